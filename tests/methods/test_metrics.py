import pytest
import torch
from torch.nn import functional as F

from robustdyn.methods.metrics import LossAndError, RobustMetrics
from tests.tolerances import EXACT32


def draw(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 5, generator=generator), torch.randint(5, (count,), generator=generator)


def test_uneven_batches_count_by_their_examples():
    # torchmetrics' MeanMetric forgets the weights it is given when its check for NaN is switched off
    batches = [draw(32), draw(7)]
    metric = LossAndError()
    for logits, targets in batches:
        metric.update(logits, targets)
    logits, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss, error = metric.compute()
    assert loss == pytest.approx(float(F.cross_entropy(logits, targets)), rel=EXACT32["rtol"])
    assert error == pytest.approx(float((logits.argmax(1) != targets).double().mean()), abs=1e-7)


def test_with_probabilities_the_error_is_the_expected_one():
    logits, targets = draw(9)
    mixed = 0.7 * F.one_hot(targets, 5) + 0.3 * F.one_hot(targets.roll(1), 5)
    metric = LossAndError()
    metric.update(logits, mixed)
    predicted = logits.argmax(1)
    expected = 0.7 * (predicted != targets).float() + 0.3 * (predicted != targets.roll(1)).float()
    assert metric.compute()[1] == pytest.approx(float(expected.mean()), rel=EXACT32["rtol"])


def test_a_nan_loss_shows():
    metric = LossAndError()
    metric.update(torch.full((2, 5), float("nan")), torch.tensor([0, 1]))
    assert metric.compute()[0] != metric.compute()[0]


def test_what_was_not_seen_is_left_out():
    metrics = RobustMetrics()
    metrics.clean.update(*draw(3))
    assert set(metrics.compute("train")) == {"train_clean_loss", "train_clean_error"}
    metrics.reset()
    assert metrics.compute("train") == {}
