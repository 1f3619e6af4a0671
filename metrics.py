"""Metrics, intervals, chance bands, paired comparison, alarms: arrays in, numbers out.

    evaluate(y_true, probabilities)       # (n,), (n, K) -> dict, what eval_SPLIT.json holds
    compare(y_true, probs_a, probs_b)     # is A better than B on the same participants?

A row is a participant. Needs numpy and scikit-learn (which brings scipy) alone.
"""

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import confusion_matrix

RESAMPLES = 2000  # of the bootstrap and of the permutations; the 2.5th percentile then rests on 50 of them

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "auroc_macro_ovr", "log_loss")


def check(y_true, probabilities, num_classes):
    y_true, probabilities = np.asarray(y_true), np.asarray(probabilities, dtype=np.float64)
    if y_true.ndim != 1 or len(y_true) == 0:
        raise ValueError(f"y_true must be one label a participant, and at least one; its shape is {y_true.shape}")
    if probabilities.shape != (len(y_true), num_classes):
        raise ValueError(f"probabilities must be ({len(y_true)}, {num_classes}); their shape is {probabilities.shape}")
    labels = y_true.astype(np.int64)
    bad = np.flatnonzero((labels != y_true) | (labels < 0) | (labels >= num_classes))
    if len(bad):
        raise ValueError(f"y_true of row {bad[0]} is {y_true[bad[0]]}, no class of 0 to {num_classes - 1}")
    bad = np.flatnonzero(~np.isfinite(probabilities).all(axis=1) | (probabilities < 0).any(axis=1)
                         | ~np.isclose(probabilities.sum(axis=1), 1, atol=1e-3))
    if len(bad):
        raise ValueError(f"probabilities of row {bad[0]} are {probabilities[bad[0]].tolist()}, no distribution")
    return labels, probabilities


def balanced_accuracy(y_true, y_pred, weights):
    """Mean recall over the classes that y_true has. weights (R, n): how often a participant counts in each resample -> (R,)."""
    recalls = [weights[:, (y_true == k) & (y_pred == k)].sum(1) / weights[:, y_true == k].sum(1) for k in np.unique(y_true)]
    return np.mean(recalls, axis=0)


def macro_f1(y_true, y_pred, weights, num_classes):
    """Mean F1 over all classes; a class neither present nor predicted counts 0, as in scikit-learn with zero_division=0 -> (R,)."""
    scores = []
    for k in range(num_classes):
        true, pred = y_true == k, y_pred == k
        denominator = weights[:, true].sum(1) + weights[:, pred].sum(1)
        scores.append(2 * weights[:, true & pred].sum(1) / np.maximum(denominator, 1))
    return np.mean(scores, axis=0)


def auroc_macro_ovr(y_true, probabilities, weights):
    """Mean one-vs-rest AUROC over the classes that can be scored: share of (positive, negative) pairs in order, ties half -> (R,)."""
    scores = []
    for k in np.unique(y_true):
        pos, neg = y_true == k, y_true != k
        if not neg.any():
            continue
        a, b = probabilities[pos, k][:, None], probabilities[neg, k][None, :]
        in_order = (a > b) + 0.5 * (a == b)  # (positives, negatives)
        pairs = ((weights[:, pos] @ in_order) * weights[:, neg]).sum(1)
        scores.append(pairs / (weights[:, pos].sum(1) * weights[:, neg].sum(1)))
    return np.mean(scores, axis=0) if scores else np.full(len(weights), np.nan)


def resample(y_true, rng):
    """Bootstrap over participants within each class -> (RESAMPLES, n): how often each was drawn. Every class keeps its size."""
    weights = np.zeros((RESAMPLES, len(y_true)))
    for k in np.unique(y_true):
        members = np.flatnonzero(y_true == k)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=RESAMPLES)
    return weights


def permuted_scores(y_true, probabilities, rng):
    """The scores that these predictions get when the labels are permuted among the participants -> dict of (RESAMPLES,)."""
    n, num_classes = probabilities.shape
    y_pred, nll = probabilities.argmax(axis=1), negative_log(probabilities)
    permuted = rng.permuted(np.tile(y_true, (RESAMPLES, 1)), axis=1)  # (R, n)
    recall, f1, auroc = [], [], []
    for k in range(num_classes):
        true, pred = permuted == k, y_pred == k
        positives, hits = (y_true == k).sum(), (true & pred).sum(1)
        f1.append(2 * hits / max(positives + pred.sum(), 1))
        if positives:
            recall.append(hits / positives)
        if 0 < positives < n:  # Mann-Whitney U from the ranks, ties at their mean rank
            u = true @ rankdata(probabilities[:, k]) - positives * (positives + 1) / 2
            auroc.append(u / (positives * (n - positives)))
    return {
        "accuracy": (permuted == y_pred).mean(1),
        "balanced_accuracy": np.mean(recall, axis=0),
        "macro_f1": np.mean(f1, axis=0),
        "auroc_macro_ovr": np.mean(auroc, axis=0) if auroc else np.full(RESAMPLES, np.nan),
        "log_loss": nll[np.arange(n), permuted].mean(1),
    }


def negative_log(probabilities):
    return -np.log(np.maximum(probabilities, np.finfo(np.float64).eps))  # clipped as scikit-learn's log_loss does


def interval(values):
    """Central 95 % of the resamples as [low, high]; None where the metric has no value."""
    return None if np.isnan(values).any() else [float(v) for v in np.percentile(values, [2.5, 97.5])]


def score(y_true, probabilities, num_classes=4):
    """The scores alone, quick: once an epoch. Arguments and names as in `evaluate`."""
    y_true, probabilities = check(y_true, probabilities, num_classes)
    y_pred, ones = probabilities.argmax(axis=1), np.ones((1, len(y_true)))
    hits, true, predicted = (np.bincount(rows, minlength=num_classes) for rows in (y_true[y_true == y_pred], y_true, y_pred))
    f1 = 2 * hits / np.maximum(true + predicted, 1)
    auroc = auroc_macro_ovr(y_true, probabilities, ones)[0]
    return {
        "n": len(y_true),
        "accuracy": float((y_true == y_pred).mean()),
        "balanced_accuracy": float(balanced_accuracy(y_true, y_pred, ones)[0]),
        "macro_f1": float(f1.mean()),
        "f1_per_class": f1.tolist(),
        "auroc_macro_ovr": None if np.isnan(auroc) else float(auroc),
        "log_loss": float(negative_log(probabilities)[np.arange(len(y_true)), y_true].mean()),
        "true_counts": true.tolist(),
        "predicted_counts": predicted.tolist(),
    }


def quick_scores(y_true, probabilities):
    """Balanced accuracy and log-loss of G models at once: y_true (n,), probabilities (G, n, K) -> two lists of G."""
    right = probabilities.argmax(axis=2) == y_true  # (G, n)
    recall = [right[:, y_true == k].mean(axis=1) for k in np.unique(y_true)]
    return np.mean(recall, axis=0).tolist(), negative_log(probabilities[:, np.arange(len(y_true)), y_true]).mean(axis=1).tolist()


def evaluate(y_true, probabilities, num_classes=4):
    """Scores of one split -> dict, ready for JSON.

    y_true (n,) class indices, probabilities (n, num_classes).
      ci95               95 % interval of each score: bootstrap over participants, stratified by class
      majority_baseline  accuracy of always answering the split's most frequent class
      majority           each score of that answer (None: it has none)
      chance_band        central 95 % of balanced accuracy when these predictions meet permuted labels
      chance             the same for each score
      alarms             sentences; empty when all is well
    auroc_macro_ovr is None when the split has one class only.
    """
    result = score(y_true, probabilities, num_classes)
    y_true, probabilities = check(y_true, probabilities, num_classes)
    y_pred, n, rng = probabilities.argmax(axis=1), len(y_true), np.random.default_rng(0)
    weights = resample(y_true, rng)
    majority = score(y_true, np.eye(num_classes)[np.full(n, np.bincount(y_true).argmax())], num_classes)
    chance = permuted_scores(y_true, probabilities, rng)
    result |= {
        "confusion_matrix": confusion_matrix(y_true, y_pred, labels=range(num_classes)).tolist(),
        "ci95": {
            "accuracy": interval(weights @ (y_pred == y_true) / n),
            "balanced_accuracy": interval(balanced_accuracy(y_true, y_pred, weights)),
            "macro_f1": interval(macro_f1(y_true, y_pred, weights, num_classes)),
            "auroc_macro_ovr": interval(auroc_macro_ovr(y_true, probabilities, weights)),
            "log_loss": interval(weights @ negative_log(probabilities)[np.arange(n), y_true] / n),
        },
        "majority_baseline": max(result["true_counts"]) / n,
        "majority": {name: majority[name] for name in SCORES} | {"log_loss": None},
        "chance_band": interval(chance["balanced_accuracy"]),
        "chance": {name: interval(values) for name, values in chance.items()},
    }
    result["alarms"] = alarms(result)
    return result


def alarms(result):
    """What a reader must know before believing the scores of `evaluate`, in words -> list of sentences."""
    found = []
    never = [k for k, count in enumerate(result["predicted_counts"]) if count == 0 and result["true_counts"][k] > 0]
    if never:
        found.append(f"model collapse: class {', '.join(map(str, never))} never predicted")
    zero = [k for k, f1 in enumerate(result["f1_per_class"]) if f1 == 0 and result["true_counts"][k] > 0 and k not in never]
    if zero:
        found.append(f"class {', '.join(map(str, zero))} predicted, but never rightly (F1 = 0)")
    absent = [k for k, count in enumerate(result["true_counts"]) if count == 0]
    if absent:
        found.append(f"class {', '.join(map(str, absent))} has no participant in this split")
    if result["accuracy"] <= result["majority_baseline"]:
        found.append(f"accuracy {result['accuracy']:.4f} is not above {result['majority_baseline']:.4f}, "
                     "the share of the most frequent class: always answering that class does as well")
    low, high = result["chance_band"]
    if result["balanced_accuracy"] <= high:
        found.append(f"balanced accuracy {result['balanced_accuracy']:.3f} is not above the chance band {low:.3f} to {high:.3f}: "
                     "permuted labels do as well")
    return found


def compare(y_true, probabilities_a, probabilities_b):
    """Is A better than B? Paired bootstrap over the same participants, within each class -> dict.

    difference: balanced accuracy of A minus that of B, ci95 its 95 % interval, p_value two-sided (Efron & Tibshirani 1993,
    the share of resamples on the far side of zero, doubled).
    """
    num_classes = np.asarray(probabilities_a).shape[-1]
    y_true, a = check(y_true, probabilities_a, num_classes)
    _, b = check(y_true, probabilities_b, num_classes)
    pred_a, pred_b = a.argmax(axis=1), b.argmax(axis=1)
    weights = resample(y_true, np.random.default_rng(0))
    ones = np.ones((1, len(y_true)))
    score_a, score_b = (float(balanced_accuracy(y_true, pred, ones)[0]) for pred in (pred_a, pred_b))
    differences = balanced_accuracy(y_true, pred_a, weights) - balanced_accuracy(y_true, pred_b, weights)
    tail = min((differences <= 1e-12).sum(), (differences >= -1e-12).sum())  # sums of recalls are equal only to rounding
    return {
        "n": len(y_true),
        "balanced_accuracy_a": score_a,
        "balanced_accuracy_b": score_b,
        "difference": score_a - score_b,
        "ci95": interval(differences),
        "p_value": float(min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))),
    }
