"""How a process ends before device.run: while torch is imported."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, children_of, settings, start, trained, warm

CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24  # linux/capability.h, linux/prctl.h


def wait_until(is_so, seconds):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def imports_torch(pid):
    with open(f"/proc/{pid}/maps", encoding="utf-8") as f:
        return "libtorch" in f.read()


@pytest.mark.parametrize("script", ["train.py", "eval.py", "data.py", "check.py"])
def test_ctrl_c_while_torch_is_imported_shows_no_traceback(script):
    process = start(script, "--help")
    wait_until(lambda: imports_torch(process.pid), 60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # --help may have been faster than the signal
    assert errors == "" and process.returncode in (-signal.SIGINT, 0)


def test_a_python_without_torch_is_told_which_to_take():
    """As python3 eval.py is, beside .venv."""
    hidden = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'eval.py'; "
    hidden += "runpy.run_path('eval.py', run_name='__main__')"
    command = [sys.executable, "-c", hidden, "--ckpt", "runs/none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == (
        f"error: {sys.executable} has no torch; run .venv/bin/python, which `make setup` makes\n"
    )


@pytest.mark.slow
def test_replicas_that_are_being_started_end_with_their_parent(dataset, tmp_path):
    more = ["device.processes=12", "device.backend=cpu"]
    process = start(
        "train.py", "--config", "configs/demo.yaml", *settings(dataset, tmp_path), *more
    )
    wait_until(lambda: len(children_of(process.pid)) >= 12, 120)
    children = children_of(process.pid)
    begun = time.monotonic()
    process.kill()
    process.communicate()
    wait_until(lambda: not any(os.path.exists(f"/proc/{child}/maps") for child in children), 100)
    # twelve imports of torch on two cores take longer
    assert time.monotonic() - begun < 6


def without_access():
    """In a child: root may write only what its permissions allow, as anyone else."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
        os._exit(99)


@pytest.mark.slow
def test_a_cache_that_holds_everything_may_be_for_reading_alone(dataset, tmp_path):
    trained(dataset)  # fills the session's cache
    cache = tmp_path / "cache"
    source = warm(dataset).partition("=")[2]
    subprocess.run(["cp", "-r", source, cache], check=True)
    subprocess.run(["chmod", "-R", "a-w", cache], check=True)

    def train(*more):
        args = ["--config", "configs/demo.yaml", *settings(dataset, tmp_path), *more]
        return subprocess.run(
            [sys.executable, "train.py", *args, f"paths.cache_dir={cache}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=without_access,
        )

    done = train()
    assert done.returncode == 0, done.stderr
    assert "features: 0 volumes encoded" in done.stdout
    # features of another kind would have to be written there
    done = train("model.pool_method=max", f"paths.run_dir={tmp_path}/max")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{cache}/features/" in done.stderr and "set paths.cache_dir" in done.stderr
    subprocess.run(["chmod", "-R", "u+w", cache], check=True)


def test_too_few_threads_or_too_little_memory_is_one_sentence():
    for error in (
        "MemoryError()",
        'RuntimeError("can\'t start new thread")',
        "RuntimeError('[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: '"
        '"can\'t allocate memory: you tried to allocate 9 bytes.")',
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
    ):
        code = f"import device, torch\ndef fail(): raise {error}\ndevice.run(fail)"
        script = [sys.executable, "-c", code]
        done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "lower data.batch_size" in done.stderr and done.stderr.count("\n") == 1
    # anything else is a fault of the program, whose place the traceback tells
    code = "import device\ndef fail(): raise RuntimeError('mine')\ndevice.run(fail)"
    script = [sys.executable, "-c", code]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "mine" in done.stderr
