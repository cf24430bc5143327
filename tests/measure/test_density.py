"""Tests the whole spectrum against dense matrices of a small network, with random vectors drawn by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from robustdyn.curvature.probes import rademacher
from robustdyn.measure import Density, WeightCurvature
from robustdyn.methods import OptimizerState
from robustdyn.records import RunRecords
from tests.measure import test_measurements as small
from tests.measure.test_measurements import ETA, EXAMPLES, MU, OMEGA, B, K, N, by_table, column
from tests.runs import TINY, command, rows
from tests.tolerances import MC_SIGMAS

snapshot, dense = small.snapshot, small.dense  # fixtures
PROBES = 24
ROUNDING = 1e-12  # of eigenvalues of order one
FACTOR = (N - B) / (B * N)  # of an unbiased covariance (Cochran, Sampling Techniques, theorem 2.2)


def measured(snapshot, **settings):
    assert snapshot.hessian.all_converged  # another measurement has found them
    size = snapshot.risk.numel
    chosen = {"probes": 3, "steps": size, "noise_probes": 4, **settings}
    tables = by_table(Density(**chosen).measure(snapshot))
    (whole,) = tables["whole_space"]
    return tables["density"], whole


@pytest.fixture(scope="module")
def full(snapshot):
    """Rows and sums from Lanczos chains that span the whole space."""
    return measured(snapshot)


@pytest.fixture(scope="module")
def many(snapshot):
    """Sums over enough random vectors for meaningful standard errors."""
    return measured(snapshot, probes=PROBES, noise_probes=2 * PROBES, steps=16)[1]


def signs(snapshot, count, shape, name):
    generator = snapshot.generator(name)
    return [rademacher(shape, generator, torch.float64, torch.device("cpu")) for _ in range(count)]


@pytest.fixture(scope="module")
def vectors(snapshot, dense):
    """The random vectors of ``full``: signs (3, P), and those with the noise's covariance (4, P)."""
    plain = torch.stack(signs(snapshot, 3, (snapshot.risk.numel,), "density-hessian"))
    centred = dense[1] - dense[1].mean(dim=0)
    noise = [
        sign @ centred / (EXAMPLES - 1) ** 0.5 for sign in signs(snapshot, 4, (EXAMPLES,), "density-noise")
    ]
    return plain, FACTOR**0.5 * torch.stack(noise)


def forms(dense, vectors, function):
    """zᵀ h(H) z of each vector."""
    values, basis = torch.linalg.eigh(dense[0])
    return ((vectors @ basis) ** 2 @ function(values)).numpy()


def controlled(dense, vectors, function):
    """The same, minus the deviation from its mean of the vectors' part along the leading directions."""
    values, basis = (part.flip(-1)[..., :K] for part in torch.linalg.eigh(dense[0]))
    covariance = FACTOR * torch.cov(dense[1].T, correction=1)
    excess = (vectors @ basis) ** 2 - (basis.T @ covariance @ basis).diagonal()
    return forms(dense, vectors, function) - (excess @ function(values)).numpy()


def term(values, eta=ETA):
    """λσ² for noise of variance 1, where λ > 0 and there is a stationary law."""
    decayed = values + OMEGA
    exists = (values > 0) & (eta * decayed < 2 * (1 + MU))
    return torch.where(
        exists, values * eta * (1 + MU) / (decayed * (1 - MU) * (2 * (1 + MU) - eta * decayed)), 0
    )


def check(row, name, samples):
    np.testing.assert_allclose(row[name], samples.mean(), rtol=1e-8)
    # an error of 1e-10 in each sample, relative to their differences
    error = samples.std(ddof=1) / len(samples) ** 0.5
    np.testing.assert_allclose(row[f"{name}_se"], error, rtol=1e-6, atol=1e-9 * abs(samples).max())


def test_chains_through_the_whole_space_are_exact_for_their_vectors(full, dense, vectors):
    plain, noise = vectors
    row = full[1]
    check(row, "hessian_trace", forms(dense, plain, lambda values: values))
    check(row, "hessian_squared_norm", forms(dense, plain, torch.square))
    check(row, "hessian_negative_trace", forms(dense, plain, lambda values: values.clamp(max=0)))
    check(row, "noise_trace", controlled(dense, noise, torch.ones_like))
    check(row, "curvature_term_positive_stable", controlled(dense, noise, term))
    assert row["products"] == len(full[0]) <= 7 * plain.shape[1]


def test_the_leading_directions_make_most_of_the_error(dense):
    centred = dense[1] - dense[1].mean(dim=0)
    signs = rademacher((4000, EXAMPLES), torch.Generator().manual_seed(1), torch.float64, torch.device("cpu"))
    draws = (FACTOR / (EXAMPLES - 1)) ** 0.5 * signs @ centred
    # 4000 draws know a standard deviation to about 2 %
    assert controlled(dense, draws, term).std() < 0.8 * forms(dense, draws, term).std()


def test_shares_are_ratios_of_what_their_vectors_hold(full, dense, vectors):
    plain, noise = vectors
    # a shift of all logits makes eigenvalues of zero, and rounding their signs
    low, high = (
        forms(dense, plain, lambda values, edge=edge: (values <= edge).double()).mean() / plain.shape[1]
        for edge in (-ROUNDING, ROUNDING)
    )
    assert low - 1e-10 <= full[1]["negative_share"] <= high + 1e-10
    assert high - low < 0.3
    held = forms(dense, noise, lambda values: (values <= 0).double())
    masses = forms(dense, noise, torch.ones_like)
    np.testing.assert_allclose(full[1]["noise_share_nonpositive"], held.sum() / masses.sum(), rtol=1e-8)
    assert full[1]["noise_share_nonpositive_se"] > 0
    assert full[1]["noise_share_unstable"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("kind", "which"), [("hessian", 0), ("noise", 1)])
def test_rows_are_the_measure_itself(full, dense, vectors, kind, which):
    chosen = [row for row in full[0] if row["kind"] == kind]
    for probe, vector in enumerate(vectors[which]):
        own = [row for row in chosen if row["probe"] == probe]
        assert column(own, "index").tolist() == list(range(len(own)))
        assert (np.diff(column(own, "ritz_value")) >= 0).all()
        for power in range(4):
            moment = (column(own, "mass") * column(own, "ritz_value") ** power).sum()
            (truth,) = forms(dense, vector[None], lambda values, power=power: values**power)
            np.testing.assert_allclose(moment, truth, rtol=1e-8)


@pytest.mark.slow
def test_sums_over_all_directions_lie_within_their_errors(many, dense):
    values, basis = torch.linalg.eigh(dense[0])
    covariance = FACTOR * torch.cov(dense[1].T, correction=1)
    gamma = ((covariance @ basis) * basis).sum(dim=0)
    trace = gamma.sum()
    truths = {
        "hessian_trace": values.sum(),
        "hessian_negative_trace": values.clamp(max=0).sum(),
        "hessian_squared_norm": values.square().sum(),
        "noise_trace": trace,
        "noise_share_nonpositive": gamma[values <= 0].sum() / trace,
        "curvature_term_positive_stable": (gamma * term(values)).sum(),
    }
    for name, truth in truths.items():
        assert abs(many[name] - float(truth)) < MC_SIGMAS * many[f"{name}_se"], name
        assert 0 < many[f"{name}_se"] < 0.5 * abs(float(truth)), name  # says something
    assert many["curvature_term_positive_stable_truncation"] < 0.1


@pytest.mark.slow
def test_the_trace_is_that_of_the_layers(many, snapshot):
    (wci,) = by_table(WeightCurvature(probes=4, exact_classes_up_to=3).measure(snapshot))["wci"]
    assert wci["estimator"] == "gauss_newton_exact"
    off = many["hessian_trace"] - wci["hessian_trace_all"]
    assert abs(off) < MC_SIGMAS * many["hessian_trace_se"]


@pytest.mark.slow  # a run of its own
def test_directions_too_sharp_for_the_rate_are_said_and_left_out(snapshot, dense, vectors):
    sharp = torch.linalg.eigvalsh(dense[0]).flip(0)[:2]
    rate = float(2 * (1 + MU) / (sharp.mean() + OMEGA))
    _, row = measured(replace(snapshot, optimizer=OptimizerState(rate, MU, OMEGA)))
    noise = vectors[1]
    held = forms(dense, noise, lambda values: (values > sharp.mean()).double())
    masses = forms(dense, noise, torch.ones_like)
    assert row["noise_share_unstable"] == pytest.approx(held.sum() / masses.sum(), rel=1e-8)
    check(row, "curvature_term_positive_stable", controlled(dense, noise, lambda values: term(values, rate)))
    # a rate for which nothing is stable
    _, row = measured(replace(snapshot, optimizer=OptimizerState(1e9, MU, OMEGA)), steps=8)
    assert row["curvature_term_positive_stable"] == 0
    assert np.isnan(row["curvature_term_positive_stable_truncation"])


@pytest.mark.parametrize("name", ["curvature_term_positive_stable", "hessian_negative_trace"])
def test_the_truncation_is_that_of_half_the_steps(snapshot, name):
    _, row = measured(snapshot, steps=8)
    _, half = measured(snapshot, steps=4)
    assert row[f"{name}_truncation"] == pytest.approx(abs(half[name] / row[name] - 1), rel=1e-9)
    assert row[f"{name}_truncation"] > 0


@pytest.mark.parametrize("steps", [4, 8, 16])
def test_the_share_below_zero_is_right_to_its_resolution(snapshot, dense, vectors, steps):
    _, row = measured(snapshot, steps=steps)
    plain = vectors[0]
    below = forms(dense, plain, lambda values: (values <= 0).double()).mean() / plain.shape[1]
    assert abs(row["negative_share"] - below) <= row["negative_share_resolution"] + 1e-12
    assert row["negative_share_resolution"] > 0


def test_without_eigenpairs_there_is_no_control(snapshot, dense, vectors):
    tables = by_table(Density(probes=2, steps=40, noise_probes=4).measure(replace(snapshot)))
    check(tables["whole_space"][0], "noise_trace", forms(dense, vectors[1], torch.ones_like))


def test_parameters_without_noise_are_counted(full, dense):
    spread = dense[1].std(dim=0)
    assert full[1]["noise_free_parameters"] == int((spread == 0).sum())


def test_every_row_fits_its_table(full, tmp_path):
    records = RunRecords(tmp_path)
    records.extend("density", full[0])
    records.append("whole_space", full[1])
    keys = {(row["kind"], row["probe"], row["index"]) for row in full[0]}
    assert len(keys) == len(full[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 1}, "probes must be at least 2, to have standard errors, got 1"),
        ({"noise_probes": 1}, "noise_probes must be at least 2"),
        ({"steps": 3}, "steps must be at least 4"),
    ],
)
def test_refuses_what_has_no_error(settings, message):
    with pytest.raises(ValueError, match=message):
        Density(**{"probes": 2, "steps": 4, "noise_probes": 2, **settings})


def test_sums_over_a_law_are_null_where_the_optimiser_has_none_that_is_known(snapshot):
    other = replace(snapshot, optimizer=OptimizerState(ETA, MU, OMEGA, plain=False))
    assert other.hessian.all_converged
    settings = {"probes": 2, "steps": 6, "noise_probes": 2}
    (ours,) = by_table(Density(**settings).measure(snapshot))["whole_space"]
    (theirs,) = by_table(Density(**settings).measure(other))["whole_space"]
    unknown = {name for name in ours if theirs[name] is None}
    assert {name for name in unknown if not name.endswith(("_se", "_truncation"))} == {
        "noise_share_unstable",
        "curvature_term_positive_stable",
    }
    assert all(theirs[name] == ours[name] for name in ours.keys() - unknown - {"seconds"})


@pytest.mark.slow
def test_a_run_measures_it_when_asked(tmp_path, monkeypatch):
    settings = [f"measure.measurements.density.{name}" for name in ("probes=2", "steps=6", "noise_probes=3")]
    assert command(monkeypatch, *TINY, "measure=full", *settings, f"hydra.run.dir={tmp_path}") == 0
    assert [row["epoch"] for row in rows(tmp_path, "whole_space")] == [0, 2]
    assert all(row["products"] == 5 * 6 for row in rows(tmp_path, "whole_space"))
    found = [(row["epoch"], row["kind"]) for row in rows(tmp_path, "density")]
    assert {key: found.count(key) for key in found} == {
        (epoch, kind): 6 * count for epoch in (0, 2) for kind, count in (("hessian", 2), ("noise", 3))
    }
    assert [row["epoch"] for row in rows(tmp_path, "wci")] == [0, 2]  # besides the default measurements
    assert (tmp_path / "report" / "figures" / "spectral_density.png").exists()
