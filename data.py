"""Samples -> preprocessed volumes: cached, in the order of the epoch, augmented.

    volumes = open_volumes(cfg, book.of("train"), (64, 384, 384))
    for i, key, volume in stream(volumes, book, order, cfg): ...    # volume (1, D, H, W) float16

read_dicom and preprocess are those of volumes.py. scripts/preview.py draws what augmentation does.
As a command, python data.py --config FILE is check.py, which prints the ledger.
"""

if __name__ in ("__main__", "__mp_main__"):
    import begin

    begin.process()

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import b2
import begin
import facts
import files
import ledger
import stages
from volumes import (  # noqa: F401  (preprocess and others, for whoever imports them from here)
    PREPROCESSING,
    READING,
    Unreadable,
    decode,
    decode_volume,
    preprocess,
    read_dicom,
)

# ------------------------------------------------------------------------ volumes, with their cache


class Volumes:
    """Preprocessed volumes of samples: load(i) -> (key, (1, D, H, W) float16).

    They are kept on disk as float16 (19 MB at 64x384x384, rounding at most 2^-11 relative), keyed
    by the file's content, size and preprocessing, until cache_gb are full. After that the rest is
    read again every time: replacing volumes does not help when every epoch reads all of them. What
    comes from the disk and what was just made are the same numbers. Other processes may use the
    same cache_dir; each volume is fetched once. ids: of all participants, as facts.check takes
    them. axes, variable: how the arrays of these samples are to be read (formats.py).
    """

    def __init__(
        self, samples, size, cache_dir, cache_gb=50, deadline=300, ids=(), axes=None, variable=None
    ):
        self.samples, self.size, self.ids = list(samples), tuple(size), ids
        self.cache_dir = Path(files.local_folder(cache_dir, "paths.cache_dir", must_write=False))
        self.folder = self.cache_dir / "volumes"
        self.limit, self.deadline = cache_gb * 1e9, deadline
        self.axes, self.variable = axes, variable
        self.are_intensities = False  # see `seen`
        self.is_counted = False  # has this process counted what the cache holds?
        self.stop = threading.Event()  # set: what is being fetched is given up
        self.reading = stages.Reading()  # where volumes are, for the progress line

    def key(self, i):
        """Key of volume i in the cache; None for a local file whose content is not known yet."""
        content = self.content(i)
        # only where they are set: the keys of other volumes are older than these two
        how = f" {self.axes} {self.variable}" if self.axes or self.variable else ""
        return content and files.hashed(f"{content} {self.size} {PREPROCESSING}{how}")

    def content(self, i):
        """What identifies the content of volume i: the store's checksum; of a local file the
        checksum in its note, None without one. Unreadable where data.checksums has another."""
        source = self.samples[i].source
        if b2.is_remote(source.path):
            return source.checksum or f"{source.path} {source.id}"
        try:
            sha1, _, sha256 = self.note(i).read_text(encoding="utf-8").partition(" ")
        except FileNotFoundError:
            return None
        expected = self.samples[i].sha256
        if expected and sha256 not in ("", expected):
            raise Unreadable(f"{source.path} has {sha256}, and data.checksums says {expected}")
        # a power cut can empty a note, and data.checksums may be newer than it
        return sha1 if sha1 and (sha256 or not expected) else None

    def note(self, i):
        """File that remembers the checksums of a local file or folder, as long as nothing touches
        it or what it holds."""
        identity = files.identity(self.samples[i].path)
        return self.cache_dir / "checksums" / files.hashed(identity)

    def facts(self, i, key):
        """What the file of volume i, whose key this is, says of itself, and its pixels; None where
        it has not been decoded yet. Unreadable where it names another participant."""
        found = key and files.load_json(self.cache_dir / "facts" / f"{key}.json")
        if not found or found.get("reading") != READING:
            return None
        facts.check(self.samples[i], found, self.ids)
        return found

    def load(self, i, decode=decode):
        """-> key, (1, D, H, W) float16. Unreadable for a volume that cannot be read, or is another
        participant's; other errors have other causes than the volume.

        decode: volumes.decode, or something that runs it elsewhere.
        """
        source = self.samples[i].source
        try:
            if self.content(i) is None:
                names = ("sha1", "sha256") if self.samples[i].sha256 else ("sha1",)
                checksums = [files.checksum(source.path, name) for name in names]
                files.write(self.note(i), " ".join(checksums))
        except FileNotFoundError:
            raise Unreadable(f"{source.path} is not there any more") from None
        key = self.key(i)
        kept = self.folder / f"{key}.npy"
        volume = self.facts(i, key) and files.load_array(kept, np.float16, self.size)
        if volume is None:
            # not named by the key: another size needs the same file fetched
            lock = self.cache_dir / "locks" / files.hashed(self.content(i))
            with files.locked(lock, self.stop):
                try:
                    # another process may have made it in the meantime
                    volume = self.facts(i, key) and files.load_array(kept, np.float16, self.size)
                    if volume is None:
                        volume, found = self.make(source, decode)
                        kept.unlink(missing_ok=True)  # of an earlier version
                        note = self.cache_dir / "facts" / f"{key}.json"
                        files.write(note, json.dumps(found))
                        self.facts(i, key)  # checked
                        self.admit(kept, volume)
                finally:
                    lock.unlink()
        return key, torch.from_numpy(volume)[None]  # (D, H, W) -> (1, D, H, W)

    def seen(self, i, key, volume):
        """What the encoder sees of volume i: the z-scores, or where are_intensities, the values of
        the file (float32, to 2^-11), which one cache of z-scores serves as well."""
        if not self.are_intensities:
            return volume
        found = self.facts(i, key)
        return volume.float() * found["sd"] + found["mean"]

    def make(self, source, decode):
        """Fetch, decode and preprocess -> (D, H, W) float16, and the file's facts."""
        path = source.path
        try:
            if b2.is_remote(path):
                fetch = b2.fetch_folder if source.members else b2.fetch
                with self.reading.during("network"):
                    path = fetch(source, self.cache_dir / "raw", self.deadline, self.stop)
            with self.reading.during("decode"):
                return decode(path, self.size, self.axes, self.variable)
        except (b2.Absent, b2.Corrupt, Unreadable) as error:
            raise Unreadable(str(error).replace(path, source.path)) from error
        finally:
            if path != source.path:  # the preprocessed volume is what the cache keeps
                shutil.rmtree(path) if source.members else os.remove(path)

    def admit(self, path, volume):
        """Keep a volume, if there is room. The lock's own file holds the number of bytes in use,
        which every process counts once, so that a volume costs the same in a cache of any size."""
        if volume.nbytes > self.limit:
            return
        with files.locked(self.cache_dir / "locks" / "admission", self.stop) as counter:
            counter.seek(0)
            text = counter.read()
            if self.is_counted and text.isdigit():
                used = int(text)
            else:  # after a kill, the number may be too large
                files.remove_abandoned(self.folder, 0)  # nobody else writes here now
                used, self.is_counted = files.size_of(self.folder), True
            is_room = used + volume.nbytes <= self.limit
            counter.truncate(0)  # written before the volume, so that the limit holds after a kill
            counter.write(str(used + volume.nbytes * is_room).encode())
            if is_room:
                files.save_array(path, volume)
                counter.truncate(0)
                counter.write(str(used + path.stat().st_size).encode())


def open_volumes(cfg, samples, size, ids=(), are_intensities=False):
    """The Volumes of samples as the config has them kept and read; are_intensities: see `seen`."""
    cache = cfg.paths.cache_dir, cfg.data.cache_gb, cfg.data.fetch_deadline
    volumes = Volumes(samples, size, *cache, ids, cfg.data.axes, cfg.data.variable)
    volumes.are_intensities = are_intensities
    return volumes


# ----------------------------------------------------------------------------------- volumes ahead


def stream(volumes, book, order, cfg, transform=None):
    """Yield (i, key, (1, D, H, W) float16, or float32 intensities) for the samples i of `order`, in
    that order.

    data.prefetch volumes are on their way at once: being fetched (by threads), decoded (by
    data.num_workers processes) or waiting for the consumer, who has one more; memory holds no
    others. A volume that cannot be read is struck off the ledger, and stops the run (ValueError)
    unless data.max_missing covers it; where book is None, every volume must be readable. OSError
    when disk, memory or store fail. transform(key, volume) -> volume is called by the threads that
    fetch. Close the generator (contextlib.closing) where the consumer may fail: else what is on its
    way still arrives before the process ends.
    """
    reading = volumes.reading
    reading.decoders = max(1, cfg.data.num_workers)
    with executors(volumes, cfg) as (fetchers, decoder):

        def load(i):
            elsewhere = lambda *args: decoder.submit(decode, *args).result()
            with reading.during("disk"):
                key, volume = volumes.load(i, elsewhere)
            with reading.during("augmentation"):
                volume = transform(key, volume) if transform else volume
                return key, volumes.seen(i, key, volume)

        submitted = ((i, fetchers.submit(load, i)) for i in order)
        ahead = deque(itertools.islice(submitted, cfg.data.prefetch))
        while ahead:
            i, future = ahead.popleft()
            sample = volumes.samples[i]
            try:
                with reading.during("wait"):
                    arrived = result_of(future, sample.participant_id)
            except Unreadable as error:
                if book is None:
                    raise ValueError(
                        f"participant {sample.participant_id}: a volume that could be read before "
                        f"cannot be read now: {error}"
                    ) from error
                book.strike(sample, str(error))
                ledger.check(book, cfg.data.max_missing)
                arrived = None
            ahead.extend(itertools.islice(submitted, 1))
            if arrived:
                yield i, *arrived


@contextlib.contextmanager
def executors(volumes, cfg):
    """-> threads that fetch, and processes (or one thread) that decode. When the block ends, what
    is on its way is given up."""
    if cfg.data.num_workers:
        # spawn: the runtimes of CUDA and XLA do not survive a fork
        context = multiprocessing.get_context("spawn")
        decoder = ProcessPoolExecutor(cfg.data.num_workers, context, start_worker)
    else:
        decoder = ThreadPoolExecutor(1)
    # one torch thread for each: the other cores are the model's
    fetchers = ThreadPoolExecutor(
        cfg.data.prefetch, initializer=torch.set_num_threads, initargs=(1,)
    )
    volumes.stop.clear()
    try:
        yield fetchers, decoder
    finally:
        volumes.stop.set()
        decoder.shutdown(wait=False, cancel_futures=True)  # first: fetchers wait for it
        fetchers.shutdown(cancel_futures=True)


def result_of(future, participant_id):
    """A future's result. Unreadable as it is; OSError for what is not the volume's fault."""
    try:
        return future.result()
    except (OSError, MemoryError) as error:
        raise OSError(f"participant {participant_id}: {str(error) or 'out of memory'}") from error
    except BrokenProcessPool as error:
        for process in multiprocessing.active_children():
            process.kill()  # they ignore the SIGTERM that the pool sends
        raise OSError(
            "a process that decodes volumes died, out of memory perhaps; lower data.num_workers"
        ) from error


def start_worker():
    """Start of a process that decodes: it uses one thread, ends with its parent, and leaves Ctrl-C
    and SIGTERM to the parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begin.end_with_parent()


# ------------------------------------------------------------------------ augmentation and sampling

AUGMENTATION = "v1"  # part of the key of every augmented view's feature: change it with augment()
# the strengths that `true` asks for
USUAL = {"flip": 0.5, "intensity_jitter": 0.1, "random_crop": 0.1, "rotation": 5.0}


def strengths(cfg):
    """data.augment as {name: strength}, without what is off or 0."""
    asked = vars(cfg.data.augment).items()
    return {name: USUAL[name] if value is True else value for name, value in asked if value}


def augment(volume, strength, key):
    """Volume (1, D, H, W) -> another view of it, of the same shape and dtype. `key`, a text, alone
    decides which.

    strength, of which any may be left out:
      flip              probability to mirror the frames (D), and to mirror the columns (W); never
                        the rows, which are depth
      intensity_jitter  a: contrast times 1 - a to 1 + a, then brightness -a to a (SD of the volume)
      random_crop       a: of each axis, up to this share is cut off, and the rest resized back
      rotation          degrees: -a to a in the lateral plane (D, W), and in the B-scan (H, W)
    All 0 is the identity. Planes are rotated in units of their own half-width and half-height.
    """
    chance = random.Random(key)
    # the same numbers, whatever is switched on
    draw = {name: [chance.random() for _ in range(6)] for name in USUAL}
    flip, jitter, crop, rotation = (strength.get(name, 0) for name in USUAL)
    flips = [axis for axis, u in zip((0, 2), draw["flip"]) if u < flip]
    gain, shift = (jitter * (2 * u - 1) for u in draw["intensity_jitter"][:2])
    scale = [1 - crop * u for u in draw["random_crop"][:3]]  # of D, H, W
    centre = [(1 - s) * (2 * u - 1) for s, u in zip(scale, draw["random_crop"][3:])]
    lateral, scan = (math.radians(rotation * (2 * u - 1)) for u in draw["rotation"][:2])

    out = volume[0].float()  # (D, H, W)
    out = resample(out, scan, scale[1:], centre[1:])  # every frame's (H, W)
    out = out.transpose(0, 1)  # (H, D, W): every row's (D, W)
    out = resample(out, lateral, (scale[0], 1), (centre[0], 0)).transpose(0, 1)  # (D, H, W)
    out = out.flip(flips)
    if gain or shift:
        out = out * (1 + gain) + shift
    return out.to(volume.dtype)[None]


def resample(planes, angle, scale, centre):
    """Planes (K, rows, columns) -> the same shape, seen through a window of `scale` (rows, columns)
    at `centre`, turned by angle."""
    if angle == 0 and tuple(scale) == (1, 1):
        return planes
    cos, sin = math.cos(angle), math.sin(angle)
    rows, columns = scale
    window = [[columns * cos, -columns * sin, centre[1]], [rows * sin, rows * cos, centre[0]]]
    shape = [1, 1, *planes.shape[1:]]
    grid = F.affine_grid(
        torch.tensor([window]), shape, align_corners=False
    )  # (1, rows, columns, 2)
    return F.grid_sample(planes[None], grid, padding_mode="border", align_corners=False)[0]


def epoch_order(labels, sampler, seed, epoch, num_classes):
    """The epoch's len(labels) draws, as indices of labels (n,); seed and epoch alone decide them.

    "shuffle": everything once. "stratified": rounds of num_classes draws, each class once in a
    round; within a class, everything once before anything again. ValueError when a class is
    missing.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    shuffled = lambda n: torch.randperm(n, generator=generator)
    if sampler == "shuffle":
        return shuffled(len(labels))
    rounds = math.ceil(len(labels) / num_classes)
    columns = []
    for k in range(num_classes):
        own = (labels == k).nonzero().flatten()
        if not len(own):
            raise ValueError(
                "data.sampler=stratified draws every class, and no training volume is of class "
                f"{k}; set data.sampler=shuffle"
            )
        passes = [own[shuffled(len(own))] for _ in range(math.ceil(rounds / len(own)))]
        columns.append(torch.cat(passes)[:rounds])
    table = torch.stack(columns, dim=1)  # (rounds, num_classes)
    turns = torch.rand(table.shape, generator=generator).argsort(dim=1)
    return table.gather(1, turns).flatten()[: len(labels)]


if __name__ == "__main__":
    # run, not imported: check.py imports this file, and nothing here may import what does
    runpy.run_path(str(Path(__file__).with_name("check.py")), run_name="__main__")
