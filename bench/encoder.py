"""The full-size encoder (C 768, depth 12, 9216 tokens of 64x384x384).

    .venv/bin/python bench/encoder.py forward              # 5 minutes on two cores, 9 GB of memory
    .venv/bin/python bench/encoder.py forward --depth 2    # a minute and a half: blocks are alike
    .venv/bin/python bench/encoder.py step                 # a training step
    .venv/bin/python bench/encoder.py checkpoint           # a minute, 1.5 GB of disk
    .venv/bin/python bench/encoder.py others               # five minutes; requirements-encoders.txt

forward: as `make probe` runs it on the CPU, against the same network with the whole matrix of
attention in memory, softmax(q k^T) v in float32, as V-JEPA's own code writes it; "q scaled" saves
that one pass over the scores. Each way runs in a process of its own. Half of the reference's time
is the system's, which zeroes 12 GB in every block: beside other processes the ratio falls.
step: forward, backward, clipping and AdamW of one volume, with and without activation
checkpointing; weights, gradients and AdamW's state (1.5 GB) count.
checkpoint: model.load_encoder of a file with the optimizer's moments, not in the page cache, in
four processes at once, as on a TPU host. Private memory is Private_Dirty of smaps_rollup, at any
time: clean pages are shared.
others: the feature pass of one volume in bf16 by other encoders, against the pretraining's, and
against the same network run by its own library: V-JEPA 2 of ViT-L's width (64x256x256, 8192
tokens), and ViT-L on 1 and on 64 B-scans of 224x224. Of the first two, --depth blocks.
bench/gpu.py measures a GPU.
"""

import functools
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import threading

import torch
import torch.nn.functional as F
from fullsize import DIM, SIZE, build, flop, matmul_rate
from measure import apart, bench, figure, of_process, peak_gb, timed

import config
import device
import features
import heads
import model
import phantom


def settings(precision):
    overrides = [f"train.precision={precision}", f"model.emb_dim={DIM}", "log.wandb=disabled"]
    return config.load("configs/base.yaml", overrides)


def materialised(q, k, v):
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def q_scaled(q, k, v):
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


ATTENTION = {"materialised": materialised, "q scaled": q_scaled}  # else the product's own


def encode_alone(way, depth, path):
    """-> seconds, peak GB, FLOP/s of a matrix product, share of attention; writes the tokens."""
    dev, encoder, spent = device.get("cpu"), build(depth), []
    precision, dtype = ("bf16", torch.bfloat16) if way == "bf16" else ("fp32", torch.float32)
    volume = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(1)).half()
    own = ATTENTION.get(way, device.attention)

    def attention(*qkv):
        took, out = timed(own, *qkv)
        spent.append(took)
        return out

    device.attention = attention
    encoder.register_forward_hook(lambda _, args, tokens: torch.save(tokens.float(), path))
    rate = matmul_rate(dev, dtype, 2048)
    took = timed(lambda: features.begin(settings(precision), encoder, volume, dev).cpu())[0]
    return took, peak_gb(), max(rate, matmul_rate(dev, dtype, 2048)), sum(spent) / took


def forward(depth=12):
    results, tokens = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("bf16", "materialised", "bf16", "q scaled", "bf16", "float32"):
            results[way] = results.get(way, []) + apart(encode_alone, way, depth, f"{folder}/{way}")
        tokens = {way: torch.load(f"{folder}/{way}") for way in results}
    mean = {way: [statistics.mean(n) for n in zip(*found)] for way, found in results.items()}
    slow, memory, *_ = mean["materialised"]
    figure("materialised: seconds", slow)
    figure("bf16: times faster", slow / mean["bf16"][0], at_least=4.5)
    figure("bf16: times faster than q scaled", mean["q scaled"][0] / mean["bf16"][0])
    for way, tolerance in (("float32", 1e-4), ("bf16", 1e-2)):
        took, peak, limit, share = mean[way]
        rate, difference = flop(depth) / took, tokens[way] - tokens["materialised"]
        difference = (difference.norm() / tokens["materialised"].norm()).item()
        figure(f"{way}: share of {memory:.2f} GB, the peak of memory", peak / memory, at_most=1 / 6)
        figure(f"{way}: difference of the tokens, relative", difference, at_most=tolerance)
        figure(f"{way}: GFLOP/s", rate / 1e9)
        figure(f"{way}: share of a matrix product's {limit / 1e9:.0f} GFLOP/s", rate / limit)
        figure(f"{way}: share of attention in the time", share)


def step_alone(precision, checkpoints, depth):
    """-> seconds, peak GB, norm of the gradient."""
    dev, cfg = device.get("cpu"), settings(precision)
    encoder, volume = build(depth), torch.randn(1, 1, *SIZE).half()
    encoder.requires_grad_(True).train()
    encoder.checkpoint = device.checkpointing(dev) if checkpoints else None
    bank, norms = heads.Heads(DIM, 4, heads.settings_of(cfg)), []
    optimizer = heads.Optimizer(cfg, bank, encoder)

    def step():
        with device.autocast(dev, precision):
            tokens = encoder(volume.float())
        logits = bank(model.pool(tokens.float(), "mean"))
        F.cross_entropy(logits[0], torch.tensor([3])).backward()
        norms.append(optimizer.clip(1.0).item())
        optimizer.step(1.0, 1.0)

    took, _ = timed(step)
    return took, peak_gb(), norms[0]


def step(precision="fp32", depth=12):
    (off, memory_off, norm_off), (on, memory_on, norm_on) = (
        apart(step_alone, precision, checkpoints, depth)[0] for checkpoints in (False, True)
    )
    figure(f"{precision}, no checkpointing: GB", memory_off)
    figure("activation checkpointing: GB", memory_on, at_most=memory_off / 2)
    figure("its time, against none", on / off)
    figure("difference of the gradients' norm, relative", abs(norm_on / norm_off - 1), at_most=0.01)


def load(path, processes, barrier):
    """-> seconds, private GB before, at most that much more, GB that the disk was asked for."""
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))  # as device.launch does
    private = lambda: of_process("smaps_rollup", "Private_Dirty") / 1e6
    before, disk, is_done, most = private(), of_process("io", "read_bytes"), threading.Event(), [0]

    def sample():
        while not is_done.wait(0.05):
            most[0] = max(most[0], private())

    watcher = threading.Thread(target=sample)
    barrier.wait()
    watcher.start()
    took, encoder = timed(model.load_encoder, path)
    is_done.set()
    watcher.join()
    cost = max(most[0], private()) - before
    barrier.wait()  # the others are still to load: what is shared stays shared
    return took, before, cost, (of_process("io", "read_bytes") - disk) / 1e9


def checkpoint(processes=4):
    barrier = multiprocessing.get_context("spawn").Barrier(processes)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/encoder.pt"
        phantom.write_encoder(path, SIZE, DIM, 12, optimizer=True)
        size = os.path.getsize(path) / 1e9
        with open(path, "rb") as f:  # out of the page cache
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        results = apart(load, path, processes, barrier, count=processes)
    took, before, cost, _ = map(max, zip(*results))
    figure(f"private memory beside {before:.2f} GB before, GB each", cost, at_most=0.5)
    disk = sum(result[3] for result in results)
    figure(f"read from the disk by all {processes}, of {size:.2f} GB", disk, at_most=1.1 * size)
    figure("seconds of the slowest", took)


def file_of(name):
    """The module of encoders/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, f"encoders/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def other(name, depth):
    """-> an encoder of random weights, and the size of its volume."""
    torch.manual_seed(0)
    slices = file_of("slices")
    if name == "the pretraining's":
        return build(depth), SIZE
    if name == "V-JEPA 2":
        vjepa2 = file_of("vjepa2")
        return vjepa2.VJEPA2(1024, depth, 4096, (2, 16, 16), 16, "2").eval(), (64, 256, 256)
    if name == "V-JEPA 2 by transformers":
        library = slices.import_library("transformers")
        options = dict(hidden_size=1024, num_hidden_layers=depth, num_attention_heads=16)
        network = library.VJEPA2Model(
            library.VJEPA2Config(crop_size=256, frames_per_clip=64, **options)
        ).eval()
        # (B, 1, D, H, W) -> (B, D, 3, H, W)
        frames = lambda volume: volume.transpose(1, 2).expand(-1, -1, 3, -1, -1)
        return lambda volume: network(frames(volume), skip_predictor=True), (64, 256, 256)
    count, name_of_timm = int(name.split()[1]), "vit_large_patch16_224"
    if "timm" not in name:
        frames = {"frames": count, "random": True}
        return slices.load(None, name=name_of_timm, **frames).eval(), (64, 224, 224)
    network = slices.import_library("timm").create_model(name_of_timm, num_classes=0).eval()

    def scans(volume):  # as slices.py: eight at once
        images = volume[0].transpose(0, 1).expand(-1, 3, -1, -1)[:count]  # (D, 3, H, W)
        return torch.cat([network(part) for part in images.split(8)])

    return scans, (64, 224, 224)


def other_alone(name, depth):
    """-> seconds, peak GB of the feature pass of one volume."""
    encoder, size = other(name, depth)
    volume = torch.rand(1, 1, *size)
    with torch.no_grad(), device.autocast(torch.device("cpu"), "bf16"):
        took = min(timed(functools.partial(encoder, volume))[0] for _ in range(2))
    return took, peak_gb()


def others(depth=2):
    names = ["the pretraining's", "V-JEPA 2", "V-JEPA 2 by transformers"]
    names += [f"{library} {count}" for count in (1, 64) for library in ("slices", "timm")]
    found = {name: apart(other_alone, name, depth)[0] for name in names}
    ours, _ = found["the pretraining's"]
    for name, (took, peak) in found.items():
        figure(f"{name}: time, against the pretraining's", took / ours)
        figure(f"{name}: GB", peak)
    pairs = {"V-JEPA 2": "V-JEPA 2 by transformers", "slices 1": "timm 1", "slices 64": "timm 64"}
    for name, library in pairs.items():
        figure(f"{name}: time, against {library}", found[name][0] / found[library][0])


if __name__ == "__main__":
    bench(__doc__, forward=forward, step=step, others=others, checkpoint=checkpoint)
