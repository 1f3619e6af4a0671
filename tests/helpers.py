"""What several test files share: paths, quick settings, commands in processes, what a run left.

Fixtures are in conftest.py. No test file imports from another one.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pydicom
import pytest
import torch
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
)
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    roc_auc_score,
)

import config
import features
import figures
import heads
import metrics
import results
import runs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIXTURES = os.path.join(ROOT, "tests", "fixtures")
# encoder of 16x64x64 volumes, 128 wide
TINY = os.path.join(FIXTURES, "vjepa3d_tiny.pt")
DEMO = os.path.join(ROOT, "configs", "demo.yaml")
PROBE = os.path.join(ROOT, "configs", "probe.yaml")

# AI-READI's study_group, whose position is the label, and the names that are shown
CLASSES = (
    "healthy",
    "pre_diabetes_lifestyle_controlled",
    "oral_medication_and_or_non_insulin_injectable_medication_controlled",
    "insulin_dependent",
)
CLASS_NAMES = ("healthy", "pre-diabetes", "oral medication", "insulin")

# ------------------------------------------------------------------------- settings and commands


@contextlib.contextmanager
def every_kind():
    """Within the block, figures are written as PNG, SVG and PDF, as everywhere but in tests."""
    earlier, figures.KINDS = figures.KINDS, ("svg", "png", "pdf")
    try:
        yield
    finally:
        figures.KINDS = earlier


def settings(root, tmp_path):
    """Overrides of a quick probe on the data set of folder root, with the tiny encoder."""
    return [
        f"paths.data={root}",
        f"paths.checkpoint_path={TINY}",
        f"paths.cache_dir={tmp_path}/cache",
        f"paths.run_dir={tmp_path}/run",
        "train.epochs=6",
        "train.warmup_epochs=1",
        "data.image_size=[16,64,64]",
        "data.num_workers=0",
        "train.sweep=null",
        "eval.gallery=0",
    ]


def start(script, *args, **options):
    """python script args in the project's folder -> Popen with both outputs piped, as text."""
    return subprocess.Popen(
        [sys.executable, script, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def make(folder, *args):
    """`make` as from a shell: without the variables by which the `make test` that runs this test
    tells its children what it was asked for."""
    told = lambda name: name.startswith("MAKE") or name in ("MFLAGS", "VENV", "PYTHON")
    env = {name: value for name, value in os.environ.items() if not told(name)}
    return subprocess.run(["make", *args], cwd=folder, env=env, capture_output=True, text=True)


def children_of(pid):
    """Process ids of the children of a process."""
    children = []
    for task in os.listdir(f"/proc/{pid}/task"):
        children += [int(child) for child in content(f"/proc/{pid}/task/{task}/children").split()]
    return children


# "train.py", killed at the moment when it moves its n-th file of the run folder to its name:
# python -c KILLED_IN_SAVE n --config ...
KILLED_IN_SAVE = """
import os, runpy, signal, sys
calls, move, last = 0, os.replace, int(sys.argv[1])
def replace(source, target):
    global calls
    calls += f"{os.sep}run{os.sep}" in str(target)
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)  # all is written, under its temporary name
    move(source, target)
os.replace = replace
del sys.argv[0]
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""

# ----------------------------------------------------------------------------------- DICOM files


def smooth_volume(frames, rows, columns, top=255, dtype=np.uint8):
    """A random walk over each frame, from 0 to top."""
    walk = np.random.default_rng(0).normal(size=(frames, rows, columns)).cumsum(1).cumsum(2)
    return ((walk - walk.min()) / np.ptp(walk) * top).astype(dtype)


def codestream(syntax, frame):
    """A frame as a JPEG of that transfer syntax."""
    if syntax == JPEGLosslessSV1:
        return imagecodecs.jpeg8_encode(frame, lossless=True, predictor=1)
    if syntax == JPEGLossless:
        return imagecodecs.jpeg8_encode(frame, lossless=True, predictor=6)
    if syntax == JPEG2000Lossless:
        return imagecodecs.jpeg2k_encode(frame, reversible=True, resolutions=2, codecformat="j2k")
    # level in dB: lossy
    return imagecodecs.jpeg2k_encode(frame, level=38, resolutions=2, codecformat="j2k")


def write_dicom(path, volume, syntax, **elements):
    """A minimal multi-frame ophthalmic file, each syntax by an encoder that is not the reader's."""
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.77.1.5.4", "1.2.3"
    ds.Modality = "OPT"
    ds.NumberOfFrames, ds.Rows, ds.Columns = volume.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.PixelRepresentation = 0
    ds.BitsAllocated = ds.BitsStored = 8 * volume.dtype.itemsize
    ds.HighBit = ds.BitsStored - 1
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    is_raw = not syntax.is_encapsulated
    ds.file_meta.TransferSyntaxUID = syntax if is_raw else ExplicitVRLittleEndian
    ds.PixelData = volume.tobytes()
    ds["PixelData"].VR = "OW" if volume.dtype.itemsize > 1 else "OB"
    if syntax in (JPEGLossless, JPEGLosslessSV1, JPEG2000, JPEG2000Lossless):
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate([codestream(syntax, frame) for frame in volume])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    elif syntax.is_encapsulated:
        ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return str(path)


def change_dicom(path, change):
    """Rewrite a DICOM file after change(data set)."""
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)


# --------------------------------------------------------------------------- the phantom's tables


def tables(root):
    """participants.tsv and manifest.tsv (lists of dicts), read without the project's reader."""
    found = []
    for name in ("participants.tsv", "retinal_oct/manifest.tsv"):
        with open(f"{root}/{name}", newline="") as f:
            found.append(list(csv.DictReader(f, delimiter="\t")))
    return found


def triton(manifest):
    """The rows of the scanner and region that a quick probe uses."""
    return [
        m
        for m in manifest
        if "/topcon_triton/" in m["filepath"] and m["anatomic_region"] == "Macula, 6 x 6"
    ]


# ------------------------------------------------------------------------------ data in a bucket

PREFIX = "ai-readi/dataset/"
ROOT_URL, ENCODER_URL = "b2://bucket/ai-readi/dataset", "b2://bucket/encoders/tiny.pt"


def remote(tmp_path, name="remote"):
    """Overrides of a quick probe on what the fixture `bucket` serves."""
    return [
        *settings(ROOT_URL, tmp_path),
        f"paths.checkpoint_path={ENCODER_URL}",
        f"paths.cache_dir={tmp_path}/{name}-cache",
        f"paths.run_dir={tmp_path}/{name}-run",
    ]


# ------------------------------------------------------------------------------------------ files


def content(path):
    """The text of a file."""
    with open(path) as f:
        return f.read()


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def write_bytes(path, data):
    with open(path, "wb") as f:
        f.write(data)


def zipped(files, compression=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def files_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def edit(path, change):
    """Rewrite a text file by change(text)."""
    with open(path, encoding="utf-8", newline="") as f:
        text = f.read()
    changed = change(text)
    assert changed != text
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write(changed)


# ------------------------------------------------------------------------------ what a run left


def read_run(cfg):
    """-> history (list of dicts, one an epoch), the best checkpoint, the last checkpoint."""
    with open(f"{cfg.paths.run_dir}/metrics.jsonl") as f:
        history = [json.loads(line) for line in f]
    load = lambda name: torch.load(f"{cfg.paths.run_dir}/{name}", weights_only=True)
    return history, load(runs.BEST), load(runs.LAST)


def read_predictions(path):
    """predictions_*.csv -> ids (list), y_true (n,), probabilities (n, 4)."""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    ids, y = [r["participant_id"] for r in rows], np.array([int(r["y_true"]) for r in rows])
    return ids, y, np.array([[float(r[f"p{k}"]) for k in range(4)] for r in rows])


def predictions(folder, split="val"):
    """The numbers of folder/run's predictions (n, columns), ids included."""
    path = f"{folder}/run/predictions_{split}.csv"
    return np.genfromtxt(path, delimiter=",", skip_header=1)


def same_run(a, b):
    """Assert that folders a and b hold the same run, bit for bit: tables, and all that the
    checkpoints hold but the paths."""

    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x if k != "paths")
        if isinstance(x, (list, tuple)):
            return len(x) == len(y) and all(map(equal, x, y))
        return x == y

    for name in ("predictions_val.csv", "metrics.jsonl"):
        assert content(f"{a}/run/{name}") == content(f"{b}/run/{name}")
    for name in (runs.LAST, runs.BEST):
        mine, other = (torch.load(f"{folder}/run/{name}", weights_only=True) for folder in (a, b))
        assert equal(mine, other), name


def assert_scores_are_scikit_learns(result, y, p):
    """The scores of metrics.evaluate, from labels y (n,) and probabilities p (n, 4), computed by
    scikit-learn."""
    pred = p.argmax(1)
    assert result["n"] == len(y)
    assert result["accuracy"] == pytest.approx(accuracy_score(y, pred))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, pred))
    assert result["macro_f1"] == pytest.approx(f1_score(y, pred, average="macro"))
    assert result["f1_per_class"] == pytest.approx(f1_score(y, pred, average=None))
    assert result["auroc_macro_ovr"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr"))
    assert result["log_loss"] == pytest.approx(log_loss(y, p))


# ------------------------------------------------------------------------- runs that tests share

# augmentation at its usual strength
AUGMENT = [
    "data.augment.flip=true",
    "data.augment.intensity_jitter=true",
    "data.augment.random_crop=true",
    "data.augment.rotation=true",
]
# a quick fine-tuning run with all that draws random numbers: an epoch of the head alone, then two
# with the encoder
TUNE = [
    *AUGMENT,
    "device.backend=cpu",
    "model.freeze_encoder=true",
    "model.unfreeze_at_epoch=1",
    "model.drop_path=0.1",
    "model.head.hidden=8",
    "model.head.dropout=0.2",
    "train.epochs=3",
    "data.batch_size=10",
    "train.lr_encoder=1e-3",
    "train.grad_clip=1",
    "train.micro_batch=4",
]
ATTENTIVE = ["model.pool_method=attentive", "model.token_grid=[2,2,2]"]


def warm(root):
    """Override: the cache that the tests of a session share. Every volume of the data set is
    decoded and encoded once; tests that look at caching have a cache of their own."""
    return f"paths.cache_dir={root}-cache"


def quick(root, folder, *overrides):
    """Checked configuration of a quick probe on the data set root, with its run below folder."""
    return config.load(DEMO, [*settings(root, folder), warm(root), *overrides])


@functools.cache
def trained(root, *overrides):
    """A folder whose run/ is a finished quick probe with these overrides, trained once for all
    tests: they only read it, or take a `copy_of` it."""
    import train

    folder = tempfile.mkdtemp(dir=os.path.dirname(root))
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(0, quick(root, folder, *overrides))
    return pathlib.Path(folder)


def copy_of(folder, target):
    """Copy folder/run to target/run -> the copy's path, as text."""
    return str(shutil.copytree(f"{folder}/run", f"{target}/run"))


def evaluate(ckpt, split, overrides=()):
    """eval.evaluate_run without report.html and its pictures, which cost most of its time; what is
    in them, test_report.py and test_feature_map.py look at."""
    import eval as evaluation
    import feature_map
    import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_map, "write", lambda *args: None)
        for name in ("write_plots", "write_report"):
            patch.setattr(report, name, lambda *args: None)
        return evaluation.evaluate_run(ckpt, split, overrides)


# ------------------------------------------------------------------------------ data of our own


def samples_of(labels):
    """A participant with one volume for every label."""
    return [
        SimpleNamespace(participant_id=str(i), unit=str(i), label=int(k))
        for i, k in enumerate(labels)
    ]


def features_of(x, y):
    """Features (n, C) or tokens (n, T, C) and labels (n,), as arrays -> features.Features."""
    return features.Features(samples_of(y), torch.as_tensor(x))


def gaussians(means, width, rows, seed):
    """-> train, val, test, each (x float32 (n, width), y (n,)): features of unit variance, whose
    class means lie along a hidden direction. Training has the classes of AI-READI's shares,
    validation (159) and test (20,000) have them evenly."""
    shares, rng = np.array([290, 162, 233, 58]), np.random.default_rng(seed)
    direction = rng.choice([-1, 1], width) / np.sqrt(width)
    counts = (shares * rows / shares.sum()).round().astype(int)
    labels = np.repeat(np.arange(4), counts), rng.integers(0, 4, 159), rng.integers(0, 4, 20_000)
    found = []
    for y in labels:
        x = rng.standard_normal((len(y), width)) + np.array(means)[y][:, None] * direction
        found.append((x.astype(np.float32), y))
    return found


# labels of a test split of 159 participants, as large as AI-READI's
LABELS_159 = np.repeat(range(4), (40, 40, 41, 38))


def answers(skill, seed):
    """Probabilities (159, 4) of a run that is right about so often."""
    rng, y = np.random.default_rng(seed), LABELS_159
    said = np.where(rng.random(len(y)) < skill, y, rng.integers(0, 4, len(y)))
    return 0.6 * np.eye(4)[said] + 0.1


# what eval.py finds of a probe of eval.floors
FLOOR = {"balanced_accuracy": 0.31, "ci95": {"balanced_accuracy": [0.2, 0.4]}}
FLOOR |= {"difference": 0.3, "difference_ci95": [0.2, 0.4], "p_value": 0.01}


def write_results(folder, p, y=LABELS_159, ids=None, **changes):
    """A run's folder as eval.py leaves it on test, of the predictions p (n, 4)."""
    ids = [str(1000 + i) for i in range(len(y))] if ids is None else ids
    table = runs.predictions_csv(heads.Predictions(ids, np.array(y), p)).encode()
    scores = metrics.evaluate(y, p, 4, ids)
    result = {
        "split": "test",
        "run": "a run",
        "epoch": 1,
        "refit": False,
        "volumes": len(y),
        "data": "SYNTHETIC data",
        "task": "study_group",
        "encoder": "an encoder",
        "mode": "linear probe",
        "pretrained_sha256": "abcdef" * 10,
        "ordered": True,
        "unit": "participant",
        "volumes_asked": "topcon_triton, Macula",
        "encoder_sha256": "abcdef" * 10,
        "checkpoint_sha256": "f" * 64,
        "labels_sha256": "0" * 64,
        "classes": list(CLASS_NAMES),
        "predictions_sha256": hashlib.sha256(table).hexdigest(),
        "unreadable": [],
        "per_volume": scores,
        **scores,
    }
    result["alarms"] = metrics.alarms(result)
    result |= changes
    os.makedirs(folder)
    write_bytes(f"{folder}/predictions_test.csv", table)
    write_bytes(f"{folder}/eval_test.json", json.dumps(results.sealed(result)).encode())
    return folder


# ------------------------------------------------------------------------- site, age and the eye

SITES = ("UW", "UCSD", "UAB")
# of each class, how likely a site is, and the mean age, where site and age tell of the label
SITES_OF_CLASS = np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.1, 0.2, 0.7]])
AGE_OF_CLASS = 54 + 4 * np.arange(4)
COUNTS = {"train": (290, 162, 233, 58), "val": (39, 40, 47, 33), "test": (40, 40, 41, 38)}


def draw_people(rng, counts, effect=0.0, confounded=False):
    """Participants with so many of each class -> y (n,), table (a dict of texts each), what a
    perfect reader of the eye says (n, 4), and what one of site and age says (n, 4), both for even
    classes. effect: distance of neighbouring classes in the eye, in SD. confounded: do site and age
    differ between the classes?"""
    y = rng.permutation(np.repeat(range(4), counts))
    shares = SITES_OF_CLASS if confounded else np.full((4, 3), 1 / 3)
    means = AGE_OF_CLASS if confounded else np.full(4, 60.0)
    site = (rng.random(len(y))[:, None] > shares.cumsum(axis=1)[y]).sum(axis=1)
    age = rng.normal(means[y], 11)
    seen = rng.normal(effect * y, 1)[:, None] - effect * np.arange(4)  # (n, 4)
    logits = np.log(shares[:, site]).T - ((age[:, None] - means) / 11) ** 2 / 2
    table = [{"site": SITES[s], "age": f"{a:.1f}"} for s, a in zip(site, age)]
    return y, table, softmax(-(seen**2) / 2, axis=1), softmax(logits, axis=1)
