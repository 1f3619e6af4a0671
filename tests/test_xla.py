"""The probe through xmp.spawn on torch_xla's CPU device: the same predictions as the plain CPU run. Runs in .venv-xla (make test-xla)."""

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
from conftest import ROOT, settings

pytest.importorskip("torch_xla", reason="needs torch_xla: make test-xla")


def probe(written, tmp_path, backend, *overrides):
    folder = tmp_path / backend  # a cache of its own: features must come from this backend
    folder.mkdir()
    outputs = []
    for script in (["train.py", "--config", "configs/demo.yaml", *settings(written, folder), f"device.backend={backend}", *overrides],
                   ["eval.py", "--ckpt", str(folder / "run"), "--split", "test"]):
        done = subprocess.run([sys.executable, *script], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PJRT_DEVICE": "CPU"})
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "volumes encoded, 0 from" in outputs[0]
    read = lambda split: np.genfromtxt(folder / "run" / f"predictions_{split}.csv", delimiter=",", skip_header=1)
    return outputs[0], read("val"), read("test")


TUNE = ["model.unfreeze_at_epoch=1", "model.drop_path=0.1", "model.head.hidden=8", "train.epochs=3", "data.batch_size=13",
        "train.micro_batch=4", "train.grad_clip=1", "data.augment.flip=true", "data.augment.rotation=true"]


@pytest.mark.parametrize("overrides", [[], ["model.pool_method=max", "train.loss=focal", "model.head.hidden=16", "data.batch_size=7"],
                                       TUNE],
                         ids=["linear", "variant", "fine-tuning"])
def test_xla_gives_the_predictions_of_the_plain_cpu_run(written, tmp_path, overrides):
    xla, *xla_predictions = probe(written, tmp_path, "xla", *overrides)
    cpu, *cpu_predictions = probe(written, tmp_path, "cpu", *overrides)
    assert " on xla (CPU)" in xla and " on cpu" in cpu
    for a, b in zip(xla_predictions, cpu_predictions):
        assert a.shape == b.shape and np.array_equal(a[:, :2], b[:, :2])
        assert np.abs(a[:, 2:] - b[:, 2:]).max() <= 1e-4


def test_the_job_goes_through_spawn(monkeypatch):
    import torch_xla.distributed.xla_multiprocessing as xmp

    import config
    import device

    calls = []
    monkeypatch.setattr(xmp, "spawn", lambda replica: calls.append((type(replica), replica.main, replica.cfg)))
    monkeypatch.setattr(device.threading, "Thread", lambda **named: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(device.signal, "signal", lambda *args: None)
    cfg = config.load(os.path.join(ROOT, "configs", "demo.yaml"))
    assert device.choose("auto") == "xla"
    device.launch(print, cfg)
    assert calls == [(device.ReplicaXla, print, cfg)]
    cfg.device.processes = 2
    with pytest.raises(ValueError, match="on XLA there is a replica for every core: set device.processes=1"):
        device.launch(print, cfg)


COUNT = """
import sys, json
import torch_xla.debug.metrics as met
import config, device, train
compiled, step_done, epoch = [], device.step_done, device.sigterm
def counting(dev):
    step_done(dev)
    compiled.append((met.metric_data("CompileTime") or [0])[0])
device.step_done = counting
train.main(0, config.load("configs/demo.yaml", sys.argv[1:]))
print("COMPILED", json.dumps(compiled))
"""


def test_nothing_is_compiled_after_the_first_steps(written, tmp_path):
    """Uneven batches, early stopping's counter, a changing learning rate: shapes and graph stay the same."""
    overrides = [*settings(written, tmp_path), "device.backend=xla", "data.batch_size=13", "train.epochs=6", "model.head.hidden=8"]
    done = subprocess.run([sys.executable, "-c", COUNT, *overrides], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PJRT_DEVICE": "CPU"}, check=False)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.split("COMPILED")[1])
    volumes = int(done.stdout.split("features: ")[1].split()[0])
    steps = (len(compiled) - volumes) // 6
    encoding, first, later = compiled[:volumes], compiled[volumes:volumes + steps], compiled[volumes + steps:]
    assert steps * 6 + volumes == len(compiled) and steps >= 4
    assert len(set(encoding[2:])) == 1  # eval of the encoder, one volume a time
    assert len(set(first[2:])) == 1  # training, with the last batch that is not full
    assert len(set(later[2:])) == 1  # from the second epoch on, predictions of val and train between them


def test_fine_tuning_compiles_nothing_after_its_first_steps(written, tmp_path):
    """Micro-batches with padding, drop-path, checkpointing, augmentation, and validation between the epochs."""
    overrides = [*settings(written, tmp_path), "device.backend=xla", *TUNE, "model.freeze_encoder=false", "model.unfreeze_at_epoch=-1"]
    done = subprocess.run([sys.executable, "-c", COUNT, *overrides], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PJRT_DEVICE": "CPU"}, check=False)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.split("COMPILED")[1])
    volumes = int(done.stdout.split("features: ")[1].split()[0])
    with open(tmp_path / "run" / "ledger.csv") as f:
        val = sum(int(line.split(",")[4]) for line in f if ",val," in line)
    steps = 4 * math.ceil((volumes - val) / 13)  # four micro-batches a step: 4, 4, 4 and one with three of padding
    first, rest = compiled[volumes:volumes + steps], compiled[volumes + steps:]
    assert len(rest) == 2 * steps + 3 * val
    assert len(set(first[8:])) == 1  # training
    assert set(rest[:val]) == {first[-1]}  # validation: the same graph as in the feature pass
    assert len(set(rest[val:])) == 1  # from the second epoch on; between them, the end of the first


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
    reductions = torch_xla._XLAC._get_xla_tensors_hlo([layer.weight.grad]).count(" all-reduce(")  # lowered, never run: not supported here
    sys.stdout.write("SAID " + json.dumps([device.rank(), device.world(), device.share(torch.arange(37), 40).tolist(), reductions]) + "\\n")
if __name__ == "__main__":
    xmp.spawn(main)
"""


def test_sixteen_replicas_share_a_batch_and_their_step_holds_the_reduction(tmp_path):
    (tmp_path / "shards.py").write_text(SHARDS)
    done = subprocess.run([sys.executable, tmp_path / "shards.py"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
                          env={**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "16", "PYTHONPATH": ROOT})
    said = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert sorted(rank for rank, *_ in said) == list(range(16)), done.stderr
    assert sorted(i for *_, share, _ in said for i in share if i >= 0) == list(range(37))
    assert {(world, len(share), reductions) for _, world, share, reductions in said} == {(16, 3, 1)}


def test_attention_never_holds_all_scores():
    import torch
    import torch_xla

    import model

    q, k, v = (torch.randn(1, 2, 1300, 64) for _ in range(3))
    here = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    there = model.attend(*(t.to(torch_xla.device()) for t in (q, k, v))).cpu()
    assert (here - there).abs().max() < 1e-5
    q, k, v = (torch.zeros(1, 12, 9216, 64, device=torch_xla.device()) for _ in range(3))
    shapes = set(re.findall(r"f32\[([\d,]+)\]", torch_xla._XLAC._get_xla_tensors_hlo([model.attend(q, k, v)])))
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest == 12 * 512 * 9216 and "1,12,9216,64" in shapes


def test_an_error_under_spawn_is_one_sentence(written, tmp_path):
    done = subprocess.run([sys.executable, "train.py", "--config", "configs/demo.yaml", *settings(written, tmp_path),
                           "device.backend=xla", "paths.checkpoint_path=/none.pt"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PJRT_DEVICE": "CPU"})
    assert done.returncode == 1 and "error: paths.checkpoint_path=/none.pt is not there" in done.stderr and "Traceback" not in done.stderr


def test_bf16_runs(written, tmp_path):
    probe(written, tmp_path, "xla", "train.precision=bf16")


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
    pjrt.plugins.using_dynamic_plugins = lambda: True
    pjrt.plugins.default = lambda: SimpleNamespace(physical_chip_count=lambda: 3)  # three processes, each with a CPU device
    device.run(lambda: device.launch(main, SimpleNamespace(device=SimpleNamespace(backend="xla", processes=1))))
"""


@pytest.mark.parametrize("how, message", [("os.kill(os.getpid(), signal.SIGKILL)", ""),
                                          ("device.world = lambda: 3; raise ValueError('no such thing')", "error: no such thing")])
def test_the_others_of_a_host_end_with_a_replica_that_dies(tmp_path, how, message):
    (tmp_path / "dies.py").write_text(DIES.format(how=how))
    began = time.monotonic()
    done = subprocess.run([sys.executable, tmp_path / "dies.py"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
                          env={**os.environ, "PJRT_DEVICE": "CPU", "PYTHONPATH": ROOT})
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert time.monotonic() - began < 40 and not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).stdout


def test_sigterm_saves_and_a_resumed_run_equals_the_uninterrupted(written, tmp_path):
    """In the thread of a child process, as on a TPU; within an epoch of fine-tuning."""
    def command(folder):
        return [sys.executable, "train.py", "--config", "configs/demo.yaml", *settings(written, folder), "device.backend=xla",
                "train.resume=auto", *TUNE, "train.save_every=1", "train.epochs=2"]

    env = {**os.environ, "PJRT_DEVICE": "CPU"}
    run = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    for line in run.stdout:
        if line.startswith("epoch   1/2"):
            time.sleep(0.5)
            run.terminate()
            break
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM and re.search(r"stopped by SIGTERM after step \d of epoch 2", output), output + errors
    for folder in (tmp_path, tmp_path / "whole"):
        done = subprocess.run(command(folder), cwd=ROOT, capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
    a, b = (np.genfromtxt(folder / "run" / "predictions_val.csv", delimiter=",", skip_header=1)
            for folder in (tmp_path, tmp_path / "whole"))
    assert np.abs(a - b).max() < 1e-5
