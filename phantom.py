"""Write a synthetic OCT data set in AI-READI's layout: nothing in it comes from a person or from the real data set.

    python phantom.py data/demo                                        # 60 participants, boosted effect, a few seconds
    python phantom.py data/lit --participants 200 --effect literature --seed 1
    python phantom.py data/full --participants 30 --scale 1 1 1        # real geometry: 102 MB per Triton volume before compression
    python phantom.py --picture phantom.png                            # B-scans for the README

Written: participants.tsv, retinal_oct/manifest.tsv, multi-frame ophthalmic DICOM files under retinal_oct/structural_oct/,
and phantom.json, which says that the data is synthetic and how large the class effect is:
  literature  differences as published; hardly visible per eye, so expect a balanced accuracy close to chance
  boosted     the same directions, several times larger, plus bright foci and dark cysts: for demo and tests only
The same arguments give byte-identical files, whatever the number of processes.

A volume is (frames, rows, columns); rows run along the depth into the eye, so volume[f] is one B-scan as it is displayed.
Order of work: anatomy of an eye (draw_eye) -> layer surfaces and reflectivity -> speckle -> log compression (synthesize)
-> DICOM (write_dicom) -> tables (write_dataset).
"""
import argparse
import csv
import datetime
import functools
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless,
                         RLELossless, generate_uid)
from scipy.interpolate import PchipInterpolator
from scipy.spatial import cKDTree
from tqdm import tqdm

GROUPS = ("healthy", "pre_diabetes_lifestyle_controlled",
          "oral_medication_and_or_non_insulin_injectable_medication_controlled", "insulin_dependent")    # class 0..3
SPLITS = {"train": (290, 162, 233, 58), "val": (39, 40, 47, 33), "test": (40, 40, 41, 38)}    # AI-READI v2, with OCT
SITES = (("UW", 1001), ("UCSD", 4001), ("UAB", 7001))                                         # site, first id
SYNTAXES = (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless)
PARTICIPANT_COLUMNS = ("participant_id clinical_site study_group age study_visit_date recommended_split cardiac_ecg "
                       "clinical_data environment retinal_flio retinal_oct retinal_octa retinal_photography "
                       "wearable_activity_monitor wearable_blood_glucose").split()
MANIFEST_COLUMNS = ("participant_id manufacturer manufacturers_model_name anatomic_region imaging laterality height width "
                    "number_of_frames pixel_spacing slice_thickness sop_instance_uid filepath reference_instance_uid "
                    "reference_filepath").split()

# Real geometry (AI-READI). axial: um per row; extent: mm covered by (frames, columns); looks: frames averaged against speckle;
# reach: 1/e depth of the light below the retina in um and rolloff: loss in dB at the last row (a swept source loses less and
# sees deeper); every: written for every n-th participant, one eye (the main protocol, 1, for both eyes).
PROTOCOLS = [dict(zip("folder maker model region stem shape axial extent looks reach rolloff every".split(), row)) for row in (
    ("topcon_triton", "Topcon", "Triton", "Macula, 6 x 6", "triton_macula_6x6_oct", (320, 992, 320), 2.6, (6, 6), 3, 260, 2, 1),
    ("heidelberg_spectralis", "Heidelberg", "Spectralis", "Macula", "spectralis_ppol_mac_hr_oct", (61, 496, 768), 3.87,
     (7.2, 8.7), 9, 130, 6, 4),
    ("topcon_maestro2", "Topcon", "Maestro2", "Macula, 6 x 6", "maestro2_macula_6x6_oct", (360, 885, 360), 2.6, (6, 6), 3, 100, 6, 5),
    ("topcon_triton", "Topcon", "Triton", "Macula, 12 x 12", "triton_macula_12x12_oct", (512, 992, 512), 2.6, (12, 12), 3, 260, 2, 10),
    ("topcon_triton", "Topcon", "Triton", "Optic Disc", "triton_3d_radial_oct", (256, 992, 512), 2.6, (6, 6), 3, 260, 2, 8),
    ("zeiss_cirrus", "Zeiss", "Cirrus", "Macula", "cirrus_mac_oct_oct", (200, 1024, 200), 1.95, (6, 6), 2, 110, 6, 6))]

# Thickness in um at KNOTS mm from the fovea. The second knot is the 1-mm mean (half of that disc's area lies within 0.35 mm), the
# third and fourth the 3-mm and 6-mm ring: Spectralis controls as in the literature table, with RNFL, GCL and IPL outside the
# fovea filling up the inner retina (252 and 219 um). They give a rim of about 325 um and 278 um in the centre. The first knot
# and those beyond 3 mm are drawn by hand, as is the reflectivity (linear, RNFL = 1).
KNOTS = (0, 0.35, 1.1, 2.25, 4.5, 9)
LAYERS = {  # thickness at the knots           SD (share), per year, reflectivity
    "RNFL":    ((4, 12.6, 22, 38, 55, 40),            0.10, -0.002, 1.0),
    "GCL":     ((4, 17.6, 49, 35, 22, 14),            0.064, -0.0018, 0.26),
    "IPL":     ((10, 22, 40, 29.5, 23, 18),           0.064, -0.0018, 0.40),
    "INL":     ((8, 18.5, 40.5, 34.3, 30, 26),        0.10, 0, 0.09),
    "OPL":     ((16, 25.4, 35.3, 28, 25, 22),         0.14, 0, 0.26),
    "ONL":     ((105, 86.4, 65.5, 54.2, 48, 42),      0.13, 0, 0.035),
    "myoid":   ((22, 20, 16, 15, 14, 13),             0.05, 0, 0.06),      # inner segments, dark part
    "EZ":      ((20, 19, 18, 17, 16, 15),             0.05, 0, 0.9),       # ellipsoid zone
    "OS":      ((45, 39, 26, 24, 22, 20),             0.05, 0, 0.2),       # outer segments
    "RPE":     ((18, 17.6, 16, 15, 14, 14),           0.11, 0, 1.4),
    "choroid": ((302, 302, 285, 250, 200, 150),       0.27, -0.005, 0.35),
    "sclera":  ((2000,) * 6,                          0, 0, 0.16)}
NAMES = list(LAYERS)
THICKNESS, SD, AGEING, REFLECTIVITY = (np.array(column) for column in zip(*LAYERS.values()))
# mirrored at 0, so that the bottom of the pit is round: radius in mm -> (layers, ...) in um
PROFILE = PchipInterpolator((-KNOTS[1], *KNOTS), THICKNESS[:, [1, *range(len(KNOTS))]], axis=1)
DISC = (4.4, 0.6)                                    # centre of the optic disc, mm nasal and above the fovea

# The only place where the label matters. Share by which (RNFL, GCL+IPL, INL+OPL, photoreceptors) change, number of bright foci
# and of dark cysts in INL-OPL of the central 6 x 6 mm. Literature: diabetes without retinopathy has GCIPL -1.7, RNFL -0.7 and
# photoreceptors -0.9 um (class 2; class 1 half of it); of class 3, a share MODERATE (our guess) has moderate retinopathy with
# GCIPL -11..-15 % and INL+OPL +8..+18 %, the others are as class 2.
EFFECTS = {"literature": ((0, 0, 0, 0, 0, 0), (-0.014, -0.01, 0, -0.006, 0, 0), (-0.028, -0.02, 0, -0.012, 0, 0),
                          (-0.028, -0.02, 0, -0.012, 0, 0)),
           "boosted": ((0, 0, 0, 0, 0, 0), (-0.15, -0.20, 0.30, -0.08, 80, 30), (-0.30, -0.40, 0.60, -0.16, 180, 70),
                       (-0.45, -0.60, 0.90, -0.24, 300, 120))}
MODERATE = 0.4


def draw_eye(seed, index, laterality, age, label, effect):
    """-> anatomy of one eye: factor per layer, pit width, vessels, foci, cysts. Every scan of this eye shares it.

    Nothing that is drawn depends on the label, so the same participant with another label is the same eye plus the effect.
    """
    person = np.random.default_rng([seed, index, 0])
    eye = np.random.default_rng([seed, index, 1 + (laterality == "L")])
    # the eyes of a person correlate 0.73-0.95 in the literature: 0.85
    both = lambda size: np.sqrt(0.85) * person.standard_normal(size) + np.sqrt(0.15) * eye.standard_normal(size)
    z = both(len(LAYERS)).clip(-2.5, 2.5)
    z[NAMES.index("IPL")] = z[NAMES.index("GCL")]    # their SD is known for the sum only
    factor = (1 + SD * z) * (1 + AGEING * (age - 60))
    pit = 1 + 0.04 * both(1).clip(-2.5, 2.5)         # pit diameter 2.2-2.45 mm

    *change, foci, cysts = EFFECTS[effect][label]
    has_moderate, how_much = person.random(2)
    if effect == "literature" and label == 3 and has_moderate < MODERATE:
        change[1:3] = -0.11 - 0.04 * how_much, 0.08 + 0.10 * how_much
    for share, names in zip(change, (["RNFL"], ["GCL", "IPL"], ["INL", "OPL"], ["myoid", "EZ", "OS"])):
        factor[[NAMES.index(name) for name in names]] *= 1 + share

    # spots: x, y (mm), height between the surfaces of INL and ONL (0..1), lateral and axial sigma (um), gain of the reflectivity
    def spots(count, shown, lateral, axial, gain):
        x, y = eye.uniform(-3, 3, (2, count))
        size = eye.uniform(0.7, 1.3, count)
        return np.stack([x, y, eye.uniform(0.2, 0.8, count), lateral * size, axial * size, np.full(count, gain)], 1)[:shown]
    spots = np.concatenate([spots(300, foci, 50, 15, 20.0), spots(120, cysts, 140, 28, -0.9)])

    # vessels: rows of x, y, width (mm); two pairs of arcades from the disc around the macula, branches that leave the centre
    # free (avascular zone), and a few on the nasal side
    t, curves = np.linspace(0, 1, 400), []
    wobble = lambda: 0.08 * np.sin(2 * np.pi * (eye.uniform(1, 3) * t + eye.random())) * np.minimum(1, 5 * t)
    for up, far in ((1, 2.3), (1, 3.1), (-1, 2.3), (-1, 3.1)):
        far = far + eye.uniform(-0.3, 0.3)
        arcade = DISC[0] - 9 * t, DISC[1] * (1 - t) + up * far * (1 - (1 - t) ** 4) + wobble(), 0.15 - 0.06 * t
        curves.append(arcade)
        for begin in eye.integers(40, 330, 5):
            end = np.array([eye.uniform(-2.8, 2.8), up * eye.uniform(-0.4, 0.5)])
            end *= max(1, 0.5 / np.hypot(*end))
            curves.append((arcade[0][begin] * (1 - t) + end[0] * t + wobble(), arcade[1][begin] * (1 - t) + end[1] * t + wobble(),
                           eye.uniform(0.07, 0.1) - 0.02 * t))
    for angle in eye.uniform(-1.4, 1.4, 4):
        curves.append((DISC[0] + 4 * t * np.cos(angle), DISC[1] + 4 * t * np.sin(angle) + wobble(), 0.12 - 0.05 * t))
    return {"laterality": laterality, "factor": factor, "pit": pit, "spots": spots, "phases": eye.uniform(0, 2 * np.pi, 6),
            "vessels": np.concatenate([np.stack(curve, 1) for curve in curves])}


def synthesize(eye, protocol, shape, rng):
    """-> uint8 (frames, rows, columns): one scan of an eye, with its own speckle, fixation, tilt and motion."""
    frames, rows, columns = shape
    row_um = protocol["axial"] * protocol["shape"][1] / rows
    frame_mm, column_mm = protocol["extent"][0] / frames, protocol["extent"][1] / columns

    # where each A-scan hits the retina, mm nasal of and above the fovea: (frames, columns). In a right eye nasal is on the right.
    centre = DISC if protocol["region"] == "Optic Disc" else (0, 0)
    fixation, drift = rng.normal(0, 0.1, 2), rng.normal(0, 0.01, (frames, 1))
    image_x = (np.arange(columns) - (columns - 1) / 2) * column_mm + np.zeros((frames, 1))
    image_y = (np.arange(frames)[:, None] - (frames - 1) / 2) * frame_mm + np.zeros(columns)
    side = 1 if eye["laterality"] == "R" else -1
    x = side * image_x + centre[0] + fixation[0] + drift
    y = image_y + centre[1] + fixation[1]

    # layer surfaces in rows: (layers, frames, columns); surface[k] is the upper limit of layer k
    radius = np.hypot(x, y)
    # only the pit is wider or narrower, not the whole macula
    radius = radius / (1 + (eye["pit"] - 1) * np.exp(-(radius / 2) ** 2))
    thickness = PROFILE(radius.clip(0, KNOTS[-1])) * eye["factor"][:, None, None]
    disc = np.hypot(x - DISC[0], (y - DISC[1]) / 1.1)
    inside = 1 / (1 + np.exp((disc - 0.85) / 0.05))                  # optic disc, radius 0.85 mm: nerve fibres only, and a cup
    thickness[0] *= 1 + 0.12 * np.tanh(x / 2) + 1.2 * np.exp(-((disc - 0.9) / 0.6) ** 2)   # thicker towards the disc
    thickness[0] += 120 * inside
    thickness[1:10] *= 1 - inside
    tilt, bow, level = rng.normal(0, 0.006, 2), rng.normal(1 / 200, 1 / 1200), rng.normal(0.52, 0.006)
    motion = 6 * rng.standard_normal((frames, 1))                    # um, per B-scan; and a slow drift
    motion += 10 * np.sin(np.linspace(0, rng.uniform(4, 12), frames)[:, None] + rng.uniform(0, 6))
    bruch = (level * rows * row_um + motion + 1000 * (tilt[0] * image_x + tilt[1] * image_y - bow * (image_x ** 2 + image_y ** 2))
             + inside * 350 * np.exp(-(disc / 0.45) ** 2) + inside * 60)
    surface = bruch + np.cumsum(np.concatenate([-thickness[:10].sum(0, keepdims=True), thickness[:-1]]), 0)
    surface = (surface / row_um).astype(np.float32)

    # share of each A-scan that lies under a vessel, softened where a pixel is wider than the vessel: (frames, columns)
    distance, nearest = cKDTree(eye["vessels"][:, :2]).query(np.stack([x, y], -1))
    width, pixel = eye["vessels"][nearest, 2], max(frame_mm, column_mm)
    vessel = np.clip(0.5 + (width / 2 - distance) / pixel, 0, np.minimum(1, width / pixel)).astype(np.float32)
    a, b, c, d, e, f = eye["phases"]
    phase_1 = (2.2 * np.sin(3.1 * x + 2.3 * y + a) + 1.6 * np.sin(4.7 * y - 5.3 * x + b) + np.sin(11 * x + 5 * y + c)).astype(np.float32)
    phase_2 = (2.2 * np.sin(3.7 * x - 1.9 * y + d) + 1.6 * np.sin(4.1 * y + 6.1 * x + e) + np.sin(9 * x - 7 * y + f)).astype(np.float32)

    # foci and cysts: centre and sigma in pixels along (frames, columns), at least half a pixel, or a coarse scan would miss them;
    # box: first and last + 1 frame and column that each one touches
    sx, sy, height, lateral, axial, spot_gain = eye["spots"].T
    pitch = np.array([[frame_mm], [column_mm]])
    middle = np.stack([sy - centre[1] - fixation[1], (sx - centre[0] - fixation[0]) * side]) / pitch
    middle += [[(frames - 1) / 2], [(columns - 1) / 2]]
    sigma = np.maximum(lateral / 1000 / pitch, 0.5)
    box = np.concatenate([np.ceil(middle - 3 * sigma), np.floor(middle + 3 * sigma) + 1])             # (4, spots)
    box = box.clip(0, [[frames], [columns]] * 2).astype(int)
    sigma_row = np.maximum(axial / row_um, 0.5)

    z = np.arange(rows, dtype=np.float32)[None, :, None]
    gain = 10 ** (-protocol["rolloff"] / 10 * (z / rows) ** 2)
    steps = np.diff(REFLECTIVITY, prepend=0.0).astype(np.float32)
    blur = np.float32(0.25 * min(1, 0.02 / column_mm))              # the light spot is about 20 um wide
    volume = np.empty(shape, np.uint8)
    slab = max(1, 2 ** 17 // (rows * columns))                      # B-scans at a time: bounds memory, fits the processor cache
    buffer = np.empty((len(LAYERS), slab, rows, columns), np.float32)    # share of each pixel that lies below surface k
    for start in range(0, frames, slab):
        part = slice(start, start + slab)
        below = buffer[:, :min(slab, frames - start)]
        np.subtract(z, surface[:, part, None] - np.float32(0.5), out=below)
        below.clip(0, 1, out=below)
        image = np.full(below[0].shape, 0.0004, np.float32)
        for step, share in zip(steps, below):
            image += step * share
        # light is lost below the retina; the choroid is a sponge of dark vessels
        depth_um = np.maximum(z - surface[10, part, None], 0) * np.float32(row_um)
        image *= np.exp(depth_um * np.float32(-1 / protocol["reach"]))
        sponge = np.sin(phase_1[part, None] + depth_um * np.float32(0.038)) * np.sin(phase_2[part, None] - depth_um * np.float32(0.027))
        image *= 1 + np.float32(0.7) * sponge * (below[10] - below[11])
        # blood scatters within the inner layers and takes the light from everything below
        image += 0.5 * vessel[part, None] * (below[0] - below[2])
        image *= 1 - 0.85 * vessel[part, None] * below[2]
        for i in np.flatnonzero((box[0] < start + slab) & (box[2] > start) & (box[0] < box[2]) & (box[1] < box[3])):
            f = np.arange(max(start, box[0, i]), min(start + slab, box[2, i]))[:, None]
            c = np.arange(box[1, i], box[3, i])
            depth = (1 - height[i]) * surface[3, f, c] + height[i] * surface[5, f, c]               # (f, c)
            top, bottom = max(0, int(depth.min() - 3 * sigma_row[i])), int(depth.max() + 3 * sigma_row[i]) + 1
            d2 = ((f - middle[0, i]) / sigma[0, i]) ** 2 + ((c - middle[1, i]) / sigma[1, i]) ** 2
            d2 = d2[:, None] + ((z[:, top:bottom] - depth[:, None]) / sigma_row[i]) ** 2            # (f, rows, c)
            touched = image[f[0, 0] - start:f[-1, 0] - start + 1, top:bottom, c[0]:c[-1] + 1]
            touched *= 1 + spot_gain[i] * np.exp(-d2 / 2).astype(np.float32)
        # detection: roll-off, noise, speckle (exponential in intensity; a mean of several looks is a gamma), log compression
        image = image * gain + np.float32(0.004)
        image *= rng.standard_gamma(protocol["looks"], image.shape, dtype=np.float32) / np.float32(protocol["looks"])
        image[..., 1:-1] = (1 - 2 * blur) * image[..., 1:-1] + blur * (image[..., :-2] + image[..., 2:])
        decibel = np.log(image) * np.float32(10 / np.log(10))       # RNFL about 0, noise about -24; (log10 is slower)
        volume[part] = np.clip((decibel + np.float32(22.5)) * np.float32(255 / 30), 0, 255)
    return volume


def write_dicom(path, volume, spacing, syntax, participant, protocol, laterality, date, uids):
    """volume uint8 (frames, rows, columns), spacing in mm in the same order -> one multi-frame file."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_encapsulated else syntax
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.5.4"             # Ophthalmic Tomography Image Storage
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = uids
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "OPT", protocol["maker"], protocol["model"]
    ds.SeriesDescription = "synthetic phantom, " + protocol["region"]
    ds.PatientID = ds.PatientName = participant
    ds.PatientBirthDate = ds.PatientSex = ds.AccessionNumber = ds.StudyTime = ds.ReferringPhysicianName = ""
    ds.StudyDate, ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = date.replace("-", ""), "1", 1, 1
    ds.Laterality = ds.ImageLaterality = laterality
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.NumberOfFrames, ds.Rows, ds.Columns = volume.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    measures, shared = Dataset(), Dataset()
    measures.SliceThickness, measures.PixelSpacing = spacing[0], list(spacing[1:])
    shared.PixelMeasuresSequence = [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PixelData = volume.tobytes() + b"\0" * (volume.size % 2)
    ds["PixelData"].VR = "OB"
    if syntax.is_encapsulated:
        if syntax == JPEG2000Lossless and min(volume.shape[1:]) < 32:
            syntax = JPEGLSLossless                                 # openjpeg's six resolutions need 32 pixels
        ds.compress(syntax, generate_instance_uid=False)            # a new uid would be random
    ds.save_as(path, enforce_file_format=True)


def write_participant(person, root, seed, effect, scale):
    """Write all scans of one participant -> their rows of the manifest."""
    index, participant = person["index"], person["participant_id"]
    scans = []                                                      # (protocol, laterality)
    for k, protocol in enumerate(PROTOCOLS):
        if protocol["every"] == 1:
            scans += [(protocol, "L"), (protocol, "R")]
            if index % 5 == 0:                                      # a repeat of one eye
                scans.append((protocol, "LR"[index // 5 % 2]))
        elif index % protocol["every"] == k % protocol["every"]:
            scans.append((protocol, "LR"[index // protocol["every"] % 2]))
    rows = []
    for scan, (protocol, laterality) in enumerate(scans):
        shape = tuple(max(4, round(n * s)) for n, s in zip(protocol["shape"], scale))
        eye = draw_eye(seed, index, laterality, person["age"], person["label"], effect)
        volume = synthesize(eye, protocol, shape, np.random.default_rng([seed, index, 3 + scan]))
        extent = protocol["extent"][0], protocol["axial"] * protocol["shape"][1] / 1000, protocol["extent"][1]
        spacing = [float(f"{mm / n:.5g}") for mm, n in zip(extent, shape)]
        uids = [generate_uid(entropy_srcs=["phantom", str(seed), effect, str(scale), participant, what])
                for what in ("study", f"series {scan}", f"instance {scan}")]
        name = f"{participant}_{protocol['stem']}_{laterality.lower()}_{uids[2]}.dcm"
        path = f"/retinal_oct/structural_oct/{protocol['folder']}/{participant}/{name}"
        (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        write_dicom(root / path[1:], volume, spacing, SYNTAXES[(index + scan) % len(SYNTAXES)], participant, protocol,
                    laterality, person["study_visit_date"], uids)
        rows.append(dict(participant_id=participant, manufacturer=protocol["maker"], manufacturers_model_name=protocol["model"],
                         anatomic_region=protocol["region"], imaging="OCT", laterality=laterality, height=shape[1],
                         width=shape[2], number_of_frames=shape[0], pixel_spacing=str(spacing[1:]), slice_thickness=spacing[0],
                         sop_instance_uid=uids[2], filepath=path, reference_instance_uid="", reference_filepath=""))
    return rows


def apportion(total, shares, least=1):
    """Whole numbers that add up to total, in the ratio of shares, by largest remainder, none of them below least."""
    exact = np.array(shares) * total / sum(shares)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[:total - counts.sum()]] += 1
    while counts.min() < least <= total // len(counts):
        counts[counts.argmin()] += 1
        counts[counts.argmax()] -= 1
    return counts.tolist()


def draw_participants(participants, seed):
    """-> one dict per row of participants.tsv, sorted by id, with index (for the seeds) and label besides."""
    rng = np.random.default_rng([seed])
    without_oct = max(1, round(0.006 * participants))
    cells = []                                                      # (split, label, has OCT)
    if participants - without_oct < len(SPLITS) * len(GROUPS):
        raise ValueError(f"participants={participants} is too few to have all classes in all splits; take 13 or more")
    for split, count in zip(SPLITS, apportion(participants - without_oct, [sum(c) for c in SPLITS.values()], least=len(GROUPS))):
        for label, n in enumerate(apportion(count, SPLITS[split])):
            cells += [(split, label, True)] * n
    cells += [("train", int(rng.integers(4)), False) for _ in range(without_oct)]
    cells = [(*cell, i % 3) for i, cell in enumerate(cells)]        # sites in turn: each split and class has all three
    rows = []
    for i in rng.permutation(len(cells)):                           # so that an id says nothing about split and class
        split, label, has_oct, site = cells[i]
        name, first = SITES[site]
        row = dict.fromkeys(PARTICIPANT_COLUMNS, "TRUE")
        row.update(participant_id=str(first + sum(r["clinical_site"] == name for r in rows)), clinical_site=name,
                   study_group=GROUPS[label], age=int(np.clip(rng.normal(60, 11), 40, 85)), recommended_split=split, label=label,
                   study_visit_date=str(datetime.date(2000, 1, 1) + datetime.timedelta(int(rng.integers(365)))),
                   retinal_oct=str(has_oct).upper())
        rows.append(row)
    rows.sort(key=lambda row: row["participant_id"])
    return [dict(row, index=i) for i, row in enumerate(rows)]


def write_table(path, columns, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_dataset(root, participants=60, seed=0, effect="boosted", scale=(1/8, 1/4, 1/8), processes=None):
    """Write the data set into the new folder root -> its Path. It appears there complete or not at all.

    participants  rows of participants.tsv, some of them without OCT; 13 to 2900
    effect        "boosted" or "literature" (see above)
    scale         share of the real number of (frames, rows, columns); the covered mm stay the same
    processes     default: one per core; the files do not depend on it
    """
    root = Path(root).resolve()
    scale = tuple(float(s) for s in scale)
    if effect not in EFFECTS:
        raise ValueError(f"effect={effect!r} is unknown, it is one of {sorted(EFFECTS)}")
    if len(scale) != 3 or not all(0 < s <= 1 for s in scale):
        raise ValueError(f"scale={scale} must be three numbers above 0 and up to 1, for (frames, rows, columns)")
    if seed < 0 or participants > 2900 or (processes is not None and processes < 1):
        raise ValueError(f"seed={seed} must be 0 or more, participants={participants} at most 2900, processes={processes} 1 or more")
    people = draw_participants(participants, seed)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not an empty folder: remove it or choose another one")

    part = root.with_name(f"{root.name}.{os.getpid()}.part")
    job = functools.partial(write_participant, root=part, seed=seed, effect=effect, scale=scale)
    # fork starts in no time and needs no importable __main__. It is safe beside torch because the children only run numpy,
    # scipy and pydicom: torch's threads, which do not survive a fork, are never called there.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(processes or os.cpu_count(), multiprocessing.get_context(method))
    try:
        (part / "retinal_oct").mkdir(parents=True)
        with_oct = [person for person in people if person["retinal_oct"] == "TRUE"]
        manifest = [row for rows in tqdm(pool.map(job, with_oct), "phantom", len(with_oct), unit=" participants") for row in rows]
        write_table(part / "retinal_oct/manifest.tsv", MANIFEST_COLUMNS, manifest)
        write_table(part / "participants.tsv", PARTICIPANT_COLUMNS, people)
        (part / "phantom.json").write_text(json.dumps(dict(effect=effect, participants=participants, seed=seed, scale=scale)) + "\n")
        os.replace(part, root)
    except OSError as error:
        raise OSError(f"{root} not written: {str(error).strip().splitlines()[-1]}") from error    # pydicom appends its traceback
    finally:
        pool.shutdown(cancel_futures=True)                          # first, or a child would still write
        shutil.rmtree(part, ignore_errors=True)
    return root


def picture(path, seed=5):
    """Save a figure: the central B-scan of each scanner, and one eye as it would be in each class (boosted)."""
    from matplotlib.figure import Figure                            # no pyplot: no display, no global state

    figure = Figure(figsize=(15, 6.4), layout="constrained")
    axes = figure.subplots(2, 4)
    shown = [(PROTOCOLS[k], 0, f"{PROTOCOLS[k]['model']}, {PROTOCOLS[k]['region']}") for k in (1, 2, 5, 4)]
    shown += [(PROTOCOLS[0], label, f"Triton, class {label}: {GROUPS[label].split('_')[0]} (boosted)") for label in range(4)]
    for axis, (protocol, label, title) in zip(axes.flat, shown):
        shape = (41, *protocol["shape"][1:])
        volume = synthesize(draw_eye(seed, 0, "R", 60, label, "boosted"), protocol, shape, np.random.default_rng([seed, 0, 3]))
        depth = protocol["axial"] * shape[1] / 1000
        axis.imshow(volume[20], cmap="gray", vmin=0, vmax=255, extent=(0, protocol["extent"][1], depth, 0), aspect="auto")
        axis.set_ylim(0.5 * depth + 0.7, 0.5 * depth - 0.6)
        axis.set(title=title, xlabel="mm", ylabel="depth in mm")
    figure.savefig(path, dpi=100)


def write_encoder(path, image_size=(16, 96, 96), dim=128, depth=4, seed=0, optimizer=False):
    """Write a small encoder with RANDOM weights, in the format of the pretraining's checkpoints.

    Random suffices for the demo: mean-pooled tokens of a random network show the boosted effect. optimizer: with AdamW's two moments
    of the context encoder and the predictor, which double the file.
    """
    import torch

    import b2
    import model

    torch.manual_seed(seed)
    num_tokens = (image_size[0] // 4) * (image_size[1] // 16) * (image_size[2] // 16)
    context, target = (model.ViT3D(dim, depth, num_tokens).state_dict() for _ in range(2))
    predictor = torch.nn.Sequential(torch.nn.Linear(dim, dim), torch.nn.BatchNorm1d(dim), torch.nn.ReLU(), torch.nn.Linear(dim, dim))
    state = {**{f"context_encoder.{k}": v for k, v in context.items()}, **{f"target_encoder.encoder.{k}": v for k, v in target.items()},
             **{f"predictor.net.{k}": v for k, v in predictor.state_dict().items()}}
    trained = [v for k, v in state.items() if v.is_floating_point() and not k.startswith("target_encoder.")] if optimizer else []
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.randn_like(v), "exp_avg_sq": torch.rand_like(v)}
               for i, v in enumerate(trained)}
    groups = [{"lr": 1e-4, "params": list(moments)}] if optimizer else []
    checkpoint = {
        "epoch": 0, "step": 0, "model_state_dict": state,
        "optimizer_state_dict": {"state": moments, "param_groups": groups}, "scheduler_state_dict": {}, "loss": float("nan"),
        "config": {"experiment_name": "random_demo_encoder", "seed": seed, "image_size": list(image_size), "patch_size": [4, 16, 16]}}
    b2.write(path, lambda file: torch.save(checkpoint, file))


def prepare(cfg):
    """Write what a demo's paths.data and paths.checkpoint_path miss below demo.dir; does nothing without demo.dir."""
    if cfg.demo.dir is None:
        return

    def below(path):
        return "://" not in path and Path(cfg.demo.dir).resolve() in Path(path).resolve().parents

    encoder, data = cfg.paths.checkpoint_path, cfg.paths.data
    if below(encoder) and not os.path.exists(encoder):
        print(f"demo: writing a small random encoder to {encoder}")
        write_encoder(encoder)
    if below(data) and not (os.path.isdir(data) and os.listdir(data)):
        print(f"demo: writing synthetic OCT volumes of {cfg.demo.participants} participants ({cfg.demo.effect} class effect) to {data}")
        write_dataset(data, cfg.demo.participants, 0, cfg.demo.effect)
    elif below(data):
        there = json.loads(Path(data, "phantom.json").read_text())
        if (there.get("effect"), there.get("participants")) != (cfg.demo.effect, cfg.demo.participants):
            raise ValueError(f"{data} holds {there.get('participants')} participants with {there.get('effect')} effect, "
                             f"but the configuration asks for demo.participants={cfg.demo.participants}, demo.effect={cfg.demo.effect}; "
                             "remove the folder, or set demo.dir and paths.data to another one")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="new folder")
    parser.add_argument("--participants", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effect", default="boosted", help=" | ".join(EFFECTS))
    parser.add_argument("--scale", type=lambda text: float(Fraction(text)), nargs=3, default=(1/8, 1/4, 1/8), metavar=("F", "R", "C"))
    parser.add_argument("--picture", metavar="FILE.png", help="save a figure of B-scans")
    args = parser.parse_args()
    if not args.root and not args.picture:
        parser.error("give a folder to write, or --picture FILE.png")
    try:
        if args.picture:
            picture(args.picture)
        if args.root:
            print(write_dataset(args.root, args.participants, args.seed, args.effect, args.scale))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
