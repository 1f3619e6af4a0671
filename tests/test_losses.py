import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

import losses

COUNTS = [290, 162, 233, 58]  # volumes of each class
LABELS = np.repeat([0, 1, 2, 3], COUNTS)


def test_auto_weights_equal_scikit_learn():
    expected = compute_class_weight("balanced", classes=np.arange(4), y=LABELS)
    for given in (LABELS, LABELS.tolist(), torch.from_numpy(LABELS)):
        weights = losses.class_weights(given, 4, "auto")
        assert weights.dtype == torch.float32 and np.allclose(weights.numpy(), expected, rtol=1e-6)


def test_other_schemes():
    assert losses.class_weights([0], 4, "none").tolist() == [1, 1, 1, 1]
    assert losses.class_weights([0], 4, [1, 2, 3, 4.5]).tolist() == [1, 2, 3, 4.5]


@pytest.mark.parametrize(
    "labels, scheme, message",
    [
        ([0, 1, 2], "auto", "every one of 4 classes"),
        ([0, 1, 2, 3, 4], "auto", "every one"),
        ([0, 1, 2, 3, -1], "auto", "every one"),
        ([0], [1, 2], "4 numbers"),
        ([0], [1, 2, 3, -1], "4 numbers"),
        ([0], [1, 2, 3, math.nan], "4 numbers"),
        ([0], [0, 0, 0, 0], "not all zero"),
        ([0], "balanced", "'auto', 'effective', 'none' or a list"),
    ],
)
def test_bad_weights(labels, scheme, message):
    with pytest.raises(ValueError, match=message):
        losses.class_weights(labels, 4, scheme)


def slow_focal(logits, targets, weight, gamma):
    total = norm = 0.0
    for row, y in zip(logits.tolist(), targets.tolist()):
        p = math.exp(row[y]) / sum(math.exp(v) for v in row)
        total += weight[y] * (1 - p) ** gamma * -math.log(p)
        norm += weight[y]
    return total / norm


def random_rows():
    torch.manual_seed(0)
    return torch.randn(20, 4, dtype=torch.float64), torch.randint(4, (20,))


WEIGHTS = pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 4.0]])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@WEIGHTS
def test_focal_equals_its_formula(gamma, weight):
    logits, targets = random_rows()
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = slow_focal(logits, targets, weight or [1] * 4, gamma)
    found = losses.focal_loss(logits, targets, w, gamma).item()
    assert found == pytest.approx(expected, abs=1e-12)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.focal_loss(z, targets, w, gamma), logits)


@WEIGHTS
def test_cross_entropy_is_torchs_and_focal_of_gamma_0(weight):
    logits, targets = random_rows()
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    expected = F.cross_entropy(logits, targets, weight=w)
    assert torch.allclose(losses.focal_loss(logits, targets, w, 0.0), expected)
    assert torch.allclose(losses.cross_entropy(logits, targets, w), expected)


def test_focal_gradient_is_finite_where_the_answer_is_certain():
    logits = torch.tensor([[200.0, 0, 0, 0]], requires_grad=True)
    losses.focal_loss(logits, torch.tensor([0]), gamma=0.5).backward()
    assert torch.isfinite(logits.grad).all()


def rows(count, dtype=torch.float64):
    """Random logits (count, 4), targets (count,) and log prior (4,)."""
    torch.manual_seed(count)
    prior = torch.tensor([0.39, 0.22, 0.31, 0.08], dtype=dtype)
    return torch.randn(count, 4, dtype=dtype) * 3, torch.randint(4, (count,)), prior.log()


def slow_softmax(row):
    return [math.exp(v) / sum(math.exp(u) for u in row) for v in row]


SLOW = {
    "ce": lambda row, y, prior: -math.log(slow_softmax(row)[y]),
    "focal": lambda row, y, prior: (
        (1 - slow_softmax(row)[y]) ** 2 * -math.log(slow_softmax(row)[y])
    ),
    "label_smoothing": lambda row, y, prior: (
        -sum((0.9 * (k == y) + 0.1 / 4) * math.log(p) for k, p in enumerate(slow_softmax(row)))
    ),
    "logit_adjustment": lambda row, y, prior: -math.log(slow_softmax(row)[y]),
    "balanced_softmax": lambda row, y, prior: (
        -math.log(prior[y] * math.exp(row[y]) / sum(q * math.exp(v) for q, v in zip(prior, row)))
    ),
    "ordinal": lambda row, y, prior: sum(
        (sum(slow_softmax(row)[: k + 1]) - (y <= k)) ** 2 for k in range(4)
    ),
}


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_equals_its_formula(name):
    logits, targets, log_prior = rows(25)
    found, prior = losses.LOSSES[name](logits, targets, log_prior), log_prior.exp().tolist()
    assert found.shape == (25,)
    expected = [SLOW[name](row, y, prior) for row, y in zip(logits.tolist(), targets.tolist())]
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_gradient_is_the_difference_quotient(name):
    logits, targets, log_prior = rows(25)
    loss = lambda z: losses.LOSSES[name](z, targets, log_prior)
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_gradient_is_finite_where_the_answer_is_certain(name):
    *_, log_prior = rows(25)
    extreme = (torch.eye(4) * 200 - 100).requires_grad_()
    losses.LOSSES[name](extreme, torch.tensor([0, 2, 1, 3]), log_prior.float()).sum().backward()
    assert torch.isfinite(extreme.grad).all()


def test_ordinal_charges_by_distance():
    found = losses.ordinal_losses(torch.eye(4) * 50, torch.zeros(4, dtype=torch.int64))
    assert found.tolist() == pytest.approx([0, 1, 2, 3])


def test_effective_numbers():
    weights = losses.class_weights(LABELS, 4, "effective")
    # the effective number, as a sum
    expected = np.array([1 / sum(0.999**i for i in range(n)) for n in COUNTS])
    assert np.allclose(weights.numpy(), 4 * expected / expected.sum(), rtol=1e-5)


def test_effective_numbers_correct_less_than_auto():
    weights = losses.class_weights(LABELS, 4, "effective")
    auto = losses.class_weights(LABELS, 4, "auto")
    assert 1 < weights[3] / weights[0] < auto[3] / auto[0]


def test_effective_numbers_need_every_class():
    with pytest.raises(ValueError, match="class_weights 'effective' needs every one of 4 classes"):
        losses.class_weights([0, 1, 2], 4, "effective")


@pytest.mark.parametrize(
    "scheme, loss, sampler, expected",
    [
        ("auto", "ce", "shuffle", [1, 1, 1]),
        ("none", "ce", "shuffle", [60, 30, 10]),
        ("none", "ce", "stratified", [1, 1, 1]),
        ("none", "balanced_softmax", "shuffle", [1, 1, 1]),
        ([1.0, 2.0, 3.0], "focal", "shuffle", [60, 60, 30]),
        ([1.0, 2.0, 3.0], "logit_adjustment", "shuffle", [1, 2, 3]),
    ],
)
def test_asked_shares(scheme, loss, sampler, expected):
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    found = losses.asked_shares(labels, 3, scheme, loss, sampler)
    assert found == pytest.approx(np.array(expected) / sum(expected))
