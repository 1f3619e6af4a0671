"""Every format of volumes: the same volume by each format's own writer, files of others, refusals.

writers.py writes the files. Of .e2e, .vol, .fda and .img none was to be had that a scanner wrote.
"""

import hashlib
import importlib.util
import io
import os
import struct
import sys
import tracemalloc
import zipfile
import zlib

import h5py
import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
import scipy.io
import tifffile
from helpers import read_bytes, smooth_volume, write_bytes, write_dicom, zipped
from PIL import Image, ImageSequence
from pydicom.uid import ExplicitVRLittleEndian
from writers import (
    ARRAYS,
    TIFFS,
    WRITERS,
    ZEISS,
    coded_fda,
    codes_of,
    e2e_file,
    fda_file,
    folder_of,
    in_matlab,
    jpeg2000,
    picture,
    pictures,
    raw_fda,
    reflectivities,
    series,
    vol_file,
    write_mat5,
    write_multiframe,
    write_multiframe_zip,
    write_nifti,
    write_npy,
    write_pngs,
    write_series,
    write_tiff,
    write_zip,
)

import b2
import data
import dicom
import formats
import ledger
import volumes

SIZE = (4, 16, 16)
EYEPY = pytest.mark.skipif(
    importlib.util.find_spec("eyepy") is None, reason="pip install -r requirements-formats.txt"
)


@pytest.fixture(scope="module")
def volume():
    """(20, 24, 30): frames, rows and columns differ, so that no two axes can be confused."""
    return smooth_volume(20, 24, 30)


def refusal(path, *options):
    with pytest.raises(volumes.Unreadable) as caught:
        volumes.read_volume(path, None, *options)
    message = str(caught.value)
    assert message.startswith(str(path)) and " at 0x" not in message and len(message) < 500
    return message


ALL = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__[6:])


@ALL
def test_every_format_gives_the_same_volume(tmp_path, volume, write):
    path = write(tmp_path, volume)
    found = volumes.read_volume(path)
    assert found.dtype == volume.dtype and np.array_equal(found, volume)


@ALL
@pytest.mark.parametrize("size", [SIZE, (5, 16, 16), (40, 20, 16)])
def test_every_format_is_preprocessed_to_the_same_numbers(tmp_path, volume, write, size):
    array, facts = volumes.decode(str(write(tmp_path, volume)), size)
    assert np.array_equal(array, volumes.preprocess(volume, size).numpy().astype(np.float16))
    assert [facts[name] for name in ("frames", "rows", "columns")] == list(volume.shape)
    assert isinstance(facts["syntax"], str) and facts["notes"] == []


@ALL
def test_only_the_frames_that_the_resize_reads_are_read(tmp_path, volume, write):
    part = volumes.read_volume(write(tmp_path, volume), SIZE)
    kept = np.flatnonzero(part.any(axis=(1, 2)))
    assert part.shape == volume.shape and kept.tolist() == [2, 7, 12, 17]
    assert np.array_equal(part[kept], volume[kept])


@ALL
def test_every_format_has_the_same_facts(tmp_path, volume, write):
    """The names of dicom.description; None, never a guess."""
    _, facts = volumes.read(write(tmp_path, volume))
    _, right = volumes.read(write_multiframe(tmp_path, volume))
    assert facts.keys() == right.keys()
    if "series" not in write.__name__:
        assert facts["patient_id"] is facts["laterality"] is facts["scanner"] is None


@pytest.mark.parametrize("write", ARRAYS + TIFFS, ids=lambda write: write.__name__[6:])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_sixteen_bits_and_real_numbers(tmp_path, volume, write, dtype):
    values = volume.astype(dtype) * (257 if dtype == "uint16" else np.float32(1 / 7))
    found = volumes.read_volume(write(tmp_path, values.astype(dtype)))
    assert found.dtype == dtype and np.array_equal(found, values)


@pytest.mark.parametrize("write", ARRAYS, ids=lambda write: write.__name__[6:])
def test_double_precision(tmp_path, volume, write):
    found = volumes.read_volume(write(tmp_path, volume / 7))
    assert found.dtype == np.float64 and np.array_equal(found, volume / 7)


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f4", ">f8", "<i8", "f2"])
def test_other_types_and_byte_orders_of_numpy(tmp_path, volume, dtype):
    path = write_npy(tmp_path, volume.astype(dtype))
    assert path.read_bytes()[:200].find(dtype.encode()) > 0
    found = volumes.read_volume(path)
    assert found.dtype.isnative and np.array_equal(found, volume)


def test_truth_values_are_0_and_1(tmp_path, volume):
    found = volumes.read_volume(write_npy(tmp_path, volume > 100))
    assert found.dtype == np.uint8 and np.array_equal(found, volume > 100)


def test_a_big_endian_nifti(tmp_path, volume):
    values = volume.astype(">u2") * 257
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">u2")
    image = nibabel.Nifti1Image(values.transpose(2, 1, 0), np.eye(4), header)
    nibabel.save(image, tmp_path / "b.nii")
    assert read_bytes(tmp_path / "b.nii")[:4] == struct.pack(">i", 348)
    assert np.array_equal(volumes.read_volume(tmp_path / "b.nii"), values)


def test_sixteen_bits_in_png(tmp_path, volume):
    deep = volume.astype(np.uint16) * 257
    path = folder_of(tmp_path / "f", pictures(deep))
    assert np.array_equal(volumes.read_volume(path), deep)


def test_jpegs_are_as_another_decoder_reads_them(tmp_path, volume):
    files = pictures(volume, "JPEG", "jpg", quality=90)
    decoded = [np.asarray(Image.open(io.BytesIO(content))) for content in files.values()]
    found = volumes.read_volume(folder_of(tmp_path / "f", files))
    assert np.array_equal(found, np.stack(decoded))


# ------------------------------------------------------------------------------ axes and variables

ORDERS = [
    "frames,rows,columns",
    "rows,columns,frames",
    "columns,rows,frames",
    "columns,frames,rows",
]


@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("write", ["npy", "npz", "mat", "nii", "nii.gz", "7.3"])
def test_axes_name_those_of_the_file(tmp_path, volume, axes, write):
    names = axes.split(",")
    stored = volume.transpose([["frames", "rows", "columns"].index(name) for name in names])
    path = tmp_path / f"a.{write}"
    if write == "npy":
        np.save(path, stored)
    elif write == "npz":
        np.savez(path, stored)
    elif write == "mat":
        scipy.io.savemat(path, {"x": stored})
    elif write == "7.3":
        with h5py.File(path, "w", userblock_size=512) as file:
            file["x"] = stored.T
    else:
        nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), path)
    for size in (None, SIZE):
        found = volumes.read_volume(path, size, axes=axes)
        kept = found.any(axis=(1, 2))
        assert np.array_equal(found[kept], volume[kept]) and kept.sum() == (4 if size else 20)
    spaced = axes.replace(",", ", ")
    array = volumes.decode_volume(path, SIZE, axes=spaced)
    assert np.array_equal(array, volumes.preprocess(volume, SIZE).numpy().astype(np.float16))


@pytest.mark.parametrize(
    "axes", ["frames,rows", "z,y,x", "frames,rows,rows", "rows columns frames"]
)
def test_axes_that_are_no_order_are_refused(tmp_path, volume, axes):
    message = refusal(write_npy(tmp_path, volume), axes)
    assert axes in message and "frames, rows and columns once" in message


@pytest.mark.parametrize("write", [write_multiframe, write_pngs, write_tiff, write_series])
def test_files_that_know_their_axes_are_read_as_without(tmp_path, volume, write):
    """A data set may have both kinds."""
    path = write(tmp_path, volume)
    found = volumes.read_volume(path, None, "columns,rows,frames", "x")
    assert (found == volumes.read_volume(path)).all()


def several(path, a, b):
    np.savez(path / "s.npz", a=a, b=b)
    scipy.io.savemat(path / "s5.mat", {"a": in_matlab(a), "b": in_matlab(b)})
    with h5py.File(path / "s73.mat", "w", userblock_size=512) as file:
        file["a"], file["b"] = in_matlab(a).T, in_matlab(b).T
    return [path / "s.npz", path / "s5.mat", path / "s73.mat"]


def test_of_several_arrays_one_must_be_named(tmp_path, volume):
    for path in several(tmp_path, volume, volume[::-1]):
        message = refusal(path)
        assert "2 arrays of three axes, a, b" in message and "data.variable" in message
        assert np.array_equal(volumes.read_volume(path, variable="a"), volume)
        assert np.array_equal(volumes.read_volume(path, variable="b"), volume[::-1])
        assert "no array c; it holds a (" in refusal(path, None, "c")


def test_axes_of_length_1_beside_three_do_not_count(tmp_path, volume):
    np.save(tmp_path / "a.npy", volume[None])
    np.save(tmp_path / "b.npy", volume[:, None, :, :, None])
    for name in ("a.npy", "b.npy"):
        assert np.array_equal(volumes.read_volume(tmp_path / name), volume)
    stored = volume.transpose(2, 1, 0)[:, :, :, None]
    nibabel.save(nibabel.Nifti1Image(stored, np.eye(4)), tmp_path / "a.nii")
    assert np.array_equal(volumes.read_volume(tmp_path / "a.nii", SIZE)[7], volume[7])


# ------------------------------------------------------------------------------ what NIfTI says


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_niftis_slope_and_intercept_are_applied(tmp_path, volume, name):
    path = write_nifti(tmp_path, volume, name)
    image = nibabel.load(path)
    content = bytearray(image.to_bytes())
    content[112:120] = struct.pack("<2f", -0.25, 10)  # scl_slope, scl_inter
    if name.endswith("gz"):
        content = zlib.compress(content, wbits=31)
    write_bytes(path, content)
    by_nibabel = nibabel.load(path).get_fdata().transpose(2, 1, 0)
    assert np.allclose(volumes.read_volume(path), by_nibabel)
    assert np.allclose(by_nibabel, volume * -0.25 + 10)


@pytest.mark.parametrize("unit, factor", [("mm", 1), ("micron", 1e-3), (None, None)])
def test_a_niftis_spacing(tmp_path, volume, unit, factor):
    image = nibabel.Nifti1Image(volume.transpose(2, 1, 0), np.diag([11.5, 4, 120, 1]))
    if unit:
        image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii")
    _, facts = volumes.read(tmp_path / "a.nii")
    if unit:
        assert np.allclose(facts["spacing"], [4 * factor, 11.5 * factor])
        assert np.isclose(facts["thickness"], 120 * factor)
    else:
        assert facts["spacing"] is None is facts["thickness"]


# ------------------------------------------------------------------------------ what is no volume


def test_arrays_that_are_no_volume(tmp_path, volume):
    shapes = {
        (24, 30): "(24, 30)",
        (2, 3, 4, 5): "(2, 3, 4, 5)",
        (7,): "(7,)",
        (1, 1, 4, 5): "(1, 1, 4, 5)",
    }
    for shape, shown in shapes.items():
        np.save(tmp_path / "a.npy", np.zeros(shape))
        assert f"has the shape {shown}; a volume has three axes" in refusal(tmp_path / "a.npy")
    for values in (volume * 1j, volume.astype(str), volume.astype("V4"), volume.astype("M8[s]")):
        np.save(tmp_path / "a.npy", values)
        assert "real numbers" in refusal(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((0, 4, 5)))
    assert "shape (0, 4, 5)" in refusal(tmp_path / "a.npy")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_no_pickle_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.full((2, 2, 2), Evil(), dtype=object)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=objects)
    for name in ("a.npy", "a.npz"):
        refusal(tmp_path / name)
        refusal(tmp_path / name, "frames,rows,columns")
    assert "real numbers" in refusal(tmp_path / "a.npy")
    refusal(tmp_path / "a.npz", None, "x")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("save", ["mat", "nii", "tif"])
def test_complex_numbers_and_flat_arrays_in_other_formats(tmp_path, volume, save):
    for values in (volume * (1 + 1j), volume[0]):
        path = tmp_path / f"a.{save}"
        if save == "mat":
            scipy.io.savemat(path, {"x": values})
        elif save == "nii":
            nibabel.save(
                nibabel.Nifti1Image(values.astype(np.result_type(values, "f4")), None), path
            )
        else:
            tifffile.imwrite(path, values)
        if save == "tif" and values.ndim == 2:
            assert len(volumes.read_volume(path)) == 1
            with pytest.raises(volumes.Unreadable, match="single frame; that is no volume"):
                volumes.decode_volume(path, SIZE)
        else:
            refusal(path)


@ALL
def test_a_single_frame_is_no_volume(tmp_path, volume, write):
    if "mat" in write.__name__ or "tiff" in write.__name__:
        pytest.skip("MATLAB has no axis of length 1 at the end; TIFF is in another test")
    path = write(tmp_path, volume[:1])
    with pytest.raises(volumes.Unreadable, match="single frame; that is no volume"):
        volumes.decode_volume(path, SIZE)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("write", ARRAYS + TIFFS, ids=lambda write: write.__name__[6:])
def test_nan_is_refused(tmp_path, volume, write, value):
    values = volume.astype(np.float32)
    values[7, 3, 4] = value
    with pytest.raises(volumes.Unreadable, match="values that are not finite"):
        volumes.decode_volume(write(tmp_path, values), (20, 24, 30))


UNKNOWN = {
    "a.txt": b"hello",
    "a.nrrd": b"NRRD0004\n",
    "a.mha": b"ObjectType = Image",
    "a.bmp": b"BM" * 99,
}


@pytest.mark.parametrize("name, content", UNKNOWN.items())
def test_another_format_is_refused_with_those_that_are_read(tmp_path, name, content):
    write_bytes(tmp_path / name, content)
    assert "DICOM, .npy, .npz, .mat, NIfTI, TIFF" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    "ending",
    ["dcm", "npy", "npz", "mat", "nii", "nii.gz", "tif", "zip", "vol", "e2e", "fda", "img", ""],
)
@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 5000])
def test_a_name_without_its_content_is_refused(tmp_path, ending, content):
    write_bytes(tmp_path / f"a.{ending}", content)
    refusal(tmp_path / f"a.{ending}")


def test_the_content_wins_over_the_name(tmp_path, volume):
    for write in (write_npy, write_tiff, write_multiframe, write_zip, write_mat5):
        path = write(tmp_path, volume)
        os.rename(path, tmp_path / "a.bin")
        assert np.array_equal(volumes.read_volume(tmp_path / "a.bin"), volume)


def test_a_single_picture_is_no_volume(tmp_path, volume):
    write_bytes(tmp_path / "a.png", picture(volume[0], "PNG"))
    assert "a single PNG; a volume is the folder" in refusal(tmp_path / "a.png")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        volumes.read_volume(tmp_path / "none.npy")


# ------------------------------------------------------------------------------ folders of pictures


def test_an_empty_folder(tmp_path):
    assert "holds no file" in refusal(folder_of(tmp_path / "f", {".hidden": b"x"}))


@pytest.mark.parametrize("name", ["notes.txt", "a.xml", "b21.bmp"])
def test_an_unknown_file_in_a_folder_is_named(tmp_path, volume, name):
    path = folder_of(tmp_path / "f", pictures(volume) | {name: b"what is this?" * 20})
    assert f"holds {name}, which is no PNG" in refusal(path)
    write_bytes(tmp_path / "f.zip", zipped({name: b"?" * 200} | pictures(volume)))
    assert f"holds {name}, which is no PNG" in refusal(tmp_path / "f.zip")


def test_a_folder_in_a_folder_is_named(tmp_path, volume):
    path = folder_of(tmp_path / "f", pictures(volume))
    (path / "OD").mkdir()
    assert "holds OD, which is no file" in refusal(path)


def test_several_kinds_of_pictures_are_refused(tmp_path, volume):
    files = pictures(volume) | {"b21.jpg": picture(volume[0], "JPEG")}
    assert "several kinds, JPEG (b21.jpg) and PNG (b1" in refusal(folder_of(tmp_path / "f", files))


def test_pictures_of_several_sizes_are_refused(tmp_path, volume):
    for kind, ending in (("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif")):
        files = pictures(volume, kind, ending) | {f"b7.{ending}": picture(volume[0].T, kind)}
        message = refusal(folder_of(tmp_path / ending, files))
        assert f"b1.{ending} 24 x 30 and b7.{ending} 30 x 24" in message


@pytest.mark.parametrize(
    "name, message",
    [
        ("thumbnail.png", "named in 2 ways"),
        ("other_1.png", "named in 2 ways"),
        ("b07.png", "have the same number"),
    ],
)
def test_a_picture_that_may_be_another_volumes_is_refused(tmp_path, volume, name, message):
    files = pictures(volume) | {name: picture(volume[0], "PNG")}
    found = refusal(folder_of(tmp_path / "f", files))
    assert message in found and name in found


def coloured(frame):
    return np.stack([frame, frame, frame // 2], axis=2)


def tripled(frame):
    return np.stack([frame] * 3, axis=2)


def with_alpha(frame, value):
    return np.concatenate([tripled(frame), np.full((*frame.shape, 1), value, np.uint8)], axis=2)


@pytest.mark.parametrize("kind, ending", [("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif")])
def test_colours_must_be_grey(tmp_path, volume, kind, ending):
    options = {"quality": 95} if kind == "JPEG" else {}
    grey = volumes.read_volume(folder_of(tmp_path / "0", pictures(volume, kind, ending, **options)))
    same = pictures([tripled(frame) for frame in volume], kind, ending, **options)
    assert np.array_equal(volumes.read_volume(folder_of(tmp_path / "1", same)), grey)
    files = same | {f"b3.{ending}": picture(coloured(volume[2]), kind)}
    message = refusal(folder_of(tmp_path / "2", files))
    assert f"b3.{ending}: it is coloured; OCT is grey" in message


@pytest.mark.parametrize("kind, ending", [("PNG", "png"), ("TIFF", "tif")])
def test_transparency_must_be_none(tmp_path, volume, kind, ending):
    opaque = pictures([with_alpha(frame, 255) for frame in volume], kind, ending)
    assert np.array_equal(volumes.read_volume(folder_of(tmp_path / "1", opaque)), volume)
    files = opaque | {f"b3.{ending}": picture(with_alpha(volume[2], 200), kind)}
    assert f"b3.{ending}: it is transparent" in refusal(folder_of(tmp_path / "2", files))


def test_a_grey_palette_is_applied_and_a_coloured_one_refused(tmp_path, volume):
    pages = [Image.fromarray(frame).convert("P") for frame in volume]
    for colours, expected in ((np.arange(256)[::-1], 255 - volume), (None, None)):
        files = {}
        for i, page in enumerate(pages):
            table = np.arange(768) % 251 if colours is None else np.repeat(colours, 3)
            page.putpalette(table.tolist())
            out = io.BytesIO()
            page.save(out, "PNG")
            files[f"{i}.png"] = out.getvalue()
        path = folder_of(tmp_path / str(colours is None), files)
        if expected is None:
            assert "it is coloured" in refusal(path)
        else:
            assert np.array_equal(volumes.read_volume(path), expected)


def test_cmyk_is_refused(tmp_path, volume):
    files = {f"{i}.jpg": b"" for i in range(3)}
    for name in files:
        out = io.BytesIO()
        Image.fromarray(volume[0]).convert("CMYK").save(out, "JPEG")
        files[name] = out.getvalue()
    assert "CMYK" in refusal(folder_of(tmp_path / "f", files))


@pytest.mark.parametrize("kind, ending", [("PNG", "png"), ("JPEG", "jpg"), ("TIFF", "tif")])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.98])
def test_a_picture_that_is_cut_short_is_named(tmp_path, volume, kind, ending, keep):
    files = pictures(volume, kind, ending)
    content = files[f"b3.{ending}"]
    files[f"b3.{ending}"] = content[: int(keep * len(content))]
    for path in (folder_of(tmp_path / "f", files), tmp_path / "f.zip"):
        if path.suffix:
            write_bytes(path, zipped(files))
        if (kind, keep) == ("PNG", 0.98):  # the pixels end before the file does
            assert np.array_equal(volumes.read_volume(path), volume)
        else:
            refusal(path)


# ------------------------------------------------------------------------------ TIFF


def test_white_is_zero_is_inverted(tmp_path, volume):
    for values, white in ((volume, 255), (volume.astype(np.uint16) * 257, 65535)):
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
        assert np.array_equal(volumes.read_volume(tmp_path / "a.tif"), white - values)


def test_pages_of_several_sizes_are_refused(tmp_path, volume):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(volume)
        writer.write(volume[0, ::2, ::2])
    assert "images of 2 sizes (20 x 24 x 30, 12 x 15)" in refusal(tmp_path / "a.tif")


def test_a_tiff_of_two_axes_besides_rows_and_columns_is_refused(tmp_path):
    values = np.zeros((3, 5, 8, 9), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, imagej=True)
    assert "3 x 5 x 8 x 9" in refusal(tmp_path / "a.tif")


def test_coloured_pages_are_refused_and_grey_ones_read(tmp_path, volume):
    tifffile.imwrite(tmp_path / "a.tif", tripled(volume[0])[None].repeat(20, 0), photometric="rgb")
    assert np.array_equal(volumes.read_volume(tmp_path / "a.tif"), volume[:1].repeat(20, 0))
    rgb = np.stack([coloured(frame) for frame in volume])
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb")
    assert "coloured" in refusal(tmp_path / "a.tif")


def test_a_turned_tiff_and_one_with_a_palette_are_refused(tmp_path, volume):
    tag = [(274, "H", 1, 6, True)]
    tifffile.imwrite(tmp_path / "a.tif", volume, photometric="minisblack", extratags=tag)
    assert "Orientation" in refusal(tmp_path / "a.tif")
    colours = np.arange(768, dtype=np.uint16).reshape(3, 256)
    tifffile.imwrite(tmp_path / "a.tif", volume, photometric="palette", colormap=colours)
    assert "palette" in refusal(tmp_path / "a.tif")


# ------------------------------------------------------------------------------ series of DICOM


def test_the_position_orders_a_series(tmp_path, volume):
    for i, more in enumerate([{}, {"InstanceNumber": None}]):
        found, facts = volumes.read(folder_of(tmp_path / str(i), series(volume, **more)))
        assert np.array_equal(found, volume) and facts["notes"] == []


def test_of_two_directions_a_series_has_that_of_its_numbers(tmp_path, volume):
    files = series(volume, InstanceNumber=lambda i: 100 - i)
    found, facts = volumes.read(folder_of(tmp_path / "f", files))
    assert np.array_equal(found, volume[::-1]) and facts["notes"] == []


def test_numbers_that_contradict_the_positions_are_a_note(tmp_path, volume):
    numbers = np.random.default_rng(5).permutation(20)
    files = series(volume, InstanceNumber=lambda i: int(numbers[i]))
    found, facts = volumes.read(folder_of(tmp_path / "f", files))
    assert np.array_equal(found, volume)
    assert facts["notes"] == [
        "InstanceNumber contradicts ImagePositionPatient, which gives the order"
    ]


@pytest.mark.parametrize("position", [None, [1.0, 2.0, 3.0]])
def test_without_positions_the_number_orders_a_series(tmp_path, volume, position):
    files = series(volume, ImagePositionPatient=position)
    found, facts = volumes.read(folder_of(tmp_path / "f", files))
    assert np.array_equal(found, volume) and facts["notes"] == []


@pytest.mark.parametrize("number", [None, 1])
def test_a_series_without_an_order_is_refused(tmp_path, volume, number):
    files = series(volume, ImagePositionPatient=None, InstanceNumber=number)
    message = refusal(folder_of(tmp_path / "f", files))
    assert "neither ImagePositionPatient nor InstanceNumber tells the order" in message


@pytest.mark.parametrize(
    "name, value",
    [("SeriesInstanceUID", "1.2.3.5"), ("PatientID", "1002"), ("ImageLaterality", "L")],
)
def test_files_of_two_series_are_refused(tmp_path, volume, name, value):
    usual = {"SeriesInstanceUID": "1.2.3.4", "PatientID": "1001", "ImageLaterality": "R"}
    more = {**usual, name: lambda i: value if i == 9 else usual[name]}
    message = refusal(folder_of(tmp_path / "f", series(volume, **more)))
    assert f"their {name} is '" in message and value in message and "IM0 and IM" in message


def test_files_of_two_sizes_are_refused(tmp_path, volume):
    files = series(volume)
    write_dicom(
        tmp_path / "x",
        volume[:1, :20],
        ExplicitVRLittleEndian,
        SeriesInstanceUID="1.2.3.4",
        PatientID="1001",
    )
    message = refusal(folder_of(tmp_path / "f", files | {"IM20": read_bytes(tmp_path / "x")}))
    assert "their Rows is '24' and '20'" in message


def test_a_multi_frame_file_among_others_is_named(tmp_path, volume):
    files = series(volume) | {"IM30": read_bytes(write_multiframe(tmp_path, volume))}
    assert "IM30 has 20 frames and is not alone" in refusal(folder_of(tmp_path / "f", files))


def test_a_series_says_what_its_files_say(tmp_path, volume):
    more = {
        "ManufacturerModelName": "Triton",
        "ImageLaterality": "L",
        "PixelSpacing": [0.0026, 0.02],
    }
    more |= {"SliceThickness": 0.05, "RescaleSlope": lambda i: 1 + i, "RescaleIntercept": -3}
    path = folder_of(tmp_path / "f", series(volume, **more))
    found, facts = volumes.read(path)
    assert np.allclose(found, volume * (1.0 + np.arange(20)[:, None, None]) - 3)
    expected = {"patient_id": "1001", "scanner": "Triton", "laterality": "L", "thickness": 0.05}
    expected |= {"spacing": [0.0026, 0.02], "syntax": "DICOM files, Explicit VR Little Endian"}
    expected |= {"frames": 20, "rows": 24, "columns": 30, "protocol": None, "notes": []}
    assert facts == expected


def test_another_kind_of_image_in_a_series_is_refused(tmp_path, volume):
    path = folder_of(tmp_path / "f", series(volume, SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2"))
    assert "no structural OCT" in refusal(path)


def test_a_damaged_file_of_a_series_is_named(tmp_path, volume):
    files = series(volume)
    files["IM7"] = files["IM7"][:-200]
    assert "IM7: " in refusal(folder_of(tmp_path / "f", files))


# ------------------------------------------------------------------------------ bombs


def peak_of(path, *options):
    """The refusal of a file, and the most memory in MB that it takes."""
    tracemalloc.start()
    message = refusal(path, *options)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return message, peak


def with_header(shape, dtype="|u1"):
    """A .npy that claims a shape, and has 100 bytes."""
    out = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + bytes(100)


HUGE = (60_000, 60_000, 60_000)


def huge_png():
    content = bytearray(picture(np.zeros((30, 40), np.uint8), "PNG"))
    content[16:24] = struct.pack(">2I", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def huge_jpeg():
    content = bytearray(picture(np.zeros((30, 40), np.uint8), "JPEG"))
    at = content.find(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">2H", 60_000, 60_000)
    return bytes(content)


def huge_tiff():
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros((30, 40), np.uint8), compression="deflate")
    content = bytearray(out.getvalue())
    for tag, value in ((256, 60_000), (257, 60_000), (278, 60_000)):
        at = content.find(struct.pack("<H", tag))
        kind = struct.unpack_from("<H", content, at + 2)[0]
        content[at + 8 : at + 12] = struct.pack("<I" if kind == 4 else "<H2x", value)
    return bytes(content)


def huge_nifti():
    header = nibabel.Nifti1Header()
    header["dim"][:4] = 3, 30_000, 30_000, 30_000
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(100)


def huge_mat73(path):
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset(
            "x", (3000, 3000, 3000), "u1", compression="gzip", chunks=(100, 100, 100)
        )
        file["x"][0, 0, 0] = 1


def huge_hidden_npz():
    """The entry says 100 bytes, and holds 50 MB of zeros."""
    content = bytearray(
        zipped({"x.npy": with_header((3, 4, 5)) + bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    )
    for at in (content.find(b"PK\3\4") + 22, content.find(b"PK\1\2") + 24):
        content[at : at + 4] = struct.pack("<I", 188)
    return bytes(content)


BOMBS = {
    "a.npy": lambda: with_header(HUGE),
    "a.npz": lambda: zipped({"x.npy": with_header(HUGE)}),
    "a.tif": huge_tiff,
    "a.nii": huge_nifti,
    "a.nii.gz": lambda: zlib.compress(huge_nifti(), wbits=31),
    "a.zip": lambda: zipped({f"{i}.png": huge_png() for i in range(3)}),
    "b.zip": lambda: zipped({f"{i}.jpg": huge_jpeg() for i in range(3)}),
    "c.zip": lambda: zipped({f"{i}.tif": huge_tiff() for i in range(3)}),
    "d.zip": lambda: zipped({f"{i}.png": bytes(3 * 10**8) for i in range(2)}, zipfile.ZIP_DEFLATED),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_memory_is_taken(tmp_path, name):
    write_bytes(tmp_path / name, BOMBS[name]())
    message, peak = peak_of(tmp_path / name)
    assert "dicom.CEILING is" in message and peak < 40


def test_a_dataset_that_is_huge_is_refused(tmp_path):
    huge_mat73(tmp_path / "a.mat")
    message, peak = peak_of(tmp_path / "a.mat")
    assert "dicom.CEILING is" in message and peak < 40


def test_a_volume_is_not_larger_for_being_stored_as_float64(tmp_path, volume, monkeypatch):
    monkeypatch.setattr(dicom, "CEILING", volume.size * 2 + 1000)
    for write in ARRAYS:
        assert np.array_equal(volumes.read_volume(write(tmp_path, volume / 7)), volume / 7)
    monkeypatch.setattr(dicom, "CEILING", volume.size * 2 - 100)
    for write in ARRAYS:
        assert "dicom.CEILING is" in refusal(write(tmp_path, volume / 7))


def test_the_arrays_of_a_npz_are_limited_together(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "CEILING", 10**6)
    arrays = {str(i): np.zeros((10, 100, 900), np.uint8) for i in range(6)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    message, peak = peak_of(tmp_path / "a.npz", None, "1")
    assert "dicom.CEILING is" in message and peak < 5


def test_a_mat_inflates_no_further_than_the_ceiling(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "CEILING", 10**6)
    zeros = np.zeros((300, 300, 1000), np.uint8)
    scipy.io.savemat(tmp_path / "a.mat", {"x": zeros}, do_compression=True)
    message, peak = peak_of(tmp_path / "a.mat")
    assert "dicom.CEILING is" in message and peak < 60


@pytest.mark.slow
def test_a_zip_that_lies_about_its_sizes_inflates_no_further(tmp_path):
    write_bytes(tmp_path / "a.npz", huge_hidden_npz())
    _, peak = peak_of(tmp_path / "a.npz")
    assert peak < 10


def test_zips_of_a_kind_that_is_not_inflated_within_bounds_are_refused(tmp_path, volume):
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_bytes(tmp_path / "a.zip", zipped(pictures(volume), method))
        assert "save it as a plain zip" in refusal(tmp_path / "a.zip")


def test_an_encrypted_zip_is_refused(tmp_path, volume):
    content = bytearray(zipped(pictures(volume)))
    at = -1
    while (at := content.find(b"PK\1\2", at + 1)) >= 0:
        content[at + 8] |= 1
    write_bytes(tmp_path / "a.zip", content)
    assert "encrypted" in refusal(tmp_path / "a.zip")


def test_a_zip_of_several_folders_is_refused(tmp_path, volume):
    files = {f"{'OD' if i < 5 else 'OS'}/{i}.png": picture(f, "PNG") for i, f in enumerate(volume)}
    write_bytes(tmp_path / "a.zip", zipped(files))
    assert "several folders (OD/4.png, OS/19.png)" in refusal(tmp_path / "a.zip")


def test_a_zips_names_lead_nowhere(tmp_path, volume):
    files = {f"../../{name}": content for name, content in pictures(volume).items()}
    write_bytes(tmp_path / "a.zip", zipped(files))
    before = sorted(tmp_path.parent.rglob("*"))
    assert np.array_equal(volumes.read_volume(tmp_path / "a.zip"), volume)
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_dataset_in_another_file_is_not_followed(tmp_path, volume):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = volume
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
    assert "no array of numbers with three axes" in refusal(tmp_path / "a.mat")
    layout = h5py.VirtualLayout(volume.shape, "u1")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", volume.shape)
    with h5py.File(tmp_path / "b.mat", "w", userblock_size=512) as file:
        file.create_virtual_dataset("x", layout)
    assert "lies in another file" in refusal(tmp_path / "b.mat")
    volume.tofile(tmp_path / "raw")
    with h5py.File(tmp_path / "c.mat", "w", userblock_size=512) as file:
        place = [(str(tmp_path / "raw"), 0, volume.nbytes)]
        file.create_dataset("x", volume.shape, "u1", external=place)
    assert "lies in another file" in refusal(tmp_path / "c.mat")


def test_heavy_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    for ending in ("vol", "e2e"):
        write_bytes(tmp_path / f"a.{ending}", bytes(5000))
        monkeypatch.setitem(sys.modules, "eyepy", None)
        message = refusal(tmp_path / f"a.{ending}")
        assert "need the package eyepy: pip install -r requirements-formats.txt" in message


# ------------------------------------------------------------------------------ through the cache


def sample_of(path, **more):
    source = b2.find_all([str(path)])[str(path)]
    return ledger.Sample("1001", "train", 0, "UW", "R", str(path), source, **more)


@pytest.mark.parametrize("write", [write_pngs, write_series, write_npy, write_zip])
def test_a_volume_is_cached_by_its_content(tmp_path, volume, write, monkeypatch):
    path = write(tmp_path, volume)
    kept = data.Volumes([sample_of(path)], SIZE, tmp_path / "cache")
    key, first = kept.load(0)
    assert np.array_equal(first[0], volumes.decode_volume(path, SIZE))
    fails = lambda *args: pytest.fail("it was read again")
    assert data.Volumes([sample_of(path)], SIZE, tmp_path / "cache").load(0, fails)[0] == key
    os.rename(path, tmp_path / "elsewhere")
    moved = data.Volumes([sample_of(tmp_path / "elsewhere")], SIZE, tmp_path / "cache")
    assert moved.load(0, fails)[0] == key


@pytest.mark.parametrize("change", ["another picture", "one more", "other names"])
def test_a_folder_that_changed_is_read_anew(tmp_path, volume, change):
    path = write_pngs(tmp_path, volume)
    key, _ = data.Volumes([sample_of(path)], SIZE, tmp_path / "cache").load(0)
    if change == "another picture":
        write_bytes(path / "b3.png", picture(volume[9], "PNG"))
        expected = np.concatenate([volume[:2], volume[9:10], volume[3:]])
    elif change == "one more":
        write_bytes(path / "b21.png", picture(volume[0], "PNG"))
        expected = np.concatenate([volume, volume[:1]])
    else:
        os.rename(path / "b1.png", path / "b21.png")
        expected = np.concatenate([volume[1:], volume[:1]])
    other, found = data.Volumes([sample_of(path)], SIZE, tmp_path / "cache").load(0)
    assert other != key and np.array_equal(
        found[0], volumes.preprocess(expected, SIZE).numpy().astype(np.float16)
    )


def test_what_systems_leave_in_a_folder_changes_nothing(tmp_path, volume):
    path = write_pngs(tmp_path, volume)
    key, _ = data.Volumes([sample_of(path)], SIZE, tmp_path / "cache").load(0)
    write_bytes(path / ".DS_Store", b"something else")
    assert data.Volumes([sample_of(path)], SIZE, tmp_path / "cache").load(0)[0] == key


def test_axes_and_variable_are_part_of_the_key_where_they_are_set(tmp_path, volume):
    cube = volume[:20, :20, :20]
    np.savez(tmp_path / "a.npz", a=cube, b=cube[::-1])
    keys, found = [], []
    for axes, variable in [("frames,rows,columns", "a"), ("rows,columns,frames", "a"), (None, "b")]:
        options = {"axes": axes, "variable": variable}
        kept = data.Volumes([sample_of(tmp_path / "a.npz")], SIZE, tmp_path / "cache", **options)
        key, array = kept.load(0)
        keys.append(key)
        found.append(array.numpy())
    assert len(set(keys)) == 3 and not np.array_equal(found[0], found[1])
    right = volumes.decode_volume(tmp_path / "a.npz", SIZE, "rows,columns,frames", "a")
    assert np.array_equal(found[1][0], right)


def test_the_key_of_a_volume_without_them_is_what_it_was(tmp_path, volume):
    path = write_multiframe(tmp_path, volume)
    kept = data.Volumes([sample_of(path)], SIZE, tmp_path / "cache")
    sha1 = hashlib.sha1(read_bytes(path)).hexdigest()
    text = f"sha1:{sha1} {SIZE} zscore-trilinear-float16-v1"
    assert kept.load(0)[0] == hashlib.sha256(text.encode()).hexdigest()


def test_a_folder_that_vanished_is_unreadable(tmp_path, volume):
    path = write_pngs(tmp_path, volume)
    kept = data.Volumes([sample_of(path)], SIZE, tmp_path / "cache")
    os.rename(path, tmp_path / "gone")
    with pytest.raises(volumes.Unreadable, match="is not there any more"):
        kept.load(0)


def objects_of(prefix, path):
    """{key: content} of a file, or of the files of a folder."""
    if os.path.isdir(path):
        return {f"{prefix}/{p.name}": read_bytes(p) for p in path.iterdir()}
    return {f"{prefix}/{path.name}": read_bytes(path)}


REMOTE = [w for w in WRITERS if "multiframe" not in w.__name__]


@pytest.mark.parametrize("write", [*REMOTE, write_multiframe_zip], ids=lambda w: w.__name__[6:])
def test_every_format_comes_from_a_store(tmp_path, volume, write, store):
    path = write(tmp_path, volume)
    objects = objects_of("d/scan", path) | {"d/scan2/x.png": b"x", "d/scan.txt": b"x"}
    url = "b2://bucket/d/scan" + ("" if os.path.isdir(path) else f"/{path.name}")
    with store(objects) as server:
        kept = data.Volumes([sample_of(url)], SIZE, tmp_path / "cache")
        key, found = kept.load(0)
        assert np.array_equal(found[0], volumes.decode_volume(path, SIZE))
        count = server.count("download")
        again = data.Volumes([sample_of(url)], SIZE, tmp_path / "cache").load(0)
        assert again[0] == key and server.count("download") == count
    assert list((tmp_path / "cache" / "raw").iterdir()) == []


def test_a_folder_of_a_store_is_an_object(tmp_path, volume, store):
    files = pictures(volume)
    objects = {f"d/OD/{name}": content for name, content in files.items()}
    objects |= {"d/OD/sub/x.png": b"x", "d/OD/.DS_Store": b"x", "d/a.dcm": b"1", "d/OD_2/y": b"2"}
    with store(objects):
        urls = [
            "b2://bucket/d/OD",
            "b2://bucket/d/OD/",
            "b2://bucket/d/none",
            "b2://bucket/d/a.dcm",
        ]
        found = b2.find_all(urls)
        assert list(found) == [urls[0], urls[1], urls[3]]
        scan = found[urls[0]]
        assert scan.size == sum(map(len, files.values())) and len(scan.members) == 20
        assert scan.checksum.startswith("files:") and found[urls[3]].members == ()
        # another name or another content is another volume
        names = [f"b2://bucket/d/OD/{name}" for name in sorted(files)]
        assert [member.path for member in scan.members] == names
    objects["d/OD/b3.png"] = files["b4.png"]
    with store(objects):
        assert b2.find_all(urls[:1])[urls[0]].checksum != scan.checksum


def test_a_file_of_a_remote_folder_that_is_damaged_is_unreadable(tmp_path, volume, store):
    objects = {f"d/OD/{name}": content for name, content in pictures(volume).items()}
    objects["d/OD/b3.png"] = objects["d/OD/b3.png"][:90]
    with store(objects):
        kept = data.Volumes([sample_of("b2://bucket/d/OD")], SIZE, tmp_path / "cache")
        with pytest.raises(volumes.Unreadable, match="^b2://bucket/d/OD is not .* b3.png"):
            kept.load(0)
    assert list((tmp_path / "cache" / "raw").iterdir()) == []


def test_folders_with_the_same_files_are_found(tmp_path, volume):
    for name in ("1", "2", "3"):
        (tmp_path / name).mkdir()
        write_pngs(tmp_path / name, volume if name != "3" else volume[::-1])
    np.save(tmp_path / "a.npy", volume)
    paths = [str(tmp_path / name / "pngs") for name in "123"] + [str(tmp_path / "a.npy")]
    assert ledger.same_content(b2.find_all(paths)) == [paths[:2]]
    (tmp_path / "empty").mkdir()
    assert b2.find_all([str(tmp_path / "empty")])[str(tmp_path / "empty")].size == 0


# ------------------------------------------------------------------------------ scanners' own files


def shown_by_heidelberg(values):
    """Reflectivities -> grey values, as HEYEX shows them."""
    shown = (np.log(np.clip(values, 0, 1) + 2.44e-4) + 8.3) / 8.285
    return np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)


@EYEPY
def test_a_vol(tmp_path, volume):
    write_bytes(tmp_path / "a.vol", vol_file(reflectivities(volume)))
    found, facts = volumes.read(tmp_path / "a.vol")
    assert np.array_equal(found, volume) and found.dtype == np.uint8
    assert np.array_equal(shown_by_heidelberg(reflectivities(volume)), volume)
    expected = {"patient_id": "1001", "laterality": "L", "thickness": 0.12, "scanner": None}
    expected |= {"spacing": [0.0039, 0.0115], "syntax": "Heidelberg .vol", "notes": []}
    assert {name: facts[name] for name in expected} == expected
    part = volumes.read_volume(tmp_path / "a.vol", SIZE)
    assert np.flatnonzero(part.any(axis=(1, 2))).tolist() == [2, 7, 12, 17]


@EYEPY
@pytest.mark.parametrize("pattern, name", [(2, "circle"), (5, "star")])
def test_scans_that_are_no_volume_are_refused(tmp_path, volume, pattern, name):
    write_bytes(tmp_path / "a.vol", vol_file(reflectivities(volume), scan_pattern=pattern))
    assert f"lie on a {name}" in refusal(tmp_path / "a.vol")


@EYEPY
@pytest.mark.parametrize("at, name", [(12, "columns"), (16, "frames"), (20, "rows"), (48, "SLO")])
@pytest.mark.parametrize("value", [0, 10**6, 2**32 - 1])
def test_a_vol_that_promises_what_it_does_not_hold(tmp_path, volume, at, name, value):
    content = bytearray(vol_file(reflectivities(volume)))
    content[at : at + 4] = struct.pack("<I", value)
    write_bytes(tmp_path / "a.vol", content)
    if name != "SLO" or value:
        assert peak_of(tmp_path / "a.vol")[1] < 40
    for keep in (0.01, 0.5, 0.99):
        write_bytes(tmp_path / "a.vol", content[: int(keep * len(content))])
        refusal(tmp_path / "a.vol")


def decoded(codes):
    """6 bits of exponent, 10 of mantissa, no sign; without the codes for nothing."""
    return (1 + (codes & 1023) / 1024) * 2.0 ** ((codes >> 10).astype(float) - 63)


@EYEPY
def test_an_e2e(tmp_path, volume):
    codes = codes_of(volume)
    write_bytes(tmp_path / "a.e2e", e2e_file({7: ("1001", "L", codes)}))
    found, facts = volumes.read(tmp_path / "a.e2e")
    right = shown_by_heidelberg(decoded(codes))
    assert np.abs(found.astype(int) - right).max() <= 1 and np.ptp(right) > 100
    expected = {"patient_id": "1001", "laterality": "L", "syntax": "Heidelberg .e2e", "notes": []}
    assert {name: facts[name] for name in expected} == expected and found.shape == volume.shape
    part = volumes.read_volume(tmp_path / "a.e2e", SIZE)
    kept = np.flatnonzero(part.any(axis=(1, 2)))
    assert kept.tolist() == [2, 7, 12, 17] and np.array_equal(part[kept], found[kept])


@EYEPY
def test_of_several_volumes_of_an_e2e_one_must_be_named(tmp_path, volume):
    codes = codes_of(volume)
    content = {7: ("1001", "L", codes), 9: ("1001", "R", codes[::-1]), 11: ("1001", "R", codes[:1])}
    write_bytes(tmp_path / "a.e2e", e2e_file(content))
    message = refusal(tmp_path / "a.e2e")
    assert "2 volumes, the series 7, 9; name one" in message
    for name, side in (("7", "L"), ("9", "R")):
        found, facts = volumes.read(tmp_path / "a.e2e", variable=name)
        right = shown_by_heidelberg(decoded(content[int(name)][2]))
        assert np.abs(found.astype(int) - right).max() <= 1 and facts["laterality"] == side
    refusal(tmp_path / "a.e2e", None, "8")


@pytest.mark.parametrize(
    "pixels",
    [
        lambda v: coded_fda(v, jpeg2000),
        lambda v: coded_fda(v, lambda f: imagecodecs.jpeg8_encode(f, lossless=True)),
        raw_fda,
    ],
    ids=["JPEG 2000", "JPEG", "raw"],
)
def test_an_fda(tmp_path, volume, pixels):
    write_bytes(tmp_path / "a.fda", fda_file(pixels(volume)))
    found, facts = volumes.read(tmp_path / "a.fda")
    assert np.array_equal(found, volume)
    expected = {"patient_id": "1001", "scanner": "Triton plus", "laterality": "L"}
    expected |= {"spacing": [0.0026, 0.2], "thickness": 0.25, "syntax": "Topcon .fda", "notes": []}
    assert {name: facts[name] for name in expected} == expected
    part = volumes.read_volume(tmp_path / "a.fda", SIZE)
    assert np.flatnonzero(part.any(axis=(1, 2))).tolist() == [2, 7, 12, 17]


def test_an_fda_that_contradicts_itself(tmp_path, volume):
    pixels = coded_fda(volume, jpeg2000)["@IMG_JPEG"]
    for at, value in ((9, 31), (13, 25), (17, 21), (17, 2**31), (9, 2**31)):
        changed = bytearray(pixels)
        changed[at : at + 4] = struct.pack("<I", value)
        write_bytes(tmp_path / "a.fda", fda_file({"@IMG_JPEG": bytes(changed)}))
        refusal(tmp_path / "a.fda")
    write_bytes(tmp_path / "a.fda", fda_file({}))
    assert "neither @IMG_JPEG nor @IMG_MOT_COMP_03" in refusal(tmp_path / "a.fda")


def test_an_img_of_zeiss(tmp_path, volume):
    """The first byte is the lower right pixel of the first B-scan."""
    write_bytes(tmp_path / ZEISS, volume[:, ::-1, ::-1].tobytes())
    found, facts = volumes.read(tmp_path / ZEISS)
    assert np.array_equal(found, volume)
    expected = {"patient_id": "P1001", "laterality": "L", "syntax": "Zeiss .img", "notes": []}
    assert {name: facts[name] for name in expected} == expected
    part = volumes.read_volume(tmp_path / ZEISS, SIZE)
    assert np.flatnonzero(part.any(axis=(1, 2))).tolist() == [2, 7, 12, 17]


@pytest.mark.parametrize("name", ["scan.img", ZEISS.replace("30x20", "512x128"), "0x0.img"])
def test_an_img_whose_name_does_not_tell_its_size(tmp_path, volume, name):
    write_bytes(tmp_path / name, volume.tobytes())
    assert "the cube in its name, as 'Cube 512x128'" in refusal(tmp_path / name)


def test_an_img_of_a_store_keeps_its_name(tmp_path, volume, store):
    stored = volume[:, ::-1, ::-1].tobytes()
    with store({f"d/{ZEISS}": stored}):
        kept = data.Volumes([sample_of(f"b2://bucket/d/{ZEISS}")], SIZE, tmp_path / "cache")
        key, found = kept.load(0)
        right = volumes.preprocess(volume, SIZE).numpy().astype(np.float16)
        assert np.array_equal(found[0], right) and kept.facts(0, key)["laterality"] == "L"


# ------------------------------------------------------------------------------ files of others


def package_file(package, *parts):
    return os.path.join(os.path.dirname(importlib.import_module(package).__file__), *parts)


NIBABEL = [
    "anatomical.nii",
    "example_nifti2.nii.gz",
    "reoriented_anat_moved.nii",
    "resampled_anat_moved.nii",
]


@pytest.mark.parametrize("name", NIBABEL)
def test_niftis_of_nibabel(name):
    path = package_file("nibabel", "tests", "data", name)
    right = nibabel.load(path).get_fdata()
    if right.ndim == 4:
        assert f"has the shape {right.shape}" in refusal(path)
        return
    alike = {"rtol": 1e-5, "equal_nan": True}
    assert np.allclose(volumes.read_volume(path), right.transpose(2, 1, 0), **alike)
    assert np.allclose(volumes.read_volume(path, None, "frames,rows,columns"), right, **alike)


def test_mats_of_scipy():
    """110 files of MATLAB 4 to 7.4, little and big endian, of which some are damaged on purpose."""
    folder = package_file("scipy.io.matlab", "tests", "data")
    read = []
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".mat"):
            continue
        path = os.path.join(folder, name)
        try:
            found = volumes.read_volume(path)
        except volumes.Unreadable as error:
            assert len(str(error)) < 500
            continue
        read.append(name)
        loaded = [v for v in scipy.io.loadmat(path).values() if getattr(v, "ndim", 0) >= 3]
        assert np.array_equal(np.moveaxis(np.squeeze(loaded[0]), 2, 0), found)
    assert len(read) >= 1, read


def test_every_array_in_the_mats_of_scipy_is_what_scipy_reads():
    folder, count = package_file("scipy.io.matlab", "tests", "data"), 0
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if read_bytes(path)[:19] != b"MATLAB 5.0 MAT-file":
            continue
        try:
            right = scipy.io.loadmat(path)
        except Exception:  # damaged on purpose; scipy raises several types
            continue
        content, at = formats.inflated(path).getbuffer(), 128
        order = "<" if content[126:128] == b"IM" else ">"
        while at < len(content):
            kind, matrix, at = formats.element(content, at, order)
            header = formats.matrix_header(matrix, order) if kind == 14 else None
            if header and header[0] in right and header[2].kind != "O":
                array, shape, dtype, rest = header
                kind, stored, _ = formats.element(rest, 0, order)
                values = np.frombuffer(stored, order + formats.STORED[kind]).astype(dtype)
                assert np.array_equal(values.reshape(shape, order="F"), right[array])
                count += 1
    assert count > 25


def test_the_duke_layout_is_read_as_matlab_shows_it(tmp_path):
    """Duke's .mat have images (512, 1000, 100), rows x columns x frames, beside maps of layers."""
    scan = smooth_volume(12, 20, 40)
    content = {"images": in_matlab(scan), "layerMaps": np.ones((12, 40, 3)), "Age": 70}
    scipy.io.savemat(tmp_path / "a.mat", content, do_compression=True)
    assert "images, layerMaps" in refusal(tmp_path / "a.mat")
    assert np.array_equal(volumes.read_volume(tmp_path / "a.mat", variable="images"), scan)


@EYEPY
def test_tiffs_of_skimage():
    path = package_file("skimage", "data", "multipage.tif")
    right = np.stack([np.asarray(page) for page in ImageSequence.Iterator(Image.open(path))])
    assert np.array_equal(volumes.read_volume(path), right) and right.shape == (2, 15, 10)
    message = refusal(package_file("skimage", "data", "multipage_rgb.tif"))
    assert "it is 2 x 3 x 10 x 10 (axes QSYX)" in message


def test_dicom_series_of_pydicom_are_no_oct():
    """Folders of CT and MR slices: every one is refused by what it is, or by two that differ."""
    root, seen = package_file("pydicom", "data", "test_files", "dicomdirtests"), 0
    for folder, _, names in os.walk(root):
        if names and folder != root:
            message, seen = refusal(folder), seen + 1
            assert any(words in message for words in ("no structural OCT", "which is no file"))
    assert seen > 5


def test_a_ct_series_of_pydicom_that_claims_to_be_oct(tmp_path):
    """Its own positions and pixels, with the class of OCT."""
    root, found = package_file("pydicom", "data", "test_files", "dicomdirtests"), []
    for folder, _, names in os.walk(root):
        for name in names:
            ds = pydicom.dcmread(os.path.join(folder, name), force=True)
            if ds.get("Modality") == "CT" and "ImagePositionPatient" in ds:
                found.append(ds)
    groups = {}
    for ds in found:
        groups.setdefault(ds.SeriesInstanceUID, []).append(ds)
    longest = max(groups.values(), key=len)
    assert len(longest) > 2
    for i, ds in enumerate(longest):
        ds.SOPClassUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.77.1.5.4", "OPT"
        ds.save_as(tmp_path / f"{i}")
    order = sorted(longest, key=lambda ds: float(ds.ImagePositionPatient[2]))
    right = np.stack(
        [ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in order]
    )
    array = volumes.read_volume(tmp_path)
    assert np.array_equal(array, right) or np.array_equal(array, right[::-1])
