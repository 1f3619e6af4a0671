"""What eval.py says beyond the scores: groups, calibration, floors, alarms; what it refuses; what W&B gets."""

import csv
import glob
import json
import os
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import ROOT, edit, settings
from scipy.optimize import minimize
from sklearn.metrics import balanced_accuracy_score, log_loss
from test_train import read_predictions, read_run

import data
import eval as evaluation
import metrics
import train


def table(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f, delimiter="\t" if str(path).endswith("tsv") else ","))


@pytest.fixture()
def run(written, configure):
    cfg = configure(written, "train.epochs=3")
    train.main(0, cfg)
    return cfg


def test_groups_are_those_of_the_tables(run, written):
    result, folder = evaluation.evaluate_run(run.paths.run_dir, "val")
    ids, y, p = read_predictions(f"{folder}/predictions_val.csv")
    people = {row["participant_id"]: row for row in table(written / "participants.tsv")}
    for name, of in (("site", lambda row: row["clinical_site"]),
                     ("age", lambda row: f"{int(float(row['age'])) // 10 * 10} to {int(float(row['age'])) // 10 * 10 + 9}")):
        members = defaultdict(list)
        for n, i in enumerate(ids):
            members[of(people[i])].append(n)
        assert {g["group"]: g["n"] for g in result["subgroups"][name]} == {group: len(rows) for group, rows in members.items()}
        for g in result["subgroups"][name]:
            rows = members[g["group"]]
            assert g["balanced_accuracy"] == pytest.approx(
                np.mean([(p[rows].argmax(1) == y[rows])[y[rows] == k].mean() for k in np.unique(y[rows])])) and g["small"]
    assert [g["group"] for g in result["subgroups"]["scanner"]] == ["topcon_triton"]
    sides = [row["laterality"] for row in table(written / "retinal_oct" / "manifest.tsv") if row["participant_id"] in ids
             and "topcon_triton" in row["filepath"] and row["anatomic_region"] == run.data.anatomic_region]
    assert (sum(g["n"] for g in result["subgroups"]["laterality"]) <= len(sides)
            and {g["group"] for g in result["subgroups"]["laterality"]} == set(sides))
    assert result["per_volume"]["n"] == len(sides) == result["volumes"] and result["per_volume"]["participants"] == len(ids)
    trained = [int(row["label"]) for row in table(f"{folder}/ledger.csv") if row["split"] == "train" and row["status"] == "used"]
    prior = np.bincount(trained, minlength=4) / len(trained)
    # of answering with training's shares
    assert result["random"]["accuracy"] == pytest.approx((prior * np.bincount(y, minlength=4) / len(y)).sum())


def test_an_age_that_is_no_number_is_its_own_group():
    assert [evaluation.age_band(age) for age in ("49", "50.5", "", "n/a")] == ["40 to 49", "50 to 59", "unknown", "unknown"]


def test_the_temperature_is_fitted_on_validation_of_the_same_checkpoint(run):
    _, y, p = read_predictions(f"{run.paths.run_dir}/predictions_val.csv")
    flat = lambda p, T: p ** (1 / T) / (p ** (1 / T)).sum(axis=1, keepdims=True)
    best = minimize(lambda t: log_loss(y, flat(p, np.exp(t[0])), labels=range(4)), [0.0]).x[0]
    os.remove(f"{run.paths.run_dir}/predictions_val.csv")  # the checkpoint itself knows
    result, folder = evaluation.evaluate_run(run.paths.run_dir, "test")
    assert result["temperature"] == pytest.approx(min(max(np.exp(best), 0.05), 20), rel=1e-2)
    _, y, p = read_predictions(f"{folder}/predictions_test.csv")
    assert result["calibrated"]["log_loss"] == pytest.approx(log_loss(y, flat(p, result["temperature"]), labels=range(4)))
    assert result["log_loss"] == pytest.approx(log_loss(y, p, labels=range(4)))


def test_a_config_that_was_edited_is_refused(run):
    edit(f"{run.paths.run_dir}/config.yaml", lambda text: text.replace("lr_head: 0.003", "lr_head: 0.5"))
    with pytest.raises(ValueError, match="config.yaml is not what this checkpoint was trained with: train.lr_head 0.003 -> 0.5; "
                                         "set that back, or train again"):
        evaluation.evaluate_run(run.paths.run_dir, "test")


def test_overfitting_raises_an_alarm(written, configure):
    cfg = configure(written, "train.epochs=40", "train.lr_head=0.05", "train.class_weights=none", "train.early_stopping.enabled=false",
                    "data.batch_size=8")
    train.main(0, cfg)
    _, best, last = read_run(cfg)
    gap = last["train_balanced_accuracy"] - last["val_balanced_accuracy"]
    assert gap > 0.2
    result, _ = evaluation.evaluate_run(f"{cfg.paths.run_dir}/last.pt", "test")
    assert any("more than 0.2 below: overfitting" in alarm for alarm in result["alarms"])


def test_floors_are_probes_on_a_random_encoder_and_on_shuffled_labels(written, configure, tmp_path, monkeypatch):
    calls = []
    fit = train.fit_heads
    monkeypatch.setattr(train, "fit_heads", lambda cfg, seed, x_train, train_, x_val, val:
                        calls.append((x_train, [s.label for s in train_], x_val, [s.label for s in val]))
                        or fit(cfg, seed, x_train, train_, x_val, val))
    cfg = configure(written, "eval.floors=true", "train.sweep.lr_head=[0.003,0.03]")
    train.main(0, cfg)
    (x, y, x_val, y_val), (x_random, y_random, _, _), (x_shuffled, y_shuffled, _, y_val_shuffled) = calls
    assert y == y_random and torch.equal(x, x_shuffled) and x.shape == x_random.shape and not torch.allclose(x, x_random)
    assert y_shuffled != y and y_val_shuffled != y_val
    people = {s.participant_id: s.label for s in data.read_ledger(cfg).of("train")}
    both = {s.participant_id: label for s, label in zip(data.read_ledger(cfg).of("train"), y_shuffled)}
    # a participant's volumes keep one label
    assert all(both[s.participant_id] == label for s, label in zip(data.read_ledger(cfg).of("train"), y_shuffled))
    assert sorted(people.values()) == sorted(both.values())
    result, folder = evaluation.evaluate_run(cfg.paths.run_dir, "test")
    assert set(result["floors"]) == {"random encoder", "shuffled labels"}
    for name, floor in result["floors"].items():
        assert (0 <= floor["balanced_accuracy"] <= 1
                and floor["difference"] == pytest.approx(result["balanced_accuracy"] - floor["balanced_accuracy"]))
        assert ((floor["p_value"] >= 0.05 or floor["difference"] <= 0)
                == any("not shown to be better" in a and name.split()[0] in a for a in result["alarms"]))
    again, _ = evaluation.evaluate_run(cfg.paths.run_dir, "test")
    assert again == result
    with pytest.raises(ValueError, match="eval.floors trains probes to compare with, and this encoder is to train"):
        configure(written, "eval.floors=true", "model.freeze_encoder=false")


def records(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, pieces in blocks of 32 KiB."""
    content, at, whole = open(path, "rb").read(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no piece begins so close to a block's end
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
        whole += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def test_wandb_holds_what_a_reader_needs(written, tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    job = subprocess.run([sys.executable, "train.py", "--config", "configs/demo.yaml", *settings(written, tmp_path), "log.wandb=offline"],
                         capture_output=True, text=True, cwd=ROOT, env=clean)
    assert job.returncode == 0, job.stderr
    from wandb.proto import wandb_internal_pb2
    path, = glob.glob(f"{tmp_path}/run/wandb/offline-run-*/run-*.wandb")
    history, summary, info = [], {}, None
    for content in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        key = lambda item: item.key or "/".join(item.nested_key)
        if record.HasField("history"):
            history.append({key(item): json.loads(item.value_json) for item in record.history.item})
        if record.HasField("summary"):
            summary |= {key(item): json.loads(item.value_json) for item in record.summary.update}
        if record.HasField("run"):
            info = record.run
    assert (info.display_name == "demo_linear_probe" and info.run_group == "vjepa3d_tiny"
            and {"probe", "network", "mean", "topcon_triton"} <= set(info.tags))
    with open(f"{tmp_path}/run/metrics.jsonl") as f:
        epochs = [json.loads(line) for line in f]
    logged = [{k: v for k, v in h.items() if not k.startswith("_")} for h in history if "epoch" in h]
    assert ([set(h) for h in logged] == [set(e) for e in epochs]
            and all(h[k] == pytest.approx(e[k]) for h, e in zip(logged, epochs) for k in e))
    assert (all(k in ("epoch", "best") or k.split("/")[0] in ("train", "val", "gap") for k in epochs[0])
            and {"val/f1_0", "val/predicted_share_3"} <= set(epochs[0]))
    ids, y, p = read_predictions(f"{tmp_path}/run/predictions_val.csv")
    expected = metrics.evaluate(y, p, 4, ids)
    assert summary["best/val/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert [summary[f"best/val/balanced_accuracy_{end}"] for end in ("low", "high")] == pytest.approx(expected["ci95"]["balanced_accuracy"])
    assert set(expected["alarms"]) <= set(summary["alarms"])
    tables = {os.path.basename(f).split("_table")[0]: json.load(open(f))
              for f in glob.glob(f"{os.path.dirname(path)}/files/media/table/**/*.json", recursive=True)}
    ledger = next(t for name, t in tables.items() if name.startswith("ledger"))
    assert ledger["columns"][0] == "participant_id" and len(ledger["data"]) == len(table(f"{tmp_path}/run/ledger.csv"))
    confusion = next(t for name, t in tables.items() if "confusion" in name)
    assert sum(row[-1] for row in confusion["data"]) == len(y)
    assert any("roc" in name for name in tables)
