import errno
import io
import os

import imagecodecs
import numpy as np
import pydicom
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FIXTURES,
    change_dicom,
    codestream,
    read_bytes,
    smooth_volume,
    write_bytes,
    write_dicom,
)
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

import volumes

# ----------------------------------------------------------------------------------- preprocessing


def slow_preprocess(volume, size):
    """The pretraining's own words: z-score, trilinear resize, z-score."""
    x = torch.from_numpy(volume.astype(np.float32))
    x = (x - x.mean()) / x.std(unbiased=False)
    x = F.interpolate(x[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]
    return (x - x.mean()) / x.std(unbiased=False)


def test_preprocessing_equals_the_pretrainings_recorded_output():
    recorded = np.load(os.path.join(FIXTURES, "preprocess.npz"))
    result = volumes.preprocess(recorded["volume"], tuple(recorded["size"]))
    assert result.dtype == torch.float32 and result.shape == (16, 64, 64)
    assert np.abs(result.numpy() - recorded["expected"][0]).max() <= 1e-4


SHAPES = [
    (256, 50, 40),
    (20, 70, 40),
    (64, 96, 32),
    (7, 33, 65),
    (1, 5, 5),
    (61, 20, 33),
    (100, 17, 96),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_preprocessing_equals_the_slow_formula(shape, dtype):
    volume, size = np.random.default_rng(0).integers(0, 255, shape).astype(dtype), (64, 96, 32)
    difference = volumes.preprocess(volume, size) - slow_preprocess(volume, size)
    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize(
    "value, dtype", [(0, np.uint8), (200, np.uint8), (0.1, np.float32), (-1e9, np.float64)]
)
def test_a_constant_volume_is_zeros(value, dtype):
    assert (volumes.preprocess(np.full((9, 7, 5), value, dtype), (16, 16, 16)) == 0).all()


def test_what_is_no_volume_is_refused():
    with pytest.raises(ValueError, match="frames, rows, columns"):
        volumes.preprocess(np.zeros((1, 4, 5, 6)), (4, 16, 16))


def test_nan_is_not_hidden():
    volume = np.random.default_rng(0).normal(size=(4, 5, 6))
    volume[0, 0, 0] = np.nan
    assert not torch.isfinite(volumes.preprocess(volume, (4, 16, 16))).any()


# ------------------------------------------------------------------------------------------- DICOM


SYNTAXES = pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        JPEG2000Lossless,
        JPEGLossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
        RLELossless,
    ],
    ids=lambda syntax: syntax.name,
)


@pytest.fixture(scope="module")
def volume():
    """(20, 24, 30), smooth."""
    return smooth_volume(20, 24, 30)


@SYNTAXES
def test_every_transfer_syntax_reads_bit_for_bit(tmp_path, volume, syntax):
    path = write_dicom(tmp_path / "v.dcm", volume, syntax)
    assert np.array_equal(volumes.read_dicom(path), volume)
    with open(path, "rb") as f:
        assert np.array_equal(volumes.read_dicom(f), volume)
    assert np.array_equal(volumes.read_dicom(io.BytesIO(read_bytes(path))), volume)


def test_lossy_jpeg_2000(tmp_path, volume):
    read = volumes.read_dicom(write_dicom(tmp_path / "v.dcm", volume, JPEG2000))
    frames = [imagecodecs.jpeg2k_decode(codestream(JPEG2000, frame)) for frame in volume]
    # decoders may round differently
    assert np.abs(read.astype(int) - np.stack(frames)).max() <= 1
    assert 0 < np.abs(read.astype(int) - volume).max() < 30


@SYNTAXES
def test_only_the_frames_that_the_resize_reads_are_decoded(tmp_path, volume, syntax):
    """20 frames -> 4 slices: slice d reads the frames around 5 (d + 1/2) - 1/2 = 2, 7, 12, 17,
    which are whole numbers, so one frame each."""
    part = volumes.read_dicom(write_dicom(tmp_path / "v.dcm", volume, syntax), (4, 16, 16))
    decoded = np.flatnonzero(part.any(axis=(1, 2)))
    assert part.shape == volume.shape and decoded.tolist() == [2, 7, 12, 17]
    assert np.array_equal(part[decoded], volume[decoded])


@SYNTAXES
def test_between_frames_two_are_decoded_for_a_slice(tmp_path, volume, syntax):
    """20 frames -> 5 slices: around 4 (d + 1/2) - 1/2 = 1.5, 5.5, ..."""
    part = volumes.read_dicom(write_dicom(tmp_path / "v.dcm", volume, syntax), (5, 16, 16))
    decoded = np.flatnonzero(part.any(axis=(1, 2)))
    assert decoded.tolist() == [1, 2, 5, 6, 9, 10, 13, 14, 17, 18]


@SYNTAXES
@pytest.mark.parametrize("size", [(4, 16, 16), (5, 16, 16)])
def test_what_is_read_in_part_is_preprocessed_as_the_whole(tmp_path, volume, syntax, size):
    part = volumes.read_dicom(write_dicom(tmp_path / "v.dcm", volume, syntax), size)
    result = volumes.preprocess(part, size)
    assert torch.equal(result, volumes.preprocess(volume, size))
    assert (result - slow_preprocess(volume, size)).abs().max() <= 1e-5


def test_sixteen_bits(tmp_path):
    deep = np.random.default_rng(0).integers(0, 60000, (3, 8, 9)).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", deep, ExplicitVRLittleEndian)
    assert np.array_equal(volumes.read_dicom(path), deep)


def test_a_single_frame_without_their_number(tmp_path):
    deep = np.random.default_rng(0).integers(0, 60000, (1, 8, 9)).astype(np.uint16)
    path = write_dicom(tmp_path / "b.dcm", deep, ExplicitVRLittleEndian)
    change_dicom(path, lambda ds: ds.__delattr__("NumberOfFrames"))
    assert np.array_equal(volumes.read_dicom(path), deep)


def functional_group(slope, intercept):
    """A functional group that rescales."""
    transform, group = pydicom.Dataset(), pydicom.Dataset()
    transform.RescaleSlope, transform.RescaleIntercept = slope, intercept
    transform.RescaleType = "US"
    group.PixelValueTransformationSequence = [transform]
    return group


def test_rescale_slope_and_intercept(tmp_path, volume):
    elements = {"RescaleSlope": -2, "RescaleIntercept": 10}
    path = write_dicom(tmp_path / "v.dcm", volume, ExplicitVRLittleEndian, **elements)
    assert np.allclose(volumes.read_dicom(path), volume * -2.0 + 10)


def test_a_rescale_of_all_frames_together(tmp_path, volume):
    elements = {"SharedFunctionalGroupsSequence": [functional_group(3, -1)]}
    path = write_dicom(tmp_path / "w.dcm", volume, ExplicitVRLittleEndian, **elements)
    assert np.allclose(volumes.read_dicom(path), volume * 3.0 - 1)


def test_a_rescale_of_its_own_for_every_frame(tmp_path, volume):
    pairs = [(1, 0), *((2.5, -100),) * 19]  # the first frame alone would stay integer
    elements = {"PerFrameFunctionalGroupsSequence": [functional_group(*pair) for pair in pairs]}
    path = write_dicom(tmp_path / "v.dcm", volume, ExplicitVRLittleEndian, **elements)
    expected = np.stack([frame * a + b for frame, (a, b) in zip(volume.astype(float), pairs)])
    assert np.allclose(volumes.read_dicom(path), expected)


# ------------------------------------------------------------------------------- what is no volume

SIZES = (None, (4, 16, 16))  # the whole file, and the frames that a resize reads


@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom
@SYNTAXES
@pytest.mark.parametrize("claimed", [1, 10, 19, 21, 40])
def test_a_wrong_number_of_frames_is_refused(tmp_path, volume, syntax, claimed):
    path = write_dicom(tmp_path / "v.dcm", volume, syntax)
    change_dicom(path, lambda ds: setattr(ds, "NumberOfFrames", claimed))
    message = f"NumberOfFrames is {claimed}, but the pixel data holds 20 frames"
    for size in SIZES:
        with pytest.raises(ValueError, match=message):
            volumes.read_dicom(path, size)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom
@SYNTAXES
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, volume, syntax, keep):
    path = write_dicom(tmp_path / "short.dcm", volume, syntax)
    whole = read_bytes(path)
    write_bytes(path, whole[: int(keep * len(whole))])
    for size in SIZES:
        with pytest.raises(ValueError, match="short.dcm is not a readable OCT volume"):
            volumes.read_dicom(path, size)


def without_pixels(ds):
    del ds.PixelData


def with_empty_pixels(ds):
    ds.PixelData = b""
    ds["PixelData"].VR = "OB"


@pytest.mark.parametrize("change", [without_pixels, with_empty_pixels])
def test_no_pixels(tmp_path, volume, change):
    path = write_dicom(tmp_path / "empty.dcm", volume, ExplicitVRLittleEndian)
    change_dicom(path, change)
    message = "empty.dcm is not a readable OCT volume: no pixel data"
    with pytest.raises(ValueError, match=message):
        volumes.read_dicom(path)


def test_no_dicom(tmp_path):
    (tmp_path / "text.dcm").write_text("hello")
    with pytest.raises(ValueError, match="text.dcm is not a readable OCT volume"):
        volumes.read_dicom(tmp_path / "text.dcm")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        volumes.read_dicom(tmp_path / "none.dcm")


def test_colours(tmp_path, volume):
    elements = {"SamplesPerPixel": 3, "PlanarConfiguration": 0}
    path = write_dicom(tmp_path / "rgb.dcm", volume, ExplicitVRLittleEndian, **elements)
    with pytest.raises(ValueError, match="3 samples a pixel"):
        volumes.read_dicom(path)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "frames, change, message",
    [
        (1, {}, "has a single frame; that is no volume"),
        (12, {"RescaleSlope": "1e38", "RescaleIntercept": "0"}, "has values that are not finite"),
    ],
)
def test_what_is_decoded_must_be_a_volume(tmp_path, frames, change, message):
    volume = np.random.default_rng(0).integers(0, 255, (frames, 48, 40), dtype=np.uint8)
    path = write_dicom(tmp_path / "a.dcm", volume, ExplicitVRLittleEndian, **change)
    with pytest.raises(volumes.Unreadable, match=message):
        volumes.decode_volume(path, (8, 32, 32))


def test_decoding_is_reading_and_preprocessing(tmp_path, volume):
    path, size = write_dicom(tmp_path / "v.dcm", volume, ExplicitVRLittleEndian), (8, 32, 32)
    result = volumes.decode_volume(path, size)
    assert result.dtype == np.float16
    assert np.array_equal(result, volumes.preprocess(volume, size).numpy().astype(np.float16))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_trouble_of_the_disk_is_not_the_files(tmp_path, volume, monkeypatch, number):
    path = write_dicom(tmp_path / "v.dcm", volume, ExplicitVRLittleEndian)

    def fails(path):
        raise OSError(number, "trouble")

    monkeypatch.setattr(pydicom, "dcmread", fails)
    with pytest.raises(OSError, match="trouble"):
        volumes.decode_volume(path, (8, 32, 32))
