"""What a script does before it imports torch, which takes seconds: say how its process may end.

if __name__ in ("__main__", "__mp_main__"):  # started by hand, or by such a process
    import begin

    begin.process()
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time

STARTED_BY = os.getppid()  # now: it may be gone when torch is imported
PARENT = "OCTPROBE_PARENT"  # variable by which a process tells those that it starts who it is


def process():
    """Until device.run: Ctrl-C ends this process without a traceback. A process that another of
    ours started leaves Ctrl-C to that one, and ends with it. Without torch, it ends now."""
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            f"error: {sys.executable} has no torch; run .venv/bin/python, which `make setup` makes"
        )
    if multiprocessing.current_process().name == "MainProcess":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_when_gone(int(os.environ[PARENT]))  # it may be dead already: getppid would not tell
    os.environ[PARENT] = str(os.getpid())


def end_when_gone(parent):
    """From now on this process ends when its parent, by its number, does."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent():
    """First thing of a process of ours whose script does not call `process`, or forked: from now
    on it ends when its parent does, however that ends."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
