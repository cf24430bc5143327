"""The named methods set what their papers say, and combine with every choice in the other groups."""

from itertools import product

import pytest
from omegaconf import OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.methods import AdversarialTraining
from robustdyn.run.combinations import check_combinations
from robustdyn.run.config import build, check
from robustdyn.run.parts import build_module
from tests.runs import command, compose, rows, tiny_but


def options(group):
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


class Splits:
    """The part of a data module that the training module uses."""

    evaluation_splits = ("test",)


def setting(cfg, key):
    """The value of a key; for a group, the name of the chosen class, or None for ``none``."""
    value = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(value):
        return value
    return value.get("_target_", "").rpartition(".")[2] or None


def assert_builds(method, schedule, perturbation):
    choice = (f"method={method}", f"schedule={schedule}", f"perturbation={perturbation}")
    cfg = compose(*choice, "model.width=4", "model.blocks=[1,1]", "model.strides=[1,2]")
    check(cfg)
    check_combinations(cfg)
    module = build_module(cfg, Splits())
    assert isinstance(module, AdversarialTraining)
    for group in ("schedule", "perturbation", "objective"):
        built, wanted = getattr(module, group), setting(cfg, group)
        assert (None if built is None else type(built).__name__) == wanted, choice


SCHEDULES, PERTURBATIONS = options("schedule"), options("perturbation")


@pytest.mark.parametrize("index", range(len(SCHEDULES)))  # all methods with all pairs: below
def test_a_preset_goes_with_every_schedule_and_every_perturbation(index):
    assert_builds("trades_awp", SCHEDULES[index], PERTURBATIONS[index % len(PERTURBATIONS)])


@pytest.mark.slow  # all pairs of the two
@pytest.mark.parametrize("method", options("method"))
def test_every_preset_goes_with_every_pair_of_schedule_and_perturbation(method):
    for schedule, perturbation in product(SCHEDULES, PERTURBATIONS):
        assert_builds(method, schedule, perturbation)


STUDY = {"objective": "AdversarialCrossEntropy", "perturbation": None, "schedule": "Piecewise"}
AUTHORS_ATTACK = {"attack.train.random_start": "gaussian", "attack.train.batchnorm": "eval"}
AWP = {"perturbation": "AWP", "perturbation.gamma": 0.01, "perturbation.warmup_epochs": 0}
AWP_TRADES = {"perturbation": "AWP", "perturbation.gamma": 0.005, "perturbation.warmup_epochs": 10}
MART = {"objective": "MART", "objective.beta": 5.0, **AUTHORS_ATTACK}
TRADES = {"objective": "TRADES", "objective.beta": 6.0, "attack.train.start_std": 0.001, **AUTHORS_ATTACK}
WCI = {
    "schedule": "WCIRate",
    "schedule.start_epoch": 100,
    "schedule.factor": 0.1,
    "schedule.interval": 1,
    "schedule.quantity": "wci",
}
SAYS = {  # what the papers say
    "at": STUDY,
    "at_ema": STUDY | {"averaging": "ExponentialAveraging", "measure.weights": "averaged"},
    "awp": STUDY | AWP,
    "awp_global": STUDY | {"perturbation": "GlobalAWP"},
    "awp_wci_lr": STUDY | AWP | WCI,
    "bound_lr": STUDY | {"schedule": "BoundRate", "schedule.start_epoch": 100, "schedule.learning_rate": 0.1},
    "mart": STUDY | MART,
    "mart_awp": STUDY | MART | AWP_TRADES,
    "nfgsm": STUDY
    | {
        "attack.train.steps": 1,
        "attack.train.step_size": 8 / 255,
        "attack.train.random_start": "uniform",
        "attack.train.relative_start": 2,
        "attack.train.projection": "range",
    },
    "sam": STUDY | {"perturbation": "SAM", "perturbation.rho": 0.05},
    "standard": STUDY | {"objective": "CrossEntropy", "measure.inputs": "clean"},
    "trades": STUDY | TRADES,
    "trades_awp": STUDY | TRADES | AWP_TRADES,
    "wci_lr": STUDY | WCI,
}


@pytest.mark.parametrize("method", options("method"))
def test_a_preset_sets_what_its_paper_says(method):
    cfg = compose("data=cifar10", f"method={method}")
    check(cfg)
    check_combinations(cfg)
    assert {key: setting(cfg, key) for key in SAYS[method]} == SAYS[method]
    evaluation = cfg.attack.evaluation  # the same for every method
    assert (evaluation.steps, evaluation.random_start, evaluation.batchnorm) == (10, "uniform", "eval")


def test_the_command_line_has_the_last_word():
    cfg = compose("method=awp", "perturbation=sam")
    assert setting(cfg, "perturbation") == "SAM"
    assert "gamma" not in cfg.perturbation
    assert compose("method=trades_awp", "perturbation=none").perturbation == {}
    assert compose("method=trades_awp", "perturbation=sam").perturbation.warmup_epochs == 0
    assert compose("method=trades_awp", "perturbation.gamma=0.02").perturbation.gamma == 0.02
    cfg = compose("method=trades", "objective=at")
    assert setting(cfg, "objective") == "AdversarialCrossEntropy"
    assert "beta" not in cfg.objective
    assert setting(compose("method=wci_lr", "schedule=cosine"), "schedule") == "Cosine"
    assert compose("method=trades", "attack.train.batchnorm=train").attack.train.batchnorm == "train"


@pytest.fixture
def experiment(tmp_path):
    """Compose with an experiment file that has this text."""

    def composed(text, *overrides):
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n" + text)
        return compose("experiment=mine", *overrides, f"hydra.searchpath=[file://{tmp_path}]")

    return composed


def test_an_experiment_can_choose_a_preset(experiment):
    text = "defaults:\n  - override /method: awp\nperturbation:\n  gamma: 0.02\n"
    cfg = experiment(text)
    assert (setting(cfg, "perturbation"), cfg.perturbation.gamma) == ("AWP", 0.02)
    cfg = experiment("defaults:\n  - override /method: trades_awp\n  - override /perturbation: sam\n")
    assert (setting(cfg, "objective"), setting(cfg, "perturbation")) == ("TRADES", "SAM")
    # the experiment's own choice wins over the default preset's
    assert setting(experiment("defaults:\n  - override /objective: mart\n"), "objective") == "MART"
    # the command line wins over both, and settings of the replaced choice are refused
    cfg = experiment(text, "perturbation=none")
    with pytest.raises(
        ValueError, match=r"perturbation\.gamma is set but perturbation=none takes no settings"
    ):
        check_combinations(cfg)
    with pytest.raises(ValueError, match=r"^perturbation: .*gamma"):
        build(experiment(text, "perturbation=sam"), "perturbation")


QUICK = (
    *tiny_but("schedule.", "trainer.max_epochs", "measure.epochs"),
    "attack.steps=1",
    "data.test_size=20",
    "trainer.max_epochs=2",
    "measure=none",
    "report=false",
)


@pytest.mark.slow  # two runs each
@pytest.mark.parametrize(
    ("sweep", "expected"),
    [(("method=wci_lr", "schedule.threshold=1,2"), 2), (("method=at,awp", "seed=0,1"), 4)],
)
def test_sweeps(sweep, expected, tmp_path, monkeypatch):
    assert command(monkeypatch, *QUICK, "-m", *sweep, f"hydra.sweep.dir={tmp_path}") == 0
    runs = sorted(path for path in tmp_path.iterdir() if (path / "records").is_dir())
    assert len(runs) == expected
    epochs = [rows(run, "epochs") for run in runs]
    assert all(len(table) == 2 for table in epochs)
    assert all(a != b for index, a in enumerate(epochs) for b in epochs[:index])  # every run is different
    if expected == 2:
        first, second = (table[1]["lr"] for table in epochs)
        assert second == pytest.approx(2 * first)  # both thresholds below the measured index
