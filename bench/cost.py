"""What the whole job costs: AI-READI's 743 + 159 + 159 participants with OCT, one or two volumes
each; on this machine, one GPU of the H200's class, and a v4-32.

    .venv/bin/python bench/cost.py                                      # three minutes on two cores
    .venv/bin/python bench/cost.py --network 12 --gpu_share 0.3

Measured here, now: the full-size encoder's forward pass in bf16; decoding and preprocessing a
Triton volume on one core; the sweep of configs/probe.yaml on so many features, with reading these
from the cache and hashing the encoder. All else is ASSUMED: network in MB/s, peak in TFLOP/s, share
of the peak that the encoder reaches, cores that decode, each as fast as one here; the TPU's cores
and network are each host's. The TPU's row rests on the least time of a volume on a v4 chip, from
what the TPU's compiler counts in the compiled encoder (bench/tpu.py); the share of that speed is
assumed. A first pass fetches, decodes and encodes every volume once; here decoding and encoding
share the cores, elsewhere the host decodes while the accelerator computes. Further probes, whatever
head, rate or seed, read cached features.
"""

import itertools
import os
import statistics
import tempfile

import numpy as np
import torch
from encoder import encode_alone
from fullsize import DIM, SIZE, build, flop
from measure import apart, bench, row, timed
from probing import features_of
from reading import SYNTAXES, write_volume

import config
import files
import model
import train
import volumes

TPU_LEAST = 0.0191  # s a volume and v4 chip, by bench/tpu.py (docs/performance.md)
TRAIN, VAL, TEST = 743, 159, 159


def measure_decoding(syntax):
    """-> core-seconds from file to preprocessed volume, MB of the file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/volume.dcm"
        write_volume(path, "Triton", syntax)
        times = [timed(volumes.decode_volume, path, SIZE)[0] for _ in "123"]
        return statistics.median(times), os.path.getsize(path) / 1e6


def measure_probe(each):
    """Seconds of a further probe: hash the encoder, read features from the cache, train and choose
    among the heads of configs/probe.yaml. each: volumes of a participant."""
    cfg = config.load("configs/probe.yaml", ["train.early_stopping.enabled=false"])
    encoder, paths = build(12), []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(each * (TRAIN + VAL)):
            paths.append(f"{folder}/{i}.npy")
            files.save_array(paths[i], torch.randn(DIM).numpy())

        def probe():
            model.weights_hash(encoder)
            x = np.stack([files.load_array(path, np.float32, (DIM,)) for path in paths])
            x = np.split(x, [each * TRAIN])
            parts = [features_of(part, np.arange(len(part)) % 4) for part in x]
            torch.set_num_threads(1)  # as repeats.fit_all does
            train.fit(cfg, 0, *parts, torch.device("cpu"))

        return timed(probe)[0]


def cost(
    network=50.0,
    gpu_peak=989.0,  # H200's data sheet, dense bf16
    gpu_share=0.4,
    gpu_cores=16,
    gpu_network=300.0,
    tpu_chips=16,
    tpu_share=0.4,
    tpu_hosts=4,
    tpu_cores=60,
    tpu_network=300.0,
):
    assumed = ", ".join(f"{name} {value:g}" for name, value in locals().items())
    with tempfile.TemporaryDirectory() as folder:
        [(encode, *_)] = apart(encode_alone, "bf16", 12, f"{folder}/tokens.pt")
    decoding = {syntax: apart(measure_decoding, syntax)[0] for syntax in SYNTAXES}
    measure_probe(1)  # imports
    probes, cores = {each: measure_probe(each) for each in (1, 2)}, os.cpu_count()
    gpu, tpu = flop(12) / 1e12 / (gpu_peak * gpu_share), TPU_LEAST / (tpu_chips * tpu_share)
    print(f"MEASURED here ({cores} cores): encoder {encode:.1f} s a volume")
    for syntax, (spent, size) in decoding.items():
        print(f"  {syntax}: {spent:.2f} core-seconds, {size:.0f} MB a volume")
    print(f"ASSUMED: {assumed}\n")
    machines = {  # seconds a volume of the encoder, cores that decode, MB/s
        "this machine, measured a volume": (encode, cores, network),
        "one H200-class GPU, extrapolated": (gpu, gpu_cores, gpu_network),
        "v4-32, from its compiler's count": (tpu, tpu_hosts * tpu_cores, tpu_hosts * tpu_network),
    }
    parts = "network", "decode", "encoder"
    row("hours", "volumes", "files", "first pass", *parts, "bound by", "a further probe, s, here")
    for machine, (encoding, cores, rate) in machines.items():
        for each, (syntax, (spent, size)) in itertools.product((1, 2), decoding.items()):
            count = each * (TRAIN + VAL + TEST)
            hours = [count * s / 3600 for s in (size / rate, spent / cores, encoding)]
            shared = machine.startswith("this")
            whole = max(hours[0], hours[1] + hours[2]) if shared else max(hours)
            cells = [f"{h:.2g}" for h in (whole, *hours)]
            row(machine, count, syntax, *cells, parts[np.argmax(hours)], f"{probes[each]:.1f}")
    row("the replaced system, as its users reported it: 6 to 10 minutes a volume, in every epoch")


if __name__ == "__main__":
    bench(__doc__, cost=cost)
