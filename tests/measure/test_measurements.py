"""Measurements against dense matrices of a small network, every formula written out again."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from robustdyn.curvature import EmpiricalRisk
from robustdyn.measure import Snapshot, Spectrum, WeightCurvature
from robustdyn.methods import OptimizerState
from robustdyn.records import RunRecords
from tests.tolerances import EXACT64

EXAMPLES, N, B = 20, 500, 32
ETA, MU, OMEGA = 0.05, 0.9, 5e-4
K = 4
# An eigenvalue's error is at most residual² / gap: 1e-9² vanishes; vectors, and what hangs on them, err by
# residual / gap, below 1e-6 for the gaps of this spectrum.
VECTORS = {"rtol": 1e-6, "abs": 1e-12}


@pytest.fixture(scope="module")
def snapshot():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    model(torch.randn(64, 1, 4, 4, dtype=torch.float64))  # running statistics that are not 0 and 1
    risk = EmpiricalRisk(
        model.eval(),
        torch.randn(EXAMPLES, 1, 4, 4, dtype=torch.float64),
        torch.randint(0, 3, (EXAMPLES,)),
        chunk_size=7,
    )
    return Snapshot(
        epoch=3,
        step=60,
        risk=risk,
        optimizer=OptimizerState(ETA, MU, OMEGA),
        train_examples=N,
        batch_size=B,
        seed=0,
    )


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
    measurement = Spectrum(directions=K, tolerance=1e-9, max_products=200, extra_vectors=26)
    return by_table(measurement.measure(snapshot))


def test_hessian_eigenvalues(spectrum, dense):
    truth = torch.linalg.eigvalsh(dense[0]).flip(0)[:K]
    np.testing.assert_allclose(
        column(spectrum["spectrum"], "hessian_eigenvalue"), truth, rtol=EXACT64["rtol"]
    )
    assert (column(spectrum["spectrum"], "residual") <= 1e-9 * float(truth[0])).all()


def test_noise_along_them_is_that_of_a_minibatch(spectrum, dense):
    vectors = torch.linalg.eigh(dense[0])[1].flip(1)[:, :K]
    single = (dense[1] @ vectors).var(dim=0, correction=1)
    truth = single * (N - B) / (B * (N - 1))
    np.testing.assert_allclose(column(spectrum["spectrum"], "gradient_noise"), truth, rtol=VECTORS["rtol"])
    assert (column(spectrum["spectrum"], "gradient_noise_se") > 0).all()


def test_noise_eigenvalues(spectrum, dense):
    covariance = torch.cov(dense[1].T, correction=0) * (N - B) / (B * (N - 1))
    truth = torch.linalg.eigvalsh(covariance).flip(0)[:K]
    np.testing.assert_allclose(column(spectrum["spectrum"], "noise_eigenvalue"), truth, rtol=1e-8)


def test_posterior_variance_and_bound_terms(spectrum):
    rows, (bound,) = spectrum["spectrum"], spectrum["bounds"]
    raw, gamma = column(rows, "hessian_eigenvalue"), column(rows, "gradient_noise")
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
    wild = Snapshot(**{**vars(snapshot), "optimizer": OptimizerState(rate, MU, 0.0)})
    rows = by_table(Spectrum(directions=K, tolerance=1e-6, max_products=200, extra_vectors=26).measure(wild))
    assert column(rows["spectrum"], "stable").tolist() == [False, True, True, True]
    variances = column(rows["spectrum"], "posterior_variance_stationary")
    assert np.isnan(variances[0])
    assert (variances[1:] > 0).all()
    assert rows["bounds"][0]["unstable_directions"] == 1
    assert np.isnan(rows["bounds"][0]["dominant_terms_top_k"])  # no sum over fewer directions under this name


def test_no_stable_direction_at_all_is_recorded_too(snapshot):
    wild = Snapshot(**{**vars(snapshot), "optimizer": OptimizerState(1e6, MU, 0.0)})
    rows = by_table(Spectrum(directions=K, tolerance=1e-3, max_products=200, extra_vectors=26).measure(wild))
    assert not column(rows["spectrum"], "stable").any()
    assert rows["bounds"][0]["unstable_directions"] == K


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
    for table, row in rows:
        records.append(table, row)
    written = {path.stem: len(path.read_text().splitlines()) for path in (tmp_path / "records").iterdir()}
    assert written == {"spectrum": K, "bounds": 1, "wci": 1, "layers": 2}
