"""What the benches share: the command line, figures and what is required of them, time, memory,
and processes of their own.

Import it before the repository's own files, which it puts on sys.path. Benches run in its root.
"""

import argparse
import contextlib
import inspect
import multiprocessing
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.chdir(ROOT)
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
MISSED = []  # requirements that are not met


def bench(doc, **parts):
    """The command line of a bench: a part, whose keywords are options. Exit status 1 where a
    requirement is not met."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    commands = parser.add_subparsers(dest="part", required=True)
    for name, part in parts.items():
        command = commands.add_parser(name)
        for option, parameter in inspect.signature(part).parameters.items():
            default = parameter.default
            kind = dict(type=type(default), default=default)
            if isinstance(default, tuple):
                kind |= dict(type=type(default[0]), nargs="+")
            command.add_argument(f"--{option}", **kind)
    args = vars(parser.parse_args([*(parts if len(parts) == 1 else ()), *sys.argv[1:]]))
    parts[args.pop("part")](**args)
    sys.exit(f"not met: {'; '.join(MISSED)}" if MISSED else 0)


def row(*cells):
    """A row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def figure(what, measured, at_most=None, at_least=None):
    """A row of the table of figures: what is measured, the number, what is required of it."""
    required = [f"at most {at_most:g}"] if at_most is not None else []
    required += [f"at least {at_least:g}"] if at_least is not None else []
    row(what, f"{measured:.3g}", *required)
    is_met = at_most is None or measured <= at_most
    if not is_met or at_least is not None and measured < at_least:
        MISSED.append(what)


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
