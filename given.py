"""features.npz: features that another program made, or another run, read in place of an encoder.

    found = read(cfg)                     # Given: participants, files, x (n, C) or (n, T, C)
    write(path, samples, x, cfg)          # what eval.py --export writes

Arrays of the file: `participant` (n,), `x` (n, C), or tokens (n, T, C); and where a row is a
volume, `file` (n,), as the table of the volumes names it, or `filepath`, since np.savez cannot
write an array called file. Without it, all rows of a participant are taken as that participant's
volumes. An export also has `split` and `label`, which are not read: the tables say both.
"""

import functools
import os
import zipfile
from collections import Counter
from dataclasses import dataclass

import numpy as np

import b2
import files

MOST_INFLATED = 100  # times its size, to which a features.npz may inflate


@dataclass
class Given:
    """What a features.npz holds. file: [] where its rows are those of participants."""

    participant: list
    file: list
    x: np.ndarray  # (n, C) or (n, T, C) float32
    sha256: str

    def row_of(self):
        """{file: row}, by the path below the data folder."""
        return {plain_path(file): row for row, file in enumerate(self.file)}

    def rows_of(self):
        """{participant: rows}."""
        rows = {}
        for row, participant in enumerate(self.participant):
            rows.setdefault(participant, []).append(row)
        return rows


def plain_path(path):
    """A path as both a table and a features.npz may write it, without what makes no difference."""
    return os.path.normpath(path.replace("\\", "/")).lstrip("/")


def lookup(cfg, samples):
    """The features of samples that ledger.read found -> (volumes, C), or tokens (volumes, T, C)."""
    found = read(cfg)
    if found.file:
        row_of = found.row_of()
        rows = [row_of[plain_path(b2.below(cfg.paths.data, sample.path))] for sample in samples]
    else:
        rows = [int(sample.path.rpartition(" ")[2]) for sample in samples]
    return found.x[rows]


def read(cfg):
    """paths.features -> Given. ValueError for what is no such file, FileNotFoundError for none."""
    name = cfg.paths.features
    try:
        path = b2.local(name, cfg.paths.cache_dir, cfg.data.fetch_deadline)
    except FileNotFoundError:
        raise FileNotFoundError(f"paths.features={name} is not there") from None
    stat = os.stat(path)
    return opened(path, name, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def opened(path, name, *identity):
    """`read` of a local file; kept, for a run asks several times."""
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(part.file_size for part in archive.infolist())
        if inflated > MOST_INFLATED * os.path.getsize(path):
            raise ValueError(f"it would inflate to {inflated / 1e9:.3g} GB")
        with np.load(path, allow_pickle=False) as archive:
            names = {"participant": "participant", "x": "x", "filepath": "file", "file": "file"}
            arrays = {names[key]: archive[key] for key in archive if key in names}
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"paths.features={name} is no features.npz: {reason}") from error
    for key in ("participant", "x"):
        if key not in arrays:
            raise ValueError(f"paths.features={name} has no array '{key}'; docs/encoders.md")
    x, rows = arrays["x"], len(arrays["participant"])
    if x.ndim not in (2, 3) or x.dtype.kind not in "fiu" or 0 in x.shape:
        raise ValueError(
            f"paths.features={name}: x is {x.dtype} {x.shape}, not numbers (n, C) or (n, T, C)"
        )
    texts = {key: [str(v) for v in arrays[key].ravel()] for key in arrays if key != "x"}
    for key in texts:
        if arrays[key].shape != (len(x),):
            raise ValueError(
                f"paths.features={name}: x has {len(x)} rows, and {key} is {arrays[key].shape}"
            )
        if arrays[key].dtype.kind not in "USiu":
            raise ValueError(f"paths.features={name}: {key} is {arrays[key].dtype}, not texts")
        if arrays[key].dtype.kind == "S":
            texts[key] = [v.decode(errors="replace") for v in arrays[key]]
    x = x.astype(np.float32)
    finite = np.isfinite(x).reshape(rows, -1).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(
            f"paths.features={name}: x of participant {texts['participant'][row]} (row {row}) is "
            "not finite"
        )
    found = texts.get("file", [])
    count = Counter(map(plain_path, found))
    twice = [file for file in count if count[file] > 1]
    if twice:
        raise ValueError(
            f"paths.features={name} has several rows of {files.first_few(twice)}; keep one of each"
        )
    return Given(texts["participant"], found, x, files.sha256(path))


def write(path, samples, x, cfg):
    """Write the features x (volumes, C) or (volumes, T, C) of samples, as `read` takes them."""
    arrays = {
        "participant": np.array([s.participant_id for s in samples]),
        "file": np.array([b2.below(cfg.paths.data, s.path) for s in samples]),
        "split": np.array([s.split for s in samples]),
        "label": np.array([s.label for s in samples]),
        "x": np.asarray(x, dtype=np.float32),
    }

    def write_zip(out):  # np.savez has a parameter of its own that is called file
        with zipfile.ZipFile(out, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as part:
                    np.lib.format.write_array(part, array, allow_pickle=False)

    files.write(path, write_zip)
