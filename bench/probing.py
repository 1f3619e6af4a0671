"""Heads on features: what they learn, and what many of them cost.

    .venv/bin/python bench/probing.py learn                  # ten minutes on two cores
    .venv/bin/python bench/probing.py learn --rows 20000     # hours
    .venv/bin/python bench/probing.py alarms                 # half an hour
    .venv/bin/python bench/probing.py sweep                  # two minutes
    .venv/bin/python bench/probing.py finetune               # 15 minutes; --seeds 1 2 3 4 5

learn: how far from chance to the best possible balanced accuracy the head that configs/probe.yaml's
sweep chooses comes (by log-loss, the same refitted on validation too, and by balanced accuracy),
beside scikit-learn's class-balanced LogisticRegression, whose C the same validation chooses by
log-loss; and the log-loss of each, beside ln 4 = 1.386 of equal chances. Gaussian features of unit
variance; the class means lie along one hidden direction, spread evenly over all features. Training
(743) has AI-READI's classes, validation (159) and test (20,000) have them evenly.
alarms: how often the alarms about training are raised, of heads that are what they should be.
sweep: 64 heads x 50 epochs on 743 x 768 features at once, against plain torch, one after the other;
and the demo's probe, encoding and 50 epochs of 24 heads, against its encoding alone.
finetune: probe or fine-tune, and which correction of the imbalance? On the boosted phantom's test
split, mean ± SD over seeds.
"""

import copy
import functools
import itertools
import json
import math
import tempfile
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from measure import bench, figure, row, script, timed
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss

import config
import features
import heads
import ledger
import metrics
import phantom
import references
import repeats
import runs
import settings
import train

SHARES = np.array([290, 162, 233, 58])


def draw(means, dim, rows, seed):
    """-> train, val, test, each (x float32 (n, dim), y (n,))."""
    rng = np.random.default_rng(seed)
    direction, means = rng.choice([-1, 1], dim) / np.sqrt(dim), np.array(means)
    counts = (SHARES * rows / SHARES.sum()).round().astype(int)
    labels = np.repeat(np.arange(4), counts), rng.integers(0, 4, 159), rng.integers(0, 4, 20_000)
    noise = lambda y: rng.standard_normal((len(y), dim))
    return [((noise(y) + means[y][:, None] * direction).astype(np.float32), y) for y in labels]


def features_of(x, y, split="train"):
    """x (n, dim), y (n,) -> features.Features of as many participants of the split, with one volume
    each."""
    ids = [f"{split} {i}" for i in range(len(y))]
    samples = [
        SimpleNamespace(participant_id=name, unit=name, label=int(k)) for name, k in zip(ids, y)
    ]
    return features.Features(samples, torch.as_tensor(x))


def best_possible(means):
    """Bayes balanced accuracy: the nearest mean along the direction."""
    rng, means = np.random.default_rng(0), np.array(means)
    y = rng.integers(0, 4, 2_000_000)
    x = rng.standard_normal(len(y)) + means[y]
    return balanced_accuracy_score(y, np.abs(x[:, None] - means).argmin(axis=1))


def both_scores(y, p):
    """Balanced accuracy and log-loss of probabilities p (n, 4)."""
    return balanced_accuracy_score(y, p.argmax(axis=1)), log_loss(y, p, labels=range(4))


def logistic(train_xy, val, test, seed):
    """Test scores of the C that validation chooses, by log-loss."""
    tried = []
    for C in np.logspace(-6, 5, 23):
        fitted = LogisticRegression(C=C, class_weight="balanced", max_iter=300).fit(*train_xy)
        p = fitted.predict_proba(val[0])
        accuracy = balanced_accuracy_score(val[1], p.argmax(axis=1))
        tried.append((-log_loss(val[1], p, labels=range(4)), accuracy, C, fitted))
    return both_scores(test[1], max(tried)[3].predict_proba(test[0]))


def swept(choose_by, train_xy, val, test, seed):
    """Test scores of the head that configs/probe.yaml's sweep chooses, and of the same refitted on
    validation too where it takes no steps."""
    width = test[0].shape[1]
    rule = f"train.choose_by={choose_by}"
    cfg = config.load("configs/probe.yaml", [f"seed={seed}", f"model.emb_dim={width}", rule])
    parts = features_of(*train_xy), features_of(*val, "val")
    fit = functools.partial(train.fit, dev=torch.device("cpu"))
    _, fitted = timed(repeats.fit_and_refit, fit, cfg, seed, *parts)
    states = fitted.head.state_dict(), runs.head_of(fitted.states, "test")
    banks = [references.load(state, cfg) for state in states]
    return [
        both_scores(test[1], heads.predict(bank, torch.from_numpy(test[0]))[0]) for bank in banks
    ]


def learn(rows=(743,), features=(64, 768), seeds=10):
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)  # as repeats.fit_all does
    for means, number, dim in itertools.product(
        ((0, 0.4, 1, 1.6), (0, 0.2, 0.5, 0.8)), rows, features
    ):
        bayes, scores = best_possible(means), []
        for seed in range(seeds):
            parts = *draw(means, dim, number, seed), seed
            chosen, refitted = swept("log_loss", *parts)
            old, _ = swept("balanced_accuracy", *parts)
            scores.append([logistic(*parts), old, chosen, refitted])
        accuracies, losses = np.mean(scores, axis=0).T
        shares = (accuracies - 0.25) / (bayes - 0.25)
        name = (
            f"means {'/'.join(map(str, means))} (Bayes {bayes:.3f}), {dim} features, {number} rows"
        )
        ways = "LogisticRegression", "the sweep by balanced accuracy", "the sweep", "refitted"
        for way, share, loss in zip(ways, shares, losses):
            at_least = shares[0] if way in ("the sweep", "refitted") else None
            figure(f"{name}: {way}", share, at_least=at_least)
            figure(f"{name}: {way}, log-loss below ln 4 by", math.log(4) - loss)


def alarms(people=(743, 139), features=(64, 768), times=40):
    """At most 5 % of healthy heads raise an alarm of training; the old rule (training more than 0.2
    above validation) stands beside. The last figure is of validation without any effect."""
    torch.set_num_threads(1)
    names = "gap", "below chance", "0.2 above"
    truths = {"no effect": (0, 0, 0, 0), "weak": (0, 0.2, 0.5, 0.8), "strong": (0, 0.4, 1, 1.6)}
    truths["very strong"] = (0, 1.5, 3, 4.5)
    for number, dim, (truth, means) in itertools.product(people, features, truths.items()):
        found = [raised(means, dim, number, seed) for seed in range(times)]
        case = f"{truth}, {dim} features, {number} participants"
        for name, share in zip(names, np.mean(found, axis=0)):
            at_most = 0.05 + 1.65 * math.sqrt(0.05 * 0.95 / times)  # by chance, one time in 20
            figure(f"{case}: {name}", share, at_most=None if name == "0.2 above" else at_most)
    sick = [raised((0, 1.5, 3, 4.5), 64, 743, seed, unlike=True)[0] for seed in range(times)]
    figure("very strong, validation without effect: gap", np.mean(sick), at_least=0.95)


def raised(means, dim, number, seed, unlike=False):
    """Does the head of two, an ordinal and a free one, that validation chooses raise each alarm?
    unlike: validation's features tell nothing."""
    train_xy, (x_val, y_val), _ = draw(means, dim, number, seed)
    few = round(159 * number / 743)
    if unlike:
        x_val = np.random.default_rng(seed).standard_normal(x_val.shape).astype(np.float32)
    few_heads = "train.sweep.lr_head=[0.0001]", "train.sweep.weight_decay=[1]", "train.epochs=5"
    cfg = config.load("configs/probe.yaml", [f"model.emb_dim={dim}", *few_heads])
    parts = features_of(*train_xy), features_of(x_val[:few], y_val[:few], "val")
    _, fitted = timed(train.fit, cfg, seed, *parts, torch.device("cpu"))
    tables, val = fitted.training, fitted.predictions
    validation = metrics.confusion(val.y_true, val.p.argmax(axis=1), val.p.shape[1])
    trained = fitted.best_record["train/balanced_accuracy"]
    return (
        bool(metrics.gap_alarm(tables["left_out"], validation)),
        bool(metrics.below_chance(np.array(tables["trained"]))),
        trained - fitted.best["val_balanced_accuracy"] > 0.2,
    )


def one_after_the_other(settings, x, y, x_val, y_val):
    """The same heads as plain torch trains them: AdamW, warm-up and cosine, batches of 32, class
    weights, the epoch that is best on validation kept."""
    mean, std, weights = x.mean(dim=0), x.std(dim=0), len(y) / (4 * y.bincount())
    x, x_val, kept = (x - mean) / std, (x_val - mean) / std, []
    steps = 50 * -(-len(x) // 32)
    share = lambda n: min((n + 1) / (steps / 10), 0.5 + 0.5 * math.cos(math.pi * n / steps))
    for setting in settings:
        torch.manual_seed(0)
        head = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(x.shape[1], 4))
        rate, decay, best = setting["lr_head"], setting["weight_decay"], None
        optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=decay)
        for epoch in range(50):
            head.train()
            for n, batch in enumerate(torch.randperm(len(x)).split(32), epoch * steps // 50):
                optimizer.param_groups[0]["lr"] = rate * share(n)
                optimizer.zero_grad()
                F.cross_entropy(head(x[batch]), y[batch], weight=weights).backward()
                optimizer.step()
            head.eval()
            with torch.no_grad():
                logits = head(x_val)
                right = (logits.argmax(dim=1) == y_val).double()
                recall = right @ F.one_hot(y_val, 4).double() / y_val.bincount()
                now = recall.mean().item(), -F.cross_entropy(logits, y_val).item()
            if best is None or now > best:
                best, state = now, copy.deepcopy(head.state_dict())
        kept.append(state)
    return kept


def sweep():
    xy, val, _ = draw((0, 0.4, 1, 1.6), 768, 743, 0)
    rates = "train.sweep.lr_head=[0.0001,0.0003,0.001,0.003,0.01,0.02,0.05,0.1]"
    decays = "train.sweep.weight_decay=[0.001,0.01,0.03,0.1,0.3,1,3,10]"
    rest = "train.sweep.ordinal=null", "train.early_stopping.enabled=false"
    cfg = config.load("configs/probe.yaml", [rates, decays, *rest])
    torch.set_num_threads(1)  # the fastest for both
    parts, dev = (features_of(*xy), features_of(*val, "val")), torch.device("cpu")
    at_once = timed(train.fit, cfg, 0, *parts, dev)[0]
    tensors = [torch.from_numpy(values) for values in (*xy, *val)]
    in_turn = timed(one_after_the_other, heads.settings_of(cfg), *tensors)[0]
    figure("64 heads at once: times faster than in turn", in_turn / at_once, at_least=15)

    def encode():
        book, encoder = ledger.read(cfg), features.open_encoder(cfg)
        features.encode(cfg, book, book.of("train") + book.of("val"), encoder, dev)

    with tempfile.TemporaryDirectory() as folder:
        paths = [f"paths.run_dir={folder}/run", f"paths.cache_dir={folder}/cache"]
        cfg = config.load("configs/demo.yaml", paths)
        timed(phantom.prepare, cfg)
        alone = timed(encode)[0]
        cfg.paths.cache_dir = f"{folder}/another"
        whole = timed(train.main, 0, cfg)[0]
    figure("the demo's probe: time, against its encoding alone", whole / alone, at_most=1.1)


PROBE = "--config configs/demo.yaml train.sweep=null train.class_weights="
WAYS = {
    "linear probe, uniform loss": PROBE + "none",
    "linear probe, balanced weights": PROBE + "auto",
    "linear probe, stratified sampling": PROBE + "none data.sampler=stratified",
    "fine-tuned, balanced weights": "--config configs/demo.yaml --config configs/finetune.yaml",
}


def train_and_evaluate(folder, arguments, seed):
    """-> eval_test.json."""
    run = f"{folder}/{seed}"
    list(script("train.py", *arguments.split(), f"seed={seed}", f"paths.run_dir={run}"))
    list(script("eval.py", "--ckpt", run, "--split", "test"))
    with open(f"{run}/eval_test.json", encoding="utf-8") as f:
        return json.load(f)


def finetune(seeds=(1, 2, 3)):
    spread = lambda values: f"{np.mean(values):.3f} ± {np.std(values, ddof=len(seeds) > 1):.3f}"
    names = (
        "balanced accuracy",
        "macro F1",
        *(f"F1 {name}" for name in settings.class_names(config.load("configs/demo.yaml"))),
    )
    row("on test", *names, "above chance")
    for name, arguments in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = [train_and_evaluate(folder, arguments, seed) for seed in seeds]
        above = sum(r["balanced_accuracy"] > r["chance_band"][1] for r in found)
        scores = [(r["balanced_accuracy"], r["macro_f1"], *r["f1_per_class"]) for r in found]
        row(name, *map(spread, zip(*scores)), f"{above} of {len(seeds)}")
    (low, high), majority = found[-1]["chance_band"], found[-1]["majority"]
    row("majority class", f"{majority['balanced_accuracy']:.3f}", f"{majority['macro_f1']:.3f}")
    row("chance band", f"{low:.3f} to {high:.3f}")


if __name__ == "__main__":
    bench(__doc__, learn=learn, alarms=alarms, sweep=sweep, finetune=finetune)
