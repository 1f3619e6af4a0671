"""Resamples and permutations of participants, always the same for the same labels.

    weights = resample(y_true, ids)          # (R, n): how often each row was drawn
    permuted = permuted_labels(y_true, ids)  # (R, n): the labels, moved among the participants

A row is a participant, or an eye or a volume of one where `ids` repeat: what belongs to one person
stays together. In shapes, n is the number of rows, R of resamples. Needs numpy alone. Both are kept
in the smallest type that holds them, and used by `parts`: 10,000 resamples of 20,000 participants
take 200 MB.
"""

import functools

import numpy as np

# of bootstrap and permutations: then 250 of them lie below the 2.5th percentile
RESAMPLES = 10_000
# numbers of an array that is made for a part of the resamples: it stays in the processor's cache
AT_ONCE = 200_000


def parts(number, size):
    """Slices of `number` resamples, each so short that an array of it and `size` is small."""
    step = max(1, AT_ONCE // max(size, 1))
    return [slice(start, min(start + step, number)) for start in range(0, number, step)]


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


@functools.lru_cache(maxsize=2)
def drawn(labels, resamples):
    """Bootstrap of labels, a tuple, within each class -> (resamples, n), see `resample`.

    Kept, so that runs with the same labels have the same resamples, which 190 pairs of runs draw
    once.
    """
    weights = np.zeros((resamples, len(labels)), np.uint8)  # nothing is drawn 256 times
    for k in set(labels):
        members = np.flatnonzero(np.array(labels) == k)
        rng, m = np.random.default_rng(k), len(members)
        for part in parts(resamples, m):
            draws = rng.integers(m, size=(part.stop - part.start, m))
            # numbers of its own for every resample, so that one bincount counts them all
            draws += m * np.arange(len(draws))[:, None]
            counts = np.bincount(draws.ravel(), minlength=draws.size).reshape(draws.shape)
            weights[part, members] = counts
    weights.flags.writeable = False
    return weights


def resample(y_true, ids=None):
    """Bootstrap over participants within each of `strata`, whose sizes stay -> (RESAMPLES, n), how
    often each row was drawn. Rows that share an id are drawn together. Read-only."""
    weights = drawn(tuple(strata(y_true, ids).tolist()), RESAMPLES)
    return weights if ids is None else weights[:, participants(y_true, ids)[1]]


def permuted_labels(y_true, ids=None):
    """RESAMPLES permutations of the labels among the participants, always the same -> (R, n).

    Where rows of a participant have several classes, whole participants change places with others
    of as many rows, and the rows within each do: what relates the rows of one stays.
    """
    first, member = participants(y_true, ids)
    y_true = y_true.astype(np.min_scalar_type(y_true.max()))
    if (y_true[first][member] == y_true).all():
        return permutations(y_true[first])[:, member]
    rng, permuted = np.random.default_rng(0), np.empty((RESAMPLES, len(y_true)), y_true.dtype)
    sizes = np.bincount(member)
    rows_of = np.split(np.argsort(member, kind="stable"), np.cumsum(sizes)[:-1])
    for size in np.unique(sizes):
        rows = np.array([rows for rows in rows_of if len(rows) == size])  # (people, size)
        for part in parts(RESAMPLES, rows.size):
            # (part, people)
            moved = np.argsort(rng.random((part.stop - part.start, len(rows))), axis=1)
            labels = rng.permuted(y_true[rows][moved], axis=2)  # (part, people, size)
            permuted[part, rows.ravel()] = labels.reshape(len(labels), -1)
    return permuted


def permutations(labels):
    """RESAMPLES permutations of labels (n,), always the same -> (R, n)."""
    rng, permuted = np.random.default_rng(0), np.empty((RESAMPLES, len(labels)), labels.dtype)
    for part in parts(RESAMPLES, len(labels)):
        tiled = np.tile(labels, (part.stop - part.start, 1))
        permuted[part] = rng.permuted(tiled, axis=1)
    return permuted


def weighted_sums(weights, columns):
    """weights (R, n) of any type @ columns (n, c), part by part -> (R, c)."""
    sums = np.empty((len(weights), columns.shape[1]))
    for part in parts(*weights.shape):
        sums[part] = weights[part].astype(float) @ columns
    return sums


def means_of_classes(y_true, values, ids=None):
    """Mean of values (n, m) in every class that is there, of the data and then of each resample ->
    (1 + R, m, classes).

    A bootstrap of m participants has (m - 1) / m of the variance; the rest is made good by moving
    the resamples away from the data (Rao and Wu 1988). NaN where a resample lacks a class.
    """
    classes, number = np.unique(y_true, return_inverse=True)
    is_true = np.eye(len(classes))[number]  # (n, classes)
    columns = [is_true, *(is_true * column[:, None] for column in np.transpose(values))]
    columns = np.hstack(columns)  # (n, (1 + m) classes)
    sums = np.vstack([columns.sum(axis=0), weighted_sums(resample(y_true, ids), columns)])
    sums = sums.reshape(len(sums), -1, len(classes))
    there, sums = sums[:, :1], sums[:, 1:]
    means = np.divide(sums, there, out=np.full(sums.shape, np.nan), where=there > 0)
    member = participants(y_true, ids)[1]
    people = np.array([len(np.unique(member[number == k])) for k in range(len(classes))])
    means[1:] = means[0] + (means[1:] - means[0]) * np.sqrt(people / np.maximum(people - 1, 1))
    return means


def balanced_accuracy(y_true, right, weights):
    """Of every resample -> (R,). right (n,): are the answers right? weights (R, n)."""
    is_true = (y_true[:, None] == np.unique(y_true)).astype(float)  # (n, classes that are there)
    both = weighted_sums(weights, np.hstack([is_true * right[:, None], is_true]))
    hits, there = np.split(both, 2, axis=1)  # (R, classes) each
    recall = np.divide(hits, there, out=np.full(hits.shape, np.nan), where=there > 0)
    return np.nanmean(recall, axis=1)


def accuracies_of_permuted(labels, answers):
    """Balanced accuracy of answers (n,) for labels (R, n), of which each row is a permutation of
    the others -> (R,)."""
    counts = np.bincount(labels[0], minlength=answers.max() + 1)
    weight = 1 / (np.maximum(counts, 1) * (counts > 0).sum())  # (K,) of a right answer
    return np.concatenate(
        [
            (weight[labels[part]] * (labels[part] == answers)).sum(axis=1)
            for part in parts(*labels.shape)
        ]
    )
