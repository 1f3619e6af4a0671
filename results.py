"""What eval.py wrote of a run on a split: sealed when it is written, and checked when it is read.

    result = sealed(result)                      # with the hash of all of it
    result = read_result("runs/a", "test")       # eval_test.json: as it was written, of known kinds
    run = open_results("a", "runs/a", "test")    # Results: with the predictions, and agreeing

No number is taken at a file's word: those that are shown beside other runs, and ranked by, are
computed again from the predictions.
"""

import functools
import json
import os
import pathlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pydantic
from pydantic import Field

import files
import intervals
import metrics
import resampling
from keys import boolean, exactly
from runs import BEST

MOST_CLASSES = 1000  # as config.KEYS allows
MOST_PARTICIPANTS = 50_000  # whose predictions are compared: 10,000 resamples of them are drawn

# -------------------------------------------------------------------- what eval_SPLIT.json holds

Text = Annotated[str, Field(strict=True, max_length=5000)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Score, Interval = Number | None, exactly(2, Number) | None  # None: undefined
ALL_SCORES = (*metrics.SCORES, *metrics.MORE_SCORES)


def shape(name, kinds, **optional):
    """A pydantic model of a JSON object with these {key: kind}, and others where it has them."""
    kinds = {key: (kind, ...) for key, kind in kinds.items()}
    return pydantic.create_model(name, **kinds, **{key: (k, None) for key, k in optional.items()})


@functools.cache
def model_of(num_classes):
    """The pydantic model of eval_SPLIT.json, of so many classes."""

    def each(names, kind):  # of scores; those of every class are lists
        per_class = exactly(num_classes, kind)
        return {name: per_class if name in metrics.PER_CLASS else kind for name in names}

    everything = (*ALL_SCORES, *metrics.PER_CLASS)
    scores, spans = shape("Scores", each(everything, Score)), each(everything, Interval)
    spans, per_class = shape("Intervals", spans), exactly(num_classes, Number)
    result = {
        "split": Literal["val", "test"],
        **dict.fromkeys(("run", "data", "task", "volumes_asked", "encoder", "mode"), Text),
        **dict.fromkeys(("content_sha256", "pretrained_sha256"), Text),
        **dict.fromkeys(("encoder_sha256", "checkpoint_sha256", "labels_sha256"), Text),
        "predictions_sha256": Text,
        "classes": exactly(num_classes, Text),
        **dict.fromkeys(("ordered", "refit"), boolean),
        "unit": Literal["participant", "eye", "volume"],
        **dict.fromkeys(("n", "participants", "volumes", "epoch"), Count),
        **each(everything, Score),
        **dict.fromkeys(("balanced_accuracy", "accuracy", "macro_f1", "log_loss"), Number),
        "majority_baseline": Number,
        **dict.fromkeys(("true_counts", "predicted_counts"), exactly(num_classes, Count)),
        "confusion_matrix": exactly(num_classes, exactly(num_classes, Count)),
        **{"ci95": spans, "chance": spans, "majority": scores, "random": scores},
        "chance_band": exactly(2, Number),
        "reliability": BINS,
        "shares": shape("Shares", {"known": boolean} | dict.fromkeys(SHARES, per_class)),
        "subgroups": dict[Text, list[shape("Group", GROUP)]],
        "per_volume": shape("PerVolume", each(ALL_SCORES, Score) | PER_VOLUME),
        "alarms": list[Text],
        "unreadable": list[shape("Unreadable", UNREADABLE)],
    }
    return shape(
        "Result",
        result,
        floors=dict[Text, shape("Floor", FLOOR)],
        seeds=shape("Seeds", {"seeds": list[Count], "balanced_accuracy": SPREAD}),
        temperature=Number,
        calibrated=shape("Calibrated", CALIBRATED),
        notes=list[Text],
        **WHAT_ELSE,
        prevalence=dict[Text, shape("AtShares", at_shares(num_classes))],
        label_shift=shape("LabelShift", label_shift(num_classes)),
        learning_curve=shape("LearningCurve", LEARNING_CURVE),
    )


def at_shares(num_classes):
    """{key: kind} of the scores at some class shares."""
    lists = dict.fromkeys(("shares", "precision_per_class"), exactly(num_classes, Number))
    numbers = dict.fromkeys(("accuracy", "macro_f1", "macro_precision", "log_loss"), Number)
    return lists | numbers | {"auroc_macro_ovr": Score}


def label_shift(num_classes):
    """{key: kind} of the estimated class shares."""
    lists = dict.fromkeys(("validation", "estimated", "true"), exactly(num_classes, Number))
    return lists | {"ci95": exactly(num_classes, exactly(2, Number))}


BINS = list[shape("Bin", {"confidence": Number, "accuracy": Number, "count": Count})]
GROUP = {"group": Text, "n": Count, "small": boolean, "balanced_accuracy": Score, "ci95": Interval}
GROUP |= {"rest": Score, "p_above_rest": Score}
FLOOR = {"balanced_accuracy": Number, "difference": Number, "p_value": Number}
FLOOR |= {"difference_ci95": exactly(2, Number)}
FLOOR["ci95"] = shape("FloorIntervals", {"balanced_accuracy": exactly(2, Number)})
SHARES = "asked", "stated", "p_value"
DIFFERENCE = {"difference": Number, "ci95": exactly(2, Number), "p_value": Number}
DIFFERENCE = shape("Difference", DIFFERENCE)
ADDS = {"weight": Number, "log_loss": DIFFERENCE, "balanced_accuracy": DIFFERENCE}
COVARIATES = {
    "columns": Annotated[list[Text], Field(min_length=1)],
    "C": Number,
    **dict.fromkeys(ALL_SCORES, Score),
    **FLOOR,
}
KNOWS = {"values": list[Text], "n": Count, "chance": Number, "ci95": exactly(2, Number)}
KNOWS |= {"balanced_accuracy": Number}
LOOKS = dict.fromkeys(("runs", "unreadable"), Count) | dict.fromkeys(("sd", "optimism"), Number)
SOME = Annotated[list[Number], Field(min_length=2)]  # of the first principal components
COLOURING = {"values": Count, "n": Count, "silhouette": Score, "components": SOME}
FEATURE_MAP = {
    "splits": dict[Text, shape("Points", dict.fromkeys(("points", "shown", "all"), Count))],
    "variance": SOME,
    "colourings": dict[Text, shape("Colouring", COLOURING)],
}
WHAT_ELSE = {
    "within": shape("Within", {"groups": Text, "band": exactly(2, Number)}),
    "covariates": shape("Covariates", COVARIATES, adds=shape("Adds", ADDS)),
    "knows": dict[Text, shape("Knows", KNOWS)],
    "looks": shape("Looks", LOOKS),
    "feature_map": shape("FeatureMap", FEATURE_MAP),
}
SPREAD = shape("Spread", {"mean": Number, "sd": Number, "each": list[Number]})
CALIBRATED = dict.fromkeys(("log_loss", "brier", "ece"), Number) | {"reliability": BINS}
MEASURED = {"mean": Number, "sd": Score, "ci95": exactly(2, Number)}
SIZE = {"participants": Number, "fraction": Number, "subsets": Count}
SIZE |= dict.fromkeys(("balanced_accuracy", "log_loss"), shape("Measured", MEASURED))
FORMULA = {
    "a": Number,
    "b": Number,
    "c": Number,
    "extrapolated": list[dict[Text, Score | Interval]],
}
FIT = shape("Fit", {"formula": shape("Formula", FORMULA) | None, "reason": Text | None})
LEARNING_CURVE = {"sizes": list[shape("Size", SIZE)], "balanced_accuracy": FIT, "log_loss": FIT}
OF_VOLUMES = shape("VolumeIntervals", dict.fromkeys(ALL_SCORES, Interval))
PER_VOLUME = {"n": Count, "ci95": OF_VOLUMES}
UNREADABLE = {"participant_id": Text, "path": Text, "reason": Text}


def sealed(result):
    """A result with the hash of all of it, by which read_result notices an edit."""
    return result | {"content_sha256": content_hash(result)}


def content_hash(result):
    content = {key: value for key, value in result.items() if key != "content_sha256"}
    return files.hashed(json.dumps(content, sort_keys=True))


def read_result(folder, split):
    """eval_SPLIT.json of a run -> dict. ValueError, with what to do, where it was edited or holds
    anything else than eval.py writes."""
    path, again = pathlib.Path(folder, f"eval_{split}.json"), how_to_score(folder, split)
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no eval_{split}.json; {again}")
    result = files.read_json(path, again)
    if result.get("content_sha256") != content_hash(result):
        raise ValueError(
            f"{path} was edited, or written by another version: it is not what its own "
            f"content_sha256 says; {again}"
        )
    try:
        classes = result.get("classes")
        num_classes = len(classes) if isinstance(classes, list) else 0  # which none fits
        model_of(min(max(num_classes, 2), MOST_CLASSES)).model_validate(result)
    except pydantic.ValidationError as error:
        unusable = files.first_few(dict.fromkeys(e["loc"][0] for e in error.errors()))
        raise ValueError(f"{path} has no {unusable} that can be used; {again}") from error
    if result["split"] != split:
        raise ValueError(f"{path} is about split {result['split']}; {again}")
    if ("temperature" in result) != ("calibrated" in result):
        raise ValueError(f"{path} has temperature or calibrated alone; {again}")
    return result


def how_to_score(folder, split):
    """What to do about a result that cannot be used. Results of RUN/last.pt are in RUN/last."""
    checkpoint = f"{folder}.pt" if os.path.isfile(f"{folder}.pt") else folder
    return f"run eval.py --ckpt {checkpoint} --split {split}"


# ------------------------------------------------------------------ a result and its predictions


@dataclass
class Results:
    """What eval.py wrote of a run on a split."""

    name: str
    result: dict  # eval_SPLIT.json
    label_of: dict  # {unit: class}, of participants, or of what data.unit says
    p_of: dict  # {unit: probabilities (K,)}
    participant_of: dict  # {unit: participant}


def open_results(name, folder, split):
    """Read what eval.py wrote -> Results. ValueError when the files do not belong together, or do
    not agree."""
    result, again = read_result(folder, split), how_to_score(folder, split)
    path, checkpoint = pathlib.Path(folder, f"eval_{split}.json"), pathlib.Path(folder, BEST)
    table = path.with_name(f"predictions_{split}.csv")
    if not table.is_file() or files.sha256(table) != result["predictions_sha256"]:
        raise ValueError(f"{table} is not what {path} was computed from; {again}")
    if checkpoint.is_file() and files.sha256(checkpoint) != result["checkpoint_sha256"]:
        raise ValueError(f"{checkpoint} is not the checkpoint that {path} is about; {again}")
    run = Results(name, result, *read_predictions(table, result, again))
    check_scores(run, table, again)
    return run


def read_predictions(table, result, again):
    """predictions_SPLIT.csv -> {unit: class}, {unit: probabilities (K,)}, {unit: participant}.
    ValueError where it holds anything else."""
    columns = [f"p{k}" for k in range(len(result["classes"]))]
    key = "participant_id" if result["unit"] == "participant" else "unit"
    rows = files.read_csv(table, [*{"participant_id", key}, "y_true", *columns], again)
    if not 0 < len(rows) <= MOST_PARTICIPANTS:
        raise ValueError(f"{table} has {len(rows)} participants; {again}")
    label_of, p_of, participant_of = {}, {}, {}
    for row in rows:
        participant = row[key]
        try:
            label, p = int(row["y_true"]), [float(row[column]) for column in columns]
        except ValueError:
            label, p = -1, [np.nan]
        if not (0 <= label < len(columns) and metrics.are_distributions(np.array(p))):
            raise ValueError(
                f"{table}: participant {participant[:40]} has no class and probabilities that can "
                f"be used; {again}"
            )
        if participant in label_of:
            raise ValueError(f"{table}: participant {participant[:40]} is there twice; {again}")
        label_of[participant], p_of[participant] = label, p
        participant_of[participant] = row["participant_id"]
    return label_of, p_of, participant_of


def check_scores(run, table, again):
    """ValueError unless the numbers that are shown and ranked by are those of the predictions."""
    result = run.result
    y, p = (np.array(list(values.values())) for values in (run.label_of, run.p_of))
    people, num_classes = list(run.participant_of.values()), len(result["classes"])
    expected = metrics.score(y, p, num_classes) | {"participants": len(set(people))}
    present = np.array(expected["true_counts"]) > 0
    expected["confusion_matrix"] = metrics.confusion(y, p.argmax(axis=1), num_classes)
    expected["majority_baseline"] = max(expected["true_counts"]) / len(y)
    asked = result["shares"]["asked"] if result["shares"]["known"] else None
    expected["shares"] = metrics.shares(y, p, people, asked)
    expected["majority"] = {"balanced_accuracy": 1 / present.sum()}
    if present.all():  # the shares of all classes add up to 1, whatever training's are
        expected["random"] = {"balanced_accuracy": 1 / num_classes}
    wrong = [name for name, value in expected.items() if not agree(result[name], value)]
    if not wrong:
        interval, band = interval_and_band(people, y, p)
        expected = {"ci95": {"balanced_accuracy": interval}, "chance_band": band}
        wrong = [name for name, value in expected.items() if not agree(result[name], value)]
    if wrong:
        names = files.first_few(wrong)
        raise ValueError(f"{names} in eval.py's result are not those of {table}; {again}")
    # the numbers are right, so these alarms are theirs; others are those of groups, and eval.py's
    missing = set(metrics.alarms(result | {"subgroups": {}})) - set(result["alarms"])
    if missing:
        raise ValueError(f"eval.py's result lacks an alarm of {table}: {min(missing)}; {again}")


def agree(found, expected):
    """Are two numbers, lists of them (None: undefined), or the expected part of a dict the same?"""
    if isinstance(expected, dict):
        return all(agree(found[name], value) for name, value in expected.items())
    found, expected = np.array(found, dtype=float), np.array(expected, dtype=float)
    return np.allclose(found, expected, rtol=0, atol=1e-9, equal_nan=True)


def interval_and_band(ids, y, p):
    """The 95 % interval and the chance band of balanced accuracy, as metrics.evaluate computes them
    beside those of all other scores, in a hundredth of its time."""
    answers = p.argmax(axis=1)
    ci95 = intervals.of_answers(y, answers, p.shape[1], ids, ["balanced_accuracy"])
    permuted = permuted_labels(tuple(y.tolist()), tuple(ids))  # (R, n)
    band = intervals.percentiles(resampling.accuracies_of_permuted(permuted, answers))
    return ci95["balanced_accuracy"], band


@functools.lru_cache(maxsize=2)
def permuted_labels(labels, ids):
    """resampling.permuted_labels of tuples; kept, for comparable runs have the same."""
    return resampling.permuted_labels(np.array(labels), ids)
