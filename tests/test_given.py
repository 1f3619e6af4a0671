"""features.npz: written from a run, and read in place of an encoder."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, content, settings, tables, triton


@pytest.fixture(scope="module")
def exported(written, tmp_path_factory):
    """A run's folder parent, and the features.npz of all its volumes."""
    folder = tmp_path_factory.mktemp("exported")
    train = ["train.py", "--config", "configs/demo.yaml", *settings(written, folder)]
    score = ["eval.py", "--ckpt", f"{folder}/run", "--split"]
    export = [*score, "all", "--export", f"{folder}/features.npz"]
    for script in (train, [*score, "test"], export):
        done = subprocess.run(
            [sys.executable, *script], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "exported:" in done.stdout and os.path.exists(f"{folder}/features.npz")
    return folder


def savez(path, **arrays):
    """np.savez_compressed, which cannot write an array called file."""
    if "file" in arrays:
        arrays["filepath"] = arrays.pop("file")
    np.savez_compressed(path, **arrays)


def arrays_of(path):
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def test_an_export_has_every_volume_with_its_label_and_split(exported, written):
    found, (people, manifest) = arrays_of(exported / "features.npz"), tables(written)
    assert sorted(found) == ["file", "label", "participant", "split", "x"]
    expected = {m["filepath"].lstrip("/"): m["participant_id"] for m in triton(manifest)}
    assert dict(zip(found["file"].tolist(), found["participant"].tolist())) == expected
    split_of = {p["participant_id"]: p["recommended_split"] for p in people}
    assert [split_of[i] for i in found["participant"].tolist()] == found["split"].tolist()
    assert found["x"].dtype == np.float32 and found["x"].shape == (len(expected), 128)


def run_of(written, folder, path, *more):
    """Arguments of train.py with features in place of an encoder, in which no volume is there."""
    given = [f"paths.features={path}", "model.emb_dim=null", "paths.checkpoint_path=null"]
    return [*("--config", "configs/demo.yaml"), *settings(written, folder), *given, *more]


def scored(command, arguments, folder):
    done = command("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    done = command("eval.py", "--ckpt", folder / "run", "--split", "test")
    assert done.returncode == 0, done.stderr
    with open(folder / "run" / "predictions_test.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture()
def only_tables(written, tmp_path):
    """The data set's tables, without any volume."""
    root = tmp_path / "tables"
    for name in ("participants.tsv", "retinal_oct/manifest.tsv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content(written / name))
    return root


def test_features_in_place_of_an_encoder_give_the_same_run(
    exported, only_tables, tmp_path, command
):
    rows = scored(command, run_of(only_tables, tmp_path, exported / "features.npz"), tmp_path)
    with open(exported / "run" / "predictions_test.csv", newline="") as f:
        expected = list(csv.DictReader(f))
    assert [row["participant_id"] for row in rows] == [row["participant_id"] for row in expected]
    for row, other in zip(rows, expected):
        assert all(abs(float(row[f"p{k}"]) - float(other[f"p{k}"])) < 1e-6 for k in range(4))
    result = json.loads(content(tmp_path / "run" / "eval_test.json"))
    other = json.loads(content(exported / "run" / "eval_test.json"))
    assert result["volumes"] == other["volumes"]
    assert result["encoder_sha256"] != other["encoder_sha256"]
    done = command("eval.py", "--compare", exported / "run", tmp_path / "run")
    assert done.returncode == 0 and "no difference" in done.stdout


def test_features_of_participants_need_no_file(exported, only_tables, tmp_path, command):
    found = arrays_of(exported / "features.npz")
    people = list(dict.fromkeys(found["participant"].tolist()))
    mean = np.stack([found["x"][found["participant"] == i].mean(axis=0) for i in people])
    savez(tmp_path / "mine.npz", participant=np.array([int(i) for i in people]), x=mean)
    rows = scored(command, run_of(only_tables, tmp_path, tmp_path / "mine.npz"), tmp_path)
    result = json.loads(content(tmp_path / "run" / "eval_test.json"))
    assert result["volumes"] == result["n"] == len(rows)


def test_tokens_are_for_an_attentive_head_or_are_pooled(exported, only_tables, tmp_path, command):
    found = arrays_of(exported / "features.npz")
    tokens = np.stack([found["x"], -found["x"], found["x"] ** 2], axis=1)  # (n, 3, C)
    savez(tmp_path / "tokens.npz", **{**found, "x": tokens})
    for method in ("attentive", "mean"):
        more = [f"model.pool_method={method}", "train.epochs=2"]
        path = tmp_path / "tokens.npz"
        scored(command, run_of(only_tables, tmp_path, path, *more), tmp_path)
    more = ["model.pool_method=attentive"]
    done = command("train.py", *run_of(only_tables, tmp_path, exported / "features.npz", *more))
    assert done.returncode == 1 and "needs tokens (n, T, C)" in done.stderr


def test_who_has_no_features_is_missing(exported, only_tables, tmp_path, command):
    found = arrays_of(exported / "features.npz")
    victim = found["participant"][0]
    kept = found["participant"] != victim
    savez(tmp_path / "some.npz", **{key: values[kept] for key, values in found.items()})
    arguments = run_of(only_tables, tmp_path, tmp_path / "some.npz")
    done = command("train.py", *arguments)
    assert done.returncode == 1 and f"participant {victim} (" in done.stderr
    assert "without a row in" in done.stderr and "data.max_missing=1" in done.stderr
    assert command("train.py", *arguments, "data.max_missing=1").returncode == 0


def test_a_run_on_features_is_not_scored_on_others(exported, only_tables, tmp_path, command):
    found = arrays_of(exported / "features.npz")
    savez(tmp_path / "a.npz", **found)
    assert command("train.py", *run_of(only_tables, tmp_path, tmp_path / "a.npz")).returncode == 0
    savez(tmp_path / "a.npz", **{**found, "x": found["x"] + 1})
    done = command("eval.py", "--ckpt", tmp_path / "run")
    assert done.returncode == 1 and "the head was trained on" in done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("x"), "has no array 'x'"),
        (lambda a: a.pop("participant"), "has no array 'participant'"),
        (lambda a: a.update(x=a["x"][:, 0]), "not numbers (n, C) or (n, T, C)"),
        (lambda a: a.update(x=a["x"][:-1]), "rows, and participant is"),
        (lambda a: a.update(x=a["x"] * np.nan), "(row 0) is not finite"),
        (lambda a: a.update(x=a["x"].astype(str)), "not numbers"),
        (lambda a: a.update(file=np.repeat(a["file"][:1], len(a["x"]))), "has several rows of"),
        (lambda a: a.update(participant=a["participant"].astype(object)), "is no features.npz"),
        (lambda a: a.update(x=np.zeros((len(a["x"]), 200000))), "would inflate to"),
    ],
)
def test_what_is_no_features_file_is_one_sentence(
    exported, only_tables, tmp_path, command, change, message
):
    found = arrays_of(exported / "features.npz")
    change(found)
    savez(tmp_path / "bad.npz", **found)
    done = command("train.py", *run_of(only_tables, tmp_path, tmp_path / "bad.npz"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.unfreeze_at_epoch=1"], "model.unfreeze_at_epoch needs an encoder"),
        (["eval.floors=true", "train.sweep.lr_head=[0.1]"], "eval.floors=true needs an encoder"),
        (["data.augment.flip=true"], "data.augment needs an encoder"),
        (["model.emb_dim=7"], "are 128 wide; set model.emb_dim=null"),
        (["paths.features=nowhere.npz"], "paths.features=nowhere.npz is not there"),
    ],
)
def test_what_features_cannot_give_is_named(
    exported, only_tables, tmp_path, command, overrides, message
):
    arguments = run_of(only_tables, tmp_path, exported / "features.npz", *overrides)
    done = command("train.py", *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
