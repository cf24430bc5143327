"""The experiment with noise turned against the Hessian runs, and its replicas agree with the closed form."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose

from robustdyn import streams
from robustdyn.theory import MomentumDynamics, covariance_terms, stationary_covariance, total_correlation
from tests.tolerances import EXACT32, EXACT64, MC_SIGMAS

FOLDER = Path(__file__).parents[2] / "experiments" / "ground_truth"
TINY = ["--angles", "45", "--directions=4", "--resamples=40", "--quadratic-replicas=2000"]
NETWORK = ["--network-replicas=24", "--examples=30", "--hidden=3", "--training-steps=20"]


@pytest.fixture(scope="module")
def folder():
    """The experiment's scripts import each other by their names."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in ("misalignment", "misalignment_tables", "misalignment_problems"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def script(folder):
    return folder("misalignment")


@pytest.fixture(scope="module")
def problems(folder):
    return folder("misalignment_problems")


@pytest.fixture(scope="module")
def tables(folder):
    return folder("misalignment_tables")


def small_network(problems, attack):
    return problems.NetworkSettings(
        directions=2,
        examples=20,
        hidden=3,
        training_steps=10,
        batch_size=8,
        learning_rate=0.05,
        replicas=3,
        attack=attack,
        seed=0,
    )


@pytest.fixture(scope="module")
def written(script, tmp_path_factory):
    """The results of a small run."""
    output = tmp_path_factory.mktemp("misalignment") / "results"
    script.main(["--output", str(output), *TINY, *NETWORK])
    return output


@pytest.mark.slow  # many replicas
def test_it_writes_what_it_promises(written):
    tables = ("terms", "curves", "variances", "pairs", "references")
    files = {f"{name}.csv" for name in tables} | {"misalignment.png", "misalignment.pdf"}
    assert {path.name for path in written.iterdir()} == files | {"findings.md", "settings.json"}
    settings = json.loads((written / "settings.json").read_text())
    assert settings["problems"].keys() == {"quadratic", "network"}
    assert settings["settings"]["angles"] == [45.0]
    assert {"date", "hardware", "torch"} <= settings.keys()
    terms = pd.read_csv(written / "terms.csv")
    assert len(terms) == 2 * 3 * 2 * 7  # problems, families, angles, terms
    assert terms.notna().all(axis=None)
    assert (terms["low"] <= terms["high"]).all()
    aligned = terms[terms["angle_deg"] == 0]
    assert (aligned[["predicted_change", "measured_change", "change_low", "change_high"]] == 0).all(axis=None)
    findings = (written / "findings.md").read_text(encoding="utf-8")
    _, answer, *files = findings.strip().split("\n\n")
    assert answer.startswith("The closed form lies within the 95 % interval of ")
    assert answer.count(" problem") == 2 * 2  # two sentences, two problems
    assert files == [
        *(f"`{name}.csv`, {len(pd.read_csv(written / f'{name}.csv'))} rows" for name in tables),
        "![misalignment](misalignment.png)",
    ]


@pytest.mark.slow
def test_replicas_of_the_quadratic_problem_agree_with_the_closed_form(written):
    terms, variances, pairs = (
        (table := pd.read_csv(written / f"{name}.csv"))[table["problem"] == "quadratic"]
        for name in ("terms", "variances", "pairs")
    )
    # 95 % intervals are 1.96 standard errors wide to either side
    for rows in (terms, variances, pairs):
        error = (rows["high"] - rows["low"]) / (2 * 1.96)
        assert (np.abs(rows["measured"] - rows["predicted"]) < MC_SIGMAS * error + 1e-4).all()
    turned = terms[terms["angle_deg"] == 45].set_index(["family", "term"])["measured_change"]
    assert turned["ends rotated", "log_determinant"] < -0.3
    assert turned["neighbours correlated", "log_determinant"] > 0.5
    assert abs(turned["neighbours correlated", "log_variance"]) < 0.2


def test_what_is_predicted_is_the_stationary_law_of_each_noise(problems, tables):
    problem = problems.quadratic(6, 0.01, 100, 0)
    for family, kept in zip(problems.FAMILIES, ("spectrum", "spectrum", "diagonal"), strict=True):
        noise = family.noise(problem.noise, np.radians(30))
        own = np.linalg.eigvalsh(noise)[::-1] if kept == "spectrum" else np.diag(noise)
        assert_allclose(own, problem.noise, **EXACT64)
        sigma = stationary_covariance(problem.eigenvalue, noise, **problem.options)
        found = tables.predicted(problem, family, [0.0, 30.0])
        assert_allclose(found["twice_total_correlation"][1], 2 * total_correlation(sigma), **EXACT64)
        assert_allclose(found["log_determinant"][1], -np.linalg.slogdet(sigma)[1], **EXACT64)
        assert_allclose(found["curvature"][1], problem.eigenvalue @ np.diag(sigma), **EXACT64)


@pytest.mark.slow
def test_the_bootstrap_covers_and_removes_bias(problems, tables):
    rng = np.random.default_rng(0)
    problem = problems.quadratic(4, 0.01, 100, 0)
    truth = tables.by_name(covariance_terms(problem.eigenvalue, np.eye(4)), problem.distance_sq)
    found = []
    for trial in range(60):
        positions = rng.normal(size=(100, 4))
        bootstrap = tables.Bootstrap.of(100, 200, trial)
        estimate = bootstrap.estimates(problem, positions)["log_determinant"]
        found.append(estimate.row(("value", "low", "high")) | {"plain": estimate.value})
    table = pd.DataFrame(found)
    error = table["value"].std() / np.sqrt(len(table))
    assert abs(table["value"].mean() - truth["log_determinant"]) < MC_SIGMAS * error
    # Wishart: −ln det of a sample covariance is k (k + 1) / 2n = 0.1 too large on average
    assert 0.03 < table["plain"].mean() - table["value"].mean() < 0.17
    covered = (
        (table["low"] <= truth["log_determinant"]) & (truth["log_determinant"] <= table["high"])
    ).mean()
    assert covered > 0.8  # 0.95 within four standard errors of 60 trials


@pytest.mark.parametrize("attack", ["held", "refreshed"])
def test_replicas_of_the_network_are_plain_momentum_sgd(problems, attack):
    settings = small_network(problems, attack)
    torch.manual_seed(0)
    model = problems.perceptron(3, 64, 0).float()
    images, targets = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    directions = torch.linalg.qr(torch.randn(sum(p.numel() for p in model.parameters()), 2))[0]
    factor = np.array([[0.5, 0.0], [0.3, 0.2]])
    dynamics = MomentumDynamics(0.05, 0.9, 0.02)
    found = problems.simulate_network(
        model, directions, images, targets, dynamics, 3, settings, np.stack([0 * factor, factor])
    )
    assert found.shape == (2, 3, 2)
    start = problems.flat(model)
    draws = [
        torch.randn(3, 2, generator=streams.generator(0, "misalignment-noise", step)) for step in range(3)
    ]
    for case, spread in enumerate((0 * factor, factor)):
        for replica in range(3):
            torch.nn.utils.vector_to_parameters(start.clone(), model.parameters())
            optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.02)
            for step in range(3):
                inputs = images
                if attack == "refreshed":
                    inputs = problems.ATTACK.perturb(model, images, targets, torch.Generator())
                optimiser.zero_grad()
                noise = directions @ (torch.from_numpy(spread).float() @ draws[step][replica])
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                (loss + noise @ torch.nn.utils.parameters_to_vector(model.parameters())).backward()
                optimiser.step()
            moved = (problems.flat(model) - start) @ directions
            assert_allclose(found[case, replica], moved.numpy(), **EXACT32)


def test_curvature_and_noise_of_the_network_are_those_of_its_examples(problems):
    settings = small_network(problems, "held")
    torch.manual_seed(0)
    model = problems.perceptron(3, 64, 0)
    images, targets = torch.rand(20, 1, 8, 8, dtype=torch.float64), torch.arange(20) % 10
    start = problems.flat(model)
    found = problems.measured(model, start - 0.1, images, images, targets, settings, {})
    directions = found.simulate.args[1].double()
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def losses(theta):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        logits = torch.func.functional_call(model, weights, (images,))
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    hessian = torch.func.hessian(lambda theta: losses(theta).mean())(start)
    assert_allclose(
        found.eigenvalue, torch.linalg.eigvalsh(hessian).flip(0)[:2].numpy(), rtol=1e-5
    )  # 1e-6 asked
    gradients = torch.func.jacrev(losses)(start) @ directions
    noise = np.cov(gradients.numpy(), rowvar=False, ddof=0) / 8  # batches of 8 with replacement
    assert_allclose(found.own, noise, rtol=1e-4, atol=1e-7)  # directions were rounded to float32
    assert_allclose(found.noise, np.diag(noise), rtol=1e-4)
    # every weight has moved by 0.1 since the start; what counts is what the directions see of it
    assert_allclose(found.distance_sq, 0.01 * (directions.sum(0) ** 2).sum().item(), rtol=1e-4)


@pytest.mark.slow
def test_the_network_stands_at_a_minimum_for_its_held_attack(written):
    facts = json.loads((written / "settings.json").read_text())["problems"]["network"]
    assert facts["largest_gradient"] < 1e-5  # L-BFGS stops at 1e-6
    assert facts["eigenvalues"] == sorted(facts["eigenvalues"], reverse=True)
    assert min(facts["noise"]) > 0
    references = pd.read_csv(written / "references.csv").query("problem == 'network'").set_index("noise")
    own, aligned = (references.loc[name] for name in ("own noise", "aligned"))
    # the same diagonal: only the total correlation differs
    assert_allclose(own["log_variance"], aligned["log_variance"], rtol=1e-5)  # six digits are written
    assert own["twice_total_correlation"] > aligned["twice_total_correlation"]
    assert own["log_determinant"] <= references.loc["own spectrum, aligned", "log_determinant"]


@pytest.mark.parametrize(
    "flags", [["--network-replicas=15"], ["--quadratic-replicas=15"], ["--attack=none"], ["--problems=other"]]
)
def test_bad_settings_are_refused(script, tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        script.main(["--output", str(tmp_path / "none"), *TINY, *NETWORK, *flags])
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
