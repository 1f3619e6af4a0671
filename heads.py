"""Heads on an encoder's features: a bank of G heads that train together, and what they predict.

    bank = start(cfg, seed, train, 4)           # Heads as training begins: a closed-form solution
    state = refit(cfg, seed, settings, train, val, 4)    # that solution, also on validation
    logits = bank(features)                     # (B, C), or tokens (B, T, C) -> (G, B, 4)
    optimizer = Optimizer(cfg, bank, encoder)   # AdamW with G learning rates and weight decays
    p = predict(bank, x)                        # (G, volumes, 4)
    by_unit(samples, p)                         # averaged over the volumes of a participant

A plain probe and fine-tuning are G = 1; a sweep has a head for every combination of settings. Each
head becomes what it would be alone. To write another head, change Heads: whatever maps x to
(G, B, num_classes) and stacks its parameters (G, ...) trains, is saved and is scored. Needs torch
alone.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import losses
import model
from discriminant import discriminant, ordinal


class Heads(nn.Module):
    """G heads: features (B, C), or tokens (B, T, C) where attentive -> logits (G, B, num_classes).

    Standardise, pool the tokens (attentive), one hidden layer (hidden > 0), dropout, linear.
    `settings` has a dict for each head: loss, ordinal, class_weights, lr_head, weight_decay.
    log_prior (G, num_classes) is subtracted from the logits except while training; zeros unless the
    loss asks for it.
    """

    def __init__(self, dim, num_classes, settings=({},), hidden=0, dropout=0.0, attentive=False):
        super().__init__()
        self.settings, self.dropout, self.left_out = list(settings), dropout, {}
        num_heads = len(self.settings)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("log_prior", torch.zeros(num_heads, num_classes))
        layers = [nn.Linear(dim, hidden)] if hidden else []
        layers.append(nn.Linear(hidden or dim, num_classes))
        for layer in layers:  # as DINOv2's and V-JEPA's probes: start near uniform answers
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

        def stacked(parameter):  # every head starts alike
            return nn.Parameter(parameter.detach().repeat(num_heads, *[1] * parameter.ndim))

        self.query = self.hidden_weight = self.hidden_bias = None
        if attentive:  # (G, C / 64, C); zeros weight all tokens alike
            self.query = stacked(torch.zeros(dim // model.HEAD_DIM, dim))
        if hidden:
            self.hidden_weight, self.hidden_bias = map(stacked, layers[0].parameters())
        self.weight, self.bias = map(stacked, layers[-1].parameters())

    def features(self, x):
        """What the last layer sees: (B, C), the same for every head, or (G, B, hidden or C)."""
        # linear probes need the training features' statistics (MAE: BatchNorm without affine)
        x = (x - self.mean) / self.std
        if self.query is not None:
            x = attentive_pool(x, self.query)  # (B, T, C) -> (G, B, C)
        if self.hidden_weight is not None:
            x = F.gelu(linear(x, self.hidden_weight, self.hidden_bias))  # (G, B, hidden)
        return x

    def forward(self, x, noise=None):
        """noise: the step's model.Noise, from which dropout's mask is drawn, the same for every
        head."""
        inputs, x = x, self.features(x)
        if self.training and self.dropout:
            noise = noise or model.any_noise(inputs)
            x = x * noise.keep(self.dropout, x.shape[-1:], layer=-1).to(x.device, x.dtype)
        logits = linear(x, self.weight, self.bias)  # (G, B, num_classes)
        return logits if self.training else logits - self.log_prior[:, None]

    def row_losses(self, logits, targets):
        """Logits (G, B, num_classes), targets (B,) -> the loss of every row by each head's own loss
        (G, B)."""
        parts = []
        for name, heads in equal_runs([h["loss"] for h in self.settings]):
            some = logits[heads]  # (g, B, num_classes)
            targets_of_all = targets.repeat(len(some))  # (g * B,)
            rows = losses.LOSSES[name](some.flatten(0, 1), targets_of_all, self.drawn_log_prior)
            parts.append(rows.view(len(some), -1))
        return torch.cat(parts)

    @torch.no_grad()
    def share_direction(self):
        """Make the last layer of the ordinal heads w (k - mean k) for class k: adjacent-category
        logits (Agresti 2010)."""
        for is_ordinal, heads in equal_runs([h["ordinal"] for h in self.settings]):
            if is_ordinal:
                self.weight[heads] = ordinal(self.weight[heads])

    def one(self, g):
        """State of head g alone, as a checkpoint holds it."""
        state = {name: v[g : g + 1].clone() for name, v in self.state_dict().items()}
        return state | {"mean": self.mean, "std": self.std}  # these are the same for all heads


def linear(x, weight, bias):
    """x (B, C), the same for every head, or (G, B, C); weight (G, out, C), bias (G, out) -> (G, B,
    out)."""
    if x.ndim == 2:  # one matrix product for all heads
        x = F.linear(x, weight.flatten(0, 1), bias.flatten())  # (B, G * out)
        return x.unflatten(1, bias.shape).transpose(0, 1)
    return torch.baddbmm(bias[:, None], x, weight.mT)


def attentive_pool(x, query):
    """Tokens (B, T, C), query (G, heads, C) -> (G, B, C): each of C / 64 queries weights the tokens
    and fills its 64 channels of their mean.

    A cross-attention whose key projection is folded into the queries, with no other projections
    (efficient probing, Psomas et al. 2025, arXiv 2506.10178): so few parameters suit few
    participants.
    """
    weights = torch.einsum("btc,ghc->gbht", x, query / model.HEAD_DIM**0.5).softmax(dim=-1)
    values = x.unflatten(2, (-1, model.HEAD_DIM))  # (B, T, C) -> (B, T, heads, 64)
    pooled = torch.einsum("gbht,bthk->gbhk", weights, values)  # (G, B, heads, 64)
    return pooled.flatten(-2)  # (G, B, C)


def equal_runs(values):
    """[a, a, b] -> [(a, slice(0, 2)), (b, slice(2, 3))]: heads that lie side by side are a view,
    without a copy."""
    ends = list(itertools.accumulate(len(list(same)) for _, same in itertools.groupby(values)))
    return [(values[start], slice(start, end)) for start, end in zip([0, *ends], ends)]


# ------------------------------------------------------------------------- where training starts


def settings_of(cfg):
    """train.sweep -> the settings of every head: all combinations, and what is not swept as the
    config has it."""
    names = "loss", "ordinal", "class_weights", "lr_head", "weight_decay"
    given = vars(cfg.train) | vars(cfg.model.head)
    tried = [getattr(cfg.train.sweep, name) or [given[name]] for name in names]
    return [dict(zip(names, values)) for values in itertools.product(*tried)]


def statistics(rows):
    """Mean and standard deviation (C,) of features (n, C), by which a head standardises them."""
    return rows.mean(dim=0), (rows.var(dim=0, unbiased=False) + 1e-6).sqrt()


def start(cfg, seed, train, num_classes, settings=None):
    """The bank as training begins, from training's Features: standardisation, and the last layer in
    closed form. settings: of every head; None: `settings_of` the config.

    bank.class_weights (G, num_classes) and bank.drawn_log_prior (num_classes,), what the losses
    need, are not saved. Neither is bank.left_out {is_ordinal: logits}, for `left_out`.
    """
    # here, for loading volumes draws random numbers, and a full cache would not
    torch.manual_seed(seed)
    bank = new_heads(cfg, num_classes, settings or settings_of(cfg))
    # (volumes, views, C) or (volumes, views, T, C) -> (rows, C)
    bank.mean, bank.std = statistics(train.views.flatten(0, -2))
    of_units = list(train.units.values())
    weights = [
        losses.class_weights(of_units, num_classes, h["class_weights"]) for h in bank.settings
    ]
    counts = train.labels.bincount(minlength=num_classes)
    counts = counts if cfg.data.sampler == "shuffle" else torch.ones(num_classes)
    bank.register_buffer("class_weights", torch.stack(weights), persistent=False)
    bank.register_buffer("drawn_log_prior", (counts / counts.sum()).log(), persistent=False)

    with torch.no_grad():
        # before any head is written: an MLP starts from the random weights of the first
        kinds = {h["ordinal"] for h in bank.settings}
        solutions = {is_ordinal: last_layer(bank, train, is_ordinal) for is_ordinal in kinds}
        bank.left_out = {kind: logits for kind, (_, _, logits) in solutions.items()}
        for g, h in enumerate(bank.settings):
            bank.weight[g], bias, _ = solutions[h["ordinal"]]
            bank.bias[g] = bias + best_constant(bank.drawn_log_prior, weights[g], h["loss"])
            if h["loss"] == "logit_adjustment":
                bank.log_prior[g] = bank.drawn_log_prior
    return bank


def new_heads(cfg, num_classes, settings=({},)):
    head, attentive = cfg.model.head, cfg.model.pool_method == "attentive"
    width = cfg.model.emb_dim
    return Heads(width, num_classes, settings, head.hidden, head.dropout, attentive)


def left_out(bank, g, samples):
    """The Predictions of training's units by head g as it starts, each by the head without its
    participant; None where it starts from no solution in closed form."""
    h = bank.settings[g]
    logits = bank.left_out.get(h.get("ordinal"))
    if logits is None:
        return None
    parts = bank.drawn_log_prior, bank.class_weights[g], bank.log_prior[g]
    drawn_log_prior, class_weights, log_prior = (part.cpu() for part in parts)
    constant = best_constant(drawn_log_prior, class_weights, h["loss"]) - log_prior
    p = (logits + constant).double().softmax(dim=1)  # (volumes, num_classes)
    return by_unit(samples, p.numpy())


def last_layer(bank, train, is_ordinal):
    """Weight (num_classes, C) and bias (num_classes,) that the last layer starts from, and the
    left-out logits of the volumes (volumes, num_classes): `discriminant` of what it sees.

    An MLP's stay random: on its small random hidden units, the solution would need huge weights.
    """
    if bank.hidden_weight is not None:
        weight, bias = bank.weight[0].clone(), bank.bias[0].clone()  # the caller writes to these
        return (ordinal(weight) if is_ordinal else weight), bias, None
    views, num_classes = train.views.shape[1], bank.weight.shape[1]
    x = (train.views.flatten(0, 1) - bank.mean) / bank.std  # (volumes * views, C) or (..., T, C)
    if bank.query is not None:
        x = x.mean(dim=1)  # what queries of zero pool: (volumes * views, C)
    people = [s.participant_id for s in train.samples]
    number_of = {participant: n for n, participant in enumerate(dict.fromkeys(people))}
    participants = torch.tensor([number_of[participant] for participant in people])
    labels, participants = (v.repeat_interleave(views) for v in (train.labels, participants))
    weight, bias, logits = discriminant(x, labels, participants, num_classes, is_ordinal)
    return weight, bias, logits[::views]  # of the volumes as they are


def refit(cfg, seed, settings, train, val, num_classes):
    """State of a head of these settings in closed form, on the Features of train and val, as `one`
    has it."""
    return start(cfg, seed, train.with_others(val), num_classes, [settings]).one(0)


def best_constant(log_prior, class_weights, loss):
    """Logits (num_classes,) of the best answer that looks at nothing, as losses.LOSSES[loss] and
    the class weights see it.

    The last bias starts with it (Lin et al. 2017, section 4.1): otherwise a slow head has not
    learned the prior yet when logit adjustment takes it away.
    """
    logits = (log_prior.exp() * class_weights).clamp(min=1e-3).log()
    if loss == "balanced_softmax":
        logits = logits - log_prior.clamp(min=math.log(1e-3))
    return logits - logits.mean()


# ------------------------------------------------------------------------------------ optimizer


class Optimizer:
    """AdamW over a bank of heads, each with its own learning rate and weight decay, and over the
    encoder (None: frozen) that trains with a single head.

    torch's AdamW has one learning rate for a parameter, and here a parameter holds G heads. So
    AdamW takes a step of learning rate 1 into `directions`, and each head scales its part of them
    by its own learning rate. Biases do not decay.
    """

    def __init__(self, cfg, bank, encoder):
        self.bank, self.heads = bank, list(bank.parameters())
        self.directions = [torch.zeros_like(p) for p in self.heads]
        # (G,) on the host: what is sent anew in each step is no constant that XLA would compile in
        self.rates = torch.tensor([h["lr_head"] for h in bank.settings])
        self.decays = torch.tensor([h["weight_decay"] for h in bank.settings])
        self.is_xla = bank.weight.device.type == "xla"
        fused = bank.weight.device.type in ("cpu", "cuda") or None
        groups = [{"params": self.directions, "lr": 1.0, "weight_decay": 0.0, "fused": fused}]
        if encoder:
            rates = cfg.train.lr_encoder, cfg.train.layer_decay
            groups += model.parameter_groups(encoder, *rates, cfg.train.weight_decay)
        # capturable: the numbers that change from step to step are computed on the device
        self.adamw = torch.optim.AdamW(groups, capturable=self.is_xla)

    def trained(self):
        """The parameters that get a gradient now."""
        encoder = [
            p for group in self.adamw.param_groups[1:] for p in group["params"] if p.requires_grad
        ]
        return [*self.heads, *encoder]

    @torch.no_grad()
    def prepare(self):
        """On XLA: zeros for the gradients and moments of what trains from now on. AdamW would make
        them within the first step, which would be another program than all later ones."""
        if not self.is_xla:
            return
        for p in self.trained():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
                # A step changes a parameter in two ways that are no values and yet part of the next
                # program's key: its views (weight.t()) are made anew at each use, and torch_xla
                # forgets the type it was declared with. This does the same before the first step.
                p.addcmul_(p.grad, p.grad)
        for group in self.adamw.param_groups:
            for p in group["params"]:
                is_head = group is self.adamw.param_groups[0]
                if (is_head or p.requires_grad) and p not in self.adamw.state:
                    # equal tensors without an axis would be one input of the program
                    step = torch.zeros(1, device=p.device)
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.adamw.state[p] = {"step": step, **moments}

    def load(self, state):
        """Go on from the state_dict of an AdamW on any backend. ValueError if it does not fit."""
        names = ("fused", "capturable")  # how this backend computes a step, whatever another did
        own = [{name: group[name] for name in names} for group in self.adamw.param_groups]
        groups = [saved | flags for saved, flags in zip(state["param_groups"], own, strict=True)]
        self.adamw.load_state_dict(state | {"param_groups": groups})
        for kept in self.adamw.state.values():
            # as `prepare` makes them
            kept["step"] = kept["step"].reshape([1] if self.is_xla else [])

    @torch.no_grad()
    def clip(self, most):
        """Scale the gradients down to a norm of at most `most` (0: any), each head by itself ->
        their norms before (G,)."""
        encoder = self.trained()[len(self.heads) :]
        norms = [
            torch.linalg.vector_norm(p.grad.flatten(1), dim=1) for p in self.heads
        ]  # (G,) each
        norms += [torch.linalg.vector_norm(p.grad).expand(len(self.rates)) for p in encoder]
        norm = torch.stack(norms).norm(dim=0)  # (G,)
        if most:
            factor = (most / (norm + 1e-6)).clamp(max=1)
            for p in self.heads:
                p.grad.mul_(per_head(factor, p))
            for p in encoder:
                p.grad.mul_(factor[0])
        return norm

    @torch.no_grad()
    def step(self, head_factor, encoder_factor):
        """A step at these shares of the learning rates; gradients are zeros afterwards."""
        groups = self.adamw.param_groups[1:]
        rates = [group["peak"] * encoder_factor for group in groups]
        if self.is_xla:
            # As numbers, those that are equal once rounded would be one input of XLA's program:
            # which are, changes as the rates fall, and each time it would be compiled anew.
            rates = torch.tensor(rates).to(self.bank.weight.device)
        for group, rate in zip(groups, rates):
            group["lr"] = rate
        for direction, p in zip(self.directions, self.heads):
            direction.zero_()
            direction.grad = p.grad.contiguous()  # the fused kernel reads nothing else rightly
        self.adamw.step()
        rates = self.rates * head_factor
        for direction, p in zip(self.directions, self.heads):
            kept = 1 - rates * self.decays if p.ndim > 2 else torch.ones_like(rates)  # (G,)
            p.mul_(per_head(kept, p)).addcmul_(direction, per_head(rates, p))
        self.bank.share_direction()
        for p in self.trained():
            p.grad.zero_()


def per_head(values, parameter):
    """values (G,) -> (G, 1, ...), to be multiplied with a parameter (G, ...) on its device."""
    return values.to(parameter.device).view(-1, *[1] * (parameter.ndim - 1))


# ---------------------------------------------------------------------------------- predictions


@dataclass
class Predictions:
    """Probabilities of units (data.unit): ids (n,), y_true (n,), p (n, num_classes), or (G, n,
    num_classes) of G heads; participants (n,), whose each unit is: the ids themselves, where a unit
    is a participant."""

    ids: list
    y_true: np.ndarray
    p: np.ndarray
    participants: list = None

    def __post_init__(self):
        self.participants = self.participants or self.ids

    def of_head(self, g):
        return Predictions(self.ids, self.y_true, self.p[g], self.participants)


def predict(bank, x):
    """Class probabilities (G, volumes, num_classes) of features x (volumes, C) or tokens (volumes,
    T, C), as numpy."""
    bank.eval()
    with torch.no_grad():
        return torch.softmax(bank(x).float().cpu().double(), dim=-1).numpy()


def by_unit(samples, probabilities):
    """Mean probability over the volumes of a unit (a participant, or what data.unit says), (...,
    volumes, num_classes) -> Predictions, units in order."""
    first = {}
    for sample in samples:
        first.setdefault(sample.unit, sample)
    number_of = {unit: n for n, unit in enumerate(first)}
    rows = [number_of[sample.unit] for sample in samples]
    p = np.moveaxis(probabilities, -2, 0)  # (volumes, ..., num_classes)
    sums = np.zeros((len(first), *p.shape[1:]))
    np.add.at(sums, rows, p)
    means = sums / np.bincount(rows).reshape(-1, *[1] * (p.ndim - 1))
    labels, participants = zip(*((s.label, s.participant_id) for s in first.values()))
    return Predictions(list(first), np.array(labels), np.moveaxis(means, 0, -2), list(participants))
