"""Labels and manifest -> ledger -> samples -> preprocessed volumes.

    python data.py --config configs/single_domain_01.yaml      # the ledger: who is there, who is missing, and why

A participant has a label (study_group) and a split (recommended_split); a sample is one OCT volume of a participant,
chosen by scanner and region. The ledger has a row for every labelled participant, so that nobody is lost silently.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

import b2

CLASSES = (  # study_group of participants.tsv; its position is the label
    "healthy",
    "pre_diabetes_lifestyle_controlled",
    "oral_medication_and_or_non_insulin_injectable_medication_controlled",
    "insulin_dependent",
)
CLASS_NAMES = ("healthy", "pre-diabetes", "oral medication", "insulin")
SPLITS = ("train", "val", "test")
LABELS, MANIFEST = "participants.tsv", "retinal_oct/manifest.tsv"
PREPROCESSING = "zscore-trilinear-float16-v1"  # part of every cache key: change it with preprocess()


# ------------------------------------------------------------------------------------------------------- the ledger


@dataclass
class Row:
    """A participant in the ledger. status: used | missing (should have a volume, has none) | no_oct (never had OCT)."""

    participant_id: str
    split: str
    label: int
    site: str
    volumes: int = 0
    status: str = "used"
    reason: str = ""


@dataclass
class Sample:
    """One volume of a participant; path is local."""

    participant_id: str
    split: str
    label: int
    site: str
    laterality: str
    path: str


@dataclass
class Ledger:
    rows: list
    samples: list
    notes: list = field(default_factory=list)  # oddities of the manifest that cost nobody a volume

    def of(self, split):
        return [s for s in self.samples if s.split == split]

    def missing(self, split=None):
        return [r for r in self.rows if r.status == "missing" and split in (None, r.split)]


def read_tsv(path, columns):
    """Tab-separated file -> list of dicts. columns: required names, each a name or a tuple of accepted spellings."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.reader(f, delimiter="\t")
            found = [name.strip() for name in next(reader, [])]
            table = [cells for cells in reader if any(cell.strip() for cell in cells)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a tab-separated text in UTF-8: {error}") from error
    for cells in table:  # a stray quotation mark joins cells and swallows rows
        if len(cells) != len(found) or any("\n" in cell or "\t" in cell for cell in cells):
            raise ValueError(f"{path}: the row that begins with '{cells[0][:40]}' has not {len(found)} cells as the header, "
                             "or a cell of several lines; look for a stray quotation mark or tab there")
    rows = [dict(zip(found, cells)) for cells in table]
    for column in columns:
        spellings = (column,) if isinstance(column, str) else column
        present = [s for s in spellings if s in found]
        if not present:
            raise ValueError(f"{path} has no column '{' or '.join(spellings)}'; found {', '.join(found)}")
        for row in rows:
            row[spellings[0]] = row[present[0]].strip()
    return rows


def read_labels(path):
    """participants.tsv -> {participant_id: Row}, in the file's order. ValueError on whatever would make a label doubtful."""
    people = {}
    for row in read_tsv(path, [("participant_id", "person_id"), "clinical_site", "study_group", "recommended_split", "retinal_oct"]):
        pid, group, split, oct_ = (row[k] for k in ("participant_id", "study_group", "recommended_split", "retinal_oct"))
        if not pid:
            raise ValueError(f"{path}: a row without participant_id: {row}")
        if group not in CLASSES:
            raise ValueError(f"{path}: participant {pid} has unknown study_group '{group}'; known are {', '.join(CLASSES)}")
        if split not in SPLITS:
            raise ValueError(f"{path}: participant {pid} has unknown recommended_split '{split}'; known are {', '.join(SPLITS)}")
        if oct_.upper() not in ("TRUE", "FALSE"):
            raise ValueError(f"{path}: participant {pid} has retinal_oct '{oct_}', neither TRUE nor FALSE")
        person = Row(pid, split, CLASSES.index(group), row["clinical_site"])
        if oct_.upper() == "FALSE":
            person.status, person.reason = "no_oct", "retinal_oct is FALSE"
        earlier = people.setdefault(pid, person)
        if earlier.split != split:
            raise ValueError(f"{path}: participant {pid} is in two splits, {earlier.split} and {split}")
        if earlier != person:
            raise ValueError(f"{path}: participant {pid} has two rows that differ")
    if not people:
        raise ValueError(f"{path} has no participants")
    return people


def read_ledger(cfg):
    """Who is there: labels joined with the manifest on the participant column -> Ledger. Opens no volume."""
    root = b2.local(cfg.paths.data)
    for name in (LABELS, MANIFEST):
        if not os.path.isfile(os.path.join(root, name)):
            raise FileNotFoundError(f"paths.data={cfg.paths.data}: {name} is not there; set paths.data to the folder that holds it")
    people = read_labels(os.path.join(root, LABELS))
    manifest_path = os.path.join(root, MANIFEST)
    manifest = read_tsv(manifest_path, [("participant_id", "person_id"), "anatomic_region", "laterality", "filepath"])

    rows_of, chosen_of, found_kinds, owner, unlabelled = Counter(), {}, Counter(), {}, set()
    notes = []
    for row in manifest:
        pid, filepath = row["participant_id"], row["filepath"]
        try:
            path = b2.join(root, filepath)
        except ValueError as error:
            raise ValueError(f"{manifest_path}: participant {pid}: {error}") from None
        if pid not in people:
            unlabelled.add(pid or "(no id)")
            continue
        parts = os.path.relpath(path, root).split(os.sep)  # retinal_oct/structural_oct/<scanner>/<participant>/<file>
        kind = (parts[-3] if len(parts) >= 3 else "", row["anatomic_region"])
        found_kinds[kind] += 1
        rows_of[pid] += 1
        if kind != (cfg.data.scanner, cfg.data.anatomic_region):
            continue
        if path in owner:
            if owner[path] != pid:
                raise ValueError(f"{manifest_path}: {filepath} is listed for two participants, {owner[path]} and {pid}")
            notes.append(f"participant {pid}: {filepath} is listed twice; used once")
            continue
        owner[path] = pid
        chosen_of.setdefault(pid, []).append(Sample(pid, people[pid].split, people[pid].label, people[pid].site, row["laterality"], path))
    if not chosen_of:
        raise ValueError(f"{manifest_path} has no volume of data.scanner={cfg.data.scanner}, data.anatomic_region={cfg.data.anatomic_region}; "
                         "it has " + "; ".join(f"{s} '{r}' ({n})" for (s, r), n in sorted(found_kinds.items())))
    if unlabelled:
        notes.append(f"{len(unlabelled)} participants of the manifest are not in {LABELS}: {few(sorted(unlabelled))}")

    samples = []
    for pid, person in people.items():
        chosen = chosen_of.get(pid, [])
        if person.status == "no_oct":
            if chosen:
                notes.append(f"participant {pid}: retinal_oct is FALSE, yet the manifest has {len(chosen)} volumes; not used")
            continue
        there = [s for s in chosen if os.path.isfile(s.path) and os.path.getsize(s.path) > 0]
        gone = [s for s in chosen if s not in there]
        person.volumes = len(there)
        if gone:
            person.reason = f"{len(gone)} of {len(chosen)} files absent or empty: {few([os.path.relpath(s.path, root) for s in gone], 2)}"
        elif not rows_of[pid]:
            person.reason = "no row in the manifest"
        elif not chosen:
            person.reason = f"no volume of {cfg.data.scanner}, {cfg.data.anatomic_region}"
        if not there:
            person.status = "missing"
        elif gone:
            notes.append(f"participant {pid}: {person.reason}")
        samples += there
    return Ledger(list(people.values()), samples, notes)


def describe(root):
    """What data this is, for headings: synthetic data must never pass for real."""
    mark = os.path.join(b2.local(root), "phantom.json")
    if not os.path.exists(mark):
        return f"data {root}"
    with open(mark, encoding="utf-8") as f:
        return f"SYNTHETIC data {root} ({json.load(f).get('effect', 'unknown')} class effect)"


def table_sha256(cfg, name):
    """sha256 of LABELS or MANIFEST: tells whether two runs saw the same table."""
    return b2.sha256(os.path.join(b2.local(cfg.paths.data), name))


def few(names, most=5):
    names = [str(n) for n in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_missing(ledger, max_missing):
    """Stop unless everybody who should be there is, but for the max_missing that the config allows."""
    missing = ledger.missing()
    if len(missing) > max_missing:
        people = few([f"{r.participant_id} ({r.reason})" for r in missing], 3)
        raise ValueError(f"{len(missing)} of {len([r for r in ledger.rows if r.status != 'no_oct'])} labelled participants have no volume, "
                         f"and data.max_missing is {max_missing}: {people}; restore them, or set data.max_missing={len(missing)} to go on without")
    for split in ("train", "val"):
        if not ledger.of(split):
            raise ValueError(f"no participant of split {split} has a volume")


def ledger_table(ledger):
    """Per split x class x site: participants with a volume / labelled participants, then who is missing and why."""
    sites = sorted({r.site for r in ledger.rows})
    lines = [f"{'split':<7}{'class':<18}" + "".join(f"{s:>10}" for s in sites) + f"{'all':>10}{'volumes':>10}"]
    for split in SPLITS:
        for label, name in [*enumerate(CLASS_NAMES), (None, "all")]:
            rows = [r for r in ledger.rows if r.split == split and label in (None, r.label)]
            cells = []
            for site in [*sites, None]:
                here = [r for r in rows if site in (None, r.site) and r.status != "no_oct"]
                cells.append(f"{sum(r.status == 'used' for r in here)}/{len(here)}" if here else "-")
            lines.append(f"{split:<7}{name:<18}" + "".join(f"{c:>10}" for c in cells) + f"{sum(r.volumes for r in rows):>10}")
    status = Counter(r.status for r in ledger.rows)
    lines.append(f"(with a volume / labelled)   {len(ledger.rows)} participants: {status['used']} used with {len(ledger.samples)} volumes, "
                 f"{status['missing']} missing, {status['no_oct']} without OCT")
    lines += [f"missing: {r.participant_id} ({r.split}, {CLASS_NAMES[r.label]}, {r.site}): {r.reason}" for r in ledger.missing()]
    lines += [f"note: {note}" for note in ledger.notes]
    return "\n".join(lines)


def ledger_csv(ledger):
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["participant_id", "split", "label", "site", "volumes", "status", "reason"])
    writer.writerows([r.participant_id, r.split, r.label, r.site, r.volumes, r.status, r.reason] for r in ledger.rows)
    return out.getvalue()


# -------------------------------------------------------------------------------------------- DICOM and preprocessing


def taps(frames, depth):
    """The two frames that each output slice of a linear resize (align_corners=False) reads, and the weight of the second."""
    source = np.clip((np.arange(depth) + 0.5) * frames / depth - 0.5, 0, None)
    low = np.minimum(source.astype(np.int64), frames - 1)
    weight = source - low
    high = np.where(weight > 0, np.minimum(low + 1, frames - 1), low)
    return low, high, weight.astype(np.float32)


def read_dicom(path_or_file, size=None):
    """Multi-frame DICOM -> array (frames, rows, columns), rescaled where the file asks for it.

    size (D, H, W): decode only the frames that preprocess(..., size) reads; the others stay zero and cost neither time
    nor memory. ValueError naming the file when there are no pixels, or not all of them, or they cannot be decoded.
    """
    import pydicom
    from pydicom.pixels import iter_pixels

    name = path_or_file if isinstance(path_or_file, (str, os.PathLike)) else getattr(path_or_file, "name", "the file")
    try:
        ds = pydicom.dcmread(path_or_file)
        if not ds.get("PixelData"):
            raise ValueError("no pixel data; the file is truncated or never had any")
        if ds.get("SamplesPerPixel", 1) != 1:
            raise ValueError(f"{ds.SamplesPerPixel} samples a pixel; OCT has 1")
        frames = int(ds.get("NumberOfFrames") or 1)
        stored = stored_frames(ds, frames)
        if stored != frames:
            raise ValueError(f"NumberOfFrames is {frames}, but the pixel data holds {stored} frames")
        wanted = range(frames)
        if size is not None:
            low, high, _ = taps(frames, size[0])
            wanted = sorted({*low.tolist(), *high.tolist()})
        rescales = [rescale(ds, index) for index in wanted]
        is_rescaled = any(pair != (1, 0) for pair in rescales)
        volume = None
        for index, (slope, intercept), frame in zip(wanted, rescales, iter_pixels(ds, indices=wanted, raw=True), strict=True):
            if is_rescaled:
                frame = frame.astype(np.float32) * slope + intercept
            if volume is None:
                volume = np.zeros((frames, *frame.shape), frame.dtype)
            volume[index] = frame
    except FileNotFoundError:
        raise
    except Exception as error:  # pydicom and the decoders raise a dozen types for a damaged file
        raise ValueError(f"{name} is not a readable OCT volume: {' '.join(str(error).split())}") from error
    return volume


def stored_frames(ds, frames):
    """How many frames the pixel data holds, whatever NumberOfFrames says; `frames` only helps to part fragments."""
    from pydicom.encaps import generate_frames, parse_basic_offsets, parse_fragments

    if not ds.file_meta.TransferSyntaxUID.is_encapsulated:
        return len(ds.PixelData) * 8 // (ds.Rows * ds.Columns * ds.BitsAllocated)
    if "ExtendedOffsetTable" in ds:
        return len(ds.ExtendedOffsetTable) // 8
    buffer = io.BytesIO(ds.PixelData)
    offsets = parse_basic_offsets(buffer)
    fragments = parse_fragments(buffer)[0]
    if offsets or fragments == frames:
        return len(offsets) or fragments
    return sum(1 for _ in generate_frames(ds.PixelData, number_of_frames=frames))  # several fragments a frame


def rescale(ds, index):
    """Rescale slope and intercept of a frame: its own functional group, the shared one, or the data set's; 1 and 0 without."""
    groups = [g for key, i in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0))
              if i < len(g_seq := ds.get(key) or []) for g in [g_seq[i]]]
    found = [g.PixelValueTransformationSequence[0] for g in groups if g.get("PixelValueTransformationSequence")]
    source = (found or [ds])[0]
    return np.float32(source.get("RescaleSlope", 1) or 1), np.float32(source.get("RescaleIntercept", 0) or 0)


def preprocess(volume, size):
    """Volume (frames, rows, columns), integer or float -> float32 tensor (D, H, W), as at pretraining.

    Pretraining: z-score, trilinear resize (align_corners=False, no anti-aliasing), z-score. The resize is linear with
    weights that add up to 1, so the first z-score cancels in the second and is left out. A constant volume gives zeros.
    """
    volume, (depth, height, width) = np.asarray(volume), size
    if volume.ndim != 3 or volume.size == 0 or min(size) < 1:
        raise ValueError(f"a volume is (frames, rows, columns) and its size (D, H, W), all above 0; these are {volume.shape} and {tuple(size)}")
    low, high, weight = taps(len(volume), depth)
    origin = np.float32(volume[low[0], 0, 0])  # cancels too; with it, a constant volume is exactly zero all the way

    def frame(i):
        return torch.from_numpy(volume[i].astype(np.float32) - origin)

    out = torch.empty(depth, height, width)
    for d in range(depth):
        plane = frame(low[d])
        if weight[d] > 0:
            plane = torch.lerp(plane, frame(high[d]), float(weight[d]))  # (rows, columns)
        out[d] = F.interpolate(plane[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    # numpy, not torch: a sum in torch depends on the number of threads, and a volume must not
    values = out.numpy()
    values -= np.float32(values.mean(dtype=np.float64))
    std = np.float32(np.sqrt(np.square(values).mean(dtype=np.float64)))
    return out.zero_() if std == 0 else out.div_(float(std))


# ------------------------------------------------------------------------------------------- volumes, with their cache


class Volumes(torch.utils.data.Dataset):
    """Preprocessed volumes: [i] -> (i, key, (1, D, H, W) float16, error).

    Kept on disk as float16 (19 MB at 64x384x384, rounding at most 2^-11 relative), keyed by the file's content, size and
    preprocessing. What comes from the disk and what was just made are the same numbers. A volume that cannot be read
    gives (i, None, None, sentence); `stream` turns that into the exception, for a worker process would wrap it in its
    traceback.
    """

    def __init__(self, samples, size, cache_dir):
        self.samples, self.size, self.cache_dir = samples, tuple(size), b2.local(cache_dir)

    def __len__(self):
        return len(self.samples)

    def known_key(self, i):
        """Key of volume i if its content was hashed before and the file has not changed since, else None."""
        note = self.note(i)
        if not os.path.exists(note):
            return None
        with open(note, encoding="utf-8") as f:
            key = f.read()
        return key if len(key) == 64 else None  # a power cut can leave it empty

    def note(self, i):
        path, stat = os.path.abspath(self.samples[i].path), os.stat(self.samples[i].path)
        identity = f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {self.size} {PREPROCESSING}"
        return os.path.join(self.cache_dir, "keys", hashlib.sha256(identity.encode()).hexdigest())

    def __getitem__(self, i):
        try:
            return i, *self.load(i), None
        except (ValueError, OSError) as error:
            return i, None, None, f"participant {self.samples[i].participant_id}: {error}"

    def load(self, i):
        key = self.known_key(i)
        if key is None:
            content = f"{b2.sha256(self.samples[i].path)} {self.size} {PREPROCESSING}"
            key = hashlib.sha256(content.encode()).hexdigest()
        kept = os.path.join(self.cache_dir, "volumes", key + ".npy")
        if os.path.exists(kept):
            volume = load_array(kept, np.float16, self.size)
        else:
            tensor = preprocess(read_dicom(self.samples[i].path, self.size), self.size)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.samples[i].path} has values that are not finite")
            volume = tensor.numpy().astype(np.float16)
            save_array(kept, volume)
        b2.write(self.note(i), key)  # last, so that a key on disk belongs to a volume that could be read
        return key, torch.from_numpy(volume)[None]  # (D, H, W) -> (1, D, H, W)


def save_array(path, array):
    out = io.BytesIO()
    np.save(out, array)
    b2.write(path, out.getvalue())


def load_array(path, dtype, shape):
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"cache file {path} is damaged, delete it: {error}") from error
    if array.dtype != dtype or array.shape != tuple(shape):
        raise ValueError(f"cache file {path} is damaged, delete it: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {tuple(shape)}")
    return array


def stream(dataset, order, num_workers):
    """Yield (i, key, (1, D, H, W) float16) for i of `order`, decoded ahead by worker processes. Counts what arrives."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=order, num_workers=num_workers,
        # not fork: the runtimes of CUDA and XLA do not survive it
        multiprocessing_context="spawn" if num_workers else None,
    )
    arrived = 0
    for i, key, volume, error in loader:
        if error:
            raise ValueError(error)
        arrived += 1
        yield i, key, volume
    if arrived != len(order):
        raise RuntimeError(f"the loader ended after {arrived} of {len(order)} volumes")


# -------------------------------------------------------------------------------------------------------- the command


def main():
    import config
    import phantom

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    cfg = config.load(args.config, args.overrides)
    phantom.prepare(cfg)
    ledger = read_ledger(cfg)
    print(f"{cfg.paths.data}: {cfg.data.scanner}, {cfg.data.anatomic_region}\n{ledger_table(ledger)}")
    check_missing(ledger, cfg.data.max_missing)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev data.py ...: the traceback too
            raise
        sys.exit(f"error: {error}")
