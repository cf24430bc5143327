"""Tests that any model is measured in one call, in any of the forms in which people hold their data."""

import gc
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import robustdyn
from robustdyn.attacks import PGD
from robustdyn.commands.report import main as report
from robustdyn.errors import RecordError
from robustdyn.measure import Eigenpairs, Spectrum, WeightCurvature
from robustdyn.measure.spectrum import StationaryLaw, Term
from robustdyn.methods import OptimizerState
from robustdyn.records import read_table
from tests.curvature.reference import dense_gradients, dense_hessian, random
from tests.curvature.test_any_model import risk_on

PAIRS = Eigenpairs(directions=3, tolerance=1e-8, max_products=200, extra_vectors=5)
SGD = OptimizerState(0.05, 0.9, 5e-4)
N, B = 200, 10


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)).double()


def examples() -> tuple[Tensor, Tensor]:
    return random(40, 4), torch.arange(40) % 3


def measure(
    model: nn.Module | None = None, *data: object, **settings: object
) -> robustdyn.measure.ModelMeasurement:
    given = {"optimizer": SGD, "train_examples": N, "batch_size": B, "eigenpairs": PAIRS, **settings}
    return robustdyn.measure_model(small() if model is None else model, *(data or examples()), **given)


def test_numbers_are_those_of_dense_matrices():
    model = small().train()
    result = measure(model)
    assert all(module.training for module in model.modules())  # as it was
    risk = risk_on(small().eval(), *examples(), chunk_size=None)
    values, vectors = torch.linalg.eigh(dense_hessian(risk))
    spectrum = result.to_frames()["spectrum"]
    assert spectrum["hessian_eigenvalue"].to_numpy() == pytest.approx(values.flip(0)[:3].numpy(), rel=1e-8)
    gradients = dense_gradients(risk) @ vectors.flip(1)[:, :3]
    # the mean of B of n numbers drawn without replacement (Cochran, Sampling Techniques, theorem 2.2)
    noise = gradients.var(dim=0) * (N - B) / (N * B)
    assert spectrum["gradient_noise"].to_numpy() == pytest.approx(noise.numpy(), rel=1e-6)
    eta, mu, slope = SGD.learning_rate, SGD.momentum, values.flip(0)[:3] + SGD.weight_decay
    variance = eta * noise * (1 + mu) / (slope * (1 - mu) * (2 * (1 + mu) - eta * slope))
    assert spectrum["posterior_variance_stationary"].to_numpy() == pytest.approx(variance.numpy(), rel=1e-6)
    parts = [dense_hessian(risk)[block, block].trace() for block in risk.blocks.values()]
    norms = [p.square().sum() for p in model.parameters()]
    terms = [
        float((n * t).sqrt()) for n, t, p in zip(norms, parts, model.parameters(), strict=True) if p.dim() > 1
    ]
    assert result.wci == pytest.approx(sum(terms), rel=1e-8)


FORMS = {
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "single precision": lambda x, y: (x.float(), y.int()),
    "a tuple": lambda x, y: ((x,), y),
    "a dictionary": lambda x, y: ({"input": x}, y),
    "a data set": lambda x, y: (TensorDataset(x, y),),
    "a loader": lambda x, y: (DataLoader(TensorDataset(x, y), batch_size=7),),
    "a generator": lambda x, y: (pair for pair in [tuple(zip(x.split(9), y.split(9), strict=True))][0]),
}


@pytest.mark.parametrize("name", FORMS)
def test_data_in_other_forms(name):
    x, y = (examples()[0].float().double(), examples()[1])
    expected = measure(None, x, y, measurements={"wci": WeightCurvature()}).wci
    data = FORMS[name](x, y)
    data = (data,) if name == "a generator" else data
    model = small()
    found = measure(model, *data, measurements={"wci": WeightCurvature()})
    # structures take Hutchinson's estimator, whose error is stated
    error = found.rows["wci"][0]["wci_se"] if name in ("a tuple", "a dictionary") else 1e-9 * expected
    assert abs(found.wci - expected) < 6 * error
    assert found.settings["measure"]["examples"] == 40


def test_a_loader_that_shuffles_gives_the_second_attack_the_same_examples():
    loader = DataLoader(TensorDataset(*examples()), batch_size=8, shuffle=True)
    found = measure(None, loader, measurements={"s": Spectrum()}, second_attack=16).to_frames()["spectrum"]
    # without an attack a second one changes nothing
    assert found["curvature"].to_numpy() == pytest.approx(found["hessian_eigenvalue"].to_numpy(), rel=1e-9)
    assert found["attack_noise"].to_numpy() == pytest.approx(0.0, abs=1e-9)


def test_only_the_first_examples():
    x, y = examples()
    few = measure(None, x[:20], y[:20], measurements={"wci": WeightCurvature()}).wci
    assert measure(None, x, y, examples=20, measurements={"wci": WeightCurvature()}).wci == few
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    assert measure(None, loader, examples=20, measurements={"wci": WeightCurvature()}).wci == pytest.approx(
        few
    )


def test_attacks():
    x, y = examples()
    wanted = {"wci": WeightCurvature()}
    attack = PGD(norm="linf", eps=0.3, step_size=0.1, steps=3, random_start="none", valid_range=(-9.0, 9.0))
    moved = attack.perturb(small().eval(), x, y, torch.Generator())
    expected = measure(None, moved, y, measurements=wanted).wci
    assert expected != measure(None, x, y, measurements=wanted).wci
    assert measure(None, x, y, attack=attack, measurements=wanted).wci == pytest.approx(expected, rel=1e-9)

    def own(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        assert not model.training
        return moved

    assert measure(None, x, y, attack=own, measurements=wanted).wci == pytest.approx(expected, rel=1e-9)
    # PGD climbs the loss that is measured
    squares = nn.MSELoss(reduction="none")

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return squares(z, t).mean(dim=1)

    goal = random(40, 3, seed=5)
    climbed = attack.perturb(small().eval(), x, goal, torch.Generator(), lambda z, t: loss(z, t).sum())
    found = measure(None, x, goal, loss=loss, attack=attack, measurements=wanted)
    assert found.rows["wci"][0]["estimator"] == "gauss_newton_exact"
    assert found.wci == pytest.approx(
        measure(None, climbed, goal, loss=loss, measurements=wanted).wci, rel=1e-9
    )


def test_nothing_of_a_measurement_stays_in_memory():
    """Graphs that hold themselves, through hooks or saved outputs, would stay: no collector sees them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3), nn.Tanh()
    ).eval()
    data = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    alive = []
    for _ in range(3):
        # Tanh saves its own output; without it the layers' traces are exact, and hooks are set
        for network in (model, model[:-1]):
            robustdyn.measure_model(network, *data, attack=PGD(eps=0.1, step_size=0.05), memory_mib=64)
        gc.collect()
        alive.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))
    assert alive[1] == alive[2]


def test_own_attacks_draw_from_seeded_generators_and_leave_them_as_they_were():
    model, found = small(), []

    def noisy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        drawn.append((torch.rand(4), np.random.rand()))  # noqa: NPY002
        return inputs + drawn[-1][0]

    for before in (0, 1):
        drawn: list[tuple[Tensor, float]] = []
        torch.manual_seed(before)
        found.append(measure(model, attack=noisy, measurements={"spectrum": Spectrum()}).rows["spectrum"])
        after = torch.rand(1)
        torch.manual_seed(before)
        assert torch.equal(after, torch.rand(1))
        (first, one), (second, another) = drawn
        assert not torch.equal(first, second)  # the second attack starts elsewhere
        assert one != another
    assert found[0] == found[1]


def test_without_optimiser_and_batch_size_it_says_what_is_missing():
    result = robustdyn.measure_model(small(), *examples(), eigenpairs=PAIRS)
    spectrum = result.to_frames()["spectrum"]
    assert spectrum[["gradient_noise", "posterior_variance_stationary"]].isna().all(axis=None)
    assert spectrum["curvature"].notna().all()
    assert "catoni" not in result.rows
    words = result.summary()
    assert "Give optimizer= for" in words
    assert "Give batch_size= for" in words
    assert "Weight-Curvature Index" in words


def test_without_a_stationary_law_it_says_why():
    adam = torch.optim.Adam(small().parameters())
    said = measure(optimizer=adam, measurements={"spectrum": Spectrum()}).summary()
    assert "No direction has a stationary variance: the law needs momentum SGD" in said


@pytest.mark.slow  # draws all figures
def test_it_is_saved_as_a_run_that_the_report_reads(tmp_path, capsys):
    result = measure()
    directory = result.save(tmp_path / "own")
    for name, frame in result.to_frames().items():
        stored = read_table(directory, name)
        assert list(stored) == list(frame)
        assert stored.equals(frame)
    assert json.loads((directory / "status.json").read_text())["state"] == "done"
    with pytest.raises(RecordError, match="holds another record; choose a new directory"):
        result.save(directory)
    assert report([str(directory)]) == 0
    assert f"WCI: at the first epoch {result.wci:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "settings", "error", "words"),
    [
        ((random(4, 4),), {}, TypeError, "targets are missing"),
        (([{"x": 1}],), {}, TypeError, r"each batch must be a pair \(inputs, targets\), not a dict"),
        (([],), {}, ValueError, "the loader gives no batch"),
        ((3,), {}, TypeError, "must be tensors, arrays, a Dataset or a loader, not a int"),
        ((random(4, 4), torch.zeros(3)), {}, ValueError, "must agree in their first dimension"),
        (examples(), {"train_examples": 30}, ValueError, "train_examples=30 is smaller than the 40"),
        (
            ({"input": examples()[0]}, examples()[1]),
            {"attack": PGD()},
            TypeError,
            "PGD attacks inputs that are one",
        ),
        (examples(), {"attack": PGD()}, ValueError, "outside valid_range"),
        (examples(), {"second_attack": 1}, ValueError, "second_attack=1 examples have no spread"),
        (examples(), {"batch_size": N + 1}, ValueError, "batch_size=201 must be at least 1 and at most"),
        (examples(), {"attack": "pgd"}, TypeError, "attack must be a PGD, a function or None, not 'pgd'"),
        ((random(4, 4), [0, 1, 2, 0]), {}, TypeError, "targets must be a tensor, not a list of numbers"),
        (
            (DataLoader(TensorDataset(*examples())), examples()[1]),
            {},
            TypeError,
            "has the targets, too: leave out targets",
        ),
        ((random(4, 4), torch.full((4,), 3)), {}, ValueError, "3 outputs, for the classes 0 to 2"),
        ((random(4, 4), torch.eye(4, 3).long()), {}, ValueError, r"use targets\.float\(\)"),
        ((random(4, 4), torch.zeros(4, 1).long()), {}, ValueError, r"use targets\.flatten\(\)"),
        ([[(random(2, 4), torch.zeros(2)), (random(2, 5), torch.zeros(2))]], {}, ValueError, "another shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(data, settings, error, words):
    with pytest.raises(error, match=words):
        measure(None, *data, **settings)


def test_attention_norms_and_recurrent_cells_are_measured():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(11, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.cell = nn.GRU(8, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.cell(self.encoder(self.words(tokens)))[0][:, -1])

    tokens = torch.randint(11, (24, 5), generator=torch.Generator().manual_seed(0))
    result = measure(Reader(), tokens, torch.arange(24) % 3, measurements={"s": Spectrum()})
    assert (result.to_frames()["spectrum"]["residual"] < 1e-3).all()


# ---------------------------------------------------------------------- standard errors and the bound


class Law:
    """A stationary law of one direction as a function of λ and γ."""

    def __init__(self) -> None:
        self.optimizer = SGD

    def at(self, eigenvalue: float, noise: float) -> StationaryLaw:
        return StationaryLaw.of(self, np.array([eigenvalue]), np.array([noise]))


@pytest.mark.parametrize("name", ["variance_terms", "curvature_terms", "log_variance_terms"])
def test_derivatives_of_the_terms(name):
    law, lam, gamma, step = Law(), 3.0, 0.2, 1e-6

    def value(eigenvalue: float, noise: float) -> float:
        return float(getattr(law.at(eigenvalue, noise), name)().values[0])

    term: Term = getattr(law.at(lam, gamma), name)()
    by_lam = (value(lam + step, gamma) - value(lam - step, gamma)) / (2 * step)
    by_gamma = (value(lam, gamma + step) - value(lam, gamma - step)) / (2 * step)
    assert term.by_curvature[0] == pytest.approx(by_lam, rel=1e-6)  # central differences
    assert term.by_noise[0] == pytest.approx(by_gamma, rel=1e-6)


def test_errors_of_single_terms_follow_from_those_of_curvature_and_noise():
    result = measure(measurements={"s": Spectrum()}, second_attack=40)
    for row in result.rows["spectrum"]:
        # the same examples on both sides: curvature and noise are not independent, so bound the error
        relative = abs(row["gradient_noise_se"] / row["gradient_noise"])
        slope = row["curvature"] + SGD.weight_decay
        eta, mu = SGD.learning_rate, SGD.momentum
        by_curvature = abs(eta / (2 * (1 + mu) - eta * slope) - 1 / slope) * row["curvature_se"]
        assert row["log_variance_term_se"] <= (relative + by_curvature) * (1 + 1e-9)
        assert row["log_variance_term_se"] >= abs(relative - by_curvature) * (1 - 1e-9)
        assert row["posterior_variance_stationary_se"] == pytest.approx(
            row["log_variance_term_se"] * row["posterior_variance_stationary"], rel=1e-9
        )
    bounds = result.rows["bounds"][0]
    assert bounds["dominant_terms_top_k_se"] > 0


@pytest.mark.slow  # many samples
def test_standard_errors_are_those_of_repeated_samples():
    """Over samples of examples, values spread as their standard errors say."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 60, 4, generator=generator, dtype=torch.float64)
    model = small().eval()
    found = []
    for x in inputs:
        y = (model(x).detach() + torch.randn(60, 3, generator=generator, dtype=torch.float64)).argmax(dim=1)
        result = measure(model, x, y, measurements={"s": Spectrum()}, eigenpairs=Eigenpairs(directions=1))
        row = result.rows["bounds"][0]
        found.append([row["log_variance_term_top_k"], row["log_variance_term_top_k_se"]])
    values, errors = np.array(found).T
    # with 30 samples the spread is known to 13 %; eigenvectors that follow the sample add to it
    assert 0.6 < values.std(ddof=1) / np.sqrt((errors**2).mean()) < 1.6
