import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TUNE, quick, read_run, samples_of, trained

import heads
import metrics
import progress
import train

BY_LOSS, BY_ACCURACY = "log_loss", "balanced_accuracy"


@pytest.mark.parametrize(
    "new, old, min_delta, is_better",
    [
        ((0.4, 1.0), (0.5, 1.1), 0.0, True),
        ((0.5, 1.1), (0.4, 1.0), 0.0, False),
        ((0.5, 1.0), (0.4, 1.0), 0.0, True),  # the same loss: by balanced accuracy
        ((0.5, 1.0), (0.5, 1.0), 0.0, False),
        ((0.5, 1.0 - 1e-12), (0.6, 1.0), 0.0, False),  # the same up to rounding
        ((0.5, 0.995), (0.5, 1.0), 0.01, False),
        ((0.52, 0.995), (0.5, 1.0), 0.01, True),
    ],
)
def test_better_goes_by_loss_then_by_balanced_accuracy(new, old, min_delta, is_better):
    assert progress.better(new, old, BY_LOSS, min_delta) == is_better


@pytest.mark.parametrize(
    "new, old, min_delta, is_better",
    [
        ((0.5, 9), (0.4, 1), 0.0, True),
        ((0.4, 1), (0.5, 9), 0.0, False),
        ((0.5, 0.9), (0.5, 1.0), 0.0, True),  # the same balanced accuracy: by loss
        ((0.5, 1.0), (0.5, 1.0), 0.0, False),
        ((0.5 + 1e-12, 1.1), (0.5, 1.0), 0.0, False),  # the same up to rounding
        ((0.505, 0.9995), (0.5, 1.0), 0.01, False),
        ((0.505, 0.9), (0.5, 1.0), 0.01, True),
    ],
)
def test_the_old_rule_goes_by_balanced_accuracy_then_by_loss(new, old, min_delta, is_better):
    assert progress.better(new, old, BY_ACCURACY, min_delta) == is_better


def test_quick_scores_are_the_scores():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 4, 60), rng.dirichlet(np.ones(4), (5, 60))
    ba, loss = metrics.quick_scores(y, p)
    for g in range(5):
        score = metrics.score(y, p[g])
        assert ba[g] == pytest.approx(score["balanced_accuracy"])
        assert loss[g] == pytest.approx(score["log_loss"])


# ----------------------------------------------------------------------------- patience, in a run


def test_early_stopping(written, tmp_path, capsys):
    early = ["train.early_stopping.patience=3", "train.early_stopping.min_delta=0.5"]
    cfg = quick(written, tmp_path, "train.epochs=40", *early)
    train.main(0, cfg)
    history, _, last = read_run(cfg)
    # no later epoch is better by 0.5 than the start
    assert [r["epoch"] for r in history] == [0, 1, 2, 3]
    assert last["progress"]["epochs_without"] == [3]
    assert "stopped early: 3 epochs without improvement" in capsys.readouterr().out


def test_early_stopping_waits_for_the_encoder(written):
    more = [
        "train.epochs=9",
        "model.unfreeze_at_epoch=4",
        "train.lr_encoder=0",
        "train.lr_head=0",
        "train.early_stopping.patience=2",
    ]
    history = read_run(quick(written, trained(written, *TUNE, *more)))[0]
    # 6 and 7 bring nothing; before 5 nothing counts
    assert [r["epoch"] for r in history] == [0, 1, 2, 3, 4, 5, 6, 7]


# ------------------------------------------------------------------------ patience, of many heads


def walk(scores, patience=2, epochs=10, choose_by=BY_ACCURACY):
    """Progress of heads with these (balanced accuracy, loss) {epoch: [of head 0, of head 1, ...]}
    -> the Progress, and [(epoch, heads that are better than ever)]."""
    early_stopping = SimpleNamespace(enabled=True, patience=patience, min_delta=0.0)
    given = SimpleNamespace(epochs=epochs, early_stopping=early_stopping, choose_by=choose_by)
    cfg = SimpleNamespace(train=given)
    found, num_heads = [], len(scores[1])
    state = progress.Progress(cfg, num_heads, steps_per_epoch=1)
    bank, y, p = heads.Heads(8, 4, [{}] * num_heads), np.arange(4), np.full((num_heads, 4, 4), 0.25)
    for number in state.epochs():
        state.step = 1
        epoch = progress.Epoch(number, torch.arange(4), bank)
        finite = np.array([np.isfinite(loss) for _, loss in scores[number]])
        answers = np.where(finite[:, None, None], p, np.nan)
        epoch.finish(heads.Predictions([], y, answers))
        with pytest.MonkeyPatch.context() as patch:
            quick_scores = lambda y_true, p, now=scores[number]: zip(*now)
            patch.setattr(metrics, "quick_scores", quick_scores)
            found.append((number, list(state.update(epoch))))
    return state, found


def test_a_head_keeps_its_best_after_it_has_stopped():
    scores = {1: [(0.5, 1), (0.3, 1)], 2: [(0.4, 1), (0.4, 1)], 3: [(0.4, 1), (0.5, 1)]}
    scores |= {4: [(0.9, 1), (0.6, 1)], 5: [(0.9, 1), (0.1, 1)], 6: [(0.9, 1), (0.1, 1)]}
    state, found = walk(scores)
    # head 0 has stopped with epoch 3, and what it would have become is no longer looked at
    assert state.best == [(0.5, 1), (0.6, 1)] and state.best_epoch == [1, 4]
    assert found == [(1, [0, 1]), (2, [1]), (3, [1]), (4, [1]), (5, []), (6, [])]
    assert state.last_epoch == [3, 6] and state.chosen() == 1


def test_a_head_whose_numbers_are_not_finite_stops_with_the_epoch_before():
    scores = {1: [(0.5, 1), (0.3, 1)], 2: [(0.6, np.nan), (0.4, 1)]}
    scores |= {3: [(0.9, 1), (0.4, 1)], 4: [(0.9, 1), (0.4, 1)]}
    state, _ = walk(scores)
    assert state.best == [(0.5, 1), (0.4, 1)] and state.last_epoch == [1, 4]


def test_the_first_of_equal_heads_is_chosen():
    state, _ = walk({1: [(0.3, 1), (0.5, 1), (0.5, 1)]}, epochs=1)
    assert state.chosen() == 1


def test_rows_are_ranked_and_name_the_chosen_head():
    scores = {1: [(0.3, 2.0), (0.5, np.nan), (0.5, 1.0)]}
    state, _ = walk(scores, epochs=1)
    rows = state.rows([{"lr_head": rate} for rate in (1.0, 2.0, 3.0)])
    assert [row["lr_head"] for row in rows] == [3.0, 1.0, 2.0]  # what diverged is last
    assert [row["chosen"] for row in rows] == [True, False, False]
    assert rows[0]["best_epoch"] == 1 and np.isnan(rows[2]["val_loss"])


def test_the_start_may_be_best_where_loss_chooses():
    scores = {
        0: [(0.3, 1.2), (0.5, 1.3)],
        1: [(0.9, 1.25), (0.5, 1.1)],
        2: [(0.9, 1.3), (0.2, 1.1)],
    }
    state, found = walk(scores, epochs=2, choose_by=BY_LOSS)
    assert found == [(0, [0, 1]), (1, [1]), (2, [])]
    assert state.best == [(0.3, 1.2), (0.5, 1.1)] and state.best_epoch == [0, 1]
    assert state.chosen() == 1 and state.last_epoch[0] == 2
    rows = state.rows([{"lr_head": 1.0}, {"lr_head": 2.0}])
    assert [(row["lr_head"], row["best_epoch"], row["chosen"]) for row in rows] == [
        (2.0, 1, True),
        (1.0, 0, False),
    ]


def test_where_balanced_accuracy_chooses_training_begins_with_epoch_1():
    assert [number for number, _ in walk({1: [(0.5, 1)], 2: [(0.4, 1)]}, epochs=2)[1]] == [1, 2]


# ------------------------------------------------------------------------- the record of an epoch


@pytest.fixture()
def logged(written):
    """The history of a fine-tuning run, and the number of training volumes of every class."""
    folder = trained(written, *TUNE, "train.save_every=2")
    with open(f"{folder}/run/metrics.jsonl") as f:
        history = [json.loads(line) for line in f]
    with open(f"{folder}/run/ledger.csv", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["split"] == "train"]
    labels = range(4)
    volumes = [sum(int(r["volumes"]) for r in rows if r["label"] == str(k)) for k in labels]
    return history, volumes


def test_the_epoch_log_shows_what_was_drawn(logged):
    history, volumes = logged
    assert all([r[f"train/drawn_{k}"] for k in range(4)] == volumes for r in history)


def test_the_epoch_log_shows_shares_that_add_up_to_one(logged):
    for r in logged[0]:
        for split in ("train", "val"):
            assert sum(r[f"{split}/predicted_share_{k}"] for k in range(4)) == pytest.approx(1)


def test_the_epoch_log_shows_the_gap(logged):
    for r in logged[0]:
        gap = r["train/balanced_accuracy"] - r["val/balanced_accuracy"]
        assert r["gap/balanced_accuracy"] == pytest.approx(gap)


def test_the_epoch_log_shows_loss_by_class_and_the_gradient(logged):
    history, volumes = logged
    weights = [sum(volumes) / (4 * v) for v in volumes]
    shares = [w * v for w, v in zip(weights, volumes)]
    for r in history:
        losses = [r[f"train/loss_{k}"] for k in range(4)]
        assert min(losses) > 0 and (r["train/grad_norm"] > 0) == (r["epoch"] > 0)
        by_class = np.average(losses, weights=shares)
        # a mean of batches, weights by participants: alike, not equal
        assert r["train/loss"] == pytest.approx(by_class, rel=0.1)


def test_the_record_is_of_what_the_steps_saw():
    """Two volumes of one participant and one of another; a volume that was drawn twice."""
    samples = [samples_of([1, 3])[i] for i in (0, 0, 1)]
    train_set = SimpleNamespace(
        samples=samples, labels=torch.tensor([1, 1, 3]), participants={"0": 1, "1": 3}
    )
    epoch = progress.Epoch(7, torch.tensor([0, 2, 0]), heads.Heads(8, 4))
    logits = torch.log(torch.tensor([[[0.1, 0.7, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]]]))
    epoch.add(torch.tensor([0, 2]), torch.tensor([[1.0, 4.0]]), logits, torch.tensor([5.0]))
    epoch.add(torch.tensor([0, -1]), torch.tensor([[2.0, 9.0]]), logits, torch.tensor([2.0]))
    y_val, p_val = np.array([0, 1]), np.array([[[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]]])
    epoch.finish(heads.Predictions(["a", "b"], y_val, p_val))
    record = progress.epoch_record(train_set, epoch, 0, {"lr_head": 0.1})
    assert [record[f"train/drawn_{k}"] for k in range(4)] == [0, 2, 0, 1]
    assert [record[f"train/loss_{k}"] for k in range(4)] == [None, 1.5, None, 4.0]
    assert [record[f"train/predicted_share_{k}"] for k in range(4)] == [0, 1, 0, 0]
    assert record["train/balanced_accuracy"] == 0.5 and record["val/accuracy"] == 0.5
    assert record["train/loss"] == pytest.approx(7 / 3) and record["epoch"] == 7
