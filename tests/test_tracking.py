import csv
import glob
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT, content, read_bytes, read_predictions, settings
from sklearn.metrics import balanced_accuracy_score

import metrics


def run(root, folder, mode, **variables):
    """train.py in a process of its own, without the developer's own account."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"HOME": str(folder), **variables}
    arguments = ["--config", "configs/demo.yaml", *settings(root, folder), f"log.wandb={mode}"]
    script = [sys.executable, "train.py", *arguments]
    return subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=env)


def records(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, pieces in
    blocks of 32 KiB."""
    log, at, whole = read_bytes(path), 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:  # no piece begins so close to a block's end
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


@pytest.fixture(scope="module")
def offline(written, tmp_path_factory):
    """What a run with log.wandb=offline left: its folder, its W&B folder, the records of history
    (list), summary (dict), run."""
    folder = tmp_path_factory.mktemp("offline")
    job = run(written, folder, "offline")
    assert job.returncode == 0, job.stderr
    from wandb.proto import wandb_internal_pb2

    (path,) = glob.glob(f"{folder}/run/wandb/offline-run-*/run-*.wandb")
    found = SimpleNamespace(run=f"{folder}/run", wandb=os.path.dirname(path))
    found.history, found.summary = [], {}
    name_of = lambda item: item.key or "/".join(item.nested_key)
    for message in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.HasField("history"):
            items = record.history.item
            found.history.append({name_of(item): json.loads(item.value_json) for item in items})
        if record.HasField("summary"):
            items = record.summary.update
            found.summary |= {name_of(item): json.loads(item.value_json) for item in items}
        if record.HasField("run"):
            found.info = record.run
    return found


def tables(offline):
    """{file name: table} of what was logged as tables."""
    paths = glob.glob(f"{offline.wandb}/files/media/table/**/*.json", recursive=True)
    return {os.path.basename(path): json.loads(content(path)) for path in paths}


def test_wandb_knows_the_run_by_name_group_and_tags(offline):
    info = offline.info
    assert info.display_name == "demo_linear_probe" and info.run_group == "vjepa3d_tiny"
    assert {"probe", "network", "mean", "topcon_triton"} <= set(info.tags)
    assert info.project == "3d-oct-foundation-model"


def test_wandb_has_every_epoch(offline):
    epochs = [json.loads(line) for line in content(f"{offline.run}/metrics.jsonl").splitlines()]
    logged = [h for h in offline.history if "epoch" in h]
    for h, e in zip(logged, epochs, strict=True):
        assert {name for name in h if not name.startswith("_")} == set(e)
        assert all(h[name] == pytest.approx(e[name]) for name in e)


def test_an_epochs_scores_have_their_part_as_prefix(offline):
    epoch = next(h for h in offline.history if "epoch" in h)
    names = {name for name in epoch if not name.startswith("_")} - {"epoch", "best"}
    assert {name.split("/")[0] for name in names} == {"train", "val", "gap"}
    assert {"val/f1_0", "val/predicted_share_3"} <= names


def test_wandbs_summary_has_scores_intervals_and_alarms(offline):
    ids, y, p = read_predictions(f"{offline.run}/predictions_val.csv")
    expected, summary = metrics.evaluate(y, p, 4, ids), offline.summary
    score = balanced_accuracy_score(y, p.argmax(1))
    assert summary["best/val/balanced_accuracy"] == pytest.approx(score)
    interval = [summary[f"best/val/balanced_accuracy_{end}"] for end in ("low", "high")]
    assert interval == pytest.approx(expected["ci95"]["balanced_accuracy"])
    assert set(expected["alarms"]) <= set(summary["alarms"])


def test_wandb_has_the_ledger(offline):
    table = next(t for name, t in tables(offline).items() if name.startswith("ledger"))
    with open(f"{offline.run}/ledger.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert table["columns"] == header and table["data"] == rows


def test_wandb_has_the_confusion_matrix_and_the_roc_curves(offline):
    _, y, _ = read_predictions(f"{offline.run}/predictions_val.csv")
    found = tables(offline)
    confusion = next(t for name, t in found.items() if "confusion" in name)
    assert sum(row[-1] for row in confusion["data"]) == len(y)
    assert any("roc" in name for name in found)


@pytest.mark.slow
def test_without_a_key_auto_is_offline(written, tmp_path):
    result = run(written, tmp_path, "auto")
    assert result.returncode == 0, result.stderr
    (path,) = glob.glob(f"{tmp_path}/run/wandb/offline-run-*/run-*.wandb")
    log = read_bytes(path)
    names = [b"val/balanced_accuracy", b"demo_linear_probe", b"3d-oct-foundation-model"]
    assert all(name in log for name in names)


@pytest.fixture()
def without_wandb(tmp_path):
    """Environment variables with which wandb cannot be imported."""
    (tmp_path / "no_wandb").mkdir()
    (tmp_path / "no_wandb" / "wandb.py").write_text("raise ImportError('not installed')\n")
    return {"PYTHONPATH": str(tmp_path / "no_wandb")}


@pytest.mark.slow
def test_without_wandb_a_run_can_do_without_it(written, tmp_path, without_wandb):
    assert run(written, tmp_path, "disabled", **without_wandb).returncode == 0


@pytest.mark.slow
def test_without_wandb_the_error_says_what_to_install(written, tmp_path, without_wandb):
    refused = run(written, tmp_path, "auto", **without_wandb)
    assert refused.returncode == 1
    assert "pip install wandb, or set log.wandb=disabled" in refused.stderr
