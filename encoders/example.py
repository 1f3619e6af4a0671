"""The smallest encoder: random projections of patches, each weighted by its place. To be copied.

In a configuration: model: {loader: encoders/example.py, emb_dim: null}, and
paths: {checkpoint_path: null}, for it has no file. docs/encoders.md says what else there may be.
"""

import torch
from torch import nn


class Places(nn.Module):
    """Nothing is learned, but mean-pooled tokens tell what lies where, as left and right."""

    def __init__(self, width, image_size):
        super().__init__()
        self.width, self.image_size = width, tuple(image_size)  # C, and (D, H, W)
        self.patches = nn.Conv3d(1, width, (4, 16, 16), stride=(4, 16, 16))
        depth, _, columns = self.grid(image_size)
        self.places = nn.Parameter(torch.randn(width, depth, 1, columns))  # of the lateral plane

    def grid(self, size):  # (D, H, W) of a volume -> (d, h, w) of its tokens
        return size[0] // 4, size[1] // 16, size[2] // 16

    def forward(self, volume):  # (B, 1, D, H, W) float32, z-scored -> (B, N, C), N = d h w
        x = self.patches(volume) * self.places  # (B, C, d, h, w)
        return x.flatten(2).transpose(1, 2)


def load(path, width=128, image_size=(16, 96, 96)):
    return Places(width, image_size)  # torch.load(path, weights_only=True), where there is a file
