"""What follows from several keys of a configuration together: contradictions, doubts, and in words
or numbers what is asked for.

    check_together(cfg)         # config.load does so: ValueError for what contradicts itself
    for note in doubts(cfg, number_of_training_volumes): ...
    mode(cfg)                   # "linear probe"
"""

import math

MOST_HEADS = 4096  # of a sweep: they train in parallel, in memory
# model.head.kind of heads that are not trained in epochs, in words
REFERENCES = {"knn": "kNN", "logistic_regression": "logistic regression"}


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
            if isinstance(scheme, list) and not any(scheme):
                raise ValueError(f"{name}={scheme} gives no class a weight; give one of them some")
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
        return REFERENCES[cfg.model.head.kind]
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
