"""Where do runs agree? Their answers to the same participants, and groups that no test tells apart.

    between(y_true, {"A": p, "B": p})     # -> Agreement: of every pair of runs
    divided(y_true, {"A": p, "B": p})     # -> the participants that only a part of them has right
    groups(["A", "B"], pairs)             # -> runs of which no two are shown to differ

In shapes, n is the number of participants, m of runs, K of classes.
"""

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass
class Agreement:
    """Of every pair of runs, each (m, m) and symmetric. same: share of participants to whom both
    give the same answer; kappa: Cohen's kappa of the answers (NaN where both know one class
    alone); both_right and one_right: share of participants that both, or exactly one of them, has
    right. On the diagonal of both_right stands the accuracy."""

    same: np.ndarray
    kappa: np.ndarray
    both_right: np.ndarray
    one_right: np.ndarray


def between(y_true, runs):
    """y_true (n,), runs {name: probabilities (n, K)} -> Agreement.

    Two runs that mostly answer with the largest class agree often by chance. Cohen's kappa (Cohen
    1960), which medicine uses for two readers of the same images, is the agreement beyond that of
    two readers who answer independently with these class shares: 0 is theirs, 1 is complete.
    """
    answers = np.stack([np.argmax(p, axis=1) for p in runs.values()])  # (m, n)
    right = (answers == np.asarray(y_true)).astype(float)
    kappa = np.ones((len(answers), len(answers)))
    for i, j in itertools.combinations(range(len(answers)), 2):
        kappa[i, j] = kappa[j, i] = kappa_of(answers[i], answers[j])
    both = right @ right.T / right.shape[1]
    accuracy = np.diag(both)
    same = (answers[:, None] == answers).mean(axis=2)
    return Agreement(same, kappa, both, accuracy[:, None] + accuracy - 2 * both)


def kappa_of(a, b):
    """Cohen's kappa of answers (n,) and (n,); NaN where all of both are of one class."""
    from sklearn.metrics import cohen_kappa_score

    return cohen_kappa_score(a, b) if len(np.union1d(a, b)) > 1 else np.nan


def divided(y_true, runs):
    """Rows of the participants on whom the runs are divided, the most divided first.

    y_true (n,), runs {name: probabilities (n, K)}. Of m runs, r are right: the participant divides
    r (m - r) pairs, of which one is right and the other is not. Of two runs, these are the
    participants that exactly one has right. Among equals, those come first to whose true class the
    runs give the most different probabilities (their SD).
    """
    y_true = np.asarray(y_true)
    p = np.stack(list(runs.values()))  # (m, n, K)
    right = (p.argmax(axis=2) == y_true).sum(axis=0)
    pairs = right * (len(p) - right)
    of_true = p[:, np.arange(len(y_true)), y_true]  # (m, n)
    order = np.lexsort((-of_true.std(axis=0).round(9), -pairs))
    return [int(row) for row in order if pairs[row]]


def groups(names, pairs):
    """The largest groups of runs of which no two are shown to differ -> lists of names, in the
    order of `names`; a run that differs from all others is in none.

    pairs: a, b and p_holm of every two runs. "Not shown to differ" is not transitive: A and C may
    be told apart where neither is from B, and then B is in two groups. So these are the maximal
    cliques of the graph whose edges are the pairs with p (Holm) of 5 % or more, as Ismail Fawaz et
    al. (2019) draw them.
    """
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(names)
    graph.add_edges_from((pair["a"], pair["b"]) for pair in pairs if pair["p_holm"] >= 0.05)
    place = {name: n for n, name in enumerate(names)}
    found = (sorted(group, key=place.get) for group in networkx.find_cliques(graph))
    return sorted(
        (group for group in found if len(group) > 1), key=lambda g: [place[name] for name in g]
    )
