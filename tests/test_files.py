import csv
import errno
import hashlib
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import ROOT, content, read_bytes, write_bytes

import files

# ----------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    "data", ["text ü", "text ü".encode(), lambda f: f.write("text ü".encode())]
)
def test_write_takes_text_bytes_or_a_function(tmp_path, data):
    files.write(tmp_path / "new" / "folder" / "a.txt", data)
    assert (tmp_path / "new" / "folder" / "a.txt").read_text(encoding="utf-8") == "text ü"


def test_a_file_that_is_written_again_is_whole_at_every_moment(tmp_path):
    path, seen = tmp_path / "a.txt", []
    files.write(path, "before")

    def halfway(f):
        f.write(b"after, the first half")
        seen.append(path.read_text())
        f.write(b" and the second")

    files.write(path, halfway)
    assert seen == ["before"] and path.read_text() == "after, the first half and the second"
    assert os.listdir(tmp_path) == ["a.txt"]


def raises_mine(f):
    f.write(b"a beginning")
    raise RuntimeError("mine")


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    files.write(tmp_path / "x", "before")
    with pytest.raises(RuntimeError, match="mine"):  # not the disk's
        files.write(tmp_path / "x", raises_mine)
    assert os.listdir(tmp_path) == ["x"] and content(tmp_path / "x") == "before"


def raises_full(f):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_says_what_to_do(tmp_path):
    message = "not written: no space left on the disk; make room, or set paths.cache_dir and"
    with pytest.raises(OSError, match=message) as error:
        files.write(tmp_path / "x", raises_full)
    assert error.value.filename == str(tmp_path / "x") and os.listdir(tmp_path) == []


def test_a_full_disk_under_a_large_checkpoint_is_one_sentence(tmp_path):
    """torch.save hides the disk's error in a RuntimeError of its own."""
    code = f"""if True:
        import resource, signal, torch, files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        checkpoint = {{"a": torch.zeros(100_000)}}
        files.write("{tmp_path}/last.pt", lambda f: torch.save(checkpoint, f))
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "OSError: [Errno 27] not written: File too large" in done.stderr
    assert os.listdir(tmp_path) == []


def test_only_old_temporary_files_are_removed(tmp_path):
    for name, age in (("old.npy.0.part", 100), ("young.npy.1.part", 0), ("old.npy", 100)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    files.remove_abandoned(tmp_path, 60)
    assert sorted(os.listdir(tmp_path)) == ["old.npy", "young.npy.1.part"]


def test_nothing_is_removed_from_a_folder_that_is_not_there(tmp_path):
    files.remove_abandoned(tmp_path / "none", 0)


def test_a_local_folder_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.local_folder("~/new/cache", "paths.cache_dir") == f"{tmp_path}/new/cache"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "path, message",
    [
        ("b2://bucket/cache", "paths.cache_dir=b2://bucket/cache: results and caches are written"),
        ("{tmp_path}/file/cache", "paths.cache_dir=.*/file/cache cannot be written, for .*/file"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        files.local_folder(path.format(tmp_path=tmp_path), "paths.cache_dir")


# ------------------------------------------------------------------------------- locks and hashes


def test_a_lock_has_one_holder(tmp_path):
    inside, most = [], []

    def work():
        with files.locked(tmp_path / "locks" / "x"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_a_lock_that_its_holder_removes_is_taken_anew(tmp_path):
    path, order = tmp_path / "x", []

    def wait():
        with files.locked(path) as file:
            order.append("second")
            assert os.path.samestat(os.fstat(file.fileno()), os.stat(path))

    with files.locked(path):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
        os.remove(path)
    thread.join(10)
    assert order == ["first", "second"]


def test_whoever_waits_for_a_lock_can_be_stopped(tmp_path):
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    path = tmp_path / "x"
    with files.locked(path), pytest.raises(files.Stopped), files.locked(path, stop):
        pass


def test_checksums(tmp_path):
    write_bytes(tmp_path / "x", b"content")
    assert files.checksum(tmp_path / "x", "sha1") == "sha1:" + hashlib.sha1(b"content").hexdigest()
    assert files.sha256(tmp_path / "x") == hashlib.sha256(b"content").hexdigest()


# ------------------------------------------------------------------------------------------ tables


def read(path, columns, name=None):
    """The rows of a table that must have these columns, each a name or several spellings."""
    table = files.read_table(path, name)
    for column in columns:
        spellings = [column] if isinstance(column, str) else column
        files.merge_spellings(table, spellings, "data.columns.x")
    return table.rows


def test_read_table_takes_any_spelling_of_a_column(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfperson_id \tage\r\n 17 \t40\r\n\t\r\n")
    columns = [("participant_id", "person_id"), "age"]
    (row,) = read(tmp_path / "a.tsv", columns)  # blank rows do not count
    assert (row["participant_id"], row["age"]) == ("17", "40")


def test_read_table_cleans_every_cell(tmp_path):
    """Also those of columns that nobody asked for, and where two files were put together."""
    data = "\ufeffc\t age\t\t\n1 \t 40 \tx\ty\n\ufeff 2\t\xa041\t\t\n".encode()
    write_bytes(tmp_path / "a.tsv", data)
    rows = read(tmp_path / "a.tsv", ["c"])  # two header cells are empty: that is no name
    assert [(row["c"], row["age"]) for row in rows] == [("1", "40"), ("2", "41")]


def test_read_table_takes_two_spellings_that_say_the_same(tmp_path):
    write_bytes(tmp_path / "a.tsv", b"d\tc\te\n17 \t17\tx\n18\t 18\ty\n")
    rows = read(tmp_path / "a.tsv", [("c", "d")])
    assert rows == [{"c": "17", "e": "x"}, {"c": "18", "e": "y"}]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"c\te\tc\n1\t2\t1\n", "table has the column 'c' twice, as column 1 and as column 3"),
        (b"c\te \t e\n1\t2\t2\n", "table has the column 'e' twice, as column 2 and as column 3"),
        (
            b"\xef\xbb\xbfc\te\t\xef\xbb\xbfc\n1\t2\t3\n",
            "table has the column 'c' twice, as column 1 and",
        ),
        (
            b"d\tc\n1\t1\n2\t3\n4\t5\n",
            "columns 'c' and 'd' mean the same and differ, first where one has '3' and the other "
            "'2'; remove or rename",
        ),
        (b"c\td\n1\t\n", "'c' and 'd' mean .* one has '1' and the other ''"),
        (
            b"a,b\n1,2\n",
            "has no column 'c or d'; found a, b; name the right one with data.columns.x",
        ),
        ("c\n1\n".encode("utf-16"), "is not a table in UTF-8, save it as one"),
        (b"a\tb\n1\t2\n", "table has no column 'c or d'; found a, b"),
        (b"", "table is empty"),
        (b"\n \n", "table is empty"),
        (b"PK\3\4abc", "table is an Excel or zip file; save it as CSV in UTF-8"),
        (b"c\n\xe4\n", "table is not a table in UTF-8"),
        (b"c\te\n1\n", "table: the row that begins with '1' does not have 2 cells"),
        (b'c\te\n1\t"2\n3\t4"\n', "look for a stray quotation mark or delimiter"),
    ],
)
def test_read_table_says_what_is_wrong(tmp_path, data, message):
    write_bytes(tmp_path / "a.tsv", data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.tsv", [("c", "d")], "table")


def test_csv_text_is_read_back(tmp_path):
    rows = [["id", "reason"], [17, 'a, "b"\nand c'], [18, ""]]
    files.write(tmp_path / "a.csv", files.csv_text(rows))
    assert files.read_csv(tmp_path / "a.csv") == [
        {"id": "17", "reason": 'a, "b"\nand c'},
        {"id": "18", "reason": ""},
    ]
    with open(tmp_path / "a.csv", newline="") as f:
        assert list(csv.reader(f)) == [[str(cell) for cell in row] for row in rows]


FORMULAS = ["=cmd|' /C calc'!A0", "+1", "-5", "@sum(1)", "\t=1", "'=1", "''+1"]
NO_FORMULAS = ["'tis", "'", "-", "a=1", ""]


def test_no_cell_is_a_formula_and_all_are_read_back(tmp_path):
    rows = [["id", "n"], *([text, n] for n, text in enumerate(FORMULAS + NO_FORMULAS))]
    files.write(tmp_path / "a.csv", files.csv_text(rows))
    with open(tmp_path / "a.csv", newline="") as f:
        cells = [row[0] for row in list(csv.reader(f))[1:]]
    assert cells == [*(f"'{text}" for text in FORMULAS), *NO_FORMULAS]
    assert [row["id"] for row in files.read_csv(tmp_path / "a.csv")] == FORMULAS + NO_FORMULAS


def test_numbers_stay_numbers():
    assert files.csv_text([["p"], [-0.5], [0.25]]) == "p\n-0.5\n0.25\n"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "a.csv has no column id, y"),
        (b"id,y,y\n1,2,3\n", "a.csv has a column twice; write it anew"),
        (b"id\n1\n", "a.csv has no column y"),
        (b"id,y\n1,2\n3\n", "a.csv: the row that begins with '3' does not have 2 cells"),
        (b"id,y\n1,2,3\n", "a.csv: the row that begins with '1' does not have 2 cells"),
        (b"id,y\n\xff,2\n", "a.csv is not a CSV table in UTF-8"),
    ],
)
def test_read_csv_says_what_is_wrong(tmp_path, data, message):
    write_bytes(tmp_path / "a.csv", data)
    with pytest.raises(ValueError, match=message):
        files.read_csv(tmp_path / "a.csv", ["id", "y"])


def test_a_json_object():
    assert files.json_object(b'{"a": 1}', "a.json", "remove it") == {"a": 1}
    numbers = b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}"
    brackets = b"[" * 100_000, b'{"a": ' * 100_000, b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}"
    for text in (b"", b"[1]", b"null", b"\xff", *numbers, *brackets):
        with pytest.raises(ValueError, match=r"a.json is damaged \(.*\); remove it"):
            files.json_object(text, "a.json", "remove it")


def test_what_no_run_has_left_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 1 << 20)
    write_bytes(tmp_path / "large.json", b" " * (2 << 20))
    os.mkfifo(tmp_path / "pipe.json")
    for name, message in (("large", r"damaged \(it has more than 1 MB"), ("pipe", "not a file")):
        with pytest.raises(ValueError, match=f"{name}.json is {message}.*; train again"):
            files.read_json(tmp_path / f"{name}.json", "train again")


def test_first_few():
    assert files.first_few([]) == ""
    assert files.first_few([1, 2]) == "1, 2"
    assert files.first_few(range(12)) == "0, 1, 2, 3, 4 and 7 more"
    assert files.first_few("abc", 2) == "a, b and 1 more"


# ------------------------------------------------------------------------------------------ arrays


@pytest.fixture()
def array():
    return np.arange(60, dtype=np.float16).reshape(3, 4, 5)


def test_an_array_is_read_back(tmp_path, array):
    files.save_array(tmp_path / "a.npy", array)
    assert np.array_equal(files.load_array(tmp_path / "a.npy", np.float16, (3, 4, 5)), array)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)  # numpy ignores the checksum


def test_an_array_that_is_not_there(tmp_path, capsys):
    assert files.load_array(tmp_path / "none.npy", np.float16, (3, 4, 5)) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[:-1], lambda c: b"", lambda c: c[:90] + b"x" + c[91:], lambda c: c + b"x"],
    ids=["cut", "empty", "changed", "longer"],
)
def test_a_damaged_array_is_removed_to_be_made_again(tmp_path, array, damage, capsys):
    path = tmp_path / "a.npy"
    files.save_array(path, array)
    write_bytes(path, damage(read_bytes(path)))
    assert files.load_array(path, np.float16, (3, 4, 5)) is None and not path.exists()
    assert f"cache file {path} is damaged; making it anew" in capsys.readouterr().err


@pytest.mark.parametrize("dtype, shape", [(np.float32, (3, 4, 5)), (np.float16, (5, 4, 3))])
def test_an_array_of_another_kind_is_removed_to_be_made_again(tmp_path, array, dtype, shape):
    files.save_array(tmp_path / "a.npy", array)
    assert files.load_array(tmp_path / "a.npy", dtype, shape) is None
    assert os.listdir(tmp_path) == []
