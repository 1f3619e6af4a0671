"""Is one model better than another on the same participants? A paired test and its interval.

    compare(y_true, probabilities_a, probabilities_b)   # -> dict
    compare_all(y_true, {"A": ..., "B": ...})           # all pairs, Holm-corrected -> their dicts

In shapes, n is the number of rows, K of classes, R of resamples. Needs numpy and scipy alone.
"""

import itertools

import numpy as np
from scipy.stats import binom, binomtest

import intervals
import scores
from resampling import means_of_classes, participants

# A test enumerates so many different sums, or else draws so many
MOST_SUMS = 200_000
SWAPS = 100_000


def compare_all(y_true, runs, ids=None):
    """Is one of these runs better than another? -> a dict for each pair.

    y_true (n,), runs {name: probabilities (n, K)}, ids (n,) participants: rows that share one stay
    together.
      a, b, balanced_accuracy_a, balanced_accuracy_b
      difference        balanced accuracy of a minus that of b; ci95: its 95 % interval by a paired
                        bootstrap over participants within each class
      p_value           two-sided, exact: `swap_test`; p_holm: adjusted for all pairs
      only_a_right, only_b_right, mcnemar_p   rows that one of the two answers rightly, and
                        McNemar's exact test of the two numbers. It is a test of accuracy, while
                        p_value is one of balanced accuracy
      sentence          the verdict, by p_holm at 5 %
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two runs or more; there are {len(runs)}")
    right = {}
    for name, probabilities in runs.items():
        try:
            labels, p = scores.check(y_true, probabilities, np.shape(probabilities)[-1], ids)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        right[name] = p.argmax(axis=1) == labels
    means = means_of_classes(labels, np.stack(list(right.values()), axis=1), ids)
    recalls = {name: means[:, m] for m, name in enumerate(right)}  # (1 + R, classes) each
    pairs = [
        compare_pair(labels, a, b, recalls, right, ids) for a, b in itertools.combinations(runs, 2)
    ]
    for pair, p in zip(pairs, holm([pair["p_value"] for pair in pairs])):
        pair["p_holm"] = float(p)
        pair["sentence"] = verdict(pair, len(pairs))
    return pairs


def compare(y_true, probabilities_a, probabilities_b, ids=None):
    """Is A better than B on the same participants? The one pair of `compare_all` -> dict."""
    return compare_all(y_true, {"A": probabilities_a, "B": probabilities_b}, ids)[0]


def compare_pair(y_true, a, b, recalls, right, ids):
    """One pair of `compare_all`, without what depends on the number of pairs."""
    gaps = recalls[a] - recalls[b]  # (1 + R, classes)
    only_a, only_b = int((right[a] > right[b]).sum()), int((right[b] > right[a]).sum())
    return {
        "a": a,
        "b": b,
        "n": len(y_true),
        "balanced_accuracy_a": float(recalls[a][0].mean()),
        "balanced_accuracy_b": float(recalls[b][0].mean()),
        "difference": float(gaps[0].mean()),
        "ci95": intervals.percentiles(np.nanmean(gaps[1:], axis=1)),
        "p_value": swap_test(y_true, right[a], right[b], ids),
        "only_a_right": only_a,
        "only_b_right": only_b,
        "mcnemar_p": mcnemar(only_a, only_b),
    }


def swap_test(y_true, right_a, right_b, ids=None):
    """Two-sided p-value of the difference of two balanced accuracies, if the answers of A and of B
    could as well be exchanged, for every participant: see `sign_test`."""
    each = shares_of_difference(y_true, right_a, right_b)
    return sign_test(np.bincount(participants(y_true, ids)[1], each))


def shares_of_difference(y_true, right_a, right_b):
    """What each row adds to the balanced accuracy of A minus that of B -> (n,)."""
    _, number, sizes = np.unique(y_true, return_inverse=True, return_counts=True)
    return (right_a.astype(float) - right_b) / sizes[number] / len(sizes)


def sign_test(shares):
    """Two-sided p-value of the sum of shares (P,), those of the participants, if each could as well
    have the other sign.

    Exact: every share has the one sign or the other, with chance 1/2 each. Where these have more
    than MOST_SUMS different sums, SWAPS of them are drawn, which gives no p-value below
    1 / (SWAPS + 1).
    """
    observed = abs(shares.sum()) - 1e-9
    shares = np.abs(shares)
    shares = np.round(shares[shares > 1e-12], 12)
    values, times = np.unique(shares, return_counts=True)
    if np.prod(times + 1.0) <= MOST_SUMS:
        sums, chances = np.zeros(1), np.ones(1)
        for value, m in zip(values, times):
            positive = np.arange(m + 1)
            sums = np.add.outer(sums, (2 * positive - m) * value).ravel()
            chances = np.multiply.outer(chances, binom.pmf(positive, m, 0.5)).ravel()
        return float(min(1.0, chances[np.abs(sums) >= observed].sum()))
    rng, sums = np.random.default_rng(0), 0.0
    for value, m in zip(values, times):
        sums = sums + (2 * rng.binomial(m, 0.5, SWAPS) - m) * value
    return float(((np.abs(sums) >= observed).sum() + 1) / (SWAPS + 1))


def mcnemar(only_a, only_b):
    """Exact two-sided p-value of McNemar's test. only_a: pairs that A alone has right, only_b: that
    B alone has; of equal models, each of these is A's with chance 1/2."""
    discordant = only_a + only_b
    return float(binomtest(only_a, discordant).pvalue) if discordant else 1.0


def holm(p_values):
    """p-values adjusted for their number by Holm's step-down method (Holm 1979) -> (m,)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(steps, 1)[np.argsort(order)]


def verdict(pair, num_pairs):
    """One sentence on a pair of `compare_all`."""
    best, other = ("a", "b") if pair["difference"] >= 0 else ("b", "a")
    low, high = sorted(v if best == "a" else -v for v in pair["ci95"])
    is_shown = pair["p_holm"] < 0.05
    start = f"no difference between {pair[best]} and {pair[other]} is shown"
    if is_shown:
        start = f"{pair[best]} is better than {pair[other]}"
    corrected = f", {pair['p_holm']:.4f} by Holm over {num_pairs} pairs" if num_pairs > 1 else ""
    sentence = (
        f"{start}: balanced accuracy {pair['balanced_accuracy_' + best]:.3f} against "
        f"{pair['balanced_accuracy_' + other]:.3f}, difference {abs(pair['difference']):.3f} "
        f"(95 % interval {low:.3f} to {high:.3f}), p = {pair['p_value']:.4f}{corrected}, the same "
        f"{pair['n']} participants"
    )
    # the interval is of this pair alone, so it is held against this pair's own test
    if (pair["p_value"] < 0.05) == (low <= 0 <= high):
        does = "includes" if low <= 0 <= high else "excludes"
        discordant = pair["only_a_right"] + pair["only_b_right"]
        sentence += (
            f"; interval and test do not agree: the interval, a bootstrap, {does} 0, and the exact "
            f"test of the {discordant} on which they differ decides"
        )
    return sentence
