"""Labels and manifest -> ledger -> samples -> preprocessed volumes.

    python data.py --config configs/single_domain_01.yaml        # the ledger: who is there, who is missing, and why
    python data.py --config configs/demo.yaml --config configs/finetune.yaml --preview views.png       # augmented volumes

A participant has a label (study_group) and a split (recommended_split); a sample is one OCT volume of a participant,
chosen by scanner and region. The ledger has a row for every labelled participant, so that nobody is lost silently.
"""

import argparse
import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

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


class Unreadable(ValueError):
    """A volume that is there and cannot be read."""


# ------------------------------------------------------------------------------------------------------- the ledger


@dataclass
class Row:
    """A participant in the ledger. status: used | missing (should have a volume, has none) | no_oct (never had OCT)."""

    participant_id: str
    split: str
    label: int
    site: str
    age: str = ""  # as in the table; "" where that has none
    volumes: int = 0
    status: str = "used"
    reason: str = ""


@dataclass
class Sample:
    """One volume of a participant; path is a local path or a URL, source what is there."""

    participant_id: str
    split: str
    label: int
    site: str
    laterality: str
    path: str
    source: b2.Object = None


@dataclass
class Ledger:
    rows: list
    samples: list
    notes: list = field(default_factory=list)  # oddities that cost nobody a place
    description: str = ""  # what data this is, for headings
    sha256: dict = field(default_factory=dict)  # of LABELS and MANIFEST: tells whether two runs saw the same tables
    unreadable: list = field(default_factory=list)  # (sample, reason) of volumes that are there and cannot be read

    def of(self, split):
        return [s for s in self.samples if s.split == split]

    def missing(self, split=None):
        return [r for r in self.rows if r.status == "missing" and split in (None, r.split)]

    def strike(self, sample, reason):
        """Take out a volume that cannot be read; once."""
        if sample.path in {s.path for s, _ in self.unreadable}:
            return
        self.unreadable.append((sample, reason))
        self.samples.remove(sample)
        row = next(r for r in self.rows if r.participant_id == sample.participant_id)
        row.volumes -= 1
        row.status = "used" if row.volumes else "missing"
        row.reason = "; ".join(filter(None, [row.reason, reason]))


def read_tsv(path, columns, name=None):
    """Tab-separated file -> list of dicts. columns: required names, each a name or a tuple of accepted spellings.

    name: what messages call the file, for one that was fetched.
    """
    name = name or path
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.reader(f, delimiter="\t")
            found = [name.strip() for name in next(reader, [])]
            table = [cells for cells in reader if any(cell.strip() for cell in cells)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{name} is not a tab-separated text in UTF-8: {error}") from error
    for cells in table:  # a stray quotation mark joins cells and swallows rows
        if len(cells) != len(found) or any("\n" in cell or "\t" in cell for cell in cells):
            raise ValueError(f"{name}: the row that begins with '{cells[0][:40]}' has not {len(found)} cells as the header, "
                             "or a cell of several lines; look for a stray quotation mark or tab there")
    rows = [dict(zip(found, cells)) for cells in table]
    for column in columns:
        spellings = (column,) if isinstance(column, str) else column
        present = [s for s in spellings if s in found]
        if not present:
            raise ValueError(f"{name} has no column '{' or '.join(spellings)}'; found {', '.join(found)}")
        for row in rows:
            row[spellings[0]] = row[present[0]].strip()
    return rows


def read_labels(path, name=None):
    """participants.tsv -> {participant_id: Row}, in the file's order. ValueError on whatever would make a label doubtful."""
    people, name = {}, name or path
    for row in read_tsv(path, [("participant_id", "person_id"), "clinical_site", "study_group", "recommended_split", "retinal_oct"], name):
        pid, group, split, oct_ = (row[k] for k in ("participant_id", "study_group", "recommended_split", "retinal_oct"))
        if not pid:
            raise ValueError(f"{name}: a row without participant_id: {row}")
        if group not in CLASSES:
            raise ValueError(f"{name}: participant {pid} has unknown study_group '{group}'; known are {', '.join(CLASSES)}")
        if split not in SPLITS:
            raise ValueError(f"{name}: participant {pid} has unknown recommended_split '{split}'; known are {', '.join(SPLITS)}")
        if oct_.upper() not in ("TRUE", "FALSE"):
            raise ValueError(f"{name}: participant {pid} has retinal_oct '{oct_}', neither TRUE nor FALSE")
        person = Row(pid, split, CLASSES.index(group), row["clinical_site"], row.get("age", ""))
        if oct_.upper() == "FALSE":
            person.status, person.reason = "no_oct", "retinal_oct is FALSE"
        earlier = people.setdefault(pid, person)
        if earlier.split != split:
            raise ValueError(f"{name}: participant {pid} is in two splits, {earlier.split} and {split}")
        if earlier != person:
            raise ValueError(f"{name}: participant {pid} has two rows that differ")
    if not people:
        raise ValueError(f"{name} has no participants")
    return people


def read_manifest(path, people, cfg, notes, name):
    """manifest.tsv -> samples of the configured scanner and region {participant_id: [Sample]}, rows of any kind per participant."""
    chosen, rows_of, found_kinds, owner, unlabelled = {}, Counter(), Counter(), {}, set()
    for row in read_tsv(path, [("participant_id", "person_id"), "anatomic_region", "laterality", "filepath"], name):
        pid, filepath = row["participant_id"], row["filepath"]
        try:
            location = b2.join(cfg.paths.data, filepath)
        except ValueError as error:
            raise ValueError(f"{name}: participant {pid}: {error}") from None
        if pid not in people:
            unlabelled.add(pid or "(no id)")
            continue
        parts = location.split("/")  # .../retinal_oct/structural_oct/<scanner>/<participant>/<file>
        kind = (parts[-3] if len(parts) >= 3 else "", row["anatomic_region"])
        found_kinds[kind] += 1
        rows_of[pid] += 1
        if kind != (cfg.data.scanner, cfg.data.anatomic_region):
            continue
        if location in owner:
            if owner[location] != pid:
                raise ValueError(f"{name}: {filepath} is listed for two participants, {owner[location]} and {pid}")
            notes.append(f"participant {pid}: {filepath} is listed twice; used once")
            continue
        owner[location] = pid
        chosen.setdefault(pid, []).append(Sample(pid, people[pid].split, people[pid].label, people[pid].site, row["laterality"], location))
    if not chosen:
        if not found_kinds:
            raise ValueError(f"{name} has no row of a participant of {LABELS}")
        raise ValueError(f"{name} has no volume of data.scanner={cfg.data.scanner}, data.anatomic_region={cfg.data.anatomic_region}; "
                         "it has " + "; ".join(f"{s} '{r}' ({n})" for (s, r), n in sorted(found_kinds.items())))
    if unlabelled:
        notes.append(f"{len(unlabelled)} participants of the manifest are not in {LABELS}: {few(sorted(unlabelled))}")
    return chosen, rows_of


def read_ledger(cfg):
    """Who is there: labels joined with the manifest on the participant column, and with what the store holds -> Ledger.

    Reads the two tables; of a bucket one listing besides. Opens no volume.
    """
    root, notes, tables = cfg.paths.data, [], {}
    for name in (LABELS, MANIFEST):
        try:
            tables[name] = b2.local(b2.join(root, name), cfg.paths.cache_dir, cfg.data.fetch_deadline)
        except FileNotFoundError:
            raise FileNotFoundError(f"paths.data={root}: {name} is not there; set paths.data to the folder that holds it") from None
    people = read_labels(tables[LABELS], b2.join(root, LABELS))
    chosen, rows_of = read_manifest(tables[MANIFEST], people, cfg, notes, b2.join(root, MANIFEST))

    def short(paths, most=2):
        return few([path.removeprefix(root.rstrip("/") + "/") for path in paths], most)

    # what the store holds of that
    owner = {s.path: pid for pid, samples in chosen.items() for s in samples}
    there = b2.find_all(list(owner), cfg.data.fetch_deadline)
    lost = {path: "absent" for path in owner if path not in there} | {path: "empty" for path, source in there.items() if source.size == 0}
    copies = set()
    for group in same_content(there):
        owners = sorted({owner[path] for path in group})
        if len(owners) == 1:
            copies.update(group[1:])
            notes.append(f"participant {owners[0]}: {short(group[1:])} has the same content as {short(group[:1])}; used once")
        else:  # what several participants share cannot carry a label
            lost |= {path: f"with content that participants {few(owners)} share" for path in group}
    unverified = [path for path, source in there.items() if b2.is_remote(path) and not source.checksum]
    if unverified:
        notes.append(f"{len(unverified)} volumes have no checksum in the store and are verified by their size alone, "
                     f"and not compared with each other: {short(unverified)}")

    used = []
    for pid, person in people.items():
        samples = chosen.get(pid, [])
        if person.status == "no_oct":
            if samples:
                notes.append(f"participant {pid}: retinal_oct is FALSE, yet the manifest has {len(samples)} volumes; not used")
            continue
        reasons = []
        for why in dict.fromkeys(lost[s.path] for s in samples if s.path in lost):
            paths = [s.path for s in samples if lost.get(s.path) == why]
            reasons.append(f"{len(paths)} of {len(samples)} files {why}: {short(paths)}")
        if not rows_of[pid]:
            reasons.append("no row in the manifest")
        elif not samples:
            reasons.append(f"no volume of {cfg.data.scanner}, {cfg.data.anatomic_region}")
        good = [s for s in samples if s.path not in lost and s.path not in copies]
        for sample in good:
            sample.source = there[sample.path]
        used += good
        person.volumes, person.reason = len(good), "; ".join(reasons)
        if not good:
            person.status = "missing"
        elif reasons:
            notes.append(f"participant {pid}: {person.reason}")
    return Ledger(list(people.values()), used, notes, describe(cfg),
                  {name: b2.sha256(path) for name, path in tables.items()})


def same_content(there):
    """{path: b2.Object} -> lists of paths whose files hold the same bytes. A store tells checksums; local files are read only
    where their sizes and first bytes agree."""
    def same(paths, trait):
        groups = {}
        for path in paths:
            groups.setdefault(trait(path), []).append(path)
        return [group for group in groups.values() if len(group) > 1]

    def head(path):
        with open(path, "rb") as f:
            return f.read(4096)

    for group in same([path for path, source in there.items() if source.size], lambda path: there[path].size):
        if b2.is_remote(group[0]):
            yield from same(group, lambda path: there[path].checksum or path)
        else:
            for same_head in same(group, head):
                yield from same(same_head, lambda path: b2.checksum(path, "sha1"))


def describe(cfg):
    """What data this is, for headings: synthetic data must never pass for real."""
    root = cfg.paths.data
    try:
        mark = b2.local(b2.join(root, "phantom.json"), cfg.paths.cache_dir, cfg.data.fetch_deadline)
    except FileNotFoundError:
        return f"data {root}"
    with open(mark, encoding="utf-8") as f:
        return f"SYNTHETIC data {root} ({json.load(f).get('effect', 'unknown')} class effect)"


def few(names, most=5):
    names = [str(n) for n in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_missing(ledger, max_missing):
    """Stop unless everybody and every volume is there, but for the max_missing that the config allows.

    Counted are participants without any volume and volumes that cannot be read.
    """
    unreadable = {s.participant_id for s, _ in ledger.unreadable}
    absent = [r for r in ledger.missing() if r.participant_id not in unreadable]
    problems = [f"{s.participant_id} ({reason})" for s, reason in ledger.unreadable] + [f"{r.participant_id} ({r.reason})" for r in absent]
    if len(problems) > max_missing:
        labelled = len([r for r in ledger.rows if r.status != "no_oct"])
        what = [f"{len(absent)} of {labelled} labelled participants have no volume"] if absent else []
        what += [f"{len(ledger.unreadable)} volumes cannot be read"] if ledger.unreadable else []
        raise ValueError(f"{' and '.join(what)}, and data.max_missing is {max_missing}: participant {few(problems, 3)}; "
                         f"restore them, or set data.max_missing={len(problems)} to go on without")
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


def unreadable_table(ledger):
    """A line for every volume that could not be read; "" when there is none."""
    return "\n".join(f"unreadable: participant {s.participant_id} ({s.split}, {CLASS_NAMES[s.label]}, {s.site}): {reason}"
                     for s, reason in ledger.unreadable)


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
    except MemoryError:
        raise
    except Exception as error:  # pydicom and the decoders raise a dozen types for a damaged file
        # the disk's or the process's trouble; EINVAL: an absurd offset
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
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
    return normalise(resize(volume, size))


def resize(volume, size):
    """Volume (frames, rows, columns) -> float32 tensor (D, H, W): trilinear, up to a constant that normalise takes away."""
    volume, (depth, height, width) = np.asarray(volume), size
    if volume.ndim != 3 or volume.size == 0 or min(size) < 1:
        raise ValueError("a volume is (frames, rows, columns) and its size (D, H, W), all above 0; "
                         f"these are {volume.shape} and {tuple(size)}")
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
    return out


def normalise(out):
    """Z-score of a tensor, in place."""
    # numpy, not torch: a sum in torch depends on the number of threads, and a volume must not
    values = out.numpy()
    values -= np.float32(values.mean(dtype=np.float64))
    std = np.float32(np.sqrt(np.square(values).mean(dtype=np.float64)))
    return out.zero_() if std == 0 else out.div_(float(std) if np.isfinite(std) else float("nan"))


# ------------------------------------------------------------------------------------------- augmentation and sampling

AUGMENTATION = "v1"  # part of the key of every augmented view's feature: change it with augment()
USUAL = {"flip": 0.5, "intensity_jitter": 0.1, "random_crop": 0.1, "rotation": 5.0}  # what `true` asks for


def strengths(cfg):
    """data.augment as {name: strength}, without what is off or 0."""
    how = cfg.data.augment
    asked = {"flip": how.flip, "intensity_jitter": how.intensity_jitter, "random_crop": how.random_crop, "rotation": how.rotation}
    return {name: USUAL[name] if value is True else value for name, value in asked.items() if value}


def augment(volume, strength, key):
    """Volume (1, D, H, W) -> another view of it, of the same shape and dtype. `key`, a text, alone decides which.

    strength, of which any may be left out:
      flip              probability to mirror the frames (D), and to mirror the columns (W); never the rows, which are depth
      intensity_jitter  a: contrast times 1 - a to 1 + a, then brightness -a to a (SD of the volume)
      random_crop       a: of each axis, up to this share is cut off, and the rest resized back
      rotation          degrees: -a to a in the lateral plane (D, W), and -a to a in the B-scan (H, W)
    All 0 is the identity. Planes are rotated in units of their own half-width and half-height.
    """
    chance = random.Random(key)
    draw = {name: [chance.random() for _ in range(6)] for name in USUAL}  # the same numbers, whatever is switched on
    flips = [p < strength.get("flip", 0) for p in draw["flip"][:2]]
    gain, shift = (strength.get("intensity_jitter", 0) * (2 * u - 1) for u in draw["intensity_jitter"][:2])
    scale = [1 - strength.get("random_crop", 0) * u for u in draw["random_crop"][:3]]  # of D, H, W
    centre = [(1 - s) * (2 * u - 1) for s, u in zip(scale, draw["random_crop"][3:])]
    lateral, scan = (math.radians(strength.get("rotation", 0) * (2 * u - 1)) for u in draw["rotation"][:2])

    out = volume[0].float()  # (D, H, W)
    out = resample(out, scan, scale[1:], centre[1:])  # every frame's (H, W)
    out = resample(out.transpose(0, 1), lateral, (scale[0], 1), (centre[0], 0)).transpose(0, 1)  # every row's (D, W)
    out = out.flip([axis for axis, flip in zip((0, 2), flips) if flip])
    if gain or shift:
        out = out * (1 + gain) + shift
    return out.to(volume.dtype)[None]


def resample(planes, angle, scale, centre):
    """Planes (K, rows, columns) -> the same shape, seen through a window of `scale` (rows, columns) at `centre`, turned by angle."""
    if angle == 0 and tuple(scale) == (1, 1):
        return planes
    cos, sin = math.cos(angle), math.sin(angle)
    window = torch.tensor([[scale[1] * cos, -scale[1] * sin, centre[1]], [scale[0] * sin, scale[0] * cos, centre[0]]])
    grid = F.affine_grid(window[None], [1, 1, *planes.shape[1:]], align_corners=False)  # (1, rows, columns, 2)
    return F.grid_sample(planes[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


def epoch_order(labels, sampler, seed, epoch):
    """The epoch's len(labels) draws, as indices of labels (n,); seed and epoch alone decide them.

    "shuffle": everything once. "stratified": rounds of num_classes draws, each class once in a round; within a class,
    everything once before anything again. ValueError when a class is missing.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    if sampler == "shuffle":
        return torch.randperm(len(labels), generator=generator)
    rounds = -(-len(labels) // len(CLASSES))
    columns = []
    for k in range(len(CLASSES)):
        own = (labels == k).nonzero().flatten()
        if not len(own):
            raise ValueError("data.sampler=stratified draws every class, and no training volume is of class "
                             f"{k} ({CLASS_NAMES[k]}); set data.sampler=shuffle")
        again = -(-rounds // len(own))
        columns.append(torch.cat([own[torch.randperm(len(own), generator=generator)] for _ in range(again)])[:rounds])
    table = torch.stack(columns, dim=1)  # (rounds, num_classes)
    turns = torch.rand(table.shape, generator=generator).argsort(dim=1)
    return table.gather(1, turns).flatten()[:len(labels)]


# ------------------------------------------------------------------------------------------- volumes, with their cache


class Volumes:
    """Preprocessed volumes of samples: load(i) -> (key, (1, D, H, W) float16).

    Kept on disk as float16 (19 MB at 64x384x384, rounding at most 2^-11 relative), keyed by the file's content, size and
    preprocessing, until cache_gb are full: then the rest is read anew every time, for throwing some out to admit others
    serves nobody when every epoch reads all. What comes from the disk and what was just made are the same numbers. Other
    processes may use the same cache_dir; each volume is fetched once.
    """

    def __init__(self, samples, size, cache_dir, cache_gb=50, deadline=300):
        self.samples, self.size, self.cache_dir = list(samples), tuple(size), b2.local_folder(cache_dir, "paths.cache_dir")
        self.folder, self.limit, self.deadline = os.path.join(self.cache_dir, "volumes"), cache_gb * 1e9, deadline
        self.stop = threading.Event()  # set: what is being fetched is given up

    def key(self, i):
        """Key of volume i in the cache; None for a local file whose content is not known yet."""
        content = self.content(i)
        return content and hashlib.sha256(f"{content} {self.size} {PREPROCESSING}".encode()).hexdigest()

    def content(self, i):
        """What identifies the content of volume i: the store's checksum, or the one that was taken of the local file before, else None."""
        source = self.samples[i].source
        if b2.is_remote(source.path):
            return source.checksum or f"{source.path} {source.id}"
        note = self.note(i)
        if not os.path.exists(note):
            return None
        with open(note, encoding="utf-8") as f:
            content = f.read()
        return content if len(content) == len("sha1:") + 40 else None  # a power cut can leave it empty

    def note(self, i):
        """File that remembers a local file's checksum, as long as nothing touches that file."""
        path = os.path.abspath(self.samples[i].path)
        stat = os.stat(path)
        identity = f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        return os.path.join(self.cache_dir, "checksums", hashlib.sha256(identity.encode()).hexdigest())

    def load(self, i, decode=None):
        """-> key, (1, D, H, W) float16. Unreadable for a volume that cannot be read; other errors are not its fault.

        decode: decode_volume, or something that runs it elsewhere.
        """
        source = self.samples[i].source
        try:
            if self.content(i) is None:
                b2.write(self.note(i), b2.checksum(source.path, "sha1"))
        except FileNotFoundError:
            raise Unreadable(f"{source.path} is not there any more") from None
        key = self.key(i)
        kept = os.path.join(self.folder, key + ".npy")
        volume = load_array(kept, np.float16, self.size)
        if volume is None:
            name = hashlib.sha256(self.content(i).encode()).hexdigest()  # not the key: another size would share the file that is fetched
            with b2.locked(os.path.join(self.cache_dir, "locks", name), self.stop) as lock:
                try:
                    volume = load_array(kept, np.float16, self.size)  # another one was faster
                    if volume is None:
                        volume = self.make(source, decode or decode_volume)
                        self.admit(kept, volume)
                finally:
                    os.remove(lock.name)
        return key, torch.from_numpy(volume)[None]  # (D, H, W) -> (1, D, H, W)

    def make(self, source, decode):
        """Fetch, decode and preprocess -> (D, H, W) float16."""
        is_remote, path = b2.is_remote(source.path), source.path
        try:
            if is_remote:
                path = b2.fetch(source, os.path.join(self.cache_dir, "raw"), self.deadline, self.stop)
            return decode(path, self.size)
        except (b2.Absent, b2.Corrupt, Unreadable) as error:
            raise Unreadable(str(error).replace(path, source.path)) from error
        finally:
            if is_remote and path != source.path:
                os.remove(path)

    def admit(self, path, volume):
        """Keep a volume, if there is room."""
        os.makedirs(self.folder, exist_ok=True)
        with b2.locked(os.path.join(self.cache_dir, "locks", "admission"), self.stop):  # nobody else writes here now
            used = 0
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):  # a damaged one, that another process removes
                    if entry.name.endswith(".part"):  # of a process that was killed
                        os.remove(entry.path)
                    else:
                        used += entry.stat().st_size
            if used + volume.nbytes <= self.limit:
                save_array(path, volume)


def decode_volume(path, size):
    """DICOM file -> preprocessed volume (D, H, W), float16. Unreadable, naming the file."""
    try:
        volume = read_dicom(path, size)
        if len(volume) == 1:
            raise ValueError(f"{path} has a single frame; that is no volume")
        tensor = preprocess(volume, size)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    if not torch.isfinite(tensor).all():
        raise Unreadable(f"{path} has values that are not finite")
    return tensor.numpy().astype(np.float16)


def save_array(path, array):
    out = io.BytesIO()
    np.save(out, array)
    out.write(hashlib.sha1(out.getbuffer()).digest())  # np.load does not mind what follows the array
    b2.write(path, out.getbuffer())


def load_array(path, dtype, shape):
    """The array kept at path; None where there is none, or a damaged one: it is then removed, to be made anew."""
    try:
        with open(path, "rb") as f:
            content = f.read()
    except FileNotFoundError:
        return None
    if hashlib.sha1(memoryview(content)[:-20]).digest() == content[-20:]:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        if array.dtype == dtype and array.shape == tuple(shape):
            return array
    tqdm.write(f"cache file {path} is damaged; making it anew", file=sys.stderr)
    with contextlib.suppress(FileNotFoundError):  # another process noticed too
        os.remove(path)
    return None


def stream(volumes, ledger, order, cfg, transform=None):
    """Yield (i, key, (1, D, H, W) float16) for the samples i of `order`, in that order.

    data.prefetch volumes are on their way at once: being fetched (by threads), decoded (by data.num_workers processes) or
    waiting for the consumer, who has one more; memory holds no others. A volume that cannot be read is struck off the ledger, and
    stops the run unless data.max_missing covers it; where ledger is None, none may be missing. transform(key, volume) -> volume
    is called by the threads that fetch. Close the generator (contextlib.closing) where the consumer may fail: else what is
    on its way still arrives before the process ends.
    """
    if cfg.data.num_workers:
        # spawn: the runtimes of CUDA and XLA do not survive a fork
        decoder = ProcessPoolExecutor(cfg.data.num_workers, multiprocessing.get_context("spawn"), start_worker)
    else:
        decoder = ThreadPoolExecutor(1)
    fetchers = ThreadPoolExecutor(cfg.data.prefetch, initializer=torch.set_num_threads, initargs=(1,))  # the other cores are the model's

    def load(i):
        key, volume = volumes.load(i, lambda *args: decoder.submit(decode_volume, *args).result())
        return key, transform(key, volume) if transform else volume

    volumes.stop.clear()
    todo, ahead = iter(order), deque()

    def fill():
        struck = {s.path for s, _ in ledger.unreadable} if ledger else ()
        for i in todo:
            if volumes.samples[i].path not in struck:
                ahead.append((i, fetchers.submit(load, i)))
            if len(ahead) >= cfg.data.prefetch:
                return

    try:
        fill()
        while ahead:
            i, future = ahead.popleft()
            sample = volumes.samples[i]
            try:
                key, volume = future.result()
            except Unreadable as error:
                if ledger is None:
                    raise ValueError(f"participant {sample.participant_id}: "
                                     f"a volume that could be read before cannot be read now: {error}") from error
                ledger.strike(sample, str(error))
                check_missing(ledger, cfg.data.max_missing)
                fill()
                continue
            except (OSError, MemoryError) as error:
                raise OSError(f"participant {sample.participant_id}: {error or 'out of memory'}") from error
            except BrokenProcessPool as error:
                for process in multiprocessing.active_children():  # they ignore the SIGTERM that the pool sends
                    process.kill()
                raise OSError("a process that decodes volumes died, out of memory perhaps; lower data.num_workers") from error
            fill()
            yield i, key, volume
    finally:
        volumes.stop.set()
        decoder.shutdown(wait=False, cancel_futures=True)  # first: fetchers wait for it
        fetchers.shutdown(cancel_futures=True)
        decoder.shutdown()


def start_worker():
    """In a process that decodes: one thread, no life after its parent's, and Ctrl-C and SIGTERM are the parent's business."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# -------------------------------------------------------------------------------------------------------- the command


def preview(path, cfg, ledger, size, views=5):
    """PNG: of one training volume of each class the middle B-scan (rows, columns) and, below it, the lateral plane (frames, columns;
    mean over rows), as it is and as epochs of a training encoder would see it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    samples = list({s.label: s for s in reversed(ledger.of("train"))}.values())
    volumes = Volumes(samples, size, cfg.paths.cache_dir, cfg.data.cache_gb, cfg.data.fetch_deadline)
    figure, axes = plt.subplots(2 * len(samples), 1 + views, figsize=(1.8 * (1 + views), 3.4 * len(samples)), squeeze=False,
                                layout="constrained")
    with contextlib.closing(stream(volumes, ledger, range(len(samples)), cfg)) as arriving:
        for i, key, volume in tqdm(arriving, total=len(samples), desc="preview", unit="volume"):
            for column in range(1 + views):
                view = augment(volume, strengths(cfg), f"{cfg.seed} {column} {key}") if column else volume
                frames = view[0].float()  # (D, H, W)
                scan, lateral = frames[len(frames) // 2], frames.mean(dim=1)
                if column == 0:
                    # one scale for the original and its views; for the faint lateral plane, each its own
                    low, high = scan.min(), scan.max()
                axes[2 * i, column].imshow(scan, cmap="gray", vmin=low, vmax=high, aspect="auto")
                axes[2 * i + 1, column].imshow(lateral, cmap="gray", aspect="auto")
            axes[2 * i, 0].set_ylabel(CLASS_NAMES[samples[i].label])
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for column in range(1 + views):
        axes[0, column].set_title(f"view {column}" if column else "original")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=90)
    plt.close(figure)
    b2.write(path, out.getvalue())


def main():
    import config
    import phantom

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, action="append", help="configuration file; a second one lies over the first")
    parser.add_argument("--preview", metavar="FILE.png", help="draw augmented volumes next to the originals")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    cfg = config.load(args.config, args.overrides)
    phantom.prepare(cfg)
    ledger = read_ledger(cfg)
    print(f"{ledger.description}: {cfg.data.scanner}, {cfg.data.anatomic_region}\n{ledger_table(ledger)}")
    check_missing(ledger, cfg.data.max_missing)
    if args.preview:
        if not strengths(cfg):
            raise ValueError("--preview has nothing to show: every switch of data.augment is off; set data.augment.flip=true, say")
        import eval as evaluation  # knows the encoder's size of volumes

        preview(args.preview, cfg, ledger, evaluation.open_encoder(cfg)[1])
        print(f"preview: {args.preview}")


if __name__ == "__main__":
    import device

    device.run(main)
