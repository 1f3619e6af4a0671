"""Intervals that hold the true score in 95 % of data sets, also where a bootstrap's do not.

    of_answers(y_true, answers, num_classes, ids)      # {"balanced_accuracy": [low, high], ...}
    of_scores(y_true, probabilities, num_classes, ids) # these, and those of probabilities

A bootstrap knows nothing of errors that did not happen: where a class is all right its resamples
are too, and the interval has no width. So each kind of score has a method that covers near its ends
and in few participants; bench/truth.py measures how often each holds the truth, docs/trust.md has
the table. The classes' shares are taken as given, and rows that share an id count as what they are
worth (`design_effects`).
"""

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

import scores
from resampling import drawn, participants, resample, strata, weighted_sums

LEVELS = (2.5, 97.5)  # percentiles
Z = ndtri(0.975)
DRAWS = 10_000
RARE = 5  # so few errors say little of what an error costs
MOST = {"log_loss": float(scores.negative_log(0.0)), "brier": 2.0}  # that a row can lose
MOST_CELLS = 4e7  # of these draws: above 63 classes there are fewer


def of_scores(y_true, probabilities, num_classes, ids=None):
    """95 % interval of every score -> {name: [low, high], or None where there is none; per class: a
    list of these}."""
    weights = resample(y_true, ids)
    bootstrap = scores.resampled(y_true, probabilities, weights)
    value = scores.of_data(y_true, probabilities)
    found = of_answers(y_true, probabilities.argmax(axis=1), num_classes, ids)
    found |= of_auroc(y_true, probabilities, ids)
    found |= of_average_precision(y_true, value, bootstrap, ids)
    losses = losses_of(y_true, probabilities)
    found |= {name: of_mean(values, y_true, ids, MOST[name]) for name, values in losses.items()}
    found |= {"ece": of_ece(value["ece"], bootstrap["ece"])}
    return found | with_rare_errors(found, y_true, probabilities)


def percentiles(values):
    """[low, high], the central 95 % of the resamples (R,) that have a value; None where none has
    one. For (R, K), a list over K."""
    if values.ndim == 2:
        return [percentiles(v) for v in values.T]
    values = values[~np.isnan(values)]
    return np.percentile(values, LEVELS).tolist() if len(values) else None


# -------------------------------------------------------------------------------------- of answers


def of_answers(y_true, answers, num_classes, ids=None, names=None):
    """Intervals of the scores that depend on the answers alone, of which `scores.of_answers` has
    the names; or of some of these names.

    Percentiles of the posterior of the confusion matrix: the answers to each true class are
    multinomial, their probabilities have a Dirichlet prior. Of one class's recall this is Jeffreys'
    interval (Brown, Cai and DasGupta 2001).
    """
    counts = scores.confusion(y_true, answers, num_classes)
    of_class, of_mean = design_effects(y_true, answers == y_true, ids, num_classes)
    ends = intervals_of_posteriors(counts, counts / of_mean, names)
    hits, true, distance = counts.diagonal(), counts.sum(axis=1), squared_distances(num_classes)
    values = scores.of_answers(true, counts.sum(axis=0), hits, (counts * distance).sum())
    # the score itself too, which lies outside where all answers are right
    ends.append({name: at(values[name]) for name in ends[0]})
    found = {name: spanned([each[name] for each in ends]) for name in ends[0]}
    by_class = [name for name in found if name in scores.PER_CLASS]
    if by_class and (of_class != of_mean).any():
        worth = counts / of_class[:, None]
        ends[:-1] = intervals_of_posteriors(counts, worth, by_class)
        found |= {name: spanned([each[name] for each in ends]) for name in by_class}
    return found


def intervals_of_posteriors(counts, worth, names):
    """[{name: percentiles}, ...] by three priors. Half a right and half a wrong pseudo-answer of
    each class give the class Jeffreys' interval; over K classes they add up to too many of the kind
    that is rare, of which one in all fits."""
    one_in_all = 1 / len(counts)
    priors = {(0.5, 0.5), (0.5, one_in_all), (one_in_all, 0.5)}  # right, wrong
    return [interval_of_posterior(counts, worth, *prior, names) for prior in sorted(priors)]


def interval_of_posterior(counts, worth, right, wrong, names):
    """{name: percentiles} of the posterior, by so many pseudo-answers of each class."""
    num_classes = len(counts)
    shares = counts.sum(axis=1) / counts.sum()
    prior = np.full(counts.shape, wrong / max(num_classes - 1, 1))
    np.fill_diagonal(prior, right)
    draws = int(np.clip(MOST_CELLS / counts.size, 1000, DRAWS))
    rng, found, squares = np.random.default_rng(0), [], squared_distances(num_classes)
    step = max(1, int(1e6 / counts.size))
    for start in range(0, draws, step):
        size = (min(step, draws - start), *counts.shape)
        cells = rng.standard_gamma(worth + prior, size)  # (step, K, K)
        cells *= shares[:, None] / cells.sum(axis=2, keepdims=True)
        hits = np.diagonal(cells, axis1=1, axis2=2)
        true = np.broadcast_to(shares, hits.shape)
        distance = (cells * squares).sum(axis=(1, 2))
        found.append(scores.of_answers(true, cells.sum(axis=1), hits, distance))
    values = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    for name in scores.PER_CLASS[:3]:
        values[name][:, shares == 0] = np.nan  # there is nothing to know of an absent class
    return {name: percentiles(values[name]) for name in names or values}


def squared_distances(num_classes):
    """Of every pair of classes (K, K), by their order."""
    classes = np.arange(num_classes)
    return (classes[:, None] - classes) ** 2


def at(value):
    """The interval that is this value; None for NaN; a list over (K,)."""
    if np.ndim(value):
        return [at(v) for v in value]
    return None if np.isnan(value) else [float(value)] * 2


def spanned(intervals):
    """The interval that spans those that there are; None where the first is; a list over lists."""
    if intervals[0] is None:
        return None
    if intervals[0] == [] or not isinstance(intervals[0][0], float):
        return [spanned(each) for each in zip(*intervals)]
    lows, highs = zip(*filter(None, intervals))
    return [min(lows), max(highs)]


def design_effects(y_true, right, ids, num_classes):
    """How many rows are worth as much as one of a participant's own: of each class by itself (K,),
    and in balanced accuracy. 1 where no two rows share an id.

    The variance over participants against that of as many independent rows (Kish 1965), at most
    what rows that are always right or wrong together have. In a mean over classes it may be below
    1: who takes both eyes for left ones is right about one of them.
    """
    of_class, present = np.ones(num_classes), np.unique(y_true)
    _, member = participants(y_true, ids)
    if member.max() + 1 == len(y_true):
        return of_class, 1.0
    influence, independent, most = np.zeros(len(y_true)), 0.0, np.ones(num_classes)
    for k in present:
        rows = y_true == k
        _, person = np.unique(member[rows], return_inverse=True)
        sizes, mean, n = np.bincount(person), right[rows].mean(), rows.sum()
        off, expected = right[rows] - mean, mean * (1 - mean) / n
        influence[rows], independent = off / n, independent + expected
        of_class[k] = most[k] = (sizes**2).sum() / n
        if expected > 0 and len(sizes) > 1:
            variance = (np.bincount(person, off) ** 2).sum() / n**2
            of_class[k] = np.clip(variance / expected, 1, most[k])
    if independent == 0:
        return of_class, most.max()
    variance = (np.bincount(member, influence) ** 2).sum()
    return of_class, np.clip(variance / independent, 0.25, len(present) * most.max())


# --------------------------------------------------------------------------- of what ranks the rows


def of_auroc(y_true, probabilities, ids=None):
    """Intervals of each class's AUROC by Newcombe's method 5 (2006), and of their mean by
    `of_mean_over_classes`."""
    num_classes, n = probabilities.shape[1], len(y_true)
    _, member = participants(y_true, ids)
    value, lows, highs = np.full((3, num_classes), np.nan)
    influence = np.zeros((n, num_classes))  # of every row on each AUROC (DeLong et al. 1988)
    for k in np.unique(y_true):
        pos, p = y_true == k, probabilities[:, k]
        if pos.all():
            continue
        ranks = rankdata(p)
        above = (ranks[pos] - rankdata(p[pos])) / (~pos).sum()  # negatives below each positive
        below = 1 - (ranks[~pos] - rankdata(p[~pos])) / pos.sum()  # positives above each negative
        value[k] = above.mean()
        influence[pos, k] = (above - value[k]) / pos.sum()
        influence[~pos, k] = (below - value[k]) / (~pos).sum()
        people = [len(np.unique(member[rows])) for rows in (pos, ~pos)]
        lows[k], highs[k] = newcombe(value[k], *people)
    there = ~np.isnan(value)
    if not there.any():
        return {"auroc_macro_ovr": None, "auroc_per_class": [None] * num_classes}
    both = np.hstack([influence[:, there], influence[:, there].mean(axis=1, keepdims=True)])
    *variances, of_mean = variance_of_sum(both, y_true, ids)
    value, lows, highs = value[there], lows[there], highs[there]
    macro = of_mean_over_classes(value, lows, highs, np.array(variances), of_mean)
    return {"auroc_macro_ovr": macro, "auroc_per_class": by_class(there, lows, highs)}


def by_class(there, lows, highs):
    """[low, high] of every class; None of those that are not there."""
    found = iter(zip(lows.tolist(), highs.tolist()))
    return [list(next(found)) if is_there else None for is_there in there]


def newcombe(auroc, positives, negatives):
    """[low, high]: the AUROCs A from which the measured one is 1.96 of their own standard
    deviations away, which Hanley and McNeil (1982) give for exponential scores."""

    def distance(a):
        more = (positives + negatives) / 2 - 1
        factor = 1 + more * ((1 - a) / (2 - a) + a / (1 + a))
        return abs(auroc - a) - Z * np.sqrt(a * (1 - a) * factor / (positives * negatives))

    ends = []
    for end in (0.0, 1.0):  # where distance is not negative; at auroc it is not positive
        outside, inside = end, auroc
        for _ in range(60):
            middle = (outside + inside) / 2
            if distance(middle) > 0:
                outside = middle
            else:
                inside = middle
        ends.append(inside)
    return ends


def of_average_precision(y_true, value, bootstrap, ids=None):
    """Intervals of each class's average precision, and of their mean by `of_mean_over_classes`.

    Noise pushes an average precision up, in the data and again in each resample; so the estimate is
    less the bias that the resamples show. Around it Wilson's interval, for as many observations as
    the resamples' variance speaks of, and no more than the class has participants.
    """
    values, macro = bootstrap["auprc_per_class"], bootstrap["auprc_macro_ovr"]  # (R, K), (R,)
    there = ~np.isnan(values).any(axis=0)
    first, member = participants(y_true, ids)
    people = np.array(
        [len(np.unique(member[y_true == k])) for k in np.flatnonzero(there)], dtype=float
    )
    estimate = value["auprc_per_class"][there]
    estimate = np.clip(estimate - (values[:, there].mean(axis=0) - estimate), 0, 1)
    variances = values[:, there].var(axis=0) * people / np.maximum(people - 1, 1)
    spread = estimate * (1 - estimate)
    worth = np.minimum(people, spread / np.maximum(variances, 1e-12))
    lows, highs = wilson(estimate, np.where(spread > 0, worth, people))
    of_mean = macro.var() * len(first) / max(len(first) - there.sum(), 1)
    return {
        "auprc_macro_ovr": of_mean_over_classes(estimate, lows, highs, variances, of_mean),
        "auprc_per_class": by_class(there, lows, highs),
    }


def wilson(share, n):
    """Wilson's interval of a share of n -> low, high."""
    centre, width = share + Z**2 / (2 * n), np.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return (centre - Z * width) / (1 + Z**2 / n), (centre + Z * width) / (1 + Z**2 / n)


def of_mean_over_classes(value, lows, highs, variances, variance_of_mean):
    """Interval of the mean of the classes' values, from their intervals (K,): MOVER (Zou and Donner
    2008), widened for the classes being correlated.

    They are correlated, for a row that is taken for another class harms both. So the distances grow
    by the variance of the mean against that of independent classes; where the data have next to
    none, by two classes for each such row.
    """
    if not len(value):
        return None
    doubt = 0.05 * (((highs - lows) / (2 * Z)) ** 2).sum()
    ratio = (len(value) ** 2 * variance_of_mean + 2 * doubt) / (variances.sum() + doubt)
    below, above = (
        np.sqrt(max(ratio, 1) * ((end - value) ** 2).sum()) / len(value) for end in (lows, highs)
    )
    return [max(0.0, float(value.mean() - below)), min(1.0, float(value.mean() + above))]


def variance_of_sum(influence, y_true, ids):
    """Variance of sums over the rows of influence (n, c), drawn as participants within `strata` ->
    (c,)."""
    _, member = participants(y_true, ids)
    of_people = np.zeros((member.max() + 1, influence.shape[1]))
    np.add.at(of_people, member, influence)
    groups, found = strata(y_true, ids), 0.0
    for group in np.unique(groups):
        u = of_people[groups == group]
        found = found + ((u - u.mean(axis=0)) ** 2).sum(axis=0) * len(u) / max(len(u) - 1, 1)
    return found


# --------------------------------------------------------------------------------- of mean losses


def of_mean(losses, y_true, ids=None, most=np.inf):
    """Interval of a mean loss, losses (n,) from 0 to most: what bootstrap-t (Efron and Tibshirani
    1993, section 12.5) gives of the mean and of its logarithm, spanned.

    A few large losses make the mean: a data set that lacks them has a small mean and a small
    spread, which the percentiles of a bootstrap take at its word. None where all losses are 0.
    """
    _, member = participants(y_true, ids)
    groups, mean = strata(y_true, ids), losses.mean()
    rows = np.bincount(member).astype(float)  # (P,)
    off = np.bincount(member, losses) - mean * rows  # (P,)
    inside = (groups[:, None] == np.unique(groups)).astype(float)  # (P, S)
    columns = np.hstack([inside * off[:, None], inside * off[:, None] ** 2, rows[:, None]])
    sizes = inside.sum(axis=0)

    def of_weights(weights):
        """Mean loss and its standard error, both (R,), for weights (R, P)."""
        sums = weighted_sums(weights, columns)
        total, squares, n = sums[:, : len(sizes)], sums[:, len(sizes) : -1], sums[:, -1]
        spread = np.maximum(squares - total**2 / sizes, 0) * sizes / np.maximum(sizes - 1, 1)
        return mean + total.sum(axis=1) / n, np.sqrt(spread.sum(axis=1)) / n

    [_], [error] = of_weights(np.ones((1, len(rows))))
    if mean <= 0:
        return None
    means, errors = of_weights(drawn(tuple(groups.tolist()), len(resample(y_true, ids))))
    known = (errors > 1e-3 * error) & (means > 0)  # a resample of equal losses says nothing
    if error <= 1e-9 * mean or not known.any():
        return [float(mean), float(mean)]
    means, errors = means[known], errors[known]
    low, high = np.percentile((means - mean) / errors, LEVELS)
    plain = [float(max(0.0, mean - high * error)), float(mean - low * error)]
    low, high = np.percentile(np.log(means / mean) / (errors / means), LEVELS)
    of_log = [float(mean * np.exp(-end * error / mean)) for end in (high, low)]
    low, high = spanned([plain, of_log])
    return [low, min(high, most)]  # of a few rows, bootstrap-t may go beyond


def losses_of(y_true, probabilities):
    """{"log_loss", "brier": of every row (n,)}."""
    true = np.eye(probabilities.shape[1])[y_true]
    return {
        "log_loss": scores.negative_log(probabilities[np.arange(len(y_true)), y_true]),
        "brier": ((probabilities - true) ** 2).sum(axis=1),
    }


def with_rare_errors(found, y_true, probabilities):
    """Those of found that are intervals of log-loss, Brier score and ECE, with upper ends that know
    of errors which did not happen, where fewer than RARE answers are wrong.

    As many are taken to be wrong as the interval of accuracy allows. Each then costs what the wrong
    ones do, and what the RARE answers that were nearest to being wrong would have.
    """
    right = probabilities.argmax(axis=1) == y_true
    if (~right).sum() >= RARE or probabilities.shape[1] < 2 or not right.any():
        return {}
    ordered = np.sort(probabilities, axis=1)  # (n, K)
    second = ordered[:, -2]  # what the true class would have had
    near = np.argsort(-np.where(right, second, -1))[: min(RARE, right.sum())]
    if_wrong = {
        "log_loss": scores.negative_log(second),
        "brier": (probabilities**2).sum(axis=1) - 2 * second + 1,
    }
    lowest = found["accuracy"][0]
    highest = {"ece": ordered[:, -1].mean() - lowest}
    for name, own in losses_of(y_true, probabilities).items():
        cost = np.concatenate([own[~right], if_wrong[name][near]]).mean()
        highest[name] = lowest * own[right].mean() + (1 - lowest) * cost
    return {
        name: [found[name][0], max(found[name][1], float(high))]
        for name, high in highest.items()
        if found.get(name) is not None
    }


def of_ece(value, values):
    """95 % interval of ECE, from its value and those of the resamples (R,).

    Noise within a bin adds to ECE in quadrature, once in the data and again in each resample, so
    that the percentiles of a calibrated model would never hold its true ECE, 0. Hence the
    percentiles of ECE squared, less twice the bias that the resamples show.
    """
    bias = 2 * ((values**2).mean() - value**2)
    return np.sqrt(np.maximum(np.percentile(values**2, LEVELS) - bias, 0)).tolist()
