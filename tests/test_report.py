import csv
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers import CLASS_NAMES, FLOOR, answers, content, copy_of, quick, trained, write_results
from PIL import Image

import compare
import eval as evaluation
import leaderboard
import ledger
import report
import train
import versus


@pytest.fixture(scope="module")
def reported(written, tmp_path_factory):
    """{split: result} of a run, its folder, and the page with all about it."""
    run = copy_of(trained(written, "train.epochs=3"), tmp_path_factory.mktemp("reported"))
    results = {split: evaluation.evaluate_run(run, split)[0] for split in ("val", "test")}
    return results, run, content(f"{run}/report.html")


@pytest.fixture()
def text(reported):
    """The page without its tags."""
    return html.unescape(re.sub("<[^>]*>", " ", reported[2]))


SPLITS = pytest.mark.parametrize("split", ["val", "test"])


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
    assert page.count("data:image/png;base64,") == 8
    assert "http" not in page.replace("http-equiv", "")


def test_a_picture_shows_dollar_signs_as_they_are():
    """In titles, legends, labels of ticks and of axes: matplotlib would read mathematics there, and
    refuse some of it."""
    import matplotlib
    from matplotlib.text import Text

    name, (figure, axis) = "cls_$A_$B^", report.new_figure(3, 2)
    axis.plot([0, 1], [0, 1], label=name)
    axis.set(title=name, xlabel=name)
    axis.set_yticks([0, 1], [name, "cls_$\\frac$"])
    axis.legend(title=name)
    assert report.png(figure).startswith(b"\x89PNG")
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

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)
# a page in a frame of some width, which tells in its title: its own width and that of the frame,
# the number of elements that stick out, of tables that must be scrolled, of pictures that are shown
# and have a text, of pictures
FRAME = """<body style="margin:0">
<iframe id=f style="border:0;width:WIDTHpx;height:9000px" srcdoc="PAGE"></iframe><script>
onload = () => { const d = f.contentDocument, root = d.documentElement
    d.querySelectorAll("details").forEach(e => e.open = true)
    const out = [...d.body.querySelectorAll("*")].filter(
        e => e.getBoundingClientRect().right > root.clientWidth + 1
            && !e.closest(".wide:not(.cards)"))
    const scrolls = [...d.querySelectorAll(".wide")].filter(e => e.scrollWidth > e.clientWidth + 1)
    document.title = JSON.stringify([root.scrollWidth, root.clientWidth, out.length, scrolls.length,
        [...d.images].filter(i => i.alt && i.naturalWidth).length, d.images.length]) }</script>"""


def seen(page, width, folder):
    """The page in a headless browser, `width` wide -> what FRAME tells, and a picture (rows,
    columns)."""
    framed, picture = folder / f"{width}.html", folder / f"{width}.png"
    srcdoc = html.escape(page.read_text())
    framed.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", srcdoc))
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    browser += [f"--user-data-dir={folder}/chromium", f"--window-size={width},9000"]

    def look(option):
        script = [*browser, option, f"file://{framed}"]
        return subprocess.run(script, capture_output=True, text=True, timeout=120, check=True)

    title = re.search("<title>(.*?)</title>", look("--dump-dom").stdout)[1]
    look(f"--screenshot={picture}")
    return json.loads(html.unescape(title)), np.asarray(Image.open(picture).convert("L"))


@pytest.fixture(scope="module")
def pages(written, tmp_path_factory):
    """{name: (path of a page, number of its pictures)}."""
    folder = tmp_path_factory.mktemp("pages")
    more = ["eval.floors=true", "train.seeds=[1,2]", "train.epochs=3"]
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
    report_page, board_page = folder / "run/report.html", folder / "board/leaderboard.html"
    pages = {"report": (report_page, 8), "leaderboard": (board_page, 2)}
    for name, number, pictures in (("pair", 2, 3), ("comparison", 3, 4)):
        page = versus.write(compare.open_runs(board[:number], "test"))
        pages[name] = shutil.copy(page, folder / f"{name}.html"), pictures
    return pages


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280], ids=["a phone", "a desk"])
@pytest.mark.parametrize("name", ["report", "leaderboard", "pair", "comparison"])
def test_pages_fit_a_phone_and_a_desk(pages, tmp_path, name, width):
    assert CHROMIUM, "this test looks at the pages in chromium: apt-get install chromium"
    page, pictures = pages[name]
    (own, shown, out, scrolls, told, images), picture = seen(page, width, tmp_path)
    assert own <= shown and not out and not scrolls, (own, shown, out, scrolls)
    assert told == images == pictures  # all shown, each with its text
    assert picture.shape[1] == width
    ink, paper = (picture[:1500] < 128).mean(), (picture[:1500] > 200).mean()
    assert ink > 0.01 and paper > 0.5


@pytest.mark.browser
@pytest.mark.parametrize("name", ["report", "leaderboard", "pair", "comparison"])
def test_pages_open_offline(pages, name):
    text = pages[name][0].read_text()
    assert not re.search(r"(src|href)=.?(http|//|file)", text) and "<script" not in text
