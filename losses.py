"""Class weights and losses. Logits (B, K), targets (B,) of class indices. Needs torch alone."""

import torch
import torch.nn.functional as F


def class_weights(labels, num_classes, scheme):
    """Weight of every class -> float tensor (num_classes,).

    labels: class indices of the training participants. scheme:
      "auto"  n / (num_classes * n_k), scikit-learn's class_weight="balanced"
      "none"  ones
      a list  these weights
    ValueError when "auto" finds a class without a participant, or the list does not fit.
    """
    if isinstance(scheme, (list, tuple)):
        weights = torch.as_tensor(scheme, dtype=torch.float32)
        if weights.shape != (num_classes,) or not (torch.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError(f"class_weights must be {num_classes} numbers >= 0, not all zero; got {list(scheme)}")
        return weights
    if scheme == "none":
        return torch.ones(num_classes)
    if scheme != "auto":
        raise ValueError(f"class_weights must be 'auto', 'none' or a list of {num_classes} numbers; got {scheme!r}")
    labels = torch.as_tensor(labels, dtype=torch.int64)
    counts = torch.bincount(labels[(labels >= 0) & (labels < num_classes)], minlength=num_classes)
    if counts.sum() != len(labels) or (counts == 0).any():
        raise ValueError(f"class_weights 'auto' needs every one of {num_classes} classes in training; counts are {counts.tolist()}")
    return (counts.sum() / (num_classes * counts)).float()


def cross_entropies(logits, targets):
    """Cross-entropy of every row -> (B,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def focal_losses(logits, targets, gamma=2.0):
    """Focal loss of every row, (1 - p_y)^gamma * CE (Lin et al. 2017, eq. 4) -> (B,); cross-entropy at gamma 0."""
    log_p = F.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)  # (B,) log-probability of the true class
    # clamp: where p_y rounds to 1, the gradient of 0^gamma would be NaN for gamma < 1
    return (1 - log_p.exp()).clamp_min(torch.finfo(log_p.dtype).tiny) ** gamma * -log_p


def weighted_mean(losses, targets, weight=None):
    """sum w[y] * loss / sum w[y], as torch averages a weighted cross-entropy."""
    w = torch.ones_like(losses) if weight is None else weight[targets]
    return (w * losses).sum() / w.sum()


def cross_entropy(logits, targets, weight=None):
    """Weighted mean cross-entropy."""
    return weighted_mean(cross_entropies(logits, targets), targets, weight)


def focal_loss(logits, targets, weight=None, gamma=2.0):
    """Weighted mean focal loss."""
    return weighted_mean(focal_losses(logits, targets, gamma), targets, weight)


LOSSES = {"ce": cross_entropies, "focal": focal_losses}  # of every row: training adds them up over replicas
