"""Where training stands: best epoch and patience of every head, and the record of an epoch.

    progress = Progress(cfg, num_heads, steps_per_epoch)
    for epoch in progress.epochs(...): ...             # until the last, or until patience ends
    improved = progress.update(this)                   # after each Epoch: heads better than ever
    record = epoch_record(train, this, g, settings)    # of head g: a line of metrics.jsonl

Validation chooses, by balanced accuracy and, where that is the same, by log-loss.
"""

import math

import numpy as np
import torch
from tqdm import tqdm

import device
import heads
import metrics


def better(new, old, min_delta=0.0):
    """Is (balanced accuracy, loss) `new` better than `old`? By balanced accuracy; where that is the
    same, by loss."""
    if abs(new[0] - old[0]) > max(
        min_delta, 1e-9
    ):  # a mean of recalls is the same only up to rounding
        return new[0] > old[0]
    return new[1] < old[1] - min_delta


class Progress:
    """Where training stands, and best epoch and patience of each of G heads.

    epoch, step: the epoch, and how many of its steps are done. best, reference: (balanced accuracy,
    loss), or None; patience counts from the reference. history: records of a run, one an epoch.
    """

    def __init__(self, cfg, num_heads, steps_per_epoch):
        early_stopping = cfg.train.early_stopping
        self.last, self.steps_per_epoch = cfg.train.epochs, steps_per_epoch
        self.patience = early_stopping.patience if early_stopping.enabled else math.inf
        self.min_delta = early_stopping.min_delta
        self.epoch, self.step, self.history = 0, steps_per_epoch, []
        self.best, self.reference = [None] * num_heads, [None] * num_heads
        self.best_epoch, self.epochs_without = [0] * num_heads, [0] * num_heads
        self.last_epoch = [math.inf] * num_heads  # with which a head stopped; infinity: it goes on

    def epochs(self, desc, is_silent):
        """Yield the epochs from where training stands, to the last or until every head stopped."""
        hidden = is_silent or device.rank() > 0
        with tqdm(desc=desc, total=self.last, unit="epoch", leave=False, disable=hidden) as bar:
            while self.epoch < self.last or self.step < self.steps_per_epoch:
                if self.step == self.steps_per_epoch:
                    if max(self.last_epoch) < math.inf:
                        return
                    self.epoch, self.step = self.epoch + 1, 0
                yield self.epoch
                bar.update()

    def update(self, epoch, restart=False):
        """Take in an Epoch -> indices of the heads that are better than ever on validation, in
        epoch.improved too.

        A head whose numbers are not finite stops with the epoch before. restart: patience begins
        anew.
        """
        found, finite = epoch.predictions, epoch.is_finite()
        for g, now in enumerate(zip(*metrics.quick_scores(found.y_true, found.p))):
            if not finite[g]:  # the others do not feel it
                self.last_epoch[g] = min(self.last_epoch[g], epoch.number - 1)
            if epoch.number > self.last_epoch[g]:
                continue
            if self.best[g] is None or better(now, self.best[g]):
                self.best[g], self.best_epoch[g] = now, epoch.number
                epoch.improved.append(g)
            if (
                restart
                or self.reference[g] is None
                or better(now, self.reference[g], self.min_delta)
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
            if better(self.best[g], self.best[chosen]):
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
        key = lambda row: (
            math.isnan(row["val_loss"]),
            -row["val_balanced_accuracy"],
            row["val_loss"],
        )
        return sorted(found, key=key)


class Epoch:
    """What an epoch leaves behind, for each of G heads.

    drawn (volumes,): indices of train's volumes, in order. seen (G, volumes, 1 + num_classes): for
    each volume, its losses and probabilities added up. losses (G,): of the steps, each times the
    size of its batch; norms (G,): of their gradients. rates: shares of the head's and the encoder's
    learning rates. predictions: of validation. improved: the heads that are better than ever.
    """

    def __init__(self, number, drawn, num_heads, num_classes, steps=1, dev=None):
        self.number, self.drawn, self.steps, self.rates = number, drawn, steps, [0.0, 0.0]
        self.seen = torch.zeros(num_heads, len(drawn), 1 + num_classes, device=dev)
        self.losses, self.norms = (torch.zeros(num_heads, device=dev) for _ in range(2))
        self.predictions, self.improved = None, []

    @torch.no_grad()
    def see(self, rows, row_losses, logits, loss):
        """Add what a step saw of the volumes `rows` (b,), -1: padding; row_losses (G, b), logits
        (G, b, num_classes), loss (G,)."""
        row_seen = torch.cat([row_losses[..., None], logits.softmax(dim=2)], dim=2)
        row_seen = row_seen * (rows >= 0)[:, None]
        self.seen.index_add_(1, rows.clamp(min=0), row_seen.to(self.seen.dtype))
        self.losses += loss

    def summed(self):
        """What all replicas saw, on the host."""
        return {
            name: device.all_sum(vars(self)[name]).cpu() for name in ("seen", "losses", "norms")
        }

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
    num_classes = p_val.shape[-1]
    seen, draws = epoch.seen[g].double(), epoch.drawn.bincount(minlength=len(labels))
    there = draws.nonzero().flatten()  # a stratified epoch leaves some out
    p = seen[there, 1:] / seen[there, 1:].sum(dim=1, keepdim=True)
    trained = heads.by_participant([train.samples[i] for i in there], p.numpy())
    # metrics.score would compare all pairs of participants, which thousands of them would feel
    (train_accuracy,), _ = metrics.quick_scores(trained.y_true, trained.p[None])
    predicted = np.bincount(trained.p.argmax(axis=1), minlength=num_classes)
    val = metrics.score(y_val, p_val, num_classes)
    drawn_of, loss_of = (
        [values[labels == k].sum().item() for k in range(num_classes)]
        for values in (draws, seen[:, 0])
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
        "train/lr_head": settings.get("lr_head", 0.0) * epoch.rates[0],
        "train/lr_encoder": epoch.rates[1],
        "train/loss": epoch.losses[g].item() / len(labels),
        "train/grad_norm": epoch.norms[g].item() / epoch.steps,
        "best": g in epoch.improved,
    }


def epoch_lines(record, epochs):
    """What the terminal shows of a record of `epoch_record`."""
    num_classes = sum(name.startswith("val/f1_") for name in record)

    def by_class(name, form):
        values = [record[f"{name}_{k}"] for k in range(num_classes)]
        return "/".join("-" if value is None else form.format(value) for value in values)

    parts = [part for part in ("head", "encoder") if record[f"train/lr_{part}"]]
    rates = "  ".join(f"{part} lr {record[f'train/lr_{part}']:.1e}" for part in parts)
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
