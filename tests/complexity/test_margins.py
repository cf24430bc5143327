"""Tests margins, thickness and entropy against their definitions, one example after the other."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from robustdyn.complexity import MEASURES
from robustdyn.complexity.margins import output_margins
from tests.complexity.plain_network import images, on, trained
from tests.tolerances import MC_SIGMAS


@pytest.fixture
def network():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    clean = torch.randn(60, 4, dtype=torch.float64)
    return on(model, clean, adversarial=clean + 0.7 * torch.randn_like(clean))


def margins(network, inputs):
    found = []
    for x, y in zip(inputs, network.targets, strict=True):
        logits = network.model(x[None])[0].tolist()
        found.append(logits[y] - max(value for k, value in enumerate(logits) if k != y))
    return np.array(found)


@pytest.mark.parametrize("kind", ["clean", "robust"])
def test_margins_and_their_share_of_the_spectral_product(network, kind):
    each = margins(network, network.clean if kind == "clean" else network.adversarial)
    product = math.prod(float(torch.linalg.matrix_norm(network.model[k].weight.detach(), 2)) for k in (0, 2))
    mean, low = MEASURES[f"margin_mean_{kind}"](network), MEASURES[f"margin_p10_{kind}"](network)
    assert mean.value == pytest.approx(each.mean(), rel=1e-10)
    assert mean.standard_error == pytest.approx(each.std(ddof=1) / 60**0.5, rel=1e-10)
    assert low.value == pytest.approx(sorted(each)[5], rel=1e-10)  # the 6th smallest of 60
    for name, one in (("mean", mean), ("p10", low)):
        over = MEASURES[f"margin_{name}_{kind}_over_spectral"](network)
        assert over.value == pytest.approx(one.value / product, rel=1e-10)
        assert over.standard_error == pytest.approx(one.standard_error / product, rel=1e-10)


def test_the_error_of_the_percentile_is_its_spread_over_samples():
    """Over 200 samples of 400 examples."""
    torch.manual_seed(2)
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]]))
    values, errors = [], []
    for _ in range(200):
        inputs = torch.randn(400, 1, dtype=torch.float64)
        found = MEASURES["margin_p10_clean"](on(model, inputs, targets=torch.zeros(400, dtype=torch.long)))
        values.append(found.value)
        errors.append(found.standard_error)
    # the spread of 200 values is known to a relative 1/√400
    assert np.mean(errors) == pytest.approx(np.std(values), rel=MC_SIGMAS / 20)


@pytest.mark.parametrize("kind", ["clean", "robust"])
def test_entropy(network, kind):
    inputs = network.clean if kind == "clean" else network.adversarial
    p = network.model(inputs).softmax(dim=1).detach().numpy()
    each = -(p * np.log(p)).sum(axis=1)
    found = MEASURES[f"entropy_{kind}"](network)
    assert found.value == pytest.approx(each.mean(), rel=1e-10)
    assert found.standard_error == pytest.approx(each.std(ddof=1) / 60**0.5, rel=1e-8)


def test_entropy_of_certain_and_of_uniform_predictions():
    certain = on(nn.Linear(2, 4).double(), torch.ones(4, 2, dtype=torch.float64))
    with torch.no_grad():
        certain.model.weight.zero_()
        certain.model.bias.copy_(torch.tensor([0.0, 1e4, 0.0, 0.0]))
    assert MEASURES["entropy_clean"](certain).value == 0.0
    uniform = on(nn.Linear(2, 4).double(), torch.ones(4, 2, dtype=torch.float64))
    with torch.no_grad():
        uniform.model.weight.zero_()
        uniform.model.bias.zero_()
    assert MEASURES["entropy_clean"](uniform).value == pytest.approx(math.log(4))


def test_boundary_thickness_of_each_segment(network):
    each = []
    for start, end in zip(network.clean, network.adversarial, strict=True):
        i, j = (int(network.model(x[None]).argmax()) for x in (start, end))
        if i == j:
            continue
        inside = 0
        for t in (np.arange(32) + 0.5) / 32:
            p = network.model(((1 - t) * start + t * end)[None]).softmax(dim=1)[0]
            inside += 0 < (p[i] - p[j]).item() < 0.75
        each.append(float((end - start).norm()) * inside / 32)
    assert len(each) > 10
    found = MEASURES["boundary_thickness"](network)
    assert found.value == pytest.approx(np.mean(each), rel=1e-10)
    assert found.standard_error == pytest.approx(np.std(each, ddof=1) / len(each) ** 0.5, rel=1e-8)
    assert found.gradients == pytest.approx((2 + 32 * len(each) / 60) / 3)


def test_thickness_of_a_linear_boundary_is_its_exact_width():
    """p_0 − p_1 = tanh(2x) on a segment from 1 to −1: between 0 and 0.75 for x up to ½ artanh 0.75."""
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0], [-2.0]]))
    inputs = torch.ones(3, 1, dtype=torch.float64)
    found = MEASURES["boundary_thickness"](on(model, inputs, adversarial=-inputs)).value
    assert found == pytest.approx(math.atanh(0.75) / 2, abs=2 / 32)  # one interval of the segment


def test_without_a_changed_prediction_there_is_no_thickness():
    found = MEASURES["boundary_thickness"](on(trained(), images(), adversarial=images() * (1 + 1e-9)))
    assert math.isnan(found.value)
    assert "changes the prediction of no example" in found.undefined


def test_margins_of_one_output_say_that_there_are_none():
    model = nn.Linear(2, 1).double()
    inputs = torch.rand(5, 2, dtype=torch.float64)
    found = MEASURES["margin_mean_clean"](on(model, inputs, targets=torch.zeros(5, dtype=torch.long)))
    assert "two or more classes" in found.undefined
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    assert output_margins(logits, torch.tensor([1, 0])).tolist() == [1.0, -5.0]
