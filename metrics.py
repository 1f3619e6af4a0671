"""Metrics, intervals, floors, alarms, subgroups, calibration, paired comparison: arrays in, numbers out.

    evaluate(y_true, probabilities)            # (n,), (n, K) -> dict, what eval_SPLIT.json holds
    subgroups(y_true, probabilities, groups)   # the score in every site, scanner, age band
    temperature(y_true, probabilities)         # fitted on validation; rescale(probabilities, T) then applies it
    compare(y_true, probs_a, probs_b)          # is A better than B on the same participants?
    compare_all(y_true, {"A": probs_a, ...})   # all pairs, Holm-corrected

A row is a participant, or a volume of one where `ids` repeat. Needs numpy and scipy alone.
"""

import functools
import itertools

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest

RESAMPLES = 10_000  # of bootstrap and permutations: the 2.5th percentile rests on 250, and a p-value can survive Holm over 190 pairs
BINS = 10  # of the reliability plot: with 15 (Guo et al. 2017) most would hold a handful of 159 participants
SMALL = 20  # a group of fewer participants is marked small: the standard error of its balanced accuracy is about 0.1

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "auroc_macro_ovr", "log_loss")
MORE_SCORES = ("macro_precision", "macro_recall", "auprc_macro_ovr", "quadratic_kappa", "brier", "ece")
PER_CLASS = ("precision_per_class", "recall_per_class", "f1_per_class", "auroc_per_class", "auprc_per_class")


def check(y_true, probabilities, num_classes, ids=None):
    """The two as arrays (n,) int and (n, num_classes) float; ValueError that names the participant, or the row where ids is None."""
    y_true, probabilities = np.asarray(y_true), np.asarray(probabilities, dtype=np.float64)
    if y_true.ndim != 1 or len(y_true) == 0:
        raise ValueError(f"y_true must be one label a participant, and at least one; its shape is {y_true.shape}")
    if probabilities.shape != (len(y_true), num_classes):
        raise ValueError(f"probabilities must be ({len(y_true)}, {num_classes}); their shape is {probabilities.shape}")
    if ids is not None and len(ids) != len(y_true):
        raise ValueError(f"ids must be one a row; there are {len(ids)} of them for {len(y_true)} rows")
    who = lambda i: f"row {i}" if ids is None else f"participant {ids[i]}"
    with np.errstate(invalid="ignore"):  # a label that is NaN: refused below
        labels = y_true.astype(np.int64)
    bad = np.flatnonzero((labels != y_true) | (labels < 0) | (labels >= num_classes))
    if len(bad):
        raise ValueError(f"y_true of {who(bad[0])} is {y_true[bad[0]]}, no class of 0 to {num_classes - 1}")
    bad = np.flatnonzero(~np.isfinite(probabilities).all(axis=1) | (probabilities < 0).any(axis=1)
                         | ~np.isclose(probabilities.sum(axis=1), 1, atol=1e-3))
    if len(bad):
        raise ValueError(f"probabilities of {who(bad[0])} are {probabilities[bad[0]].tolist()}, no distribution")
    return labels, probabilities


def negative_log(probabilities):
    return -np.log(np.maximum(probabilities, np.finfo(np.float64).eps))  # clipped as scikit-learn's log_loss does


def ratio(a, b):
    """a / b, NaN where b is 0."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def plain(value):
    """Numbers for JSON: lists of floats, None for NaN."""
    return [plain(v) for v in value] if np.ndim(value) else None if np.isnan(value) else float(value)


def bins(probabilities):
    """The reliability bin (b / BINS, (b + 1) / BINS] that the probability of each row's answer falls into -> (n,)."""
    return np.digitize(probabilities.max(axis=1), np.arange(1, BINS) / BINS, right=True)


def ranking_scores(y_true, probabilities, weights):
    """One-vs-rest AUROC and average precision -> two (R, K); NaN for a class without positives, of AUROC also without negatives.

    AUROC is the share of (positive, negative) pairs in order, ties half; average precision the mean over the positives of the
    precision at their threshold, tied rows all above it: scikit-learn's step sum, each step spread over its positives.
    """
    auroc, auprc = np.full((2, len(weights), probabilities.shape[1]), np.nan)
    for k in np.unique(y_true):
        pos, neg = y_true == k, y_true != k
        p, q, w_pos, w_neg = probabilities[pos, k], probabilities[neg, k], weights[:, pos], weights[:, neg]
        above, tied = q[:, None] > p, q[:, None] == p  # (negatives, positives)
        # weight before each positive (R, positives)
        wrong, ties = (w_neg @ part.astype(float) if part.any() else 0 for part in (above, tied))
        hits, count = w_pos @ (p[:, None] >= p).astype(float), w_pos.sum(1)
        auroc[:, k] = 1 - ratio((w_pos * (wrong + 0.5 * ties)).sum(1), count * w_neg.sum(1))
        auprc[:, k] = ratio((w_pos * hits / np.maximum(hits + wrong + ties, 1)).sum(1), count)
    return auroc, auprc


def scores(y_true, probabilities, weights):
    """Every score of every resample. weights (R, n): how often a row counts in each -> dict of (R,), per class (R, K); NaN: undefined.

    Balanced accuracy is the mean recall over the classes that y_true has, Brier the sum of squares over the classes (0 to 2),
    kappa weighted by the squared distance of the classes, ECE the mean distance of confidence and accuracy over BINS bins.
    """
    classes, total, one_hot = np.arange(probabilities.shape[1]), weights.sum(1), np.eye(probabilities.shape[1])
    y_pred, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    true, pred, hits = (weights @ part for part in (one_hot[y_true], one_hot[y_pred], one_hot[y_true] * one_hot[y_pred]))  # (R, K) each
    precision, recall, f1 = ratio(hits, pred), ratio(hits, true), ratio(2 * hits, true + pred)
    auroc, auprc = ranking_scores(y_true, probabilities, weights)
    # of kappa: the sum of squares that is expected of answers with these shares that know nothing of the truth
    unrelated = true @ classes**2 + pred @ classes**2 - 2 * (true @ classes) * (pred @ classes) / total
    mean = lambda values: ratio(np.nansum(values, axis=1), (~np.isnan(values)).sum(1))  # over the classes that have a value
    return {
        "accuracy": hits.sum(1) / total, "balanced_accuracy": mean(recall), "auroc_macro_ovr": mean(auroc), "auprc_macro_ovr": mean(auprc),
        "macro_precision": np.nan_to_num(precision).mean(1), "macro_recall": np.nan_to_num(recall).mean(1),
        "macro_f1": np.nan_to_num(f1).mean(1),
        "quadratic_kappa": 1 - ratio(weights @ (y_true - y_pred) ** 2.0, unrelated),
        "log_loss": weights @ negative_log(probabilities[np.arange(len(y_true)), y_true]) / total,
        "brier": weights @ ((probabilities - one_hot[y_true]) ** 2).sum(1) / total,
        "ece": np.abs(weights @ (np.eye(BINS)[bins(probabilities)] * (confidence - (y_true == y_pred))[:, None])).sum(1) / total,
        "precision_per_class": precision, "recall_per_class": recall, "f1_per_class": f1, "auroc_per_class": auroc,
        "auprc_per_class": auprc,
    }


def score(y_true, probabilities, num_classes=4, ids=None):
    """The scores alone, quick: once an epoch. Arguments and names as in `evaluate`."""
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    values = {name: value[0] for name, value in scores(y_true, probabilities, np.ones((1, len(y_true)))).items()}
    for name in ("precision_per_class", "recall_per_class", "f1_per_class"):
        values[name] = np.nan_to_num(values[name])  # 0 where there is nothing to divide by, as in scikit-learn with zero_division=0
    return {
        "n": len(y_true), **{name: plain(value) for name, value in values.items()},
        "true_counts": np.bincount(y_true, minlength=num_classes).tolist(),
        "predicted_counts": np.bincount(probabilities.argmax(axis=1), minlength=num_classes).tolist(),
    }


def quick_scores(y_true, probabilities):
    """Balanced accuracy and log-loss of G models at once: y_true (n,), probabilities (G, n, K) -> two lists of G."""
    right = probabilities.argmax(axis=2) == y_true  # (G, n)
    recall = [right[:, y_true == k].mean(axis=1) for k in np.unique(y_true)]
    return np.mean(recall, axis=0).tolist(), negative_log(probabilities[:, np.arange(len(y_true)), y_true]).mean(axis=1).tolist()


@functools.lru_cache(maxsize=2)
def drawn(labels, resamples):
    """`resample`, kept: two runs with the same labels meet the same resamples, and 190 pairs of runs draw them once."""
    weights = np.zeros((resamples, len(labels)))
    for k in set(labels):
        members = np.flatnonzero(np.array(labels) == k)
        draws = np.random.default_rng(k).integers(len(members), size=weights[:, members].shape)
        draws += len(members) * np.arange(resamples)[:, None]  # a range of numbers of its own for every resample
        weights[:, members] = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
    weights.flags.writeable = False
    return weights


def participants(y_true, ids):
    """First row of every participant (P,), and the participant of every row (n,)."""
    if ids is None:
        return np.arange(len(y_true)), np.arange(len(y_true))
    _, first, member = np.unique(np.asarray(ids), return_index=True, return_inverse=True)
    bad = np.flatnonzero(y_true[first][member] != y_true)
    if len(bad):
        raise ValueError(f"participant {ids[bad[0]]} has rows of two classes")
    return first, member


def resample(y_true, ids=None):
    """Bootstrap over participants within each class -> (RESAMPLES, n): how often each row was drawn. Every class keeps its size.

    Rows that share an id are drawn together. Read-only.
    """
    first, member = participants(y_true, ids)
    weights = drawn(tuple(y_true[first].tolist()), RESAMPLES)
    return weights if ids is None else weights[:, member]


def permuted_scores(y_true, probabilities, ids=None):
    """The scores that these predictions get when the labels are permuted among the participants -> as `scores`.

    Every row is there once with each class as its label, and counts where a permutation gives it that one.
    """
    first, member = participants(y_true, ids)
    permuted = np.random.default_rng(0).permuted(np.tile(y_true[first], (RESAMPLES, 1)), axis=1)[:, member]  # (R, n)
    classes = np.unique(y_true)
    labels, answers = np.repeat(classes, len(y_true)), np.tile(probabilities, (len(classes), 1))  # (classes * n,), (classes * n, K)
    parts = [scores(labels, answers, np.concatenate([part == k for k in classes], axis=1).astype(float))
             for part in np.array_split(permuted, max(1, RESAMPLES // 1000))]  # in parts, to spare memory
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interval(values):
    """Central 95 % of the resamples (R,) that the metric could score, [low, high]; of (R, K), a list; None where it could score none."""
    if values.ndim == 2:
        return [interval(v) for v in values.T]
    values = values[~np.isnan(values)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if len(values) else None


def ece_interval(value, values):
    """95 % interval of ECE: percentiles of its square, less twice its bias, once for the resample's noise and once for the data's.

    Noise within a bin adds to ECE in quadrature, in the data and again in each resample: the plain percentiles of a calibrated
    model would never hold its true ECE, 0.
    """
    square = values**2
    return np.sqrt(np.maximum(np.percentile(square, [2.5, 97.5]) - 2 * (square.mean() - value**2), 0)).tolist()


def random_floor(y_true, prior):
    """Expected scores of answering at random with class shares prior (K,), and of stating the prior as everyone's probabilities.

    Exact. The answers give accuracy, precision, recall, F1 and kappa; the stated probabilities give AUROC, AUPRC, log-loss, Brier, ECE.
    """
    n, classes = len(y_true), range(len(prior))
    counts = np.bincount(y_true, minlength=len(prior))
    share, there, m = counts / n, counts > 0, np.arange(n + 1)
    chances = [binom.pmf(m, n, p) for p in prior]  # of answering class k m times; m * share of them are then right on average
    recall, precision = np.where(there, prior, 0), share * [1 - c[0] for c in chances]
    f1 = np.array([(c * 2 * m * share[k] / np.maximum(counts[k] + m, 1)).sum() for k, c in enumerate(chances)])
    stated = scores(y_true, np.tile(prior, (n, 1)), np.ones((1, n)))
    return {
        "accuracy": float(share @ prior), "balanced_accuracy": float(np.mean(prior[there])), "macro_f1": float(f1.mean()),
        "macro_precision": float(precision.mean()), "macro_recall": float(recall.mean()),
        "quadratic_kappa": None if max(share * prior) == 1 else 0.0,  # None: nothing but agreement is possible
        "precision_per_class": plain(precision), "recall_per_class": plain(recall), "f1_per_class": plain(f1),
        **{name: plain(stated[name][0]) for name in ("auroc_macro_ovr", "auprc_macro_ovr", "log_loss", "brier", "ece",
                                                     "auroc_per_class", "auprc_per_class")},
    }


def reliability(y_true, probabilities):
    """The bins of the reliability plot that are not empty -> list of {confidence, accuracy, count}, means over the bin's rows."""
    found, confidence, right = bins(probabilities), probabilities.max(axis=1), probabilities.argmax(axis=1) == y_true
    return [{"confidence": float(confidence[found == b].mean()), "accuracy": float(right[found == b].mean()),
             "count": int((found == b).sum())} for b in np.unique(found)]


def score_with_intervals(y_true, probabilities, num_classes=4, ids=None):
    """`score`, with ci95, resamples and skipped as in `evaluate`: what costs little."""
    result = score(y_true, probabilities, num_classes, ids)
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    names, resampled = SCORES + MORE_SCORES + PER_CLASS, scores(y_true, probabilities, resample(y_true, ids))
    return result | {
        "participants": len(participants(y_true, ids)[0]),
        "ci95": {name: interval(resampled[name]) for name in names} | {"ece": ece_interval(result["ece"], resampled["ece"])},
        "resamples": RESAMPLES,
        "skipped": {name: np.isnan(resampled[name]).sum(0).tolist() for name in names},
    }


def evaluate(y_true, probabilities, num_classes=4, ids=None, prior=None, groups=None):
    """Scores of one split -> dict, ready for JSON (None: undefined).

    y_true (n,) class indices, probabilities (n, num_classes), ids (n,) names of the participants: rows that share one are drawn
    together. prior (num_classes,) class shares of training (default: the split's own). groups {"site": (n,) of text, ...}, or one (n,).
      ci95               95 % interval of each score: percentiles of a bootstrap over participants, stratified by class
                         (ECE: `ece_interval`)
      resamples, skipped how many resamples, and how many of them each score could not score
      majority_baseline  accuracy of always answering the split's most frequent class
      majority           each score of that answer (None: it has none)
      random             each score expected of answering at random with shares prior: `random_floor`
      chance_band        central 95 % of balanced accuracy when these predictions meet permuted labels; chance: of each score
      reliability        bins of the reliability plot
      subgroups          {"site": what `subgroups` finds, ...}
      alarms             sentences; empty when all is well
    """
    result = score_with_intervals(y_true, probabilities, num_classes, ids)
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    shares = np.bincount(y_true, minlength=num_classes) / len(y_true)
    prior = shares if prior is None else np.asarray(prior, dtype=float)
    if prior.shape != (num_classes,) or not (prior >= 0).all() or not np.isclose(prior.sum(), 1, atol=1e-3):
        raise ValueError(f"prior must be {num_classes} class shares that add up to 1; it is {prior.tolist()}")
    groups = {} if groups is None else groups if isinstance(groups, dict) else {"group": groups}
    chance = permuted_scores(y_true, probabilities, ids)
    cells = np.bincount(num_classes * y_true + probabilities.argmax(axis=1), minlength=num_classes**2)
    majority = score(y_true, np.eye(num_classes)[np.full(len(y_true), shares.argmax())], num_classes)
    names = SCORES + MORE_SCORES + PER_CLASS
    result |= {
        "confusion_matrix": cells.reshape(num_classes, -1).tolist(),  # rows: true
        "majority_baseline": float(shares.max()),
        "majority": {name: majority[name] for name in names} | dict.fromkeys(("log_loss", "brier", "ece")),
        "random": random_floor(y_true, prior),
        "chance_band": interval(chance["balanced_accuracy"]),
        "chance": {name: interval(chance[name]) for name in names},
        "reliability": reliability(y_true, probabilities),
        "subgroups": {name: subgroups(y_true, probabilities, group, num_classes, ids) for name, group in groups.items()},
    }
    result["alarms"] = alarms(result)
    return result


def subgroups(y_true, probabilities, groups, num_classes=4, ids=None):
    """Balanced accuracy in every group -> list of dicts. groups (n,) of text; ids as in `evaluate`.

      n, classes               participants, and classes present: the balanced accuracy is over these
      balanced_accuracy, ci95  bootstrap of the whole split; resamples that lost one of the group's classes are skipped, and counted
      small                    fewer than SMALL participants, or a class of the split with none
      rest                     balanced accuracy of all others
      p_above_rest             share of resamples in which the group is not above the rest (None: one of the two is small)
    """
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    groups, people = np.asarray(groups).astype(str), np.arange(len(y_true)) if ids is None else np.asarray(ids)
    if groups.shape != y_true.shape:
        raise ValueError(f"groups must be one a row, ({len(y_true)},); their shape is {groups.shape}")
    right, weights, found = probabilities.argmax(axis=1) == y_true, np.vstack([np.ones(len(y_true)), resample(y_true, ids)]), []

    def part(inside):  # -> participants, classes, small, balanced accuracy (1 + RESAMPLES,): of the data, then of each resample
        n, classes = len(np.unique(people[inside])), np.unique(y_true[inside])
        recalls = [ratio(weights[:, r] @ right[r], weights[:, r].sum(1)) for r in (inside & (y_true == k) for k in classes)]
        return n, classes, n < SMALL or len(classes) < len(np.unique(y_true)), np.mean(recalls or [np.full(len(weights), np.nan)], axis=0)

    for group in np.unique(groups):
        (n, classes, small, values), (*_, rest_small, rest) = part(groups == group), part(groups != group)
        lead, leads = (values - rest)[0], (values - rest)[1:]
        leads = lead + (leads - lead) * np.sqrt(n / max(n - len(classes), 1))  # spread as in `compare_all`
        leads = leads[~np.isnan(leads)]
        found.append({
            "group": str(group), "n": n, "classes": classes.tolist(), "balanced_accuracy": plain(values[0]), "ci95": interval(values[1:]),
            "skipped": int(np.isnan(values[1:]).sum()), "small": bool(small), "rest": plain(rest[0]),
            "p_above_rest": None if small or rest_small else float(((leads <= 1e-12).sum() + 1) / (len(leads) + 1)),
        })
    return found


def alarms(result):
    """What a reader must know before believing the scores of `evaluate`, in words -> list of sentences."""
    found, true, predicted, n = [], result["true_counts"], result["predicted_counts"], result["n"]
    never = [k for k, count in enumerate(predicted) if count == 0 and true[k] > 0]
    if never:
        found.append(f"model collapse: class {', '.join(map(str, never))} never predicted")
    zero = [k for k, f1 in enumerate(result["f1_per_class"]) if f1 == 0 and true[k] > 0 and k not in never]
    if zero:
        found.append(f"class {', '.join(map(str, zero))} predicted, but never rightly (F1 = 0)")
    absent = [k for k, count in enumerate(true) if count == 0]
    if absent:
        found.append(f"class {', '.join(map(str, absent))} has no participant in this split")
    for k, hits in enumerate(np.diag(result["confusion_matrix"])):
        # both far and beyond chance: 10 points, and McNemar's test of the class's share at 5 % over all classes (Bonferroni)
        if abs(predicted[k] - true[k]) > 0.1 * n and mcnemar(predicted[k] - hits, true[k] - hits) * len(true) < 0.05:
            found.append(f"class {k} is answered {predicted[k]} times and true {true[k]} times of {n}: shares far apart")
    if result["accuracy"] <= result["majority_baseline"]:
        found.append(f"accuracy {result['accuracy']:.4f} is not above {result['majority_baseline']:.4f}, "
                     "the share of the most frequent class: always answering that class does as well")
    low, high = result["chance_band"]
    if result["balanced_accuracy"] <= high:
        found.append(f"balanced accuracy {result['balanced_accuracy']:.3f} is not above the chance band {low:.3f} to {high:.3f}: "
                     "permuted labels do as well")
    # A group carries the result when it is above the rest by more than chance, at 5 % over all groups that are large enough
    # (Bonferroni): then what the score says of the others is less than it seems. Groups below the rest are in the table.
    groups = [(name, g) for name, rows in result["subgroups"].items() for g in rows if g["p_above_rest"] is not None]
    for name, g in groups:
        if g["p_above_rest"] * len(groups) < 0.05:
            found.append(f"{name} {g['group']} carries the result: balanced accuracy {g['balanced_accuracy']:.3f} "
                         f"({g['n']} participants), {g['rest']:.3f} without it")
    return found


def gap_alarm(train, validation):
    """Balanced accuracy on training and validation -> [] or one sentence, where training is more than 0.2 above."""
    if train - validation <= 0.2:
        return []
    return [f"balanced accuracy is {train:.3f} on training and {validation:.3f} on validation, more than 0.2 below: overfitting"]


def rescale(probabilities, T):
    """probabilities ** (1 / T), renormalised (n, K): T > 1 makes them flatter. Clipped at the float64 eps first, as in the log-loss."""
    logits = -negative_log(np.asarray(probabilities, dtype=np.float64)) / T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def temperature(y_true, probabilities):
    """The T that minimises the log-loss of rescale(probabilities, T) (Guo et al. 2017); to be fitted on validation.

    Sought between 0.05 and 20, where the loss has one minimum: predictions that separate the classes perfectly would have T go
    to 0, hopeless ones to infinity. 1 where no T is better.
    """
    y_true, probabilities = check(y_true, probabilities, np.shape(probabilities)[-1])
    loss = lambda log_T: negative_log(rescale(probabilities, np.exp(log_T))[np.arange(len(y_true)), y_true]).mean()
    best = minimize_scalar(loss, bounds=np.log([0.05, 20]), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(best.x)) if best.fun < loss(0.0) - 1e-12 else 1.0


def mcnemar(only_a, only_b):
    """Exact two-sided p-value of McNemar's test: only_a of the discordant pairs are for A, only_b for B, each with chance 1/2."""
    return float(binomtest(int(only_a), int(only_a + only_b)).pvalue) if only_a + only_b else 1.0


def holm(p_values):
    """p-values adjusted for their number by Holm's step-down method (Holm 1979) -> (m,)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def compare_all(y_true, runs, ids=None):
    """Is one of these runs better than another? Paired bootstrap over the same participants, within each class -> a dict a pair.

    y_true (n,), runs {name: probabilities (n, K)}, ids (n,) names for messages.
      a, b, balanced_accuracy_a, balanced_accuracy_b
      difference        balanced accuracy of a minus that of b; ci95 its 95 % interval
      p_value           two-sided (Efron & Tibshirani 1993: share of resamples on the far side of zero, doubled); p_holm over all pairs
      only_a_right, only_b_right, mcnemar_p   participants that one of the two answers rightly, and McNemar's exact test of the two
                        numbers: of accuracy, where p_value is of balanced accuracy
      sentence          the verdict, by p_holm at 5 %
    Of two equal models of 159 participants, p_value < 0.05 in 5 to 6 % of data sets. A gap of 10 points is found in 43 % when their
    errors are independent, in 73 % when half of B's hits and errors are A's, in nearly all when 80 % are (tests/test_metrics.py).
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two runs or more; there are {len(runs)}")
    right = {}
    for name, probabilities in runs.items():
        try:
            labels, p = check(y_true, probabilities, np.shape(probabilities)[-1], ids)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        right[name] = p.argmax(axis=1) == labels
    y_true, n = labels, len(labels)
    m = np.bincount(y_true)[y_true]  # a bootstrap of m has (m - 1) / m of the variance: made good for every class (Rao & Wu 1988)
    weights = np.vstack([np.ones(n), 1 + (resample(y_true) - 1) * np.sqrt(m / np.maximum(m - 1, 1))])
    weights /= m * len(np.unique(y_true))  # mean recall is the weighted sum of the right answers
    values = {name: weights @ r for name, r in right.items()}  # of the data, then of each resample
    pairs = []
    for a, b in itertools.combinations(runs, 2):
        difference, differences = (values[a] - values[b])[0], (values[a] - values[b])[1:]
        tail = min((differences <= 1e-12).sum(), (differences >= -1e-12).sum())  # sums of recalls are equal only to rounding
        only_a, only_b = int((right[a] & ~right[b]).sum()), int((right[b] & ~right[a]).sum())
        pairs.append({
            "a": a, "b": b, "n": n, "balanced_accuracy_a": float(values[a][0]), "balanced_accuracy_b": float(values[b][0]),
            "difference": float(difference), "ci95": interval(differences), "p_value": float(min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))),
            "only_a_right": only_a, "only_b_right": only_b, "mcnemar_p": mcnemar(only_a, only_b),
        })
    for pair, p in zip(pairs, holm([pair["p_value"] for pair in pairs])):
        pair["p_holm"] = float(p)
        pair["sentence"] = verdict(pair, len(pairs))
    return pairs


def verdict(pair, of):
    """One sentence on a pair of `compare_all`, one of so many pairs."""
    a, b = ("a", "b") if pair["difference"] >= 0 else ("b", "a")
    low, high = pair["ci95"] if a == "a" else (-v for v in reversed(pair["ci95"]))
    start = f"{pair[a]} is better than {pair[b]}" if pair["p_holm"] < 0.05 else f"no difference between {pair[a]} and {pair[b]} is shown"
    return (f"{start}: balanced accuracy {pair['balanced_accuracy_' + a]:.3f} against {pair['balanced_accuracy_' + b]:.3f}, difference "
            f"{abs(pair['difference']):.3f} (95 % interval {low:.3f} to {high:.3f}), p = {pair['p_value']:.4f}"
            + (f", {pair['p_holm']:.4f} by Holm over {of} pairs" if of > 1 else "") + f", the same {pair['n']} participants")


def compare(y_true, probabilities_a, probabilities_b, ids=None):
    """Is A better than B on the same participants? The one pair of `compare_all` -> dict."""
    return compare_all(y_true, {"A": probabilities_a, "B": probabilities_b}, ids)[0]
