"""The encoder of the config, checked: model.py's own, or one that a Python file of yours loads.

    encoder = open_encoder(cfg)               # Encoder: module, size of its volumes, sha256
    other = random_encoder(encoder, seed)     # the same with random weights, which a floor needs

model.loader names a file with load(path, **model.loader_options) -> nn.Module. docs/encoders.md has
an example and what the module must have. Its weights, the text of that file and its options make up
the encoder's sha256, which is part of every cached feature's key.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import os
import sys
from dataclasses import dataclass

import torch
from torch import nn

import b2
import files
import given
import model


@dataclass
class Encoder:
    """An encoder in eval mode, the size (D, H, W) of the volumes that it sees, and what its tokens
    depend on: the sha256 of its weights, and of its loader."""

    module: nn.Module
    size: tuple
    sha256: str

    @property
    def wants_intensities(self):
        """Does it see volumes in their original intensities, and not z-scores?"""
        return isinstance(self.module, Adapted) and self.module.wants_intensities


def open_encoder(cfg):
    """The Encoder of the config, whose model.emb_dim it sets where that is null. ValueError naming
    the key, where the two do not fit; OSError where its file cannot be read."""
    if cfg.paths.features:
        return of_features(cfg)
    module = load(cfg)
    name = cfg.paths.checkpoint_path or cfg.model.loader
    if cfg.model.emb_dim is None:
        cfg.model.emb_dim = module.width
    if module.width != cfg.model.emb_dim:
        raise ValueError(
            f"model.emb_dim is {cfg.model.emb_dim}, but the encoder of {name} is {module.width} "
            f"wide; set model.emb_dim={module.width}"
        )
    if cfg.model.pool_method == "attentive" and module.width % model.HEAD_DIM:
        raise ValueError(
            f"model.pool_method=attentive needs an encoder whose width is a multiple of "
            f"{model.HEAD_DIM}, but that of {name} is {module.width} wide; set "
            "model.pool_method=mean"
        )
    size = volume_size(cfg, module.image_size)
    module.check_size(size)
    if cfg.model.pool_method == "attentive" and any(
        n > most for n, most in zip(cfg.model.token_grid, module.grid(size))
    ):
        raise ValueError(
            f"model.token_grid={cfg.model.token_grid} is finer than the encoder's tokens, "
            f"{list(module.grid(size))}; set at most those"
        )
    module.requires_grad_(False)
    return Encoder(module, size, hash_of(module))


def of_features(cfg):
    """The Encoder where paths.features stands in for one: without a module."""
    found = given.read(cfg)
    width, is_attentive = found.x.shape[-1], cfg.model.pool_method == "attentive"
    if cfg.model.emb_dim not in (None, width):
        raise ValueError(
            f"model.emb_dim is {cfg.model.emb_dim}, but the features of {cfg.paths.features} are "
            f"{width} wide; set model.emb_dim=null"
        )
    if is_attentive and (found.x.ndim == 2 or width % model.HEAD_DIM):
        raise ValueError(
            "model.pool_method=attentive needs tokens (n, T, C) whose width is a multiple of "
            f"{model.HEAD_DIM}, and x of {cfg.paths.features} is {found.x.shape}; set "
            "model.pool_method=mean"
        )
    cfg.model.emb_dim = width
    return Encoder(None, None, found.sha256)


def load(cfg):
    """The module of the config, in eval mode, whatever loads it."""
    name = (cfg.paths.checkpoint_path or "").replace("\0", "\\0")  # no path has it, a message may
    path = cfg.paths.checkpoint_path and local(cfg, name)
    if cfg.model.loader:
        return adapted(cfg, path)
    try:
        module = model.load_encoder(path, cfg.model.encoder)
    except ValueError as error:
        raise ValueError(str(error).replace(path, name, 1)) from error
    except OSError as error:
        raise OSError(
            f"paths.checkpoint_path={name} cannot be read ({error.strerror}); allow this user to "
            "read it, or set paths.checkpoint_path"
        ) from error
    if module.assumed:
        print(f"note: {assumptions(module.assumed)}")
    return module


def local(cfg, name):
    """Local path of paths.checkpoint_path: a file, or for a loader, a local folder too."""
    path = os.path.expanduser(cfg.paths.checkpoint_path)
    if cfg.model.loader and os.path.isdir(path):
        return path
    try:
        return b2.local(cfg.paths.checkpoint_path, cfg.paths.cache_dir, cfg.data.fetch_deadline)
    except FileNotFoundError:
        # a folder or a pipe, or nothing
        what = "no file" if os.path.exists(path) else "not there"
        of_demo = "; .venv/bin/python bench/encoders.py makes those of demo_short and demo_long"
        is_theirs = "demo_encoders/" in cfg.paths.checkpoint_path
        raise FileNotFoundError(
            f"paths.checkpoint_path={name} is {what}; put the pretrained encoder's file there, "
            f"or set paths.checkpoint_path{of_demo if is_theirs else ''}"
        ) from None


def described(cfg):
    """Where the encoder comes from, in words."""
    path = cfg.paths.checkpoint_path
    if cfg.paths.features:
        return f"features of {cfg.paths.features}"
    if not cfg.model.loader:
        return f"{path} ({cfg.model.encoder} encoder)"
    return f"{cfg.model.loader} of {path}" if path else cfg.model.loader


def provenance(cfg):
    """What a run keeps of its loader; None where model.py loads the encoder."""
    if not cfg.model.loader:
        return None
    file = os.path.abspath(os.path.expanduser(cfg.model.loader))
    return {"file": file, "sha256": files.sha256(file), "options": cfg.model.loader_options}


def volume_size(cfg, image_size):
    """(D, H, W) of the volumes that the encoder sees: data.image_size, or its own image_size."""
    size = cfg.data.image_size or image_size
    if size is None:
        raise ValueError(
            f"{cfg.paths.checkpoint_path or cfg.model.loader} does not say its image_size; set "
            "data.image_size=[depth, height, width]"
        )
    return tuple(size)


def assumptions(assumed):
    """Sentence on what is assumed of an encoder: {what its file does not say: what is used}."""

    def listed(words):
        *more, last = words
        return f"{', '.join(more)} and {last}" if more else last

    return (
        f"the encoder's file does not say its {listed(assumed)}; assumed "
        f"{'are' if len(assumed) > 1 else 'is'} {listed(assumed.values())}"
    )


def hash_of(module):
    """sha256 of all that an encoder's tokens depend on but the volume."""
    if not isinstance(module, Adapted):
        return model.weights_hash(module)
    digest = hashlib.sha256(module.loaded_by.encode())
    for name, tensor in sorted(module.module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # as bytes, for numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def random_encoder(encoder, seed):
    """An Encoder of the same shape with random weights, which a floor is computed with."""
    like = encoder.module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(like, Adapted):
            module = randomised(copy.deepcopy(like))
        else:
            module = model.ViT3D(
                like.width,
                len(like.blocks),
                like.pos_embed.shape[1],
                like.blocks[0].mlp.fc1.out_features,
                like.patch_size,
                like.num_heads,
                like.eps,
                like.activation,
            )
    module.eval().requires_grad_(False)
    return Encoder(module, encoder.size, hash_of(module))


@torch.no_grad()
def randomised(module):
    """The module, initialised anew as its own layers do it; parameters that belong to none, such as
    positions, from a normal distribution of SD 0.02."""
    own = set()
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
            own |= {id(parameter) for parameter in part.parameters(recurse=False)}
    for parameter in module.parameters():
        if id(parameter) not in own:
            parameter.normal_(std=0.02)
    return module


# ------------------------------------------------------------------------ from a file of one's own


def adapted(cfg, path):
    """The module that model.loader's load gives, called as model.ViT3D is."""
    file, options = os.path.expanduser(cfg.model.loader), cfg.model.loader_options
    if not os.path.isfile(file):
        raise ValueError(f"model.loader={cfg.model.loader} is not a file; name one with load(path)")
    with open(file, "rb") as f:
        source = f.read()
    loaded_by = json.dumps([hashlib.sha256(source).hexdigest(), options], sort_keys=True)
    if path and os.path.isdir(path):  # what stands beside the weights may decide about them
        beside = [name for name in sorted(os.listdir(path)) if name.endswith(".json")]
        loaded_by += " ".join(files.sha256(os.path.join(path, name)) for name in beside)
    spec = importlib.util.spec_from_file_location(f"loader_{files.hashed(loaded_by)[:8]}", file)
    code = importlib.util.module_from_spec(spec)
    sys.path.append(os.path.dirname(os.path.abspath(file)))  # it may import its neighbours
    try:
        exec(compile(source, file, "exec"), code.__dict__)  # the very bytes that were hashed
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"model.loader={cfg.model.loader} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(code, "load", None)):
        raise ValueError(f"model.loader={cfg.model.loader} has no function load(path, **options)")
    try:
        # what it may leave at random is the same again when the run is scored
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = code.load(path, **options)
    except TypeError as error:
        if "load()" in str(error):  # not one within it
            raise ValueError(
                f"model.loader={cfg.model.loader}, model.loader_options: {error}"
            ) from error
        raise
    check_contract(module, cfg.model.loader)
    # the same file, with another version of the library whose network it is, is another encoder
    loaded_by += getattr(module, "made_with", "")
    return Adapted(module.eval(), loaded_by)


def check_contract(module, name):
    """ValueError, before anything is encoded, where a loader gives something else than an encoder:
    see docs/encoders.md."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"model.loader={name}: load gives {type(module).__name__}, no nn.Module")
    wanted = {
        "width": ("the number of channels of a token", lambda v: type(v) is int and v > 0),
        "image_size": ("(D, H, W), or None for any", is_size_or_none),
        "grid": ("grid(size) -> (d, h, w), the tokens along each axis", callable),
    }
    for attribute, (what, is_right) in wanted.items():
        if not hasattr(module, attribute):
            raise ValueError(f"model.loader={name}: its module has no {attribute}, {what}")
        if not is_right(getattr(module, attribute)):
            value = repr(getattr(module, attribute))[:100]
            raise ValueError(f"model.loader={name}: its {attribute} is {value}, not {what}")


def is_size_or_none(value):
    return value is None or (len(value) == 3 and all(type(n) is int and n > 0 for n in value))


class Adapted(nn.Module):
    """An encoder of another file, called as model.ViT3D is: drop-path and activation checkpointing
    are put around the layers that it names, its own normalisation before it."""

    drop_path = 0.0
    checkpoint = None

    def __init__(self, module, loaded_by):
        super().__init__()
        self.module, self.loaded_by = module, loaded_by
        self.width, self.image_size = module.width, module.image_size
        self.wants_intensities = hasattr(module, "normalise")

    def forward(self, volume, noise=None):
        """(B, 1, D, H, W), z-scores or where wants_intensities intensities -> (B, N, C)."""
        size = volume.shape[-3:]
        if self.wants_intensities:
            volume = self.module.normalise(volume)
        if not self.training or not (self.drop_path or self.checkpoint):
            return self.checked(self.module(volume), size)
        with contextlib.ExitStack() as stack:
            blocks = self.layers()[1:-1]
            for i, block in enumerate(blocks):
                if self.drop_path:
                    noise = noise or model.any_noise(volume)
                    keep = noise.keep(self.drop_path * (i + 1) / len(blocks), (1, 1), layer=i)
                    hook = block.register_forward_hook(functools.partial(skip, keep))  # (B, 1, 1)
                    stack.callback(hook.remove)
                if self.checkpoint:
                    block.forward = functools.partial(self.checkpoint, block.forward)
                    stack.callback(delattr, block, "forward")
            return self.checked(self.module(volume), size)

    def grid(self, size):
        return tuple(self.module.grid(tuple(size)))

    def layers(self):
        """Its modules from input to output; ValueError where it does not say."""
        if not hasattr(self.module, "layers"):
            raise ValueError(
                "the module of model.loader has no layers(), its modules from input to output; set "
                "train.layer_decay=1, model.drop_path=0 and train.activation_checkpointing=false"
            )
        return list(self.module.layers())

    def check_size(self, size):
        """ValueError unless it takes volumes of `size` (D, H, W)."""
        if self.image_size is not None and tuple(self.image_size) != tuple(size):
            raise ValueError(
                f"data.image_size={list(size)} does not fit the encoder of model.loader, whose "
                f"image_size is {list(self.image_size)}; set data.image_size=null"
            )

    def checked(self, tokens, size):
        """The tokens. ValueError unless they are (B, N, C), with N of grid(size) and C of width."""
        expected = (math.prod(self.grid(size)), self.width)
        shape = tuple(getattr(tokens, "shape", ()))
        if len(shape) != 3 or shape[1:] != expected:
            raise ValueError(
                f"the encoder of model.loader gives {shape or type(tokens).__name__} for a volume "
                f"of {tuple(size)}; by its grid and width, it is to be (B, {expected[0]}, "
                f"{expected[1]})"
            )
        return tokens


def skip(keep, block, args, output):
    """Forward hook of drop-path: of some samples, a block's change of its tokens is left out.
    keep (B, 1, 1): 0, or 1 / (1 - p)."""
    y = output[0] if isinstance(output, tuple) else output
    if y.shape != args[0].shape or len(y) != len(keep):
        raise ValueError(
            f"model.drop_path needs blocks that see whole volumes, (B, N, C) -> (B, N, C); one of "
            f"this encoder turns {tuple(args[0].shape)} into {tuple(y.shape)}; set "
            "model.drop_path=0"
        )
    y = args[0] + keep.to(y.device, y.dtype) * (y - args[0])
    return (y, *output[1:]) if isinstance(output, tuple) else y
