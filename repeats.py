"""Heads fitted again on the same features: seeds, folds, floors; and what a run saves that does not
save as it goes.

    run(fit, cfg, run_, train, val, random)   # fit(cfg, seed, train, val) -> Fitted: train.fit, or train.fit_references

What is cheap on a frozen encoder's features: a sweep, train.seeds, data.cv, eval.floors, kNN and
logistic regression.
"""

import dataclasses
import os

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold

import files
import heads
import ledger
import metrics
import runs
from progress import epoch_lines


@dataclasses.dataclass
class Fitted:
    """What fitting a bank of heads came to: the chosen head, as a bank of one; the records of its
    epochs; its Predictions of validation at its best epoch; and the rows of sweep.csv, best
    first."""

    head: object
    history: list
    predictions: heads.Predictions
    rows: list

    @property
    def best(self):
        """The row of the chosen head."""
        return next(row for row in self.rows if row["chosen"])

    @property
    def best_record(self):
        return self.history[self.best["best_epoch"] - 1]


def run(fit, cfg, run_, train, val, random):
    """Fit all that the config asks for and save the head that validation chooses. Every replica
    does the same.

    train, val: Features; random: theirs of a random encoder, for eval.floors, else None.
    """
    seeds = cfg.train.seeds or [cfg.seed]
    number = {"knn": len(heads.NEIGHBOURS), "logistic_regression": len(heads.STRENGTHS)}.get(
        cfg.model.head.kind
    )
    print(
        f"{number or len(heads.settings_of(cfg))} heads ({cfg.model.head.kind}) on "
        f"{len(train.samples)} volumes"
        f"{f', {len(seeds)} seeds' if len(seeds) > 1 else ''}{f', {cfg.data.cv} folds beside' if cfg.data.cv else ''}; "
        "validation chooses"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # many small operations: on a busy machine, more threads mostly wait for each other
    fits = [fit(cfg, seed, train, val) for seed in seeds]
    folds = cross_validate(fit, cfg, seeds, train, val) if cfg.data.cv else []
    floors = {}
    if cfg.eval.floors:
        shuffled = [part.labelled(shuffle_labels(part.samples, cfg.seed)) for part in (train, val)]
        for name, parts in (("random encoder", random), ("shuffled labels", shuffled)):
            floors[name] = fit(cfg, seeds[0], *parts).head.state_dict()
    torch.set_num_threads(threads)
    save(cfg, run_, seeds, fits, folds, floors)
    describe(cfg, run_, seeds, fits, folds)


def save(cfg, run_, seeds, fits, folds, floors):
    first = fits[0]
    run_.prepare()
    content = {
        "head": first.head.state_dict(),
        "sweep": first.best,
        "repeats": [
            {"seed": seed, "head": fitted.head.state_dict()} for seed, fitted in zip(seeds, fits)
        ],
        **({"floors": floors} if floors else {}),
    }
    record = first.best_record
    if cfg.model.head.kind == "knn":
        record = record | {
            "train/balanced_accuracy": None
        }  # everybody is their own nearest neighbour there
    run_.save_best(record, first.predictions, content)
    run_.write_history(first.history)
    run_.write(
        "sweep.csv",
        table([{"seed": seed, **row} for seed, fitted in zip(seeds, fits) for row in fitted.rows]),
    )
    if folds:
        run_.write("cv.csv", table([fold.row for fold in folds]))
        run_.write("predictions_cv.csv", runs.predictions_csv(held_out(folds, seeds[0])))
    for record in first.history:
        run_.wandb.log(record)
    # the same as last.pt, which says that the run is finished
    best = {"epoch": record["epoch"], **content, **runs.scores_of(record, first.predictions)}
    run_.save(runs.LAST, best | {"wandb": run_.wandb.id})


def table(rows):
    """Dicts of the same keys -> CSV text."""
    return files.csv_text([list(rows[0]), *(list(row.values()) for row in rows)])


def describe(cfg, run_, seeds, fits, folds):
    """Tell what was found: the best heads, the chosen one's epoch, seeds, folds."""
    first, is_network = fits[0], cfg.model.head.kind == "network"
    scores = ("best_epoch", "val_balanced_accuracy", "val_loss", "chosen")
    swept = [
        name
        for name in first.best
        if name not in scores and len({str(row[name]) for row in first.rows}) > 1
    ]

    def described(row):
        values = [
            f"{name} {row[name]:.3g}" if type(row[name]) is float else f"{name} {row[name]}"
            for name in swept
        ]
        return ", ".join([f"epoch {row['best_epoch']}"] * is_network + values)

    for row in first.rows[:5]:
        print(
            f"  val bal.acc {row['val_balanced_accuracy']:.3f} loss {row['val_loss']:.3f}  "
            f"{described(row)}{'  *' if row['chosen'] else ''}"
        )
    if is_network:
        print(epoch_lines(first.best_record, cfg.train.epochs))
    print(
        f"best of {len(first.rows)}: {described(first.best)}; val balanced accuracy "
        f"{first.best['val_balanced_accuracy']:.3f}; saved as "
        f"{os.path.join(run_.folder, runs.BEST)}"
    )
    if len(seeds) > 1:
        spread = mean_and_sd([fitted.best["val_balanced_accuracy"] for fitted in fits])
        print(f"over {len(seeds)} seeds: val balanced accuracy {spread}")
    for seed in seeds if folds else ():
        held = held_out(folds, seed)
        spread = mean_and_sd(
            [f.row["held_out_balanced_accuracy"] for f in folds if f.row["seed"] == seed]
        )
        print(
            f"{cfg.data.cv}-fold cross-validation{f', seed {seed}' if len(seeds) > 1 else ''}: "
            "balanced accuracy "
            f"{metrics.score(held.y_true, held.p, held.p.shape[1])['balanced_accuracy']:.3f} "
            f"on {len(held.ids)} participants, each held out once; folds {spread}"
        )


def mean_and_sd(values):
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} ({', '.join(f'{v:.3f}' for v in values)})"


def shuffle_labels(samples, seed):
    """The samples with the participants' labels permuted among them."""
    people = list({s.participant_id: s.label for s in samples}.items())
    labels = [people[i][1] for i in np.random.default_rng(seed).permutation(len(people))]
    label_of = {i: label for (i, _), label in zip(people, labels)}
    return [dataclasses.replace(s, label=label_of[s.participant_id]) for s in samples]


@dataclasses.dataclass
class Fold:
    """A fold of cross-validation: its row of cv.csv, and the Predictions of the participants that
    it held out."""

    row: dict
    held: heads.Predictions


def cross_validate(fit, cfg, seeds, train, val):
    """The Folds of every seed: of the participants of train and val, stratified by class.

    Neither weights nor choice know anything of what a fold's score is computed on: it is held out,
    the next fold chooses head and epoch, the others train.
    """
    everybody = train.with_others(val)
    ids, labels = list(everybody.participants), np.array(list(everybody.participants.values()))
    num_classes = len(ledger.CLASSES)
    if np.bincount(labels, minlength=num_classes).min() < cfg.data.cv:
        raise ValueError(
            f"data.cv={cfg.data.cv} needs as many participants of every class in train and val; "
            f"there are {np.bincount(labels).tolist()}"
        )
    found = []
    for seed in seeds:
        folds = StratifiedKFold(cfg.data.cv, shuffle=True, random_state=seed).split(ids, labels)
        fold_of = {ids[i]: fold for fold, (_, held) in enumerate(folds) for i in held}
        for fold in range(cfg.data.cv):
            part = {"train": [], "choose": [], "hold": []}
            for i, sample in enumerate(everybody.samples):
                away = (fold_of[sample.participant_id] - fold) % cfg.data.cv
                part[{0: "hold", 1: "choose"}.get(away, "train")].append(i)
            hold = everybody.rows(part["hold"])
            fitted = fit(cfg, seed, everybody.rows(part["train"]), everybody.rows(part["choose"]))
            held = heads.by_participant(hold.samples, heads.predict(fitted.head, hold.x)[0])
            score = metrics.score(held.y_true, held.p, num_classes)
            row = {"seed": seed, "fold": fold, "participants": len(held.ids), **fitted.best}
            del row["chosen"]
            row["held_out_balanced_accuracy"], row["held_out_loss"] = (
                score["balanced_accuracy"],
                score["log_loss"],
            )
            found.append(Fold(row, held))
    return found


def held_out(folds, seed):
    """The Predictions of all participants, each as its fold held it out."""
    parts = [fold.held for fold in folds if fold.row["seed"] == seed]
    ids = [participant for part in parts for participant in part.ids]
    return heads.Predictions(
        ids, *(np.concatenate([getattr(part, name) for part in parts]) for name in ("y_true", "p"))
    )
