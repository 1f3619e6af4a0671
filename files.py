"""Every file that the project writes: whole or not at all. Locks, hashes, CSV and TSV tables.

    write("a.jsonl", text)                            # text, bytes, or a function that writes
    with locked("cache/locks/x", stop) as file: ...   # one holder on this host at a time
    table = read_table("a.tsv")                       # TSV or CSV -> Table: its header and rows
    rows = read_csv("a.csv", ["id"], "train again")   # dicts of a file that a run left, and
    found = read_json("a.json", "train again")        # what to do about it; a dict
    write("a.csv", csv_text([["id", "y"], [17, 0]]))  # the first row is the header
    save_array("cache/a.npy", array)                  # with its checksum
    array = load_array("cache/a.npy", dtype, shape)   # None where it is missing or damaged

A file appears under its name when all of it is written: a reader sees all of it or nothing.
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# of a file that a run left and that is read whole; most have some hundred kB
MOST_BYTES = 64 << 20
FORMULA = re.compile(r"'*[=+\-@\t\r].", re.DOTALL)  # how a text begins that a spreadsheet computes

# what operating systems and DICOM writers leave in a folder, beside the files of a volume
IGNORED = re.compile(r"\..*|Thumbs\.db|desktop\.ini|__MACOSX|DICOMDIR", re.IGNORECASE | re.DOTALL)

FORBIDDEN = errno.EACCES, errno.EROFS, errno.EPERM
FORBIDDEN_REMEDY = (
    "; allow this user to write there, or set paths.cache_dir and paths.run_dir to folders of "
    "your own"
)


class Stopped(Exception):
    """The caller has set its `stop` event and waits for nothing more."""


# ------------------------------------------------------------------------------------------ writing


def write(path, data):
    """Write bytes or text to path: to a temporary name first, then moved, so that a reader sees
    all of it or nothing.

    data may be a function that writes to the open file it is given, for what should not lie in
    memory a second time. OSError naming the path, and what to do when the disk is full.
    """
    path = str(path)
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as f:
            if callable(data):
                data(f)
            else:
                f.write(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as raised:
        # torch.save hides the disk's error in a RuntimeError of its own
        error = raised if isinstance(raised, OSError) else raised.__context__
        if not isinstance(error, OSError):
            raise
        reason = error.strerror
        if error.errno == errno.ENOSPC:
            reason = (
                "no space left on the disk; make room, or set paths.cache_dir and paths.run_dir to "
                "another one"
            )
        elif error.errno in FORBIDDEN:
            reason += FORBIDDEN_REMEDY
        raise OSError(error.errno, f"not written: {reason}", path) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_abandoned(folder, age):
    """Remove the temporary files that killed writers left in a folder: those that nobody has
    touched for `age` seconds."""
    if not os.access(folder, os.W_OK):
        return  # it is for reading alone
    for path in Path(folder).glob("*.part"):
        # not found: its writer has just finished, or another process removed it first
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink()


def size_of(folder):
    """Bytes of the files in a folder."""
    total = 0
    for path in Path(folder).glob("*"):
        # not found: another process has just removed it
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def local_folder(path, key, must_write=True):
    """Path of a folder to write to, with ~ expanded; it need not exist. ValueError naming the
    config key when it cannot be written. must_write=False: one that exists may be for reading
    alone, as a cache that holds everything may be; what is written there all the same fails."""
    if "://" in str(path):
        raise ValueError(
            f"{key}={path}: results and caches are written to a local folder; set {key} to one"
        )
    path = os.path.expanduser(str(path))
    parent = os.path.abspath(path)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    may_write = os.access(parent, os.W_OK) or (parent == os.path.abspath(path) and not must_write)
    if not os.path.isdir(parent) or not may_write:
        raise ValueError(
            f"{key}={path} cannot be written, for {parent} cannot; set {key} to another one"
        )
    return path


# --------------------------------------------------------------------------------- locks and hashes


@contextlib.contextmanager
def what_to_do():
    """Within, an OSError about what this user may not write says what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in FORBIDDEN:
            error.strerror += FORBIDDEN_REMEDY
        raise


@contextlib.contextmanager
def locked(path, stop=None):
    """The file path, open for reading and appending, held alone among all threads and processes
    of this host. Stopped when the event `stop` is set while waiting.

    The holder may remove or rename the file. The lock of a process that is killed is free.
    """
    stop = stop or threading.Event()
    for tries in itertools.count(1):
        with what_to_do():
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            # unbuffered: on a full disk, closing would fail too
            opened = open(path, "a+b", buffering=0)  # noqa: SIM115
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except (BlockingIOError, FileNotFoundError):
                is_ours = False  # another holds it, or its last holder removed or renamed it
            if is_ours:
                yield file
                return
        if tries == 600:  # after 30 s
            say(f"waiting for another thread or process that holds {path}")
        if stop.wait(0.05):
            raise Stopped


def say(text):
    """Print a line to stderr, above progress lines."""
    from tqdm import tqdm  # here, so that the mathematics, which imports this file, needs no tqdm

    tqdm.write(text, file=sys.stderr)


def members(folder):
    """Names in a folder, sorted, without what systems leave there unasked (IGNORED)."""
    return sorted(name for name in os.listdir(folder) if not IGNORED.fullmatch(name))


def contents(path):
    """[(name, path)] of the files that make up a volume: those directly in a folder, or the file
    itself, whose name is "" then."""
    if not os.path.isdir(path):
        return [("", path)]
    inside = [(name, os.path.join(path, name)) for name in members(path)]
    return [(name, file) for name, file in inside if os.path.isfile(file)]


def bytes_of(path):
    """Bytes of a file, or of all files directly in a folder."""
    return sum(os.path.getsize(file) for _, file in contents(path))


def first_bytes(path, count=4096):
    """The first bytes of a file; of a folder, those of its first file."""
    found = contents(path)
    if not found:
        return b""
    with open(found[0][1], "rb") as f:
        return f.read(count)


def identity(path):
    """A text that changes when anything touches the file, or a file of the folder."""
    parts = []
    for name, file in contents(path):
        stat = os.stat(file)
        parts.append(f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}".lstrip())
    return " ".join([os.path.abspath(path), *parts])


def checksum(path, name):
    """Checksum of a file's content as "name:hex"; name as hashlib knows it. Of a folder, the
    checksum of a list of its files' names and checksums."""
    if os.path.isdir(path):
        listed = "\n".join(f"{checksum(file, name)} {inside}" for inside, file in contents(path))
        return f"{name}:{hashlib.new(name, os.fsencode(listed)).hexdigest()}"
    with open(path, "rb") as f:
        return f"{name}:{hashlib.file_digest(f, name).hexdigest()}"


def sha256(path):
    """SHA-256 of a file's content, in hex."""
    return checksum(path, "sha256").split(":")[1]


def hashed(text):
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------- tables and arrays


@dataclass
class Table:
    """A table of texts. name: what messages call it, short: the same within a sentence."""

    name: str
    short: str
    header: list
    rows: list  # {column: cell}


def read_table(path, name=None, short=None):
    """Text file with a header, its cells parted by tabs, commas or semicolons -> Table. ValueError
    naming the file, and what is wrong."""
    name = str(name or path)
    with open(path, "rb") as f:
        if f.read(4) == b"PK\3\4":
            raise ValueError(f"{name} is an Excel or zip file; save it as CSV in UTF-8")
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            lines = [line for line in f if cleaned(line)]
        is_said = re.fullmatch(r"sep=(.)\s*", lines[0]) if lines else None  # Excel's own first line
        lines = lines[1:] if is_said else lines
        delimiter = is_said[1] if is_said else delimiter_of(lines[0] if lines else "")
        reader = csv.reader(lines, delimiter=delimiter)
        header = [cleaned(cell) for cell in next(reader, [])]
        table = [cells for cells in reader if any(cleaned(cell) for cell in cells)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{name} is not a table in UTF-8, save it as one: {error}") from error
    if not header:
        raise ValueError(f"{name} is empty")
    check_header(header, name)
    for cells in table:  # a stray quotation mark joins cells and swallows rows
        if len(cells) != len(header) or any("\n" in cell or "\t" in cell for cell in cells):
            raise ValueError(
                f"{name}: the row that begins with '{cells[0][:40]}' does not have {len(header)} "
                f"cells as the header has, parted by {DELIMITERS.get(delimiter, delimiter)}, or "
                "has a cell of several lines; look for a stray quotation mark or delimiter there"
            )
    rows = [dict(zip(header, map(cleaned, cells))) for cells in table]
    return Table(name, short or name, header, rows)


DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons"}


def delimiter_of(header):
    """What parts the cells of a line: that which makes most of it; a tab where there is none."""
    return max(DELIMITERS, key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))


def merge_spellings(table, spellings, key):
    """Give a column of a Table the first of its accepted spellings as its name. ValueError where
    none is there, or two differ. key: what in the configuration lists them."""
    present = [s for s in spellings if s in table.header]
    if not present:
        raise ValueError(
            f"{table.name} has no column '{' or '.join(spellings)}'; found "
            f"{', '.join(table.header)}; name the right one with {key}"
        )
    for row in table.rows:
        value, *others = [row.pop(spelling) for spelling in present]
        for spelling, other in zip(present[1:], others):
            if other != value:
                raise ValueError(
                    f"{table.name}: columns '{present[0]}' and '{spelling}' mean the same and "
                    f"differ, first where one has '{value}' and the other '{other}'; remove or "
                    "rename the wrong one"
                )
        row[spellings[0]] = value
    table.header = [spellings[0], *(c for c in table.header if c not in spellings)]


def cleaned(cell):
    """A cell without the white space around it, and without the byte-order mark that stands within
    a file that was put together from several."""
    return cell.replace("\ufeff", "").strip()


def check_header(header, name):
    """ValueError where a column is there twice: nobody could say which one is meant."""
    for i, column in enumerate(header):
        if column and column in header[:i]:
            raise ValueError(
                f"{name} has the column '{column}' twice, as column {header.index(column) + 1} and "
                f"as column {i + 1}; remove or rename one of them"
            )


def content_of(path, remedy):
    """The bytes of a file that a run left. ValueError, with what to do, where it is none that a
    run can have left."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"{path} is not a file; {remedy}")
    with open(path, "rb") as f:
        content = f.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} is damaged (it has more than {MOST_BYTES >> 20} MB); {remedy}")
    return content


def read_csv(path, columns=(), remedy="write it anew"):
    """CSV file with a header, as csv_text makes it -> list of dicts of texts. ValueError naming the
    file, and what to do, where it is no such table, or lacks one of the columns."""
    try:
        text = content_of(path, remedy).decode()
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows, header = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV table in UTF-8: {error}; {remedy}") from error
    missing = [column for column in columns if column not in header]
    if missing:
        raise ValueError(f"{path} has no column {first_few(missing)}; {remedy}")
    if len(set(header)) < len(header):
        raise ValueError(f"{path} has a column twice; {remedy}")
    for row in rows:
        if None in row or None in row.values():
            first = str(next(iter(row.values())))[:40]
            raise ValueError(
                f"{path}: the row that begins with '{first}' does not have {len(header)} cells as "
                f"the header has; {remedy}"
            )
    return [{name: unguarded(cell) for name, cell in row.items()} for row in rows]


def read_json(path, remedy):
    """The dict in a JSON file. ValueError, with what to do, where it holds none."""
    return json_object(content_of(path, remedy), path, remedy)


def json_object(text, path, remedy):
    """The dict that a JSON text holds, of finite numbers. ValueError, with its file and what to do,
    where it holds none."""
    try:
        found = json.loads(text, parse_float=finite, parse_constant=finite)
        check_depth(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object); {remedy}")
    return found


def finite(text):
    """A number of JSON. ValueError for NaN, Infinity and 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def check_depth(value, most=50):
    """ValueError where JSON is nested deeper than any of ours: whoever walks it would fail."""
    level = [value]
    for _ in range(most):
        nested = [v for v in level if isinstance(v, dict | list)]
        inner = [v.values() if isinstance(v, dict) else v for v in nested]
        level = list(itertools.chain.from_iterable(inner))
    if level:
        raise ValueError(f"more than {most} brackets within each other")


def csv_text(rows):
    """Rows, each a list of cells and the first of them the header -> the text of a CSV file. A text
    that a spreadsheet would compute, as "=1+1", stands there behind an apostrophe, which read_csv
    takes off."""
    guarded = lambda cell: f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([guarded(cell) for cell in row] for row in rows)
    return out.getvalue()


def unguarded(cell):
    """A cell as it was given to csv_text."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell[1:]) else cell


def first_few(names, most=5):
    """Names -> "a, b, c and 7 more", for a message."""
    names = [str(n) for n in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def save_array(path, array):
    """Write an array as .npy, followed by the SHA-1 of that; np.load ignores what follows."""
    out = io.BytesIO()
    np.save(out, array)
    out.write(hashlib.sha1(out.getbuffer()).digest())
    write(path, out.getbuffer())


def load_array(path, dtype, shape):
    """The array that save_array wrote to path. None where there is none, or one that is damaged or
    of another dtype or shape: it is then removed, to be made again."""
    try:
        with open(path, "rb") as f:
            content = f.read()
    except FileNotFoundError:
        return None
    if hashlib.sha1(memoryview(content)[:-20]).digest() == content[-20:]:
        array = np.load(io.BytesIO(content))
        if array.dtype == dtype and array.shape == tuple(shape):
            return array
    say(f"cache file {path} is damaged; making it anew")
    Path(path).unlink(missing_ok=True)  # missing: another process noticed too
    return None


def load_json(path):
    """What a JSON file holds; None where there is none, or one that is damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (FileNotFoundError, ValueError, RecursionError):  # a power cut can cut it short
        return None
