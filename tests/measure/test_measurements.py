"""Tests the measurements against dense matrices of a small network, with every formula written out again."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.func import functional_call, hessian

from robustdyn.curvature import EmpiricalRisk
from robustdyn.measure import Alignment, Eigenpairs, Snapshot, Spectrum, WeightCurvature
from robustdyn.measure.spectrum import best_rate_terms
from robustdyn.methods import OptimizerState
from robustdyn.records import RunRecords
from tests.tolerances import EXACT64, MC_SIGMAS

EXAMPLES, SECOND, N, B = 20, 12, 500, 32
ETA, MU, OMEGA = 0.05, 0.9, 5e-4
K = 4
# An eigenvalue's error is at most residual² / gap, which vanishes for 1e-9². Eigenvectors, and values that
# depend on them, have errors of residual / gap, below 1e-6 for the gaps of this spectrum.
VECTORS = {"rtol": 1e-6, "abs": 1e-12}


@pytest.fixture(scope="module")
def snapshot():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    model(torch.randn(64, 1, 4, 4, dtype=torch.float64))  # running statistics that are not 0 and 1
    inputs, targets = torch.randn(EXAMPLES, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (EXAMPLES,))
    risk = EmpiricalRisk(model.eval(), inputs, targets, chunk_size=7, memory=2**26)
    moved = inputs[:SECOND] + 0.1 * torch.randn(SECOND, 1, 4, 4, dtype=torch.float64)
    again = EmpiricalRisk(model, moved, targets[:SECOND], chunk_size=5)
    return Snapshot(
        epoch=3,
        step=60,
        risk=risk,
        again=lambda theta: again,
        optimizer=OptimizerState(ETA, MU, OMEGA),
        train_examples=N,
        batch_size=B,
        seed=0,
        eigenpairs=solver(tolerance=1e-9),
    )


def solver(**changes):
    settings = {
        "directions": K,
        "tolerance": 1e-6,
        "max_products": 200,
        "extra_vectors": 26,
        "warm_start": True,
    }
    return Eigenpairs(**{**settings, **changes})


@pytest.fixture(scope="module")
def dense(snapshot):
    """Dense Hessian (P, P), per-example gradients (m, P) and the slices of the named tensors."""
    risk = snapshot.risk
    shapes = {name: p.shape for name, p in risk.model.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in risk.model.parameters()])
    inputs, targets = risk.subset(slice(None))

    def losses(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        parameters = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        logits = functional_call(risk.model, parameters, (inputs,))
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    return hessian(lambda flat: losses(flat).mean())(theta), torch.func.jacrev(losses)(theta)


def by_table(rows):
    tables = {}
    for table, row in rows:
        tables.setdefault(table, []).append(row)
    return tables


def column(rows, name):
    return np.array([row[name] for row in rows])


@pytest.fixture(scope="module")
def spectrum(snapshot):
    measurement = Spectrum()
    return by_table(measurement.measure(snapshot))


def test_hessian_eigenvalues(spectrum, dense):
    truth = torch.linalg.eigvalsh(dense[0]).flip(0)[:K]
    np.testing.assert_allclose(
        column(spectrum["spectrum"], "hessian_eigenvalue"), truth, rtol=EXACT64["rtol"]
    )
    assert (column(spectrum["spectrum"], "residual") <= 1e-9 * float(truth[0])).all()


def gradients_and_gauss_newton(risk, vectors):
    """Each example's gradient and uᵀ Jᵀ Λ J u along the vectors."""
    shapes = {name: p.shape for name, p in risk.model.named_parameters()}
    inputs, targets = risk.subset(slice(None))

    def logits(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        named = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        return functional_call(risk.model, named, (inputs,))

    theta = torch.cat([p.detach().flatten() for p in risk.model.parameters()])
    changes = torch.func.jacrev(logits)(theta) @ vectors
    p = logits(theta).softmax(dim=1).detach()
    slopes = p - nn.functional.one_hot(targets, p.shape[1])
    means = torch.einsum("ic,ick->ik", p, changes)
    curved = torch.einsum("ic,ick->ik", p, changes**2) - means**2
    return torch.einsum("ic,ick->ik", slopes, changes).numpy(), curved.numpy()


def test_values_along_them_are_those_of_the_second_attack(snapshot, spectrum, dense):
    values, vectors = torch.linalg.eigh(dense[0])
    values, vectors = values.flip(0)[:K].numpy(), vectors.flip(1)[:, :K]
    g, curved = gradients_and_gauss_newton(snapshot.risk, vectors)
    other, curved_again = gradients_and_gauss_newton(snapshot.again(None), vectors)
    rows = spectrum["spectrum"]
    change = (curved_again - curved[:SECOND]).mean(axis=0)
    np.testing.assert_allclose(column(rows, "curvature"), values + change, rtol=VECTORS["rtol"])
    first, second = g[:SECOND] - g.mean(axis=0), other - g.mean(axis=0)
    square, again = (first**2).sum(axis=0), (second**2).sum(axis=0)
    single = g.var(axis=0, ddof=1) * again / square
    attack = single * (1 - np.maximum((first * second).sum(axis=0) / np.sqrt(square * again), 0))
    np.testing.assert_allclose(column(rows, "attack_noise"), attack / B, rtol=VECTORS["rtol"])
    # of the examples' part, a mini-batch's share without replacement
    truth = (single - attack) * (N - B) / (B * N) + attack / B
    np.testing.assert_allclose(column(rows, "gradient_noise"), truth, rtol=VECTORS["rtol"])


def test_added_noise_is_a_part_that_no_shuffling_takes_back(snapshot, spectrum):
    noisy = by_table(Spectrum().measure(replace(snapshot, added_noise=9.0)))["spectrum"]
    rows = spectrum["spectrum"]
    attack = column(rows, "attack_noise")
    # of one example's variance, a batch without replacement has the share (N - B) / (B N)
    single = (column(rows, "gradient_noise") - attack) * B * N / (N - B) + B * attack
    for name in ("gradient_noise", "attack_noise"):
        np.testing.assert_allclose(column(noisy, name), column(rows, name) + 9 * single / B, rtol=1e-6)
    for name in ("gradient_noise_se", "noise_eigenvalue"):
        ratio = column(noisy, name) / column(rows, name)
        np.testing.assert_allclose(ratio, 10 if name.endswith("se") else 1 + 9 * N / (N - B), rtol=1e-6)
    variances = (column(r, "posterior_variance_stationary") for r in (noisy, rows))
    ratio = np.divide(*variances)
    np.testing.assert_allclose(
        ratio, column(noisy, "gradient_noise") / column(rows, "gradient_noise"), rtol=1e-6
    )


@pytest.mark.slow
def test_values_along_eigenvectors_have_neither_bias_nor_wrong_errors(snapshot):
    """With few examples the eigenvectors fit noise, which must not enter the recorded values."""
    torch.manual_seed(0)
    model = nn.Linear(30, 2, bias=False).double()
    seen, errors, own = [], [], []
    for _ in range(60):
        centre = torch.randn(40, 30, dtype=torch.float64) * torch.linspace(2, 0.1, 30, dtype=torch.float64)
        targets = torch.randint(0, 2, (40,))

        def attacked(count, centre=centre, targets=targets):
            return EmpiricalRisk(
                model, centre[:count] + torch.randn(count, 30, dtype=torch.float64), targets[:count]
            )

        drawn = replace(
            snapshot,
            risk=attacked(40),
            again=lambda theta, a=attacked: a(30),
            eigenpairs=solver(directions=2),
        )
        u, along = drawn.hessian.eigenvectors, drawn.along
        truth = []
        for _ in range(100):
            g, curved = gradients_and_gauss_newton(attacked(40), u)
            truth.append([curved.mean(axis=0), g.var(axis=0, ddof=1)])
        truth = np.mean(truth, axis=0)
        seen.append(np.stack([along.curvature, along.variances]) / truth)
        own.append(np.stack([drawn.hessian.eigenvalues.numpy(), drawn.projected.variances.numpy()]) / truth)
        errors.append(np.stack([along.curvature_standard_errors, along.variance_standard_errors]) / truth)
    mean, spread = np.mean(seen, axis=0), np.std(seen, axis=0, ddof=1)
    assert (np.abs(mean - 1) < MC_SIGMAS * spread / np.sqrt(60)).all()
    assert (np.mean(own, axis=0) > 1.1).all()  # curvature and noise, both directions


def test_noise_eigenvalues(spectrum, dense):
    covariance = torch.cov(dense[1].T, correction=1) * (N - B) / (B * N)
    truth = torch.linalg.eigvalsh(covariance).flip(0)[:K]
    np.testing.assert_allclose(column(spectrum["spectrum"], "noise_eigenvalue"), truth, rtol=1e-8)
    assert (column(spectrum["spectrum"], "noise_residual") <= 2e-9 * float(truth[0])).all()


def test_posterior_variance_and_bound_terms(spectrum):
    rows, (bound,) = spectrum["spectrum"], spectrum["bounds"]
    raw, gamma = column(rows, "curvature"), column(rows, "gradient_noise")
    lam = raw + OMEGA
    variance = ETA * gamma * (1 + MU) / (lam * (1 - MU) * (2 * (1 + MU) - ETA * lam))
    np.testing.assert_allclose(column(rows, "posterior_variance_stationary"), variance, rtol=1e-12)
    np.testing.assert_allclose(column(rows, "curvature_term"), raw * variance, rtol=1e-12)
    np.testing.assert_allclose(column(rows, "log_variance_term"), -np.log(variance), rtol=1e-12)
    assert bound["curvature_term_top_k"] == pytest.approx((raw * variance).sum())
    assert bound["log_variance_term_top_k"] == pytest.approx(-np.log(variance).sum())
    assert bound["tracked_directions"] == K
    assert bound["unstable_directions"] == 0


def test_a_direction_too_sharp_for_the_rate_has_no_variance(snapshot, dense):
    # A rate too high for the sharpest direction only: between 2 (1 + μ) / λ_1 and 2 (1 + μ) / λ_2.
    sharp = torch.linalg.eigvalsh(dense[0]).flip(0)[:2]
    rate = float(2 * (1 + MU) / sharp.mean())
    wild = replace(snapshot, optimizer=OptimizerState(rate, MU, 0.0), eigenpairs=solver())
    rows = by_table(Spectrum().measure(wild))
    assert column(rows["spectrum"], "stable").tolist() == [False, True, True, True]
    variances = column(rows["spectrum"], "posterior_variance_stationary")
    assert np.isnan(variances[0])
    assert (variances[1:] > 0).all()
    assert rows["bounds"][0]["unstable_directions"] == 1
    assert np.isnan(rows["bounds"][0]["dominant_terms_top_k"])  # a sum over fewer directions has no such name


def test_the_rate_that_minimises_the_dominating_terms(spectrum):
    (row,) = spectrum["bounds"]
    lam, gamma = (column(spectrum["spectrum"], name) for name in ("curvature", "gradient_noise"))
    assert (lam > 0).all()

    def best(lam, gamma):
        return len(lam) / (lam * gamma / (2 * (lam + OMEGA) * (1 - MU))).sum()

    assert row["best_rate_top_k"] == pytest.approx(best(lam, gamma), rel=1e-12)
    assert row["best_rate_top_k_se"] > 0
    # a direction without positive curvature is left out
    term = best_rate_terms(OptimizerState(ETA, MU, OMEGA), np.array([*lam, -1.0]), np.array([*gamma, 5.0]))
    assert term.values.sum() == pytest.approx(best(lam, gamma), rel=1e-12)
    steps = 1e-6 * np.eye(K)
    for found, moved in (
        (term.by_curvature, [best(lam + s, gamma) - best(lam - s, gamma) for s in steps]),
        (term.by_noise, [best(lam, gamma + s * gamma) - best(lam, gamma - s * gamma) for s in steps]),
    ):
        assert found[K] == 0
        scale = gamma if found is term.by_noise else 1.0
        # central differences of a smooth function; by λ it is a small one, with fewer digits
        np.testing.assert_allclose(found[:K], np.array(moved) / (2e-6 * scale), rtol=1e-5, atol=1e-6)
    assert np.isnan(best_rate_terms(OptimizerState(ETA, MU, OMEGA), -lam, gamma).values).all()
    assert np.isnan(best_rate_terms(OptimizerState(ETA, MU, OMEGA, plain=False), lam, gamma).values).all()


def test_an_optimiser_without_a_known_law_keeps_the_spectrum(snapshot):
    other = replace(snapshot, optimizer=OptimizerState(ETA, MU, OMEGA, plain=False), eigenpairs=solver())
    ours, theirs = by_table(Spectrum().measure(snapshot)), by_table(Spectrum().measure(other))
    for mine, row in zip(ours["spectrum"], theirs["spectrum"], strict=True):
        assert row["stable"] is None
        for name in ("posterior_variance_stationary", "curvature_term", "log_variance_term"):
            assert np.isnan(row[name])
        assert row["hessian_eigenvalue"] == pytest.approx(mine["hessian_eigenvalue"])
        assert row["gradient_noise"] == pytest.approx(mine["gradient_noise"])
    assert theirs["bounds"][0]["unstable_directions"] is None


def test_no_stable_direction_at_all_is_recorded_too(snapshot):
    wild = replace(snapshot, optimizer=OptimizerState(1e6, MU, 0.0), eigenpairs=solver(tolerance=1e-3))
    rows = by_table(Spectrum().measure(wild))
    assert not column(rows["spectrum"], "stable").any()
    assert rows["bounds"][0]["unstable_directions"] == K


def test_alignment(snapshot, dense):
    (row,) = by_table(Alignment(groups=10, randomisations=50).measure(snapshot))["alignment"]
    values, vectors = torch.linalg.eigh(dense[0])
    lam, u = values.flip(0)[:K], vectors.flip(1)[:, :K]
    covariance = torch.cov(dense[1].T, correction=0)
    h, c = torch.diag(lam), u.T @ covariance @ u
    commutator = (h @ c - c @ h).norm() / (2 * h.norm() * c.norm())
    assert row["commutator"] == pytest.approx(float(commutator), rel=VECTORS["rtol"])
    assert row["cosine"] == pytest.approx(float((h * c).sum() / (h.norm() * c.norm())), rel=VECTORS["rtol"])
    kappa, v = torch.linalg.eigh(covariance)
    overlap = (u.T @ v.flip(1)[:, :K]).norm() ** 2 / K
    assert row["subspace_overlap"] == pytest.approx(float(overlap), rel=VECTORS["rtol"])
    captured = c.diagonal().sum() / kappa.flip(0)[:K].sum()
    assert row["captured_noise"] == pytest.approx(float(captured), rel=VECTORS["rtol"])
    # the discrete Lyapunov equation of the 2K-dimensional system, without our formulas
    eta, mu, lam = ETA, MU, lam.numpy() + OMEGA
    a = np.block([[np.diag(1 - eta * lam), -eta * mu * np.eye(K)], [np.diag(lam), mu * np.eye(K)]])
    b = np.vstack([-eta * np.eye(K), np.eye(K)])
    sigma = scipy.linalg.solve_discrete_lyapunov(a, b @ c.numpy() @ b.T)[:K, :K]
    correlation = (np.log(np.diag(sigma)).sum() - np.linalg.slogdet(sigma)[1]) / 2
    assert row["total_correlation"] == pytest.approx(correlation, rel=1e-5)
    for name in ("commutator_se", "commutator_null", "cosine_se", "total_correlation_se"):
        assert row[name] > 0
    assert row["tracked_directions"] == K
    assert row["examples"] == EXAMPLES


def test_no_total_correlation_without_a_stationary_law(snapshot):
    wild = replace(snapshot, optimizer=OptimizerState(1e6, MU, 0.0))
    (row,) = by_table(Alignment(groups=10, randomisations=5).measure(wild))["alignment"]
    assert np.isnan(row["total_correlation"])
    assert row["commutator"] > 0


def test_what_measurements_share_is_computed_once(snapshot):
    fresh = replace(snapshot)
    assert fresh.solved == {}
    list(Spectrum().measure(fresh))
    first = fresh.solved
    assert set(first) == {"hessian", "noise"}
    list(Alignment(groups=5, randomisations=5).measure(fresh))
    assert all(fresh.solved[name] is pairs for name, pairs in first.items())


def test_a_warm_start_finds_the_same_pairs_sooner(snapshot):
    cold = replace(snapshot)
    starts = {name: pairs.warm_start for name, pairs in (("hessian", cold.hessian), ("noise", cold.noise))}
    warm = replace(snapshot, starts=starts)
    unused = replace(snapshot, starts=starts, eigenpairs=solver(tolerance=1e-9, warm_start=False))
    for name in starts:
        a, b = getattr(cold, name), getattr(warm, name)
        # products at least K; exact eigenvectors sum to a vector whose Krylov space closes after K
        assert b.products < a.products
        np.testing.assert_allclose(b.eigenvalues, a.eigenvalues, rtol=1e-8)
        assert torch.equal(getattr(unused, name).eigenvalues, a.eigenvalues)


def test_weight_curvature_index_and_layers(snapshot, dense):
    tables = by_table(WeightCurvature(probes=4, exact_classes_up_to=3).measure(snapshot))
    (row,) = tables["wci"]
    model = snapshot.risk.model
    diagonal, start, norms, traces = dense[0].diagonal(), 0, [], []
    for parameter in model.parameters():
        part = diagonal[start : start + parameter.numel()]
        start += parameter.numel()
        if parameter.dim() > 1:
            norms.append(float(parameter.detach().norm() ** 2))
            traces.append(float(part.sum()))
    terms = np.sqrt(np.array(norms) * np.array(traces))
    np.testing.assert_allclose(row["wci"], terms.sum(), rtol=EXACT64["rtol"])
    np.testing.assert_allclose(row["hessian_trace"], sum(traces), rtol=EXACT64["rtol"])
    np.testing.assert_allclose(row["hessian_trace_all"], float(diagonal.sum()), rtol=EXACT64["rtol"])
    np.testing.assert_allclose(row["cauchy_schwarz_bound"], np.sqrt(sum(norms) * sum(traces)), rtol=1e-10)
    assert row["estimator"] == "gauss_newton_exact"
    assert row["batchnorm"] == "eval"
    assert row["examples"] == EXAMPLES
    assert row["wci_se"] > 0
    layers = tables["layers"]
    assert [layer["layer"] for layer in layers] == ["0.weight", "4.weight"]
    np.testing.assert_allclose(column(layers, "wci_term"), terms, rtol=EXACT64["rtol"])
    np.testing.assert_allclose(
        column(layers, "optimal_variance"), np.sqrt(np.array(norms) / traces), rtol=1e-10
    )


def test_every_row_fits_its_table(snapshot, spectrum, tmp_path):
    records = RunRecords(tmp_path)
    rows = [(table, row) for table, rows in spectrum.items() for row in rows]
    rows += list(WeightCurvature(probes=4, exact_classes_up_to=3).measure(snapshot))
    rows += list(Alignment(groups=5, randomisations=5).measure(snapshot))
    for table, row in rows:
        records.append(table, row)
    written = {path.stem: len(path.read_text().splitlines()) for path in (tmp_path / "records").iterdir()}
    assert written == {"spectrum": K, "bounds": 1, "wci": 1, "layers": 2, "alignment": 1}
