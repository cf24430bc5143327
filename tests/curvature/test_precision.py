"""Tests the accuracy of float32 and bfloat16, and the settings of torch that belong to them.

The measured numbers in the comments are for one thread of an x86 CPU. Bounds are at least five times larger.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from robustdyn.curvature import (
    EmpiricalRisk,
    GaussNewton,
    GradientCovariance,
    Hessian,
    LinearOperator,
    eigen_residuals,
    gradient_projections,
    lanczos,
)
from robustdyn.curvature.risk_function import tensor_float_32
from tests.cases import CASES, _unsettle
from tests.curvature.reference import generator, random

EPS32 = torch.finfo(torch.float32).eps / 2
HALF = torch.finfo(torch.bfloat16).eps / 2
OPERATORS = {"hessian": Hessian, "gauss_newton": GaussNewton, "covariance": GradientCovariance}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


class Net(nn.Module):
    """Six convolutions or linear layers and five norms, 8865 parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 12, 12, 16, 16, 20)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=1 + (a != b), padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=(2, 3)))


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A problem in float32; its copy in float64 holds the same numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Net().eval()
        _unsettle(model)
    inputs = random(24, 3, 16, 16).float()
    return model, inputs, torch.arange(24) % 5


def pair(precision: str) -> tuple[EmpiricalRisk, EmpiricalRisk]:
    """The risk in float32 and the given precision, and in float64."""
    model, inputs, targets = problem()
    exact = EmpiricalRisk(copy.deepcopy(model).double(), inputs.double(), targets)
    return EmpiricalRisk(model, inputs, targets, precision=precision), exact


def errors(precision: str, seed: int) -> dict[str, float]:
    """Relative errors of products with a random vector."""
    risk, exact = pair(precision)
    vector = random(risk.numel, seed=seed).float()
    found = {name: kind(risk) @ vector for name, kind in OPERATORS.items()}
    found["projections"] = gradient_projections(risk, vector[:, None])
    wanted = {name: kind(exact) @ vector.double() for name, kind in OPERATORS.items()}
    wanted["projections"] = gradient_projections(exact, vector.double()[:, None])
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    return {name: relative(found[name], wanted[name]) for name in found}


# ---------------------------------------------------------------------- float32


@pytest.mark.parametrize("precision", ["full", "tf32"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_products(precision, seed):
    """On a CPU TensorFloat-32 is float32.

    Four passes through eleven layers and a loss, each of which rounds once or a few times at random. If all
    of 48 roundings added up: 3e-6. Measured are 1e-7 to 3e-7.
    """
    for name, error in errors(precision, seed).items():
        assert 0.0 < error < 48 * EPS32, name


def test_float32_eigenvalues():
    """An eigenvalue moves by no more than a product with its eigenvector: measured 1e-7, relative."""
    risk, exact = pair("full")
    settings = {"which": "largest", "tol": 1e-4, "max_products": 100}
    found = lanczos(Hessian(risk), 5, generator=generator(), **settings)
    wanted = lanczos(Hessian(exact), 5, generator=generator(), **settings)
    assert found.all_converged
    assert wanted.all_converged
    # the error of a Ritz value is the square of its residual, 1e-8, over a gap of order one tenth
    assert (found.eigenvalues / wanted.eigenvalues - 1).abs().max() < 48 * EPS32


def long_problem() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 2))
    # examples of different length, so that the leading eigenvalues are apart
    return model, (0.8 ** torch.arange(20)[:, None] * random(20, 784) / 4).float(), torch.arange(20) % 2


@pytest.mark.parametrize("max_basis", [24, pytest.param(None, marks=pytest.mark.slow)])
def test_float32_basis_stays_orthonormal(max_basis):
    """P = 201 474 and sixty products, long after the leading pairs have converged."""
    model, inputs, targets = long_problem()
    risk = EmpiricalRisk(model, inputs, targets, memory=10**9)
    exact = EmpiricalRisk(copy.deepcopy(model).double(), inputs.double(), targets, memory=10**9)
    assert risk.numel == 201_474
    settings = {"which": "largest", "tol": 1e-5, "max_products": 60, "max_basis": max_basis}
    found = lanczos(Hessian(risk), 10, generator=generator(), **settings)
    wanted = lanczos(Hessian(exact), 10, generator=generator(), **settings)
    gram = found.eigenvectors.double().T @ found.eigenvectors.double()
    lengths = gram.diagonal()
    # n EPS32 for combinations of sixty vectors; measured 9e-7
    assert (gram - lengths.diag()).abs().max() < 60 * EPS32
    # a float32 sum of P squares on top; measured 4e-6
    assert (lengths - 1.0).abs().max() < 2e-5
    assert wanted.converged.sum() == 5
    assert torch.equal(found.converged, wanted.converged)
    first = slice(0, 5)
    assert_close(
        found.eigenvalues[first], wanted.eigenvalues[first], rtol=0.0, atol=48 * EPS32 * wanted.eigenvalues[0]
    )
    residuals = eigen_residuals(Hessian(risk), found.eigenvalues[first], found.eigenvectors[:, first])
    assert (residuals <= 1e-5 * found.eigenvalues[0]).all()
    assert (found.restarts > 0) == (max_basis is not None)


class Diagonal(LinearOperator):
    def __init__(self, diagonal: Tensor) -> None:
        super().__init__(len(diagonal), diagonal.dtype, diagonal.device)
        self.diagonal = diagonal

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.diagonal * vector


def test_long_vectors():
    """Four million parameters on a CPU. With sums in slabs of 2^16, or in float64, the errors are 3e-6."""
    diagonal = torch.ones(4_000_000)
    diagonal[:1_500_000], diagonal[:1000], diagonal[:20] = 2.0, 10.0, 200.0
    operator = Diagonal(diagonal)
    found = lanczos(operator, 2, which="largest", tol=1e-4, max_products=30, generator=generator())
    assert_close(found.eigenvalues, torch.full((2,), 200.0, dtype=torch.float64), rtol=1e-5, atol=0.0)
    lengths = found.eigenvectors.double().norm(dim=0)
    assert_close(lengths, torch.ones_like(lengths), rtol=0.0, atol=1e-5)
    residuals = eigen_residuals(operator, found.eigenvalues, found.eigenvectors)
    assert (residuals <= 1e-5 * 200.0).all()


# ---------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bfloat16_products(seed):
    """Six convolutions or linear layers in four passes, with two factors and one result rounded in each.

    These 72 roundings are of HALF/√3 at most, root mean square, and have random signs: 0.019. The bound is
    twice that, because the terms of a product partly cancel. Measured: 0.010 to 0.015 for H, which contains
    differences; 0.002 to 0.007 for the others.
    """
    typical = (72 / 3) ** 0.5 * HALF
    for name, error in errors("bfloat16", seed).items():
        assert HALF / 10 < error < 2 * typical, name


def test_bfloat16_eigenvalues():
    """Leading eigenvectors are sums over many examples, whose errors average out: measured 8e-4."""
    risk, exact = pair("bfloat16")
    operator = Hessian(risk)
    settings = {"which": "largest", "tol": 1e-4, "max_products": 100, "verify": True}
    wanted = lanczos(Hessian(exact), 5, generator=generator(), **settings)
    found = lanczos(operator, 5, generator=generator(), **settings)
    # The rounded operator is neither linear nor symmetric, to HALF; pairs are found to that accuracy.
    assert (found.residuals < 2 * HALF * found.eigenvalues[0]).all()
    # An eigenvalue lies within ‖H̃u − λu‖ of λ for any unit vector u, to the accuracy of the symmetry.
    for value, vector, rounded in zip(
        wanted.eigenvalues, wanted.eigenvectors.T, found.eigenvalues, strict=True
    ):
        image = (operator @ vector.float()).double()
        assert (rounded - value).abs() <= (image - value * vector).norm() + 1e-4 * wanted.eigenvalues[0]
    assert (found.eigenvalues / wanted.eigenvalues - 1).abs().max() < HALF


def test_bfloat16_is_for_products_only():
    model, inputs, targets = problem()
    full = EmpiricalRisk(model, inputs, targets, chunk_size=10)
    half = EmpiricalRisk(model, inputs, targets, chunk_size=10, precision="bfloat16")
    assert half.value() == full.value()
    assert torch.equal(half.gradient(), full.gradient())
    assert torch.equal(
        GradientCovariance(half).sample(generator()), GradientCovariance(full).sample(generator())
    )
    vector = random(half.numel).float()
    kept = EmpiricalRisk(model, inputs, targets, chunk_size=10, precision="bfloat16", memory=10**9)
    for kind in OPERATORS.values():
        wanted = kind(half) @ vector
        assert not torch.equal(kind(full) @ vector, wanted)
        for _ in range(2):
            assert torch.equal(kind(kept) @ vector, wanted)


# ---------------------------------------------------------------------- settings


def test_refusals():
    model, inputs, targets = CASES["preact"].problem()
    for precision in ("tf32", "bfloat16"):
        with pytest.raises(ValueError, match=r"float32 parameters, these are torch\.float64"):
            EmpiricalRisk(model, inputs, targets, precision=precision)
    for unknown in ("half", "float16", "", None):
        with pytest.raises(ValueError, match="precision must be 'full', 'tf32' or 'bfloat16'"):
            EmpiricalRisk(model.float(), inputs.float(), targets, precision=unknown)


@pytest.fixture
def _settings() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = before


def flags() -> tuple[object, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.enabled,
        torch.backends.mkldnn.enabled,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    )


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("precision", ["full", "tf32", "bfloat16"])
def test_the_guard_touches_no_flag_on_a_cpu(precision, allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    model, inputs, targets = problem()
    before = flags()
    risk = EmpiricalRisk(model, inputs, targets, precision=precision)
    with risk.guard():
        assert flags() == before
    _ = Hessian(risk) @ random(risk.numel).float()
    assert flags() == before


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_tf32_is_put_back(before, wanted):
    """The guard matters on a GPU, for which Lightning recommends "medium"."""
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = not wanted
    with tensor_float_32(wanted):
        assert torch.backends.cuda.matmul.allow_tf32 == wanted
        assert torch.backends.cudnn.allow_tf32 == wanted
    assert torch.get_float32_matmul_precision() == before
    assert torch.backends.cuda.matmul.allow_tf32 == (before != "highest")
    assert torch.backends.cudnn.allow_tf32 == (not wanted)
