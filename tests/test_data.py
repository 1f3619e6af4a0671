import csv
import glob
import io
import os
import shutil
import time

import imagecodecs
import numpy as np
import pydicom
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, edit
from pydicom.encaps import encapsulate
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000,
                         JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless)

import data

# ---------------------------------------------------------------------------------------------------- preprocessing


def slow_preprocess(volume, size):
    """The pretraining's own words: z-score, trilinear resize, z-score."""
    x = torch.from_numpy(volume.astype(np.float32))
    x = (x - x.mean()) / x.std(unbiased=False)
    x = F.interpolate(x[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]
    return (x - x.mean()) / x.std(unbiased=False)


def test_preprocessing_equals_the_pretrainings_recorded_output():
    recorded = np.load(os.path.join(ROOT, "tests", "fixtures", "preprocess.npz"))
    result = data.preprocess(recorded["volume"], tuple(recorded["size"]))
    assert result.dtype == torch.float32 and result.shape == (16, 64, 64)
    assert np.abs(result.numpy() - recorded["expected"][0]).max() <= 1e-4


@pytest.mark.parametrize("shape", [(256, 50, 40), (20, 70, 40), (64, 96, 32), (7, 33, 65), (1, 5, 5), (61, 20, 33), (100, 17, 96)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_preprocessing_equals_the_slow_formula(shape, dtype):
    volume = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
    assert (data.preprocess(volume, (64, 96, 32)) - slow_preprocess(volume, (64, 96, 32))).abs().max() <= 1e-5


@pytest.mark.parametrize("value, dtype", [(0, np.uint8), (200, np.uint8), (0.1, np.float32), (-1e9, np.float64)])
def test_a_constant_volume_is_zeros(value, dtype):
    assert (data.preprocess(np.full((9, 7, 5), value, dtype), (16, 16, 16)) == 0).all()


def test_what_is_no_volume_is_refused_and_nan_is_not_hidden():
    with pytest.raises(ValueError, match="frames, rows, columns"):
        data.preprocess(np.zeros((1, 4, 5, 6)), (4, 16, 16))
    volume = np.random.default_rng(0).normal(size=(4, 5, 6))
    volume[0, 0, 0] = np.nan
    assert not torch.isfinite(data.preprocess(volume, (4, 16, 16))).any()


# ------------------------------------------------------------------------------------------------------------- DICOM


def codestream(syntax, frame):
    if syntax == JPEGLosslessSV1:
        return imagecodecs.jpeg8_encode(frame, lossless=True, predictor=1)
    if syntax == JPEGLossless:
        return imagecodecs.jpeg8_encode(frame, lossless=True, predictor=6)
    if syntax == JPEG2000Lossless:
        return imagecodecs.jpeg2k_encode(frame, reversible=True, resolutions=2, codecformat="j2k")
    return imagecodecs.jpeg2k_encode(frame, level=38, resolutions=2, codecformat="j2k")  # dB; lossy


def write_dicom(path, volume, syntax, **elements):
    """A minimal multi-frame ophthalmic file, each syntax by an encoder that is not the reader's."""
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.77.1.5.4", "1.2.3", "OPT"
    ds.Rows, ds.Columns, ds.NumberOfFrames = volume.shape[1], volume.shape[2], len(volume)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated = ds.BitsStored = 8 * volume.dtype.itemsize
    ds.HighBit = ds.BitsStored - 1
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax if not syntax.is_encapsulated else ExplicitVRLittleEndian
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


SYNTAXES = [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1,
            JPEGLSLossless, RLELossless]


@pytest.fixture()
def volume():
    smooth = np.random.default_rng(0).normal(size=(20, 24, 30)).cumsum(1).cumsum(2)
    return ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda s: s.name)
def test_every_transfer_syntax_reads_bit_for_bit(tmp_path, volume, syntax):
    path = write_dicom(tmp_path / "v.dcm", volume, syntax)
    assert np.array_equal(data.read_dicom(path), volume)
    with open(path, "rb") as f:
        assert np.array_equal(data.read_dicom(f), volume)
    with open(path, "rb") as f:
        assert np.array_equal(data.read_dicom(io.BytesIO(f.read())), volume)


def test_lossy_jpeg_2000(tmp_path, volume):
    read = data.read_dicom(write_dicom(tmp_path / "v.dcm", volume, JPEG2000))
    expected = np.stack([imagecodecs.jpeg2k_decode(codestream(JPEG2000, frame)) for frame in volume])
    assert np.abs(read.astype(int) - expected).max() <= 1  # decoders may round differently
    assert 0 < np.abs(read.astype(int) - volume).max() < 30


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda s: s.name)
def test_only_the_frames_that_the_resize_reads_are_decoded(tmp_path, volume, syntax):
    """20 frames -> 4 slices: 4 frames are read; -> 5 slices: 10; and the preprocessed volume is that of the whole file."""
    path = write_dicom(tmp_path / "v.dcm", volume, syntax)
    part = data.read_dicom(path, (4, 16, 16))
    decoded = np.flatnonzero(part.any(axis=(1, 2)))
    # slice d reads the frames around 5 (d + 1/2) - 1/2 = 2, 7, 12, 17: whole numbers, one frame each
    assert part.shape == volume.shape and decoded.tolist() == [2, 7, 12, 17]
    assert np.array_equal(part[decoded], volume[decoded])
    assert torch.equal(data.preprocess(part, (4, 16, 16)), data.preprocess(volume, (4, 16, 16)))
    halves = data.read_dicom(path, (5, 16, 16))  # around 4 (d + 1/2) - 1/2 = 1.5, 5.5, ...: two frames each
    assert np.flatnonzero(halves.any(axis=(1, 2))).tolist() == [1, 2, 5, 6, 9, 10, 13, 14, 17, 18]
    assert torch.equal(data.preprocess(halves, (5, 16, 16)), data.preprocess(volume, (5, 16, 16)))
    assert (data.preprocess(part, (4, 16, 16)) - slow_preprocess(volume, (4, 16, 16))).abs().max() <= 1e-5


def test_sixteen_bits_and_single_frame(tmp_path):
    deep = np.random.default_rng(0).integers(0, 60000, (3, 8, 9)).astype(np.uint16)
    assert np.array_equal(data.read_dicom(write_dicom(tmp_path / "a.dcm", deep, ExplicitVRLittleEndian)), deep)
    path = write_dicom(tmp_path / "b.dcm", deep[:1], ExplicitVRLittleEndian)
    ds = pydicom.dcmread(path)
    del ds.NumberOfFrames
    ds.save_as(path)
    assert np.array_equal(data.read_dicom(path), deep[:1])


def test_rescale_slope_and_intercept(tmp_path, volume):
    path = write_dicom(tmp_path / "v.dcm", volume, ExplicitVRLittleEndian, RescaleSlope=-2, RescaleIntercept=10)
    assert np.allclose(data.read_dicom(path), volume * -2.0 + 10)
    transform, shared = pydicom.Dataset(), pydicom.Dataset()
    transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = 3, -1, "US"
    shared.PixelValueTransformationSequence = [transform]
    path = write_dicom(tmp_path / "w.dcm", volume, ExplicitVRLittleEndian, SharedFunctionalGroupsSequence=[shared])
    assert np.allclose(data.read_dicom(path), volume * 3.0 - 1)


def test_a_rescale_of_its_own_for_every_frame(tmp_path, volume):
    def group(slope, intercept):
        transform, frame = pydicom.Dataset(), pydicom.Dataset()
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = slope, intercept, "US"
        frame.PixelValueTransformationSequence = [transform]
        return frame
    pairs = [(1, 0), *((2.5, -100),) * 19]  # the first frame alone would stay integer
    path = write_dicom(tmp_path / "v.dcm", volume, ExplicitVRLittleEndian,
                       PerFrameFunctionalGroupsSequence=[group(*pair) for pair in pairs])
    assert np.allclose(data.read_dicom(path), np.stack([frame * a + b for frame, (a, b) in zip(volume.astype(float), pairs)]))


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda s: s.name)
@pytest.mark.parametrize("claimed", [1, 10, 19, 21, 40])
def test_a_wrong_number_of_frames_is_refused(tmp_path, volume, syntax, claimed):
    path = write_dicom(tmp_path / "v.dcm", volume, syntax)
    ds = pydicom.dcmread(path)
    ds.NumberOfFrames = claimed
    ds.save_as(path)
    for size in (None, (4, 16, 16)):
        with pytest.raises(ValueError, match=f"NumberOfFrames is {claimed}, but the pixel data holds 20 frames"):
            data.read_dicom(path, size)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda s: s.name)
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, volume, syntax, keep):
    path = write_dicom(tmp_path / "short.dcm", volume, syntax)
    content = open(path, "rb").read()
    with open(path, "wb") as f:
        f.write(content[:int(keep * len(content))])
    for size in (None, (4, 16, 16)):
        with pytest.raises(ValueError, match="short.dcm is not a readable OCT volume"):
            data.read_dicom(path, size)


def test_no_pixels_no_dicom_no_file(tmp_path, volume):
    path = write_dicom(tmp_path / "empty.dcm", volume, ExplicitVRLittleEndian)
    ds = pydicom.dcmread(path)
    del ds.PixelData
    ds.save_as(path)
    with pytest.raises(ValueError, match="empty.dcm is not a readable OCT volume: no pixel data"):
        data.read_dicom(path)
    ds.PixelData = b""
    ds["PixelData"].VR = "OB"
    ds.save_as(path)
    with pytest.raises(ValueError, match="empty.dcm is not a readable OCT volume: no pixel data"):
        data.read_dicom(path)
    (tmp_path / "text.dcm").write_text("hello")
    with pytest.raises(ValueError, match="text.dcm is not a readable OCT volume"):
        data.read_dicom(tmp_path / "text.dcm")
    with pytest.raises(FileNotFoundError):
        data.read_dicom(tmp_path / "none.dcm")
    with pytest.raises(ValueError, match="3 samples a pixel"):
        data.read_dicom(write_dicom(tmp_path / "rgb.dcm", volume, ExplicitVRLittleEndian, SamplesPerPixel=3, PlanarConfiguration=0))


# ------------------------------------------------------------------------------------------------------------ ledger


def tables(root):
    """participants.tsv and manifest.tsv, read without the project's reader."""
    with open(root / "participants.tsv", newline="") as f:
        people = list(csv.DictReader(f, delimiter="\t"))
    with open(root / "retinal_oct" / "manifest.tsv", newline="") as f:
        return people, list(csv.DictReader(f, delimiter="\t"))


def triton(manifest):
    return [m for m in manifest if "/topcon_triton/" in m["filepath"] and m["anatomic_region"] == "Macula, 6 x 6"]


def test_nobody_is_lost(written, configure):
    people, manifest = tables(written)
    ledger = data.read_ledger(configure(written))
    assert [r.participant_id for r in ledger.rows] == [p["participant_id"] for p in people]
    with_oct = {p["participant_id"] for p in people if p["retinal_oct"] == "TRUE"}
    assert {r.participant_id for r in ledger.rows if r.status == "used"} == with_oct
    assert {i[0] for i in with_oct} == {"1", "4", "7"}  # all three sites
    assert {(r.split, r.label) for r in ledger.rows} == {(s, k) for s in data.SPLITS for k in range(4)}
    chosen = triton(manifest)
    assert sorted(s.path for s in ledger.samples) == sorted(str(written) + m["filepath"] for m in chosen)
    for row in ledger.rows:
        assert row.volumes == sum(m["participant_id"] == row.participant_id for m in chosen)
        person = next(p for p in people if p["participant_id"] == row.participant_id)
        assert ((row.split, data.CLASSES[row.label], row.site)
                == (person["recommended_split"], person["study_group"], person["clinical_site"]))
    assert any(row.volumes > 2 for row in ledger.rows)  # repeats count
    data.check_missing(ledger, 0)


def test_another_scanner_is_another_set_of_volumes(written, configure):
    _, manifest = tables(written)
    ledger = data.read_ledger(configure(written, "data.scanner=heidelberg_spectralis", "data.anatomic_region=Macula"))
    expected = [m for m in manifest if "/heidelberg_spectralis/" in m["filepath"]]
    assert len(ledger.samples) == len(expected) and {s.participant_id for s in ledger.samples} == {m["participant_id"] for m in expected}
    assert len(ledger.missing()) == len([r for r in ledger.rows if r.status != "no_oct"]) - len(expected)
    assert ledger.missing()[0].reason == "no volume of heidelberg_spectralis, Macula"
    with pytest.raises(ValueError, match=r"no volume of data.scanner=zeis.*topcon_triton 'Macula, 6 x 6'"):
        data.read_ledger(configure(written, "data.scanner=zeis"))


def test_crlf_person_id_and_lower_case_flags(dataset, configure):
    before = data.read_ledger(configure(dataset))
    edit(dataset / "participants.tsv", lambda t: t.replace("participant_id", "person_id").replace("TRUE", "true")
                                                  .replace("\r\n", "\n").replace("\n", "\r\n"))
    edit(dataset / "retinal_oct" / "manifest.tsv", lambda t: t.replace("participant_id", "person_id").replace("\n", "\r\n"))
    after = data.read_ledger(configure(dataset))
    assert (after.rows, after.samples, after.notes) == (before.rows, before.samples, before.notes)


def test_missing_files_are_counted_and_stop_the_run_unless_allowed(dataset, configure):
    people, manifest = tables(dataset)
    chosen = triton(manifest)
    victims = [p["participant_id"] for p in people if p["retinal_oct"] == "TRUE"][:2]
    for m in chosen:
        if m["participant_id"] == victims[0]:
            os.remove(str(dataset) + m["filepath"])
        if m["participant_id"] == victims[1]:
            open(str(dataset) + m["filepath"], "w").close()  # size zero
    one_of_two = next(m for m in chosen if m["participant_id"] not in victims)
    os.remove(str(dataset) + one_of_two["filepath"])
    ledger = data.read_ledger(configure(dataset))
    assert ([r.participant_id for r in ledger.missing()] == victims
            and "files absent" in ledger.missing()[0].reason and "files empty" in ledger.missing()[1].reason)
    partly = next(r for r in ledger.rows if r.participant_id == one_of_two["participant_id"])
    assert partly.status == "used" and partly.reason.startswith("1 of ") and any(partly.participant_id in n for n in ledger.notes)
    with pytest.raises(ValueError, match=f"2 of {len([p for p in people if p['retinal_oct'] == 'TRUE'])} labelled participants "
                                         f"have no volume.*{victims[0]}.*set data.max_missing=2"):
        data.check_missing(ledger, 1)
    data.check_missing(ledger, 2)
    rows = list(csv.DictReader(io.StringIO(data.ledger_csv(ledger))))
    assert len(rows) == len(people) and sum(r["status"] == "missing" for r in rows) == 2


def test_a_participant_without_manifest_rows(dataset, configure):
    people, manifest = tables(dataset)
    victim = next(p["participant_id"] for p in people if p["retinal_oct"] == "TRUE")
    edit(dataset / "retinal_oct" / "manifest.tsv", lambda t: "".join(line for line in t.splitlines(True) if not line.startswith(victim)))
    assert [(r.participant_id, r.reason) for r in data.read_ledger(configure(dataset)).missing()] == [(victim, "no row in the manifest")]


def test_duplicates_and_strangers_in_the_manifest_are_noted(dataset, configure):
    people, manifest = tables(dataset)
    before = data.read_ledger(configure(dataset))
    path = dataset / "retinal_oct" / "manifest.tsv"
    first = next(line for line in open(path) if "triton_macula_6x6" in line)
    edit(path, lambda t: t + first + first.replace(first.split("\t")[0], "9999"))
    after = data.read_ledger(configure(dataset))
    assert after.samples == before.samples
    assert any("listed twice" in n for n in after.notes) and any("9999" in n for n in after.notes)


def test_oddly_written_tables_lose_nobody(dataset, configure):
    before = data.read_ledger(configure(dataset))
    edit(dataset / "participants.tsv", lambda t: t.replace("participant_id\t", "participant_id \t", 1) + "\t" * 14 + "\n\n")
    path = dataset / "retinal_oct" / "manifest.tsv"
    first = next(line for line in open(path) if "triton_macula_6x6" in line)
    edit(path, lambda t: t + first.replace("/retinal_oct/", "/./retinal_oct//") + first.replace("/", "\\") + "\t" * 14 + "\n")
    after = data.read_ledger(configure(dataset))
    assert after.samples == before.samples and sum("listed twice" in n for n in after.notes) == 2


def test_a_stray_quotation_mark_does_not_swallow_rows(dataset, configure):
    path = dataset / "retinal_oct" / "manifest.tsv"
    lines = open(path).read().splitlines(True)
    quoted = lambda line: line.replace("\tOCT\t", '\t"OCT\t')
    path.write_text("".join([*lines[:3], quoted(lines[3]), *lines[4:8], quoted(lines[8]), *lines[9:]]))
    with pytest.raises(ValueError, match="look for a stray quotation mark"):
        data.read_ledger(configure(dataset))


def swap_column(name, replacement):
    return lambda t: t.replace(name, replacement, 1)


def second_row(change):
    def apply(text):
        lines = text.splitlines(True)
        return text + change(lines[1])
    return apply


@pytest.mark.parametrize("file, change, message", [
    ("participants.tsv", swap_column("study_group", "group"), "has no column 'study_group'; found"),
    ("participants.tsv", swap_column("participant_id", "pid"), "has no column 'participant_id or person_id'"),
    ("participants.tsv", swap_column("recommended_split", "split"), "has no column 'recommended_split'"),
    ("participants.tsv", swap_column("insulin_dependent", "type_3"), "unknown study_group 'type_3'"),
    ("participants.tsv", swap_column("\ttrain\t", "\tholdout\t"), "unknown recommended_split 'holdout'"),
    ("participants.tsv", second_row(lambda r: r.replace("\tval\t", "\ttrain\t") if "\tval\t" in r
                                    else r.replace("\ttrain\t", "\ttest\t").replace("\ttest\t", "\tval\t")), "is in two splits"),
    ("participants.tsv", second_row(lambda r: r.replace("healthy", "insulin_dependent") if "healthy" in r
                                    else r.replace(r.split("\t")[2], "healthy")), "two rows that differ"),
    ("retinal_oct/manifest.tsv", swap_column("filepath", "file"), "has no column 'filepath'"),
    ("retinal_oct/manifest.tsv", swap_column("/retinal_oct/structural_oct", "/../other"), "points outside the data folder"),
    ("retinal_oct/manifest.tsv", swap_column("/retinal_oct/structural_oct", "/retinal_oct/../../structural_oct"),
     "points outside the data folder"),
])
def test_doubtful_tables_stop_with_a_sentence(dataset, configure, file, change, message):
    edit(dataset / file, change)
    with pytest.raises(ValueError, match=message):
        data.read_ledger(configure(dataset))


def test_a_file_listed_for_two_participants(dataset, configure):
    people, manifest = tables(dataset)
    a, b = (next(m for m in triton(manifest) if m["participant_id"] == p)
            for p in list(dict.fromkeys(m["participant_id"] for m in triton(manifest)))[:2])
    edit(dataset / "retinal_oct" / "manifest.tsv", lambda t: t.replace(b["filepath"], a["filepath"]))
    with pytest.raises(ValueError, match="is listed for two participants"):
        data.read_ledger(configure(dataset))


def test_the_ledger_command(written, dataset, command):
    good = command("data.py", "--config", "configs/demo.yaml", root=written)
    assert good.returncode == 0, good.stderr
    people, _ = tables(written)
    for site in ("UW", "UCSD", "UAB"):
        assert site in good.stdout
    train_healthy = sum(p["recommended_split"] == "train" and p["study_group"] == "healthy" and p["retinal_oct"] == "TRUE" for p in people)
    line = next(line for line in good.stdout.splitlines() if line.startswith("train") and "healthy" in line)
    assert f"{train_healthy}/{train_healthy}" in line
    _, manifest = tables(dataset)
    victim = triton(manifest)[0]["participant_id"]
    for m in triton(manifest):
        if m["participant_id"] == victim:
            os.remove(str(dataset) + m["filepath"])
    bad = command("data.py", "--config", "configs/demo.yaml", root=dataset)
    assert (bad.returncode == 1 and f"missing: {victim}" in bad.stdout
            and bad.stderr.startswith("error: 1 of ") and "Traceback" not in bad.stderr)


# ------------------------------------------------------------------------------------------------------------- cache


def test_volumes_are_cached_by_content(dataset, configure, tmp_path, monkeypatch):
    cfg = configure(dataset)
    ledger = data.read_ledger(cfg)
    samples = ledger.samples[:4]
    volumes = data.Volumes(samples, (16, 64, 64), cfg.paths.cache_dir)
    first = {i: (key, volume) for i, key, volume in data.stream(volumes, ledger, range(4), cfg)}
    for i, sample in enumerate(samples):
        exact = data.preprocess(data.read_dicom(sample.path), (16, 64, 64))
        assert first[i][1].shape == (1, 16, 64, 64) and first[i][1].dtype == torch.float16
        assert ((first[i][1][0].float() - exact).abs() <= exact.abs() * 2**-11 + 1e-7).all()  # float16 rounding, nothing else

    calls = []
    monkeypatch.setattr(data, "read_dicom", lambda *args, real=data.read_dicom: calls.append(args) or real(*args))
    again = {i: (key, volume) for i, key, volume in data.stream(volumes, ledger, range(4), cfg)}
    assert not calls and all(again[i][0] == first[i][0] and torch.equal(again[i][1], first[i][1]) for i in range(4))
    os.utime(samples[0].path, (0, 0))  # another time, the same content
    assert [k for _, k, _ in data.stream(volumes, ledger, [0], cfg)] == [first[0][0]] and not calls
    content = open(samples[1].path, "rb").read()
    open(samples[0].path, "wb").write(content)  # another content under the same name
    assert [k for _, k, _ in data.stream(volumes, ledger, [0], cfg)] == [first[1][0]]
    other_size = data.Volumes(samples, (8, 32, 32), cfg.paths.cache_dir)
    assert [v.shape for _, _, v in data.stream(other_size, ledger, [2], cfg)] == [(1, 8, 32, 32)] and len(calls) == 1
    assert not glob.glob(f"{cfg.paths.cache_dir}/**/*.part", recursive=True)


def test_a_change_that_keeps_size_and_time_is_noticed(dataset, configure):
    cfg = configure(dataset)
    ledger = data.read_ledger(cfg)
    sample = ledger.samples[0]
    volumes = data.Volumes([sample], (16, 64, 64), cfg.paths.cache_dir)
    (_, before, _), = data.stream(volumes, ledger, [0], cfg)
    stat, content = os.stat(sample.path), bytearray(open(sample.path, "rb").read())
    content[200] ^= 1  # in the preamble's uid, not in the pixels
    with open(sample.path, "r+b") as f:
        f.write(content)
    os.utime(sample.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert volumes.key(0) is None


def test_an_emptied_checksum_file_is_made_again(dataset, configure):
    cfg = configure(dataset)
    ledger = data.read_ledger(cfg)
    volumes = data.Volumes(ledger.samples[:3], (16, 64, 64), cfg.paths.cache_dir)
    before = [k for _, k, _ in data.stream(volumes, ledger, range(3), cfg)]
    for note in glob.glob(f"{cfg.paths.cache_dir}/checksums/*"):
        open(note, "w").close()
    assert [volumes.key(i) for i in range(3)] == [None] * 3
    assert [k for _, k, _ in data.stream(volumes, ledger, range(3), cfg)] == before and len(set(before)) == 3


def test_worker_processes_give_the_same_volumes_and_the_same_error(dataset, configure):
    cfg = configure(dataset)
    with_workers = configure(dataset, "data.num_workers=2")
    ledger = data.read_ledger(cfg)
    samples = ledger.samples[:6]

    def volumes(name):
        return data.Volumes(samples, (16, 64, 64), f"{cfg.paths.cache_dir}/{name}")

    alone = [(i, k, v.tolist()) for i, k, v in data.stream(volumes("a"), ledger, range(6), cfg)]
    workers = [(i, k, v.tolist()) for i, k, v in data.stream(volumes("b"), ledger, range(6), with_workers)]
    assert alone == workers and [i for i, _, _ in alone] == list(range(6))
    open(samples[3].path, "wb").write(b"damaged")
    for config_ in (cfg, with_workers):
        ledger = data.read_ledger(cfg)
        samples = ledger.samples[:6]
        with pytest.raises(ValueError, match="1 volumes cannot be read, and data.max_missing is 0: "
                                             f"participant {samples[3].participant_id} .*{os.path.basename(samples[3].path)} "
                                             "is not a readable OCT volume.*set data.max_missing=1"):
            list(data.stream(volumes("c"), ledger, range(6), config_))


def test_unreadable_volumes_that_max_missing_covers_are_struck_off_the_ledger(dataset, configure):
    first = data.read_ledger(configure(dataset)).samples
    person, other = list(dict.fromkeys(s.participant_id for s in first))[:2]
    bad = [s.path for s in first if s.participant_id == person] + [next(s.path for s in first if s.participant_id == other)]
    for path in bad:
        open(path, "wb").write(b"damaged")
        open(path, "ab").write(path.encode())  # no two the same
    cfg = configure(dataset, f"data.max_missing={len(bad)}")
    ledger = data.read_ledger(cfg)
    samples = list(ledger.samples)
    arrived = [samples[i].path for i, _, _ in data.stream(data.Volumes(samples, (16, 64, 64), cfg.paths.cache_dir), ledger,
                                                          range(len(samples)), cfg)]
    assert arrived == [s.path for s in samples if s.path not in bad] == [s.path for s in ledger.samples]
    rows = {r["participant_id"]: r for r in csv.DictReader(io.StringIO(data.ledger_csv(ledger)))}
    assert (rows[person]["status"], rows[person]["volumes"]) == ("missing", "0") and bad[0] in rows[person]["reason"]
    assert ((rows[other]["status"], int(rows[other]["volumes"])) == ("used", sum(s.participant_id == other for s in first) - 1)
            and bad[-1] in rows[other]["reason"])
    assert all(path in data.unreadable_table(ledger) for path in bad)
    with pytest.raises(ValueError, match=f"{len(bad)} volumes cannot be read, and data.max_missing is {len(bad) - 1}"):
        data.check_missing(ledger, len(bad) - 1)


def damaged_at(content, position):
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1:]


@pytest.mark.parametrize("damage", [lambda c: c[:500], lambda c: b"", lambda c: c[:-1], lambda c: damaged_at(c, 20),
                                    lambda c: damaged_at(c, len(c) // 2), lambda c: damaged_at(c, len(c) - 5), lambda c: c + b"x",
                                    lambda c: b"\0" * len(c)],
                         ids=["cut", "empty", "a byte short", "header", "middle", "digest", "longer", "zeros"])
def test_a_damaged_cache_file_is_made_anew(written, configure, damage, capsys):
    cfg = configure(written)
    ledger = data.read_ledger(cfg)
    volumes = data.Volumes(ledger.samples[:1], (16, 64, 64), cfg.paths.cache_dir)
    (_, key, before), = data.stream(volumes, ledger, [0], cfg)
    kept, = glob.glob(f"{cfg.paths.cache_dir}/volumes/*.npy")
    good = open(kept, "rb").read()
    open(kept, "wb").write(damage(good))
    (_, again, after), = data.stream(volumes, ledger, [0], cfg)
    assert again == key and torch.equal(before, after) and open(kept, "rb").read() == good
    assert f"cache file {kept} is damaged" in capsys.readouterr().err


def test_the_cache_admits_until_it_is_full(written, configure):
    cfg = configure(written)
    ledger = data.read_ledger(cfg)
    one = 16 * 64 * 64 * 2
    # three, with their headers
    volumes = data.Volumes(ledger.samples[:6], (16, 64, 64), cfg.paths.cache_dir, cache_gb=(3 * one + 3 * 200) / 1e9)
    first = [v for _, _, v in data.stream(volumes, ledger, range(6), cfg)]
    kept = sorted(glob.glob(f"{cfg.paths.cache_dir}/volumes/*"))
    assert len(kept) == 3
    second = [v for _, _, v in data.stream(volumes, ledger, range(6), cfg)]
    assert sorted(glob.glob(f"{cfg.paths.cache_dir}/volumes/*")) == kept  # nothing is thrown out
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_content_that_several_files_share(dataset, configure):
    before = data.read_ledger(configure(dataset))
    a, b = next((s, o) for s in before.samples for o in before.samples if s is not o and s.participant_id == o.participant_id)
    c = next(s for s in before.samples if s.participant_id != a.participant_id)
    d = next(s for s in before.samples if s.participant_id not in (a.participant_id, c.participant_id))
    shutil.copyfile(a.path, b.path)
    shutil.copyfile(c.path, d.path)
    ledger = data.read_ledger(configure(dataset))
    assert {s.path for s in before.samples} - {s.path for s in ledger.samples} == {b.path, c.path, d.path}
    assert any(f"participant {a.participant_id}" in n and "same content" in n and "used once" in n for n in ledger.notes)
    row = next(r for r in ledger.rows if r.participant_id == c.participant_id)
    assert "with content that participants " in row.reason and d.participant_id in row.reason


def test_a_second_epoch_after_a_volume_was_struck(dataset, configure):
    bad = data.read_ledger(configure(dataset)).samples[2].path
    open(bad, "wb").write(b"damaged")
    cfg = configure(dataset, "data.max_missing=1")
    ledger = data.read_ledger(cfg)
    paths = [s.path for s in ledger.samples]
    volumes = data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir)
    for _ in range(2):
        arrived = [(i, v) for i, _, v in data.stream(volumes, ledger, range(8), cfg)]
        assert [i for i, _ in arrived] == [0, 1, 3, 4, 5, 6, 7] and len(ledger.unreadable) == 1
        for i, volume in arrived:  # index and content still belong together
            exact = data.preprocess(data.read_dicom(paths[i]), (16, 64, 64))
            assert (volume[0].float() - exact).abs().max() <= 2**-8


def test_stopping_does_not_wait_for_what_is_queued(written, configure, monkeypatch):
    monkeypatch.setattr(data, "decode_volume", lambda *args, real=data.decode_volume: time.sleep(0.5) or real(*args))
    cfg = configure(written, "data.prefetch=16")
    ledger = data.read_ledger(cfg)
    arriving = data.stream(data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir), ledger, range(40), cfg)
    next(arriving)
    began = time.monotonic()
    arriving.close()
    assert time.monotonic() - began < 3  # 16 decodes last 8 s


def test_what_a_kill_left_of_a_cached_volume_takes_no_room(written, configure):
    cfg = configure(written)
    ledger = data.read_ledger(cfg)
    folder = os.path.join(cfg.paths.cache_dir, "volumes")
    os.makedirs(folder)
    open(os.path.join(folder, "x.npy.17.part"), "wb").write(b"x" * 1_000_000)
    list(data.stream(data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir, cache_gb=1e-3), ledger, range(3), cfg))
    assert len(os.listdir(folder)) == 3 and not glob.glob(f"{folder}/*.part")


@pytest.mark.parametrize("frames, change, message", [
    (1, {}, "has a single frame; that is no volume"),
    (12, {"RescaleSlope": "1e38", "RescaleIntercept": "0"}, "has values that are not finite"),
])
def test_what_is_decoded_must_be_a_volume(tmp_path, frames, change, message):
    volume = np.random.default_rng(0).integers(0, 255, (frames, 48, 40), dtype=np.uint8)
    path = write_dicom(tmp_path / "a.dcm", volume, ExplicitVRLittleEndian, **change)
    with pytest.raises(data.Unreadable, match=message):
        data.decode_volume(path, (8, 32, 32))


@pytest.mark.parametrize("number", ["EMFILE", "EIO"])
def test_trouble_of_the_disk_is_no_fault_of_the_volume(written, configure, monkeypatch, number):
    import errno

    import pydicom

    def fails(path):
        raise OSError(getattr(errno, number), "trouble")
    cfg = configure(written, "data.max_missing=10")
    ledger = data.read_ledger(cfg)
    monkeypatch.setattr(pydicom, "dcmread", fails)
    with pytest.raises(OSError, match=f"participant {ledger.samples[0].participant_id}: .*trouble"):
        list(data.stream(data.Volumes(ledger.samples, (16, 64, 64), cfg.paths.cache_dir), ledger, range(4), cfg))
    assert ledger.unreadable == []


def test_an_empty_manifest(dataset, configure):
    edit(dataset / "retinal_oct" / "manifest.tsv", lambda t: t.splitlines(True)[0])
    with pytest.raises(ValueError, match="manifest.tsv has no row of a participant of participants.tsv"):
        data.read_ledger(configure(dataset))
