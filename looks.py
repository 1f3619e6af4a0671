"""How often was this test set looked at? The best of many runs is better on it than it is.

    found, unreadable = others(opened, result)
    count(found, unreadable, result)     # "looks" of eval_test.json
    best(found, split)                   # for the figure of the whole result

eval.py never chooses anything by test. Whoever runs it for many runs, and takes the best, does.
"""

import contextlib
import itertools
import pathlib

from scipy.integrate import quad
from scipy.stats import norm

import results

MOST_SHOWN = 6  # other runs in the figure of the whole result
SAME = ("task", "unit", "labels_sha256", "classes")  # what makes it the same question


def expected_maximum(count):
    """The mean of the largest of so many independent standard normals."""
    density = lambda x: x * count * norm.pdf(x) * norm.cdf(x) ** (count - 1)
    return quad(density, -10, 10, limit=200)[0] if count > 1 else 0.0


def optimism(ci95, count):
    """How far the best score of so many equally good models is above their true one -> SD of a
    score, optimism, both in balanced accuracy.

    ci95: the 95 % interval of one of them, which gives the SD; the optimism is that times
    `expected_maximum`. It is an upper bound, for it takes the models' errors to be independent, and
    they see the same participants."""
    low, high = ci95
    sd = (high - low) / (2 * norm.ppf(0.975))
    return sd, sd * expected_maximum(count)


def others(opened, result):
    """The other runs beside this one, in the folder of its folder, that were scored on the same
    split with the same labels -> {folder of the results: result}, and how many could not be
    read."""
    own, split = pathlib.Path(opened.path).absolute().parent, result["split"]
    found, unreadable = {}, 0
    # the second: of a run's last.pt. A set, for a link may name a run again
    paths = (own.parent.glob(f"{depth}/eval_{split}.json") for depth in ("*", "*/*"))
    paths = {path.resolve() for path in itertools.chain.from_iterable(paths)}
    # without an earlier score of this very checkpoint
    for path in paths - {pathlib.Path(opened.folder, f"eval_{split}.json").resolve()}:
        try:
            other = results.read_result(path.parent, split)
        except (ValueError, OSError):
            unreadable += 1
            continue
        if all(other[name] == result[name] for name in SAME):
            found[path.parent] = other
    return found, unreadable


def count(found, unreadable, result):
    """Of what `others` gives -> {"runs", "unreadable", "sd", "optimism"}: how many runs these are,
    the result's own included."""
    runs = 1 + len(found)
    sd, above = optimism(result["ci95"]["balanced_accuracy"], runs)
    return {"runs": runs, "unreadable": unreadable, "sd": sd, "optimism": above}


def best(found, split):
    """The best MOST_SHOWN of the runs that `others` found, to be shown beside a result -> {name:
    result}, the best first. Those whose numbers are not what their predictions give are left out:
    --leaderboard says why."""
    shown = {}
    for folder in sorted(found, key=lambda path: (-found[path]["balanced_accuracy"], path)):
        if len(shown) < MOST_SHOWN:
            with contextlib.suppress(ValueError, OSError):
                shown[folder.name] = results.open_results(folder.name, folder, split).result
    return shown
