"""The grid of heads: each as if trained alone, validation chooses, and the folder says what was tried."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, settings
from test_train import read_predictions, read_run

import config
import eval as evaluation
import metrics
import train

GRID = {"lr_head": [0.003, 0.03], "weight_decay": [0.01, 3.0], "ordinal": [False, True]}


def cfg_of(root, folder, *more):
    return config.load(os.path.join(ROOT, "configs", "demo.yaml"), [*settings(root, folder), "train.epochs=12", *more])


def rows_of(folder):
    with open(f"{folder}/run/sweep.csv", newline="") as f:
        return list(csv.DictReader(f))


# more volumes than features: else a head starts where training is right already, and what is left of its gradient is rounding
VIEWS = ["data.augment.flip=true", "data.augment.intensity_jitter=0.5", "data.augment.rotation=20", "data.augment_views=6"]


@pytest.mark.parametrize("grid, more", [
    pytest.param(GRID, [*VIEWS, "train.early_stopping.patience=3"], marks=pytest.mark.slow),
    ({"loss": ["ce", "focal", "ordinal", "balanced_softmax", "logit_adjustment"], "class_weights": ["none", "auto"], "lr_head": [0.01]},
     [*VIEWS, "train.early_stopping.enabled=false"]),
    ({"lr_head": [0.003, 0.01], "weight_decay": [0.1, 2]},
     ["model.head.hidden=8", "data.sampler=stratified", "train.class_weights=none", "train.grad_clip=0.5",
      "data.augment.flip=true", "data.augment_views=2", "data.batch_size=7"]),
    ({"lr_head": [0.003, 0.03], "ordinal": [False, True]}, ["model.pool_method=attentive", "model.token_grid=[2,2,2]"]),
    pytest.param({"lr_head": [0.003, 0.03]}, ["model.pool_method=attentive", "model.token_grid=[2,2,2]", "model.head.hidden=8"],
                 marks=pytest.mark.slow),
], ids=["rates", "losses", "MLP", "attentive", "attentive MLP"])
def test_every_head_is_what_it_would_be_alone(written, tmp_path, grid, more):
    cfg = cfg_of(written, tmp_path, *more, *(f"train.sweep.{name}={json.dumps(values)}" for name, values in grid.items()))
    train.main(0, cfg)
    rows, history, best = rows_of(tmp_path), *read_run(cfg)[:2]
    assert len(rows) == np.prod([len(values) for values in grid.values()]) and sum(row["chosen"] == "True" for row in rows) == 1
    key = lambda row: (-float(row["val_balanced_accuracy"]), float(row["val_loss"]))
    assert rows == sorted(rows, key=key)
    for i, row in enumerate(rows):
        place = {name: f"model.head.{name}" if name == "ordinal" else f"train.{name}" for name in grid}
        alone = cfg_of(written, tmp_path, *more, *(f"{place[name]}={row[name].lower()}" for name in grid),
                       f"paths.run_dir={tmp_path}/alone{i}")
        train.main(0, alone)
        own_history, own_best, _ = read_run(alone)
        assert int(row["best_epoch"]) == own_best["epoch"]
        assert float(row["val_balanced_accuracy"]) == pytest.approx(own_best["val_balanced_accuracy"], abs=1e-9)
        assert float(row["val_loss"]) == pytest.approx(own_best["val_loss"], abs=1e-5)
        if row["chosen"] == "True":
            assert all((own_best["head"][k] - v).abs().max() < 1e-5 for k, v in best["head"].items())
            assert len(history) == len(own_history) and best["epoch"] == own_best["epoch"]
            for a, b in zip(history, own_history):
                assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a), (a, b)
            p, own = (read_predictions(f"{folder}/predictions_val.csv") for folder in (cfg.paths.run_dir, alone.paths.run_dir))
            assert p[0] == own[0] and np.abs(p[2] - own[2]).max() < 1e-5


def test_validation_chooses_and_eval_scores_the_chosen(written, tmp_path, capsys):
    cfg = cfg_of(written, tmp_path, *(f"train.sweep.{name}={json.dumps(values)}" for name, values in GRID.items()))
    train.main(0, cfg)
    rows = rows_of(tmp_path)
    assert rows[0]["chosen"] == "True" and "8 heads (network) on 58 volumes" in capsys.readouterr().out
    before = read_predictions(f"{tmp_path}/run/predictions_val.csv")
    result, _ = evaluation.evaluate_run(cfg.paths.run_dir, "val")
    assert np.abs(before[2] - read_predictions(f"{tmp_path}/run/predictions_val.csv")[2]).max() < 1e-6
    assert (result["balanced_accuracy"] == pytest.approx(float(rows[0]["val_balanced_accuracy"]))
            and result["log_loss"] == pytest.approx(float(rows[0]["val_loss"]), abs=1e-6))
    assert {"sweep.csv", "last.pt", "metrics.jsonl", "config.yaml", "provenance.json", "ledger.csv"} <= set(os.listdir(cfg.paths.run_dir))
    stamp = os.stat(f"{tmp_path}/run/sweep.csv").st_mtime_ns
    again = cfg_of(written, tmp_path, "train.resume=auto", *(f"train.sweep.{name}={json.dumps(values)}" for name, values in GRID.items()))
    train.main(0, again)  # finished: left as it is
    assert "holds this run, finished" in capsys.readouterr().out and os.stat(f"{tmp_path}/run/sweep.csv").st_mtime_ns == stamp
    train.main(0, cfg_of(written, tmp_path))  # a single head there: no table of an earlier sweep
    assert not os.path.exists(f"{tmp_path}/run/sweep.csv")


def test_a_head_that_diverges_disturbs_nobody(written, tmp_path):
    def swept(folder, rates):
        cfg = cfg_of(written, folder, f"train.sweep.lr_head={rates}", "train.warmup_epochs=0")
        train.main(0, cfg)
        return rows_of(folder), read_run(cfg)[1]

    (alone,), best = swept(tmp_path / "alone", [0.01])
    (first, last), best_of_two = swept(tmp_path, [1e38, 0.01])
    assert float(first.pop("val_loss")) == pytest.approx(float(alone.pop("val_loss")), abs=1e-6)
    assert first == alone and last["lr_head"] == "1e+38" and last["val_loss"] == "nan" and last["best_epoch"] == "0"
    assert all((best["head"][k] - v).abs().max() < 1e-6 for k, v in best_of_two["head"].items())
    with pytest.raises(ValueError, match="every head of train.sweep diverged in the first epoch; lower train.sweep.lr_head"):
        swept(tmp_path / "none", [1e38])


def test_an_ordinal_heads_classes_share_one_direction(written, tmp_path):
    cfg = cfg_of(written, tmp_path, "model.head.ordinal=true")
    train.main(0, cfg)
    weight = read_run(cfg)[1]["head"]["2.weight"]  # (4, C)
    steps = weight[1:] - weight[:-1]
    assert torch.linalg.matrix_rank(weight, rtol=1e-4) == 1 and torch.allclose(steps, steps[:1].expand(3, -1), atol=1e-6)


def test_quick_scores_are_the_scores():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 4, 60), rng.dirichlet(np.ones(4), (5, 60))
    ba, loss = metrics.quick_scores(y, p)
    for g in range(5):
        score = metrics.score(y, p[g])
        assert ba[g] == pytest.approx(score["balanced_accuracy"]) and loss[g] == pytest.approx(score["log_loss"])


def test_a_sweep_needs_a_frozen_encoder_and_lists():
    demo = os.path.join(ROOT, "configs", "demo.yaml")
    for overrides, message in ((["model.unfreeze_at_epoch=1"], "train.sweep tries heads on the features of a frozen encoder, "
                                                               "and this one is to train; set train.sweep=null"),
                               (["train.sweep.lr_head=0.1"], "train.sweep.lr_head must be a list of values to try, or null"),
                               (["train.sweep.loss=[hinge]"], "train.sweep.loss must be one of ce, focal"),
                               (["train.sweep.lr=[1]"], "unknown key 'train.sweep.lr'")):
        with pytest.raises(ValueError, match=message):
            config.load(demo, overrides)
    assert any(vars(config.load(demo).train.sweep).values()) and not any(vars(config.load(demo, ["train.sweep=null"]).train.sweep).values())
    assert config.load(demo, ["train.sweep=null", "model.unfreeze_at_epoch=1"]).model.unfreeze_at_epoch == 1


