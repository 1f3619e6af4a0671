"""Which run is best? A ranking of the runs of each task, and of the encoders over all tasks.

    print(leaderboard(["runs/a", "runs/b"], "test"))   # runs/leaderboard.md, .csv, .html, .tex too

What was not scored on the same participants with the same labels is never ranked together. A task
is a label on certain volumes; a method is an encoder in a mode (a probe, an attentive one, ...).
Figures are in runs/leaderboard/, as PNG, SVG and PDF.

Whether runs differ is drawn as in the critical-difference diagrams of Demsar (2006, JMLR 7), but
not by the tests of Friedman and Nemenyi, which take data sets for a sample and need more than ten.
Of one task there is none; of a few, which often have the same participants, none that could be
believed; and their result for two methods depends on which others are there (Benavoli et al. 2016,
JMLR 17). So each two are tested on the same participants, exactly (paired.py), Holm-corrected, and
a bar joins those of which no two are shown to differ.
"""

import itertools
import os
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

import files
import forest
import intervals
import paired
from agreement import groups
from compare import (
    ENDINGS,
    compare_pairs,
    names_of,
    once,
    pair_table,
    printable,
    reason_not_comparable,
    verdict,
    without_pages,
)
from findings import CHOSEN, clean, number, span, units
from report import latex, render
from resampling import balanced_accuracy, resample
from results import open_results


@dataclass
class Task:
    """The runs of a task. runs: Results, best first, then those that are not compared; reasons:
    {name: why a run is not compared, or None}; pairs: metrics.compare_all of those that are."""

    title: str
    runs: list
    reasons: dict
    pairs: list

    @property
    def compared(self):
        return [run for run in self.runs if not self.reasons[run.name]]


def leaderboard(folders, split):
    """Rank the runs by balanced accuracy, within each task -> text. Writes leaderboard.md, .csv,
    .html and .tex beside the first, and the figures into leaderboard/. FileNotFoundError for a
    folder that is not there, ValueError when none can be ranked.

    A run whose files are damaged or do not agree is left out, with the reason in these files.
    """
    missing = [folder for folder in folders if not os.path.exists(folder)]
    if missing:
        raise FileNotFoundError(f"--leaderboard: {missing[0]} is not there; name run folders")
    beside = os.path.join(os.path.dirname(os.path.abspath(folders[0])), "leaderboard")
    folders = [folder for folder in without_pages(folders) if os.path.isdir(folder)]
    folders = once(folders, split)
    runs, left_out = open_all(folders, split)
    tasks = tasks_of(runs)
    # columns that any run has, so that the tables of all tasks are alike
    floors = list(dict.fromkeys(name for run in runs for name in run.result.get("floors", {})))
    sections = [section(task, split, floors, len(tasks) > 1) for task in tasks]
    overall, drawn = over_all_tasks(tasks), {}
    for n, (task, shown) in enumerate(zip(tasks, sections), 1):
        ending = f"_{n}" if len(tasks) > 1 else ""
        figures, words = draw(task)
        drawn |= {f"{name}{ending}": figure for name, figure in figures.items()}
        shown["words"] = {f"{name}{ending}": text for name, text in words.items()}
    if overall:
        drawn["mean_ranks"] = forest.draw_ranking(*overall["ranking"], "mean rank", True)
    content = {
        "title": f"leaderboard on {split}",
        "overall": overall,
        "sections": sections,
        "pictures": forest.write(beside, drawn),
        "note": forest.ranking_note,
        "left_out": [printable(f"{name}: not ranked: {why}") for name, why in left_out.items()],
    }
    text = render("leaderboard.md", **content)
    files.write(f"{beside}.csv", files.csv_text(csv_rows(tasks, sections, left_out)))
    files.write(f"{beside}.md", text)
    files.write(f"{beside}.html", render("leaderboard.html", **content))
    files.write(f"{beside}.tex", latex_of(content))
    *endings, last = (f".{ending}" for ending in ENDINGS)
    return f"{text}\nwritten: {beside}{', '.join(endings)} and {last}"


def open_all(folders, split):
    """Results of every folder that can be ranked, and {name: why not} of the others. ValueError
    where there is none."""
    runs, left_out = [], {}
    for name, folder in zip(names_of(folders), folders):
        try:
            runs.append(open_results(name, folder, split))
        except (ValueError, OSError) as error:
            left_out[name] = str(error)
    if not runs:
        what = next(iter(left_out.values()), "there is no folder")
        raise ValueError(f"--leaderboard: none of {len(folders)} runs can be ranked: {what}")
    return runs, left_out


# ---------------------------------------------------------------------------------------- one task


def tasks_of(runs):
    """Results -> Tasks, in the order of the runs."""
    of_task = defaultdict(list)
    for run in runs:
        r = run.result
        of_task[r["task"], tuple(r["classes"]), r["unit"], r["volumes_asked"]].append(run)
    found = []
    for (name, _, _, volumes), members in of_task.items():
        ranked, reasons = rank(members)
        compared = [run for run in ranked if not reasons[run.name]]
        pairs = compare_pairs(compared) if len(compared) > 1 else []
        first = compared[0].result
        title = f"{name}: {first['n']} {units(first)}, {volumes}"
        found.append(Task(printable(title), ranked, reasons, pairs))
    return found


def rank(runs):
    """Results -> Results, best first, then those that are not compared; and {name: why a run is not
    compared, or None}.

    One run of other participants must not end the comparison of all others: the largest group of
    runs that can be compared with each other is.
    """
    runs = sorted(runs, key=lambda r: (-r.result["balanced_accuracy"], r.result["log_loss"]))
    seen = lambda run: (frozenset(run.label_of.items()), run.result["labels_sha256"])
    [(largest, _)] = Counter(map(seen, runs)).most_common(1)
    first = next(run for run in runs if seen(run) == largest)
    reasons = {run.name: reason_not_comparable(first, run) for run in runs}
    return sorted(runs, key=lambda run: reasons[run.name] is not None), reasons


def section(task, split, floors, is_one_of_several):
    """What the pages show of a task: sentences, tables, notes."""
    said, p_holm, tied = verdict(task.compared[0], split, task.pairs)
    data = ", ".join(dict.fromkeys(printable(run.result["data"]) for run in task.runs))
    notes = [f"{n}: not compared, for it has {why}" for n, why in task.reasons.items() if why]
    notes += [f"{run.name}: ALARM: {alarm}" for run in task.runs for alarm in run.result["alarms"]]
    chosen = f" {CHOSEN}: the scores are too good, and so are their differences."
    return {
        "title": task.title if is_one_of_several else "",
        "about": [
            said,
            f"{data}. Tied: the difference from the best is not significant at 5 % (paired "
            "test over the same participants, Holm-corrected over all pairs)."
            + (chosen if split == "val" else ""),
        ],
        "runs": task_table(task, p_holm, floors, "tied for best" if tied else "best"),
        "notes": [printable(note) for note in notes],
        "groups": groups([run.name for run in task.compared], task.pairs),
        "pairs": pair_table(task.pairs, split),
    }


def draw(task):
    """-> {name: figure} of a task, {name: the same in words}."""
    results = {
        f"{run.name} (not compared)" if task.reasons[run.name] else run.name: run.result
        for run in task.runs
    }
    drawn = {"scores": forest.draw_scores(results)}
    words = {"scores": forest.scores_in_words(results)}
    if len(task.compared) > 2:
        values = {run.name: run.result["balanced_accuracy"] for run in task.compared}
        ranked = values, groups(list(values), task.pairs)
        drawn["ranking"] = forest.draw_ranking(*ranked, "balanced accuracy")
        words["ranking"] = forest.ranking_in_words(*ranked, "Balanced accuracy")
    return drawn, words


def task_table(task, p_holm, floors, first_place):
    """Header and rows. p_holm {name: p-value of the difference from the best run}; floors: names of
    eval.floors; first_place: what the best run and those tied are called."""
    header = ["run", "balanced accuracy", "95 % interval", "place", "p (Holm)"]
    header += ["majority class, random answers", "chance band", *floors]
    header += ["log-loss", units(task.runs[0].result), "alarms", "encoder"]
    score = lambda scores: number(scores.get("balanced_accuracy"))
    rows = []
    for run in task.runs:
        r, p = run.result, p_holm.get(run.name)
        place = "worse" if p is not None and p < 0.05 else first_place
        rows.append(
            [
                run.name,
                score(r),
                span(clean(r, r["ci95"]["balanced_accuracy"])),
                "not compared" if task.reasons[run.name] else place,
                "-" if p is None else f"{p:.4f}",
                f"{score(r['majority'])}, {score(r['random'])}",
                span(r["chance_band"]),
                *(score(r.get("floors", {}).get(name, {})) for name in floors),
                number(r["log_loss"]),
                str(r["n"]),
                str(len(r["alarms"])),
                r["encoder_sha256"][:12],
            ]
        )
    return header, rows


# --------------------------------------------------------------------------------------- all tasks


def over_all_tasks(tasks):
    """Methods that were scored on every task, by mean rank -> a dict: about (sentences), table, or
    None where there are fewer than two such methods or tasks.

    The rank of a method in a task is that of its balanced accuracy among these methods (1: best;
    equal ones share the mean rank). Interval: bootstrap over the participants of each task. Wins
    and losses are pairs whose difference is significant within a task, by p (Holm); the others are
    ties.
    """
    hashes = defaultdict(set)
    for run in (run for task in tasks for run in task.runs):
        hashes[run.result["encoder"]].add(run.result["pretrained_sha256"])
    run_of = [methods_of(task, hashes) for task in tasks]
    everywhere = [m for m in run_of[0] if all(m in runs for runs in run_of)]
    if len(tasks) < 2 or len(everywhere) < 2:
        return None
    mean_rank, wins = ranks_and_wins(tasks, run_of, everywhere)
    order = np.argsort(mean_rank[:, 0], kind="stable")
    header = ["encoder, mode", "mean rank", "95 % interval", "wins, ties, losses"]
    header += [task.title.partition(":")[0] for task in tasks]
    rows = []
    for k in order:
        method = everywhere[k]
        scores = [number(runs[method].result["balanced_accuracy"]) for runs in run_of]
        interval = span(intervals.percentiles(mean_rank[k, 1:]))
        counts = ", ".join(map(str, wins[method]))
        rows.append([printable(method), f"{mean_rank[k, 0]:.2f}", interval, counts, *scores])
    pairs = pairs_over_tasks([everywhere[k] for k in order], run_of)
    ranking = {printable(everywhere[k]): mean_rank[k, 0] for k in order}
    told = groups(list(ranking), pairs)
    about = [
        f"Over {len(tasks)} tasks, {rows[0][0]} has the best mean rank of {len(rows)} "
        f"({rows[0][1]}, 95 % interval {rows[0][2]}).",
        "Wins, ties and losses are pairs with another of these within a task, by p (Holm).",
        told_apart(told, len(pairs)),
    ]
    omitted = sorted({m for runs in run_of for m in runs} - set(everywhere))
    if omitted:
        about.append(
            f"Not scored on every task, and not ranked here: {printable(files.first_few(omitted))}."
        )
    words = forest.ranking_in_words(ranking, told, "Mean rank")
    return {"about": about, "table": (header, rows), "ranking": (ranking, told), "words": words}


def ranks_and_wins(tasks, run_of, methods):
    """-> mean ranks (methods, 1 + R), of the data and of each resample; {method: [wins, ties,
    losses]}."""
    ranks, wins = [], {method: [0, 0, 0] for method in methods}
    for task, runs in zip(tasks, run_of):
        values = resampled_accuracy([runs[method] for method in methods])  # (methods, 1 + R)
        ranks.append(rankdata(-np.round(values, 12), axis=0))
        names = {runs[method].name: method for method in methods}
        for pair in task.pairs:
            if pair["a"] in names and pair["b"] in names:
                count_pair(wins, names[pair["a"]], names[pair["b"]], pair)
    return np.mean(ranks, axis=0), wins


def pairs_over_tasks(methods, run_of):
    """Every two methods over all tasks -> dicts with a, b (as they are printed), p_value, p_holm.

    Tested is the difference of their balanced accuracies, averaged over the tasks: what a
    participant adds to it, in all tasks together, could as well have the other sign. So tasks of
    the same participants need not be independent. run_of: of each task, {method: Results}.
    """
    pairs = []
    for a, b in itertools.combinations(methods, 2):
        shares = defaultdict(float)  # of each participant
        for runs in run_of:
            labels, people = runs[a].label_of, runs[a].participant_of
            y = np.array(list(labels.values()))
            p_a, p_b = (np.array([runs[m].p_of[i] for i in labels]) for m in (a, b))
            right = p_a.argmax(axis=1) == y, p_b.argmax(axis=1) == y
            each = paired.shares_of_difference(y, *right) / len(run_of)
            for i, share in zip(labels, each):
                shares[people[i]] += share
        p = paired.sign_test(np.array(list(shares.values())))
        pairs.append({"a": printable(a), "b": printable(b), "p_value": p})
    for pair, p in zip(pairs, paired.holm([pair["p_value"] for pair in pairs])):
        pair["p_holm"] = float(p)
    return pairs


def told_apart(told, num_pairs):
    """Which methods no test tells apart, in words. told: of agreement.groups."""
    how = (
        "Over all tasks together (their mean balanced accuracy; exact paired test, Holm over "
        f"{num_pairs} pair{'s' * (num_pairs > 1)})"
    )
    if not told:
        return f"{how}, every two are shown to differ."
    said = "; ".join(" and ".join(f'"{name}"' for name in group) for group in told[:3])
    more = f"; and {len(told) - 3} more groups" if len(told) > 3 else ""
    return f"{how}, these are not shown to differ: {said}{more}."


def methods_of(task, hashes):
    """{method: its best run} of the compared runs of a task. hashes {encoder: those of its weights}
    tell encoders of one name apart."""
    found = {}
    for run in task.compared:  # best first
        r = run.result
        which = f" {r['pretrained_sha256'][:12]}" if len(hashes[r["encoder"]]) > 1 else ""
        found.setdefault(f"{r['encoder']}{which}, {r['mode']}", run)
    return found


def count_pair(wins, a, b, pair):
    """Count a pair of methods as a win and a loss, or as a tie."""
    if pair["p_holm"] >= 0.05:
        wins[a][1] += 1
        wins[b][1] += 1
        return
    better, worse = (a, b) if pair["difference"] > 0 else (b, a)
    wins[better][0] += 1
    wins[worse][2] += 1


def resampled_accuracy(runs):
    """Balanced accuracy of Results of the same participants: of the data, then of each resample ->
    (runs, 1 + R)."""
    ids = list(runs[0].label_of)
    y = np.array([runs[0].label_of[i] for i in ids])
    weights = resample(y, [runs[0].participant_of[i] for i in ids])  # (R, n)
    weights = np.vstack([np.ones(len(y)), weights])
    answers = [np.array([run.p_of[i] for i in ids]).argmax(axis=1) for run in runs]
    return np.array([balanced_accuracy(y, said == y, weights) for said in answers])


# ------------------------------------------------------------------------------------------- files


def csv_rows(tasks, sections, left_out):
    """The rows of leaderboard.csv: those of all tasks; why a run is not compared stands beside it,
    and runs that are left out are rows too."""
    header = [*sections[0]["runs"][0], "task", "note"]
    # the tables say of each task what was scored
    rows = [["participants" if name in ("eyes", "volumes") else name for name in header]]
    for task, shown in zip(tasks, sections):
        for row in shown["runs"][1]:
            rows.append([*row, task.title, printable(task.reasons[row[0]] or "")])
    nothing = dict.fromkeys(header, "-") | {"place": "not ranked"}
    for name, why in left_out.items():
        rows.append([*(nothing | {"run": name, "note": printable(why)}).values()])
    return rows


def latex_of(content):
    """leaderboard.tex: each table as a LaTeX table in the style of booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    if content["overall"]:
        parts.append(latex(*content["overall"]["table"], content["overall"]["about"][0]))
    for shown in content["sections"]:
        header, rows = shown["runs"]
        columns = [0, 1, 2, 4, 6]  # what a paper shows
        parts.append(
            latex(
                [header[k] for k in columns],
                [[row[k] for k in columns] for row in rows],
                f"{shown['title']}. {shown['about'][0]}".removeprefix(". "),
            )
        )
    return "\n".join(parts)
