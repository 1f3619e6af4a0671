import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from browser import CHROMIUM, seen
from helpers import (
    CLASS_NAMES,
    FLOOR,
    ROOT,
    answers,
    content,
    copy_of,
    every_kind,
    quick,
    trained,
    write_results,
)

import compare
import eval as evaluation
import figures
import files
import leaderboard
import ledger
import report
import train
import versus
from config import load


@pytest.fixture(scope="module")
def reported(written, tmp_path_factory):
    """{split: result} of a run, its folder, and the page with all about it."""
    run = copy_of(trained(written, "train.epochs=3"), tmp_path_factory.mktemp("reported"))
    results = {"val": evaluation.evaluate_run(run, "val")[0]}
    with every_kind():
        results["test"], _ = evaluation.evaluate_run(run, "test")
    return results, run, content(f"{run}/report.html")


@pytest.fixture()
def text(reported):
    """The page without its tags."""
    return html.unescape(re.sub("<[^>]*>", " ", reported[2]))


SPLITS = pytest.mark.parametrize("split", ["val", "test"])


def test_a_pipe_among_the_figures_is_an_error_and_is_not_waited_for(tmp_path):
    (tmp_path / "plots").mkdir()
    os.mkfifo(tmp_path / "plots/roc_test.svg")
    found = f"import pathlib, report; report.pictures_of(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", found], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert "roc_test.svg is not a file; remove it" in done.stderr


@SPLITS
def test_the_report_says_the_result_in_a_sentence_and_its_alarms(reported, text, split):
    result = reported[0][split]
    assert report.sentence(result) in text
    assert all(f"ALARM: {alarm}" in text for alarm in result["alarms"])


@SPLITS
def test_the_report_has_every_score(reported, text, split):
    for name, label in report.SCORE_NAMES.items():
        assert re.search(rf"{re.escape(label)} +{reported[0][split][name]:.3f}", text)


@SPLITS
def test_the_report_has_every_group(reported, text, split):
    for name, groups in reported[0][split]["subgroups"].items():
        assert groups and all(f"{name} {group['group']}" in text for group in groups)


@SPLITS
def test_the_report_has_hashes_and_temperature(reported, text, split):
    result = reported[0][split]
    assert result["checkpoint_sha256"] in text and result["predictions_sha256"] in text
    assert f"Temperature {result['temperature']:.3f}" in text


def test_the_report_says_where_the_run_comes_from(reported, text):
    made = json.loads(content(f"{reported[1]}/provenance.json"))
    assert all(made[name] in text for name in ("manifest_sha256", "encoder_sha256", "command"))


def test_the_report_counts_participants_by_split_and_class(reported, text):
    with open(f"{reported[1]}/ledger.csv", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["status"] == "used"]
    used = [
        [sum(r["split"] == split and r["label"] == str(k) for r in rows) for split in ledger.SPLITS]
        for k in range(4)
    ]
    numbers_of = dict(zip([*CLASS_NAMES, "all"], [*used, np.sum(used, axis=0)]))
    for name, numbers in numbers_of.items():
        assert re.search(rf"{name} +" + " +".join(f"{n}/{n}" for n in numbers), text)


def test_the_report_says_that_data_are_synthetic(reported):
    assert "SYNTHETIC" in reported[2]


def test_the_report_holds_its_pictures_and_needs_no_network(reported):
    page = reported[2]
    # four of test, three of val, the map of the features, and two of the training
    assert page.count("data:image/svg+xml;base64,") == 10
    links = re.findall(r"""(?:src|href)=["']?([^"'> ]*)""", page)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in page and "url(" not in page


def test_every_alarm_links_to_a_section_that_is_there(reported):
    results, _, page = reported
    sections = set(re.findall('id="([^"]+)"', page))
    links = re.findall('class="alarm"><a href="#([^"]+)">', page)
    assert len(links) == sum(len(result["alarms"]) for result in results.values()) > 0
    assert set(links) <= sections


@pytest.mark.parametrize(
    "alarm, section",
    [
        ("model collapse: class insulin never predicted", "classes-test"),
        ("class a is given 40% of the probability, where 25% are asked for: ...", "classes-test"),
        (
            "accuracy 0.2500 is not above 0.2600, the share of the most frequent class",
            "classes-test",
        ),
        ("site UW carries the result: balanced accuracy 0.9", "groups-test"),
        ("not shown to be better than age alone: balanced accuracy 0.5", "compared-test"),
        ("balanced accuracy 0.300 is not above the chance band within site", "compared-test"),
        ("balanced accuracy 0.300 is not above the chance band 0.1 to 0.4", "scores-test"),
        ("balanced accuracy on training is 0.100, below chance", "training"),
        ("balanced accuracy is 0.9 on training's participants, each left out", "training"),
        ("3 participants of test were trained on: 1, 2, 3", "participants"),
        ("2 labelled participants of test have no volume and are not scored", "participants"),
    ],
)
def test_an_alarm_is_shown_in_the_section_that_it_is_about(alarm, section):
    assert report.shown_in(alarm, "test") == section


def test_figures_are_saved_for_the_web_for_papers_and_as_text(reported):
    """Fonts stay text: SVG has text elements, PDF embeds TrueType fonts (42), not outlines (3)."""
    plots = Path(reported[1]) / "plots"
    names = {path.stem for path in plots.iterdir() if not path.stem.endswith("_val")}
    assert {"summary_test", "confusion_test", "roc_test", "training", "shares"} <= names
    for name in names:
        assert (plots / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = ElementTree.parse(plots / f"{name}.svg")
        texts = ["".join(e.itertext()) for e in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert len(texts) > 5
        pdf = (plots / f"{name}.pdf").read_bytes()
        assert b"/TrueType" in pdf or b"/CIDFontType2" in pdf
        assert b"/Type3" not in pdf


def test_the_same_result_gives_the_same_figure(reported):
    results, run, _ = reported
    figure = lambda: figures.picture(figures.draw_summary(results["test"], {}), "svg")
    assert figure() == figure()


def test_the_figure_of_the_whole_result_has_all_that_it_is_seen_beside(reported):
    result = reported[0]["test"] | {"floors": {"random encoder": FLOOR}}
    result["within"] = {"groups": "site", "band": [0.2, 0.5]}
    other = result | {"run": "another"}
    svg = figures.picture(figures.draw_summary(result, {"cls_$A_$B<&": other}), "svg").decode()
    texts = ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter()]
    for text in (result["run"], "cls_$A_$B<&", "probe on random encoder", "one class for all"):
        assert text in texts
    for text in ("chance band", "chance band within site"):
        assert text in texts
    assert any("alone" in text for text in texts) == ("covariates" in result)


def test_lines_and_points_differ_without_colour():
    """On a grey printer: no two curves have the same dashes, no two points the same shape; and the
    first four colours differ in lightness (CIE L*) by at least 8."""
    assert len(set(map(str, figures.DASHES))) == len(figures.DASHES) == len(figures.COLOURS)
    assert len(set(figures.MARKERS)) == len(figures.MARKERS)


def test_open_shows_the_report_in_the_users_browser(reported, tmp_path, command, monkeypatch):
    """BROWSER is what Python's webbrowser starts."""
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    run = copy_of(Path(reported[1]).parent, tmp_path)
    call = ["eval.py", "--ckpt", run, "--split", "test", "--open"]
    monkeypatch.setenv("BROWSER", str(browser))
    done = command(*call)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "opened").strip() == Path(run, "report.html").as_uri()
    monkeypatch.setattr("webbrowser.open", lambda address: False)  # where there is none
    done = command(*call)
    assert done.returncode == 1 and "set BROWSER, or open" in done.stderr
    assert command("eval.py", "--compare", run, run, "--open").returncode != 0


def test_a_picture_shows_dollar_signs_as_they_are():
    """In titles, legends, labels of ticks and of axes: matplotlib would read mathematics there, and
    refuse some of it."""
    import matplotlib
    from matplotlib.text import Text

    name, (figure, axis) = "cls_$A_$B^", figures.new_figure(3, 2)
    axis.plot([0, 1], [0, 1], label=name)
    axis.set(title=name, xlabel=name)
    axis.set_yticks([0, 1], [name, "cls_$\\frac$"])
    axis.legend(title=name)
    assert figures.picture(figure, "png").startswith(b"\x89PNG")
    texts = figure.findobj(Text)
    assert sum(text.get_text() == name for text in texts) >= 5
    assert not any(text.get_parse_math() for text in texts)
    assert matplotlib.rcParams["text.parse_math"]  # pictures of others may hold mathematics


@pytest.mark.parametrize(
    "text, prose, cell",
    [
        ("cls_plain-1.0", "cls_plain-1.0", "cls_plain-1.0"),
        ("cls_$A_$B", r"cls_\$A_\$B", "`cls_$A_$B`"),
        ("<b>", r"\<b>", "`<b>`"),
        ("a|b", r"a\|b", r"`a\|b`"),
        ("`a``b", r"\`a\`\`b", "``` `a``b ```"),
        ("a&amp;b", r"a\&amp;b", "`a&amp;b`"),
        ("# a", r"\# a", "# a"),
        ("- a", r"\- a", "- a"),
        ("~~a~~", r"\~\~a\~\~", "`~~a~~`"),
    ],
)
def test_markdown_shows_a_name_as_it_is(text, prose, cell):
    assert (report.markdown(text), report.markdown_cell(text)) == (prose, cell)


# ------------------------------------------------------------------------------ seen by a browser

HOSTILE = "<script>document.title='gone'</script> $a_$b \"quoted\" 'one' \u202egnp.exe &amp; ü"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run whose name, classes, sites and participants are HOSTILE, of given features."""
    folder = tmp_path_factory.mktemp("hostile")
    rng, rows, x = np.random.default_rng(0), [["who", "label", "set", "site", "file"]], []
    for i in range(48):
        k, split = i % 3, ("train", "val", "test")[i // 3 % 3]
        rows.append([f"{HOSTILE} {i}", f"{HOSTILE}{k}", split, f"{HOSTILE} {i % 2}", f"{i}.npy"])
        x.append(rng.normal(size=8) + 3 * np.eye(8)[k])
    files.write(folder / "labels.csv", files.csv_text(rows))
    found = {"participant": [row[0] for row in rows[1:]], "file": [row[4] for row in rows[1:]]}
    arrays = {"filepath": found["file"], "participant": found["participant"]}
    np.savez_compressed(folder / "features.npz", x=np.float32(x), **arrays)
    columns = {"participant": "who", "label": "label", "split": "set", "site": "site"}
    columns |= {"file": "file", "eye": None, "age": None, "has_oct": None, "sex": None}
    config = {
        "base": f"{ROOT}/configs/base.yaml",
        "paths": {
            "data": str(folder),
            "features": str(folder / "features.npz"),
            "checkpoint_path": None,
            "cache_dir": str(folder / "cache"),
        },
        "data": {
            "labels": "labels.csv",
            "participants": None,
            "manifest": None,
            "columns": columns,
            "classes": {f"{HOSTILE}{k}": f"{HOSTILE}{k}" for k in range(3)},
            "task": HOSTILE,
        },
        "model": {"emb_dim": None},
        "train": {"epochs": 2, "warmup_epochs": 0},
        "device": {"backend": "cpu"},
        "log": {"wandb": "disabled", "run_name": HOSTILE},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    run = folder / "run"  # named here, or the task's name would become a part of it
    cfg = load([str(folder / "config.yaml")], [f"paths.run_dir={run}"])
    train.main(0, cfg)
    evaluation.evaluate_run(run, "test")
    return run


def test_hostile_texts_are_shown_as_text(hostile):
    page = content(hostile / "report.html")
    assert "document.title" in page and "<script>document" not in page
    assert page.count("<script") == 1  # our own
    assert html.escape(HOSTILE[:10]) in page
    assert "\u202e" not in page and "\\u202egnp.exe" in page  # it would turn what follows
    svg = content(hostile / "plots" / "confusion_test.svg")
    texts = ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter()]
    assert any(text.startswith("<script>") for text in texts)


@pytest.fixture(scope="module")
def pages(written, tmp_path_factory, hostile):
    """{name: path of a page}."""
    folder = tmp_path_factory.mktemp("pages")
    more = ["eval.floors=true", "train.seeds=[1,2]", "train.epochs=3", "eval.gallery=6"]
    cfg = quick(written, folder, *more)
    train.main(0, cfg)
    for split in ("val", "test"):
        evaluation.evaluate_run(cfg.paths.run_dir, split)
    floors = dict.fromkeys(("random encoder", "shuffled labels"), FLOOR)
    for seed, skill in enumerate((0.3, 0.35, 0.8)):
        name = f"a_run_with_a_rather_long_name_{seed}"
        write_results(folder / "board" / name, answers(skill, seed), floors=floors)
    board = sorted((folder / "board").iterdir())
    leaderboard.leaderboard(board, "test")
    found = {
        "report": folder / "run/report.html",
        "hostile": hostile / "report.html",
        "leaderboard": folder / "board/leaderboard.html",
    }
    for name, number in (("pair", 2), ("comparison", 3)):
        page = versus.write(compare.open_runs(board[:number], "test"))
        found[name] = shutil.copy(page, folder / f"{name}.html")
    assert "data:image/webp" in content(found["report"])
    return found


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280], ids=["a phone", "a desk"])
@pytest.mark.parametrize("name", ["report", "hostile", "leaderboard", "pair", "comparison"])
def test_pages_fit_a_phone_and_a_desk_and_can_be_read_by_everybody(
    pages, tmp_path, name, width, dark
):
    look = seen(pages[name], width, tmp_path, dark)
    # names of classes of sixty letters do not fit a phone: these tables may scroll
    assert look.problems(may_scroll=name == "hostile") == []
    assert look.images > 0 and look.pixels.shape[1] == width
    background = np.median(look.pixels[:1500])
    assert background < 60 if dark else background > 200


@pytest.mark.browser
def test_the_look_at_a_page_finds_what_is_wrong(tmp_path):
    """Each fault alone, so that a check that cannot fail would be seen."""
    page = lambda body: (
        f'<!doctype html><html lang="en"><head><title>t</title></head><body><main>'
        f"<h1>Words that are black on white</h1>{body}</main></body></html>"
    )
    faults = {
        '<p style="width:2000px;background:#ccc">wide</p>': "sticks out",
        '<p style="color:#bbb;background:#fff">hard to read</p>': "color-contrast",
        "<script>console.error('broken')</script>": "broken",
        "<script>nothing.at.all()</script>": "nothing is not defined",
        '<img src="data:image/png;base64,AAAA" alt="damaged">': "an image is not shown",
        '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">': "image-alt",
    }
    path = tmp_path / "page.html"
    for body, problem in faults.items():
        path.write_text(page(body))
        assert any(problem in text for text in seen(path, 390, tmp_path).problems()), body
    path.write_text(page("<p>nothing is wrong</p>"))
    assert seen(path, 390, tmp_path).problems() == []
    path.write_text("<!doctype html><html><head></head><body></body></html>")
    assert "blank" in seen(path, 390, tmp_path).problems()


@pytest.mark.browser
def test_a_link_to_a_section_that_is_folded_opens_it(pages, tmp_path):
    """As an alarm's link does, without a server: the page is opened at #provenance."""
    link = f"file://{pages['report']}#provenance"
    script = [CHROMIUM, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}/chromium"]
    dump = lambda address: (
        subprocess.run(
            [*script, "--dump-dom", address],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
    )
    is_open = r'<details open="">\s*<summary><h2>Provenance'
    assert re.search(is_open, dump(link))
    assert not re.search(is_open, dump(link.partition("#")[0]))


def test_the_report_is_small_and_quickly_made(reported, tmp_path):
    """Its eight figures, in three kinds each, and the page: at most the time of 25 plain figures,
    for how long a figure takes depends on the machine (docs/performance.md has seconds)."""
    results, run, page = reported
    assert len(page.encode()) < 1_500_000
    y, p = np.array([0, 1, 2, 3] * 10), np.full((40, 4), 0.25)

    def plain():
        figure, axis = figures.new_figure(4, 3)
        axis.plot([0, 1], [0, 1], label="a curve")
        axis.legend()
        figures.save(tmp_path, "plain", figure)

    def written():
        report.write_plots(run, results["test"], y, p, {})
        report.write_report(run)

    def seconds(work):
        begun = time.process_time()
        work()
        return time.process_time() - begun

    with every_kind():
        plain(), written()  # what is imported at the first time
        unit = min(seconds(plain) for _ in range(3))
        assert seconds(written) < 25 * unit
