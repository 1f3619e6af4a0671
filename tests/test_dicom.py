"""What DICOM files say of themselves: kind, meaning of a pixel, order of frames, where frames are.

Values are checked against arrays that the tests know, files are written by pydicom and imagecodecs.
"""

import os
import struct
import tracemalloc

import imagecodecs
import numpy as np
import pydicom
import pytest
from helpers import change_dicom, read_bytes, smooth_volume, write_bytes, write_dicom
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

import dicom
import volumes


@pytest.fixture(scope="module")
def volume():
    return smooth_volume(8, 24, 30)


def written(tmp_path, volume, change=None, syntax=ExplicitVRLittleEndian, **elements):
    """Path of a DICOM file with elements in place of the usual ones, after change(data set)."""
    path = write_dicom(tmp_path / "v.dcm", volume, syntax, **elements)
    if change:
        change_dicom(path, change)
    return path


def refusal(path):
    with pytest.raises(volumes.Unreadable) as caught:
        volumes.read_dicom(path)
    message = str(caught.value)
    assert " at 0x" not in message and message.startswith(path)
    return message


# ------------------------------------------------------------------------------ what the file is

OTHER_KINDS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "Segmentation Storage",
    "1.2.840.10008.5.1.4.1.1.77.1.5.7": "En Face",
    "1.2.840.10008.5.1.4.1.1.77.1.5.8": "B-scan Volume Analysis",  # OCT angiography
    "1.2.840.10008.5.1.4.1.1.77.1.5.1": "Ophthalmic Photography 8 Bit",
    "1.2.840.10008.5.1.4.1.1.481.2": "RT Dose",
    "1.2.840.10008.5.1.4.1.1.4.1": "Enhanced MR",
    "1.2.840.10008.5.1.4.1.1.14.1": "Intravascular Optical Coherence Tomography",
    "1.2.840.10008.5.1.4.1.1.81.1": "Thickness Map",
}


@pytest.mark.parametrize("uid, name", OTHER_KINDS.items())
def test_another_kind_of_image_is_refused_by_its_name(tmp_path, volume, uid, name):
    message = refusal(written(tmp_path, volume, SOPClassUID=uid))
    assert "no structural OCT" in message and name in message


@pytest.mark.parametrize("uid", ["1.2.276.0.7230010.3.1.0.1", "1.2.840.10008.5.1.4.1.1.7.2"])
def test_a_class_that_says_nothing_is_a_note(tmp_path, volume, uid):
    array, facts = volumes.read(written(tmp_path, volume, SOPClassUID=uid))
    assert np.array_equal(array, volume)
    (note,) = facts["notes"]
    assert "does not say that this is OCT" in note


def test_a_modality_tells_where_the_class_does_not(tmp_path, volume):
    elements = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2", "Modality": "SEG"}
    assert "its modality is SEG" in refusal(written(tmp_path, volume, **elements))


def test_a_file_that_says_nothing_of_its_kind_is_read(tmp_path, volume):
    def change(ds):
        del ds.Modality

    array, facts = volumes.read(written(tmp_path, volume, change))
    assert np.array_equal(array, volume) and facts["notes"] == []


def test_what_the_file_says_is_handed_on(tmp_path, volume):
    def change(ds):
        measures, groups = Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = [0.0026, 0.02], 0.05
        groups.PixelMeasuresSequence = [measures]
        ds.SharedFunctionalGroupsSequence = [groups]

    elements = {"PatientID": "1001 ", "ManufacturerModelName": "Triton", "ImageLaterality": "L"}
    _, facts = volumes.read(written(tmp_path, volume, change, **elements))
    expected = {"patient_id": "1001", "scanner": "Triton", "laterality": "L", "protocol": None}
    expected |= {"frames": 8, "rows": 24, "columns": 30, "spacing": [0.0026, 0.02]}
    expected |= {"thickness": 0.05, "syntax": "Explicit VR Little Endian", "notes": []}
    assert facts == expected


def test_a_spacing_that_is_no_number_costs_nothing(tmp_path, volume):
    path = written(tmp_path, volume, PixelSpacing=[0.25, 0.125])
    content = read_bytes(path)
    write_bytes(path, content.replace(b"0.25", b"0,25"))
    array, facts = volumes.read(path)
    assert np.array_equal(array, volume) and facts["spacing"] is None


# ------------------------------------------------------------------------------ what a pixel means


def with_palette(red, green, blue, first=0, bits=8):
    """A change of a data set to PALETTE COLOR with these tables."""

    def change(ds):
        ds.PhotometricInterpretation = "PALETTE COLOR"
        for name, table in (("Red", red), ("Green", green), ("Blue", blue)):
            stem = f"{name}PaletteColorLookupTable"
            setattr(ds, f"{stem}Descriptor", [len(table), first, bits])
            setattr(ds, f"{stem}Data", table.tobytes())
            ds[f"{stem}Descriptor"].VR, ds[f"{stem}Data"].VR = "US", "OW"

    return change


def test_a_grey_palette_is_applied(tmp_path, volume):
    table = np.random.default_rng(1).permutation(256).astype(np.uint8)
    path = written(tmp_path, volume, with_palette(table, table, table))
    assert np.array_equal(volumes.read_dicom(path), table[volume])


def test_a_grey_palette_of_16_bits_that_begins_late_is_applied(tmp_path, volume):
    table = np.random.default_rng(1).permutation(60000)[:200].astype("<u2")
    path = written(tmp_path, volume, with_palette(table, table, table, first=20, bits=16))
    assert np.array_equal(volumes.read_dicom(path), table[np.clip(volume.astype(int) - 20, 0, 199)])


def test_a_coloured_palette_is_refused(tmp_path, volume):
    table = np.arange(256, dtype=np.uint8)
    path = written(tmp_path, volume, with_palette(table, table[::-1].copy(), table))
    assert "palette is coloured" in refusal(path)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "ARGB", "nonsense"])
def test_what_is_not_grey_is_refused(tmp_path, volume, photometric):
    message = refusal(written(tmp_path, volume, PhotometricInterpretation=photometric))
    assert photometric in message


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_monochrome1_is_inverted(tmp_path, volume, dtype):
    values = volume.astype(dtype) - (100 if dtype == np.int16 else 0)
    elements = {"PhotometricInterpretation": "MONOCHROME1", "PixelRepresentation": 0}
    elements["PixelRepresentation"] = int(dtype == np.int16)
    read = volumes.read_dicom(written(tmp_path, values, **elements))
    highest = {np.uint8: 255, np.uint16: 65535, np.int16: -1}[dtype]
    assert np.array_equal(read, highest - values.astype(int))


def test_monochrome1_of_12_bits_with_a_rescale(tmp_path):
    values = smooth_volume(6, 20, 22, 4095, np.uint16)
    elements = {"BitsStored": 12, "HighBit": 11, "PhotometricInterpretation": "MONOCHROME1"}
    elements |= {"RescaleSlope": 2, "RescaleIntercept": -7}
    read = volumes.read_dicom(written(tmp_path, values, **elements))
    assert np.allclose(read, 2.0 * (4095 - values.astype(float)) - 7)


def test_a_modality_lookup_table_is_applied(tmp_path, volume):
    table = (1000 + np.random.default_rng(2).permutation(256)).astype("<u2")

    def change(ds):
        item = Dataset()
        item.LUTDescriptor, item.ModalityLUTType = [256, 0, 16], "US"
        item.LUTData = table.tobytes()
        item["LUTData"].VR = "OW"
        ds.ModalityLUTSequence = [item]

    path = written(tmp_path, volume, change)
    assert np.array_equal(volumes.read_dicom(path), table[volume])
    change_dicom(path, lambda ds: setattr(ds, "RescaleSlope", 2))
    assert "only one can hold" in refusal(path)


def test_bits_above_the_value_are_cleared(tmp_path):
    """Overlays in the top bit, and values of 10 bits that begin at bit 3."""
    values = smooth_volume(6, 20, 22, 1023, np.uint16)
    overlay = (np.random.default_rng(3).random(values.shape) < 0.1).astype(np.uint16) << 15
    for shift, high in ((0, 9), (3, 12)):
        path = written(tmp_path, (values << shift) | overlay, BitsStored=10, HighBit=high)
        assert np.array_equal(volumes.read_dicom(path), values)


def signed_of_12_bits():
    return smooth_volume(6, 20, 22, 4095, np.int16) - 2048


@pytest.mark.parametrize("extended", [True, False], ids=["sign extended", "zeros above"])
def test_signed_values_in_part_of_a_word(tmp_path, extended):
    values = signed_of_12_bits()
    stored = values if extended else values & 0x0FFF
    elements = {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 1}
    assert np.array_equal(volumes.read_dicom(written(tmp_path, stored, **elements)), values)


def compressed(frames, syntax):
    def change(ds):
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = frames if isinstance(frames, bytes) else encapsulate(frames)
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True

    return change


def jpeg2000(frame):
    return imagecodecs.jpeg2k_encode(frame, reversible=True, resolutions=2, codecformat="j2k")


@pytest.mark.parametrize(
    "encode, syntax",
    [(jpeg2000, JPEG2000Lossless), (imagecodecs.jpegls_encode, JPEGLSLossless)],
    ids=["JPEG 2000", "JPEG-LS"],
)
def test_overlay_bits_of_compressed_frames_are_cleared(tmp_path, encode, syntax):
    values = smooth_volume(6, 40, 42, 4095, np.uint16)
    overlay = (np.random.default_rng(3).random(values.shape) < 0.1).astype(np.uint16) << 15
    change = compressed([encode(frame) for frame in values | overlay], syntax)
    path = written(tmp_path, values, change, BitsStored=12, HighBit=11)
    assert np.array_equal(volumes.read_dicom(path), values)


def test_overlay_bits_in_rle_are_cleared(tmp_path):
    values = smooth_volume(6, 40, 42, 4095, np.uint16)
    overlay = (np.random.default_rng(3).random(values.shape) < 0.1).astype(np.uint16) << 15
    path = written(tmp_path, values | overlay, syntax=RLELossless)
    change_dicom(path, lambda ds: ds.update({"BitsStored": 12, "HighBit": 11}))
    assert np.array_equal(volumes.read_dicom(path), values)


def test_a_codestream_of_fewer_bits_than_the_file_says(tmp_path, volume):
    change = compressed(
        [imagecodecs.jpeg8_encode(f, lossless=True) for f in volume], JPEGLosslessSV1
    )
    path = written(tmp_path, volume.astype(np.uint16), change, BitsStored=12, HighBit=11)
    assert np.array_equal(volumes.read_dicom(path), volume)


def set_bits(ds):
    ds.BitsStored, ds.HighBit = 8, 7


def test_values_wider_than_their_bits_are_refused(tmp_path):
    """Masking them would fold a bright retina over into a dark one."""
    values = smooth_volume(6, 20, 22, 4095, np.uint16)
    message = refusal(written(tmp_path, values, set_bits))
    assert "use bit 8" in message and "BitsStored 8" in message


def test_an_overlay_that_the_file_names_may_lie_beside_the_value(tmp_path):
    values = smooth_volume(6, 20, 22, 255, np.uint16)
    overlay = (np.random.default_rng(3).random(values.shape) < 0.1).astype(np.uint16) << 8

    def change(ds):
        set_bits(ds)
        ds.add_new((0x6000, 0x0100), "US", 16)
        ds.add_new((0x6000, 0x0102), "US", 8)

    path = written(tmp_path, values | overlay, change)
    assert np.array_equal(volumes.read_dicom(path), values)


@pytest.mark.parametrize("stored, high", [(12, 9), (12, 16), (20, 19)])
def test_bits_that_contradict_each_other_are_refused(tmp_path, stored, high):
    values = smooth_volume(6, 20, 22, 4095, np.uint16)
    message = refusal(written(tmp_path, values, BitsStored=stored, HighBit=high))
    assert "contradict each other" in message


@pytest.mark.parametrize("name, dtype", [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")])
def test_float_pixels_are_read(tmp_path, volume, name, dtype):
    values = volume.astype(dtype) / 7

    def change(ds):
        for keyword in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
            delattr(ds, keyword)
        ds.BitsAllocated = 8 * values.dtype.itemsize
        setattr(ds, name, values.tobytes())

    path = written(tmp_path, volume, change)
    assert np.array_equal(volumes.read_dicom(path), values)
    part = volumes.read_dicom(path, (4, 8, 8))
    assert part.shape == values.shape


# ------------------------------------------------------------------------------ the order of frames


def positioned(at, **parts):
    """A change of a data set: frame i is at position at[i], said in each of the parts."""

    def change(ds):
        groups = []
        for z in map(int, at):
            content, plane, group = Dataset(), Dataset(), Dataset()
            content.StackID = "1"
            if "stack" in parts:
                content.InStackPositionNumber = z + 1
            if "index" in parts:
                content.DimensionIndexValues = [1, z + 1]
            group.FrameContentSequence = [content]
            if "plane" in parts:
                plane.ImagePositionPatient = [float(v) for v in parts["plane"](z)]
                group.PlanePositionSequence = [plane]
            groups.append(group)
        ds.PerFrameFunctionalGroupsSequence = groups

    return change


tilted = lambda z: (1 + 0.3 * z, 5, -0.1 * z)
SAYS = pytest.mark.parametrize(
    "parts",
    [{"stack": 1}, {"index": 1}, {"plane": tilted}, {"stack": 1, "index": 1, "plane": tilted}],
    ids=["position in stack", "dimension index", "plane", "all"],
)
INTERLEAVED = np.r_[0:20:2, 1:20:2]


@SAYS
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEG2000Lossless], ids=["raw", "j2k"])
def test_frames_are_put_in_order(tmp_path, parts, syntax):
    scan = smooth_volume(20, 40, 42)
    for at in (INTERLEAVED, np.random.default_rng(0).permutation(20)):
        path = written(tmp_path, scan[at], positioned(at, **parts), syntax)
        read, facts = volumes.read(path)
        assert np.array_equal(read, scan)
        (note,) = facts["notes"]
        assert "out of order" in note
        # 20 frames -> 4 slices read the frames 2, 7, 12, 17 of the right order
        part = volumes.read_dicom(path, (4, 16, 16))
        assert np.flatnonzero(part.any(axis=(1, 2))).tolist() == [2, 7, 12, 17]
        assert np.array_equal(part[[2, 7, 12, 17]], scan[[2, 7, 12, 17]])


@SAYS
def test_frames_in_order_are_left_alone(tmp_path, parts):
    scan = smooth_volume(20, 24, 30)
    read, facts = volumes.read(written(tmp_path, scan, positioned(range(20), **parts)))
    assert np.array_equal(read, scan) and facts["notes"] == []


def test_rescales_go_with_their_frames(tmp_path):
    scan = smooth_volume(20, 24, 30)

    def change(ds):
        positioned(INTERLEAVED, stack=1)(ds)
        for z, group in zip(INTERLEAVED, ds.PerFrameFunctionalGroupsSequence):
            item = Dataset()
            item.RescaleSlope, item.RescaleIntercept, item.RescaleType = 1, int(z), "US"
            group.PixelValueTransformationSequence = [item]

    read = volumes.read_dicom(written(tmp_path, scan[INTERLEAVED], change))
    assert np.allclose(read, scan + np.arange(20.0)[:, None, None])


def without_one(ds):
    positioned(INTERLEAVED, stack=1)(ds)
    del ds.PerFrameFunctionalGroupsSequence[3].FrameContentSequence[0].InStackPositionNumber


def all_alike(ds):
    positioned(INTERLEAVED, stack=1, index=1)(ds)
    for group in ds.PerFrameFunctionalGroupsSequence:
        content = group.FrameContentSequence[0]
        content.InStackPositionNumber, content.DimensionIndexValues = 1, [1, 1]


UNCLEAR = {
    "one frame without a position": without_one,
    "all at one position": all_alike,
    "too few groups": lambda ds: positioned(INTERLEAVED[:7], stack=1)(ds),
    "planes on a circle": positioned(INTERLEAVED, plane=lambda z: (np.cos(z), np.sin(z), 0)),
    "planes in descending order": positioned(range(20)[::-1], plane=tilted),
}


@pytest.mark.parametrize("change", UNCLEAR.values(), ids=UNCLEAR)
def test_what_does_not_say_an_order_clearly_leaves_that_of_storage(tmp_path, change):
    scan = smooth_volume(20, 24, 30)
    read, facts = volumes.read(written(tmp_path, scan, change))
    assert np.array_equal(read, scan) and facts["notes"] == []


def test_several_stacks_are_refused(tmp_path):
    def change(ds):
        positioned(range(20), stack=1)(ds)
        for group in ds.PerFrameFunctionalGroupsSequence[12:]:
            group.FrameContentSequence[0].StackID = "2"

    assert "2 stacks of frames (1, 2)" in refusal(
        written(tmp_path, smooth_volume(20, 24, 30), change)
    )


PARTS = [
    {"InConcatenationNumber": 2, "InConcatenationTotalNumber": 3},
    {"InConcatenationNumber": 1, "InConcatenationTotalNumber": 2},
    {"InConcatenationNumber": 2},
    {"ConcatenationFrameOffsetNumber": 40},
]


@pytest.mark.parametrize("elements", PARTS)
def test_a_part_of_a_concatenation_is_refused(tmp_path, volume, elements):
    message = refusal(written(tmp_path, volume, ConcatenationUID="1.2.3.4", **elements))
    assert "of a concatenation" in message


def test_a_concatenation_of_one_part_is_whole(tmp_path, volume):
    elements = {"InConcatenationNumber": 1, "InConcatenationTotalNumber": 1}
    path = written(tmp_path, volume, ConcatenationUID="1.2.3.4", **elements)
    assert np.array_equal(volumes.read_dicom(path), volume)


# ------------------------------------------------------------------------------ where frames are


def even(frame):
    return frame + b"\0" * (len(frame) % 2)


def items(fragments, offsets):
    """Encapsulated pixel data with an offset table of one's own."""
    table = struct.pack(f"<{len(offsets)}I", *offsets)
    parts = [
        b"\xfe\xff\x00\xe0" + struct.pack("<I", len(part)) + part for part in [table, *fragments]
    ]
    return b"".join(parts) + b"\xfe\xff\xdd\xe0\0\0\0\0"


@pytest.fixture(scope="module")
def frames(volume):
    return [even(jpeg2000(frame)) for frame in volume]


def starts(fragments):
    return np.cumsum([0, *(len(part) + 8 for part in fragments)])[:-1].tolist()


TABLES = {
    "right": lambda at: at,
    "none": lambda at: [],
    "one entry": lambda at: [0],
    "one too many": lambda at: [*at, at[-1] + 8],
    "zeros": lambda at: [0] * 8,
    "shifted": lambda at: [offset + 8 for offset in at],
    "backwards": lambda at: at[::-1],
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_as_many_fragments_as_frames_are_the_frames(tmp_path, volume, frames, table):
    pixels = items(frames, table(starts(frames)))
    path = written(tmp_path, volume, compressed(pixels, JPEG2000Lossless))
    assert np.array_equal(volumes.read_dicom(path), volume)


def test_empty_fragments_are_no_frames(tmp_path, volume, frames):
    for fragments in ([*frames, b""], [b"", *frames], [*frames[:3], b"", b"", *frames[3:]]):
        path = written(tmp_path, volume, compressed(items(fragments, []), JPEG2000Lossless))
        assert np.array_equal(volumes.read_dicom(path), volume)


@pytest.mark.parametrize("with_table", [True, False])
def test_frames_of_several_fragments(tmp_path, volume, frames, with_table):
    halves = [part for f in frames for part in (f[: len(f) // 4 * 2], f[len(f) // 4 * 2 :])]
    pixels = items(halves, starts(halves)[::2] if with_table else [])
    path = written(tmp_path, volume, compressed(pixels, JPEG2000Lossless))
    assert np.array_equal(volumes.read_dicom(path), volume)
    part = volumes.read_dicom(path, (2, 8, 8))
    assert np.array_equal(part[part.any(axis=(1, 2))], volume[part.any(axis=(1, 2))])


def test_a_table_that_contradicts_several_fragments_is_blamed(tmp_path, volume, frames):
    halves = [part for f in frames for part in (f[: len(f) // 4 * 2], f[len(f) // 4 * 2 :])]
    offsets = [offset + 2 for offset in starts(halves)[::2]]
    path = written(tmp_path, volume, compressed(items(halves, offsets), JPEG2000Lossless))
    assert "offset table contradicts its 16 fragments" in refusal(path)


@pytest.mark.parametrize("value", [b"", struct.pack("<Q", 0), struct.pack("<8Q", *range(8))])
def test_an_extended_table_is_not_believed_against_the_fragments(tmp_path, volume, frames, value):
    def change(ds):
        compressed(items(frames, []), JPEG2000Lossless)(ds)
        ds.ExtendedOffsetTable = ds.ExtendedOffsetTableLengths = value

    path = written(tmp_path, volume, change)
    assert np.array_equal(volumes.read_dicom(path), volume)


# ------------------------------------------------------------------------------ words


def scrambled(codestream):
    out = bytearray(codestream)
    out[::7] = bytes(byte ^ 0x5A for byte in out[::7])
    return bytes(out)


def test_what_no_decoder_knows_is_said_in_words(tmp_path, volume, frames):
    change = compressed([scrambled(frame) for frame in frames], JPEG2000Lossless)
    message = refusal(written(tmp_path, volume, change))
    assert "cannot be decoded as JPEG 2000" in message and "damaged or obfuscated" in message


def test_a_private_transfer_syntax_is_named(tmp_path, volume):
    path = written(tmp_path, volume)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = UID("1.2.840.113619.5.2")
    ds.save_as(path, implicit_vr=False, little_endian=True)
    message = refusal(path)
    assert "transfer syntax 1.2.840.113619.5.2 is private" in message and "convert" in message


def test_a_missing_transfer_syntax_is_named(tmp_path, volume):
    path = written(tmp_path, volume)
    ds = pydicom.dcmread(path)
    del ds.file_meta.TransferSyntaxUID
    ds.save_as(path, implicit_vr=False, little_endian=True)
    assert "it has no transfer syntax" in refusal(path)


def test_a_missing_number_of_frames_is_named(tmp_path, volume):
    path = written(tmp_path, volume, lambda ds: delattr(ds, "NumberOfFrames"))
    assert "it has no NumberOfFrames, and its pixel data holds 8 frames" in refusal(path)


@pytest.mark.parametrize("name", ["Rows", "Columns", "BitsAllocated"])
def test_a_missing_size_is_named(tmp_path, volume, name):
    assert f"it has no {name}" in refusal(written(tmp_path, volume, lambda ds: delattr(ds, name)))


@pytest.mark.parametrize(
    "encode, syntax",
    [(jpeg2000, JPEG2000Lossless), (imagecodecs.jpegls_encode, JPEGLSLossless)],
    ids=["JPEG 2000", "JPEG-LS"],
)
def test_frames_of_another_size_are_refused(tmp_path, volume, encode, syntax):
    """Also with rows and columns exchanged, which have as many pixels."""
    turned = volume.transpose(0, 2, 1).copy()
    for other, size in ((np.pad(volume, ((0, 0), (0, 8), (0, 2))), (32, 32)), (turned, (30, 24))):
        path = written(tmp_path, volume, compressed([encode(f) for f in other], syntax))
        expected = f"encoded with {size[0]} rows and {size[1]} columns, while Rows and Columns are"
        assert expected in refusal(path)


def test_what_is_no_dicom_is_said_in_words(tmp_path):
    path = tmp_path / "notes.dcm"
    path.write_bytes(b"hello " * 100)
    assert refusal(str(path)).endswith("it is no DICOM file")


# ------------------------------------------------------------------------------ what shows nothing


def blank(value):
    return np.full((16, 64, 64), value, np.uint8)


def with_a_logo():
    scan = blank(0)
    scan[:, :5, :8] = 200
    return scan


def with_noise():
    return blank(7) + (np.random.default_rng(0).random((16, 64, 64)) < 0.5)


SHOW_NOTHING = [blank(0), blank(255), with_a_logo(), with_noise(), smooth_volume(16, 64, 64, 2)]


@pytest.mark.parametrize("scan", SHOW_NOTHING, ids=["black", "white", "logo", "noise", "binary"])
def test_a_volume_that_shows_nothing_is_unreadable(tmp_path, scan):
    path = written(tmp_path, scan.astype(np.uint8))
    with pytest.raises(volumes.Unreadable, match="v.dcm shows nothing"):
        volumes.decode_volume(path, (16, 64, 64))


def test_a_faint_volume_is_read(tmp_path):
    scan = smooth_volume(16, 64, 64, 12)
    array = volumes.decode_volume(written(tmp_path, scan), (16, 64, 64))
    assert abs(array.astype(np.float32).std() - 1) < 1e-3


def test_blank_frames_are_a_note(tmp_path):
    scan = smooth_volume(16, 64, 64)
    scan[3:9] = 0
    _, facts = volumes.read(written(tmp_path, scan))
    assert facts["notes"] == ["6 of 16 frames that were read are blank"]


# ------------------------------------------------------------------------------ bombs


def peak_of(path):
    """The most memory, in MB, that refusing a file takes above what is held already."""
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return message, peak


def test_a_deflated_file_inflates_no_further_than_the_ceiling(tmp_path, volume, monkeypatch):
    monkeypatch.setattr(dicom, "CEILING", 10**6)
    zeros = np.zeros((1000, 200, 300), np.uint8)
    path = written(tmp_path, zeros, syntax=DeflatedExplicitVRLittleEndian)
    assert os.path.getsize(path) < 10**5
    message, peak = peak_of(path)
    assert "its pixels would take" in message and "dicom.CEILING is 0.00 GB" in message
    assert peak < 40  # 16 MB beside the pixels are allowed


def test_a_file_is_refused_before_its_frames_are_decoded(tmp_path, volume):
    """A codestream of a few bytes for each of 60,000 x 60,000 pixels."""
    path = written(tmp_path, volume, syntax=RLELossless)
    change_dicom(path, lambda ds: ds.update({"Rows": 60000, "Columns": 60000}))
    message, peak = peak_of(path)
    assert "would take 28.80 GB" in message and peak < 10


@pytest.mark.parametrize(
    "encode, syntax", [(jpeg2000, JPEG2000Lossless), (imagecodecs.jpegls_encode, JPEGLSLossless)]
)
def test_a_codestream_that_claims_to_be_huge_is_not_decoded(tmp_path, volume, encode, syntax):
    def huge(frame):
        code = bytearray(encode(frame))
        marker = code.find(b"\xff\x51" if syntax == JPEG2000Lossless else b"\xff\xf7")
        at, n = (marker + 6, 4) if syntax == JPEG2000Lossless else (marker + 5, 2)
        code[at : at + 2 * n] = (60000).to_bytes(n, "big") * 2
        return bytes(code)

    change = compressed([huge(frame) for frame in volume], syntax)
    message, peak = peak_of(written(tmp_path, volume, change))
    assert "encoded with 60000 rows and 60000 columns" in message and peak < 10
