"""What the whole job costs: the 743 + 159 + 159 participants with OCT, one or two volumes each; on this machine, one GPU of the H200's
class, and a v4-32.

    .venv/bin/python bench/cost.py                                        # three minutes on two cores
    .venv/bin/python bench/cost.py --network 12 --gpu-share 0.3 ...       # other assumptions: --help lists them all

Measured here, now: the full-size encoder's forward pass as `make probe` runs it with train.precision=bf16; decoding and preprocessing a
Triton volume of 256x992x512 on one core, uncompressed and JPEG 2000, and the sizes of the files; the sweep of configs/probe.yaml on so
many features, with reading these from the cache and hashing the encoder. Everything else is ASSUMED: the network everywhere, and
speed, cores and share of the peak of the machines that are not this one. Rows are marked so. Nothing is required.

A first pass fetches, decodes and encodes every volume once. On this machine decoding and encoding share the cores and their times add
up; elsewhere the host decodes while the accelerator computes, and the slowest of the three sets the pace. Further probes, whatever
head, rate or seed, read cached features.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]

import numpy as np  # noqa: E402
import pydicom  # noqa: E402
import torch  # noqa: E402

import config  # noqa: E402
import data  # noqa: E402
import device  # noqa: E402
import encoder as full  # noqa: E402
import eval as evaluation  # noqa: E402
import heads as gaussians  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
import volumes as geometry  # noqa: E402

PARTICIPANTS = {"train": 743, "val": 159, "test": 159}


def seconds(job):
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def measure_decoding(syntax):
    """-> core-seconds from bytes to preprocessed volume, MB of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/volume.dcm"
        geometry.write_volume(path, "Triton", geometry.GEOMETRY["Triton"], syntax)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        spent = statistics.median(seconds(lambda: data.decode_volume(path, full.SIZE)) for _ in range(3))
        torch.set_num_threads(threads)
        return spent, os.path.getsize(path) / 1e6


def measure_probe(encoder, per_participant):
    """Seconds of a further probe: hash the encoder, read features from the cache, train and choose among the heads of
    configs/probe.yaml."""
    cfg = config.load(os.path.join(ROOT, "configs", "probe.yaml"), ["train.early_stopping.enabled=false"])
    counts = [PARTICIPANTS[split] * per_participant for split in ("train", "val")]
    labels = [np.arange(n) % 4 for n in counts]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        kept = torch.randn(sum(counts), full.DIM)
        for i, feature in enumerate(kept):
            data.save_array(f"{folder}/{i}.npy", feature.numpy())

        def probe():
            model.weights_hash(encoder)
            x = torch.from_numpy(np.stack([data.load_array(f"{folder}/{i}.npy", np.float32, (full.DIM,)) for i in range(sum(counts))]))
            x, x_val = x[:counts[0], None], x[counts[0]:]
            train.fit_heads(cfg, 0, x, gaussians.samples(labels[0]), x_val, gaussians.samples(labels[1]))

        return seconds(probe)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=float, default=50, help="MB/s that this machine fetches (default 50)")
    parser.add_argument("--gpu-peak", type=float, default=989, help="TFLOP/s of the GPU in bf16, dense (H200's data sheet: 989)")
    parser.add_argument("--gpu-share", type=float, default=0.4, help="share of the peak that the encoder reaches (0.4)")
    parser.add_argument("--gpu-cores", type=int, default=16, help="cores of its host that decode (16)")
    parser.add_argument("--gpu-network", type=float, default=300, help="MB/s that its host fetches (300)")
    parser.add_argument("--tpu-peak", type=float, default=16 * 275, help="TFLOP/s of the slice in bf16 (v4-32: 16 chips of 275)")
    parser.add_argument("--tpu-share", type=float, default=0.4)
    parser.add_argument("--tpu-hosts", type=int, default=4)
    parser.add_argument("--tpu-cores", type=int, default=60, help="cores of each host that decode (60)")
    parser.add_argument("--tpu-network", type=float, default=300, help="MB/s that each host fetches (300)")
    args = parser.parse_args()

    dev, work = device.get("cpu"), full.flop(12) / 1e12
    encoder, volume = full.build(12), torch.randn(1, *full.SIZE).half()
    cfg = full.settings("bf16")
    encode = seconds(lambda: evaluation.encode(cfg, encoder, volume, dev))
    decoding = {"uncompressed": measure_decoding(pydicom.uid.ExplicitVRLittleEndian),
                "JPEG 2000": measure_decoding(pydicom.uid.JPEG2000Lossless)}
    with contextlib.redirect_stdout(sys.stderr):
        measure_probe(encoder, 1)  # imports
        probe = {n: measure_probe(encoder, n) for n in (1, 2)}

    print(f"MEASURED here ({os.cpu_count()} cores): encoder {encode:.1f} s a volume ({work / encode * 1e3:.0f} GFLOP/s, bf16); "
          + "; ".join(f"{name} {spent:.2f} core-seconds and {size:.0f} MB a volume" for name, (spent, size) in decoding.items())
          + f"; a further probe {probe[1]:.0f} s ({probe[2]:.0f} s with two volumes each)")
    gpu, tpu = args.gpu_peak * args.gpu_share, args.tpu_peak * args.tpu_share
    print(f"ASSUMED: network {args.network:g} MB/s here, {args.gpu_network:g} to the GPU's host, {args.tpu_network:g} to each of "
          f"{args.tpu_hosts} TPU hosts; encoder at {args.gpu_share:.0%} of {args.gpu_peak:g} TFLOP/s on the GPU "
          f"and {args.tpu_share:.0%} of {args.tpu_peak:g} on the v4-32; "
          f"{args.gpu_cores} and {args.tpu_hosts} x {args.tpu_cores} cores decode, each as fast as one here\n")
    machines = [  # seconds a volume of the encoder, cores that decode, MB/s, do decoding and encoding share the cores?
        ("this machine", "measured a volume, times their number; network assumed", encode, os.cpu_count(), args.network, True),
        ("one H200-class GPU", "extrapolated", work / gpu, args.gpu_cores, args.gpu_network, False),
        ("v4-32", "extrapolated", work / tpu, args.tpu_hosts * args.tpu_cores, args.tpu_hosts * args.tpu_network, False)]
    print("| machine | | volumes | files | first feature pass | bound by | network, decode, encoder alone | any further probe |\n"
          "|---|---|---|---|---|---|---|---|")
    for machine, how, encoding, cores, network, shared in machines:
        for per_participant in (1, 2):
            for name, (spent, size) in decoding.items():
                count = per_participant * sum(PARTICIPANTS.values())
                parts = {"network": count * size / network / 3600, "decode": count * spent / cores / 3600,
                         "encoder": count * encoding / 3600}
                whole = max(parts["network"], parts["decode"] + parts["encoder"]) if shared else max(parts.values())
                print(f"| {machine} | {how} | {count} | {name} | {whole:.2g} h | {max(parts, key=parts.get)} | "
                      f"{', '.join(f'{part:.2g} h' for part in parts.values())} | "
                      f"{probe[per_participant]:.0f} s{'' if shared else ' as here'} |")
    count = sum(PARTICIPANTS.values())
    print(f"| the replaced system | as its users reported it | {count} | | 6 to 10 minutes a volume in every epoch: "
          f"{count * 6 / 60:.0f} to {count * 10 / 60:.0f} h an epoch, one volume after the other | | | "
          "the same again; 2 to 3 h for 50 epochs were hoped for |")


if __name__ == "__main__":
    main()
