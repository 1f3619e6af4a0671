"""check.html: the flow of participants against the tables, read without the project's reader."""

import base64
import csv
import html
import io
import os
import re
from collections import Counter

import numpy as np
import pytest
from browser import seen
from helpers import CLASSES, ROOT, content, edit, every_kind, tables, triton
from PIL import Image

import flow
import ledger

MANIFEST = "retinal_oct/manifest.tsv"
DEMO = ["--config", "configs/demo.yaml"]


def text_of(page):
    """A page without its tags."""
    return html.unescape(re.sub("<[^>]*>", " ", page))


def remove_files(root, people):
    for row in triton(tables(root)[1]):
        if row["participant_id"] in people:
            os.remove(f"{root}{row['filepath']}")


def remove_rows(root, people):
    """From the manifest."""
    kept = lambda line: line.split("\t")[0] not in people
    edit(root / MANIFEST, lambda text: "".join(filter(kept, text.splitlines(True))))


@pytest.fixture()
def damaged(dataset):
    """A data set in which people lack files, or rows, and one site is not asked for -> folder,
    {reason: participants}, those that are used."""
    people, manifest = tables(dataset)
    asked = [p for p in people if p["clinical_site"] != "UAB"]
    with_oct = [p["participant_id"] for p in asked if p["retinal_oct"] == "TRUE"]
    gone, unlisted, other = with_oct[:3], with_oct[3:5], with_oct[5]
    remove_files(dataset, gone)
    remove_rows(dataset, unlisted)
    edit(
        dataset / MANIFEST,
        lambda text: "".join(
            line.replace("Macula, 6 x 6", "Optic Disc") if line.startswith(other) else line
            for line in text.splitlines(True)
        ),
    )
    reasons = {
        "not data.where clinical_site=UW, UCSD": len(people) - len(asked),
        "retinal_oct is FALSE": sum(p["retinal_oct"] == "FALSE" for p in asked),
        "files absent": 3,
        "no row in the manifest": 2,
        "no volume of topcon_triton, Macula, 6 x 6, clinical_site UW or UCSD": 1,
    }
    lost = {*gone, *unlisted, other}
    used = [p for p in asked if p["participant_id"] in set(with_oct) - lost]
    return dataset, reasons, used


WHERE = 'data.where={clinical_site: ["UW", "UCSD"]}'


def test_the_flow_adds_up_to_the_tables(damaged, configure):
    root, reasons, used = damaged
    found = flow.count(ledger.read(configure(root, WHERE)), "participants.tsv")
    assert found.listed == len(tables(root)[0])
    assert found.left_out | found.missing == {why: n for why, n in reasons.items() if n}
    assert set(found.missing) == set(list(reasons)[2:])
    volumes = Counter(row["participant_id"] for row in triton(tables(root)[1]))
    for part in found.splits:
        people = [p for p in used if part.name in ("used", p["recommended_split"])]
        assert part.participants == part.units == len(people)
        assert part.volumes == sum(volumes[p["participant_id"]] for p in people)
        labels = Counter(p["study_group"] for p in people)
        assert list(part.classes.values()) == [labels[name] for name in CLASSES]
    lost = sum(found.left_out.values()) + sum(found.missing.values())
    assert found.listed - lost == found.splits[0].participants
    assert sum(part.participants for part in found.splits[1:]) == found.splits[0].participants


def test_the_figure_the_table_and_the_words_have_the_numbers(damaged, configure):
    root, reasons, used = damaged
    found = flow.count(ledger.read(configure(root, WHERE)), "participants.tsv")
    drawn = " ".join(text.get_text() for text in flow.draw(found).axes[0].texts)
    drawn, words = " ".join(drawn.split()), flow.in_words(found)
    header, rows = flow.table(found)
    assert header == ["", "participants", "volumes"]
    numbers = {name.split(": ")[-1]: int(number) for name, number, _ in rows}
    for why, number in reasons.items():
        if number:
            assert f"{why}: {number}" in drawn and f"{why}: {number}" in words
            assert numbers[why] == number
    assert f"{len(used)} participants used" in drawn
    assert numbers["used"] == len(used) == sum(numbers[split] for split in ledger.SPLITS)


def test_the_flow_of_eyes_counts_participants_and_eyes(dataset, configure):
    """The label is the manifest's laterality: whoever has no volume has no label."""
    people, manifest = tables(dataset)
    victim = next(p["participant_id"] for p in people if p["retinal_oct"] == "TRUE")
    remove_rows(dataset, [victim])
    more = ["data.unit=eye", "data.columns.label=laterality", "data.classes=[L, R]"]
    cfg = configure(dataset, *more, "data.columns.split=null", "data.task=side")
    book = ledger.read(cfg)
    found = flow.count(book, "participants.tsv")
    rows = triton(tables(dataset)[1])
    used, *splits = found.splits
    assert found.listed == len(people) and not found.missing
    assert used.participants == len({r["participant_id"] for r in rows})
    assert used.units == len({(r["participant_id"], r["laterality"]) for r in rows})
    assert used.volumes == len(rows)
    without = sum(p["retinal_oct"] == "FALSE" for p in people)
    assert found.left_out.get("retinal_oct is FALSE", 0) == without
    assert found.left_out["no volume that could have a label"] == 1
    assert used.participants == len(people) - without - 1
    assert [sum(p.units for p in splits), sum(p.participants for p in splits)] == [
        used.units,
        used.participants,
    ]
    assert flow.table(found)[0] == ["", "participants", "eyes", "volumes"]
    assert f"{used.units} eyes" in flow.in_words(found)


def book_of(rows, left_out=()):
    return ledger.Ledger(rows, [], ("a", "b"), left_out=dict(left_out))


def row(pid, status="used", cause="", unit="", split="train", label=0):
    volumes = int(status == "used")
    about = {"volumes": volumes, "status": status, "cause": cause, "unit": unit}
    return ledger.Row(pid, split, label, "", **about)


def test_many_reasons_are_summed_up_and_none_is_lost():
    rows = [row(f"m{i}.{k}", "missing", f"reason {i}") for i in range(30) for k in range(30 - i)]
    found = flow.count(book_of(rows), "t.csv")
    texts = [text.get_text() for text in flow.draw(found).axes[0].texts]
    assert "reason 0: 30" in texts and f"and 24 more: {sum(range(1, 25))}" in texts
    assert sum(found.missing.values()) == found.listed == len(rows)
    in_table = [int(n) for name, n, _ in flow.table(found, most=5)[1] if "missing" in name]
    assert sum(in_table) == len(rows) and len(in_table) == 6
    assert flow.shortened({"a": 3, "b": 1}, 1) == [("a", 3), ("b", 1)]  # not "and 1 more"


def test_a_participant_with_one_eye_left_is_used_and_counted_once():
    rows = [row("1", unit="1 L"), row("1", "missing", "files absent", "1 R"), row("2", "missing")]
    found = flow.count(book_of(rows, {"3": "not asked"}), "t.csv")
    assert (found.listed, found.eligible, found.splits[0].participants) == (3, 2, 1)
    assert found.missing == {"not said": 1} and found.left_out == {"not asked": 1}


# ------------------------------------------------------------------------------------- the command


def scans_of(page):
    """The pictures of a page that are not the flow."""
    return [
        Image.open(io.BytesIO(base64.b64decode(text)))
        for text in re.findall('src="data:image/png;base64,([^"]+)"', page)
    ]


def test_the_page_is_the_last_line_and_figures_lie_beside_it(written, command, tmp_path):
    with every_kind():
        done = command("data.py", *DEMO, root=written)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"page: {tmp_path}/run_check.html"
    names = {path.name for path in tmp_path.glob("run*")}
    assert names == {"run_check.html", *(f"run_flow.{kind}" for kind in ("png", "svg", "pdf"))}
    page = content(tmp_path / "run_check.html")
    total = len(triton(tables(written)[1]))
    assert f"0 of {total} files have been opened so far" in " ".join(text_of(page).split())
    assert "SYNTHETIC" in page and not scans_of(page)
    assert "Nothing in these tables stops a run" in page
    other = command("check.py", *DEMO, root=written)
    assert other.stdout == done.stdout and content(tmp_path / "run_check.html") == page


def test_the_page_has_class_site_and_split(written, command, tmp_path):
    command("check.py", *DEMO, root=written)
    text = text_of(content(tmp_path / "run_check.html"))
    people = [p for p in tables(written)[0] if p["retinal_oct"] == "TRUE"]
    count = Counter((p["clinical_site"], p["study_group"], p["recommended_split"]) for p in people)
    for site in ("UW", "UCSD", "UAB"):
        cells = [count[site, "healthy", split] for split in ledger.SPLITS]
        numbers = r"\s+".join(f"{n}/{n}" if n else "-" for n in cells)
        assert re.search(rf"{site}: healthy\s+{numbers}\s", text)


def test_what_was_opened_is_shown_without_opening_it_again(dataset, command, tmp_path):
    done = command("check.py", "--deep", *DEMO, root=dataset)
    assert done.returncode == 0, done.stderr
    deep = content(tmp_path / "run_check.html")
    total = len(triton(tables(dataset)[1]))
    again = command("check.py", *DEMO, root=dataset)
    assert again.returncode == 0 and "files were read" not in again.stdout
    page = content(tmp_path / "run_check.html")
    assert f"{total} of {total} files have been opened so far" in " ".join(text_of(page).split())
    assert all("RLE Lossless" in text and "20 x 62 x 20" in text for text in (deep, page))
    (scan,), (same,) = scans_of(deep), scans_of(page)
    assert scan.tobytes() == same.tobytes() and np.asarray(scan).std() > 10
    # of the manifest, for the phantom's files say the same
    mm = triton(tables(dataset)[1])[0]
    depth, across = (float(n) for n in mm["pixel_spacing"].strip("[]").split(","))
    expected = int(mm["height"]) * depth / (int(mm["width"]) * across)
    assert scan.height / scan.width == pytest.approx(expected, abs=0.01)


def test_a_page_without_images(dataset, command, tmp_path):
    done = command("check.py", "--deep", "--no-images", *DEMO, root=dataset)
    assert done.returncode == 0, done.stderr
    page = content(tmp_path / "run_check.html")
    assert "data:image/png" not in page and "images of their eyes" not in page
    assert "RLE Lossless" in page


@pytest.mark.parametrize(
    "spacing, height, width",
    [((0.01, 0.1), 1, 2), (None, 50, 10), ((1e-9, 1), 50, 10), (None, 50, 1)],
)
def test_proportions(spacing, height, width):
    import check

    columns = 1 if width == 1 else 10
    found = {"rows": 50, "columns": columns, "spacing": spacing}
    h, w, said = check.extent(found)
    assert h / w == pytest.approx(min(height / width, 10) if width != 2 else 0.5)
    assert ("mm" in said) == (width == 2)


def test_the_page_is_written_where_somebody_is_missing(damaged, command, tmp_path):
    root, reasons, _ = damaged
    done = command("check.py", *DEMO, WHERE, root=root)
    assert done.returncode == 1 and done.stderr.startswith("error: 6 of ")
    assert done.stdout.splitlines()[-1] == f"page: {tmp_path}/run_check.html"
    text = " ".join(text_of(content(tmp_path / "run_check.html")).split())
    assert "No run would start: 6 of " in text and "Missing participants: 6" in text
    assert "no row in the manifest" in text


def test_the_page_is_written_where_a_class_is_absent(dataset, command, tmp_path):
    people, _ = tables(dataset)
    healthy = [p for p in people if p["study_group"] == "healthy"]
    ids = [p["participant_id"] for p in healthy if p["recommended_split"] == "train"]
    lines = content(dataset / "participants.tsv").splitlines(True)
    moved = [line.replace("\ttrain\t", "\ttest\t") if line[:4] in ids else line for line in lines]
    (dataset / "participants.tsv").write_text("".join(moved))
    done = command("check.py", *DEMO, root=dataset)
    assert done.returncode == 1 and "no training volume is of class healthy" in done.stderr
    assert "no training volume is of class healthy" in content(tmp_path / "run_check.html")


def test_the_deep_check_goes_on_where_a_split_has_nothing_readable(dataset, command, tmp_path):
    """And where more is missing than is there."""
    people, manifest = tables(dataset)
    split_of = {p["participant_id"]: p["recommended_split"] for p in people}
    trains = [p["participant_id"] for p in people if p["recommended_split"] == "train"]
    remove_files(dataset, trains[:-2])
    of_val = [row for row in triton(manifest) if split_of[row["participant_id"]] == "val"]
    for number, row in enumerate(of_val):
        with open(f"{dataset}{row['filepath']}", "w") as f:
            f.write(f"no DICOM {number}")
    done = command("check.py", "--deep", *DEMO, root=dataset)
    assert done.returncode == 1 and f"{len(of_val)} volumes cannot be read" in done.stderr
    text = text_of(content(tmp_path / "run_check.html"))
    assert f"Unreadable or refused volumes: {len(of_val)}" in text
    rest = [row for row in triton(manifest) if split_of[row["participant_id"]] == "test"]
    rest += [row for row in triton(manifest) if row["participant_id"] in trains[-2:]]
    assert f"{len(rest)} files were read" in done.stdout


def test_where_nothing_says_the_size_the_page_says_so(written, command, tmp_path):
    args = [*DEMO, "paths.checkpoint_path=/nowhere.pt"]
    done = command("check.py", *args, f"paths.data={written}", f"paths.run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    text = " ".join(text_of(content(tmp_path / "run_check.html")).split())
    assert "It was not looked up which files have been opened so far" in text


# --------------------------------------------------------------------------------- odd texts, many

ODD = ["<script>alert(1)</script>", "$\\frac$ a_b^c$", "\"'&amp;"]
ODD += ["\u202egro.elpmaxe\u200f", "x" * 90]


def write_odd(folder, people=300):
    """Scans and a table with texts that a page must show as they are, half of the scans absent."""
    (folder / "scans").mkdir(parents=True)
    rows = [["id", "group", "scan", "fold", "place"]]
    for i in range(people):
        odd, name = ODD[i % len(ODD)], f"scans/{i}.npy"
        fold = ("train", "train", "val", "test")[i // 10 % 4]
        rows.append([f"{odd} {i}", ["<i>a</i>", "$b$"][i % 2], name, fold, ODD[i % 5]])
        if i % 20 < 10:
            np.save(folder / name, np.full((2, 3, 4), i))
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)
    columns = {"participant": "id", "label": "group", "file": "scan", "split": "fold"}
    columns |= {"eye": "null", "site": "place", "age": "null", "has_oct": "null"}
    return [
        *DEMO,
        "data.labels=labels.csv",
        "data.manifest=null",
        *(f"data.columns.{role}={column}" for role, column in columns.items()),
        'data.classes=["<i>a</i>", "$b$"]',
        f"paths.data={folder}",
        f"paths.run_dir={folder}/cls_<b>",
        f"paths.cache_dir={folder}/cache",
    ]


@pytest.fixture()
def odd_page(tmp_path, command):
    done = command("check.py", *write_odd(tmp_path / "odd"))
    assert done.returncode == 1 and "150 of 300 labelled participants" in done.stderr
    return tmp_path / "odd" / "cls_<b>_check.html"


def test_texts_of_the_data_are_shown_as_text(odd_page):
    page = odd_page.read_text()
    assert "<script>alert" not in page and "<i>a</i>" not in page and "<b>_" not in page
    assert "\u202e" not in page and "\u200f" not in page
    text = text_of(page)
    assert all(odd in text for odd in (*ODD[:3], "\\u202egro.elpmaxe\\u200f", "cls_<b>"))
    assert "The first 100 of 150; the command prints all." in text
    assert page.count("<li>") == 100
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280], ids=["a phone", "a desk"])
@pytest.mark.parametrize("which", ["of the demo", "of odd texts"])
def test_the_page_fits_a_phone_and_a_desk(request, dataset, command, tmp_path, which, width, dark):
    if which == "of the demo":
        command("check.py", "--deep", *DEMO, root=dataset)
        page, pictures = tmp_path / "run_check.html", 2
    else:
        page, pictures = request.getfixturevalue("odd_page"), 1
    look = seen(page, width, tmp_path, dark)
    assert look.problems() == [] and look.images == pictures


def test_make_check_is_this_command():
    assert "check.py$(if $(DEEP), --deep)" in content(f"{ROOT}/Makefile")
