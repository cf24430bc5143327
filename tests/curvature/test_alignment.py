import itertools
import sys
from dataclasses import fields
from functools import partial

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from robustdyn.curvature import GradientCovariance, Hessian, gradient_projections, lanczos
from robustdyn.curvature.alignment import (
    AlignmentEstimate,
    alignment,
    covariance_jackknife,
    principal_angles,
    sign_flipped_covariances,
    subspace_overlap,
)
from robustdyn.theory import stationary_covariance, total_correlation
from tests.cases import CASES
from tests.curvature.reference import dense_gradients, dense_hessian, generator, random, risk_of
from tests.tolerances import EXACT64, MC_SIGMAS

# Derandomised, without a limit that a loaded machine could trip, and nothing on disk.
properties = settings(deadline=None, derandomize=True, database=None, max_examples=60)

real = partial(torch.tensor, dtype=torch.float64)
STATISTICS = ("commutator", "cosine", "off_diagonal_share")


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(random(rows, columns, seed=seed)).Q


def covariance_of(projections: torch.Tensor) -> torch.Tensor:
    return torch.cov(projections.T, correction=0).reshape(projections.shape[1], projections.shape[1])


def examples_with(covariance: torch.Tensor, m: int = 12, seed: int = 3) -> torch.Tensor:
    """Examples (m, k) with exactly this covariance, and some mean."""
    k = len(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    q = orthonormal(m, k + 1, seed) if m > k + 1 else orthonormal(m, m, seed)[:, : k + 1]
    centred = torch.linalg.qr(torch.cat([torch.ones(m, 1, dtype=q.dtype), q[:, :k]], dim=1)).Q[:, 1:]
    return m**0.5 * centred @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T + random(k, seed=seed)


def measure(eigenvalues: torch.Tensor, projections: torch.Tensor, **changes: object) -> AlignmentEstimate:
    arguments = {
        "eigenvectors": torch.eye(len(eigenvalues), dtype=torch.float64),
        "groups": 4,
        "randomisations": 20,
        "generator": generator(),
        **changes,
    }
    return alignment(eigenvalues, projections=projections, **arguments)  # type: ignore[arg-type]


def brute_force(hessian: torch.Tensor, covariance: torch.Tensor) -> tuple[float, float]:
    """Commutator and cosine from whole matrices in any basis."""
    size = hessian.norm() * covariance.norm()
    commutator = (hessian @ covariance - covariance @ hessian).norm() / (2 * size)
    return float(commutator), float((hessian * covariance).sum() / size)


# ---------------------------------------------------------------------- commutator, cosine, share


def test_commuting_matrices():
    eigenvalues = real([5.0, 2.0, -1.0])
    variances = real([1.0, 3.0, 0.5])
    result = measure(eigenvalues, examples_with(variances.diag()))
    assert result.commutator == pytest.approx(0.0, abs=1e-14)
    assert result.off_diagonal_share == pytest.approx(0.0, abs=1e-14)
    cosine = torch.nn.functional.cosine_similarity(eigenvalues, variances, dim=0)
    assert result.cosine == pytest.approx(float(cosine), rel=1e-12)
    assert result.commutator_null > 0.05  # twelve examples are too few to tell


def test_equal_curvatures_commute_with_everything():
    result = measure(torch.full((3,), 2.0), random(12, 3))
    assert result.commutator == 0.0
    assert result.commutator_null == 0.0
    assert result.off_diagonal_share > 0.0


def test_noise_proportional_to_the_hessian():
    eigenvalues = real([5.0, 2.0, 0.5])
    assert measure(eigenvalues, examples_with(0.3 * eigenvalues.diag())).cosine == pytest.approx(
        1.0, rel=1e-13
    )


@pytest.mark.parametrize(
    ("a", "b", "p", "q", "r"),
    [(3.0, 1.0, 2.0, 0.7, 1.0), (3.0, -4.0, 0.5, -0.6, 1.0), (1.0, -1.0, 1.0, 1.0, 1.0)],
)
def test_two_directions_in_closed_form(a, b, p, q, r):
    covariance = real([[p, q], [q, r]])
    result = measure(real([a, b]), examples_with(covariance))
    hessian, noise = (a * a + b * b) ** 0.5, (p * p + r * r + 2 * q * q) ** 0.5
    assert result.commutator == pytest.approx(2**0.5 * abs(a - b) * abs(q) / (2 * hessian * noise), rel=1e-11)
    assert result.cosine == pytest.approx((a * p + b * r) / (hessian * noise), rel=1e-11, abs=1e-12)
    assert result.off_diagonal_share == pytest.approx(2 * q * q / noise**2, rel=1e-11)
    if (a, b) == (1.0, -1.0):
        assert result.commutator == pytest.approx(0.5, rel=1e-11)  # the bound is attained


@pytest.mark.parametrize("seed", range(4))
def test_whole_space_against_dense_matrices(seed):
    size, m = 7, 11
    half = random(size, size, seed=seed)
    hessian = half + half.T
    gradients = random(m, size, seed=seed + 100) @ random(size, size, seed=seed + 200)
    covariance = covariance_of(gradients)
    eigenvalues, eigenvectors = torch.linalg.eigh(hessian)
    noise_values, noise_vectors = torch.linalg.eigh(covariance)
    result = measure(
        eigenvalues,
        gradients @ eigenvectors,
        eigenvectors=eigenvectors,
        noise_eigenvalues=noise_values.flip(0),
        noise_eigenvectors=noise_vectors.flip(1),
    )
    commutator, cosine = brute_force(hessian, covariance)
    assert result.commutator == pytest.approx(commutator, rel=1e-11)
    assert result.cosine == pytest.approx(cosine, rel=1e-11, abs=1e-13)
    assert result.subspace_overlap == pytest.approx(1.0, rel=1e-13)
    assert_close(result.angles, torch.zeros(size, dtype=torch.float64), rtol=0, atol=1e-13)
    assert float(result.captured_noise[-1]) == pytest.approx(1.0, rel=1e-12)


def test_signs_scales_and_the_mean_gradient_do_not_matter():
    eigenvalues = real([5.0, 2.0, -1.0, 0.3])
    projections = random(30, 4) @ random(4, 4, seed=1)
    result = measure(eigenvalues, projections)
    signs = real([1.0, -1.0, -1.0, 1.0])
    for other in (
        measure(eigenvalues, projections * signs),
        measure(1e-3 * eigenvalues, projections),
        measure(eigenvalues, 1e3 * projections),
        measure(eigenvalues, projections + random(4, seed=2)),
    ):
        for field in fields(AlignmentEstimate):
            if field.name not in ("captured_noise", "angles", "seconds"):
                assert getattr(other, field.name) == pytest.approx(getattr(result, field.name), rel=1e-10)


def test_nothing_to_compare_is_nan():
    zero, some = torch.zeros(3).double(), random(3)
    for result in (measure(zero, random(9, 3)), measure(some, torch.ones(9, 3))):
        assert all(value != value for value in (result.commutator, result.cosine, result.subspace_overlap))
    assert measure(zero, random(9, 3)).off_diagonal_share > 0.0
    assert result.captured_noise.shape == result.angles.shape == result.cosines.shape == (0,)


@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from([2, 3, 8, 40]))
@properties
def test_the_commutator_is_at_most_one_half(seed, k, m):
    result = measure(random(k, seed=seed), random(m, k, seed=seed + 1), groups=2, randomisations=2)
    assert 0.0 <= result.commutator <= 0.5 + 1e-12
    assert -1.0 - 1e-12 <= result.cosine <= 1.0 + 1e-12
    assert 0.0 <= result.off_diagonal_share <= 1.0


# ---------------------------------------------------------------------- subspaces


@pytest.mark.parametrize("slab", [2**16, 7])
@pytest.mark.parametrize(("k", "l"), [(4, 4), (2, 5), (5, 2), (1, 1), (12, 14)])
def test_angles_are_scipys(k, l, slab, monkeypatch):  # noqa: E741
    monkeypatch.setattr(sys.modules["robustdyn.curvature.alignment"], "_SLAB_ROWS", slab)
    first, second = orthonormal(20, k, 1), orthonormal(20, l, 2)
    angles = principal_angles(first, second)
    expected = torch.from_numpy(scipy.linalg.subspace_angles(first.numpy(), second.numpy())).flip(0)
    shared = max(0, k + l - 20)  # dimensions that must be common; SciPy has rounding of up to 1e-8 there
    assert (angles[:shared] < 1e-14).all()
    assert_close(angles[shared:], expected[shared:], rtol=1e-10, atol=0.0)
    assert_close(principal_angles(second, first), angles, rtol=1e-10, atol=1e-14)
    assert subspace_overlap(first, second) == pytest.approx(float(angles.cos().square().mean()), rel=1e-12)


@pytest.mark.parametrize("slab", [2**16, 11])
@pytest.mark.parametrize("largest", [(), (1.2, torch.pi / 2 - 1e-7, torch.pi / 2)])
def test_small_angles_keep_their_digits(largest, slab, monkeypatch):
    monkeypatch.setattr(sys.modules["robustdyn.curvature.alignment"], "_SLAB_ROWS", slab)
    wanted = real([1e-9, 1e-7, 3e-7, 1e-3, 0.5, *largest])
    n = len(wanted)
    both = orthonormal(50, 2 * n)
    first = both[:, :n]
    second = first * wanted.cos() + both[:, n:] * wanted.sin()
    first, second = first @ orthonormal(n, n, 1), second @ orthonormal(n, n, 2)
    angles = principal_angles(first, second)
    # The columns themselves are rounded to 1e-16, a handful of which add up: 2e-8 of an angle of 1e-7.
    assert_close(angles, wanted, rtol=1e-13, atol=2e-15)
    if not largest:  # SciPy 1.17 takes the small angles from the cosines when there are large ones
        expected = torch.from_numpy(scipy.linalg.subspace_angles(first.numpy(), second.numpy())).flip(0)
        assert_close(angles, expected, rtol=1e-13, atol=2e-15)


def test_overlap_from_nothing_to_everything():
    basis = orthonormal(30, 8)
    assert subspace_overlap(basis[:, :4], basis[:, 4:]) == pytest.approx(0.0, abs=1e-28)
    assert subspace_overlap(basis[:, :4], basis[:, 2:6]) == pytest.approx(0.5, rel=1e-12)
    assert subspace_overlap(basis[:, :6], basis[:, 1:3] @ orthonormal(2, 2)) == pytest.approx(1.0, rel=1e-12)
    draws = torch.tensor(
        [subspace_overlap(basis[:, :3], orthonormal(30, 5, seed)) for seed in range(200)], dtype=torch.float64
    )
    assert abs(float(draws.mean()) - 5 / 30) < MC_SIGMAS * float(draws.std()) / 200**0.5


def test_float32_columns_give_float64_angles():
    first, second = orthonormal(40, 3, 1), orthonormal(40, 4, 2)
    angles = principal_angles(first.float(), second.float())
    assert angles.dtype == torch.float64
    assert_close(angles, principal_angles(first, second), rtol=0, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(2, 20))
@properties
def test_no_directions_hold_more_noise_than_its_own(seed, k, l, m):  # noqa: E741
    """Ky Fan's maximum principle; with the noise's own directions it is an equality."""
    size = 8
    gradients = random(m, size, seed=seed) * torch.logspace(0, -2, size, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance_of(gradients))
    values, vectors = values.flip(0)[:l], vectors.flip(1)
    directions = orthonormal(size, k, seed + 1)
    options = {"groups": 2, "randomisations": 2, "noise_eigenvalues": values}
    share = measure(random(k), gradients @ directions, **options).captured_noise
    assert share.shape == (min(k, l),)
    assert (share <= 1 + 1e-12).all()
    own = measure(random(k), gradients @ vectors[:, :k], **options).captured_noise
    assert_close(own, torch.ones_like(own), **EXACT64)


# ---------------------------------------------------------------------- sampling noise


@pytest.mark.parametrize("groups", [2, 5, 20])
def test_jackknife_by_leaving_rows_out(groups):
    projections = random(20, 3) @ random(3, 3, seed=1) + 10.0

    def statistic(covariance: torch.Tensor) -> torch.Tensor:
        return torch.stack([covariance.logdet(), covariance[0, 1] / covariance.trace()])

    left_out = torch.stack(
        [statistic(covariance_of(projections[torch.arange(20) % groups != g])) for g in range(groups)]
    )
    expected = ((groups - 1) / groups * (left_out - left_out.mean(dim=0)).square().sum(dim=0)).sqrt()
    assert_close(covariance_jackknife(statistic, projections, groups), expected, **EXACT64)


def test_jackknife_with_groups_of_two_sizes():
    """For a mean of squares, the jackknife over groups has a closed form."""
    a, b = random(2, 4)
    projections = torch.cat([a, -a, b, -b, torch.zeros(2, dtype=torch.float64)])  # x and −x share a group
    parts = [projections[group::4] for group in range(4)]
    weight = real([len(part) / 18 for part in parts])
    means = torch.stack([part.square().mean() for part in parts])
    expected = (weight / (1 - weight) * (means - weight @ means).square()).mean().sqrt()
    result = covariance_jackknife(lambda covariance: float(covariance[0, 0]), projections[:, None], 4)
    assert result.shape == ()
    assert_close(result, expected, **EXACT64)


@pytest.mark.slow  # many samples
def test_jackknife_of_the_total_correlation():
    """The statistic may be any function of a covariance, for instance one in NumPy."""
    eigenvalues = [3.0, 2.5, 0.5]

    def correlation(covariance: torch.Tensor) -> float:
        options = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.0}
        return total_correlation(stationary_covariance(eigenvalues, covariance, **options))

    samples = [random(400, 3, seed=seed) @ random(3, 3, seed=999) for seed in range(200)]
    values = real([correlation(covariance_of(sample)) for sample in samples])
    errors = torch.stack([covariance_jackknife(correlation, sample, 20) for sample in samples])
    assert values.mean() > 0.1
    spread = (2 / 199 + 2 / 19 / 200) ** 0.5  # as in the next test
    assert abs(float(errors.square().mean() / values.var()) - 1) < MC_SIGMAS * spread


@pytest.mark.slow  # many samples
def test_jackknife_errors_are_the_spread_over_samples():
    datasets, groups, m = 300, 20, 400
    factor = real([[1.0, 0, 0], [0.8, 0.9, 0], [-0.3, 0.4, 0.5]])
    eigenvalues = torch.tensor([3.0, 1.0, -0.5])
    results = [
        measure(eigenvalues, random(m, 3, seed=seed) @ factor.T, groups=groups, randomisations=2)
        for seed in range(datasets)
    ]
    for name in STATISTICS:
        values = real([getattr(r, name) for r in results])
        errors = real([getattr(r, f"{name}_standard_error") for r in results])
        # A variance from n numbers has relative spread sqrt(2/(n−1)): here of the values, and of the mean of
        # the jackknife's from `groups` pseudo-values each. Biases are of order 1/m.
        spread = (2 / (datasets - 1) + 2 / (groups - 1) / datasets) ** 0.5
        assert abs(float(errors.square().mean() / values.var()) - 1) < MC_SIGMAS * spread


def test_random_signs_keep_variances_and_end_correlations():
    projections, count = random(8, 3) @ random(3, 3, seed=1) + 5.0, 500
    covariances = torch.stack(list(sign_flipped_covariances(projections, count, generator())))
    centred = projections - projections.mean(dim=0)
    truth = covariance_of(projections).diagonal()
    assert_close(covariances.diagonal(dim1=1, dim2=2), truth.expand(count, 3), **EXACT64)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        entries, squares = covariances[:, i, j], (centred[:, i] * centred[:, j]).square().sum() / 64
        assert abs(float(entries.mean())) < MC_SIGMAS * float(entries.std()) / count**0.5
        squared = entries.square()
        assert abs(float(squared.mean() - squares)) < MC_SIGMAS * float(squared.std()) / count**0.5


def test_null_is_the_mean_over_all_signs():
    eigenvalues, projections = real([3.0, -1.0]), random(4, 2, seed=8)
    centred = projections - projections.mean(dim=0)
    commutators, shares = [], []
    for signs in itertools.product([-1.0, 1.0], repeat=8):
        flipped = real(signs).view(4, 2) * centred
        covariance = flipped.T @ flipped / 4
        commutators.append(brute_force(eigenvalues.diag(), covariance)[0])
        shares.append(float((2 * covariance[0, 1] ** 2) / covariance.square().sum()))
    count = 2000
    result = measure(eigenvalues, projections, randomisations=count)
    for name, values in (("commutator", commutators), ("off_diagonal_share", shares)):
        exact = real(values)
        mean, spread = getattr(result, f"{name}_null"), getattr(result, f"{name}_null_spread")
        assert abs(mean - float(exact.mean())) < MC_SIGMAS * spread / count**0.5
        # Spread of a sample's standard deviation is at most that of bounded numbers: half their range.
        assert spread == pytest.approx(float(exact.std(correction=0)), rel=0.1)


def test_null_tells_sampling_noise_from_correlation():
    """As in real gradients, directions share an example's magnitude: uncorrelated, but dependent squares."""
    m, k = 1000, 6
    eigenvalues = torch.linspace(5, 1, k)
    magnitudes = (0.5 * random(m, 1, seed=1)).exp()
    independent = magnitudes * random(m, k, seed=2) * torch.linspace(2, 1, k)
    result = measure(eigenvalues, independent, randomisations=200)
    assert abs(result.commutator - result.commutator_null) < MC_SIGMAS * result.commutator_null_spread
    excess = result.off_diagonal_share - result.off_diagonal_share_null
    assert abs(excess) < MC_SIGMAS * result.off_diagonal_share_null_spread
    correlated = independent @ random(k, k, seed=3)
    result = measure(eigenvalues, correlated, randomisations=200)
    assert result.commutator - result.commutator_null > 3 * MC_SIGMAS * result.commutator_null_spread


@pytest.mark.slow  # many samples
def test_null_is_unbiased_where_magnitudes_are_shared():
    m, k, datasets = 200, 4, 300
    eigenvalues = torch.linspace(5, 1, k)
    options = {"groups": 2, "randomisations": 10}
    excess, lost = [], []
    for seed in range(datasets):
        # Bounded magnitudes: moments up to the fourth settle at this m, so that biases are of order 1/m.
        magnitudes = torch.where(random(m, 1, seed=seed) > 1, 3.0, 0.5)
        projections = magnitudes * random(m, k, seed=seed + datasets)
        result = measure(eigenvalues, projections, **options)
        excess.append(result.commutator - result.commutator_null)
        # A permutation loses the common magnitude and with it part of the sampling noise.
        orders = torch.rand(m, k, generator=generator(seed)).argsort(dim=0)
        permuted = measure(eigenvalues, projections.gather(0, orders), **options)
        lost.append(result.commutator - permuted.commutator)
    mean, error = zip(*((d.mean(), d.std() / datasets**0.5) for d in (real(excess), real(lost))), strict=True)
    assert abs(mean[0]) < MC_SIGMAS * error[0]
    assert mean[1] > MC_SIGMAS * error[1]


# ---------------------------------------------------------------------- a network


@pytest.mark.parametrize("name", ["tanh_mlp", "norm_mlp"])
def test_network_against_dense_matrices(name):
    risk = risk_of(CASES[name])
    k, l = 5, 4  # noqa: E741
    solver = {"which": "largest", "tol": 1e-10, "max_products": 1000, "generator": generator()}
    top, noise = lanczos(Hessian(risk), k, **solver), lanczos(GradientCovariance(risk), l, **solver)
    result = alignment(
        top.eigenvalues,
        top.eigenvectors,
        gradient_projections(risk, top.eigenvectors),
        noise.eigenvalues,
        noise.eigenvectors,
        groups=4,
        randomisations=50,
        generator=generator(),
    )
    covariance = covariance_of(dense_gradients(risk))
    u = torch.linalg.eigh(dense_hessian(risk)).eigenvectors.flip(1)[:, :k]
    kappa, v = torch.linalg.eigh(covariance)
    kappa, v = kappa.flip(0)[:l], v.flip(1)[:, :l]
    seen = u.T @ covariance @ u
    commutator, cosine = brute_force(u.T @ dense_hessian(risk) @ u, seen)
    # Eigenvectors are as accurate as the residuals over the gaps: some 1e-7.
    close = {"rtol": 1e-6, "atol": 1e-7}
    assert result.commutator == pytest.approx(commutator, rel=1e-6)
    assert result.cosine == pytest.approx(cosine, rel=1e-6)
    share = 1 - seen.diagonal().square().sum() / seen.square().sum()
    assert result.off_diagonal_share == pytest.approx(float(share), rel=1e-6)
    expected = torch.from_numpy(scipy.linalg.subspace_angles(u.numpy(), v.numpy())).flip(0)
    assert_close(result.angles, expected, **close)
    assert result.subspace_overlap == pytest.approx(subspace_overlap(u, v), rel=1e-6)
    assert_close(result.captured_noise, (seen.diagonal()[:l].cumsum(0) / kappa.cumsum(0)), **close)
    assert (result.captured_noise <= 1 + 1e-9).all()
    assert (result.examples, result.groups, result.randomisations) == (risk.examples, 4, 50)


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eigenvalues": torch.ones(3, 1)}, "eigenvalues must be a vector"),
        ({"eigenvalues": torch.ones(0)}, "eigenvalues must be a vector"),
        ({"eigenvectors": torch.eye(4)}, "eigenvectors must have 3 columns, got 4"),
        ({"eigenvectors": torch.ones(3)}, "eigenvectors must be orthonormal columns"),
        ({"projections": torch.ones(9, 4)}, "projections must have 3 columns, got 4"),
        ({"projections": torch.ones(1, 3)}, "projections must be .m, k. with m ≥ 2"),
        ({"noise_eigenvalues": torch.ones(2, 2)}, "noise_eigenvalues must be a vector"),
        ({"noise_eigenvectors": torch.ones(4, 2)}, "noise_eigenvectors must have 3 rows, got 4"),
        (
            {"noise_eigenvalues": torch.ones(2), "noise_eigenvectors": torch.ones(3, 1)},
            "noise_eigenvectors must have 2 columns, got 1",
        ),
        ({"groups": 1}, "groups must be between 2 and the 9 examples"),
        ({"groups": 10}, "groups must be between 2 and the 9 examples"),
        ({"randomisations": 1}, "randomisations must be at least 2"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        measure(**{"eigenvalues": random(3), "projections": random(9, 3), **changes})


def test_bad_subspaces():
    with pytest.raises(ValueError, match="second must have 5 rows, got 6"):
        principal_angles(torch.eye(5), torch.eye(6))
    with pytest.raises(ValueError, match="first must be orthonormal columns"):
        subspace_overlap(torch.eye(5)[:2], torch.eye(5)[:2])
