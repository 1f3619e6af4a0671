"""bench/gpu.py, tried on the CPU: it must run at the first try where a GPU is lent for minutes."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT

PARTS = ["forward", "neighbours", "step", "predictions", "feature_pass"]
BARE = """
import runpy, sys
missing = "yaml", "pydantic", "tqdm", "pydicom", "imagecodecs", "fsspec", "matplotlib", "jinja2"
sys.modules |= dict.fromkeys(missing)  # None: as if they were not installed
sys.path.insert(0, "bench")
sys.argv[0] = "bench/gpu.py"
runpy.run_path("bench/gpu.py", run_name="__main__")
"""


def bench(*command):
    command = [sys.executable, *command, "--backend", "cpu", "--parts"]
    return lambda *parts: subprocess.run(
        [*command, *parts], cwd=ROOT, capture_output=True, text=True
    )


def measured(done, what):
    """The number in the row of this beginning."""
    return float(re.search(rf"^\| {re.escape(what)}.*?\| (\S+) \|", done.stdout, re.M)[1])


def test_every_part_measures():
    done = bench("bench/gpu.py")(*PARTS)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
    assert measured(done, "forward, batch 2: volumes/s") > 0
    assert measured(done, "batch 2 against alone, fp32: difference of the tokens") < 1e-5
    assert measured(done, "training step, batch 1, checkpointing on: s") > 0
    assert measured(done, "its probabilities here in fp32") < 1e-6  # it is the CPU
    assert measured(done, "its probabilities here in bf16") > 1e-6
    assert measured(done, "feature pass, 4 cached volumes: volumes/s") > 0


def test_torch_numpy_and_scikit_learn_are_enough():
    done = bench("-c", BARE)("forward", "step", "predictions", "feature_pass", "runs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert measured(done, "its probabilities here in fp32") < 1e-6
    assert measured(done, "feature pass, 4 cached volumes: volumes/s") > 0
    assert "| runs: skipped | needs yaml, pydantic, tqdm, pydicom" in done.stdout


def test_a_part_that_fails_is_named_and_the_others_are_measured(tmp_path):
    broken = BARE.replace("runpy.run_path", "import model; model.pool = None; runpy.run_path")
    done = bench("-c", broken)("step", "forward")
    assert done.returncode == 1 and "not met: step failed" in done.stderr
    assert "| step: failed | 'NoneType' object is not callable |" in done.stdout
    assert measured(done, "forward, batch 2: volumes/s") > 0


def test_without_a_gpu_it_says_so():
    command = [sys.executable, "bench/gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: no GPU is here; --backend=cpu")


@pytest.mark.slow
def test_runs_are_compared_and_resumed():
    done = bench("bench/gpu.py")("runs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert measured(done, "demo: largest difference of a probability") == 0  # it is the CPU
    assert measured(done, "fine-tuning resumed") < 1e-5
