"""eval.py --compare and --leaderboard, and the pages that it writes, seen by a browser."""

import csv
import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score

import b2
import data
import eval as evaluation
import metrics
import train
from conftest import edit

Y = np.repeat(range(4), (40, 40, 41, 38))


def answers(skill, seed):
    """Probabilities (159, 4) of a run that is right about so often."""
    rng = np.random.default_rng(seed)
    said = np.where(rng.random(len(Y)) < skill, Y, rng.integers(0, 4, len(Y)))
    return 0.6 * np.eye(4)[said] + 0.1


def write_run(folder, p, y=Y, ids=None, **changes):
    """A run folder as eval.py leaves it, of these predictions."""
    ids = [str(1000 + i) for i in range(len(y))] if ids is None else ids
    table = evaluation.predictions_csv(ids, np.array(y), p)
    result = {"split": "test", "run": "a run", "epoch": 1, "volumes": len(y), "data": "SYNTHETIC data", "scanner": "topcon_triton",
              "anatomic_region": "Macula", "encoder_sha256": "abcdef" * 10, "labels_sha256": "0" * 64, "unreadable": [],
              **metrics.evaluate(y, p, 4, ids), **changes}
    os.makedirs(folder)
    with open(f"{folder}/predictions_test.csv", "w", newline="") as f:
        f.write(table)
    result["predictions_sha256"] = b2.sha256(f"{folder}/predictions_test.csv")
    with open(f"{folder}/eval_test.json", "w") as f:
        json.dump(result, f)
    return folder


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ---------------------------------------------------------------------------------------------------------------- compare


def test_two_runs_and_the_sentence(tmp_path, command):
    good, bad = answers(0.7, 0), answers(0.2, 1)
    order = np.random.default_rng(2).permutation(len(Y))  # the same participants in another order
    write_run(tmp_path / "bad", bad)
    write_run(tmp_path / "good", good[order], Y[order], [str(1000 + i) for i in order])
    job = command("eval.py", "--compare", tmp_path / "bad", tmp_path / "good")
    assert job.returncode == 0, job.stderr
    right = [p.argmax(axis=1) == Y for p in (good, bad)]
    scores = [balanced_accuracy_score(Y, p.argmax(axis=1)) for p in (good, bad)]
    assert (f"good is better than bad: balanced accuracy {scores[0]:.3f} against {scores[1]:.3f}, "
            f"difference {scores[0] - scores[1]:.3f}") in job.stdout
    only = (right[1] & ~right[0]).sum(), (right[0] & ~right[1]).sum()
    assert f"{only[0]} right only by bad, {only[1]} only by good, p = {binomtest(only[0], sum(only)).pvalue:.4f}" in job.stdout
    assert "the same 159 participants" in job.stdout


def test_equal_runs_are_not_told_apart_and_three_are_corrected_by_holm(tmp_path, command):
    runs = [write_run(tmp_path / name, answers(skill, seed)) for name, skill, seed in (("a", 0.4, 0), ("b", 0.4, 1), ("c", 0.8, 2))]
    job = command("eval.py", "--compare", *runs)
    assert job.returncode == 0 and job.stdout.count("by Holm over 3 pairs") == 3
    assert (re.search("no difference between [ab] and [ab] is shown", job.stdout)
            and "c is better than a" in job.stdout and "c is better than b" in job.stdout)


def relabel(folder, change):
    """Change the table of predictions, and its hash with it."""
    edit(f"{folder}/predictions_test.csv", change)
    with open(f"{folder}/eval_test.json") as f:
        result = json.load(f)
    result["predictions_sha256"] = b2.sha256(f"{folder}/predictions_test.csv")
    with open(f"{folder}/eval_test.json", "w") as f:
        json.dump(result, f)


@pytest.mark.parametrize("change, message", [
    (lambda f: relabel(f, lambda t: t.replace("1005,0,", "9005,0,")),
     r"a and b cannot be compared on test, for they have other participants: 1 only in a \(1005\); 1 only in b \(9005\)"),
    (lambda f: relabel(f, lambda t: re.sub("1158,3.*\n", "", t)), r"other participants: 1 only in a \(1158\)"),
    (lambda f: relabel(f, lambda t: t.replace("1005,0,", "1005,1,")), "other labels: participant 1005 is of class 0 in a and 1 in b"),
    (lambda f: edit(f"{f}/eval_test.json", lambda t: t.replace("0" * 64, "1" * 64)),
     "other labels: participants.tsv of a .sha256 000000000000. is not that of b"),
    (lambda f: edit(f"{f}/eval_test.json", lambda t: t.replace('"split": "test"', '"split": "val"')),
     "b/eval_test.json is about split val; run eval.py --ckpt .*b --split test"),
    (lambda f: edit(f"{f}/predictions_test.csv", lambda t: t.replace("1005,0,", "1005,1,")),
     "b/predictions_test.csv is not what .*b/eval_test.json was computed from; run eval.py"),
    (lambda f: (f / evaluation.BEST).write_bytes(b"another"),
     f"b/{evaluation.BEST} is not the checkpoint that .*b/eval_test.json is about; run eval.py"),
    (lambda f: (f / "eval_test.json").write_text('{"split": "te'),
     r"b/eval_test.json is damaged \(.*\); run eval.py --ckpt .*b --split test"),
    (lambda f: os.remove(f / "eval_test.json"), "b has no eval_test.json; run eval.py --ckpt .*b --split test"),
])
def test_what_does_not_belong_together_is_refused(tmp_path, command, change, message):
    a, b = (write_run(tmp_path / name, answers(0.5, seed)) for seed, name in enumerate("ab"))
    assert command("eval.py", "--compare", a, b).returncode == 0
    change(b)
    job = command("eval.py", "--compare", a, b)
    assert job.returncode == 1 and re.search(message, job.stderr) and not job.stdout, job.stderr


def test_a_comparison_needs_two_runs_and_takes_no_settings(tmp_path, command):
    a = write_run(tmp_path / "a", answers(0.5, 0))
    for runs in ([a], [a, tmp_path / "b" / ".." / "a"]):
        assert "--compare needs two or more different run folders" in command("eval.py", "--compare", *runs).stderr
    for what in ("--leaderboard", "--compare"):
        job = command("eval.py", what, a, "data.max_missing=1")
        assert job.returncode == 1 and "data.max_missing=1" in job.stderr and not job.stdout


def test_other_volumes_of_the_same_participants_are_noted(tmp_path, command):
    a, b = write_run(tmp_path / "a", answers(0.5, 0)), write_run(tmp_path / "b", answers(0.5, 1), scanner="zeiss_cirrus")
    assert ("note: these runs saw other volumes of the same participants: topcon_triton, Macula; zeiss_cirrus, Macula"
            in command("eval.py", "--compare", a, b).stdout)


def test_real_runs_are_compared_on_either_split(written, configure, command):
    cfgs = [configure(written, "train.epochs=2"), configure(written, "train.epochs=2", "model.encoder=target")]
    for n, cfg in enumerate(cfgs):
        cfg.paths.run_dir += str(n)
        train.main(0, cfg)
        for split in ("val", "test"):
            evaluation.evaluate_run(cfg.paths.run_dir, split)
    for split in ("val", "test"):
        job = command("eval.py", "--compare", *(cfg.paths.run_dir for cfg in cfgs), "--split", split)
        assert job.returncode == 0 and f"{split}, 6 participants, SYNTHETIC data" in job.stdout, job.stderr
    train.main(0, cfgs[0])  # trained again: what was evaluated is of a checkpoint that is there no longer
    job = command("eval.py", "--compare", *(cfg.paths.run_dir for cfg in cfgs))
    assert job.returncode == 1 and "run0 has no eval_test.json; run eval.py --ckpt" in job.stderr


# ------------------------------------------------------------------------------------------------------------ leaderboard


def test_the_leaderboard_ranks_marks_ties_and_names_what_it_lacks(tmp_path, command):
    write_run(tmp_path / "worse", answers(0.1, 0), alarms=["model collapse: class 3 never predicted"])
    write_run(tmp_path / "good", answers(0.7, 1), floors={"random encoder": {"balanced_accuracy": 0.31}})
    write_run(tmp_path / "as_good", answers(0.69, 1))
    write_run(tmp_path / "elsewhere", answers(0.9, 4)[:100], Y[:100])
    (tmp_path / "untested").mkdir()
    (tmp_path / "notes.txt").write_text("")
    job = command("eval.py", "--leaderboard", *sorted(tmp_path.iterdir()))
    assert job.returncode == 0, job.stderr
    rows = rows_of(tmp_path / "leaderboard.csv")
    # though its score is the highest
    assert rows[-1]["run"] == "elsewhere" and rows[-1]["place"] == "not compared" and rows[-1]["p (Holm)"] == "-"
    assert re.search("elsewhere: not compared, for it has other participants: 59 only in (as_)?good", job.stdout)
    scores = [float(row["balanced accuracy"]) for row in rows[:-1]]
    assert scores == sorted(scores, reverse=True) and scores[0] < float(rows[-1]["balanced accuracy"])
    rows = {row["run"]: row for row in rows[:-1]}
    assert {name: row["place"] for name, row in rows.items()} == {"good": "tied for best", "as_good": "tied for best", "worse": "worse"}
    best, tied, _ = rows
    pairs = {(pair["a"], pair["b"]): pair for pair in metrics.compare_all(
        Y, {name: answers(*{"good": (0.7, 1), "as_good": (0.69, 1), "worse": (0.1, 0)}[name]) for name in rows})}
    for name in (tied, "worse"):
        assert rows[name]["p (Holm)"] == f"{pairs[best, name]['p_holm']:.4f}"
    assert (rows["good"]["random encoder"] == "0.310" and rows["worse"]["random encoder"] == "-"
            and rows["good"]["encoder"] == "abcdefabcdef" and rows["good"]["majority class, random answers"] == "0.250, 0.250")
    text, page = (tmp_path / "leaderboard.md").read_text(), (tmp_path / "leaderboard.html").read_text()
    for part in ((f"{best} leads with balanced accuracy {rows[best]['balanced accuracy']} on test, "
                  f"but is not shown to be better than {tied}."),
                 "worse: ALARM: model collapse: class 3 never predicted", f"not scored on test: {tmp_path / 'untested'}"):
        assert part in text and part in job.stdout and html.escape(part) in page
    assert command("eval.py", "--leaderboard", tmp_path / "untested").returncode == 1


def test_the_leaderboard_says_that_one_is_better_than_all(tmp_path, command):
    runs = [write_run(tmp_path / name, answers(skill, seed)) for seed, (name, skill) in enumerate((("a", 0.2), ("b", 0.9), ("c", 0.3)))]
    job = command("eval.py", "--leaderboard", *runs)
    assert re.search(r"b is the best of 3 runs: balanced accuracy 0\.\d+ on test, "
                     r"better than every other \(p at most 0\.000\d, Holm over 3 pairs\)\.", job.stdout), job.stdout
    assert rows_of(tmp_path / "leaderboard.csv")[0]["place"] == "best"
    job = command("eval.py", "--leaderboard", runs[0])
    assert job.returncode == 0 and "there is no other run to compare it with" in job.stdout


# ------------------------------------------------------------------------------------------------------------------ pages


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def seen(page, width, folder):
    """The page in a headless browser, `width` wide -> (its own width, elements that stick out, picture as an array (rows, columns))."""
    wrapped = folder / f"{width}.html"
    wrapped.write_text(f'''<body style="margin:0">
        <iframe id=f style="border:0;width:{width}px;height:9000px" srcdoc="{html.escape(page.read_text())}"></iframe><script>
        onload = () => {{ const d = f.contentDocument, root = d.documentElement
            const out = [...d.body.querySelectorAll("*")].filter(
                e => e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest(".wide:not(.cards)"))
            const scrolls = [...d.querySelectorAll(".wide")].filter(e => e.scrollWidth > e.clientWidth + 1)
            document.title = JSON.stringify([root.scrollWidth, root.clientWidth, out.length, scrolls.length,
                [...d.images].filter(i => i.alt && i.naturalWidth).length, d.images.length]) }}</script>''')
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={folder}/chromium", f"--window-size={width},9000"]
    dom = subprocess.run([*browser, "--dump-dom", f"file://{wrapped}"], capture_output=True, text=True, timeout=120).stdout
    subprocess.run([*browser, f"--screenshot={folder}/{width}.png", f"file://{wrapped}"], capture_output=True, timeout=120, check=True)
    return (json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1])),
            np.asarray(Image.open(f"{folder}/{width}.png").convert("L")))


@pytest.mark.browser
def test_pages_fit_a_phone_and_a_desk(written, configure, tmp_path, command):
    assert CHROMIUM, "this test looks at the pages in chromium: apt-get install chromium"
    cfg = configure(written, "eval.floors=true", "train.seeds=[1,2]", "train.epochs=3")
    train.main(0, cfg)
    for split in ("val", "test"):
        evaluation.evaluate_run(cfg.paths.run_dir, split)
    for seed, skill in enumerate((0.3, 0.35, 0.8)):
        write_run(tmp_path / "board" / f"a_run_with_a_rather_long_name_{seed}", answers(skill, seed),
                  floors={name: {"balanced_accuracy": 0.3} for name in ("random encoder", "shuffled labels")})
    assert command("eval.py", "--leaderboard", *(tmp_path / "board").iterdir()).returncode == 0
    for page, pictures in ((tmp_path / "run" / "report.html", 8), (tmp_path / "board" / "leaderboard.html", 1)):
        for width in (390, 1280):
            (own, shown, out, scrolls, told, images), picture = seen(page, width, tmp_path)
            assert own <= shown and not out and not scrolls, (page, width, own, shown, out, scrolls)
            assert told == images == pictures  # all shown, each with its text
            assert (picture.shape[1] == width
                    and (picture[:1500] < 128).mean() > 0.01 and (picture[:1500] > 200).mean() > 0.5)  # ink on paper
        text = page.read_text()
        assert not re.search(r"(src|href)=.?(http|//|file)", text) and "<script" not in text  # opens offline


def test_the_report_holds_what_there_is_to_know(written, configure, tmp_path):
    cfg = configure(written, "train.epochs=3")
    train.main(0, cfg)
    results = {split: evaluation.evaluate_run(cfg.paths.run_dir, split)[0] for split in ("val", "test")}
    page = (tmp_path / "run" / "report.html").read_text()
    text = html.unescape(re.sub("<[^>]*>", " ", page))
    for result in results.values():
        assert evaluation.sentence(result) in text and all(f"ALARM: {alarm}" in text for alarm in result["alarms"])
        for name, label in evaluation.SCORE_NAMES.items():
            assert re.search(rf"{re.escape(label)} +{result[name]:.3f}", text)
        assert all(f"{name} {group['group']}" in text for name, groups in result["subgroups"].items() for group in groups)
        assert (result["checkpoint_sha256"] in text and result["predictions_sha256"] in text
                and f"Temperature {result['temperature']:.3f}" in text)
    with open(tmp_path / "run" / "provenance.json") as f:
        made = json.load(f)
    assert made["manifest_sha256"] in text and made["encoder_sha256"] in text and made["command"] in text
    rows = rows_of(tmp_path / "run" / "ledger.csv")
    used = [[sum(row["split"] == split and row["status"] == "used" and row["label"] == str(k) for row in rows)
             for split in data.SPLITS] for k in range(4)]
    for name, numbers in zip([*data.CLASS_NAMES, "all"], [*used, np.sum(used, axis=0)]):
        assert re.search(rf"{name} +" + " +".join(f"{n}/{n}" for n in numbers), text)
