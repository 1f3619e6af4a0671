"""Volumes at real geometry: bytes of a DICOM file -> cached tensor, time by stage, beside what the machine can do.

    .venv/bin/python bench/volumes.py                        # two minutes on two cores
    .venv/bin/python bench/volumes.py --syntax RLELossless

Synthetic volumes of Triton 256x992x512, Spectralis 61x496x768, Maestro2 128x885x512 and Cirrus 200x1024x200, uncompressed and
JPEG 2000, to (64, 384, 384) on one thread. The stages are those of data.decode_volume and data.save_array: read the file, decode
the frames that the resize needs, resize, normalise, write (round to float16, checksum, file). Limits, measured in the same run:
bare decoder, that is openjpeg on the same frames, or for uncompressed files a copy of their pixels; copying memory, against which
the resize and the normalisation stand with the bytes that they must read and write at least. "In one go" is
what the product calls, beside the sum of the stages. Medians of --times rounds. Nothing is required.
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import pydicom  # noqa: E402
import torch  # noqa: E402
from pydicom.pixels import iter_pixels  # noqa: E402

import data  # noqa: E402
import phantom  # noqa: E402

SIZE = (64, 384, 384)
GEOMETRY = {"Triton": (256, 992, 512), "Spectralis": (61, 496, 768), "Maestro2": (128, 885, 512), "Cirrus": (200, 1024, 200)}
STAGES = ("read", "decode", "resize", "normalise", "write")


def write_volume(path, model, shape, syntax):
    """A phantom of `shape` by a scanner's protocol, as a DICOM file."""
    protocol = next(p for p in phantom.PROTOCOLS if p["model"] == model)
    volume = phantom.synthesize(phantom.draw_eye(0, 0, "R", 60, 0, "boosted"), protocol, shape, np.random.default_rng(0))
    phantom.write_dicom(path, volume, [0.02, 0.0026, 0.01], syntax, "1001", protocol, "R", "2000-01-01",
                        [pydicom.uid.generate_uid() for _ in range(3)])


def copy_rate():
    """Bytes/s, read and written, of copying 256 MB."""
    a = np.zeros(1 << 28, np.uint8)
    b = np.ones_like(a)
    best = min(timed(np.copyto, b, a)[0] for _ in range(5))
    return 2 * a.nbytes / best


def timed(call, *args):
    began = time.perf_counter()
    out = call(*args)
    return time.perf_counter() - began, out


def bare_decoder(content, wanted):
    """The frames as the library gives them, without pydicom around it; of an uncompressed file a copy of their bytes."""
    ds = pydicom.dcmread(io.BytesIO(content))
    if ds.file_meta.TransferSyntaxUID == pydicom.uid.JPEG2000Lossless:
        import openjpeg

        frames = list(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=ds.NumberOfFrames))
        return timed(lambda: [openjpeg.decode_pixel_data(frames[i], version=2) for i in wanted])[0]
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        return timed(lambda: list(iter_pixels(ds, indices=wanted, raw=True)))[0]
    size = ds.Rows * ds.Columns
    view = np.frombuffer(ds.PixelData, np.uint8)[:size * ds.NumberOfFrames].reshape(-1, size)
    out = np.empty((len(wanted), size), np.uint8)
    out[:] = 0
    return timed(lambda: np.take(view, wanted, axis=0, out=out))[0]


def once(path, folder):
    """-> {stage: seconds}, seconds of the same in one go, volume's bytes that are needed, seconds of the bare decoder."""
    spent = {}

    def content_of(path):
        with open(path, "rb") as f:
            return f.read()

    spent["read"], content = timed(content_of, path)
    spent["decode"], volume = timed(data.read_dicom, io.BytesIO(content), SIZE)
    spent["resize"], small = timed(data.resize, volume, SIZE)
    spent["normalise"], tensor = timed(data.normalise, small)
    spent["write"], _ = timed(lambda: data.save_array(f"{folder}/kept.npy", tensor.numpy().astype(np.float16)))
    whole, _ = timed(lambda: data.save_array(f"{folder}/kept.npy", data.decode_volume(path, SIZE)))
    low, high, _ = data.taps(len(volume), SIZE[0])
    wanted = sorted({*low.tolist(), *high.tolist()})
    return spent, whole, len(wanted) * volume[0].nbytes, bare_decoder(content, wanted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syntax", nargs="+", default=("ExplicitVRLittleEndian", "JPEG2000Lossless"), help="names of pydicom.uid")
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    copy = copy_rate()
    print(f"copying memory: {copy / 1e9:.1f} GB/s, read and written; one thread; times in seconds")
    print(f"{'':<36}{'file':>8}" + "".join(f"{stage:>11}" for stage in STAGES)
          + f"{'sum':>8}{'in one go':>11}{'bare decoder':>14}{'decode / it':>13}{'resize':>10}{'normalise':>11}")
    output = 4 * SIZE[0] * SIZE[1] * SIZE[2]
    with tempfile.TemporaryDirectory() as folder:
        for syntax in args.syntax:
            for name, shape in GEOMETRY.items():
                path = f"{folder}/{name}.dcm"
                write_volume(path, name, shape, getattr(pydicom.uid, syntax))
                rounds = [once(path, folder) for _ in range(args.times)]
                spent = {stage: statistics.median(r[0][stage] for r in rounds) for stage in STAGES}
                whole, bare, needed = statistics.median(r[1] for r in rounds), statistics.median(r[3] for r in rounds), rounds[0][2]
                total = sum(spent.values())
                least = {"resize": (needed + output) / copy, "normalise": 2 * output / copy}
                print(f"{name + ' ' + 'x'.join(map(str, shape)) + ' ' + syntax[:12]:<36}{os.path.getsize(path) / 1e6:>5.0f} MB"
                      + "".join(f"{spent[stage]:>11.3f}" for stage in STAGES)
                      + f"{total:>8.2f}{whole:>11.2f}{bare:>14.3f}{spent['decode'] / bare:>12.1f}x"
                      + "".join(f"{least[stage] / spent[stage]:>{width}.0%}" for stage, width in (("resize", 10), ("normalise", 11))),
                      flush=True)
    print("(last two columns: share of the rate of copying memory, for the bytes that the stage must read and write at least)")


if __name__ == "__main__":
    main()
