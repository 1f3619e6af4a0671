"""The same volume in every format, by each format's own writer: write_NAME(folder, volume) -> path.

Nobody may hand on a scanner's own files. Those are written here after the public descriptions of
their formats: they show that the readers agree with the descriptions, not that every scanner does.
"""

import io
import struct
import zipfile

import h5py
import imagecodecs
import nibabel
import numpy as np
import scipy.io
import tifffile
from helpers import read_bytes, write_bytes, write_dicom, zipped
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless


def picture(frame, kind, **options):
    """A picture's bytes, by PIL."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, kind, **options)
    return out.getvalue()


def pictures(volume, kind="PNG", ending="png", **options):
    """{name: content}: 1, 2, ... 10, whose order as text is another one."""
    return {f"b{i + 1}.{ending}": picture(f, kind, **options) for i, f in enumerate(volume)}


def folder_of(path, files):
    path.mkdir()
    for name, content in files.items():
        write_bytes(path / name, content)
    return path


def write_npy(path, volume):
    np.save(path / "a.npy", volume)
    return path / "a.npy"


def write_npy_fortran(path, volume):
    np.save(path / "f.npy", np.asfortranarray(volume))
    return path / "f.npy"


def write_npz(path, volume):
    np.savez(path / "a.npz", volume=volume, spacing=np.ones(3), name="a text")
    return path / "a.npz"


def write_npz_compressed(path, volume):
    np.savez_compressed(path / "c.npz", volume=volume)
    return path / "c.npz"


def in_matlab(volume):
    """(frames, rows, columns) -> (rows, columns, frames), as MATLAB shows a stack of pictures."""
    return np.moveaxis(volume, 0, 2)


def write_mat5(path, volume, **options):
    content = {"images": in_matlab(volume), "age": 64, "note": "a text"}
    scipy.io.savemat(path / "a.mat", content, **options)
    return path / "a.mat"


def write_mat5_compressed(path, volume):
    return write_mat5(path, volume, do_compression=True)


CLASSES = {"uint8": b"uint8", "uint16": b"uint16", "float64": b"double", "float32": b"single"}


def write_mat73(path, volume, **options):
    """As MATLAB writes it: a user block, axes reversed, the class as an attribute, texts too."""
    with h5py.File(path / "b.mat", "w", userblock_size=512) as file:
        values = file.create_dataset("images", data=in_matlab(volume).T, **options)
        values.attrs["MATLAB_class"] = np.bytes_(CLASSES[str(volume.dtype)])
        text = file.create_dataset("note", data=np.ones((3, 4, 5), np.uint16))
        text.attrs["MATLAB_class"] = np.bytes_(b"char")
        file.create_group("#refs#")
    content = bytearray(read_bytes(path / "b.mat"))
    content[:124] = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124)
    content[124:128] = b"\0\2IM"
    write_bytes(path / "b.mat", content)
    return path / "b.mat"


def write_mat73_compressed(path, volume):
    return write_mat73(path, volume, compression="gzip", chunks=(3, 7, 9))


def write_nifti(path, volume, name="a.nii", kind=nibabel.Nifti1Image):
    """(frames, rows, columns) -> (columns, rows, frames), as ITK and dcm2niix store pictures."""
    nibabel.save(kind(volume.transpose(2, 1, 0), np.eye(4)), path / name)
    return path / name


def write_nifti_gz(path, volume):
    return write_nifti(path, volume, "a.nii.gz")


def write_nifti2(path, volume):
    return write_nifti(path, volume, "b.nii", nibabel.Nifti2Image)


def write_tiff(path, volume, **options):
    tifffile.imwrite(path / "a.tif", volume, photometric="minisblack", **options)
    return path / "a.tif"


def write_tiff_compressed(path, volume):
    return write_tiff(path, volume, compression="deflate", predictor=True, tile=(16, 16))


def write_tiff_big(path, volume):
    return write_tiff(path, volume, bigtiff=True, byteorder=">")


def write_tiff_imagej(path, volume):
    return write_tiff(path, volume, imagej=True)


def write_tiff_ome(path, volume):
    return write_tiff(path, volume, ome=True)


def write_tiff_by_pil(path, volume):
    first, *others = [Image.fromarray(frame) for frame in volume]
    first.save(path / "p.tiff", save_all=True, append_images=others, compression="tiff_lzw")
    return path / "p.tiff"


def write_pngs(path, volume):
    return folder_of(path / "pngs", pictures(volume) | {"Thumbs.db": b"x", ".DS_Store": b"x"})


def write_tiffs(path, volume):
    return folder_of(path / "tiffs", pictures(volume, "TIFF", "tif"))


def write_zip(path, volume):
    files = {f"scan/{name}": content for name, content in pictures(volume).items()}
    write_bytes(path / "a.zip", zipped(files | {"__MACOSX/scan/._b1.png": b"x"}))
    return path / "a.zip"


def series(volume, syntax=ExplicitVRLittleEndian, **more):
    """{name: data set's bytes} of one-frame files, whose names and numbers are in no order."""
    files = {}
    shuffled = np.random.default_rng(1).permutation(len(volume))
    for name, i in enumerate(shuffled):
        out = io.BytesIO()
        elements = {
            "SeriesInstanceUID": "1.2.3.4",
            "PatientID": "1001",
            "InstanceNumber": int(i) + 1,
        }
        elements |= {"ImagePositionPatient": [1 + 0.3 * i, 5, -0.1 * i]}
        elements |= {
            key: value(int(i)) if callable(value) else value for key, value in more.items()
        }
        elements = {key: value for key, value in elements.items() if value is not None}
        write_dicom(out, volume[i : i + 1], syntax, **elements)
        files[f"IM{name}"] = out.getvalue()
    return files


def write_series(path, volume):
    return folder_of(path / "series", series(volume) | {"DICOMDIR": b"x"})


def write_series_zip(path, volume):
    write_bytes(path / "s.zip", zipped(series(volume, JPEG2000Lossless), zipfile.ZIP_DEFLATED))
    return path / "s.zip"


def write_multiframe(path, volume):
    return write_dicom(path / "a.dcm", volume, ExplicitVRLittleEndian)


def write_multiframe_zip(path, volume):
    write_bytes(path / "m.zip", zipped({"a.dcm": read_bytes(write_multiframe(path, volume))}))
    return path / "m.zip"


def vol_file(volume, scan_pattern=3):
    """A .vol, after the description in eyepy (whose own writer fails at its dates)."""
    frames, rows, columns = volume.shape
    head = bytearray(2048)
    struct.pack_into(
        "<12s3I3d", head, 0, b"HSF-OCT-103", columns, frames, rows, 0.0115, 0.12, 0.0039
    )
    struct.pack_into("<2I2d", head, 48, 8, 6, 0.01, 0.01)
    struct.pack_into("<4s", head, 84, b"OS")
    struct.pack_into("<2i", head, 96, scan_pattern, 300)
    struct.pack_into("<24s", head, 140, b"1001")
    content = bytes(head) + bytes(48)  # the fundus picture
    for i, frame in enumerate(volume):
        own = struct.pack("<12sI4dI", b"HSF-BS-103", 300, 0, i, 6, i, 0).ljust(300, b"\0")
        content += own + frame.astype("<f4").tobytes()
    return content


def reflectivities(volume):
    return (np.exp(volume / np.float32(255) * 8.285 - 8.3) - 2.44e-4).astype(np.float32)


def e2e_file(series):
    """An .e2e: {series id: (patient id, side, codes (frames, rows, columns) of 16 bits)}."""
    head = lambda magic: struct.pack("<12sI20s", magic, 100, bytes(20))
    entries, data = [], b""

    def add(kind, content, *ids, ind=0):
        """ids: study, series, slice; -1 where it belongs to the patient, or to a whole series."""
        nonlocal data
        ids = struct.pack("<4i2H2I", 1, *ids, ind, 0, kind, 0)
        entries.append((len(data), len(content), ids))
        data += struct.pack("<12s5I", b"MDbData", 0, 0, 0, len(content), 0) + ids + content

    for number, (patient, side, codes) in series.items():
        person = struct.pack("<31s66sIs25s", b"", b"", 0, b"F", patient.encode())
        add(9, person, -1, -1, -1)
        add(11, bytes(14) + side.encode() + bytes(12), 1, number, -1)
        for i in np.random.default_rng(2).permutation(len(codes)):
            rows, columns = codes[i].shape
            meta = bytearray(428)
            struct.pack_into("<3I4f", meta, 0, 0, rows, columns, 0, i, 6, i)
            struct.pack_into("<4I", meta, 60, columns, len(codes), i, 3)
            add(10004, bytes(meta), 1, number, 2 * i)
            pixels = struct.pack("<5I", codes[i].nbytes, 35652097, codes[i].size, rows, columns)
            pixels += codes[i].astype("<u2").tobytes()
            add(0x40000000, pixels, 1, number, 2 * i, ind=1)
    start = 36 + 52 + 52 + 44 * len(entries)
    table = [struct.pack("<4I", 0, start + at, length, 0) + ids for at, length, ids in entries]
    main = head(b"CMDb") + head(b"MDbMDir") + struct.pack("<4I", 0, 88, 88, 0)
    directory = head(b"MDbDir") + struct.pack("<4I", len(entries), 88, 0, 0)
    return main + directory + b"".join(table) + data


def codes_of(volume):
    """Codes of 16 bits whose exponents lie where reflectivities do. Their mantissas are the same
    from either end: eyepy and oct-converter take the lowest bit for the highest, and without a file
    of Heidelberg's own nobody here can tell whether that is right."""
    low = volume.astype(np.uint16) & 31
    high = sum(((low >> bit) & 1) << (4 - bit) for bit in range(5))
    return ((54 + volume // 32).astype(np.uint16) << 10) + (high << 5) + low


def chunk(name, content):
    return bytes([len(name)]) + name.encode() + struct.pack("<I", len(content)) + content


def fda_file(pixels, **more):
    """An .fda of chunks: the pixels', then those of participant, scanner, eye and size."""
    chunks = {
        "@PATIENT_INFO_02": b"1001".ljust(32, b"\0") + bytes(300),
        "@CAPTURE_INFO_02": b"\1" + bytes(105),
    }
    chunks |= {"@HW_INFO_03": b"Triton plus".ljust(16, b"\0") + bytes(100)}
    chunks |= {"@PARAM_SCAN_04": struct.pack("<3I3d", 0, 0, 0, 6.0, 5.0, 2.6) + bytes(18)}
    content = b"".join(chunk(name, value) for name, value in ({**pixels, **chunks, **more}).items())
    return b"FOCTFDA" + struct.pack("<2I", 2, 0) + content + b"\0"


def coded_fda(volume, encode):
    frames, rows, columns = volume.shape
    coded = [encode(frame) for frame in volume]
    parts = b"".join(struct.pack("<I", len(part)) + part for part in coded)
    head = struct.pack("<B6I", 2, 0, 0, columns, rows, frames, 0)
    return {"@IMG_JPEG": head + parts}


def raw_fda(volume):
    frames, rows, columns = volume.shape
    head = struct.pack("<B4IBI", 2, columns, rows, 16, frames, 0, volume.size * 2)
    return {"@IMG_MOT_COMP_03": head + volume.astype("<u2").tobytes()}


def jpeg2000(frame):
    return imagecodecs.jpeg2k_encode(frame, reversible=True, resolutions=2)


ZEISS = "P1001_Macular Cube 30x20_1-2-2020_10-20-30_OS_sn1234_cube_z.img"


WRITERS = [write for name, write in list(globals().items()) if name.startswith("write_")]
WRITERS = [write for write in WRITERS if write.__module__ == __name__]
# of those, what holds 16 bits and real numbers
ARRAYS = [write_npy, write_npy_fortran, write_npz, write_mat5, write_mat5_compressed, write_mat73]
ARRAYS += [write_mat73_compressed, write_nifti, write_nifti_gz, write_nifti2]
TIFFS = [write_tiff, write_tiff_compressed, write_tiff_big, write_tiff_imagej]
