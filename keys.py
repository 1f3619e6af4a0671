"""The keys of the configuration with their types: KEYS {"section.key": type}.

A type checks a value and turns it into what the code reads; its words say in messages what the
value must be. configs/base.yaml gives every key its default and says what it does.
"""

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

# types: what a value may be


def described(words, kind, *validators, **limits):
    """Type of a key. words: what messages say that its value must be."""
    return Annotated[kind, *validators, Field(description=words, **limits)]


def words_of(kind):
    return kind.__metadata__[-1].description


def not_boolean(value):
    if type(value) is bool:  # pydantic would take true for 1
        raise ValueError
    return value


def integer(low, high=2**31):
    words = f"a whole number from {low} to {high - 1}"
    return described(words, int, BeforeValidator(not_boolean), ge=low, lt=high)


def number(low, below=None, most=None):
    """A number, or its text, since YAML reads 3e-4 as text."""
    words = f"a number >= {low:g}"
    words += (f" and < {below:g}" if below else "") + (f" and <= {most:g}" if most else "")
    limits = {"ge": low, "lt": below, "le": most, "allow_inf_nan": False}
    return described(words, float, BeforeValidator(not_boolean), **limits)


def strength(most):
    """A switch with its strength: false, true (the usual strength) or a number."""
    kind = number(0, most=most)
    return described(f"true, false or {words_of(kind)}", boolean | kind)


def optional(kind):
    return described(f"{words_of(kind)}, or null", kind | None)


def one_of(*allowed):
    return described(f"one of {', '.join(allowed)}", Literal[allowed])


def choices(kind):
    """Values to try, each of this type, or null."""
    words = f"a list of values to try, each {words_of(kind)}, no two alike"
    values = Annotated[list[kind], AfterValidator(different), Field(min_length=1)]
    return optional(described(words, values))


def exactly(count, kind):
    return Annotated[list[kind], Field(min_length=count, max_length=count)]


def different(values):
    if len(set(map(str, values))) < len(values):
        raise ValueError
    return values


def any_order(axes):
    names = [name.strip() for name in axes.split(",")]
    if sorted(names) != ["columns", "frames", "rows"]:
        raise ValueError
    return ",".join(names)


boolean = described("true or false", bool, strict=True)
text = described(
    "a text, in quotes where YAML would read something else",
    str,
    strict=True,
    min_length=1,
    pattern=r"^[^\x00-\x1f]*$",
)
image_size = described(
    "[depth, height, width], three whole numbers > 0",
    exactly(3, Annotated[int, Field(strict=True, gt=0)]),
)
class_weights = described(
    "auto, effective, none or a list of numbers >= 0, one for each class",
    Literal["auto", "effective", "none"] | list[number(0)],
)
axes = described(
    "frames, rows and columns in the order in which the file has them, such as rows,columns,frames",
    str,
    AfterValidator(any_order),
)
ordinal_choices = described(
    f"auto, or {words_of(choices(boolean))}", Literal["auto"] | choices(boolean)
)
different_seeds = Annotated[list[integer(0)], AfterValidator(different), Field(min_length=1)]
seeds = optional(described("a list of different seeds", different_seeds))


def texts(value):
    """What stands in a cell of a table, as YAML gives it: a text or a number."""
    if type(value) not in (str, int, float):  # YAML reads yes, no, true and false as booleans
        raise ValueError
    return str(value)


def listed(values):
    """One value, or a list of different ones -> the list, as texts."""
    return different([texts(v) for v in (values if isinstance(values, list) else [values])])


def named_values(values):
    """{value: name shown}, or a list of values that are their own names -> the dict, as texts."""
    names = values if isinstance(values, dict) else dict(zip(listed(values), listed(values)))
    names = {texts(value): texts(name) for value, name in names.items()}
    if len(set(names.values())) < 2 or not all(names.values()):
        raise ValueError
    return names


def mapping(values):
    """null is an empty one."""
    if values is not None and not isinstance(values, dict):
        raise ValueError
    return values or {}


def asked_for(columns):
    return {texts(column): listed(values) for column, values in mapping(columns).items()}


def increasing(values):
    if sorted(set(values)) != values:
        raise ValueError
    return values


fraction = Annotated[float, BeforeValidator(not_boolean), Field(gt=0, le=1)]
fractions = optional(
    described(
        "a list of shares of the training participants that increase, each above 0 and at most 1",
        Annotated[list[fraction], AfterValidator(increasing), Field(min_length=1)],
    )
)
columns = described(
    "a column's name, or a list of names that are accepted",
    list[text],
    BeforeValidator(listed),
    min_length=1,
)
classes = described(
    "a mapping of every value in the table to the name shown, in order, or a list of values; two "
    "classes or more; in quotes where YAML would read something else (yes, no)",
    dict,
    BeforeValidator(named_values),
    max_length=1000,
)
where = described(
    "a mapping of columns to a value or a list of values, in quotes where YAML would read "
    "something else (yes, no)",
    dict,
    BeforeValidator(asked_for),
)


def plain_values(options):
    """Keyword arguments for a loader: what JSON holds."""
    try:
        json.dumps(options, allow_nan=False)
    except TypeError as error:  # a date, say
        raise ValueError from error
    return {texts(name): value for name, value in mapping(options).items()}


options = described(
    "a mapping of names to numbers, texts, lists or null", dict, BeforeValidator(plain_values)
)
finite = Annotated[float, BeforeValidator(not_boolean), Field(allow_inf_nan=False)]
covariates = optional(
    described("a list of different columns, [] for none", list[text], BeforeValidator(listed))
)


def shares(values):
    if abs(sum(values) - 1) > 1e-6:
        raise ValueError
    return values


class_shares = optional(
    described(
        "a list of numbers >= 0 that add up to 1, one for each class",
        list[number(0)],
        AfterValidator(shares),
        min_length=2,
    )
)
thresholds = described(
    "a list of numbers that increase", list[finite], AfterValidator(increasing), min_length=1
)
LOSSES = one_of("ce", "focal", "label_smoothing", "logit_adjustment", "balanced_softmax", "ordinal")

KEYS = {
    "project_name": text,
    "seed": integer(0),
    "paths.data": text,
    "paths.checkpoint_path": optional(text),
    "paths.features": optional(text),
    "paths.cache_dir": text,
    "paths.run_dir": text,
    "data.task": optional(text),
    "data.labels": text,
    "data.participants": optional(text),
    "data.manifest": optional(text),
    "data.columns.participant": columns,
    "data.columns.label": text,
    "data.columns.split": optional(text),
    "data.columns.file": text,
    "data.columns.eye": optional(text),
    "data.columns.site": optional(text),
    "data.columns.age": optional(text),
    "data.columns.sex": optional(text),
    "data.columns.has_oct": optional(text),
    "data.classes": classes,
    "data.thresholds": optional(thresholds),
    "data.ordered": boolean,
    "data.unit": one_of("participant", "eye", "volume"),
    "data.where": where,
    "data.split.val": number(0, below=1),
    "data.split.test": number(0, below=1),
    "data.scanner": optional(text),
    "data.anatomic_region": optional(text),
    "data.axes": optional(axes),
    "data.variable": optional(text),
    "data.image_size": optional(image_size),
    "data.batch_size": integer(1),
    "data.num_workers": integer(0, 257),
    "data.prefetch": integer(1, 65),
    "data.cache_gb": number(0),
    "data.fetch_deadline": number(1),
    "data.max_missing": integer(0),
    "data.checksums": optional(text),
    "data.sampler": one_of("shuffle", "stratified"),
    "data.augment.flip": strength(1),
    "data.augment.intensity_jitter": strength(1),
    "data.augment.random_crop": strength(0.9),
    "data.augment.rotation": strength(180),
    "data.augment_views": integer(0, 1001),
    "data.cv": optional(integer(3)),
    "model.loader": optional(text),
    "model.loader_options": options,
    "model.emb_dim": optional(integer(1)),
    "model.encoder": one_of("context", "target"),
    "model.freeze_encoder": boolean,
    "model.unfreeze_at_epoch": integer(-1),
    "model.drop_path": number(0, 1),
    "model.pool_method": one_of("mean", "max", "attentive"),
    "model.token_grid": image_size,
    "model.token_pool": one_of("mean", "max"),
    "model.head.kind": one_of("network", "logistic_regression", "knn"),
    "model.head.hidden": integer(0, 2**16 + 1),
    "model.head.dropout": number(0, 1),
    "model.head.ordinal": boolean,
    "train.seeds": seeds,
    "train.fractions": fractions,
    "train.refit": boolean,
    "train.choose_by": one_of("log_loss", "balanced_accuracy"),
    "train.epochs": integer(1, 10**6 + 1),
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
    "train.sweep.ordinal": ordinal_choices,
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
    "eval.covariates": covariates,
    "eval.probes": boolean,
    "eval.prevalence": class_shares,
    "eval.gallery": integer(0, 1001),
    "device.backend": one_of("auto", "xla", "cuda", "cpu"),
    "device.processes": integer(1, 1025),
    "demo.dir": optional(text),
    "demo.effect": one_of("boosted", "literature", "confounded"),
    "demo.participants": integer(1, 2901),
    "log.wandb": one_of("auto", "online", "offline", "disabled"),
    "log.wandb_project": text,
    "log.wandb_participants": boolean,
    "log.run_name": text,
}

# "train", "train.early_stopping", ...
SECTIONS = {key[:i] for key in KEYS for i, letter in enumerate(key) if letter == "."}
