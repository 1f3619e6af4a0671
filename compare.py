"""Is one run better than another? Paired comparisons and the leaderboard, from what eval.py wrote.

    print(compare(["runs/a", "runs/b"], "test"))       # a sentence for every pair
    print(leaderboard(["runs/a", "runs/b"], "test"))   # runs/leaderboard.md, .csv and .html as well

Only runs that were scored on the same participants with the same labels can be compared.
"""

import os
import pathlib
from dataclasses import dataclass

import numpy as np

import files
import metrics
from ledger import CLASS_NAMES, LABELS
from report import draw_leaderboard, number, png, render, span, text_table
from runs import BEST

# what a comparison or the leaderboard reads of eval_SPLIT.json
KINDS = dict.fromkeys(("balanced_accuracy", "log_loss"), float) | {"n": int}
KINDS |= dict.fromkeys(("data", "scanner", "anatomic_region"), str)
KINDS |= dict.fromkeys(("labels_sha256", "encoder_sha256"), str)
KINDS |= {"alarms": list, "chance_band": list, "ci95": dict, "majority": dict, "random": dict}


@dataclass
class Results:
    """What eval.py wrote of a run on a split."""

    name: str
    result: dict  # eval_SPLIT.json
    label_of: dict  # {participant: class}
    p_of: dict  # {participant: probabilities (K,)}


def open_results(name, folder, split):
    """Read what eval.py wrote -> Results. ValueError when the files do not belong together."""
    again = f"run eval.py --ckpt {folder} --split {split}"
    path = pathlib.Path(folder, f"eval_{split}.json")
    table, checkpoint = path.with_name(f"predictions_{split}.csv"), path.with_name(BEST)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no eval_{split}.json; {again}")
    result = files.json_object(path.read_bytes(), path, again)
    if result.get("split") != split:
        raise ValueError(f"{path} is about split {result.get('split')}; {again}")
    if not table.is_file() or files.sha256(table) != result.get("predictions_sha256"):
        raise ValueError(f"{table} is not what {path} was computed from; {again}")
    if checkpoint.is_file() and files.sha256(checkpoint) != result.get("checkpoint_sha256"):
        raise ValueError(f"{checkpoint} is not the checkpoint that {path} is about; {again}")
    unusable = [key for key, kind in KINDS.items() if not isinstance(result.get(key), kind)]
    if unusable:
        raise ValueError(f"{path} has no {files.first_few(unusable)} that can be used; {again}")
    try:
        return Results(name, result, *read_predictions(table))
    except ValueError as error:
        raise ValueError(f"{error}; {again}") from error


def read_predictions(table):
    """predictions_SPLIT.csv -> {participant: class}, {participant: probabilities (K,)}. ValueError
    where it holds anything else."""
    columns = [f"p{k}" for k in range(len(CLASS_NAMES))]
    label_of, p_of = {}, {}
    for row in files.read_csv(table, ["participant_id", "y_true", *columns]):
        participant = row["participant_id"]
        try:
            label, p = int(row["y_true"]), [float(row[column]) for column in columns]
        except ValueError as error:
            raise ValueError(f"{table}: participant {participant}: {error}") from error
        if not (0 <= label < len(CLASS_NAMES) and np.isfinite(p).all()):
            raise ValueError(f"{table}: participant {participant} has class {label} and {p}")
        if participant in label_of:
            raise ValueError(f"{table}: participant {participant} is there twice")
        label_of[participant], p_of[participant] = label, p
    return label_of, p_of


def open_all(folders, split):
    """Results of every folder, named by the last part of its path; by the whole path where two
    folders share that."""
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    return [
        open_results(printable(name if names.count(name) == 1 else folder), folder, split)
        for name, folder in zip(names, folders)
    ]


def printable(folder):
    """A folder's name or path as text. What no terminal, page or picture could show is escaped:
    line breaks, bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(folder))


def reason_not_comparable(a, b):
    """How the participants or labels of two Results differ, in words. None where they do not."""
    differences = [
        f"{len(ids)} only in {name} ({files.first_few(sorted(ids), 3)})"
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
            f"other labels: participant {first} is of class {a.label_of[first]} in {a.name} "
            f"and {b.label_of[first]} in {b.name} ({len(relabelled)} such)"
        )
    hash_a, hash_b = a.result["labels_sha256"], b.result["labels_sha256"]
    if hash_a != hash_b:
        return (
            f"other labels: {LABELS} of {a.name} (sha256 {hash_a[:12]}) "
            f"is not that of {b.name} ({hash_b[:12]})"
        )
    return None


def compare_pairs(runs):
    """metrics.compare_all of Results that can be compared, in the first one's order."""
    ids = list(runs[0].label_of)
    probabilities = {run.name: np.array([run.p_of[i] for i in ids]) for run in runs}
    return metrics.compare_all(list(runs[0].label_of.values()), probabilities, ids)


def compare(folders, split):
    """Is one run better than another? -> text: a table of the runs, and a sentence for every pair.

    ValueError when they were not scored on the same participants and labels.
    """
    if len(set(map(os.path.realpath, folders))) < max(2, len(folders)):
        raise ValueError("--compare needs two or more different run folders")
    runs = open_all(folders, split)
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
        f"{split}, {len(first.label_of)} participants, {first.result['data']}\n",
        f"{text_table(header, rows)}\n",
    ]
    volumes = {f"{run.result['scanner']}, {run.result['anatomic_region']}" for run in runs}
    if len(volumes) > 1:
        what = "these runs saw other volumes of the same participants"
        lines.append(f"note: {what}: {'; '.join(sorted(volumes))}")
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
    first. FileNotFoundError for a folder that is not there, ValueError when none was scored."""
    missing = [folder for folder in folders if not os.path.exists(folder)]
    if missing:
        raise FileNotFoundError(f"--leaderboard: {missing[0]} is not there; name run folders")
    # runs/* also has leaderboard.md; a folder that is named twice is one run
    folders = list({os.path.realpath(f): f for f in folders if os.path.isdir(f)}.values())
    scored = [f for f in folders if os.path.exists(os.path.join(f, f"eval_{split}.json"))]
    if not scored:
        again = f"run eval.py --ckpt RUN --split {split} first"
        raise ValueError(f"--leaderboard: no folder holds an eval_{split}.json; {again}")
    runs, reasons = rank(open_all(scored, split))
    compared = [run for run in runs if not reasons[run.name]]
    pairs = compare_pairs(compared) if len(compared) > 1 else []
    best = compared[0]
    p_holm = {pair["b"]: pair["p_holm"] for pair in pairs if pair["a"] == best.name}
    tied = [name for name, p in p_holm.items() if p >= 0.05]

    header, rows = leaderboard_table(runs, reasons, p_holm, "tied for best" if tied else "best")
    data = ", ".join(dict.fromkeys(run.result["data"] for run in runs))
    about = [
        verdict(best, split, p_holm, tied, len(pairs)),
        f"{data}. Tied: the difference from the best is not significant at 5 % (paired bootstrap "
        "over the same participants, Holm-corrected over all pairs).",
    ]
    notes = [f"{name}: not compared, for it has {why}" for name, why in reasons.items() if why]
    notes += [f"{run.name}: ALARM: {alarm}" for run in runs for alarm in run.result["alarms"]]
    notes += [f"not scored on {split}: {printable(f)}" for f in folders if f not in scored]

    content = {"about": about, "runs": (header, rows), "notes": notes}
    text = render("leaderboard.md", **content)
    picture = png(draw_leaderboard({run.name: run.result for run in runs}))
    content |= {"title": f"leaderboard on {split}", "picture": picture, "pairs": pairs}
    beside = os.path.join(os.path.dirname(os.path.abspath(folders[0])), "leaderboard")
    files.write(f"{beside}.csv", files.csv_text([header, *rows]))
    files.write(f"{beside}.md", text)
    files.write(f"{beside}.html", render("leaderboard.html", **content))
    return text


def rank(runs):
    """Results -> Results, best first, then those that are not compared; and {name: why a run is not
    compared, or None}.

    One run of other participants must not end the comparison of all others: the largest group of
    runs that can be compared with each other is.
    """
    runs = sorted(runs, key=lambda r: (-r.result["balanced_accuracy"], r.result["log_loss"]))
    candidates = [{run.name: reason_not_comparable(first, run) for run in runs} for first in runs]
    reasons = max(candidates, key=lambda reasons: list(reasons.values()).count(None))
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


def verdict(best, split, p_holm, tied, num_pairs):
    """The leaderboard in one sentence. best: Results; tied: names."""
    name = best.name
    score = f"balanced accuracy {number(best.result['balanced_accuracy'])} on {split}"
    if not p_holm:
        return f"{name}: {score}; there is no other run to compare it with."
    if tied:
        return f"{name} leads with {score}, but is not shown to be better than {', '.join(tied)}."
    return (
        f"{name} is the best of {len(p_holm) + 1} runs: {score}, better than every other "
        f"(p at most {max(p_holm.values()):.4f}, Holm over {num_pairs} pairs)."
    )
