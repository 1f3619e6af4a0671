import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

import losses


def test_auto_weights_equal_scikit_learn():
    labels = np.repeat([0, 1, 2, 3], [290, 162, 233, 58])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    for given in (labels, labels.tolist(), torch.from_numpy(labels)):
        weights = losses.class_weights(given, 4, "auto")
        assert weights.dtype == torch.float32 and np.allclose(weights.numpy(), expected, rtol=1e-6)


def test_other_schemes():
    assert losses.class_weights([0], 4, "none").tolist() == [1, 1, 1, 1]
    assert losses.class_weights([0], 4, [1, 2, 3, 4.5]).tolist() == [1, 2, 3, 4.5]


@pytest.mark.parametrize("labels, scheme, message", [
    ([0, 1, 2], "auto", "every one of 4 classes"), ([0, 1, 2, 3, 4], "auto", "every one"), ([0, 1, 2, 3, -1], "auto", "every one"), ([0], [1, 2], "4 numbers"),
    ([0], [1, 2, 3, -1], "4 numbers"), ([0], [1, 2, 3, math.nan], "4 numbers"), ([0], [0, 0, 0, 0], "not all zero"), ([0], "balanced", "'auto', 'none' or a list")])
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


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 2.0, 4.0]])
def test_focal_equals_its_formula(gamma, weight):
    torch.manual_seed(0)
    logits, targets = torch.randn(20, 4, dtype=torch.float64), torch.randint(4, (20,))
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    assert losses.focal_loss(logits, targets, w, gamma).item() == pytest.approx(slow_focal(logits, targets, weight or [1] * 4, gamma), abs=1e-12)
    if gamma == 0:
        assert torch.allclose(losses.focal_loss(logits, targets, w, 0.0), F.cross_entropy(logits, targets, weight=w))
        assert torch.allclose(losses.cross_entropy(logits, targets, w), F.cross_entropy(logits, targets, weight=w))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.focal_loss(z, targets, w, gamma), logits)


def test_focal_gradient_is_finite_where_the_answer_is_certain():
    logits = torch.tensor([[200.0, 0, 0, 0]], requires_grad=True)
    losses.focal_loss(logits, torch.tensor([0]), gamma=0.5).backward()
    assert torch.isfinite(logits.grad).all()
