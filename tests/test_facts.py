"""What volume files say of themselves, against the tables and against each other."""

import glob
import json
import os
import shutil

import imagecodecs
import numpy as np
import pydicom
import pytest
from helpers import change_dicom, content, edit, tables, triton, write_dicom
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import data
import facts
import ledger
import volumes

SIZE = (16, 64, 64)
MANIFEST = "retinal_oct/manifest.tsv"


def paths_of(root, participant_id):
    """Absolute paths of a participant's volumes that a quick probe uses."""
    rows = [row for row in triton(tables(root)[1]) if row["participant_id"] == participant_id]
    return [f"{root}{row['filepath']}" for row in rows]


def people_of(root, split):
    """Ids of the participants of a split with two volumes or more."""
    rows = [row for row in tables(root)[0] if row["recommended_split"] == split]
    return [r["participant_id"] for r in rows if len(paths_of(root, r["participant_id"])) >= 2]


def change_ids(root, change):
    """Apply change(id, index of the row) to the manifest's participant_id."""

    def changed(text):
        header, *lines = text.splitlines()
        rows = [line.split("\t") for line in lines]
        ids = [change(row[0], i) for i, row in enumerate(rows)]
        return "\n".join([header, *("\t".join([i, *r[1:]]) for i, r in zip(ids, rows))]) + "\n"

    edit(f"{root}/{MANIFEST}", changed)


def set_column(root, name, value, participants=None):
    """Set a column of the manifest, in all rows or in those of some participants."""

    def changed(text):
        header, *lines = text.splitlines()
        k, out = header.split("\t").index(name), [header]
        for line in lines:
            cells = line.split("\t")
            if participants is None or cells[0] in participants:
                cells[k] = value
            out.append("\t".join(cells))
        return "\n".join(out) + "\n"

    edit(f"{root}/{MANIFEST}", changed)


def opened(cfg):
    """The ledger of a config after every volume was opened, and the notes."""
    book = ledger.read(cfg)
    cfg.data.max_missing = 10**6
    cache = cfg.paths.cache_dir, cfg.data.cache_gb, cfg.data.fetch_deadline
    kept = data.Volumes(book.samples, SIZE, *cache, book.ids)
    for i, key, _ in data.stream(kept, book, range(len(kept.samples)), cfg):
        book.facts[kept.samples[i].path] = kept.facts(i, key)
    return book, ledger.compare_files(book, kept.samples, facts.NOTHING)


# ------------------------------------------------------------------------------ who


def test_ids_shifted_by_a_participant_stop_the_run(dataset, command):
    ids = sorted({row["participant_id"] for row in tables(dataset)[1]})
    following = dict(zip(ids, ids[1:] + ids[:1]))
    change_ids(dataset, lambda pid, i: following[pid])
    done = command("train.py", "--config", "configs/demo.yaml", root=dataset)
    assert done.returncode == 1
    expected = f"belongs to participant {ids[-1]} by its folder, and to {ids[0]} by the manifest"
    assert expected in done.stderr


def flat(root):
    """Move all volumes so that no folder names a participant, as other exports have them."""
    edit(f"{root}/{MANIFEST}", lambda text: text.replace("/topcon_triton/", "/x/topcon_triton/"))
    for row in triton(tables(root)[1]):
        target = f"{root}/x/topcon_triton/scans/{os.path.basename(row['filepath'])}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(f"{root}{row['filepath'].replace('/x/', '/')}", target)

    def moved(text):
        lines = text.splitlines()
        out = []
        for line in lines:
            cells = line.split("\t")
            if "triton_macula_6x6" in line:
                k = next(i for i, cell in enumerate(cells) if "triton_macula_6x6" in cell)
                cells[k] = f"/x/topcon_triton/scans/{os.path.basename(cells[k])}"
            out.append("\t".join(cells))
        return "\n".join(out) + "\n"

    edit(f"{root}/{MANIFEST}", moved)


def test_the_patient_id_tells_where_folders_do_not(dataset, configure):
    flat(dataset)
    first, second = people_of(dataset, "train")[:2]
    path = paths_of(dataset, first)[0]
    change_dicom(path, lambda ds: setattr(ds, "PatientID", second))
    book, _ = opened(configure(dataset))
    ((sample, reason),) = book.unreadable
    assert sample.path == path
    expected = f"belongs to participant {second} by its PatientID, and to {first} by the manifest"
    assert expected in reason


@pytest.mark.parametrize("cached", ["nothing", "volumes and features"])
@pytest.mark.slow
def test_a_manifest_that_is_shifted_later_is_found_in_spite_of_the_cache(dataset, command, cached):
    flat(dataset)
    arguments = ["--config", "configs/demo.yaml", "train.epochs=2"]
    if cached != "nothing":
        assert command("train.py", *arguments, root=dataset).returncode == 0
    ids = sorted({row["participant_id"] for row in tables(dataset)[1]})
    following = dict(zip(ids, ids[1:] + ids[:1]))
    change_ids(dataset, lambda pid, i: following[pid])
    done = command("train.py", *arguments, root=dataset)
    assert done.returncode == 1 and "by its PatientID" in done.stderr


@pytest.mark.parametrize("form", ["", "AIREADI-{}", "UW", "ANON7731", " 0{} ", "{}.0", "99{}"])
def test_what_names_nobody_else_says_nothing(dataset, configure, form):
    pid = people_of(dataset, "train")[0]
    for path in paths_of(dataset, pid):
        change_dicom(path, lambda ds: setattr(ds, "PatientID", form.format(pid)))
    book, notes = opened(configure(dataset))
    assert not book.unreadable and notes == []


def test_another_participant_in_another_form_is_another_participant():
    ids = {"1001", "1002", "abc"}
    for name, expected in {
        "1002": "1002",
        " 01002": "1002",
        "1002.0": "1002",
        "1001": None,
        "1001.0": None,
        "11002": None,
        "abc": "abc",
        None: None,
    }.items():
        assert facts.other_participant(name, "1001", ids) == expected


# ------------------------------------------------------------------------------ how

CHANGES = {
    "number_of_frames": ("99", "number of frames: ", "manifest 99, file 20"),
    "height": ("63", "rows x columns: ", "manifest 63 x 20, file 62 x 20"),
    "pixel_spacing": ("[0.5, 0.5]", "pixel spacing: ", "manifest 0.5 x 0.5, file 0.0416"),
    "slice_thickness": ("7", "slice thickness: ", "manifest 7, file 0.3"),
    "imaging": ("OCTA", "imaging: ", "manifest OCTA"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_contradiction_is_a_note_with_both_values(dataset, configure, name):
    value, what, both = CHANGES[name]
    pid = people_of(dataset, "train")[0]
    set_column(dataset, name, value, {pid})
    book, (note,) = opened(configure(dataset))
    count = len(paths_of(dataset, pid))
    assert note.startswith(f"{what}{count} of {len(book.samples)} files (participant {pid}: {both}")
    row = next(row for row in book.rows if row.participant_id == pid)
    assert both in row.notes and row.status == "used" and not book.unreadable
    assert sum(bool(row.notes) for row in book.rows) == 1
    assert both in str(ledger.rows_for_csv(book))


def test_what_most_files_do_alike_is_a_convention_and_told_once(dataset, configure):
    set_column(dataset, "laterality", "L")
    set_column(dataset, "height", "20")
    set_column(dataset, "width", "62")
    book, notes = opened(configure(dataset))
    total = len(book.samples)
    sides, sizes = notes
    assert sides.startswith("laterality: ") and "convention" not in sides  # half of them are L
    assert sizes.startswith(f"rows x columns: {total} of {total} files, so a convention")
    assert not book.unreadable


@pytest.mark.parametrize("value", ["Not reported", "Varies by frame", "", "[]", "n/a"])
def test_where_the_manifest_does_not_say_nothing_is_demanded(dataset, configure, value):
    for name in ("number_of_frames", "height", "pixel_spacing", "slice_thickness", "laterality"):
        set_column(dataset, name, value)
    assert opened(configure(dataset))[1] == []


def test_columns_that_are_not_there_demand_nothing(dataset, configure):
    names = ("number_of_frames", "height", "width", "pixel_spacing", "slice_thickness", "imaging")

    def without(text):
        rows = [line.split("\t") for line in text.splitlines()]
        kept = [k for k, name in enumerate(rows[0]) if name not in names]
        return "\n".join("\t".join(row[k] for k in kept) for row in rows) + "\n"

    edit(f"{dataset}/{MANIFEST}", without)
    assert opened(configure(dataset))[1] == []


# ------------------------------------------------------------------------------ copies


def export_again(source, target, participant_id, change=lambda frames: frames, syntax=None):
    """Write the scan of a file to another one, with its own UID and id."""
    frames = change(volumes.read_dicom(source))
    write_dicom(target, frames, ExplicitVRLittleEndian)

    def renamed(ds):
        ds.SOPInstanceUID, ds.PatientID = generate_uid(), participant_id

    change_dicom(target, renamed)


@pytest.fixture()
def one_scan_of_two(dataset):
    """-> two participants, of training and of test; a scan of the first replaces one of the
    second."""

    def make(change=lambda frames: frames):
        first, second = people_of(dataset, "train")[0], people_of(dataset, "test")[0]
        source, target = paths_of(dataset, first)[0], paths_of(dataset, second)[0]
        export_again(source, target, second, change)
        return first, second

    return make


def test_one_scan_under_two_ids_is_used_for_nobody(dataset, configure, one_scan_of_two):
    first, second = one_scan_of_two()
    book, _ = opened(configure(dataset))
    assert {s.participant_id for s, _ in book.unreadable} == {first, second}
    for _, reason in book.unreadable:
        assert reason.endswith(f"shows pixels that participants {first}, {second} share")


def test_one_scan_twice_of_one_participant_is_used_once(dataset, configure):
    pid = people_of(dataset, "train")[0]
    first, second = paths_of(dataset, pid)[:2]
    export_again(first, second, pid)
    book, (note,) = opened(configure(dataset))
    assert "used once" in note and not book.unreadable
    row = next(row for row in book.rows if row.participant_id == pid)
    assert (
        row.volumes
        == len(paths_of(dataset, pid)) - 1
        == len([s for s in book.samples if s.participant_id == pid])
    )


@pytest.mark.slow
def test_a_scan_that_passes_from_training_to_test_stops_the_evaluation(
    dataset, command, one_scan_of_two, tmp_path
):
    first, second = one_scan_of_two()
    arguments = ["--config", "configs/demo.yaml", "train.epochs=2"]
    assert command("train.py", *arguments, root=dataset).returncode == 0
    run = tmp_path / "run"
    assert command("eval.py", "--ckpt", run, "--split", "val").returncode == 0
    done = command("eval.py", "--ckpt", run)
    assert done.returncode == 1
    assert f"shows pixels that participants {first}, {second} share" in done.stderr
    done = command("eval.py", "--ckpt", run, "data.max_missing=1")
    assert done.returncode == 0, done.stderr
    (row,) = report_of(run)["unreadable"]
    assert row["participant_id"] == second


def report_of(run):
    return json.loads(content(run / "eval_test.json"))


def lossy(frames):
    encode = lambda f: imagecodecs.jpeg2k_encode(f, level=36, resolutions=2, codecformat="j2k")
    return np.stack([imagecodecs.jpeg2k_decode(encode(frame)) for frame in frames])


NEAR = {
    "lossy": lossy,
    "brighter": lambda frames: np.minimum(frames.astype(int) + 9, 255).astype(np.uint8),
    "half the contrast": lambda frames: frames // 2,
}


@pytest.mark.parametrize("change", NEAR.values(), ids=NEAR)
@pytest.mark.slow
def test_nearly_the_same_scan_of_two_participants_is_an_alarm(
    dataset, command, one_scan_of_two, tmp_path, change
):
    first, second = one_scan_of_two(change)
    arguments = ["--config", "configs/demo.yaml", "train.epochs=2"]
    assert command("train.py", *arguments, root=dataset).returncode == 0
    done = command("eval.py", "--ckpt", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    expected = f"participants {first} (train) and {second} (test) have nearly the same scan"
    (alarm,) = [a for a in report_of(tmp_path / "run")["alarms"] if "nearly the same" in a]
    assert expected in alarm and f"ALARM: {alarm}" in done.stdout


def test_two_scans_of_one_eye_are_no_alarm(dataset, configure):
    """The phantom scans an eye again with other speckle and fixation. As another participant's it
    would pass for another eye, and must not raise an alarm either."""
    book, notes = opened(configure(dataset))
    assert notes == [] and book.near_copies == []
    eyes = {}
    for sample in book.samples:
        eyes.setdefault((sample.participant_id, sample.laterality), []).append(sample)
    repeats = next(samples for samples in eyes.values() if len(samples) > 1)
    repeats[1].participant_id = "another"
    assert facts.near_copies(repeats, book.facts, facts.NOTHING) == []


# ------------------------------------------------------------------------------ make check DEEP=1


def test_the_deep_check_says_what_the_files_are(dataset, command, tmp_path):
    people = people_of(dataset, "train")
    bad, blank, odd = (paths_of(dataset, pid)[0] for pid in people[:3])
    change_dicom(bad, lambda ds: setattr(ds, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.66.4"))
    write_dicom(blank, np.zeros((20, 62, 20), np.uint8), ExplicitVRLittleEndian)
    set_column(dataset, "number_of_frames", "99", {people[2]})
    done = command("data.py", "--deep", "--config", "configs/demo.yaml", root=dataset)
    assert done.returncode == 1
    assert "unreadable: participant " + people[0] in done.stdout
    assert "no structural OCT: its SOP class is Segmentation Storage" in done.stdout
    assert "shows nothing" in done.stdout and "manifest 99, file 20" in done.stdout
    assert "2 volumes cannot be read, and data.max_missing is 0" in done.stderr
    total = len(triton(tables(dataset)[1]))
    assert f"{total - 2} files were read" in done.stdout
    assert "RLE Lossless" in done.stdout and "20 x 62 x 20" in done.stdout
    page = content(tmp_path / "run_check.html")
    assert "Unreadable or refused volumes: 2" in page and "data:image/png" in page


def test_the_deep_check_fills_the_cache(dataset, command, tmp_path):
    done = command("data.py", "--deep", "--config", "configs/demo.yaml", root=dataset)
    assert done.returncode == 0, done.stderr
    assert "note" not in done.stdout
    total = len(triton(tables(dataset)[1]))
    assert len(glob.glob(f"{tmp_path}/cache/volumes/*.npy")) == total
    shutil.rmtree(tmp_path / "cache" / "volumes")
    assert len(os.listdir(tmp_path / "cache" / "facts")) == total


def test_the_shallow_check_opens_nothing(dataset, command, monkeypatch):
    def opens(*args, **options):
        raise AssertionError("a volume was opened")

    monkeypatch.setattr(pydicom, "dcmread", opens)
    assert command("data.py", "--config", "configs/demo.yaml", root=dataset).returncode == 0
