import csv
import itertools
import json

import numpy as np
import pytest
import torch
from helpers import (
    ATTENTIVE,
    PROBE,
    ROOT,
    evaluate,
    features_of,
    gaussians,
    quick,
    read_predictions,
    read_run,
    samples_of,
    trained,
)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, log_loss

import config
import discriminant
import features
import heads
import ledger
import losses
import metrics
import model
import train

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------ attentive pooling


@pytest.fixture()
def attention():
    """Tokens (3, 10, 128), a query (heads, 128), and what torch's cross-attention makes of both."""
    torch.manual_seed(0)
    B, T, C = 3, 10, 128
    reference = torch.nn.MultiheadAttention(C, C // 64, bias=False, batch_first=True)
    x, q, key = torch.randn(B, T, C), torch.randn(C), torch.randn(C, C)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([torch.eye(C), key, torch.eye(C)]))
        reference.out_proj.weight.copy_(torch.eye(C))
        expected = reference(q.expand(B, 1, C), x, x)[0][:, 0]
    # q_h . (K_h x) = (K_h^T q_h) . x
    query = torch.stack([key[h : h + 64].T @ q[h : h + 64] for h in range(0, C, 64)])
    return x, query, expected


def test_attentive_pooling_is_cross_attention_without_other_projections(attention):
    x, query, expected = attention
    assert torch.allclose(heads.attentive_pool(x, query[None])[0], expected, atol=1e-5)


def test_queries_of_zero_weight_all_tokens_alike(attention):
    x, query, _ = attention
    pooled = heads.attentive_pool(x, torch.zeros_like(query)[None])
    assert torch.allclose(pooled[0], x.mean(dim=1), atol=1e-6)


def test_every_head_of_a_bank_pools_with_its_own_queries(attention):
    x, query, expected = attention
    pooled = heads.attentive_pool(x, torch.stack([query, torch.zeros_like(query)]))
    assert torch.allclose(pooled, torch.stack([expected, x.mean(dim=1)]), atol=1e-5)


@pytest.mark.parametrize("method", ["mean", "max"])
@pytest.mark.parametrize(
    "shape, size", [((4, 6, 6), (2, 3, 2)), ((5, 3, 4), (2, 2, 3)), ((2, 2, 2), (2, 2, 2))]
)
def test_the_token_grid_pools_its_cells(shape, size, method):
    tokens = torch.randn(2, np.prod(shape), 8)
    pooled, cells = model.pool_grid(tokens, shape, size, method), tokens.view(2, *shape, 8)
    bounds = [[(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in zip(shape, size)]
    slow = []
    for z, y, x in itertools.product(*bounds):
        cell = cells[:, slice(*z), slice(*y), slice(*x)].flatten(1, 3)  # (2, tokens of the cell, 8)
        slow.append(cell.mean(dim=1) if method == "mean" else cell.amax(dim=1))
    assert torch.allclose(pooled, torch.stack(slow, dim=1), atol=1e-6)


def test_attention_finds_what_the_mean_drowns():
    """The class shows in one token of 27, wherever that is; a marker says where."""
    rng = np.random.default_rng(0)

    def draw(n):
        y, x = rng.integers(0, 4, n), rng.standard_normal((n, 27, 64)).astype(np.float32)
        place = rng.integers(0, 27, n)
        x[np.arange(n), place, 0] += 6
        x[np.arange(n), place, 1:5] += 4 * np.eye(4)[y]
        return x, y

    (x, y), (x_val, y_val) = draw(400), draw(200)
    best = {}
    for pooling, more in (("mean", []), ("attentive", [f"{ROOT}/configs/attentive.yaml"])):
        cfg = config.load([PROBE, *more], ["model.emb_dim=64"])
        seen = [part if more else part.mean(axis=1) for part in (x, x_val)]
        fitted = train.fit(cfg, 0, features_of(seen[0], y), features_of(seen[1], y_val), CPU)
        best[pooling] = fitted.rows[0]["val_balanced_accuracy"]
    assert best["mean"] < 0.5 and best["attentive"] > 0.9, best


# ---------------------------------------------------------------------------- where a head starts


def test_standardisation_uses_training_features_alone(written):
    cfg = quick(written, trained(written))
    book = ledger.read(cfg)
    x = features.encode(cfg, book, book.of("train"), features.open_encoder(cfg), CPU).x
    assert torch.allclose(read_run(cfg)[1]["head"]["mean"], x.mean(0))
    assert not torch.allclose(x.std(0), torch.ones(128))


@pytest.mark.parametrize("hidden", [0, 8], ids=["linear", "MLP"])
def test_every_head_starts_as_it_would_alone(hidden):
    x, y = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32), np.arange(40) % 7
    train_set = features_of(x, np.minimum(y, 3))
    values = {
        "loss": ["logit_adjustment", "ce", "balanced_softmax"],
        "ordinal": [True, False],
        "class_weights": ["auto", "none"],
    }

    def started(overrides):
        cfg = config.load(
            PROBE,
            ["train.sweep=null", "model.emb_dim=8", f"model.head.hidden={hidden}", *overrides],
        )
        return heads.start(cfg, 0, train_set, 4)

    lists = [f"train.sweep.{name}={json.dumps(tried)}" for name, tried in values.items()]
    bank = started(lists)
    assert len(bank.settings) == 12
    for g, settings in enumerate(bank.settings):
        own = [f"train.{name}={settings[name]}" for name in ("loss", "class_weights")]
        own.append(f"model.head.ordinal={str(settings['ordinal']).lower()}")
        state = started(own).state_dict()
        assert all(torch.equal(v, state[name]) for name, v in bank.one(g).items()), settings


@pytest.mark.parametrize("is_ordinal", [False, True])
def test_a_head_starts_from_ridge_regression_judged_on_the_participants_left_out(is_ordinal):
    """Against scikit-learn's Ridge, fitted again without each participant."""
    rng = np.random.default_rng(0)
    # one to four volumes each
    people = rng.permutation(np.repeat(np.arange(30), rng.integers(1, 5, 30)))
    y = rng.integers(0, 4, 30)[people]
    x = rng.standard_normal((len(y), 12)) @ rng.standard_normal((12, 12)) + 5
    x[:, :2] += y[:, None]
    x[:, 2:5] += 4 * np.eye(4)[y][:, 1:]  # so that every contrast of the classes is foretold
    x_, t = x - x.mean(axis=0), (y[:, None] if is_ordinal else np.eye(4)[y][:, 1:]).astype(float)

    def ridge(alpha, rows):
        return Ridge(alpha=alpha).fit(x_[rows], t[rows])

    best = None
    for alpha in np.trace(x_.T @ x_) / 12 * np.logspace(-4, 4, 17):
        scores, error = np.zeros_like(t), 0
        for person in range(30):
            own, others = people == person, people != person
            foretold = ridge(alpha, others).predict(x_[own]).reshape(-1, t.shape[1])
            error += ((t[own] - foretold) ** 2).sum()
            scores[own] = foretold - t[others].mean(axis=0)
        if best is None or error < best[0]:
            best = error, alpha, scores
    _, alpha, scores = best
    means = np.array([scores[y == k].mean(axis=0) for k in range(4)])
    deviations = scores - means[y]
    scatter = 5 * sum(np.outer(s, s) for s in scores) / len(y)
    covariance = (sum(np.outer(d, d) for d in deviations) + scatter) / (len(y) + 5)
    # (n, d), of the fit to all
    along = ridge(alpha, slice(None)).predict(x_).reshape(t.shape) - t.mean(axis=0)
    weight, bias, left_out = discriminant.discriminant(
        *map(torch.from_numpy, (x, y, people)), 4, is_ordinal
    )

    def expected(scores):  # steps of the logits from class to class
        if is_ordinal:  # one slope, borders between neighbours in the middle
            middle = (means[1:] + means[:-1])[:, 0] / 2
            slope = np.polyfit(np.arange(4), means[:, 0] / covariance[0, 0], 1)[0]
            return slope * (scores - middle)
        distance = lambda d: d @ np.linalg.solve(covariance, d)
        return np.diff([[-0.5 * distance(s - m) for m in means] for s in scores], axis=1)

    for logits, of in ((x @ weight.numpy().T + bias.numpy(), along), (left_out.numpy(), scores)):
        assert (
            np.abs(np.diff(logits, axis=1) - expected(of)).max() < 1e-4 * np.abs(expected(of)).max()
        )


@pytest.mark.parametrize("is_ordinal", [False, True])
@pytest.mark.parametrize(
    "y, x",
    [([0] * 6, None), ([0, 0, 0, 2, 2, 2], None), ([0, 1, 2, 3, 0, 1], 1.0)],
    ids=["one class", "two classes", "constant features"],
)
def test_a_start_from_little_is_finite(y, x, is_ordinal):
    rows = torch.full((6, 3), x) if x else torch.randn(6, 3)
    found = discriminant.discriminant(rows, torch.tensor(y), torch.arange(6), 4, is_ordinal)
    assert all(torch.isfinite(values).all() for values in found)
    assert x is None or found[0].abs().max() < 1e-6


def balanced(logits, y):
    return balanced_accuracy_score(y, logits.argmax(axis=1))


@pytest.mark.parametrize("is_ordinal", [False, True], ids=["free", "ordinal"])
@pytest.mark.parametrize("means", [(0, 0, 0, 0), (0, 0.2, 0.5, 0.8)], ids=["noise", "weak"])
def test_a_start_never_answers_the_opposite_of_what_training_shows(means, is_ordinal):
    """Where left-out scores say nothing of the classes, the answer is constant."""
    constant = 0
    for seed in range(12):
        (x, y), _, _ = gaussians(means, 192, 186, seed)
        parts = torch.from_numpy(x), torch.from_numpy(y), torch.arange(len(y))
        weight, bias, _ = discriminant.discriminant(*parts, 4, is_ordinal)
        assert balanced(x @ weight.numpy().T + bias.numpy(), y) >= 0.25 - 1e-9, seed
        constant += not weight.any()
        assert weight.any() or not bias.any()
    assert constant > 0 or not is_ordinal or means[-1]


def test_left_out_answers_know_nothing_of_their_participant():
    """More features than participants: the mean of the targets, which all share, tells of whom is
    left out, and a regression that keeps it foretells noise without an error."""
    scores, losses_of = [], []
    for seed in range(6):
        (x, y), _, (x_test, y_test) = gaussians((0, 0, 0, 0), 384, 186, seed)
        parts = torch.from_numpy(x), torch.from_numpy(y), torch.arange(len(y))
        weight, bias, left_out = discriminant.discriminant(*parts, 4, False)
        scores.append(balanced(left_out.numpy(), y))
        p = torch.from_numpy(x_test) @ weight.T + bias
        losses_of.append(log_loss(y_test, p.double().softmax(dim=1).numpy(), labels=range(4)))
    assert np.mean(scores) < 0.4 and np.mean(losses_of) < np.log(4) + 0.1, (scores, losses_of)


def test_contrasts_that_are_foretold_do_not_hang_on_which_class_is_left_out():
    """Of a head without an order, the target of one class follows from the others'."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        means = rng.standard_normal((4, 4))
        means -= means.mean(axis=1, keepdims=True)  # scores of all classes add up to zero
        kept = []
        for out in range(4):
            classes = [k for k in range(4) if k != out]
            found = discriminant.foretold(
                torch.from_numpy(means[:, classes]), torch.eye(4).double()[:, classes]
            )
            kept.append(found.shape[1])
        assert len(set(kept)) == 1


# -------------------------------------------------------------------------------------- optimizer


def bank_and_encoder(*overrides):
    """A bank of two heads, an encoder and the optimizer of both."""
    torch.manual_seed(0)
    cfg = config.load(PROBE, ["model.emb_dim=64", "train.sweep=null", *overrides])
    settings = [{"lr_head": 0.1, "weight_decay": 0.05, "ordinal": False, "loss": "ce"}]
    settings.append({**settings[0], "lr_head": 0.01, "weight_decay": 0.5})
    bank, encoder = heads.Heads(64, 4, settings, hidden=8), model.ViT3D(64, 3, 8)
    return bank, encoder, heads.Optimizer(cfg, bank, encoder)


def test_layer_wise_rates_are_the_formulas():
    rates = ["train.lr_encoder=0.01", "train.layer_decay=0.5", "train.weight_decay=0.05"]
    _, encoder, optimizer = bank_and_encoder(*rates)
    groups = optimizer.adamw.param_groups[1:]
    found = {id(p): (g["peak"], g["weight_decay"], g["part"]) for g in groups for p in g["params"]}
    number = len(list(encoder.parameters()))
    assert len(found) == sum(len(g["params"]) for g in groups) == number
    first = dict.fromkeys(("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"), 1 / 16)
    share_of = first | {"norm.weight": 1, "norm.bias": 1}
    for name, p in encoder.named_parameters():
        share = share_of.get(name) or 0.5 ** (3 - int(name.split(".")[1]))
        decay = 0.0 if name == "pos_embed" or name.endswith("bias") or "norm" in name else 0.05
        assert found[id(p)] == (pytest.approx(0.01 * share), decay, "encoder"), name


def test_every_head_decays_at_its_own_rate_and_biases_do_not():
    """With gradients of zero, decay is all that a step does."""
    bank, encoder, optimizer = bank_and_encoder()
    before = {name: p.detach().clone() for name, p in bank.named_parameters()}
    for p in [*bank.parameters(), *encoder.parameters()]:
        p.grad = torch.zeros_like(p)
    optimizer.step(1.0, 1.0)
    kept = torch.tensor([1 - 0.1 * 0.05, 1 - 0.01 * 0.5])
    assert set(before) == {"weight", "bias", "hidden_weight", "hidden_bias"}
    for name, p in bank.named_parameters():
        factor = torch.ones(2) if name.endswith("bias") else kept
        assert torch.allclose(p, before[name] * factor.view(-1, *[1] * (p.ndim - 1))), name


def test_every_head_moves_at_its_own_rate():
    """AdamW's first step has the length of the learning rate, whatever the gradient."""
    bank, encoder, optimizer = bank_and_encoder()
    before = bank.bias.detach().clone()
    for p in [*bank.parameters(), *encoder.parameters()]:
        p.grad = torch.full_like(p, 7.0)
    optimizer.step(0.5, 0.0)
    moved = (before - bank.bias).detach()
    assert torch.allclose(moved, torch.tensor([[0.05], [0.005]]).expand(2, 4), rtol=1e-4)


# ----------------------------------------------------- a head of a bank is what it would be alone

GRID = {"lr_head": [0.003, 0.03], "weight_decay": [0.01, 3.0], "ordinal": [False, True]}
# more volumes than features: else a head starts where training is right already, and what is left
# of its gradient is rounding
VIEWS = [
    "data.augment.flip=true",
    "data.augment.intensity_jitter=0.5",
    "data.augment.rotation=20",
    "data.augment_views=6",
]


def swept(root, folder, grid, *more):
    """Configuration of a quick probe of 12 epochs with a grid {name: values}."""
    sweep = [f"train.sweep.{name}={json.dumps(values)}" for name, values in grid.items()]
    return quick(root, folder, "train.epochs=12", *more, *sweep)


def heads_of(folder):
    """The rows of a run's sweep.csv."""
    with open(f"{folder}/run/sweep.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize(
    "grid, more",
    [
        pytest.param(GRID, [*VIEWS, "train.early_stopping.patience=3"], marks=pytest.mark.slow),
        (
            {
                "loss": ["ce", "focal", "ordinal", "balanced_softmax", "logit_adjustment"],
                "class_weights": ["none", "auto"],
                "lr_head": [0.01],
            },
            [*VIEWS, "train.early_stopping.enabled=false"],
        ),
        (
            {"lr_head": [0.003, 0.01], "weight_decay": [0.1, 2]},
            [
                "model.head.hidden=8",
                "data.sampler=stratified",
                "train.class_weights=none",
                "train.grad_clip=0.5",
                "data.augment.flip=true",
                "data.augment_views=2",
                "data.batch_size=7",
            ],
        ),
        ({"lr_head": [0.003, 0.03], "ordinal": [False, True]}, ATTENTIVE),
        pytest.param(
            {"lr_head": [0.003, 0.03]}, [*ATTENTIVE, "model.head.hidden=8"], marks=pytest.mark.slow
        ),
    ],
    ids=["rates", "losses", "MLP", "attentive", "attentive MLP"],
)
@pytest.mark.slow
def test_every_head_is_what_it_would_be_alone(written, tmp_path, grid, more):
    cfg = swept(written, tmp_path, grid, *more)
    train.main(0, cfg)
    rows, history, best = heads_of(tmp_path), *read_run(cfg)[:2]
    assert len(rows) == np.prod([len(values) for values in grid.values()])
    assert sum(row["chosen"] == "True" for row in rows) == 1
    key = lambda row: (float(row["val_loss"]), -float(row["val_balanced_accuracy"]))
    assert rows == sorted(rows, key=key)
    key_of = {name: f"train.{name}" for name in grid} | {"ordinal": "model.head.ordinal"}
    for i, row in enumerate(rows):
        own = [f"{key_of[name]}={row[name].lower()}" for name in grid]
        alone = quick(
            written, tmp_path, "train.epochs=12", *more, *own, f"paths.run_dir={tmp_path}/alone{i}"
        )
        train.main(0, alone)
        own_history, own_best, _ = read_run(alone)
        assert int(row["best_epoch"]) == own_best["epoch"]
        accuracy = own_best["val_balanced_accuracy"]
        assert float(row["val_balanced_accuracy"]) == pytest.approx(accuracy, abs=1e-9)
        assert float(row["val_loss"]) == pytest.approx(own_best["val_loss"], abs=1e-5)
        if row["chosen"] == "True":
            assert best["epoch"] == own_best["epoch"]
            same_head(best["head"], own_best["head"], 1e-5)
            same_history(history, own_history)
            same_predictions(cfg, alone)


def same_head(a, b, most):
    assert a.keys() == b.keys()
    assert all((b[k] - v).abs().max() < most for k, v in a.items())


def same_history(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a), (a, b)


def same_predictions(*cfgs):
    a, b = (read_predictions(f"{cfg.paths.run_dir}/predictions_val.csv") for cfg in cfgs)
    assert a[0] == b[0] and np.abs(a[2] - b[2]).max() < 1e-5


def test_a_head_that_diverges_disturbs_nobody(written, tmp_path):
    def run(folder, rates):
        more = "train.warmup_epochs=0", "train.choose_by=balanced_accuracy"
        cfg = swept(written, folder, {"lr_head": rates}, *more)
        train.main(0, cfg)
        return heads_of(folder), read_run(cfg)[1]["head"]

    (alone,), best = run(tmp_path / "alone", [0.01])
    (first, last), best_of_two = run(tmp_path, [1e38, 0.01])
    loss = float(alone.pop("val_loss"))
    assert float(first.pop("val_loss")) == pytest.approx(loss, abs=1e-6)
    assert first == alone
    assert (last["lr_head"], last["val_loss"], last["best_epoch"]) == ("1e+38", "nan", "0")
    same_head(best_of_two, best, 1e-6)


def test_heads_that_all_diverge_stop_the_run(written, tmp_path):
    message = "every head of train.sweep diverged in the first epoch; lower train.sweep.lr_head"
    more = "train.warmup_epochs=0", "train.choose_by=balanced_accuracy"
    with pytest.raises(ValueError, match=message):
        train.main(0, swept(written, tmp_path, {"lr_head": [1e38]}, *more))


def test_a_head_that_diverges_at_once_is_what_it_started_from(written, tmp_path):
    cfg = swept(written, tmp_path, {"lr_head": [1e38]}, "train.warmup_epochs=0")
    train.main(0, cfg)
    assert heads_of(tmp_path)[0]["best_epoch"] == "0" and read_run(cfg)[1]["epoch"] == 0


# ------------------------------------------------------------------------ what a head has learned


def test_the_classes_of_an_ordinal_head_share_one_direction(written):
    more = ["train.epochs=12", "model.head.ordinal=true"]
    weight = read_run(quick(written, trained(written, *more)))[1]["head"]["weight"][0]  # (4, C)
    steps = weight[1:] - weight[:-1]
    assert torch.linalg.matrix_rank(weight, rtol=1e-4) == 1
    assert torch.allclose(steps, steps[:1].expand(3, -1), atol=1e-6)


@pytest.fixture(scope="module")
def adjusted(written, tmp_path_factory):
    """[(answers on validation (n, 4), the head's state)] of the last epoch of cross-entropy and of
    logit adjustment, and the classes' shares in training (4,)."""
    folder, found = tmp_path_factory.mktemp("adjusted"), []
    for loss in ("ce", "logit_adjustment"):
        more = ["train.class_weights=none", "train.early_stopping.enabled=false"]
        cfg = quick(written, folder, f"train.loss={loss}", *more)
        train.main(0, cfg)
        _, results = evaluate(f"{cfg.paths.run_dir}/last.pt", "val")
        p = read_predictions(f"{results}/predictions_val.csv")[2]
        found.append((p, read_run(cfg)[2]["head"]))
    labels = [s.label for s in ledger.read(cfg).of("train")]
    return found, np.bincount(labels) / len(labels)


def test_logit_adjustment_trains_as_cross_entropy(adjusted):
    ((_, plain), (_, state)), share = adjusted
    assert torch.equal(plain["weight"], state["weight"]) and not plain["log_prior"].any()
    assert np.allclose(state["log_prior"][0].exp().numpy(), share)


def test_logit_adjustment_divides_the_answers_by_the_shares_of_training(adjusted):
    found, share = adjusted
    banks = [heads.Heads(128, 4) for _ in found]
    for bank, (_, state) in zip(banks, found):
        bank.load_state_dict(state)
    x = torch.randn(5, 128)
    expected = heads.predict(banks[0], x)[0] / share
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.allclose(heads.predict(banks[1], x)[0], expected, atol=1e-6)
    assert torch.equal(*(bank.train()(x) for bank in banks))  # not while training


def test_logit_adjustment_makes_the_rarest_class_likelier(adjusted):
    ((plain, _), (p, _)), _ = adjusted
    assert p[:, 3].mean() > plain[:, 3].mean()


@pytest.mark.slow
@pytest.mark.parametrize("scheme, sk", [("none", None), ("auto", "balanced")])
def test_a_linear_head_at_its_optimum_is_logistic_regression(scheme, sk, monkeypatch):
    """Without penalty, for AdamW's decay is none that the loss knows."""
    (x, y), (x_val, y_val), _ = gaussians((0, 0.4, 1, 1.6), 12, 743, 3)
    cfg = config.load(
        PROBE,
        [
            "train.sweep=null",
            "model.emb_dim=12",
            "train.weight_decay=0",
            "model.head.dropout=0",
            "train.lr_head=0.03",
            "train.epochs=2000",
            "data.batch_size=743",
            "train.early_stopping.enabled=false",
            f"train.class_weights={scheme}",
        ],
    )
    calls = itertools.count()
    # the last epoch is to be kept
    scores = lambda y_true, p: ([float(next(calls))], [0.0])
    monkeypatch.setattr(metrics, "quick_scores", scores)
    fitted = train.fit(cfg, 0, features_of(x, y), features_of(x_val, y_val), CPU)
    reference = LogisticRegression(C=np.inf, class_weight=sk, max_iter=5000, tol=1e-8).fit(x, y)
    weights = losses.class_weights(y, 4, scheme).numpy()[y]
    for x_, y_, w in ((x, y, weights), (x_val, y_val, None)):
        mine = heads.predict(fitted.head, torch.from_numpy(x_))[0]
        expected = log_loss(y_, reference.predict_proba(x_), sample_weight=w)
        assert abs(log_loss(y_, mine, sample_weight=w) - expected) < 1e-3


@pytest.mark.slow
def test_what_corrects_the_imbalance_beats_what_does_not():
    """Trained on 39/22/31/8 %, tested balanced, 20 seeds."""
    tried = {
        "uniform": ("ce", "none"),
        "logit adjustment": ("logit_adjustment", "none"),
        "balanced softmax": ("balanced_softmax", "none"),
        "balanced weights": ("ce", "auto"),
    }
    scores, collapsed = {name: [] for name in tried}, 0
    for seed in range(20):
        (x, y), (x_val, y_val), (x_test, y_test) = gaussians((0, 0.4, 1, 1.6), 64, 743, seed)
        for name, (loss, weights) in tried.items():
            cfg = config.load(
                PROBE,
                [
                    "model.emb_dim=64",
                    f"train.loss={loss}",
                    f"train.class_weights={weights}",
                    "train.sweep.weight_decay=[0.01,1]",
                    "train.sweep.ordinal=[true]",
                ],
            )
            fitted = train.fit(cfg, seed, features_of(x, y), features_of(x_val, y_val), CPU)
            p = heads.predict(fitted.head, torch.from_numpy(x_test))[0]
            scores[name].append(balanced_accuracy_score(y_test, p.argmax(axis=1)))
            if name == "uniform":  # what a study of 159 would see
                alarms = metrics.evaluate(y_test[:159], p[:159])["alarms"]
                collapsed += any(
                    alarm.startswith("model collapse: class") and "never predicted" in alarm
                    for alarm in alarms
                )
    for name in list(tried)[1:]:
        wins = np.array(scores[name]) > np.array(scores["uniform"])
        assert wins.sum() >= 19, (name, scores)
    assert collapsed >= 19, collapsed


# ------------------------------------------------------------------------------------ predictions


def test_predictions_are_averaged_over_the_volumes_of_a_participant():
    samples = samples_of([2, 0, 1])
    samples = [samples[0], samples[1], samples[0], samples[2], samples[0]]
    p = np.random.default_rng(0).dirichlet(np.ones(4), (2, 5))  # of two heads
    found = heads.by_unit(samples, p)
    assert found.ids == ["0", "1", "2"] and found.y_true.tolist() == [2, 0, 1]
    assert np.allclose(found.p[:, 0], p[:, [0, 2, 4]].mean(axis=1))
    assert np.allclose(found.p[:, 1:], p[:, [1, 3]])
    assert np.array_equal(found.of_head(1).p, found.p[1])
