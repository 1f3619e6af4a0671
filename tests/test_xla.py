"""The probe through xmp.spawn on torch_xla's CPU device: the same predictions as the plain CPU run. Runs in .venv-xla (make test-xla)."""

import os
import subprocess
import sys

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


@pytest.mark.parametrize("overrides", [[], ["model.pool_method=max", "train.loss=focal", "model.head.hidden=16", "data.batch_size=7"]], ids=["linear", "variant"])
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
    monkeypatch.setattr(xmp, "spawn", lambda fn, args, nprocs: calls.append((fn, args, nprocs)))
    cfg = config.load(os.path.join(ROOT, "configs", "demo.yaml"))
    assert device.choose("auto") == "xla"
    device.launch(print, cfg)
    assert calls == [(print, (cfg,), 1)]


def test_an_error_under_spawn_is_one_sentence(written, tmp_path):
    done = subprocess.run([sys.executable, "train.py", "--config", "configs/demo.yaml", *settings(written, tmp_path), "device.backend=xla",
                           "paths.checkpoint_path=/none.pt"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PJRT_DEVICE": "CPU"})
    assert done.returncode == 1 and "error: paths.checkpoint_path=/none.pt is not there" in done.stderr and "Traceback" not in done.stderr


def test_bf16_runs(written, tmp_path):
    probe(written, tmp_path, "xla", "train.precision=bf16")
