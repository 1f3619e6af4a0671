"""The full-size encoder (C 768, depth 12, 9216 tokens of 64x384x384).

    .venv/bin/python bench/encoder.py forward              # 5 minutes on two cores, 9 GB of memory
    .venv/bin/python bench/encoder.py forward --depth 2    # a minute and a half: blocks are alike
    .venv/bin/python bench/encoder.py step                 # a training step; --backend cuda
    .venv/bin/python bench/encoder.py checkpoint           # a minute, 1.5 GB of disk
    .venv/bin/python bench/encoder.py gpu                  # has never met a GPU

forward: as `make probe` runs it on the CPU, against the same network with the whole matrix of
attention in memory, softmax(q k^T) v in float32, as V-JEPA's own code writes it; "q scaled" saves
that one pass over the scores. Each way runs in a process of its own. Required: bf16 4.5 times
faster, float32 and bf16 in at most a sixth of the memory, tokens equal to 1e-4 and 1e-2 of their
norm. Half of the reference's time is the system's, which zeroes 12 GB in every block: beside other
processes the ratio falls, from 8 to 4.
step: forward, backward, clipping and AdamW of one volume, with and without activation
checkpointing; weights, gradients and AdamW's state (1.5 GB) count. Required: half the memory, the
same gradients.
checkpoint: model.load_encoder of a file with the optimizer's moments, not in the page cache, in
four processes at once, as on a TPU host. Required: each has at most 0.5 GB more private memory at
any time (Private_Dirty of smaps_rollup: clean pages are shared), and the file is read once.
gpu: volumes/s in bf16 by batch (aim: 45 % of the matrix product), and the feature pass from cached
volumes (aim: 90 % of the encoder's rate).
"""

import multiprocessing
import os
import statistics
import tempfile
import threading

import torch
import torch.nn.functional as F
from measure import apart, bench, check, header, of_process, peak_gb, require, row, timed

import config
import data
import device
import features
import files
import heads
import ledger
import model
import phantom

SIZE, DIM, TOKENS = (64, 384, 384), 768, 9216


def settings(precision):
    overrides = [f"train.precision={precision}", f"model.emb_dim={DIM}", "log.wandb=disabled"]
    return config.load("configs/base.yaml", overrides)


def build(depth):
    torch.manual_seed(0)
    return model.ViT3D(DIM, depth, TOKENS).eval().requires_grad_(False)


def flop(depth):
    """Of a volume's forward pass: products of the patches, of each block's four layers, and of
    q k^T and of that with v."""
    block = 2 * TOKENS * 12 * DIM * DIM + 4 * TOKENS * TOKENS * DIM
    return 2 * TOKENS * (4 * 16 * 16) * DIM + depth * block


def seconds(job, dev):
    """Of job(), until the device has done it."""
    return timed(lambda: (job(), torch.cuda.synchronize() if dev.type == "cuda" else None))[0]


def matmul_rate(dev, dtype, n):
    """FLOP/s of the best of ten products of n x n."""
    a, b = torch.randn(2, n, n, device=dev).to(dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b, dev) for _ in range(10))


def materialised(q, k, v):
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def q_scaled(q, k, v):
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


ATTENTION = {"materialised": materialised, "q scaled": q_scaled}  # else the product's own
WAYS = (*ATTENTION, "float32", "bf16")


def encode_alone(way, depth, path):
    """-> seconds, peak GB, FLOP/s of a matrix product, seconds by layer; writes the tokens."""
    dev, encoder, spent = device.get("cpu"), build(depth), {}
    precision, dtype = ("bf16", torch.bfloat16) if way == "bf16" else ("fp32", torch.float32)
    volume = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(1)).half()

    def watched(name, call):
        def run(*args):
            took, out = timed(call, *args)
            spent[name] = spent.get(name, 0) + took
            return out

        return run

    device.attention = watched("attention", ATTENTION.get(way, device.attention))
    for name, layer in encoder.named_modules():
        if name == "patch_embed" or not list(layer.children()):
            layer.forward = watched(name.split(".")[-1], layer.forward)
    encoder.register_forward_hook(lambda _, args, tokens: torch.save(tokens.float(), path))
    rate = matmul_rate(dev, dtype, 2048)
    took = timed(lambda: features.begin(settings(precision), encoder, volume, dev).cpu())[0]
    return took, peak_gb(), max(rate, matmul_rate(dev, dtype, 2048)), spent


def forward(args):
    work, results = flop(args.depth), {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("bf16", "materialised", "bf16", "q scaled", "bf16", "float32"):
            results[way] += apart(encode_alone, way, args.depth, f"{folder}/{way}.pt")
        tokens = {way: torch.load(f"{folder}/{way}.pt") for way in WAYS}
    print(f"{os.cpu_count()} cores, {args.depth} blocks, {work / 1e12:.2f} TFLOP a volume\n")
    rates = "GFLOP/s", "of a matrix product's", "largest shares of the time"
    header("forward", "time", "faster", "memory", "share", "difference", *rates)
    took = {way: statistics.mean(result[0] for result in results[way]) for way in WAYS}
    for way in WAYS:
        faster, rate = took["materialised"] / took[way], work / took[way]
        _, memory, limit, _ = map(max, zip(*(r[:3] + (0,) for r in results[way])))
        share = memory / results["materialised"][0][1]
        difference = (tokens[way] - tokens["materialised"]).norm() / tokens["materialised"].norm()
        spent = sorted(((s, name) for name, s in results[way][0][3].items()), reverse=True)
        parts = ", ".join(f"{name} {s / results[way][0][0]:.0%}" for s, name in spent[:4])
        cells = f"{took[way]:.1f} s", f"{faster:.1f}x", f"{memory:.2f} GB", f"{share:.0%}"
        rates = f"{rate / 1e9:.0f}", f"{rate / limit:.0%} of {limit / 1e9:.0f}", parts
        row(way, *cells, f"{difference:.1e}", *rates)
        require(f"{way}: 4.5 times faster", way != "bf16" or faster >= 4.5)
        require(f"{way}: a sixth of the memory", way in ATTENTION or share <= 1 / 6)
        require(f"{way}: the same tokens", difference <= (1e-2 if way == "bf16" else 1e-4))
    print(f"\nbf16 against q scaled: {took['q scaled'] / took['bf16']:.1f}x")


def step_alone(backend, precision, checkpoints, depth):
    """-> seconds, peak GB, norm of the gradient."""
    dev, cfg = device.get(backend), settings(precision)
    encoder, volume = build(depth).to(dev), torch.randn(1, 1, *SIZE).half()
    encoder.requires_grad_(True).train()
    encoder.checkpoint = device.checkpointing(dev) if checkpoints else None
    bank = heads.Heads(DIM, 4, heads.settings_of(cfg)).to(dev)
    optimizer = heads.Optimizer(cfg, bank, encoder)

    def step():
        with device.autocast(dev, precision):
            tokens = encoder(volume.to(dev).float())
        logits = bank(model.pool(tokens.float(), "mean"))
        F.cross_entropy(logits[0], torch.tensor([3], device=dev)).backward()
        norms.append(optimizer.clip(1.0).item())
        optimizer.step(1.0, 1.0)

    norms, rounds = [], 1 if backend == "cpu" else 4  # on a GPU the first ones choose kernels
    took = [seconds(step, dev) for _ in range(rounds)][-1]
    peak = peak_gb() if backend == "cpu" else torch.cuda.max_memory_allocated() / 1e9
    return took, peak, norms[-1]


def step(args):
    header(f"{args.backend}, {args.precision}", "peak memory", "time", "norm of the gradient")
    ways = args.backend, args.precision
    off, on = (
        apart(step_alone, *ways, checkpoints, args.depth)[0] for checkpoints in (False, True)
    )
    for name, (took, peak, norm) in (("no checkpointing", off), ("activation checkpointing", on)):
        row(name, f"{peak:.1f} GB", f"{took:.2f} s, {took / off[0]:.2f}x", f"{norm:.5f}")
    require("half the memory", on[1] < off[1] / 2)
    require("the same gradients", abs(on[2] / off[2] - 1) < 1e-2)


def samples_below(folder, count):
    """Samples whose files are never decoded: what that would give is in the cache."""
    samples = []
    for i in range(count):
        path, split = f"{folder}/{i}", ledger.SPLITS[i % 3]
        files.write(path, str(i)) if not os.path.exists(path) else None
        source = data.b2.Object(path, 1)
        samples.append(ledger.Sample(str(i), split, 0, "", "L", path, source))
    return samples


def fill_cache(folder, samples, size):
    kept = data.Volumes(samples, size, f"{folder}/cache")
    for i, sample in enumerate(samples):
        files.write(kept.note(i), files.checksum(sample.path, "sha1"))
        path = os.path.join(kept.folder, kept.key(i) + ".npy")
        files.save_array(path, torch.randn(size).half().numpy())


def gpu(args):
    dev, encoder, best = device.get("cuda"), build(args.depth).to("cuda"), 0
    limit = matmul_rate(dev, torch.bfloat16, 8192)
    print(f"{device.describe(dev)}: {limit / 1e12:.0f} TFLOP/s in products of 8192 x 8192\n")
    header("bf16", "volumes/s", "share of the matrix product", "peak memory")
    for batch in (1, 2, 4, 8, 16):
        x = torch.randn(batch, 1, *SIZE, device=dev)
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad(), device.autocast(dev, "bf16"):
            times = [seconds(lambda x=x: encoder(x), dev) for _ in range(6)]
        rate = batch / statistics.median(times[2:])  # the first ones choose kernels
        memory, share = torch.cuda.max_memory_allocated() / 1e9, rate * flop(args.depth) / limit
        row(f"batch {batch}", f"{rate:.1f}", f"{share:.0%}", f"{memory:.1f} GB")
        best = max(best, rate)
    cfg, count, whole = settings("bf16"), 64, features.Encoder(encoder, SIZE, "0" * 64)
    with tempfile.TemporaryDirectory() as folder:
        samples, cfg.paths.cache_dir = samples_below(folder, count), f"{folder}/cache"
        fill_cache(folder, samples, SIZE)
        book = ledger.Ledger([], samples)
        rate = count / timed(features.encode, cfg, book, samples, whole, dev)[0]
    row("feature pass", f"{rate:.1f}", f"{rate / best:.0%} of the best batch", "-")


def load(path, processes, barrier):
    """-> seconds, private GB before, at most that much more, GB that the disk was asked for."""
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))  # as device.launch does
    private = lambda: of_process("smaps_rollup", "Private_Dirty") / 1e6
    samples, is_done = [], threading.Event()

    def sample():
        while not is_done.wait(0.05):
            samples.append(private())

    before, disk, watcher = (
        private(),
        of_process("io", "read_bytes"),
        threading.Thread(target=sample),
    )
    barrier.wait()
    watcher.start()
    took, encoder = timed(model.load_encoder, path)
    is_done.set()
    watcher.join()
    cost = max(*samples, private()) - before
    barrier.wait()  # the others are still to load: what is shared stays shared
    return took, before, cost, (of_process("io", "read_bytes") - disk) / 1e9


def checkpoint(args):
    barrier = multiprocessing.get_context("spawn").Barrier(args.processes)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/encoder.pt"
        phantom.write_encoder(path, SIZE, DIM, 12, optimizer=True)
        size = os.path.getsize(path) / 1e9
        with open(path, "rb") as f:  # out of the page cache
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        results = apart(load, path, args.processes, barrier, count=args.processes)
    took, before, cost, _ = map(max, zip(*results))
    disk = sum(result[3] for result in results)
    header(f"loading {size:.2f} GB on {args.processes} processes", "measured", "required")
    check("more private memory, each", f"{cost:.2f} GB", "at most 0.5", cost <= 0.5)
    check("read from the disk, by all", f"{disk:.2f} GB", f"at most {size:.2f}", disk <= 1.1 * size)
    row("the slowest; private memory before", f"{took:.1f} s; {before:.2f} GB", "-")


if __name__ == "__main__":
    depth = dict(type=int, default=12, help="of forward, step, gpu")
    processes = dict(type=int, default=4, help="of checkpoint")
    backend = dict(choices=("cpu", "cuda"), default="cpu", help="of step")
    precision = dict(choices=("fp32", "bf16"), default="fp32", help="of step")
    parts = {"forward": forward, "step": step, "checkpoint": checkpoint, "gpu": gpu}
    options = {"--depth": depth, "--processes": processes, "--backend": backend}
    bench(__doc__, parts, options | {"--precision": precision})
