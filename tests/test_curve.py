import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PROBE, copy_of, evaluate, features_of, gaussians, quick, read_run, trained
from scipy.optimize import curve_fit
from sklearn.metrics import balanced_accuracy_score

import config
import curve
import eval as evaluation
import features
import findings
import heads
import ledger
import references
import results
import train

FRACTIONS = "train.fractions=[0.75,0.9,1]"


def people(counts, volumes=2):
    """So many participants of each class, with so many volumes each."""
    labels = np.repeat(range(len(counts)), counts)
    return [
        SimpleNamespace(participant_id=f"p{i}", unit=f"p{i}", label=int(label))
        for i, label in enumerate(labels)
        for _ in range(volumes)
    ]


def counted(samples, indices):
    """Participants of each class among the volumes."""
    found = {samples[i].participant_id: samples[i].label for i in indices}
    return np.bincount(list(found.values()), minlength=4).tolist()


# ------------------------------------------------------------------------------------- the shares


def test_a_share_has_so_many_of_each_class_with_all_their_volumes():
    samples = people([40, 20, 30, 10])
    rows = curve.drawn(samples, 0.25, seed=0)
    assert counted(samples, rows) == [10, 5, 8, 2]  # 7.5 is rounded to the even number
    inside = {samples[i].participant_id for i in rows}
    assert len(rows) == 2 * len(inside)


def test_shares_of_a_seed_lie_in_each_other_and_seeds_differ():
    samples = people([40, 20, 30, 10])
    parts = [set(curve.drawn(samples, f, seed=3)) for f in (0.1, 0.25, 0.5, 1)]
    assert all(a < b for a, b in zip(parts, parts[1:])) and len(parts[-1]) == len(samples)
    assert parts[0] != set(curve.drawn(samples, 0.1, seed=4))


def test_participants_with_eyes_of_several_classes_are_drawn_as_a_class_of_their_own():
    samples = people([8, 8, 8, 8], volumes=1)
    samples += [SimpleNamespace(participant_id="p0", unit="p0 L", label=3)]  # the other eye
    rows = curve.drawn(samples, 0.5, seed=0)
    assert len({samples[i].participant_id for i in rows}) in (16, 15)
    assert len(curve.drawn(samples, 1, seed=0)) == len(samples)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["train.fractions=[0.5]", "model.freeze_encoder=false"],
            r"train.fractions=\[0.5\] fits heads on the features of a frozen encoder",
        ),
        (["train.fractions=[0.5,0.1]"], "train.fractions must be a list of shares"),
        (["train.fractions=[0]"], "train.fractions must be a list of shares"),
        (["train.fractions=[1.5]"], "train.fractions must be a list of shares"),
        (["train.fractions=[]"], "train.fractions must be a list of shares"),
    ],
)
def test_what_cannot_be_is_refused(configure, overrides, message):
    with pytest.raises(ValueError, match=message):
        configure("/none", *overrides)


def test_a_share_that_leaves_a_class_with_too_few_is_refused(written, tmp_path):
    message = (
        r"train.fractions=\[0.1, 1.0\]: a share of 0.1 leaves class .* with [01] training "
        "participants, fewer than 2; set larger shares"
    )
    with pytest.raises(ValueError, match=message):
        train.main(0, quick(written, tmp_path, "train.fractions=[0.1,1]"))


# ------------------------------------------------------------------------------------ the formula


def resamples_of(y, sd, seed=0):
    return y[:, None] + np.random.default_rng(seed).normal(0, sd, (len(y), 1000))


@pytest.mark.parametrize("name, sign", [("balanced_accuracy", 1), ("log_loss", -1)])
def test_the_formula_is_scipys_least_squares(name, sign):
    n = np.array([74, 186, 372, 743])
    y = 0.5 + sign * (0.1 - 0.05 * (n / 743) ** -0.6)
    y = y + np.array([0.001, -0.002, 0.001, 0.0005])
    found = curve.formula(n, y, resamples_of(y, 0.002), name)["formula"]
    law = lambda m, a, b, c: a - b * m**-c
    (a, b, c), _ = curve_fit(law, n / 743, y, [0.6, sign * 0.05, 0.5])
    for point in found["extrapolated"]:  # c is searched on a grid
        assert point["value"] == pytest.approx(law(point["times"], a, b, c), abs=5e-4)
        assert point["participants"] == 743 * point["times"]
        assert point["ci95"][0] < point["value"] < point["ci95"][1]


@pytest.mark.parametrize(
    "y, sd, reason",
    [
        ([0.3, 0.4, 0.45], 0.001, "needs 4 shares or more; there are 3"),
        ([0.30, 0.31, 0.30, 0.31], 0.02, "not better with more participants by more than chance"),
        ([0.30, 0.50, 0.20, 0.45], 0.001, "do not follow an inverse power law"),
        ([0.60, 0.75, 0.88, 1.00], 0.001, "leaves what is possible"),
    ],
)
def test_where_the_formula_does_not_hold_nothing_is_extrapolated(y, sd, reason):
    y, n = np.array(y), np.array([100, 200, 400, 800])[: len(y)]
    found = curve.formula(n, y, resamples_of(y, sd), "balanced_accuracy")
    assert found["formula"] is None and reason in found["reason"]


# ---------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def scored(written, tmp_path_factory):
    """The run's configuration, its folder after eval.py on val and test, and both results."""
    folder = tmp_path_factory.mktemp("curve")
    run = copy_of(trained(written, FRACTIONS), folder)
    found = {split: evaluation.evaluate_run(run, split)[0] for split in ("val", "test")}
    return quick(written, folder), run, found


def test_every_share_is_fitted_by_every_seed_and_the_whole_once(scored):
    entries = read_run(scored[0])[1]["curve"]
    assert [entry["fraction"] for entry in entries] == [0.75] * 5 + [0.9] * 5 + [1.0]
    book = ledger.read(scored[0])
    everybody = {s.participant_id for s in book.of("train")}
    assert entries[-1]["participants"] == len(everybody)
    assert all(entry["participants"] < len(everybody) for entry in entries[:-1])


def test_the_whole_is_the_runs_own_head_before_it_is_refitted(scored):
    saved = read_run(scored[0])[1]
    own = saved["curve"][-1]["head"]
    assert all(torch.equal(value, own[name]) for name, value in saved["head"].items())
    result = scored[2]["val"]
    whole = result["learning_curve"]["sizes"][-1]
    for name in curve.SCORES:
        assert whole[name]["mean"] == pytest.approx(result[name])
        (low, high), own = whole[name]["ci95"], result["ci95"][name]
        assert low <= own[0] + 1e-9 and high >= own[1] - 1e-9  # it spans the run's own
        assert high - low < 1.5 * (own[1] - own[0])
        assert whole[name]["sd"] is None and whole["subsets"] == 1


def test_a_share_is_the_mean_over_its_subsets(scored):
    """Its interval holds what subsets add to what participants of the split do."""
    cfg, _, found = scored
    entries = [e for e in read_run(cfg)[1]["curve"] if e["fraction"] == 0.75]
    each = [score_of(cfg, entry["head"]) for entry in entries]
    size = found["test"]["learning_curve"]["sizes"][0]
    assert size["balanced_accuracy"]["mean"] == pytest.approx(np.mean(each))
    assert size["balanced_accuracy"]["sd"] == pytest.approx(np.std(each, ddof=1))
    low, high = size["balanced_accuracy"]["ci95"]
    assert low < np.mean(each) < high


def score_of(cfg, state):
    """Balanced accuracy of a head on test, by scikit-learn."""
    book, dev = ledger.read(cfg), torch.device("cpu")
    found = features.encode(cfg, book, book.of("test"), features.open_encoder(cfg), dev)
    own = heads.by_unit(found.samples, heads.predict(references.load(state, cfg), found.x)[0])
    return balanced_accuracy_score(own.y_true, own.p.argmax(axis=1))


def test_the_curve_stands_in_a_table_a_picture_and_the_report(scored):
    _, run, found = scored
    with open(f"{run}/learning_curve_test.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    sizes = found["test"]["learning_curve"]["sizes"]
    assert [row["what"] for row in rows] == ["measured"] * 3 + ["extrapolated"] * 2
    for row, size in zip(rows, sizes):
        assert int(row["participants"]) == size["participants"]
        assert float(row["balanced_accuracy"]) == size["balanced_accuracy"]["mean"]
        assert float(row["log_loss_high"]) == size["log_loss"]["ci95"][1]
    assert rows[-1]["balanced_accuracy"] == ""  # three shares carry no formula
    with open(f"{run}/report.html", encoding="utf-8") as f:
        page = f.read()
    assert "training participants" in page and "subsets" in page
    assert "nothing is extrapolated, for needs 4 shares or more; there are 3" in page
    assert "number of training participants" in page and page.count("<img") >= 8
    assert results.read_result(run, "test") == found["test"]


def test_what_is_extrapolated_is_marked(scored):
    result = scored[2]["test"]
    law = {"a": 0.5, "b": 0.1, "c": 0.5}
    law["extrapolated"] = [
        {"times": t, "participants": 40 * t, "value": 0.45, "ci95": [0.4, 0.5]} for t in (2, 4)
    ]
    changed = result["learning_curve"] | {"balanced_accuracy": {"formula": law, "reason": None}}
    rows = findings.curve_table(result | {"learning_curve": changed})[1]
    assert [row[0] for row in rows[-2:]] == ["80 (extrapolated)", "160 (extrapolated)"]
    assert rows[-1][2:] == ["0.450", "0.400 to 0.500", "-", "-"]
    (line, _) = findings.curve_lines(result | {"learning_curve": changed})
    assert "fitted; beyond" in line and "extrapolated, not measured" in line
    assert curve.draw(changed, 4)


@pytest.mark.parametrize("kind", ["knn", "logistic_regression"])
def test_references_have_a_curve_too(written, tmp_path, kind):
    more = [f"model.head.kind={kind}", "train.fractions=[0.75,1]", "train.seeds=[1,2]"]
    cfg = quick(written, tmp_path, *more)
    train.main(0, cfg)
    found = evaluate(cfg.paths.run_dir, "test")[0]["learning_curve"]["sizes"]
    assert [size["subsets"] for size in found] == [2, 2]


def test_the_score_grows_with_participants():
    """Where features tell much, more participants tell more, and the formula says so."""
    (x, y), val, test = gaussians((0, 1, 2, 3), 256, 743, 0)
    settings = ["train.sweep=null", "train.epochs=1", "train.fractions=[0.1,0.25,0.5,1]"]
    cfg = config.load(PROBE, ["model.emb_dim=256", *settings])
    parts = features_of(x, y), features_of(*val)
    fit = lambda *args: train.fit(*args, dev=torch.device("cpu"))
    entries = curve.fit(fit, cfg, {cfg.seed: fit(cfg, cfg.seed, *parts)}, *parts)
    few = slice(0, 600)
    found = curve.score(entries, cfg, features_of(test[0][few], test[1][few]))
    scores = [size["balanced_accuracy"]["mean"] for size in found["sizes"]]
    assert scores == sorted(scores) and [s["participants"] for s in found["sizes"]][-1] == 743
    law = found["balanced_accuracy"]["formula"]
    assert scores[-1] < law["extrapolated"][0]["value"] < law["extrapolated"][1]["value"]
