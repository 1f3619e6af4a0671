"""A folder or zip of B-scans, one a file (PNG, JPEG, TIFF, DICOM), or a TIFF's pages -> a volume.

    volume, facts = read_files("scan_017/", choose)       # (frames, rows, columns), dict
    volume, facts = read_pages("scan_017.tif", choose)

Pictures are put in the natural order of their names (1, 2, 10), DICOM files in the order that they
give themselves. All files must be of one kind and size, and named alike but for their numbers: what
may be another volume, a thumbnail or a colour picture is refused by name, with ValueError. Every
size is taken from headers and limited by dicom.CEILING before memory is taken.
"""

import contextlib
import functools
import io
import math
import os
import re
import zipfile
from dataclasses import dataclass

import numpy as np

import dicom
from files import IGNORED, first_few, members

MOST_FILES = 20_000  # in a zip
WIDEST = 4  # times dicom.CEILING are taken where its pixels of 16 bits have 64
KINDS = {  # how a file begins: what it is
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}


@dataclass(frozen=True)
class Member:
    """A file in a folder or zip. open() -> a binary file, of which no more is asked than it has."""

    name: str
    size: int  # bytes, inflated
    open: callable


def check_values(shape, dtype):
    """ValueError where values would take more than dicom.CEILING if none had more than 16 bits: a
    volume is not larger for being stored as float64."""
    dicom.check_room(math.prod(map(int, shape)) * min(np.dtype(dtype).itemsize, 2))


def kind_of(head):
    """What a file is that begins with `head` (at least 132 bytes of it): PNG, JPEG, TIFF, DICOM or
    None."""
    if head[128:132] == b"DICM":
        return "DICOM"
    return next((kind for start, kind in KINDS.items() if head.startswith(start)), None)


def read_files(path, choose):
    """A folder or zip of single frames -> volume (frames, rows, columns), facts. See dicom.read."""
    with listed(path) as found:
        if not found:
            raise ValueError("it holds no file")
        kinds = {}
        for member in found:
            with member.open() as file:
                kinds.setdefault(kind_of(file.read(132)), member.name)
        if None in kinds:
            raise ValueError(
                f"it holds {kinds[None]}, which is no PNG, JPEG, TIFF or DICOM; a volume's folder "
                "holds its B-scans and nothing else"
            )
        if len(kinds) > 1:
            named = " and ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
            raise ValueError(f"it holds files of several kinds, {named}; keep those of one volume")
        (kind,) = kinds
        if kind == "DICOM":
            return read_series(found, choose)
        return read_pictures(in_natural_order(found), kind, choose)


# ------------------------------------------------------------------------------ folders and zips


@contextlib.contextmanager
def listed(path):
    """The Members of a folder or zip, as long as the block lasts. ValueError for folders within."""
    if os.path.isdir(path):
        names = members(path)
        for name in names:
            if not os.path.isfile(os.path.join(path, name)):
                raise ValueError(
                    f"it holds {name}, which is no file; name the folder whose files are B-scans"
                )
        places = [os.path.join(path, name) for name in names]
        yield [
            Member(name, os.path.getsize(place), functools.partial(opened, place))
            for name, place in zip(names, places)
        ]
        return
    with zipfile.ZipFile(path) as archive:
        yield [
            Member(info.filename, info.file_size, functools.partial(archive.open, info))
            for info in entries(archive)
        ]


def opened(path):
    return dicom.Bounded(io.FileIO(path))


def entries(archive, times=1):
    """The entries of a zip that are files of the volume. ValueError where they would take more than
    dicom.CEILING (times that), are encrypted, in several folders or not inflated within bounds."""
    found = []
    for info in archive.infolist():
        name = info.filename.rpartition("/")[2]
        if not (info.is_dir() or IGNORED.fullmatch(name) or "__MACOSX/" in info.filename):
            found.append(info)
    if len(found) > MOST_FILES:
        raise ValueError(f"it holds {len(found)} files; {MOST_FILES} are the most for one volume")
    for info in found:
        if info.flag_bits & 1:
            raise ValueError("it is encrypted; save it without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("its compression is neither deflate nor none; save it as a plain zip")
        if info.file_size > 1032 * info.compress_size:  # the most that deflate can do
            raise ValueError(f"{info.filename} cannot inflate to the size that the zip says")
    # zipfile inflates no further than these sizes, and compares the checksum at the end
    dicom.check_room(sum(info.file_size for info in found) // times)
    if sum(info.compress_size for info in found) > os.path.getsize(archive.filename):
        raise ValueError("it is cut short, or its entries overlap")
    folders = {info.filename.rpartition("/")[0]: info.filename for info in found}
    if len(folders) > 1:
        raise ValueError(
            f"it holds files of several folders ({first_few(folders.values(), 2)}); zip one "
            "volume's folder"
        )
    names = [info.filename for info in found]
    twice = next((name for name in names if names.count(name) > 1), None) if names else None
    if twice:
        raise ValueError(f"it holds {twice} twice")
    return found


def in_natural_order(found):
    """Members in the natural order of their names: 1, 2, 10. ValueError where the names do not tell
    an order: two with the same numbers, or names that differ in more than numbers."""
    stem = lambda member: os.path.splitext(os.path.basename(member.name))[0].casefold()
    numbers = lambda member: [int(digits) for digits in re.findall("[0-9]+", stem(member))]
    forms = {re.sub("[0-9]+", "#", stem(member)): member.name for member in found}
    if len(forms) > 1:
        raise ValueError(
            f"its files are named in {len(forms)} ways ({first_few(forms.values(), 2)}); one "
            "volume's B-scans are named alike but for their numbers, which give their order"
        )
    ordered = sorted(found, key=numbers)
    for before, after in zip(ordered, ordered[1:]):
        if numbers(before) == numbers(after):
            raise ValueError(
                f"{before.name} and {after.name} have the same number, so that their order is "
                "unknown; remove one of them"
            )
    return ordered


# ------------------------------------------------------------------------------ pictures


def read_pictures(found, kind, choose):
    """Members, in order -> volume, facts."""
    heads = [size_of(member, kind) for member in found]  # (rows, columns, bytes)
    for member, head in zip(found, heads):
        if head[:2] != heads[0][:2]:
            shown = [f"{m.name} {h[0]} x {h[1]}" for m, h in ((found[0], heads[0]), (member, head))]
            raise ValueError(f"its B-scans differ in size: {' and '.join(shown)}")
    dicom.check_room(sum(head[2] for head in heads))
    wanted, notes = list(choose(len(found))), []
    arrays = (frame_of(found[i], kind, heads[i][:2]) for i in wanted)
    volume = dicom.filled(len(found), wanted, arrays, notes)
    return volume, dicom.facts_of(volume.shape, f"{kind} files") | {"notes": notes}


def content_of(member):
    dicom.check_room(member.size)
    with member.open() as file:
        return file.read()


def size_of(member, kind):
    """(rows, columns, bytes of its pixels) of a picture, by its header."""
    with member.open() as file:
        if kind == "TIFF":
            with pages_of(file, member.size) as (shape, dtype, _):
                if shape[0] != 1:
                    raise ValueError(f"{member.name} has {shape[0]} pages, not one B-scan")
                return *shape[1:], math.prod(shape) * dtype.itemsize
        head = file.read(2**16)
    if kind == "PNG":
        rows, columns = int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
        samples = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(head[25] if len(head) > 25 else None, 4)
        return rows, columns, rows * columns * samples * (2 if head[24:25] == b"\x10" else 1)
    size = dicom.size_in(head) or dicom.size_in(content_of(member))
    if not size or not all(size):
        raise ValueError(f"{member.name} is damaged: it has no header of a JPEG")
    return *size, size[0] * size[1] * 4


def frame_of(member, kind, size):
    """One picture -> its grey values (rows, columns). ValueError, naming it, where they are not."""
    import imagecodecs

    content = content_of(member)
    try:
        if kind == "TIFF":
            with pages_of(io.BytesIO(content), len(content)) as (_, _, read):
                frame = next(read([0]))
        elif kind == "PNG":
            frame = imagecodecs.png_decode(content)
        # libjpeg fills what is missing with grey, and says nothing
        elif content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):
            raise ValueError("it is cut short")
        else:
            frame = imagecodecs.jpeg8_decode(content)
        if kind == "JPEG" and frame.shape[2:] == (4,):
            raise ValueError("it is in CMYK; OCT is grey, so save the B-scans without colours")
        frame = grey(frame)
    except MemoryError:
        raise
    except Exception as error:  # every decoder has a type of its own
        raise ValueError(f"{member.name}: {error}") from error
    if frame.shape != tuple(size):
        raise ValueError(f"{member.name} is {frame.shape}, and its header says {tuple(size)}")
    return frame


def grey(frame):
    """A picture (rows, columns), or (rows, columns, samples) of equal colours and no transparency
    -> (rows, columns). ValueError for others."""
    if frame.ndim == 2:
        return frame
    if frame.ndim != 3 or frame.shape[2] not in (1, 2, 3, 4):
        raise ValueError(f"its pixels have the shape {frame.shape}, not (rows, columns)")
    colours, alpha = frame, None
    if frame.shape[2] in (2, 4):
        colours, alpha = frame[..., :-1], frame[..., -1]
    opaque = np.iinfo(frame.dtype).max if frame.dtype.kind in "iu" else 1
    if alpha is not None and (alpha != opaque).any():
        raise ValueError("it is transparent in places; save it without transparency")
    if (colours != colours[..., :1]).any():
        raise ValueError("it is coloured; OCT is grey, so save the B-scans without colours")
    return np.ascontiguousarray(colours[..., 0])


# ------------------------------------------------------------------------------ TIFF


def read_pages(path, choose):
    """The pages of a TIFF -> volume, facts."""
    with opened(path) as file, pages_of(file, os.path.getsize(path)) as (shape, dtype, read):
        check_values(shape, dtype)
        wanted, notes = list(choose(shape[0])), []
        volume = dicom.filled(shape[0], wanted, map(grey, read(wanted)), notes)
    return volume, dicom.facts_of(volume.shape, "TIFF pages") | {"notes": notes}


@contextlib.contextmanager
def pages_of(file, size):
    """An open TIFF of `size` bytes -> shape (frames, rows, columns), dtype, and read(frames), which
    yields each as (rows, columns) or (rows, columns, samples)."""
    import tifffile

    # what OME says may point to other files
    with tifffile.TiffFile(file, is_ome=False) as tiff:
        if len(tiff.series) != 1:
            shapes = [" x ".join(map(str, series.shape)) for series in tiff.series]
            raise ValueError(
                f"it holds images of {len(shapes)} sizes ({first_few(shapes, 3)}); a volume has one"
            )
        (series,) = tiff.series
        page, shape, axes = series.keyframe, series.shape, series.axes
        inside = 3 if axes.endswith("YXS") else 2
        leading = [n for n in shape[:-inside] if n != 1]
        if not axes.endswith(("YX", "YXS")) or len(leading) > 1:
            raise ValueError(
                f"it is {' x '.join(map(str, shape))} (axes {axes}); a volume has rows, columns "
                "and one axis more"
            )
        check_page(tiff, page, size)
        frames, (rows, columns, *samples) = (leading or [1])[0], shape[-inside:]
        white = 2**page.bitspersample - 1 if page.photometric == 0 else None  # WhiteIsZero

        def read(wanted):
            whole = None
            for i in wanted:
                if len(series.pages) == frames:
                    own = series.pages[i]
                    if own.shape != page.shape or own.chunks != page.chunks:
                        raise ValueError(f"its page {i + 1} differs in size from the first")
                    frame = own.asarray(maxworkers=1)
                else:  # one page says where all frames are, one after the other
                    whole = series.asarray(maxworkers=1) if whole is None else whole
                    frame = whole.reshape(frames, rows, columns, *samples)[i]
                frame = frame.reshape(rows, columns, *samples)
                yield frame if white is None else (white - frame).astype(frame.dtype)

        # with all samples of a pixel
        yield (frames, rows, columns), np.dtype((series.dtype, tuple(samples))), read


def check_page(tiff, page, size):
    """ValueError for a TIFF whose values are no grey values as they stand, or not all there."""
    kind = page.dtype.kind if page.dtype is not None else "?"
    if kind not in "biuf" or (page.photometric == 0 and kind not in "bu"):
        raise ValueError(f"its pixels are {page.dtype}, which are no grey values")
    dicom.check_room(math.prod(page.chunks) * page.dtype.itemsize)
    if page.photometric == 3:
        raise ValueError("it has a palette; save it in grey values")
    if page.tags.valueof(274, 1) != 1:
        raise ValueError("its Orientation turns the picture; save it upright")
    for other in tiff.pages:
        offsets, counts = getattr(other, "dataoffsets", ()), getattr(other, "databytecounts", ())
        if any(not 0 < at <= at + n <= size or n == 0 for at, n in zip(offsets, counts)):
            raise ValueError("it is cut short: some of its pixels are beyond its end")


# ------------------------------------------------------------------------------ DICOM series


def read_series(found, choose):
    """Members, each a DICOM file of one frame -> volume, facts. A single one may have many."""
    if len(found) == 1:
        return dicom.read(io.BytesIO(content_of(found[0])), choose)
    headers = []
    for member in found:
        with member.open() as file:
            headers.append(dicom.data_set(file, stop_before_pixels=True))
    check_alike(found, headers)
    first = headers[0]
    dicom.check_room(len(found) * first.Rows * first.Columns * first.BitsAllocated // 8)
    order, notes = series_order(found, headers)
    wanted, frame_notes = list(choose(len(found))), []

    def frames():
        for position in wanted:
            member = found[order[position]]
            try:
                frame, facts = dicom.read(io.BytesIO(content_of(member)), range)
            except MemoryError:
                raise
            except Exception as error:  # pydicom and the decoders raise a dozen types
                raise ValueError(f"{member.name}: {error}") from error
            frame_notes.extend(note for note in facts["notes"] if note not in frame_notes)
            yield frame[0]

    volume = dicom.filled(len(found), wanted, frames(), notes)
    facts = dicom.description(first, len(found))
    facts["syntax"] = f"DICOM files, {facts['syntax']}"
    return volume, facts | {"notes": frame_notes + notes}


def check_alike(found, headers):
    """ValueError where DICOM files are no frames of one volume, naming two that differ."""
    for member, ds in zip(found, headers):
        if int(ds.get("NumberOfFrames") or 1) != 1:
            raise ValueError(
                f"{member.name} has {ds.NumberOfFrames} frames and is not alone; name that file "
                "instead of its folder"
            )
        dicom.check_kind(ds)
        dicom.check_syntax(ds)
        dicom.check_pixels(ds, "PixelData" if ds.get("BitsStored") else "FloatPixelData")
        for name in ("SeriesInstanceUID", "PatientID", "Rows", "Columns", "ImageLaterality"):
            values = [str(d.get(name) or "") for d in (headers[0], ds)]
            if values[0] != values[1]:
                raise ValueError(
                    f"{found[0].name} and {member.name} are not of one volume: their {name} is "
                    f"'{values[0]}' and '{values[1]}'"
                )


def series_order(found, headers):
    """-> indices of the files in the order of their frames, and notes.

    They lie where ImagePositionPatient says. A line has two directions: of these, that in which
    InstanceNumber ascends. Without positions InstanceNumber alone tells. The names of DICOM files
    tell nothing, and neither is guessed: ValueError.
    """
    numbers = [ds.get("InstanceNumber") for ds in headers]
    is_numbered = None not in numbers and len(set(numbers)) == len(numbers)
    by_number = sorted(range(len(found)), key=lambda i: int(numbers[i])) if is_numbered else None
    positions, along = [dicom.numbers(ds, "ImagePositionPatient") for ds in headers], None
    if all(len(position) == 3 for position in positions):
        along = dicom.along_a_line(np.array(positions))
    if along is None:
        if by_number is None:
            raise ValueError(
                "neither ImagePositionPatient nor InstanceNumber tells the order of its files "
                f"({first_few([m.name for m in found], 2)}); export them with one of these"
            )
        return by_number, []
    order = np.argsort(along).tolist()
    if by_number in (None, order, order[::-1]):
        return by_number or order, []
    return order, ["InstanceNumber contradicts ImagePositionPatient, which gives the order"]
