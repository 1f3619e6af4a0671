"""A multi-frame DICOM file -> its frames in order, and what the file says of itself.

    frames, facts = read("a.dcm", lambda n: range(n))       # (frames, rows, columns), dict

Only structural OCT is read. What the standard says about the meaning of a pixel is applied: unused
bits, palette, modality lookup table, rescale, MONOCHROME1. Frames are put in the order that the
file gives them. What cannot be applied, or contradicts itself, is refused by name: ValueError.

Sections named in comments are those of the standard (PS3.3, PS3.5), https://dicom.nema.org.
"""

import contextlib
import io
import itertools
import os
import re
import struct
import zlib

import numpy as np

# Bytes that the stored pixels of a volume may take, checked before anything is inflated: twice
# AI-READI's largest volume, 512 x 992 x 512 of 8 bits.
CEILING = 2 * 512 * 992 * 512
DEFLATED = re.compile(rb".{132}\x02\0\0\0UL.*1\.2\.840\.10008\.1\.2\.1\.99", re.DOTALL)
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
ITEM, END_OF_ITEMS = 0xE000FFFE, 0xE0DDFFFE  # tags of encapsulated pixel data (PS3.5 A.4)
OVERLAYS = range(0x6000, 0x6020, 2)
GREY = ("MONOCHROME2", "MONOCHROME1", "PALETTE COLOR")
# of the modalities (CID 29, CID 33) those that are never structural OCT of the retina
# fmt: off
OTHER_MODALITIES = {
    "AR", "CR", "CT", "DX", "ES", "IO", "IVOCT", "IVUS", "KER", "LEN", "MG", "MR", "NM", "OAM",
    "OP", "OPM", "OPR", "OPV", "OPTBSV", "OPTENF", "PT", "PX", "RF", "RTDOSE", "RTIMAGE", "RTPLAN",
    "RTSTRUCT", "SEG", "SM", "SR", "US", "VA", "XA", "XC",
}
# fmt: on


def read(path_or_file, choose):
    """-> array (frames, rows, columns), and facts, a dict of what the file says of itself.

    choose(frames) -> the frames that are wanted, as ascending positions in the right order; the
    others stay zero and are not decoded. ValueError says what is wrong with the file.
    """
    import jpeg  # noqa: F401  (it tells pydicom how to decode JPEG)

    ds = data_set(path_or_file)
    facts = {"notes": check_kind(ds)}
    keyword = next((name for name in PIXELS if ds.get(name)), None)
    if not keyword:
        raise ValueError("no pixel data; the file is truncated or never had any")
    check_syntax(ds)
    check_pixels(ds, keyword)
    check_concatenation(ds)
    encoded, stored = stored_frames(ds, keyword)
    frames = number_of_frames(ds, stored)
    check_room(frames * ds.Rows * ds.Columns * ds.BitsAllocated // 8)
    order, how = frame_order(ds, frames)
    if how:
        facts["notes"].append(f"frames are stored out of order, and were put in order by {how}")
    facts |= description(ds, frames)
    wanted = list(choose(frames))
    arrays = (
        meaning(ds, keyword, order[position], frame)
        for position, frame in zip(wanted, decoded(ds, encoded, order[wanted]), strict=True)
    )
    return filled(frames, wanted, arrays, facts["notes"]), facts


def filled(frames, wanted, arrays, notes):
    """The arrays (rows, columns) of the frames `wanted`, in that order -> (frames, rows, columns),
    zeros elsewhere. Says in the notes how many are blank."""
    volume, blank = None, 0
    for position, frame in zip(wanted, arrays, strict=True):
        if volume is None:
            volume = np.zeros((frames, *frame.shape), frame.dtype)
        elif frame.dtype != volume.dtype:  # some frames are rescaled and others are not
            volume = volume.astype(np.float32, copy=False)
        volume[position] = frame
        blank += frame.min() == frame.max()
    if 0 < blank < len(wanted):
        notes.append(f"{blank} of {len(wanted)} frames that were read are blank")
    return volume


class Bounded(io.BufferedReader):
    """A file of which no more is asked than it has: Python would first take memory for whatever
    length a damaged element claims."""

    def read(self, size=-1):
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def data_set(path_or_file, **options):
    """As pydicom.dcmread, but what a deflated file inflates to is limited, by CEILING."""
    import pydicom

    with contextlib.ExitStack() as stack:
        file = path_or_file
        if isinstance(file, (str, os.PathLike)):
            file = stack.enter_context(Bounded(io.FileIO(file)))
        head = file.read(4096)
        if head[128:132] != b"DICM":
            raise ValueError("it is no DICOM file")
        if not DEFLATED.match(head):
            file.seek(0)
            return pydicom.dcmread(file, **options)
        # the length of the group 0002, which follows its first element, is in that element
        start = 144 + int.from_bytes(head[140:144], "little")
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        file.seek(start)
        room = CEILING + 2**24  # for the elements beside the pixels
        content = inflate.decompress(file.read(), room)
        if not inflate.eof:
            if len(content) == room:  # and there is more
                check_room(room)
            raise ValueError("its deflated content is cut short")
        ds = pydicom.dcmread(io.BytesIO(content), force=True, **options)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        return ds


def check_room(size):
    """ValueError where pixels would take more bytes than CEILING."""
    if size > CEILING:
        raise ValueError(
            f"its pixels would take {size / 1e9:.2f} GB or more, and dicom.CEILING is "
            f"{CEILING / 1e9:.2f} GB; raise it there if your volumes are so large"
        )


def first(ds, name):
    """The first item of a sequence of a data set, or an empty one."""
    return next(iter(ds.get(name) or []), {})


def shared(ds):
    return first(ds, "SharedFunctionalGroupsSequence")


def own(ds, index):
    """The functional groups of one frame."""
    return next(iter((ds.get("PerFrameFunctionalGroupsSequence") or [])[index : index + 1]), {})


# ------------------------------------------------------------------------------ what the file is


def check_kind(ds):
    """ValueError by name for what is known to be something else than structural OCT -> notes about
    what is not known. A file that says nothing is believed."""
    from pydicom import uid

    sop_class, modality = ds.get("SOPClassUID"), str(ds.get("Modality") or "")
    if sop_class == uid.OphthalmicTomographyImageStorage:
        return []
    is_known = sop_class and sop_class.name != str(sop_class)
    # a secondary capture may hold anything
    if is_known and "Secondary Capture" not in sop_class.name:
        raise ValueError(f"it is no structural OCT: its SOP class is {sop_class.name}")
    if modality in OTHER_MODALITIES:
        raise ValueError(f"it is no structural OCT: its modality is {modality}")
    if not sop_class:
        return []
    return [f"the SOP class is {sop_class.name}, which does not say that this is OCT"]


def check_syntax(ds):
    syntax = ds.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise ValueError(
            "it has no transfer syntax (0002,0010), so that its pixels could mean anything; write "
            "it anew with the tool that exported it"
        )
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise ValueError(
            f"its transfer syntax {syntax} is private or unknown; convert the file to a standard "
            "one, with dcmtk's dcmconv or in the program that exported it"
        )


def check_concatenation(ds):
    """ValueError for a part of a concatenation (PS3.3 C.7.6.16.2.2.4)."""
    if not ds.get("ConcatenationUID"):
        return
    number, total = ds.get("InConcatenationNumber"), ds.get("InConcatenationTotalNumber")
    offset = ds.get("ConcatenationFrameOffsetNumber") or 0
    if total != 1 and (total or offset or (number or 1) > 1):
        raise ValueError(
            f"it is part {number or '?'} of {total or '?'} of a concatenation, not a whole volume; "
            "join the parts first"
        )


def description(ds, frames):
    """What the file says of its participant, scanner and geometry; None where it says nothing."""
    measures = first(shared(ds), "PixelMeasuresSequence") or ds
    anatomy = first(shared(ds), "FrameAnatomySequence")
    side = ds.get("ImageLaterality") or ds.get("Laterality") or anatomy.get("FrameLaterality")
    spacing, thickness = (numbers(measures, name) for name in ("PixelSpacing", "SliceThickness"))
    return facts_of(
        (frames, int(ds.Rows), int(ds.Columns)),
        ds.file_meta.TransferSyntaxUID.name,
        patient_id=ds.get("PatientID"),
        scanner=ds.get("ManufacturerModelName"),
        protocol=ds.get("SeriesDescription") or ds.get("ProtocolName"),
        laterality=side,
        spacing=spacing if len(spacing) == 2 else None,
        thickness=thickness[0] if thickness else None,
    )


def facts_of(
    shape,
    syntax,
    patient_id=None,
    scanner=None,
    protocol=None,
    laterality=None,
    spacing=None,
    thickness=None,
):
    """The facts of a volume of shape (frames, rows, columns); None for what its file does not say.
    syntax: how its pixels are stored."""
    text = lambda value: str(value).strip() if value else None
    frames, rows, columns = shape
    return {
        "patient_id": text(patient_id),
        "scanner": text(scanner),
        "protocol": text(protocol),
        "laterality": text(laterality),
        "frames": frames,
        "rows": rows,
        "columns": columns,
        "spacing": spacing,  # mm, (rows, columns)
        "thickness": thickness,  # mm
        "syntax": syntax,
    }


def numbers(ds, name):
    """The numbers of an element that nothing depends on; [] where it has none."""
    try:
        return [float(value) for value in np.ravel(ds.get(name, []))]
    except (TypeError, ValueError):  # empty, or a text that is no number
        return []


# ------------------------------------------------------------------------------ its frames, encoded


def number_of_frames(ds, stored):
    """NumberOfFrames, which must be how many frames are stored."""
    if ds.get("NumberOfFrames") is None and stored != 1:
        raise ValueError(
            f"it has no NumberOfFrames, and its pixel data holds {stored} frames; write that "
            "number into it"
        )
    frames = int(ds.get("NumberOfFrames") or 1)
    if stored != frames:
        raise ValueError(f"NumberOfFrames is {frames}, but the pixel data holds {stored} frames")
    return frames


def stored_frames(ds, keyword):
    """-> the encoded frames (None where they are not encapsulated), and how many there are."""
    pixels = ds[keyword].value
    if not ds.file_meta.TransferSyntaxUID.is_encapsulated:
        return None, len(pixels) * 8 // (ds.Rows * ds.Columns * ds.BitsAllocated)
    encoded = frames_of(pixels, int(ds.get("NumberOfFrames") or 1), ds)
    return encoded, len(encoded)


def frames_of(pixels, frames, ds):
    """Encapsulated pixel data -> encoded frames, bytes or views of them.

    Fragments, empty ones aside, that are as many as the frames are the frames, whatever the offset
    tables say. Only where a frame has several fragments, a table tells them apart, or without one,
    the markers at the end of a JPEG image do.
    """
    from pydicom.encaps import generate_fragmented_frames

    table, *fragments = items_of(pixels)
    whole = [fragment for fragment in fragments if fragment]
    if len(whole) == frames:
        return whole
    extended = ds.get("ExtendedOffsetTable")
    offsets = np.frombuffer(extended, "<u8") if extended else np.frombuffer(table, "<u4")
    if len(offsets):
        return frames_by_table(fragments, offsets.tolist(), frames)
    if len(whole) < frames:
        return whole
    joined = generate_fragmented_frames(pixels, number_of_frames=frames)
    return [b"".join(parts) for parts in joined]


def items_of(pixels):
    """Encapsulated pixel data -> its items as views: the offset table, then the fragments."""
    view, at, items = memoryview(pixels), 0, []
    while at + 8 <= len(view):
        tag, length = struct.unpack_from("<II", view, at)
        if tag == END_OF_ITEMS:
            break
        if tag != ITEM or at + 8 + length > len(view):
            raise ValueError(
                f"its pixel data is damaged or truncated at byte {at} of {len(view)}, after "
                f"{len(items)} items"
            )
        items.append(view[at + 8 : at + 8 + length])
        at += 8 + length
    if not items:
        raise ValueError("its pixel data has no items, though its transfer syntax asks for them")
    return items


def frames_by_table(fragments, offsets, frames):
    """Join the fragments of every frame, as an offset table tells them apart."""
    starts = np.cumsum([0, *(8 + len(fragment) for fragment in fragments)]).tolist()
    index = {start: k for k, start in enumerate(starts[:-1])}
    if offsets[0] or sorted(set(offsets)) != offsets or not set(offsets) <= set(index):
        raise ValueError(
            f"its offset table contradicts its {len(fragments)} fragments, and NumberOfFrames is "
            f"{frames}"
        )
    bounds = [*(index[offset] for offset in offsets), len(fragments)]
    return [b"".join(fragments[a:b]) for a, b in itertools.pairwise(bounds)]


def frame_order(ds, frames):
    """-> array (frames,), the stored index of every frame in the right order, and what tells it, or
    None where they are stored in order or the file does not say clearly.

    ValueError for several stacks (PS3.3 C.7.6.16.2.2).
    """
    stored, groups = np.arange(frames), ds.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != frames:
        return stored, None
    content = [first(group, "FrameContentSequence") for group in groups]
    stacks = sorted({str(c.get("StackID")) for c in content if c.get("StackID")})
    if len(stacks) > 1:
        raise ValueError(
            f"it holds {len(stacks)} stacks of frames ({', '.join(stacks[:3])}), not one volume; "
            "export every stack as a file of its own"
        )
    for name in ("InStackPositionNumber", "DimensionIndexValues"):
        values = [np.ravel(c.get(name)).tolist() for c in content]
        is_complete = None not in (v for value in values for v in value)
        if is_complete and len({tuple(value) for value in values}) == frames:
            order = np.array(sorted(stored, key=lambda i: values[i]))
            return order, None if (order == stored).all() else name
    positions = [
        first(group, "PlanePositionSequence").get("ImagePositionPatient") for group in groups
    ]
    if None in positions or frames < 3:
        return stored, None
    along = along_a_line(np.array(positions, float))
    if along is None:
        return stored, None
    order = np.argsort(along)
    is_monotonic = (order == stored).all() or (order[::-1] == stored).all()
    return (stored, None) if is_monotonic else (order, "ImagePositionPatient")


def along_a_line(points):
    """Points (n, 3) on a line -> where on it each lies (n,), ascending with the coordinate that
    varies most. None where they are on no line, or two are at the same place."""
    points = points - points.mean(axis=0)
    _, sizes, axes = np.linalg.svd(points, full_matrices=False)
    direction = axes[0] * np.sign(axes[0][np.abs(axes[0]).argmax()])
    along = points @ direction
    gaps = np.diff(np.sort(along))
    on_a_line = np.isfinite(points).all() and sizes[1] <= 0.01 * sizes[0]
    return along if on_a_line and gaps.min() > 0.01 * np.median(gaps) else None


# ------------------------------------------------------------------------------ decoding


def decoded(ds, encoded, indices):
    """Yield the stored values (rows, columns) of the frames `indices`, without any correction."""
    from pydicom.pixels import iter_pixels

    indices = [int(i) for i in indices]
    options = {"raw": True, "correct_unused_bits": False}
    if encoded is None:
        yield from iter_pixels(ds, indices=indices, **options)
        return
    # only the frames that are wanted, so that no table of the file is needed to find them
    for i in indices:
        check_codestream(ds, encoded[i], i)
    item = lambda part: struct.pack("<II", ITEM, len(part))
    parts = [b"", *(encoded[i] for i in indices)]  # an empty table first
    ds.PixelData = b"".join(piece for part in parts for piece in (item(part), part))
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if name in ds:
            del ds[name]
    ds.NumberOfFrames = len(indices)
    try:
        yield from iter_pixels(ds, **options)
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise a dozen types
        # without addresses of objects in memory
        reason = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "", " ".join(str(error).split()))
        raise ValueError(undecodable(ds, reason)) from error


def size_in(codestream):
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 codestream gives itself, or None."""
    siz = codestream.find(b"\xff\x4f\xff\x51", 0, 4096)  # a JP2 file has boxes before it
    number = lambda at, size: int.from_bytes(codestream[at : at + size], "big")
    if siz >= 0:  # after marker, length and capabilities: width, height, and the image's offset
        width, height, left, top = (number(siz + 8 + 4 * k, 4) for k in range(4))
        return height - top, width - left
    at = 2
    while codestream[:2] == b"\xff\xd8" and at + 9 <= len(codestream) and codestream[at] == 0xFF:
        marker = codestream[at + 1]
        # every SOF but DHT, JPG and DAC, which lie among them; JPEG-LS has its own
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return number(at + 5, 2), number(at + 7, 2)
        at += 2 + number(at + 2, 2) if marker != 0xFF else 1
    return None


def check_codestream(ds, encoded, index):
    """ValueError where a frame's codestream has another size than Rows and Columns."""
    syntax, size = ds.file_meta.TransferSyntaxUID, size_in(bytes(encoded[: 2**16]))
    if size is None and "RLE" in syntax.name:  # which has no header
        return
    if size is None or not all(0 < n < 2**16 for n in size):
        raise ValueError(undecodable(ds, "no image header was found"))
    if size != (ds.Rows, ds.Columns):
        raise ValueError(
            f"frame {index + 1} is encoded with {size[0]} rows and {size[1]} columns, while Rows "
            f"and Columns are {ds.Rows} and {ds.Columns}"
        )


def undecodable(ds, reason):
    return (
        f"a frame cannot be decoded as {ds.file_meta.TransferSyntaxUID.name}; it is damaged or "
        f"obfuscated, or the transfer syntax is not the one that the file names ({reason[:150]})"
    )


# ------------------------------------------------------------------------------ what a pixel means


def check_pixels(ds, keyword):
    """ValueError for pixels that are no grey values, or whose description contradicts itself."""
    for name in ("Rows", "Columns", "BitsAllocated"):
        if not ds.get(name):
            raise ValueError(f"it has no {name}")
    if ds.get("SamplesPerPixel", 1) != 1:
        raise ValueError(f"{ds.SamplesPerPixel} samples a pixel; OCT has 1")
    photometric = ds.get("PhotometricInterpretation") or GREY[0]
    if photometric not in GREY:
        raise ValueError(f"its photometric interpretation is {photometric}, which is not grey")
    if keyword != "PixelData":
        return
    allocated, stored = ds.BitsAllocated, bits_stored(ds)
    high = ds.get("HighBit", stored - 1)
    if not stored - 1 <= high < allocated:
        raise ValueError(
            f"BitsAllocated {allocated}, BitsStored {stored} and HighBit {high} contradict each "
            "other"
        )
    if high != stored - 1 and ds.file_meta.TransferSyntaxUID.is_encapsulated:
        raise ValueError(
            f"HighBit is {high} and BitsStored {stored}; compressed pixels must begin at bit 0"
        )
    if ds.get("ModalityLUTSequence") and rescale(ds, 0) != (1, 0):
        raise ValueError("it has a modality lookup table and a rescale slope; only one can hold")


def meaning(ds, keyword, index, frame):
    """Stored values (rows, columns) of frame `index` -> the grey values that they stand for."""
    from pydicom.pixels import apply_modality_lut

    photometric, table = ds.get("PhotometricInterpretation"), ds.get("ModalityLUTSequence")
    is_inverted = photometric == "MONOCHROME1"  # the lowest value is white (C.7.6.3.1.2)
    white = 0
    if keyword == "PixelData":
        frame = used_bits(ds, frame)
        white = -1 if ds.PixelRepresentation else 2 ** bits_stored(ds) - 1
    if photometric == "PALETTE COLOR":
        frame = grey_of_palette(ds, frame)
    if table:
        frame = apply_modality_lut(frame, ds)
        white = np.iinfo(frame.dtype).max
    if is_inverted:
        frame = white - frame
    slope, intercept = (1, 0) if table else rescale(ds, index)
    if (slope, intercept) != (1, 0):
        frame = frame.astype(np.float32) * slope + intercept
    return frame


def bits_stored(ds):
    return ds.get("BitsStored") or ds.BitsAllocated


def used_bits(ds, frame):
    """Stored words -> the values in their BitsStored bits below HighBit (PS3.5 8.1.1).

    Bits above may hold overlays, and are cleared. ValueError where the value itself seems to go on
    there, for then BitsStored is wrong.
    """
    stored, words = bits_stored(ds), frame.dtype.itemsize * 8
    high = ds.get("HighBit", stored - 1)
    if stored >= words:  # also where a codestream has fewer bits than the file says
        return frame
    up = np.left_shift(frame, words - 1 - high)  # the highest bit at the top, then signed or not
    values = np.right_shift(up, words - stored)
    above = frame >> (high + 1) if high + 1 < words else np.zeros(1, frame.dtype)
    if frame.dtype.kind == "i":  # the sign, continued, is no content
        above = np.where(above == values >> (stored - 1), 0, above)
    used = int(np.bitwise_or.reduce(above, axis=None))
    position = 0x102  # OverlayBitPosition, in the groups 6000 to 601E (PS3.3 C.9.2)
    overlays = {ds[group, position].value for group in OVERLAYS if (group, position) in ds}
    if used & 1 and high + 1 not in overlays:
        raise ValueError(
            f"its pixels use bit {high + 1}, and HighBit is {high} with BitsStored {stored}: "
            "values are wider than the file says"
        )
    return values


def grey_of_palette(ds, frame):
    """Indices (rows, columns) -> the grey values of the file's palette. ValueError for colours."""
    from pydicom.pixels import apply_color_lut

    colours = apply_color_lut(frame, ds)  # (rows, columns, 3)
    if (colours != colours[..., :1]).any():
        raise ValueError("its palette is coloured; OCT is grey")
    return colours[..., 0]


def rescale(ds, index):
    """Rescale slope and intercept of frame `index`: from its own functional group, the shared one,
    or the data set; 1 and 0 where none has them."""
    sources = [ds]
    for group in (shared(ds), own(ds, index)):
        sources += group.get("PixelValueTransformationSequence") or []
    slope, intercept = sources[-1].get("RescaleSlope"), sources[-1].get("RescaleIntercept")
    return np.float32(1 if slope is None else slope), np.float32(intercept or 0)
