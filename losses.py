"""Class weights and losses. Logits are (B, K), targets (B,) class indices. Needs torch alone.

Classes that are rare in training can be helped in three places. Using more than one corrects
the imbalance twice:
  the weight of a row    class_weights: "auto", "effective", a list; with any loss
  the draw of a row      data.epoch_order(sampler="stratified")
  the logits             "logit_adjustment" and "balanced_softmax": they know the class shares, and
                         need no weights
"""

import torch
import torch.nn.functional as F


def asked_shares(labels, num_classes, scheme, loss, sampler):
    """The class shares for which a head's probabilities are, by what it was trained with -> (K,) of
    numpy: those that training sees, times the class weights; a loss that takes the prior away makes
    the former even. labels: of the training participants; scheme: of their weights; sampler: of
    data.sampler."""
    labels = torch.as_tensor(labels)
    seen = labels.bincount(minlength=num_classes).double()
    if sampler == "stratified" or loss in ("logit_adjustment", "balanced_softmax"):
        seen = torch.ones(num_classes)
    asked = seen * class_weights(labels, num_classes, scheme)
    return (asked / asked.sum()).numpy()


def class_weights(labels, num_classes, scheme):
    """Weight of every class -> float32 tensor (num_classes,).

    labels (n,): class indices of the training participants. scheme:
      "auto"       n / (num_classes * n_k), scikit-learn's class_weight="balanced"
      "effective"  (1 - b) / (1 - b^n_k) with b = 0.999, scaled to the sum num_classes: by the
                   effective number of samples (Cui et al. 2019, eq. 4); between "none" and "auto"
      "none"       ones
      a list       these weights
    ValueError when a class has no participant and its weight would need one, or the list does not
    fit.
    """
    if isinstance(scheme, (list, tuple)):
        weights = torch.as_tensor(scheme, dtype=torch.float32)
        valid = torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0
        if weights.shape != (num_classes,) or not valid:
            raise ValueError(
                f"class_weights must be {num_classes} numbers >= 0, not all zero; "
                f"got {list(scheme)}"
            )
        return weights
    if scheme == "none":
        return torch.ones(num_classes)
    if scheme not in ("auto", "effective"):
        raise ValueError(
            f"class_weights must be 'auto', 'effective', 'none' or a list of {num_classes} "
            f"numbers; got {scheme!r}"
        )
    labels = torch.as_tensor(labels, dtype=torch.int64)
    valid = labels[(labels >= 0) & (labels < num_classes)]
    counts = torch.bincount(valid, minlength=num_classes)
    if len(valid) != len(labels) or (counts == 0).any():
        raise ValueError(
            f"class_weights '{scheme}' needs every one of {num_classes} classes in training; "
            f"counts are {counts.tolist()}"
        )
    if scheme == "effective":
        weights = (1 - 0.999) / (1 - 0.999 ** counts.double())
        return (num_classes * weights / weights.sum()).float()
    return (counts.sum() / (num_classes * counts)).float()


# Losses of every row: f(logits (B, K), targets (B,), log_prior (K,) or None) -> (B,)


def cross_entropies(logits, targets, log_prior=None):
    """Cross-entropy of every row, -log p_y -> (B,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def smoothed_losses(logits, targets, log_prior=None, smoothing=0.1):
    """Cross-entropy of every row with label smoothing -> (B,).

    The target is (1 - smoothing) for the true class, plus smoothing / K for each class (Szegedy et
    al. 2016, section 7).
    """
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


def balanced_softmax_losses(logits, targets, log_prior):
    """Cross-entropy of every row of logits + log_prior -> (B,) (Ren et al. 2020, eq. 4; Menon et
    al. 2021, eq. 10, tau = 1).

    log_prior (K,): log of the classes' shares in what training draws. The logits alone then suit
    classes that are equally frequent.
    """
    return F.cross_entropy(logits + log_prior, targets, reduction="none")


def ordinal_losses(logits, targets, log_prior=None):
    """Squared earth mover's distance of every row, the sum over k of (P(class <= k) - [y <= k])^2
    -> (B,) (Hou et al. 2016, eq. 8).

    The classes are ordered: an answer that is off by two costs more than one that is off by one.
    """
    p = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, K)
    true = F.one_hot(targets, logits.shape[-1]).cumsum(dim=-1)  # (B, K)
    return (p - true).square().sum(dim=-1)


def focal_losses(logits, targets, log_prior=None, gamma=2.0):
    """Focal loss of every row, -(1 - p_y)^gamma * log p_y -> (B,) (Lin et al. 2017, eq. 4). It is
    the cross-entropy at gamma 0."""
    log_p = F.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)  # (B,)
    # clamped: where p_y rounds to 1, the gradient of 0^gamma would be NaN for gamma < 1
    return (1 - log_p.exp()).clamp_min(torch.finfo(log_p.dtype).tiny) ** gamma * -log_p


# Training adds up the losses of rows over replicas, and so takes them from here. "logit_adjustment"
# trains as "ce"; the head then subtracts the log prior from its logits (Menon et al. 2021, eq. 9),
# see heads.py.
LOSSES = {  # train.loss -> losses of every row
    "ce": cross_entropies,
    "focal": focal_losses,
    "label_smoothing": smoothed_losses,
    "logit_adjustment": cross_entropies,
    "balanced_softmax": balanced_softmax_losses,
    "ordinal": ordinal_losses,
}


def weighted_mean(losses, targets, weight=None):
    """sum w[y] * loss / sum w[y], as torch averages a weighted cross-entropy -> scalar.

    losses (B,), targets (B,), weight (K,) or None for equal weights.
    """
    w = torch.ones_like(losses) if weight is None else weight[targets]
    return (w * losses).sum() / w.sum()


def cross_entropy(logits, targets, weight=None):
    """Cross-entropy, as a weighted mean over rows -> scalar. weight: (K,), of the classes."""
    return weighted_mean(cross_entropies(logits, targets), targets, weight)


def focal_loss(logits, targets, weight=None, gamma=2.0):
    """Focal loss, as a weighted mean over rows -> scalar. weight: (K,), of the classes."""
    return weighted_mean(focal_losses(logits, targets, gamma=gamma), targets, weight)
