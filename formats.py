"""A file or folder of any supported format -> its volume, and what it says of itself.

    volume, facts = read("a.npy", choose)                          # (frames, rows, columns), dict
    volume, facts = read("a.mat", choose, "rows,columns,frames", "images")

The content tells the format, and where it cannot, the name does:

    DICOM          several frames in one file (dicom.py); a folder or zip of one-frame files
    pictures       a folder or zip of PNG, JPEG or TIFF B-scans; the pages of a TIFF (stacks.py)
    arrays         .npy, .npz, .mat, NIfTI (here)
    scanners' own  .e2e, .vol, .fda, .img (devices.py)

axes names what the axes of an array are, in its order; without it they are what AXES says. variable
names the array of an .npz or .mat that has several, or the series of an .e2e. Other files know both
by themselves. No pickle is ever read. Sizes are taken from headers and limited by dicom.CEILING
before memory is taken; what is no volume of grey values, or not whole, is refused with ValueError.
"""

import contextlib
import gzip
import io
import math
import os
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np

import devices
import dicom
import stacks
from files import first_few

NAMES = ("frames", "rows", "columns")
# The axes of an array that nobody names: in numpy's order; as MATLAB shows M(:, :, k); and as ITK,
# dcm2niix and the standard itself store pictures (i along a row, k over the slices).
AXES = {
    ".npy": "frames,rows,columns",
    ".npz": "frames,rows,columns",
    ".mat": "rows,columns,frames",
    "NIfTI": "columns,rows,frames",
}
HDF5 = b"\x89HDF\r\n\x1a\n"


def read(path, choose, axes=None, variable=None):
    """-> array (frames, rows, columns), and facts, as dicom.read gives them of a DICOM file.

    choose(frames) -> the frames that are wanted, ascending; where it is cheap the others are not
    decoded and stay zero. ValueError says what is wrong with the file.
    """
    path = os.fspath(path)
    kind = kind_of(path)
    if kind == ".e2e":
        return devices.read_e2e(path, choose, variable)
    readers = {
        "DICOM": dicom.read,
        "files": stacks.read_files,
        "pages": stacks.read_pages,
        ".vol": devices.read_vol,
        ".fda": devices.read_fda,
        ".img": devices.read_img,
    }
    if kind in readers:
        return readers[kind](path, choose)
    openers = {".npy": open_npy, ".npz": open_npz, ".mat": open_mat, "NIfTI": open_nifti}
    return arranged(openers[kind](path, variable), axes or AXES[kind], choose)


def kind_of(path):
    """What kind of file lies at path. ValueError where nothing here reads it."""
    if os.path.isdir(path):
        return "files"
    with open(path, "rb") as file:
        head = file.read(4096)
    name = path.lower()
    ending = os.path.splitext(name)[1]
    single = stacks.kind_of(head)
    if single == "DICOM":
        return "DICOM"
    if single == "TIFF":
        return "pages"
    if single:
        raise ValueError(f"it is a single {single}; a volume is the folder of all its B-scans")
    if head.startswith(b"\x93NUMPY"):
        return ".npy"
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return ".npz" if ending == ".npz" else "files"
    if head.startswith(b"MATLAB 5.0 MAT-file") or HDF5 in (head[:8], *blocks(head)):
        return ".mat"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "NIfTI"
    if name.endswith((".nii", ".nii.gz")):
        return "NIfTI"
    if head.startswith(b"HSF-OCT") or ending == ".vol":
        return ".vol"
    if head.startswith((b"CMDb", b"E2EMultipleVolumeFile")) or ending == ".e2e":
        return ".e2e"
    if head.startswith(b"FOCT") or ending == ".fda":
        return ".fda"
    if ending in (".img", ".npy", ".npz", ".mat"):
        return ending
    if ending in ("", ".dcm"):
        return "DICOM"  # which says what is wrong with it
    raise ValueError(
        "its content is that of no format that is read here: DICOM, .npy, .npz, .mat, NIfTI, TIFF, "
        "a folder or zip of B-scans, .e2e, .vol, .fda or .img"
    )


def blocks(head):
    """Where the signature of HDF5 may be behind a user block."""
    return [head[at : at + 8] for at in (512, 1024, 2048)]


# ------------------------------------------------------------------------------ arrays


@dataclass
class Array:
    """An array of a file. values: in memory, or mapped; times scale[0], plus scale[1], they are the
    grey values. spacing: mm along each axis, () where the file does not say."""

    values: np.ndarray
    syntax: str
    scale: tuple = (1, 0)
    spacing: tuple = ()


def arranged(found, axes, choose):
    """An Array and the names of its axes -> volume (frames, rows, columns), facts."""
    names = [name.strip() for name in axes.split(",")]
    if sorted(names) != sorted(NAMES):
        raise ValueError(f"axes={axes}: name frames, rows and columns once each, with commas")
    kept = volume_axes(found.values.shape, found.values.dtype)
    at = [kept[names.index(name)] for name in NAMES]  # of frames, rows, columns in the file
    index = tuple(slice(None) if axis in kept else 0 for axis in range(found.values.ndim))
    view = found.values[index].transpose([kept.index(axis) for axis in at])
    if view.strides[0] == min(view.strides):
        view = np.ascontiguousarray(view)  # once, instead of a pass through the file for each frame
    wanted, notes = list(choose(len(view))), []
    volume = dicom.filled(len(view), wanted, (grey(view[i], found.scale) for i in wanted), notes)
    mm = [found.spacing[axis] for axis in at] if found.spacing else None
    facts = dicom.facts_of(
        view.shape,
        f"{found.syntax}, {','.join(names)}",
        spacing=mm and mm[1:],
        thickness=mm and mm[0],
    )
    return volume, facts | {"notes": notes}


def volume_axes(shape, dtype):
    """Which axes of an array are those of the volume: all three, or of more those that are longer
    than 1. ValueError for what is no volume."""
    if np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"its array is of {dtype}, and a volume's values are real numbers")
    axes = [axis for axis, length in enumerate(shape) if length != 1]
    axes = [0, 1, 2] if len(shape) == 3 else axes
    if len(shape) < 3 or len(axes) != 3 or 0 in shape:
        raise ValueError(
            f"its array has the shape {tuple(map(int, shape))}; a volume has three axes, frames, "
            "rows and columns"
        )
    return axes


def grey(frame, scale):
    """A frame in this machine's byte order, rescaled. Truth values become 0 and 1."""
    if frame.dtype.kind == "b":
        return frame.astype(np.uint8)
    native = frame.dtype.newbyteorder("=") if frame.dtype.itemsize <= 8 else np.float64
    if scale == (1, 0):
        return frame.astype(native)
    return frame.astype(np.float32) * np.float32(scale[0]) + np.float32(scale[1])


def pick(found, variable):
    """The name of the array that is meant, of {name: (shape, dtype)}: the only volume, or what
    variable names. ValueError, listing the names, where that is unclear."""
    shown = [f"{name} {tuple(map(int, shape))}" for name, (shape, _) in found.items()]
    if variable:
        if variable not in found:
            raise ValueError(f"it has no array {variable}; it holds {first_few(shown) or 'none'}")
        return variable
    fitting = []
    for name, (shape, dtype) in found.items():
        with contextlib.suppress(ValueError):
            volume_axes(shape, dtype)
            fitting.append(name)
    if len(fitting) > 1:
        raise ValueError(
            f"it holds {len(fitting)} arrays of three axes, {first_few(fitting)}; name one as "
            "variable (data.variable)"
        )
    if not fitting:
        raise ValueError(
            f"it holds no array of numbers with three axes, only {first_few(shown) or 'nothing'}"
        )
    return fitting[0]


def check_size(shape, dtype):
    volume_axes(shape, dtype)
    stacks.check_values(shape, dtype)


# ------------------------------------------------------------------------------ numpy


def header_of(file):
    """-> shape, dtype of the .npy that begins here, in an open file that then is at its values."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"its .npy is of version {version}")
    # numpy has no public name for the third, which differs from the second in its letters alone
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
    shape, _, dtype = (read or np.lib.format.read_array_header_2_0)(file)
    return shape, dtype


def open_npy(path, variable):
    with open(path, "rb") as file:
        check_size(*header_of(file))
    # mapped: ValueError where the file is shorter than its header says
    return Array(np.load(path, mmap_mode="r", allow_pickle=False), "NumPy")


def open_npz(path, variable):
    with zipfile.ZipFile(path) as archive:
        infos = {
            info.filename.removesuffix(".npy"): info
            for info in stacks.entries(archive, stacks.WIDEST)
        }
        found = {}
        for name, info in infos.items():
            with archive.open(info) as file:
                found[name] = header_of(file)
        name = pick(found, variable)
        check_size(*found[name])
        with archive.open(infos[name]) as file:
            return Array(np.lib.format.read_array(file, allow_pickle=False), "NumPy .npz")


# ------------------------------------------------------------------------------ MATLAB


def open_mat(path, variable):
    with open(path, "rb") as file:
        head = file.read(4096)
    if HDF5 in (head[:8], *blocks(head)):
        return open_mat73(path, variable)
    if not head.startswith(b"MATLAB 5.0 MAT-file"):
        raise ValueError("it is no .mat of MATLAB 5 to 7.3; save it anew in MATLAB")
    return open_mat5(path, variable)


# types of data elements, and classes of arrays (MATLAB's MAT-File Format, table 1-1 and 1-3)
STORED = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8"}
CLASSES |= {15: "u8"}


def open_mat5(path, variable):
    """A .mat of version 5. Not by scipy.io: there a damaged file can end the whole process."""
    content = inflated(path).getbuffer()
    order = "<" if content[126:128] == b"IM" else ">"
    found, parts, at = {}, {}, 128
    while at + 8 <= len(content):
        kind, matrix, at = element(content, at, order)
        header = matrix_header(matrix, order) if kind == 14 else None  # miMATRIX
        if header:
            name, shape, dtype, rest = header
            found[name], parts[name] = (shape, dtype), rest
    name = pick(found, variable)
    shape, dtype = found[name]
    check_size(shape, dtype)
    kind, stored, _ = element(parts[name], 0, order)
    if kind not in STORED:
        raise ValueError(f"its {name} is damaged")
    values = np.frombuffer(stored, order + STORED[kind], math.prod(shape))
    # MATLAB stores whole numbers in as few bytes as they need
    return Array(values.astype(dtype, copy=False).reshape(shape, order="F"), "MATLAB")


def element(view, at, order):
    """The data element that begins at `at` -> its type, its data, and where the next one begins."""
    first, length = np.frombuffer(view, order + "u4", 2, at).tolist()
    if first >> 16:  # at most 4 bytes, within the tag
        kind, length, start, end = first & 0xFFFF, first >> 16, at + 4, at + 8
    else:
        kind, start = first, at + 8
        end = start + length + -length % 8
    if start + length > len(view):
        raise ValueError("it is cut short")
    return kind, view[start : start + length], end


def matrix_header(view, order):
    """Name, shape and dtype of an array, and the elements after these; None for what has no shape.
    What is no array of real numbers gets the dtype of an object."""
    _, flags, at = element(view, 0, order)
    bits = int.from_bytes(flags[:4], "little" if order == "<" else "big")
    if bits & 0xFF not in range(1, 16):
        return None
    kind, sizes, at = element(view, at, order)
    _, name, at = element(view, at, order)
    shape = np.frombuffer(sizes, order + STORED.get(kind, "i4")).tolist()
    is_real = bits & 0xFF in CLASSES and not bits & 0x800
    dtype = np.dtype(CLASSES[bits & 0xFF] if is_real else "O")
    return bytes(name).decode("latin-1"), tuple(shape), dtype, view[at:]


def inflated(path):
    """A .mat of version 5 without its compression, as an open file. What all its variables inflate
    to is limited by dicom.CEILING, as in stacks.check_values."""
    room, out = stacks.WIDEST * dicom.CEILING + 2**24, io.BytesIO()
    with stacks.opened(path) as file:
        dicom.check_room(os.path.getsize(path) // stacks.WIDEST)
        head = file.read(128)
        order = "little" if head[126:128] == b"IM" else "big"
        out.write(head)
        while tag := file.read(8):
            kind, length = (int.from_bytes(part, order) for part in (tag[:4], tag[4:]))
            element = file.read(length)
            if len(tag) < 8 or len(element) < length:
                raise ValueError("it is cut short")
            if kind == 15:  # miCOMPRESSED
                inflate = zlib.decompressobj()
                element, tag = inflate.decompress(element, room - out.tell()), b""
                if not inflate.eof:
                    dicom.check_room((out.tell() + len(element)) // stacks.WIDEST)
                    raise ValueError("one of its variables is cut short")
            out.write(tag + element)
            if out.tell() >= room:
                dicom.check_room(out.tell() // stacks.WIDEST)
    out.seek(0)
    return out


def open_mat73(path, variable):
    """A .mat of version 7.3, which is an HDF5 with the axes reversed."""
    import h5py

    with h5py.File(path, "r") as file:
        found = {}
        for name in file:
            # a link may lead to another file
            if not isinstance(file.get(name, getlink=True), h5py.HardLink):
                continue
            values, kind = file[name], file[name].attrs.get("MATLAB_class", b"")
            if not isinstance(values, h5py.Dataset) or values.shape is None:
                continue
            if values.is_virtual or values.external:
                raise ValueError(f"its {name} lies in another file")
            is_number = kind not in (b"char", b"cell") and values.dtype.kind in "biuf"
            dtype = values.dtype if is_number else np.dtype("O")
            found[name] = values.shape[::-1], dtype
        name = pick(found, variable)
        check_size(*found[name])
        values = file[name]
        stacks.check_values(values.chunks or (), values.dtype)
        stored = values.id.get_storage_size()
        if not stored:
            raise ValueError(f"its {name} was never written")
        return Array(values[()].transpose(), "MATLAB 7.3")


# ------------------------------------------------------------------------------ NIfTI


def open_nifti(path, variable):
    from nibabel import Nifti1Header, Nifti2Header

    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if is_gzip else open(path, "rb") as file:
        head = file.read(544)
        is_second = 540 in (int.from_bytes(head[:4], order) for order in ("little", "big"))
        if head[4:7] == b"ni2" or head[344:347] == b"ni1":
            raise ValueError("its pixels are in another file; save both as one .nii")
        kind, length = (Nifti2Header, 540) if is_second else (Nifti1Header, 348)
        header = kind(head[:length])  # checked
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        check_size(shape, dtype)
        at, slope = int(header.get_data_offset()), header.get_slope_inter()
        count = math.prod(map(int, shape))
        dicom.check_room(at)
        if is_gzip:
            file.seek(at)
            content = file.read(count * dtype.itemsize)
            file.read(2**16)  # to its end, where its checksum is compared
            values = np.frombuffer(content, dtype, count).reshape(shape, order="F")
        else:
            values = np.memmap(path, dtype, "r", at, shape, order="F")
    scale = (1, 0) if slope[0] is None else (float(slope[0]), float(slope[1]))
    return Array(values, "NIfTI", scale, millimetres(header))


def millimetres(header):
    """The spacing of a NIfTI's axes; () without a unit, and where all are 1, which nobody set."""
    unit = {"meter": 1000, "mm": 1, "micron": 0.001}.get(header.get_xyzt_units()[0])
    sizes = [float(size) for size in header.get_zooms()]
    if not unit or all(size == 1 for size in sizes[:3]):
        return ()
    sizes = [size * unit for size in sizes]
    return tuple(sizes) if all(0 < size < math.inf for size in sizes[:3]) else ()
