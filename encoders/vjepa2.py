"""V-JEPA 2 and 2.1: a published checkpoint -> an encoder of OCT volumes, of any size and depth.

    encoder = load("vjepa2-vitl-fpc64-256")                     # a folder of transformers
    encoder = load("vitl.pt", version=2, model="vit_large")     # Meta's own file of V-JEPA 2
    encoder = load("vjepa2_1_vitb_dist_vitG_384.pt", model="vit_base")       # and of V-JEPA 2.1
    tokens = encoder(encoder.normalise(volume))     # (B, 1, D, H, W), 0 to 255 -> (B, N, C)

The models were trained on videos of three channels, on [0, 1], with the mean and standard deviation
of ImageNet. A grey volume has three equal channels, so both are folded into the kernel of the
patches: the tokens are the same, and the input is a third. Needs torch and numpy, and device.py,
model.py and weights.py.

Sources: github.com/facebookresearch/vjepa2 (src/models, app/vjepa_2_1, src/hub/backbones.py) and
transformers' models/vjepa2; arXiv 2506.09985. All their weights are float32.
"""

import functools
import json
import math
import os
import re

import numpy as np
import torch
from torch import nn

import device
from model import Attention, PatchEmbed, scaled
from weights import keys_text, read_checkpoint, read_file, verify

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, on [0, 1]
EPS = 1e-6  # of LayerNorm, in all of Meta's models
THETA = 10000  # of the rotary positions
PRETRAINED_GRID = 16  # V-JEPA 2.1 stretches rows and columns to this many places, 256 pixels' worth

# Meta's names: width, number of blocks, number of heads
MODELS = {
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
    "vit_giant": (1408, 40, 22),
    "vit_gigantic": (1664, 48, 26),
}

# Keys that a file may have besides those of the encoder: beginnings of their names.
# - pos_embed: learned nothing, and is not used with rotary positions
# - patch_embed_img, img_mod_embed: V-JEPA 2.1's way in for single images; norms_block: its norms of
#   inner layers, of which only the last is used for tokens
UNUSED_META = ("pos_embed", "patch_embed_img.", "img_mod_embed", "norms_block.")
# - the predictor of the pretraining, and what VJEPA2ForVideoClassification has on top
UNUSED_TRANSFORMERS = ("predictor.", "pooler.", "classifier.")


class RotaryAttention(Attention):
    def forward(self, x, turn):
        """Tokens (B, N, C) -> (B, N, C). turn (2, N, C / heads): see `rotation`."""
        # (B, N, 3 C) -> (B, N, 3, heads, C / heads) -> (3, B, heads, N, C / heads)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = device.attention(rotated(q, turn), rotated(k, turn), v)  # (B, heads, N, C / heads)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, heads, C / heads) -> (B, N, C)


class Block(nn.Module):
    def __init__(self, dim, hidden, num_heads, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = RotaryAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, hidden))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(hidden, dim))

    def forward(self, x, turn):
        """Tokens (B, N, C) -> (B, N, C)."""
        x = x + self.attn(self.norm1(x), turn)
        return x + self.mlp(self.norm2(x))


class VJEPA2(nn.Module):
    """(B, 1, D, H, W) float in [0, 1] -> tokens (B, N, C), in the order depth, rows, columns.

    version: "2" or "2.1", whose rotary positions differ. white: the intensity that is 1.
    """

    image_size = None  # any, in whole patches

    def __init__(self, dim, depth, hidden, patch_size, num_heads, version, eps=EPS, white=255):
        super().__init__()
        self.width, self.patch_size, self.num_heads = dim, tuple(patch_size), num_heads
        self.version, self.white = version, white
        self.patch_embed = PatchEmbed(dim, self.patch_size)
        self.blocks = nn.ModuleList(Block(dim, hidden, num_heads, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, volume):
        grid = self.grid(volume.shape[-3:])
        turn = rotation(grid, self.width // self.num_heads, self.version)
        turn = torch.from_numpy(turn).to(volume.device)
        # the sum over the blocks is kept in float32, also where autocast makes the patches bfloat16
        x = self.patch_embed(volume).to(self.norm.weight.dtype)
        for block in self.blocks:
            x = block(x, turn)
        return self.norm(x)

    def grid(self, size):
        """Tokens along each axis (d, h, w) of a volume of `size` (D, H, W)."""
        if any(n < p or n % p for n, p in zip(size, self.patch_size)):
            raise ValueError(
                f"volumes of size {tuple(size)} are not whole patches of {self.patch_size}; set "
                "data.image_size to multiples of those"
            )
        return tuple(n // p for n, p in zip(size, self.patch_size))

    def normalise(self, volume):
        """Original intensities (B, 1, D, H, W) -> what forward takes, on [0, 1]."""
        return scaled(volume, self.white)

    def layers(self):
        """The modules from input to output."""
        return [self.patch_embed, *self.blocks, self.norm]


# ---- rotary positions


@functools.lru_cache(maxsize=8)
def rotation(grid, head_dim, version):
    """Cosines and sines (2, N, head_dim), float32, by which queries and keys are turned.

    The dimensions of a head are three equal parts, for depth, rows and columns, and a rest that is
    not turned: of 64, 20 each and 4; of 80, 26 each and 2. A part of n dimensions has n / 2
    frequencies THETA ** (-2 i / n). Version 2 writes them one after the other, twice, so that the
    two dimensions of a pair turn differently; its authors call it a bug that its weights have
    learned. Version 2.1 gives both the same, and counts rows and columns in places of a grid of
    PRETRAINED_GRID. It is an array, because a tensor that inference mode made cannot train.
    """
    part = 2 * (head_dim // 3 // 2)
    frequencies = THETA ** (-np.arange(part // 2) / (part / 2))
    angles = []
    for axis, places in enumerate(np.indices(grid).reshape(3, -1)):  # each (N,)
        if version == "2.1" and axis > 0:
            places = places * ((PRETRAINED_GRID - 1) / max(grid[axis] - 1, 1))
        angle = places[:, None] * frequencies  # (N, part / 2)
        angles.append(np.tile(angle, 2) if version == "2" else np.repeat(angle, 2, axis=1))
    angles.append(np.zeros((math.prod(grid), head_dim - 3 * part)))  # the rest
    angles = np.concatenate(angles, axis=1)  # (N, head_dim)
    return np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)


def rotated(x, turn):
    """Queries or keys (B, heads, N, d), each pair of neighbouring dimensions turned."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (B, heads, N, d / 2)
    across = torch.stack((-second, first), dim=-1).flatten(-2)  # (B, heads, N, d)
    return (x * turn[0] + across * turn[1]).to(x.dtype)


# ---- loading, strictly


def load(path, version=None, key=None, model=None, num_heads=None, white=255):
    """Encoder of a checkpoint, in eval mode.

    path: a folder of transformers (config.json and model.safetensors, in one or several files), or
    one of Meta's files. Sizes come from the weights. A folder's config tells the rest; of Meta's
    files, say what they do not tell:
    version: 2 or 2.1. The keys tell 2.1; those of 2 could as well be V-JEPA's (1), which is another
        model, so 2 has to be said.
    model: one of MODELS; or num_heads, the number of heads.
    key: of the encoder in the file's dict; by default its only one of target_encoder and
        ema_encoder, the averages of the pretraining that Meta publishes for use.
    white: the intensity of the volumes that counts as 1.
    ValueError naming the keys when any is missing, unexpected, of the wrong shape or not finite.
    """
    version = None if version is None else str(version)
    if version not in (None, "2", "2.1"):
        raise ValueError(f"model.loader_options.version is {version}, not 2 or 2.1")
    if model is not None and model not in MODELS:
        raise ValueError(f"model.loader_options.model is {model!r}, not one of {list(MODELS)}")
    folder = folder_of(path)
    try:
        if folder:
            state, config = read_folder(folder)
            prefix = "vjepa2." if any(k.startswith("vjepa2.") for k in state) else ""
            depth = depth_of(state, f"{prefix}encoder.layer.")
            found, names = "2", names_in_transformers(prefix, depth)
            unused = (*UNUSED_TRANSFORMERS, f"{prefix}predictor.")
        else:
            state, config = read_meta(path, key), {}
            found, names, unused = *meta_layout(state, version), UNUSED_META
        if version not in (None, found):
            raise ValueError(
                f"its keys are those of V-JEPA {found}, but model.loader_options.version is "
                f"{version}"
            )
        sizes = sizes_of(state, names)
        heads, eps = heads_of(sizes, config, model, num_heads), config.get("layer_norm_eps", EPS)
        with torch.device("meta"):  # without memory for its own weights
            encoder = VJEPA2(*sizes, heads, found, eps, white)
        check(state, names, unused, encoder)
    except ValueError as error:
        raise ValueError(f"{path}: V-JEPA 2 not loaded: {error}") from error
    weights = {name: joined(state, keys) for name, keys in names.items()}
    fold(weights)
    encoder.load_state_dict(weights, assign=True)
    return encoder.eval()


def read_meta(path, key):
    """The encoder's state dict in one of Meta's files, its keys without the wrappers' names."""
    content = read_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of state dicts")
    if key is None:
        found = [k for k in ("target_encoder", "ema_encoder") if k in content]
        if len(found) != 1:
            raise ValueError(
                f"it has {' and '.join(found) or 'neither target_encoder nor ema_encoder'}; set "
                f"model.loader_options.key to the encoder's, one of {keys_text(content)}"
            )
        (key,) = found
    if not isinstance(content.get(key), dict):
        raise ValueError(f"it has no state dict {key!r}; found {keys_text(content)}")
    check_tensors(content[key])
    verify(path, content[key])
    state = {re.sub(r"^((module|backbone)\.)+", "", k): v for k, v in content[key].items()}
    if len(state) < len(content[key]):
        raise ValueError(f"{key!r} has a key with and without module. or backbone. before it")
    return state


def folder_of(path):
    """The folder of transformers that path is, or whose weights it is; else None."""
    if os.path.isdir(path):
        return path
    folder, name = os.path.split(path)
    is_weights = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)
    return folder if is_weights and os.path.exists(os.path.join(folder, "config.json")) else None


def read_folder(folder):
    """The weights and the config of a folder of transformers."""
    config = read_json(os.path.join(folder, "config.json"))
    if config.get("model_type") != "vjepa2":
        raise ValueError(f"its config.json has model_type {config.get('model_type')!r}, not vjepa2")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"its config.json has hidden_act {config['hidden_act']!r}, not gelu")
    parts, index = ["model.safetensors"], os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        parts = sorted(set(read_json(index).get("weight_map", {}).values()))
    state = {}
    for part in parts:
        if os.path.basename(part) != part:
            raise ValueError(f"its index names a file outside of the folder: {part!r}")
        path = os.path.join(folder, part)
        weights = read_checkpoint(path)["model_state_dict"]
        check_tensors(weights)
        verify(path, weights)
        if twice := state.keys() & weights.keys():
            raise ValueError(f"in two of its files: {keys_text(sorted(twice))}")
        state |= weights
    return state, config


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(f"{os.path.basename(path)} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{os.path.basename(path)} holds no object of JSON")
    return content


def check_tensors(state):
    others = [
        k
        for k, v in state.items()
        if not (isinstance(k, str) and isinstance(v, torch.Tensor) and v.dtype.is_floating_point)
    ]
    if others:
        raise ValueError(f"not named tensors of floating-point numbers: {keys_text(others)}")


def depth_of(state, beginning):
    """The number of blocks, whose keys begin with `beginning` and 0., 1. and so on."""
    pattern = re.compile(rf"{re.escape(beginning)}(\d{{1,4}})\.")
    depth = len({int(m[1]) for k in state if (m := pattern.match(k))})
    if not 0 < depth <= 1000:
        raise ValueError(f"{depth} blocks have keys that begin with {beginning!r}; expected some")
    return depth


def block_names(ours, theirs, qkv, proj, depth):
    """{our name: the keys that make it} of all blocks."""
    names = {}
    for i, kind in ((i, kind) for i in range(depth) for kind in ("weight", "bias")):
        for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            names[f"{ours}.{i}.{part}.{kind}"] = [f"{theirs}.{i}.{part}.{kind}"]
        names[f"{ours}.{i}.attn.qkv.{kind}"] = [f"{theirs}.{i}.{part}.{kind}" for part in qkv]
        names[f"{ours}.{i}.attn.proj.{kind}"] = [f"{theirs}.{i}.{proj}.{kind}"]
    return names


def meta_layout(state, version):
    """(version, {our name: the keys that make it}) of one of Meta's state dicts."""
    norms = [int(m[1]) for k in state if (m := re.fullmatch(r"norms_block\.(\d{1,4})\.weight", k))]
    if not norms and version is None:
        raise ValueError(
            "its keys could be those of V-JEPA 2 or of V-JEPA (1), which is not read here; if it "
            "is V-JEPA 2, set model.loader_options.version to 2"
        )
    names = block_names("blocks", "blocks", ["attn.qkv"], "attn.proj", depth_of(state, "blocks."))
    for kind in ("weight", "bias"):
        names[f"patch_embed.proj.{kind}"] = [f"patch_embed.proj.{kind}"]
        norm = f"norms_block.{max(norms)}" if norms else "norm"
        names[f"norm.{kind}"] = [f"{norm}.{kind}"]
    if norms:  # what tells a video from an image is added to every patch, as the bias is
        names["patch_embed.proj.bias"].append("video_mod_embed")
    return "2.1" if norms else "2", names


def names_in_transformers(prefix, depth):
    qkv = [f"attention.{part}" for part in ("query", "key", "value")]
    names = block_names("blocks", f"{prefix}encoder.layer", qkv, "attention.proj", depth)
    for kind in ("weight", "bias"):
        patches = f"{prefix}encoder.embeddings.patch_embeddings.proj.{kind}"
        names[f"patch_embed.proj.{kind}"] = [patches]
        names[f"norm.{kind}"] = [f"{prefix}encoder.layernorm.{kind}"]
    return names


def sizes_of(state, names):
    """(width, depth, width of the MLP, patch size) as the weights have them."""

    def shape_of(name, dimensions):
        (key, *_) = names[name]
        shape = getattr(state.get(key), "shape", ())
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"missing or of the wrong shape: {key}")
        return shape

    dim, _, *patch_size = shape_of("patch_embed.proj.weight", 5)
    hidden, _ = shape_of("blocks.0.mlp.fc1.weight", 2)
    depth = sum(name.endswith(".norm1.weight") for name in names)
    return dim, depth, hidden, patch_size


def heads_of(sizes, config, model, num_heads):
    """The number of heads. ValueError if nothing tells it, or what tells it contradicts itself or
    the weights."""
    dim, depth, *_ = sizes
    told = {
        "hidden_size": (config.get("hidden_size"), dim),
        "num_hidden_layers": (config.get("num_hidden_layers"), depth),
    }
    for key, (value, of_weights) in told.items():
        if value not in (None, of_weights):
            raise ValueError(f"its config.json has {key} {value}, but its weights {of_weights}")
    if model and MODELS[model][:2] != (dim, depth):
        raise ValueError(
            f"its weights are {dim} wide, of {depth} blocks, but model.loader_options.model is "
            f"{model}, which is {MODELS[model][0]} wide, of {MODELS[model][1]} blocks"
        )
    heads = {
        "model.loader_options.model": MODELS[model][2] if model else None,
        "model.loader_options.num_heads": num_heads,
        "config.json's num_attention_heads": config.get("num_attention_heads"),
    }
    heads = {name: number for name, number in heads.items() if number is not None}
    if not heads:
        raise ValueError(
            "the number of heads is not in its weights; set model.loader_options.model to one of "
            f"{list(MODELS)}, or model.loader_options.num_heads"
        )
    if len(set(heads.values())) > 1:
        said = " and ".join(f"{name} says {number}" for name, number in heads.items())
        raise ValueError(f"the numbers of heads differ: {said}")
    (name, number) = next(iter(heads.items()))
    # a head has three parts of at least one pair of dimensions
    if (
        type(number) is not int
        or number < 1
        or dim % number
        or dim // number % 2
        or dim < 6 * number
    ):
        raise ValueError(f"{name} says {number} heads, which do not divide a width of {dim}")
    return number


def check(state, names, unused, encoder):
    """ValueError naming all keys that are not as the encoder needs them."""
    expected = {}
    for name, weight in encoder.state_dict().items():
        first, *rest = weight.shape
        if name == "patch_embed.proj.weight":
            rest = [len(MEAN), *rest[1:]]
        if ".qkv." in name:  # in one, or query, key and value by themselves
            first //= len(names[name])
        expected |= dict.fromkeys(names[name], (first, *rest))
    if "video_mod_embed" in expected:
        expected["video_mod_embed"] = (1, 1, encoder.width)
    problems = {
        "missing": [k for k in expected if k not in state],
        "unexpected": [k for k in state if k not in expected and not k.startswith(unused)],
        "wrong shape": [
            f"{k} {tuple(state[k].shape)}, expected {shape}"
            for k, shape in expected.items()
            if k in state and tuple(state[k].shape) != shape
        ],
        "not finite": [k for k in expected if k in state and not state[k].float().isfinite().all()],
    }
    found = [f"{problem}: {keys_text(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError("; ".join(found))


def joined(state, keys):
    """One weight, float32, of the tensors that make it: a copy, so that nothing of the mapped file
    is kept, which others may replace."""
    tensors = [state[key].float() for key in keys]
    if keys[-1] == "video_mod_embed":
        return tensors[0] + tensors[1].flatten()
    return torch.cat(tensors)


def fold(weights):
    """Make the patches' kernel for three normalised channels into one for a grey one on [0, 1].

    sum_c w_c (x - mean_c) / std_c + b = (sum_c w_c / std_c) x + (b - sum_c w_c mean_c / std_c)
    """
    kernel = weights["patch_embed.proj.weight"].double()  # (C, 3, 2, 16, 16)
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1, 1) for v in (MEAN, STD))
    shift = (kernel * mean / std).sum(dim=(1, 2, 3, 4))  # (C,)
    bias = weights["patch_embed.proj.bias"].double() - shift
    weights["patch_embed.proj.weight"] = (kernel / std).sum(dim=1, keepdim=True).float()
    weights["patch_embed.proj.bias"] = bias.float()
