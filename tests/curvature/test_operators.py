import pytest
import torch
from torch import nn
from torch.testing import assert_close

from robustdyn.curvature import (
    EmpiricalRisk,
    GradientCovariance,
    Hessian,
    gradient_projections,
    projected_covariance,
)
from tests.cases import CASES
from tests.curvature.reference import (
    SMOOTH,
    check_operator_contract,
    dense_gradients,
    dense_hessian,
    generator,
    random,
    risk_of,
)
from tests.tolerances import EXACT64, FD


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_hessian_is_dense_autograd(case):
    risk = risk_of(case)
    check_operator_contract(Hessian(risk), dense_hessian(risk))


def test_hessian_closed_form():
    # Softmax regression: H = (1/m) Σ_i (diag p_i − p_i p_iᵀ) ⊗ x_i x_iᵀ.
    risk = risk_of(CASES["softmax"])
    p = risk.model(risk.inputs).softmax(dim=1).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    outer = risk.inputs[:, :, None] * risk.inputs[:, None, :]
    closed = torch.stack([torch.kron(c, o) for c, o in zip(curvature, outer, strict=True)]).mean(dim=0)
    check_operator_contract(Hessian(risk), closed)


@pytest.mark.parametrize("case", SMOOTH, ids=lambda c: c.name)
def test_hessian_is_the_slope_of_the_gradient(case):
    risk = risk_of(case)
    theta, direction, step = risk.theta(), random(risk.numel), 1e-5
    slope = (risk.at(theta + step * direction).gradient() - risk.at(theta - step * direction).gradient()) / (
        2 * step
    )
    assert_close(Hessian(risk) @ direction, slope, **FD)


def test_hessian_with_batch_statistics():
    model, inputs, targets = CASES["preact"].problem()
    risk = EmpiricalRisk(model, inputs, targets, batchnorm="train")
    hessian = Hessian(risk)
    check_operator_contract(hessian)
    # Smooth in θ away from ReLU kinks; a short step stays on one side of them for this problem.
    theta, direction, step = risk.theta(), random(risk.numel), 1e-6
    slope = (risk.at(theta + step * direction).gradient() - risk.at(theta - step * direction).gradient()) / (
        2 * step
    )
    assert_close(hessian @ direction, slope, rtol=1e-4, atol=1e-5)


def test_hessian_of_a_loss_linear_in_the_weights_is_zero():
    risk = EmpiricalRisk(
        nn.Linear(4, 1).double(), random(6, 4), random(6), loss=lambda out, y: out[:, 0] - y, chunk_size=4
    )
    assert torch.equal(Hessian(risk) @ random(risk.numel), torch.zeros(risk.numel, dtype=torch.float64))


def test_hessian_of_a_filtered_risk_is_the_block():
    model, inputs, targets = CASES["preact"].problem()
    full = EmpiricalRisk(model, inputs, targets)
    some = EmpiricalRisk(model, inputs, targets, parameters=["conv1.weight", "linear.bias"])
    rows = torch.cat([torch.arange(full.numel)[full.blocks[name]] for name in some.names])
    check_operator_contract(Hessian(some), dense_hessian(full)[rows][:, rows])


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_gradient_covariance_is_dense(case):
    risk = risk_of(case)
    gradients = dense_gradients(risk)
    dense = torch.cov(gradients.T, correction=0)
    check_operator_contract(GradientCovariance(risk), dense)
    # trace of C₁ is the mean squared deviation
    centred = gradients - gradients.mean(dim=0)
    assert_close(dense.trace(), centred.square().sum(dim=1).mean(), **EXACT64)

    directions = random(risk.numel, 3)
    assert_close(gradient_projections(risk, directions), gradients @ directions, **EXACT64)
    projected = projected_covariance(risk, directions)
    assert_close(projected.covariance, torch.cov((gradients @ directions).T), **EXACT64)
    assert_close(projected.variances, projected.covariance.diagonal(), **EXACT64)
    assert_close(projected.mean, risk.gradient() @ directions, **EXACT64)
    assert (projected.examples, projected.products) == (case.examples, 3)


def test_variance_standard_errors_cover_the_population():
    """Softmax regression on resampled data: the standard error predicts the spread of the variance."""
    g = generator(3)
    model = CASES["softmax"].problem()[0]
    estimates, errors = [], []
    direction = random(12, 1)
    for _ in range(200):
        inputs = torch.randn(40, 4, generator=g, dtype=torch.float64)
        targets = torch.randint(3, (40,), generator=g)
        result = projected_covariance(EmpiricalRisk(model, inputs, targets), direction)
        estimates.append(result.variances[0])
        errors.append(result.standard_errors[0])
    ratio = torch.stack(errors).square().mean().sqrt() / torch.stack(estimates).std()
    # Heavy tails and 200 repetitions: the spread itself is known to about 10 %, and the sample fourth moment
    # is biased low by O(1/m) kurtosis terms.
    assert 0.75 < ratio < 1.25


def test_covariance_refusals():
    model, inputs, targets = CASES["preact"].problem()
    batch = EmpiricalRisk(model, inputs, targets, batchnorm="train")
    for measure in (
        lambda: GradientCovariance(batch),
        lambda: gradient_projections(batch, random(batch.numel, 1)),
        lambda: projected_covariance(batch, random(batch.numel, 1)),
    ):
        with pytest.raises(ValueError, match="batchnorm='eval'"):
            measure()
    risk = EmpiricalRisk(model, inputs, targets)
    with pytest.raises(ValueError, match="directions must be"):
        gradient_projections(risk, random(risk.numel))
    with pytest.raises(ValueError, match="two examples"):
        projected_covariance(EmpiricalRisk(model, inputs[:1], targets[:1]), random(risk.numel, 1))


def test_matvec_refuses_foreign_vectors():
    hessian = Hessian(risk_of(CASES["softmax"]))
    with pytest.raises(ValueError, match="shape"):
        hessian.matvec(random(5))
    with pytest.raises(ValueError, match="float64 tensor"):
        hessian.matvec(random(12).float())
