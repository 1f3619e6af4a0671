import numpy as np
import pytest
from helpers import COUNTS, draw_people
from scipy.special import softmax

import config
import metrics
import prevalence


def people(seed, counts, effect=0.9):
    y, _, p, _ = draw_people(np.random.default_rng(seed), counts, effect)
    return y, p


def test_scores_at_other_shares_are_those_of_rows_that_are_repeated():
    y, p = people(0, (10, 20, 30, 40))
    times = np.array([12, 6, 4, 3])  # every class 120 times
    rows = np.repeat(np.arange(100), times[y])
    expected = metrics.score(y[rows], p[rows], 4)
    found = prevalence.at_shares(y, p, [0.25] * 4)
    names = ("accuracy", "macro_f1", "macro_precision", "log_loss", "auroc_macro_ovr")
    for name in (*names, "precision_per_class"):
        assert found[name] == pytest.approx(expected[name]), name


def test_at_the_splits_own_shares_the_scores_are_its_own():
    y, p = people(1, COUNTS["test"])
    found, own = prevalence.at_shares(y, p, np.bincount(y) / len(y)), metrics.score(y, p, 4)
    assert all(found[name] == pytest.approx(own[name]) for name in found if name != "shares")


def test_a_class_that_is_not_there_cannot_become_frequent():
    y, p = people(2, (40, 40, 40, 0))
    assert prevalence.at_shares(y, p, [0.25] * 4) is None
    assert prevalence.at_shares(y, p, [0.5, 0.25, 0.25, 0])["accuracy"] > 0.3


def test_planted_shares_are_found():
    planted = np.array([0.6, 0.2, 0.15, 0.05])
    y, p = people(3, (planted * 8000).astype(int), effect=1.3)
    assert prevalence.estimated(p, np.full(4, 0.25)) == pytest.approx(planted, abs=0.03)
    # of probabilities for other shares than they say, as those of a head without class weights
    train = np.array([0.39, 0.22, 0.31, 0.08])
    tilted = p * train / (p * train).sum(axis=1, keepdims=True)
    assert prevalence.estimated(tilted, train) == pytest.approx(planted, abs=0.03)


@pytest.mark.parametrize("counts", [(60, 50, 30, 20), (100, 60, 0, 0)])
def test_the_shares_are_those_that_em_converges_to(counts):
    _, p = people(4, counts)
    prior, times = np.array([0.4, 0.2, 0.2, 0.2]), np.random.default_rng(0).integers(0, 3, len(p))
    shares, rows = prior, np.repeat(p, times, axis=0)
    for _ in range(20_000):
        posterior = rows / prior * shares
        shares = (posterior / posterior.sum(axis=1, keepdims=True)).mean(axis=0)
    assert prevalence.estimated(p, prior, times) == pytest.approx(shares, abs=0.005)


def test_a_head_that_leans_and_is_too_sure_is_calibrated_first():
    """Whatever its probabilities are for: its class weights, loss and sampler are not asked."""
    planted, held = (64, 48, 32, 15), 0
    for seed in range(8):
        (y_val, p_val), (y, p) = people(seed, COUNTS["val"], 1.3), people(100 + seed, planted, 1.3)
        p_val, p = (softmax(3 * np.log(q) + [2.0, 0, 0, 0], axis=1) for q in (p_val, p))
        found = prevalence.label_shift((y_val, p_val, range(len(y_val))), (y, p, range(len(y))))
        assert found["true"] == pytest.approx(np.array(planted) / 159)
        held += sum(low <= true <= high for (low, high), true in zip(found["ci95"], found["true"]))
    assert held >= 26  # of 32


def test_validation_without_a_class_calibrates_nothing():
    val, test = people(0, (40, 40, 40, 0)), people(1, COUNTS["test"])
    assert prevalence.label_shift((*val, range(120)), (*test, range(159))) is None


def test_a_participants_rows_are_drawn_together():
    drawn = prevalence.drawn(np.random.default_rng(0), ["a", "b", "a", "c", "b", "a"])
    assert drawn[0] == drawn[2] == drawn[5] and drawn[1] == drawn[4]
    assert drawn[0] + drawn[1] + drawn[3] == 3


@pytest.mark.parametrize(
    "value, message",
    [
        ("[0.5,0.6,0,0]", "eval.prevalence must be a list of numbers >= 0 that add up to 1"),
        ("[0.5,0.5]", "eval.prevalence=.* has 2 numbers, and there are 4 classes"),
        ("[2,-1,0,0]", "eval.prevalence must be a list of numbers >= 0 that add up to 1"),
    ],
)
def test_shares_that_are_none_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        config.load("configs/demo.yaml", [f"eval.prevalence={value}"])
