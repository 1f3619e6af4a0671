"""What eval.py says of a split: scores with intervals, floors, groups, alarms; calibration.

    evaluate(y_true, probabilities)            # (n,), (n, K) -> dict, what eval_SPLIT.json holds
    temperature(y_true, probabilities)         # fitted on validation; rescale(probabilities, T)
                                               # then applies it
    compare(y_true, probs_a, probs_b)          # is A better than B on the same participants?

Arrays in, numbers out. A row is a participant, or an eye or a volume of one where `ids` repeat. The
rooms behind it: scores.py, resampling.py, intervals.py, paired.py, groups.py, whose names that
other code uses are here too. In shapes, n is the number of rows, K of classes, R of resamples.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import binom, norm

import intervals
import resampling
from groups import subgroups
from paired import compare, compare_all  # noqa: F401  (where they are looked for)
from resampling import RESAMPLES, participants
from scores import (  # noqa: F401  (some are for others)
    MORE_SCORES,
    PER_CLASS,
    SCORES,
    are_distributions,
    bins,
    check,
    confusion,
    negative_log,
    of_data,
    plain,
    quick_scores,
    relabelled,
    score,
)

# -------------------------------------------------------------------------------------- evaluate


def score_with_intervals(y_true, probabilities, num_classes=4, ids=None):
    """`score`, with participants and ci95 as in `evaluate`."""
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    return score(y_true, probabilities, num_classes) | {
        "participants": len(participants(y_true, ids)[0]),
        "ci95": intervals.of_scores(y_true, probabilities, num_classes, ids),
        "resamples": RESAMPLES,
    }


def evaluate(
    y_true, probabilities, num_classes=4, ids=None, prior=None, groups=None, names=None, asked=None
):
    """Scores of one split -> dict, ready for JSON (None: undefined).

    y_true (n,) class indices, probabilities (n, num_classes). ids (n,) names of the participants:
    rows that share one are drawn together. prior (num_classes,) class shares of training (default:
    the split's own). groups {"site": (n,) of text, ...}, or one (n,). asked (num_classes,): the
    class shares that the probabilities are for, as training's class weights ask (default: unknown).
      ci95               95 % interval of each score, of which intervals.py says how
      resamples          number of resamples
      majority_baseline  accuracy of always answering the split's most frequent class
      majority           each score of that answer (None: it has none)
      random             each score expected of answering at random: `random_floor`
      chance_band        central 95 % of balanced accuracy when the labels are permuted;
                         chance: the same of each score
      reliability        bins of the reliability plot
      shares             `shares`, of asked
      subgroups          {"site": what `subgroups` finds, ...}
      classes            names of the classes, where they are given
      alarms             sentences; empty when all is well
    """
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    own = np.bincount(y_true, minlength=num_classes) / len(y_true)
    prior = own if prior is None else shares_of_classes(prior, num_classes, "prior")
    asked = None if asked is None else shares_of_classes(asked, num_classes, "asked")
    groups = {} if groups is None else groups if isinstance(groups, dict) else {"group": groups}
    permuted = relabelled(resampling.permuted_labels(y_true, ids), probabilities)
    chance = {name: intervals.percentiles(permuted[name]) for name in permuted}
    most = score(y_true, np.eye(num_classes)[np.full(len(y_true), own.argmax())], num_classes)
    answers = probabilities.argmax(axis=1)
    result = score_with_intervals(y_true, probabilities, num_classes, ids) | {
        "confusion_matrix": confusion(y_true, answers, num_classes).tolist(),  # rows: true
        "majority_baseline": most["accuracy"],
        "majority": {n: most[n] for n in chance} | dict.fromkeys(("log_loss", "brier", "ece")),
        "random": random_floor(y_true, prior),
        "chance_band": chance["balanced_accuracy"],
        "chance": chance,
        "reliability": reliability(y_true, probabilities),
        "shares": shares(y_true, probabilities, ids, asked),
        "subgroups": {
            name: subgroups(y_true, probabilities, group, num_classes, ids)
            for name, group in groups.items()
        },
    }
    if names is not None:
        result["classes"] = list(names)
    result["alarms"] = alarms(result)
    return result


def shares_of_classes(values, num_classes, name):
    """The values as an array (num_classes,). ValueError unless they are class shares."""
    found = np.asarray(values, dtype=float)
    if found.shape != (num_classes,) or not are_distributions(found):
        raise ValueError(
            f"{name} must be {num_classes} class shares that add up to 1; it is {found.tolist()}"
        )
    return found


def shares(y_true, probabilities, ids=None, asked=None):
    """How much probability each class gets on average, were the classes of the split as `asked`.

    known     is asked given? Else it is that of these which the probabilities are nearest to: the
              split's own shares, or the same for every class that is there
    asked, stated, p_value   (K,) each: the shares, what the mean probabilities are, and how
              likely such a distance is by chance (normal approximation over participants)

    A calibrated model that was trained for shares other than the split's answers other than the
    split's. So the rows of each class are weighed to have the share that is asked for.
    """
    num_classes = probabilities.shape[1]
    counts = np.bincount(y_true, minlength=num_classes)
    of_class = np.eye(num_classes)[y_true] / np.maximum(counts, 1)  # (n, K)
    means = of_class.T @ probabilities  # (K, K): of the rows of each class

    def held_against(wanted):
        wanted = wanted * (counts > 0)
        wanted = wanted / wanted.sum() if wanted.any() else counts / counts.sum()
        stated = wanted @ means
        influence = (of_class @ wanted)[:, None] * (probabilities - means[y_true])  # (n, K)
        variance = intervals.variance_of_sum(influence, y_true, ids)
        # of a class with few rows, as if there were one more that is 1/2 away
        variance = variance + (wanted**2 / np.maximum(counts * (counts + 1), 1)).sum() / 4
        p_value = 2 * norm.sf(np.abs(stated - wanted) / np.sqrt(variance))
        return {"asked": wanted.tolist(), "stated": stated.tolist(), "p_value": p_value.tolist()}

    tried = [counts / counts.sum(), np.ones(num_classes)] if asked is None else [np.array(asked)]
    found = [held_against(wanted) for wanted in tried]
    distance = lambda each: np.abs(np.subtract(each["stated"], each["asked"])).max()
    return {"known": asked is not None, **min(found, key=distance)}


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
    values = of_data(y_true, np.tile(prior, (n, 1))) | {
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


# ---------------------------------------------------------------------------------------- alarms


def alarms(result):
    """What a reader must know before believing the scores of `evaluate` -> list of sentences.
    result["classes"], where it is there, has the names of the classes."""
    hits = np.diag(result["confusion_matrix"])
    true, predicted = np.array(result["true_counts"]), np.array(result["predicted_counts"])
    present, names = true > 0, result.get("classes", range(len(true)))
    # in so few, a model that guesses is never right of one class with more than 5 % (Bonferroni)
    is_telling = (1 - 1 / len(true)) ** true * len(true) < 0.05
    of_classes = {
        "model collapse: class {} never predicted": present & (predicted == 0),
        "class {} predicted, but never rightly (F1 = 0)": is_telling
        & (predicted > 0)
        & (hits == 0),
        "class {} has no participant in this split": ~present,
    }
    found = []
    for text, applies in of_classes.items():
        if applies.any():
            found.append(text.format(", ".join(str(names[k]) for k in np.flatnonzero(applies))))
    asked, stated, p_values = (result["shares"][name] for name in ("asked", "stated", "p_value"))
    for k, name in enumerate(names):
        # far apart by size, 10 points, and by a test at 5 % over all classes (Bonferroni)
        if abs(stated[k] - asked[k]) > 0.1 and p_values[k] * len(true) < 0.05:
            found.append(
                f"class {name} is given {stated[k]:.0%} of the probability, where "
                f"{asked[k]:.0%} are asked for: shares far apart"
            )
    found += majority_alarm(result, true, hits)
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


def majority_alarm(result, true, hits):
    """[], or a sentence where always answering one class is as accurate. At the shares that
    training asks for, where these are known: a model that was trained to weigh all classes alike
    does not try to be accurate where one of them is frequent."""
    accuracy, most = result["accuracy"], result["majority_baseline"]
    where = ""
    if result["shares"]["known"]:
        asked = np.array(result["shares"]["asked"])
        accuracy, most = float(asked @ (hits / np.maximum(true, 1))), float(asked.max())
        where = "at the class shares that training asks for, "
    if accuracy > most + 1e-12:
        return []
    return [
        f"{where}accuracy {accuracy:.4f} is not above {most:.4f}, the share of the most frequent "
        "class: always answering that class does as well"
    ]


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


def below_chance(counts):
    """[], or a sentence where balanced accuracy on training is below that of the same answers to
    permuted labels by more than chance (one-sided, 1 %): the head answers the opposite of what it
    was shown. counts (K, K): of training's participants, rows: true, columns: answered.

    Mean and variance over all permutations are exact (Hoeffding 1951), the tail is a normal one's.
    """
    true, answered, n = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    weight = np.diag(np.divide(1, true, out=np.zeros(len(true)), where=true > 0)) / (true > 0).sum()
    score = (weight * counts).sum()
    # what an answer to a label is worth, less its means over labels, over answers, and over both
    of_answer, of_label = true @ weight / n, weight @ answered / n  # (K,) of columns, of rows
    mean = of_answer @ answered / n
    spread = weight - of_label[:, None] - of_answer + mean
    error = np.sqrt(true @ spread**2 @ answered / max(n - 1, 1))
    if score >= n * mean - norm.isf(0.01) * error - 1e-9:
        return []
    return [
        f"balanced accuracy on training is {score:.3f}, below chance by more than chance: the head "
        "answers the opposite of what it was shown"
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
