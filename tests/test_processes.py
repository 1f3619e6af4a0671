"""One result whatever the number of processes; what happens when one of them dies; and going on after a kill."""

import csv
import glob
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, settings
from test_stream import children_of, content, start

import config
import data


def overrides(root, folder, *more):
    """A probe on CPU with folders of its own; dropout and an MLP, for their random numbers must agree too."""
    return [*settings(root, folder), "device.backend=cpu", "data.batch_size=7", "model.head.hidden=8", *more]


def train(root, folder, *more):
    run = start("train.py", "--config", "configs/demo.yaml", *overrides(root, folder, *more))
    output, errors = run.communicate(timeout=150)
    assert run.returncode == 0 and "resource_tracker" not in errors, errors
    return output


def predictions(folder, split="val"):
    return np.genfromtxt(f"{folder}/run/predictions_{split}.csv", delimiter=",", skip_header=1)


@pytest.fixture(scope="module")
def alone(written, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(written, folder)
    return folder


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_one_result(written, alone, tmp_path, processes):
    output = train(written, tmp_path, f"device.processes={processes}")
    a, b = predictions(alone), predictions(tmp_path)
    assert a.shape == b.shape and np.array_equal(a[:, :2], b[:, :2]) and np.abs(a - b).max() < 1e-5
    assert len(b) < 16  # with 16, a split smaller than the number of processes
    # rank 0 alone prints
    assert f" on {processes} x cpu" in output and output.count("features: ") == 1 and output.count("epoch   1/6") == 1
    assert json.load(open(f"{tmp_path}/run/provenance.json"))["world_size"] == processes
    one, many = (json.loads(open(f"{folder}/run/metrics.jsonl").readline()) for folder in (alone, tmp_path))
    assert one.keys() == many.keys() and all(one[k] == pytest.approx(many[k], abs=1e-5) for k in one)
    assert content(f"{tmp_path}/run/ledger.csv") == content(f"{alone}/run/ledger.csv")


@pytest.mark.slow
def test_eval_in_several_processes(written, alone, tmp_path):
    results = []
    for processes in (1, 3):
        run = start("eval.py", "--ckpt", f"{alone}/run", "--split", "test", f"device.processes={processes}",
                    f"paths.cache_dir={tmp_path}/{processes}")
        output, errors = run.communicate(timeout=100)
        assert run.returncode == 0 and output.count("no alarms") + output.count("ALARM") >= 1, errors
        results.append((predictions(alone, "test"), json.load(open(f"{alone}/run/eval_test.json"))))
    assert np.array_equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert len(results[0][0]) == sum(row["split"] == "test" and row["status"] == "used"
                                     for row in csv.DictReader(open(f"{alone}/run/ledger.csv")))


@pytest.mark.slow
def test_an_unreadable_volume_of_one_replica_is_everybodys(dataset, alone, tmp_path):
    bad = [s.path for s in data.read_ledger(
        config.load(os.path.join(ROOT, "configs", "demo.yaml"), overrides(dataset, tmp_path))).of("train")[3:5]]
    for path in bad:
        open(path, "wb").write(path.encode())
    run = start("train.py", "--config", "configs/demo.yaml", *overrides(dataset, tmp_path, "device.processes=2", "data.max_missing=1"))
    output, errors = run.communicate(timeout=100)  # one for each replica: only together are they too many
    assert run.returncode == 1 and "2 volumes cannot be read, and data.max_missing is 1" in errors and not os.path.exists(f"{tmp_path}/run")
    output = train(dataset, tmp_path, "device.processes=2", "data.max_missing=2")
    assert "2 volumes could not be read and were left out" in output and all(path in output for path in bad)
    alone_too = tmp_path / "alone"
    train(dataset, alone_too, "data.max_missing=2")
    assert np.abs(predictions(tmp_path) - predictions(alone_too)).max() < 1e-5
    rows = [{r["participant_id"]: r["volumes"] for r in csv.DictReader(open(f"{folder}/run/ledger.csv"))}
            for folder in (tmp_path, alone_too)]
    assert rows[0] == rows[1]


REPLICAS = f"""
import sys
sys.path.insert(0, {ROOT!r})
import torch
import device
from types import SimpleNamespace


def main(rank, cfg):
    world, dev = device.world(), torch.device("cpu")
    assert rank == device.rank()
    for n, size in ((5, 5), (1, 7), (7, 7), (4, 8), (0, 3)):
        share = device.share(torch.arange(n), size)
        assert len(share) == -(-size // world)  # of one length, whatever n
        everybody = sum(device.gather(share.tolist(), dev), [])
        assert sorted(i for i in everybody if i >= 0) == list(range(n))  # each exactly once
    assert device.gather({{"rank": rank, "ü": [rank] * rank}}, dev) == [{{"rank": r, "ü": [r] * r}} for r in range(world)]
    values = torch.linspace(-1, 1, 11).exp()
    assert torch.equal(device.all_sum(values * (rank == world - 1)), values)  # zeros change no bit
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, 0.5)
    layer(torch.full((1, 3), float(rank + 1))).sum().backward()
    device.all_sum_gradients(layer.parameters())
    assert layer.weight.grad.tolist() == [[world * (world + 1) / 2] * 3] * 2 and layer.bias.grad.tolist() == [world] * 2
    device.barrier(dev)
    print("rank", rank)


if __name__ == "__main__":
    device.run(lambda: device.launch(main, SimpleNamespace(device=SimpleNamespace(backend="cpu", processes=int(sys.argv[1])))))
"""


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_what_replicas_do_together(tmp_path, processes):
    (tmp_path / "script.py").write_text(REPLICAS)
    done = subprocess.run([sys.executable, tmp_path / "script.py", str(processes)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "rank 0\n", "")


# ---------------------------------------------------------------------------------------------------- a replica that dies


DIES = """
import sys, time, os, signal
sys.path.insert(0, {root!r})
import device, torch
from types import SimpleNamespace


def main(rank, cfg):
    print("started", flush=True)
    if rank == 1:
        time.sleep(0.5)
        {how}
    device.gather(rank, torch.device("cpu"))
    time.sleep(600)


if __name__ == "__main__":
    device.run(lambda: device.launch(main, SimpleNamespace(device=SimpleNamespace(backend="cpu", processes=3))))
"""


def descendants(pid):
    found = children_of(pid) if os.path.exists(f"/proc/{pid}") else []
    return found + [d for child in found for d in descendants(child)]


def wait_for_end(pids, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.1)
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("how, code, message, traceback", [
    ("raise ValueError('no such thing')", 1, "error: no such thing\n", False),
    ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug\n", True),
    ("os.kill(os.getpid(), signal.SIGKILL)", 1,
     "error: replica 1 of 3 was ended by SIGKILL, out of memory perhaps; lower device.processes\n", False),
    pytest.param("sys.exit(7)", 7, "", False, marks=pytest.mark.slow),
])
def test_the_others_end_with_it(tmp_path, how, code, message, traceback):
    (tmp_path / "script.py").write_text(DIES.format(root=ROOT, how=how))
    run = start(tmp_path / "script.py")
    run.stdout.readline()
    family, began = descendants(run.pid), time.monotonic()
    _, errors = run.communicate(timeout=30)
    assert time.monotonic() - began < 15 and run.returncode == code and errors.endswith(message)
    assert ("Traceback" in errors) == traceback and errors.count("rror: ") <= 1  # the first alone, not what the others saw of it
    assert len(family) >= 3 and not wait_for_end(family, 5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_nobody_outlives_the_parent(tmp_path, number):
    (tmp_path / "script.py").write_text(DIES.format(root=ROOT, how="pass"))
    run = start(tmp_path / "script.py", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    run.stdout.readline()
    family = descendants(run.pid)
    run.send_signal(number)
    run.communicate(timeout=20)
    assert run.returncode != 0 and len(family) >= 3 and not wait_for_end(family, 10)


@pytest.mark.slow
def test_a_killed_replica_leaves_nothing_in_the_way(written, alone, tmp_path):
    arguments = overrides(written, tmp_path, "device.processes=2", "data.num_workers=1", "train.epochs=2000",
                          "train.early_stopping.enabled=false")
    run = start("train.py", "--config", "configs/demo.yaml", *arguments)
    deadline = time.monotonic() + 60
    while not glob.glob(f"{tmp_path}/cache/volumes/*.npy") and time.monotonic() < deadline:
        time.sleep(0.02)
    family = descendants(run.pid)
    replica = next(pid for pid in children_of(run.pid) if b"spawn_main" in open(f"/proc/{pid}/cmdline", "rb").read())
    os.kill(replica, signal.SIGKILL)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 1 and "was ended by SIGKILL" in errors and not wait_for_end(family, 10)
    train(written, tmp_path, "device.processes=2", "data.num_workers=1")
    assert np.abs(predictions(tmp_path) - predictions(alone)).max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------- resuming


LONG = ["train.epochs=60", "train.resume=auto", "train.early_stopping.patience=1000"]


def same_run(a, b):
    """Bit for bit: tables, and all that the checkpoints hold but the paths."""
    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x if k != "paths")
        return len(x) == len(y) and all(map(equal, x, y)) if isinstance(x, (list, tuple)) else x == y
    assert content(f"{a}/run/predictions_val.csv") == content(f"{b}/run/predictions_val.csv")
    assert content(f"{a}/run/metrics.jsonl") == content(f"{b}/run/metrics.jsonl")
    for name in ("last.pt", "best_checkpoint_during_training.pt"):
        assert equal(torch.load(f"{a}/run/{name}", weights_only=True), torch.load(f"{b}/run/{name}", weights_only=True)), name


@pytest.fixture(scope="module")
def uninterrupted(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(written, folder, *LONG)
    return folder


KILLED_IN_SAVE = """
import os, runpy, signal, sys
calls, move, last = 0, os.replace, int(sys.argv[1])
def replace(source, target):
    global calls
    calls += f"{os.sep}run{os.sep}" in str(target)
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)  # all is written, under its temporary name
    move(source, target)
os.replace = replace
del sys.argv[0]
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(written, uninterrupted, command, tmp_path, seed):
    """Killed at a random moment, and (the odd ones) in the midst of a save."""
    chance, arguments = random.Random(seed), ["--config", "configs/demo.yaml", *overrides(written, tmp_path, *LONG)]
    if seed % 2:
        run = subprocess.Popen([sys.executable, "-c", KILLED_IN_SAVE, str(chance.randrange(20, 100)), *arguments], cwd=ROOT,
                               stdout=subprocess.DEVNULL)
    else:
        run, epochs = start("train.py", *arguments), chance.randrange(2, 40)
        for line in run.stdout:
            if line.startswith(f"epoch {epochs:3d}/60"):
                time.sleep(chance.uniform(0, 0.02))
                break
        run.kill()
    run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL
    killed = torch.load(f"{tmp_path}/run/last.pt", weights_only=True)["epoch"]
    assert 0 < killed < 60
    resumed = command("train.py", *arguments)
    assert (resumed.returncode == 0 and f"resuming after epoch {killed} of " in resumed.stdout
            and resumed.stdout.count("  train loss ") == 60 - killed)
    same_run(tmp_path, uninterrupted)
    assert [r["after_epoch"] for r in json.load(open(f"{tmp_path}/run/provenance.json"))["resumed"]] == [killed]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits_and_another_world_goes_on(written, uninterrupted, tmp_path, processes):
    run = start("train.py", "--config", "configs/demo.yaml", *overrides(written, tmp_path, *LONG, f"device.processes={processes}"))
    for line in run.stdout:
        if line.startswith("epoch   5/60"):
            run.terminate()
            break
    output, errors = run.communicate(timeout=30)
    assert run.returncode == 128 + signal.SIGTERM, errors
    epoch = torch.load(f"{tmp_path}/run/last.pt", weights_only=True)["epoch"]
    assert f"stopped by SIGTERM after epoch {epoch}; train.resume=auto goes on from there" in output and 5 <= epoch < 60
    output = train(written, tmp_path, *LONG, f"device.processes={3 - processes}")
    assert f"resuming after epoch {epoch} of" in output
    assert np.abs(predictions(tmp_path) - predictions(uninterrupted)).max() < 1e-5


def test_a_finished_run_is_left_as_it_is(written, command, tmp_path):
    assert command("train.py", "--config", "configs/demo.yaml", *overrides(written, tmp_path)).returncode == 0
    before = {path: open(path, "rb").read() for path in glob.glob(f"{tmp_path}/run/*.*") if "provenance" not in path}
    output = command("train.py", "--config", "configs/demo.yaml", *overrides(written, tmp_path, "train.resume=auto")).stdout
    assert "resuming after epoch 6 of" in output and "  train loss " not in output and "best: epoch" in output
    assert before == {path: open(path, "rb").read() for path in before}


@pytest.mark.parametrize("change, message", [
    (["train.lr_head=0.1", "seed=7"], "seed 42 -> 7; train.lr_head 0.003 -> 0.1; set that back, or set train.resume=never"),
    (["data.batch_size=8"], "data.batch_size 7 -> 8"),
    (["model.encoder=target"], "model.encoder context -> target"),
])
def test_a_change_that_would_change_the_result_is_refused(written, alone, command, change, message):
    before = content(f"{alone}/run/metrics.jsonl")
    run = command("train.py", "--config", "configs/demo.yaml", *overrides(written, alone, "train.resume=auto", *change))
    errors = run.stderr
    assert (run.returncode == 1
            and errors.splitlines()[-1].startswith(f"error: {alone}/run holds a run whose result this would change: ")
            and message in errors)
    assert content(f"{alone}/run/metrics.jsonl") == before


def test_another_data_set_is_no_resumption(dataset, alone, command):
    path = data.read_ledger(config.load(os.path.join(ROOT, "configs", "demo.yaml"), overrides(dataset, alone))).of("train")[0].path
    os.remove(path)  # one of the volumes of a participant, then all
    result = command("train.py", "--config", "configs/demo.yaml", *overrides(dataset, alone, "train.resume=auto"))
    assert result.returncode == 1 and "would change: volumes is another; set that back" in result.stderr
    for name in os.listdir(os.path.dirname(path)):
        os.remove(os.path.join(os.path.dirname(path), name))
    result = command("train.py", "--config", "configs/demo.yaml", *overrides(dataset, alone, "train.resume=auto", "data.max_missing=1"))
    assert result.returncode == 1 and "train_participants is another" in result.stderr


@pytest.mark.slow
def test_focal_and_weights_are_those_of_the_whole_batch(written, tmp_path):
    """Class weights, padding and the loss: three processes that share uneven batches."""
    more = ["train.loss=focal", "train.class_weights=[1,2,3,10]", "data.batch_size=5"]
    train(written, tmp_path / "one", *more)
    train(written, tmp_path / "three", *more, "device.processes=3")
    assert np.abs(predictions(tmp_path / "one") - predictions(tmp_path / "three")).max() < 1e-5
