"""A linear head in closed form: penalised discriminant analysis, judged on participants left out.

    weight, bias, left_out = discriminant(x, labels, participants, num_classes, is_ordinal)

Needs torch alone.
"""

import torch
import torch.nn.functional as F
from torch import nn


def discriminant(x, labels, participants, num_classes, is_ordinal):
    """Penalised discriminant analysis (Hastie, Buja and Tibshirani 1995) -> weight (num_classes,
    C), bias (num_classes,), and logits (n, num_classes) of the rows by the head without their
    participant.

    For equal priors. Ridge regression of the class (is_ordinal: of its rank) on x (n, C); then
    Gaussian classes of one covariance on its left-out scores, but for those that foretell nothing
    (`foretold`). participants (n,): integers from 0 on, none of which is missing.
    """
    x, y = x.double(), F.one_hot(labels, num_classes).double()  # (n, C), (n, num_classes)
    ranks = torch.arange(num_classes, dtype=torch.float64)[:, None]
    targets = ranks if is_ordinal else torch.eye(num_classes, dtype=torch.float64)[:, 1:]
    centre = x.mean(dim=0)
    coefficients, scores = ridge(x - centre, targets[labels], participants)  # (C, d), (n, d)
    means = y.T @ scores / y.sum(dim=0).clamp(min=1)[:, None]  # (num_classes, d)
    kept = foretold(means, targets)  # (d, r)
    # (C, r), (n, r), (num_classes, r)
    coefficients, scores, means = coefficients @ kept, scores @ kept, means @ kept
    # few volumes say little of how well the classes separate: shrink towards the scatter of all
    within, prior = scores - means[labels], num_classes + 1
    covariance = (within.T @ within + prior * scores.T @ scores / len(x)) / (len(x) + prior)
    slopes = torch.linalg.lstsq(covariance, means.T).solution.T  # (num_classes, r)
    bias = -(slopes * means).sum(dim=1) / 2
    if is_ordinal:  # equal slopes; the borders between neighbours stay in the middle
        slopes = ordinal(slopes)
        steps = slopes.diff(dim=0) * (means[1:] + means[:-1]) / 2  # (num_classes - 1, r)
        bias = -F.pad(steps.cumsum(dim=0).sum(dim=1), (1, 0))
    weight = slopes @ coefficients.T  # (num_classes, C)
    left_out = scores @ slopes.T + bias  # (n, num_classes)
    return weight.float(), (bias - weight @ centre).float(), left_out.float()


def ridge(x, target, participants):
    """Ridge regression of target (n, d) on centred x (n, C), with the penalty that predicts best
    when a participant, with all volumes, is left out -> coefficients (C, d), scores (n, d).

    scores: of every row by the regression without its participant, above the mean target of the
    others. That mean lies below where the participant's own target lies above: of many features
    that tell little, the scores would say nothing else.
    """
    target = target - target.mean(dim=0)
    values, axes = torch.linalg.eigh(x.T @ x)  # principal axes (C, C)
    x = x @ axes
    rows = torch.argsort(participants, stable=True).split(participants.bincount().tolist())
    if len(rows) == 1:  # nobody is left to foretell a participant by
        return torch.zeros(x.shape[1], target.shape[1], dtype=x.dtype), torch.zeros_like(target)
    # (participants, volumes), padded with -1
    rows = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    is_row = (rows >= 0)[..., None].double()  # (participants, volumes, 1)
    own, own_target = x[rows] * is_row, target[rows] * is_row  # (participants, volumes, C or d)
    # of the intercept, which is fitted without the participant too
    identity = torch.eye(rows.shape[1], dtype=torch.float64) - is_row @ is_row.mT / len(x)
    # targets add up to zero, so those of the others to what is missing: (participants, 1, d)
    others = (len(x) - is_row.sum(dim=1, keepdim=True)).clamp(min=1)
    mean_of_others = -own_target.sum(dim=1, keepdim=True) / others
    best = None
    for penalty in values.mean().clamp(min=1e-12) * torch.logspace(-4, 4, 17, dtype=torch.float64):
        shrunk = 1 / (values + penalty)
        coefficients = shrunk[:, None] * (x.T @ target)  # (C, d)
        residual = (target - x @ coefficients)[rows] * is_row
        # (participants, volumes, d): exact, without a refit
        left_out = torch.linalg.solve(identity - own * shrunk @ own.mT, residual)
        error = left_out.square().sum()
        if best is None or error < best[0]:
            best = error, coefficients, left_out
    _, coefficients, left_out = best
    scores = torch.zeros_like(target)
    scores[rows[rows >= 0]] = (own_target - left_out - mean_of_others)[rows >= 0]
    return axes @ coefficients, scores


def foretold(means, targets):
    """The contrasts of the targets (num_classes, d) that their left-out scores foretell -> (d, r).
    means (num_classes, d): of the left-out scores of every class.

    The scores of a contrast are the same contrast of the scores, so every contrast has a slope: of
    its left-out scores on itself, with classes of equal weight. This finds uncorrelated contrasts,
    from the least to the largest slope. Where that is not above zero, the features say nothing of
    the contrast, and what is fitted to its left-out scores would reverse what the head has learned:
    it is left out. Without any contrast, the answer is constant.
    """
    targets = targets - targets.mean(dim=0)
    basis = torch.linalg.inv(torch.linalg.cholesky(targets.T @ targets)).T  # targets @ basis: 1
    relation = basis.T @ targets.T @ means @ basis  # (d, d)
    slopes, turn = torch.linalg.eigh((relation + relation.T) / 2)
    kept = slopes > 1e-9
    return torch.eye(len(kept), dtype=means.dtype) if kept.all() else (basis @ turn)[:, kept]


def ordinal(weight):
    """weight (..., num_classes, C) -> the nearest that share one direction and differ by the
    class's rank."""
    rank = torch.arange(weight.shape[-2], device=weight.device, dtype=weight.dtype)[:, None]
    rank = (rank - rank.mean()) / (rank - rank.mean()).norm()  # (num_classes, 1)
    return rank * (rank * weight).sum(dim=-2, keepdim=True)
