import csv
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import (
    FLOOR,
    LABELS_159,
    ROOT,
    answers,
    copy_of,
    edit,
    evaluate,
    quick,
    read_bytes,
    read_predictions,
    trained,
    write_bytes,
    write_results,
)
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score

import compare
import leaderboard
import metrics
import results
import runs
import train


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ---------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A good run and a bad one that have the same participants in another order: the answers
    (159, 4) of both, and what is said of bad and good."""
    folder = tmp_path_factory.mktemp("two")
    good, bad = answers(0.7, 0), answers(0.2, 1)
    order = np.random.default_rng(2).permutation(len(LABELS_159))
    ids = [str(1000 + i) for i in order]
    write_results(folder / "bad", bad)
    write_results(folder / "good", good[order], LABELS_159[order], ids)
    return good, bad, compare.compare([folder / "bad", folder / "good"], "test")


def test_two_runs_and_the_sentence(two):
    good, bad, said = two
    scores = [balanced_accuracy_score(LABELS_159, p.argmax(axis=1)) for p in (good, bad)]
    assert (
        f"good is better than bad: balanced accuracy {scores[0]:.3f} against {scores[1]:.3f}, "
        f"difference {scores[0] - scores[1]:.3f}"
    ) in said
    assert "the same 159 participants" in said


def test_two_runs_and_mcnemars_test(two):
    good, bad, said = two
    right = [p.argmax(axis=1) == LABELS_159 for p in (good, bad)]
    only = (right[1] & ~right[0]).sum(), (right[0] & ~right[1]).sum()
    p = binomtest(only[0], sum(only)).pvalue
    assert f"{only[0]} right only by bad, {only[1]} only by good, p = {p:.4f}" in said


def test_equal_runs_are_not_told_apart_and_three_are_corrected_by_holm(tmp_path, command):
    skills = (("a", 0.4, 0), ("b", 0.4, 1), ("c", 0.8, 2))
    folders = [write_results(tmp_path / name, answers(*skill)) for name, *skill in skills]
    job = command("eval.py", "--compare", *folders)
    assert job.returncode == 0 and job.stdout.count("by Holm over 3 pairs") == 3
    assert re.search("no difference between [ab] and [ab] is shown", job.stdout)
    assert "c is better than a" in job.stdout and "c is better than b" in job.stdout


@pytest.fixture(scope="module")
def a_and_b(tmp_path_factory):
    """A folder with two runs that can be compared; to be copied."""
    folder = tmp_path_factory.mktemp("a_and_b")
    for n, name in enumerate("ab"):
        write_results(folder / name, answers(0.5, n))
    return folder


def test_what_belongs_together_is_compared(a_and_b, command):
    assert command("eval.py", "--compare", a_and_b / "a", a_and_b / "b").returncode == 0


def edit_result(change):
    """Change what eval_test.json holds, and its hash with it."""

    def apply(folder):
        result = json.loads(read_bytes(f"{folder}/eval_test.json"))
        change(result)
        write_bytes(f"{folder}/eval_test.json", json.dumps(results.sealed(result)).encode())

    return apply


def edit_table(change):
    """Change the table of predictions, and its hash with it."""

    def apply(folder):
        edit(f"{folder}/predictions_test.csv", change)
        table = hashlib.sha256(read_bytes(f"{folder}/predictions_test.csv")).hexdigest()
        edit_result(lambda result: result.update(predictions_sha256=table))(folder)

    return apply


def score_again(change):
    """Change participants, classes and probabilities, and score them as eval.py would."""

    def apply(folder):
        ids, y, p = change(*read_predictions(f"{folder}/predictions_test.csv"))
        shutil.rmtree(folder)
        write_results(folder, p, y, ids)

    return apply


def another_class(ids, y, p):
    y[ids.index("1005")] = 1
    return ids, y, p


def edit_file(name, old, new):
    return lambda folder: edit(f"{folder}/{name}", lambda text: text.replace(old, new))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            score_again(lambda ids, y, p: ([i.replace("1005", "9005") for i in ids], y, p)),
            r"a and b cannot be compared on test, for they have other participants: "
            r"1 only in a \(1005\); 1 only in b \(9005\)",
        ),
        (
            score_again(lambda ids, y, p: (ids[:-1], y[:-1], p[:-1])),
            r"other participants: 1 only in a \(1158\)",
        ),
        (
            score_again(another_class),
            "other labels: participant 1005 is of class 0 in a and 1 in b",
        ),
        (
            edit_result(lambda result: result.update(labels_sha256="1" * 64)),
            "other labels: the table of a .sha256 000000000000. is not that of b",
        ),
        (
            edit_result(lambda result: result.update(split="val")),
            "b/eval_test.json is about split val; run eval.py --ckpt .*b --split test",
        ),
        (
            edit_file("predictions_test.csv", "1005,0,", "1005,1,"),
            "b/predictions_test.csv is not what .*b/eval_test.json was computed from; run eval.py",
        ),
        (
            lambda folder: write_bytes(f"{folder}/{runs.BEST}", b"another"),
            f"b/{runs.BEST} is not the checkpoint that .*b/eval_test.json is about; run eval.py",
        ),
        (
            lambda folder: write_bytes(f"{folder}/eval_test.json", b'{"split": "te'),
            r"b/eval_test.json is damaged \(.*\); run eval.py --ckpt .*b --split test",
        ),
        (
            lambda folder: write_bytes(f"{folder}/eval_test.json", b"[]"),
            r"b/eval_test.json is damaged \(it holds no JSON object\); run eval.py --ckpt .*b",
        ),
        (
            edit_result(lambda result: result.pop("chance_band")),
            "b/eval_test.json has no chance_band that can be used; run eval.py --ckpt .*b",
        ),
        (
            edit_table(lambda text: re.sub("^(1005,0),[^,]*", r"\1,nan", text, flags=re.M)),
            r"b/predictions_test.csv: participant 1005 has no class and probabilities that can be",
        ),
        (
            edit_table(lambda text: text.replace("1005,0,", "1005,4,")),
            r"b/predictions_test.csv: participant 1005 has no class and .*; run eval.py",
        ),
        (
            edit_table(lambda text: text.replace("1005,0,", "1005,,")),
            "b/predictions_test.csv: participant 1005 has no class and .*; run eval.py",
        ),
        (
            edit_table(lambda text: text + text.splitlines(True)[1]),
            "b/predictions_test.csv: participant 1000 is there twice; run eval.py",
        ),
        (
            edit_table(lambda text: text.replace("p3", "p4", 1)),
            "b/predictions_test.csv has no column p3; run eval.py",
        ),
        (
            edit_file("eval_test.json", '"n": 159', '"n": 1590'),
            "b/eval_test.json was edited, .*: it is not what its own content_sha256 says; run eval",
        ),
        (
            lambda folder: os.remove(f"{folder}/eval_test.json"),
            "b has no eval_test.json; run eval.py --ckpt .*b --split test",
        ),
    ],
    ids=[
        "another participant",
        "one less",
        "another label",
        "another table of labels",
        "another split",
        "an edited table",
        "another checkpoint",
        "half a file",
        "another file",
        "a result that lacks a key",
        "no probability",
        "no class",
        "an empty label",
        "a participant twice",
        "no column",
        "an edited result",
        "no file",
    ],
)
def test_what_does_not_belong_together_is_refused(a_and_b, tmp_path, command, change, message):
    copy = shutil.copytree(a_and_b, tmp_path / "copy")
    change(copy / "b")
    job = command("eval.py", "--compare", copy / "a", copy / "b")
    assert job.returncode == 1 and not job.stdout
    assert re.search(message, job.stderr), job.stderr


@pytest.mark.parametrize("others", [[], ["b/../a"]], ids=["one", "the same one twice"])
def test_a_comparison_needs_two_runs(a_and_b, command, others):
    job = command("eval.py", "--compare", a_and_b / "a", *(a_and_b / other for other in others))
    assert "--compare needs two or more different run folders" in job.stderr


@pytest.mark.parametrize("what", ["--leaderboard", "--compare"])
def test_neither_takes_settings(a_and_b, command, what):
    job = command("eval.py", what, a_and_b / "a", "data.max_missing=1")
    assert job.returncode == 1 and "data.max_missing=1" in job.stderr and not job.stdout


def test_other_volumes_of_the_same_participants_are_noted(tmp_path, command):
    a = write_results(tmp_path / "a", answers(0.5, 0))
    b = write_results(tmp_path / "b", answers(0.5, 1), volumes_asked="zeiss_cirrus, Macula")
    assert (
        "note: these runs saw other volumes of the same participants: topcon_triton, Macula; "
        "zeiss_cirrus, Macula"
    ) in command("eval.py", "--compare", a, b).stdout


@pytest.fixture(scope="module")
def real(written, tmp_path_factory):
    """The folders of two runs that were trained and scored on both splits."""
    folders, parent = [], tmp_path_factory.mktemp("real")
    for name, more in (("context", []), ("target", ["model.encoder=target"])):
        run = copy_of(trained(written, "train.epochs=2", *more), parent)
        for split in ("val", "test"):
            evaluate(run, split)
        folders.append(os.path.join(parent, name))
        os.rename(run, folders[-1])
    return folders


def test_real_runs_are_compared_on_either_split(real, command):
    for split in ("val", "test"):
        job = command("eval.py", "--compare", *real, "--split", split)
        assert job.returncode == 0, job.stderr
        assert f"{split}, 6 participants, SYNTHETIC data" in job.stdout


def test_a_run_that_was_trained_again_must_be_scored_again(real, written, tmp_path, command):
    """What was evaluated is of a checkpoint that is there no longer."""
    again, other = shutil.copytree(real[0], tmp_path / "again"), real[1]
    assert command("eval.py", "--compare", again, other).returncode == 0
    train.main(0, quick(written, tmp_path, "train.epochs=2", f"paths.run_dir={again}"))
    job = command("eval.py", "--compare", again, other)
    assert job.returncode == 1
    assert "again has no eval_test.json; run eval.py --ckpt" in job.stderr


# ------------------------------------------------------------------------------------ leaderboard

SKILLS = {"worse": (0.1, 0), "good": (0.7, 1), "as_good": (0.69, 1)}


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """The leaderboard of three runs that can be compared, one that cannot and one that was not
    scored: the folder, the rows of its table, what is said."""
    folder = tmp_path_factory.mktemp("board")
    for name, skill in SKILLS.items():
        write_results(folder / name, answers(*skill))
    collapse = "model collapse: class insulin never predicted"
    edit_result(lambda result: result["alarms"].append(collapse))(folder / "worse")
    floors = {"random encoder": FLOOR}
    edit_result(lambda result: result.update(floors=floors))(folder / "good")
    write_results(folder / "elsewhere", answers(0.9, 4)[:100], LABELS_159[:100])
    (folder / "untested").mkdir()
    (folder / "notes.txt").write_text("")
    said = leaderboard.leaderboard(sorted(folder.iterdir()), "test")
    *rows, untested = rows_of(folder / "leaderboard.csv")
    assert (untested["run"], untested["place"]) == ("untested", "not ranked")
    return folder, rows, said


def test_the_leaderboard_ranks(board):
    rows = board[1]
    scores = [float(row["balanced accuracy"]) for row in rows[:-1]]
    assert scores == sorted(scores, reverse=True) and len(rows) == 4


def test_the_leaderboard_does_not_compare_what_it_cannot(board):
    _, rows, said = board
    *others, last = rows
    assert (last["run"], last["place"], last["p (Holm)"]) == ("elsewhere", "not compared", "-")
    # though its score is the highest
    assert all(float(r["balanced accuracy"]) < float(last["balanced accuracy"]) for r in others)
    message = "elsewhere: not compared, for it has other participants: 59 only in (as_)?good"
    assert re.search(message, said)


def test_the_leaderboard_marks_ties(board):
    places = {row["run"]: row["place"] for row in board[1][:-1]}
    assert places == {"good": "tied for best", "as_good": "tied for best", "worse": "worse"}


def test_the_leaderboard_gives_the_p_values_of_all_pairs(board):
    rows = {row["run"]: row for row in board[1][:-1]}
    best, tied, _ = rows
    found = metrics.compare_all(LABELS_159, {name: answers(*SKILLS[name]) for name in rows})
    p_of = {(pair["a"], pair["b"]): pair["p_holm"] for pair in found}
    for name in (tied, "worse"):
        assert rows[name]["p (Holm)"] == f"{p_of[best, name]:.4f}"


def test_the_leaderboard_has_floors_and_encoders(board):
    rows = {row["run"]: row for row in board[1]}
    assert rows["good"]["random encoder"] == "0.310" and rows["worse"]["random encoder"] == "-"
    assert rows["good"]["encoder"] == "abcdefabcdef"
    assert rows["good"]["majority class, random answers"] == "0.250, 0.250"


def test_the_leaderboard_says_what_there_is_to_know(board):
    folder, rows, said = board
    text, page = (folder / "leaderboard.md").read_text(), (folder / "leaderboard.html").read_text()
    best, tied = rows[0], rows[1]["run"]
    for part in (
        f"{best['run']} leads with balanced accuracy {best['balanced accuracy']} on test, "
        f"but is not shown to be better than {tied}.",
        "worse: ALARM: model collapse: class insulin never predicted",
        f"untested: not ranked: {folder / 'untested'} has no eval_test.json; run eval.py --ckpt",
    ):
        assert part in text and part in said and html.escape(part) in page


# an undecodable byte, as in a name that was written on another system
ODD = ["cls_$A_$B", "<i>&amp;", "a|b", "測試 ü", "x`y", "cls_\udce9"]


@pytest.mark.filterwarnings("ignore:Glyph")  # the picture's font has no Chinese
@pytest.mark.slow
def test_odd_names_of_runs_are_ranked_and_shown_as_they_are(tmp_path, command):
    for n, name in enumerate(ODD):
        write_results(tmp_path / name, answers(0.5, n))
    job = command("eval.py", "--leaderboard", *sorted(tmp_path.iterdir()))
    assert job.returncode == 0, job.stderr
    shown = [*ODD[:-1], r"cls_\udce9"]
    assert sorted(row["run"] for row in rows_of(tmp_path / "leaderboard.csv")) == sorted(shown)
    page, text = ((tmp_path / f"leaderboard.{end}").read_text() for end in ("html", "md"))
    assert all(html.escape(name) in page for name in shown) and "<i>" not in page
    table = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(columns) == 1 and len(table) == len(ODD) + 2
    assert all(name.replace("|", r"\|") in "".join(table) for name in shown)
    pair = command("eval.py", "--compare", *sorted(tmp_path.glob("*/")))
    assert pair.returncode == 0 and all(name in pair.stdout for name in shown)


def test_a_run_that_is_named_twice_is_ranked_once(a_and_b, tmp_path):
    copy = shutil.copytree(a_and_b, tmp_path / "copy")
    os.symlink("a", copy / "linked")
    (copy / "of_links").mkdir()
    for name in ("eval_test.json", "predictions_test.csv"):
        os.symlink(f"../a/{name}", copy / "of_links" / name)
    names = ("a", "b", "a/", "b/../a", "linked", "of_links")
    leaderboard.leaderboard([f"{copy}/{name}" for name in names], "test")
    assert sorted(row["run"] for row in rows_of(copy / "leaderboard.csv")) == ["a", "b"]


def test_a_run_is_not_compared_with_a_link_to_itself(a_and_b, tmp_path):
    copy = shutil.copytree(a_and_b, tmp_path / "copy")
    os.symlink("a", copy / "linked")
    with pytest.raises(ValueError, match="--compare needs two or more different run folders"):
        compare.compare([f"{copy}/a", f"{copy}/linked"], "test")


@pytest.fixture()
def alike(a_and_b, tmp_path):
    """alike("name", ...) -> folder of copies of one run with these names."""

    def make(*names):
        for name in names:
            shutil.copytree(a_and_b / "a", tmp_path / "alike" / name)
        return tmp_path / "alike"

    return make


def test_a_verdict_names_the_first_few(alike):
    folder = alike(*(f"run_{n:02d}" for n in range(12)))
    said = leaderboard.leaderboard(sorted(folder.iterdir()), "test")
    others = "run_01, run_02, run_03 and 8 more"
    assert f"is not shown to be better than {others}.\n" in said
    assert len(rows_of(folder / "leaderboard.csv")) == 12


HOSTILE = ["\x1b[31mred\x1b[0m", "two\nlines", "=1+1", "@sum(1)", "- list", "\u202ereversed"]


def test_hostile_names_and_ids_give_no_orders(alike, command):
    """Escapes to the terminal, formulas to a spreadsheet, markup to Markdown."""
    folder = alike(*HOSTILE)
    ids = "=1+1", "\x1b[2Jgone"
    rescored = score_again(lambda i, y, p: ([*ids, *i[2:]], y, p))
    rescored(folder / HOSTILE[0])
    shown = [ascii(name)[1:-1] for name in HOSTILE]
    for what in ("--compare", "--leaderboard"):
        job = command("eval.py", what, *sorted(folder.glob("*/")))
        assert "\x1b" not in job.stdout + job.stderr and "\u202e" not in job.stdout
    assert not [line for line in job.stdout.splitlines() if line.startswith(("lines", "=", "- l"))]
    with open(folder / "leaderboard.csv", newline="") as f:
        cells = [cell for row in csv.reader(f) for cell in row]
    assert not [cell for cell in cells if len(cell) > 1 and cell[0] in "=+-@"]
    assert "'=1+1" in cells and "'@sum(1)" in cells
    names = [row["run"].removeprefix("'") for row in rows_of(folder / "leaderboard.csv")]
    assert sorted(names) == sorted(name.removeprefix("'") for name in shown)
    everything = (folder / "leaderboard.md").read_text() + (folder / "leaderboard.csv").read_text()
    assert "\x1b" not in everything and "\u202e" not in everything
    with open(folder / HOSTILE[0] / "predictions_test.csv", newline="") as f:
        assert [row["participant_id"] for row in csv.DictReader(f)][:2] == ["'=1+1", ids[1]]
    run = results.open_results("a", folder / HOSTILE[0], "test")
    assert list(run.label_of)[:2] == list(ids)  # read back as they were


@pytest.mark.parametrize("language", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C"}])
def test_no_letter_that_the_terminal_lacks_ends_a_command(alike, language):
    folder = alike("測試 ü", "b")
    environment = os.environ | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"} | language
    script = [sys.executable, "eval.py", "--compare", *sorted(folder.iterdir())]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"no difference between b and \\u" in done.stdout and done.stdout.isascii()


def test_a_leaderboard_of_nothing_is_refused(tmp_path, command):
    (tmp_path / "untested").mkdir()
    assert command("eval.py", "--leaderboard", tmp_path / "untested").returncode == 1


def test_the_leaderboard_says_that_one_is_better_than_all(tmp_path, command):
    skills = enumerate((("a", 0.2), ("b", 0.9), ("c", 0.3)))
    folders = [write_results(tmp_path / name, answers(skill, n)) for n, (name, skill) in skills]
    job = command("eval.py", "--leaderboard", *folders)
    assert re.search(
        r"b is the best of 3 runs: balanced accuracy 0\.\d+ on test, better than every other "
        r"\(p at most 0\.000\d, Holm over 3 pairs\)\.",
        job.stdout,
    ), job.stdout
    assert rows_of(tmp_path / "leaderboard.csv")[0]["place"] == "best"


def test_the_leaderboard_of_a_single_run(tmp_path, command):
    folder = write_results(tmp_path / "a", answers(0.5, 0))
    job = command("eval.py", "--leaderboard", folder)
    assert job.returncode == 0
    assert "there is no other run to compare it with" in job.stdout
