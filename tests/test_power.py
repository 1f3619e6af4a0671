import numpy as np
import pytest
from helpers import LABELS_159, answers, write_results
from scipy.stats import norm

import metrics
import power
from resampling import means_of_classes


def pair(rng, counts, gap=0.15, agree=0.6):
    """Labels and answers of two runs: A is right in 55 %, B in `gap` less; so often one draw
    decides both."""
    y, luck = np.repeat(range(4), counts), rng.random(sum(counts))
    other = np.where(rng.random(len(y)) < agree, luck, rng.random(len(y)))
    return y, *(np.eye(4)[np.where(r, y, (y + 1) % 4)] for r in (luck < 0.55, other < 0.55 - gap))


def variance(y, p_a, p_b, people=None):
    """Of the difference, as the smallest that is shown tells it: 1.96 + 0.84 standard errors."""
    shown = power.needed(y, p_a, p_b, people)["shown"]
    return (shown / (norm.ppf(0.975) + norm.ppf(0.8))) ** 2


def test_the_variance_is_that_of_the_mean_of_class_means():
    y, p_a, p_b = pair(np.random.default_rng(0), (30, 50, 20, 59))
    gain = (p_a.argmax(axis=1) == y).astype(float) - (p_b.argmax(axis=1) == y)
    by_class = [gain[y == k] for k in range(4)]
    expected = sum(values.var(ddof=1) / len(values) for values in by_class) / 16
    assert variance(y, p_a, p_b) == pytest.approx(expected)


def test_rows_of_a_participant_count_together():
    """Against the spread of a bootstrap: eyes that are answered alike tell as one."""
    y, p_a, p_b = pair(np.random.default_rng(1), (60, 60, 60, 60))
    eyes = np.arange(240).repeat(2)
    once = variance(y, p_a, p_b)
    assert variance(y[eyes], p_a[eyes], p_b[eyes], eyes) == pytest.approx(once)
    people = np.arange(480) // 2  # and where the two differ
    y, p_a, p_b = pair(np.random.default_rng(2), (120, 120, 120, 120))
    gain = (p_a.argmax(axis=1) == y).astype(float) - (p_b.argmax(axis=1) == y)
    resampled = means_of_classes(y, gain[:, None], people)[1:, 0].mean(axis=1)
    assert variance(y, p_a, p_b, people) == pytest.approx(resampled.var(), rel=0.06)


def test_so_many_participants_show_the_difference_in_four_of_five_cases():
    found = power.needed(*pair(np.random.default_rng(0), [20_000] * 4))
    counts = [found["needed"] // 4 + 1] * 4
    shown = [
        metrics.compare(*pair(np.random.default_rng(seed), counts))["p_value"] < 0.05
        for seed in range(1, 151)
    ]
    assert 0.72 < np.mean(shown) < 0.89  # 2.5 standard errors


def test_the_smallest_difference_that_is_shown_is_the_one_for_which_the_participants_suffice():
    y, p_a, p_b = pair(np.random.default_rng(3), [100] * 4)
    found = power.needed(y, p_a, p_b)
    share = (found["shown"] / found["difference"]) ** 2
    assert found["needed"] == pytest.approx(400 * share, abs=1)


def test_no_number_shows_a_difference_of_zero():
    y, p_a, _ = pair(np.random.default_rng(0), [40] * 4)
    found = power.needed(y, p_a, p_a)
    assert found["needed"] is None and found["difference"] == 0
    assert "are right for the same participants" in power.sentence("a", "b", found)
    # right for others, but for as many
    p_a, p_b = (np.eye(4)[np.where(np.arange(160) % 2 == k, y, (y + 1) % 4)] for k in (0, 1))
    found = power.needed(y, p_a, p_b)
    assert found["needed"] is None and found["shown"] > 0.1
    assert "no number of participants shows it; 160 participants show one of" in power.sentence(
        "a", "b", found
    )


def test_the_command_says_how_many(tmp_path, command):
    for name, skill in (("a", 0.6), ("b", 0.4)):
        write_results(tmp_path / name, answers(skill, 0 if name == "a" else 1))
    runs = tmp_path / "a", tmp_path / "b"
    found = power.needed(LABELS_159, answers(0.6, 0), answers(0.4, 1))
    said = command("eval.py", "--compare", *runs, "--power").stdout
    assert f"is shown with {found['needed']} participants in 80 % of cases" in said
    assert "the same shares of classes" in said
    assert "power" not in command("eval.py", "--compare", *runs).stdout
    assert "--power is of a comparison" in command("eval.py", "--ckpt", tmp_path, "--power").stderr
