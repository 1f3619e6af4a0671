import json
import math
import time
import warnings

import numpy as np
import pytest
from conftest import assert_scores_are_scikit_learns
from sklearn.metrics import (accuracy_score, average_precision_score, balanced_accuracy_score, cohen_kappa_score,
                             confusion_matrix, f1_score, log_loss, precision_score, recall_score, roc_auc_score)

import metrics


def random_case(n=159, signal=0.5, seed=0, classes=4):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    y[:classes] = np.arange(classes)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), y] += signal
    p = np.exp(logits)
    return y, p / p.sum(axis=1, keepdims=True)


def slow_scores(y, p, undefined=0):
    """Every score, by scikit-learn or from the formula; undefined: precision, recall and F1 that divide by zero."""
    pred, classes = p.argmax(1), range(p.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, on what is undefined
        auroc = [roc_auc_score(y == k, p[:, k]) if 0 < (y == k).sum() < len(y) else np.nan for k in classes]
        auprc = [average_precision_score(y == k, p[:, k]) if (y == k).any() else np.nan for k in classes]
        result = {
            "accuracy": accuracy_score(y, pred), "balanced_accuracy": np.mean([np.mean(pred[y == k] == k) for k in np.unique(y)]),
            **{f"macro_{name}": f(y, pred, labels=classes, average="macro", zero_division=0)
               for name, f in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score))},
            **{f"{name}_per_class": f(y, pred, labels=classes, average=None, zero_division=undefined)
               for name, f in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score))},
            "auroc_per_class": auroc, "auroc_macro_ovr": np.nanmean(auroc), "auprc_per_class": auprc, "auprc_macro_ovr": np.nanmean(auprc),
            "quadratic_kappa": cohen_kappa_score(y, pred, labels=classes, weights="quadratic"),
            "log_loss": log_loss(y, p, labels=classes),
        }
    result["brier"] = sum((p[i, k] - (y[i] == k)) ** 2 for i in range(len(y)) for k in classes) / len(y)
    result["ece"] = 0
    for b in range(10):
        inside = [i for i in range(len(y)) if b / 10 < p[i].max() <= (b + 1) / 10]
        result["ece"] += abs(sum(p[i].max() - (pred[i] == y[i]) for i in inside)) / len(y)
    return result


def nan(values):
    return np.array(values, dtype=float)  # None, which JSON has, is NaN


def one_hot(answers):
    return np.eye(4)[answers]


CASES = {
    "random": random_case(),
    "ties": (random_case()[0], np.round(random_case()[1] * 4 + 0.5) / np.round(random_case()[1] * 4 + 0.5).sum(1, keepdims=True)),
    "class absent": [a[random_case()[0] != 3] for a in random_case()],
    "absent and never answered": (np.arange(30) % 2, one_hot(np.arange(30) // 2 % 2)),
    "all the same": (random_case()[0], np.full((159, 4), 0.25)),
    "one class": (np.full(20, 2), random_case()[1][:20]),
    "one class, all right": (np.full(20, 2), one_hot([2] * 20)),
    "never answered": (random_case()[0], one_hot(random_case()[0] % 3)),
    "perfect": (random_case()[0], one_hot(random_case()[0])),
    "one participant": (np.array([2]), np.array([[0.1, 0.2, 0.6, 0.1]])),
}


@pytest.mark.parametrize("case", CASES)
def test_every_score_equals_scikit_learn_or_its_formula(case):
    y, p = CASES[case]
    result, expected = metrics.evaluate(y, p), slow_scores(y, p)
    for name in metrics.SCORES + metrics.MORE_SCORES + metrics.PER_CLASS:
        assert nan(result[name]) == pytest.approx(nan(expected[name]), abs=1e-12, nan_ok=True), name
        for floor in ("ci95", "skipped", "majority", "random", "chance"):
            assert name in result[floor]
            if np.ndim(result[name]):
                assert len(result[floor][name]) == 4, (floor, name)
    json.dumps(result, allow_nan=False)
    bins = result["reliability"]
    assert sum(b["count"] for b in bins) == len(y)
    assert sum(b["count"] / len(y) * abs(b["confidence"] - b["accuracy"]) for b in bins) == pytest.approx(result["ece"], abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_scores_of_resamples_equal_those_of_the_drawn_rows(case):
    y, p = CASES[case]
    weights = metrics.resample(y)[:8]
    assert weights.sum(1).tolist() == [len(y)] * 8
    found = metrics.scores(y, p, weights)
    for r, w in enumerate(weights):
        rows = np.repeat(np.arange(len(y)), w.astype(int))
        assert np.bincount(y[rows]).tolist() == np.bincount(y).tolist()
        for name, expected in slow_scores(y[rows], p[rows], undefined=np.nan).items():
            assert found[name][r] == pytest.approx(np.array(expected), abs=1e-12, nan_ok=True), (name, r)


@pytest.mark.parametrize("case", ["random", "class absent"])
def test_majority_and_random_floors(case):
    y, p = CASES[case]
    rng, prior = np.random.default_rng(0), np.array([0.39, 0.22, 0.31, 0.08])
    result, most = metrics.evaluate(y, p, prior=prior), np.bincount(y).argmax()
    for name, expected in slow_scores(y, one_hot(np.full(len(y), most))).items():
        if name in ("log_loss", "brier", "ece"):
            assert result["majority"][name] is None
        else:
            assert nan(result["majority"][name]) == pytest.approx(nan(expected), abs=1e-12, nan_ok=True), name
    stated = slow_scores(y, np.tile(prior, (len(y), 1)))
    for name in ("log_loss", "brier", "ece", "auroc_macro_ovr", "auroc_per_class", "auprc_macro_ovr", "auprc_per_class"):
        assert nan(result["random"].pop(name)) == pytest.approx(nan(stated[name]), abs=1e-12, nan_ok=True), name
    answered = [slow_scores(y, one_hot(rng.choice(4, len(y), p=prior))) for _ in range(100)]
    for name, expected in result["random"].items():
        values = np.array([a[name] for a in answered])
        assert (abs(values.mean(0) - expected) <= 4 * values.std(0) / np.sqrt(100) + 1e-12).all(), name


def test_resamples_that_cannot_be_scored_are_skipped_and_counted():
    y = np.repeat([0, 1, 2, 3], [10, 10, 10, 10])
    answers = y.copy()
    answers[y == 3] = 0
    answers[0] = 3  # the one answer 3: absent from a resample with chance 0.9 ** 10
    result = metrics.evaluate(y, one_hot(answers))
    assert result["resamples"] == metrics.RESAMPLES == 10_000
    assert result["skipped"]["precision_per_class"][:3] == [0, 0, 0]
    assert result["skipped"]["precision_per_class"][3] == pytest.approx(10_000 * 0.9**10, abs=200)  # 4 standard deviations
    assert result["ci95"]["precision_per_class"][3] == [0, 0] and result["ci95"]["balanced_accuracy"] is not None
    answers[0] = 1
    result = metrics.evaluate(y, one_hot(answers))
    assert result["skipped"]["precision_per_class"][3] == 10_000 and result["ci95"]["precision_per_class"][3] is None
    assert result["precision_per_class"][3] == 0 and result["skipped"]["macro_precision"] == 0


def test_volumes_of_a_participant_are_drawn_together():
    y, p = random_case()
    names = [f"{i:04d}" for i in range(159)]
    one, two = metrics.evaluate(y, p, ids=names), metrics.evaluate(np.repeat(y, 2), np.repeat(p, 2, axis=0), ids=np.repeat(names, 2))
    assert (two["n"], two["participants"]) == (318, 159)
    for name in metrics.SCORES + metrics.MORE_SCORES:  # a second volume that says the same teaches nothing
        assert two["ci95"][name] == pytest.approx(one["ci95"][name], abs=1e-9), name
        assert two["chance"][name] == pytest.approx(one["chance"][name], abs=1e-9), name
    with pytest.raises(ValueError, match="participant 0001 has rows of two classes"):
        metrics.evaluate([0, 1, 2], np.full((3, 4), 0.25), ids=["0000", "0001", "0001"])


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scikit_learn(seed):
    y, p = random_case(seed=seed)
    if seed == 4:
        p = np.round(p, 1) + 1e-9  # ties
        p /= p.sum(axis=1, keepdims=True)
    result, pred = metrics.evaluate(y, p), p.argmax(1)
    assert result["n"] == 159
    assert_scores_are_scikit_learns(result, y, p)
    assert result["confusion_matrix"] == confusion_matrix(y, pred).tolist()
    assert result["predicted_counts"] == np.bincount(pred, minlength=4).tolist()
    assert result["majority_baseline"] == np.bincount(y).max() / 159


def test_intervals_equal_a_slow_bootstrap():
    y, p = random_case(signal=0.8)
    result, pred, rng = metrics.evaluate(y, p), p.argmax(1), np.random.default_rng(1)
    slow = {name: [] for name in (*metrics.SCORES, "brier", "quadratic_kappa", "auprc_macro_ovr")}
    for _ in range(600):
        rows = np.concatenate([rng.choice(np.flatnonzero(y == k), (y == k).sum()) for k in range(4)])
        slow["accuracy"].append(accuracy_score(y[rows], pred[rows]))
        slow["balanced_accuracy"].append(balanced_accuracy_score(y[rows], pred[rows]))
        slow["macro_f1"].append(f1_score(y[rows], pred[rows], average="macro"))
        slow["log_loss"].append(log_loss(y[rows], p[rows]))
        slow["brier"].append(((p[rows] - np.eye(4)[y[rows]]) ** 2).sum(1).mean())
        slow["quadratic_kappa"].append(cohen_kappa_score(y[rows], pred[rows], weights="quadratic"))
    for _ in range(150):
        rows = np.concatenate([rng.choice(np.flatnonzero(y == k), (y == k).sum()) for k in range(4)])
        slow["auprc_macro_ovr"].append(np.mean([average_precision_score(y[rows] == k, p[rows, k]) for k in range(4)]))
        slow["auroc_macro_ovr"].append(roc_auc_score(y[rows], p[rows], multi_class="ovr"))
    for name, values in slow.items():
        low, high = np.percentile(values, [2.5, 97.5])
        width = high - low
        assert result["ci95"][name] == pytest.approx([low, high], abs=0.2 * width), name


def test_chance_bands_equal_slow_permutations():
    y, p = random_case(signal=0.8)
    result, pred, rng = metrics.evaluate(y, p), p.argmax(1), np.random.default_rng(1)
    slow = {name: [] for name in (*metrics.SCORES, "brier", "quadratic_kappa", "auprc_macro_ovr")}
    for i in range(500):
        z = rng.permutation(y)
        slow["accuracy"].append(accuracy_score(z, pred))
        slow["balanced_accuracy"].append(balanced_accuracy_score(z, pred))
        slow["macro_f1"].append(f1_score(z, pred, average="macro"))
        slow["log_loss"].append(log_loss(z, p))
        slow["brier"].append(((p - np.eye(4)[z]) ** 2).sum(1).mean())
        slow["quadratic_kappa"].append(cohen_kappa_score(z, pred, weights="quadratic"))
        if i < 150:
            slow["auprc_macro_ovr"].append(np.mean([average_precision_score(z == k, p[:, k]) for k in range(4)]))
            slow["auroc_macro_ovr"].append(roc_auc_score(z, p, multi_class="ovr"))
    for name, values in slow.items():
        low, high = np.percentile(values, [2.5, 97.5])
        assert result["chance"][name] == pytest.approx([low, high], abs=0.2 * (high - low)), name
    assert result["chance_band"] == result["chance"]["balanced_accuracy"]


def test_chance_band_at_the_size_of_the_real_test_split():
    """159 participants, a model that answers at random: 0.25 +- 0.034, upper end 0.320 (facts, and binomial theory)."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2, 3], [40, 40, 41, 38])
    low, high = metrics.evaluate(y, rng.dirichlet(np.ones(4), 159))["chance_band"]
    assert low == pytest.approx(0.185, abs=0.01) and high == pytest.approx(0.320, abs=0.01)


def test_the_failure_that_must_never_happen_again():
    """The 65 validation participants that the replaced system was left with, and its constant answer `healthy`."""
    y = np.repeat([0, 1, 2, 3], [17, 17, 20, 11])
    p = np.zeros((65, 4))
    p[:, 0] = 1
    result = metrics.evaluate(y, p)
    assert result["accuracy"] == pytest.approx(0.2615, abs=5e-5)
    assert [round(f, 2) for f in result["f1_per_class"]] == [0.41, 0, 0, 0]
    assert result["balanced_accuracy"] == 0.25
    assert result["majority_baseline"] >= result["accuracy"]
    assert any(a.startswith("model collapse: class 1, 2, 3 never predicted") for a in result["alarms"])
    assert any("always answering that class does as well" in a for a in result["alarms"])
    assert any("chance band" in a for a in result["alarms"])


def test_alarms_are_silent_when_all_is_well_and_name_a_class_never_right():
    y = np.repeat([0, 1, 2, 3], 20)
    p = np.full((80, 4), 0.1)
    p[np.arange(80), y] = 0.7
    assert metrics.evaluate(y, p)["alarms"] == []
    p[y == 3] = [0.7, 0.1, 0.1, 0.1]  # class 3 is answered 0 ...
    p[0] = [0.1, 0.1, 0.1, 0.7]  # ... and the one answer 3 is wrong
    assert metrics.evaluate(y, p)["alarms"] == [
        "class 3 predicted, but never rightly (F1 = 0)", "class 0 is answered 39 times and true 20 times of 80: shares far apart",
        "class 3 is answered 1 times and true 20 times of 80: shares far apart"]


def test_gap_alarm():
    assert metrics.gap_alarm(0.6, 0.4) == metrics.gap_alarm(0.3, 0.5) == []
    assert metrics.gap_alarm(0.61, 0.4) == ["balanced accuracy is 0.610 on training and 0.400 on validation, "
                                            "more than 0.2 below: overfitting"]


def test_degenerate_splits():
    one = metrics.evaluate([2], [[0.1, 0.2, 0.6, 0.1]])
    assert one["accuracy"] == 1 and one["auroc_macro_ovr"] is None and one["ci95"]["auroc_macro_ovr"] is None
    y, p = random_case()
    keep = y != 3
    absent = metrics.evaluate(y[keep], p[keep])
    recalls = [np.mean(p[keep].argmax(1)[y[keep] == k] == k) for k in range(3)]
    assert absent["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert "class 3 has no participant in this split" in absent["alarms"]
    same = metrics.evaluate(y, np.full_like(p, 0.25))
    assert same["auroc_macro_ovr"] == 0.5 and same["log_loss"] == pytest.approx(np.log(4))


@pytest.mark.parametrize("y, p, message", [
    ([0, 1], [[1, 0, 0, 0]], r"probabilities must be \(2, 4\)"),
    ([0, 4], np.full((2, 4), 0.25), "y_true of row 1 is 4"),
    ([0, 1], [[0.25] * 4, [np.nan] * 4], "row 1"),
    ([0, 1], [[0.25] * 4, [2, -1, 0, 0]], "row 1"),
    ([0, 1], [[0.25] * 4, [0.9, 0.9, 0, 0]], "row 1"),
    ([], np.zeros((0, 4)), "at least one")])
def test_bad_input_names_the_row(y, p, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(y, p)
    if "row" in message:
        with pytest.raises(ValueError, match=message.replace("row 1", "participant 7123")):
            metrics.evaluate(y, p, ids=["1001", "7123"])


@pytest.mark.parametrize("call, message", [
    (lambda y, p: metrics.evaluate([0, np.nan, *y[2:]], p), "y_true of row 1 is nan"),
    (lambda y, p: metrics.evaluate(y, p, ids=["1001"]), "ids must be one a row; there are 1 of them for 159"),
    (lambda y, p: metrics.evaluate(y, p, prior=[1, 1, 1, 1]), "prior must be 4 class shares"),
    (lambda y, p: metrics.evaluate(y, p, prior=[np.nan, 0, 0, 1]), "prior must be 4 class shares"),
    (lambda y, p: metrics.subgroups(y, p, ["UW"]), r"groups must be one a row, \(159,\)"),
    (lambda y, p: metrics.compare_all(y, {"one": p}), "two runs or more"),
    (lambda y, p: metrics.compare_all(y, {"one": p, "other": p * np.nan}, ids=range(1001, 1160)),
     "other: probabilities of participant 1001 are"),
    (lambda y, p: metrics.temperature(y, p * np.nan), "row 0")])
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_case())


# ------------------------------------------------------------------------------------------------------- calibration


def test_temperature_equals_a_grid_search():
    for y, p in (random_case(n=400, signal=1), random_case(signal=0.3)):
        losses = {T: np.mean(np.log((p ** (1 / T)).sum(1)) - np.log(p[np.arange(len(y)), y]) / T) for T in np.geomspace(0.05, 20, 4001)}
        assert metrics.temperature(y, p) == pytest.approx(min(losses, key=losses.get), rel=2e-3)
        assert metrics.rescale(p, 2) == pytest.approx(p**0.5 / (p**0.5).sum(1, keepdims=True))
        assert metrics.rescale(p, 1) == pytest.approx(p)


def test_temperature_undoes_overconfidence():
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(4), 20_000)
    y = (rng.random(20_000)[:, None] > q.cumsum(1)).sum(1)  # q are the true probabilities
    p = q**2.5 / (q**2.5).sum(1, keepdims=True)
    T = metrics.temperature(y, p)
    before, after = (slow_scores(y[:2000], probabilities[:2000])["ece"] for probabilities in (p, metrics.rescale(p, T)))
    assert T == pytest.approx(2.5, abs=0.05) and after < 0.04 < 0.15 < before


def test_temperature_of_degenerate_predictions():
    y, p = random_case()
    perfect, hopeless = metrics.temperature(y, 0.6 * one_hot(y) + 0.1), metrics.temperature(y, 0.9 * one_hot((y + 1) % 4) + 0.025)
    assert 0.05 <= perfect < 0.06 and 19.9 < hopeless <= 20  # the ends of the search
    assert metrics.temperature(y, np.full((159, 4), 0.25)) == 1
    answers = one_hot(np.where(np.arange(159) % 3, y, (y + 1) % 4))  # zeros, a third of them wrong
    T = metrics.temperature(y, answers)
    rescaled = metrics.rescale(answers, T)
    assert np.isfinite(rescaled).all() and rescaled.sum(1) == pytest.approx(np.ones(159)) and log_loss(y, rescaled) < log_loss(y, answers)
    assert 0 < metrics.temperature([2], [[0.1, 0.2, 0.6, 0.1]]) < 1


# --------------------------------------------------------------------------------------------------------- subgroups


def test_subgroups():
    y, p = random_case(signal=1)
    site = np.array(["UW", "UCSD", "UAB"], dtype=object)[np.arange(159) % 3]
    site[:8] = "elsewhere"
    site[np.flatnonzero((site == "UW") & (y == 3))] = "UCSD"  # a site that lacks a class
    found = {g["group"]: g for g in metrics.subgroups(y, p, site)}
    assert list(found) == ["UAB", "UCSD", "UW", "elsewhere"]
    assert {name: g["small"] for name, g in found.items()} == {"UAB": False, "UCSD": False, "UW": True, "elsewhere": True}
    assert found["UW"]["classes"] == [0, 1, 2] and found["UW"]["p_above_rest"] is found["elsewhere"]["p_above_rest"] is None
    rng, pred = np.random.default_rng(0), p.argmax(1)
    for name, g in found.items():
        at = site == name
        assert (g["n"] == at.sum()
                and g["balanced_accuracy"] == pytest.approx(recall_score(y[at], pred[at], average="macro", labels=g["classes"])))
    for name in ("UAB", "UCSD"):
        slow, lead, at = [], [], site == name
        for _ in range(600):
            rows = np.concatenate([rng.choice(np.flatnonzero(y == k), (y == k).sum()) for k in range(4)])
            inside, outside = rows[at[rows]], rows[~at[rows]]
            slow.append(np.mean([np.mean(pred[inside][y[inside] == k] == k) for k in range(4)]))
            lead.append(slow[-1] - np.mean([np.mean(pred[outside][y[outside] == k] == k) for k in range(4)]))
        low, high = np.percentile(slow, [2.5, 97.5])
        assert found[name]["ci95"] == pytest.approx([low, high], abs=0.2 * (high - low))
        assert found[name]["p_above_rest"] == pytest.approx(np.mean(np.array(lead) <= 0), abs=0.09)  # 4 standard deviations of 600
    assert metrics.evaluate(y, p, groups=site)["subgroups"] == {"group": list(found.values())}
    pair = metrics.subgroups([0, 0, 1, 1, 1], np.full((5, 4), 0.25), ["in", "out", "in", "out", "out"])[0]  # one of two, one of three
    assert pair["skipped"] == pytest.approx(10_000 * (1 - (1 - 1 / 4) * (1 - 8 / 27)), abs=200)  # 4 standard deviations
    alone = metrics.subgroups(y, p, ["UW"] * 159)
    assert len(alone) == 1 and alone[0]["rest"] is alone[0]["p_above_rest"] is None and not alone[0]["small"]


def test_a_site_that_carries_the_result_is_named():
    rng = np.random.default_rng(0)
    y, site = np.repeat([0, 1, 2, 3], [40, 40, 41, 38]), np.array(["UAB", "UCSD", "UW"])[np.arange(159) % 3]
    p = 0.6 * one_hot(np.where((site == "UW") & (rng.random(159) < 0.8), y, rng.integers(4, size=159))) + 0.1
    result = metrics.evaluate(y, p, groups={"site": site})
    at = {g["group"]: g for g in result["subgroups"]["site"]}
    assert [a for a in result["alarms"] if "carries" in a] == [
        f"site UW carries the result: balanced accuracy {at['UW']['balanced_accuracy']:.3f} (53 participants), "
        f"{at['UW']['rest']:.3f} without it"]
    volumes = metrics.evaluate(np.repeat(y, 2), np.repeat(p, 2, axis=0), ids=np.repeat(np.arange(159), 2),
                               groups={"site": np.repeat(site, 2)})
    for one, two in zip(result["subgroups"]["site"], volumes["subgroups"]["site"]):
        assert two["ci95"] == pytest.approx(one.pop("ci95")) and {key: two[key] for key in one} == one


# -------------------------------------------------------------------------------------------------------- comparison


def test_compare():
    y, better = random_case(n=300, signal=1.5)
    _, worse = random_case(n=300, signal=0.0, seed=0)
    result = metrics.compare(y, better, worse)
    expected = balanced_accuracy_score(y, better.argmax(1)) - balanced_accuracy_score(y, worse.argmax(1))
    assert result["difference"] == pytest.approx(expected) and result["p_value"] < 0.01
    assert result["ci95"][0] > 0 and result["ci95"][0] < expected < result["ci95"][1]
    back = metrics.compare(y, worse, better)
    assert back["difference"] == pytest.approx(-expected) and back["p_value"] == pytest.approx(result["p_value"])
    same = metrics.compare(y, better, better)
    assert same["difference"] == 0 and same["p_value"] == 1 and same["ci95"] == [0, 0]


def test_compare_false_alarms_and_power():
    """Two equal models: p < 0.05 in about 5 % of data sets; a gap of 20 points is found."""
    rng, false_alarms = np.random.default_rng(3), 0
    y = np.repeat([0, 1, 2, 3], 40)

    def answers(hit):
        pred = np.where(rng.random(160) < hit, y, rng.integers(4, size=160))
        return np.eye(4)[pred]

    for _ in range(200):
        false_alarms += metrics.compare(y, answers(0.3), answers(0.3))["p_value"] < 0.05
    assert 2 <= false_alarms <= 20  # 200 x 5 % = 10, central 99.7 % of the binomial
    assert np.mean([metrics.compare(y, answers(0.5), answers(0.2))["p_value"] < 0.05 for _ in range(20)]) > 0.9


def test_mcnemar_and_holm_equal_their_formulas():
    for b, c in ((0, 0), (0, 1), (3, 9), (10, 10), (21, 8)):
        tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
        assert metrics.mcnemar(b, c) == pytest.approx(min(1, 2 * tail))
    assert metrics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p = np.random.default_rng(0).random(50) ** 4
    p[:5] = p[5:10]  # ties
    for i, adjusted in enumerate(metrics.holm(p)):  # p is rejected at this level, and at none below: the step-down itself
        expected = max(min(1, q * (50 - (p < q).sum())) for q in p[p <= p[i]])
        assert adjusted == pytest.approx(expected)


def test_compare_all():
    rng, n = np.random.default_rng(0), 159
    y = np.repeat([0, 1, 2, 3], [40, 40, 41, 38])
    runs = {f"run {i}": random_answers(y, 0.1 + 0.2 * i, rng) for i in range(4)}
    pairs = metrics.compare_all(y, runs)
    assert [(r["a"], r["b"]) for r in pairs] == [(f"run {i}", f"run {j}") for i in range(4) for j in range(i + 1, 4)]
    right = {name: p.argmax(1) == y for name, p in runs.items()}
    for r in pairs:
        alone = metrics.compare(y, runs[r["a"]], runs[r["b"]])
        assert all(alone[key] == r[key] for key in ("n", "difference", "ci95", "p_value", "mcnemar_p", "only_a_right", "only_b_right"))
        assert r["balanced_accuracy_a"] == pytest.approx(balanced_accuracy_score(y, runs[r["a"]].argmax(1)))
        assert r["only_a_right"] == sum(right[r["a"]] & ~right[r["b"]])
        slow = []
        for _ in range(600):
            rows = np.concatenate([rng.choice(np.flatnonzero(y == k), (y == k).sum()) for k in range(4)])
            slow.append(np.mean([np.mean(right[r["a"]][rows][y[rows] == k] * 1.0 - right[r["b"]][rows][y[rows] == k]) for k in range(4)]))
        low, high = np.percentile(slow, [2.5, 97.5])
        assert r["ci95"] == pytest.approx([low, high], abs=0.2 * (high - low))
    assert [r["p_holm"] for r in pairs] == metrics.holm([r["p_value"] for r in pairs]).tolist()
    best = pairs[2]  # run 0 and run 3
    assert best["sentence"].startswith("run 3 is better than run 0: balanced accuracy ") and "by Holm over 6 pairs" in best["sentence"]
    low, high = best["ci95"]
    assert f"difference {-best['difference']:.3f} (95 % interval {-high:.3f} to {-low:.3f})" in best["sentence"]
    same = metrics.compare_all(y, {"a": runs["run 1"], "b": runs["run 1"]})[0]
    assert same["sentence"].startswith("no difference between a and b is shown") and same["mcnemar_p"] == same["p_holm"] == 1
    json.dumps(pairs, allow_nan=False)
    assert metrics.compare([2], [[0.1, 0.2, 0.6, 0.1]], [[0.6, 0.2, 0.1, 0.1]])["difference"] == 1  # a single participant


def test_time():
    """159 participants in far less than 10 s, the 190 pairs of 20 runs in far less than 30 s: 0.5 s and 0.2 s on one core."""
    rng, y = np.random.default_rng(0), np.repeat([0, 1, 2, 3], [40, 40, 41, 38])
    runs = {str(i): rng.dirichlet(np.ones(4), 159) for i in range(20)}
    start = time.perf_counter()
    metrics.evaluate(y, runs["0"], groups={"site": np.arange(159) % 3})
    evaluated = time.perf_counter()
    assert len(metrics.compare_all(y, runs)) == 190
    assert evaluated - start < 5 and time.perf_counter() - evaluated < 5


# ------------------------------------------------------------------------------------------------------- simulations

REAL_TEST = np.repeat([0, 1, 2, 3], [40, 40, 41, 38])


def random_answers(y, hit, rng):
    """Answers that are right where chance hit says so, and at random elsewhere, as probabilities."""
    return 0.6 * one_hot(np.where(rng.random(len(y)) < hit, y, rng.integers(4, size=len(y)))) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("recalls", [(0.6, 0.5, 0.4, 0.3), (0.9, 0.9, 0.8, 0.8)])
def test_intervals_cover_the_truth(recalls):
    """1,000 data sets of 159: the 95 % interval holds the true accuracy and balanced accuracy in 92 to 98 % of them."""
    rng, y, hit, covered = np.random.default_rng(0), REAL_TEST, np.array(recalls), []
    true_accuracy, true_balanced = hit[y].mean(), hit.mean()
    for _ in range(1000):
        pred = np.where(rng.random(159) < hit[y], y, (y + rng.integers(1, 4, size=159)) % 4)
        values = metrics.scores(y, one_hot(pred), metrics.resample(y))
        (a, b), (c, d) = (metrics.interval(values[name]) for name in ("accuracy", "balanced_accuracy"))
        covered.append([a <= true_accuracy <= b, c <= true_balanced <= d])
    accuracy, balanced = np.mean(covered, axis=0)
    print(f"coverage: accuracy {accuracy:.3f}, balanced accuracy {balanced:.3f}")
    assert 0.92 <= accuracy <= 0.98 and 0.92 <= balanced <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1, 1 / 0.7, 2])
def test_the_interval_of_ece_covers_the_truth(sharpness):
    """Calibrated and overconfident predictions; plain percentiles would hold the truth in 0 to 91 %."""
    rng, covered = np.random.default_rng(0), []

    def draw(n):
        q = rng.dirichlet(np.ones(4), n)
        y = (rng.random(n)[:, None] > q.cumsum(1)).sum(1)
        p = q**sharpness
        return y, p / p.sum(1, keepdims=True)

    y, p = draw(1_000_000)
    off, tenth = p.max(1) - (p.argmax(1) == y), np.ceil(p.max(1) * 10)
    truth = sum(abs(off[tenth == b].sum()) for b in range(11)) / 1_000_000
    for _ in range(300):
        y, p = draw(159)
        values = metrics.scores(y, p, metrics.resample(y)[:2000])["ece"]
        low, high = metrics.ece_interval(metrics.score(y, p)["ece"], values)
        covered.append(low <= truth <= high)
    print(f"coverage: ECE {np.mean(covered):.3f}, truth {truth:.3f}")
    assert np.mean(covered) >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("agree", [0, 0.5, 0.8])
def test_compare_false_alarms_and_power_over_thousands_of_data_sets(agree):
    """Models right in 45 %, B's answer A's for a share of the participants: equal ones get p < 0.05 in 3 to 7 %; 10 points are found."""
    rng, y, found = np.random.default_rng(0), REAL_TEST, {0: [], 0.1: []}
    for gap in found:
        for _ in range(4000 if gap == 0 else 1000):
            a = rng.random(159) < 0.45
            b = np.where(rng.random(159) < agree, a, rng.random(159) < 0.45 + gap / (1 - agree))
            wrong = (y + rng.integers(1, 4, size=159)) % 4
            found[gap].append(metrics.compare(y, one_hot(np.where(a, y, wrong)), one_hot(np.where(b, y, wrong)))["p_value"] < 0.05)
    false_alarms, power = np.mean(found[0]), np.mean(found[0.1])
    print(f"agreement {agree}: false alarms {false_alarms:.4f}, power for a 10-point gap {power:.3f}")
    assert 0.03 <= false_alarms <= 0.07
    assert power > {0: 0.38, 0.5: 0.68, 0.8: 0.98}[agree]


@pytest.mark.slow
def test_alarms_without_effect_are_rare(monkeypatch):
    """A model that is as good at every site and answers each class as often as it is true: few alarms on sites and on shares."""
    monkeypatch.setattr(metrics, "RESAMPLES", 2000)
    rng, y, site, share = np.random.default_rng(0), REAL_TEST, 0, 0
    age = np.array(["40-54", "55-64", "65-74", "75-"])
    for _ in range(500):
        groups = {"site": rng.integers(3, size=159), "age": age[rng.integers(4, size=159)]}
        found = " ".join(metrics.evaluate(y, random_answers(y, 0.3, rng), groups=groups)["alarms"])
        site, share = site + ("carries" in found), share + ("shares" in found)
    print(f"alarms without effect: groups {site / 500:.3f}, shares {share / 500:.3f}")
    assert site / 500 < 0.06 and share / 500 < 0.05
