"""Volumes on their way: from a file's bytes, or from a B2, to what an encoder takes.

    .venv/bin/python bench/reading.py decode
    .venv/bin/python bench/reading.py volumes --syntaxes RLELossless     # two minutes on two cores
    .venv/bin/python bench/reading.py stream
    .venv/bin/python bench/reading.py augment
    .venv/bin/python bench/reading.py copies

decode: a synthetic Triton volume to (64, 384, 384) by volumes.py, against decoding all frames,
float32, z-score, trilinear resize, z-score; one thread, each way in processes of its own, in turn.
volumes: from file to cached tensor at four scanners' real geometries, one thread; decoding as a
share of that, and against openjpeg alone on the same frames.
stream: a B2 of our own on loopback, and the real b2sdk in another process.
augment: a volume on one core, in the demo against training its encoder on that volume with all
cores, and at full size against preprocessing a file, which happens only once.
copies: correlations of the sketches of two scans, and of two copies of one scan
(facts.near_copies).
"""

import base64
import contextlib
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pydicom
import torch
import torch.nn.functional as F
from measure import apart, bench, figure, peak_gb, row, timed

import b2
import config
import data
import device
import facts
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


def decode():
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/volume.dcm"
        for syntax, required in zip(SYNTAXES, (3.0, 1.7)):
            write_volume(path, "Triton", syntax)
            difference = (plain(path) - ours(path)).abs().max().item()
            rounds = [[apart(decode_alone, way, path)[0] for way in (plain, ours)] for _ in "123"]
            (a, memory_a), (b, memory_b) = np.median(rounds, axis=0)
            figure(f"{syntax}: times faster than the plain way", a / b, at_least=required)
            figure(f"{syntax}: share of its {memory_a:.2f} GB", memory_b / memory_a, at_most=0.5)
            figure(f"{syntax}: largest difference", difference, at_most=1e-4)


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


def by_scanner(syntaxes=SYNTAXES, times=3):
    torch.set_num_threads(1)
    row("DICOM to cached tensor", "MB", "seconds", "of it decoding", "decoding against openjpeg")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/volume.dcm"
        for syntax in syntaxes:
            for scanner, shape in GEOMETRY.items():
                write_volume(path, scanner, syntax)
                rounds = [cached_tensor(path, folder, shape) for _ in range(times)]
                whole, decoding, bare = np.median(rounds, axis=0)
                name = f"{scanner} {'x'.join(map(str, shape))} {syntax}"
                shares = f"{decoding / whole:.0%}", f"{decoding / bare:.2f}"
                row(name, f"{os.path.getsize(path) / 1e6:.0f}", f"{whole:.2f}", *shares)


@contextlib.contextmanager
def store(folder, rate=None):
    """A B2 of the files of folder, and the environment that b2.py needs for it in a new process ->
    when it was asked for something. Each connection is throttled to `rate` bytes a second."""
    from b2_server import B2Server, Fault

    asked = []

    def fault(kind, *_):
        asked.append(time.monotonic())
        return Fault(rate=rate) if rate and kind == "download" else None

    with B2Server(folder) as server:
        server.fault = fault
        names = "B2_REALM", "B2_APPLICATION_KEY_ID", "B2_APPLICATION_KEY"
        os.environ.update(zip(names, (server.url, server.key_id, server.key)))
        yield asked


def fetch(folder, number):
    """How many times a single stream's rate `number` objects at once come."""
    b2.ENV_FILE = os.devnull
    found = list(b2.find_all([f"b2://bucket/{i}" for i in range(number)]).values())
    one, _ = timed(b2.fetch, found[0], f"{folder}/one")
    with ThreadPoolExecutor(number) as pool:
        fetch_all = lambda: list(pool.map(lambda source: b2.fetch(source, f"{folder}/many"), found))
        return number * one / timed(fetch_all)[0]


def two_epochs(folder):
    """-> number of volumes; growth of memory in windows of 8 volumes, from the first tenth of an
    epoch (the window was full twice by then) to its end; when a second epoch began and ended."""
    b2.ENV_FILE = os.devnull
    overrides = f"""paths.data=b2://bucket paths.cache_dir={folder}/cache data.num_workers=0
        data.prefetch=8""".split()
    cfg = config.load("configs/demo.yaml", overrides)
    book, peaks = ledger.read(cfg), []
    kept = data.Volumes(book.samples, (64, 192, 192), cfg.paths.cache_dir)
    order = range(len(book.samples))
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak of memory begins anew
    for _, _, volume in data.stream(kept, book, order, cfg):
        window = 8 * volume.nbytes / 1e9
        peaks.append(peak_gb())
    began = time.monotonic()
    for _ in data.stream(kept, book, order, cfg):
        pass
    growth = (peaks[-1] - peaks[len(order) // 10]) / window
    return len(order), growth, began, time.monotonic()


def stream():
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/objects")
        for i in range(16):
            files.write(f"{folder}/objects/{i}", os.urandom(50_000_000))
        with store(f"{folder}/objects", rate=20e6):
            [ratio] = apart(fetch, folder, 16)
    figure(
        "16 objects of 50 MB at 20 MB/s a connection: times one stream's rate", ratio, at_least=7
    )
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_dataset(f"{folder}/data", participants=90, scale=(1 / 8, 1 / 8, 1 / 8))
        with store(f"{folder}/data") as asked:
            [(count, growth, began, ended)] = apart(two_epochs, folder)
    figure(f"growth of memory over {count} volumes, in windows of 8", growth, at_most=2)
    figure("requests of a second epoch", sum(began < at < ended for at in asked), at_most=0)


def mean_seconds(job, times):
    """Of job(1), job(2), ..., after a first call."""
    job(0)
    return statistics.mean(timed(job, i)[0] for i in range(1, times + 1))


def augment():
    threads, encoder = torch.get_num_threads(), model.ViT3D(128, 4, 144).train()
    encoder.checkpoint = device.checkpointing(torch.device("cpu"))
    volume, full = torch.randn(1, 16, 96, 96).half(), torch.randn(1, *SIZE).half()
    train = lambda _: encoder(volume[None].float()).square().mean().backward()
    training = mean_seconds(train, 30)
    torch.set_num_threads(1)
    ratio = mean_seconds(lambda i: data.augment(volume, data.USUAL, str(i)), 30) / training
    figure(f"demo: share of the time of training on {threads} cores", ratio, at_most=1)
    scan = np.random.default_rng(0).integers(0, 255, GEOMETRY["Triton"], np.uint8)
    ratio = mean_seconds(lambda i: data.augment(full, data.USUAL, str(i)), 3)
    ratio /= mean_seconds(lambda _: volumes.preprocess(scan, SIZE), 2)
    figure("64x384x384: share of the time of preprocessing 256x992x512", ratio)


def correlations(scans, others):
    """Of the sketches of two lists of scans (frames, rows, columns) -> array of both lengths."""

    def sketches(scans):
        arrays = [volumes.preprocess(scan, (16, 96, 96)).numpy() for scan in scans]
        texts = [volumes.sketch(array.astype(np.float16)) for array in arrays]
        return np.array([np.frombuffer(base64.b64decode(text), np.int8) for text in texts], float)

    return np.corrcoef(sketches(scans), sketches(others))[: len(scans), len(scans) :]


def copies(people=60):
    protocol = phantom.PROTOCOLS[0]
    shape = tuple(n // k for n, k in zip(protocol["shape"], (8, 4, 8)))
    scans = [
        phantom.synthesize(
            phantom.draw_eye(0, i, "R", 60, i % 4, "boosted"), protocol, shape, random
        )
        for i in range(people)
        for random in map(np.random.default_rng, ([i, 0], [i, 1]))
    ]
    r = correlations(scans, scans)
    eye = np.arange(len(scans)) // 2
    is_same_eye = (eye[:, None] == eye) & ~np.eye(len(scans), dtype=bool)
    figure(
        "scans of two people: largest correlation", r[eye[:, None] != eye].max(), facts.NEAR_COPY
    )
    figure("two scans of one eye: largest correlation", r[is_same_eye].max(), facts.NEAR_COPY)
    jpeg = lambda f: imagecodecs.jpeg8_decode(imagecodecs.jpeg8_encode(f, level=50))
    coded = lambda f: imagecodecs.jpeg2k_encode(f, level=30, resolutions=2, codecformat="j2k")
    ways = {
        "JPEG of quality 50": jpeg,
        "JPEG 2000 at 30 dB": lambda f: imagecodecs.jpeg2k_decode(coded(f)),
        "gamma of 0.7": lambda f: (255 * (f / 255) ** 0.7).astype(np.uint8),
        "4 of 248 rows cut off": lambda f: f[2:-2],
    }
    for name, way in ways.items():
        changed = [np.stack([way(frame) for frame in scan]) for scan in scans[:10]]
        lowest = np.diag(correlations(scans[:10], changed)).min()
        figure(f"a scan and its copy, {name}: smallest", lowest, at_least=facts.NEAR_COPY)


if __name__ == "__main__":
    bench(__doc__, decode=decode, volumes=by_scanner, stream=stream, augment=augment, copies=copies)
