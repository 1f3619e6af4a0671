"""How time, memory and results depend on how much there is: processes, volumes, heads, runs.

    .venv/bin/python bench/scaling.py processes     # 1, 2, 4 and 16 on the demo data
    .venv/bin/python bench/scaling.py growth        # two minutes on two cores; --processes 1 2 4 8
    .venv/bin/python bench/scaling.py evaluate      # four minutes, most of them for the data
    .venv/bin/python bench/scaling.py cohort        # a minute

processes: feature pass, 50 epochs and predictions of several processes, against one; the machine
may have fewer cores.
growth: the feature pass (the demo's encoder, preprocessed volumes from the cache, one thread a
process; each row is a run of its own) by volumes and by processes; training heads (20 epochs, 768
features, one thread) by heads, participants and classes. Each table is fitted by a line.
evaluate: eval.evaluate_run of a probe with eval.floors on as many participants as AI-READI has, the
features at hand: all intervals, floors, plots, report. Then compare.compare of 20 runs.
cohort: metrics.evaluate of many participants, with nine groups.
"""

import json
import os
import shutil
import tempfile
import time

import numpy as np
import torch
from cached import fill_cache, samples_below
from measure import apart, bench, figure, peak_gb, row, script, timed
from probing import features_of

import compare
import config
import device
import eval as evaluation
import features
import files
import heads
import ledger
import metrics
import model
import phantom
import results
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


def by_processes(processes=(2, 4, 16)):
    with tempfile.TemporaryDirectory() as folder:
        encoding, training, first = train_demo(folder, 1)
        for count in (count for count in processes if count > 1):
            encoded, trained, predictions = train_demo(folder, count)
            difference = np.abs(predictions - first).max()
            name = f"{count} processes on {os.cpu_count()} cores, against 1"
            figure(f"{name}: time of the feature pass", encoded / encoding)
            figure(f"{name}: time of 50 epochs", trained / training)
            figure(f"{name}: largest difference in predictions", difference, at_most=1e-5)


def encode_in_replica(rank, cfg):
    """A feature pass over the volumes of cfg.paths.data; rank 0 writes its seconds and peak GB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = features.Encoder(model.ViT3D(128, 4, 144).eval(), SIZE, "0" * 64)
    samples, dev = samples_below(cfg.paths.data, int(cfg.log.run_name)), device.get("cpu")
    book = ledger.Ledger([], samples, ())
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


def train_heads(num_heads, participants, num_classes):
    """Seconds of train.fit."""
    torch.manual_seed(0)
    labels = [torch.arange(n) % num_classes for n in (participants, 159)]
    parts = [features_of(torch.randn(len(y), 768) + 0.03 * y[:, None], y) for y in labels]
    rates = ",".join(f"{rate:.7f}" for rate in np.geomspace(1e-4, 1e-2, num_heads))
    overrides = f"""train.epochs=20 train.early_stopping.enabled=false train.sweep.ordinal=null
        train.sweep.weight_decay=null train.sweep.lr_head=[{rates}]
        data.classes={list(range(num_classes))}""".replace(", ", ",").split()
    cfg = config.load("configs/probe.yaml", overrides)
    return timed(train.fit, cfg, 0, *parts, torch.device("cpu"))[0]


def print_line(what, took):
    """A row of times {number: seconds}, and of the line fitted to them -> R^2."""
    numbers, values = np.array(list(took)), np.array(list(took.values()))
    slope, fixed = np.polyfit(numbers, values, 1)
    fit = 1 - np.square(values - fixed - slope * numbers).sum() / values.var() / len(values)
    first, times = values[0], ", ".join(f"{n}: {s / values[0]:.2f}" for n, s in took.items())
    line = f"{fixed / first:.2f} + {slope / first:.4f} n, R² {fit:.4f}"
    row(what, times, line, f"the first took {first:.2f} s")
    return fit


def growth(volumes=(50, 100, 200, 400), processes=(1, 2)):
    with tempfile.TemporaryDirectory() as folder:
        fill_cache(folder, max(volumes), SIZE)
        rounds = [[feature_pass(folder, n, 1) for n in volumes] for _ in "12"]
        took, memory = np.min(rounds, axis=0).T
        fit = print_line("feature pass, volumes", dict(zip(volumes, took)))
        figure("R² of that line", fit, at_least=0.95)
        figure("its memory, the last against the first", memory[-1] / memory[0], at_most=1.1)
        took = {n: feature_pass(folder, max(volumes), n)[0] for n in processes}
        print_line(f"feature pass, processes on {os.cpu_count()} cores", took)
    torch.set_num_threads(1)
    train_heads(8, 743, 4)  # imports, and the allocator's first pages
    for what, cases in {
        "training, heads": {n: (n, 743, 4) for n in (8, 16, 32, 64, 128)},
        "training, participants": {n: (24, n, 4) for n in (250, 500, 1000, 2000)},
        "training, classes": {n: (24, 743, n) for n in (2, 4, 8, 16)},
    }.items():
        print_line(what, {n: min(train_heads(*case) for _ in "12") for n, case in cases.items()})


def another_run(folder, run, seed):
    """A copy of a run's results with other answers, as eval.py would leave it."""
    found, rng = results.open_results(run, run, "test"), np.random.default_rng(seed)
    p = np.array(list(found.p_of.values())) * rng.uniform(0.5, 2, (len(found.p_of), 4))
    p, labels = p / p.sum(axis=1, keepdims=True), np.array(list(found.label_of.values()))
    table = f"{folder}/predictions_test.csv"
    files.write(table, runs.predictions_csv(heads.Predictions(list(found.p_of), labels, p)))
    result = found.result | metrics.evaluate(labels, p, ids=list(found.p_of))
    result = results.sealed(result | {"predictions_sha256": files.sha256(table)})
    files.write(f"{folder}/eval_test.json", json.dumps(result))
    return folder


def evaluate(participants=1067):
    with tempfile.TemporaryDirectory() as folder:
        scale, encoder, run = (1 / 32, 1 / 32, 1 / 32), f"{folder}/encoder.pt", f"{folder}/run"
        phantom.write_dataset(f"{folder}/data", participants=participants, scale=scale)
        phantom.write_encoder(encoder, image_size=(8, 32, 32), dim=64, depth=1)
        overrides = f"""demo.dir=null paths.data={folder}/data paths.checkpoint_path={encoder}
            paths.cache_dir={folder}/cache paths.run_dir={run} model.emb_dim=64
            eval.floors=true""".split()
        timed(train.main, 0, config.load("configs/demo.yaml", overrides))
        timed(evaluation.evaluate_run, run, "test")  # encodes
        one, (result, _) = timed(evaluation.evaluate_run, run, "test")
        others = [another_run(f"{folder}/runs/{n}", run, n) for n in range(20)]
        twenty, text = timed(compare.compare, others, "test")
    what = f"evaluating {result['n']} participants, {result['volumes']} volumes: seconds"
    figure(what, one, at_most=5)
    figure(f"comparing 20 runs, {text.count('McNemar')} pairs: seconds", twenty, at_most=10)


def evaluate_many(n):
    """-> seconds, peak GB of the scores of n participants of random answers."""
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 4, n), rng.dirichlet(np.ones(4), n)
    members = {"site": rng.choice(list("abc"), n), "age": rng.choice(list("345678"), n)}
    ids = [str(i) for i in range(n)]
    return timed(lambda: metrics.evaluate(y, p, 4, ids, groups=members))[0], peak_gb()


def cohort(participants=(1000, 5000, 20000)):
    for n in participants:
        ((took, memory),) = apart(evaluate_many, n)
        figure(f"scoring {n} participants: seconds", took, at_most=120)
        figure(f"scoring {n} participants: GB", memory, at_most=2)


if __name__ == "__main__":
    bench(__doc__, processes=by_processes, growth=growth, evaluate=evaluate, cohort=cohort)
