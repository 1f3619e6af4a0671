"""What a checkpoint's config says of its encoder, beside what the weights tell.

    said = read({"model": {"num_heads": 16, "eps": 1e-6}}, sizes)
    said["number of heads"]         # ("config.model.num_heads", 16)

Nobody agreed on the names of these settings, nor on the sections that they are in, so this file
knows the usual ones. What a config says holds; what it contradicts is an error; what it does not
say is left to the caller. Needs nothing but Python.
"""

import re

NAMES = {
    "number of heads": "num_heads n_heads n_head nhead heads num_attention_heads attention_heads",
    "width of a head": "head_dim dim_head head_width head_size",
    "LayerNorm eps": "layer_norm_eps layernorm_eps layer_norm_epsilon norm_eps ln_eps eps",
    "activation": "activation activation_fn activation_function activation_layer act act_fn "
    "act_layer hidden_act hidden_activation",
    # these the weights tell too, see model.sizes_of
    "width": "embed_dim emb_dim embedding_dim hidden_size dim",
    "depth": "depth num_layers num_hidden_layers n_layers",
    "patch size": "patch_size",
    "MLP ratio": "mlp_ratio",
}
SETTING = {name: setting for setting, names in NAMES.items() for name in names.split()}

# An encoder's activations: their names here, and what else configs call them. transformers'
# gelu_new is the tanh form; its quick_gelu and gelu_fast are neither.
ACTIVATIONS = {
    "gelu": "gelu gelu(approximate=none)",
    "gelu_tanh": "gelu_tanh gelu_pytorch_tanh gelu_new gelu(approximate=tanh)",
    "relu": "relu",
    "silu": "silu swish",
}
ACTIVATION = {name: known for known, names in ACTIVATIONS.items() for name in names.split()}

# The beginnings of the words in sections' names. A section is the encoder's if one of its words, or
# of those around it, is an encoder's and none is another part's.
ENCODERS = (
    *("model", "enc", "vit", "backbone", "trunk", "transformer", "net", "arch", "jepa", "vjepa"),
    *("att", "mlp", "ffn", "block", "layer", "patch", "teacher", "student", "vis", "ijepa"),
)
INSIDE_BLOCKS = ("att", "mlp", "ffn")  # of their own width
OTHERS = (
    *("pred", "dec", "optim", "sched", "lr", "wandb", "log", "data", "load", "loss", "aug", "mask"),
    *("prob", "class", "pool", "proj", "head", "text", "cross", "adapter", "lora", "adam"),
    *("callback", "scaler", "crit", "metric", "tokenizer", "normali"),  # normalisation of volumes
)
CONTAINERS = re.compile(r"args?|cfg|conf|config\d*|h?params|hyper|parameters|settings|kwargs")
PREFIX = re.compile(r"(context_encoder|target_encoder|encoder|enc|vit|model|backbone)_(.+)")


def read(config, sizes):
    """What config, of plain Python, says: {setting: (key, value)}, values as a model needs them.

    sizes: {setting: (what the weights are, in words, fits(value))}. ValueError naming the keys if a
    value cannot be used, differs from another one, or is not what the weights have.
    """
    said, found = [], {}
    for sections, key, value, beside in leaves(config):
        *path, name = (*sections, *key.lower().replace("-", "_").split("."))
        if prefix := PREFIX.fullmatch(name):
            path, name = [*path, prefix[1]], prefix[2]
        value = resolved(value, config)
        if value is not None and is_of_encoder(path, name, beside):
            setting, key = SETTING[name], ".".join(("config", *sections, key))[:200]
            said.append((setting, key, usable(setting, key, value)))
    for setting, key, value in said:
        first, other = found.setdefault(setting, (key, value))
        # a patch's size may be whole here and without its depth there
        if other != value and setting != "patch size":
            raise ValueError(
                f"its {first} is {other}, but its {key} is {value}; correct its config"
            )
    for setting, key, value in said:
        weights, fits = sizes.get(setting, ("", lambda _: True))
        if not fits(value):
            raise ValueError(
                f"its {key} is {value}, but its weights are {weights}; correct its config"
            )
    return found


def leaves(config, sections=()):
    """(names of the sections, key, value, the keys beside it) of every value."""
    for key, value in config.items():
        key = str(key)
        # Hydra's {_target_: torch.nn.GELU} is a value where a setting is named so
        is_value = not isinstance(value, dict) or (key.lower() in SETTING and "_target_" in value)
        if is_value:
            yield sections, key, value, config
        else:
            yield from leaves(value, (*sections, key))


def is_of_encoder(sections, name, beside):
    """Does a value of this name, in these sections, say something of the encoder?"""
    if name not in SETTING or (name == "depth" and "height" in beside):  # depth of a volume
        return False
    words = [word for section in sections for word in section.lower().split("_")]
    words = [word for word in words if not CONTAINERS.fullmatch(word)]
    if any(word.startswith(OTHERS) for word in words):
        return False
    if SETTING[name] == "width" and any(word.startswith(INSIDE_BLOCKS) for word in words):
        return False
    # an optimizer has an eps too, and its section may have any name
    return any(word.startswith(ENCODERS) for word in words) or (not words and name != "eps")


def resolved(value, config):
    """The value for which OmegaConf's "${a.b}" stands, if config has it."""
    for _ in range(10):  # it may stand for another one
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if not reference:
            break
        found = config
        for key in reference[1].split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if found is None:
            break
        value = found
    return value


def usable(setting, key, value):
    """A setting's value as a model needs it. ValueError naming its key if it is none."""
    is_number = type(value) in (int, float) and 0 < value < 1e9
    if setting == "activation":
        # "torch.nn.GELU()" and "<class 'torch.nn.GELU'>" are "gelu"
        name = re.sub(r"<class|[\s'\"<>]", "", str(value).lower()).removesuffix("()")
        name = re.sub(r"^([a-z_]\w*\.)+", "", name)
        if isinstance(value, str) and name in ACTIVATION:
            return ACTIVATION[name]
        needed = f"one of {', '.join(ACTIVATION)}"
    elif setting == "patch size":
        sizes = value if isinstance(value, list) else [value, value]  # rows and columns
        if len(sizes) in (2, 3) and all(type(n) is int and 0 < n < 1e9 for n in sizes):
            return tuple(sizes)
        needed = "one to three whole numbers"
    elif setting == "LayerNorm eps":
        if is_number and value < 1:
            return float(value)
        needed = "a number between 0 and 1"
    elif setting == "MLP ratio":
        if is_number:
            return value
        needed = "a number above 0"
    else:
        if is_number and value % 1 == 0:
            return int(value)
        needed = "a whole number above 0"
    shown = " ".join(repr(value).split())[:100]
    raise ValueError(f"its {key} is {shown}, not {needed}; correct its config")
