"""DICOM to tensor: what data.py does against decoding all frames, float32, z-score, trilinear resize, z-score.

    .venv/bin/python bench/decode.py

A synthetic Triton volume of 256x992x512, uncompressed and JPEG 2000, to (64, 384, 384), on one thread. Each way runs in a
process of its own, for its peak memory; the ways take turns, and the median counts. Exits 1 when a requirement is not met.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

import data
import phantom

SIZE = (64, 384, 384)
REQUIRED = {"uncompressed": 3.0, "JPEG 2000": 1.7}


def plain(path):
    """What the pretraining did, word by word."""
    volume = torch.from_numpy(pydicom.dcmread(path).pixel_array.astype(np.float32))
    volume = (volume - volume.mean()) / volume.std(correction=0)
    volume = F.interpolate(volume[None, None], SIZE, mode="trilinear", align_corners=False)[0, 0]
    return (volume - volume.mean()) / volume.std(correction=0)


def ours(path):
    return data.preprocess(data.read_dicom(path, SIZE), SIZE)


def peak():
    """MB at most so far in this process; ru_maxrss would count its parent's too."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1000 for line in f if line.startswith("VmHWM"))


def measure(way, path, pipe):
    """Median seconds of a call, and peak of memory above what the imports took."""
    torch.set_num_threads(1)
    before = peak()
    seconds = []
    while sum(seconds) < 2:  # the first call of a quick way has imports to do
        began = time.perf_counter()
        way(path)
        seconds.append(time.perf_counter() - began)
    pipe.send((statistics.median(seconds), peak() - before))


def run(way, path):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(way, path, there))
    process.start()
    result = here.recv()
    process.join()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    protocol = next(p for p in phantom.PROTOCOLS if p["shape"] == (256, 992, 512))
    volume = phantom.synthesize(phantom.draw_eye(0, 0, "R", 60, 0, "boosted"), protocol, protocol["shape"], np.random.default_rng(0))
    missed = []
    print(f"{'256x992x512 -> 64x384x384':<28}{'plain':>8}{'ours':>8}{'faster':>9}{'required':>10}   "
          f"{'memory plain':>12}{'ours':>9}{'share':>8}{'required':>10}{'largest difference':>21}")
    with tempfile.TemporaryDirectory() as folder:
        for name, syntax in (("uncompressed", ExplicitVRLittleEndian), ("JPEG 2000", JPEG2000Lossless)):
            path = os.path.join(folder, f"{name}.dcm")
            phantom.write_dicom(path, volume, [0.02, 0.0026, 0.01], syntax, "1001", protocol, "R", "2000-01-01",
                                [pydicom.uid.generate_uid() for _ in range(3)])
            difference = (plain(path) - ours(path)).abs().max().item()
            rounds = [(run(plain, path), run(ours, path)) for _ in range(3)]
            (a, memory_a), (b, memory_b) = ([statistics.median(values) for values in zip(*way)] for way in zip(*rounds))
            print(f"{name:<28}{a:>7.2f}s{b:>7.2f}s{a / b:>8.1f}x{REQUIRED[name]:>9.1f}x   "
                  f"{memory_a:>9.0f} MB{memory_b:>6.0f} MB{memory_b / memory_a:>8.0%}{'below 50%':>10}{difference:>21.1e}", flush=True)
            missed += [f"{name}: {what}" for what, is_met in (
                ("speed", a / b >= REQUIRED[name]), ("memory", memory_b < memory_a / 2), ("same tensor", difference < 1e-4)) if not is_met]
    sys.exit(f"not met: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
