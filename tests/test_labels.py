"""Labels of one's own: tables, columns, classes, units, splits (labels.py), without any volume."""

import collections

import numpy as np
import pytest
from helpers import DEMO

import config
import ledger


@pytest.fixture()
def table(tmp_path):
    """table("id,dx,...\\n...", "key=value", ...) -> Ledger of a table with a row per volume, whose
    files exist; null for all columns but participant, label and file."""

    def make(text, *overrides, name="labels.csv"):
        (tmp_path / name).write_text(text)
        header, *rows = [line.split(",") for line in text.splitlines()]
        for row in rows:
            cells = dict(zip(header, row))
            if cells.get("file"):
                path = tmp_path / cells["file"].strip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(cells["file"])  # each another content
        own = {"participant": "id", "label": "dx", "file": "file"}
        nothing = dict.fromkeys(("split", "eye", "site", "age", "has_oct"), "null")
        given = [f"data.columns.{role}={column}" for role, column in (nothing | own).items()]
        settings = [f"paths.data={tmp_path}", f"data.labels={name}", "data.manifest=null"]
        settings += ["data.classes=[a,b]", "data.ordered=false", *given, *overrides]
        return ledger.read(config.load(DEMO, settings))

    return make


def rows_of(people, classes, volumes=1, columns=""):
    """A table of so many participants, classes in turn, each with so many volumes."""
    lines = [f"id,dx,file{columns}"]
    for i in range(people):
        for v in range(volumes):
            lines.append(f"p{i},{classes[i % len(classes)]},scans/p{i}_{v}.npy")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------- splits that are drawn


@pytest.mark.parametrize("number", [2, 3, 12])
def test_a_split_is_drawn_by_participant_and_stratified_by_class(table, number):
    names = [f"class {k}" for k in range(number)]
    book = table(rows_of(240, names, volumes=2), f"data.classes={names}")
    split_of = {}
    for sample in book.samples:  # nobody is in two
        assert split_of.setdefault(sample.participant_id, sample.split) == sample.split
    per_class = collections.Counter((row.label, row.split) for row in book.rows)
    for label in range(number):
        for split, share in (("val", 0.15), ("test", 0.15), ("train", 0.7)):
            assert abs(per_class[label, split] - share * 240 / number) <= 1
    again = table(rows_of(240, names, volumes=2), f"data.classes={names}")
    assert [row.split for row in again.rows] == [row.split for row in book.rows]
    other = table(rows_of(240, names, volumes=2), f"data.classes={names}", "seed=7")
    assert [row.split for row in other.rows] != [row.split for row in book.rows]


def test_a_new_participant_moves_few_others(table):
    before = {row.unit: row.split for row in table(rows_of(200, "ab")).rows}
    after = {row.unit: row.split for row in table(rows_of(202, "ab")).rows}
    assert sum(before[unit] != after[unit] for unit in before) <= 4


def test_a_class_of_one_is_trained_on(table):
    text = rows_of(20, "ab") + "z,c,scans/z.npy\n"
    book = table(text, "data.classes=[a,b,c]")
    assert next(row for row in book.rows if row.unit == "z").split == "train"


# ------------------------------------------------------------------------------ tables of all kinds


@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
def test_tables_may_be_parted_by_tabs_commas_or_semicolons(table, delimiter, tmp_path):
    expected = [(s.participant_id, s.label, s.split) for s in table(rows_of(20, "ab")).samples]
    (tmp_path / "other.txt").write_text(rows_of(20, "ab").replace(",", delimiter))
    book = table(rows_of(20, "ab"), f"data.labels={tmp_path}/other.txt")
    assert [(s.participant_id, s.label, s.split) for s in book.samples] == expected


def test_values_may_be_numbers_and_share_a_name(table):
    text = rows_of(30, ["0", "1.0", "2"])
    book = table(text, "data.classes={0: none, 1: some, 2: some}")
    assert book.classes == ("none", "some")
    assert [row.label for row in book.rows] == [0, 1, 1] * 10


def test_thresholds_make_classes_of_a_number(table):
    text = rows_of(40, ["5.6", "5.7", "6.4999", "6.5"])
    book = table(text, "data.thresholds=[5.7,6.5]", "data.classes=[low,middle,high]")
    assert [row.label for row in book.rows[:4]] == [0, 1, 1, 2]


def test_where_leaves_rows_out_and_counts_them(table):
    text = "id,dx,file,quality\n" + "".join(
        f"p{i},{'ab'[i % 2]},scans/{i}_{q}.npy,{q}\n" for i in range(20) for q in ("good", "bad")
    )
    book = table(text, "data.where={quality: good}")
    assert len(book.samples) == 20 and all("good" in s.path for s in book.samples)
    assert any("quality=good leaves out 20 of 40 rows" in note for note in book.notes)


def test_paths_may_be_absolute_below_the_data_folder(table, tmp_path):
    text = rows_of(20, "ab")
    table(text)
    book = table(text.replace("scans/", f"{tmp_path}/scans/"))
    assert len(book.samples) == 20


def test_folders_that_are_numbered_by_class_belong_to_nobody(table):
    """They could be taken for those of participants 0 and 1."""
    text = "id,dx,file\n" + "".join(f"{i},{'ab'[i % 2]},{i % 2}/{i}.npy\n" for i in range(20))
    assert len(table(text).samples) == 20


def test_ages_may_differ_between_the_rows_of_a_participant(table):
    text = "id,dx,file,years\n" + "".join(
        f"p{i},{'ab'[i % 2]},scans/{i}_{v}.npy,{60 + v}\n" for i in range(20) for v in range(2)
    )
    book = table(text, "data.columns.age=years")
    assert {row.age for row in book.rows} == {"60"} and len(book.samples) == 40


# --------------------------------------------------------------------------- eyes, volumes as units


def eyes(people=20):
    text = "id,dx,file,side\n"
    for i in range(people):
        for side in "LR":
            text += f"p{i},{'ab'[(i + (side == 'R')) % 2]},scans/{i}_{side}.npy,{side}\n"
    return text


def test_an_eye_may_have_a_label_of_its_own(table):
    book = table(eyes(), "data.unit=eye", "data.columns.eye=side")
    assert [row.unit for row in book.rows[:2]] == ["p0 L", "p0 R"]
    assert [row.label for row in book.rows[:2]] == [0, 1]
    split_of = {}
    for row in book.rows:  # the other eye would give away much
        assert split_of.setdefault(row.participant_id, row.split) == row.split
    header, first, *_ = ledger.rows_for_csv(book)
    assert header[:2] == ["participant_id", "unit"] and first[:2] == ["p0", "p0 L"]


def test_a_volume_may_have_a_label_of_its_own(table):
    book = table(eyes(), "data.unit=volume")
    assert len(book.rows) == 40 and book.rows[0].unit == "p0 scans/0_L.npy"


# --------------------------------------------------------------------------------------- bad tables


@pytest.mark.parametrize(
    "change, overrides, message",
    [
        (("p3,b", "p3,B2"), [], r"participant p3 has unknown dx 'B2'; known are a, b \(data.clas"),
        (
            ("p3,b", "p3,normall"),
            ["data.classes=[normal,b,a]"],
            "unknown dx 'normall', did you mean 'normal'",
        ),
        (("p3,b", "p3,"), [], "participant p3 has no dx .''.; fill it in, or leave such rows"),
        (("p3,b", "p3,n/a"), [], "participant p3 has no dx .'n/a'.; fill it in, or leave"),
        (("dx", "diagnosis"), [], "has no column 'dx'; found id, diagnosis, file; name the right"),
        (("id,", "patient,"), [], "has no column 'id'; found patient, dx, file.*columns.participa"),
        ((), ["data.columns.split=fold", "data.columns.site=place"], "'fold', 'place'.*or set it"),
        ((), ["data.where={quality: good}"], "no table has a column 'quality'; they have id, dx"),
        ((), ["data.where={dx: c}"], "data.where dx=c fits no row .*; it has a, b"),
        (("scans/p3_0.npy", "../p3.npy"), [], "participant p3: '../p3.npy' points outside the dat"),
        (("scans/p3_0.npy", ""), [], "participant p3: a row names no file"),
        ((), ["data.thresholds=[1]"], "participant p0 has dx 'a', which is no number"),
        (("p3,b,scans/p3_0", "p3,a,scans/p3_1"), [], None),
        (("p4,a,scans/p4_0", "p3,a,scans/p4_0"), [], "participant p3 has two rows .*two labels; c"),
        ((), ["data.unit=eye"], "data.unit=eye needs to know which eye"),
        (("p4,a,scans/p4_0", "p4,a,scans/p3_0"), [], "scans/p3_0.npy is listed for two participa"),
    ],
)
def test_a_bad_table_is_one_sentence(table, change, overrides, message):
    text = rows_of(20, "ab")
    text = text.replace(*change, 1) if change else text
    if message is None:
        assert len(table(text, *overrides).samples) == 20
        return
    with pytest.raises(ValueError, match=message) as error:
        table(text, *overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "second, message",
    [
        ("p0,a,x.npy,test", "participant p0 is in two splits, train and test"),
        ("q,a,x.npy,Train", "unknown fold 'Train', did you mean 'train'. known are train, val"),
    ],
)
def test_splits_of_a_table_are_those_of_a_participant(table, second, message):
    text = "id,dx,file,fold\np0,a,p0.npy,train\n" + second + "\n"
    with pytest.raises(ValueError, match=message):
        table(text, "data.columns.split=fold")


def test_ids_that_differ_in_form_are_refused_in_a_table_of_ones_own(table):
    text = rows_of(20, "ab") + "7,a,scans/7.npy\n7.0,a,scans/8.npy\n"
    with pytest.raises(ValueError, match="participants 7, 7.0 may be one"):
        table(text)


def test_people_from_another_table(table, tmp_path):
    """Measurements in one table, splits and sites in another."""
    people = "who,fold,site\n" + "".join(
        f"p{i},{('train', 'val', 'test')[i % 3]},S{i % 2}\n" for i in range(20)
    )
    (tmp_path / "people.csv").write_text(people.replace("who", "id"))
    columns = ["data.columns.split=fold", "data.columns.site=site", "data.participants=people.csv"]
    book = table(rows_of(20, "ab"), *columns)
    assert [(row.split, row.site) for row in book.rows[:3]] == [
        ("train", "S0"),
        ("val", "S1"),
        ("test", "S0"),
    ]
    (tmp_path / "people.csv").write_text(people.replace("who", "id").replace("p3,", "p33,"))
    with pytest.raises(ValueError, match="people.csv has no row of participant p3, whom .*labels"):
        table(rows_of(20, "ab"), *columns)


def test_nothing_but_the_config_knows_the_classes(table):
    book = table(rows_of(24, "ab"))
    assert book.classes == ("a", "b") and "healthy" not in ledger.table(book)
    assert np.isin([row.label for row in book.rows], [0, 1]).all()
    assert "topcon" not in ledger.table(book)  # nobody asked for a scanner


# --------------------------------------------------------------- eyes and ids in several spellings


def test_an_eye_is_one_however_it_is_spelled(table):
    text = "id,dx,file,side\n" + "".join(
        f"p{i},{'ab'[i % 2]},{i}_{v}.npy,{side}\n"
        for i in range(20)
        for v, side in enumerate(("OD", "R", "right", "os", "L"))
    )
    book = table(text, "data.unit=eye", "data.columns.eye=side")
    assert len(book.rows) == 40 and {row.unit[-1] for row in book.rows} == {"L", "R"}
    assert [row.volumes for row in book.rows[:2]] == [3, 2]
    with pytest.raises(ValueError, match="participant p0 has 3 eyes, p0 R, p0 L, p0 links"):
        table(text + "p0,a,x.npy,links\n", "data.unit=eye", "data.columns.eye=side")
    for missing in ("", "nan", "NA"):
        with pytest.raises(ValueError, match="x.npy does not say which eye"):
            table(text + f"p0,a,x.npy,{missing}\n", "data.unit=eye", "data.columns.eye=side")


def test_units_of_two_people_are_never_one(table):
    text = rows_of(20, "ab").replace("dx,file", "dx,file,side").replace(".npy", ".npy,L")
    text += "Q,a,50.npy,1 L\nQ 1,a,51.npy,L\n"
    with pytest.raises(ValueError, match="participants 'Q' and 'Q 1' both have 'Q 1 L' as eye"):
        table(text, "data.unit=eye", "data.columns.eye=side")


@pytest.mark.parametrize("name", ["nan", "NA", "None", "null"])
def test_a_missing_id_is_nobody(table, name):
    with pytest.raises(ValueError, match=f"a row has no id .'{name}'.; fill it in, or remove"):
        table(rows_of(20, "ab") + f"{name},a,x.npy\n")


def test_ids_that_differ_in_case_alone_are_refused(table):
    with pytest.raises(ValueError, match="participants p1, P1 may be one"):
        table(rows_of(20, "ab") + "P1,b,x.npy\n")


def test_a_star_asks_for_what_is_not_missing(table):
    text = rows_of(20, ["5.1", "6.2"]) + "x,,x.npy\ny,NaN,y.npy\n"
    own = ["data.thresholds=[5.7]", "data.classes=[low,high]"]
    with pytest.raises(ValueError, match="leave such rows out: data.where={dx: '.'}"):
        table(text, *own)
    book = table(text, *own, "data.where={dx: '*'}")
    assert len(book.rows) == 20
    assert any("leaves out 2 of 22 rows" in note for note in book.notes)
    with pytest.raises(ValueError, match="which is no number"):
        table(text.replace("x,,x", "x,5_8,x"), *own, "data.where={dx: '*'}")


def test_who_has_no_scan_by_the_table_needs_no_file(table):
    text = "id,dx,file,scanned\n" + "".join(
        f"p{i},{'ab'[i % 2]},{'' if i == 3 else f'{i}.npy'},{'no' if i == 3 else 'yes'}\n"
        for i in range(20)
    )
    book = table(text, "data.columns.has_oct=scanned")
    assert [row.unit for row in book.rows if row.status == "no_oct"] == ["p3"]
    assert len(book.samples) == 19


def test_the_order_of_the_classes_does_not_change_the_split(table):
    splits = []
    for classes in ("{a: ill, b: well}", "{b: well, a: ill}"):
        book = table(rows_of(31, "aab"), f"data.classes={classes}")
        splits.append({row.unit: row.split for row in book.rows})
    assert splits[0] == splits[1]


@pytest.mark.parametrize("people, split", [(3, "val"), (5, "val")])
def test_too_few_people_to_be_split(table, people, split):
    message = f"data.split.{split}=0.05 of {people} participants is nobody; raise it, or name a col"
    with pytest.raises(ValueError, match=message):
        table(rows_of(people, "ab"), "data.split.val=0.05", "data.split.test=0.3")


def test_who_lost_all_rows_to_where_is_told_so(table, tmp_path):
    people = "id,dx\n" + "".join(f"p{i},{'ab'[i % 2]}\n" for i in range(20))
    scans = "id,file,quality\n" + "".join(
        f"p{i},{i}.npy,{'bad' if i == 7 else 'good'}\n" for i in range(20)
    )
    (tmp_path / "scans.csv").write_text(scans)
    for i in range(20):
        (tmp_path / f"{i}.npy").write_text(str(i))
    more = ["data.manifest=scans.csv", "data.scanner=null", "data.where={quality: good}"]
    (missing,) = table(people, *more).missing()
    assert (missing.unit, missing.reason) == ("p7", "no volume of quality good")


@pytest.mark.parametrize("text", ["sep=;\n{}", "\n\n{}", "{}"])
def test_what_spreadsheets_write_before_the_header_is_no_row(table, tmp_path, text):
    own = rows_of(20, "ab").replace(",", ";").replace("dx", '"dx"')
    (tmp_path / "odd.csv").write_text(text.format(own))
    assert len(table(rows_of(20, "ab"), f"data.labels={tmp_path}/odd.csv").samples) == 20
