"""Quadrature where Krylov spaces close, and where numbers have single precision."""

import pytest
import torch
from torch.testing import assert_close

from robustdyn.curvature.quadrature import spectral_density
from tests.curvature.reference import Dense, generator, random
from tests.curvature.test_quadrature import (
    SIZE,
    Diagonal,
    drawing,
    noise_root,
    positive,
    probe_vectors,
    quadratic_form,
    rotated,
    spectrum,
    stationary,
)
from tests.tolerances import EXACT32, EXACT64

CLOSING = {
    "degenerate": [5.0] * 3 + [-6.0] * 2 + [3.0] * 4,
    "rank_one": [4.0],
    "low_rank": [5.0, 3.0, -4.0],
    "zero": [],
    "multiple_of_identity": [2.0] * SIZE,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CLOSING)
def test_closed_spaces_are_exact(name, dtype):
    values = torch.zeros(SIZE, dtype=torch.float64)
    values[: len(CLOSING[name])] = torch.tensor(CLOSING[name], dtype=torch.float64)
    matrix = rotated(values).to(dtype)
    operator = Dense(matrix)
    result = spectral_density(operator, probes=3, steps=30, generator=generator())
    assert result.products == operator.count == int(result.lengths.sum())
    assert result.closed.all()
    # How many steps that takes is up to rounding: a rotated matrix has no exact repetitions.
    assert result.nodes.shape == (3, 30)
    assert_close(result.weights.sum(dim=1), torch.ones(3, dtype=torch.float64), **EXACT64)
    tolerance = EXACT64 if dtype == torch.float64 else EXACT32
    for function in (torch.exp, torch.cos, lambda x: 1.0 / (x + 7.0)):
        forms = [quadratic_form(matrix.double(), probe, function) for probe in probe_vectors(3)]
        assert_close(result.trace_of(function)[0], float(torch.stack(forms).mean()), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_chain_has_one_node_for_each_eigenvalue_it_sees(dtype):
    values = torch.tensor([4.0] * 5 + [1.0] * 10 + [0.0] * 25, dtype=dtype)
    root = torch.eye(SIZE, dtype=dtype)[:, :12]  # the noise never leaves the first two eigenspaces
    plain = spectral_density(Diagonal(values), probes=2, steps=10, generator=generator())
    noisy = spectral_density(Diagonal(values), probes=2, steps=10, generator=generator(), draw=drawing(root))
    assert plain.lengths.tolist() == [3, 3]
    assert noisy.lengths.tolist() == [2, 2]
    tolerance = EXACT64 if dtype == torch.float64 else EXACT32
    for row, weights in zip(plain.nodes, plain.weights, strict=True):
        assert_close(row[:3], torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64), **tolerance)
        assert_close(weights[:3], torch.tensor([25.0, 10.0, 5.0], dtype=torch.float64) / 40, **tolerance)
        assert torch.equal(row[3:], row[2].expand(7))
        assert not weights[3:].any()
    # Padded with an eigenvalue, so an h with a pole elsewhere has nothing to refuse; and without error, as
    # all signs weigh the eigenspaces of a diagonal matrix alike. float32: 4 eps ‖A‖ = 2e-6 against the 1e-3.
    value, error = plain.trace_of(lambda x: 1.0 / (x + 1e-3))
    precision = 1e-9 if dtype == torch.float64 else 2e-3
    assert_close(value, 25e3 + 10 / 1.001 + 5 / 4.001, rtol=precision, atol=0.0)
    assert error < precision * value
    cut = plain.shortened(2)
    assert not cut.closed.any()
    assert plain.shortened(3).closed.all()


def test_more_steps_than_dimensions_end_at_the_dimension():
    matrix = rotated(spectrum())
    result = spectral_density(Dense(matrix), probes=2, steps=SIZE + 13, generator=generator())
    assert result.lengths.tolist() == [SIZE, SIZE]
    assert result.closed.all()
    assert_close(result.nodes[0, :SIZE], torch.linalg.eigvalsh(matrix), **EXACT64)


def test_float32_gives_float32_accuracy_in_float64_results():
    matrix, root = rotated(positive()), noise_root()
    settings = {"probes": 5, "steps": 15}
    double = spectral_density(Dense(matrix), generator=generator(), draw=drawing(root), **settings)
    # the same vectors, drawn in float64 and passed to a float32 operator
    single = spectral_density(Dense(matrix.float()), generator=generator(), draw=drawing(root), **settings)
    assert single.nodes.dtype == single.weights.dtype == single.masses.dtype == torch.float64
    assert_close(single.masses, double.masses, **EXACT64)
    for function in (lambda x: x, torch.square, stationary):
        assert_close(single.trace_of(function)[0], double.trace_of(function)[0], **EXACT32)


def test_float32_sums_do_not_drift_with_size():
    size = 300_000
    values = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    single, double = (
        spectral_density(Diagonal(v), probes=1, steps=4, generator=generator())
        for v in (values.float(), values)
    )
    assert single.masses[0] == float(size)
    # a few roundings of 6e-8 in each product
    assert_close(single.trace_of(torch.sqrt)[0], double.trace_of(torch.sqrt)[0], rtol=3e-7, atol=0.0)
    assert_close(single.nodes, double.nodes, rtol=1e-6, atol=0.0)


def test_the_bulk_behind_float32_outliers_is_not_cut_off():
    """A chain must not count as closed when only the outliers are done: β is then 1e-6 of ‖A‖."""
    bulk = 1e-3
    values = torch.cat([torch.logspace(3, 1, 8, dtype=torch.float64), bulk * random(20_000, seed=3)])
    result = spectral_density(Diagonal(values.float()), probes=1, steps=25, generator=generator())
    assert result.lengths.tolist() == [25]

    def window(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(x**2) / (2 * bulk**2))

    truth = float(window(values).sum())
    # eps ‖A‖ is 0.1 of the bulk here: float32 allows a per cent, a chain cut short is 14 % off
    assert_close(result.trace_of(window)[0], truth, rtol=1e-2, atol=0.0)
