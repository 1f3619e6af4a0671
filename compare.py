"""Is one run better than another? Paired comparisons and the leaderboard, from what eval.py wrote.

    print(compare(["runs/a", "runs/b"], "test"))       # a sentence for every pair
    print(leaderboard(["runs/a", "runs/b"], "test"))   # runs/leaderboard.md, .csv and .html as well

Only runs that were scored on the same participants with the same labels can be compared.
"""

import os
from collections import Counter

import numpy as np

import device
import files
import metrics
from report import draw_leaderboard, number, png, render, span, text_table, units
from results import open_results


def names_of(folders):
    """What each folder is called: the last part of its path; the whole path where two share that;
    and with its number where even that would be shown alike."""
    names = [printable(os.path.basename(os.path.abspath(folder))) for folder in folders]
    both = zip(names, map(printable, folders))
    names = [path if names.count(name) > 1 else name for name, path in both]
    return [f"{name} ({n})" if names.count(name) > 1 else name for n, name in enumerate(names, 1)]


def printable(text):
    """A text on one line, that no terminal, page or picture takes for anything else."""
    return device.printable(str(text), keep="")


def once(folders, split):
    """The folders, each once: also where a link, or a link to its eval_SPLIT.json, names it
    again."""
    found = {}
    for folder in folders:
        found.setdefault(os.path.realpath(os.path.join(folder, f"eval_{split}.json")), folder)
    return list(found.values())


def reason_not_comparable(a, b):
    """How the participants or labels of two Results differ, in words. None where they do not."""
    differences = [
        f"{len(ids)} only in {name} ({files.first_few((i[:40] for i in sorted(ids)), 3)})"
        for name, ids in (
            (a.name, a.label_of.keys() - b.label_of.keys()),
            (b.name, b.label_of.keys() - a.label_of.keys()),
        )
        if ids
    ]
    if differences:
        return f"other participants: {'; '.join(differences)}"
    relabelled = sorted(i for i in a.label_of if a.label_of[i] != b.label_of[i])
    if relabelled:
        first = relabelled[0]
        return (
            f"other labels: participant {first[:40]} is of class {a.label_of[first]} in {a.name} "
            f"and {b.label_of[first]} in {b.name} ({len(relabelled)} such)"
        )
    names_a, names_b = a.result["classes"], b.result["classes"]
    if names_a != names_b:
        return f"other classes: {', '.join(names_a)} and {', '.join(names_b)}"
    hash_a, hash_b = a.result["labels_sha256"], b.result["labels_sha256"]
    if hash_a != hash_b:
        return (
            f"other labels: the table of {a.name} (sha256 {hash_a[:12]}) "
            f"is not that of {b.name} ({hash_b[:12]})"
        )
    return None


def compare_pairs(runs):
    """metrics.compare_all of Results that can be compared, in the first one's order."""
    ids = list(runs[0].label_of)
    probabilities = {run.name: np.array([run.p_of[i] for i in ids]) for run in runs}
    people = [runs[0].participant_of[i] for i in ids]
    return metrics.compare_all(list(runs[0].label_of.values()), probabilities, people)


def compare(folders, split):
    """Is one run better than another? -> text: a table of the runs, and a sentence for every pair.

    ValueError when they were not scored on the same participants and labels.
    """
    if len(once(folders, split)) < max(2, len(folders)):
        raise ValueError("--compare needs two or more different run folders")
    named = zip(names_of(folders), folders)
    runs = [open_results(name, folder, split) for name, folder in named]
    first = runs[0]
    for run in runs[1:]:
        reason = reason_not_comparable(first, run)
        if reason:
            raise ValueError(
                f"{first.name} and {run.name} cannot be compared on {split}, for they have {reason}"
            )
    header = ["", "balanced accuracy", "95 % interval", "chance band", "alarms"]
    rows = [
        [
            run.name,
            number(run.result["balanced_accuracy"]),
            span(run.result["ci95"]["balanced_accuracy"]),
            span(run.result["chance_band"]),
            str(len(run.result["alarms"])),
        ]
        for run in runs
    ]
    lines = [
        f"{split}, {len(first.label_of)} {units(first.result)}, {first.result['data']}\n",
        f"{text_table(header, rows)}\n",
    ]
    volumes = {run.result["volumes_asked"] for run in runs}
    if len(volumes) > 1:
        what = "these runs saw other volumes of the same participants"
        lines.append(f"note: {what}: {'; '.join(sorted(volumes))}")
    places = list(dict.fromkeys(run.result["data"] for run in runs))
    if len(places) > 1:
        lines.append(f"note: these runs were scored on data of several places: {'; '.join(places)}")
    for pair in compare_pairs(runs):
        lines += [
            f"{pair['sentence']}.",
            f"    McNemar's test of accuracy: {pair['only_a_right']} right only by {pair['a']}, "
            f"{pair['only_b_right']} only by {pair['b']}, p = {pair['mcnemar_p']:.4f}",
        ]
    lines += [f"ALARM: {run.name}: {alarm}" for run in runs for alarm in run.result["alarms"]]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- leaderboard


def leaderboard(folders, split):
    """Rank the runs by balanced accuracy -> text. Writes leaderboard.md, .csv and .html beside the
    first. FileNotFoundError for a folder that is not there, ValueError when none can be ranked.

    A run whose files are damaged or do not agree is left out, with the reason in all three files.
    """
    missing = [folder for folder in folders if not os.path.exists(folder)]
    if missing:
        raise FileNotFoundError(f"--leaderboard: {missing[0]} is not there; name run folders")
    beside = os.path.join(os.path.dirname(os.path.abspath(folders[0])), "leaderboard")
    # runs/* also has leaderboard.md
    folders = once([folder for folder in folders if os.path.isdir(folder)], split)
    runs, left_out = open_all(folders, split)
    runs, reasons = rank(runs)
    compared = [run for run in runs if not reasons[run.name]]
    pairs = compare_pairs(compared) if len(compared) > 1 else []
    best = compared[0]
    p_holm = {pair["b"]: pair["p_holm"] for pair in pairs if pair["a"] == best.name}
    tied = [name for name, p in p_holm.items() if p >= 0.05]

    header, rows = leaderboard_table(runs, reasons, p_holm, "tied for best" if tied else "best")
    data = ", ".join(dict.fromkeys(printable(run.result["data"]) for run in runs))
    about = [
        verdict(best, split, p_holm, tied, len(pairs)),
        f"{data}. Tied: the difference from the best is not significant at 5 % (paired bootstrap "
        "over the same participants, Holm-corrected over all pairs).",
    ]
    notes = [f"{name}: not ranked: {why}" for name, why in left_out.items()]
    notes += [f"{name}: not compared, for it has {why}" for name, why in reasons.items() if why]
    notes += [f"{run.name}: ALARM: {alarm}" for run in runs for alarm in run.result["alarms"]]
    notes = [printable(note) for note in notes]

    content = {"about": about, "runs": (header, rows), "notes": notes}
    text = render("leaderboard.md", **content)
    picture = png(draw_leaderboard({run.name: run.result for run in runs}))
    content |= {"title": f"leaderboard on {split}", "picture": picture, "pairs": pairs}
    files.write(f"{beside}.csv", files.csv_text(table_with_notes(header, rows, reasons, left_out)))
    files.write(f"{beside}.md", text)
    files.write(f"{beside}.html", render("leaderboard.html", **content))
    return f"{text}\nwritten: {beside}.html, .md and .csv"


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


def rank(runs):
    """Results -> Results, best first, then those that are not compared; and {name: why a run is not
    compared, or None}.

    One run of other participants must not end the comparison of all others: the largest group of
    runs that can be compared with each other is.
    """
    runs = sorted(runs, key=lambda r: (-r.result["balanced_accuracy"], r.result["log_loss"]))
    seen = lambda run: (
        frozenset(run.label_of.items()),
        tuple(run.result["classes"]),
        run.result["labels_sha256"],
    )
    [(largest, _)] = Counter(map(seen, runs)).most_common(1)
    first = next(run for run in runs if seen(run) == largest)
    reasons = {run.name: reason_not_comparable(first, run) for run in runs}
    return sorted(runs, key=lambda run: reasons[run.name] is not None), reasons


def leaderboard_table(runs, reasons, p_holm, first_place):
    """Header and rows. reasons {name: why a run is not compared, or None}; p_holm {name: p-value of
    the difference from the best run}; first_place: what the best run and those tied are called."""
    floors = list(dict.fromkeys(name for run in runs for name in run.result.get("floors", {})))
    header = ["run", "balanced accuracy", "95 % interval", "place", "p (Holm)"]
    header += ["majority class, random answers", "chance band", *floors]
    header += ["log-loss", "participants", "alarms", "encoder"]
    score = lambda scores: number(scores.get("balanced_accuracy"))
    rows = []
    for run in runs:
        r, p = run.result, p_holm.get(run.name)
        place = "worse" if p is not None and p < 0.05 else first_place
        rows.append(
            [
                run.name,
                score(r),
                span(r["ci95"]["balanced_accuracy"]),
                "not compared" if reasons[run.name] else place,
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


def table_with_notes(header, rows, reasons, left_out):
    """The table of leaderboard.csv: why a run is not compared stands beside it, and runs that are
    left out are rows too."""
    noted = [[*row, printable(reasons[row[0]] or "")] for row in rows]
    nothing = dict.fromkeys(header, "-") | {"place": "not ranked"}
    for name, why in left_out.items():
        noted.append([*(nothing | {"run": name}).values(), printable(why)])
    return [[*header, "note"], *noted]


def verdict(best, split, p_holm, tied, num_pairs):
    """The leaderboard in one sentence. best: Results; tied: names."""
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
