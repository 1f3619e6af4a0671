import functools
import json
import math
import time
import warnings

import numpy as np
import pytest
from helpers import assert_scores_are_scikit_learns
from scipy.stats import beta
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
)

import groups
import metrics
import paired
import resampling
import scores

REAL_TEST = np.repeat([0, 1, 2, 3], [40, 40, 41, 38])  # labels of the size of the real test split
PRIOR = np.array([0.39, 0.22, 0.31, 0.08])  # class shares of the real training split


def random_case(n=159, signal=0.5, seed=0, classes=4):
    """Labels (n,) and probabilities (n, classes) of a model that knows something of them."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    y[:classes] = np.arange(classes)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), y] += signal
    p = np.exp(logits)
    return y, p / p.sum(axis=1, keepdims=True)


def random_answers(y, hit, rng):
    """Answers that are right where chance hit says so, and at random elsewhere, as
    probabilities."""
    return 0.6 * one_hot(np.where(rng.random(len(y)) < hit, y, rng.integers(4, size=len(y)))) + 0.1


def one_hot(answers):
    return np.eye(4)[answers]


def redraw(y, rng):
    """Rows of a resample that keeps the number of each class."""
    return np.concatenate([rng.choice(np.flatnonzero(y == k), (y == k).sum()) for k in range(4)])


def recalls(y, pred):
    return [np.mean(pred[y == k] == k) for k in range(4)]


def slow_scores(y, p, undefined=0):
    """Every score, by scikit-learn or from the formula; undefined: precision, recall and F1 that
    divide by zero."""
    n, classes, pred = len(y), range(p.shape[1]), p.argmax(1)
    result = {
        "accuracy": accuracy_score(y, pred),
        "balanced_accuracy": np.mean([np.mean(pred[y == k] == k) for k in np.unique(y)]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, on what is undefined
        by_answers = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        for name, f in by_answers.items():
            score = functools.partial(f, y, pred, labels=classes)
            result[f"macro_{name}"] = score(average="macro", zero_division=0)
            result[f"{name}_per_class"] = score(average=None, zero_division=undefined)
        by_rank = {"auroc": roc_auc_score, "auprc": average_precision_score}
        for name, f in by_rank.items():
            values = []
            for k in classes:
                is_k = y == k
                defined = is_k.any() and (name == "auprc" or not is_k.all())
                values.append(f(is_k, p[:, k]) if defined else np.nan)
            result[f"{name}_per_class"] = values
            result[f"{name}_macro_ovr"] = np.nanmean(values)
        kappa = cohen_kappa_score(y, pred, labels=classes, weights="quadratic")
        result["quadratic_kappa"] = kappa
        result["log_loss"] = log_loss(y, p, labels=classes)
    result["brier"] = sum((p[i, k] - (y[i] == k)) ** 2 for i in range(n) for k in classes) / n
    result["ece"] = 0
    for b in range(10):
        inside = [i for i in range(n) if b / 10 < p[i].max() <= (b + 1) / 10]
        result["ece"] += abs(sum(p[i].max() - (pred[i] == y[i]) for i in inside)) / n
    return result


def nan(values):
    return np.array(values, dtype=float)  # None, which JSON has, is NaN


def equal_to(values):
    return pytest.approx(nan(values), abs=1e-12, nan_ok=True)


def interval_like(values):
    """The 95 % interval of slow draws, within a fifth of its width."""
    low, high = np.percentile(values, [2.5, 97.5])
    return pytest.approx([low, high], abs=0.2 * (high - low))


def rounded(y, p):
    """Probabilities of quarters: many ties."""
    quarters = np.round(p * 4 + 0.5)
    return y, quarters / quarters.sum(1, keepdims=True)


Y, P = random_case()
CASES = {
    "random": (Y, P),
    "ties": rounded(Y, P),
    "class absent": (Y[Y != 3], P[Y != 3]),
    "absent and never answered": (np.arange(30) % 2, one_hot(np.arange(30) // 2 % 2)),
    "all the same": (Y, np.full((159, 4), 0.25)),
    "one class": (np.full(20, 2), P[:20]),
    "one class, all right": (np.full(20, 2), one_hot([2] * 20)),
    "never answered": (Y, one_hot(Y % 3)),
    "perfect": (Y, one_hot(Y)),
    "one participant": (np.array([2]), np.array([[0.1, 0.2, 0.6, 0.1]])),
}


@functools.cache
def evaluated(case):
    return metrics.evaluate(*CASES[case])


# ----------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("case", CASES)
def test_every_score_equals_scikit_learn_or_its_formula(case):
    result, expected = evaluated(case), slow_scores(*CASES[case])
    for name in metrics.SCORES + metrics.MORE_SCORES + metrics.PER_CLASS:
        assert nan(result[name]) == equal_to(expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_every_score_has_its_interval_and_floors(case):
    result = evaluated(case)
    for name in metrics.SCORES + metrics.MORE_SCORES + metrics.PER_CLASS:
        for floor in ("ci95", "majority", "random", "chance"):
            assert name in result[floor]
            if np.ndim(result[name]):
                assert len(result[floor][name]) == 4, (floor, name)


@pytest.mark.parametrize("case", CASES)
def test_a_result_is_json(case):
    json.dumps(evaluated(case), allow_nan=False)


@pytest.mark.parametrize("case", CASES)
def test_the_bins_of_reliability_add_up_to_ece(case):
    result, n = evaluated(case), len(CASES[case][0])
    bins = result["reliability"]
    assert sum(b["count"] for b in bins) == n
    ece = sum(b["count"] / n * abs(b["confidence"] - b["accuracy"]) for b in bins)
    assert ece == pytest.approx(result["ece"], abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_scores_of_resamples_equal_those_of_the_drawn_rows(case):
    y, p = CASES[case]
    weights = resampling.resample(y)[:8]
    assert weights.sum(1).tolist() == [len(y)] * 8
    found = scores.resampled(y, p, weights)
    for r, w in enumerate(weights):
        rows = np.repeat(np.arange(len(y)), w.astype(int))
        assert np.bincount(y[rows]).tolist() == np.bincount(y).tolist()
        for name, expected in slow_scores(y[rows], p[rows], undefined=np.nan).items():
            assert found[name][r] == equal_to(expected), (name, r)


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


# -------------------------------------------------------------------------- floors and intervals


@pytest.mark.parametrize("case", ["random", "class absent"])
def test_the_majority_floor(case):
    y, p = CASES[case]
    result, most = metrics.evaluate(y, p, prior=PRIOR)["majority"], np.bincount(y).argmax()
    for name, expected in slow_scores(y, one_hot(np.full(len(y), most))).items():
        if name in ("log_loss", "brier", "ece"):
            assert result[name] is None
        else:
            assert nan(result[name]) == equal_to(expected), name


@pytest.mark.parametrize("case", ["random", "class absent"])
@pytest.mark.slow
def test_the_random_floor(case):
    y, p = CASES[case]
    result = metrics.evaluate(y, p, prior=PRIOR)["random"]
    stated = slow_scores(y, np.tile(PRIOR, (len(y), 1)))
    by_rank = [
        f"{score}_{kind}" for score in ("auroc", "auprc") for kind in ("macro_ovr", "per_class")
    ]
    for name in ("log_loss", "brier", "ece", *by_rank):
        assert nan(result.pop(name)) == equal_to(stated[name]), name
    rng = np.random.default_rng(0)
    answered = [slow_scores(y, one_hot(rng.choice(4, len(y), p=PRIOR))) for _ in range(100)]
    for name, expected in result.items():
        values = np.array([a[name] for a in answered])
        error = values.std(0) / np.sqrt(100)
        assert (abs(values.mean(0) - expected) <= 4 * error + 1e-12).all(), name


@pytest.mark.parametrize("case", CASES)
def test_scores_of_permutations_equal_those_of_the_permuted_labels(case):
    y, p = CASES[case]
    permuted = resampling.permuted_labels(y)[:8]
    found = scores.relabelled(permuted, p)
    for r, labels in enumerate(permuted.astype(int)):
        assert sorted(labels) == sorted(y)
        for name, expected in slow_scores(labels, p, undefined=np.nan).items():
            assert found[name][r] == equal_to(expected), (name, r)


def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    y, ids = random_case(n=159)[0], np.arange(159) // 2
    y_of_people = y[2 * ids % 158]
    draw = lambda: [
        resampling.resample(y),
        resampling.permuted_labels(y),
        resampling.permuted_labels(y_of_people, ids),
    ]
    before = draw()
    resampling.drawn.cache_clear()
    monkeypatch.setattr(resampling, "AT_ONCE", 1000)
    for one, other in zip(before, draw()):
        assert (one == other).all()


def test_a_class_that_is_never_answered_has_an_interval():
    y = np.repeat([0, 1, 2, 3], [10, 10, 10, 10])
    answers = y.copy()
    answers[y == 3] = 0
    result = metrics.evaluate(y, one_hot(answers))
    assert result["precision_per_class"][3] == result["f1_per_class"][3] == 0
    low, high = result["ci95"]["f1_per_class"][3]
    assert low == pytest.approx(0, abs=0.01) and 0.1 < high < 0.5
    # Jeffreys' interval of 0 of 10
    low, high = result["ci95"]["recall_per_class"][3]
    assert low == pytest.approx(0, abs=0.001)
    assert high == pytest.approx(beta.ppf(0.975, 0.5, 10.5), abs=0.02)


def test_volumes_of_a_participant_are_drawn_together():
    """A second volume that says the same teaches nothing."""
    ids = [f"{i:04d}" for i in range(159)]
    one = metrics.evaluate(Y, P, ids=ids)
    two = metrics.evaluate(np.repeat(Y, 2), np.repeat(P, 2, axis=0), ids=np.repeat(ids, 2))
    assert (two["n"], two["participants"]) == (318, 159)
    for name in metrics.SCORES + metrics.MORE_SCORES:
        assert two["ci95"][name] == pytest.approx(one["ci95"][name], abs=1e-9), name
        assert two["chance"][name] == pytest.approx(one["chance"][name], abs=1e-9), name


def two_eyes(people=80, seed=0):
    """Of so many people a left and a right eye (classes 0 and 1), rows in no order, and answers
    that depend on the person more than on the eye."""
    rng = np.random.default_rng(seed)
    y, ids = np.tile([0, 1], people), np.repeat(np.arange(people), 2)
    logit = 0.8 * (2 * y - 1) + 1.5 * rng.normal(size=people)[ids] + rng.normal(size=2 * people)
    order = rng.permutation(2 * people)
    p = 1 / (1 + np.exp(-logit[order]))
    return y[order], np.stack([1 - p, p], axis=1), ids[order]


def test_both_eyes_of_a_person_are_drawn_together_where_their_classes_differ():
    y, p, ids = two_eyes()
    weights = resampling.resample(y, ids).astype(int)
    for person in (0, 17, 79):
        left, right = np.flatnonzero(ids == person)
        assert (weights[:, left] == weights[:, right]).all()
    assert (weights.sum(axis=1) == len(y)).all()
    low, high = metrics.evaluate(y, p, 2, ids)["ci95"]["balanced_accuracy"]
    rng, right = np.random.default_rng(1), p.argmax(axis=1) == y
    of_person = np.array([right[ids == person].mean() for person in range(80)])
    slow = [of_person[rng.integers(80, size=80)].mean() for _ in range(4000)]
    assert np.allclose([low, high], np.percentile(slow, [2.5, 97.5]), atol=0.012)


def test_the_chance_band_of_two_eyes_swaps_them_within_a_person():
    y, p, ids = two_eyes()
    low, high = metrics.evaluate(y, p, 2, ids)["chance_band"]
    rng, answers, slow = np.random.default_rng(1), p.argmax(axis=1), []
    for _ in range(3000):
        swap = rng.random(80) < 0.5
        slow.append(np.mean(np.where(swap[ids], 1 - y, y) == answers))
    assert np.allclose([low, high], np.percentile(slow, [2.5, 97.5]), atol=0.012)
    # answers that go by the person alone say nothing of the eye, whatever permutation
    by_person = np.eye(2)[(ids % 2).astype(int)]
    assert metrics.evaluate(y, by_person, 2, ids)["chance_band"] == [0.5, 0.5]


def test_a_comparison_draws_the_rows_of_a_participant_together():
    """Rows that are there four times tell no more than once."""
    rng = np.random.default_rng(0)
    y, once = rng.integers(0, 3, 159), {}
    for name, skill in (("a", 0.5), ("b", 0.65)):
        said = np.where(rng.random(159) < skill, y, rng.integers(0, 3, 159))
        once[name] = np.eye(3)[said] * 0.7 + 0.1
    (single,) = metrics.compare_all(y, once, np.arange(159))
    four = {name: np.repeat(p, 4, axis=0) for name, p in once.items()}
    (repeated,) = metrics.compare_all(np.repeat(y, 4), four, np.repeat(np.arange(159), 4))
    assert repeated["difference"] == pytest.approx(single["difference"])
    assert repeated["p_value"] == pytest.approx(single["p_value"])
    assert np.allclose(repeated["ci95"], single["ci95"])


def slow_values(y, p, draws, draw):
    """{score: its values} over random draws; draw() -> labels and probabilities. The scores of
    ranks cost more, and get 150 draws."""
    slow = {name: [] for name in (*metrics.SCORES, "brier", "quadratic_kappa", "auprc_macro_ovr")}
    for i in range(draws):
        y, p = draw()
        pred = p.argmax(1)
        slow["accuracy"].append(accuracy_score(y, pred))
        slow["balanced_accuracy"].append(balanced_accuracy_score(y, pred))
        slow["macro_f1"].append(f1_score(y, pred, average="macro"))
        slow["log_loss"].append(log_loss(y, p))
        slow["brier"].append(((p - np.eye(4)[y]) ** 2).sum(1).mean())
        slow["quadratic_kappa"].append(cohen_kappa_score(y, pred, weights="quadratic"))
        if i < 150:
            auprc = [average_precision_score(y == k, p[:, k]) for k in range(4)]
            slow["auprc_macro_ovr"].append(np.mean(auprc))
            slow["auroc_macro_ovr"].append(roc_auc_score(y, p, multi_class="ovr"))
    return slow


@pytest.mark.slow
def test_intervals_equal_a_slow_bootstrap():
    y, p = random_case(signal=0.8)
    result, rng = metrics.evaluate(y, p), np.random.default_rng(1)

    def draw():
        rows = redraw(y, rng)
        return y[rows], p[rows]

    slow = slow_values(y, p, 600, draw)
    del slow["auprc_macro_ovr"]  # which is biased in resamples, so its interval is elsewhere
    for name, values in slow.items():
        assert result["ci95"][name] == interval_like(values), name


@pytest.mark.slow
def test_chance_bands_equal_slow_permutations():
    y, p = random_case(signal=0.8)
    result, rng = metrics.evaluate(y, p), np.random.default_rng(1)
    for name, values in slow_values(y, p, 500, lambda: (rng.permutation(y), p)).items():
        assert result["chance"][name] == interval_like(values), name
    assert result["chance_band"] == result["chance"]["balanced_accuracy"]


def test_chance_band_at_the_size_of_the_real_test_split():
    """159 participants, a model that answers at random: 0.25 +- 0.034, upper end 0.320 (facts, and
    binomial theory)."""
    p = np.random.default_rng(0).dirichlet(np.ones(4), 159)
    low, high = metrics.evaluate(REAL_TEST, p)["chance_band"]
    assert low == pytest.approx(0.185, abs=0.01) and high == pytest.approx(0.320, abs=0.01)


# ----------------------------------------------------------------------------------------- alarms


def test_the_failure_that_must_never_happen_again():
    """The 65 validation participants that the replaced system was left with, and its constant
    answer `healthy`."""
    y = np.repeat([0, 1, 2, 3], [17, 17, 20, 11])
    p = np.zeros((65, 4))
    p[:, 0] = 1
    result = metrics.evaluate(y, p)
    assert result["accuracy"] == pytest.approx(0.2615, abs=5e-5)
    assert [round(f, 2) for f in result["f1_per_class"]] == [0.41, 0, 0, 0]
    assert result["balanced_accuracy"] == 0.25
    assert result["majority_baseline"] >= result["accuracy"]
    alarms = result["alarms"]
    assert any(a.startswith("model collapse: class 1, 2, 3 never predicted") for a in alarms)
    assert any("always answering that class does as well" in a for a in alarms)
    assert any("chance band" in a for a in alarms)


def test_alarms_are_silent_when_all_is_well_and_name_a_class_never_right():
    y = np.repeat([0, 1, 2, 3], 20)
    p = np.full((80, 4), 0.1)
    p[np.arange(80), y] = 0.7
    assert metrics.evaluate(y, p)["alarms"] == []
    p[y == 3] = [0.7, 0.1, 0.1, 0.1]  # class 3 is answered 0 ...
    p[0] = [0.1, 0.1, 0.1, 0.7]  # ... and the one answer 3 is wrong
    assert metrics.evaluate(y, p)["alarms"] == [
        "class 3 predicted, but never rightly (F1 = 0)",
        "class 0 is given 39% of the probability, where 25% are asked for: shares far apart",
        "class 3 is given 11% of the probability, where 25% are asked for: shares far apart",
    ]


def test_no_hit_among_a_few_is_no_alarm():
    """Of two participants of a class, a model with a recall of 0.35 misses both in 42 %."""
    y = np.repeat([0, 1, 2, 3], [12, 7, 9, 2])
    answers = y.copy()
    answers[y == 3], answers[0] = 0, 3
    assert metrics.evaluate(y, 0.7 * one_hot(answers) + 0.075)["alarms"] == []


def test_shares_are_held_against_what_training_asked_for():
    """Answers for even shares, on a split whose shares are not: nothing is wrong. The answers were
    held against the split's shares, and 68 to 91 % of such models had an alarm."""
    rng, y = np.random.default_rng(0), np.repeat([0, 1, 2, 3], [62, 35, 49, 13])
    p = random_answers(y, 0.5, rng)
    even = np.full(4, 0.25)
    assert not [a for a in metrics.evaluate(y, p, asked=even)["alarms"] if "shares" in a]
    found = metrics.shares(y, p, asked=even)
    recall_like = [[p[y == k, j].mean() for j in range(4)] for k in range(4)]
    assert found["stated"] == pytest.approx(np.mean(recall_like, axis=0)) and found["known"]
    # and where a class is preferred beyond what was asked for
    p[:, 0] += 0.6
    p /= p.sum(axis=1, keepdims=True)
    alarms = metrics.evaluate(y, p, asked=even)["alarms"]
    assert any("class 0 is given" in a and "25% are asked for" in a for a in alarms)


def test_accuracy_is_held_against_the_majority_at_the_shares_that_training_asked_for():
    y = np.repeat([0, 1], [90, 10])
    answers = np.where(np.arange(100) < 45, 1, 0)  # half of class 0, and none of class 1
    answers[90:] = 1
    p = 0.7 * np.eye(2)[answers] + 0.15
    sign = "always answering that class"
    assert any(sign in a for a in metrics.evaluate(y, p, 2)["alarms"])
    assert not any(sign in a for a in metrics.evaluate(y, p, 2, asked=[0.5, 0.5])["alarms"])


def test_gap_alarm():
    def table(n, share):  # (4, 4): of n of each class, so many are right
        right = round(n * share)
        return np.eye(4, dtype=int) * right + np.eye(4, dtype=int)[[1, 2, 3, 0]] * (n - right)

    assert metrics.gap_alarm(table(100, 0.6), table(40, 0.5)) == []  # 40 of a class say little
    assert metrics.gap_alarm(table(100, 0.3), table(40, 0.5)) == []
    (alarm,) = metrics.gap_alarm(table(100, 0.6), table(40, 0.4))
    assert "0.600 on training's participants" in alarm and "0.400 on validation" in alarm
    absent = table(40, 0.4)
    absent[0] = 0  # a class that validation lacks does not count
    assert len(metrics.gap_alarm(table(100, 0.6), absent)) == 1


def test_the_gap_alarm_is_a_test_at_one_percent():
    """Of two samples with the same recalls, by simulation."""
    rng, alarms, times = np.random.default_rng(0), 0, 2000
    for _ in range(times):
        recall = rng.uniform(0.1, 0.9, 4)
        tables = []
        for n in ([290, 162, 233, 58], [40, 40, 40, 39]):
            right = rng.binomial(n, recall)
            tables.append(np.diag(right) + np.diag(n - right)[:, [1, 2, 3, 0]])
        alarms += bool(metrics.gap_alarm(*tables))
    assert alarms / times < 0.02


# ------------------------------------------------------------------------- degenerate and bad input


def test_a_single_participant():
    one = metrics.evaluate([2], [[0.1, 0.2, 0.6, 0.1]])
    assert one["accuracy"] == 1
    assert one["auroc_macro_ovr"] is None and one["ci95"]["auroc_macro_ovr"] is None


def test_a_class_without_participants():
    y, p = CASES["class absent"]
    absent = evaluated("class absent")
    known = [np.mean(p.argmax(1)[y == k] == k) for k in range(3)]
    assert absent["balanced_accuracy"] == pytest.approx(np.mean(known))
    assert "class 3 has no participant in this split" in absent["alarms"]


def test_probabilities_that_are_all_the_same():
    same = evaluated("all the same")
    assert same["auroc_macro_ovr"] == 0.5 and same["log_loss"] == pytest.approx(np.log(4))


@pytest.mark.parametrize(
    "y, p, message",
    [
        ([0, 1], [[1, 0, 0, 0]], r"probabilities must be \(2, 4\)"),
        ([0, 4], np.full((2, 4), 0.25), "y_true of row 1 is 4"),
        ([0, 1], [[0.25] * 4, [np.nan] * 4], "row 1"),
        ([0, 1], [[0.25] * 4, [2, -1, 0, 0]], "row 1"),
        ([0, 1], [[0.25] * 4, [0.9, 0.9, 0, 0]], "row 1"),
        ([], np.zeros((0, 4)), "at least one"),
    ],
)
def test_bad_input_names_the_row(y, p, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(y, p)
    if "row" in message:
        with pytest.raises(ValueError, match=message.replace("row 1", "participant 7123")):
            metrics.evaluate(y, p, ids=["1001", "7123"])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda y, p: metrics.evaluate([0, np.nan, *y[2:]], p), "y_true of row 1 is nan"),
        (
            lambda y, p: metrics.evaluate(y, p, ids=["1001"]),
            "ids must be one a row; there are 1 of them for 159",
        ),
        (lambda y, p: metrics.evaluate(y, p, prior=[1, 1, 1, 1]), "prior must be 4 class shares"),
        (
            lambda y, p: metrics.evaluate(y, p, prior=[np.nan, 0, 0, 1]),
            "prior must be 4 class shares",
        ),
        (lambda y, p: metrics.subgroups(y, p, ["UW"]), r"groups must be one a row, \(159,\)"),
        (lambda y, p: metrics.compare_all(y, {"one": p}), "two runs or more"),
        (
            lambda y, p: metrics.compare_all(
                y, {"one": p, "other": p * np.nan}, ids=range(1001, 1160)
            ),
            "other: probabilities of participant 1001 are",
        ),
        (lambda y, p: metrics.temperature(y, p * np.nan), "row 0"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_case())


# ------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("y, p", [random_case(n=400, signal=1), random_case(signal=0.3)])
def test_temperature_equals_a_grid_search(y, p):
    def loss(T):
        return np.mean(np.log((p ** (1 / T)).sum(1)) - np.log(p[np.arange(len(y)), y]) / T)

    best = min(np.geomspace(0.05, 20, 4001), key=loss)
    assert metrics.temperature(y, p) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("y, p", [random_case(n=400, signal=1), random_case(signal=0.3)])
def test_rescaled_probabilities_are_powers(y, p):
    assert metrics.rescale(p, 2) == pytest.approx(p**0.5 / (p**0.5).sum(1, keepdims=True))
    assert metrics.rescale(p, 1) == pytest.approx(p)


def test_temperature_undoes_overconfidence():
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(4), 20_000)
    y = (rng.random(20_000)[:, None] > q.cumsum(1)).sum(1)  # q are the true probabilities
    p = q**2.5 / (q**2.5).sum(1, keepdims=True)
    temperature = metrics.temperature(y, p)
    ece = lambda p: slow_scores(y[:2000], p[:2000])["ece"]
    assert temperature == pytest.approx(2.5, abs=0.05)
    assert ece(metrics.rescale(p, temperature)) < 0.04 < 0.15 < ece(p)


def test_temperature_of_perfect_and_hopeless_predictions_is_an_end_of_the_search():
    assert 0.05 <= metrics.temperature(Y, 0.6 * one_hot(Y) + 0.1) < 0.06
    assert 19.9 < metrics.temperature(Y, 0.9 * one_hot((Y + 1) % 4) + 0.025) <= 20


def test_temperature_of_predictions_that_say_nothing_is_one():
    assert metrics.temperature(Y, np.full((159, 4), 0.25)) == 1


def test_temperature_of_certain_answers():
    answers = one_hot(np.where(np.arange(159) % 3, Y, (Y + 1) % 4))  # zeros, a third of them wrong
    rescaled = metrics.rescale(answers, metrics.temperature(Y, answers))
    assert np.isfinite(rescaled).all() and rescaled.sum(1) == pytest.approx(np.ones(159))
    assert log_loss(Y, rescaled) < log_loss(Y, answers)


def test_temperature_of_a_single_participant():
    assert 0 < metrics.temperature([2], [[0.1, 0.2, 0.6, 0.1]]) < 1


# --------------------------------------------------------------------------------------- subgroups


@pytest.fixture(scope="module")
def sites():
    """Labels, probabilities and sites of 159 participants, one site small and one that lacks a
    class; and the subgroups by name."""
    y, p = random_case(signal=1)
    site = np.array(["UW", "UCSD", "UAB"], dtype=object)[np.arange(159) % 3]
    site[:8] = "elsewhere"
    site[np.flatnonzero((site == "UW") & (y == 3))] = "UCSD"  # a site that lacks a class
    return y, p, site, {g["group"]: g for g in metrics.subgroups(y, p, site)}


def test_subgroups_say_their_size_and_score(sites):
    y, p, site, found = sites
    assert list(found) == ["UAB", "UCSD", "UW", "elsewhere"]
    for name, g in found.items():
        at = site == name
        score = recall_score(y[at], p[at].argmax(1), average="macro", labels=g["classes"])
        assert g["n"] == at.sum() and g["balanced_accuracy"] == pytest.approx(score)
    assert metrics.evaluate(y, p, groups=site)["subgroups"] == {"group": list(found.values())}


def test_subgroups_that_are_small_or_lack_a_class_are_not_compared(sites):
    *_, found = sites
    small = {"UAB": False, "UCSD": False, "UW": True, "elsewhere": True}
    assert {name: g["small"] for name, g in found.items()} == small
    assert found["UW"]["classes"] == [0, 1, 2]
    assert found["UW"]["p_above_rest"] is found["elsewhere"]["p_above_rest"] is None


def test_intervals_of_subgroups_equal_a_slow_bootstrap(sites):
    y, p, site, found = sites
    rng, pred = np.random.default_rng(0), p.argmax(1)
    for name in ("UAB", "UCSD"):
        slow, at = [], site == name
        for _ in range(600):
            rows = redraw(y, rng)
            inside = rows[at[rows]]
            slow.append(np.mean(recalls(y[inside], pred[inside])))
        assert found[name]["ci95"] == interval_like(slow)


def test_the_lead_of_a_subgroup_is_held_against_permuted_membership(sites):
    y, p, site, found = sites
    rng, pred = np.random.default_rng(0), p.argmax(1)
    for name in ("UAB", "UCSD"):
        at, above = site == name, []

        def lead(at):
            return np.mean(recalls(y[at], pred[at])) - np.mean(recalls(y[~at], pred[~at]))

        for _ in range(600):
            permuted = at.copy()
            for k in range(4):
                permuted[y == k] = rng.permutation(at[y == k])
            above.append(lead(permuted) >= lead(at) - 1e-12)
        expected = np.mean(above)
        assert found[name]["p_above_rest"] == pytest.approx(expected, abs=0.09)  # 4 sd of 600


def test_a_subgroup_of_everybody_has_no_rest(sites):
    y, p, *_ = sites
    (alone,) = metrics.subgroups(y, p, ["UW"] * 159)
    assert alone["rest"] is alone["p_above_rest"] is None and not alone["small"]


@pytest.fixture(scope="module")
def carried():
    """Labels, probabilities and sites of a model that is right at one site alone."""
    rng = np.random.default_rng(0)
    site = np.array(["UAB", "UCSD", "UW"])[np.arange(159) % 3]
    knows = (site == "UW") & (rng.random(159) < 0.8)
    return (
        REAL_TEST,
        0.6 * one_hot(np.where(knows, REAL_TEST, rng.integers(4, size=159))) + 0.1,
        site,
    )


def test_a_site_that_carries_the_result_is_named(carried):
    y, p, site = carried
    result = metrics.evaluate(y, p, groups={"site": site})
    uw = {g["group"]: g for g in result["subgroups"]["site"]}["UW"]
    assert [a for a in result["alarms"] if "carries" in a] == [
        f"site UW carries the result: balanced accuracy {uw['balanced_accuracy']:.3f} "
        f"(53 participants), {uw['rest']:.3f} without it"
    ]


def test_subgroups_of_volumes_are_those_of_participants(carried):
    y, p, site = carried
    twice = lambda values: np.repeat(values, 2, axis=0)
    ids = np.repeat(np.arange(159), 2)
    ones = metrics.evaluate(y, p, groups={"site": site})["subgroups"]["site"]
    groups = {"site": twice(site)}
    twos = metrics.evaluate(twice(y), twice(p), ids=ids, groups=groups)["subgroups"]["site"]
    for one, two in zip(ones, twos):
        assert two["ci95"] == pytest.approx(one.pop("ci95"))
        assert {key: two[key] for key in one} == one


# -------------------------------------------------------------------------------------- comparison


def test_compare():
    y, better = random_case(n=300, signal=1.5)
    _, worse = random_case(n=300, signal=0.0, seed=0)
    score = lambda p: balanced_accuracy_score(y, p.argmax(1))
    expected = score(better) - score(worse)
    result, back = metrics.compare(y, better, worse), metrics.compare(y, worse, better)
    assert result["difference"] == pytest.approx(expected) and result["p_value"] < 0.01
    assert result["ci95"][0] > 0 and result["ci95"][0] < expected < result["ci95"][1]
    assert back["difference"] == pytest.approx(-expected)
    assert back["p_value"] == pytest.approx(result["p_value"])


def test_compare_a_model_with_itself():
    y, p = random_case(n=300, signal=1.5)
    same = metrics.compare(y, p, p)
    assert same["difference"] == 0 and same["p_value"] == 1 and same["ci95"] == [0, 0]


def test_compare_on_a_single_participant():
    right, wrong = [[0.1, 0.2, 0.6, 0.1]], [[0.6, 0.2, 0.1, 0.1]]
    assert metrics.compare([2], right, wrong)["difference"] == 1


@pytest.mark.slow
def test_compare_false_alarms_and_power():
    """Two equal models: p < 0.05 in about 5 % of data sets; a gap of 20 points is found."""
    rng, y = np.random.default_rng(3), np.repeat([0, 1, 2, 3], 40)

    def answers(hit):
        return one_hot(np.where(rng.random(160) < hit, y, rng.integers(4, size=160)))

    def alarms(a, b, data_sets):
        p_values = [metrics.compare(y, answers(a), answers(b))["p_value"] for _ in range(data_sets)]
        return np.array(p_values) < 0.05

    # 200 x 5 % = 10, central 99.7 % of the binomial
    assert 2 <= alarms(0.3, 0.3, 200).sum() <= 20
    assert alarms(0.5, 0.2, 20).mean() > 0.9


@pytest.mark.parametrize("b, c", [(0, 0), (0, 1), (3, 9), (10, 10), (21, 8)])
def test_mcnemar_equals_its_formula(b, c):
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
    assert paired.mcnemar(b, c) == pytest.approx(min(1, 2 * tail))


def test_holm_equals_its_formula():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p = np.random.default_rng(0).random(50) ** 4
    p[:5] = p[5:10]  # ties
    for i, adjusted in enumerate(paired.holm(p)):
        # p is rejected at this level, and at none below: the step-down itself
        expected = max(min(1, q * (50 - (p < q).sum())) for q in p[p <= p[i]])
        assert adjusted == pytest.approx(expected)


@pytest.fixture(scope="module")
def four_runs():
    """Probabilities of four runs on 159 participants, each better than the last; and their six
    pairs."""
    rng = np.random.default_rng(0)
    runs = {f"run {i}": random_answers(REAL_TEST, 0.1 + 0.2 * i, rng) for i in range(4)}
    return runs, metrics.compare_all(REAL_TEST, runs)


def test_compare_all_compares_every_pair(four_runs):
    runs, pairs = four_runs
    expected = [(f"run {i}", f"run {j}") for i in range(4) for j in range(i + 1, 4)]
    assert [(r["a"], r["b"]) for r in pairs] == expected
    right = {name: p.argmax(1) == REAL_TEST for name, p in runs.items()}
    same = ("n", "difference", "ci95", "p_value", "mcnemar_p", "only_a_right", "only_b_right")
    for r in pairs:
        alone = metrics.compare(REAL_TEST, runs[r["a"]], runs[r["b"]])
        assert all(alone[key] == r[key] for key in same)
        score = balanced_accuracy_score(REAL_TEST, runs[r["a"]].argmax(1))
        assert r["balanced_accuracy_a"] == pytest.approx(score)
        assert r["only_a_right"] == sum(right[r["a"]] & ~right[r["b"]])
    json.dumps(pairs, allow_nan=False)


def test_intervals_of_differences_equal_a_slow_bootstrap(four_runs):
    runs, pairs = four_runs
    rng, y = np.random.default_rng(0), REAL_TEST
    for r in pairs:
        a, b = (runs[r[side]].argmax(1) for side in "ab")
        slow = []
        for _ in range(600):
            rows = redraw(y, rng)
            difference = np.subtract(recalls(y[rows], a[rows]), recalls(y[rows], b[rows]))
            slow.append(np.mean(difference))
        assert r["ci95"] == interval_like(slow)


def test_compare_all_adjusts_by_holm(four_runs):
    _, pairs = four_runs
    assert [r["p_holm"] for r in pairs] == paired.holm([r["p_value"] for r in pairs]).tolist()


def test_compare_all_says_who_is_better(four_runs):
    best = four_runs[1][2]  # run 0 and run 3
    sentence = best["sentence"]
    assert sentence.startswith("run 3 is better than run 0: balanced accuracy ")
    assert "by Holm over 6 pairs" in sentence
    low, high = best["ci95"]
    difference = f"{-best['difference']:.3f} (95 % interval {-high:.3f} to {-low:.3f})"
    assert f"difference {difference}" in sentence


def test_compare_all_says_where_no_difference_is_shown(four_runs):
    run = four_runs[0]["run 1"]
    same = metrics.compare_all(REAL_TEST, {"a": run, "b": run})[0]
    assert same["sentence"].startswith("no difference between a and b is shown")
    assert same["mcnemar_p"] == same["p_holm"] == 1


@pytest.mark.slow
def test_time():
    """159 participants in far less than 10 s, the 190 pairs of 20 runs in far less than 30 s: 0.5 s
    and 0.2 s on one core."""
    rng = np.random.default_rng(0)
    runs = {str(i): rng.dirichlet(np.ones(4), 159) for i in range(20)}
    start = time.perf_counter()
    metrics.evaluate(REAL_TEST, runs["0"], groups={"site": np.arange(159) % 3})
    middle = time.perf_counter()
    assert len(metrics.compare_all(REAL_TEST, runs)) == 190
    assert middle - start < 5 and time.perf_counter() - middle < 5


# ------------------------------------------------------------------------------------- simulations


@pytest.mark.slow
@pytest.mark.parametrize("agree", [0, 0.5, 0.8])
def test_compare_false_alarms_and_power_over_thousands_of_data_sets(agree):
    """Models right in 45 %, B's answer A's for a share of the participants: equal ones get p < 0.05
    in 3 to 7 %; 10 points are found."""
    rng, y = np.random.default_rng(0), REAL_TEST

    def found(gap):
        a = rng.random(159) < 0.45
        b = np.where(rng.random(159) < agree, a, rng.random(159) < 0.45 + gap / (1 - agree))
        wrong = (y + rng.integers(1, 4, size=159)) % 4
        answers = [one_hot(np.where(is_right, y, wrong)) for is_right in (a, b)]
        return metrics.compare(y, *answers)["p_value"] < 0.05

    false_alarms = np.mean([found(0) for _ in range(4000)])
    power = np.mean([found(0.1) for _ in range(1000)])
    print(f"agreement {agree}: false alarms {false_alarms:.4f}, power for 10 points {power:.3f}")
    assert 0.03 <= false_alarms <= 0.06
    assert power > {0: 0.38, 0.5: 0.68, 0.8: 0.98}[agree]


@pytest.mark.slow
def test_alarms_without_effect_are_rare(monkeypatch):
    """A model that is as good at every site and answers each class as often as it is true: few
    alarms on sites and on shares."""
    for module in (resampling, groups):
        monkeypatch.setattr(module, "RESAMPLES", 2000)
    rng, y, site, share = np.random.default_rng(0), REAL_TEST, 0, 0
    age = np.array(["40-54", "55-64", "65-74", "75-"])
    for _ in range(250):
        members = {"site": rng.integers(3, size=159), "age": age[rng.integers(4, size=159)]}
        found = " ".join(metrics.evaluate(y, random_answers(y, 0.3, rng), groups=members)["alarms"])
        site, share = site + ("carries" in found), share + ("shares" in found)
    print(f"alarms without effect: groups {site / 250:.3f}, shares {share / 250:.3f}")
    assert site / 250 < 0.06 and share / 250 < 0.05
