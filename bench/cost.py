"""What the whole job costs: AI-READI's 743 + 159 + 159 participants with OCT, one or two volumes
each; on this machine, one GPU of the H200's class, and a v4-32.

    .venv/bin/python bench/cost.py                              # three minutes on two cores
    .venv/bin/python bench/cost.py --assume network=12 gpu_share=0.3

Measured here, now: the full-size encoder's forward pass in bf16; decoding and preprocessing a
Triton volume on one core; the sweep of configs/probe.yaml on so many features, with reading these
from the cache and hashing the encoder. All else is ASSUMED, below. A first pass fetches, decodes
and encodes every volume once; here decoding and encoding share the cores, elsewhere the host
decodes while the accelerator computes. Further probes, whatever head, rate or seed, read cached
features. Nothing is required.
"""

import os
import statistics
import tempfile

import numpy as np
import torch
from encoder import DIM, SIZE, build, encode_alone, flop
from measure import apart, bench, header, row, timed
from probing import features_of
from reading import SYNTAXES, write_volume

import config
import files
import model
import train
import volumes

PARTICIPANTS = {"train": 743, "val": 159, "test": 159}
ASSUMED = {
    "network": 50,  # MB/s that this machine fetches
    "gpu_peak": 989,  # TFLOP/s in bf16, dense (H200's data sheet)
    "gpu_share": 0.4,  # of the peak that the encoder reaches
    "gpu_cores": 16,  # that decode, on the GPU's host; each as fast as one here
    "gpu_network": 300,  # MB/s that its host fetches
    "tpu_peak": 16 * 275,  # TFLOP/s of the slice in bf16: 16 chips
    "tpu_share": 0.4,
    "tpu_hosts": 4,
    "tpu_cores": 60,  # that decode, on each host
    "tpu_network": 300,  # MB/s that each host fetches
}


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
    counts, encoder = [PARTICIPANTS[split] * each for split in ("train", "val")], build(12)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.npy" for i in range(sum(counts))]
        for path in paths:
            files.save_array(path, torch.randn(DIM).numpy())

        def probe():
            model.weights_hash(encoder)
            x = np.stack([files.load_array(path, np.float32, (DIM,)) for path in paths])
            parts = [
                features_of(part, np.arange(len(part)) % 4) for part in np.split(x, counts[:1])
            ]
            train.fit(cfg, 0, *parts, torch.device("cpu"))

        return timed(probe)[0]


def cost(args):
    assumed = ASSUMED | dict(pair.split("=") for pair in args.assume)
    at = {name: float(value) for name, value in assumed.items()}
    with tempfile.TemporaryDirectory() as folder:
        [(encode, *_)] = apart(encode_alone, "bf16", 12, f"{folder}/tokens.pt")
    decoding = {syntax: apart(measure_decoding, syntax)[0] for syntax in SYNTAXES}
    measure_probe(1)  # imports
    probes, work, cores = {n: measure_probe(n) for n in (1, 2)}, flop(12) / 1e12, os.cpu_count()
    print(f"MEASURED here ({cores} cores): encoder {encode:.1f} s a volume")
    for syntax, (spent, size) in decoding.items():
        print(f"  {syntax}: {spent:.2f} core-seconds and {size:.0f} MB a volume")
    print(f"ASSUMED: {', '.join(f'{name} {value:g}' for name, value in at.items())}\n")
    gpu, tpu = work / at["gpu_peak"] / at["gpu_share"], work / at["tpu_peak"] / at["tpu_share"]
    hosts = at["tpu_hosts"]
    machines = {  # seconds a volume of the encoder, cores that decode, MB/s
        "this machine, measured a volume": (encode, cores, at["network"]),
        "one H200-class GPU, extrapolated": (gpu, at["gpu_cores"], at["gpu_network"]),
        "v4-32, extrapolated": (tpu, hosts * at["tpu_cores"], hosts * at["tpu_network"]),
    }
    parts = "network", "decode", "encoder"
    header("machine", "volumes", "files", "first pass", "bound by", *parts, "any further probe")
    for machine, (encoding, cores, network) in machines.items():
        for each, (syntax, (spent, size)) in (
            (n, item) for n in (1, 2) for item in decoding.items()
        ):
            count = each * sum(PARTICIPANTS.values())
            hours = [count * s / 3600 for s in (size / network, spent / cores, encoding)]
            shares_cores = machine.startswith("this")
            whole = max(hours[0], hours[1] + hours[2]) if shares_cores else max(hours)
            cells = f"{whole:.2g} h", parts[np.argmax(hours)], *(f"{h:.2g} h" for h in hours)
            row(machine, count, syntax, *cells, f"{probes[each]:.0f} s here")
    print(
        "\nThe replaced system, as its users reported it: 6 to 10 minutes a volume in every epoch, "
        "106 to 177 h an epoch; 2 to 3 h for 50 epochs were hoped for."
    )


if __name__ == "__main__":
    assume = dict(nargs="+", default=[], metavar="NAME=NUMBER", help=f"among {', '.join(ASSUMED)}")
    bench(__doc__, {"cost": cost}, {"--assume": assume})
