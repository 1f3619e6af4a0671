"""One result whatever the number of processes: time of the feature pass and of 50 epochs, and the largest difference in predictions.

    .venv/bin/python bench/processes.py            # 1, 2, 4 and 16 processes on the demo data

Times are ratios to one process, on a machine that may have fewer cores than processes. Exits 1 when a difference exceeds 1e-5.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(folder, processes):
    """-> seconds of the feature pass, of 50 epochs, and validation predictions (n, 4)."""
    command = [sys.executable, "train.py", "--config", "configs/demo.yaml", "device.backend=cpu", f"device.processes={processes}",
               f"paths.cache_dir={folder}/cache{processes}", f"paths.run_dir={folder}/run{processes}",
               "train.early_stopping.enabled=false", "train.sweep=null"]
    times = {}
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in job.stdout:
        for mark in ("(with a volume", "features:", "head:", "epoch  50/50"):
            if line.startswith(mark):
                times[mark] = time.monotonic()
    if job.wait():
        sys.exit(f"{' '.join(command)} failed")
    predictions = np.genfromtxt(f"{folder}/run{processes}/predictions_val.csv", delimiter=",", skip_header=1)[:, 2:]
    return times["features:"] - times["(with a volume"], times["epoch  50/50"] - times["head:"], predictions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2, 4, 16))
    args = parser.parse_args()
    print(f"{'processes':>9}{'feature pass':>15}{'50 epochs':>12}{'largest difference':>21}   "
          f"({os.cpu_count()} cores; times against one process)")
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, *(n for n in args.processes if n > 1)):
            passed, epochs, predictions = run(folder, processes)
            if processes == 1:
                one = passed, epochs, predictions
            difference = np.abs(predictions - one[2]).max()
            worst = max(worst, difference)
            print(f"{processes:>9}{passed / one[0]:>14.2f}x{epochs / one[1]:>11.1f}x{difference:>21.1e}", flush=True)
    sys.exit("not met: predictions equal to 1e-5" if worst > 1e-5 else 0)


if __name__ == "__main__":
    main()
