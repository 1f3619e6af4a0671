"""Is one run better than another? Paired comparisons, from what eval.py wrote.

    print(compare(["runs/a", "runs/b"], "test"))       # a sentence for every pair

Only runs that were scored on the same participants with the same labels can be compared.
"""

import os

import numpy as np

import device
import files
import metrics
import power
from findings import CHOSEN, clean, number, span
from report import text_table, units
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
        return f"other {units(a.result)}: {'; '.join(differences)}"
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


def power_of(a, b):
    """How many participants would show the difference of two Results, in words."""
    ids, y = list(a.label_of), list(a.label_of.values())
    p_a, p_b = (np.array([run.p_of[i] for i in ids]) for run in (a, b))
    people = [a.participant_of[i] for i in ids]
    return power.sentence(a.name, b.name, power.needed(y, p_a, p_b, people))


def compare(folders, split, with_power=False):
    """Is one run better than another? -> text: a table of the runs, and a sentence for every pair.
    with_power: also how many participants would show each difference.

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
            span(clean(run.result, run.result["ci95"]["balanced_accuracy"])),
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
    if split == "val":
        lines.append(
            f"note: {CHOSEN}; so these differences, their intervals and p-values are of the best "
            "of many, and say too much"
        )
    of_name = {run.name: run for run in runs}
    for pair in compare_pairs(runs):
        lines += [
            f"{pair['sentence']}.",
            f"    McNemar's test of accuracy: {pair['only_a_right']} right only by {pair['a']}, "
            f"{pair['only_b_right']} only by {pair['b']}, p = {pair['mcnemar_p']:.4f}",
        ]
        if with_power:
            lines.append(power_of(of_name[pair["a"]], of_name[pair["b"]]))
    lines += [f"ALARM: {run.name}: {alarm}" for run in runs for alarm in run.result["alarms"]]
    return "\n".join(lines)
