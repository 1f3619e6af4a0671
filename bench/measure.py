"""What the benches share: times, memory, processes of their own, tables, requirements.

Import it before the repository's own files, which it puts on sys.path. Benches run in its root.
"""

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.chdir(ROOT)
sys.path.insert(0, ROOT)
MISSED = []  # requirements that are not met


def bench(doc, parts, options=None):
    """A bench's command line: runs one of its parts {name: function of args}; exit status 1 where
    a requirement is not met. options: {name: arguments of add_argument}."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument("part", choices=parts, nargs="?" if len(parts) == 1 else None)
    for name, arguments in (options or {}).items():
        parser.add_argument(name, **arguments)
    args = parser.parse_args()
    parts[args.part or min(parts)](args)
    sys.exit(f"not met: {'; '.join(MISSED)}" if MISSED else 0)


def require(what, is_met):
    if not is_met:
        MISSED.append(what)


def header(*names):
    """The head of a Markdown table."""
    row(*names)
    print("|---" * len(names) + "|", flush=True)


def row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def check(what, measured, required, is_met):
    """A row, and a requirement."""
    row(what, measured, required)
    require(what, is_met)


def timed(job, *args):
    """-> seconds, result. What the job prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        began = time.perf_counter()
        result = job(*args)
        return time.perf_counter() - began, result


def script(*command):
    """Run one of the repository's scripts -> the lines that it prints, as they come."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")


def of_process(file, name):
    """The number behind `name:` in a file of /proc/self."""
    with open(f"/proc/self/{file}") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(f"{name}:"))


def peak_gb():
    """The most memory that this process has held; ru_maxrss would count its parent's too."""
    return of_process("status", "VmHWM") / 1e6


def apart(job, *args, count=1):
    """-> results of job(*args) in `count` new processes that run at the same time."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [context.Process(target=send, args=(pipe, job, args)) for _, pipe in pipes]
    for process in processes:
        process.start()
    for _, pipe in pipes:
        pipe.close()  # now recv notices when the process dies
    try:
        return [pipe.recv() for pipe, _ in pipes]
    except EOFError:
        sys.exit(f"the process of {job.__name__}{args} failed")
    finally:
        for process in processes:
            process.join()


def send(pipe, job, args):
    with contextlib.redirect_stdout(sys.stderr):
        pipe.send(job(*args))
