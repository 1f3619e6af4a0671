"""Configuration: a YAML file with at most one `base:` parent, then `section.key=value` overrides.

    cfg = load("configs/demo.yaml", ["train.epochs=10", "train.lr_head=3e-4"])
    cfg = load(["configs/demo.yaml", "configs/finetune.yaml"])      # the second over the first
    cfg.train.lr_head

`base:` is a path relative to the file that names it, or absolute. KEYS below lists every key there is and what it may
hold; configs/base.yaml gives every key its default and says what it does. Whatever is unknown or of the wrong type stops
the run with a ValueError that names the key.
"""

import difflib
import os
import re
from types import SimpleNamespace

import yaml

DEFAULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "base.yaml")

# ------------------------------------------------------------------- what a value may be: value -> value, or ValueError


def integer(low, high=2**31):
    def check(value):
        if type(value) is float and value.is_integer() or type(value) is str and re.fullmatch(r"[+-]?[0-9]+", value):
            value = int(value)
        if type(value) is not int or not low <= value < high:
            raise ValueError(f"a whole number from {low} to {high - 1}")
        return value
    return check


def number(low, below=float("inf"), most=float("inf")):
    def check(value):
        try:
            value = value if type(value) is bool else float(value)  # YAML reads 3e-4 as text
        except (TypeError, ValueError):
            pass
        if type(value) is not float or not low <= value < below or value > most:
            raise ValueError(f"a number >= {low:g}" + (f" and < {below:g}" if below < float("inf") else "")
                             + (f" and <= {most:g}" if most < float("inf") else ""))
        return value
    return check


def strength(most):
    """A switch with its strength: false, true (the usual strength) or a number."""
    def check(value):
        try:
            return value if type(value) is bool else number(0, most=most)(value)
        except ValueError as error:
            raise ValueError(f"true, false or {error}") from None
    return check


def boolean(value):
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def text(value):
    if type(value) is not str or not value:
        raise ValueError("a text, in quotes where YAML would read something else")
    return value


def optional(check):
    def check_or_none(value):
        try:
            return None if value is None else check(value)
        except ValueError as error:
            raise ValueError(f"{error}, or null") from None
    return check_or_none


def one_of(*allowed):
    def check(value):
        if value not in allowed or type(value) is bool:
            raise ValueError(f"one of {', '.join(allowed)}")
        return value
    return check


def image_size(value):
    if type(value) is not list or len(value) != 3 or not all(type(n) is int and n > 0 for n in value):
        raise ValueError("[depth, height, width], three whole numbers > 0")
    return value


def class_weights(value):
    if value in ("auto", "effective", "none"):
        return value
    if type(value) is not list or len(value) != 4:
        raise ValueError("auto, effective, none or a list of 4 numbers")
    return [number(0)(w) for w in value]


def choices(check):
    """A list of values that each pass check, or null."""
    def check_all(value):
        if type(value) is not list or not value:
            raise ValueError("a list of values to try, or null")
        return [check(v) for v in value]
    return lambda value: None if value is None else check_all(value)


def seeds(value):
    checked = choices(integer(0))(value)
    if checked and len(set(checked)) < len(checked):
        raise ValueError("a list of different seeds, or null")
    return checked


LOSSES = one_of("ce", "focal", "label_smoothing", "logit_adjustment", "balanced_softmax", "ordinal")

KEYS = {
    "project_name": text,
    "seed": integer(0),
    "paths.data": text,
    "paths.checkpoint_path": text,
    "paths.cache_dir": text,
    "paths.run_dir": text,
    "data.scanner": text,
    "data.anatomic_region": text,
    "data.image_size": optional(image_size),
    "data.batch_size": integer(1),
    "data.num_workers": integer(0),
    "data.prefetch": integer(1, 65),
    "data.cache_gb": number(0),
    "data.fetch_deadline": number(1),
    "data.max_missing": integer(0),
    "data.sampler": one_of("shuffle", "stratified"),
    "data.augment.flip": strength(1),
    "data.augment.intensity_jitter": strength(1),
    "data.augment.random_crop": strength(0.9),
    "data.augment.rotation": strength(180),
    "data.augment_views": integer(0),
    "data.cv": optional(integer(3)),
    "model.emb_dim": integer(1),
    "model.encoder": one_of("context", "target"),
    "model.freeze_encoder": boolean,
    "model.unfreeze_at_epoch": integer(-1),
    "model.drop_path": number(0, 1),
    "model.pool_method": one_of("mean", "max", "attentive"),
    "model.token_grid": image_size,
    "model.token_pool": one_of("mean", "max"),
    "model.head.kind": one_of("network", "logistic_regression", "knn"),
    "model.head.hidden": integer(0),
    "model.head.dropout": number(0, 1),
    "model.head.ordinal": boolean,
    "train.seeds": seeds,
    "train.epochs": integer(1),
    "train.lr_head": number(0),
    "train.lr_encoder": number(0),
    "train.layer_decay": number(0),
    "train.weight_decay": number(0),
    "train.optimizer": one_of("AdamW"),
    "train.scheduler": one_of("cosine"),
    "train.warmup_epochs": integer(0),
    "train.class_weights": class_weights,
    "train.loss": LOSSES,
    "train.sweep.lr_head": choices(number(0)),
    "train.sweep.weight_decay": choices(number(0)),
    "train.sweep.class_weights": choices(class_weights),
    "train.sweep.loss": choices(LOSSES),
    "train.sweep.ordinal": choices(boolean),
    "train.precision": one_of("fp32", "bf16"),
    "train.micro_batch": integer(1),
    "train.activation_checkpointing": boolean,
    "train.grad_clip": number(0),
    "train.resume": one_of("auto", "never"),
    "train.save_every": integer(0),
    "train.early_stopping.enabled": boolean,
    "train.early_stopping.patience": integer(1),
    "train.early_stopping.min_delta": number(0),
    "eval.floors": boolean,
    "device.backend": one_of("auto", "xla", "cuda", "cpu"),
    "device.processes": integer(1),
    "demo.dir": optional(text),
    "demo.effect": one_of("boosted", "literature"),
    "demo.participants": integer(1),
    "log.wandb": one_of("auto", "online", "offline", "disabled"),
    "log.wandb_project": text,
    "log.run_name": text,
}

SECTIONS = {key[:i] for key in KEYS for i, letter in enumerate(key) if letter == "."}  # "train", "train.early_stopping", ...


def check_together(cfg):
    """Values that are fine each, and contradict each other or ask for nothing: ValueError."""
    unfreeze = cfg.model.unfreeze_at_epoch
    trains = not cfg.model.freeze_encoder or unfreeze >= 0  # the encoder, sooner or later
    if not cfg.model.freeze_encoder and unfreeze > 0:
        raise ValueError(f"model.freeze_encoder=false trains the encoder from the start, and model.unfreeze_at_epoch={unfreeze} later; set "
                         "model.freeze_encoder=true, or model.unfreeze_at_epoch=-1")
    if unfreeze >= cfg.train.epochs:
        raise ValueError(f"model.unfreeze_at_epoch={unfreeze} is never reached in train.epochs={cfg.train.epochs}; set more epochs, or "
                         "model.unfreeze_at_epoch=-1")
    if any(vars(cfg.train.sweep).values()) and trains:
        raise ValueError("train.sweep tries heads on the features of a frozen encoder, and this one is to train; set train.sweep=null")
    if (cfg.train.seeds or cfg.data.cv) and trains:
        raise ValueError("train.seeds and data.cv repeat the head, on the features of a frozen encoder, and this one is to train; "
                         "set both to null and run train.py once for each seed=")
    if cfg.model.head.kind != "network":
        if trains:
            raise ValueError(f"model.head.kind={cfg.model.head.kind} is for the features of a frozen encoder, and this one is to train; "
                             "set model.head.kind=network")
        asked = {"model.pool_method=attentive": cfg.model.pool_method == "attentive",
                 f"model.head.hidden={cfg.model.head.hidden}": cfg.model.head.hidden,
                 "model.head.ordinal=true": cfg.model.head.ordinal, f"train.loss={cfg.train.loss}": cfg.train.loss != "ce",
                 f"data.sampler={cfg.data.sampler}": cfg.data.sampler != "shuffle", "train.sweep": any(vars(cfg.train.sweep).values()),
                 f"train.seeds={cfg.train.seeds}": cfg.train.seeds and not cfg.data.cv}
        for name in (name for name, is_asked in asked.items() if is_asked):
            raise ValueError(f"{name} means nothing to model.head.kind={cfg.model.head.kind}; unset it, or set model.head.kind=network")
    if cfg.eval.floors and trains:
        raise ValueError("eval.floors trains probes to compare with, and this encoder is to train; "
                         "set eval.floors=false, and floors in a probe's run")
    views, augments = cfg.data.augment_views, any(vars(cfg.data.augment).values())
    if not trains and cfg.model.drop_path:
        raise ValueError(f"model.drop_path={cfg.model.drop_path} is for an encoder that trains; "
                         "set model.drop_path=0, or let it train (model.unfreeze_at_epoch)")
    if not trains and augments and not views:
        raise ValueError("data.augment asks for augmentation, data.augment_views=0 for none while the encoder is frozen, "
                         "and it always is; set data.augment_views=1 or more, or switch data.augment off")
    if views > 1 and (not cfg.model.freeze_encoder or unfreeze == 0):
        raise ValueError(f"data.augment_views={views} is for a frozen encoder, and this one trains from the start; "
                         "set data.augment_views=1")
    if views > 1 and not augments:
        raise ValueError(f"data.augment_views={views} asks for augmented views, and every switch of data.augment is off; set one of "
                         f"{', '.join('data.augment.' + name for name in vars(cfg.data.augment))}")


def flatten(tree, prefix=""):
    """Nested dict -> {"section.key": value}. A section given as anything but a mapping keeps its name as the key."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if value is None and name == "train.sweep":
            value = {key.removeprefix("train.sweep."): None for key in KEYS if key.startswith("train.sweep.")}
        if value in (None, {}) and name in SECTIONS:
            continue  # a section whose keys are all commented out
        flat.update(flatten(value, name + ".") if isinstance(value, dict) and value else {name: value})
    return flat


def nest(flat):
    """{"section.key": value} -> nested dict."""
    tree = {}
    for name, value in flat.items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return tree


class UniqueKeys(yaml.SafeLoader):
    """A second `train:` section would silently replace the first; here it is an error."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key '{twice[0]}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse(text_, where):
    try:
        return yaml.load(text_, UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def known(name, where):
    if name in KEYS:
        return
    if name in SECTIONS:
        raise ValueError(f"{where}: '{name}' is a section; give its keys, such as "
                         f"{next(key for key in KEYS if key.startswith(name + '.'))}")
    same_leaf = [key for key in KEYS if key.split(".")[-1] == name.split(".")[-1]]  # a right name in the wrong section
    nearest = same_leaf or difflib.get_close_matches(name, KEYS, n=1, cutoff=0)
    raise ValueError(f"{where}: unknown key '{name}'; did you mean '{nearest[0]}'?")


def known_values(tree, where):
    """Nested or flat dict -> {"section.key": value}; ValueError when a key is none of KEYS."""
    flat = flatten(tree)
    for name in flat:
        known(name, where)
    return flat


def read(path, children=(), overlay=None):
    """Flat values of a file over those of its base. overlay: the file that it is to lie over, and then it may have no base."""
    path = os.path.abspath(path)
    if path in children:
        raise ValueError(f"{path}: its chain of base: files comes back to itself")
    with open(path, encoding="utf-8") as f:
        try:
            tree = parse(f.read(), path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no keys")
    base = tree.pop("base", None)
    own = known_values(tree, path)
    if base is None:
        return own
    if overlay:
        raise ValueError(f"{path} is to lie over {overlay}, and its base: would replace all of that; name it first, or remove its base:")
    return {**read(os.path.join(os.path.dirname(path), text(base)), (*children, path)), **own}


def load(path, overrides=()):
    """Configuration file and "section.key=value" overrides -> nested namespace of every key, checked; defaults from configs/base.yaml.

    path: one, or a list of files, of which a later one lies over the earlier.
    """
    first, *others = [path] if isinstance(path, (str, os.PathLike)) else path
    flat = read(first)
    for other in others:
        flat |= read(other, overlay=first)
    return resolve(flat, overrides, ", ".join(map(str, [first, *others])))


def resolve(tree, overrides, where):
    """Nested or flat dict and overrides -> checked namespace. where: the name of the dict's origin, for messages."""
    flat = {**read(DEFAULTS), **known_values(tree, where)}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"'{override}' is no override; write section.key=value")
        if override == "train.sweep=null":
            flat |= flatten({"train": {"sweep": None}})
            continue
        known(name, "command line")
        flat[name] = value if KEYS[name] is text else parse(value, f"command line: {name}")
    for name, check in KEYS.items():
        try:
            flat[name] = check(flat[name])
        except ValueError as error:
            raise ValueError(f"{name} must be {error}; got {flat[name]!r}") from None
    cfg = to_namespace(nest({name: flat[name] for name in KEYS}))
    check_together(cfg)
    return cfg


def to_namespace(tree):
    return SimpleNamespace(**{k: to_namespace(v) if isinstance(v, dict) else v for k, v in tree.items()})


def to_dict(cfg):
    """The namespace as nested dict, for YAML and W&B."""
    return {k: to_dict(v) if isinstance(v, SimpleNamespace) else v for k, v in vars(cfg).items()}
