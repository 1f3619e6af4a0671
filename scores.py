"""Scores of predictions, as they are and in every resample: arrays in, arrays out.

    score(y_true, probabilities)                  # (n,), (n, K) -> dict of numbers
    resampled(y_true, probabilities, weights)     # weights (R, n) -> dict of (R,), per class (R, K)
    relabelled(labels, probabilities)             # labels (R, n) -> the same, of other labels

In shapes, n is the number of rows, K of classes, R of resamples. Time and memory grow as a line in
n: the rows are sorted once for each class, and every resample adds up its weights in that order.
Needs numpy alone.
"""

import numpy as np

from resampling import parts

# of the reliability plot: with 15 (Guo et al. 2017), most would hold a handful of 159 participants
BINS = 10

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "auroc_macro_ovr", "log_loss")
# fmt: off
MORE_SCORES = ("macro_precision", "macro_recall", "auprc_macro_ovr", "quadratic_kappa", "brier",
               "ece")
PER_CLASS = ("precision_per_class", "recall_per_class", "f1_per_class", "auroc_per_class",
             "auprc_per_class")
# fmt: on


def check(y_true, probabilities, num_classes, ids=None):
    """The two as arrays, (n,) int and (n, num_classes) float. ValueError that names the participant
    whose values are wrong, or the row where ids is None."""
    y_true, probabilities = np.asarray(y_true), np.asarray(probabilities, dtype=np.float64)
    n, shape = len(y_true), probabilities.shape
    if y_true.ndim != 1 or n == 0:
        raise ValueError(
            f"y_true must be one label a row, and at least one; its shape is {y_true.shape}"
        )
    if shape != (n, num_classes):
        raise ValueError(f"probabilities must be ({n}, {num_classes}); their shape is {shape}")
    if ids is not None and len(ids) != n:
        raise ValueError(f"ids must be one a row; there are {len(ids)} of them for {n} rows")
    name = lambda i: f"row {i}" if ids is None else f"participant {ids[i]}"
    for i in np.flatnonzero(~np.isin(y_true, np.arange(num_classes))):
        raise ValueError(f"y_true of {name(i)} is {y_true[i]}, no class of 0 to {num_classes - 1}")
    for i in np.flatnonzero(~are_distributions(probabilities)):
        raise ValueError(
            f"probabilities of {name(i)} are {probabilities[i].tolist()}, no distribution"
        )
    return y_true.astype(np.int64), probabilities


def are_distributions(probabilities):
    """Whether these are no less than 0 and add up to 1 -> bool of every row (..., K)."""
    return (probabilities >= 0).all(axis=-1) & np.isclose(probabilities.sum(axis=-1), 1, atol=1e-3)


def negative_log(probabilities):
    """-log of probabilities of any shape, clipped at the float64 eps as scikit-learn's log_loss
    clips them."""
    return -np.log(np.maximum(probabilities, np.finfo(np.float64).eps))


def ratio(a, b):
    """a / b, NaN where b is 0."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def plain(value):
    """Numbers for JSON: lists of floats, None for NaN."""
    if np.ndim(value):
        return [plain(v) for v in value]
    return None if np.isnan(value) else float(value)


def bins(confidence):
    """Bin of the reliability plot that each row falls into -> (n,). Confidence is the row's largest
    probability; bin b is (b / BINS, (b + 1) / BINS]."""
    return np.digitize(confidence, np.arange(1, BINS) / BINS, right=True)


def mean_with_zeros(values):
    """(..., K) -> (...), NaN counting as 0."""
    return np.nan_to_num(values).mean(axis=-1)


def mean_defined(values):
    """(..., K) -> (...), the mean of those that are not NaN; NaN where all are."""
    return ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))


# ------------------------------------------------------------------------- from counts of answers


def of_answers(true, predicted, hits, distance):
    """The scores that depend on the answers alone -> dict of (...), per class (..., K).

    true, predicted, hits (..., K): how often each class is true, is answered, and both, in any
    unit; distance (...): the sum of the squared distances between answer and truth. NaN where
    undefined. Balanced accuracy is the mean recall over the classes that are there.
    """
    classes, total = np.arange(true.shape[-1]), true.sum(axis=-1)
    precision, recall = ratio(hits, predicted), ratio(hits, true)
    f1 = ratio(2 * hits, true + predicted)
    # of kappa: the distances that are expected if answers and truth are independent
    independent = true @ classes**2 + predicted @ classes**2
    independent = independent - 2 * (true @ classes) * (predicted @ classes) / total
    return {
        "accuracy": hits.sum(axis=-1) / total,
        "balanced_accuracy": mean_defined(recall),
        "macro_f1": mean_with_zeros(f1),
        "macro_precision": mean_with_zeros(precision),
        "macro_recall": mean_with_zeros(recall),
        "quadratic_kappa": 1 - ratio(distance, independent),
        "precision_per_class": precision,
        "recall_per_class": recall,
        "f1_per_class": f1,
    }


# ------------------------------------------------------------------------------- of many resamples


class Table:
    """What the scores of any resample of these rows are sums of, computed once.

    members[k]: the rows (m,) that may be of class k. Here they are sorted from the largest to the
    smallest probability of that class; columns[k] (m, K + 3 + BINS): of such a row with the label
    k, the answer one-hot, squared distance, negative log, Brier, and in the confidence's bin,
    confidence less rightness.
    """

    def __init__(self, probabilities, members):
        n, self.num_classes = probabilities.shape
        answers, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
        in_bin, one_hot = np.eye(BINS)[bins(confidence)], np.eye(self.num_classes)
        self.rows, self.columns, self.orders, self.ties = [], [], [], []
        for k in range(self.num_classes):
            order = np.argsort(-probabilities[:, k], kind="stable")
            place = np.empty(n, np.int64)
            place[order] = np.arange(n)
            rows = members[k][np.argsort(place[members[k]])]
            self.rows.append(rows)
            self.orders.append(order)
            self.ties.append(Ties(probabilities[order, k], place[rows]))
            sums = [
                (answers - k) ** 2.0,
                negative_log(probabilities[:, k]),
                ((probabilities - one_hot[k]) ** 2).sum(axis=1),
            ]
            distance = in_bin * (confidence - (answers == k))[:, None]
            columns = [one_hot[answers], np.stack(sums, axis=1), distance]
            self.columns.append(np.hstack(columns)[rows])

    def scores(self, weights_of, everything):
        """Every score -> dict of (R,), per class (R, K); NaN where undefined.

        weights_of(k, rows): weights (R, m) of rows as members of class k; everything (R or 1, n):
        of all rows, whatever their class. Brier is the sum of squares over the classes (0 to 2),
        ECE the mean distance of confidence and accuracy over BINS bins.
        """
        num, sums, ranked = self.num_classes, [], []
        for k in range(num):
            weights = weights_of(k, self.rows[k]).astype(float)  # (R, m)
            sums.append(weights @ self.columns[k])  # (R, K + 3 + BINS)
            ahead = np.cumsum(everything[:, self.orders[k]], axis=1, dtype=np.int32)  # (R, n)
            ranked.append(ranking(weights, ahead, self.ties[k]))
        sums = np.stack(sums, axis=1)  # (R, K, K + 3 + BINS)
        confusion, rest = sums[:, :, :num], sums[:, :, num:].sum(axis=1)  # (R, K, K), (R, 3 + BINS)
        true, total = confusion.sum(axis=2), confusion.sum(axis=(1, 2))
        hits = np.diagonal(confusion, axis1=1, axis2=2)
        auroc, auprc = np.stack(ranked, axis=2)  # (R, K) each
        return of_answers(true, confusion.sum(axis=1), hits, rest[:, 0]) | {
            "auroc_macro_ovr": mean_defined(auroc),
            "log_loss": rest[:, 1] / total,
            "auprc_macro_ovr": mean_defined(auprc),
            "brier": rest[:, 2] / total,
            "ece": np.abs(rest[:, 3:]).sum(axis=1) / total,
            "auroc_per_class": auroc,
            "auprc_per_class": auprc,
        }


class Ties:
    """Where each of m rows stands in a sorted list, and what has the same value.

    values (n,): the list. places (m,): of the rows, ascending. last (m,): the last place with the
    same value; before (m,): the first, less 1. own_last, own_before (m,): the same, counted among
    the m rows alone; None where all values of the list differ.
    """

    def __init__(self, values, places):
        begins = np.append(True, values[1:] != values[:-1])
        run = np.cumsum(begins) - 1  # (n,): number of the run of equal values
        starts = np.append(np.flatnonzero(begins), len(values))
        self.last, self.before = starts[run[places] + 1] - 1, starts[run[places]] - 1
        self.own_last = self.own_before = None
        if not begins.all():
            self.own_last = np.searchsorted(places, self.last, side="right") - 1
            self.own_before = np.searchsorted(places, self.before, side="right") - 1


def ranking(weights, ahead, ties):
    """One-vs-rest AUROC and average precision of every resample -> (R,), (R,).

    weights (R, m): of the positives, from the largest probability to the smallest. ahead (R or 1,
    n): of all rows up to each, in the same order. NaN for a class without positives; for AUROC,
    also for one without negatives.

    AUROC is the share of pairs of a positive and a negative in which the positive has the larger
    probability; ties count half. Average precision is the mean over the positives of the precision
    at their threshold, where tied rows count as above it. This equals scikit-learn's sum over
    thresholds, with each step divided among its positives.
    """
    if not weights.shape[1]:
        return np.full((2, len(weights)), np.nan)
    hits, above = np.cumsum(weights, axis=1), ahead[:, ties.last]  # or beside
    count, wrong = hits[:, -1], 0
    if ties.own_last is not None:
        up_to = lambda sums, places: np.where(places < 0, 0, sums[:, places])
        before, hits = up_to(hits, ties.own_before), hits[:, ties.own_last]
        beside = above - up_to(ahead, ties.before) - (hits - before)  # the negatives, (R, m)
        wrong = -0.5 * beside
    wrong = wrong + above - hits  # negatives above, and half of those beside
    precision = hits / np.maximum(above, 1)
    total = lambda values: np.einsum("rm,rm->r", weights, values)
    pairs = count * (ahead[:, -1] - count)
    return 1 - ratio(total(wrong), pairs), ratio(total(precision), count)


def in_parts(number, size, scores_of):
    """scores_of(slice) of `number` resamples, part by part, which spares memory."""
    found = [scores_of(part) for part in parts(number, size)]
    return {name: np.concatenate([values[name] for values in found]) for name in found[0]}


def resampled(y_true, probabilities, weights):
    """Every score of every resample -> dict of (R,), per class (R, K); NaN where undefined.

    weights (R, n): how often a row counts in each resample.
    """
    members = [np.flatnonzero(y_true == k) for k in range(probabilities.shape[1])]
    table = Table(probabilities, members)

    def scores_of(part):
        return table.scores(lambda k, rows: weights[part][:, rows], weights[part])

    return in_parts(*weights.shape, scores_of)


def relabelled(labels, probabilities):
    """Every score when the rows have these labels (R, n) -> as `resampled`."""
    members = [np.arange(len(probabilities))] * probabilities.shape[1]
    table, everything = Table(probabilities, members), np.ones((1, len(probabilities)), np.uint8)

    def scores_of(part):
        return table.scores(lambda k, rows: labels[part][:, rows] == k, everything)

    return in_parts(*labels.shape, scores_of)


# ------------------------------------------------------------------------------- of the data alone


def of_data(y_true, probabilities):
    """`resampled` of the rows as they are -> dict of numbers, per class (K,)."""
    values = resampled(y_true, probabilities, np.ones((1, len(y_true)), np.uint8))
    return {name: value[0] for name, value in values.items()}


def counts(classes, num_classes):
    """How often each class occurs -> list (num_classes,)."""
    return np.bincount(classes, minlength=num_classes).tolist()


def confusion(y_true, answers, num_classes):
    """Counts (K, K): rows are true classes, columns are answers."""
    cells = np.bincount(num_classes * y_true + answers, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def score(y_true, probabilities, num_classes=4, ids=None):
    """The scores alone, which is quick. Arguments and names as in `metrics.evaluate`."""
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    values = of_data(y_true, probabilities)
    for name in PER_CLASS[:3]:  # 0 / 0 is 0, as in scikit-learn with zero_division=0
        values[name] = np.nan_to_num(values[name])
    return {
        "n": len(y_true),
        **{name: plain(values[name]) for name in (*SCORES, *MORE_SCORES, *PER_CLASS)},
        "true_counts": counts(y_true, num_classes),
        "predicted_counts": counts(probabilities.argmax(axis=1), num_classes),
    }


def quick_scores(y_true, probabilities):
    """Balanced accuracy and log-loss of G models at once -> two lists of G.

    y_true (n,), probabilities (G, n, K), which are not checked.
    """
    right = probabilities.argmax(axis=2) == y_true  # (G, n)
    recall = [right[:, y_true == k].mean(axis=1) for k in np.unique(y_true)]
    losses = negative_log(probabilities[:, np.arange(len(y_true)), y_true])  # (G, n)
    return np.mean(recall, axis=0).tolist(), losses.mean(axis=1).tolist()
