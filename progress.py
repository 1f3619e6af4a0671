"""Where training stands: best epoch and patience of every head, and the record of an epoch.

    progress = Progress(cfg, num_heads, steps_per_epoch)
    for epoch in progress.epochs(...): ...             # 0: the start; until patience ends
    improved = progress.update(this)                   # after each Epoch: heads better than ever
    record = epoch_record(train, this, g, settings)    # of head g: a line of metrics.jsonl

Validation chooses, by log-loss and, where that is the same, by balanced accuracy; or the other way
round (train.choose_by).
"""

import math

import numpy as np
import torch

import device
import heads
import metrics


def merits(scores, choose_by):
    """(balanced accuracy, log-loss) -> two numbers, the first of which decides and the second
    among equals; larger is better."""
    accuracy, loss = scores
    return (accuracy, -loss) if choose_by == "balanced_accuracy" else (-loss, accuracy)


def better(new, old, choose_by, min_delta=0.0):
    """Is (balanced accuracy, log-loss) `new` better than `old`, by train.choose_by?"""
    (first, second), (old_first, old_second) = merits(new, choose_by), merits(old, choose_by)
    # a mean is the same only up to rounding
    if abs(first - old_first) > max(min_delta, 1e-9):
        return first > old_first
    return second > old_second + min_delta


class Progress:
    """Where training stands, and best epoch and patience of each of G heads.

    epoch, step: the epoch, and how many of its steps are done. Epoch 0 is the start, which is
    judged before any training and may be the best; not where balanced accuracy chooses. best,
    reference: (balanced accuracy, loss), or None; patience counts from the reference. history:
    records of a run, one an epoch.
    """

    def __init__(self, cfg, num_heads, steps_per_epoch):
        early_stopping = cfg.train.early_stopping
        self.last, self.steps_per_epoch = cfg.train.epochs, steps_per_epoch
        self.patience = early_stopping.patience if early_stopping.enabled else math.inf
        self.min_delta = early_stopping.min_delta
        self.choose_by = cfg.train.choose_by
        self.first = 1 if self.choose_by == "balanced_accuracy" else 0
        self.epoch, self.step, self.history = self.first - 1, steps_per_epoch, []
        self.best, self.reference = [None] * num_heads, [None] * num_heads
        self.best_epoch, self.epochs_without = [0] * num_heads, [0] * num_heads
        self.last_epoch = [math.inf] * num_heads  # with which a head stopped; infinity: it goes on

    def epochs(self, stage=None):
        """Yield the epochs from where training stands, to the last or until every head stopped.
        stage: the stages.Stage that counts them, those that patience saves too."""
        while self.epoch < self.last or self.step < self.steps_per_epoch:
            if self.step == self.steps_per_epoch:
                if max(self.last_epoch) < math.inf:
                    if stage:
                        stage.update(self.last - self.epoch)
                    return
                self.epoch, self.step = self.epoch + 1, 0
            yield self.epoch
            if stage:
                stage.update()

    def update(self, epoch, reset_patience=False):
        """Take in an Epoch -> indices of the heads that are better than ever on validation.

        A head whose numbers are not finite stops with the epoch before.
        """
        found, finite = epoch.predictions, epoch.is_finite()
        for g, now in enumerate(zip(*metrics.quick_scores(found.y_true, found.p))):
            if not finite[g]:  # the others do not feel it
                self.last_epoch[g] = min(self.last_epoch[g], epoch.number - 1)
            if epoch.number > self.last_epoch[g]:
                continue
            if self.best[g] is None or better(now, self.best[g], self.choose_by):
                self.best[g], self.best_epoch[g] = now, epoch.number
                epoch.improved.append(g)
            if (
                reset_patience
                or self.reference[g] is None
                or better(now, self.reference[g], self.choose_by, self.min_delta)
            ):
                self.reference[g], self.epochs_without[g] = now, 0
            else:
                self.epochs_without[g] += 1
            if self.epochs_without[g] >= self.patience:
                self.last_epoch[g] = epoch.number
        return epoch.improved

    def chosen(self):
        """The head that validation chooses; the first of equals. ValueError when every head
        diverged at once."""
        with_best = [g for g in range(len(self.best)) if self.best[g]]
        if not with_best:
            raise ValueError(
                "every head of train.sweep diverged in the first epoch; lower train.sweep.lr_head"
            )
        chosen = with_best[0]
        for g in with_best:
            if better(self.best[g], self.best[chosen], self.choose_by):
                chosen = g
        return chosen

    def rows(self, settings):
        """sweep.csv -> a dict for each head, best first: its settings, its best epoch and scores,
        whether it is chosen."""
        chosen = self.chosen()
        found = []
        for g, setting in enumerate(settings):
            accuracy, loss = self.best[g] or (math.nan, math.nan)  # it diverged at once
            scores = {
                "best_epoch": self.best_epoch[g],
                "val_balanced_accuracy": accuracy,
                "val_loss": loss,
            }
            found.append({**setting, **scores, "chosen": g == chosen})

        def key(row):
            scores = row["val_balanced_accuracy"], row["val_loss"]
            first, second = merits(scores, self.choose_by)
            return math.isnan(row["val_loss"]), -first, -second

        return sorted(found, key=key)


class Epoch:
    """What an epoch leaves behind, for each of G heads.

    drawn (volumes,): the indices of the training volumes in the order in which they were drawn.
    seen (G, volumes, 1 + num_classes): each volume's losses and probabilities in training, added
    up. losses (G,): of the steps, each times the size of its batch; norms (G,): of their gradients.
    predictions: of validation. improved: the heads that are better than ever.
    """

    def __init__(self, number, drawn, bank, steps=1):
        num_heads, num_classes = bank.log_prior.shape
        self.log_prior = bank.log_prior  # (G, num_classes), which answers go without
        self.number, self.drawn, self.steps, self.improved = number, drawn, steps, []
        zeros = self.log_prior.new_zeros
        self.seen = zeros(num_heads, len(drawn), 1 + num_classes)
        self.losses, self.norms = zeros(num_heads), zeros(num_heads)

    @torch.no_grad()
    def add(self, indices, losses, logits, loss):
        """Add what a step saw of the volumes `indices` (b,), -1: padding; losses (G, b), logits (G,
        b, num_classes), loss (G,)."""
        p = (logits - self.log_prior[:, None]).softmax(dim=2)
        seen = torch.cat([losses[..., None], p], dim=2) * (indices >= 0)[:, None]
        self.seen.index_add_(1, indices.clamp(min=0), seen)
        self.losses += loss

    def summed(self):
        """What the steps of all replicas saw, on the host."""
        return {
            name: device.all_sum(vars(self)[name]).cpu() for name in ("seen", "losses", "norms")
        }

    def restore(self, earlier):
        """Go on from a last.pt that was saved within this epoch."""
        if device.rank() == 0:  # it holds the sums over all replicas, which are added up again
            so_far = {name: v.to(self.seen.device) for name, v in earlier["so_far"].items()}
            vars(self).update(so_far)

    def finish(self, predictions, head_factor=0.0, lr_encoder=0.0):
        """All steps are done. predictions: of validation; head_factor: of the head's learning rate
        in the last step; lr_encoder: the learning rate of the encoder."""
        vars(self).update(self.summed())
        self.predictions, self.head_factor, self.lr_encoder = predictions, head_factor, lr_encoder

    def of_training(self, train, g):
        """The Predictions of training's units by head g, as its steps saw them."""
        drawn = self.drawn.unique()  # a stratified epoch leaves some out
        p = self.seen[g, drawn, 1:].double()
        p = p / p.sum(dim=1, keepdim=True)
        return heads.by_unit([train.samples[i] for i in drawn], p.numpy())

    def is_finite(self):
        """(G,): are the numbers of each head finite?"""
        finite = torch.isfinite(self.losses + self.norms).numpy()
        return finite & np.isfinite(self.predictions.p).all(axis=(1, 2))


def epoch_record(train, epoch, g, settings):
    """What is logged of an Epoch of head g: scores of validation, and of training as its steps saw
    it, by participant.

    train: Features. settings: of head g.
    """
    labels, y_val, p_val = train.labels, epoch.predictions.y_true, epoch.predictions.p[g]
    num_classes, losses = p_val.shape[-1], epoch.seen[g, :, 0].double()
    draws, trained = epoch.drawn.bincount(minlength=len(labels)), epoch.of_training(train, g)
    # metrics.score would compare all pairs of participants, which thousands of them would feel
    (train_accuracy,), _ = metrics.quick_scores(trained.y_true, trained.p[None])
    predicted = np.bincount(trained.p.argmax(axis=1), minlength=num_classes)
    val = metrics.score(y_val, p_val, num_classes)
    drawn_of, loss_of = (
        [values[labels == k].sum().item() for k in range(num_classes)] for values in (draws, losses)
    )

    def by_class(name, values):
        return {f"{name}_{k}": value for k, value in enumerate(values)}

    return {
        "epoch": epoch.number,
        "train/balanced_accuracy": train_accuracy,
        **by_class("train/loss", [loss / n if n else None for loss, n in zip(loss_of, drawn_of)]),
        **by_class("train/drawn", drawn_of),
        **by_class("train/predicted_share", [n / len(trained.ids) for n in predicted.tolist()]),
        "val/loss": val["log_loss"],
        "val/accuracy": val["accuracy"],
        "val/balanced_accuracy": val["balanced_accuracy"],
        "val/macro_f1": val["macro_f1"],
        **by_class("val/f1", val["f1_per_class"]),
        **by_class("val/predicted_share", [n / len(y_val) for n in val["predicted_counts"]]),
        "gap/balanced_accuracy": train_accuracy - val["balanced_accuracy"],
        "train/lr_head": settings.get("lr_head", 0.0) * epoch.head_factor,
        "train/lr_encoder": epoch.lr_encoder,
        "train/loss": epoch.losses[g].item() / len(labels),
        "train/grad_norm": epoch.norms[g].item() / epoch.steps,
        "best": g in epoch.improved,
    }


def training_tables(train, epoch, bank, g):
    """What eval.py's alarms are told of training -> {name: counts (num_classes, num_classes) of its
    units, rows: true, columns: answered}.

    "trained": as the Epoch's steps saw them; "left_out": each by the head as it started without the
    participant, where that is known.
    """
    found = {
        "trained": epoch.of_training(train, g),
        "left_out": heads.left_out(bank, g, train.samples),
    }
    return {
        name: metrics.confusion(p.y_true, p.p.argmax(axis=1), p.p.shape[1]).tolist()
        for name, p in found.items()
        if p
    }


def epoch_lines(record, epochs):
    """What the terminal shows of a record of `epoch_record`."""
    num_classes = sum(name.startswith("val/f1_") for name in record)

    def by_class(name, form):
        values = [record[f"{name}_{k}"] for k in range(num_classes)]
        return "/".join("-" if value is None else form.format(value) for value in values)

    parts = [part for part in ("head", "encoder") if record[f"train/lr_{part}"]]
    rates = "  ".join(f"{part} lr {record[f'train/lr_{part}']:.1e}" for part in parts)
    rates = rates if record["epoch"] else "start, before any step"
    return (
        f"epoch {record['epoch']:3d}/{epochs}  train loss {record['train/loss']:.3f} "
        f"bal.acc {record['train/balanced_accuracy']:.3f}   val loss {record['val/loss']:.3f} "
        f"acc {record['val/accuracy']:.3f} bal.acc {record['val/balanced_accuracy']:.3f} "
        f"macro F1 {record['val/macro_f1']:.3f}   gap {record['gap/balanced_accuracy']:+.3f}"
        f"{'  *' if record['best'] else ''}\n"
        f"    {rates}  gradient {record['train/grad_norm']:.2g}   by class: drawn "
        f"{by_class('train/drawn', '{}')}, "
        f"loss {by_class('train/loss', '{:.2f}')}, predicted on val "
        f"{by_class('val/predicted_share', '{:.0%}')}"
    )
