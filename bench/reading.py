"""Volumes on their way: from a file's bytes, or from a B2, to what an encoder takes.

    .venv/bin/python bench/reading.py decode
    .venv/bin/python bench/reading.py volumes --syntax RLELossless     # two minutes on two cores
    .venv/bin/python bench/reading.py stream
    .venv/bin/python bench/reading.py augment

decode: a synthetic Triton volume to (64, 384, 384) by volumes.py, against decoding all frames,
float32, z-score, trilinear resize, z-score; one thread, each way in processes of its own, in turn.
Required: 3.0 (uncompressed) and 1.7 (JPEG 2000) times faster, less than half the memory, the same
tensor to 1e-4.
volumes: from file to cached tensor at four scanners' real geometries, one thread; and decoding
against openjpeg alone on the same frames. Nothing is required.
stream: a B2 of our own on loopback, in its own process, and the real b2sdk.
augment: a volume on one core, in the demo against training its encoder on that volume with all
cores, and at full size against preprocessing a file, which happens only once.
"""

import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from measure import ROOT, apart, bench, check, header, peak_gb, require, row, timed

import b2
import config
import data
import device
import files
import ledger
import model
import phantom
import volumes

SIZE = (64, 384, 384)
GEOMETRY = {
    "Triton": (256, 992, 512),
    "Spectralis": (61, 496, 768),
    "Maestro2": (128, 885, 512),
    "Cirrus": (200, 1024, 200),
}
SYNTAXES = ("ExplicitVRLittleEndian", "JPEG2000Lossless")


def write_volume(path, scanner, syntax):
    """A phantom of a scanner's real geometry as a DICOM file. syntax: a name of pydicom.uid."""
    protocol = next(p for p in phantom.PROTOCOLS if p["model"] == scanner)
    eye = phantom.draw_eye(0, 0, "R", 60, 0, "boosted")
    volume = phantom.synthesize(eye, protocol, GEOMETRY[scanner], np.random.default_rng(0))
    syntax, uids = getattr(pydicom.uid, syntax), [pydicom.uid.generate_uid() for _ in range(3)]
    spacing, date = [0.02, 0.0026, 0.01], "2000-01-01"
    phantom.write_dicom(path, volume, spacing, syntax, "1001", protocol, "R", date, uids)


def plain(path):
    """What the pretraining did, word by word."""
    volume = torch.from_numpy(pydicom.dcmread(path).pixel_array.astype(np.float32))
    volume = (volume - volume.mean()) / volume.std(correction=0)
    volume = F.interpolate(volume[None, None], SIZE, mode="trilinear", align_corners=False)[0, 0]
    return (volume - volume.mean()) / volume.std(correction=0)


def ours(path):
    return volumes.preprocess(volumes.read_dicom(path, SIZE), SIZE)


def decode_alone(way, path):
    """-> median seconds of a call, and peak of memory in GB above what the imports took."""
    torch.set_num_threads(1)
    before, seconds = peak_gb(), []
    while sum(seconds) < 2:  # the first call of a quick way has imports to do
        seconds.append(timed(way, path)[0])
    return statistics.median(seconds), peak_gb() - before


def decode(args):
    header("256x992x512", "plain", "ours", "faster", "required", "memory", "required", "difference")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/volume.dcm"
        for syntax, required in zip(SYNTAXES, (3.0, 1.7)):
            write_volume(path, "Triton", syntax)
            difference = (plain(path) - ours(path)).abs().max().item()
            rounds = [[apart(decode_alone, way, path)[0] for way in (plain, ours)] for _ in "123"]
            (a, memory_a), (b, memory_b) = np.median(rounds, axis=0)
            times = f"{a:.2f} s", f"{b:.2f} s", f"{a / b:.1f}x", f"{required}x"
            memory = f"{memory_b:.2f} of {memory_a:.2f} GB, {memory_b / memory_a:.0%}", "below 50 %"
            row(syntax, *times, *memory, f"{difference:.1e}")
            require(f"{syntax}: speed", a / b >= required)
            require(f"{syntax}: memory", memory_b < memory_a / 2)
            require(f"{syntax}: same tensor", difference < 1e-4)


def openjpeg_alone(path, wanted):
    """Seconds of the wanted frames without pydicom around them; NaN of another syntax."""
    import openjpeg

    ds = pydicom.dcmread(path)
    if ds.file_meta.TransferSyntaxUID != pydicom.uid.JPEG2000Lossless:
        return np.nan
    frames = pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=ds.NumberOfFrames)
    frames = [frame for i, frame in enumerate(frames) if i in wanted]
    return timed(lambda: [openjpeg.decode_pixel_data(frame, version=2) for frame in frames])[0]


def cached_tensor(path, folder, shape):
    """-> seconds from file to cached tensor, of its decoding, of openjpeg alone."""
    make = lambda: files.save_array(f"{folder}/kept.npy", volumes.decode_volume(path, SIZE))
    low, high, _ = volumes.taps(shape[0], SIZE[0])
    bare = openjpeg_alone(path, {*low.tolist(), *high.tolist()})
    return timed(make)[0], timed(volumes.read_dicom, path, SIZE)[0], bare


def by_scanner(args):
    torch.set_num_threads(1)
    header("DICOM to cached tensor", "file", "time", "of it decoding", "decoding against openjpeg")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/volume.dcm"
        for syntax in args.syntax:
            for scanner, shape in GEOMETRY.items():
                write_volume(path, scanner, syntax)
                rounds = [cached_tensor(path, folder, shape) for _ in range(args.times)]
                whole, decoding, bare = np.median(rounds, axis=0)
                name = f"{scanner} {'x'.join(map(str, shape))} {syntax}"
                cells = f"{os.path.getsize(path) / 1e6:.0f} MB", f"{whole:.2f} s"
                against = "-" if np.isnan(bare) else f"{decoding / bare:.1f}x"
                row(name, *cells, f"{decoding / whole:.0%}", against)


def serve(folder, rate, pipe):
    """A B2 of the files of folder; answers with the number of requests so far."""
    sys.path.insert(0, os.path.join(ROOT, "tests"))
    from b2_server import B2Server, Fault

    with B2Server(folder) as server:
        server.fault = lambda kind, *_: Fault(rate=rate) if kind == "download" and rate else None
        pipe.send((server.url, server.key_id, server.key))
        while pipe.recv():
            pipe.send(len(server.requests))


@contextlib.contextmanager
def store(folder, rate=0):
    """serve() in a process of its own, and the environment that b2.py needs for it -> a function
    that says how many requests there were."""
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, rate, other))
    process.start()
    names = "B2_REALM", "B2_APPLICATION_KEY_ID", "B2_APPLICATION_KEY"
    os.environ.update(zip(names, pipe.recv()))
    b2.renew()
    yield lambda: (pipe.send(True), pipe.recv())[1]
    pipe.send(False)
    process.join()


def connections(folder, number=16, size=50_000_000, rate=20e6):
    """How many times a single stream's rate `number` objects at once come, where each connection
    is throttled to `rate` bytes a second."""
    os.makedirs(f"{folder}/objects")
    for i in range(number):
        files.write(f"{folder}/objects/{i}", os.urandom(size))
    with store(f"{folder}/objects", rate), ThreadPoolExecutor(number) as pool:
        found = list(b2.find_all([f"b2://bucket/{i}" for i in range(number)]).values())
        one, _ = timed(b2.fetch, found[0], f"{folder}/one")
        fetch_all = lambda: list(pool.map(lambda source: b2.fetch(source, f"{folder}/many"), found))
        return number * one / timed(fetch_all)[0]


def epochs(folder):
    """-> number of volumes; growth of memory in windows of 8 volumes, from the first tenth of an
    epoch (the window was full twice by then) to its end; requests of a second epoch."""
    phantom.write_dataset(f"{folder}/data", participants=90, scale=(1 / 8, 1 / 8, 1 / 8))
    overrides = ["paths.data=b2://bucket", f"paths.cache_dir={folder}/cache"]
    overrides += ["data.num_workers=0", "data.prefetch=8"]
    with store(f"{folder}/data") as requests:
        cfg = config.load("configs/demo.yaml", overrides)
        book, peaks = ledger.read(cfg), []
        kept = data.Volumes(book.samples, (64, 192, 192), cfg.paths.cache_dir)
        order = range(len(book.samples))
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak of memory begins anew
        for _, _, volume in data.stream(kept, book, order, cfg):
            peaks.append(peak_gb())
            window = 8 * volume.nbytes / 1e9
        before = requests()
        for _ in data.stream(kept, book, order, cfg):
            pass
        growth = (peaks[-1] - peaks[len(order) // 10]) / window
        return len(order), growth, requests() - before


def stream(args):
    b2.ENV_FILE = os.devnull
    header("streaming", "measured", "required")
    with tempfile.TemporaryDirectory() as folder:
        ratio = connections(folder)
    what = "16 objects of 50 MB at 20 MB/s a connection, against one after the other"
    check(what, f"{ratio:.1f}x faster", "at least 7x", ratio >= 7)
    with tempfile.TemporaryDirectory() as folder:
        count, growth, requests = epochs(folder)
    what = f"growth of memory while {count} volumes pass a window of 8"
    check(what, f"{growth:.1f} windows", "at most 2", growth <= 2)
    check("requests of a second epoch", requests, 0, requests == 0)


def mean_seconds(job, times):
    """Of job(1), job(2), ..., after a first call."""
    job(0)
    return statistics.mean(timed(job, i)[0] for i in range(1, times + 1))


def augment(args):
    threads, encoder = torch.get_num_threads(), model.ViT3D(128, 4, 144).train()
    encoder.checkpoint = device.checkpointing(torch.device("cpu"))
    volume, full = torch.randn(1, 16, 96, 96).half(), torch.randn(1, *SIZE).half()
    train = lambda _: encoder(volume[None].float()).square().mean().backward()
    training = mean_seconds(train, 30)
    torch.set_num_threads(1)
    ratio = mean_seconds(lambda i: data.augment(volume, data.USUAL, str(i)), 30) / training
    header("augmenting a volume on 1 core", "share of the time", "required")
    what = f"demo, against training the encoder on {threads} cores"
    check(what, f"{ratio:.2f}", "at most 1", ratio <= 1)
    scan = np.random.default_rng(0).integers(0, 255, GEOMETRY["Triton"], np.uint8)
    ratio = mean_seconds(lambda i: data.augment(full, data.USUAL, str(i)), 3)
    ratio /= mean_seconds(lambda _: volumes.preprocess(scan, SIZE), 2)
    row("64x384x384, against preprocessing 256x992x512 on 1", f"{ratio:.2f}", "-")


if __name__ == "__main__":
    parts = {"decode": decode, "volumes": by_scanner, "stream": stream, "augment": augment}
    syntax = dict(nargs="+", default=SYNTAXES, help="of volumes: names of pydicom.uid")
    times = dict(type=int, default=3, help="of volumes: rounds, whose medians count")
    bench(__doc__, parts, {"--syntax": syntax, "--times": times})
