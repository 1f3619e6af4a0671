import csv
import filecmp
import json
import os
from collections import Counter

import numpy as np
import pydicom
import pytest

import model
import phantom

SCALE = (1 / 16, 1 / 16, 1 / 16)


def files(root):
    return sorted(os.path.relpath(os.path.join(d, f), root) for d, _, names in os.walk(root) for f in names)


def test_the_same_arguments_give_the_same_bytes(written, tmp_path):
    again = phantom.write_dataset(tmp_path / "again", 40, seed=0, scale=SCALE, processes=2)
    assert files(again) == files(written)
    _, different, errors = filecmp.cmpfiles(written, again, files(again), shallow=False)
    assert not different and not errors
    other = phantom.write_dataset(tmp_path / "other", 40, seed=1, scale=SCALE)
    assert (other / "participants.tsv").read_text() != (again / "participants.tsv").read_text()


def test_layout(written):
    with open(written / "participants.tsv", newline="") as f:
        people = list(csv.DictReader(f, delimiter="\t"))
    with open(written / "retinal_oct" / "manifest.tsv", newline="") as f:
        manifest = list(csv.DictReader(f, delimiter="\t"))
    assert len(people) == 40 and len(manifest[0]) == 15 and list(people[0])[:3] == ["participant_id", "clinical_site", "study_group"]
    assert {(p["clinical_site"], p["participant_id"][0]) for p in people} == {("UW", "1"), ("UCSD", "4"), ("UAB", "7")}
    counts = Counter((p["recommended_split"], p["study_group"]) for p in people if p["retinal_oct"] == "TRUE")
    assert len(counts) == 12 and counts["train", "healthy"] > counts["train", "insulin_dependent"]
    assert any(p["retinal_oct"] == "FALSE" for p in people)
    assert {m["participant_id"] for m in manifest} == {p["participant_id"] for p in people if p["retinal_oct"] == "TRUE"}
    assert sorted(m["filepath"][1:] for m in manifest) == [f for f in files(written) if f.endswith(".dcm")]
    assert len({m["sop_instance_uid"] for m in manifest}) == len(manifest)
    syntaxes, scanners = set(), set()
    for m in manifest:
        ds = pydicom.dcmread(str(written) + m["filepath"])
        syntaxes.add(ds.file_meta.TransferSyntaxUID)
        scanners.add((m["filepath"].split("/")[3], m["anatomic_region"]))
        assert ds.pixel_array.shape == (int(m["number_of_frames"]), int(m["height"]), int(m["width"])) and ds.pixel_array.dtype == np.uint8
        assert (ds.PatientID, ds.ImageLaterality, ds.SOPInstanceUID) == (m["participant_id"], m["laterality"], m["sop_instance_uid"])
        assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.77.1.5.4" and ds.Modality == "OPT"
    assert len(syntaxes) >= 4 and len(scanners) == 6
    macular = [m for m in manifest if m["anatomic_region"] == "Macula, 6 x 6" and "/topcon_triton/" in m["filepath"]]
    per_person = Counter((m["participant_id"], m["laterality"]) for m in macular)
    assert len(per_person) == 2 * 39 and max(per_person.values()) == 2  # both eyes of everybody, and repeats
    assert json.loads((written / "phantom.json").read_text())["effect"] == "boosted"


def test_the_label_changes_the_eye_only_through_the_effect():
    eyes = [phantom.draw_eye(0, 3, "L", 60, label, "boosted") for label in range(4)]
    inl, gcl = phantom.NAMES.index("INL"), phantom.NAMES.index("GCL")
    assert np.all(np.diff([e["factor"][gcl] for e in eyes]) < 0) and np.all(np.diff([e["factor"][inl] for e in eyes]) > 0)
    assert np.all(np.diff([len(e["spots"]) for e in eyes]) > 0) and all(np.array_equal(e["vessels"], eyes[0]["vessels"]) for e in eyes)
    mild = [phantom.draw_eye(0, 3, "L", 60, label, "literature")["factor"][gcl] for label in (0, 2)]
    assert 84.6 * (1 - mild[1] / mild[0]) == pytest.approx(1.7, abs=0.2)  # um of GCIPL without retinopathy


def test_eyes_of_a_person_correlate():
    factors = np.array([[phantom.draw_eye(0, i, side, 60, 0, "boosted")["factor"][5] for side in "LR"] for i in range(400)])
    assert 0.73 <= np.corrcoef(factors.T)[0, 1] <= 0.95


def test_thirteen_participants_have_all_classes_in_all_splits():
    for n in (13, 20, 27):
        people = phantom.draw_participants(n, 0)
        assert len(people) == n and len({(p["recommended_split"], p["label"]) for p in people if p["retinal_oct"] == "TRUE"}) == 12


@pytest.mark.parametrize("kwargs, message", [({"participants": 5}, "too few"), ({"effect": "huge"}, "effect='huge'"),
                                             ({"scale": (0, 1, 1)}, "scale=")])
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        phantom.write_dataset(tmp_path / "data", **kwargs)
    assert not (tmp_path / "data").exists()


def test_never_over_an_existing_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError):
        phantom.write_dataset(tmp_path, 40, scale=SCALE)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_the_demo_encoder_loads_strictly_and_is_the_same_every_time(tmp_path):
    hashes = set()
    for name in ("a.pt", "b.pt"):
        phantom.write_encoder(tmp_path / name)
        hashes.add(model.weights_hash(model.load_encoder(str(tmp_path / name))))
    assert len(hashes) == 1 and model.load_encoder(str(tmp_path / "a.pt"), "target").image_size == (16, 96, 96)
    assert set(model.read_checkpoint(str(tmp_path / "a.pt"))) == {
        "epoch", "step", "model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "loss", "config"}


def test_the_demo_writes_below_its_folder_only_and_says_when_another_effect_is_there(tmp_path, configure, written):
    def settings(**demo):
        cfg = configure(tmp_path / "demo" / "data", f"demo.dir={tmp_path}/demo", "demo.participants=30",
                        *(f"demo.{k}={v}" for k, v in demo.items()))
        cfg.paths.checkpoint_path = str(tmp_path / "demo" / "encoder.pt")
        return cfg
    cfg = settings()
    phantom.prepare(cfg)
    before = files(tmp_path / "demo")
    assert "encoder.pt" in before and "data/participants.tsv" in before
    phantom.prepare(cfg)
    assert files(tmp_path / "demo") == before
    with pytest.raises(ValueError, match="holds 30 participants with boosted effect, .* demo.effect=literature"):
        phantom.prepare(settings(effect="literature"))
    elsewhere = settings()
    elsewhere.paths.data = elsewhere.paths.checkpoint_path = str(tmp_path / "typo")
    phantom.prepare(elsewhere)
    assert not (tmp_path / "typo").exists()
