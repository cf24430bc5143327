import importlib

import pytest
import torch
from torch.testing import assert_close

from robustdyn.curvature import Hessian, eigen_residuals, lanczos
from tests.cases import CASES
from tests.curvature.reference import Dense, dense_hessian, generator, random, risk_of
from tests.tolerances import EXACT64

SIZE = 60


def with_spectrum(values: torch.Tensor, seed: int = 5) -> Dense:
    q, _ = torch.linalg.qr(random(len(values), len(values), seed=seed))
    matrix = q @ torch.diag(values) @ q.T
    return Dense((matrix + matrix.T) / 2)


def leading(values: torch.Tensor, k: int, which: str) -> torch.Tensor:
    key = values if which == "largest" else values.abs()
    return values[key.argsort(descending=True, stable=True)][:k]


SPECTRA = {
    "outliers": torch.cat([torch.tensor([30.0, 20.0, 10.0, -15.0]), torch.linspace(-1, 1, SIZE - 4)]),
    "smooth": torch.linspace(-1, 2, SIZE),
    "negative": -(torch.linspace(1, 3, SIZE) ** 2),
    "rank_deficient": torch.cat([torch.tensor([5.0, 3.0, -4.0]), torch.zeros(SIZE - 3)]),
    "degenerate": torch.cat([torch.tensor([5.0, 5, 5, 4, 3, 3, -6, -6]), torch.zeros(SIZE - 8)]),
    "identity": torch.full((SIZE,), 2.0),
    "zero": torch.zeros(SIZE),
}
SPECTRA = {name: values.double() for name, values in SPECTRA.items()}


@pytest.mark.parametrize("which", ["largest", "magnitude"])
@pytest.mark.parametrize("max_basis", [None, 14])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_prescribed_spectra(spectrum, max_basis, which):
    operator, k = with_spectrum(SPECTRA[spectrum]), 6
    result = lanczos(
        operator, k, which=which, tol=1e-9, max_products=2000, generator=generator(), max_basis=max_basis
    )
    wanted = leading(SPECTRA[spectrum], k, which)
    # By the residual bound |λ − θ| ≤ residual ≤ 1e-9 · 30; signs of ±equal magnitudes may swap places.
    key = (lambda x: x) if which == "largest" else torch.abs
    assert_close(key(result.eigenvalues), key(wanted), rtol=0.0, atol=4e-8)
    assert result.all_converged
    assert result.products == operator.count
    assert result.which == which
    assert result.eigenvalues.dtype == torch.float64
    assert_close(result.eigenvectors.T @ result.eigenvectors, torch.eye(k, dtype=torch.float64), **EXACT64)
    true = eigen_residuals(operator, result.eigenvalues, result.eigenvectors)
    # Reported residuals are the true ones, up to rounding of the products (64 eps ‖A‖); upper bounds of them
    # where a closed chain left something behind.
    rounding = 64 * 2.3e-16 * 30
    assert (true <= 1.001 * result.residuals + rounding).all()
    if spectrum in ("outliers", "smooth", "negative"):
        assert_close(true, result.residuals, rtol=1e-3, atol=rounding)


@pytest.mark.parametrize(
    "name", ["tanh_mlp", "conv_norm_uneven", pytest.param("preact", marks=pytest.mark.slow)]
)
def test_full_depth_reproduces_a_hessian(name):
    risk = risk_of(CASES[name])
    dense = dense_hessian(risk)
    operator = Dense(dense)
    result = lanczos(
        operator, risk.numel, which="largest", tol=1e-12, max_products=10**4, generator=generator()
    )
    values = torch.linalg.eigvalsh(dense).flip(0)
    assert_close(result.eigenvalues, values, rtol=1e-10, atol=1e-12 * float(values.abs().max()))
    rebuilt = result.eigenvectors @ torch.diag(result.eigenvalues) @ result.eigenvectors.T
    assert_close(rebuilt, dense, rtol=1e-10, atol=1e-11)


def test_matrix_free_hessian_top_pairs():
    risk = risk_of(CASES["preact"])
    values = torch.linalg.eigvalsh(dense_hessian(risk)).flip(0)
    result = lanczos(Hessian(risk), 4, which="largest", tol=1e-6, max_products=300, generator=generator())
    assert result.all_converged
    assert_close(result.eigenvalues, values[:4], rtol=1e-6, atol=0.0)


def test_small_basis_restarts_and_agrees():
    operator = with_spectrum(SPECTRA["smooth"])
    result = lanczos(
        operator, 3, which="largest", tol=1e-10, max_products=5000, generator=generator(), max_basis=5
    )
    assert result.restarts > 5
    assert result.all_converged
    assert_close(result.eigenvalues, leading(SPECTRA["smooth"], 3, "largest"), rtol=0.0, atol=1e-9)


def test_largest_and_magnitude_differ_where_curvature_is_negative():
    operator = with_spectrum(SPECTRA["outliers"])
    settings = {"tol": 1e-8, "max_products": 60, "generator": generator()}
    assert_close(
        lanczos(operator, 3, which="largest", **settings).eigenvalues, torch.tensor([30.0, 20, 10]).double()
    )
    assert_close(
        lanczos(operator, 3, which="magnitude", **settings).eigenvalues,
        torch.tensor([30.0, 20, -15]).double(),
    )


def test_budget_is_kept_and_admitted():
    operator = with_spectrum(SPECTRA["smooth"])
    result = lanczos(operator, 5, which="largest", tol=1e-8, max_products=7, generator=generator())
    assert result.products == operator.count == 7
    assert not result.all_converged
    true = eigen_residuals(operator, result.eigenvalues, result.eigenvectors)
    assert_close(true, result.residuals, rtol=1e-8, atol=1e-12)


def test_verify_recomputes_the_residuals():
    operator = with_spectrum(SPECTRA["outliers"])
    result = lanczos(
        operator, 3, which="largest", tol=1e-6, max_products=60, generator=generator(), verify=True
    )
    assert result.products == operator.count
    assert torch.equal(result.residuals, eigen_residuals(operator, result.eigenvalues, result.eigenvectors))
    assert result.all_converged


def test_start_vector_is_used():
    operator = with_spectrum(SPECTRA["smooth"])
    leading_two = torch.linalg.eigh(operator.matrix)[1][:, -2:].sum(dim=1)  # the wanted one and the next
    top = torch.linalg.eigh(operator.matrix)[1][:, -1]
    # The exact eigenvector closes the space at once; the fresh chain then finds the second pair.
    settings = {"which": "largest", "tol": 1e-8, "max_products": 200}
    cold = lanczos(operator, 1, generator=generator(), **settings)
    near = lanczos(operator, 1, generator=generator(), start=leading_two + 1e-6 * random(SIZE), **settings)
    assert near.products < cold.products
    exact = lanczos(operator, 2, generator=generator(), start=top, **settings)
    assert_close(exact.eigenvalues, leading(SPECTRA["smooth"], 2, "largest"), rtol=0.0, atol=1e-7)


def test_same_seed_same_bits_and_no_global_randomness():
    operator = with_spectrum(SPECTRA["degenerate"])
    rng = torch.get_rng_state()
    settings = {"which": "largest", "tol": 1e-8, "max_products": 100}
    first = lanczos(operator, 6, generator=generator(1), **settings)
    second = lanczos(operator, 6, generator=generator(1), **settings)
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert torch.equal(torch.get_rng_state(), rng)


def test_float32_reaches_float32_accuracy():
    values = SPECTRA["outliers"]
    operator = Dense(with_spectrum(values).matrix.float())
    result = lanczos(operator, 3, which="largest", tol=1e-5, max_products=60, generator=generator())
    assert result.all_converged
    assert result.eigenvectors.dtype == torch.float32
    assert result.eigenvalues.dtype == torch.float64
    # sixty-term float32 dot products: sqrt(60) eps, times ten
    assert_close(result.eigenvalues, leading(values, 3, "largest"), rtol=1e-5, atol=0.0)
    true = eigen_residuals(operator, result.eigenvalues, result.eigenvectors)
    assert (true <= 2e-5 * 30).all()


def test_float32_closed_space():
    operator = Dense(with_spectrum(SPECTRA["degenerate"]).matrix.float())
    result = lanczos(operator, 6, which="largest", tol=1e-5, max_products=60, generator=generator())
    assert_close(result.eigenvalues, leading(SPECTRA["degenerate"], 6, "largest"), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("k", [40, 120])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_many_repeated_eigenvalues(k, noise):
    # each chain sees a repeated value once, so that fifty chains close before all are found
    values = torch.tensor([3.0, 2.0, 1.0]).double().repeat_interleave(50)
    operator = with_spectrum(values + noise * random(150))
    result = lanczos(operator, k, which="largest", tol=1e-3, max_products=400, generator=generator())
    assert result.all_converged
    assert result.products <= 200
    assert_close(result.eigenvalues, values[:k], rtol=0.0, atol=1e-12 + 5 * noise)
    true = eigen_residuals(operator, result.eigenvalues, result.eigenvectors)
    assert (true <= 1.001 * result.residuals + 1e-13).all()
    assert (result.residuals <= 1e-3 * 3).all()


@pytest.mark.parametrize(("k", "tol", "most"), [(60, 0.1, 80), (100, 0.03, 130), (250, 1e-3, 450)])
def test_residuals_of_many_directions_are_bounds(k, tol, most):
    # a network's spectrum: some outliers, a bulk that falls off by orders of magnitude, negative curvature
    values = torch.cat([torch.logspace(0.6, -6, 500), -torch.logspace(-1, -6, 100)]).double()
    operator = with_spectrum(values)
    result = lanczos(operator, k, which="largest", tol=tol, max_products=4 * k, generator=generator())
    assert result.all_converged
    assert result.products <= most
    true = eigen_residuals(operator, result.eigenvalues, result.eigenvectors)
    assert (true <= 1.001 * result.residuals + 1e-12).all()
    # a symmetric matrix has an eigenvalue within a residual
    distance = (result.eigenvalues[:, None] - values).abs().amin(dim=1)
    assert (distance <= 1.001 * result.residuals + 1e-12).all()


@pytest.mark.slow  # many starts
def test_an_eigenvalue_is_rarely_passed_over():
    values = torch.cat([torch.tensor([100, 20, 9, 6, 5.4, 4.8]), torch.linspace(0, 1, 494)]).double()
    operator = Dense(torch.diag(values))
    wrong = 0
    for seed in range(100):
        result = lanczos(
            operator, 5, which="largest", tol=1e-3, max_products=100, generator=generator(seed), max_basis=20
        )
        assert result.all_converged
        wrong += bool(((result.eigenvalues - values[:5]).abs() > 0.1).any())
    assert wrong <= 4  # 2 when measured; 7 where the sixth pair is not sought


def test_the_last_pair_counts_only_once_the_next_is_known():
    values = torch.cat([torch.tensor([100, 20, 9, 6, 5.4, 4.8]), torch.linspace(0, 1, 494)]).double()
    operator = Dense(torch.diag(values))
    settings = {"which": "largest", "tol": 1e-3, "generator": generator(0)}
    needed = lanczos(operator, 5, max_products=100, **settings).products
    settings["generator"] = generator(0)
    short = lanczos(operator, 5, max_products=needed - 1, **settings)
    assert not short.converged[-1]
    assert not short.all_converged


def test_a_long_search_says_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(importlib.import_module("robustdyn.curvature.lanczos"), "QUIET_SECONDS", -1.0)
    with caplog.at_level("INFO"):
        found = lanczos(Dense(torch.diag(torch.arange(9.0).double())), 2, max_products=8)
    assert len(caplog.messages) == found.products
    assert caplog.messages[2].startswith("eigenpairs: product 3 of at most 8, ")


def test_refusals():
    operator = with_spectrum(SPECTRA["smooth"])
    settings = {"which": "largest", "tol": 1e-3, "max_products": 100, "generator": generator()}
    with pytest.raises(ValueError, match="k must be between 1 and"):
        lanczos(operator, SIZE + 1, **settings)
    with pytest.raises(ValueError, match="k must be"):
        lanczos(operator, 0, **settings)
    with pytest.raises(ValueError, match=r"k \+ 2"):
        lanczos(operator, 5, max_basis=6, **settings)
    with pytest.raises(ValueError, match="max_products"):
        lanczos(operator, 5, **{**settings, "max_products": 4})
    with pytest.raises(ValueError, match="which"):
        lanczos(operator, 5, **{**settings, "which": "smallest"})
    with pytest.raises(ValueError, match="start"):
        lanczos(operator, 5, start=torch.zeros(SIZE), **settings)
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos(Dense(operator.matrix * float("nan")), 5, **settings)
