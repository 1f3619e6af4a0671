"""Damaged files of every kind that octprobe reads: the right result or one sentence, within ten
seconds and a gigabyte; never another exception, a hang or the end of the process.

Encoder files and run folders have their own in test_fuzz_encoder.py and test_results.py.
"""

import contextlib
import logging
import multiprocessing
import random
import resource
import signal
import warnings

import numpy as np
import pytest
from helpers import DEMO, PROBE, read_bytes, smooth_volume, write_bytes, write_dicom
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from writers import (
    WRITERS,
    ZEISS,
    coded_fda,
    codes_of,
    e2e_file,
    fda_file,
    folder_of,
    jpeg2000,
    pictures,
    raw_fda,
    reflectivities,
    series,
    vol_file,
)

import config
import ledger
import volumes

pytestmark = pytest.mark.slow


def mutated(content, chance):
    """One of seven kinds of damage to bytes, drawn by a random.Random."""
    content, size = bytearray(content), len(content)
    at, other = chance.randrange(size), chance.randrange(size)
    length = min(size - max(at, other), chance.choice([1, 2, 4, 8, 64, 1024]))
    kind = chance.randrange(7)
    if kind == 0:  # flipped bits
        for _ in range(chance.choice([1, 3, 30])):
            content[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif kind == 1:  # other bytes, mostly where headers are
        for _ in range(chance.choice([1, 3, 30])):
            content[chance.randrange(min(size, 2000))] = chance.choice([0, 1, 127, 128, 255])
    elif kind == 2:
        del content[at:]
    elif kind == 3:
        del content[at : at + length]
    elif kind == 4:  # a piece twice
        content[at:at] = content[other : other + length]
    elif kind == 5:  # two pieces exchanged
        a, b = content[at : at + length], content[other : other + length]
        content[at : at + length], content[other : other + length] = b, a
    else:
        content[at : at + length] = chance.randbytes(length)
    return bytes(content)


def outcomes(job, seeds, results):
    """In a process of its own: job(seed) for all seeds -> their outcomes, one more put each."""
    grown = resource.getrlimit(resource.RLIMIT_AS)[1]
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, grown))

    def too_long(*_):
        raise TimeoutError("ten seconds have passed")

    signal.signal(signal.SIGALRM, too_long)
    for seed in seeds:
        signal.alarm(10)
        try:
            job(seed)
            found = "read"
        except TimeoutError as error:
            found = f"{type(error).__name__}: {error}"
        except ValueError as error:
            text = str(error)
            found = (
                "refused" if len(text) < 2000 and "\n" not in text else f"too long: {text[:300]}"
            )
        except BaseException as error:  # whatever it is, it is a finding
            found = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        results.put((seed, found))
    results.put(None)


def fuzz(job, count):
    """{outcome: number}. Asserts that every case is read or refused."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=outcomes, args=(job, range(count), results))
    child.start()
    found = []
    while child.is_alive() or not results.empty():
        if results.empty():
            child.join(0.1)
            continue
        outcome = results.get()
        if outcome is None:
            break
        found.append(outcome)
    child.join()
    assert child.exitcode == 0 and len(found) == count, f"ended after seed {found[-1:]}"
    odd = [(seed, outcome) for seed, outcome in found if outcome not in ("read", "refused")]
    assert not odd, odd[:5]
    return [outcome for _, outcome in found]


SYNTAXES = [
    ExplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.name)
def test_damaged_volumes(tmp_path, syntax):
    content = read_bytes(write_dicom(tmp_path / "a.dcm", smooth_volume(12, 40, 44), syntax))

    def job(seed):
        warnings.simplefilter("ignore")
        write_bytes(tmp_path / "b.dcm", mutated(content, random.Random(seed)))
        array, _ = volumes.decode(str(tmp_path / "b.dcm"), (8, 32, 32))
        assert array.shape == (8, 32, 32) and np.isfinite(array).all()

    found = fuzz(job, 300)
    assert 30 < found.count("refused") < 300


# the files of folders and zips are damaged one at a time
SINGLE = [
    write
    for write in WRITERS
    if write.__name__ not in ("write_pngs", "write_tiffs", "write_series")
]
DEVICES = {
    "a.vol": lambda volume: vol_file(reflectivities(volume)),
    "a.e2e": lambda volume: e2e_file({7: ("1001", "L", codes_of(volume))}),
    "a.fda": lambda volume: fda_file(coded_fda(volume, jpeg2000)),
    "b.fda": lambda volume: fda_file(raw_fda(volume)),
    ZEISS: lambda volume: volume.tobytes(),
}


def damaged_file(path, content):
    """A job for fuzz: the file at path, damaged, is decoded."""

    def job(seed):
        warnings.simplefilter("ignore")
        logging.disable()
        write_bytes(path, mutated(content, random.Random(seed)))
        array, _ = volumes.decode(str(path), (8, 16, 16))
        assert array.shape == (8, 16, 16) and np.isfinite(array).all()

    return job


@pytest.mark.parametrize("write", SINGLE, ids=lambda write: write.__name__[6:])
def test_damaged_files_of_other_formats(tmp_path, write):
    path = write(tmp_path, smooth_volume(20, 24, 30))
    found = fuzz(damaged_file(path, read_bytes(path)), 300)
    assert 10 < found.count("refused") <= 300


@pytest.mark.parametrize("name", DEVICES)
def test_damaged_files_of_scanners(tmp_path, name):
    content = DEVICES[name](smooth_volume(20, 24, 30))
    found = fuzz(damaged_file(tmp_path / name, content), 300)
    assert 10 < found.count("refused") <= 300


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "DICOM"])
def test_a_damaged_file_in_a_folder(tmp_path, kind):
    volume = smooth_volume(8, 24, 30)
    files = series(volume) if kind == "DICOM" else pictures(volume, kind, kind.lower())
    path, name = folder_of(tmp_path / "f", files), sorted(files)[2]
    job = damaged_file(path / name, files[name])

    def of_folder(seed):
        with contextlib.suppress(volumes.Unreadable):
            job(seed)  # the file alone, which is no volume
        array, _ = volumes.decode(str(path), (8, 16, 16))
        assert array.shape == (8, 16, 16) and np.isfinite(array).all()

    found = fuzz(of_folder, 300)
    assert 10 < found.count("refused") <= 300


@pytest.mark.parametrize("name", ["participants.tsv", "retinal_oct/manifest.tsv"])
def test_damaged_tables(dataset, tmp_path, configure, name):
    """A table that is read names only labels, splits and participants that the right one has."""
    cfg = configure(dataset)
    content, right = read_bytes(dataset / name), ledger.read(cfg)
    allowed = {(row.participant_id, row.label, row.split) for row in right.rows}
    differ = multiprocessing.get_context("fork").Value("i", 0)

    def job(seed):
        write_bytes(dataset / name, mutated(content, random.Random(seed)))
        try:
            book = ledger.read(cfg)
            ledger.check(book, 10**6)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        rows = {(row.participant_id, row.label, row.split) for row in book.rows}
        differ.value += bool(rows - allowed)

    found = fuzz(job, 300)
    assert found.count("refused") > 30
    # damage that makes another valid id or another valid word cannot be noticed in a text
    assert differ.value < 20


def test_damaged_configurations(tmp_path):
    content = read_bytes(PROBE).replace(b"base: base.yaml", b"") + b"\n" + read_bytes(DEMO)

    def job(seed):
        chance = random.Random(seed)
        text = read_bytes(DEMO) if chance.random() < 0.5 else content
        text = text.replace(b"base: probe.yaml", f"base: {PROBE}".encode())
        write_bytes(tmp_path / "a.yaml", mutated(text, chance))
        try:
            config.load(tmp_path / "a.yaml")
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error

    found = fuzz(job, 500)
    assert found.count("refused") > 100
