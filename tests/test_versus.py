"""The page of a comparison, the figures of many runs, and the groups that no test tells apart."""

import html
import itertools
import os
import re
import shutil

import numpy as np
import pytest
from helpers import CLASS_NAMES, LABELS_159, answers, every_kind, read_bytes, write_results
from PIL import Image
from sklearn.metrics import accuracy_score, cohen_kappa_score

import agreement
import compare
import files
import forest
import leaderboard
import results
import versus

SKILLS = {"good": (0.78, 1), "same": (0.8, 0), "middle": (0.55, 2), "poor": (0.3, 3)}
ANSWERS = {name: answers(*skill) for name, skill in SKILLS.items()}
IDS = [str(1000 + i) for i in range(len(LABELS_159))]
FIGURES = {"scores", "differences", "agreement", "ranking"}


def text_of(page):
    """A page, or a part of it, without its tags."""
    return html.unescape(re.sub("<[^>]*>", " ", page))


def rows_of(page, caption):
    """The rows of the table with this caption, as lists of texts, the header first."""
    [table] = re.findall(rf'aria-label="{re.escape(caption)}"><table>(.*?)</table>', page, re.S)
    cells = [re.findall(r"<t[hd] [^>]*>(.*?)</t[hd]>", row) for row in table.split("</tr>")]
    return [[html.unescape(cell) for cell in row] for row in cells if row]


def alts(page):
    return [html.unescape(alt) for alt in re.findall('<img alt="([^"]*)"', page)]


def written_in(svg):
    """The texts of an SVG."""
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The folder of four runs, what --compare says of them, and the page."""
    folder = tmp_path_factory.mktemp("many")
    for name, p in ANSWERS.items():
        write_results(folder / name, p)
    found = compare.open_runs([folder / name for name in sorted(ANSWERS)], "test")
    with every_kind():
        assert versus.write(found) == str(folder / "comparison.html")
    return folder, compare.in_words(found), (folder / "comparison.html").read_text()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same of two runs."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("good", "poor"):
        write_results(folder / name, ANSWERS[name])
    found = compare.open_runs([folder / "poor", folder / "good"], "test")
    versus.write(found)
    return folder, compare.in_words(found), (folder / "comparison.html").read_text()


# ------------------------------------------------------------------------------ what --compare says

SENTENCE = re.compile(
    r"(?:no difference between (\w+) and (\w+) is shown|(\w+) is better than (\w+)): "
    r".*?difference (\S+) \(95 % interval (\S+ to \S+)\), p = (\S+?),? (?:(\S+) by Holm)?"
)


def test_the_command_prints_the_comparison_and_names_the_page(many, command):
    folder, said, page = many
    with every_kind():
        job = command("eval.py", "--compare", *(folder / name for name in sorted(ANSWERS)))
    assert job.stdout == f"{said}\nwritten: {folder}/comparison.html\n", job.stderr
    assert (folder / "comparison.html").read_text() == page


def test_what_is_written_beside_runs_is_no_run(many, tmp_path):
    """`--compare runs/*` after `make check` and `make preview`."""
    folder, said, _ = many
    runs = [str(folder / name) for name in sorted(ANSWERS)]
    for name in ("cls_a_check.html", "cls_a_flow.png", "preview_a.png", "comparison.html"):
        (tmp_path / name).touch()
        runs.insert(1, str(tmp_path / name))
    assert compare.compare(runs, "test") == said
    (tmp_path / "notes.html").touch()
    with pytest.raises(FileNotFoundError, match="notes.html has no eval_test.json"):
        compare.compare([*runs, str(tmp_path / "notes.html")], "test")


def test_figures_tables_and_alt_texts_have_the_numbers_that_are_printed(many):
    folder, said, page = many
    svg = written_in((folder / "comparison/differences.svg").read_text())
    table = {(row[0], row[1]): row[2:] for row in rows_of(page, "every pair")[1:]}
    [alt] = [alt for alt in alts(page) if alt.startswith("Differences")]
    printed = SENTENCE.findall(said)
    assert len(printed) == len(table) == 6
    for a, b, better, worse, difference, interval, p, p_holm in printed:
        higher, lower = (a or better), (b or worse)
        assert table[higher, lower][:4] == [difference, interval, p, p_holm]
        assert f"{difference} ({interval})" in svg and f"p (Holm) {p_holm}" in svg
        assert f"{higher} minus {lower} {difference} ({interval}), p (Holm) {p_holm}" in alt
        assert (float(p_holm) < 0.05) == bool(better)


def test_the_forest_of_scores_has_the_numbers_that_are_printed(many):
    folder, said, page = many
    svg = written_in((folder / "comparison/scores.svg").read_text())
    [alt] = [alt for alt in alts(page) if alt.startswith("Balanced accuracy of each")]
    for name in ANSWERS:
        score, interval, band = re.search(
            rf"^{name} +(\S+)  +(\S+ to \S+)  +(\S+ to \S+)", said, re.M
        ).groups()
        assert name in svg and f"{score} ({interval})" in svg
        assert f"{name} {score} ({interval}), chance {band}" in alt
    assert [row[0] for row in rows_of(page, "scores")[1:]] == ["good", "same", "middle", "poor"]


def test_two_runs_are_summed_up_by_their_sentence(pair):
    _, said, page = pair
    sentence = next(line for line in said.splitlines() if line.startswith("good is better"))
    assert f"<p><b>{sentence}</b></p>" in page and "McNemar&#39;s test of accuracy" in page
    assert "ranking" not in {name.stem for name in (pair[0] / "comparison").iterdir()}


def test_alarms_notes_and_powers_are_on_the_page(tmp_path):
    a = write_results(tmp_path / "a", answers(0.5, 0), alarms=["an alarm"])
    b = write_results(tmp_path / "b", answers(0.5, 1), volumes_asked="zeiss_cirrus, Macula")
    found = compare.open_runs([a, b], "test", with_power=True)
    page = text_of(read_bytes(versus.write(found)).decode())
    assert "ALARM: a: an alarm" in page and "these runs saw other volumes" in page
    assert found.powers[0].strip() in page and found.powers[0] in compare.in_words(found)


def test_validation_has_no_interval(tmp_path):
    for name in ("good", "poor"):
        folder = write_results(tmp_path / name, ANSWERS[name], split="val")
        for ending in ("eval_{}.json", "predictions_{}.csv"):
            os.rename(folder / ending.format("test"), folder / ending.format("val"))
    found = compare.open_runs([tmp_path / "good", tmp_path / "poor"], "val")
    page = read_bytes(versus.write(found)).decode()
    assert "Head and epoch were chosen on this split" in page
    for name in ("scores", "differences"):
        svg = (tmp_path / f"comparison/{name}.svg").read_text()
        assert not [text for text in written_in(svg) if re.search(r"\d to -?\d", text)]
    assert rows_of(page, "every pair")[1][3] == rows_of(page, "scores")[1][2] == "-"
    assert leaderboard.leaderboard([tmp_path / "good", tmp_path / "poor"], "val")
    assert rows_of((tmp_path / "leaderboard.html").read_text(), "every pair")[1][3] == "-"


# ---------------------------------------------------------------------------------------- agreement


def test_the_agreement_is_scikit_learns(many):
    folder, _, page = many
    svg = written_in((folder / "comparison/agreement.svg").read_text())
    [alt] = [alt for alt in alts(page) if alt.startswith("Agreement")]
    table = rows_of(page, "agreement of every pair, in participants")[1:]
    assert len(table) == 6
    said = {name: p.argmax(axis=1) for name, p in ANSWERS.items()}
    for first, second, same, kappa, *counts in table:
        a, b = said[first], said[second]
        share, n = accuracy_score(a, b), len(LABELS_159)
        assert same == f"{accuracy_score(a, b, normalize=False):.0f} ({share:.0%})"
        assert kappa == f"{cohen_kappa_score(a, b):.2f}"
        right = list(zip(a == LABELS_159, b == LABELS_159))
        kinds = [(True, True), (True, False), (False, True), (False, False)]
        assert counts == [str(right.count(kind)) for kind in kinds]
        assert f"κ {kappa}" in svg and f"{share:.0%}" in svg
        both, one = int(counts[0]) / n, (int(counts[1]) + int(counts[2])) / n
        words = f"same answer {share:.0%}, kappa {kappa}, both right {both:.0%}, exactly one right"
        assert re.search(f"({first} and {second}|{second} and {first}): {words} {one:.0%}", alt)


def test_runs_that_know_one_class_have_no_kappa(tmp_path):
    collapsed = np.tile([0.7, 0.1, 0.1, 0.1], (len(LABELS_159), 1))
    for name in "ab":
        write_results(tmp_path / name, collapsed)
    page = read_bytes(versus.write(compare.open_runs([tmp_path / "a", tmp_path / "b"], "test")))
    assert rows_of(page.decode(), "agreement of every pair, in participants")[1][2:4] == [
        "159 (100%)",
        "-",
    ]
    assert "0 of 159 participants." in page.decode()


# ------------------------------------------------------------------------------------------- groups


def pairs_of(names, p_holm):
    return [
        {"a": a, "b": b, "p_holm": p} for (a, b), p in zip(itertools.combinations(names, 2), p_holm)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_those_of_a_slow_search(seed):
    rng, names = np.random.default_rng(seed), list("abcdefg")
    pairs = pairs_of(names, rng.random(21) ** (1 + seed % 4))
    alike = {frozenset((pair["a"], pair["b"])): pair["p_holm"] >= 0.05 for pair in pairs}
    sets = [
        set(group)
        for size in range(2, len(names) + 1)
        for group in itertools.combinations(names, size)
        if all(alike[frozenset(two)] for two in itertools.combinations(group, 2))
    ]
    largest = [group for group in sets if not any(group < other for other in sets)]
    found = agreement.groups(names, pairs)
    assert sorted(found) == sorted(sorted(group) for group in largest)


def test_a_run_between_two_that_differ_is_in_two_groups():
    pairs = pairs_of("abc", [0.5, 0.01, 0.5])
    assert agreement.groups("abc", pairs) == [["a", "b"], ["b", "c"]]
    # and a bar that passes over a run says so
    pairs = pairs_of("abc", [0.01, 0.5, 0.01])
    assert agreement.groups("abc", pairs) == [["a", "c"]]


def test_the_ranking_says_who_is_not_shown_to_differ(many):
    _, said, page = many
    [alt] = [alt for alt in alts(page) if "the best first" in alt]
    ties = re.findall(r"no difference between (\w+) and (\w+) is shown", said)
    assert [set(tie) for tie in ties] == [{"good", "same"}]
    assert alt.endswith("Not shown to differ: good, same.")
    assert re.search(r"good 0\.\d{3}, same 0\.\d{3}, middle 0\.\d{3}, poor 0\.\d{3}", alt)


@pytest.mark.parametrize("order", ["same participants", "other participants"])
def test_methods_are_compared_over_tasks_by_exchanging_all_of_a_participant(tmp_path, order):
    """Against every way of exchanging two methods' answers, of few participants."""
    y, runs = np.repeat(range(4), 3), []
    for task in range(2):
        ids = [f"{i if order == 'same participants' else 100 * task + i}" for i in range(12)]
        rng, found = np.random.default_rng(task), {}
        for method, skill in (("a", 0.9), ("b", 0.2)):
            said = np.where(rng.random(12) < skill, y, (y + 1) % 4)
            folder = tmp_path / f"{method}{task}"
            write_results(folder, 0.6 * np.eye(4)[said] + 0.1, y, ids)
            found[method] = results.open_results(method, folder, "test")
        runs.append(found)
    [pair] = leaderboard.pairs_over_tasks(["a", "b"], runs)
    shares = {}
    for found in runs:
        right = {
            m: {i: p.index(max(p)) == run.label_of[i] for i, p in run.p_of.items()}
            for m, run in found.items()
        }
        for i in right["a"]:
            gain = (right["a"][i] - right["b"][i]) / 3 / 4 / 2
            shares[i] = shares.get(i, 0) + gain
    shares = [share for share in shares.values() if share]
    sums = [np.dot(signs, shares) for signs in itertools.product((-1, 1), repeat=len(shares))]
    expected = np.mean(np.abs(sums) >= abs(sum(shares)) - 1e-9)
    assert 0 < expected < 1 and pair["p_value"] == pytest.approx(expected)


# ------------------------------------------------------------------------------------- participants


def test_the_participants_that_exactly_one_of_two_has_right(pair):
    _, _, page = pair
    header, *rows = rows_of(page, "Participants that exactly one run has right")
    assert header[:3] == ["participant", "true class", "good: answer"]
    right = {name: ANSWERS[name].argmax(axis=1) == LABELS_159 for name in ("good", "poor")}
    one = {i for i, a, b in zip(IDS, right["good"], right["poor"]) if a != b}
    assert f"{len(one)} of 159 participants; the first 50 are shown." in page
    assert len(rows) == 50 < len(one) and {row[0] for row in rows} <= one
    for i, true, *shown in rows:
        n = IDS.index(i)
        assert true == CLASS_NAMES[LABELS_159[n]]
        for name, answer, of_true in zip(("good", "poor"), shown[::2], shown[1::2]):
            p = ANSWERS[name][n]
            word = "right" if right[name][n] else "wrong"
            assert answer == f"{CLASS_NAMES[p.argmax()]} {p.max():.3f}, {word}"
            assert of_true == f"{p[LABELS_159[n]]:.3f}"


def test_the_most_divided_come_first():
    rng = np.random.default_rng(0)
    y, runs = rng.integers(0, 3, 200), {name: rng.dirichlet(np.ones(3), 200) for name in "abcde"}
    rows = agreement.divided(y, runs)
    right = sum((p.argmax(axis=1) == y).astype(int) for p in runs.values())
    spread = np.std([p[np.arange(200), y] for p in runs.values()], axis=0)
    assert set(rows) == {n for n in range(200) if 0 < right[n] < 5}
    keys = [(right[n] * (5 - right[n]), spread[n]) for n in rows]
    assert keys == sorted(keys, reverse=True)


def test_many_runs_are_named_beside_the_participants_that_divide_them(many):
    _, _, page = many
    _, *rows = rows_of(page, "Participants on whom the runs are divided")
    for i, true, count, right, others in rows:
        n = IDS.index(i)
        expected = [name for name, p in ANSWERS.items() if p[n].argmax() == LABELS_159[n]]
        assert right.split(", ") == expected and count == f"{len(expected)} of 4"
        assert true not in others
        assert [said.partition(":")[0] for said in others.split("; ")] == [
            name for name in ANSWERS if name not in expected
        ]
    assert rows[0][2] == "2 of 4"


# -------------------------------------------------------------------------------------------- files


def test_every_figure_is_a_png_an_svg_with_text_and_a_pdf_with_fonts(many):
    folder = many[0] / "comparison"
    names = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg", "pdf")}
    assert {path.name for path in folder.iterdir()} == names
    for name in FIGURES:
        width, _ = Image.open(folder / f"{name}.png").size
        assert width <= 5.2 * 110 + 1
        svg, pdf = (folder / f"{name}.svg").read_text(), read_bytes(folder / f"{name}.pdf")
        assert any("good" in text for text in written_in(svg))
        # TrueType is embedded as it is; outlines would be fonts of type 3
        assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"DejaVuSans" in pdf


def test_the_figures_of_an_earlier_call_do_not_stay(many, tmp_path):
    draw = lambda: forest.draw_scores({"good": results.read_result(many[0] / "good", "test")})
    forest.write(tmp_path, {"scores_1": draw(), "ranking_12": draw()})
    (tmp_path / "mine.png").write_bytes(b"")
    forest.write(tmp_path, {"scores": draw()})
    assert {path.stem for path in tmp_path.iterdir()} == {"scores", "mine"}


def test_what_the_commands_wrote_is_no_run(many, tmp_path, command):
    folder = shutil.copytree(many[0], tmp_path / "runs")
    for what in ("--leaderboard", "--compare", "--leaderboard"):
        job = command("eval.py", what, *sorted(folder.iterdir()))
        assert job.returncode == 0 and "not ranked" not in job.stdout, job.stderr
    assert {"comparison", "leaderboard", "leaderboard.csv"} <= set(os.listdir(folder))
    rows = files.read_csv(folder / "leaderboard.csv")
    assert sorted(row["run"] for row in rows) == sorted(ANSWERS)


def test_a_run_may_be_called_as_these_folders(tmp_path, command):
    folders = tmp_path / "comparison", tmp_path / "leaderboard"
    for folder, p in zip(folders, (ANSWERS["good"], ANSWERS["poor"])):
        write_results(folder, p)
    for what in ("--leaderboard", "--compare", "--leaderboard"):
        job = command("eval.py", what, *folders)
        assert job.returncode == 0, job.stderr
    rows = files.read_csv(tmp_path / "leaderboard.csv")
    assert [row["run"] for row in rows] == ["comparison", "leaderboard"]


def test_an_empty_folder_is_still_named(tmp_path):
    write_results(tmp_path / "a", answers(0.5, 0))
    (tmp_path / "leaderboard").mkdir()
    said = leaderboard.leaderboard([tmp_path / "a", tmp_path / "leaderboard"], "test")
    assert "leaderboard: not ranked: " in said


def test_a_folder_that_cannot_be_written_costs_only_the_page(many, command, monkeypatch):
    def refuse(path, data):
        raise PermissionError(13, "not written: Permission denied", path)

    monkeypatch.setattr(files, "write", refuse)
    job = command("eval.py", "--compare", many[0] / "good", many[0] / "poor")
    assert job.returncode == 1 and "good is better than poor" in job.stdout
    assert "Permission denied" in job.stderr


# ---------------------------------------------------------------------------------------- many, odd


@pytest.mark.slow
def test_of_many_runs_the_figures_show_what_fits(tmp_path):
    names = [f"cls_{'a_very_long_name_' * 3}{n:02d}_{'and_its_end_' * 2}" for n in range(14)]
    for n, name in enumerate(names):
        write_results(tmp_path / name, answers(0.2 + 0.05 * n, n))
    found = compare.open_runs([tmp_path / name for name in names], "test")
    page = read_bytes(versus.write(found)).decode()
    assert len(rows_of(page, "every pair")) == 1 + 91
    assert "The figure has the pairs of the best run alone." in page
    assert "The figure has the 12 best runs." in page
    [differences] = [alt for alt in alts(page) if alt.startswith("Differences")]
    assert differences.count("minus") == 13 == differences.count(found.order[0])
    assert len(set(forest.labels(names))) == 14  # though all are cut alike
    [matrix] = [alt for alt in alts(page) if alt.startswith("Agreement")]
    assert matrix.count("same answer") == 66


HOSTILE = ["<script>alert(1)<", "$a_$b^", "a\"b'c", "\u202ereversed", "a&amp;b", "x\x1b[31m"]


@pytest.mark.parametrize("number", [2, len(HOSTILE)])
def test_hostile_names_and_ids_are_shown_as_text(tmp_path, number):
    ids = ["<script>alert(2)</script>", "$x$", '"><img src=x>', "\u202egnol", *IDS[4:]]
    for n, name in enumerate(HOSTILE[:number]):
        about = {"alarms": ["<script>alert(3)</script>"], "data": "<i>data</i> \u202e"}
        about["classes"] = ["<b>", "$k$", "\u202e", "plain"]
        p = answers(0.3 + 0.1 * n, n)
        p[:4] = np.eye(4)[LABELS_159[:4] if n % 2 else (LABELS_159[:4] + 1) % 4]
        write_results(tmp_path / f"{n}" / name, p, ids=ids, **about)
    found = compare.open_runs(
        [tmp_path / f"{n}" / name for n, name in enumerate(HOSTILE[:number])], "test"
    )
    page = read_bytes(versus.write(found)).decode()
    assert "<script>alert" not in page and "<img src=x" not in page and "<i>" not in page
    assert "\u202e" not in page and "\x1b" not in page
    shown = [ascii(name)[1:-1] if not name.isprintable() else name for name in HOSTILE[:number]]
    cells = [cell for row in rows_of(page, "scores") for cell in row]
    assert set(shown) <= set(cells)
    first = {html.unescape(cell) for cell in re.findall(r'scope="row">([^<]*)<', page)}
    assert {"<script>alert(2)</script>", "$x$", '"><img src=x>', r"\u202egnol"} <= first
    svg = (tmp_path / "0/comparison/scores.svg").read_text()
    assert "<script" not in svg and "\u202e" not in svg
    assert any(text in ("<script>alert(1)<",) for text in written_in(svg))
