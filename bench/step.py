"""One training step of the full-size encoder (C 768, depth 12, 64x384x384, batch 1): peak memory and time, with and without
activation checkpointing.

    .venv/bin/python bench/step.py                        # CPU, float32; on a machine with a GPU also there, in bf16
    .venv/bin/python bench/step.py --precision bf16

A step is forward, backward, clipping and AdamW with its state. Every row is a process of its own. Memory is what the process
ever held (CPU) or what torch ever allocated (GPU), and counts weights, gradients and the optimizer's state: 1.5 GB. Times are
ratios, but for a GPU's. Exits 1 when checkpointing does not at least halve the memory, or the gradients differ.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)


def step(backend, precision, checkpointing, dim, depth, size):
    """Run in a process of its own; prints seconds, peak GB and the norm of the gradient."""
    import torch

    import device
    import losses
    import model

    torch.manual_seed(0)
    dev = device.get(backend)
    encoder = model.ViT3D(dim, depth, math.prod(n // p for n, p in zip(size, (4, 16, 16)))).to(dev).train()
    head = model.Head(dim, 4).to(dev)
    encoder.checkpoint = device.checkpointing(dev) if checkpointing else None
    optimizer = torch.optim.AdamW(model.parameter_groups(head, encoder, 1e-3, 1e-4, 0.7, 0.05))
    volume = torch.randn(1, 1, *size).half()
    for _ in range(1 if dev.type == "cpu" else 4):  # on a GPU the first ones choose kernels
        if dev.type == "cuda":
            torch.cuda.synchronize()
        began = time.monotonic()
        with device.autocast(dev, precision):
            tokens = encoder(volume.to(dev).float())
        loss = losses.cross_entropy(head(model.pool(tokens.float(), "mean")), torch.tensor([3], device=dev))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *head.parameters()], 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if dev.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() if dev.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([seconds, peak / 1e9, norm]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="on CPU")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--size", type=int, nargs=3, default=(64, 384, 384), metavar=("D", "H", "W"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # what a row's process is called with
    args = parser.parse_args()
    if args.one:
        step(args.one[0], args.one[1], args.one[2] == "True", args.dim, args.depth, args.size)
        return
    import device

    print(f"{'backend':<8}{'precision':<11}{'checkpointing':<15}{'peak memory':>12}{'time':>10}   "
          f"({args.dim} wide, {args.depth} deep, {'x'.join(map(str, args.size))})", flush=True)
    met = True
    for backend, precision in (("cpu", args.precision), *([("cuda", "bf16")] if device.choose("auto") == "cuda" else [])):
        rows = []
        for checkpointing in (False, True):
            command = [sys.executable, __file__, "--one", backend, precision, str(checkpointing),
                       "--dim", str(args.dim), "--depth", str(args.depth), "--size", *map(str, args.size)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{backend}, checkpointing {checkpointing}: {done.stderr or done.returncode}")
            rows.append(json.loads(done.stdout))
            seconds, peak, norm = rows[-1]
            spent = f"{seconds:.2f} s" if backend == "cuda" else f"{seconds / rows[0][0]:.2f}x"
            print(f"{backend:<8}{precision:<11}{'on' if checkpointing else 'off':<15}{peak:>9.1f} GB{spent:>10}", flush=True)
        met = met and rows[1][1] < rows[0][1] / 2 and abs(rows[1][2] / rows[0][2] - 1) < 1e-2
    sys.exit(0 if met else "not met: half the memory, and the same gradients")


if __name__ == "__main__":
    main()
