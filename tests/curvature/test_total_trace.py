import functools
import math

import pytest
import torch
from torch import Tensor

from robustdyn.curvature import LinearOperator, lanczos
from robustdyn.curvature import vectors as sums
from robustdyn.curvature.traces import TraceResult, hutch_plus_plus, hutchinson_trace, xtrace
from tests.curvature.reference import Dense, generator, random
from tests.tolerances import EXACT32, EXACT64, MC_SIGMAS

SIZE = 60
REPEATS = 250
BUDGET = 16  # products of an estimate that is repeated
SKETCHED = {"hutch++": hutch_plus_plus, "xtrace": xtrace}
ALL = {"hutchinson": hutchinson_trace, **SKETCHED}


def orthonormal(size: int, count: int, seed: int = 5) -> Tensor:
    return torch.linalg.qr(random(size, count, seed=seed))[0]


def with_spectrum(values: Tensor, seed: int = 5) -> Tensor:
    q = orthonormal(len(values), len(values), seed)
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def low_rank(rank: int) -> Tensor:
    return with_spectrum(torch.cat([5.0 - 2.0 * torch.arange(rank), torch.zeros(SIZE - rank)]).double())


SPECTRA = {
    "outliers": torch.cat([torch.tensor([30.0, 20.0, 10.0]), torch.linspace(-1, 1, SIZE - 3)]),
    "indefinite": torch.cat([torch.tensor([20.0, 9.0, -15.0, -7.0]), torch.linspace(-1, 1.5, SIZE - 4)]),
    "decaying": 0.8 ** torch.arange(SIZE),
}
MATRICES = {name: with_spectrum(values.double()) for name, values in SPECTRA.items()}
OUTLIERS = MATRICES["outliers"]


def leading_pairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    kept = values.abs().argsort(descending=True)[:k]
    return values[kept], vectors[:, kept]


def variance_of_a_probe(matrix: Tensor) -> float:
    """The variance of vᵀ A v over random signs, 2 Σ_{i≠j} A_ij²."""
    return 2.0 * float(matrix.square().sum() - matrix.diagonal().square().sum())


def gather(results: list[TraceResult]) -> tuple[Tensor, Tensor]:
    """Estimates and stated variances."""
    table = torch.tensor([(r.estimate, r.standard_error**2) for r in results], dtype=torch.float64)
    return table[:, 0], table[:, 1]


@functools.cache
def repeated(name: str, spectrum: str) -> tuple[Tensor, Tensor]:
    operator = Dense(MATRICES[spectrum])
    return gather([ALL[name](operator, BUDGET, generator(1000 + seed)) for seed in range(REPEATS)])


def pytest_tolerance(tolerance: dict[str, float]) -> dict[str, float]:
    return {"rel": tolerance["rtol"], "abs": tolerance["atol"]}


def z_score(samples: Tensor) -> float:
    """The z-score of a mean that should be zero."""
    return abs(float(samples.mean())) / float(samples.std()) * math.sqrt(len(samples))


class Recording(Dense):
    """Keeps the vectors that it was multiplied with."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.asked: list[Tensor] = []

    def _matvec(self, vector: Tensor) -> Tensor:
        self.asked.append(vector.clone())
        return super()._matvec(vector)


# ---------------------------------------------------------------------- exact cases


def test_signs_make_hutchinson_exact_on_diagonal_matrices():
    diagonal = random(SIZE)
    result = hutchinson_trace(Dense(diagonal.diag()), 3, generator())
    assert result.estimate == pytest.approx(float(diagonal.sum()), rel=EXACT64["rtol"])
    assert result.standard_error < EXACT64["atol"]


def test_exact_pairs_of_the_whole_spectrum_leave_no_noise():
    values, vectors = leading_pairs(OUTLIERS, SIZE)
    result = hutchinson_trace(Dense(OUTLIERS), 2, generator(), eigenvalues=values, eigenvectors=vectors)
    assert result.estimate == pytest.approx(float(OUTLIERS.trace()), rel=EXACT64["rtol"])
    # rounding of vᵀ A v, whose terms add up to at most ‖A‖ P = 1800
    assert result.standard_error < 1800 * EXACT64["atol"]
    assert result.deflated == SIZE


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize(("name", "products"), [("hutch++", 12), ("xtrace", 10)])
def test_low_rank_is_exact_once_the_sketch_covers_it(name, products, rank):
    """Rank four is covered by four columns of Hutch++'s sketch, or by four other probes of XTrace."""
    matrix = low_rank(rank)
    result = SKETCHED[name](Dense(matrix), products, generator())
    assert result.deflated == 4
    assert result.estimate == pytest.approx(float(matrix.trace()), **pytest_tolerance(EXACT64))
    assert result.standard_error < 1e-10  # as EXACT64, of ‖A‖ and the like, all below 100


@pytest.mark.parametrize(("name", "products"), [("hutch++", 12), ("xtrace", 10)])
def test_one_rank_more_is_not_exact(name, products):
    result = SKETCHED[name](Dense(low_rank(5)), products, generator())
    assert result.standard_error > 1e-3


@pytest.mark.parametrize("name", SKETCHED)
def test_a_diagonal_operator_with_a_null_space(name):
    """The sketch vectors are exactly linearly dependent, with exact zeros."""
    matrix = torch.tensor([3.0, -1.0] + [0.0] * 30, dtype=torch.float64).diag()
    result = SKETCHED[name](Dense(matrix), 24, generator())
    assert result.estimate == pytest.approx(2.0, rel=EXACT64["rtol"])


@pytest.mark.parametrize("name", SKETCHED)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_budget_for_every_unit_vector_measures_the_diagonal(name, size):
    matrix = random(size, size)
    operator = Dense(matrix + matrix.T)
    result = SKETCHED[name](operator, 5, generator())
    assert result.estimate == pytest.approx(2 * float(matrix.trace()), **pytest_tolerance(EXACT64))
    assert (result.products, operator.count, result.deflated, result.probes) == (size, size, size, 0)
    assert (result.standard_error, result.converged, result.estimator) == (0.0, True, name)


def test_one_parameter():
    operator = Dense(torch.tensor([[-3.0]], dtype=torch.float64))
    result = hutchinson_trace(operator, 9, generator(), tol=1e-3)
    assert (result.estimate, result.standard_error, result.products, result.converged) == (-3.0, 0.0, 4, True)
    vector = torch.ones(1, 1, dtype=torch.float64)
    pair = {"eigenvalues": torch.tensor([2.0]), "eigenvectors": vector}
    assert hutchinson_trace(operator, 2, generator(), **pair).estimate == -3.0


# ---------------------------------------------------------------------- bias and stated errors


@pytest.mark.parametrize("spectrum", MATRICES)
@pytest.mark.parametrize(
    "name", [*(name for name in ALL if name != "xtrace"), pytest.param("xtrace", marks=pytest.mark.slow)]
)
def test_no_bias(name, spectrum):
    estimates, _ = repeated(name, spectrum)
    assert z_score(estimates - MATRICES[spectrum].trace()) < MC_SIGMAS


@pytest.mark.parametrize("spectrum", MATRICES)
def test_hutchinson_states_its_known_variance(spectrum):
    _, variances = repeated("hutchinson", spectrum)
    assert z_score(variances - variance_of_a_probe(MATRICES[spectrum]) / BUDGET) < MC_SIGMAS


@pytest.mark.parametrize("spectrum", MATRICES)
@pytest.mark.parametrize("name", ["hutchinson", "hutch++"])
def test_stated_variance_is_the_true_one(name, spectrum):
    """Stated variance minus squared error has mean zero; the test could see a factor of two."""
    estimates, variances = repeated(name, spectrum)
    difference = variances - (estimates - MATRICES[spectrum].trace()).square()
    assert z_score(difference) < MC_SIGMAS
    assert MC_SIGMAS * float(difference.std()) / math.sqrt(REPEATS) < float(variances.mean())


@pytest.mark.parametrize(
    ("spectrum", "expected"), [("outliers", 0.86), ("indefinite", 0.89), ("decaying", 0.55)]
)
def test_xtrace_states_too_little(spectrum, expected):
    """The ratio of stated to true variance is below one, because estimates that share sketches correlate.

    3000 other seeds gave the expected ratios. A ratio from 250 has a relative error of sqrt(2.5 / 250) = 0.1
    from the squared errors (of kurtosis 3.5) and up to 0.9 / sqrt(250) = 0.057 from the stated variances.
    """
    estimates, variances = repeated("xtrace", spectrum)
    ratio = float(variances.mean() / (estimates - MATRICES[spectrum].trace()).square().mean())
    assert ratio == pytest.approx(expected, rel=MC_SIGMAS * 0.115)


# ---------------------------------------------------------------------- known eigenpairs


def test_deflation_leaves_the_variance_of_the_rest():
    pairs = lanczos(Dense(OUTLIERS), 3, which="magnitude", tol=1e-3, max_products=60, generator=generator())
    operator = Dense(OUTLIERS)
    known = {"eigenvalues": pairs.eigenvalues, "eigenvectors": pairs.eigenvectors}
    estimates, variances = gather(
        [hutchinson_trace(operator, 8, generator(seed), **known) for seed in range(REPEATS)]
    )
    assert operator.count == 8 * REPEATS  # the pairs cost nothing
    assert z_score(estimates - OUTLIERS.trace()) < MC_SIGMAS
    values, vectors = leading_pairs(OUTLIERS, 3)
    rest = OUTLIERS - (vectors * values) @ vectors.T
    # cross terms: at most about 4 Σ (residual)² ≤ 4 · 3 · (1e-3 · 30)² = 0.01, beside 2 ‖rest‖_F² ≈ 38
    assert z_score(variances - variance_of_a_probe(rest) / 8) < MC_SIGMAS
    plain, _ = repeated("hutchinson", "outliers")
    # 0.12 = sqrt(38 / 2700) is predicted, of which the spreads from 250 seeds know some 6 %
    assert estimates.std() < 0.15 * plain.std() * math.sqrt(BUDGET / 8)


@pytest.mark.parametrize("kind", ["stale", "not_orthonormal", "nonsense"])
def test_wrong_pairs_do_not_bias(kind):
    values, vectors = leading_pairs(OUTLIERS, 3)
    if kind == "stale":  # of another matrix nearby, with values that are no Rayleigh quotients
        values, vectors = leading_pairs(OUTLIERS + 2.0 * with_spectrum(SPECTRA["decaying"].double(), 6), 3)
        values = 0.8 * values
    elif kind == "not_orthonormal":
        vectors = vectors + 0.2 * random(SIZE, 3, seed=8)
    else:
        values, vectors = -5.0 * values, random(SIZE, 3, seed=9)
    operator, truth = Dense(OUTLIERS), OUTLIERS.trace()
    results = [
        hutchinson_trace(operator, 8, generator(seed), eigenvalues=values, eigenvectors=vectors)
        for seed in range(REPEATS)
    ]
    estimates, variances = gather(results)
    assert z_score(estimates - truth) < MC_SIGMAS
    left = OUTLIERS - (vectors * values) @ vectors.T
    assert z_score(variances - variance_of_a_probe(left) / 8) < MC_SIGMAS
    if kind == "stale":
        # What is not done, the projected probe with the values taken at their word, would be seen here.
        taken_at_word = values.sum() - (vectors * (OUTLIERS @ vectors)).sum()
        assert abs(float(taken_at_word)) > 20 * float(estimates.std()) / math.sqrt(REPEATS)


def test_no_pairs_at_all_are_plain_hutchinson():
    nothing = {"eigenvalues": torch.zeros(0), "eigenvectors": torch.zeros(SIZE, 0)}
    with_nothing = hutchinson_trace(Dense(OUTLIERS), 5, generator(), **nothing)
    plain = hutchinson_trace(Dense(OUTLIERS), 5, generator())
    assert (with_nothing.estimate, with_nothing.deflated) == (plain.estimate, 0)


# ---------------------------------------------------------------------- cost and precision


@pytest.mark.parametrize("products", [4, 5, 13, 24])
@pytest.mark.parametrize("name", ALL)
def test_products_are_counted(name, products):
    operator = Dense(OUTLIERS)
    result = ALL[name](operator, products, generator())
    expected = products - products % 2 if name == "xtrace" else products
    assert result.products == operator.count == expected
    third, half = products // 3, products // 2
    assert (result.probes, result.deflated) == {
        "hutchinson": (products, 0),
        "hutch++": (products - 2 * third, third),
        "xtrace": (half, half - 1),
    }[name]
    assert result.estimator == name
    assert result.converged
    assert result.seconds > 0.0


@pytest.mark.parametrize("name", SKETCHED)
def test_sketches_pay_on_outliers(name):
    """With equally many products, the spread is far below Hutchinson's, which is known."""
    estimates, _ = repeated(name, "outliers")
    error = (estimates - OUTLIERS.trace()).square().mean().sqrt()
    # 0.21 and 0.16 over 3000 other seeds
    assert error < 0.3 * math.sqrt(variance_of_a_probe(OUTLIERS) / BUDGET)


@pytest.mark.parametrize("name", ALL)
def test_float32(name):
    """The error agrees with the standard error, although outliers are a million times the rest."""
    values = torch.cat([torch.tensor([1e6, -5e5]), torch.linspace(0, 1, 298)]).double()
    matrix = with_spectrum(values).float()
    truth = float(matrix.double().trace())
    pairs = {}
    if name == "hutchinson":
        eigenvalues, eigenvectors = leading_pairs(matrix.double(), 2)
        pairs = {"eigenvalues": eigenvalues, "eigenvectors": eigenvectors.float()}
    result = ALL[name](Dense(matrix), 24, generator(), **pairs)
    # A product rounds at 6e-8 · 1e6 = 0.06, which the weight of a leading direction in a probe, (uᵀv)² < 10,
    # may multiply. A plain probe has a standard deviation of 1.5e6, one off the two directions of at most 14.
    assert abs(result.estimate - truth) < MC_SIGMAS * result.standard_error + 0.6
    assert result.standard_error < 14 / math.sqrt(result.probes)


@pytest.mark.parametrize("name", SKETCHED)
def test_float32_low_rank(name):
    """Sketch vectors that differ by rounding only: the basis must not lose its orthogonality."""
    factors = orthonormal(500, 3).float()
    result = SKETCHED[name](
        Dense(factors @ torch.diag(torch.tensor([9.0, 4.0, -2.0])) @ factors.T), 40, generator()
    )
    assert result.estimate == pytest.approx(11.0, rel=EXACT32["rtol"])
    assert result.standard_error < 11.0 * EXACT32["rtol"]


def test_float32_is_summed_in_float64():
    """A float32 sum of so many equal terms would be wrong in the seventh digit."""

    class Scaled(LinearOperator):
        def _matvec(self, vector: Tensor) -> Tensor:
            return 0.1 * vector

    operator = Scaled(100_003, torch.float32, torch.device("cpu"))
    result = hutchinson_trace(operator, 2, generator())
    assert result.estimate == pytest.approx(100_003 * float(torch.tensor(0.1)), rel=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_small_work_spaces_change_rounding_only(name, monkeypatch):
    values, vectors = leading_pairs(OUTLIERS, 3)
    pairs = {"eigenvalues": values, "eigenvectors": vectors} if name == "hutchinson" else {}
    whole = ALL[name](Dense(OUTLIERS), 12, generator(), **pairs)
    monkeypatch.setattr(sums, "_SUMMED", 14)
    pieces = ALL[name](Dense(OUTLIERS), 12, generator(), **pairs)
    assert pieces.estimate == pytest.approx(whole.estimate, rel=EXACT64["rtol"])
    assert pieces.standard_error == pytest.approx(whole.standard_error, rel=EXACT64["rtol"])


# ---------------------------------------------------------------------- stopping


def test_stops_at_the_tolerance_and_not_before():
    operator = Dense(OUTLIERS)
    tol = 0.2
    result = hutchinson_trace(operator, 500, generator(2), tol=tol)
    assert result.converged
    assert result.products == result.probes == operator.count
    assert 4 < result.probes < 500
    assert result.standard_error <= tol * abs(result.estimate)
    same = hutchinson_trace(operator, result.probes, generator(2))
    assert (same.estimate, same.standard_error) == (result.estimate, result.standard_error)
    for fewer in range(4, result.probes):
        earlier = hutchinson_trace(operator, fewer, generator(2), tol=tol)
        assert not earlier.converged
        assert earlier.probes == fewer
        assert earlier.standard_error > tol * abs(earlier.estimate)


def test_fewer_than_four_probes_are_not_judged():
    operator = Dense(torch.eye(7, dtype=torch.float64))
    assert not hutchinson_trace(operator, 3, generator(), tol=0.1).converged
    result = hutchinson_trace(operator, 30, generator(), tol=0.1)
    assert (result.probes, result.converged) == (4, True)


def test_known_pairs_stop_sooner():
    values, vectors = leading_pairs(OUTLIERS, 3)
    plain = hutchinson_trace(Dense(OUTLIERS), 500, generator(), tol=0.02)
    known = hutchinson_trace(
        Dense(OUTLIERS), 500, generator(), tol=0.02, eigenvalues=values, eigenvectors=vectors
    )
    assert known.converged
    # variances of a probe: 2700 and 38
    assert known.probes < plain.probes / 10


# ---------------------------------------------------------------------- randomness and refusals


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "matrix", [OUTLIERS, torch.zeros(SIZE, SIZE, dtype=torch.float64)], ids=["full", "zero"]
)
def test_random_numbers_are_the_generators(name, matrix):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(ALL[name](Dense(matrix), 12, generator(7)))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = results
    assert (first.estimate, first.standard_error) == (second.estimate, second.standard_error)
    if matrix.any():
        assert ALL[name](Dense(matrix), 12, generator(8)).estimate != first.estimate


def test_arguments_are_left_alone():
    values, vectors = leading_pairs(OUTLIERS, 3)
    copies = values.clone(), vectors.clone()
    hutchinson_trace(Dense(OUTLIERS), 3, generator(), eigenvalues=values, eigenvectors=vectors)
    assert torch.equal(values, copies[0])
    assert torch.equal(vectors, copies[1])


@pytest.mark.parametrize("name", SKETCHED)
def test_too_few_products(name):
    with pytest.raises(ValueError, match=r"products must be at least 4 .* not 3"):
        SKETCHED[name](Dense(OUTLIERS), 3, generator())


REFUSALS = {
    "one_probe": ({"probes": 1}, "probes must be at least 2"),
    "zero_tol": ({"tol": 0.0}, "tol must be positive and finite, not 0.0: give None"),
    "nan_tol": ({"tol": math.nan}, "tol must be positive"),
    "values_alone": ({"eigenvalues": torch.ones(2)}, "eigenvalues and eigenvectors go together"),
    "vectors_alone": ({"eigenvectors": torch.ones(SIZE, 2)}, "eigenvalues and eigenvectors go together"),
    "rows": (
        {"eigenvalues": torch.ones(2), "eigenvectors": torch.ones(2, SIZE)},
        r"must have the shapes \(k,\) and \(60, k\)",
    ),
    "scalar": (
        {"eigenvalues": torch.tensor(1.0), "eigenvectors": torch.ones(SIZE, 1)},
        "must have the shapes",
    ),
    "counts": ({"eigenvalues": torch.ones(3), "eigenvectors": torch.ones(SIZE, 2)}, "must have the shapes"),
    "elsewhere": (
        {"eigenvalues": torch.ones(2), "eigenvectors": torch.ones(SIZE, 2, device="meta")},
        "eigenvectors are on meta: move them to cpu",
    ),
    "nan_value": (
        {"eigenvalues": torch.tensor([1.0, math.nan]), "eigenvectors": torch.ones(SIZE, 2)},
        "must be finite: leave out",
    ),
    "inf_vector": (
        {"eigenvalues": torch.ones(1), "eigenvectors": torch.full((SIZE, 1), math.inf)},
        "must be finite: leave out",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    changes, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        hutchinson_trace(Dense(OUTLIERS), **{"probes": 4, "generator": generator(), **changes})


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("budget", [12, 100])
def test_products_that_are_not_finite(name, value, budget):
    matrix = OUTLIERS.clone()
    matrix[3, 3] = value
    with pytest.raises(FloatingPointError, match=r"product [14] with the operator is not finite"):
        ALL[name](Dense(matrix), budget, generator())
