"""What share of a fine-tuning step the sum of the gradients takes, and the step of more GPUs.

    .venv/bin/python bench/reduction.py measure                     # two minutes on two cores
    torchrun ... bench/reduction.py measure                         # between hosts: docs/hosts.md
    .venv/bin/python bench/reduction.py extrapolate --network 12.5 50

measure: device.all_sum_gradients of the full-size encoder's gradients (float32, 344 MB; 372 with
the positions of all tokens), and of fewer, between --processes replicas on loopback, or those that
torchrun has started; and a step (forward, backward, clipping, AdamW) of the same encoder on a
volume of 1/64 of the tokens, a thread for each replica, without the sum. The step of a whole volume
is EXTRAPOLATED from it by its number of multiplications.
extrapolate: nothing is measured. All is ASSUMED: the GPU's peak in bf16, TFLOP/s, and the share of
it that a step reaches; a step is four forward passes (activation checkpointing) of --volumes for
each GPU; GPUs in hosts of eight; GB/s of a GPU's links within its host, and of a host's network in
each direction, of which --efficiency is reached. A ring sends 2 (n - 1) / n of the gradients; the
sum begins when the backward pass has ended, as device.all_sum_gradients does.
"""

import statistics

import torch
from fullsize import DIM, TOKENS, flop, seconds
from measure import bench, row

import config
import device
import hosts
import model

SMALL, FEWER = (16, 96, 96), 64  # a volume, and how many times fewer tokens it has
MEGABYTES = (1, 16, 128)


def measure_in_replica(rank, cfg):
    dev = device.get(cfg.device.backend)
    if dev.type == "cpu":
        torch.set_num_threads(1)
    device.seed(0, dev)
    encoder = model.ViT3D(DIM, 12, TOKENS // FEWER).train().to(dev)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5)
    volume = torch.randn(1, 1, *SMALL, device=dev)

    def step():
        with device.autocast(dev, "fp32" if dev.type == "cpu" else "bf16"):
            encoder(volume).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()

    def median(job, times=5):
        def once():
            device.barrier(dev)  # all begin together
            return seconds(job, dev)

        once()
        return statistics.median(once() for _ in range(times))

    alone = median(step)
    print(f"{device.describe(dev)}; a step without the sum, 1/{FEWER} of the tokens: {alone:.3g} s")
    row("gradients, MB", "their sum, s", "MB/s")
    for size in MEGABYTES:
        part = torch.nn.Parameter(torch.zeros(size * 250_000, device=dev))
        part.grad = torch.ones_like(part)
        took = median(lambda part=part: device.all_sum_gradients([part]))
        row(size, f"{took:.3g}", f"{size / took:.3g}")
    took = median(lambda: device.all_sum_gradients(encoder.parameters()))
    size = sum(p.numel() for p in encoder.parameters()) * 4 / 1e6
    row(f"{size:.0f}, the encoder's", f"{took:.3g}", f"{size / took:.3g}")
    whole = alone * flop(12) / flop(12, size=SMALL)
    row("step", "without the sum, s", "share of the sum")
    row(f"1/{FEWER} of the tokens", f"{alone:.3g}", f"{took / (took + alone):.1%}")
    row("a whole volume, EXTRAPOLATED", f"{whole:.3g}", f"{took / (took + whole):.2%}")


def measure(processes=2, backend="auto"):
    count = 1 if hosts.find() else processes
    overrides = [f"device.processes={count}", f"device.backend={backend}"]
    device.launch(measure_in_replica, config.load("configs/base.yaml", overrides))


def extrapolate(
    network=(12.5, 50.0), efficiency=0.7, links=450.0, peak=989.0, share=0.4, volumes=1
):
    gigabytes, each = 0.372, 8
    computing = volumes * 4 * flop(12) / 1e12 / (peak * share)
    print(
        f"EXTRAPOLATED from assumptions: {peak:g} TFLOP/s, {share:.0%} of it; {volumes} volumes a "
        f"GPU; {each} GPUs a host, links {links:g} GB/s, {efficiency:.0%} of every bandwidth"
    )
    row("GPUs", "network of a host", "computing", "sum", "step", "share of the sum", "volumes/s")
    for rate in network:
        for gpus in (1, 8, 16, 64):
            inside, between = min(gpus, each), max(1, gpus // each)
            ring = lambda n, speed: 2 * (n - 1) / n * gigabytes / (speed * efficiency)
            summing = ring(inside, links) + ring(between, rate)
            whole = computing + summing
            times = (f"{1000 * s:.0f} ms" for s in (computing, summing, whole))
            last = f"{summing / whole:.0%}", f"{gpus * volumes / whole:.0f}"
            row(gpus, f"{8 * rate:g} Gbit/s", *times, *last)


if __name__ == "__main__":
    device.run(lambda: bench(__doc__, measure=measure, extrapolate=extrapolate))
