import hashlib
import os
import re
import shutil

import pytest
from helpers import (
    CLASSES,
    PREFIX,
    ROOT_URL,
    content,
    edit,
    read_bytes,
    remote,
    tables,
    triton,
    write_bytes,
)

import files
import ledger

LABELS, MANIFEST = "participants.tsv", "retinal_oct/manifest.tsv"


@pytest.fixture()
def read(configure):
    """read(root, "key=value", ...) -> Ledger."""
    return lambda root, *overrides: ledger.read(configure(root, *overrides))


def row_of(book, participant_id):
    return next(r for r in book.rows if r.participant_id == participant_id)


def first_triton_line(root):
    """The first line of the manifest that a quick probe uses."""
    lines = content(root / MANIFEST).splitlines(True)
    return next(line for line in lines if "triton_macula_6x6" in line)


# -------------------------------------------------------------------------------- who is in it


def test_every_labelled_participant_has_a_row(written, read):
    people, _ = tables(written)
    assert [r.participant_id for r in read(written).rows] == [p["participant_id"] for p in people]


def test_everybody_with_oct_is_used(written, read):
    people, _ = tables(written)
    with_oct = {p["participant_id"] for p in people if p["retinal_oct"] == "TRUE"}
    assert {r.participant_id for r in read(written).rows if r.status == "used"} == with_oct
    assert {i[0] for i in with_oct} == {"1", "4", "7"}  # all three sites


def test_rows_say_what_the_table_says(written, read):
    people, book = {p["participant_id"]: p for p in tables(written)[0]}, read(written)
    assert {(r.split, r.label) for r in book.rows} == {
        (split, label) for split in ledger.SPLITS for label in range(4)
    }
    for row in book.rows:
        person = people[row.participant_id]
        assert row.split == person["recommended_split"]
        assert CLASSES[row.label] == person["study_group"]
        assert row.site == person["clinical_site"]


def test_all_volumes_of_the_scanner_and_region_are_used(written, read):
    chosen, book = triton(tables(written)[1]), read(written)
    paths = sorted(str(written) + m["filepath"] for m in chosen)
    assert sorted(s.path for s in book.samples) == paths
    for row in book.rows:
        assert row.volumes == sum(m["participant_id"] == row.participant_id for m in chosen)
    assert any(row.volumes > 2 for row in book.rows)  # repeats count


def test_nothing_is_missing_from_the_phantom(written, read):
    ledger.check(read(written), 0)


def test_another_scanner_is_another_set_of_volumes(written, read):
    book = read(written, "data.scanner=heidelberg_spectralis", "data.anatomic_region=Macula")
    _, manifest = tables(written)
    expected = [m for m in manifest if "/heidelberg_spectralis/" in m["filepath"]]
    assert len(book.samples) == len(expected)
    assert {s.participant_id for s in book.samples} == {m["participant_id"] for m in expected}
    with_oct = [r for r in book.rows if r.status != "no_oct"]
    assert len(book.missing()) == len(with_oct) - len(expected)
    assert book.missing()[0].reason == "no volume of heidelberg_spectralis, Macula"


def test_an_unknown_scanner_stops_and_the_known_are_named(written, read):
    message = r"no volume of data.scanner=zeis.*topcon_triton 'Macula, 6 x 6'"
    with pytest.raises(ValueError, match=message):
        read(written, "data.scanner=zeis")


# ------------------------------------------------------------------------------ who is missing


@pytest.fixture()
def losses(dataset):
    """The ids of a participant without files, one with empty files, and one who lacks a file."""
    people, manifest = tables(dataset)
    absent, empty = [p["participant_id"] for p in people if p["retinal_oct"] == "TRUE"][:2]
    for m in triton(manifest):
        path = str(dataset) + m["filepath"]
        if m["participant_id"] == absent:
            os.remove(path)
        if m["participant_id"] == empty:
            open(path, "w").close()
    partly = next(m for m in triton(manifest) if m["participant_id"] not in (absent, empty))
    os.remove(str(dataset) + partly["filepath"])
    return absent, empty, partly["participant_id"]


def test_absent_and_empty_files_make_a_participant_missing(dataset, losses, read):
    absent, empty = read(dataset).missing()
    assert (absent.participant_id, empty.participant_id) == losses[:2]
    assert "files absent" in absent.reason and "files empty" in empty.reason


def test_a_participant_who_lacks_a_file_is_used_and_noted(dataset, losses, read):
    book = read(dataset)
    partly = row_of(book, losses[2])
    assert partly.status == "used" and partly.reason.startswith("1 of ")
    assert any(partly.participant_id in note for note in book.notes)


def test_missing_participants_stop_the_run_unless_allowed(dataset, losses, read):
    book, (people, _) = read(dataset), tables(dataset)
    with_oct = [p for p in people if p["retinal_oct"] == "TRUE"]
    message = (
        f"2 of {len(with_oct)} labelled participants have no volume.*{losses[0]}.*"
        "set data.max_missing=2"
    )
    with pytest.raises(ValueError, match=message):
        ledger.check(book, 1)
    ledger.check(book, 2)


def test_the_table_for_csv_has_everybody(dataset, losses, read, tmp_path):
    book = read(dataset)
    files.write(tmp_path / "ledger.csv", files.csv_text(ledger.rows_for_csv(book)))
    rows = files.read_csv(tmp_path / "ledger.csv")
    assert len(rows) == len(tables(dataset)[0])
    assert sum(r["status"] == "missing" for r in rows) == 2


def test_a_participant_without_manifest_rows(dataset, read):
    people, _ = tables(dataset)
    victim = next(p["participant_id"] for p in people if p["retinal_oct"] == "TRUE")
    lines = content(dataset / MANIFEST).splitlines(True)
    kept = [line for line in lines if not line.startswith(victim)]
    edit(dataset / MANIFEST, lambda text: "".join(kept))
    missing = [(r.participant_id, r.reason) for r in read(dataset).missing()]
    assert missing == [(victim, "no row in the manifest")]


# --------------------------------------------------------------------------- odd ways to write it


def test_crlf_person_id_and_lower_case_flags(dataset, read):
    before = read(dataset)
    rename = lambda text: text.replace("participant_id", "person_id")
    crlf = lambda text: text.replace("\r\n", "\n").replace("\n", "\r\n")
    edit(dataset / LABELS, lambda text: crlf(rename(text).replace("TRUE", "true")))
    edit(dataset / MANIFEST, lambda text: rename(text).replace("\n", "\r\n"))
    after = read(dataset)
    assert (after.rows, after.samples, after.notes) == (before.rows, before.samples, before.notes)


def test_duplicates_and_strangers_in_the_manifest_are_noted(dataset, read):
    before, first = read(dataset), first_triton_line(dataset)
    stranger = first.replace(first.split("\t")[0], "9999")
    edit(dataset / MANIFEST, lambda text: text + first + stranger)
    after = read(dataset)
    assert after.samples == before.samples
    assert any("listed twice" in note for note in after.notes)
    assert any("9999" in note for note in after.notes)


def test_oddly_written_labels_lose_nobody(dataset, read):
    before = read(dataset)
    header = lambda text: text.replace("participant_id\t", "participant_id \t", 1)
    edit(dataset / LABELS, lambda text: header(text) + "\t" * 14 + "\n\n")
    assert read(dataset).samples == before.samples


def test_oddly_written_paths_are_the_same_file(dataset, read):
    before, first = read(dataset), first_triton_line(dataset)
    dots = first.replace("/retinal_oct/", "/./retinal_oct//")
    edit(dataset / MANIFEST, lambda text: text + dots + first.replace("/", "\\") + "\t" * 14 + "\n")
    after = read(dataset)
    assert after.samples == before.samples
    assert sum("listed twice" in note for note in after.notes) == 2


# --------------------------------------------------------------------------------- doubtful tables


def test_a_stray_quotation_mark_does_not_swallow_rows(dataset, read):
    lines = content(dataset / MANIFEST).splitlines(True)
    for i in (3, 8):
        lines[i] = lines[i].replace("\tOCT\t", '\t"OCT\t')
    (dataset / MANIFEST).write_text("".join(lines))
    with pytest.raises(ValueError, match="look for a stray quotation mark"):
        read(dataset)


def swap(name, replacement):
    return lambda text: text.replace(name, replacement, 1)


def second_row(change):
    """Adds a row for the first participant, changed."""
    return lambda text: text + change(text.splitlines(True)[1])


def another_split(row):
    if "\tval\t" in row:
        return row.replace("\tval\t", "\ttrain\t")
    return row.replace("\ttrain\t", "\ttest\t").replace("\ttest\t", "\tval\t")


def another_group(row):
    if "healthy" in row:
        return row.replace("healthy", "insulin_dependent")
    return row.replace(row.split("\t")[2], "healthy")


@pytest.mark.parametrize(
    "file, change, message",
    [
        (LABELS, swap("study_group", "group"), "has no column 'study_group'; found"),
        (LABELS, swap("participant_id", "pid"), "has no column 'participant_id or person_id'"),
        (LABELS, swap("recommended_split", "split"), "has no column 'recommended_split'"),
        (LABELS, swap("insulin_dependent", "type_3"), "unknown study_group 'type_3'"),
        (LABELS, swap("\ttrain\t", "\tholdout\t"), "unknown recommended_split 'holdout'"),
        (LABELS, second_row(another_split), "is in two splits"),
        (LABELS, second_row(another_group), "two rows that differ"),
        (
            LABELS,
            second_row(lambda row: row.replace("\t", ".0\t", 1)),
            "participants 1001, 1001.0 may be one, for their ids differ only in form",
        ),
        (
            LABELS,
            second_row(lambda row: row[row.index("\t") :]),
            "a row has no participant_id; fill it in, or remove the row",
        ),
        (LABELS, swap("\tage\t", "\tstudy_group\t"), "the column 'study_group' twice, as column 3"),
        (MANIFEST, swap("\tlaterality\t", "\tfilepath \t"), "the column 'filepath' twice"),
        (
            MANIFEST,
            swap("\tlaterality\t", "\tperson_id\t"),
            "columns 'participant_id' and 'person_id' mean the same and differ, first where one",
        ),
        (MANIFEST, swap("filepath", "file"), "has no column 'filepath'"),
        (
            MANIFEST,
            swap("/retinal_oct/structural_oct", "/../other"),
            "points outside the data folder",
        ),
        (
            MANIFEST,
            swap("/retinal_oct/structural_oct", "/retinal_oct/../../structural_oct"),
            "points outside the data folder",
        ),
    ],
)
def test_doubtful_tables_stop_with_a_sentence(dataset, read, file, change, message):
    edit(dataset / file, change)
    with pytest.raises(ValueError, match=message):
        read(dataset)


def test_a_file_listed_for_two_participants(dataset, read):
    _, manifest = tables(dataset)
    file_of = {m["participant_id"]: m["filepath"] for m in reversed(triton(manifest))}
    a, b = list(dict.fromkeys(m["participant_id"] for m in triton(manifest)))[:2]
    edit(dataset / MANIFEST, lambda text: text.replace(file_of[b], file_of[a]))
    with pytest.raises(ValueError, match="is listed for two participants"):
        read(dataset)


def test_an_empty_manifest(dataset, read):
    edit(dataset / MANIFEST, lambda text: text.splitlines(True)[0])
    message = "manifest.tsv has no row of a participant of participants.tsv"
    with pytest.raises(ValueError, match=message):
        read(dataset)


# ---------------------------------------------------------------------------- ids in another form


def written_as(form):
    """Changes the first cell of every row."""

    def change(text):
        header, *rows = text.splitlines(True)
        cells = [row.partition("\t") for row in rows]
        return header + "".join(form(pid) + tab + rest for pid, tab, rest in cells)

    return change


@pytest.mark.parametrize("form", ["{}.0", "0{}", "{},0", "{}.00"])
def test_ids_that_differ_in_form_alone_are_shown_side_by_side(dataset, read, form):
    edit(dataset / MANIFEST, written_as(form.format))
    pid = tables(dataset)[0][0]["participant_id"]
    message = (
        "has no row of a participant of participants.tsv; participants.tsv writes "
        f"'{pid}' and the manifest '{form.format(pid)}'; write both alike"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        read(dataset)


def test_ids_of_another_kind_are_shown_too(dataset, read):
    edit(dataset / MANIFEST, written_as("X-{}".format))
    with pytest.raises(ValueError, match="its first id is 'X-1001', theirs '1001'"):
        read(dataset)


@pytest.mark.parametrize("form", ["{} ", "\ufeff{}\xa0"])
def test_white_space_and_byte_order_marks_around_ids_are_nothing(dataset, read, form):
    before = read(dataset)
    edit(dataset / MANIFEST, written_as(form.format))
    assert read(dataset).samples == before.samples


def test_one_id_in_another_form_is_in_the_reason_and_in_the_note(dataset, read):
    victim = triton(tables(dataset)[1])[0]["participant_id"]
    edit(dataset / MANIFEST, written_as(lambda pid: f"{pid}.0" if pid == victim else pid))
    book = read(dataset)
    reason = f"no row in the manifest; it has '{victim}.0', write ids alike in both"
    assert [(r.participant_id, r.reason) for r in book.missing()] == [(victim, reason)]
    (note,) = [note for note in book.notes if "not in participants.tsv" in note]
    assert f"participants.tsv writes '{victim}' and the manifest '{victim}.0'" in note


# -------------------------------------------------------------------------------------------- ages


def with_age(age):
    def change(text):
        header, first, *rows = text.splitlines(True)
        cells = first.split("\t")
        cells[header.split("\t").index("age")] = age
        return "".join([header, "\t".join(cells), *rows])

    return change


@pytest.mark.parametrize(
    "age", ["inf", "-inf", "1e400", "-3", "45 years", "540", "45,5", "90+", "four"]
)
def test_what_is_no_age_is_named_with_its_participant(dataset, read, age):
    edit(dataset / LABELS, with_age(age))
    pid = tables(dataset)[0][0]["participant_id"]
    message = f"participants.tsv: participant {pid} has age '{age}'; write it as a number of years"
    with pytest.raises(ValueError, match=re.escape(message)):
        read(dataset)


@pytest.mark.parametrize(
    "age, known", [("", ""), ("NaN", ""), ("n/a", ""), (" 0", "0"), ("101.5 ", "101.5")]
)
def test_an_age_may_be_missing(dataset, read, age, known):
    edit(dataset / LABELS, with_age(age))
    assert read(dataset).rows[0].age == known


# ----------------------------------------------------------------------- content that files share


def two_of_one_and_two_of_others(samples):
    """Two samples of a participant, and one of each of two others."""
    pairs = ((a, b) for a in samples for b in samples if a is not b)
    a, b = next((a, b) for a, b in pairs if a.participant_id == b.participant_id)
    c = next(s for s in samples if s.participant_id != a.participant_id)
    known = (a.participant_id, c.participant_id)
    return a, b, c, next(s for s in samples if s.participant_id not in known)


def test_content_that_files_of_a_participant_share_is_used_once(dataset, read):
    before = read(dataset)
    a, b, *_ = two_of_one_and_two_of_others(before.samples)
    shutil.copyfile(a.path, b.path)
    book = read(dataset)
    assert {s.path for s in before.samples} - {s.path for s in book.samples} == {b.path}
    notes = [note for note in book.notes if f"participant {a.participant_id}" in note]
    assert any("same content" in note and "used once" in note for note in notes)


def test_content_that_participants_share_is_used_for_neither(dataset, read):
    before = read(dataset)
    *_, c, d = two_of_one_and_two_of_others(before.samples)
    shutil.copyfile(c.path, d.path)
    book = read(dataset)
    assert {s.path for s in before.samples} - {s.path for s in book.samples} == {c.path, d.path}
    reason = row_of(book, c.participant_id).reason
    assert "with content that participants " in reason and d.participant_id in reason


# ------------------------------------------------------------------------------ the ledger's
# command


def ledger_command(command, **options):
    return command("data.py", "--config", "configs/demo.yaml", **options)


def test_the_command_counts_by_split_class_and_site(written, command):
    result = ledger_command(command, root=written)
    assert result.returncode == 0, result.stderr
    assert all(site in result.stdout for site in ("UW", "UCSD", "UAB"))
    of_train = {"recommended_split": "train", "study_group": "healthy", "retinal_oct": "TRUE"}
    people, _ = tables(written)
    healthy = sum(all(p[key] == value for key, value in of_train.items()) for p in people)
    lines = result.stdout.splitlines()
    line = next(line for line in lines if line.startswith("train") and "healthy" in line)
    assert f"{healthy}/{healthy}" in line


def test_the_command_fails_when_somebody_is_missing(dataset, command):
    _, manifest = tables(dataset)
    victim = triton(manifest)[0]["participant_id"]
    for m in triton(manifest):
        if m["participant_id"] == victim:
            os.remove(str(dataset) + m["filepath"])
    result = ledger_command(command, root=dataset)
    assert result.returncode == 1 and f"missing: {victim}" in result.stdout
    assert result.stderr.startswith("error: 1 of ") and "Traceback" not in result.stderr


# ----------------------------------------------------------------------------------- from a bucket


@pytest.fixture()
def damaged_bucket(written, bucket, read):
    """A bucket in which people lack files, and files share their content -> server, the names of
    the objects of each participant, and the five participants concerned."""
    names = {}
    for sample in read(written).samples:
        name = PREFIX + os.path.relpath(sample.path, written)
        names.setdefault(sample.participant_id, []).append(name)
    gone, empty, twin, one, other = list(names)[:5]
    with bucket(written) as server:
        for name in names[gone]:
            server.remove(name)
        for name in names[empty]:
            server.put(name, b"")
        server.put(names[twin][1], server.objects[names[twin][0]].content)
        server.put(names[other][0], server.objects[names[one][0]].content)
        yield server, names, (gone, empty, twin, one, other)


def scans_fetched(server):
    return [r for r in server.requests if r[0] == "download" and r[1].endswith(".dcm")]


def test_the_command_tells_what_is_wrong_in_a_bucket(damaged_bucket, command, tmp_path):
    server, names, (gone, empty, twin, one, other) = damaged_bucket
    result = command("data.py", "--config", "configs/demo.yaml", *remote(tmp_path))
    assert result.returncode == 1
    assert "2 of " in result.stderr and "data.max_missing=2" in result.stderr
    assert f"missing: {gone} " in result.stdout
    assert f"{len(names[gone])} of {len(names[gone])} files absent" in result.stdout
    assert f"missing: {empty} " in result.stdout and "files empty" in result.stdout
    assert f"participant {twin}: " in result.stdout
    assert "has the same content as" in result.stdout
    both = ", ".join(sorted([one, other]))
    for pid in (one, other):
        line = f"1 of {len(names[pid])} files with content that participants {both} share: "
        assert f"participant {pid}: {line}" in result.stdout
    assert not scans_fetched(server)


def test_the_ledger_knows_the_bucket_without_a_volume(damaged_bucket, read, written, tmp_path):
    server, names, (gone, empty, twin, one, other) = damaged_bucket
    book = read(written, *remote(tmp_path))
    found = {PREFIX + os.path.relpath(s.path, ROOT_URL) for s in book.samples}
    expected = {name for pid in names if pid not in (gone, empty) for name in names[pid]}
    assert found == expected - {names[twin][1], names[one][0], names[other][0]}
    assert not scans_fetched(server)


# -------------------------------------------------------------------------- paths of another form


@pytest.mark.parametrize("form", ["{folder}/{name}", "{folder}/{pid}/more/{name}"])
def test_a_path_that_does_not_end_in_scanner_participant_file_is_named(dataset, read, form):
    line = first_triton_line(dataset)
    pid, path = line.split("\t")[0], next(c for c in line.split("\t") if c.endswith(".dcm"))
    folder, name = path.rsplit(f"/{pid}/", 1)
    other = form.format(folder=folder, name=name, pid=pid)
    edit(dataset / MANIFEST, lambda text: text.replace(path, other))
    total = len(triton(tables(dataset)[1]))
    book = read(dataset)
    (note,) = [note for note in book.notes if "does not end in scanner/participant/file" in note]
    assert note.startswith("1 rows of the manifest") and f"participant {pid}: {other}" in note
    assert len(book.samples) == total - 1


# --------------------------------------------------------------------------------- data.checksums


def checksums_of(root, path):
    lines = []
    for row in triton(tables(root)[1]):
        content = read_bytes(f"{root}{row['filepath']}")
        lines.append(f"{hashlib.sha256(content).hexdigest()}  .{row['filepath']}\n")
    path.write_text("".join(lines))


def test_volumes_are_verified_by_a_list_of_checksums(dataset, command, tmp_path):
    """Also one that was cached before there was a list, and was changed since it was made."""
    sums, check = tmp_path / "sums", ["--deep", "--config", "configs/demo.yaml"]
    checksums_of(dataset, sums)
    done = command("data.py", *check, f"data.checksums={sums}", root=dataset)
    assert done.returncode == 0, done.stderr
    row = triton(tables(dataset)[1])[0]
    path = f"{dataset}{row['filepath']}"
    content = bytearray(read_bytes(path))
    content[-100] ^= 1  # of a raw pixel, or of a codestream: no reader need notice
    write_bytes(path, content)
    for _ in range(2):
        done = command("data.py", *check, f"data.checksums={sums}", root=dataset)
        assert done.returncode == 1
        assert f"{path} has sha256:" in done.stdout and "data.checksums says sha256:" in done.stdout


def test_volumes_that_are_not_listed_are_noted_and_bad_lists_refused(dataset, read, tmp_path):
    sums = tmp_path / "sums"
    checksums_of(dataset, sums)
    sums.write_text("".join(content(sums).splitlines(True)[2:]))
    (note,) = read(dataset, f"data.checksums={sums}").notes
    assert note.startswith("2 volumes are not in data.checksums")
    sums.write_text("hello\n")
    with pytest.raises(ValueError, match="line 1 is not what sha256sum writes"):
        read(dataset, f"data.checksums={sums}")
