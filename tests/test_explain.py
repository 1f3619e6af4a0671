import html
import os
import re

import numpy as np
import pytest
from helpers import ATTENTIVE, TUNE, content, copy_of, quick, tables, trained

import eval as evaluation
import explain
import gallery
import report
import results
import train


@pytest.fixture(scope="module")
def run(written, tmp_path_factory):
    """The folder of a finished run."""
    return copy_of(trained(written, "train.epochs=3"), tmp_path_factory.mktemp("explained"))


def of_split(written, split):
    return [p for p in tables(written)[0] if p["recommended_split"] == split]


def text_of(page):
    return html.unescape(re.sub("<[^>]*>", " ", page))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_explain_writes_a_page_of_a_participant_of_any_split(written, run, command, split):
    person = next(p for p in of_split(written, split) if p["retinal_oct"] == "TRUE")
    own = person["participant_id"]
    done = command("eval.py", "--ckpt", run, "--explain", own)
    assert done.returncode == 0, done.stderr
    path = f"{run}/explain_{own}.html"
    assert os.path.relpath(path) in done.stdout
    page = content(path)
    assert page.count("data:image/webp;base64,") == 2 * 2 * 3 or "Volume 2 of" in page
    text = text_of(page)
    assert f"Participant {own} ({split}" in text and "SYNTHETIC" in text
    assert "images of the eyes of a person" in text


KINDS = {
    "linear": ["train.epochs=3"],
    "attentive": ["train.epochs=3", *ATTENTIVE],
    "fine-tuned, with an MLP": TUNE,
    "kNN": ["model.head.kind=knn"],
    "two seeds, eyes": ["train.epochs=3", "train.seeds=[1,2]", "data.unit=eye"],
}


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_its_probabilities_are_those_of_the_predictions(written, tmp_path, command, overrides):
    run = copy_of(trained(written, *overrides), tmp_path)
    own = of_split(written, "test")[0]["participant_id"]
    assert command("eval.py", "--ckpt", run, "--split", "test").returncode == 0
    assert command("eval.py", "--ckpt", run, "--explain", own, "--split", "test").returncode == 0
    found = results.open_results("a", run, "test")
    p = [p for unit, p in found.p_of.items() if found.participant_of[unit] == own]
    shown = re.findall(r"<span>(0\.\d{3}|1\.000)</span>", content(f"{run}/explain_{own}.html"))
    shown = np.array(shown[: 4 * len(p)], dtype=float).reshape(len(p), 4)
    np.testing.assert_allclose(
        shown, p, atol=2e-3
    )  # an attentive head's tokens are kept in float16


def test_what_the_answer_is_made_of_adds_up(written, run, command):
    own = of_split(written, "test")[0]["participant_id"]
    assert command("eval.py", "--ckpt", run, "--explain", own).returncode == 0
    rows = re.findall(
        r'<th scope="row">.*?</th>((?:<td[^>]*>[+-]?\d+\.\d{3}</td>)+)',
        content(f"{run}/explain_{own}.html"),
    )
    assert len(rows) >= 4
    for row in rows:
        _, logit, *parts = map(float, re.findall(r">([+-]?\d+\.\d{3})<", row))
        assert logit == pytest.approx(sum(parts), abs=2.1e-3)


def error_of(command, run, *args):
    done = command("eval.py", "--ckpt", run, *args)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_an_unknown_participant_is_an_error(run, command):
    assert "participant <b>9 is not in the ledger" in error_of(command, run, "--explain", "<b>9")
    assert not [name for name in os.listdir(run) if "b_9" in name]


def test_a_participant_of_another_split_is_an_error(written, run, command):
    own = of_split(written, "val")[0]["participant_id"]
    line = error_of(command, run, "--explain", own, "--split", "test")
    assert f"participant {own} (val" in line and "not in test" in line


def test_a_participant_without_a_volume_is_an_error(written, run, command):
    own = next(p for p in tables(written)[0] if p["retinal_oct"] == "FALSE")["participant_id"]
    assert f"participant {own} (train" in (line := error_of(command, run, "--explain", own))
    assert "no volume" in line


@pytest.mark.parametrize(
    "args, words",
    [
        (["--compare", "a", "b", "--explain", "1001"], "--explain is about one run"),
        (["--leaderboard", "a", "--no-images"], "--no-images is of --ckpt or --compare"),
        (["--ckpt", "a", "--explain", "1001", "--no-images"], "different jobs"),
        (["--ckpt", "a", "--explain", "1001", "--export", "b.npz"], "different jobs"),
        (["--ckpt", "a", "--explain", ""], "--explain is empty; name a participant"),
        (["--ckpt", "a", "--export", ""], "--export is empty; name a file"),
    ],
)
def test_jobs_that_contradict_each_other_are_an_error(command, args, words):
    done = command("eval.py", *args)
    assert done.returncode == 1 and words in done.stderr


def test_file_names_are_safe_and_differ():
    odd = ["../../etc/passwd", "a/b", "a\\b", "a b", "é", "x" * 300, "<script>", "CON:1", ".."]
    names = [explain.file_name(participant) for participant in odd]
    assert len(set(names)) == len(odd)
    assert all(re.fullmatch(r"explain_[A-Za-z0-9._-]+\.html", name) for name in names)
    assert all(len(name) < 100 for name in names)
    assert explain.file_name("1001") == "explain_1001.html"


def test_a_run_on_given_features_says_that_it_has_no_pictures(written, run, tmp_path, command):
    path, own = tmp_path / "features.npz", of_split(written, "test")[0]["participant_id"]
    done = command("eval.py", "--ckpt", run, "--split", "all", "--export", path)
    assert done.returncode == 0, done.stderr
    given = [f"paths.features={path}", "model.emb_dim=null", "paths.checkpoint_path=null"]
    cfg = quick(written, tmp_path, *given, "eval.gallery=3", "train.epochs=2")
    train.main(0, cfg)
    result, folder = evaluation.evaluate_run(cfg.paths.run_dir, "test")
    cards = gallery.read(folder, result)["cards"]
    assert cards and all(eye["missing"] and not eye["planes"] for c in cards for eye in c["eyes"])
    page = content(f"{folder}/report.html")
    assert "this run reads features" in page and "no image of an eye in it" in page
    assert "there is nothing to draw" in error_of(command, folder, "--explain", own)


def test_texts_of_the_data_are_shown_as_text():
    odd, p = '<script>alert("1")</script> $x$ \u202e', [0.5, 0.5]
    plane = {"name": "B-scan", "is_to_scale": True, "width": 9, "height": 9, "image": ""}
    plane |= {"map": "", "weights": ""}
    volume = {"title": odd, "about": odd, "unit": odd, "answer": 0, "p": p, "planes": [plane]}
    page = report.render(
        "explain.html",
        **dict.fromkeys(("title", "who", "checkpoint", "data"), odd),
        classes=[odd, "b"],
        units=[{"id": odd, "label": 0, "answer": 1, "p": p}],
        unit="eye",
        volumes=[volume | {"table": (["class"], [[odd]])}],
        how="",
    )
    shown = odd.replace("\u202e", r"\u202e")  # a sign that turns the order of others
    assert page.count("<script") == 1 and shown in html.unescape(page)
