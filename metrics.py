"""Metrics, intervals, floors, alarms, subgroups, calibration, paired tests: arrays in, numbers out.

    evaluate(y_true, probabilities)            # (n,), (n, K) -> dict, what eval_SPLIT.json holds
    subgroups(y_true, probabilities, groups)   # the score in every site, scanner, age band
    temperature(y_true, probabilities)         # fitted on validation; rescale(probabilities, T)
                                               # then applies it
    compare(y_true, probs_a, probs_b)          # is A better than B on the same participants?
    compare_all(y_true, {"A": probs_a, ...})   # all pairs, Holm-corrected

A row is a participant, or an eye or a volume of one where `ids` repeat. In shapes, n is the number
of rows, K of classes, R of resamples. Needs numpy and scipy alone.
"""

import functools
import itertools

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, norm

# of bootstrap and permutations: then 250 of them lie below the 2.5th percentile, and a p-value can
# be small enough for Holm's correction over 190 pairs
RESAMPLES = 10_000
# of the reliability plot: with 15 (Guo et al. 2017), most would hold a handful of 159 participants
BINS = 10
# a group of fewer participants is marked small: its balanced accuracy has a standard error of 0.1
SMALL = 20

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


# ---------------------------------------------------------------------------------------- scores


def bins(confidence):
    """Bin of the reliability plot that each row falls into -> (n,). Confidence is the row's largest
    probability; bin b is (b / BINS, (b + 1) / BINS]."""
    return np.digitize(confidence, np.arange(1, BINS) / BINS, right=True)


def ranking_scores(y_true, probabilities, weights):
    """One-vs-rest AUROC and average precision of every resample -> two (R, K). NaN for a class
    without positives; for AUROC, also for one without negatives.

    AUROC is the share of pairs of a positive and a negative in which the positive has the larger
    probability; ties count half. Average precision is the mean over the positives of the precision
    at their threshold, where tied rows count as above it. This equals scikit-learn's sum over
    thresholds, with each step divided among its positives.
    """
    auroc, auprc = np.full((2, len(weights), probabilities.shape[1]), np.nan)
    for k in np.unique(y_true):
        pos, neg = y_true == k, y_true != k
        p, q = probabilities[pos, k], probabilities[neg, k]
        w_pos, w_neg = weights[:, pos], weights[:, neg]
        above, tied = q[:, None] > p, q[:, None] == p  # (negatives, positives)
        # weight of the negatives above and beside each positive, each (R, positives)
        wrong, ties = (w_neg @ part.astype(float) if part.any() else 0 for part in (above, tied))
        hits, count = w_pos @ (p[:, None] >= p).astype(float), w_pos.sum(1)
        auroc[:, k] = 1 - ratio((w_pos * (wrong + 0.5 * ties)).sum(1), count * w_neg.sum(1))
        auprc[:, k] = ratio((w_pos * hits / np.maximum(hits + wrong + ties, 1)).sum(1), count)
    return auroc, auprc


def scores(y_true, probabilities, weights):
    """Every score of every resample -> dict of (R,), per class (R, K); NaN where undefined.

    weights (R, n): how often a row counts in each resample. Balanced accuracy is the mean recall
    over the classes that y_true has, Brier the sum of squares over the classes (0 to 2), kappa
    weighted by the squared distance of the classes, ECE the mean distance of confidence and
    accuracy over BINS bins.
    """
    num_classes, total = probabilities.shape[1], weights.sum(1)
    classes, one_hot = np.arange(num_classes), np.eye(num_classes)
    y_pred, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    is_true, is_pred = one_hot[y_true], one_hot[y_pred]  # (n, K)
    true, pred, hits = (weights @ part for part in (is_true, is_pred, is_true * is_pred))  # (R, K)
    precision, recall, f1 = ratio(hits, pred), ratio(hits, true), ratio(2 * hits, true + pred)
    auroc, auprc = ranking_scores(y_true, probabilities, weights)
    # of kappa: the sum of squared distances that is expected if answers and truth are independent
    independent = true @ classes**2 + pred @ classes**2
    independent -= 2 * (true @ classes) * (pred @ classes) / total
    distance = np.eye(BINS)[bins(confidence)] * (confidence - (y_true == y_pred))[:, None]
    mean_with_zeros = lambda values: np.nan_to_num(values).mean(1)
    mean_defined = lambda values: ratio(np.nansum(values, axis=1), (~np.isnan(values)).sum(1))
    return {
        "accuracy": hits.sum(1) / total,
        "balanced_accuracy": mean_defined(recall),
        "macro_f1": mean_with_zeros(f1),
        "auroc_macro_ovr": mean_defined(auroc),
        "log_loss": weights @ negative_log(probabilities[is_true > 0]) / total,
        "macro_precision": mean_with_zeros(precision),
        "macro_recall": mean_with_zeros(recall),
        "auprc_macro_ovr": mean_defined(auprc),
        "quadratic_kappa": 1 - ratio(weights @ (y_true - y_pred) ** 2.0, independent),
        "brier": weights @ ((probabilities - is_true) ** 2).sum(1) / total,
        "ece": np.abs(weights @ distance).sum(1) / total,
        "precision_per_class": precision,
        "recall_per_class": recall,
        "f1_per_class": f1,
        "auroc_per_class": auroc,
        "auprc_per_class": auprc,
    }


def scores_of_data(y_true, probabilities):
    """`scores` of the rows as they are -> dict of numbers, per class (K,)."""
    values = scores(y_true, probabilities, np.ones((1, len(y_true))))
    return {name: value[0] for name, value in values.items()}


def counts(classes, num_classes):
    """How often each class occurs -> list (num_classes,)."""
    return np.bincount(classes, minlength=num_classes).tolist()


def score(y_true, probabilities, num_classes=4, ids=None):
    """The scores alone, which is quick. Arguments and names as in `evaluate`."""
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    values = scores_of_data(y_true, probabilities)
    for name in PER_CLASS[:3]:  # 0 / 0 is 0, as in scikit-learn with zero_division=0
        values[name] = np.nan_to_num(values[name])
    return {
        "n": len(y_true),
        **{name: plain(value) for name, value in values.items()},
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


# ----------------------------------------------------------------------- resamples and intervals


@functools.lru_cache(maxsize=2)
def drawn(labels, resamples):
    """Bootstrap of labels, a tuple, within each class -> (resamples, n), see `resample`.

    Kept, so that runs with the same labels have the same resamples, which 190 pairs of runs draw
    once.
    """
    weights = np.zeros((resamples, len(labels)))
    for k in set(labels):
        members = np.flatnonzero(np.array(labels) == k)
        draws = np.random.default_rng(k).integers(len(members), size=(resamples, len(members)))
        # numbers of its own for every resample, so that one bincount counts them all
        draws += len(members) * np.arange(resamples)[:, None]
        weights[:, members] = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
    weights.flags.writeable = False
    return weights


def participants(y_true, ids):
    """First row of every participant (P,), and the participant of every row (n,)."""
    ids = np.arange(len(y_true)) if ids is None else np.asarray(ids)
    _, first, member = np.unique(ids, return_index=True, return_inverse=True)
    return first, member


def strata(y_true, ids):
    """The class of every participant (P,); of one whose rows have several classes, a number above
    all classes, one for each set of them."""
    first, member = participants(y_true, ids)
    found, mixed = y_true[first], np.unique(member[y_true[first][member] != y_true])
    sets = [tuple(np.unique(y_true[member == person])) for person in mixed]
    number_of = {classes: n for n, classes in enumerate(sorted(set(sets)), start=y_true.max() + 1)}
    found[mixed] = [number_of[classes] for classes in sets]
    return found


def resample(y_true, ids=None):
    """Bootstrap over participants within each of `strata`, whose sizes stay -> (RESAMPLES, n), how
    often each row was drawn. Rows that share an id are drawn together. Read-only."""
    weights = drawn(tuple(strata(y_true, ids).tolist()), RESAMPLES)
    return weights if ids is None else weights[:, participants(y_true, ids)[1]]


def balanced_accuracy(y_true, right, weights):
    """Of every resample -> (R,). right (n,): are the answers right? weights (R, n)."""
    is_true = (y_true[:, None] == np.unique(y_true)).astype(float)  # (n, classes that are there)
    return np.nanmean(ratio(weights @ (is_true * right[:, None]), weights @ is_true), axis=1)


def permutations(labels):
    """RESAMPLES permutations of labels (n,), always the same -> (R, n)."""
    return np.random.default_rng(0).permuted(np.tile(labels, (RESAMPLES, 1)), axis=1)


def permuted_labels(y_true, ids=None):
    """RESAMPLES permutations of the labels among the participants, always the same -> (R, n).

    Where rows of a participant have several classes, whole participants change places with others
    of as many rows, and the rows within each do: what relates the rows of one stays.
    """
    first, member = participants(y_true, ids)
    if (y_true[first][member] == y_true).all():
        return permutations(y_true[first])[:, member]
    rng, permuted = np.random.default_rng(0), np.empty((RESAMPLES, len(y_true)), y_true.dtype)
    sizes = np.bincount(member)
    rows_of = np.split(np.argsort(member, kind="stable"), np.cumsum(sizes)[:-1])
    for size in np.unique(sizes):
        rows = np.array([rows for rows in rows_of if len(rows) == size])  # (people, size)
        moved = np.argsort(rng.random((RESAMPLES, len(rows))), axis=1)  # (R, people)
        labels = rng.permuted(y_true[rows][moved], axis=2)  # (R, people, size)
        permuted[:, rows.ravel()] = labels.reshape(RESAMPLES, -1)
    return permuted


def permuted_scores(y_true, probabilities, ids=None):
    """The scores of these predictions when the labels are permuted among the participants -> as
    `scores`, with R = RESAMPLES."""
    permuted = permuted_labels(y_true, ids)  # (R, n)
    # every row stands there once with each class as its label, and has weight where a permutation
    # gives it that label
    classes = np.unique(y_true)
    every_label = np.repeat(classes, len(y_true))  # (classes * n,)
    repeated = np.tile(probabilities, (len(classes), 1))  # (classes * n, K)
    parts = []
    for part in np.array_split(permuted, 10):  # to spare memory
        weights = np.concatenate([part == k for k in classes], axis=1).astype(float)
        parts.append(scores(every_label, repeated, weights))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interval(values):
    """[low, high], the central 95 % of the resamples (R,) that have a value; None where none has
    one. For (R, K), a list over K."""
    if values.ndim == 2:
        return [interval(v) for v in values.T]
    values = values[~np.isnan(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None


def ece_interval(value, values):
    """95 % interval of ECE, from its value and those of the resamples (R,).

    Noise within a bin adds to ECE in quadrature, once in the data and again in each resample, so
    that the percentiles of a calibrated model would never hold its true ECE, 0. Hence the
    percentiles of ECE squared, less twice the bias that the resamples show.
    """
    bias = 2 * ((values**2).mean() - value**2)
    return np.sqrt(np.maximum(np.percentile(values**2, [2.5, 97.5]) - bias, 0)).tolist()


# -------------------------------------------------------------------------------------- evaluate


def random_floor(y_true, prior):
    """Scores expected of a model that knows nothing but the class shares prior (K,), exactly.

    Accuracy, precision, recall, F1 and kappa are those of answers drawn at random with these
    shares. AUROC, AUPRC, log-loss, Brier and ECE are those of stating prior as the probabilities of
    every row.
    """
    n = len(y_true)
    true, times = np.bincount(y_true, minlength=len(prior)), np.arange(n + 1)
    share = true / n
    # chance (K, times) of answering a class so many times, of which times * share are right on
    # average
    chance = binom.pmf(times, n, prior[:, None])
    expected = chance * 2 * times * share[:, None] / np.maximum(true[:, None] + times, 1)
    f1 = expected.sum(axis=1)
    recall, precision = np.where(true > 0, prior, 0), share * (1 - chance[:, 0])
    values = scores_of_data(y_true, np.tile(prior, (n, 1))) | {
        "accuracy": share @ prior,
        "balanced_accuracy": np.mean(prior[true > 0]),
        "macro_f1": f1.mean(),
        "macro_precision": precision.mean(),
        "macro_recall": recall.mean(),
        # undefined where nothing but agreement is possible
        "quadratic_kappa": np.nan if max(share * prior) == 1 else 0.0,
        "precision_per_class": precision,
        "recall_per_class": recall,
        "f1_per_class": f1,
    }
    return {name: plain(value) for name, value in values.items()}


def reliability(y_true, probabilities):
    """Bins of the reliability plot that are not empty -> list of {confidence, accuracy, count};
    the first two are means over the bin's rows."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == y_true
    bin_of_row = bins(confidence)
    return [
        {
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(right[inside].mean()),
            "count": int(inside.sum()),
        }
        for inside in (bin_of_row == b for b in np.unique(bin_of_row))
    ]


def score_with_intervals(y_true, probabilities, num_classes=4, ids=None):
    """`score`, with participants, ci95, resamples and skipped as in `evaluate`."""
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    result = score(y_true, probabilities, num_classes)
    resampled = scores(y_true, probabilities, resample(y_true, ids))
    ci95 = {name: interval(values) for name, values in resampled.items()}
    return result | {
        "participants": len(participants(y_true, ids)[0]),
        "ci95": ci95 | {"ece": ece_interval(result["ece"], resampled["ece"])},
        "resamples": RESAMPLES,
        "skipped": {name: np.isnan(v).sum(0).tolist() for name, v in resampled.items()},
    }


def evaluate(y_true, probabilities, num_classes=4, ids=None, prior=None, groups=None, names=None):
    """Scores of one split -> dict, ready for JSON (None: undefined).

    y_true (n,) class indices, probabilities (n, num_classes). ids (n,) names of the participants:
    rows that share one are drawn together. prior (num_classes,) class shares of training (default:
    the split's own). groups {"site": (n,) of text, ...}, or one (n,).
      ci95               95 % interval of each score: percentiles of a bootstrap over participants,
                         stratified by class (of ECE: `ece_interval`)
      resamples, skipped number of resamples, and in how many of them each score is undefined
      majority_baseline  accuracy of always answering the split's most frequent class
      majority           each score of that answer (None: it has none)
      random             each score expected of answering at random: `random_floor`
      chance_band        central 95 % of balanced accuracy when the labels are permuted;
                         chance: the same of each score
      reliability        bins of the reliability plot
      subgroups          {"site": what `subgroups` finds, ...}
      classes            names of the classes, where they are given
      alarms             sentences; empty when all is well
    """
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    shares = np.bincount(y_true, minlength=num_classes) / len(y_true)
    prior = shares if prior is None else np.asarray(prior, dtype=float)
    if prior.shape != (num_classes,) or not are_distributions(prior):
        raise ValueError(
            f"prior must be {num_classes} class shares that add up to 1; it is {prior.tolist()}"
        )
    groups = {} if groups is None else groups if isinstance(groups, dict) else {"group": groups}
    permuted = permuted_scores(y_true, probabilities, ids)
    chance = {name: interval(values) for name, values in permuted.items()}
    cells = counts(num_classes * y_true + probabilities.argmax(axis=1), num_classes**2)
    most = score(y_true, np.eye(num_classes)[np.full(len(y_true), shares.argmax())], num_classes)
    result = score_with_intervals(y_true, probabilities, num_classes, ids) | {
        "confusion_matrix": np.reshape(cells, (num_classes, -1)).tolist(),  # rows: true
        "majority_baseline": most["accuracy"],
        "majority": {n: most[n] for n in chance} | dict.fromkeys(("log_loss", "brier", "ece")),
        "random": random_floor(y_true, prior),
        "chance_band": chance["balanced_accuracy"],
        "chance": chance,
        "reliability": reliability(y_true, probabilities),
        "subgroups": {
            name: subgroups(y_true, probabilities, group, num_classes, ids)
            for name, group in groups.items()
        },
    }
    if names is not None:
        result["classes"] = list(names)
    result["alarms"] = alarms(result)
    return result


def subgroups(y_true, probabilities, groups, num_classes=4, ids=None):
    """Balanced accuracy in every group -> list of dicts. groups (n,) of text; ids as in `evaluate`.

    n, classes               participants, and classes present: the balanced accuracy is over these
    balanced_accuracy, ci95  bootstrap of the whole split; resamples that lack one of the group's
                             classes are skipped, and counted in skipped
    small                    fewer than SMALL participants, or a class of the split is absent
    rest                     balanced accuracy of all others
    p_above_rest             share of resamples in which the group is not above the rest (None: one
                             of the two is small)
    """
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    groups, member = np.asarray(groups).astype(str), participants(y_true, ids)[1]
    if groups.shape != y_true.shape:
        raise ValueError(
            f"groups must be one a row, ({len(y_true)},); their shape is {groups.shape}"
        )
    right, is_true, found = probabilities.argmax(axis=1) == y_true, np.eye(num_classes)[y_true], []
    weights = np.vstack([np.ones(len(y_true)), resample(y_true, ids)])  # the data, then resamples

    def part(inside):  # -> participants, classes, small, balanced accuracy (1 + RESAMPLES,)
        n, classes = len(np.unique(member[inside])), np.unique(y_true[inside])
        rows = is_true[:, classes] * inside[:, None]  # (n, classes)
        recall = ratio(weights @ (rows * right[:, None]), weights @ rows)
        values = ratio(recall.sum(axis=1), len(classes))
        return n, classes, n < SMALL or len(classes) < len(np.unique(y_true)), values

    for group in np.unique(groups):
        n, classes, small, values = part(groups == group)
        _, _, rest_small, rest = part(groups != group)
        gaps = values - rest  # of the data, then of each resample, with spread as in `compare_all`
        gaps = gaps[0] + (gaps[1:] - gaps[0]) * np.sqrt(n / max(n - len(classes), 1))
        gaps = gaps[~np.isnan(gaps)]
        p_value = float(((gaps <= 1e-12).sum() + 1) / (len(gaps) + 1))
        found.append(
            {
                "group": str(group),
                "n": n,
                "classes": classes.tolist(),
                "balanced_accuracy": plain(values[0]),
                "ci95": interval(values[1:]),
                "skipped": int(np.isnan(values[1:]).sum()),
                "small": small,
                "rest": plain(rest[0]),
                "p_above_rest": None if small or rest_small else p_value,
            }
        )
    return found


# ---------------------------------------------------------------------------------------- alarms


def alarms(result):
    """What a reader must know before believing the scores of `evaluate` -> list of sentences.
    result["classes"], where it is there, has the names of the classes."""
    n, hits = result["n"], np.diag(result["confusion_matrix"])
    true, predicted = np.array(result["true_counts"]), np.array(result["predicted_counts"])
    present, names = true > 0, result.get("classes", range(len(true)))
    of_classes = {
        "model collapse: class {} never predicted": present & (predicted == 0),
        "class {} predicted, but never rightly (F1 = 0)": present & (predicted > 0) & (hits == 0),
        "class {} has no participant in this split": ~present,
    }
    found = []
    for text, applies in of_classes.items():
        if applies.any():
            found.append(text.format(", ".join(str(names[k]) for k in np.flatnonzero(applies))))
    for k in range(len(true)):
        # far apart by size, 10 points, and by McNemar's test at 5 % over all classes (Bonferroni)
        p_value = mcnemar(predicted[k] - hits[k], true[k] - hits[k])
        if abs(predicted[k] - true[k]) > 0.1 * n and p_value * len(true) < 0.05:
            found.append(
                f"class {names[k]} is answered {predicted[k]} times and true {true[k]} times of "
                f"{n}: shares far apart"
            )
    if result["accuracy"] <= result["majority_baseline"]:
        found.append(
            f"accuracy {result['accuracy']:.4f} is not above {result['majority_baseline']:.4f}, "
            "the share of the most frequent class: always answering that class does as well"
        )
    low, high = result["chance_band"]
    if result["balanced_accuracy"] <= high:
        found.append(
            f"balanced accuracy {result['balanced_accuracy']:.3f} is not above the chance band "
            f"{low:.3f} to {high:.3f}: permuted labels do as well"
        )
    # A group carries the result when it is above the rest by more than chance, at 5 % over all
    # groups that are large enough (Bonferroni): then the score says less of the others than it
    # seems to. Groups below the rest are in the table.
    rows = [(name, row) for name, table in result["subgroups"].items() for row in table]
    groups = [(name, row) for name, row in rows if row["p_above_rest"] is not None]
    for name, g in groups:
        if g["p_above_rest"] * len(groups) < 0.05:
            found.append(
                f"{name} {g['group']} carries the result: balanced accuracy "
                f"{g['balanced_accuracy']:.3f} ({g['n']} participants), {g['rest']:.3f} without it"
            )
    return found


def gap_alarm(left_out, validation):
    """[], or one sentence where balanced accuracy on validation is below that on training by more
    than chance (one-sided, 1 %), over the classes that both have.

    Both are counts (K, K) of participants, rows: true, columns: answered; those of training by the
    head without the participant, for with many features a head is right on whom it was fitted to,
    whatever it learned. Each class's recall has the standard error of a binomial share, after one
    hit and one miss more, so that 0 and 1 have some.
    """
    tables = np.array([left_out, validation])  # (2, K, K)
    hits, n = np.diagonal(tables, axis1=1, axis2=2), tables.sum(axis=2)  # (2, K)
    present = (n > 0).all(axis=0)
    hits, n = hits[:, present], n[:, present]
    train, val = (hits / n).mean(axis=1)
    share = (hits + 1) / (n + 2)
    error = np.sqrt((share * (1 - share) / (n + 2)).sum()) / present.sum()
    if train - val <= norm.isf(0.01) * error:
        return []
    return [
        f"balanced accuracy is {train:.3f} on training's participants, each left out of the fit, "
        f"and {val:.3f} on validation, below by more than chance: the splits differ, or training "
        "spoilt the head"
    ]


# ----------------------------------------------------------------------------------- calibration


def rescale(probabilities, T):
    """probabilities ** (1 / T), renormalised (n, K): T > 1 makes them flatter. They are clipped at
    the float64 eps first, as in the log-loss."""
    logits = -negative_log(np.asarray(probabilities, dtype=np.float64)) / T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def temperature(y_true, probabilities):
    """The T that minimises the log-loss of rescale(probabilities, T) (Guo et al. 2017); to be
    fitted on validation. 1 where no T is better.

    It is sought between 0.05 and 20, where the loss has one minimum: for predictions that separate
    the classes perfectly T would go to 0, for predictions worse than none to infinity.
    """
    y_true, probabilities = check(y_true, probabilities, np.shape(probabilities)[-1])
    rows = np.arange(len(y_true))
    loss = lambda log_T: negative_log(rescale(probabilities, np.exp(log_T))[rows, y_true]).mean()
    bounds = np.log([0.05, 20])
    best = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(best.x)) if best.fun < loss(0.0) - 1e-12 else 1.0


# ------------------------------------------------------------------------------------ comparison


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


def compare_all(y_true, runs, ids=None):
    """Is one of these runs better than another? Paired bootstrap over the same participants, within
    each class -> a dict for each pair.

    y_true (n,), runs {name: probabilities (n, K)}, ids (n,) participants: rows that share one are
    drawn together.
      a, b, balanced_accuracy_a, balanced_accuracy_b
      difference        balanced accuracy of a minus that of b; ci95: its 95 % interval
      p_value           two-sided: share of resamples on the far side of zero, doubled (Efron &
                        Tibshirani 1993); p_holm: adjusted for all pairs
      only_a_right, only_b_right, mcnemar_p   participants that one of the two answers rightly, and
                        McNemar's exact test of the two numbers. It is a test of accuracy, while
                        p_value is one of balanced accuracy
      sentence          the verdict, by p_holm at 5 %
    Of two equal models of 159 participants, p_value is below 0.05 in 5 to 6 % of data sets. A gap
    of 10 points is found in 43 % when their errors are independent, in 73 % when half of B's hits
    and errors are A's, in nearly all when 80 % are (tests/test_metrics.py).
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
    # of the data, then of each resample
    weights = np.vstack([np.ones(len(labels)), spread_out(labels, ids)])
    values = {name: balanced_accuracy(labels, r, weights) for name, r in right.items()}
    pairs = [compare_pair(a, b, values, right) for a, b in itertools.combinations(runs, 2)]
    for pair, p in zip(pairs, holm([pair["p_value"] for pair in pairs])):
        pair["p_holm"] = float(p)
        pair["sentence"] = verdict(pair, len(pairs))
    return pairs


def spread_out(y_true, ids):
    """`resample` -> (R, n), with the variance that a bootstrap of m lacks, (m - 1) / m of it, made
    good in every stratum (Rao & Wu 1988)."""
    if ids is not None and len(set(ids)) == len(ids):
        ids = None
    of_people = strata(y_true, ids)
    m = np.bincount(of_people)[of_people][participants(y_true, ids)[1]]
    return 1 + (resample(y_true, ids) - 1) * np.sqrt(m / np.maximum(m - 1, 1))


def compare_pair(a, b, values, right):
    """One pair of `compare_all`, without what depends on the number of pairs. values {name:
    (1 + RESAMPLES,)} balanced accuracy, right {name: (n,)} the answers that are right."""
    differences = values[a] - values[b]  # of the data, then of each resample
    # sums of recalls are equal only up to rounding
    tail = min((differences[1:] <= 1e-12).sum(), (differences[1:] >= -1e-12).sum())
    only_a, only_b = int((right[a] > right[b]).sum()), int((right[b] > right[a]).sum())
    return {
        "a": a,
        "b": b,
        "n": len(right[a]),
        "balanced_accuracy_a": float(values[a][0]),
        "balanced_accuracy_b": float(values[b][0]),
        "difference": float(differences[0]),
        "ci95": interval(differences[1:]),
        "p_value": float(min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))),
        "only_a_right": only_a,
        "only_b_right": only_b,
        "mcnemar_p": mcnemar(only_a, only_b),
    }


def verdict(pair, num_pairs):
    """One sentence on a pair of `compare_all`."""
    best, other = ("a", "b") if pair["difference"] >= 0 else ("b", "a")
    low, high = sorted(v if best == "a" else -v for v in pair["ci95"])
    start = f"no difference between {pair[best]} and {pair[other]} is shown"
    if pair["p_holm"] < 0.05:
        start = f"{pair[best]} is better than {pair[other]}"
    corrected = f", {pair['p_holm']:.4f} by Holm over {num_pairs} pairs" if num_pairs > 1 else ""
    return (
        f"{start}: balanced accuracy {pair['balanced_accuracy_' + best]:.3f} against "
        f"{pair['balanced_accuracy_' + other]:.3f}, difference {abs(pair['difference']):.3f} "
        f"(95 % interval {low:.3f} to {high:.3f}), p = {pair['p_value']:.4f}{corrected}, the same "
        f"{pair['n']} participants"
    )


def compare(y_true, probabilities_a, probabilities_b, ids=None):
    """Is A better than B on the same participants? The one pair of `compare_all` -> dict."""
    return compare_all(y_true, {"A": probabilities_a, "B": probabilities_b}, ids)[0]
