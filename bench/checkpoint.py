"""What it costs to load the pretraining's 1.4 GB checkpoint on four processes of one host at once, as on a TPU host.

    .venv/bin/python bench/checkpoint.py      # a minute on two cores; 1.5 GB of disk in the temporary folder

A file of the full-size encoder with random weights: context and target encoder, predictor, the optimizer's moments. Each process
calls model.load_encoder; its private memory is Private_Dirty of /proc/self/smaps_rollup, at most (sampled) and at the end, beside
what it had before (Python and torch); the cost is the difference. The file has left the page cache before; how much the disk is
then asked for, by all processes together, shows that they share it. Times stand beside one process that reads the same bytes, from
the disk and from the cache. Exits 1 when that costs a process more than 0.5 GB at any time, or the disk is asked for more than the
file has.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def private():
    """GB that this process has to itself, (written, clean): the clean ones are pages of files, which the system can drop, and all
    processes share once a second one reads them."""
    with open("/proc/self/smaps_rollup") as f:
        fields = dict(line.split(":") for line in f if line.startswith("Private_"))
    return [int(fields[f"Private_{name}"].split()[0]) / 1e6 for name in ("Dirty", "Clean")]


def from_disk():
    """GB that this process made the disk read."""
    with open("/proc/self/io") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("read_bytes")) / 1e9


def load(path, processes):
    """Run in a process of its own, once it is told to go on; prints what it took."""
    import torch

    import model

    torch.set_num_threads(max(1, torch.get_num_threads() // processes))  # as device.launch does
    before, samples, done = private(), [], threading.Event()

    def sample():
        while not done.wait(0.05):
            samples.append(private())

    print("ready", flush=True)
    sys.stdin.readline()
    watcher = threading.Thread(target=sample)
    watcher.start()
    disk, began = from_disk(), time.perf_counter()
    encoder = model.load_encoder(path)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    after = private()
    peak, clean = (max(values) for values in zip(*samples, after))
    print(json.dumps([seconds, before[0], peak, after[0], clean, from_disk() - disk, sum(p.numel() for p in encoder.parameters())]),
          flush=True)
    sys.stdin.readline()  # the others are still to load: what is shared stays shared


def load_in(count, path):
    """-> results of `count` processes that begin together."""
    processes = [subprocess.Popen([sys.executable, __file__, "--load", path, "--processes", str(count)],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for process in processes:
        if process.stdout.readline() != "ready\n":
            sys.exit("a process that was to load the checkpoint failed")
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [json.loads(process.stdout.readline()) for process in processes]
    for process in processes:
        process.communicate("end\n")
    return results


def forget(path):
    """Out of the page cache."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path, size):
    """Seconds to read so many bytes."""
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as f:
        while size > 0:
            size -= len(f.read(8 << 20))
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--load", help=argparse.SUPPRESS)  # what a process is called with
    args = parser.parse_args()
    if args.load:
        load(args.load, args.processes)
        return
    import phantom

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/encoder.pt"
        phantom.write_encoder(path, (64, 384, 384), 768, 12, optimizer=True)
        size, encoder = os.path.getsize(path) / 1e9, None
        forget(path)
        rows, times = [], {}
        for name in ("from the disk", "from the page cache"):
            rows.append((name, load_in(args.processes, path)))
            encoder = rows[-1][1][0][6] * 4 / 1e9
            if name == "from the disk":
                forget(path)
            times[name] = read(path, int(encoder * 1e9))
    print(f"checkpoint of {size:.2f} GB, encoder {encoder * 1e9 / 4:,.0f} parameters, {encoder:.2f} GB; "
          f"{args.processes} processes on {os.cpu_count()} cores")
    print(f"{'':<22}{'slowest':>9}{'reading that much':>19}{'private before':>16}{'at most':>9}{'after':>9}"
          f"{'cost':>9}{'(clean)':>9}{'disk, all processes':>21}")
    for name, results in rows:
        _, before, most, after, clean, disk, _ = (max(values) for values in zip(*results))
        print(f"{name:<22}{max(r[0] for r in results):>7.1f} s{times[name]:>17.1f} s{before:>13.2f} GB{most:>6.2f} GB{after:>6.2f} GB"
              f"{max(r[2] - r[1] for r in results):>6.2f} GB{clean:>6.2f} GB{sum(r[5] for r in results):>18.2f} GB")
    cost, disk = max(r[2] - r[1] for _, results in rows for r in results), max(sum(r[5] for r in results) for _, results in rows)
    missed = [what for what, is_met in (("0.5 GB private", cost <= 0.5), ("one reading of the file", disk <= 1.1 * size)) if not is_met]
    sys.exit(f"not met: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
