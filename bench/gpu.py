"""What a GPU does with the full-size encoder (C 768, depth 12, 9216 tokens of 64x384x384).

    make bench-gpu                           # everything; under eight minutes, without a network
    python bench/gpu.py --parts forward step # some of it
    python bench/gpu.py --backend cpu        # tries this script: small sizes, figures mean nothing

It prints the rows of docs/performance.md. With torch, numpy and scikit-learn alone, on any Python
from 3.11 on, it measures all but `runs`, which needs more packages (of requirements-common.txt) and
is skipped, with their names. "required" decides the exit status, "aim" does not.

forward: volumes/s in bf16 by batch, as a share of the speed of a matrix product of 8192 x 8192.
compile: the same with torch.compile, at the best batch.
neighbours: the tokens of a volume in a batch against those of the same volume alone.
step: forward, backward, clipping and AdamW, with and without activation checkpointing.
predictions: probabilities from the features of small volumes, on the GPU against the CPU.
feature_pass: features.encode of cached volumes, against the encoder alone.
runs: train.py on the demo against the CPU; fine-tuning that SIGTERM stops and that is resumed,
against one that is not stopped.
"""

import argparse
import functools
import importlib.util
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from fullsize import DIM, SIZE, build, flop, matmul_rate, seconds
from measure import MISSED, ROOT, figure, row, timed

import device
import heads
import metrics
import model


def settings(precision, dim=DIM, cache_dir=None):
    """What heads.py and features.py read of a config; config.py needs PyYAML and pydantic."""
    sweep = dict.fromkeys(("loss", "ordinal", "class_weights", "lr_head", "weight_decay"))
    train = dict(loss="cross_entropy", class_weights="auto", lr_head=1e-3, weight_decay=0.01)
    train |= dict(lr_encoder=1e-5, layer_decay=1.0, precision=precision)
    head = SimpleNamespace(hidden=0, dropout=0.0, ordinal=False)
    cache = dict(cache_gb=1e3, fetch_deadline=300, num_workers=0, prefetch=8)
    reading = dict(axes=None, variable=None, max_missing=0, augment=SimpleNamespace())
    return SimpleNamespace(
        train=SimpleNamespace(**train, sweep=SimpleNamespace(**sweep)),
        model=SimpleNamespace(head=head, pool_method="mean", emb_dim=dim),
        data=SimpleNamespace(sampler="shuffle", **cache, **reading),
        paths=SimpleNamespace(features=None, cache_dir=cache_dir),
    )


# ------------------------------------------------------------------------------------- the parts


class Machine:
    """The device, the encoder's sizes on it, and what one part tells the next."""

    def __init__(self, backend):
        small = backend == "cpu"
        self.dev = device.get(backend)
        self.depth, self.dim, self.size = (1, 64, (16, 96, 96)) if small else (12, DIM, SIZE)
        self.batches, self.count = ((1, 2), 4) if small else ((1, 2, 4, 8, 16), 64)
        self.participants = 20 if small else 60  # of the demo
        self.flop = flop(self.depth, self.dim, self.size)
        self.rate_of = {}  # volumes/s by batch

    @functools.cached_property
    def limit(self):
        """FLOP/s of a matrix product in bf16."""
        return matmul_rate(self.dev, torch.bfloat16, 8192 if self.dev.type == "cuda" else 256)

    def encoder(self):
        return build(self.depth, self.dim, self.size).to(self.dev)

    def volumes(self, batch, seed=1):
        """(batch, 1, D, H, W), on the device."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 1, *self.size, generator=generator).to(self.dev)

    def start_memory(self):
        if self.dev.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def gb(self):
        """The most memory of the device since start_memory; 0 on the CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.dev.type == "cuda" else 0.0


def tokens_of(encoder, x, dev, precision="bf16"):
    with torch.no_grad(), device.autocast(dev, precision):
        return encoder(x)


def relative(found, wanted):
    """Norm of the difference, over the norm."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def volumes_a_second(machine, encoder, batch, rounds=6):
    x = machine.volumes(batch)
    times = [
        seconds(lambda: tokens_of(encoder, x, machine.dev), machine.dev) for _ in range(rounds)
    ]
    return batch / statistics.median(times[2:])  # the first ones choose kernels


def forward(machine):
    encoder = machine.encoder()
    figure("matrix product in bf16: TFLOP/s", machine.limit / 1e12)
    for batch in machine.batches:
        machine.start_memory()
        try:
            rate = volumes_a_second(machine, encoder, batch)
        except torch.cuda.OutOfMemoryError:
            row(f"forward, batch {batch}", "out of memory", "")
            break
        machine.rate_of[batch] = rate
        share = rate * machine.flop / machine.limit
        figure(f"forward, batch {batch}: volumes/s", rate)
        aim("forward, share of the matrix product's speed", share, at_least=0.45)
        figure(f"forward, batch {batch}: GB", machine.gb())
    best = max(machine.rate_of, key=machine.rate_of.get)
    rate = machine.rate_of[best] / machine.rate_of[1]
    row(f"best batch, and its volumes/s against batch 1: batch {best}", f"{rate:.3g}", "")


def compiled(machine):
    """Kernels fused by torch.compile. It needs a C compiler and, on a GPU, triton."""
    encoder, batch = machine.encoder(), max(machine.rate_of, key=machine.rate_of.get, default=1)
    plain = machine.rate_of.get(batch) or volumes_a_second(machine, encoder, batch)
    faster = torch.compile(encoder)
    x = machine.volumes(batch)
    took = seconds(lambda: tokens_of(faster, x, machine.dev), machine.dev)
    figure("torch.compile: seconds until the first result", took)
    rate = volumes_a_second(machine, faster, batch)
    figure(f"torch.compile, batch {batch}: volumes/s, against none", rate / plain)
    difference = relative(tokens_of(faster, x, machine.dev), tokens_of(encoder, x, machine.dev))
    figure("torch.compile: difference of the tokens, relative", difference, at_most=2e-2)


def neighbours(machine):
    """A volume's feature should not depend on what else is in the batch. Kernels are chosen by the
    batch, so that it does by their rounding."""
    encoder = machine.encoder()
    batch = max(machine.rate_of, key=machine.rate_of.get, default=2)
    x = machine.volumes(max(batch, 2))
    for precision, most in (("fp32", 1e-4), ("bf16", 2e-2)):
        together = tokens_of(encoder, x, machine.dev, precision)
        alone = tokens_of(encoder, x[:1], machine.dev, precision)
        what = f"batch {len(x)} against alone, {precision}: difference of"
        figure(f"{what} the tokens, relative", relative(together[:1], alone), at_most=most)
        pooled = relative(model.pool(together[:1].float(), "mean"), alone.float().mean(dim=1))
        figure(f"{what} their mean, relative", pooled, at_most=most)


def step(machine):
    for batch in (batch for batch in (1, 2, 4) if batch <= max(machine.batches)):
        for checkpoints in (False, True):
            what = f"training step, batch {batch}, checkpointing {'on' if checkpoints else 'off'}"
            machine.start_memory()
            try:
                took = seconds_of_step(machine, batch, checkpoints)
            except torch.cuda.OutOfMemoryError:
                row(what, "out of memory", "")
                continue
            figure(f"{what}: s", took)
            # forward, and twice that backward; what is computed again is not counted
            share = 3 * batch * machine.flop / took / machine.limit
            aim(f"{what}: share of the matrix product's speed", share, at_least=0.45)
            if batch == 1:
                aim(f"{what}: GB", machine.gb(), at_most=20)
            else:
                figure(f"{what}: GB", machine.gb())


def seconds_of_step(machine, batch, checkpoints):
    cfg, dev, encoder = settings("bf16", machine.dim), machine.dev, machine.encoder()
    encoder.requires_grad_(True).train()
    encoder.checkpoint = device.checkpointing(dev) if checkpoints else None
    bank = heads.Heads(machine.dim, 4, heads.settings_of(cfg)).to(dev)
    optimizer, x = heads.Optimizer(cfg, bank, encoder), machine.volumes(batch)
    targets = torch.arange(batch, device=dev) % 4

    def one():
        with device.autocast(dev, "bf16"):
            tokens = encoder(x)
        logits = bank(model.pool(tokens.float(), "mean"))  # (1, B, 4)
        F.cross_entropy(logits[0], targets).backward()
        optimizer.clip(1.0)
        optimizer.step(1.0, 1.0)

    return statistics.median([seconds(one, dev) for _ in range(6)][2:])


def predictions(machine, count=64):
    """Small volumes of four classes, and a head in closed form on half of them: what it says of the
    others, on this device and on the CPU."""
    size, labels = (16, 96, 96), torch.arange(count) % 4
    volumes = torch.randn(count, 1, 1, *size, generator=torch.Generator().manual_seed(0))
    volumes[:, :, :, 4:8] += 0.1 * labels.view(-1, 1, 1, 1, 1, 1)
    encoder, known = build(4, 192, size), count // 2
    ids = [str(i) for i in range(known)]
    samples = [SimpleNamespace(participant_id=i) for i in ids]

    def probabilities(dev, precision):
        network = encoder.to(dev)
        x = [
            model.pool(tokens_of(network, v.to(dev), dev, precision).float(), "mean")
            for v in volumes
        ]
        x = torch.cat(x).cpu()  # (count, C)
        train = SimpleNamespace(x=x[:known], views=x[:known, None], labels=labels[:known])
        train.samples, train.units = samples, dict(zip(ids, labels.tolist()))
        bank = heads.start(settings(precision, 192), 0, train, 4).to(dev)
        return heads.predict(bank, x[known:].to(dev))[0]  # (count - known, 4)

    cpu = probabilities(torch.device("cpu"), "fp32")
    score = metrics.evaluate(labels[known:].numpy(), cpu, 4)["balanced_accuracy"]
    figure("balanced accuracy of small volumes, CPU", score, at_least=0.5)
    for precision, limit in (("fp32", {"at_most": 1e-3}), ("bf16", {})):
        difference = np.abs(probabilities(machine.dev, precision) - cpu).max()
        what = (
            f"its probabilities here in {precision}, against the CPU's in fp32: largest difference"
        )
        figure(what, difference, **limit)


class NoBar:
    """In place of tqdm's bar, where that is not installed: nothing is shown."""

    def __init__(self, **options):
        self.disable = True

    def update(self):
        pass

    def __exit__(self, *error):
        self.close()


def feature_pass(machine):
    if "tqdm" not in INSTALLED:
        sys.modules["tqdm"] = SimpleNamespace(tqdm=NoBar)
    from cached import fill_cache, samples_below  # now, for all of them import tqdm

    import features
    import ledger

    batch_1 = machine.rate_of.get(1) or volumes_a_second(machine, machine.encoder(), 1)
    whole = features.Encoder(machine.encoder(), machine.size, "0" * 64)
    with tempfile.TemporaryDirectory() as folder:
        fill_cache(folder, machine.count, machine.size)
        samples = samples_below(folder, machine.count)
        cfg = settings("bf16", machine.dim, f"{folder}/cache")
        book = ledger.Ledger([], samples, ())
        took, _ = timed(features.encode, cfg, book, samples, whole, machine.dev)
    rate = machine.count / took
    figure(f"feature pass, {machine.count} cached volumes: volumes/s", rate)
    aim("feature pass, against the encoder alone one volume a call", rate / batch_1, at_least=0.9)


def train(folder, name, backend, *overrides, stop_after=None):
    """train.py on the demo's data -> validation predictions (n, 4), or None where SIGTERM stops it
    after a line."""
    demo = f"{folder}/demo"
    command = [sys.executable, "train.py", "--config", "configs/demo.yaml", *overrides]
    command += [f"demo.dir={demo}", f"paths.data={demo}/data"]
    command += [f"paths.checkpoint_path={demo}/encoder.pt", f"paths.run_dir={folder}/{name}"]
    command += [f"paths.cache_dir={folder}/cache_{backend}", f"device.backend={backend}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if stop_after and line.startswith(stop_after):
                process.terminate()
    wanted = 128 + signal.SIGTERM if stop_after else 0
    if process.returncode != wanted:
        raise RuntimeError(f"exit status {process.returncode}, not {wanted}: {' '.join(command)}")
    if stop_after:
        return None
    table = np.genfromtxt(f"{folder}/{name}/predictions_val.csv", delimiter=",", skip_header=1)
    return table[:, 2:]


def runs(machine):
    backend, few = machine.dev.type, f"demo.participants={machine.participants}"
    probe = (few, "train.sweep=null", "train.early_stopping.enabled=false")
    tune = ("--config", "configs/finetune.yaml", few, "train.early_stopping.enabled=false")
    tune += ("train.epochs=2", "train.save_every=1", "train.resume=auto")
    with tempfile.TemporaryDirectory() as folder:
        here, cpu = (train(folder, f"probe_{b}", b, *probe) for b in (backend, "cpu"))
        what = "demo: largest difference of a probability to the CPU's"
        figure(what, np.abs(here - cpu).max(), at_most=1e-3)
        whole = train(folder, "whole", backend, *tune)
        train(folder, "stopped", backend, *tune, stop_after="epoch   1/2")
        resumed = train(folder, "stopped", backend, *tune)
        difference = np.abs(resumed - whole).max()
        figure("fine-tuning resumed, against not stopped: the same", difference, at_most=1e-3)


# ------------------------------------------------------------------------------------ the command

MORE = ("yaml", "pydantic", "tqdm", "pydicom", "imagecodecs", "fsspec")
INSTALLED = [package for package in MORE if importlib.util.find_spec(package)]
PARTS = {  # and the packages that each imports, beside torch, numpy and scikit-learn
    "forward": (forward, ()),
    "compile": (compiled, ()),
    "neighbours": (neighbours, ()),
    "step": (step, ()),
    "predictions": (predictions, ()),
    "feature_pass": (feature_pass, ()),
    "runs": (runs, MORE),
}


def aim(what, measured, at_least=None, at_most=None):
    """A row with what is hoped for, which does not decide the exit status."""
    row(
        what,
        f"{measured:.3g}",
        f"aim: at {'least' if at_most is None else 'most'} {at_least or at_most:g}",
    )


def command():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--backend", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    if args.backend == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU is here; --backend=cpu tries this script with small sizes")
    machine = Machine(args.backend)
    print(f"{device.describe(machine.dev)}, torch {torch.__version__}, ", end="")
    print(f"Python {platform.python_version()}")
    row("what", "measured", "required")
    row("---", "---", "---")
    for name in args.parts:
        job, packages = PARTS[name]
        missing = [package for package in packages if package not in INSTALLED]
        if missing:
            row(f"{name}: skipped", f"needs {', '.join(missing)}", "")
            continue
        began = time.monotonic()
        try:
            job(machine)
        except Exception as error:  # the rest is measured all the same, and the exit status tells
            traceback.print_exc()
            row(f"{name}: failed", str(error).strip().partition("\n")[0], "")
            MISSED.append(f"{name} failed")
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    sys.exit(f"not met: {'; '.join(MISSED)}" if MISSED else 0)


if __name__ == "__main__":
    command()
