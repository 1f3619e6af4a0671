"""The configuration: loaded and checked.

    cfg = load("configs/demo.yaml", ["train.epochs=10", "train.lr_head=3e-4"])
    cfg = load(["configs/demo.yaml", "configs/finetune.yaml"])      # the second over the first
    cfg.train.lr_head

A configuration is a YAML file with at most one `base:` parent, then `section.key=value` overrides.
`base:` is a path relative to the file that names it, or absolute. keys.py lists every key there is
and its type; configs/base.yaml gives every key its default and says what it does. An unknown key or
a value of the wrong type stops the run with a ValueError that names the key; so do values that
contradict each other, which settings.py knows.
"""

import argparse
import difflib
import os
from types import SimpleNamespace

import yaml
from pydantic import TypeAdapter, ValidationError

from keys import KEYS, SECTIONS, text, words_of
from settings import check_together

DEFAULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "base.yaml")


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
        folder, name = os.path.split(path)
        names = os.listdir(folder) if os.path.isdir(folder) else []
        found = sorted(other for other in names if other.endswith(".yaml"))
        nearest = difflib.get_close_matches(name, found, n=1)
        raise FileNotFoundError(
            f"{path} is not a file; "
            + (f"did you mean {nearest[0]}? " if nearest else "")
            + f"{folder} has {', '.join(found) or 'no configuration'}"
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
    hint = "settings are written section.key=value; --help shows the rest"
    parser.error = lambda message: parser.exit(2, f"error: {message}; {hint}\n")
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
    places, typed = dict(places or {}), {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"'{override}' is no override; write section.key=value")
        if override == "train.sweep=null":
            flat |= flatten({"train": {"sweep": None}})
            continue
        check_known(name, "command line")
        places.pop(name, None)
        typed[name] = value
        flat[name] = value if KEYS[name] is text else parse(value, f"command line: {name}")
    for name, kind in KEYS.items():
        try:
            checked[name] = TypeAdapter(kind).validate_python(flat[name])
        except ValidationError:
            place = f" ({places[name]})" if name in places else ""
            got = flat[name]
            if isinstance(got, bool):  # YAML reads yes, no, on and off as one
                got = typed.get(name, got)
            raise ValueError(
                f"{name} must be {words_of(kind)}; got {repr(got)[:200]}{place}"
            ) from None
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
