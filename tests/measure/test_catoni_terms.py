"""Tests the bound over the whole space against dense H and C, at several epochs of a real short training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

from robustdyn.measure import CatoniTerms, Density, Recorder, measure_model
from robustdyn.measure.catoni_terms import _measure_of
from robustdyn.records import read_table
from robustdyn.theory import (
    MeasuredSpectrum,
    SpectralMeasure,
    cell_edges,
    gaussian_kl,
    minibatch_noise_factor,
    propagate,
    whole_space_law,
)
from tests.runs import command, rows, tiny_but
from tests.tolerances import MC_SIGMAS

N, B, MU, OMEGA = 64, 16, 0.9, 5e-4
MEASURED = (1, 5, 7)
RATES = np.repeat([0.03, 0.006], [24, 8])  # four steps an epoch
SMALL = tiny_but("measure.measurements")
SETTING = {"momentum": MU, "weight_decay": OMEGA, "interpolation": "log_linear"}


def attacked(model, x, y):
    x = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), x)
    return (x + 0.1 * slope.sign()).detach()


def dense(model, x, y):
    """H (P, P) and the examples' gradients (N, P)."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    moved = attacked(model, x, y)

    def losses(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        named = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, named, (moved,)), y, reduction="none")

    hessian = torch.func.jacfwd(torch.func.grad(lambda flat: losses(flat).mean()))(theta)
    return hessian.numpy(), torch.func.jacrev(losses)(theta).numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of eight epochs, and H and the gradients at its measured epochs."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:N] / 16).view(-1, 1, 8, 8), torch.tensor(labels[:N])
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 10)),
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), momentum=MU, weight_decay=OMEGA, lr=0.1)
    path = tmp_path_factory.mktemp("bound") / "run"
    measurements = {"density": Density(probes=4, steps=48, noise_probes=8), "bound": CatoniTerms()}
    found = {}
    with Recorder(
        model, x, y, path, attack=attacked, batch_size=B, measurements=measurements, second_attack=4
    ) as recorder:
        for epoch in range(len(RATES) * B // N):
            for part in torch.randperm(N).split(B):
                optimizer.param_groups[0]["lr"] = RATES[recorder._steps]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(attacked(model, x[part], y[part])), y[part]).backward()
                optimizer.step()
                recorder.step(optimizer)
            if epoch in MEASURED:
                recorder.measure(epoch)
                found[epoch] = dense(model, x, y)
    tables = {name: read_table(path, name) for name in ("catoni", "curvature_cells", "density")}
    return SimpleNamespace(found=found, **tables)


def spectrum_of(trained, epoch):
    """λ and γ of all directions, and the number of parameters without noise."""
    hessian, gradients = trained.found[epoch]
    lam, basis = np.linalg.eigh(hessian)
    centred = gradients - gradients.mean(axis=0)
    noise = minibatch_noise_factor(N, B, replacement=False) * ((centred @ basis) ** 2).mean(axis=0)
    return lam[::-1], noise[::-1], int((np.abs(centred).max(axis=0) == 0).sum())


def exact(lam, mass):
    return SpectralMeasure(np.tile(lam, 2), np.tile(mass, 2), np.repeat([0, 1], lam.size))


def test_every_term_is_that_of_the_dense_matrices(trained):
    """Within 2 %, or within the stated errors, at every measured epoch."""
    before, last, off = None, 0, {}
    assert trained.catoni["epoch"].tolist() == list(MEASURED)
    for row in trained.catoni.itertuples():
        lam, gamma, noise_free = spectrum_of(trained, row.epoch)
        assert row.noise_free_parameters == noise_free
        assert row.directions == row.parameters == lam.size
        plain, noise = exact(lam, np.ones(lam.size)).without_zeros(noise_free), exact(lam, gamma)
        nodes = trained.density[trained.density["epoch"] == row.epoch].to_dict("records")
        edges = cell_edges(
            _measure_of(nodes, "hessian").without_zeros(noise_free), _measure_of(nodes, "noise")
        )
        # a cell may hold nodes, but no eigenvalue
        edges = np.r_[edges[:-1][plain.in_cells(edges) > 0.5], edges[-1]]
        edges[0] = np.inf
        law = whole_space_law(plain, noise, edges, RATES[last : row.step], before=before, **SETTING)
        before, last = law.cells, row.step
        d, prior = law.directions, row.prior_variance
        truth = {
            "curvature": law.curvature_sum / 2,
            "negative_curvature": law.negative_curvature_sum / 2,
            "kl_trace": (law.variance_sum / prior - d) / 2,
            "kl_log_determinant": (d * np.log(prior) - law.log_variance_sum) / 2,
        }
        truth["kl"] = row.kl_mean + truth["kl_trace"] + truth["kl_log_determinant"]
        truth["total"] = (
            row.empirical_loss + truth["curvature"] + truth["kl"] / row.beta + row.confidence + row.complexity
        )
        for name, value in truth.items():
            stated = MC_SIGMAS * getattr(row, f"{name}_se")
            stated += getattr(row, f"{name}_truncation") * abs(getattr(row, name))
            assert abs(getattr(row, name) - value) < max(0.02 * abs(value), stated), (row.epoch, name)
            off.setdefault(name, []).append(abs(getattr(row, name) / value - 1))
    assert max(off["kl"]) < 0.05  # the stated errors do not hide what makes the bound
    assert max(off["total"]) < 0.05


def test_traces_need_no_assumption_on_the_noise(trained):
    """At the first measured epoch, λ and γ are held: the law of each direction is known without cells."""
    epoch = MEASURED[0]
    lam, gamma, _ = spectrum_of(trained, epoch)
    row = trained.catoni[trained.catoni["epoch"] == epoch].iloc[0]
    held = MeasuredSpectrum(
        np.array([0]), lam.clip(min=0)[None], gamma.clip(min=1e-300)[None], "piecewise_constant"
    )
    path = propagate(held, RATES, momentum=MU, weight_decay=OMEGA, record_steps=[int(row["step"])])
    variance = path.variance[0]
    for name, part in (("curvature", lam.clip(min=0)), ("negative_curvature", lam.clip(max=0))):
        assert abs(row[name] - part @ variance / 2) < MC_SIGMAS * row[f"{name}_se"]
    trace = gaussian_kl(variance[variance > 0], distance_sq=0.0, prior_variance=row["prior_variance"]).trace
    missing = (variance.size - row["noise_free_parameters"]) - (variance > 0).sum()
    assert abs(row["kl_trace"] - (trace - missing / 2)) < MC_SIGMAS * row["kl_trace_se"]


def test_what_is_recorded_adds_up(trained):
    for row in trained.catoni.itertuples():
        parts = row.kl_mean + row.kl_trace + row.kl_log_determinant
        assert row.kl == pytest.approx(parts)
        assert row.total == pytest.approx(
            row.empirical_loss + row.curvature + row.kl / row.beta + row.confidence + row.complexity
        )
        assert row.kl_over_beta == pytest.approx(row.kl / row.beta)
        assert np.isnan(row.kl_total_correlation)  # no directions were tracked
        assert row.covers == f"all {row.parameters} parameters"
        assert row.vacuous == (row.total >= row.loss_range)
        assert row.total_se >= row.empirical_loss_se
        cells = trained.curvature_cells[trained.curvature_cells["epoch"] == row.epoch]
        assert cells["directions"].sum() == pytest.approx(row.parameters - row.noise_free_parameters)
        assert (cells[["gradient_noise", "posterior_variance", "buffer_variance"]] > 0).all(axis=None)
        assert (cells["gradient_noise_se"] > 0).all()


@pytest.mark.slow  # two runs
def test_a_run_records_it_and_a_resumed_one_the_same(tmp_path, monkeypatch):
    steps = "measure.measurements.density.steps=6"
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert command(monkeypatch, *SMALL, "measure=bound", steps, f"hydra.run.dir={whole}") == 0
    found = rows(whole, "catoni")
    assert [row["epoch"] for row in found] == [0, 2]
    for epochs, measured in ((1, [0]), (3, [0, 2])):
        changed = f"trainer.max_epochs={epochs}", f"measure.epochs={measured}", "schedule.milestones=[2]"
        assert (
            command(
                monkeypatch,
                *SMALL,
                "measure=bound",
                steps,
                *changed,
                "resume=changed",
                f"hydra.run.dir={parted}",
            )
            == 0
        )
    assert rows(parted, "catoni") == found
    assert rows(parted, "curvature_cells") == rows(whole, "curvature_cells")


def test_refuses_to_go_before_the_density():
    model = nn.Linear(3, 2)
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    with pytest.raises(ValueError, match=r"measurements\.density must come before it"):
        measure_model(model, x, y, measurements={"bound": CatoniTerms()})


def test_without_the_rates_of_all_steps_there_is_no_bound():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,))
    measurements = {"density": Density(probes=2, steps=4, noise_probes=2), "bound": CatoniTerms()}
    result = measure_model(model, x, y, batch_size=4, measurements=measurements)
    assert {"density", "whole_space"} <= set(result.rows)
    assert not {"catoni", "curvature_cells"} & set(result.rows)
