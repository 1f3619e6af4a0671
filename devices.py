"""A scanner's own file -> a volume: Heidelberg .e2e and .vol, Topcon .fda, Zeiss Cirrus .img.

    volume, facts = read_vol("a.vol", choose)             # (frames, rows, columns), dict
    volume, facts = read_e2e("a.e2e", choose, "12345")    # one series of several, by its id

The two of Heidelberg are read by eyepy (requirements-formats.txt), and shown as Heidelberg's own
viewer does, in 8 bits. Topcon's and Zeiss's are read here: the reader of oct-converter 0.7.0 calls
what numpy 2.3 removed, and puts the rows of a Cirrus cube in the wrong places. What nobody has
documented is left alone; what contradicts itself is refused with ValueError.
"""

import mmap
import os
import re
import struct

import numpy as np

import dicom
from files import first_few

EYES = {"OD": "R", "OS": "L", 0: "R", 1: "L", ord("R"): "R", ord("L"): "L"}


def eyepy_needed(path):
    """ValueError unless eyepy, which reads Heidelberg's files, is installed."""
    try:
        import eyepy  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{os.path.splitext(path)[1]} files need the package eyepy: "
            "pip install -r requirements-formats.txt"
        ) from None


# ------------------------------------------------------------------------------ Heidelberg


def read_vol(path, choose):
    """Heidelberg's raw export -> volume, facts."""
    eyepy_needed(path)
    check_vol(path)
    from eyepy.core.utils import from_vol_intensity
    from eyepy.io.he.vol_reader import HeVolReader

    found = HeVolReader(path).parsed_file
    if found.scan_pattern in (2, 5):
        name = "circle" if found.scan_pattern == 2 else "star"
        raise ValueError(f"its B-scans lie on a {name}; a volume's lie side by side")
    wanted, notes = list(choose(found.n_bscans)), []
    # eyepy writes into what it is given
    arrays = (from_vol_intensity(found.bscans[i].data.copy()) for i in wanted)
    volume = dicom.filled(found.n_bscans, wanted, arrays, notes)
    text = lambda value: value.split("\0")[0].strip()
    facts = dicom.facts_of(
        volume.shape,
        "Heidelberg .vol",
        patient_id=text(found.patient_id),
        laterality=EYES.get(text(found.scan_position)),
        spacing=positive([found.scale_y, found.scale_x]),
        thickness=(positive([found.distance]) or [None])[0],
    )
    return volume, facts | {"notes": notes}


def check_vol(path):
    """ValueError unless all that the header of a .vol promises is in the file: eyepy would first
    take memory for it. Headers begin with version, columns, frames and rows; sizes are in bytes."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(2048)
        if len(head) < 2048:
            raise ValueError("it is cut short, within its header")
        columns, frames, rows = struct.unpack_from("<3I", head, 12)
        slo_columns, slo_rows = struct.unpack_from("<2I", head, 48)
        dicom.check_room(frames * rows * columns * 4)
        at, pixels = 2048 + slo_columns * slo_rows, rows * columns * 4
        if not pixels or not frames or at + frames * (256 + pixels) > size:
            raise ValueError(
                f"its header promises {frames} B-scans of {rows} x {columns}, which the file of "
                f"{size} bytes does not hold"
            )
        for i in range(frames):
            file.seek(at)
            own = file.read(256)
            if len(own) == 256:
                (before,), (lines,) = (struct.unpack_from("<I", own, place) for place in (12, 48))
                at += before + pixels
            if len(own) < 256 or before < 256 + 4 * lines * columns or at > size:
                raise ValueError(f"it is cut short or damaged at its B-scan {i + 1} of {frames}")


def positive(numbers):
    """Numbers as floats; None unless all are above 0 and finite."""
    values = [float(number) for number in numbers]
    return values if all(0 < value < np.inf for value in values) else None


def read_e2e(path, choose, series_id=None):
    """Heidelberg's whole examination -> volume, facts. series_id: which of its volumes is meant,
    where it has several, as of two eyes."""
    eyepy_needed(path)
    check_e2e(path)
    try:
        return series_of_e2e(path, choose, series_id)
    except MemoryError:  # eyepy takes whatever a damaged header asks for
        raise ValueError("it asks for more memory than there is, as a damaged file does") from None


def series_of_e2e(path, choose, series_id):
    from eyepy.core.utils import intensity_transforms
    from eyepy.io.he import HeE2eReader

    with HeE2eReader(path) as reader:
        volumes = {str(series.id): in_order(series) for series in reader.series}
        volumes = {name: slices for name, slices in volumes.items() if len(slices) > 1}
        if series_id is None and len(volumes) == 1:
            (series_id,) = volumes
        if series_id not in volumes:
            raise ValueError(
                f"it holds {len(volumes)} volumes, the series {first_few(volumes)}; name one as "
                "its variable (data.variable)"
            )
        series = next(series for series in reader.series if str(series.id) == series_id)
        slices, notes = volumes[series_id], []
        wanted = list(choose(len(slices)))
        first = slices[0].get_meta()
        dicom.check_room(len(slices) * first["size_x"] * first["size_y"] * 4)

        def frames():
            for i in wanted:
                frame = np.array(slices[i].get_bscan(), np.float32)
                if frame.shape != (first["size_y"], first["size_x"]):
                    raise ValueError(
                        f"its B-scan {i + 1} is {frame.shape[0]} x {frame.shape[1]}, and the first "
                        f"{first['size_y']} x {first['size_x']}"
                    )
                yield intensity_transforms["e2e"](frame)

        volume = dicom.filled(len(slices), wanted, frames(), notes)
        facts = dicom.facts_of(volume.shape, "Heidelberg .e2e", **said_by(series))
    return volume, facts | {"notes": notes}


def in_order(series):
    """The slices of an .e2e's series that are B-scans of a volume, in the order of acquisition; []
    for circles and stars."""
    from eyepy.io.he.e2e_format import TypesEnum

    slices = [s for s in series.slices.values() if TypesEnum.bscanmeta in s.folders]
    slices = [s for s in slices if any(f.ind == 1 for f in s.folders.get(TypesEnum.image, []))]
    if any(s.get_meta()["scan_pattern"] in (2, 5) for s in slices):
        return []
    return sorted(slices, key=lambda s: (s.get_meta()["aktImage"], s.id))


def said_by(series):
    """What an .e2e says of a series."""
    from eyepy.io.he.e2e_format import TypesEnum

    patient = series.patient.folders.get(TypesEnum.patient) if series.patient else None
    side = series.folders.get(TypesEnum.laterality)
    return {
        "patient_id": patient[0].data.patient_id.strip("\0 ") if patient else None,
        "laterality": EYES.get(int(side[0].data.laterality)) if side else None,
    }


def check_e2e(path):
    """ValueError unless the directories of an .e2e, each of which begins behind the one before it
    and its data, are within the file: eyepy would go round in circles, or ask for any memory."""
    size, at = os.path.getsize(path), 36 + 52
    with open(path, "rb") as file:
        if file.read(21) == b"E2EMultipleVolumeFile":
            raise ValueError(
                "it is a container of several .e2e; export every examination by itself"
            )
        while at < size:
            file.seek(at)
            head = file.read(52)
            count = struct.unpack_from("<I", head, 36)[0] if len(head) == 52 else 0
            table = file.read(min(44 * count, size))
            if not head.startswith(b"MDbDir") or not count or len(table) < 44 * count:
                raise ValueError(f"it is damaged or cut short: at {at} it has no directory")
            end = at + 52 + 44 * count
            for _, start, length, *_, kind, _ in struct.iter_unpack("<11I", table):
                file.seek(start + 60)
                sizes = struct.unpack("<5I", file.read(20).ljust(20, b"\0"))
                pixels = sizes[3] * sizes[4] if kind == 0x40000000 else 0
                if start + length > size or pixels > size or (pixels and max(sizes[:3:2]) > size):
                    raise ValueError("it is cut short: some of its data are beyond its end")
            if not length:  # a directory that is not full is the last
                return
            if start + length + 60 < end:
                raise ValueError("it is damaged: one of its directories points back at itself")
            at = start + length + 60


# ------------------------------------------------------------------------------ Topcon


def read_fda(path, choose):
    """Topcon's file -> volume, facts. It is a list of named chunks; numbers are little-endian."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        chunks = chunks_of(view)
        facts = topcon_facts(chunks)
        if "@IMG_JPEG" in chunks:
            frames, rows, columns, frame = topcon_coded(chunks["@IMG_JPEG"])
        elif "@IMG_MOT_COMP_03" in chunks:
            frames, rows, columns, frame = topcon_raw(chunks["@IMG_MOT_COMP_03"])
        else:
            raise ValueError("it has neither @IMG_JPEG nor @IMG_MOT_COMP_03, so no OCT volume")
        wanted, notes = list(choose(frames)), []
        volume = dicom.filled(frames, wanted, map(frame, wanted), notes)
    size = facts.pop("size")
    if size:  # mm of the whole width and length, micrometres of a pixel's height
        facts["spacing"] = positive([size[2] / 1000, size[0] / columns])
        facts["thickness"] = (positive([size[1] / frames]) or [None])[0]
    return volume, dicom.facts_of(volume.shape, "Topcon .fda", **facts) | {"notes": notes}


def chunks_of(view):
    """{name: bytes} of an .fda. ValueError for one that is cut short."""
    at, found = 15, {}
    while at < len(view) and view[at]:
        name = view[at + 1 : at + 1 + view[at]]
        at += 1 + len(name)
        length = int.from_bytes(view[at : at + 4], "little")
        at += 4
        if at + length > len(view):
            raise ValueError(f"it is cut short, within its {name.decode('ascii', 'replace')}")
        found.setdefault(name.decode("ascii", "replace"), view[at : at + length])
        at += length
    return found


def topcon_coded(chunk):
    """@IMG_JPEG -> frames, rows, columns, and frame(i), which decodes one."""
    import imagecodecs

    columns, rows, frames = struct.unpack_from("<3I", chunk, 9)
    at, coded = 25, []
    while len(coded) < frames:
        (length,) = struct.unpack_from("<I", chunk, at)
        coded.append(chunk[at + 4 : at + 4 + length])
        if len(coded[-1]) < length or not length:
            raise ValueError(f"its @IMG_JPEG ends within B-scan {len(coded)} of {frames}")
        at += 4 + length
    dicom.check_room(frames * rows * columns)

    def frame(i):
        if dicom.size_in(coded[i]) != (rows, columns):
            raise ValueError(
                f"its B-scan {i + 1} is encoded as {dicom.size_in(coded[i])}, and the file says "
                f"{(rows, columns)}"
            )
        is_jpeg = coded[i].startswith(b"\xff\xd8")
        decode = imagecodecs.jpeg8_decode if is_jpeg else imagecodecs.jpeg2k_decode
        array = decode(coded[i])
        if array.shape != (rows, columns):
            raise ValueError(f"its B-scan {i + 1} has the shape {array.shape}, and OCT is grey")
        return array

    return frames, rows, columns, frame


def topcon_raw(chunk):
    """@IMG_MOT_COMP_03 -> frames, rows, columns, and frame(i)."""
    columns, rows, bits, frames = struct.unpack_from("<4I", chunk, 1)
    dicom.check_room(frames * rows * columns * 2)
    if bits != 16 or not frames * rows * columns or 22 + frames * rows * columns * 2 > len(chunk):
        raise ValueError(
            f"its @IMG_MOT_COMP_03 promises {frames} B-scans of {rows} x {columns} at {bits} bits, "
            "which it does not hold"
        )
    values = np.frombuffer(chunk, "<u2", frames * rows * columns, 22)
    return frames, rows, columns, values.reshape(frames, rows, columns).__getitem__


def topcon_facts(chunks):
    """What an .fda says of participant, scanner, eye and size; None for what it does not say."""
    text = lambda part: part.split(b"\0")[0].decode("ascii", "ignore").strip()
    first = lambda *names: next((chunks[name] for name in names if name in chunks), b"")
    eye = first("@CAPTURE_INFO_02", "@CAPTURE_INFO")[:1]
    size, scan = None, first("@PARAM_SCAN_04", "@PARAM_SCAN_02")
    at = 12 if "@PARAM_SCAN_04" in chunks else 21
    if len(scan) >= at + 24:
        size = positive(struct.unpack_from("<3d", scan, at))
    return {
        "patient_id": text(first("@PATIENT_INFO_02")[:32]),
        "scanner": text(first("@HW_INFO_03", "@HW_INFO_02", "@HW_INFO_01")[:16]),
        "laterality": EYES.get(eye[0]) if eye else None,
        "size": size,
    }


# ------------------------------------------------------------------------------ Zeiss


def read_img(path, choose):
    """Zeiss Cirrus's raw cube -> volume, facts. It has no header: the name says how many A-scans
    and B-scans there are, as in "..._Macular Cube 512x128_..._OD_sn1234_cube_z.img". Pixels are
    bytes; every B-scan is stored from its lower right corner on."""
    name = os.path.basename(path)
    cube, eye = re.search(r"([0-9]+)x([0-9]+)", name), re.search("_(OD|OS)_", name)
    size = os.path.getsize(path)
    columns, frames = (int(cube[1]), int(cube[2])) if cube else (0, 0)
    rows = size // (columns * frames or 1)
    if not cube or rows < 2 or rows * columns * frames != size:
        raise ValueError(
            f"an .img of Zeiss is read by the cube in its name, as 'Cube 512x128', and {name} does "
            f"not name one that {size} bytes can be; keep the name that the scanner gave it"
        )
    dicom.check_room(size)
    stored = np.memmap(path, np.uint8, "r", shape=(frames, rows, columns))
    wanted, notes = list(choose(frames)), []
    volume = dicom.filled(frames, wanted, (stored[i, ::-1, ::-1] for i in wanted), notes)
    said = re.match(r"(?:[0-9a-f]{32}-)?(P[0-9A-Za-z]+)_", name)  # b2.fetch puts a hash before it
    facts = dicom.facts_of(
        volume.shape,
        "Zeiss .img",
        patient_id=said and said[1],
        laterality=EYES.get(eye[1]) if eye else None,
    )
    return volume, facts | {"notes": notes}
