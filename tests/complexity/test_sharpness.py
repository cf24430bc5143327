"""Sharpness against the maximum of a quadratic over a ball, and against normalised networks."""

import math

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from robustdyn.complexity.sharpness import (
    MEASURES,
    adaptive_sharpness,
    largest_increase,
    normalised_adaptive_sharpness,
    worst_case_sharpness,
)
from robustdyn.curvature import EmpiricalRisk
from tests.complexity.two_layer import (
    REPARAMETRISATIONS,
    assert_model_is_as_before,
    initialised,
    on_examples,
    relu_network,
    tanh_network,
)

BY_NAME = {measure.name: measure for measure in MEASURES}


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs[:, 0] - targets).square()


def quadratic() -> tuple[EmpiricalRisk, Tensor, Tensor]:
    """Linear regression: its risk, gradient (P,) and Hessian (P, P) at the weights."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(50, 8, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 8)
    targets = torch.randn(50, generator=generator, dtype=torch.float64)
    model = nn.Linear(8, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 8, generator=generator, dtype=torch.float64))
    errors = inputs @ model.weight[0].detach() - targets
    risk = EmpiricalRisk(model, inputs, targets, loss=squared_error)
    return risk, inputs.T @ errors / 50, inputs.T @ inputs / 50


def maximum_on_ball(gradient: Tensor, hessian: Tensor, rho: float) -> float:
    """max g·v + v·Hv/2 over ‖v‖ ≤ ρ for H ⪰ 0: v = (ν − H)⁻¹ g with ν > λ_1 such that ‖v‖ = ρ."""
    values, vectors = torch.linalg.eigh(hessian)
    g = vectors.T @ gradient

    def excess(nu: float) -> float:
        return float((g / (nu - values)).norm()) - rho

    top = float(values[-1])
    nu = brentq(excess, top * (1 + 1e-9), top + float(g.norm()) / rho, xtol=1e-14)
    v = g / (nu - values)
    return float(g @ v + 0.5 * (values * v * v).sum())


@pytest.mark.parametrize("rho", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ascent_finds_the_maximum_of_a_quadratic_on_the_ball(rho, adaptive):
    risk, gradient, hessian = quadratic()
    scale = risk.theta().abs() if adaptive else torch.ones(8, dtype=torch.float64)
    exact = maximum_on_ball(scale * gradient, scale[:, None] * hessian * scale, rho)
    found = largest_increase(risk, scale, rho, steps=10)
    assert found <= exact * (1 + 1e-9)
    # each step shrinks the angle to the maximiser by about λ_2/λ_1 or less, and the loss by its square
    assert found > 0.999 * exact


def test_the_first_step_is_that_of_sam():
    network = on_examples(initialised(relu_network))
    loss = nn.functional.cross_entropy(network.model(network.adversarial), network.targets)
    slopes = torch.autograd.grad(loss, list(network.model.parameters()))
    loss = loss.detach()
    length = torch.stack([slope.norm() for slope in slopes]).norm()
    with torch.no_grad():
        for p, slope in zip(network.model.parameters(), slopes, strict=True):
            p += 0.05 * slope / length
        moved = nn.functional.cross_entropy(network.model(network.adversarial), network.targets)
        for p, slope in zip(network.model.parameters(), slopes, strict=True):
            p -= 0.05 * slope / length
    ones = torch.ones(network.risk.numel, dtype=torch.float64)
    assert largest_increase(network.risk, ones, 0.05, steps=1) == pytest.approx(float(moved - loss), rel=1e-9)
    assert worst_case_sharpness(network).value >= float(moved - loss) * (1 - 1e-9)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_no_random_point_of_the_ball_has_a_greater_loss(measure):
    network = on_examples(initialised(tanh_network))
    risk, theta = network.risk, network.risk.theta()
    if measure.name == "normalised_adaptive_sharpness":
        network = on_examples(Normalised(network.model), like=network)
        risk = network.risk
        found = adaptive_sharpness(network).value
    else:
        found = measure(network).value
    scale, rho = (
        (torch.ones_like(theta), 0.05) if measure.name == "worst_case_sharpness" else (theta.abs(), 0.5)
    )
    generator = torch.Generator().manual_seed(0)
    before = risk.value()
    for _ in range(200):
        u = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        assert risk.at(theta + scale * u * rho / u.norm()).value() - before <= found


class Normalised(nn.Module):
    """The network with logits of mean 0 and length 1."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        z = z - z.mean(dim=1, keepdim=True)
        return z / z.norm(dim=1, keepdim=True)


def test_normalised_sharpness_is_the_sharpness_of_the_normalised_network():
    network = on_examples(initialised(relu_network))
    wrapped = on_examples(Normalised(network.model), like=network)
    found = normalised_adaptive_sharpness(network).value
    assert found == pytest.approx(adaptive_sharpness(wrapped).value, rel=1e-9)
    assert found != pytest.approx(adaptive_sharpness(network).value, rel=0.1)


def test_the_size_of_the_logits_counts_only_where_they_are_not_normalised():
    network = on_examples(initialised(relu_network))
    before = {name: measure(network).value for name, measure in BY_NAME.items()}
    with torch.no_grad():
        network.model[2].weight *= 2
        network.model[2].bias *= 2
    larger = on_examples(network.model, like=network)
    assert normalised_adaptive_sharpness(larger).value == pytest.approx(
        before["normalised_adaptive_sharpness"], rel=1e-9
    )
    assert adaptive_sharpness(larger).value > 1.1 * before["adaptive_sharpness"]


@pytest.mark.parametrize("change", REPARAMETRISATIONS)
@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_the_stated_invariances_hold_and_no_other(measure, change):
    build, reparametrise = REPARAMETRISATIONS[change]
    network = on_examples(initialised(build))
    before = measure(network).value
    reparametrise(network.model)
    after = measure(on_examples(network.model, like=network)).value
    if change in measure.invariances:
        assert after == pytest.approx(before, rel=1e-9)
    else:
        assert abs(after / before - 1) > 0.1


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_the_model_is_as_before_even_if_a_pass_fails(measure):
    assert_model_is_as_before(measure, passes=5)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_a_network_whose_loss_is_not_finite_has_no_sharpness(measure):
    network = on_examples(initialised(relu_network))
    with torch.no_grad():
        network.model[0].weight[0, 0] = math.nan
    found = measure(network)
    assert math.isnan(found.value)
    assert "not finite" in found.undefined
