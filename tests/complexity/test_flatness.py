"""Traces, the largest eigenvalue and relative flatness against dense Hessians and loops over examples."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustdyn.complexity import UndefinedMeasure
from robustdyn.complexity.flatness import (
    MEASURES,
    fisher_trace,
    hessian_lambda_1,
    hessian_trace,
    relative_flatness,
)
from robustdyn.curvature import EmpiricalRisk
from robustdyn.curvature.gauss_newton_blocks import example_gradient_norms
from tests.cases import CASES
from tests.complexity.two_layer import (
    EXAMPLES,
    REPARAMETRISATIONS,
    assert_model_is_as_before,
    batchnorm_network,
    dense_hessian,
    initialised,
    on_examples,
    relu_network,
    tanh_network,
)
from tests.tolerances import EXACT64, MC_SIGMAS


@pytest.mark.parametrize("build", [relu_network, batchnorm_network])
def test_the_trace_of_a_piecewise_linear_network_is_that_of_the_dense_hessian(build):
    network = on_examples(initialised(build))
    found = hessian_trace(network)
    assert found.value == pytest.approx(float(dense_hessian(network).trace()), **_approx())
    assert found.gradients == 1 + 3 * 2 / 3  # three classes


def test_the_trace_of_a_smooth_network_is_estimated():
    network = on_examples(initialised(tanh_network))
    found = hessian_trace(network)
    assert abs(found.value - float(dense_hessian(network).trace())) < MC_SIGMAS * found.standard_error
    assert found.gradients == 24


def test_the_standard_error_of_the_trace_is_over_examples():
    network = on_examples(initialised(relu_network))
    traces = []
    for i in range(EXAMPLES):
        one = slice(i, i + 1)
        part = replace(network, adversarial=network.adversarial[one], targets=network.targets[one])
        traces.append(dense_hessian(part).trace())
    spread = float(torch.stack(traces).std()) / EXAMPLES**0.5
    assert hessian_trace(network).standard_error == pytest.approx(spread, **_approx())


@pytest.mark.parametrize("build", [relu_network, tanh_network, batchnorm_network])
def test_the_largest_eigenvalue_is_that_of_the_dense_hessian(build):
    network = on_examples(initialised(build))
    found = hessian_lambda_1(network)
    exact = torch.linalg.eigvalsh(dense_hessian(network))
    # a residual of 1 % and an error of its square over the gap, which is at least a tenth of λ_1 here
    assert float(exact[-1] - exact[-2]) > 0.1 * float(exact[-1])
    assert found.value == pytest.approx(float(exact[-1]), rel=1e-3)
    assert found.gradients <= 60


@pytest.mark.parametrize("build", [relu_network, tanh_network, batchnorm_network])
def test_the_fisher_trace_is_the_mean_squared_gradient_of_an_example(build):
    network = on_examples(initialised(build))
    squares = []
    for x, y in zip(network.adversarial, network.targets, strict=True):
        loss = F.cross_entropy(network.model(x[None]), y[None])
        slopes = torch.autograd.grad(loss, list(network.model.parameters()))
        squares.append(sum(float(slope.square().sum()) for slope in slopes))
    squares = torch.tensor(squares, dtype=torch.float64)
    found = fisher_trace(network)
    assert found.value == pytest.approx(float(squares.mean()), **_approx())
    assert found.standard_error == pytest.approx(float(squares.std()) / EXAMPLES**0.5, **_approx())


@pytest.mark.parametrize("name", ["conv_norm_uneven", "preact"])
def test_one_pass_gives_every_example_s_gradient_norm_for_each_tensor(name):
    case = CASES[name]
    model, inputs, targets = case.problem()
    risk = EmpiricalRisk(model, inputs, targets, chunk_size=case.chunk_size)
    found = example_gradient_norms(risk, risk.names)
    for row, x, y in zip(found, inputs, targets, strict=True):
        slopes = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        torch.testing.assert_close(row, torch.stack([s.square().sum() for s in slopes]), **EXACT64)


@pytest.mark.parametrize("build", [relu_network, tanh_network, batchnorm_network])
def test_relative_flatness_is_the_definition_with_the_dense_hessian_of_the_last_layer(build):
    network = on_examples(initialised(build))
    weight = network.model[-1].weight.detach()
    rows, columns = weight.shape
    bias = network.model[-1].bias.numel()
    block = dense_hessian(network)[-rows * columns - bias : -bias, -rows * columns - bias : -bias]
    block = block.view(rows, columns, rows, columns)
    exact = sum(
        float(weight[s] @ weight[t]) * float(block[s, :, t, :].trace())
        for s in range(rows)
        for t in range(rows)
    )
    found = relative_flatness(network)
    assert found.value == pytest.approx(exact, **_approx())
    assert 0 < found.standard_error < found.value


def test_relative_flatness_needs_a_linear_last_layer():
    network = on_examples(initialised(lambda: nn.Sequential(*relu_network(), nn.Softplus())))
    with pytest.raises(UndefinedMeasure, match="linear layer"):
        relative_flatness(network)


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
    assert_model_is_as_before(measure, passes=1)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_a_network_whose_loss_is_not_finite_has_no_flatness(measure):
    network = on_examples(initialised(relu_network))
    with torch.no_grad():
        network.model[0].weight[0, 0] = math.nan
    found = measure(network)
    assert math.isnan(found.value)
    assert "not finite" in found.undefined


def _approx() -> dict[str, float]:
    return {"rel": EXACT64["rtol"], "abs": EXACT64["atol"]}
