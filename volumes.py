"""A DICOM file -> one checked OCT volume, preprocessed as at the encoder's pretraining.

    volume = read_dicom("a.dcm")                      # (frames, rows, columns)
    tensor = preprocess(volume, (64, 384, 384))       # (D, H, W) float32
    array = decode_volume("a.dcm", (64, 384, 384))    # both, as float16; or Unreadable

Only the frames that the resize to D slices reads are decoded.
"""

import errno
import os

import numpy as np
import torch
import torch.nn.functional as F

# part of every cache key: change it when the result of preprocess() changes
PREPROCESSING = "zscore-trilinear-float16-v1"


class Unreadable(ValueError):
    """A volume that is in the store and cannot be read."""


# ------------------------------------------------------------------------------------------- DICOM


def read_dicom(path_or_file, size=None):
    """Multi-frame DICOM -> array (frames, rows, columns), rescaled where the file asks for it.

    size (D, H, W): decode only the frames that preprocess(..., size) reads; the others stay zero
    and cost neither time nor memory. Unreadable, a ValueError that names the file, when there are
    no pixels, or not all of them, or they cannot be decoded.
    """
    import pydicom
    from pydicom.pixels import iter_pixels

    import jpeg  # noqa: F401  (it tells pydicom how to decode JPEG)

    is_path = isinstance(path_or_file, (str, os.PathLike))
    name = path_or_file if is_path else getattr(path_or_file, "name", "the file")
    try:
        ds = pydicom.dcmread(path_or_file)
        if not ds.get("PixelData"):
            raise ValueError("no pixel data; the file is truncated or never had any")
        if ds.get("SamplesPerPixel", 1) != 1:
            raise ValueError(f"{ds.SamplesPerPixel} samples a pixel; OCT has 1")
        frames = int(ds.get("NumberOfFrames") or 1)
        stored = stored_frames(ds, frames)
        if stored != frames:
            raise ValueError(
                f"NumberOfFrames is {frames}, but the pixel data holds {stored} frames"
            )
        wanted = range(frames)
        if size is not None:
            low, high, _ = taps(frames, size[0])
            wanted = np.unique([low, high]).tolist()
        rescales = [rescale(ds, index) for index in wanted]
        is_rescaled = any(pair != (1, 0) for pair in rescales)
        volume = None
        decoded = iter_pixels(ds, indices=wanted, raw=True)
        for index, (slope, intercept), frame in zip(wanted, rescales, decoded, strict=True):
            if is_rescaled:
                frame = frame.astype(np.float32) * slope + intercept
            if volume is None:
                volume = np.zeros((frames, *frame.shape), frame.dtype)
            volume[index] = frame
    except MemoryError:
        raise
    except Exception as error:  # pydicom and the decoders raise a dozen types for a damaged file
        # an error of the disk or the process is not the file's; EINVAL comes from an absurd offset
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = " ".join(str(error).split())
        raise Unreadable(f"{name} is not a readable OCT volume: {reason}") from error
    return volume


def stored_frames(ds, frames):
    """How many frames the pixel data of a data set holds, whatever its NumberOfFrames says.

    frames: what NumberOfFrames says; where several fragments make a frame, it tells them apart.
    """
    from pydicom.encaps import generate_fragmented_frames

    if not ds.file_meta.TransferSyntaxUID.is_encapsulated:
        return len(ds.PixelData) * 8 // (ds.Rows * ds.Columns * ds.BitsAllocated)
    if "ExtendedOffsetTable" in ds:
        return len(ds.ExtendedOffsetTable) // 8
    return sum(1 for _ in generate_fragmented_frames(ds.PixelData, number_of_frames=frames))


def rescale(ds, index):
    """Rescale slope and intercept of frame `index`: from its own functional group, the shared one,
    or the data set; 1 and 0 where none has them."""
    own = (ds.get("PerFrameFunctionalGroupsSequence") or [])[index : index + 1]
    shared = (ds.get("SharedFunctionalGroupsSequence") or [])[:1]
    sources = [ds]
    for group in [*shared, *own]:
        sources += group.get("PixelValueTransformationSequence") or []
    slope, intercept = sources[-1].get("RescaleSlope"), sources[-1].get("RescaleIntercept")
    return np.float32(slope or 1), np.float32(intercept or 0)


# ----------------------------------------------------------------------------------- preprocessing


def taps(frames, depth):
    """Linear resize (align_corners=False) of `frames` frames to `depth` slices -> three arrays
    (depth,): the two frames that each slice reads, and the weight of the second."""
    source = np.clip((np.arange(depth) + 0.5) * frames / depth - 0.5, 0, None)
    low = np.minimum(source.astype(np.int64), frames - 1)
    weight = source - low
    high = np.where(weight > 0, np.minimum(low + 1, frames - 1), low)
    return low, high, weight.astype(np.float32)


def preprocess(volume, size):
    """Volume (frames, rows, columns), integer or float -> float32 tensor (D, H, W), as at
    pretraining. ValueError when volume or size is not of that form.

    Pretraining: z-score, trilinear resize (align_corners=False, no anti-aliasing), z-score. The
    resize is linear with weights that add up to 1, so the first z-score cancels in the second and
    is left out. A constant volume gives zeros, one with a value that is not finite gives NaN.
    """
    return normalise(resize(volume, size))


def resize(volume, size):
    """Volume (frames, rows, columns) -> float32 tensor (D, H, W): trilinear, less a constant that
    does not matter to normalise."""
    volume, (depth, height, width) = np.asarray(volume), size
    if volume.ndim != 3 or volume.size == 0 or min(size) < 1:
        raise ValueError(
            "a volume is (frames, rows, columns) and its size (D, H, W), all above 0; "
            f"these are {volume.shape} and {tuple(size)}"
        )
    low, high, weight = taps(len(volume), depth)
    # subtracted so that a constant volume is exactly zero, without rounding; it cancels too
    origin = np.float32(volume[low[0], 0, 0])

    def frame(i):
        return torch.from_numpy(volume[i].astype(np.float32) - origin)

    out = torch.empty(depth, height, width)
    for d in range(depth):
        plane = frame(low[d])  # (rows, columns)
        if weight[d] > 0:
            plane = torch.lerp(plane, frame(high[d]), float(weight[d]))
        plane = plane[None, None]  # (1, 1, rows, columns)
        out[d] = F.interpolate(plane, (height, width), mode="bilinear", align_corners=False)[0, 0]
    return out


def normalise(out):
    """Z-score of a CPU tensor, in place."""
    # numpy, not torch: a sum in torch depends on the number of threads, and a volume must not
    values = out.numpy()
    values -= np.float32(values.mean(dtype=np.float64))
    std = np.float32(np.sqrt(np.square(values).mean(dtype=np.float64)))
    return out.zero_() if std == 0 else out.div_(float(std) if np.isfinite(std) else float("nan"))


def decode_volume(path, size):
    """DICOM file -> preprocessed volume (D, H, W), float16. Unreadable, naming the file."""
    volume = read_dicom(path, size)
    if len(volume) == 1:
        raise Unreadable(f"{path} has a single frame; that is no volume")
    tensor = preprocess(volume, size)
    if not torch.isfinite(tensor).all():
        raise Unreadable(f"{path} has values that are not finite")
    return tensor.numpy().astype(np.float16)
