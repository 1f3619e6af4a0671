"""How time and memory grow: the feature pass with the number of volumes and of processes, training heads with the number of heads,
participants and classes.

    .venv/bin/python bench/growth.py                          # two minutes on two cores
    .venv/bin/python bench/growth.py --processes 1 2 4 8      # where there are so many cores

Feature pass: the demo's encoder (128 wide, 4 deep, 16x96x96) in float32 on preprocessed volumes from the cache, one thread a process;
each row is a run of its own, through device.launch (several processes gain only where cores are free). Heads: train.sweep, 20 epochs,
on 768 features, one thread. The number of classes is four everywhere (data.CLASSES, and the default of metrics.score); both are
replaced within this process. A line seconds = fixed + slope x number is fitted to each table. Exits 1 when the feature pass does not
follow its line (R^2 0.95), or its memory grows by more than a tenth from the first row to the last.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import config  # noqa: E402
import data  # noqa: E402
import device  # noqa: E402
import encoder as full  # noqa: E402
import eval as evaluation  # noqa: E402
import heads as gaussians  # noqa: E402
import metrics  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

SIZE, SCORE = (16, 96, 96), metrics.score


def job(rank, cfg):
    """A feature pass over the volumes of cfg.paths.data in every replica; rank 0 prints its seconds and its peak MB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dev, encoder = device.get("cpu"), model.ViT3D(128, 4, 144).eval().requires_grad_(False)
    count = int(os.path.basename(cfg.paths.run_dir))
    paths = [os.path.join(cfg.paths.data, str(i)) for i in range(count)]
    samples = [data.Sample(str(i), data.SPLITS[i % 3], 0, "", "L", path, data.b2.Object(path, 1)) for i, path in enumerate(paths)]
    device.barrier(dev)
    began = time.perf_counter()
    evaluation.features(cfg, data.Ledger([], samples), samples, encoder, SIZE, "0" * 64, dev)
    seconds = time.perf_counter() - began
    with open("/proc/self/status") as f:
        peak = next(int(line.split()[1]) / 1000 for line in f if line.startswith("VmHWM"))
    print(json.dumps([seconds, peak]))


def feature_pass(folder, count, processes):
    """-> seconds, peak MB of replica 0; the features are not kept."""
    command = [sys.executable, __file__, "--pass", folder, str(count), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"feature pass of {count} volumes on {processes} processes: {done.stderr}")
    subprocess.run(["rm", "-r", f"{folder}/cache/features"], check=True)
    return json.loads(done.stdout.splitlines()[-1])


def settings(folder, count, processes):
    return config.load(os.path.join(ROOT, "configs", "base.yaml"), [
        f"paths.data={folder}", f"paths.cache_dir={folder}/cache", f"paths.run_dir={folder}/{count}", "model.emb_dim=128",
        "device.backend=cpu", f"device.processes={processes}"])


def line(numbers, values):
    """Least squares: fixed part, slope, R^2."""
    slope, fixed = np.polyfit(numbers, values, 1)
    left = np.square(np.array(values) - fixed - slope * np.array(numbers)).sum()
    return fixed, slope, 1 - left / np.square(values - np.mean(values)).sum()


def train_heads(num_heads, participants, num_classes):
    """-> seconds of train.sweep."""
    data.CLASSES, metrics.score = tuple(map(str, range(num_classes))), functools.partial(SCORE, num_classes=num_classes)
    torch.manual_seed(0)
    labels = [np.arange(n) % num_classes for n in (participants, 159)]
    x, x_val = (torch.randn(len(y), 768) + torch.from_numpy(y)[:, None] * 0.03 for y in labels)
    cfg = config.load(os.path.join(ROOT, "configs", "probe.yaml"), ["train.epochs=20", "train.early_stopping.enabled=false"])
    grid = [dict(train.grid_of(cfg)[0], lr_head=lr) for lr in np.geomspace(1e-4, 1e-2, num_heads).tolist()]
    began = time.perf_counter()
    train.sweep(cfg, 0, grid, train.start_head(cfg, 0, x[:, None]), x[:, None], gaussians.samples(labels[0]),
                x_val, gaussians.samples(labels[1]))
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, nargs="+", default=(50, 100, 200, 400))
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--pass", dest="one", nargs=3, help=argparse.SUPPRESS)  # what a row's process is called with
    args = parser.parse_args()
    if args.one:
        device.launch(job, settings(*args.one))
        return
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        full.fill_cache(folder, max(args.volumes), SIZE)
        rows = [[feature_pass(folder, n, 1) for n in args.volumes] for _ in range(2)]
        seconds, memory = [min(r[0] for r in row) for row in zip(*rows)], [row[0][1] for row in zip(*rows)]
        print(f"feature pass, 1 process\n{'volumes':<14}" + "".join(f"{n:>10}" for n in args.volumes)
              + f"\n{'seconds':<14}" + "".join(f"{s:>10.2f}" for s in seconds)
              + f"\n{'peak MB':<14}" + "".join(f"{m:>10.0f}" for m in memory))
        fixed, slope, fit = line(args.volumes, seconds)
        print(f"{fixed:.2f} s + {slope * 1e3:.1f} ms a volume, R^2 {fit:.4f}; memory {memory[-1] / memory[0]:.2f} times "
              f"for {args.volumes[-1] / args.volumes[0]:.0f} times the volumes")
        missed += [what for what, is_met in (("a line", fit >= 0.95), ("flat memory", memory[-1] <= 1.1 * memory[0])) if not is_met]
        rows = [[feature_pass(folder, max(args.volumes), p)[0] for p in args.processes] for _ in range(2)]
        seconds = [min(row) for row in zip(*rows)]
        print(f"\nfeature pass, {max(args.volumes)} volumes, {os.cpu_count()} cores\n"
              f"{'processes':<14}" + "".join(f"{p:>10}" for p in args.processes)
              + f"\n{'times faster':<14}" + "".join(f"{seconds[0] / s:>10.2f}" for s in seconds))
    torch.set_num_threads(1)
    train_heads(8, 743, 4)  # imports, and the allocator's first pages
    for what, numbers, settings_of in (("heads", (8, 16, 32, 64, 128), lambda n: (n, 743, 4)),
                                       ("participants", (250, 500, 1000, 2000), lambda n: (24, n, 4)),
                                       ("classes", (2, 4, 8, 16), lambda n: (24, 743, n))):
        seconds = [min(train_heads(*settings_of(n)) for _ in range(2)) for n in numbers]
        fixed, slope, fit = line(numbers, seconds)
        print(f"\n{what:<14}" + "".join(f"{n:>10}" for n in numbers)
              + f"\n{'against first':<14}" + "".join(f"{s / seconds[0]:>10.2f}" for s in seconds)
              + f"\n{fixed / seconds[0]:.2f} + {slope / seconds[0]:.4f} for each, R^2 {fit:.4f}", flush=True)
    sys.exit(f"not met: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
