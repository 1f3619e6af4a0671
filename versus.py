"""The page of a comparison: where the runs differ, on which participants, and where they agree.

    write(found)        # found: compare.Comparison; comparison.html beside the runs -> its path

Its figures are in comparison/, as PNG, SVG and PDF.
"""

import os

import numpy as np

import agreement
import compare
import files
import forest
import gallery
from findings import number, units
from report import render

MOST_SHOWN = 50  # participants on whom the runs are divided
# title and explanation of the list of these participants, of two runs and of more
TITLE_OF_TWO, TITLE_OF_MANY = "that exactly one run has right", "on whom the runs are divided"
HOW_OF_TWO = (
    "Those come first to whose true class the two runs give the most different probabilities."
)
HOW_OF_MANY = (
    "Those that some runs have right and others wrong. First come those that divide most pairs of "
    "runs into one that is right and one that is not; among equals, those to whose true class the "
    "runs give the most different probabilities."
)


def write(found, with_images=True):
    """Write comparison.html and comparison/* beside the first run -> path of the page.

    with_images: with the cards that the galleries of the runs (eval.gallery) have of participants
    on whom the runs are divided.
    """
    beside = os.path.join(os.path.dirname(os.path.abspath(found.folders[0])), "comparison")
    runs = {name: run for name in found.order for run in found.runs if run.name == name}
    y, p = arrays(runs)
    pairs, agreed = best_first(found), agreement.between(y, p)
    drawn, words = draw(found.split, runs, pairs, agreed)
    divided, what = divided_table(runs, y, p), units(found.runs[0].result)
    page = render(
        "comparison.html",
        title=f"comparison on {found.split}",
        about=compare.about(found),
        summary=summary(found, runs[found.order[0]]),
        notes=compare.notes(found),
        alarms=compare.alarms(found),
        pictures=forest.write(beside, drawn),
        words=words,
        scores=compare.score_table(list(runs.values())),
        pairs=compare.pair_table(pairs, found.split),
        sentences=sentences(found),
        agreement=agreement_table(pairs, agreed, list(runs)),
        ranking_note=forest.ranking_note(agreement.groups(list(runs), pairs)),
        limits={"pairs": forest.MOST_PAIRS, "runs": forest.MOST_RUNS},
        divided=divided,
        galleries=galleries(found, divided["ids"]) if with_images else {},
        units=what,
    )
    files.write(f"{beside}.html", page)
    return f"{beside}.html"


def galleries(found, ids):
    """{name of a run: its gallery of the participants of these units (ids)}, of the runs that have
    cards of them, the best first."""
    people = [found.runs[0].participant_of[i] for i in ids]
    opened = {
        run.name: gallery.of_participants(folder, run.result, people)
        for folder, run in zip(found.folders, found.runs)
    }
    return {name: opened[name] for name in found.order if opened[name] and opened[name]["cards"]}


def draw(split, runs, pairs, agreed):
    """runs {name: Results}, the best first -> {name: figure}, {name: the same in words}."""
    names, what = list(runs), units(next(iter(runs.values())).result)
    results = {name: run.result for name, run in runs.items()}
    drawn = {
        "scores": forest.draw_scores(results),
        "differences": forest.draw_differences(pairs, names, split),
        "agreement": forest.draw_agreement(names, agreed, what),
    }
    words = {
        "scores": forest.scores_in_words(results),
        "differences": forest.differences_in_words(pairs, names, split),
        "agreement": forest.agreement_in_words(names, agreed, what),
    }
    if len(names) > 2:
        values = {name: result["balanced_accuracy"] for name, result in results.items()}
        ranked = values, agreement.groups(names, pairs)
        drawn["ranking"] = forest.draw_ranking(*ranked, "balanced accuracy")
        words["ranking"] = forest.ranking_in_words(*ranked, "Balanced accuracy")
    return drawn, words


def best_first(found):
    """The pairs in the order of the runs: those of the best run first."""
    place = {name: n for n, name in enumerate(found.order)}
    return sorted(found.pairs, key=lambda pair: sorted((place[pair["a"]], place[pair["b"]])))


def arrays(runs):
    """runs {name: Results} -> classes (n,), {name: probabilities (n, K)}, in the first one's
    order."""
    first = next(iter(runs.values()))
    p = {name: np.array([run.p_of[i] for i in first.label_of]) for name, run in runs.items()}
    return np.array(list(first.label_of.values())), p


def summary(found, best):
    """The comparison in a sentence."""
    if len(found.pairs) == 1:
        return f"{found.pairs[0]['sentence']}."
    return compare.verdict(best, found.split, found.pairs)[0]


def sentences(found):
    """What --compare prints of every pair -> a list of lines for each."""
    return [
        [
            f"{pair['sentence']}.",
            compare.mcnemar_line(pair),
            *map(str.strip, found.powers[n : n + 1]),
        ]
        for n, pair in enumerate(found.pairs)
    ]


def agreement_table(pairs, agreed, order):
    """Every pair in numbers of participants -> header and rows. order: of the rows of `agreed`."""
    header = ["first", "second", "same answer", "Cohen's kappa"]
    header += ["both right", "only the first", "only the second", "neither"]
    place = {name: n for n, name in enumerate(order)}
    rows = []
    for pair in pairs:
        i, j, n = place[pair["a"]], place[pair["b"]], pair["n"]
        both = round(n * agreed.both_right[i, j])
        only = pair["only_a_right"], pair["only_b_right"]
        counts = [both, *only, n - both - sum(only)]
        same = f"{round(n * agreed.same[i, j])} ({agreed.same[i, j]:.0%})"
        kappa = forest.kappa_text(agreed.kappa[i, j])
        rows.append([pair["a"], pair["b"], same, kappa, *map(str, counts)])
    return header, rows


def divided_table(runs, y, p):
    """The participants on whom the runs are divided -> a dict: title; how they were chosen; ids, as
    they are; table (header, rows). runs {name: Results} and p {name: probabilities}: the best run
    first."""
    first = next(iter(runs.values()))
    ids = list(first.label_of)
    classes = first.result["classes"]
    rows = agreement.divided(y, p)
    header = [first.result["unit"], "true class"]
    is_pair = len(p) == 2
    if is_pair:
        short = forest.labels(list(p), 24)
        header += [
            f"{name}: {what}" for name in short for what in ("answer", "p of the true class")
        ]
    else:
        header += ["right", "right runs", "other answers"]
    shown = []
    for row in rows[:MOST_SHOWN]:
        said = {name: int(each[row].argmax()) for name, each in p.items()}
        answer = {name: f"{classes[k]} {number(p[name][row, k])}" for name, k in said.items()}
        right = [name for name, k in said.items() if k == y[row]]
        cells = [ids[row], classes[y[row]]]
        if is_pair:
            for name in p:
                mark = "right" if name in right else "wrong"
                cells += [f"{answer[name]}, {mark}", number(p[name][row, y[row]])]
        else:
            others = [f"{name}: {answer[name]}" for name in p if name not in right]
            cells += [f"{len(right)} of {len(p)}", ", ".join(right), "; ".join(others)]
        shown.append(cells)
    what = units(first.result)
    how = f"{len(rows)} of {len(ids)} {what}"
    how += f"; the first {MOST_SHOWN} are shown. " if len(rows) > MOST_SHOWN else ". "
    how += HOW_OF_TWO if is_pair else HOW_OF_MANY
    return {
        "title": f"{what} {TITLE_OF_TWO if is_pair else TITLE_OF_MANY}".capitalize(),
        "how": how,
        "ids": [ids[row] for row in rows[:MOST_SHOWN]],
        "table": (header, shown),
    }
