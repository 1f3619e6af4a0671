import csv
import json
import os
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    ROOT,
    TINY,
    TUNE,
    assert_scores_are_scikit_learns,
    content,
    copy_of,
    edit,
    evaluate,
    quick,
    read_predictions,
    read_run,
    tables,
    trained,
    triton,
    write_bytes,
)
from scipy.optimize import minimize
from sklearn.metrics import log_loss

import data
import eval as evaluation
import ledger
import metrics
import model
import report
import runs
import train

SPLITS = pytest.mark.parametrize("split", ["val", "test"])


@pytest.fixture(scope="module")
def scored(written, tmp_path_factory):
    """{split: result} of a run, and its folder."""
    run = copy_of(trained(written, "train.epochs=3"), tmp_path_factory.mktemp("scored"))
    return {split: evaluate(run, split)[0] for split in ("val", "test")}, run


# ------------------------------------------------------------------------------ scores and tables


@SPLITS
def test_every_participant_of_the_split_with_oct_is_scored(scored, written, split):
    ids, y, _ = read_predictions(f"{scored[1]}/predictions_{split}.csv")
    people = {row["participant_id"]: row for row in tables(written)[0]}
    of_split = [
        i
        for i, row in people.items()
        if row["recommended_split"] == split and row["retinal_oct"] == "TRUE"
    ]
    assert sorted(ids) == sorted(of_split)
    assert [CLASSES[k] for k in y] == [people[i]["study_group"] for i in ids]


@SPLITS
def test_the_scores_are_scikit_learns(scored, split):
    _, y, p = read_predictions(f"{scored[1]}/predictions_{split}.csv")
    assert_scores_are_scikit_learns(scored[0][split], y, p)


@SPLITS
def test_a_result_is_what_the_file_says(scored, split):
    result = json.loads(content(f"{scored[1]}/eval_{split}.json"))
    assert result == scored[0][split]
    names = {"majority_baseline", "chance_band", "ci95", "predicted_counts", "alarms"}
    assert names | {"confusion_matrix"} <= set(result)


def test_random_answers_are_those_of_trainings_shares(scored):
    results, run = scored
    with open(f"{run}/ledger.csv", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["status"] == "used"]
    trained_on = [int(row["label"]) for row in rows if row["split"] == "train"]
    prior = np.bincount(trained_on, minlength=4) / len(trained_on)
    _, y, _ = read_predictions(f"{run}/predictions_val.csv")
    expected = (prior * np.bincount(y, minlength=4) / len(y)).sum()
    assert results["val"]["random"]["accuracy"] == pytest.approx(expected)


# ----------------------------------------------------------------------------------------- groups


def decade(row):
    low = int(float(row["age"])) // 10 * 10
    return f"{low} to {low + 9}"


@pytest.mark.parametrize(
    "name, group_of",
    [("site", lambda row: row["clinical_site"]), ("age", decade)],
    ids=["site", "age"],
)
def test_groups_are_those_of_the_tables(scored, written, name, group_of):
    results, run = scored
    ids, y, p = read_predictions(f"{run}/predictions_val.csv")
    people = {row["participant_id"]: row for row in tables(written)[0]}
    members, groups = defaultdict(list), results["val"]["subgroups"][name]
    for n, i in enumerate(ids):
        members[group_of(people[i])].append(n)
    assert {g["group"]: g["n"] for g in groups} == {g: len(rows) for g, rows in members.items()}
    for g in groups:
        rows = members[g["group"]]
        right = p[rows].argmax(1) == y[rows]
        recalls = [right[y[rows] == k].mean() for k in np.unique(y[rows])]
        assert g["balanced_accuracy"] == pytest.approx(np.mean(recalls)) and g["small"]


def test_the_scanner_is_a_group(scored):
    groups = scored[0]["val"]["subgroups"]["scanner"]
    assert [g["group"] for g in groups] == ["topcon_triton"]


def test_sides_are_groups_and_every_volume_is_scored(scored, written):
    results, run = scored
    ids, _, _ = read_predictions(f"{run}/predictions_val.csv")
    manifest = triton(tables(written)[1])
    sides = [row["laterality"] for row in manifest if row["participant_id"] in ids]
    result, groups = results["val"], results["val"]["subgroups"]["laterality"]
    assert {g["group"] for g in groups} == set(sides)
    assert sum(g["n"] for g in groups) <= len(sides)
    assert result["per_volume"]["n"] == len(sides) == result["volumes"]
    assert result["per_volume"]["participants"] == len(ids)


@pytest.mark.parametrize(
    "age, band",
    [
        ("49", "40 to 49"),
        ("50.5", "50 to 59"),
        ("", "unknown"),
        ("n/a", "unknown"),
        ("inf", "unknown"),
        ("1e400", "unknown"),
    ],
)
def test_an_age_that_is_no_number_is_its_own_group(age, band):
    assert evaluation.age_band(age) == band


# ------------------------------------------------------------------------------------ calibration


def flattened(p, T):
    return p ** (1 / T) / (p ** (1 / T)).sum(axis=1, keepdims=True)


def test_the_temperature_is_fitted_on_validation_of_the_same_checkpoint(written, tmp_path):
    run = copy_of(trained(written, "train.epochs=3"), tmp_path)
    _, y, p = read_predictions(f"{run}/predictions_val.csv")
    loss = lambda t: log_loss(y, flattened(p, np.exp(t[0])), labels=range(4))
    best = minimize(loss, [0.0]).x[0]
    os.remove(f"{run}/predictions_val.csv")  # the checkpoint itself knows
    result, _ = evaluate(run, "test")
    assert result["temperature"] == pytest.approx(min(max(np.exp(best), 0.05), 20), rel=1e-2)


def test_calibrated_scores_are_of_the_flattened_answers(scored):
    results, run = scored
    _, y, p = read_predictions(f"{run}/predictions_test.csv")
    result = results["test"]
    expected = log_loss(y, flattened(p, result["temperature"]), labels=range(4))
    assert result["calibrated"]["log_loss"] == pytest.approx(expected)
    assert result["log_loss"] == pytest.approx(log_loss(y, p, labels=range(4)))


# -------------------------------------------------------------------------- damage in the folder


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("eval_val.json", b"", r"eval_val.json is damaged \(.*\); run eval.py --ckpt .* val"),
        ("eval_val.json", b"[]", r"eval_val.json is damaged \(it holds no JSON object\); run eval"),
        ("eval_val.json", b'{"split": "val"}', "eval_val.json was edited, .*; run eval.py --ckpt"),
        ("metrics.jsonl", b"text", r"metrics.jsonl is damaged \(.*\); remove it"),
        (
            "metrics.jsonl",
            b"17",
            r"metrics.jsonl is damaged \(it holds no JSON object\); remove it",
        ),
        (
            "metrics.jsonl",
            b'{"epoch": 1, "train/loss": "low"}',
            r"metrics.jsonl is damaged \(low is no number\); remove it",
        ),
        ("metrics.jsonl", b"[" * 100_000, r"metrics.jsonl is damaged \(.*\); remove it"),
        ("metrics.jsonl", b'{"epoch": NaN}', r"metrics.jsonl is damaged \(NaN is no finite number"),
        ("provenance.json", b"null", r"provenance.json is damaged \(.*\); remove it"),
        (
            "provenance.json",
            b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
            r"provenance.json is damaged \(.*\); remove it",
        ),
        ("ledger.csv", b"\xff", "ledger.csv is not a CSV table in UTF-8: .*; remove it"),
        ("ledger.csv", b"a,b\n1,2\n", "ledger.csv has no column participant_id, .*; remove it"),
        (
            "config.yaml",
            b"\xff",
            "config.yaml is not a run's configuration: Unicode.*; train again",
        ),
        ("config.yaml", b"seed: !!timestamp x", "config.yaml is not a run's conf.*; train again"),
        ("config.yaml", b"seed: 2026-99-99", "config.yaml is not a run's conf.*; train again"),
    ],
)
def test_a_damaged_file_of_the_folder_is_named(written, tmp_path, name, damage, message):
    run = copy_of(trained(written, "train.epochs=3"), tmp_path)
    write_bytes(f"{run}/{name}", damage)
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate_run(run, "test")


def test_a_run_that_lacks_its_ledgers_columns_is_named(written, tmp_path):
    """A table that another program has rewritten."""
    run = copy_of(trained(written, "train.epochs=3"), tmp_path)
    evaluate(run, "test")
    write_bytes(f"{run}/ledger.csv", b"split,label,status,reason\ntest,0,used,\n")
    with pytest.raises(
        ValueError, match="ledger.csv has no column participant_id, volumes; remove"
    ):
        report.write_report(run)


def test_success_says_what_to_do_next(written, tmp_path, command):
    run = copy_of(trained(written, "train.epochs=3"), tmp_path)
    job = command("eval.py", "--ckpt", run, "--split", "test")
    *_, where, then = job.stdout.splitlines()
    run = os.path.relpath(run)
    assert where == f"report: {run}/report.html"
    assert then.endswith(f"eval.py --compare {run} OTHER_RUN --split test")


SCRIPTS = ["train.py", "eval.py", "data.py", "check.py", "phantom.py"]
SCRIPTS += [f"scripts/{name}" for name in os.listdir(f"{ROOT}/scripts") if name.endswith(".py")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_starts_nothing(command, tmp_path, monkeypatch, script):
    before = set(os.listdir())
    job = command(script, "--help")
    assert job.returncode == 0 and job.stdout.startswith("usage:") and not job.stderr
    assert set(os.listdir()) == before


# ------------------------------------------------------------------------------- which checkpoint


def test_the_last_checkpoint_does_not_pass_for_the_best(written, tmp_path):
    more = ["train.epochs=15", "train.lr_head=0.02", "train.early_stopping.enabled=false"]
    run = copy_of(trained(written, *more), tmp_path)
    _, best, last = read_run(quick(written, tmp_path))
    before = content(f"{run}/predictions_val.csv")
    result, folder = evaluate(f"{run}/last.pt", "val")
    assert result["epoch"] == 15 != best["epoch"] and folder == f"{run}/last"
    assert result["log_loss"] == pytest.approx(last["val_loss"])
    assert os.path.exists(f"{folder}/eval_val.json")
    assert not os.path.exists(f"{run}/eval_val.json")
    assert content(f"{run}/predictions_val.csv") == before


@pytest.fixture()
def tuned(written, tmp_path):
    """The folder of a fine-tuning run."""
    return copy_of(trained(written, *TUNE, "train.save_every=2"), tmp_path)


def test_the_best_of_a_fine_tuning_run_is_scored_with_its_encoder(written, tuned, tmp_path):
    history, best, _ = read_run(quick(written, tmp_path))
    before = read_predictions(f"{tuned}/predictions_val.csv")[2]
    result, _ = evaluate(tuned, "val")
    assert np.array_equal(before, read_predictions(f"{tuned}/predictions_val.csv")[2])
    assert result["epoch"] == best["epoch"] > 1
    lowest = min(record["val/loss"] for record in history)
    assert result["log_loss"] == pytest.approx(lowest)


def test_predictions_of_a_fine_tuned_encoder_computed_by_hand(written, tuned, tmp_path):
    cfg = quick(written, tmp_path)
    best, encoder, answers = read_run(cfg)[1], model.load_encoder(TINY), {}
    encoder.load_state_dict(best["encoder"])
    head = best["head"]
    for s in ledger.read(cfg).of("val"):
        x = data.preprocess(data.read_dicom(s.path), (16, 64, 64)).half().float()
        with torch.no_grad():
            feature = (encoder(x[None, None])[0].mean(0) - head["mean"]) / head["std"]
            hidden = feature @ head["hidden_weight"][0].T + head["hidden_bias"][0]
            logits = torch.nn.functional.gelu(hidden) @ head["weight"][0].T + head["bias"][0]
        answers.setdefault(s.participant_id, []).append(logits.softmax(0).numpy())
    ids, _, p = read_predictions(f"{tuned}/predictions_val.csv")
    assert np.abs(p - np.stack([np.mean(answers[i], axis=0) for i in ids])).max() < 1e-5


def test_the_last_of_a_fine_tuning_run_is_scored_with_its_encoder(written, tuned, tmp_path):
    last = read_run(quick(written, tmp_path))[2]
    result, _ = evaluate(f"{tuned}/last.pt", "val")
    assert result["log_loss"] == pytest.approx(last["val_loss"]) and result["epoch"] == 3


def test_a_fine_tuned_encoder_that_lacks_a_weight_is_refused(tuned, tmp_path):
    last = torch.load(f"{tuned}/last.pt", weights_only=True)
    del last["encoder"]["norm.bias"]
    torch.save(last, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="broken.pt: not loaded: .*norm.bias"):
        evaluate(str(tmp_path / "broken.pt"), "val")


# ----------------------------------------------------------------------------------------- alarms


def with_training(written, tmp_path, **changes):
    """A run whose checkpoint says something else of training, and of 40 validation participants,
    of whom a quarter is right."""
    run = copy_of(trained(written), tmp_path)
    saved = torch.load(f"{run}/{runs.BEST}", weights_only=True)
    saved["training"] |= changes
    p, ids = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 40).double(), [f"val {i}" for i in range(40)]
    saved["val_predictions"] = {"participant_id": ids, "y_true": [0, 1, 2, 3] * 10, "p": p}
    torch.save(saved, f"{run}/{runs.BEST}")
    return run


def test_validation_far_below_left_out_training_raises_an_alarm(written, tmp_path):
    run = with_training(written, tmp_path, left_out=(100 * np.eye(4, dtype=int)).tolist())
    alarms = evaluate(run, "test")[0]["alarms"]
    assert any("each left out of the fit, and " in alarm for alarm in alarms)


def test_a_head_that_answers_the_opposite_of_training_raises_an_alarm(written, tmp_path):
    run = with_training(written, tmp_path, trained=(20 * np.eye(4, dtype=int)[::-1]).tolist())
    alarms = evaluate(run, "test")[0]["alarms"]
    assert any("balanced accuracy on training is 0.000, below chance" in alarm for alarm in alarms)


def test_below_chance_is_a_permutation_test():
    """Against permutations; and answers that know nothing raise it in 1 % of cases."""
    rng = np.random.default_rng(0)
    y, said = np.repeat(range(4), (60, 30, 45, 12)), rng.choice(4, 147, p=[0.5, 0.1, 0.3, 0.1])
    permuted = np.array([rng.permutation(y) for _ in range(20_000)])
    right = permuted == said
    scores = np.mean([(right & (permuted == k)).sum(axis=1) / (y == k).sum() for k in range(4)], 0)

    def alarm(labels):
        counts = np.zeros((4, 4), dtype=int)
        np.add.at(counts, (labels, said), 1)
        return metrics.below_chance(counts)

    raised = np.array([bool(alarm(labels)) for labels in permuted[:4000]])
    assert 0.002 < raised.mean() < 0.02
    assert scores[:4000][raised].max() <= np.percentile(scores, 2)
    assert metrics.below_chance(np.array([[9, 0], [5, 0]])) == []  # constant answers


@pytest.fixture()
def moved(written, dataset, tmp_path):
    """A run on the data set `dataset`, and a participant of training whom that now has in test."""
    run = copy_of(trained(written), tmp_path)
    saved = torch.load(f"{run}/{runs.BEST}", weights_only=True)
    saved["config"]["paths"]["data"] = str(dataset)
    torch.save(saved, f"{run}/{runs.BEST}")
    participant = saved["train_participants"][0]

    def move(line):
        return line.replace("\ttrain\t", "\ttest\t") if line.startswith(participant) else line

    edit(dataset / "participants.tsv", lambda text: "".join(map(move, text.splitlines(True))))
    return run, participant


def test_tables_that_changed_are_refused(moved):
    message = (
        "participants.tsv in .* changed since .* was trained; put that back, train again, or name "
        "the other data"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(moved[0], "test")


def test_participants_that_moved_from_train_to_test_raise_an_alarm(moved, dataset):
    run, participant = moved
    result, _ = evaluate(run, "test", [f"paths.data={dataset}"])
    assert f"1 participants of test were trained on: {participant}" in result["alarms"]
    other = f"participants.tsv of {dataset} is not what this run was trained with"
    assert other in result["alarms"]


def test_missing_participants_raise_an_alarm(dataset, tmp_path):
    cfg = quick(dataset, tmp_path, "data.max_missing=1")
    train.main(0, cfg)
    victim = ledger.read(cfg).of("test")[0].participant_id
    for s in ledger.read(cfg).of("test"):
        if s.participant_id == victim:
            os.remove(s.path)
    result, _ = evaluate(cfg.paths.run_dir, "test")
    message = "1 labelled participants of test have no volume and are not scored"
    assert message in result["alarms"]
    other = next(s for s in ledger.read(cfg).of("test") if s.participant_id != victim)
    os.remove(other.path)
    result, _ = evaluate(cfg.paths.run_dir, "test")
    message = f"1 participants of test lack some of their volumes: {other.participant_id}"
    assert message in result["alarms"]
