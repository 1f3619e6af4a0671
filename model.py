"""The encoder: a V-JEPA2-style 3D ViT, its loading from a pretraining checkpoint, and pooling.

    encoder = load_encoder("checkpoints/single_domain_01.pt")   # eval mode
    tokens = encoder(volume)                                    # (B, 1, D, H, W) -> (B, N, C)
    features = pool(tokens, "mean")                             # (B, N, C) -> (B, C)

To train the encoder, call encoder.train(); set encoder.drop_path and encoder.checkpoint as you
like, and give parameter_groups(...) to the optimizer.

D, H, W are depth (frames), height (rows) and width (columns) of a volume; N is the number of
tokens, C the width of the embedding. Needs torch and numpy, and device.py, architecture.py and
weights.py beside it.
"""

import hashlib
import math
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import architecture
import device
from weights import keys_text, plain, read_checkpoint, verify

# What the pretraining's encoders have. The weights tell none of the three: they hold where the
# file's config is silent, which is then said.
HEAD_DIM = 64  # width of an attention head
EPS = 1e-5  # of LayerNorm
GELU = "gelu"  # the exact one

ACTIVATIONS = {
    GELU: nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


@dataclass
class Noise:
    """The random numbers of one training step, drawn on the host.

    `key` alone decides them, on any backend, in any number of replicas and micro-batches: masks are
    drawn for the whole batch, and each sample takes its own row.
    key: an integer of the step. places: (B,), the index of each of these B samples in the step's
    batch, -1 for padding. size: the number of samples in that batch.
    """

    key: int
    places: torch.Tensor
    size: int

    def keep(self, p, shape, layer):
        """Dropout's factors (B, *shape), 0 or 1 / (1 - p). layer: the caller's own integer."""
        generator = torch.Generator().manual_seed(self.key + layer)
        return (torch.rand(self.size, *shape, generator=generator)[self.places] >= p) / (1 - p)


def any_noise(x):
    """Noise of a batch by itself, from torch's global generator."""
    return Noise(torch.randint(2**62, ()).item(), torch.arange(len(x)), len(x))


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        """Tokens (B, N, C) -> (B, N, C)."""
        # (B, N, 3 C) -> (B, N, 3, heads, C / heads) -> (3, B, heads, N, C / heads)
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = device.attention(*qkv)  # (B, heads, N, C / heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, heads, C / heads) -> (B, N, C)


class Block(nn.Module):
    def __init__(self, dim, hidden, num_heads, eps, activation):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        layers = {
            "fc1": nn.Linear(dim, hidden),
            "act": ACTIVATIONS[activation](),
            "fc2": nn.Linear(hidden, dim),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, keep=None):
        """Tokens (B, N, C) -> (B, N, C). keep (2, B, 1, 1): drop-path factors of the branches."""
        attn = self.attn(self.norm1(x))
        x = x + (attn if keep is None else attn * keep[0])
        mlp = self.mlp(self.norm2(x))
        return x + (mlp if keep is None else mlp * keep[1])


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch_size):
        super().__init__()
        self.proj = nn.Conv3d(1, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        """(B, 1, D, H, W) -> (B, N, C).

        Patches do not overlap, so the convolution is a matrix product of them, which is ten times
        faster in bfloat16 on the CPU.
        """
        for axis, size in zip((2, 4, 6), self.proj.kernel_size):
            x = x.unflatten(axis, (-1, size))  # in the end (B, 1, d, 4, h, 16, w, 16)
        # (B, d, h, w, 1, 4, 16, 16) -> (B, N, 1024)
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ViT3D(nn.Module):
    """Pre-norm 3D ViT without CLS token, with learned absolute positions.

    (B, 1, D, H, W) float -> tokens (B, N, C). In training mode, a sample skips a block's branch
    with a probability that grows to `drop_path` at the last block (Huang et al. 2016), and
    `checkpoint` (device.checkpointing) runs each block, to compute its activations again in the
    backward pass instead of keeping them. num_heads: None for heads of width 64. activation: one of
    ACTIVATIONS.
    """

    drop_path = 0.0
    checkpoint = None

    def __init__(
        self,
        dim,
        depth,
        num_tokens,
        hidden=None,
        patch_size=(4, 16, 16),
        num_heads=None,
        eps=EPS,
        activation=GELU,
    ):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.num_heads = num_heads or dim // HEAD_DIM
        self.eps, self.activation = eps, activation
        self.image_size = None  # (D, H, W) of the pretraining, where its checkpoint names it
        self.assumed = {}  # on loading: what neither the weights nor the config say -> what is used
        self.patch_embed = PatchEmbed(dim, self.patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim).normal_(std=0.02))
        block = (dim, hidden or 4 * dim, self.num_heads, eps, activation)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, volume, noise=None):
        self.check_size(volume.shape[-3:])
        x = self.patch_embed(volume) + self.pos_embed
        drop_path = self.drop_path if self.training else 0
        if drop_path and noise is None:
            noise = any_noise(x)
        for i, block in enumerate(self.blocks):
            args = [x]
            if drop_path:
                keep = noise.keep(drop_path * (i + 1) / len(self.blocks), (2, 1, 1), layer=i)
                args.append(keep.transpose(0, 1).to(x.device, x.dtype))  # (2, B, 1, 1)
            x = self.checkpoint(block, *args) if self.training and self.checkpoint else block(*args)
        return self.norm(x)

    @property
    def width(self):
        return self.pos_embed.shape[-1]

    def layers(self):
        """Its modules from input to output."""
        return [self.patch_embed, *self.blocks, self.norm]

    def grid(self, size):
        """Tokens along each axis (d, h, w) of a volume of `size` (D, H, W)."""
        return tuple(n // p for n, p in zip(size, self.patch_size))

    def check_size(self, size):
        """ValueError unless volumes of `size` (D, H, W) are what the positions were learned for."""
        num_tokens = self.pos_embed.shape[1]
        fits = (
            self.image_size in (None, tuple(size))
            and all(n % p == 0 for n, p in zip(size, self.patch_size))
            and math.prod(self.grid(size)) == num_tokens
        )
        if not fits:
            pretrained = f" and was pretrained at image_size {self.image_size}"
            raise ValueError(
                f"volumes of size {tuple(size)} do not fit the encoder: it has {num_tokens} "
                f"positions of patches {self.patch_size}" + (pretrained if self.image_size else "")
            )


# ---- loading, strictly

PREFIXES = {"context": "context_encoder.", "target": "target_encoder.encoder."}


def load_encoder(path, encoder="context"):
    """Encoder of a pretraining checkpoint, in eval mode: (B, 1, D, H, W) float -> tokens (B, N, C).

    encoder: "context", or "target" (its EMA copy). Sizes come from the weights, and what those do
    not tell from the file's config; what neither tells is in the encoder's `assumed`. ValueError
    naming the keys when any is missing, unexpected, of the wrong shape or not finite (nothing is
    left at random), or when the config contradicts itself or the weights.
    """
    if encoder not in PREFIXES:
        raise ValueError(f"encoder must be 'context' or 'target', not {encoder!r}")
    prefix, checkpoint = PREFIXES[encoder], read_checkpoint(path)
    try:
        config = plain(checkpoint.get("config"))
        config = config if isinstance(config, dict) else {}
        state = weights_under(prefix, checkpoint["model_state_dict"])
        verify(path, state)
        model = empty_vit(prefix, state, config)
        copy_weights(prefix, state, model)
        set_image_size(model, config)
    except (ValueError, RuntimeError) as error:  # torch's own: sparse or nested tensors, say
        raise ValueError(f"{path}: {encoder} encoder not loaded: {error}") from error
    return model.eval()


def weights_under(prefix, state_dict):
    """The weights whose keys begin with `prefix`, by their whole keys."""
    state = {k: v for k, v in state_dict.items() if str(k).startswith(prefix)}
    if not state:
        found = sorted({str(k).split(".")[0] for k in state_dict})
        raise ValueError(f"no keys begin with '{prefix}'; found {found[:10]}")
    not_tensors = [
        k
        for k, v in state.items()
        if not isinstance(v, torch.Tensor) or not v.dtype.is_floating_point
    ]
    if not_tensors:
        raise ValueError(f"not tensors of floating-point numbers: {keys_text(not_tensors)}")
    return state


def empty_vit(prefix, state, config):
    """A ViT3D of the sizes that the weights tell and of the settings that config tells, without
    memory for its own weights."""

    def shape_of(name, dimensions):
        shape = getattr(state.get(prefix + name), "shape", ())
        if len(shape) != dimensions:
            raise ValueError(f"missing or of the wrong shape: {prefix}{name}")
        return shape

    _, num_tokens, _ = shape_of("pos_embed", 3)
    dim, _, *patch_size = shape_of("patch_embed.proj.weight", 5)
    hidden, _ = shape_of("blocks.0.mlp.fc1.weight", 2)
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if state[prefix + name].numel() == 0:
            raise ValueError(f"{prefix}{name} is empty")
    depth = len({m[1] for k in state if (m := re.match(r"blocks\.(\d+)\.", k[len(prefix) :]))})
    if depth > 1000:
        raise ValueError(f"its keys are of {depth} blocks, but no encoder has more than 1000")
    said = architecture.read(config, sizes_of(dim, depth, patch_size, hidden))
    num_heads, assumed = heads_of(said, dim)
    if "LayerNorm eps" not in said:
        assumed["LayerNorm eps"] = str(EPS)
    if "activation" not in said:
        assumed["activation"] = "exact GELU"
    _, eps = said.get("LayerNorm eps", (None, EPS))
    _, activation = said.get("activation", (None, GELU))
    with torch.device("meta"):
        model = ViT3D(dim, depth, num_tokens, hidden, patch_size, num_heads, eps, activation)
    model.assumed = assumed
    return model


def sizes_of(dim, depth, patch_size, hidden):
    """What the weights have of what a config may say too, as architecture.read wants it."""
    patch_size = tuple(patch_size)
    return {
        "width": (f"{dim} wide", lambda n: n == dim),
        "depth": (f"of {depth} blocks", lambda n: n == depth),
        # without the depth it is of rows and columns, as V-JEPA's
        "patch size": (f"of patches {patch_size}", lambda n: n in (patch_size, patch_size[1:])),
        "MLP ratio": (f"{hidden} wide in the MLP", lambda n: abs(n * dim - hidden) < 1),
    }


def heads_of(said, dim):
    """-> (number of heads, {} or what is assumed for it). ValueError naming the keys of what a
    config said, if that does not fit the width."""
    heads, width = said.get("number of heads"), said.get("width of a head")
    for key, value in filter(None, (heads, width)):
        if dim % value:
            raise ValueError(
                f"its {key} is {value}, which does not divide the width {dim} of its weights; "
                "correct its config"
            )
    if heads and width and heads[1] * width[1] != dim:
        raise ValueError(
            f"its {heads[0]} is {heads[1]} and its {width[0]} is {width[1]}, but its weights are "
            f"{dim} wide; correct its config"
        )
    if heads or width:
        return heads[1] if heads else dim // width[1], {}
    if dim % HEAD_DIM:
        raise ValueError(
            f"its config does not say num_heads, and the width {dim} of its weights is not a "
            f"multiple of {HEAD_DIM}, the usual width of a head; add num_heads to its config"
        )
    assumed = f"{dim // HEAD_DIM} heads of width {HEAD_DIM}"
    return dim // HEAD_DIM, {"number of heads": assumed}


def copy_weights(prefix, state, model):
    """Give the model all weights of `state`, which must be exactly its own, as float32.

    They are copies: nothing of the mapped file is kept, which others may replace or cut short.
    """
    expected = model.state_dict(prefix=prefix)
    problems = {
        "missing": [k for k in expected if k not in state],
        "unexpected": [k for k in state if k not in expected],
        "wrong shape": [
            f"{k} {tuple(v.shape)}, expected {tuple(expected[k].shape)}"
            for k, v in state.items()
            if k in expected and v.shape != expected[k].shape
        ],
        "not finite": [k for k, v in state.items() if not v.float().isfinite().all()],
    }
    found = [f"{problem}: {keys_text(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError("; ".join(found))
    copies = {k[len(prefix) :]: torch.empty(v.shape).copy_(v) for k, v in state.items()}
    model.load_state_dict(copies, assign=True)


def set_image_size(model, config):
    """Take over the image_size of the pretraining's config, where it names one."""
    size = architecture.resolved(config.get("image_size"), config)
    if size is None:
        return
    is_size = isinstance(size, list) and len(size) == 3
    if not (is_size and all(type(n) is int and 0 < n < 10**6 for n in size)):
        shown = repr(size)[:100]
        raise ValueError(f"its config.image_size is {shown}, not [depth, height, width]")
    model.image_size = tuple(size)
    model.check_size(size)


def weights_hash(model):
    """sha256 of the names, shapes and values of a model's weights, and of what beside them decides
    its tokens, unless that is as at the pretraining: so the hashes of such encoders, which are in
    the names of cached features and in runs, are those of the weights alone."""
    digest = hashlib.sha256()
    settings = model.num_heads, model.eps, model.activation
    if settings != (model.width // HEAD_DIM, EPS, GELU):
        digest.update(repr(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def scaled(volume, white):
    """Intensities with `white` as 1. ValueError where they cannot be of that kind: volumes of 16
    bits with a white of 255 would saturate, and floats on [0, 1] would all be black."""
    largest = volume.abs().max().item()  # amax without an axis does nothing on XLA
    if largest > 2 * white or 0 < largest <= white / 128:  # augmentation may brighten somewhat
        raise ValueError(
            f"the volume's intensities reach {largest:g}, but model.loader_options.white is "
            f"{white}; set it to the largest that the format can hold (255 for 8 bits, 65535 for "
            "16 bits, 1 for floats on [0, 1])"
        )
    return volume / white


def pool(tokens, method):
    """Tokens (B, N, C) -> features (B, C) by "mean" or "max"."""
    return tokens.mean(dim=1) if method == "mean" else tokens.amax(dim=1)


def pool_grid(tokens, shape, size, method):
    """Tokens (B, N, C) of a grid `shape` (d, h, w), N = d h w -> (B, T, C) of a coarser grid.

    size: (d, h, w) of the coarser grid, T its product. method: "mean" or "max".
    """
    grid = tokens.transpose(1, 2).unflatten(2, shape)  # (B, N, C) -> (B, C, d, h, w)
    pool_3d = F.adaptive_avg_pool3d if method == "mean" else F.adaptive_max_pool3d
    return pool_3d(grid, size).flatten(2).transpose(1, 2)  # (B, C, *size) -> (B, T, C)


# names of parameters that stand for themselves, as positions do
UNDECAYED = ("pos_embed", "position_embeddings", "cls_token", "reg_token", "register_tokens")


def parameter_groups(encoder, lr, layer_decay, weight_decay):
    """The encoder's groups for an optimizer; `peak` is a group's learning rate before its schedule.

    The last of encoder.layers() learns at lr, each before it slower by the factor layer_decay
    (BEiT, MAE); what belongs to no layer, as positions, learns as the first. Biases, norms and
    positions do not decay.
    """
    layers = [] if layer_decay == 1 else encoder.layers()
    layer_of = {id(p): i for i, layer in enumerate(layers) for p in layer.parameters()}
    found, top = {}, max(len(layers) - 1, 0)
    for name, parameter in encoder.named_parameters():
        layer = layer_of.get(id(parameter), 0)
        decays = parameter.ndim > 1 and name.rpartition(".")[2] not in UNDECAYED
        found.setdefault((lr * layer_decay ** (top - layer), decays), []).append(parameter)
    return [
        dict(part="encoder", params=group, lr=peak, peak=peak, weight_decay=weight_decay * decays)
        for (peak, decays), group in found.items()
    ]
