"""How much each token of a volume adds to a head's answer, for every kind of head.

    found = attribute(bank, tokens, "mean")     # tokens (T, C) of one volume -> Attribution
    found.scores.sum(axis=0) + found.constant   # (K,): the head's own logits
    contrast(found.scores, answer)              # (T,): for the answered class, against the others

A head sees one feature p (C,), pooled from the tokens and standardised, and all its ways to pool
are sums of parts of the tokens: the mean; the maximum, where a channel's value is that of one
token; attentive pooling, given its weights. A linear head adds up w . p, so a token's score for a
class is w . (its part of p): exact, without a gradient. An MLP is followed along the straight line
from the mean feature of training (p = 0) to p: integrated gradients (Sundararajan, Taly and Yan
2017, arXiv 1703.01365), which add up to the change of the logits. With one hidden layer the
integral has a closed form, and so the scores are exact, too. kNN has no such sum: the score is the
head's answer for a token alone. Needs torch alone, as heads.py does.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import heads
import model
import references

# what the scores of a kind of head are, for whoever looks at a map of them
WORDS = {
    "linear": "The scores of all tokens and a constant add up to the head's logits.",
    "mlp": "The scores of all tokens add up to what the logits change by on the straight line from "
    "the mean feature of training to this one (integrated gradients).",
    "knn": "kNN has no sum over tokens: a score is the head's answer, a share of the neighbours' "
    "votes, for that token alone.",
}


@dataclass
class Attribution:
    """Of one volume, all float64: scores (T, K) of its tokens; constant (K,), what no token adds to
    the logits, None where the scores do not add up; weights (T,) of attentive pooling, the mean
    over its queries, which adds up to 1, else None."""

    scores: np.ndarray
    constant: np.ndarray = None
    weights: np.ndarray = None


def kind_of(bank):
    """The key of WORDS for a head."""
    if isinstance(bank, references.KNN):
        return "knn"
    return "linear" if bank.hidden_weight is None else "mlp"


@torch.no_grad()
def attribute(bank, tokens, pooling):
    """The Attribution of a volume's tokens (T, C), which the bank of one head sees pooled by
    pooling: "mean", "max" or "attentive"."""
    if kind_of(bank) == "knn":
        return Attribution(heads.predict(bank, tokens)[0])
    x = (tokens.double() - bank.mean) / bank.std
    parts, weights = parts_of(bank, x, pooling)
    slopes, constant = line_to(bank, parts.sum(dim=0))
    scores = parts @ slopes.T  # (T, C) and (K, C) -> (T, K)
    return Attribution(scores.numpy(), constant.numpy(), weights)


def parts_of(bank, x, pooling):
    """Standardised tokens x (T, C) -> the part of each in the pooled feature, (T, C): they add up
    to it; and the weights (T,) of attentive pooling as a numpy array, else None."""
    if pooling == "mean":
        return x / len(x), None
    if pooling == "max":
        parts, channels = torch.zeros_like(x), torch.arange(x.shape[1])
        largest = x.argmax(dim=0)  # (C,): the first, where several are alike
        parts[largest, channels] = x[largest, channels]
        return parts, None
    query = bank.query[0].double() / model.HEAD_DIM**0.5  # (heads, C)
    weights = (x @ query.T).softmax(dim=0)  # (T, heads), as heads.attentive_pool
    values = x.unflatten(1, (-1, model.HEAD_DIM))  # (T, C) -> (T, heads, 64)
    return (weights[..., None] * values).flatten(1), weights.mean(dim=1).numpy()


def line_to(bank, pooled):
    """Slopes (K, C) and constant (K,) of the head's logits on the line from the mean feature (zero)
    to the pooled one (C,): logits = slopes @ pooled + constant."""
    weight = bank.weight[0].double()  # (K, C), or (K, hidden)
    bias = bank.bias[0].double() - bank.log_prior[0]
    if bank.hidden_weight is None:
        return weight, bias
    hidden, start = bank.hidden_weight[0].double(), bank.hidden_bias[0].double()
    # each hidden unit goes from `start` to `start + change`; the mean slope of GELU between them
    change = hidden @ pooled  # (hidden,)
    rise = (F.gelu(start + change) - F.gelu(start)) / change
    density = torch.exp(-(start**2) / 2) / math.sqrt(2 * math.pi)
    at_start = torch.special.ndtr(start) + start * density  # GELU's derivative
    slope = torch.where(change.abs() > 1e-6, rise, at_start)
    return (weight * slope) @ hidden, weight @ F.gelu(start) + bias


def contrast(scores, answer):
    """Scores (..., K) -> (...): that of the class `answer`, less the mean of the others'."""
    others = (scores.sum(axis=-1) - scores[..., answer]) / (scores.shape[-1] - 1)
    return scores[..., answer] - others
