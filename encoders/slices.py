"""B-scans, one by one, through a 2D backbone of timm or transformers -> tokens of an OCT volume.

    encoder = load("RETFound_oct_weights.pth", name="vit_large_patch16_224.mae", key="model")
    encoder = load("dinov2-base", library="transformers", frames=8, tokens="patches")
    tokens = encoder(encoder.normalise(volume))     # (B, 1, D, H, W), 0 to 255 -> (B, N, C)

Some B-scans of a volume are resized to the backbone's input, made three equal channels and
normalised as the backbone was trained. What it makes of each is one token (its feature of a whole
image), or the tokens of all its patches. Needs torch, weights.py, and timm or transformers
(requirements-encoders.txt). Nothing is ever downloaded: weights come from `path`.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model import scaled
from weights import keys_text, read_file, verify

# Beginnings of keys that a file of a pretraining has beside the backbone's: an MAE's decoder, what
# stands for masked patches, classifiers, and poolers that were trained to classify
UNUSED = ("decoder_", "mask_token", "masked_embed", "head.", "fc.", "classifier.", "pooler.")

# Where ViTs have their patch embedding, blocks and last norm
LAYERS = (
    ("patch_embed", "blocks", "norm"),  # timm
    ("embeddings", "encoder.layer", "layernorm"),  # transformers: DINOv2, and ViT before 5
    ("embeddings", "layers", "layernorm"),  # ViT in transformers 5
    ("embeddings", "model.layer", "norm"),  # DINOv3
)


class Slices(nn.Module):
    """(B, 1, D, H, W) float in [0, 1] -> tokens (B, N, C), B-scan after B-scan.

    backbone: maps images (b, 3, h, w) to a feature of each (b, C) and a map (b, C, h', w').
    frames: the number of B-scans, None for all. batch: B-scans that go through at once. tokens:
    "scans", N = frames, or "patches", N = frames h' w'.
    """

    image_size = None  # any

    def __init__(self, backbone, size, mean, std, frames, tokens, batch, white):
        super().__init__()
        self.backbone, self.size, self.frames = backbone, size, frames
        self.tokens, self.batch, self.white = tokens, batch, white
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        with torch.no_grad():  # what a black B-scan becomes tells the sizes
            feature, patches = backbone(self.image(torch.zeros(1, 1, *size)))
        self.width = (feature if tokens == "scans" else patches).shape[1]
        self.patches = tuple(patches.shape[2:]) if tokens == "patches" else (1, 1)

    def forward(self, volume):
        places = self.places(volume.shape[2])
        scans = volume[:, 0, places].flatten(0, 1)[:, None]  # (B, D, H, W) -> (B n, 1, H, W)
        tokens = torch.cat([self.encode(part) for part in scans.split(self.batch)])
        # (B n, T, C) -> (B, n, T, C) -> (B, n T, C)
        return tokens.unflatten(0, (len(volume), -1)).flatten(1, 2)

    def encode(self, scans):
        """B-scans (b, 1, H, W) -> tokens (b, T, C), T = 1 or h' w'."""
        feature, patches = self.backbone(self.image(scans))
        if self.tokens == "scans":
            return feature[:, None]
        return patches.flatten(2).transpose(1, 2)  # (b, C, h', w') -> (b, h' w', C)

    def image(self, scans):
        """B-scans (b, 1, H, W) in [0, 1] -> what the backbone was trained on (b, 3, h, w)."""
        if scans.shape[2:] != self.size:
            scans = F.interpolate(scans, self.size, mode="bilinear", antialias=True)
        return (scans - self.mean) / self.std  # mean and std (1, 3, 1, 1)

    def places(self, depth):
        """Which of `depth` B-scans: in the middle of as many equal parts; of one, the middle."""
        number = self.frames or depth
        if number > depth:
            raise ValueError(
                f"model.loader_options.frames is {number}, but the volume has {depth} B-scans; set "
                "at most those, or null for all"
            )
        return [(2 * i + 1) * depth // (2 * number) for i in range(number)]

    def grid(self, size):
        """Tokens along each axis (d, h, w) of a volume of `size` (D, H, W)."""
        return (len(self.places(size[0])), *self.patches)

    def normalise(self, volume):
        """Original intensities (B, 1, D, H, W) -> what forward takes, on [0, 1]."""
        return scaled(volume, self.white)


class SlicesOfViT(Slices):
    """Slices whose backbone is a ViT: it can say its layers."""

    def layers(self):
        """The modules from input to output."""
        patches, blocks, norm = vit_layers(self.backbone.model)
        return [patches, *blocks, norm]


# ---- backbones


class Timm(nn.Module):
    """A model of timm: images (b, 3, h, w) -> feature (b, C), map (b, C, h', w').

    pool: None for timm's own feature, "cls", or "mean" of the patches.
    """

    def __init__(self, model, pool):
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, images):
        x, cls = self.model.forward_features(images), None
        if x.ndim == 3:  # (b, N, C)
            others = self.model.num_prefix_tokens  # CLS and registers, which have no place
            cls = x[:, 0] if others else None
            shape = grid_of(images, self.model.patch_embed.patch_size, x)
            patches = x[:, others:].transpose(1, 2).unflatten(2, shape)  # (b, C, h', w')
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            patches = x.permute(0, 3, 1, 2)
        else:
            patches = x
        if self.pool is None:
            return self.model.forward_head(x, pre_logits=True), patches
        return pooled(self.pool, cls, patches), patches


class Transformers(nn.Module):
    """A model of transformers: images (b, 3, h, w) -> feature (b, C), map (b, C, h', w').

    pool: None for CLS where there is one, else the mean of the patches; "cls"; or "mean".
    """

    def __init__(self, model, pool):
        super().__init__()
        self.model, self.pool = model, pool
        # ViTs whose positions were learned for one size have to be asked for another
        names = inspect.signature(model.forward).parameters
        self.options = {k: True for k in ("interpolate_pos_encoding",) if k in names}

    def forward(self, images):
        x = self.model(pixel_values=images, **self.options).last_hidden_state
        if x.ndim == 4:  # (b, C, h', w'), of a CNN
            return pooled(self.pool or "mean", None, x), x
        h, w = grid_of(images, self.model.config.patch_size, x)
        others = x.shape[1] - h * w  # CLS and registers, which have no place
        cls = x[:, 0] if others else None
        patches = x[:, others:].transpose(1, 2).unflatten(2, (h, w))  # (b, C, h', w')
        return pooled(self.pool or ("cls" if others else "mean"), cls, patches), patches


def pooled(pool, cls, patches):
    """A feature (b, C): the mean of a map (b, C, h', w'), or the CLS token (b, C)."""
    if pool == "mean":
        return patches.mean(dim=(2, 3))
    if cls is None:
        raise ValueError("the backbone has no CLS token; set model.loader_options.pool to mean")
    return cls


def grid_of(images, patch_size, tokens):
    """(h', w'), the patches of images; tokens (b, N, C) has them last."""
    sizes = patch_size if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    h, w = (n // p for n, p in zip(images.shape[2:], sizes))
    if h * w > tokens.shape[1]:
        raise ValueError(
            f"the backbone makes {tokens.shape[1]} tokens of {h} x {w} patches, so their places "
            "are not known; use a plain ViT or a CNN"
        )
    return h, w


def vit_layers(model):
    """(patch embedding, blocks, last norm) of a ViT, or None."""
    modules = dict(model.named_modules())
    for names in LAYERS:
        if all(name in modules for name in names):
            return tuple(modules[name] for name in names)
    return None


# ---- loading, strictly


@dataclass
class Source:
    """Where weights are: a file or folder, the key of the state dict in the file, what the keys of
    the backbone begin with, and the beginnings of keys that may be left over."""

    path: str
    key: str
    prefix: str
    unused: tuple


def load(
    path,
    name=None,
    library="timm",
    frames=None,
    tokens="scans",
    pool=None,
    size=None,
    mean=None,
    std=None,
    key=None,
    prefix="",
    unused=(),
    batch=8,
    white=255,
    random=False,
):
    """Encoder of a 2D backbone, in eval mode.

    path: the file of weights; or for transformers, the folder that save_pretrained writes; or None,
        with random: true, for random weights.
    name: the model, as timm calls it; or for transformers, a folder with its config.json, by
        default path.
    frames: B-scans of a volume: 1, the middle one; n, evenly spaced; None, all.
    tokens: "scans", one a B-scan; or "patches", all of each.
    pool: what a B-scan's token is: "cls", "mean" of its patches; None, as the backbone defines it.
    size: of its input, a number or [rows, columns]; mean, std: on [0, 1], a number or three. None:
        as the library or the folder says. The weights' positions are resampled only for a size
        that is named here.
    key: of the state dict in the file; prefix: what its keys begin with, others being no part of
        the backbone; unused: beginnings of more keys that may be left over, beside UNUSED.
    batch: B-scans that go through the backbone at once: speed for memory, with the same result.
    white: the intensity of the volumes that counts as 1.
    ValueError naming the keys when any is missing, unexpected, of the wrong shape or not finite.
    """
    check_options(path, random, library, tokens, pool, frames, batch)
    size = size if size is None or isinstance(size, (tuple, list)) else (size, size)
    make = of_timm if library == "timm" else of_transformers
    try:
        source = Source(path, key, prefix, (*UNUSED, *unused))
        backbone, settings = make(source, name, size, pool)
        settings |= {k: v for k, v in {"mean": mean, "std": std}.items() if v is not None}
        for option in ("size", "mean", "std"):
            if settings[option] is None:
                raise ValueError(f"nothing tells its {option}; set model.loader_options.{option}")
        mean, std = (three(settings[option]) for option in ("mean", "std"))
        kind = Slices if vit_layers(backbone.model) is None else SlicesOfViT
        backbone.eval()
        size = tuple(settings["size"])
        module = kind(backbone, size, mean, std, frames, tokens, batch, white)
        module.made_with = f"{library} {importlib.metadata.version(library)}"
        return module.eval()
    except ValueError as error:
        raise ValueError(f"{path or name}: backbone not loaded: {error}") from error


def check_options(path, random, library, tokens, pool, frames, batch):
    choices = {
        "library": (library, ("timm", "transformers")),
        "tokens": (tokens, ("scans", "patches")),
        "pool": (pool, (None, "cls", "mean")),
    }
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"model.loader_options.{option} is {value!r}, not one of {allowed}")
    for option, value in {"frames": 1 if frames is None else frames, "batch": batch}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"model.loader_options.{option} is {value!r}, not a number above 0")
    if path is None and not random:
        raise ValueError(
            "there is no path of weights; set paths.checkpoint_path, or for random weights "
            "model.loader_options.random to true"
        )
    if path is not None and random:
        raise ValueError(f"model.loader_options.random is true, but the weights are {path}")


def three(value):
    values = [float(v) for v in (value if isinstance(value, (tuple, list)) else [value])]
    if len(values) not in (1, 3):
        raise ValueError(f"mean and std are one number or three, not {values}")
    return values * (3 // len(values))


def of_timm(source, name, size, pool):
    """(Timm, its size, mean and std)."""
    timm = import_library("timm")
    if name is None or ":" in name or not timm.is_model(name):  # "hf-hub:..." would download
        raise ValueError(f"timm has no model {name!r}; set model.loader_options.name to one it has")
    model = timm.create_model(name, pretrained=False, num_classes=0)
    if size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=tuple(size))
    if source.path is not None:
        state = resampled(state_dict(source), model, size is not None)
        copy_weights(state, model, source)
    said = model.pretrained_cfg
    size = size or said["input_size"][1:]
    return Timm(model, pool), {"size": size, "mean": said["mean"], "std": said["std"]}


def resampled(state, model, is_asked):
    """The state dict of a timm ViT with its positions at the model's size, if that is asked for."""
    from timm.layers import resample_abs_pos_embed

    positions, ours = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if positions is None or ours is None or positions.shape == ours.shape:
        return state
    if not is_asked:
        raise ValueError(
            f"wrong shape: pos_embed {tuple(positions.shape)}, expected {tuple(ours.shape)}; set "
            "model.loader_options.size to the size of its input"
        )
    if positions.ndim != 3 or positions.shape[2] != ours.shape[2]:
        return state  # which is an error
    others = 0 if model.no_embed_class else model.num_prefix_tokens
    side = round((positions.shape[1] - others) ** 0.5)
    if side * side + others != positions.shape[1]:
        return state
    grid = list(model.patch_embed.grid_size)
    positions = resample_abs_pos_embed(
        positions.float(), new_size=grid, old_size=[side, side], num_prefix_tokens=others
    )
    return {**state, "pos_embed": positions}


def of_transformers(source, name, size, pool):
    """(Transformers, its size, mean and std)."""
    transformers = import_library("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder = name or source.path
    if folder is None or not os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(
            f"there is no config.json of transformers in {folder!r}; set model.loader_options.name "
            "to its folder"
        )
    local = dict(local_files_only=True, trust_remote_code=False)
    config = transformers.AutoConfig.from_pretrained(folder, **local)
    if source.path is not None and os.path.isdir(source.path):
        # transformers itself knows the names that its earlier versions gave to weights
        model, report = transformers.AutoModel.from_pretrained(
            source.path,
            **local,
            config=config,
            use_safetensors=True,  # no pickle
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
        refuse_transformers(report, source.unused)
        refuse({"not finite": not_finite(model.state_dict())})
    else:
        model = transformers.AutoModel.from_config(config, trust_remote_code=False)
        if source.path is not None:
            copy_weights(state_dict(source), model, source)
    said = preprocessing(folder)
    if size is None:
        size = said["size"] or getattr(config, "image_size", None)
        size = (size, size) if isinstance(size, int) else size
    return Transformers(model, pool), {**said, "size": size}


def preprocessing(folder):
    """Size, mean and std in a folder's preprocessor_config.json, None where it has none."""
    path = os.path.join(folder, "preprocessor_config.json")
    said = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
    size = said.get("crop_size") if said.get("do_center_crop", True) else None
    size = size or said.get("size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    size = (size, size) if isinstance(size, int) else size
    return {"size": size, "mean": said.get("image_mean"), "std": said.get("image_std")}


def state_dict(source):
    """The backbone's weights in a file, their keys without the prefix."""
    content = read_file(source.path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of weights")
    if source.key is not None:
        if not isinstance(content.get(source.key), dict):
            raise ValueError(f"it has no state dict {source.key!r}; found {keys_text(content)}")
        content = content[source.key]
    elif isinstance(content.get("model_state_dict"), dict):
        content = content["model_state_dict"]
    state = {
        k: v
        for k, v in content.items()
        if isinstance(v, torch.Tensor) and isinstance(k, str) and k.startswith(source.prefix)
    }
    if not state:
        raise ValueError(
            f"no weights begin with {source.prefix!r} there; found {keys_text(content)}; set "
            "model.loader_options.key and prefix"
        )
    verify(source.path, state)
    return {k.removeprefix(source.prefix): v for k, v in state.items()}


def copy_weights(state, model, source):
    """Give a model exactly the weights of a state dict, which are copies, as its own types."""
    ours = model.state_dict()
    report = {
        # the number of batches that a batch norm has seen does not matter
        "missing": [k for k in ours if k not in state and not k.endswith("num_batches_tracked")],
        "unexpected": [k for k in state if k not in ours and not k.startswith(source.unused)],
        "wrong shape": [
            f"{k} {tuple(state[k].shape)}, expected {tuple(v.shape)}"
            for k, v in ours.items()
            if k in state and state[k].shape != v.shape
        ],
        "not finite": not_finite({k: v for k, v in state.items() if k in ours}),
    }
    # a pooler is not used, so it may be missing too
    report["missing"] = [k for k in report["missing"] if not k.startswith("pooler.")]
    refuse(report, source.prefix)
    with torch.no_grad():
        for k, v in ours.items():
            if k in state:
                v.copy_(state[k])


def refuse_transformers(report, unused):
    """ValueError naming the keys, if transformers reports any that are not as they should be."""
    refuse(
        {
            "missing": [k for k in sorted(report["missing_keys"]) if not k.startswith("pooler.")],
            "unexpected": [
                k for k in sorted(report["unexpected_keys"]) if not k.startswith(unused)
            ],
            "wrong shape": [str(k) for k in report["mismatched_keys"]],
            "not readable": [str(k) for k in report.get("error_msgs") or ()],
        }
    )


def not_finite(state):
    return [k for k, v in state.items() if not v.float().isfinite().all()]


def refuse(report, prefix=""):
    found = [
        f"{problem}: {keys_text([prefix + k for k in keys])}"
        for problem, keys in report.items()
        if keys
    ]
    if found:
        raise ValueError("; ".join(found))


def import_library(name):
    """Import timm or transformers, also beside a torchvision whose compiled operators do not load
    because it was built for a GPU, and torch for the CPU. Both import it for its transforms; its
    operators, for the detection of objects, remain an error where they are called."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"model.loader_options.library is {name}, which is not installed; run "
            ".venv/bin/pip install -r requirements-encoders.txt"
        )
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::nms does not exist" not in str(error):
                raise
            OPERATORS.append(torch.library.Library("torchvision", "DEF"))
            for operator in ("nms", "qnms"):
                schema = f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor"
                OPERATORS[0].define(schema)
            importlib.import_module("torchvision")
    return importlib.import_module(name)


OPERATORS = []  # definitions last as long as their library
