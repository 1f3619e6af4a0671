import csv
import os

import numpy as np
import pytest
import torch
from helpers import PROBE, ROOT, copy_of, evaluate, features_of, quick, read_predictions, trained
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.neighbors import KNeighborsClassifier

import config
import features
import heads
import ledger
import losses
import references

SCHEMES = {"none": "none", "weighted": "[1,2,3,4]"}


def standardised(x, x_train):
    return (x - x_train.mean(axis=0)) / np.sqrt(x_train.var(axis=0) + 1e-6)


def unit(x, x_train):
    """Standardised, and of length 1: distances are those of the cosine."""
    z = standardised(x, x_train)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def neighbours(k):
    """scikit-learn's kNN with the votes of DINO: exp(cosine / 0.07)."""
    return KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07))


def weighted(p, weights):
    p = p * weights
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("k", [1, 3, 20])
def test_knn_is_scikit_learns(k, scheme):
    rng = np.random.default_rng(k)
    x, y, new = (
        rng.standard_normal((200, 16)),
        rng.integers(0, 4, 200),
        rng.standard_normal((50, 16)),
    )
    x, new = x.astype(np.float32), new.astype(np.float32)
    overrides = ["model.emb_dim=16", f"train.class_weights={scheme}"]
    cfg = config.load([PROBE, os.path.join(ROOT, "configs", "knn.yaml")], overrides)
    bank = references.fit(cfg, features_of(x, y), 4)
    g = [settings["k"] for settings in bank.settings].index(k)
    expected = neighbours(k).fit(unit(x, x), y).predict_proba(unit(new, x))
    # a class's votes count so much more
    expected = weighted(expected, [1, 1, 1, 1] if scheme == "none" else [1, 2, 3, 4])
    assert np.allclose(heads.predict(bank, torch.from_numpy(new))[g], expected, atol=1e-4)


def test_more_neighbours_than_volumes_are_not_tried():
    x, y = np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32), np.arange(12) % 4
    cfg = config.load([PROBE, os.path.join(ROOT, "configs", "knn.yaml")], ["model.emb_dim=16"])
    bank = references.fit(cfg, features_of(x, y), 4)
    assert [settings["k"] for settings in bank.settings] == [1, 3, 5, 10]


def test_logistic_regression_needs_every_class():
    x, y = np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32), np.arange(12) % 3
    overrides = ["model.emb_dim=16", "train.class_weights=none"]
    reference = os.path.join(ROOT, "configs", "logistic_regression.yaml")
    cfg = config.load([PROBE, reference], overrides)
    with pytest.raises(ValueError, match=r"needs every one of 4 classes .*found \[0, 1, 2\]"):
        references.fit(cfg, features_of(x, y), 4)


# ------------------------------------------------------------------------------- a run as a whole

KINDS = pytest.mark.parametrize("kind", ["knn", "logistic_regression"])


def rows_of(folder):
    with open(f"{folder}/run/sweep.csv", newline="") as f:
        return list(csv.DictReader(f))


def features_in(cfg, split):
    """x (volumes, C) in double precision, labels (volumes,) and samples of a split."""
    book = ledger.read(cfg)
    encoder = features.open_encoder(cfg)
    found = features.encode(cfg, book, book.of(split), encoder, torch.device("cpu"))
    return found.x.numpy().astype(np.float64), found.labels.numpy(), found.samples


@KINDS
def test_a_reference_run_is_scikit_learn_on_the_features(written, kind):
    folder = trained(written, f"model.head.kind={kind}")
    cfg = quick(written, folder)
    (x, y, samples), (x_val, _, val) = features_in(cfg, "train"), features_in(cfg, "val")
    people = list({s.participant_id: s.label for s in samples}.values())
    weights, rows, scores = losses.class_weights(people, 4, "auto").numpy(), rows_of(folder), []
    assert len(rows) == {"knn": 7, "logistic_regression": 45}[kind]
    for row in rows:
        if kind == "knn":
            p = neighbours(int(row["k"])).fit(unit(x, x), y).predict_proba(unit(x_val, x))
            p = weighted(p, weights)
        else:
            class_weight = dict(enumerate(weights))
            reference = LogisticRegression(
                C=float(row["C"]), class_weight=class_weight, max_iter=1000, tol=1e-6
            )
            reference.fit(standardised(x, x), y)
            p = reference.predict_proba(standardised(x_val, x))
        found = heads.by_unit(val, p)
        accuracy = balanced_accuracy_score(found.y_true, found.p.argmax(axis=1))
        loss = log_loss(found.y_true, found.p, labels=range(4))
        scores.append(loss)
        # with next to no penalty on separable features, where the solver ends hangs on the last
        # digit
        if kind == "knn" or float(row["C"]) < 30:
            assert float(row["val_balanced_accuracy"]) == pytest.approx(accuracy)
            assert float(row["val_loss"]) == pytest.approx(loss, rel=1e-3)
    assert scores[0] == min(scores)
    assert [row["chosen"] for row in rows] == ["True"] + ["False"] * (len(rows) - 1)


@KINDS
def test_a_reference_run_is_scored(written, tmp_path, kind):
    folder = trained(written, f"model.head.kind={kind}")
    run, best = copy_of(folder, tmp_path), rows_of(folder)[0]
    before = read_predictions(f"{run}/predictions_val.csv")[2]
    result, _ = evaluate(run, "val")
    assert result["balanced_accuracy"] == pytest.approx(float(best["val_balanced_accuracy"]))
    assert np.allclose(before, read_predictions(f"{run}/predictions_val.csv")[2], atol=1e-6)
    evaluate(run, "test")
