"""How time, memory and results depend on how much there is: processes, volumes, heads, runs.

    .venv/bin/python bench/scaling.py processes     # 1, 2, 4 and 16 on the demo data
    .venv/bin/python bench/scaling.py growth        # two minutes on two cores
    .venv/bin/python bench/scaling.py evaluate      # three minutes, most of them for the data

processes: feature pass, 50 epochs and predictions of several processes, against one; the machine
may have fewer cores. Required: predictions are equal to 1e-5.
growth: the feature pass (the demo's encoder, preprocessed volumes from the cache, one thread a
process; each row is a run of its own) by volumes and processes; training heads (20 epochs, 768
features, one thread) by heads, participants and classes. A line, time = fixed + slope x number, is
fitted. Required of the feature pass: it follows its line (R^2 0.95), and its memory grows by less
than a tenth from the first row to the last.
evaluate: eval.evaluate_run of a probe with eval.floors on as many participants as AI-READI has, the
features at hand: all intervals, floors, plots, report. Then compare.compare of 20 runs.
"""

import json
import os
import shutil
import tempfile
import time

import numpy as np
import torch
from encoder import fill_cache, samples_below
from measure import apart, bench, check, header, peak_gb, require, row, script, timed
from probing import features_of

import compare
import config
import device
import eval as evaluation
import features
import files
import heads
import ledger
import model
import phantom
import runs
import train

SIZE = (16, 96, 96)


def train_demo(folder, count):
    """-> seconds of the feature pass and of 50 epochs, validation predictions (n, 4)."""
    overrides = f"""device.backend=cpu device.processes={count} train.sweep=null train.epochs=50
        train.early_stopping.enabled=false paths.cache_dir={folder}/cache{count}
        paths.run_dir={folder}/run{count}""".split()
    marks, times = ("(with a volume", "features:", "head:", "epoch  50/50"), {}
    for line in script("train.py", "--config", "configs/demo.yaml", *overrides):
        times |= {mark: time.monotonic() for mark in marks if line.startswith(mark)}
    table = f"{folder}/run{count}/predictions_val.csv"
    predictions = np.genfromtxt(table, delimiter=",", skip_header=1)[:, 2:]
    began, encoded, trains, trained = (times[mark] for mark in marks)
    return encoded - began, trained - trains, predictions


def processes(args):
    header(f"processes ({os.cpu_count()} cores)", "feature pass", "50 epochs", "difference")
    with tempfile.TemporaryDirectory() as folder:
        first = train_demo(folder, 1)
        for count in args.processes or (2, 4, 16):
            encoded, trained, predictions = train_demo(folder, count)
            difference = np.abs(predictions - first[2]).max()
            times = f"{encoded / first[0]:.2f}x", f"{trained / first[1]:.1f}x"
            row(count, *times, f"{difference:.1e}")
            require(f"{count} processes: equal to 1e-5", difference <= 1e-5)


def encode_in_replica(rank, cfg):
    """A feature pass over the volumes of cfg.paths.data; rank 0 writes its seconds and peak GB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = features.Encoder(model.ViT3D(128, 4, 144).eval(), SIZE, "0" * 64)
    samples, dev = samples_below(cfg.paths.data, int(cfg.log.run_name)), device.get("cpu")
    book = ledger.Ledger([], samples)
    device.barrier(dev)
    took, _ = timed(features.encode, cfg, book, samples, encoder, dev)
    if rank == 0:
        files.write(f"{cfg.paths.data}/result", json.dumps([took, peak_gb()]))


def feature_pass(folder, count, replicas):
    """-> seconds, peak GB of replica 0; the features are not kept."""
    overrides = f"""paths.data={folder} paths.cache_dir={folder}/cache model.emb_dim=128
        log.run_name={count} device.backend=cpu device.processes={replicas}""".split()
    apart(device.launch, encode_in_replica, config.load("configs/base.yaml", overrides))
    shutil.rmtree(f"{folder}/cache/features")
    with open(f"{folder}/result", encoding="utf-8") as f:
        return json.load(f)


def print_growth(what, numbers, values):
    """-> R^2 of the line."""
    slope, fixed = np.polyfit(numbers, values, 1)
    left = np.square(np.array(values) - fixed - slope * np.array(numbers)).sum()
    fit = 1 - left / np.square(values - np.mean(values)).sum()
    times = ", ".join(f"{value / values[0]:.2f}" for value in values)
    line = f"{fixed / values[0]:.2f} + {slope / values[0]:.4f} n"
    row(what, ", ".join(map(str, numbers)), times, f"{line}, R^2 {fit:.4f}", f"{values[0]:.2f} s")
    return fit


def train_heads(num_heads, participants, num_classes):
    """Seconds of train.fit."""
    ledger.CLASSES = tuple(map(str, range(num_classes)))  # the only place that says how many
    torch.manual_seed(0)
    labels = [torch.arange(n) % num_classes for n in (participants, 159)]
    parts = [features_of(torch.randn(len(y), 768) + 0.03 * y[:, None], y) for y in labels]
    rates = ",".join(f"{rate:.7f}" for rate in np.geomspace(1e-4, 1e-2, num_heads))
    overrides = f"""train.epochs=20 train.early_stopping.enabled=false train.sweep.ordinal=null
        train.sweep.weight_decay=null train.sweep.lr_head=[{rates}]""".split()
    cfg = config.load("configs/probe.yaml", overrides)
    return timed(train.fit, cfg, 0, *parts, torch.device("cpu"))[0]


def growth(args):
    header("", "number", "time against the first", "line", "the first")
    with tempfile.TemporaryDirectory() as folder:
        fill_cache(folder, samples_below(folder, max(args.volumes)), SIZE)
        rounds = [[feature_pass(folder, n, 1) for n in args.volumes] for _ in "12"]
        took, memory = np.min(rounds, axis=0).T
        fit = print_growth("feature pass, by volumes", args.volumes, took)
        require("the feature pass follows a line", fit >= 0.95)
        grown = memory[-1] / memory[0]
        row("its memory", "", f"{grown:.2f} from first to last", "", f"{memory[0]:.2f} GB")
        require("flat memory", grown <= 1.1)
        replicas = args.processes or (1, 2)
        took = [feature_pass(folder, max(args.volumes), count)[0] for count in replicas]
        print_growth(f"the same, by processes ({os.cpu_count()} cores)", replicas, took)
    torch.set_num_threads(1)
    train_heads(8, 743, 4)  # imports, and the allocator's first pages
    for what, cases in (
        ("training, by heads", {n: (n, 743, 4) for n in (8, 16, 32, 64, 128)}),
        ("training, by participants", {n: (24, n, 4) for n in (250, 500, 1000, 2000)}),
        ("training, by classes", {n: (24, 743, n) for n in (2, 4, 8, 16)}),
    ):
        took = [min(train_heads(*case) for _ in "12") for case in cases.values()]
        print_growth(what, list(cases), took)


def another_run(folder, run, seed):
    """A copy of a run's results with other answers, as eval.py would leave it."""
    found, rng = compare.open_results(run, run, "test"), np.random.default_rng(seed)
    p = np.array(list(found.p_of.values()))
    p = p * rng.uniform(0.5, 2, p.shape)
    labels = np.array(list(found.label_of.values()))
    predictions = heads.Predictions(list(found.label_of), labels, p / p.sum(axis=1, keepdims=True))
    table = f"{folder}/predictions_test.csv"
    files.write(table, runs.predictions_csv(predictions))
    result = found.result | {"predictions_sha256": files.sha256(table)}
    files.write(f"{folder}/eval_test.json", json.dumps(result))
    return folder


def evaluate(args):
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_dataset(f"{folder}/data", participants=1067, scale=(1 / 32, 1 / 32, 1 / 32))
        encoder, run = f"{folder}/encoder.pt", f"{folder}/run"
        phantom.write_encoder(encoder, image_size=(8, 32, 32), dim=64, depth=1)
        overrides = f"""demo.dir=null paths.data={folder}/data paths.checkpoint_path={encoder}
            paths.cache_dir={folder}/cache paths.run_dir={run} model.emb_dim=64
            eval.floors=true""".split()
        timed(train.main, 0, config.load("configs/demo.yaml", overrides))
        timed(evaluation.evaluate_run, run, "test")  # encodes
        one, (result, _) = timed(evaluation.evaluate_run, run, "test")
        others = [another_run(f"{folder}/runs/{n}", run, n) for n in range(20)]
        twenty, text = timed(compare.compare, others, "test")
    header("", "measured", "required")
    what = f"evaluating {result['n']} participants, {result['volumes']} volumes"
    check(what, f"{one:.1f} s", "at most 10 s", one <= 10)
    what = f"comparing 20 runs, {text.count('McNemar')} pairs"
    check(what, f"{twenty:.1f} s", "at most 30 s", twenty <= 30)


if __name__ == "__main__":
    volumes = dict(type=int, nargs="+", default=(50, 100, 200, 400), help="of growth")
    several = dict(type=int, nargs="+", help="of processes (2 4 16) and growth (1 2)")
    parts = {"processes": processes, "growth": growth, "evaluate": evaluate}
    bench(__doc__, parts, {"--volumes": volumes, "--processes": several})
