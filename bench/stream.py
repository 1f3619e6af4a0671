"""Streaming from a B2 on loopback: many connections against one, what a second epoch asks for, and whether memory grows.

    .venv/bin/python bench/stream.py

Exits 1 when a requirement is not met. The server runs in a process of its own; the client is the real b2sdk.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import b2
import config
import data
import phantom
from b2_server import B2Server, Fault


def serve(folder, rate, pipe):
    """A B2 of the files of folder; answers with the number of requests so far."""
    with B2Server(folder) as server:
        server.fault = lambda kind, name, n: Fault(rate=rate) if kind == "download" and rate else None
        pipe.send((server.url, server.key_id, server.key))
        while pipe.recv():
            pipe.send(len(server.requests))


class Store:
    """serve() in a process of its own, and the environment that b2.py needs for it."""

    def __init__(self, folder, rate=0):
        self.pipe, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, rate, there))

    def __enter__(self):
        self.process.start()
        os.environ["B2_REALM"], os.environ["B2_APPLICATION_KEY_ID"], os.environ["B2_APPLICATION_KEY"] = self.pipe.recv()
        b2.renew()
        return self

    def requests(self):
        self.pipe.send(True)
        return self.pipe.recv()

    def __exit__(self, *_):
        self.pipe.send(False)
        self.process.join()


def connections(folder, objects=16, size=50_000_000, rate=20e6):
    """How many times a single stream's rate 16 objects at once come, each connection being throttled to `rate` bytes a second."""
    source = os.path.join(folder, "objects")
    os.makedirs(source)
    for i in range(objects):
        with open(os.path.join(source, str(i)), "wb") as f:
            f.write(os.urandom(size))
    with Store(source, rate), ThreadPoolExecutor(objects) as pool:
        sources = list(b2.find_all([f"b2://bucket/{i}" for i in range(objects)]).values())
        began = time.monotonic()
        b2.fetch(sources[0], os.path.join(folder, "one"))
        one = time.monotonic() - began
        began = time.monotonic()
        list(pool.map(lambda s: b2.fetch(s, os.path.join(folder, "many")), sources))
        return objects * one / (time.monotonic() - began)


def resident():
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def epochs(folder, prefetch=8, size=(64, 192, 192)):
    """-> requests of a second epoch, number of volumes, bytes of them all, peak of memory in the last half of an epoch, and in its first
    tenth, by when the window was full twice. The server is in another process, decoding in this one."""
    phantom.write_dataset(os.path.join(folder, "data"), participants=90, scale=(1 / 8, 1 / 8, 1 / 8))
    with Store(os.path.join(folder, "data")) as store:
        cfg = config.load(os.path.join(ROOT, "configs", "demo.yaml"), [
            "paths.data=b2://bucket", f"paths.cache_dir={folder}/cache", "data.num_workers=0", f"data.prefetch={prefetch}"])
        ledger = data.read_ledger(cfg)
        volumes, count = data.Volumes(ledger.samples, size, cfg.paths.cache_dir), len(ledger.samples)
        peaks, done = [0] * count, threading.Event()

        def watch():
            while not done.wait(0.005):
                peaks[at] = max(peaks[at], resident())

        at, watcher = 0, threading.Thread(target=watch)
        watcher.start()
        for at, (_, _, volume) in enumerate(data.stream(volumes, ledger, range(count), cfg)):
            peaks[at] = max(peaks[at], resident())
        done.set()
        watcher.join()
        before = store.requests()
        for _ in data.stream(volumes, ledger, range(count), cfg):
            pass
        return store.requests() - before, count, count * volume.nbytes, max(peaks[len(peaks) // 2:]), max(peaks[:len(peaks) // 10])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    b2.ENV_FILE = os.devnull
    with tempfile.TemporaryDirectory() as folder:
        ratio = connections(folder)
    with tempfile.TemporaryDirectory() as folder:
        requests, count, total, last, first = epochs(folder)
    rows = [("16 objects of 50 MB at 20 MB/s a connection, against one stream", f"{ratio:.1f}x", "at least 7x", ratio >= 7),
            (f"requests of a second epoch of {count} volumes", f"{requests}", "0", requests == 0),
            ((f"growth of memory while {count} volumes pass a window of 8, "
              f"in windows ({count // 8} windows of {8 * total / count / 1e6:.0f} MB)"),
             f"{(last - first) / (8 * total / count):.1f}", "at most 2", last - first <= 16 * total / count)]
    for name, measured, required, _ in rows:
        print(f"{name:<98}{measured:>8}   required: {required}")
    missed = [name for name, *_, met in rows if not met]
    sys.exit(f"not met: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
