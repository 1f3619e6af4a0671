"""The configuration: loaded, checked, and what follows from several of its keys together.

    cfg = load("configs/demo.yaml", ["train.epochs=10", "train.lr_head=3e-4"])
    cfg = load(["configs/demo.yaml", "configs/finetune.yaml"])      # the second over the first
    cfg.train.lr_head

A configuration is a YAML file with at most one `base:` parent, then `section.key=value` overrides.
`base:` is a path relative to the file that names it, or absolute. keys.py lists every key there is
and its type; configs/base.yaml gives every key its default and says what it does. An unknown key or
a value of the wrong type stops the run with a ValueError that names the key.
"""

import argparse
import difflib
import math
import os
from types import SimpleNamespace

import yaml
from pydantic import TypeAdapter, ValidationError

from keys import KEYS, SECTIONS, text, words_of

MOST_HEADS = 4096  # of a sweep: they train in parallel, in memory
DEFAULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "base.yaml")


def check_together(cfg):
    """ValueError where values that are fine by themselves contradict each other, or where one asks
    for something that would not happen."""
    trains = not cfg.model.freeze_encoder or cfg.model.unfreeze_at_epoch >= 0  # sooner or later
    check_classes(cfg)
    if cfg.paths.checkpoint_path is None and not cfg.model.loader and not cfg.paths.features:
        raise ValueError(
            "paths.checkpoint_path=null is for an encoder that model.loader makes without a file; "
            "name the pretrained encoder's file"
        )
    check_given(cfg, trains)
    if cfg.model.loader_options and not cfg.model.loader:
        raise ValueError(
            f"model.loader_options={cfg.model.loader_options} are those of model.loader, which is "
            "null; name it, or remove them"
        )
    check_encoder(cfg, trains)
    heads = math.prod(len(values) for values in vars(cfg.train.sweep).values() if values)
    if heads > MOST_HEADS:
        raise ValueError(
            f"train.sweep makes {heads} heads, more than {MOST_HEADS}; list fewer values"
        )
    if trains:
        check_probes_only(cfg)
    if cfg.model.head.kind != "network":
        check_reference(cfg)
    check_augmentation(cfg, trains)


def class_names(cfg):
    """The names of the classes, in order: a class is the place of its name."""
    return tuple(dict.fromkeys(cfg.data.classes.values()))


def check_given(cfg, trains):
    """What features that are read in place of an encoder cannot give."""
    asked = {
        "model.unfreeze_at_epoch": trains,
        "model.loader": cfg.model.loader,
        "data.augment": any(vars(cfg.data.augment).values()),
        "eval.floors=true": cfg.eval.floors,
    }
    for name in (name for name, is_asked in asked.items() if is_asked and cfg.paths.features):
        raise ValueError(
            f"{name} needs an encoder, and paths.features={cfg.paths.features} is read in place of "
            "one; unset one of them"
        )


def check_classes(cfg):
    """What depends on how many classes there are, and on whether they are in an order."""
    number = len(class_names(cfg))
    if cfg.data.thresholds and len(cfg.data.thresholds) != number - 1:
        raise ValueError(
            f"data.thresholds={cfg.data.thresholds} makes {len(cfg.data.thresholds) + 1} classes, "
            f"and data.classes names {number}; name one for each interval"
        )
    for name in ("train.class_weights", "train.sweep.class_weights"):
        schemes = cfg.train.sweep.class_weights if "sweep" in name else [cfg.train.class_weights]
        for scheme in schemes or []:
            if isinstance(scheme, list) and len(scheme) != number:
                raise ValueError(
                    f"{name}={scheme} has {len(scheme)} numbers, and there are {number} classes "
                    "(data.classes); give one for each"
                )
    ordinal = {
        "model.head.ordinal=true": cfg.model.head.ordinal,
        "train.loss=ordinal": cfg.train.loss == "ordinal",
        "train.sweep.ordinal": True in (cfg.train.sweep.ordinal or []),
        "train.sweep.loss": "ordinal" in (cfg.train.sweep.loss or []),
    }
    for name in (name for name, is_asked in ordinal.items() if is_asked and not cfg.data.ordered):
        raise ValueError(
            f"{name} is for classes that are in an order, and data.ordered=false says that these "
            "are not; set data.ordered=true, or do without"
        )
    shares = cfg.eval.prevalence
    if shares and len(shares) != number:
        raise ValueError(
            f"eval.prevalence={shares} has {len(shares)} numbers, and there are {number} classes "
            "(data.classes); give one for each"
        )
    columns = cfg.data.columns
    answers = {columns.label: "label", **dict.fromkeys(columns.participant, "participant")}
    for column in cfg.eval.covariates or ():
        if column in answers:
            raise ValueError(
                f"eval.covariates={cfg.eval.covariates} has '{column}', which is "
                f"data.columns.{answers[column]}; leave it out"
            )
    if cfg.data.split.val + cfg.data.split.test >= 1:
        raise ValueError(
            f"data.split.val={cfg.data.split.val} and data.split.test={cfg.data.split.test} leave "
            "nobody for training; set less"
        )


def check_placeholders(cfg):
    """ValueError where a shipped file still has to be filled in."""
    for name in ("data", "checkpoint_path"):
        if "YOUR-BUCKET" in (getattr(cfg.paths, name) or ""):
            raise ValueError(
                f"paths.{name}={getattr(cfg.paths, name)}: put your bucket's name for YOUR-BUCKET, "
                "or a local path"
            )


def check_encoder(cfg, trains):
    """When the encoder trains."""
    unfreeze = cfg.model.unfreeze_at_epoch
    if not cfg.model.freeze_encoder and unfreeze > 0:
        raise ValueError(
            "model.freeze_encoder=false trains the encoder from the start, and "
            f"model.unfreeze_at_epoch={unfreeze} later; set model.freeze_encoder=true, or "
            "model.unfreeze_at_epoch=-1"
        )
    if unfreeze >= cfg.train.epochs:
        raise ValueError(
            f"model.unfreeze_at_epoch={unfreeze} is never reached in "
            f"train.epochs={cfg.train.epochs}; set more epochs, or model.unfreeze_at_epoch=-1"
        )
    if not trains and cfg.model.drop_path:
        raise ValueError(
            f"model.drop_path={cfg.model.drop_path} is for an encoder that trains; "
            "set model.drop_path=0, or let it train (model.unfreeze_at_epoch)"
        )


def check_probes_only(cfg):
    """What works on the features of a frozen encoder alone, while this one is to train."""
    if any(vars(cfg.train.sweep).values()):
        raise ValueError(
            "train.sweep tries heads on the features of a frozen encoder, and this one is to "
            "train; set train.sweep=null"
        )
    if cfg.train.seeds or cfg.data.cv:
        raise ValueError(
            "train.seeds and data.cv repeat the head, on the features of a frozen encoder, and "
            "this one is to train; set both to null and run train.py once for each seed="
        )
    if cfg.train.fractions:
        raise ValueError(
            f"train.fractions={cfg.train.fractions} fits heads on the features of a frozen "
            "encoder, and this one is to train; set train.fractions=null"
        )
    if cfg.model.head.kind != "network":
        raise ValueError(
            f"model.head.kind={cfg.model.head.kind} is for the features of a frozen encoder, and "
            "this one is to train; set model.head.kind=network"
        )
    if cfg.eval.floors:
        raise ValueError(
            "eval.floors trains probes to compare with, and this encoder is to train; "
            "set eval.floors=false, and floors in a probe's run"
        )


def check_reference(cfg):
    """What a logistic regression or kNN has no use for."""
    head = cfg.model.head
    useless = {
        "model.pool_method=attentive": cfg.model.pool_method == "attentive",
        f"model.head.hidden={head.hidden}": head.hidden,
        "model.head.ordinal=true": head.ordinal,
        f"train.loss={cfg.train.loss}": cfg.train.loss != "ce",
        f"data.sampler={cfg.data.sampler}": cfg.data.sampler != "shuffle",
        "train.sweep": any(vars(cfg.train.sweep).values()),
        f"train.seeds={cfg.train.seeds}": cfg.train.seeds
        and not (cfg.data.cv or cfg.train.fractions),
    }
    for name in (name for name, is_asked in useless.items() if is_asked):
        raise ValueError(
            f"{name} means nothing to model.head.kind={head.kind}; unset it, or set "
            "model.head.kind=network"
        )


def check_augmentation(cfg, trains):
    """Augmented views of a frozen encoder's volumes."""
    views, switches = cfg.data.augment_views, vars(cfg.data.augment)
    augments = any(switches.values())
    if not trains and augments and not views:
        raise ValueError(
            "data.augment asks for augmentation, data.augment_views=0 for none while the encoder "
            "is frozen, and it always is; set data.augment_views=1, or switch data.augment off"
        )
    if views > 1 and (not cfg.model.freeze_encoder or cfg.model.unfreeze_at_epoch == 0):
        raise ValueError(
            f"data.augment_views={views} is for a frozen encoder, and this one trains from the "
            "start; set data.augment_views=1"
        )
    if views > 1 and not augments:
        raise ValueError(
            f"data.augment_views={views} asks for augmented views, and every switch of "
            f"data.augment is off; set one of {', '.join('data.augment.' + k for k in switches)}"
        )


def first_epoch_of_encoder(cfg):
    """The epoch, counted from 1, from which on the encoder trains; infinity: never."""
    if not cfg.model.freeze_encoder:
        return 1
    unfreeze = cfg.model.unfreeze_at_epoch
    return unfreeze + 1 if unfreeze >= 0 else math.inf


def refits(cfg):
    """May the chosen head be fitted again on train and val? Only one that takes no steps to fit: a
    reference, or the solution that a head without a hidden layer starts from."""
    head, is_frozen = cfg.model.head, first_epoch_of_encoder(cfg) > cfg.train.epochs
    starts_solved = head.hidden == 0 and cfg.train.choose_by == "log_loss"
    return cfg.train.refit and is_frozen and (head.kind != "network" or starts_solved)


def mode(cfg):
    """How an encoder is used, in words: the same for all encoders and tasks."""
    if first_epoch_of_encoder(cfg) <= cfg.train.epochs:
        return "fine-tuning"
    if cfg.model.head.kind != "network":
        return {"knn": "kNN"}.get(cfg.model.head.kind, cfg.model.head.kind.replace("_", " "))
    pooling = {"mean": "", "max": "max-pooled ", "attentive": "attentive "}[cfg.model.pool_method]
    return f"{pooling}{'MLP' if cfg.model.head.hidden else 'linear'} probe"


def trains_one_head(cfg):
    """Is a single head trained, with or without the encoder? Else several, or a reference."""
    swept = any(vars(cfg.train.sweep).values())
    several = swept or cfg.train.seeds or cfg.data.cv or cfg.eval.floors or cfg.train.fractions
    return cfg.model.head.kind == "network" and not several


def doubts(cfg, num_volumes):
    """Settings that are allowed and seldom meant."""
    for part, first in (("head", 1), ("encoder", first_epoch_of_encoder(cfg))):
        if first <= cfg.train.epochs <= cfg.train.warmup_epochs + first - 1:
            epochs = f"all {cfg.train.epochs - first + 1} epochs of the {part}"
            yield f"train.warmup_epochs={cfg.train.warmup_epochs} lasts {epochs}"
    corrections = {
        "data.sampler=stratified": cfg.data.sampler == "stratified",
        f"train.class_weights={cfg.train.class_weights}": cfg.train.class_weights != "none",
        f"train.loss={cfg.train.loss}": cfg.train.loss in ("logit_adjustment", "balanced_softmax"),
    }
    used = [name for name, is_used in corrections.items() if is_used]
    if len(used) > 1:
        yield (
            f"{' and '.join(used)} correct the imbalance "
            f"{'twice' if len(used) == 2 else 'three times'}; "
            "keep one, and set the others to data.sampler=shuffle, train.class_weights=none, "
            "train.loss=ce"
        )
    steps = math.ceil(num_volumes / cfg.data.batch_size) * cfg.train.epochs
    starts_random = cfg.model.head.hidden or cfg.model.pool_method == "attentive"
    if cfg.model.head.kind == "network" and starts_random and steps < 200:
        yield (
            f"data.batch_size={cfg.data.batch_size} makes {steps} steps in all, few for a head "
            "that starts knowing nothing; "
            "lower it"
        )


def flatten(tree, prefix=""):
    """Nested dict -> {"section.key": value}. A section given as anything but a mapping keeps its
    name as the key. ValueError for a key that is given both nested and with dots."""
    flat = {}
    for key, value in tree.items():
        name, part = f"{prefix}{key}", {}
        if value is None and name == "train.sweep":
            part = {key: None for key in KEYS if key.startswith("train.sweep.")}
        elif isinstance(value, dict) and value and name not in KEYS:
            part = flatten(value, name + ".")
        elif value not in (None, {}) or name not in SECTIONS:
            part = {name: value}  # else a section whose keys are all commented out
        for twice in flat.keys() & part.keys():
            raise ValueError(f"key '{twice}' is given twice")
        flat |= part
    return flat


def nest(flat):
    """{"section.key": value} -> namespace of values and namespaces."""
    cfg = SimpleNamespace()
    for name, value in flat.items():
        *sections, key = name.split(".")
        section = cfg
        for part in sections:
            section = vars(section).setdefault(part, SimpleNamespace())
        setattr(section, key, value)
    return cfg


class UniqueKeys(yaml.SafeLoader):
    """A second `train:` section would silently replace the first; here it is an error. So are
    aliases, of which a few lines can stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            problem = "aliases (*name) are not supported; write the values out"
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            problem = f"key '{twice[0]}' is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def parse(yaml_text, where):
    """Value that a YAML text holds; ValueError naming where it stands."""
    try:
        return yaml.load(yaml_text, UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def check_known(name, where):
    """ValueError naming the nearest key unless this is one of KEYS."""
    if name in KEYS:
        return
    if name in SECTIONS:
        example = next(key for key in KEYS if key.startswith(name + "."))
        raise ValueError(f"{where}: '{name}' is a section; give its keys, such as {example}")
    leaf = name.split(".")[-1]
    same_leaf = [key for key in KEYS if key.split(".")[-1] == leaf]  # in another section
    nearest = same_leaf or difflib.get_close_matches(name, KEYS, n=1, cutoff=0)
    raise ValueError(f"{where}: unknown key '{name}'; did you mean '{nearest[0]}'?")


def known_values(tree, where):
    """Nested or flat dict -> {"section.key": value}; ValueError when a key is none of KEYS."""
    try:
        flat = flatten(tree)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for name in flat:
        check_known(name, where)
    return flat


def read(path, children=(), overlay=None):
    """Flat values of a file over those of its base, and where each of them stands. children: files
    that name this one as their base. overlay: the file over which this one is to lie; it may then
    have no base."""
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        folder = os.path.dirname(path)
        found = (
            [name for name in os.listdir(folder) if name.endswith(".yaml")]
            if (os.path.isdir(folder))
            else []
        )
        raise FileNotFoundError(
            f"{path} is not a file; {folder} has {', '.join(sorted(found)) or 'no configuration'}"
        )
    if path in children:
        raise ValueError(f"{path}: its chain of base: files comes back to itself")
    with open(path, encoding="utf-8") as f:
        try:
            content = f.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    tree = parse(content, path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no keys")
    base = tree.pop("base", None)
    if not isinstance(base, str | None):
        raise ValueError(f"{path}: base: must be a path, not {base!r}")
    own, line_of = known_values(tree, path), lines_of(yaml.compose(content, UniqueKeys))
    places = {name: f"{path}, line {line_of[name]}" for name in own if name in line_of}
    if base is None:
        return own, places
    if overlay:
        raise ValueError(
            f"{path} is to lie over {overlay}, and its base: would replace all of that; name it "
            "first, or remove its base:"
        )
    below, places_below = read(os.path.join(os.path.dirname(path), base), (*children, path))
    return below | own, places_below | places


def lines_of(node, prefix=""):
    """{"section.key": line} of a YAML mapping, as compose gives it."""
    lines = {}
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        lines[name] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            lines |= lines_of(value, name + ".")
    return lines


def parser(description, **positional):
    """The command line that every script has: --config FILE, positional arguments with their help,
    and overrides."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config_help = "configuration file; repeatable, later files override earlier ones"
    parser.add_argument("--config", required=True, action="append", help=config_help)
    for name, what in positional.items():
        parser.add_argument(name, help=what)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def load(path, overrides=()):
    """Configuration file and "section.key=value" overrides -> checked namespace of every key.
    What neither gives is as in configs/base.yaml.

    path: one file, or a list of files, of which a later one lies over the earlier ones.
    """
    first, *others = [path] if isinstance(path, (str, os.PathLike)) else path
    flat, places = read(first)
    for other in others:
        values, places_over = read(other, overlay=first)
        flat, places = flat | values, places | places_over
    return resolve(flat, overrides, ", ".join(map(str, [first, *others])), places, is_new=True)


def resolve(tree, overrides, where, places=None, is_new=False):
    """Nested or flat dict and overrides -> checked namespace. where: the dict's origin, places:
    those of its values, for messages. is_new: of a run that begins, and is named for its task."""
    flat, checked = read(DEFAULTS)[0] | known_values(tree, where), {}
    places = dict(places or {})
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"'{override}' is no override; write section.key=value")
        if override == "train.sweep=null":
            flat |= flatten({"train": {"sweep": None}})
            continue
        check_known(name, "command line")
        places.pop(name, None)
        flat[name] = value if KEYS[name] is text else parse(value, f"command line: {name}")
    for name, kind in KEYS.items():
        try:
            checked[name] = TypeAdapter(kind).validate_python(flat[name])
        except ValidationError:
            place = f" ({places[name]})" if name in places else ""
            got = repr(flat[name])[:200]
            raise ValueError(f"{name} must be {words_of(kind)}; got {got}{place}") from None
    cfg = nest(checked)
    given = {override.partition("=")[0] for override in overrides}
    check_swept(cfg, given)
    if is_new:
        name_task(cfg, given)
    if cfg.train.sweep.ordinal == "auto":
        cfg.train.sweep.ordinal = [False, True] if cfg.data.ordered else None
    try:
        check_together(cfg)
    except ValueError as error:
        named = [f"{key}: {place}" for key, place in places.items() if f"{key}=" in str(error)]
        raise ValueError(f"{error} ({'; '.join(named)})" if named else str(error)) from None
    return cfg


def check_swept(cfg, given):
    """ValueError where the command line gives a key whose values train.sweep tries anyway."""
    for name, values in vars(cfg.train.sweep).items():
        key = "model.head.ordinal" if name == "ordinal" else f"train.{name}"
        if key in given and values and f"train.sweep.{name}" not in given:
            raise ValueError(
                f"{key} would change nothing, for train.sweep.{name}={values} tries other values; "
                f"set train.sweep.{name}=null for yours alone, or train.sweep=null for one head"
            )


def name_task(cfg, given):
    """Let the run's folder and name tell its task, where the command line does not give them: two
    tasks of one encoder must not replace each other's results."""
    task, folder = cfg.data.task, cfg.paths.run_dir.rstrip("/")
    if task and "paths.run_dir" not in given and not folder.endswith(f"_{task}"):
        cfg.paths.run_dir = f"{folder}_{task}"
    if task and "log.run_name" not in given and not cfg.log.run_name.endswith(f"_{task}"):
        cfg.log.run_name = f"{cfg.log.run_name}_{task}"


def to_dict(cfg):
    """The namespace as nested dict, for YAML and W&B."""
    return {k: to_dict(v) if isinstance(v, SimpleNamespace) else v for k, v in vars(cfg).items()}
