"""The score in every site, age band, scanner and eye, and whether one of them carries the result.

    subgroups(y_true, probabilities, groups)   # groups (n,) of text -> list of dicts

In shapes, n is the number of rows, K of classes, R of resamples. Needs numpy and scipy alone.
"""

import numpy as np

import intervals
from resampling import RESAMPLES, participants
from scores import check, plain, ratio

# a group of fewer participants is marked small: its balanced accuracy has a standard error of 0.1
SMALL = 20


def subgroups(y_true, probabilities, groups, num_classes=4, ids=None):
    """Balanced accuracy in every group -> list of dicts. ids as in `metrics.evaluate`.

    n, classes               participants, and classes present: the balanced accuracy is over these
    balanced_accuracy, ci95  as of the whole split
    small                    fewer than SMALL participants, or a class of the split is absent
    rest                     balanced accuracy of all others
    p_above_rest             `p_above_rest` (None: one of the two is small)
    """
    y_true, probabilities = check(y_true, probabilities, num_classes, ids)
    groups, member = np.asarray(groups).astype(str), participants(y_true, ids)[1]
    if groups.shape != y_true.shape:
        raise ValueError(
            f"groups must be one a row, ({len(y_true)},); their shape is {groups.shape}"
        )
    answers, all_classes = probabilities.argmax(axis=1), np.unique(y_true)
    ids = member if ids is not None else None

    def part(inside):  # -> participants, classes, small, balanced accuracy
        n, classes = len(np.unique(member[inside])), np.unique(y_true[inside])
        right = answers[inside] == y_true[inside]
        recalls = [right[y_true[inside] == k].mean() for k in classes]
        value = np.mean(recalls) if recalls else np.nan
        return n, classes, n < SMALL or len(classes) < len(all_classes), value

    found = []
    for group in np.unique(groups):
        inside = groups == group
        n, classes, small, value = part(inside)
        _, _, rest_small, rest = part(~inside)
        own_ids = None if ids is None else ids[inside]
        own = y_true[inside], answers[inside], num_classes, own_ids
        ci95 = intervals.of_answers(*own, names=["balanced_accuracy"])
        is_compared = not small and not rest_small
        p_value = p_above_rest(y_true, answers == y_true, inside, ids) if is_compared else None
        found.append(
            {
                "group": str(group),
                "n": n,
                "classes": classes.tolist(),
                "balanced_accuracy": plain(value),
                "ci95": ci95["balanced_accuracy"],
                "small": small,
                "rest": plain(rest),
                "p_above_rest": p_value,
            }
        )
    return found


def p_above_rest(y_true, right, inside, ids=None):
    """Share of permutations of the group's membership in which the group is as far above the rest.

    y_true, right, inside (n,): class, whether the answer is right, whether the row is in the group.
    Participants change places with others whose rows are of the same classes, so this asks whether
    the model is better in the group than its score in each class explains. The rows of a
    participant stay together; one with rows in and outside of the group counts as two. A bootstrap
    would fail here: a group that is all right has no variance.

    Exchanging participants of a class is drawing without replacement, so how many of each kind (of
    rows and right answers by class) come into the group is multivariate hypergeometric.
    """
    classes, number = np.unique(y_true, return_inverse=True)
    _, member = participants(y_true, ids)
    _, first, unit = np.unique(2 * member + inside, return_index=True, return_inverse=True)
    one_hot = np.eye(len(classes))[number]
    columns = np.hstack([one_hot, one_hot * right[:, None]])  # rows and hits by class (n, 2 K)
    of_units = np.zeros((len(first), columns.shape[1]))
    np.add.at(of_units, unit, columns)
    is_in, rows = inside[first], of_units[:, : len(classes)]
    _, strata = np.unique(rows, axis=0, return_inverse=True)  # the same rows of the same classes
    rng, sums = np.random.default_rng(0), np.zeros((RESAMPLES, columns.shape[1]))
    for stratum in range(strata.max() + 1):
        kinds, times = np.unique(of_units[strata == stratum], axis=0, return_counts=True)
        size = is_in[strata == stratum].sum()
        sums += rng.multivariate_hypergeometric(times, size, RESAMPLES) @ kinds  # (R, kinds)

    def gap(of_group):  # (..., 2 K) -> (...)
        of_rest = of_units.sum(axis=0) - of_group
        recalls = [
            ratio(part[..., len(classes) :], part[..., : len(classes)])
            for part in (of_group, of_rest)
        ]
        return recalls[0].mean(axis=-1) - recalls[1].mean(axis=-1)

    gaps = gap(sums)
    return float(((gaps >= gap(of_units[is_in].sum(axis=0)) - 1e-9).sum() + 1) / (RESAMPLES + 1))
