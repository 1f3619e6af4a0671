"""Write a synthetic OCT data set in AI-READI's layout. No part of it comes from a person.

    python phantom.py data/demo                               # 60 participants, boosted effect
    python phantom.py data/lit --participants 200 --effect literature --seed 1
    python phantom.py data/full --participants 30 --scale 1 1 1    # the scanners' real geometry:
                                                # 102 MB per Triton volume before compression

Written: participants.tsv, clinical_data/measurement.csv (HbA1c), retinal_oct/manifest.tsv,
multi-frame ophthalmic DICOM files under retinal_oct/structural_oct/, and phantom.json, which says
that the data is synthetic and how large the effect of the class is:
  literature  differences as published; hardly visible in a single eye, so expect a balanced
              accuracy close to chance
  boosted     the same directions, several times larger, plus bright foci and dark cysts; for demo
              and tests only
  confounded  none in the eye: the classes differ in how often a site scans them, and the sites in
              brightness, so that the label is predicted from what is no disease; for tests only
The same arguments give byte-identical files, whatever the number of processes.

A volume is (frames, rows, columns). Rows run along the depth into the eye, so volume[f] is one
B-scan as it is displayed. Order of work: anatomy of an eye (draw_eye), one scan of it
(synthesize), DICOM (write_dicom), the scans of a participant (write_participant), all
participants and the tables (write_dataset). The numbers of anatomy, scanners and effects stand in
phantom.yaml. scripts/phantom_picture.py shows some B-scans.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import yaml
from scipy.interpolate import PchipInterpolator
from scipy.spatial import cKDTree

import begin
import files
import stages

# phantom.yaml says what its numbers mean and where they come from
TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
MEASUREMENT_COLUMNS = ["measurement_id", "person_id", "measurement_concept_id", "value_as_number"]
GROUPS, SPLITS, SITES = TABLES["groups"], TABLES["splits"], TABLES["sites"]
PARTICIPANT_COLUMNS, MANIFEST_COLUMNS = TABLES["participant_columns"], TABLES["manifest_columns"]
PROTOCOLS = [row | {"shape": tuple(row["shape"])} for row in TABLES["protocols"]]
SYNTAXES, EFFECTS, DISC = TABLES["syntaxes"], TABLES["effects"], TABLES["disc"]
KNOTS, LAYERS = TABLES["knots"], TABLES["layers"]

NAMES = list(LAYERS)
RNFL, GCL, IPL, INL, OPL, ONL, MYOID, EZ, OS, RPE, CHOROID, SCLERA = range(len(NAMES))
THICKNESS, SD, AGEING, REFLECTIVITY = (np.array(column) for column in zip(*LAYERS.values()))
# radius in mm -> (layers, ...) in um; mirrored at 0, so that the bottom of the pit is round
PROFILE = PchipInterpolator((-KNOTS[1], *KNOTS), THICKNESS[:, [1, *range(len(KNOTS))]], axis=1)


# ------------------------------------------------------------------------------- anatomy of an eye


def draw_eye(seed, index, laterality, age, label, effect):
    """Anatomy of one eye, which all its scans share -> dict: factor of each layer's thickness,
    width of the pit, spots, vessels, phases of the choroid's waves.

    No random draw depends on the label: the same participant with another label has the same eye
    plus the effect.
    """
    person = np.random.default_rng([seed, index, 0])
    eye = np.random.default_rng([seed, index, 1 + (laterality == "L")])

    # Of the thickness of each layer, and of the pit's width. The eyes of a person correlate by 0.73
    # to 0.95 in the literature; 0.85 here.
    shared, own = (rng.standard_normal(len(LAYERS) + 1) for rng in (person, eye))
    *z, z_pit = (np.sqrt(0.85) * shared + np.sqrt(0.15) * own).clip(-2.5, 2.5)
    z[IPL] = z[GCL]  # the SD in the literature is that of their sum
    factor = (1 + SD * z) * (1 + AGEING * (age - 60))

    *changes, foci, cysts = EFFECTS[effect][label]
    luck, severity = person.random(2)
    if effect == "literature" and label == 3 and luck < TABLES["moderate_share"]:
        changes[1:3] = -0.11 - 0.04 * severity, 0.08 + 0.10 * severity
    for change, first, end in zip(changes, (RNFL, GCL, INL, MYOID), (GCL, INL, ONL, RPE)):
        factor[first:end] *= 1 + change
    return {
        "laterality": laterality,
        "factor": factor,
        "pit": 1 + 0.04 * z_pit,  # diameter 2.2 to 2.45 mm
        "spots": draw_spots(eye, foci, cysts),
        "vessels": draw_vessels(eye),
        "phases": eye.uniform(0, 2 * np.pi, (2, 3)),
    }


def draw_spots(rng, foci, cysts):
    """Foci and cysts -> (spots, 6): x, y in mm, height between the upper surfaces of INL (0) and
    ONL (1), lateral and axial sigma in um, gain of the reflectivity.

    As many as the strongest effect shows are drawn for every label.
    """
    spots = []
    for shown, (drawn, lateral, axial, gain) in zip((foci, cysts), TABLES["spots"].values()):
        x, y = rng.uniform(-3, 3, (2, drawn))
        size, height = rng.uniform(0.7, 1.3, drawn), rng.uniform(0.2, 0.8, drawn)
        columns = [x, y, height, lateral * size, axial * size, np.full(drawn, gain)]
        spots.append(np.stack(columns, 1)[:shown])
    return np.concatenate(spots)


def draw_vessels(rng):
    """Retinal vessels -> (points, 3): x, y and width in mm, in small steps along every vessel."""
    (disc_x, disc_y), t, curves = DISC, np.linspace(0, 1, 400), []

    def wobble():
        wave = np.sin(2 * np.pi * (rng.uniform(1, 3) * t + rng.random()))
        return 0.08 * wave * np.minimum(1, 5 * t)

    # two pairs of arcades from the disc around the macula
    for up, far in itertools.product((1, -1), (2.3, 3.1)):
        height = up * (far + rng.uniform(-0.3, 0.3))
        arcade = disc_x - 9 * t, disc_y * (1 - t) + height * (1 - (1 - t) ** 4) + wobble()
        curves.append((*arcade, 0.15 - 0.06 * t))
        # their branches towards the centre, which itself is free of vessels
        for start in rng.integers(40, 330, 5):
            end = np.array([rng.uniform(-2.8, 2.8), up * rng.uniform(-0.4, 0.5)])
            end *= max(1, 0.5 / np.hypot(*end))
            branch = [a[start] * (1 - t) + b * t + wobble() for a, b in zip(arcade, end)]
            curves.append((*branch, rng.uniform(0.07, 0.1) - 0.02 * t))
    # a few on the nasal side of the disc
    for angle in rng.uniform(-1.4, 1.4, 4):
        x, y = disc_x + 4 * t * np.cos(angle), disc_y + 4 * t * np.sin(angle) + wobble()
        curves.append((x, y, 0.12 - 0.05 * t))
    return np.concatenate(curves, 1).T


# ------------------------------------------------------------------------------------- one scan


class Scan:
    """Where the pixels of one scan lie, with its own fixation and drift. Lengths along the retina
    are in mm: x nasal of the fovea, y above it."""

    def __init__(self, eye, protocol, shape, rng):
        frames, self.rows, columns = shape
        self.size = np.array([[frames], [columns]])
        self.pitch = np.array(protocol["extent"])[:, None] / self.size  # (2, 1) mm per pixel
        self.row_um = protocol["axial"] * protocol["shape"][1] / self.rows
        # where the scan aims, and by how much the eye looks beside it
        aim = DISC if protocol["region"] == "Optic Disc" else (0, 0)
        self.centre = aim + rng.normal(0, 0.1, 2)
        drift = rng.normal(0, 0.01, (frames, 1))
        # mm from the middle of the image, (frames, 1) and (1, columns)
        frame, column = np.ogrid[:frames, :columns]
        self.image_y = (frame - (frames - 1) / 2) * self.pitch[0]
        self.image_x = (column - (columns - 1) / 2) * self.pitch[1]
        # nasal is on the right of a right eye's image
        self.side = 1 if eye["laterality"] == "R" else -1
        # where the A-scans hit the retina: (frames, columns) and (frames, 1)
        self.x = self.side * self.image_x + self.centre[0] + drift
        self.y = self.image_y + self.centre[1]


def synthesize(eye, protocol, shape, rng):
    """One scan of an eye -> uint8 (frames, rows, columns), with its own position, motion and
    speckle."""
    scan = Scan(eye, protocol, shape, rng)
    surface = layer_surfaces(eye, scan, rng)
    vessels, waves, spots = vessel_cover(eye, scan), choroid_waves(eye, scan), find_spots(eye, scan)

    frames, rows, columns = shape
    z = np.arange(rows, dtype=np.float32)[None, :, None]
    steps = np.diff(REFLECTIVITY, prepend=0.0).astype(np.float32)
    volume = np.empty(shape, np.uint8)
    # B-scans at a time: bounds the memory, and fits the processor's cache
    slab = max(1, 2**17 // (rows * columns))
    buffer = np.empty((len(LAYERS), slab, rows, columns), np.float32)
    for start in range(0, frames, slab):
        part = slice(start, min(start + slab, frames))
        top, vessel = surface[:, part, None], vessels[part, None]
        # share of each pixel that lies below each surface, (layers, frames, rows, columns)
        below = np.subtract(z, top - 0.5, out=buffer[:, : part.stop - start])
        below.clip(0, 1, out=below)
        image = np.full(below[0].shape, 0.0004, np.float32)
        for step, share in zip(steps, below):
            image += step * share
        # light is lost below the retina; the choroid is a sponge of dark vessels
        depth_um = np.maximum(z - top[CHOROID], 0) * scan.row_um
        image *= np.exp(depth_um * (-1 / protocol["reach"]))
        sponge = np.sin(waves[0, part, None] + depth_um * 0.038)
        sponge *= np.sin(waves[1, part, None] - depth_um * 0.027)
        image *= 1 + 0.7 * sponge * (below[CHOROID] - below[SCLERA])
        # blood scatters within the inner layers and takes the light from everything below
        image += 0.5 * vessel * (below[RNFL] - below[IPL])
        image *= 1 - 0.85 * vessel * below[IPL]
        for spot in spots:
            add_spot(image, part, surface, z, *spot)
        volume[part] = detect(image, protocol, scan.pitch[1, 0], z, rng)
    return volume


def layer_surfaces(eye, scan, rng):
    """Upper surface of every layer -> float32 (layers, frames, columns), in rows."""
    radius = np.hypot(scan.x, scan.y)
    # only the pit is wider or narrower, not the whole macula
    radius = radius / (1 + (eye["pit"] - 1) * np.exp(-((radius / 2) ** 2)))
    thickness = PROFILE(radius.clip(0, KNOTS[-1])) * eye["factor"][:, None, None]

    # the optic disc, of radius 0.85 mm, has nerve fibres only, and a cup; towards it, they thicken
    disc = np.hypot(scan.x - DISC[0], (scan.y - DISC[1]) / 1.1)
    inside = 1 / (1 + np.exp((disc - 0.85) / 0.05))
    thickness[RNFL] *= 1 + 0.12 * np.tanh(scan.x / 2) + 1.2 * np.exp(-(((disc - 0.9) / 0.6) ** 2))
    thickness[RNFL] += 120 * inside
    thickness[GCL:CHOROID] *= 1 - inside
    cup = inside * 350 * np.exp(-((disc / 0.45) ** 2))

    # Bruch's membrane, the upper surface of the choroid, in um: tilted and bowed in the image, and
    # moved from B-scan to B-scan, by a jump and by a slow drift
    tilt, bow = rng.normal(0, 0.006, 2), rng.normal(1 / 200, 1 / 1200)
    level = rng.normal(0.52, 0.006)
    frames = len(scan.image_y)
    motion = 6 * rng.standard_normal((frames, 1))
    time = np.linspace(0, rng.uniform(4, 12), frames)[:, None]
    motion += 10 * np.sin(time + rng.uniform(0, 6))
    x, y = scan.image_x, scan.image_y
    slope = tilt[0] * x + tilt[1] * y - bow * (x**2 + y**2)
    bruch = level * scan.rows * scan.row_um + motion + 1000 * slope + cup + inside * 60
    top = -thickness[:CHOROID].sum(0, keepdims=True)
    surface = bruch + np.cumsum(np.concatenate([top, thickness[:-1]]), 0)
    return (surface / scan.row_um).astype(np.float32)


def vessel_cover(eye, scan):
    """Share of each A-scan that lies under a retinal vessel -> float32 (frames, columns)."""
    tree = cKDTree(eye["vessels"][:, :2])
    distance, nearest = tree.query(np.stack(np.broadcast_arrays(scan.x, scan.y), -1))
    width, pixel = eye["vessels"][nearest, 2], scan.pitch.max()
    # softened where a pixel is wider than the vessel
    cover = np.clip(0.5 + (width / 2 - distance) / pixel, 0, np.minimum(1, width / pixel))
    return cover.astype(np.float32)


def choroid_waves(eye, scan):
    """Phases of the two patterns of the choroid's vessels -> float32 (2, frames, columns)."""
    patterns = [
        sum(a * np.sin(u * scan.x + v * scan.y + phase) for (a, u, v), phase in zip(waves, phases))
        for waves, phases in zip(TABLES["choroid_waves"], eye["phases"])
    ]
    return np.array(patterns, np.float32)


def find_spots(eye, scan):
    """Foci and cysts in pixels -> list of (first, last, middle, sigma, sigma_row, height, gain).

    first, last: the first frame and column that the spot touches, and the last of each + 1.
    middle, sigma: (2,) along frames and columns; sigma_row: along rows. Sigma is half a pixel at
    least, or a coarse scan would miss the small ones.
    """
    x, y, height, lateral, axial, gain = eye["spots"].T
    centre_x, centre_y = scan.centre
    offset = np.stack([y - centre_y, (x - centre_x) * scan.side])  # mm from the image's middle
    middle = offset / scan.pitch + (scan.size - 1) / 2
    sigma = np.maximum(lateral / 1000 / scan.pitch, 0.5)
    first = np.ceil(middle - 3 * sigma).clip(0, scan.size).astype(int)
    last = (np.floor(middle + 3 * sigma) + 1).clip(0, scan.size).astype(int)
    sigma_row = np.maximum(axial / scan.row_um, 0.5)
    return list(zip(first.T.tolist(), last.T.tolist(), middle.T, sigma.T, sigma_row, height, gain))


def add_spot(image, part, surface, z, first, last, middle, sigma, sigma_row, height, gain):
    """Brighten or darken the B-scans `part` by what lies of one spot in them, in place."""
    (begin, left), (end, right) = first, last
    begin, end = max(part.start, begin), min(part.stop, end)
    if begin >= end or left >= right:
        return
    frame, column = np.arange(begin, end)[:, None], np.arange(left, right)
    upper, lower = surface[INL, begin:end, left:right], surface[ONL, begin:end, left:right]
    depth = (1 - height) * upper + height * lower  # (frames, columns), in rows
    reach = 3 * sigma_row
    rows = slice(max(0, int(depth.min() - reach)), int(depth.max() + reach) + 1)
    d2 = ((frame - middle[0]) / sigma[0]) ** 2 + ((column - middle[1]) / sigma[1]) ** 2
    d2 = d2[:, None] + ((z[:, rows] - depth[:, None]) / sigma_row) ** 2  # (frames, rows, columns)
    touched = image[begin - part.start : end - part.start, rows, left:right]
    touched *= 1 + gain * np.exp(-d2 / 2).astype(np.float32)


def detect(image, protocol, column_mm, z, rng):
    """Intensities -> grey levels: roll-off, noise, speckle, blur, log compression."""
    looks = protocol["looks"]
    gain = protocol.get("gain", 1)
    image = image * (gain * 10 ** (-protocol["rolloff"] / 10 * (z / z.size) ** 2)) + 0.004
    # speckle is exponential in intensity, and the mean of several looks is a gamma
    image *= rng.standard_gamma(looks, image.shape, dtype=np.float32) / looks
    blur = np.float32(0.25 * min(1, 0.02 / column_mm))  # the light spot is 20 um wide
    image[..., 1:-1] = (1 - 2 * blur) * image[..., 1:-1] + blur * (image[..., :-2] + image[..., 2:])
    # RNFL lies at about 0 dB, noise at about -24 dB; log10 is slower
    decibel = np.log(image) * np.float32(10 / np.log(10))
    return np.clip((decibel + 22.5) * (255 / 30), 0, 255)


# -------------------------------------------------------------------------------------- files


def write_dicom(path, volume, spacing, syntax, participant, protocol, laterality, date, uids):
    """Write volume, uint8 (frames, rows, columns), as one multi-frame file. spacing: mm in the same
    order. syntax: transfer syntax. uids: of study, series and instance."""
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    compressed = syntax.is_encapsulated
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian if compressed else syntax
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = uids
    for name, value in TABLES["dicom"].items():
        setattr(ds, name, value)
    ds.Manufacturer, ds.ManufacturerModelName = protocol["maker"], protocol["model"]
    ds.SeriesDescription = "synthetic phantom, " + protocol["region"]
    ds.PatientID = ds.PatientName = participant
    ds.StudyDate = date.replace("-", "")
    ds.Laterality = ds.ImageLaterality = laterality
    ds.NumberOfFrames, ds.Rows, ds.Columns = volume.shape
    measures, shared = Dataset(), Dataset()
    measures.SliceThickness, measures.PixelSpacing = spacing[0], list(spacing[1:])
    shared.PixelMeasuresSequence = [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PixelData = volume.tobytes() + b"\0" * (volume.size % 2)
    ds["PixelData"].VR = "OB"
    if compressed:
        if syntax == uid.JPEG2000Lossless and min(volume.shape[1:]) < 32:
            syntax = uid.JPEGLSLossless  # openjpeg's six resolutions need 32 pixels
        ds.compress(syntax, generate_instance_uid=False)  # a new uid would be random
    ds.save_as(path, enforce_file_format=True)


def scans_of(index):
    """Scans of the index-th participant -> list of (protocol, laterality)."""
    scans = []
    for k, protocol in enumerate(PROTOCOLS):
        every = protocol["every"]
        sides = "" if k else "LR"  # the first is the main protocol
        if index % every == k % every:
            sides += "LR"[index // every % 2]
        scans += [(protocol, laterality) for laterality in sides]
    return scans


def write_participant(person, root, seed, effect, scale):
    """Write all scans of one participant -> their rows of the manifest, lists in the
    order of MANIFEST_COLUMNS."""
    from pydicom import uid

    index, participant, rows = person["index"], person["participant_id"], []
    gains = TABLES["confounded"]["gains"] if effect == "confounded" else {}
    for scan, (protocol, laterality) in enumerate(scans_of(index)):
        shape = tuple(max(4, round(n * s)) for n, s in zip(protocol["shape"], scale))
        eye = draw_eye(seed, index, laterality, person["age"], person["label"], effect)
        protocol = protocol | {"gain": gains.get(person["clinical_site"], 1)}
        volume = synthesize(eye, protocol, shape, np.random.default_rng([seed, index, 3 + scan]))
        frames_mm, columns_mm = protocol["extent"]
        extent = frames_mm, protocol["axial"] * protocol["shape"][1] / 1000, columns_mm
        spacing = [float(f"{mm / n:.5g}") for mm, n in zip(extent, shape)]
        source = ["phantom", str(seed), effect, str(scale), participant]
        uids = [
            uid.generate_uid(entropy_srcs=[*source, what])
            for what in ("study", f"series {scan}", f"instance {scan}")
        ]
        maker, model, region = (protocol[key] for key in ("maker", "model", "region"))
        folder = f"/retinal_oct/structural_oct/{maker}_{model}/{participant}".lower()
        path = f"{folder}/{participant}_{protocol['stem']}_{laterality.lower()}_{uids[2]}.dcm"
        os.makedirs(f"{root}{folder}", exist_ok=True)
        syntax = getattr(uid, SYNTAXES[(index + scan) % len(SYNTAXES)])
        date, place = person["study_visit_date"], f"{root}{path}"
        write_dicom(place, volume, spacing, syntax, participant, protocol, laterality, date, uids)
        geometry = shape[1], shape[2], shape[0], spacing[1:], spacing[0]
        rows.append(
            [participant, maker, model, region, "OCT", laterality, *geometry, uids[2], path, "", ""]
        )
    return rows


def apportion(total, shares, least=1):
    """Whole numbers that add up to total, in the ratio of shares, by largest remainder, none of
    them below least."""
    exact = np.array(shares) * total / sum(shares)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    while counts.min() < least <= total // len(counts):
        counts[counts.argmin()] += 1
        counts[counts.argmax()] -= 1
    return counts.tolist()


def draw_participants(participants, seed, effect="boosted"):
    """-> list of dicts sorted by id: a row of participants.tsv each, and besides label and index
    (for the seeds). With the effect "confounded", the class decides how likely each site is."""
    rng, rng_site = np.random.default_rng([seed]), np.random.default_rng([seed, 1])
    without_oct = max(1, round(0.006 * participants))
    with_oct = participants - without_oct
    if with_oct < len(SPLITS) * len(GROUPS) or participants > 2900:
        raise ValueError(
            f"participants={participants} is too few to have all classes in all splits, or too "
            "many for ids of four digits; take 13 to 2900"
        )
    cells = []  # (split, label, has OCT)
    totals = apportion(with_oct, [sum(counts) for counts in SPLITS.values()], least=len(GROUPS))
    for (split, counts), total in zip(SPLITS.items(), totals):
        for label, n in enumerate(apportion(total, counts)):
            cells += [(split, label, True)] * n
    cells += [("train", int(rng.integers(4)), False) for _ in range(without_oct)]
    rows = []
    for i in rng.permutation(len(cells)):  # so that an id says nothing about split and class
        split, label, has_oct = cells[i]
        site, first_id = SITES[i % 3]  # in turn: each split and class has all three
        if effect == "confounded":
            site, first_id = SITES[rng_site.choice(3, p=TABLES["confounded"]["shares"][label])]
        age = int(np.clip(rng.normal(60, 11), 40, 85))
        visit = np.datetime64("2000-01-01") + rng.integers(365)
        number = first_id + sum(row["clinical_site"] == site for row in rows)
        drawn = {
            "participant_id": str(number),
            "clinical_site": site,
            "study_group": GROUPS[label],
            "age": age,
            "study_visit_date": str(visit),
            "recommended_split": split,
            "retinal_oct": str(has_oct).upper(),
            "label": label,
        }
        rows.append(dict.fromkeys(PARTICIPANT_COLUMNS, "TRUE") | drawn)
    rows.sort(key=lambda row: row["participant_id"])
    return [row | {"index": i} for i, row in enumerate(rows)]


def measurements(people, seed):
    """Rows of OMOP's table of measurements: HbA1c of everybody, and another value beside it."""
    rng, rows = np.random.default_rng([seed, 3004410]), []
    for person in people:
        mean, sd = TABLES["hba1c"][person["label"]]
        hba1c, cholesterol = round(max(4.0, rng.normal(mean, sd)), 1), int(rng.normal(190, 35))
        for concept, value in ((3004410, hba1c), (3027114, cholesterol)):
            rows.append([len(rows) + 1, person["participant_id"], concept, value])
    return rows


def write_table(path, rows):
    """Write rows, lists of values of which the first is the header, as a TSV file."""
    files.write(path, "".join("\t".join(map(str, row)) + "\n" for row in rows))


def is_running(pid):
    """Is there a process of this number, a text, on this host?"""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def write_dataset(
    root, participants=60, seed=0, effect="boosted", scale=(1 / 8, 1 / 4, 1 / 8), processes=None
):
    """Write the data set into the new folder root -> its Path. It appears there complete or not
    at all.

    participants  rows of participants.tsv, some of them without OCT; 13 to 2900
    effect        "boosted", "literature" or "confounded" (see above)
    scale         share of the real number of (frames, rows, columns); the covered mm stay the same
    processes     default: one per core; the files do not depend on it
    """
    root = Path(root).resolve()
    scale = tuple(map(float, scale))
    if effect not in EFFECTS:
        raise ValueError(f"effect={effect!r} is unknown, it is one of {sorted(EFFECTS)}")
    if len(scale) != 3 or not all(0 < s <= 1 for s in scale):
        raise ValueError(
            f"scale={scale} must be three numbers above 0 and up to 1, for (frames, rows, columns)"
        )
    people = draw_participants(participants, seed, effect)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} exists and is not an empty folder: remove it or choose another one"
        )

    for left in root.parent.glob(f"{root.name}.*.part"):
        if not is_running(left.name.split(".")[-2]):  # its writer was killed
            shutil.rmtree(left, ignore_errors=True)
    part = root.with_name(f"{root.name}.{os.getpid()}.part")
    job = functools.partial(write_participant, root=part, seed=seed, effect=effect, scale=scale)
    # fork starts in no time and needs no importable __main__. It is safe beside torch because the
    # children only run numpy, scipy and pydicom: torch's threads, which do not survive a fork, are
    # never called there.
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), begin.end_with_parent
    )
    facts = {"effect": effect, "participants": participants, "seed": seed, "scale": scale}
    try:
        with_oct = [person for person in people if person["retinal_oct"] == "TRUE"]
        done = pool.map(job, with_oct)  # forks, and so before the stage starts a thread
        with stages.Stage("phantom", len(with_oct), "participant", shown=True) as stage:
            manifest = [row for rows in stage.over(done) for row in rows]
        write_table(part / "retinal_oct/manifest.tsv", [MANIFEST_COLUMNS, *manifest])
        table = [[person[name] for name in PARTICIPANT_COLUMNS] for person in people]
        write_table(part / "participants.tsv", [PARTICIPANT_COLUMNS, *table])
        measured = files.csv_text([MEASUREMENT_COLUMNS, *measurements(people, seed)])
        files.write(part / "clinical_data/measurement.csv", measured)
        files.write(part / "phantom.json", json.dumps(facts) + "\n")
        os.replace(part, root)
    except OSError as error:
        reason = str(error).strip().splitlines()[-1]  # pydicom appends its traceback
        raise OSError(f"{root} not written: {reason}") from error
    finally:
        pool.shutdown(cancel_futures=True)  # first, or a child would still write
        shutil.rmtree(part, ignore_errors=True)
    return root


def write_encoder(path, image_size=(16, 96, 96), dim=128, depth=4, seed=0, optimizer=False):
    """Write a small encoder with RANDOM weights, in the format of the pretraining's checkpoints.

    Random weights suffice for the demo: mean-pooled tokens of a random network show the boosted
    effect. optimizer: with AdamW's two moments of the context encoder and the predictor, which
    double the file.
    """
    import torch
    from torch import nn

    import model

    torch.manual_seed(seed)
    patch_size = [4, 16, 16]
    num_tokens = math.prod(size // patch for size, patch in zip(image_size, patch_size))
    context, target = (model.ViT3D(dim, depth, num_tokens) for _ in range(2))
    predictor = nn.Sequential(
        nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim)
    )
    state = {
        **context.state_dict(prefix="context_encoder."),
        **target.state_dict(prefix="target_encoder.encoder."),
        **predictor.state_dict(prefix="predictor.net."),
    }
    moments = {"state": {}, "param_groups": []}
    if optimizer:  # of one step that changes no weight
        trained = [*context.parameters(), *predictor.parameters()]
        adam = torch.optim.AdamW(trained, lr=0.0)
        sum(p.sum() for p in trained).backward()
        adam.step()
        moments = adam.state_dict()
    checkpoint = {
        "epoch": 0,
        "step": 0,
        "model_state_dict": state,
        "optimizer_state_dict": moments,
        "scheduler_state_dict": {},
        "loss": float("nan"),
        "config": {
            "experiment_name": "random_demo_encoder",
            "seed": seed,
            "image_size": list(image_size),
            "patch_size": patch_size,
            "num_heads": context.num_heads,
            "layer_norm_eps": context.eps,
            "activation": context.activation,
        },
    }
    files.write(path, lambda file: torch.save(checkpoint, file))


def prepare(cfg):
    """Write what a demo's paths.data and paths.checkpoint_path miss below demo.dir; does nothing
    without demo.dir."""
    if cfg.demo.dir is None:
        return

    def below(path):
        is_local = path and "://" not in path
        return is_local and Path(cfg.demo.dir).resolve() in Path(path).resolve().parents

    encoder, data = cfg.paths.checkpoint_path or "", cfg.paths.data
    participants, effect = cfg.demo.participants, cfg.demo.effect
    description = Path(data, "phantom.json")

    def missing():
        proofs = {encoder: encoder, data: description}
        return [path for path in proofs if below(path) and not os.path.exists(proofs[path])]

    if missing():
        lock = os.path.join(cfg.demo.dir, ".lock")
        with files.locked(lock):  # of several processes of this host, one writes for all
            for path in missing():
                if path == encoder:
                    print(f"demo: writing a small random encoder to {encoder}")
                    write_encoder(encoder)
                else:
                    print(
                        f"demo: writing synthetic OCT volumes of {participants} participants "
                        f"({effect} class effect) to {data}"
                    )
                    write_dataset(data, participants, 0, effect)
            os.unlink(lock)
    if below(data):
        facts = json.loads(description.read_text())
        if (facts["effect"], facts["participants"]) != (effect, participants):
            raise ValueError(
                f"{data} holds {facts['participants']} participants with {facts['effect']} effect, "
                f"but the configuration asks for demo.participants={participants}, "
                f"demo.effect={effect}; remove the folder, or set demo.dir and paths.data to "
                "another one"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # write_dataset has the defaults
    )
    parser.add_argument("root", help="new folder")
    parser.add_argument("--participants", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--effect", help=" | ".join(EFFECTS))
    parser.add_argument("--scale", type=Fraction, nargs=3, metavar=("F", "R", "C"))
    args = parser.parse_args()
    try:
        print(write_dataset(**vars(args)))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
