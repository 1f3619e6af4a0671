import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pydicom
import pytest
from helpers import DEMO, ROOT, children_of, tables, triton

import config
import model
import phantom

SCALE = (1 / 16, 1 / 16, 1 / 16)


def files(root):
    """Paths of all files below root, relative to it."""
    walk = list(os.walk(root))
    return sorted(os.path.relpath(os.path.join(d, f), root) for d, _, names in walk for f in names)


# --------------------------------------------------------------------------------- the data set


@pytest.fixture(scope="module")
def people(written):
    return tables(written)[0]


@pytest.fixture(scope="module")
def with_oct(people):
    return [p for p in people if p["retinal_oct"] == "TRUE"]


@pytest.fixture(scope="module")
def manifest(written):
    return tables(written)[1]


@pytest.fixture(scope="module")
def scans(written, manifest):
    """(row of the manifest, its DICOM data set) of every scan."""
    return [(m, pydicom.dcmread(str(written) + m["filepath"])) for m in manifest]


def test_the_same_arguments_give_the_same_bytes(written, tmp_path):
    again = phantom.write_dataset(tmp_path / "again", 40, seed=0, scale=SCALE, processes=2)
    assert files(again) == files(written)
    _, different, errors = filecmp.cmpfiles(written, again, files(again), shallow=False)
    assert not different and not errors


def test_another_seed_gives_other_participants(written, tmp_path):
    other = phantom.write_dataset(tmp_path / "other", 40, seed=1, scale=SCALE)
    table = "participants.tsv"
    assert (other / table).read_text() != (written / table).read_text()


def test_the_table_of_participants(people):
    assert len(people) == 40
    assert list(people[0])[:3] == ["participant_id", "clinical_site", "study_group"]
    sites = {(p["clinical_site"], p["participant_id"][0]) for p in people}
    assert sites == {("UW", "1"), ("UCSD", "4"), ("UAB", "7")}
    assert any(p["retinal_oct"] == "FALSE" for p in people)


def test_every_class_is_in_every_split_and_they_are_not_even(with_oct):
    counts = Counter((p["recommended_split"], p["study_group"]) for p in with_oct)
    assert len(counts) == 12
    assert counts["train", "healthy"] > counts["train", "insulin_dependent"]


def test_the_manifest_lists_the_files_of_those_with_oct(written, with_oct, manifest):
    assert len(manifest[0]) == 15
    assert {m["participant_id"] for m in manifest} == {p["participant_id"] for p in with_oct}
    scans = [path for path in files(written) if path.endswith(".dcm")]
    assert sorted(m["filepath"][1:] for m in manifest) == scans
    assert len({m["sop_instance_uid"] for m in manifest}) == len(manifest)


def test_the_scans_are_what_the_manifest_says(scans):
    for m, ds in scans:
        shape = (int(m["number_of_frames"]), int(m["height"]), int(m["width"]))
        assert ds.pixel_array.shape == shape and ds.pixel_array.dtype == np.uint8
        assert (ds.PatientID, ds.ImageLaterality) == (m["participant_id"], m["laterality"])
        assert ds.SOPInstanceUID == m["sop_instance_uid"]
        assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.77.1.5.4" and ds.Modality == "OPT"


def test_the_scans_are_of_several_syntaxes_and_scanners(scans):
    assert len({ds.file_meta.TransferSyntaxUID for _, ds in scans}) >= 4
    assert len({(m["filepath"].split("/")[3], m["anatomic_region"]) for m, _ in scans}) == 6


def test_both_eyes_of_everybody_are_scanned_and_some_twice(manifest):
    per_eye = Counter((m["participant_id"], m["laterality"]) for m in triton(manifest))
    assert len(per_eye) == 2 * 39 and max(per_eye.values()) == 2


def test_the_effect_is_written_down(written):
    assert json.loads((written / "phantom.json").read_text())["effect"] == "boosted"


@pytest.mark.parametrize("participants", [13, 20, 27])
def test_thirteen_participants_have_all_classes_in_all_splits(participants):
    people = phantom.draw_participants(participants, 0)
    assert len(people) == participants
    with_oct = [p for p in people if p["retinal_oct"] == "TRUE"]
    assert len({(p["recommended_split"], p["label"]) for p in with_oct}) == 12


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"participants": 5}, "too few"),
        ({"effect": "huge"}, "effect='huge'"),
        ({"scale": (0, 1, 1)}, "scale="),
    ],
)
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        phantom.write_dataset(tmp_path / "data", **kwargs)
    assert not (tmp_path / "data").exists()


def test_never_over_an_existing_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError):
        phantom.write_dataset(tmp_path, 40, scale=SCALE)
    assert os.listdir(tmp_path) == ["mine.txt"]


# -------------------------------------------------------------------------------------- the eyes


@pytest.fixture(scope="module")
def eyes():
    """One eye as it would be in each class."""
    return [phantom.draw_eye(0, 3, "L", 60, label, "boosted") for label in range(4)]


def test_the_label_thins_and_thickens_layers(eyes):
    inl, gcl = phantom.NAMES.index("INL"), phantom.NAMES.index("GCL")
    assert np.all(np.diff([e["factor"][gcl] for e in eyes]) < 0)
    assert np.all(np.diff([e["factor"][inl] for e in eyes]) > 0)


def test_the_label_adds_spots_and_leaves_the_vessels(eyes):
    assert np.all(np.diff([len(e["spots"]) for e in eyes]) > 0)
    assert all(np.array_equal(e["vessels"], eyes[0]["vessels"]) for e in eyes)


def test_the_effect_of_the_literature():
    gcl = phantom.NAMES.index("GCL")
    eyes = [phantom.draw_eye(0, 3, "L", 60, label, "literature") for label in (0, 2)]
    healthy, mild = (eye["factor"][gcl] for eye in eyes)
    # um of GCIPL without retinopathy
    assert 84.6 * (1 - mild / healthy) == pytest.approx(1.7, abs=0.2)


def test_eyes_of_a_person_correlate():
    factor = lambda i, side: phantom.draw_eye(0, i, side, 60, 0, "boosted")["factor"][5]
    factors = np.array([[factor(i, side) for side in "LR"] for i in range(400)])
    assert 0.73 <= np.corrcoef(factors.T)[0, 1] <= 0.95


@pytest.mark.slow
def test_the_picture_of_the_readme(command, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "phantom.png"
    result = command("scripts/phantom_picture.py", path)
    assert result.returncode == 0, result.stderr
    picture = imread(path)
    assert picture.shape[:2] == (640, 1500) and picture[..., :3].std() > 0.1


# -------------------------------------------------------------------------- the demo's encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "a.pt"
    phantom.write_encoder(path)
    return str(path)


def test_the_demo_encoder_is_the_same_every_time(encoder, tmp_path):
    phantom.write_encoder(tmp_path / "b.pt")
    paths = [encoder, str(tmp_path / "b.pt")]
    assert len({model.weights_hash(model.load_encoder(path)) for path in paths}) == 1


def test_the_demo_encoder_loads_strictly(encoder):
    assert model.load_encoder(encoder, "target").image_size == (16, 96, 96)


def test_the_demo_encoder_has_what_a_checkpoint_of_pretraining_has(encoder):
    states = {f"{name}_state_dict" for name in ("model", "optimizer", "scheduler")}
    assert set(model.read_checkpoint(encoder)) == states | {"epoch", "step", "loss", "config"}


# -------------------------------------------------------------------------- prepare, for the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """demo(key=value, ...) -> configuration whose data and encoder lie below demo.dir."""
    folder = tmp_path_factory.mktemp("prepare") / "demo"

    def make(**keys):
        more = [f"demo.{key}={value}" for key, value in keys.items()]
        cfg = config.load(DEMO, [f"demo.dir={folder}", "demo.participants=30", *more])
        cfg.paths.data, cfg.paths.checkpoint_path = str(folder / "data"), str(folder / "encoder.pt")
        return cfg

    return make


@pytest.mark.slow
def test_the_demo_is_written_once(demo):
    cfg = demo()
    phantom.prepare(cfg)
    before = files(cfg.demo.dir)
    assert "encoder.pt" in before and "data/participants.tsv" in before
    phantom.prepare(cfg)
    assert files(cfg.demo.dir) == before


def test_the_demo_says_when_another_effect_is_there(demo):
    phantom.prepare(demo())
    message = "holds 30 participants with boosted effect, .* demo.effect=literature"
    with pytest.raises(ValueError, match=message):
        phantom.prepare(demo(effect="literature"))


def test_the_demo_writes_below_its_folder_only(tmp_path, demo):
    cfg = demo()
    cfg.paths.data = cfg.paths.checkpoint_path = str(tmp_path / "typo")
    phantom.prepare(cfg)
    assert not (tmp_path / "typo").exists()


# ------------------------------------------------------------------------------ when it is ended


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_what_is_ended_while_it_writes_leaves_nothing_for_ever(tmp_path, number):
    script = f"import phantom; phantom.write_dataset({str(tmp_path / 'data')!r}, 60, processes=2)"
    writer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: list(tmp_path.glob("*.part/retinal_oct/structural_oct")))
    children = children_of(writer.pid)
    assert len(children) >= 2
    writer.send_signal(number)
    writer.wait(20)
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))
    assert not (tmp_path / "data").exists()
    phantom.write_dataset(tmp_path / "data", 16, scale=SCALE, processes=1)
    assert os.listdir(tmp_path) == ["data"]


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("half a minute has passed")
