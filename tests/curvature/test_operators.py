"""Tests the operators against dense matrices, their products with matrices, sampled noise, and the cost."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from robustdyn.curvature import (
    DiagonallyScaled,
    EmpiricalRisk,
    GaussNewton,
    GradientCovariance,
    Hessian,
    gradient_covariance,
    gradient_projections,
    hutchinson_trace,
    lanczos,
    projected_covariance,
)
from robustdyn.theory import adam_scale, whiten
from tests.cases import CASES
from tests.curvature.reference import (
    DENSE,
    OPERATORS,
    PLENTY,
    SMOOTH,
    check_operator_contract,
    dense_covariance,
    dense_gauss_newton,
    dense_gradients,
    dense_hessian,
    generator,
    random,
    risk_of,
)
from tests.tolerances import EXACT64, FD, MC_SIGMAS


def slope_of_gradient(risk: EmpiricalRisk, direction: Tensor, step: float) -> Tensor:
    ahead, behind = (risk.at(risk.theta() + sign * step * direction).gradient() for sign in (1, -1))
    return (ahead - behind) / (2 * step)


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
    direction = random(risk.numel)
    assert_close(Hessian(risk) @ direction, slope_of_gradient(risk, direction, 1e-5), **FD)


def test_hessian_with_batch_statistics():
    model, inputs, targets = CASES["preact"].problem()
    risk = EmpiricalRisk(model, inputs, targets, batchnorm="train")
    hessian, direction = Hessian(risk), random(risk.numel)
    check_operator_contract(hessian)
    # Smooth in θ away from ReLU kinks; a short step stays on one side of them for this problem.
    slope = slope_of_gradient(risk, direction, 1e-6)
    assert_close(hessian @ direction, slope, rtol=1e-4, atol=1e-5)


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


@pytest.mark.slow  # many samples
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


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_gauss_newton_is_dense(case):
    risk = risk_of(case)
    dense = dense_gauss_newton(risk)
    operator = GaussNewton(risk)
    check_operator_contract(operator, dense)
    eigenvalues = torch.linalg.eigvalsh(operator @ torch.eye(risk.numel, dtype=torch.float64))
    assert eigenvalues[-1] > 0.0
    assert eigenvalues[0] > -1e-13 * eigenvalues[-1] * risk.numel  # P eps, the rounding of eigvalsh
    if case.name == "softmax":
        assert_close(dense, dense_hessian(risk), **EXACT64)
        vector = random(risk.numel)
        assert_close(operator @ vector, Hessian(risk) @ vector, **EXACT64)


def test_gauss_newton_is_the_models_own_fisher_information():
    """For cross-entropy: the mean over inputs and over the model's own labels of ∇ℓ ∇ℓᵀ."""
    model, inputs, _ = CASES["conv_norm_uneven"].problem()
    risk = EmpiricalRisk(model, inputs, torch.zeros(5, dtype=torch.long))
    probabilities = model(inputs).softmax(dim=1).detach()
    fisher = torch.zeros(risk.numel, risk.numel, dtype=torch.float64)
    for label in range(3):
        gradients = dense_gradients(EmpiricalRisk(model, inputs, torch.full((5,), label)))
        fisher += gradients.T @ (probabilities[:, label, None] * gradients) / 5
    check_operator_contract(GaussNewton(risk), fisher)


@pytest.mark.parametrize("memory", [None, PLENTY])
@pytest.mark.parametrize("kind", [*OPERATORS, "scaled"])
def test_a_matrix_is_its_columns(kind, memory):
    risk = risk_of(CASES["preact"], memory=memory)
    if kind == "scaled":
        operator = DiagonallyScaled(GradientCovariance(risk), random(risk.numel, seed=5))
    else:
        operator = OPERATORS[kind](risk)
    matrix = random(risk.numel, 3)
    for given in (matrix, matrix.T.contiguous().T, matrix.clone().requires_grad_()):
        columns = torch.stack([operator @ column for column in matrix.T], dim=1)
        image = operator @ given
        assert not image.requires_grad
        # the same numbers are added in the same order, but ḡ (ḡᵀ V) is a matrix product
        if kind in ("hessian", "gauss_newton"):
            assert torch.equal(image, columns)
        assert_close(image, columns, **EXACT64)
    assert (operator @ matrix[:, :0]).shape == (risk.numel, 0)
    assert_close(operator @ matrix[:, :1], columns[:, :1], **EXACT64)
    for wrong in (matrix[:-1], matrix.float(), torch.zeros((), dtype=torch.float64)):
        with pytest.raises(ValueError, match="expected"):
            _ = operator @ wrong
    with pytest.raises(ValueError, match="shape"):
        operator.matvec(matrix[:-1, 0])
    with pytest.raises(ValueError, match="float64 tensor"):
        operator.matvec(matrix[:, 0].float())


def test_diagonally_scaled():
    risk = risk_of(CASES["preact"])
    scale = random(risk.numel, seed=4)
    scale[3] = 0.0
    dense = dense_hessian(risk)
    for name, kind in OPERATORS.items():
        operator = DiagonallyScaled(kind(risk), scale)
        facts = (operator.shape, operator.dtype, operator.device)
        assert facts == ((risk.numel, risk.numel), torch.float64, risk.device)
        matrix = dense if name == "hessian" else DENSE[name](risk)
        check_operator_contract(operator, scale[:, None] * matrix * scale)
    twice = DiagonallyScaled(DiagonallyScaled(Hessian(risk), scale), scale)
    check_operator_contract(twice, scale[:, None] ** 2 * dense * scale**2)


def test_diagonally_scaled_refusals():
    hessian_ = Hessian(risk_of(CASES["softmax"]))
    scale = random(12)
    for wrong in (scale[:-1], scale[:, None], scale[0]):
        with pytest.raises(ValueError, match="shape"):
            DiagonallyScaled(hessian_, wrong)
    with pytest.raises(ValueError, match="float64 tensor"):
        DiagonallyScaled(hessian_, scale.float())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            DiagonallyScaled(hessian_, torch.where(scale > 0, scale, bad))


def test_diagonally_scaled_does_not_follow_the_callers_tensor():
    scale, vector = random(12), random(12, seed=1)
    operator = DiagonallyScaled(Hessian(risk_of(CASES["softmax"])), scale)
    before = operator @ vector
    scale.mul_(2.0)
    assert torch.equal(operator @ vector, before)


def test_diagonally_scaled_is_what_adam_sees():
    """The theory's whitened problem, computed there with dense numpy matrices."""
    risk = risk_of(CASES["tanh_mlp"])
    second_moment = random(risk.numel, seed=6).square().numpy()
    diagonal = adam_scale(second_moment, 1e-2)
    curved, noise = dense_hessian(risk).numpy(), dense_covariance(risk).numpy()
    problem = whiten(curved, noise, diagonal, weight_decay=0.0)

    root = torch.from_numpy(np.sqrt(diagonal))
    curvature = DiagonallyScaled(Hessian(risk), root)
    identity = torch.eye(risk.numel, dtype=torch.float64)
    found = torch.linalg.eigvalsh(curvature @ identity)
    wanted = torch.from_numpy(problem.eigenvalue)
    # rounding of an eigenvalue is relative to the largest one
    assert_close(found, wanted, rtol=0.0, atol=1e-12 * float(wanted.abs().max()))
    top = lanczos(
        curvature, 5, which="magnitude", tol=1e-10, max_products=200, generator=generator(), verify=True
    )
    assert top.all_converged
    order = wanted.abs().argsort(descending=True)
    # for a symmetric operator the error is at most the residual
    assert_close(top.eigenvalues, wanted[order[:5]], rtol=0.0, atol=1e-10 * float(wanted.abs().max()))

    # y = D^{−1/2} θ = basis of the problem in these coordinates, orthonormal there
    basis = torch.from_numpy(problem.basis) / root[:, None]
    assert_close(basis.T @ basis, identity, rtol=0.0, atol=1e-12)
    projected = basis.T @ (DiagonallyScaled(GradientCovariance(risk), root) @ basis)
    assert_close(projected, torch.from_numpy(problem.noise), rtol=1e-9, atol=1e-11)


def test_sampled_noise_has_the_covariance(monkeypatch):
    """All 2⁵ sign vectors of five examples: E z = 0 and E z zᵀ = C₁ without any chance."""
    risk = risk_of(CASES["preact"])
    operator = GradientCovariance(risk)
    drawn = operator.sample(generator(3))
    choices = [torch.tensor(signs, dtype=torch.float64) for signs in product((-1.0, 1.0), repeat=5)]
    queue = iter(choices)
    monkeypatch.setattr(gradient_covariance, "rademacher", lambda *arguments: next(queue))
    samples = torch.stack([operator.sample(generator()) for _ in choices])
    assert_close(samples.mean(dim=0), torch.zeros(risk.numel, dtype=torch.float64), **EXACT64)
    assert_close(samples.T @ samples / len(samples), dense_covariance(risk), **EXACT64)
    # and what is drawn by itself is one of these
    distances = (samples - drawn).norm(dim=1)
    assert distances.min() < 1e-12 * drawn.norm()
    gradients = dense_gradients(risk)
    centred = gradients - gradients.mean(dim=0)
    signs = choices[int(distances.argmin())]
    assert_close(drawn, signs @ centred / 5**0.5, **EXACT64)


def test_sampled_noise_is_drawn_from_the_generator_alone():
    risk = risk_of(CASES["norm_mlp"])
    operator = GradientCovariance(risk)
    torch.manual_seed(1)
    first = operator.sample(generator(7))
    torch.manual_seed(2)
    assert torch.equal(operator.sample(generator(7)), first)
    source = generator(7)
    assert torch.equal(operator.sample(source), first)
    assert not torch.equal(operator.sample(source), first)
    # Tr C₁ = E‖z‖²; a sum over pairs of examples, so far from constant
    draws = torch.stack([operator.sample(source).square().sum() for _ in range(200)])
    trace = dense_covariance(risk).trace()
    assert (draws.mean() - trace).abs() < MC_SIGMAS * draws.std() / 200**0.5
    assert hutchinson_trace(operator, 4, generator()).estimate > 0


def flops(function: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def costs() -> dict[str, float]:
    """Multiplications of convolutions and matrices in one product, in units of one gradient's."""
    torch.manual_seed(0)
    width = 8
    blocks = [
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        for _ in range(6)
    ]
    stem, head = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, 3)
    model = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    inputs, targets = torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    risk, fresh = (EmpiricalRisk(model, inputs, targets, memory=memory) for memory in (PLENTY, None))
    vector = torch.randn(risk.numel)
    operators = {name: kind(risk) for name, kind in OPERATORS.items()}
    measured = {name: lambda o=operator: o.matvec(vector) for name, operator in operators.items()}
    measured["projections"] = lambda: gradient_projections(risk, vector[:, None])
    measured["hessian, graph not kept"] = lambda: Hessian(fresh).matvec(vector)
    _ = operators["hessian"] @ vector
    gradient = flops(lambda: F.cross_entropy(model(inputs), targets).backward())
    assert flops(risk.gradient) == gradient
    return {name: flops(measure) / gradient for name, measure in measured.items()}


# What the docstrings promise in gradients' time. A forward pass is a third of a gradient's; products with J
# and Jᵀ are two thirds each.
@pytest.mark.parametrize(
    ("name", "promised"),
    [
        ("hessian", 2),
        ("hessian, graph not kept", 3),
        ("gauss_newton", 4 / 3),
        ("covariance", 4 / 3),
        ("projections", 2 / 3),
    ],
)
def test_cost_of_a_product(costs, name, promised):
    # 5 % for the first layer, whose input has no derivative: 1/8 of the others' work, in a third of the terms
    assert promised / 1.05 < costs[name] < 1.05 * promised
