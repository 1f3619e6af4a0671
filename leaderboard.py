"""Which run is best? A ranking of the runs of each task, and of the encoders over all tasks.

    print(leaderboard(["runs/a", "runs/b"], "test"))   # runs/leaderboard.md, .csv, .html, .tex too

What was not scored on the same participants with the same labels is never ranked together. A task
is a label on certain volumes; a method is an encoder in a mode (a probe, an attentive one, ...).
"""

import os
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

import figures
import files
import intervals
from compare import compare_pairs, names_of, once, printable, reason_not_comparable
from findings import CHOSEN, clean, number, span, units
from report import latex, render
from resampling import balanced_accuracy, resample
from results import open_results

ENDINGS = ("md", "csv", "html", "tex")


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
    .html and .tex beside the first. FileNotFoundError for a folder that is not there, ValueError
    when none can be ranked.

    A run whose files are damaged or do not agree is left out, with the reason in these files.
    """
    missing = [folder for folder in folders if not os.path.exists(folder)]
    if missing:
        raise FileNotFoundError(f"--leaderboard: {missing[0]} is not there; name run folders")
    beside = os.path.join(os.path.dirname(os.path.abspath(folders[0])), "leaderboard")
    # runs/* also has leaderboard.md
    folders = once([folder for folder in folders if os.path.isdir(folder)], split)
    runs, left_out = open_all(folders, split)
    tasks = tasks_of(runs)
    # columns that any run has, so that the tables of all tasks are alike
    floors = list(dict.fromkeys(name for run in runs for name in run.result.get("floors", {})))
    sections = [section(task, split, floors, len(tasks) > 1) for task in tasks]
    content = {
        "title": f"leaderboard on {split}",
        "overall": over_all_tasks(tasks),
        "sections": sections,
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
    groups = defaultdict(list)
    for run in runs:
        r = run.result
        groups[r["task"], tuple(r["classes"]), r["unit"], r["volumes_asked"]].append(run)
    found = []
    for (name, _, _, volumes), members in groups.items():
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
    """What the pages show of a task: sentences, table, notes, picture, pairs."""
    best = task.compared[0]
    p_holm = {pair["b"]: pair["p_holm"] for pair in task.pairs if pair["a"] == best.name}
    tied = [name for name, p in p_holm.items() if p >= 0.05]
    data = ", ".join(dict.fromkeys(printable(run.result["data"]) for run in task.runs))
    notes = [f"{n}: not compared, for it has {why}" for n, why in task.reasons.items() if why]
    notes += [f"{run.name}: ALARM: {alarm}" for run in task.runs for alarm in run.result["alarms"]]
    chosen = f" {CHOSEN}: the scores are too good, and so are their differences."
    return {
        "title": task.title if is_one_of_several else "",
        "about": [
            verdict(best, split, p_holm, tied, len(task.pairs)),
            f"{data}. Tied: the difference from the best is not significant at 5 % (paired "
            "test over the same participants, Holm-corrected over all pairs)."
            + (chosen if split == "val" else ""),
        ],
        "runs": task_table(task, p_holm, floors, "tied for best" if tied else "best"),
        "notes": [printable(note) for note in notes],
        "picture": figures.picture(
            figures.draw_leaderboard({run.name: run.result for run in task.runs}), "svg"
        ),
        "pairs": task.pairs,
    }


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


def verdict(best, split, p_holm, tied, num_pairs):
    """A task's table in one sentence. best: Results; tied: names."""
    name = best.name
    score = f"balanced accuracy {number(best.result['balanced_accuracy'])} on {split}"
    if not p_holm:
        return f"{name}: {score}; there is no other run to compare it with."
    if tied:
        others = files.first_few(tied, 3)
        return f"{name} leads with {score}, but is not shown to be better than {others}."
    corrected = f", Holm over {num_pairs} pairs" if num_pairs > 1 else ""
    return (
        f"{name} is the best of {len(p_holm) + 1} runs: {score}, better than every other "
        f"(p at most {max(p_holm.values()):.4f}{corrected})."
    )


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
    ranks, wins = [], {method: [0, 0, 0] for method in everywhere}
    for task, runs in zip(tasks, run_of):
        chosen = [runs[method] for method in everywhere]
        values = resampled_accuracy(chosen)  # (methods, 1 + R)
        ranks.append(rankdata(-np.round(values, 12), axis=0))
        names = {runs[method].name: method for method in everywhere}
        for pair in task.pairs:
            if pair["a"] in names and pair["b"] in names:
                count_pair(wins, names[pair["a"]], names[pair["b"]], pair)
    mean_rank = np.mean(ranks, axis=0)  # (methods, 1 + R)
    header = ["encoder, mode", "mean rank", "95 % interval", "wins, ties, losses"]
    header += [task.title.partition(":")[0] for task in tasks]
    rows = []
    for k in np.argsort(mean_rank[:, 0], kind="stable"):
        method = everywhere[k]
        scores = [number(runs[method].result["balanced_accuracy"]) for runs in run_of]
        interval = span(intervals.percentiles(mean_rank[k, 1:]))
        counts = ", ".join(map(str, wins[method]))
        rows.append([printable(method), f"{mean_rank[k, 0]:.2f}", interval, counts, *scores])
    omitted = sorted({m for runs in run_of for m in runs} - set(everywhere))
    about = [
        f"Over {len(tasks)} tasks, {rows[0][0]} has the best mean rank of {len(rows)} "
        f"({rows[0][1]}, 95 % interval {rows[0][2]}).",
        "Wins, ties and losses are pairs with another of these within a task, by p (Holm).",
    ]
    if omitted:
        about.append(
            f"Not scored on every task, and not ranked here: {printable(files.first_few(omitted))}."
        )
    return {"about": about, "table": (header, rows)}


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
