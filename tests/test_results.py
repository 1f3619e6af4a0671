"""What is believed of eval_SPLIT.json and predictions_SPLIT.csv, and what a damaged run costs."""

import hashlib
import html
import json
import os
import random
import shutil
import time

import numpy as np
import pytest
from helpers import (
    FLOOR,
    answers,
    content,
    copy_of,
    evaluate,
    read_bytes,
    read_predictions,
    trained,
    write_bytes,
    write_results,
)
from sklearn.metrics import balanced_accuracy_score

import compare
import eval as evaluation
import files
import leaderboard
import ledger
import metrics
import report
import results
import runs

NAMES = "a", "b", "c"
FEW = np.repeat(range(4), 10)  # labels


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with three runs of 40 participants, which can be compared; to be copied."""
    folder = tmp_path_factory.mktemp("three")
    for n, name in enumerate(NAMES):
        p = answers(0.5 + 0.1 * n, n)[np.r_[0:10, 40:50, 80:90, 121:131]]
        floors = {"random encoder": FLOOR}
        write_results(folder / name, p, FEW, floors=floors)
    return folder


@pytest.fixture()
def runs_abc(three, tmp_path):
    return shutil.copytree(three, tmp_path / "runs")


def paths_of(folder):
    return [os.path.join(folder, name) for name in NAMES]


def read(folder):
    return json.loads(read_bytes(f"{folder}/eval_test.json"))


def write(folder, result, seal=True):
    result = results.sealed(result) if seal else result
    write_bytes(f"{folder}/eval_test.json", json.dumps(result).encode())


def board_of(folder):
    """{run: row of leaderboard.csv}."""
    return {row["run"]: row for row in files.read_csv(f"{folder}/leaderboard.csv")}


# ------------------------------------------------------------------------- scores that are edited


def set_to(name, value):
    def change(result):
        *parents, last = name.split(".")
        for parent in parents:
            result = result[parent]
        result[last] = value(result[last]) if callable(value) else value

    return change


EDITS = {
    "n": set_to("n", 400),
    "participants": set_to("participants", 41),
    "accuracy": set_to("accuracy", 0.999),
    "balanced_accuracy": set_to("balanced_accuracy", 0.999),
    "macro_f1": set_to("macro_f1", 0.999),
    "auroc_macro_ovr": set_to("auroc_macro_ovr", 0.999),
    "log_loss": set_to("log_loss", 0.001),
    "ece": set_to("ece", 0.0),
    "f1_per_class": set_to("f1_per_class", [1.0, 1.0, 1.0, 1.0]),
    "true_counts": set_to("true_counts", [10, 10, 11, 9]),
    "predicted_counts": set_to("predicted_counts", [10, 10, 10, 10]),
    "confusion_matrix": set_to("confusion_matrix", np.diag([10] * 4).tolist()),
    "majority_baseline": set_to("majority_baseline", 0.1),
    "majority": set_to("majority.balanced_accuracy", 0.1),
    "random": set_to("random.balanced_accuracy", 0.1),
    "ci95": set_to("ci95.balanced_accuracy", lambda old: [0.9, old[1]]),
    "chance_band": set_to("chance_band", [0.0, 0.1]),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_number_that_is_edited_with_its_seal_is_refused(runs_abc, name):
    result = read(runs_abc / "b")
    EDITS[name](result)
    write(runs_abc / "b", result)
    message = f"{name}.* in eval.py's result are not those of .*b/predictions_test.csv; run eval"
    with pytest.raises(ValueError, match=message):
        compare.compare(paths_of(runs_abc), "test")


def test_an_alarm_that_is_taken_out_with_the_seal_is_refused(tmp_path):
    collapsed = np.tile([0.7, 0.1, 0.1, 0.1], (40, 1))
    folder = write_results(tmp_path / "a", collapsed, FEW)
    result = read(folder)
    result["alarms"] = [alarm for alarm in result["alarms"] if "collapse" not in alarm]
    write(folder, result)
    with pytest.raises(ValueError, match="lacks an alarm of .*: model collapse: class pre-dia"):
        results.open_results("a", folder, "test")


SEALED = {"floors": {}, "subgroups": {"site": []}, "encoder_sha256": "0" * 64, "data": "other"}
SEALED |= {"alarms": ["none"], "balanced_accuracy": 0.999}


@pytest.mark.parametrize("name", SEALED)
def test_an_edit_without_the_seal_is_refused(runs_abc, name):
    result = read(runs_abc / "b") | {name: SEALED[name]}
    write(runs_abc / "b", result, seal=False)
    with pytest.raises(ValueError, match="b/eval_test.json was edited, or written by another"):
        compare.compare(paths_of(runs_abc), "test")


def test_a_result_without_a_seal_is_refused(runs_abc):
    result = read(runs_abc / "b")
    del result["content_sha256"]
    write(runs_abc / "b", result, seal=False)
    with pytest.raises(ValueError, match="b/eval_test.json was edited, or written by another"):
        results.read_result(runs_abc / "b", "test")


@pytest.mark.parametrize("labels", [[10, 10, 10, 10], [12, 0, 20, 8], [1, 39, 0, 0], [40, 0, 0, 0]])
def test_interval_and_band_are_those_of_metrics(labels):
    rng = np.random.default_rng(sum(labels[:2]))
    y, p = np.repeat(range(4), labels), rng.dirichlet(np.ones(4), 40)
    ids = [f"p{i}" for i in rng.permutation(40)]
    expected = metrics.evaluate(y, p, 4, ids)
    interval, band = results.interval_and_band(ids, y, p)
    assert interval == pytest.approx(expected["ci95"]["balanced_accuracy"], abs=1e-12)
    assert band == pytest.approx(expected["chance_band"], abs=1e-12)


def test_what_eval_writes_is_believed(written, tmp_path):
    run = copy_of(trained(written, "eval.floors=true", "train.seeds=[1,2]"), tmp_path)
    for split in ("val", "test"):
        result, _ = evaluate(run, split)
        assert results.open_results("run", run, split).result == result
        assert {"floors", "seeds", "calibrated", "content_sha256"} <= result.keys()


# ------------------------------------------------------------------ a damaged run among others


def nested(depth):
    return b"[" * depth + b"]" * depth


def with_value(name, value):
    """eval_test.json with another value, sealed."""

    def damage(folder):
        result = read(folder)
        set_to(name, value)(result)
        write(folder, result)

    return damage


def without(name):
    def damage(folder):
        result = read(folder)
        del result[name]
        write(folder, result)

    return damage


def with_text(name, data):
    return lambda folder: write_bytes(f"{folder}/{name}", data)


def with_table(change):
    """predictions_test.csv with another text, and its hash in a sealed result."""

    def damage(folder):
        path = f"{folder}/predictions_test.csv"
        write_bytes(path, change(read_bytes(path)))
        set_sha = set_to("predictions_sha256", hashlib.sha256(read_bytes(path)).hexdigest())
        result = read(folder)
        set_sha(result)
        write(folder, result)

    return damage


DAMAGES = {
    "a list": with_text("eval_test.json", b"[]"),
    "null": with_text("eval_test.json", b"null"),
    "empty": with_text("eval_test.json", b""),
    "100,000 brackets": with_text("eval_test.json", nested(100_000)),
    "100,000 objects": with_text("eval_test.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "500 brackets": with_text("eval_test.json", b'{"a":' + nested(500) + b"}"),
    "not UTF-8": with_text("eval_test.json", b'{"run": "\xff"}'),
    "NaN": with_text("eval_test.json", b'{"n": NaN}'),
    "Infinity": with_text("eval_test.json", b'{"n": -Infinity}'),
    "1e999": with_text("eval_test.json", b'{"n": 1e999}'),
    "5,000 digits": with_text("eval_test.json", b'{"n": ' + b"9" * 5000 + b"}"),
    "80 MB": with_text("eval_test.json", b" " * (80 << 20)),
    "a missing key": without("log_loss"),
    "calibrated missing": with_value("temperature", 1.0),
    "text for a number": with_value("balanced_accuracy", "0.999"),
    "true for a number": with_value("balanced_accuracy", True),
    "null for a number": with_value("balanced_accuracy", None),
    "a huge number": with_value("balanced_accuracy", 10**400),
    "a huge count": with_value("n", 10**30),
    "subgroups no list": with_value("subgroups", {"site": 17}),
    "subgroups of text": with_value("subgroups", {"site": ["UAB"]}),
    "an interval of text": with_value("ci95.balanced_accuracy", ["low", "high"]),
    "an interval of three": with_value("ci95.balanced_accuracy", [0.1, 0.2, 0.3]),
    "no interval": with_value("ci95", {}),
    "a matrix of 3": with_value("confusion_matrix", [[1, 2, 3]] * 3),
    "a ragged matrix": with_value("confusion_matrix", [[1, 2, 3, 4]] * 3 + [[1]]),
    "half a floor": with_value("floors", {"random encoder": {"balanced_accuracy": 0.3}}),
    "floors null": with_value("floors", None),
    "an alarm of a megabyte": with_value("alarms", ["x" * 10**6]),
    "alarms no list": with_value("alarms", "all is well"),
    "an alarm that is a number": with_value("alarms", [17]),
    "half a character": with_value("run", "\ud800"),
    "no seal": lambda folder: write(folder, read(folder) | {"content_sha256": None}, seal=False),
    "no table": lambda folder: os.remove(f"{folder}/predictions_test.csv"),
    "no rows": with_table(lambda text: text.splitlines(True)[0]),
    "a participant twice": with_table(lambda text: text + text.splitlines(True)[1]),
    "a column twice": with_table(lambda text: text.replace(b"p3", b"p2", 1)),
    "an id of a megabyte": with_table(lambda text: text.replace(b"1001,", b"x" * 10**6 + b",")),
    "a long probability": with_table(lambda text: text + b"1,1," + b"9" * 10**5 + b",0,0,0"),
    "a pipe": lambda folder: (
        os.remove(f"{folder}/eval_test.json"),
        os.mkfifo(f"{folder}/eval_test.json"),
    ),
    "a folder": lambda folder: (
        os.remove(f"{folder}/eval_test.json"),
        os.mkdir(f"{folder}/eval_test.json"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_leaderboard_goes_on_without_a_damaged_run(runs_abc, damage):
    damage(runs_abc / "b")
    said = leaderboard.leaderboard(paths_of(runs_abc), "test")
    board = board_of(runs_abc)
    assert board["b"]["place"] == "not ranked" and board["b"]["balanced accuracy"] == "-"
    assert f"{runs_abc}/b" in board["b"]["note"] and "; run eval.py --ckpt" in board["b"]["note"]
    assert len(board["b"]["note"]) < 1000 and "\n" not in board["b"]["note"]
    note = f"b: not ranked: {board['b']['note']}"
    assert note in said.replace("\\", "")  # without Markdown's own
    assert note in content(runs_abc / "leaderboard.md").replace("\\", "")
    assert note in html.unescape(content(runs_abc / "leaderboard.html"))
    for name in "ac":
        _, y, p = read_predictions(f"{runs_abc}/{name}/predictions_test.csv")
        assert board[name]["balanced accuracy"] == f"{balanced_accuracy_score(y, p.argmax(1)):.3f}"
        assert "b (" not in board[name]["place"]
    with pytest.raises((ValueError, OSError), match="/b"):
        compare.compare(paths_of(runs_abc), "test")


def test_a_leaderboard_of_damaged_runs_alone_says_what_is_wrong(runs_abc):
    for name in NAMES:
        write_bytes(runs_abc / name / "eval_test.json", b"[]")
    message = "none of 3 runs can be ranked: .*a/eval_test.json is damaged"
    with pytest.raises(ValueError, match=message):
        leaderboard.leaderboard(paths_of(runs_abc), "test")


# ---------------------------------------------------------------------------------- random damage


def damaged(data, other, chance):
    """Bytes after one of six kinds of damage. other: the same file of another run."""
    data, size = bytearray(data), len(data)
    at, length = chance.randrange(size), chance.choice([1, 2, 8, 64, 1024])
    kind = chance.randrange(6)
    if kind == 0:  # flipped bits
        for _ in range(chance.choice([1, 3, 30])):
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif kind == 1:  # cut
        del data[at:]
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:  # a piece twice
        data[at:at] = data[at : at + length]
    elif kind == 4:  # spliced
        data[at:] = other[at:]
    else:
        data[at : at + length] = chance.randbytes(length)
    return bytes(data)


VALUES = (
    None,
    True,
    -1,
    0,
    0.999,
    10**30,
    10**400,
    -1e308,
    float("nan"),
    "",
    "0.999",
    [],
    {},
    [[]],
)


def with_damaged_values(value, chance, count):
    """JSON after so many deleted keys and other values, anywhere."""
    for _ in range(count):
        parent = value
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            key = chance.choice(keys)
            if not isinstance(parent[key], dict | list) or not parent[key] or chance.random() < 0.3:
                break
            parent = parent[key]
        if chance.random() < 0.3:
            del parent[key]
        elif isinstance(parent[key], float) and chance.random() < 0.5:
            parent[key] += chance.choice([1e-6, -0.01, 0.2])
        else:
            parent[key] = chance.choice(VALUES)
        if not value:
            break
    return value


def damage_a_run(folder, other, chance):
    """One of four kinds of damage to the results in folder."""
    result, table = f"{folder}/eval_test.json", f"{folder}/predictions_test.csv"
    kind = chance.choice(["bytes", "values", "values, sealed", "table, sealed"])
    if kind == "bytes":
        path = chance.choice([result, table])
        same_file = read_bytes(os.path.join(other, os.path.basename(path)))
        write_bytes(path, damaged(read_bytes(path), same_file, chance))
    elif kind == "table, sealed":
        change = lambda text: damaged(text, read_bytes(f"{other}/predictions_test.csv"), chance)
        with_table(change)(folder)
    else:
        changed = with_damaged_values(read(folder), chance, chance.choice([1, 1, 3]))
        write(folder, changed, seal=kind != "values")
    return kind


def one_sentence(call, *args):
    """What the call gives, within ten seconds; None where it is refused in a sentence."""
    since = time.monotonic()
    try:
        found = call(*args)
    except (ValueError, OSError) as error:
        assert len(str(error)) < 2000 and "\n" not in str(error), str(error)[:3000]
        found = None
    assert time.monotonic() - since < 10
    return found


SHOWN = "balanced accuracy", "95 % interval", "chance band", "log-loss", "participants"


@pytest.mark.slow
def test_random_damage_never_changes_a_score_that_is_believed(three, tmp_path, capsys):
    """300 times: whatever befell a run, the leaderboard shows the right scores of the others, and
    of this one the right scores or none."""
    folder, counts = shutil.copytree(three, tmp_path / "runs"), {"right": 0, "refused": 0}
    leaderboard.leaderboard(paths_of(folder), "test")
    expected = board_of(folder)
    for seed in range(300):
        chance = random.Random(seed)
        shutil.rmtree(folder / "b")
        shutil.copytree(three / "b", folder / "b")
        kind = damage_a_run(folder / "b", folder / "c", chance)
        assert one_sentence(leaderboard.leaderboard, paths_of(folder), "test")
        board = board_of(folder)
        was_refused = board["b"]["place"] == "not ranked"
        for name in "ac" if was_refused else NAMES:
            wrong = [column for column in SHOWN if board[name][column] != expected[name][column]]
            assert not wrong, (seed, kind, name, wrong)
        pair = one_sentence(compare.compare, [folder / "a", folder / "b"], "test")
        assert (pair is None) == (board["b"]["place"] in ("not ranked", "not compared")), seed
        counts["refused" if was_refused else "right"] += 1
    with capsys.disabled():
        print(f"\n300 damaged runs: {counts}")


@pytest.mark.slow
def test_random_damage_of_what_eval_reads_is_one_sentence(written, tmp_path, capsys):
    """400 times: ledger, history, provenance, configuration and the other split's result."""
    whole = copy_of(trained(written, "train.epochs=3"), tmp_path)
    for split in ("val", "test"):
        evaluate(whole, split)
    folder, other = tmp_path / "damaged", trained(written) / "run"
    shutil.copytree(whole, folder)
    book = ledger.read(runs.open_checkpoint(whole).cfg)
    result = results.read_result(whole, "test")
    opened = runs.open_checkpoint(whole)
    opened.path = str(folder / runs.BEST)
    calls = {
        "ledger.csv": [lambda: evaluation.update_ledger(folder / "ledger.csv", book, "test")],
        "metrics.jsonl": [lambda: report.draw_course(folder, result)],
        "provenance.json": [],
        "config.yaml": [lambda: runs.check_config(opened)],
        "eval_val.json": [],
    }
    for seed in range(400):
        chance, name = random.Random(seed), list(calls)[seed % len(calls)]
        data = read_bytes(f"{whole}/{name}")
        same_file = read_bytes(other / name) if (other / name).exists() else data
        changed = damaged(data, same_file, chance)
        if name.endswith("json") and chance.random() < 0.5:
            value = with_damaged_values(json.loads(data), chance, 1)
            value = results.sealed(value) if name == "eval_val.json" else value
            changed = json.dumps(value).encode()
        write_bytes(folder / name, changed)
        for call in [*calls[name], lambda: report.write_report(folder)]:
            one_sentence(call)
        write_bytes(folder / name, data)
