"""Attentive heads on cached tokens, the references, repeats over seeds and folds, losses under a prior shift, make sweep."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, settings
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.neighbors import KNeighborsClassifier
from test_train import read_predictions, read_run

import config
import data
import eval as evaluation
import losses
import metrics
import model
import train

sys.path.insert(0, os.path.join(ROOT, "bench"))
import heads as gaussians  # noqa: E402

ATTENTIVE = ["model.pool_method=attentive", "model.token_grid=[2,2,2]"]


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def features_of(cfg, split):
    ledger = data.read_ledger(cfg)
    samples, x = evaluation.features(cfg, ledger, ledger.of(split), *evaluation.open_encoder(cfg), torch.device("cpu"))
    return x.numpy().astype(np.float64), np.array([s.label for s in samples]), samples


# ------------------------------------------------------------------------------------------------------ attentive pooling


def test_attentive_pooling_is_cross_attention_without_other_projections():
    torch.manual_seed(0)
    B, T, C = 3, 10, 128
    x, pool, reference = torch.randn(B, T, C), model.AttentivePool(C), torch.nn.MultiheadAttention(C, C // 64, bias=False, batch_first=True)
    assert torch.allclose(pool(x), x.mean(dim=1), atol=1e-6)  # zero queries look everywhere alike
    q, key = torch.randn(C), torch.randn(C, C)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([torch.eye(C), key, torch.eye(C)]))
        reference.out_proj.weight.copy_(torch.eye(C))
        for h in range(C // 64):  # q_h . (K_h x) = (K_h^T q_h) . x
            pool.query[h] = key[64 * h:64 * (h + 1)].T @ q[64 * h:64 * (h + 1)]
        expected = reference(q.expand(B, 1, C), x, x)[0][:, 0]
        assert torch.allclose(pool(x), expected, atol=1e-5)
        many = torch.stack([pool.query, torch.zeros_like(pool.query)])
        assert torch.allclose(pool.look(x, many), torch.stack([expected, x.mean(dim=1)]), atol=1e-5)


@pytest.mark.parametrize("method", ["mean", "max"])
@pytest.mark.parametrize("shape, size", [((4, 6, 6), (2, 3, 2)), ((5, 3, 4), (2, 2, 3)), ((2, 2, 2), (2, 2, 2))])
def test_the_token_grid_pools_its_cells(shape, size, method):
    tokens = torch.randn(2, np.prod(shape), 8)
    pooled, cells = model.pool_grid(tokens, shape, size, method), tokens.view(2, *shape, 8)
    bounds = [[(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in zip(shape, size)]
    slow = []
    for z in bounds[0]:
        for y in bounds[1]:
            for x in bounds[2]:
                cell = cells[:, slice(*z), slice(*y), slice(*x)].flatten(1, 3)  # (2, tokens of the cell, 8)
                slow.append(cell.mean(dim=1) if method == "mean" else cell.amax(dim=1))
    assert torch.allclose(pooled, torch.stack(slow, dim=1), atol=1e-6)


def test_an_attentive_run_caches_its_tokens_and_says_their_room(written, configure, capsys, monkeypatch):
    cfg = configure(written, *ATTENTIVE)
    train.main(0, cfg)
    printed = capsys.readouterr().out
    number = len(data.read_ledger(cfg).of("train")) + len(data.read_ledger(cfg).of("val"))
    assert f"tokens: {number} volumes to encode, 8 x 128 float16 each" in printed and printed.index("tokens:") < printed.index("features:")
    kept = [os.path.join(folder, name) for folder, _, names in os.walk(f"{cfg.paths.cache_dir}/features") for name in names]
    assert len(kept) == number and all(np.load(path).dtype == np.float16 and np.load(path).shape == (8, 128) for path in kept)
    first = read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2]
    train.main(0, cfg)
    assert f"tokens: 0 volumes to encode" in capsys.readouterr().out
    assert np.array_equal(first, read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2])  # fresh or from the cache
    result, _ = evaluation.evaluate_run(cfg.paths.run_dir, "val")
    assert np.allclose(first, read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2], atol=1e-6)
    capsys.readouterr()
    train.main(0, configure(written, *ATTENTIVE, "model.token_pool=max"))  # other tokens
    assert f"tokens: {number} volumes to encode" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="no room for .* GB of tokens; set a smaller model.token_grid, or paths.cache_dir elsewhere"):
        train.main(0, configure(written, *ATTENTIVE, "model.token_grid=[2,2,1]"))
    with pytest.raises(ValueError, match=r"model.token_grid=\[4, 4, 5\] is finer than the encoder's tokens, \[4, 4, 4\]"):
        train.main(0, configure(written, *ATTENTIVE, "model.token_grid=[4,4,5]"))


def test_attentive_fine_tuning(written, configure):
    cfg = configure(written, *ATTENTIVE, "model.unfreeze_at_epoch=1", "train.epochs=3")
    train.main(0, cfg)
    before = read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2]
    evaluation.evaluate_run(cfg.paths.run_dir, "val")
    # tokens kept for eval are float16
    assert np.allclose(before, read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2], atol=2e-3)


def test_attention_finds_what_the_mean_drowns():
    """The class shows in one token of 27, wherever that is; a marker says where."""
    rng = np.random.default_rng(0)

    def draw(n):
        y, x = rng.integers(0, 4, n), rng.standard_normal((n, 27, 64)).astype(np.float32)
        place = rng.integers(0, 27, n)
        x[np.arange(n), place, 0] += 6
        x[np.arange(n), place, 1:5] += 4 * np.eye(4)[y]
        return torch.from_numpy(x), gaussians.samples(y)

    (x, train_samples), (x_val, val_samples) = draw(400), draw(200)
    best = {}
    for pooling in ("mean", "attentive"):
        files = [os.path.join(ROOT, "configs", f"{name}.yaml") for name in ("probe", *(["attentive"] if pooling == "attentive" else []))]
        cfg = config.load(files, ["model.emb_dim=64"])
        a, b = (x, x_val) if pooling == "attentive" else (x.mean(dim=1), x_val.mean(dim=1))
        best[pooling] = train.fit_heads(cfg, 0, a[:, None], train_samples, b, val_samples)[3][0]["val_balanced_accuracy"]
    assert best["mean"] < 0.5 and best["attentive"] > 0.9, best


# ------------------------------------------------------------------------------------- the references, against scikit-learn


def standardised(x, x_train):
    return (x - x_train.mean(axis=0)) / np.sqrt(x_train.var(axis=0) + 1e-6)


@pytest.mark.parametrize("is_ordinal", [False, True])
def test_a_head_starts_from_ridge_regression_judged_on_the_participants_left_out(is_ordinal):
    """Against scikit-learn's Ridge, fitted again without each participant."""
    rng = np.random.default_rng(0)
    people = rng.permutation(np.repeat(np.arange(30), rng.integers(1, 5, 30)))  # one to four volumes each
    y = rng.integers(0, 4, 30)[people]
    x = rng.standard_normal((len(y), 12)) @ rng.standard_normal((12, 12)) + 5
    x[:, :2] += y[:, None]
    x_, t = x - x.mean(axis=0), (y[:, None] if is_ordinal else np.eye(4)[y][:, 1:]).astype(float)
    t -= t.mean(axis=0)
    best = None
    for alpha in np.trace(x_.T @ x_) / 12 * np.logspace(-4, 4, 17):
        scores = np.zeros_like(t)
        for person in range(30):
            scores[people == person] = x_[people == person] @ Ridge(alpha=alpha, fit_intercept=False).fit(
                x_[people != person], t[people != person]).coef_.reshape(t.shape[1], -1).T
        error = ((t - scores) ** 2).sum()
        if best is None or error < best[0]:
            best = error, alpha, scores
    _, alpha, scores = best
    means = np.array([scores[y == k].mean(axis=0) for k in range(4)])
    deviations = scores - means[y]
    covariance = (sum(np.outer(d, d) for d in deviations) + 5 * sum(np.outer(s, s) for s in scores) / len(y)) / (len(y) + 5)
    along = x_ @ Ridge(alpha=alpha, fit_intercept=False).fit(x_, t).coef_.reshape(t.shape[1], -1).T  # (n, d)
    weight, bias = model.discriminant(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(people), 4, is_ordinal)
    logits = x @ weight.numpy().T + bias.numpy()
    if is_ordinal:  # one slope, borders between neighbours in the middle
        middle, slope = (means[1:] + means[:-1])[:, 0] / 2, np.polyfit(np.arange(4), means[:, 0] / covariance[0, 0], 1)[0]
        expected = slope * (along - middle)
    else:
        expected = np.diff([[-0.5 * (s - m) @ np.linalg.solve(covariance, s - m) for m in means] for s in along], axis=1)
    assert np.abs(np.diff(logits, axis=1) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("y, x", [([0] * 6, None), ([0, 0, 0, 2, 2, 2], None), ([0, 1, 2, 3, 0, 1], 1.0)],
                         ids=["one class", "two classes", "constant features"])
def test_a_start_from_little_is_finite(y, x):
    features = torch.full((6, 3), x) if x else torch.randn(6, 3)
    for is_ordinal in (False, True):
        weight, bias = model.discriminant(features, torch.tensor(y), torch.arange(6), 4, is_ordinal)
        assert torch.isfinite(weight).all() and torch.isfinite(bias).all() and (x is None or weight.abs().max() < 1e-6)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_knn_is_scikit_learns(k):
    rng = np.random.default_rng(k)
    x, y, new = rng.standard_normal((200, 16)), rng.integers(0, 4, 200), rng.standard_normal((50, 16))
    head = model.KNN(16, 4, 200).fit(torch.from_numpy(x).float(), torch.from_numpy(y), torch.ones(4), k)
    unit = lambda z: (lambda s: s / np.linalg.norm(s, axis=1, keepdims=True))(standardised(z, x))
    reference = KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07)).fit(unit(x), y)
    assert np.allclose(evaluation.predict(head, torch.from_numpy(new).float()), reference.predict_proba(unit(new)), atol=1e-4)
    weights = torch.tensor([1.0, 2, 3, 4])  # a class's votes count so much more
    weighted = evaluation.predict(head.fit(torch.from_numpy(x).float(), torch.from_numpy(y), weights, k), torch.from_numpy(new).float())
    expected = reference.predict_proba(unit(new)) * weights.numpy()
    assert np.allclose(weighted, expected / expected.sum(axis=1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("kind", ["knn", "logistic_regression"])
def test_a_reference_run_is_scikit_learn_on_the_features(written, configure, kind):
    cfg = configure(written, f"model.head.kind={kind}")
    train.main(0, cfg)
    (x, y, samples), (x_val, _, val) = features_of(cfg, "train"), features_of(cfg, "val")
    weights = losses.class_weights(list({s.participant_id: s.label for s in samples}.values()), 4, "auto").numpy()
    rows, scores = rows_of(f"{cfg.paths.run_dir}/sweep.csv"), []
    assert len(rows) == {"knn": 7, "logistic_regression": 45}[kind]
    for row in rows:
        z, z_val = standardised(x, x), standardised(x_val, x)
        if kind == "knn":
            z, z_val = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in (z, z_val))
            p = (KNeighborsClassifier(int(row["k"]), weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)).fit(z, y).predict_proba(z_val)
                 * weights)
            p /= p.sum(axis=1, keepdims=True)
        else:
            p = LogisticRegression(C=float(row["C"]), class_weight=dict(enumerate(weights)), max_iter=1000,
                                   tol=1e-6).fit(z, y).predict_proba(z_val)
        ids, y_val, p = evaluation.by_participant(val, p)
        scores.append((balanced_accuracy_score(y_val, p.argmax(axis=1)), -log_loss(y_val, p, labels=range(4))))
        # with next to no penalty on separable features, where the solver ends hangs on the last digit
        if kind == "knn" or float(row["C"]) < 100:
            assert float(row["val_balanced_accuracy"]) == pytest.approx(scores[-1][0])
            assert float(row["val_loss"]) == pytest.approx(-scores[-1][1], rel=1e-3)
    assert (scores[0][0] == max(accuracy for accuracy, _ in scores)
            and [row["chosen"] for row in rows] == ["True"] + ["False"] * (len(rows) - 1))
    before = read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")
    result, _ = evaluation.evaluate_run(cfg.paths.run_dir, "val")
    assert result["balanced_accuracy"] == pytest.approx(float(rows[0]["val_balanced_accuracy"]))
    assert np.allclose(before[2], read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv")[2], atol=1e-6)
    evaluation.evaluate_run(cfg.paths.run_dir, "test")


@pytest.mark.slow
@pytest.mark.parametrize("scheme, sk", [("none", None), ("auto", "balanced")])
def test_a_linear_head_at_its_optimum_is_logistic_regression(scheme, sk, monkeypatch):
    """Without penalty, for AdamW's decay is none that the loss knows."""
    (x, y), (x_val, y_val), _ = gaussians.draw((0, 0.4, 1, 1.6), 12, 743, 3)
    cfg = config.load(os.path.join(ROOT, "configs", "probe.yaml"), [
        "train.sweep=null", "model.emb_dim=12", "train.weight_decay=0", "model.head.dropout=0", "train.lr_head=0.03",
        "train.epochs=2000", "data.batch_size=743", "train.early_stopping.enabled=false", f"train.class_weights={scheme}"])
    calls = itertools.count()
    monkeypatch.setattr(metrics, "quick_scores", lambda y_true, p: ([float(next(calls))], [0.0]))  # the last epoch is to be kept
    X, X_val = torch.from_numpy(x), torch.from_numpy(x_val)
    head = train.fit_heads(cfg, 0, X[:, None], gaussians.samples(y), X_val, gaussians.samples(y_val))[0]
    reference = LogisticRegression(C=np.inf, class_weight=sk, max_iter=5000, tol=1e-8).fit(x, y)
    weights = losses.class_weights(y, 4, scheme).numpy()[y]
    for X_, x_, y_, w in ((X, x, y, weights), (X_val, x_val, y_val, None)):
        assert abs(log_loss(y_, evaluation.predict(head, X_), sample_weight=w)
                   - log_loss(y_, reference.predict_proba(x_), sample_weight=w)) < 1e-3


# -------------------------------------------------------------------------------------------- repeats over seeds and folds


def test_seeds_are_the_runs_that_they_would_be_alone(written, configure, tmp_path, capsys):
    cfg = configure(written, "train.seeds=[5,6,7]", "train.sweep.lr_head=[0.003,0.03]")
    train.main(0, cfg)
    printed, scores = capsys.readouterr().out, {"val": [], "test": []}
    rows = rows_of(f"{cfg.paths.run_dir}/sweep.csv")
    assert [row["seed"] for row in rows] == ["5", "5", "6", "6", "7", "7"] and sum(row["chosen"] == "True" for row in rows) == 3
    for seed in (5, 6, 7):
        alone = configure(written, f"seed={seed}", "train.sweep.lr_head=[0.003,0.03]", f"paths.run_dir={tmp_path}/alone{seed}")
        train.main(0, alone)
        for split in scores:
            scores[split].append(evaluation.evaluate_run(alone.paths.run_dir, split)[0])
        if seed == 5:
            assert all(torch.equal(p, read_run(cfg)[1]["head"][name]) for name, p in read_run(alone)[1]["head"].items())
    accuracies = [score["balanced_accuracy"] for score in scores["val"]]
    assert f"over 3 seeds: val balanced accuracy {np.mean(accuracies):.3f} ± {np.std(accuracies, ddof=1):.3f}" in printed
    for split in scores:
        result, _ = evaluation.evaluate_run(cfg.paths.run_dir, split)
        assert result["seeds"]["seeds"] == [5, 6, 7] and result["balanced_accuracy"] == scores[split][0]["balanced_accuracy"]
        for name in ("balanced_accuracy", "log_loss"):
            values = [score[name] for score in scores[split]]
            spread = result["seeds"][name]
            assert (spread["each"] == pytest.approx(values) and spread["mean"] == pytest.approx(np.mean(values))
                    and spread["sd"] == pytest.approx(np.std(values, ddof=1)))


def test_cross_validation_holds_every_participant_out_once_and_never_touches_test(written, configure, capsys, monkeypatch):
    cfg = configure(written, "data.cv=3", "train.seeds=[1,2]")
    calls, tested = [], []
    fit, features = train.fit_heads, evaluation.features
    monkeypatch.setattr(train, "fit_heads", lambda cfg, seed, x_train, train_, x_val, val:
                        calls.append((train_, val)) or fit(cfg, seed, x_train, train_, x_val, val))
    monkeypatch.setattr(evaluation, "features", lambda cfg, ledger, samples, *more:
                        tested.extend(s for s in samples if s.split == "test") or features(cfg, ledger, samples, *more))
    train.main(0, cfg)
    ledger = data.read_ledger(cfg)
    everyone = {s.participant_id: s.label for s in ledger.of("train") + ledger.of("val")}
    assert not tested and len(calls) == 2 + 2 * 3  # the run's own, for each seed, and the folds
    held = []
    for trains, chooses in calls[2:]:
        trained, chose = ({s.participant_id for s in part} for part in (trains, chooses))
        held.append(set(everyone) - trained - chose)
        # with all their volumes
        assert (not trained & chose
                and len(trains) == sum(s.participant_id in trained for s in ledger.of("train") + ledger.of("val")))
        for label in range(4):  # every class spread over the folds
            number = sum(k == label for k in everyone.values())
            assert number // 3 <= sum(everyone[i] == label for i in held[-1]) <= -(-number // 3)
    assert (held[0] | held[1] | held[2] == held[3] | held[4] | held[5] == set(everyone)
            and sum(map(len, held)) == 2 * len(everyone) and held[:3] != held[3:])
    rows, (ids, y, p) = rows_of(f"{cfg.paths.run_dir}/cv.csv"), read_predictions(f"{cfg.paths.run_dir}/predictions_cv.csv")
    assert sorted(ids) == sorted(everyone) and [everyone[i] for i in ids] == y.tolist()
    for row, out in list(zip(rows, held))[:3]:  # predictions are the first seed's
        mine = [n for n, i in enumerate(ids) if i in out]
        assert (float(row["held_out_balanced_accuracy"]) == pytest.approx(balanced_accuracy_score(y[mine], p[mine].argmax(axis=1)))
                and int(row["participants"]) == len(out))
    assert (f"3-fold cross-validation, seed 1: balanced accuracy {balanced_accuracy_score(y, p.argmax(axis=1)):.3f} "
            f"on {len(everyone)} participants") in capsys.readouterr().out
    with pytest.raises(ValueError, match="data.cv=9 needs as many participants of every class in train and val"):
        train.main(0, configure(written, "data.cv=9"))


def test_cross_validation_trains_on_views_and_scores_without(written, configure, monkeypatch):
    cfg = configure(written, "data.cv=3", "data.augment.flip=true", "data.augment_views=2", "train.epochs=2")
    shapes = []
    fit = train.fit_heads
    monkeypatch.setattr(train, "fit_heads", lambda cfg, seed, x_train, train_, x_val, val:
                        shapes.append((x_train.shape[1], x_val.ndim)) or fit(cfg, seed, x_train, train_, x_val, val))
    train.main(0, cfg)
    assert shapes == [(3, 2)] * 4


def test_a_head_learns_nothing_of_whom_it_is_scored_on(written, configure):
    """With labels at random, cross-validation falls to chance; choosing on the held-out fold would not."""
    cfg = configure(written, "model.emb_dim=128", "train.epochs=20", "train.sweep.lr_head=[0.001,0.01,0.1]",
                    "train.sweep.weight_decay=[0.01,1]", "data.cv=3")
    rng, scores = np.random.default_rng(0), []
    for seed in range(6):
        y = rng.permutation(np.repeat(range(4), 40))
        samples = gaussians.samples(y)
        folds = train.cross_validate(cfg, [seed], torch.from_numpy(rng.standard_normal((160, 1, 128)).astype(np.float32)), samples)
        _, y_true, p = train.held_out(folds, seed)
        scores.append(balanced_accuracy_score(y_true, p.argmax(axis=1)))
    assert abs(np.mean(scores) - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 160 / 6), scores


@pytest.mark.parametrize("overrides, message", [
    (["train.seeds=[1,2]", "model.freeze_encoder=false"], "train.seeds and data.cv repeat the head, on the features of a frozen encoder"),
    (["data.cv=5", "model.unfreeze_at_epoch=1"], "train.seeds and data.cv repeat the head"),
    (["model.head.kind=knn", "model.head.hidden=8"], "model.head.hidden=8 means nothing to model.head.kind=knn"),
    (["model.head.kind=knn", "model.pool_method=attentive"], "model.pool_method=attentive means nothing to model.head.kind=knn"),
    (["model.head.kind=logistic_regression", "train.loss=focal"], "train.loss=focal means nothing to model.head.kind=logistic_regression"),
    (["model.head.kind=logistic_regression", "train.seeds=[1,2]"], r"train.seeds=\[1, 2\] means nothing to"),
    (["model.head.kind=knn", "train.sweep.lr_head=[1]"], "train.sweep means nothing to model.head.kind=knn"),
    (["model.head.kind=knn", "model.freeze_encoder=false"], "model.head.kind=knn is for the features of a frozen encoder"),
])
def test_what_means_nothing_is_refused(configure, overrides, message):
    with pytest.raises(ValueError, match=message):
        configure("/nowhere", *overrides)


# ------------------------------------------------------------------------------------------------------------ prior shift


@pytest.mark.slow
def test_what_corrects_the_imbalance_beats_what_does_not():
    """Trained on 39/22/31/8 %, tested balanced, 20 seeds."""
    tried = {"uniform": ("ce", "none"), "logit adjustment": ("logit_adjustment", "none"),
             "balanced softmax": ("balanced_softmax", "none"), "balanced weights": ("ce", "auto")}
    scores, collapsed = {name: [] for name in tried}, 0
    for seed in range(20):
        (x, y), (x_val, y_val), (x_test, y_test) = gaussians.draw((0, 0.4, 1, 1.6), 64, 743, seed)
        X, X_val = torch.from_numpy(x), torch.from_numpy(x_val)
        for name, (loss, weights) in tried.items():
            cfg = config.load(os.path.join(ROOT, "configs", "probe.yaml"), [
                "model.emb_dim=64", f"train.loss={loss}", f"train.class_weights={weights}", "train.sweep.weight_decay=[0.01,1]",
                "train.sweep.ordinal=[true]"])
            head = train.fit_heads(cfg, seed, X[:, None], gaussians.samples(y), X_val, gaussians.samples(y_val))[0]
            p = evaluation.predict(head, torch.from_numpy(x_test))
            scores[name].append(balanced_accuracy_score(y_test, p.argmax(axis=1)))
            if name == "uniform":  # what a study of 159 would see
                few = metrics.evaluate(y_test[:159], p[:159])
                collapsed += any(alarm.startswith("model collapse: class") and "never predicted" in alarm for alarm in few["alarms"])
    for name in list(tried)[1:]:
        wins = np.array(scores[name]) > np.array(scores["uniform"])
        assert wins.sum() >= 19, (name, scores)
    assert collapsed >= 19, collapsed


# ------------------------------------------------------------------------------------------------------------ make sweep


@pytest.mark.slow
def test_make_sweep_goes_on_after_a_failure_and_skips_what_is_finished(written, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for name in os.listdir(ROOT):
        if name.endswith((".py", ".txt")) or name == "Makefile":
            shutil.copy2(os.path.join(ROOT, name), work)
    shutil.copytree(os.path.join(ROOT, "configs"), work / "configs")
    os.symlink(os.path.join(ROOT, ".venv"), work / ".venv")
    mine = [s for s in settings(written, tmp_path) if not s.startswith(("paths.run_dir", "train.sweep"))]
    cfg = config.load(os.path.join(ROOT, "configs", "demo.yaml"), mine)
    for name, path in (("good", cfg.paths.checkpoint_path), ("broken", "/nowhere.pt")):
        cfg.paths.checkpoint_path = path
        (work / "configs" / f"{name}.yaml").write_text(json.dumps(config.to_dict(cfg)))
    sweep = lambda: subprocess.run(["make", "sweep", "CKPTS=broken good", "MODES=probe knn"], cwd=work, capture_output=True, text=True)
    job = sweep()
    assert (job.returncode != 0
            and "FAILED, and not in the leaderboard: broken/probe broken/knn" in job.stdout), job.stdout[-2000:] + job.stderr[-2000:]
    assert {row["run"] for row in rows_of(work / "runs" / "leaderboard.csv")} == {"cls_good", "cls_good_knn"}
    assert "/nowhere.pt is not there" in job.stderr
    stamp = os.stat(work / "runs" / "cls_good" / "sweep.csv").st_mtime_ns
    job = sweep()
    assert job.stdout.count("holds this run, finished") == 2 and os.stat(work / "runs" / "cls_good" / "sweep.csv").st_mtime_ns == stamp
