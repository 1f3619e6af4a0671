"""The full-size encoder of random weights, its arithmetic, and what a device could do at best.

Needs torch alone."""

import math

import torch
from measure import timed

import model

SIZE, DIM, TOKENS = (64, 384, 384), 768, 9216


def build(depth, dim=DIM, size=SIZE):
    """The encoder, of random weights that are always the same."""
    torch.manual_seed(0)
    return model.ViT3D(dim, depth, tokens_in(size)).eval().requires_grad_(False)


def tokens_in(size):
    """Number of tokens of a volume (D, H, W); each is 4 x 16 x 16 voxels."""
    return math.prod(n // side for n, side in zip(size, (4, 16, 16)))


def flop(depth, dim=DIM, size=SIZE):
    """Of a volume's forward pass: products of the patches, of each block's four layers, and of
    q k^T and of that with v."""
    tokens = tokens_in(size)
    block = 2 * tokens * 12 * dim * dim + 4 * tokens * tokens * dim
    return 2 * tokens * (4 * 16 * 16) * dim + depth * block


def seconds(job, dev):
    """Of job(), until the device has done it."""
    return timed(lambda: (job(), torch.cuda.synchronize() if dev.type == "cuda" else None))[0]


def matmul_rate(dev, dtype, n):
    """FLOP/s of the best of ten products of n x n."""
    a, b = torch.randn(2, n, n, device=dev).to(dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b, dev) for _ in range(10))
