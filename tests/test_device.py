import csv
import glob
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    TUNE,
    children_of,
    content,
    copy_of,
    predictions,
    quick,
    read_bytes,
    read_run,
    settings,
    start,
    trained,
    warm,
    write_bytes,
)

import device
import ledger
import model
import train

# a quick probe with an MLP and dropout, for their random numbers must agree too
MLP = ["device.backend=cpu", "data.batch_size=7", "model.head.hidden=8"]


def arguments(root, folder, *more):
    return ["--config", "configs/demo.yaml", *settings(root, folder), *MLP, *more]


def run(root, folder, *more, timeout=400):
    """train.py in a process of its own -> what it printed."""
    process = start("train.py", *arguments(root, folder, *more))
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0 and "resource_tracker" not in errors, errors
    return output


def tune(root, folder, *more):
    """Fine-tuning in a process of its own."""
    args = ["--config", "configs/demo.yaml", *settings(root, folder), warm(root), *TUNE, *more]
    process = start("train.py", *args)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ----------------------------------------------------------------------- one result of any number


@pytest.mark.parametrize(
    "processes",
    [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_any_number_of_processes_gives_one_result(written, tmp_path, processes):
    alone = trained(written, *MLP)
    output = run(written, tmp_path, f"device.processes={processes}")  # with a cache of its own
    a, b = predictions(alone), predictions(tmp_path)
    assert a.shape == b.shape and np.array_equal(a[:, :2], b[:, :2])
    assert np.abs(a - b).max() < 1e-5
    assert len(b) < 16  # with 16, a split smaller than the number of processes
    # rank 0 alone prints
    assert f" on {processes} x cpu" in output
    assert output.count("features: ") == 1 and output.count("epoch   1/6") == 1
    provenance = json.loads(content(f"{tmp_path}/run/provenance.json"))
    assert provenance["world_size"] == processes
    one, many = (read_run(quick(written, folder))[0][0] for folder in (alone, tmp_path))
    assert one.keys() == many.keys()
    assert all(one[k] == pytest.approx(many[k], abs=1e-5) for k in one)
    assert content(f"{tmp_path}/run/ledger.csv") == content(f"{alone}/run/ledger.csv")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 5])
def test_processes_do_not_change_a_fine_tuning_run(written, tmp_path, processes):
    alone = trained(written, *TUNE, "train.save_every=2")
    tune(written, tmp_path, f"device.processes={processes}")
    assert np.abs(predictions(tmp_path) - predictions(alone)).max() < 1e-5
    (one, _, last), (many, _, other) = (
        read_run(quick(written, folder)) for folder in (alone, tmp_path)
    )
    assert all((other["encoder"][k] - v).abs().max() <= 1e-5 for k, v in last["encoder"].items())
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a)


@pytest.mark.slow
def test_a_stratified_epoch_is_the_same_for_any_number_of_processes(written, tmp_path):
    more = ["data.sampler=stratified", "train.class_weights=none", "train.epochs=2"]
    alone = trained(written, *TUNE, *more)
    tune(written, tmp_path, *more, "device.processes=3")
    assert np.abs(predictions(alone) - predictions(tmp_path)).max() < 1e-5


@pytest.mark.slow
def test_focal_and_weights_are_those_of_the_whole_batch(written, tmp_path):
    """Class weights, padding and the loss: three processes that share uneven batches."""
    more = ["train.loss=focal", "train.class_weights=[1,2,3,10]", "data.batch_size=5"]
    alone = trained(written, *MLP, *more)
    run(written, tmp_path, warm(written), *more, "device.processes=3")
    assert np.abs(predictions(alone) - predictions(tmp_path)).max() < 1e-5


@pytest.mark.slow
def test_eval_in_several_processes(written, tmp_path):
    copy, results = copy_of(trained(written, *MLP), tmp_path), []
    for processes in (1, 3):
        more = [f"device.processes={processes}", f"paths.cache_dir={tmp_path}/{processes}"]
        process = start("eval.py", "--ckpt", copy, "--split", "test", *more)
        output, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        assert output.count("no alarms") + output.count("ALARM") >= 1
        result = json.loads(content(f"{copy}/eval_test.json"))
        results.append((predictions(tmp_path, "test"), result))
    assert np.array_equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    rows = [row for row in rows_of(f"{copy}/ledger.csv") if row["split"] == "test"]
    assert len(results[0][0]) == sum(row["status"] == "used" for row in rows)


@pytest.mark.slow
def test_an_unreadable_volume_of_one_replica_is_everybodys(dataset, tmp_path):
    bad = [s.path for s in ledger.read(quick(dataset, tmp_path, *MLP)).of("train")[3:5]]
    for path in bad:
        write_bytes(path, path.encode())
    # one for each replica: only together are they too many
    allowed = arguments(dataset, tmp_path, "device.processes=2", "data.max_missing=1")
    process = start("train.py", *allowed)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and not os.path.exists(f"{tmp_path}/run")
    assert "2 volumes cannot be read, and data.max_missing is 1" in errors
    output = run(dataset, tmp_path, "device.processes=2", "data.max_missing=2")
    assert "2 volumes could not be read and were left out" in output
    assert all(path in output for path in bad)
    alone = tmp_path / "alone"
    run(dataset, alone, "data.max_missing=2")
    assert np.abs(predictions(tmp_path) - predictions(alone)).max() < 1e-5
    a, b = (
        {row["participant_id"]: row["volumes"] for row in rows_of(f"{folder}/run/ledger.csv")}
        for folder in (tmp_path, alone)
    )
    assert a == b


# ---------------------------------------------------------------------- what replicas do together


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
    expected = [{{"rank": r, "ü": [r] * r}} for r in range(world)]
    assert device.gather({{"rank": rank, "ü": [rank] * rank}}, dev) == expected
    values = torch.linspace(-1, 1, 11).exp()
    total = device.all_sum(values * (rank == world - 1))
    assert torch.equal(total, values)  # zeros change no bit
    with device.alone():
        assert device.world() == 1 and device.gather(rank, dev) == [rank]
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(layer.weight, 0.5)
    layer(torch.full((1, 3), float(rank + 1))).sum().backward()
    device.all_sum_gradients(layer.parameters())
    assert layer.weight.grad.tolist() == [[world * (world + 1) / 2] * 3] * 2
    assert layer.bias.grad.tolist() == [world] * 2
    device.barrier(dev)
    print("rank", rank)


if __name__ == "__main__":
    settings = SimpleNamespace(backend="cpu", processes=int(sys.argv[1]))
    device.run(lambda: device.launch(main, SimpleNamespace(device=settings)))
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_what_replicas_do_together(tmp_path, processes):
    (tmp_path / "script.py").write_text(REPLICAS)
    script = [sys.executable, tmp_path / "script.py", str(processes)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "rank 0\n", "")


# ---------------------------------------------------------------------------- a replica that dies


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
    settings = SimpleNamespace(backend="cpu", processes=3)
    device.run(lambda: device.launch(main, SimpleNamespace(device=settings)))
"""


def descendants(pid):
    found = children_of(pid) if os.path.exists(f"/proc/{pid}") else []
    return found + [d for child in found for d in descendants(child)]


def wait_for_end(pids, seconds):
    """Those of the processes that are still there after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.1)
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize(
    "how, code, message, has_traceback",
    [
        ("raise ValueError('no such thing')", 1, "error: no such thing\n", False),
        pytest.param(
            "raise RuntimeError('a bug')", 1, "RuntimeError: a bug\n", True, marks=pytest.mark.slow
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            1,
            "error: replica 1 of 3 was ended by SIGKILL, out of memory perhaps; "
            "lower device.processes\n",
            False,
        ),
        pytest.param("sys.exit(7)", 7, "", False, marks=pytest.mark.slow),
    ],
    ids=["an error of the user's", "a bug", "killed", "an exit status"],
)
@pytest.mark.slow
def test_the_others_end_with_it(tmp_path, how, code, message, has_traceback):
    (tmp_path / "script.py").write_text(DIES.format(root=ROOT, how=how))
    process = start(tmp_path / "script.py")
    process.stdout.readline()
    family, began = descendants(process.pid), time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < 15
    assert process.returncode == code and errors.endswith(message)
    # the first alone, not what the others saw of it
    assert ("Traceback" in errors) == has_traceback and errors.count("rror: ") <= 1
    assert len(family) >= 3 and not wait_for_end(family, 5)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_nobody_outlives_the_parent(tmp_path, number):
    (tmp_path / "script.py").write_text(DIES.format(root=ROOT, how="pass"))
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(tmp_path / "script.py", preexec_fn=listen)
    process.stdout.readline()
    family = descendants(process.pid)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode != 0 and len(family) >= 3 and not wait_for_end(family, 10)


@pytest.mark.slow
def test_a_killed_replica_leaves_nothing_in_the_way(written, tmp_path):
    more = ["device.processes=2", "data.num_workers=1"]
    long = ["train.epochs=2000", "train.early_stopping.enabled=false"]
    process = start("train.py", *arguments(written, tmp_path, *more, *long))
    deadline = time.monotonic() + 60
    while not glob.glob(f"{tmp_path}/cache/volumes/*.npy") and time.monotonic() < deadline:
        time.sleep(0.02)
    family, children = descendants(process.pid), children_of(process.pid)
    command_of = lambda pid: read_bytes(f"/proc/{pid}/cmdline")
    os.kill(next(pid for pid in children if b"spawn_main" in command_of(pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and "was ended by SIGKILL" in errors
    assert not wait_for_end(family, 10)
    run(written, tmp_path, *more)
    assert np.abs(predictions(tmp_path) - predictions(trained(written, *MLP))).max() < 1e-5


@pytest.mark.slow
def test_sigterm_to_all_processes_saves_though_decoders_get_it_too(written, tmp_path):
    more = [*TUNE, "data.num_workers=1", "data.cache_gb=0", "train.epochs=40"]
    args = ["--config", "configs/demo.yaml", *settings(written, tmp_path), *more]
    process = start("train.py", *args, start_new_session=True)
    for line in process.stdout:
        if line.startswith("epoch   2/40"):
            os.killpg(process.pid, signal.SIGTERM)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM after" in output


# ---------------------------------------------------------------------------------- checkpointing


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    encoder, volume = model.load_encoder(TINY).train(), torch.randn(3, 1, 16, 64, 64)
    encoder.drop_path = 0.5
    gradients, calls = [], []
    checkpoint = device.checkpointing(torch.device("cpu"))
    for recompute in (None, lambda *args: calls.append(1) or checkpoint(*args)):
        encoder.checkpoint = recompute
        encoder.zero_grad()
        tokens = encoder(volume, model.Noise(7, torch.tensor([0, 2, 3]), 5))
        tokens.square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert len(calls) == 2 and all(torch.equal(a, b) for a, b in zip(*gradients))


def test_checkpointing_is_used_where_asked_for(written, tmp_path, monkeypatch):
    calls = []

    def checkpointing(dev):
        return lambda block, *args: calls.append(1) or block(*args)

    monkeypatch.setattr(device, "checkpointing", checkpointing)
    train.main(0, quick(written, tmp_path, *TUNE, "train.epochs=2"))
    # one epoch of 58 volumes, ten a step, four at once; the last ones are padding
    blocks, micro_batches = 2, 6 * 3
    assert len(calls) == blocks * micro_batches
    more = ["train.epochs=2", "train.activation_checkpointing=false"]
    train.main(0, quick(written, tmp_path, *TUNE, *more))
    assert len(calls) == blocks * micro_batches


# ------------------------------------------------------------------------------------- printing


PRINTED = "0.5 ± 0.1\n\t\x1b[2J\u202e測\n"
ARRIVED = b"0.5 \\xb1 0.1\n\t\\x1b[2J\\u202e\\u6e2c\n"


@pytest.mark.parametrize("how", ["alone", "a replica"])
def test_printing_ends_no_command_and_gives_no_orders(monkeypatch, how):
    """On a terminal that knows no letter but ASCII's."""
    terminal = io.BytesIO()
    with monkeypatch.context() as patch:
        ascii_alone = io.TextIOWrapper(terminal, encoding="ascii", write_through=True)
        patch.setattr(sys, "stdout", ascii_alone)
        if how == "alone":
            device.run(lambda: print(PRINTED, end=""))
        else:
            device.quietly(lambda rank, cfg: print(PRINTED, end=""), 0, None)
    assert terminal.getvalue() == ARRIVED


def test_an_error_gives_no_orders_either():
    def fail():
        raise ValueError("participant \x1b[2J is there twice")

    with pytest.raises(SystemExit) as exit_:
        device.run(fail)
    assert exit_.value.code == r"error: participant \x1b[2J is there twice"
