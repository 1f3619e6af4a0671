"""Is one run better than another? Paired comparisons, from what eval.py wrote.

    found = open_runs(["runs/a", "runs/b"], "test")    # the runs, and the tests of every pair
    print(in_words(found))                             # a sentence for every pair

Only runs that were scored on the same participants with the same labels can be compared. The page
of a comparison is in versus.py.
"""

import os
import re
from dataclasses import dataclass

import numpy as np

import device
import files
import metrics
import power
from findings import CHOSEN, clean, number, span
from forest import KINDS, oriented
from report import text_table, units
from results import open_results

# what --compare and --leaderboard write beside the runs: folders of figures, and these files
WRITTEN = ("comparison", "leaderboard")
ENDINGS = ("md", "csv", "html", "tex")
# of `make check` and `make preview`
BESIDE_RUNS = re.compile(rf".+_check\.html|.+_flow\.({'|'.join(KINDS)})|preview_.+\.png")


@dataclass
class Comparison:
    """Runs that were scored on the same participants. pairs: metrics.compare_all; powers: a
    sentence on each pair, where they were asked for."""

    split: str
    folders: list  # of the runs
    runs: list  # of Results
    pairs: list
    powers: list

    @property
    def order(self):
        """Names of the runs, the best first."""
        ranked = sorted(self.runs, key=lambda run: -run.result["balanced_accuracy"])
        return [run.name for run in ranked]


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


def without_pages(paths):
    """The paths without what --compare, --leaderboard, check.py and preview.py wrote: runs/* has
    that, too. Such a folder holds figures and nothing else; a run may have its name."""
    return [path for path in paths if not is_written(path)]


def is_written(path):
    name = os.path.basename(os.path.abspath(path))
    if os.path.isfile(path) and BESIDE_RUNS.fullmatch(name):
        return True
    stem, _, ending = name.partition(".")
    if stem not in WRITTEN:
        return False
    if os.path.isdir(path):
        names = [name for name in os.listdir(path) if not files.IGNORED.fullmatch(name)]
        return bool(names) and all(name.rpartition(".")[2] in KINDS for name in names)
    return os.path.isfile(path) and ending in ENDINGS


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


def open_runs(folders, split, with_power=False):
    """Open the results of the folders, and test every pair of them -> Comparison. with_power: say
    also how many participants would show each difference.

    ValueError when they were not scored on the same participants and labels.
    """
    folders = without_pages(folders)
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
    pairs, of_name = compare_pairs(runs), {run.name: run for run in runs}
    powers = [power_of(of_name[pair["a"]], of_name[pair["b"]]) for pair in pairs if with_power]
    return Comparison(split, folders, runs, pairs, powers)


def compare(folders, split, with_power=False):
    """Is one run better than another? -> text, see `open_runs` and `in_words`."""
    return in_words(open_runs(folders, split, with_power))


def in_words(found):
    """A Comparison as text: a table of the runs, and a sentence for every pair."""
    lines = [f"{about(found)}\n", f"{text_table(*score_table(found.runs))}\n"]
    lines += [f"note: {note}" for note in notes(found)]
    for n, pair in enumerate(found.pairs):
        lines += [f"{pair['sentence']}.", f"    {mcnemar_line(pair)}"]
        lines += found.powers[n : n + 1]
    lines += [f"ALARM: {alarm}" for alarm in alarms(found)]
    return "\n".join(lines)


def about(found):
    """What was scored."""
    first = found.runs[0]
    return f"{found.split}, {len(first.label_of)} {units(first.result)}, {first.result['data']}"


def score_table(runs):
    """Results -> header and rows."""
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
    return header, rows


def notes(found):
    """What else is to be known of these runs."""
    said, results = [], [run.result for run in found.runs]
    volumes = {result["volumes_asked"] for result in results}
    if len(volumes) > 1:
        what = "these runs saw other volumes of the same participants"
        said.append(f"{what}: {'; '.join(sorted(volumes))}")
    places = list(dict.fromkeys(result["data"] for result in results))
    if len(places) > 1:
        said.append(f"these runs were scored on data of several places: {'; '.join(places)}")
    if found.split == "val":
        said.append(
            f"{CHOSEN}; so these differences, their intervals and p-values are of the best of "
            "many, and say too much"
        )
    return said


def mcnemar_line(pair):
    return (
        f"McNemar's test of accuracy: {pair['only_a_right']} right only by {pair['a']}, "
        f"{pair['only_b_right']} only by {pair['b']}, p = {pair['mcnemar_p']:.4f}"
    )


def alarms(found):
    return [f"{run.name}: {alarm}" for run in found.runs for alarm in run.result["alarms"]]


def pair_table(pairs, split):
    """Every pair, the higher score first -> header and rows."""
    header = ["higher", "lower", "difference", "95 % interval", "p", "p (Holm)", "McNemar p"]
    rows = []
    for pair in pairs:
        higher, lower, difference, interval = oriented(pair, split)
        tests = [f"{pair[name]:.4f}" for name in ("p_value", "p_holm", "mcnemar_p")]
        rows.append([higher, lower, number(difference), span(interval), *tests])
    return header, rows


def verdict(best, split, pairs):
    """Some runs in one sentence, and those that are tied with the best. best: Results; pairs: of
    all of them -> sentence, {name: p (Holm) of the difference from the best}, names."""
    other = {"a": "b", "b": "a"}
    p_holm = {
        pair[other[own]]: pair["p_holm"]
        for pair in pairs
        for own in ("a", "b")
        if pair[own] == best.name
    }
    tied = [name for name, p in p_holm.items() if p >= 0.05]
    score = f"balanced accuracy {number(best.result['balanced_accuracy'])} on {split}"
    if not p_holm:
        said = f"{best.name}: {score}; there is no other run to compare it with."
    elif tied:
        others = files.first_few(tied, 3)
        said = f"{best.name} leads with {score}, but is not shown to be better than {others}."
    else:
        corrected = f", Holm over {len(pairs)} pairs" if len(pairs) > 1 else ""
        said = (
            f"{best.name} is the best of {len(p_holm) + 1} runs: {score}, better than every other "
            f"(p at most {max(p_holm.values()):.4f}{corrected})."
        )
    return said, p_holm, tied
