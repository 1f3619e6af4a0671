"""A file or folder -> one checked OCT volume, preprocessed as at the encoder's pretraining.

    volume = read_volume("a.nii.gz")                  # (frames, rows, columns), of any format
    tensor = preprocess(volume, (64, 384, 384))       # (D, H, W) float32
    array = decode_volume("a.dcm", (64, 384, 384))    # both, as float16; or Unreadable

formats.py says which formats there are, and what axes and variable mean. Only the frames that the
resize to D slices reads are decoded.
"""

import base64
import errno
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F

import dicom
import formats

# part of every cache key, and so of the random numbers of augmentation: change it when the result
# of preprocess() changes
PREPROCESSING = "zscore-trilinear-float16-v1"
# in the facts of every volume: change it when the result of read() changes for some files, and what
# was cached before is made anew
READING = "v3"


class Unreadable(ValueError):
    """A volume that is in the store and cannot be read."""


# ----------------------------------------------------------------------------------------- reading


def read_volume(path, size=None, axes=None, variable=None):
    """File or folder of any format -> array (frames, rows, columns), as formats.read gives it.

    size (D, H, W): read only the frames that preprocess(..., size) reads, where that is cheaper;
    the others stay zero. Unreadable, a ValueError that names the file, when it is no volume of grey
    values, or not whole, or needs a package that is not installed.
    """
    return read(path, size, axes, variable)[0]


def read_dicom(path_or_file, size=None):
    """Multi-frame DICOM -> array (frames, rows, columns), as dicom.read gives it.

    size (D, H, W): decode only the frames that preprocess(..., size) reads; the others stay zero
    and cost neither time nor memory. Unreadable, a ValueError that names the file, when it is no
    structural OCT, or has no pixels, or not all of them, or they cannot be decoded.
    """
    return checked(dicom.read, path_or_file, size)[0]


def read(path_or_file, size=None, axes=None, variable=None):
    """As read_volume, and besides what the file says of itself: dicom.description, with notes. A
    file that is open already is taken for DICOM."""
    if not isinstance(path_or_file, (str, os.PathLike)):
        return checked(dicom.read, path_or_file, size)
    return checked(formats.read, path_or_file, size, axes, variable)


def checked(reader, path_or_file, size, *options):
    """reader's volume and facts. Unreadable, naming the file, for whatever is wrong with that."""
    is_path = isinstance(path_or_file, (str, os.PathLike))
    name = path_or_file if is_path else getattr(path_or_file, "name", "the file")
    try:
        return reader(path_or_file, lambda frames: wanted(frames, size), *options)
    except MemoryError:
        raise
    except Exception as error:  # the readers raise dozens of types for a damaged file
        # an error of the disk or the process is not the file's; EINVAL comes from an absurd offset
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = " ".join(str(error).split())[:500]  # zipfile quotes what it has read
        raise Unreadable(f"{name} is not a readable OCT volume: {reason}") from error


def wanted(frames, size=None):
    """The frames that preprocess(..., size) reads, in ascending order; all of them without size."""
    return np.unique(taps(frames, size[0])[:2]).tolist() if size else range(frames)


def check_contrast(path, volume, size):
    """Unreadable for a volume that shows nothing: where 99 % of the pixels that are read have fewer
    than 4 different values, or differ by a millionth."""
    some = wanted(len(volume), size)
    sample = np.sort(volume[some[:: 1 + len(some) // 16], ::5, ::5], axis=None)
    trim = len(sample) // 200
    central = sample[trim : len(sample) - trim]
    low, high = (float(value) for value in (central[0], central[-1]))
    if len(np.unique(central)) < 4 or high - low <= 1e-6 * max(abs(low), abs(high)):
        raise Unreadable(
            f"{path} shows nothing: 99 % of its pixels are from {low:g} to {high:g}, all alike or "
            "with fewer than 4 different values"
        )


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
    origin = origin_of(volume, size)

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


def origin_of(volume, size):
    """The value that resize() takes off, so that a constant volume is exactly zero, without
    rounding; the z-score cancels it."""
    low, _, _ = taps(len(volume), size[0])
    return np.float32(volume[low[0], 0, 0])


def normalise(out):
    """Z-score of a CPU tensor, in place."""
    z_score(out)
    return out


def z_score(out):
    """`normalise` -> the mean and the SD that the tensor had."""
    # numpy, not torch: a sum in torch depends on the number of threads, and a volume must not
    values = out.numpy()
    mean = np.float32(values.mean(dtype=np.float64))
    values -= mean
    std = np.float32(np.sqrt(np.square(values).mean(dtype=np.float64)))
    out.zero_() if std == 0 else out.div_(float(std) if np.isfinite(std) else float("nan"))
    return float(mean), float(std)


def decode_volume(path, size, axes=None, variable=None):
    """File or folder -> preprocessed volume (D, H, W), float16. Unreadable, naming the file."""
    return decode(path, size, axes, variable)[0]


def decode(path, size, axes=None, variable=None):
    """As decode_volume, and besides the file's facts, with two of the preprocessed volume: the hash
    of its pixels, and a sketch of it."""
    volume, facts = read(path, size, axes, variable)
    if len(volume) == 1:
        raise Unreadable(f"{path} has a single frame; that is no volume")
    tensor = resize(volume, size)
    mean, sd = z_score(tensor)  # both as preprocess() does
    if not torch.isfinite(tensor[0, 0, 0]):  # for a single value makes them all NaN
        raise Unreadable(f"{path} has values that are not finite")
    check_contrast(path, volume, size)
    array = tensor.numpy().astype(np.float16)
    facts |= {"reading": READING, "pixels": hashlib.sha1(array).hexdigest()}
    # of the resized volume, in the file's own intensities
    facts |= {"mean": mean + float(origin_of(volume, size)), "sd": sd}
    return array, facts | {"sketch": sketch(array)}


def sketch(array):
    """Z-scored volume (D, H, W) -> 1,024 of its lateral differences, at places that its size
    decides, in sixteenths of an SD as signed bytes in base64. The layers, which all eyes share,
    cancel in a difference along W. Its speckle and vessels remain, and another scan has others."""
    depth, height, width = array.shape
    random, step = np.random.default_rng(0), width // 8
    d, h, w = (random.integers(n, size=1024) for n in (depth, height, width - step))
    difference = array[d, h, w + step].astype(np.float32) - array[d, h, w]
    values = np.clip(np.rint(16 * difference), -127, 127).astype(np.int8)
    return base64.b64encode(values).decode()
