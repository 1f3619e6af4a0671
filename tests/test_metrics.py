import numpy as np
import pytest
from conftest import assert_scores_are_scikit_learns
from sklearn.metrics import (accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, log_loss, roc_auc_score)

import metrics


def random_case(n=159, signal=0.5, seed=0, classes=4):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    y[:classes] = np.arange(classes)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), y] += signal
    p = np.exp(logits)
    return y, p / p.sum(axis=1, keepdims=True)


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
    slow = {name: [] for name in metrics.SCORES}
    for _ in range(600):
        rows = np.concatenate([rng.choice(np.flatnonzero(y == k), (y == k).sum()) for k in range(4)])
        slow["accuracy"].append(accuracy_score(y[rows], pred[rows]))
        slow["balanced_accuracy"].append(balanced_accuracy_score(y[rows], pred[rows]))
        slow["macro_f1"].append(f1_score(y[rows], pred[rows], average="macro"))
        slow["log_loss"].append(log_loss(y[rows], p[rows]))
    for _ in range(150):
        rows = np.concatenate([rng.choice(np.flatnonzero(y == k), (y == k).sum()) for k in range(4)])
        slow["auroc_macro_ovr"].append(roc_auc_score(y[rows], p[rows], multi_class="ovr"))
    for name, values in slow.items():
        low, high = np.percentile(values, [2.5, 97.5])
        width = high - low
        assert result["ci95"][name] == pytest.approx([low, high], abs=0.2 * width), name


def test_chance_bands_equal_slow_permutations():
    y, p = random_case(signal=0.8)
    result, pred, rng = metrics.evaluate(y, p), p.argmax(1), np.random.default_rng(1)
    slow = {name: [] for name in metrics.SCORES}
    for i in range(500):
        z = rng.permutation(y)
        slow["accuracy"].append(accuracy_score(z, pred))
        slow["balanced_accuracy"].append(balanced_accuracy_score(z, pred))
        slow["macro_f1"].append(f1_score(z, pred, average="macro"))
        slow["log_loss"].append(log_loss(z, p))
        if i < 150:
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
    assert metrics.evaluate(y, p)["alarms"] == ["class 3 predicted, but never rightly (F1 = 0)"]


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
