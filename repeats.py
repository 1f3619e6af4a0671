"""Heads fitted again on the same features: a sweep, seeds, folds, floors, kNN, logistic regression.

    fit_all(fit, cfg, run, train, val, floor)   # fit(cfg, seed, train, val) -> Fitted: train.fit

All of it is cheap on the features of a frozen encoder, and is saved when it is finished.
"""

import dataclasses
import functools
import os

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

import curve
import files
import heads
import losses
import metrics
import references
import runs
import settings
import stages
from progress import Epoch, Progress, epoch_lines, epoch_record, training_tables

CPU = torch.device("cpu")
HELD_OUT = "held_out_balanced_accuracy"  # column of cv.csv


@dataclasses.dataclass
class Fitted:
    """What fitting a bank of heads came to: the chosen head, as a bank of one; the records of its
    epochs; its Predictions of validation at its best epoch; the rows of sweep.csv, best first; what
    progress.training_tables counts; and the state of the head fitted on validation too, None where
    that is not done."""

    head: object
    history: list
    predictions: heads.Predictions
    rows: list
    training: dict
    refit: dict = None

    @property
    def best(self):
        """The row of the chosen head."""
        return next(row for row in self.rows if row["chosen"])

    @property
    def best_record(self):
        return next(r for r in self.history if r["epoch"] == self.best["best_epoch"])

    @property
    def states(self):
        """Of the head, as a checkpoint holds it: see runs.head_of."""
        refit = {"refit": self.refit} if self.refit else {}
        return {"head": self.head.state_dict()} | refit


def fit_all(fit, cfg, run, train, val, floor):
    """Fit all that the config asks for and save the head that validation chooses. Every replica
    does the same. train, val: Features; floor: theirs by a random encoder, for eval.floors."""
    seeds, threads = cfg.train.seeds or [cfg.seed], torch.get_num_threads()
    # many small operations: on a busy machine, more threads mostly wait for each other
    torch.set_num_threads(1)
    with stage_of(cfg) as stage:
        fit_once = functools.partial(
            fit if cfg.model.head.kind == "network" else fit_references, dev=CPU, stage=stage
        )
        fit = functools.partial(fit_and_refit, fit_once)
        fits = {seed: fit(cfg, seed, train, val) for seed in seeds}
        sizes = curve.fit(fit_once, cfg, fits, train, val) if cfg.train.fractions else []
        folds = cross_validate(fit, cfg, seeds, train, val) if cfg.data.cv else []
        floors = {}
        if cfg.eval.floors:
            shuffled = [
                part.labelled(shuffle_labels(part.samples, cfg.seed)) for part in (train, val)
            ]
            for name, parts in (("random encoder", floor), ("shuffled labels", shuffled)):
                floors[name] = fit(cfg, seeds[0], *parts).states
    torch.set_num_threads(threads)
    save(cfg, run, fits, folds, floors, sizes)
    describe(cfg, run, fits, folds, sizes, len(train.samples))


def stage_of(cfg):
    """The Stage of all that `fit_all` fits. It counts the epochs of a bank of heads, each C of
    logistic regression, and kNN as one."""
    seeds, kind = len(cfg.train.seeds or [cfg.seed]), cfg.model.head.kind
    shares = sum(fraction < 1 for fraction in cfg.train.fractions or [])
    draws = len(cfg.train.seeds or range(curve.SUBSETS))
    fits = seeds * (1 + (cfg.data.cv or 0)) + shares * draws + 2 * cfg.eval.floors
    start = cfg.train.choose_by == "log_loss"  # epoch 0 is judged too
    each = {"knn": 1, "logistic_regression": len(references.STRENGTHS)}
    number = fits * each.get(kind, cfg.train.epochs + start)
    unit = {"knn": "fit", "logistic_regression": "C"}.get(kind, "epoch")
    desc = f"training, {fits} fits" if fits > 1 else "training"
    return stages.Stage(desc, number, unit, "training", leave=False)


def fit_and_refit(fit, cfg, seed, train, val):
    """The Fitted of fit, with the chosen head fitted again on train and val, where that is asked
    for and takes no steps."""
    fitted, num_classes = fit(cfg, seed, train, val), len(settings.class_names(cfg))
    if settings.refits(cfg):
        if cfg.model.head.kind != "network":
            fitted.refit = references.refit(cfg, fitted.best, train, val, num_classes)
        elif fitted.best["best_epoch"] == 0:
            fitted.refit = heads.refit(cfg, seed, fitted.best, train, val, num_classes)
    return fitted


def fit_references(cfg, seed, train, val, dev, stage=None):
    """As train.fit, of scikit-learn's logistic regression for every C, or of kNN for every k. There
    is nothing to train in steps, so it is recorded as a single epoch; seed and dev are not used."""
    num_classes, labels = len(settings.class_names(cfg)), train.labels
    bank = references.fit(cfg, train, num_classes, stage=stage)
    if stage and cfg.model.head.kind == "knn":
        stage.update()
    of_units = list(train.units.values())
    weights = losses.class_weights(of_units, num_classes, cfg.train.class_weights)[labels]
    p = torch.from_numpy(heads.predict(bank, train.x)).float()  # (G, volumes, num_classes)
    logits, order = p.clamp(min=torch.finfo(torch.float64).eps).log(), torch.arange(len(labels))
    row_losses = -logits[:, order, labels]  # (G, volumes)
    epoch = Epoch(1, order, bank)
    loss = (row_losses * weights).sum(dim=1) / weights.sum()  # (G,)
    epoch.add(order, row_losses, logits, loss * len(labels))
    epoch.finish(heads.by_unit(val.samples, heads.predict(bank, val.x)))
    progress = Progress(cfg, len(p), steps_per_epoch=1)
    progress.update(epoch)
    return best_head(cfg, bank, progress, [epoch], train)


def best_head(cfg, bank, progress, epochs, train):
    """The Fitted of the head that validation chooses, of a bank that holds every head's best
    parameters. epochs: all Epochs."""
    g = progress.chosen()
    own = [e for e in epochs if e.number <= progress.last_epoch[g]]  # until its patience ended
    history = [epoch_record(train, epoch, g, bank.settings[g]) for epoch in own]
    best = next(epoch for epoch in own if epoch.number == progress.best_epoch[g])
    head, rows = references.load(bank.one(g), cfg), progress.rows(bank.settings)
    # in training, everybody is their own nearest neighbour
    training = {} if cfg.model.head.kind == "knn" else training_tables(train, best, bank, g)
    return Fitted(head, history, best.predictions.of_head(g), rows, training)


def save(cfg, run, fits, folds, floors, sizes):
    """fits: {seed: Fitted}; the first is the run's. sizes: of curve.fit."""
    run.prepare()
    (seed, first), record = next(iter(fits.items())), next(iter(fits.values())).best_record
    if cfg.model.head.kind == "knn":  # everybody is their own nearest neighbour in training
        record = record | {"train/balanced_accuracy": None}
    repeated = [{"seed": seed, **fitted.states} for seed, fitted in fits.items()]
    content = {**first.states, "sweep": first.best, "repeats": repeated, "training": first.training}
    content |= {"floors": floors} if floors else {}
    content |= {"curve": sizes} if sizes else {}
    run.save_best(record, first.predictions, content)
    run.write_history(first.history)
    rows = [{"seed": seed, **row} for seed, fitted in fits.items() for row in fitted.rows]
    run.write("sweep.csv", table(rows))
    if folds:
        run.write("cv.csv", table([fold.row for fold in folds]))
        run.write("predictions_cv.csv", runs.predictions_csv(held_out(folds, seed)))
    for epoch in first.history:
        run.wandb.log(epoch)
    # last.pt, by which a finished run is known
    content |= {"epoch": record["epoch"], "wandb": run.wandb.id}
    run.save(runs.LAST, content | runs.scores_of(record, first.predictions))


def table(rows):
    """Dicts of the same keys -> CSV text."""
    return files.csv_text([list(rows[0]), *(list(row.values()) for row in rows)])


def describe(cfg, run, fits, folds, sizes, number):
    """Tell what was found: the best heads, the chosen one's epoch, seeds, fractions, folds."""
    first, is_network = next(iter(fits.values())), cfg.model.head.kind == "network"
    seeds = f", {len(fits)} seeds" if len(fits) > 1 else ""
    print(f"{len(first.rows)} heads ({cfg.model.head.kind}) on {number} volumes{seeds}")
    scores = ("best_epoch", "val_balanced_accuracy", "val_loss", "chosen")
    swept = [name for name in first.best if len({str(row[name]) for row in first.rows}) > 1]

    def described(row):
        values = [f"epoch {row['best_epoch']}"] if is_network else []
        for name in swept:
            if name not in scores:
                value = row[name]
                values.append(f"{name} {value:.3g}" if type(value) is float else f"{name} {value}")
        return ", ".join(values)

    for row in first.rows[:5]:
        print(
            f"  val bal.acc {row['val_balanced_accuracy']:.3f} loss {row['val_loss']:.3f}  "
            f"{described(row)}{'  *' if row['chosen'] else ''}"
        )
    if is_network:
        print(epoch_lines(first.best_record, cfg.train.epochs))
    print(
        f"best of {len(first.rows)}: {described(first.best)}; val balanced accuracy "
        f"{first.best['val_balanced_accuracy']:.3f}, log-loss {first.best['val_loss']:.3f}; "
        f"saved as {os.path.join(run.folder, runs.BEST)}"
    )
    for line in runs.refit_lines(cfg, first.refit is not None):
        print(line)
    for line in curve.lines(sizes):
        print(line)
    if seeds:
        spread = mean_and_sd([fitted.best["val_balanced_accuracy"] for fitted in fits.values()])
        print(f"over {len(fits)} seeds: val balanced accuracy {spread}")
    for seed in fits if folds else ():
        held = held_out(folds, seed)
        spread = mean_and_sd([f.row[HELD_OUT] for f in folds if f.row["seed"] == seed])
        score = metrics.score(held.y_true, held.p, held.p.shape[1])["balanced_accuracy"]
        print(
            f"{cfg.data.cv}-fold cross-validation{f', seed {seed}' if seeds else ''}: balanced "
            f"accuracy {score:.3f} on {len(held.ids)} {cfg.data.unit}s, each held out once; "
            f"folds {spread}"
        )


def mean_and_sd(values):
    each = ", ".join(f"{v:.3f}" for v in values)
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} ({each})"


def shuffle_labels(samples, seed):
    """The samples with the participants' labels permuted among them."""
    units = list({s.unit: s.label for s in samples}.items())
    labels = [units[i][1] for i in np.random.default_rng(seed).permutation(len(units))]
    label_of = {unit: label for (unit, _), label in zip(units, labels)}
    return [dataclasses.replace(s, label=label_of[s.unit]) for s in samples]


@dataclasses.dataclass
class Fold:
    """A fold of cross-validation: its row of cv.csv, and the Predictions of the participants that
    it held out."""

    row: dict
    held: heads.Predictions


def check_folds(cfg, samples):
    """ValueError where data.cv asks for more folds than a class has participants."""
    people = [set() for _ in settings.class_names(cfg)]
    for sample in samples:
        people[sample.label].add(sample.participant_id)
    counts = [len(of_class) for of_class in people]
    if cfg.data.cv and min(counts) < cfg.data.cv:
        raise ValueError(
            f"data.cv={cfg.data.cv} needs as many participants of every class in train and val; "
            f"there are {counts}"
        )


def cross_validate(fit, cfg, seeds, train, val):
    """The Folds of every seed: of the participants of train and val, stratified by class.

    Neither weights nor choice know anything of what a fold's score is computed on: it is held out,
    the next fold chooses head and epoch, the others train.
    """
    everybody = train.with_others(val)
    units, labels = list(everybody.units), np.array(list(everybody.units.values()))
    person_of = {s.unit: s.participant_id for s in everybody.samples}
    num_classes = len(settings.class_names(cfg))
    check_folds(cfg, everybody.samples)
    # a participant is never in two folds
    by_person = list(person_of.values()) == units
    kind = StratifiedKFold if by_person else StratifiedGroupKFold
    found = []
    for seed in seeds:
        folds = kind(cfg.data.cv, shuffle=True, random_state=seed)
        folds = folds.split(units, labels, None if by_person else list(person_of.values()))
        fold_of = {units[i]: fold for fold, (_, held) in enumerate(folds) for i in held}
        for fold in range(cfg.data.cv):
            part = {"train": [], "choose": [], "hold": []}
            for i, sample in enumerate(everybody.samples):
                away = (fold_of[sample.unit] - fold) % cfg.data.cv
                part[{0: "hold", 1: "choose"}.get(away, "train")].append(i)
            hold = everybody.rows(part["hold"])
            fitted = fit(cfg, seed, everybody.rows(part["train"]), everybody.rows(part["choose"]))
            # who is held out is to these folds what test is to a run
            head = references.load(runs.head_of(fitted.states, "test"), cfg)
            held = heads.by_unit(hold.samples, heads.predict(head, hold.x)[0])
            score = metrics.score(held.y_true, held.p, num_classes)
            row = {
                "seed": seed,
                "fold": fold,
                "participants": len(set(held.participants)),
                **fitted.best,
            }
            del row["chosen"]
            row |= {HELD_OUT: score["balanced_accuracy"], "held_out_loss": score["log_loss"]}
            found.append(Fold(row, held))
    return found


def held_out(folds, seed):
    """The Predictions of all participants, each as its fold held it out."""
    parts = [fold.held for fold in folds if fold.row["seed"] == seed]
    ids, people = (
        [i for part in parts for i in getattr(part, name)] for name in ("ids", "participants")
    )
    y_true, p = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("y_true", "p")
    )
    return heads.Predictions(ids, y_true, p, people)
