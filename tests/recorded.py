"""Record what train.py and eval.py compute on small data, or compare with an earlier recording.

    python tests/recorded.py record FILE.json.gz            # run every case, write what it computed
    python tests/recorded.py check FILE.json.gz [CASE ...] # run again; exit status 1 if it moved

A recording says what a change to the code must leave as it is, to 1e-6. The cases go through the
commands alone, so the same script records any version of the code (one from before train.choose_by
without OLD_RULE, by which all cases but the last choose their heads). Other processors round
differently, so tests/test_recorded.py compares with a wider tolerance.
"""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOLERANCE = 1e-6
# the temperature is found by a search that stops within 1e-6 on a flat minimum: tiny differences
# of the predictions move where it stops
FITTED, FITTED_TOLERANCE = ("/temperature", "/calibrated/"), 1e-5
VIEWS = [
    "data.augment.flip=true",
    "data.augment.intensity_jitter=0.5",
    "data.augment.rotation=20",
    "data.augment_views=3",
]
FINETUNE = [
    "--config",
    "configs/finetune.yaml",
    "train.epochs=3",
    "train.warmup_epochs=1",
    "data.batch_size=8",
    "model.head.hidden=0",
]
PLAIN = ["train.sweep=null", "train.epochs=8", "train.warmup_epochs=1", "data.batch_size=16"]
SWEEP = ["train.epochs=12", "train.warmup_epochs=2"]
# as heads were chosen before train.choose_by was there; what a case says goes before it
OLD_RULE = ["train.choose_by=balanced_accuracy", "train.refit=false"]
CASES = {
    "probe": SWEEP,
    "probe_views": [*SWEEP, *VIEWS, "data.batch_size=16", "train.early_stopping.patience=3"],
    "probe_losses": [
        *SWEEP,
        "train.sweep.lr_head=[0.003]",
        "train.sweep.weight_decay=[0.1]",
        "train.sweep.loss=[ce,focal,label_smoothing,ordinal,balanced_softmax,logit_adjustment]",
        "train.sweep.class_weights=[none,auto,effective]",
        "data.batch_size=16",
    ],
    "plain": PLAIN,
    "plain_4_processes": [*PLAIN, "device.processes=4"],
    "plain_killed": PLAIN,
    "plain_stratified": [
        *PLAIN,
        "data.sampler=stratified",
        "train.class_weights=none",
        "model.head.dropout=0.2",
        "train.grad_clip=0.5",
        "model.head.ordinal=true",
    ],
    "plain_logit_adjustment": [*PLAIN, "train.loss=logit_adjustment", "train.class_weights=none"],
    "mlp": [*PLAIN, "model.head.hidden=32", "model.head.dropout=0.1"],
    "attentive": [
        "--config",
        "configs/attentive.yaml",
        "model.token_grid=[2,2,2]",
        "train.epochs=8",
        "train.warmup_epochs=1",
        "data.batch_size=16",
    ],
    "finetune": FINETUNE,
    "finetune_4_processes": [*FINETUNE, "device.processes=4"],
    "finetune_killed": FINETUNE,
    "finetune_mlp": [
        *FINETUNE,
        "model.head.hidden=16",
        "model.freeze_encoder=false",
        "model.unfreeze_at_epoch=-1",
    ],
    "knn": ["--config", "configs/knn.yaml"],
    "logistic_regression": ["--config", "configs/logistic_regression.yaml"],
    "cv": [*SWEEP, "data.cv=3", "train.seeds=[1,2]"],
    "cv_knn": ["--config", "configs/knn.yaml", "data.cv=3"],
    "seeds": [*SWEEP, "train.seeds=[3,1,2]", "data.batch_size=16"],
    "floors": [*SWEEP, "eval.floors=true"],
    "by_log_loss": [*SWEEP, "train.choose_by=log_loss", "train.refit=true"],
}


def run(script, *args):
    command = [sys.executable, script, *args]
    answer = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if answer.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{answer.stdout}{answer.stderr}")


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def killed_once(args, run_dir):
    """Start training, kill it after its second epoch, and train again with train.resume=auto."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *args, "train.resume=auto"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    history = os.path.join(run_dir, "metrics.jsonl")
    while process.poll() is None:
        if os.path.exists(history) and count_lines(history) >= 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            break
        time.sleep(0.002)
    run("train.py", *args, "train.resume=auto")


def count_lines(path):
    with open(path) as f:
        return sum(1 for _ in f)


def numbers(tree, prefix=""):
    """Nested JSON -> {"path/to/number": value} of its numbers; its texts are made of them."""
    if isinstance(tree, (dict, list)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in numbers(value, f"{prefix}/{key}").items()}
    return (
        {prefix: float(tree)}
        if isinstance(tree, (int, float)) and not isinstance(tree, bool)
        else {}
    )


def read_run(folder):
    """What a finished run's folder holds in numbers, and its alarms."""
    found = {}
    for split in ("val", "test"):
        with open(f"{folder}/eval_{split}.json") as f:
            result = json.load(f)
        alarms = [by_number(alarm, result["classes"]) for alarm in result["alarms"]]
        result.pop("looks", None)  # how many cases were scored before
        result.pop("feature_map", None)  # newer than the recording; test_feature_map.py has it
        found |= numbers(result, f"eval_{split}") | {f"eval_{split}/alarms": alarms}
    for name in sorted(os.listdir(folder)):
        if name.startswith("predictions_") or name in ("sweep.csv", "cv.csv"):
            with open(f"{folder}/{name}", newline="") as f:
                rows = [[as_number(cell) for cell in row] for row in csv.reader(f)]
            if name == "sweep.csv":  # heads that are the same up to rounding may change places
                rows = in_order_of_settings(rows)
            found |= {f"{name}/{i}": row for i, row in enumerate(rows)}
    with open(f"{folder}/metrics.jsonl") as f:
        for line in f:
            record = json.loads(line)
            found |= numbers(record, f"metrics/{record['epoch']}")
    return found


def in_order_of_settings(rows):
    """The header, then the rows of sweep.csv by the settings that come before best_epoch."""
    header, *heads = rows
    end = header.index("best_epoch")
    return [header, *sorted(heads, key=lambda row: str(row[:end]))]


def as_number(cell):
    try:
        return float(cell)
    except ValueError:
        return cell


def record(names):
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        run("phantom.py", data, "--participants", "48", "--scale", "1/16", "1/16", "1/16")
        shared = [
            f"paths.data={data}",
            "demo.dir=null",
            "paths.checkpoint_path=tests/fixtures/vjepa3d_tiny.pt",
            f"paths.cache_dir={folder}/cache",
            "data.image_size=[16,64,64]",
        ]
        for name in names:
            run_dir = f"{folder}/runs/{name}"
            args = [
                "--config",
                "configs/demo.yaml",
                *OLD_RULE,
                *CASES[name],
                *shared,
                f"paths.run_dir={run_dir}",
            ]
            started = time.time()
            if name.endswith("_killed"):
                killed_once(args, run_dir)
            else:
                run("train.py", *args)
            for split in ("val", "test"):
                run("eval.py", "--ckpt", run_dir, "--split", split)
            found[name] = read_run(run_dir)
            print(f"{name}: {len(found[name])} values, {time.time() - started:.0f} s", flush=True)
    return found


def by_number(alarm, classes):
    """An alarm that numbers the classes, as they did when these were recorded."""
    for k, name in enumerate(classes):
        alarm = alarm.replace(name, str(k))
    return alarm


def difference(old, new):
    """The largest distance between two recorded values; infinity where they differ in kind."""
    if isinstance(old, list):
        if not isinstance(new, list) or len(old) != len(new):
            return float("inf")
        return max((difference(a, b) for a, b in zip(old, new)), default=0.0)
    if isinstance(old, float) and isinstance(new, float):
        return 0.0 if old == new or old != old and new != new else abs(old - new) / max(1, abs(old))
    return 0.0 if old == new else float("inf")


def compare(old, new, tolerance=TOLERANCE):
    """{name: (old, new)} of the values that moved by more than the tolerance, or are missing."""
    moved = {}
    for name in {**old, **new}:
        allowed = max(tolerance, FITTED_TOLERANCE) if any(x in name for x in FITTED) else tolerance
        if name not in old or name not in new or difference(old[name], new[name]) > allowed:
            moved[name] = old.get(name), new.get(name)
    return moved


def load(path):
    with gzip.open(path, "rt") as f:
        return json.load(f)


def main():
    what, path, *names = sys.argv[1:]
    if what == "record":
        with gzip.open(path, "wt") as f:
            json.dump(record(names or CASES), f)
        return 0
    expected = load(path)
    found = record(names or CASES)
    failed = 0
    for name, values in found.items():
        worst = max(
            (difference(v, values.get(k, "")) for k, v in expected[name].items()), default=0.0
        )
        moved = compare(expected[name], values)
        print(f"{name}: largest difference {worst:.1e}, {len(moved)} values moved")
        for key in list(moved)[:6]:
            print(f"    {key}: {moved[key][0]} -> {moved[key][1]}")
        failed += bool(moved)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
