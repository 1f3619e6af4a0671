"""The probe through xmp.spawn on torch_xla's CPU device: the same predictions as the plain CPU run.
Runs in .venv-xla (make test-xla)."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import AUGMENT, DEMO, ROOT, predictions, settings

pytest.importorskip("torch_xla", reason="needs torch_xla: make test-xla")

ENVIRONMENT = {**os.environ, "PJRT_DEVICE": "CPU"}
DEMO_CONFIG = ["--config", "configs/demo.yaml"]
TUNE = [
    "model.unfreeze_at_epoch=1",
    "model.drop_path=0.1",
    "model.head.hidden=8",
    "train.epochs=3",
    "data.batch_size=13",
    "train.micro_batch=4",
    "train.grad_clip=1",
    *(name for name in AUGMENT if "flip" in name or "rotation" in name),
]


def run(*script, **more):
    """python script -> the finished process, with both outputs."""
    options = {"capture_output": True, "text": True, "check": False, "env": ENVIRONMENT, **more}
    return subprocess.run([sys.executable, *map(str, script)], cwd=ROOT, **options)


# --------------------------------------------------------------------------- the same predictions


def probe(written, tmp_path, backend, *overrides):
    """Train and evaluate -> what train.py printed, predictions on val and on test."""
    folder = tmp_path / backend  # a cache of its own: features must come from this backend
    folder.mkdir()
    overrides = [*settings(written, folder), f"device.backend={backend}", *overrides]
    outputs = []
    for script in (
        ["train.py", *DEMO_CONFIG, *overrides],
        ["eval.py", "--ckpt", folder / "run", "--split", "test"],
    ):
        done = run(*script)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "volumes encoded, 0 from" in outputs[0]
    return outputs[0], predictions(folder, "val"), predictions(folder, "test")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.pool_method=max", "train.loss=focal", "model.head.hidden=16", "data.batch_size=7"],
        TUNE,
    ],
    ids=["linear", "variant", "fine-tuning"],
)
def test_xla_gives_the_predictions_of_the_plain_cpu_run(written, tmp_path, overrides):
    xla, *xla_predictions = probe(written, tmp_path, "xla", *overrides)
    cpu, *cpu_predictions = probe(written, tmp_path, "cpu", *overrides)
    assert " on xla (CPU)" in xla and " on cpu" in cpu
    for a, b in zip(xla_predictions, cpu_predictions):
        assert a.shape == b.shape and np.array_equal(a[:, :2], b[:, :2])
        assert np.abs(a[:, 2:] - b[:, 2:]).max() <= 1e-4


def test_bf16_runs(written, tmp_path):
    probe(written, tmp_path, "xla", "train.precision=bf16")


@pytest.mark.parametrize(
    "overrides",
    [["train.sweep.lr_head=[0.003,0.03]"], ["model.head.kind=knn"], ["data.cv=3"]],
    ids=["sweep", "knn", "cv"],
)
def test_heads_that_are_fitted_again_are_those_of_the_plain_cpu_run(written, tmp_path, overrides):
    """They are fitted on the CPU, on features of either backend."""
    _, *xla_predictions = probe(written, tmp_path, "xla", *overrides)
    _, *cpu_predictions = probe(written, tmp_path, "cpu", *overrides)
    for a, b in zip(xla_predictions, cpu_predictions):
        assert a.shape == b.shape and np.array_equal(a[:, :2], b[:, :2])
        assert np.abs(a[:, 2:] - b[:, 2:]).max() <= 1e-3


# -------------------------------------------------------------------------------------- launching


def test_the_job_goes_through_spawn(monkeypatch):
    import torch_xla.distributed.xla_multiprocessing as xmp

    import config
    import device

    calls = []
    spawn = lambda replica: calls.append((type(replica), replica.main, replica.cfg))
    no_thread = lambda **named: SimpleNamespace(start=lambda: None)
    monkeypatch.setattr(xmp, "spawn", spawn)
    monkeypatch.setattr(device.threading, "Thread", no_thread)
    monkeypatch.setattr(device.signal, "signal", lambda *args: None)
    cfg = config.load(DEMO)
    assert device.choose("auto") == "xla"
    device.launch(print, cfg)
    assert calls == [(device.ReplicaXla, print, cfg)]
    cfg.device.processes = 2
    message = "on XLA there is a replica for every core: set device.processes=1"
    with pytest.raises(ValueError, match=message):
        device.launch(print, cfg)


def test_an_error_under_spawn_is_one_sentence(written, tmp_path):
    more = ["device.backend=xla", "paths.checkpoint_path=/none.pt"]
    done = run("train.py", *DEMO_CONFIG, *settings(written, tmp_path), *more)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: paths.checkpoint_path=/none.pt is not there" in done.stderr


# -------------------------------------------------------------------------------------- compiling

COUNT = """
import sys, json
import torch_xla.debug.metrics as met
import config, device, train
compiled, step_done = [], device.step_done
def counting(dev):
    step_done(dev)
    compiled.append((met.metric_data("CompileTime") or [0])[0])
device.step_done = counting
train.main(0, config.load("configs/demo.yaml", sys.argv[1:]))
print("COMPILED", json.dumps(compiled))
"""


# without epoch 0, which takes no step and so has a program of its own
NO_START = "train.choose_by=balanced_accuracy"


def compiled_after(*overrides):
    """Number of programs that were compiled after each step_done of a run, of those of encoding and
    of those of training; and what the run printed."""
    done = run("-c", COUNT, *overrides, "device.backend=xla")
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.split("COMPILED")[1])
    volumes = int(done.stdout.split("features: ")[1].split()[0])
    return compiled[:volumes], compiled[volumes:]


def test_nothing_is_compiled_after_the_first_steps(written, tmp_path):
    """Uneven batches, early stopping's counter, a changing learning rate: shapes and graph stay the
    same."""
    more = ["data.batch_size=13", "train.epochs=6", "model.head.hidden=8", NO_START]
    encoding, training = compiled_after(*settings(written, tmp_path), *more)
    # step_done before a micro-batch, after the last, and after the step
    epoch, step = len(training) // 6, 3
    assert epoch * 6 == len(training) and epoch >= 4 * step
    first, later = training[:epoch], training[epoch:]
    assert len(set(encoding[2:])) == 1  # eval of the encoder, one volume a time
    # after the first step: training, with the last batch that is not full
    assert len(set(first[step - 1 :])) == 1
    # from the second epoch on, predictions of val and train between them
    assert len(set(later[2 * step - 1 :])) == 1


def test_fine_tuning_compiles_nothing_after_its_first_steps(written, tmp_path):
    """Micro-batches with padding, drop-path, checkpointing, augmentation, and validation between
    the epochs."""
    more = [*TUNE, "model.freeze_encoder=false", "model.unfreeze_at_epoch=-1", NO_START]
    encoding, training = compiled_after(*settings(written, tmp_path), *more)
    with open(tmp_path / "run" / "ledger.csv") as f:
        val = sum(int(line.split(",")[4]) for line in f if ",val," in line)
    # step_done before each of four micro-batches (4, 4, 4 and one with three of padding), after the
    # last, and after the step
    step = 4 + 2
    epoch = step * math.ceil((len(encoding) - val) / 13)
    first, rest = training[:epoch], training[epoch:]
    assert len(rest) == 2 * epoch + 3 * val
    # training, after the first step
    assert len(set(first[step - 1 :])) == 1
    assert first[-1] - first[0] == 2  # a micro-batch, and what follows the last
    assert set(rest[:val]) == {first[-1]}  # validation: the same graph as in the feature pass
    # from the second epoch on; between them, the end of the first
    assert len(set(rest[val:])) == 1


RATES = """
import torch, torch_xla
import torch_xla.debug.metrics as met
import config, heads, model
cfg = config.load("configs/base.yaml", ["train.lr_encoder=3e-5", "train.layer_decay=0.7"])
dev = torch_xla.device()
encoder = model.ViT3D(64, 6, 8).to(dev)
bank = heads.Heads(64, 4, heads.settings_of(cfg)).to(dev)
optimizer = heads.Optimizer(cfg, bank, encoder)
optimizer.prepare()
torch_xla.sync()
compiled = []
for factor in (0.02, 0.04, 0.5, 1.0, 0.3):
    optimizer.step(factor, factor)
    torch_xla.sync()
    compiled.append(met.metric_data("CompileTime")[0])
print("COMPILED", len(set(compiled)))
"""


def test_no_learning_rate_compiles_the_step_anew():
    """1 - rate * decay rounds to the same number for some layers, for others at another rate."""
    done = run("-c", RATES)
    assert "COMPILED 1\n" in done.stdout, done.stdout + done.stderr


# ------------------------------------------------------------------------------- several replicas

SHARDS = """
import sys, json
import torch
import torch_xla
import torch_xla.distributed.xla_multiprocessing as xmp
import device
def main(index):
    dev = torch_xla.device()
    layer = torch.nn.Linear(3, 2).to(dev)
    layer(torch.ones(1, 3, device=dev)).sum().backward()
    device.all_sum_gradients(layer.parameters())
    # lowered, never run: not supported here
    program = torch_xla._XLAC._get_xla_tensors_hlo([layer.weight.grad])
    said = [device.rank(), device.world(), device.share(torch.arange(37), 40).tolist()]
    said.append(program.count(" all-reduce("))
    sys.stdout.write("SAID " + json.dumps(said) + "\\n")
if __name__ == "__main__":
    xmp.spawn(main)
"""


def test_sixteen_replicas_share_a_batch_and_their_step_holds_the_reduction(tmp_path):
    (tmp_path / "shards.py").write_text(SHARDS)
    env = {**ENVIRONMENT, "CPU_NUM_DEVICES": "16", "PYTHONPATH": ROOT}
    done = run(tmp_path / "shards.py", timeout=120, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    said = [json.loads(line.split(" ", 1)[1]) for line in lines]
    assert sorted(rank for rank, *_ in said) == list(range(16)), done.stderr
    assert sorted(i for *_, share, _ in said for i in share if i >= 0) == list(range(37))
    found = {(world, len(share), reductions) for _, world, share, reductions in said}
    assert found == {(16, 3, 1)}


DIES = """
import os, signal, sys, time
import torch_xla._internal.pjrt as pjrt
import device
from types import SimpleNamespace
def main(rank, cfg):
    if os.environ["PJRT_LOCAL_PROCESS_RANK"] == "1":
        time.sleep(1)
        {how}
    time.sleep(600)
if __name__ == "__main__":
    # three processes, each with a CPU device
    pjrt.plugins.using_dynamic_plugins = lambda: True
    pjrt.plugins.default = lambda: SimpleNamespace(physical_chip_count=lambda: 3)
    settings = SimpleNamespace(backend="xla", processes=1)
    device.run(lambda: device.launch(main, SimpleNamespace(device=settings)))
"""


@pytest.mark.parametrize(
    "how, message",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", ""),
        ("device.world = lambda: 3; raise ValueError('no such thing')", "error: no such thing"),
    ],
    ids=["killed", "an error"],
)
def test_the_others_of_a_host_end_with_a_replica_that_dies(tmp_path, how, message):
    (tmp_path / "dies.py").write_text(DIES.format(how=how))
    began = time.monotonic()
    done = run(tmp_path / "dies.py", timeout=100, env={**ENVIRONMENT, "PYTHONPATH": ROOT})
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and time.monotonic() - began < 40
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False)
    assert not left.stdout


def test_sigterm_saves_and_a_resumed_run_equals_the_uninterrupted(written, tmp_path):
    """In the thread of a child process, as on a TPU; within an epoch of fine-tuning."""

    def script(folder):
        more = ["device.backend=xla", "train.resume=auto", *TUNE, "train.save_every=1"]
        return ["train.py", *DEMO_CONFIG, *settings(written, folder), *more, "train.epochs=2"]

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *script(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes)
    for line in process.stdout:
        if line.startswith("epoch   1/2"):
            time.sleep(0.5)
            process.terminate()
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output + errors
    assert re.search(r"stopped by SIGTERM after step \d of epoch 2", output), output + errors
    for folder in (tmp_path, tmp_path / "whole"):
        done = run(*script(folder))
        assert done.returncode == 0, done.stderr
    assert np.abs(predictions(tmp_path) - predictions(tmp_path / "whole")).max() < 1e-5


@pytest.mark.parametrize("backends", [("xla", "cpu"), ("cpu", "xla")], ids=" then ".join)
def test_a_run_goes_on_on_another_backend(written, tmp_path, backends):
    more = [*TUNE, "train.resume=auto", "train.epochs=3", "train.choose_by=balanced_accuracy"]
    stop = "import runs, train\nsave = runs.Run.save_epoch\n"
    stop += "def save_once(run, summary, *rest):\n    save(run, summary, *rest)\n"
    stop += "    if summary.number == 2:\n        raise SystemExit(7)\n"
    stop += "runs.Run.save_epoch = save_once\nimport config, sys\n"
    stop += "train.main(0, config.load('configs/demo.yaml', sys.argv[1:]))"
    first, second = (f"device.backend={backend}" for backend in backends)
    done = run("-c", stop, *settings(written, tmp_path), *more, first)
    assert done.returncode == 7, done.stderr
    for folder in (tmp_path, tmp_path / "whole"):
        done = run("train.py", *DEMO_CONFIG, *settings(written, folder), *more, second)
        assert done.returncode == 0, done.stderr
    assert np.abs(predictions(tmp_path) - predictions(tmp_path / "whole")).max() < 1e-4


# -------------------------------------------------------------------------------------- attention


def test_attention_is_the_same_on_xla():
    import torch
    import torch_xla

    import device

    q, k, v = (torch.randn(1, 2, 1300, 64) for _ in range(3))
    here = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    on_xla = device.attention(*(t.to(torch_xla.device()) for t in (q, k, v))).cpu()
    assert (here - on_xla).abs().max() < 1e-5


def test_attention_never_holds_all_scores():
    import torch
    import torch_xla

    import device

    q, k, v = (torch.zeros(1, 12, 9216, 64, device=torch_xla.device()) for _ in range(3))
    program = torch_xla._XLAC._get_xla_tensors_hlo([device.attention(q, k, v)])
    shapes = set(re.findall(r"f32\[([\d,]+)\]", program))
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest == 12 * 512 * 9216 and "1,12,9216,64" in shapes
