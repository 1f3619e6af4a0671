"""What augmentation costs: one volume on one core, against what the encoder needs to train on it, on two.

    .venv/bin/python bench/augment.py

The demo's volumes and encoder; then full size, against decoding a DICOM file of 256x992x512, which happens once where
augmentation happens every epoch. Exits 1 when the demo's model would wait for it: one core must augment faster than the
others train.
"""

import argparse
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import device  # noqa: E402
import model  # noqa: E402


def seconds(job, times):
    job(0)
    began = time.monotonic()
    for i in range(1, times + 1):
        job(i)
    return (time.monotonic() - began) / times


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    threads, encoder = torch.get_num_threads(), model.ViT3D(128, 4, 144).train()
    encoder.checkpoint = device.checkpointing(torch.device("cpu"))
    volume = torch.randn(1, 16, 96, 96).half()
    train = seconds(lambda i: encoder(volume[None].float()).square().mean().backward(), 30)
    torch.set_num_threads(1)
    augment = seconds(lambda i: data.augment(volume, data.USUAL, str(i)), 30)
    print(f"demo, 16x96x96: augmenting on 1 core takes {augment / train:.2f} of the time of training on {threads}")
    full = torch.randn(1, 64, 384, 384).half()
    scan = np.random.default_rng(0).integers(0, 255, (256, 992, 512), np.uint8)
    ratio = seconds(lambda i: data.augment(full, data.USUAL, str(i)), 3) / seconds(lambda i: data.preprocess(scan, (64, 384, 384)), 2)
    print(f"full size, 64x384x384: augmenting takes {ratio:.2f} of the time of preprocessing 256x992x512, on 1 core each")
    sys.exit("not met: faster than the model" if augment > train else 0)


if __name__ == "__main__":
    main()
