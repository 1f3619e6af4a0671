"""References that need no training loop: kNN for every k, logistic regression for every C.

    bank = fit(cfg, train, num_classes)    # like heads.Heads: x (B, C) -> (G, B, num_classes)
    state = refit(cfg, settings, train, val, 4)    # one head of these settings, also on validation
    bank = load(state, cfg)                # one head, of any kind, from a checkpoint

Needs torch and scikit-learn.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import heads
import losses

STRENGTHS = np.logspace(-6, 5, 45)  # C of logistic regression: what DINOv2's evaluation tries
# k of kNN; more neighbours would outnumber the 58 participants of AI-READI's rarest class
NEIGHBOURS = (1, 3, 5, 10, 20, 30, 50)


class KNN(nn.Module):
    """Features (B, C) -> log of the k nearest training volumes' votes (G, B, num_classes), for each
    of G values of k.

    Nearest by cosine between standardised features; a vote weighs exp(cosine / 0.07), as in DINO's
    kNN (Caron et al. 2021, from Wu et al. 2018), times its class's weight. num_rows: number of
    training volumes that it keeps.
    """

    def __init__(self, dim, num_classes, num_rows, num_heads):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("features", torch.zeros(num_rows, dim))  # standardised, of length 1
        self.register_buffer("votes", torch.zeros(num_rows, num_classes))
        # for other code that handles a bank: nothing is subtracted
        self.register_buffer("log_prior", torch.zeros(num_heads, num_classes), persistent=False)
        self.register_buffer("k", torch.ones(num_heads, dtype=torch.int64))

    def forward(self, x):
        x = F.normalize((x - self.mean) / self.std)
        near, which = (x @ self.features.T).topk(self.k.max().item())  # (B, k)
        votes = (near / 0.07).exp()[..., None] * self.votes[which]  # (B, k, num_classes)
        votes = torch.stack([votes[:, :k].sum(dim=1) for k in self.k.tolist()])
        return (votes + torch.finfo(votes.dtype).tiny).log()

    def one(self, g):
        return self.state_dict() | {"k": self.k[g : g + 1].clone()}


def fit(cfg, train, num_classes, settings=None, stage=None):
    """A bank of the references that the config names, on training's Features; views are rows.
    settings: the head's k or C alone; None: all that are tried. stage: the stages.Stage that counts
    them."""
    rows = train.views.flatten(0, 1)  # (volumes * views, C)
    labels = train.labels.repeat_interleave(train.views.shape[1])
    mean, std = heads.statistics(rows)
    x, of_units = (rows - mean) / std, list(train.units.values())
    weights = losses.class_weights(of_units, num_classes, cfg.train.class_weights)
    if cfg.model.head.kind == "knn":
        k = [settings["k"]] if settings else [k for k in NEIGHBOURS if k <= len(x)]
        bank = KNN(x.shape[1], num_classes, len(x), len(k))
        bank.settings = [{"k": k} for k in k]
        bank.features, bank.k = F.normalize(x), torch.tensor(k)
        bank.votes = F.one_hot(labels, num_classes) * weights
    else:
        strengths = [settings["C"]] if settings else STRENGTHS
        bank = heads.new_heads(cfg, num_classes, [{"C": float(C)} for C in strengths])
        fit_logistic_regressions(bank, x, labels, weights, stage)
    bank.mean, bank.std = mean, std
    return bank


def refit(cfg, settings, train, val, num_classes):
    """State of one head with this k or C, on the Features of train and val."""
    return fit(cfg, train.with_others(val), num_classes, settings).one(0)


@torch.no_grad()
def fit_logistic_regressions(bank, x, labels, weights, stage=None):
    """Make head g of the bank scikit-learn's logistic regression (L2 penalty 1 / (2 C)) of its C on
    x (n, C), labels (n,).

    settings["converged"] says whether it did. ValueError when a class is missing from labels.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if labels.unique().numel() < len(weights):
        raise ValueError(
            f"model.head.kind=logistic_regression needs every one of {len(weights)} classes in "
            "training; "
            f"found {labels.unique().tolist()}"
        )
    class_weight = dict(enumerate(weights.tolist()))
    for g, setting in enumerate(bank.settings):
        fitted = LogisticRegression(
            C=setting["C"], class_weight=class_weight, max_iter=1000, tol=1e-6
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the setting says it instead
            fitted.fit(x.double().numpy(), labels.numpy())
        weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
        if len(weight) == 1:  # of two classes, scikit-learn has the logit of the second alone
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        bank.weight[g], bank.bias[g] = weight, bias
        setting["converged"] = bool(fitted.n_iter_.max() < fitted.max_iter)
        if stage:
            stage.update()


def load(state, cfg):
    """A bank of one head, with the state that a checkpoint holds. RuntimeError when it does not fit
    the config."""
    if cfg.model.head.kind == "knn":
        num_rows, num_classes = state["votes"].shape
        bank = KNN(cfg.model.emb_dim, num_classes, num_rows, 1)
    else:
        bank = heads.new_heads(cfg, state["log_prior"].shape[1])
    bank.load_state_dict(state, strict=True)
    return bank
