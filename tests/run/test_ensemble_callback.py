"""Ensembles of replicas within a training, which continues as if there were none."""

import copy
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from robustdyn.commands.replicas import main as replicas
from robustdyn.errors import ConfigError, TrainingError
from robustdyn.replicas import EnsembleRecord, EnsembleRun, read_ensemble
from robustdyn.run.config import build
from robustdyn.run.ensembles import check_ensemble, ensemble_callbacks
from robustdyn.run.parts import build_module
from tests.runs import command, compose, rows, tiny_but
from tests.tolerances import EXACT32

EPOCHS = 2
TRAINED = (
    *tiny_but("measure.", "schedule.", "trainer.max_epochs", "data."),
    "data.train_size=40",
    "data.test_size=20",
    "data.batch_size=20",
    "attack.steps=1",
    f"trainer.max_epochs={EPOCHS}",
    "report=false",
)
SMALL = {
    "replicas": 4,
    "chunk": 2,
    "steps": 3,
    "initial_state": "checkpoint",
    "record.steps": "[0,3]",
    "record.loss_steps": "[3]",
    "record.mean_steps": "[3]",
    "record.loss_examples": 20,
    "start.eigenvectors": 2,
    "start.attack_draws": 1,
    "start.noise_batches": 2,
    "start.slope_batches": 0,
    "start.tolerance": 0.1,
}
ENSEMBLE = ("ensemble=default", *(f"ensemble.{key}={value}" for key, value in SMALL.items()))
ALL = (*ENSEMBLE, "ensemble.epochs=[every 1]")
METHODS = {
    "at": ("measure=none", "schedule.milestones=[1]"),
    "awp": ("measure=none", "schedule.milestones=[1]", "method=awp"),
}
WCI = (
    "measure=none",
    "measure.examples=8",
    "method=wci_lr",
    "schedule.start_epoch=1",
    "schedule.threshold=1e-3",
)


def train(run_dir, *overrides):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return command(monkeypatch, *TRAINED, *overrides, f"hydra.run.dir={run_dir}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of a method that is asked for: with ensembles after every epoch, and without any."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def of(method):
        assert train(folder / method / "with", *METHODS[method], *ALL) == 0
        assert train(folder / method / "without", *METHODS[method]) == 0
        return folder / method

    return of


def state_of(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def same_ensembles(one, other):
    """Whether all arrays of all replicas are the same, bit for bit."""
    one, other = read_ensemble(one), read_ensemble(other)
    names = (
        "replicas",
        "position",
        "buffer",
        "gradient",
        "distance",
        "batch_loss",
        "robust_loss",
        "mean_move",
    )
    return all(np.array_equal(getattr(one, n), getattr(other, n), equal_nan=True) for n in names)


@pytest.mark.parametrize("method", ["at", pytest.param("awp", marks=pytest.mark.slow)])
def test_training_is_the_same_bit_for_bit(runs, method):
    ours, theirs = (state_of(runs(method) / which) for which in ("with", "without"))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    for number, state in theirs["optimizer_states"][0]["state"].items():
        found = ours["optimizer_states"][0]["state"][number]["momentum_buffer"]
        assert torch.equal(found, state["momentum_buffer"])
    for table in ("epochs", "rates"):
        assert rows(runs(method) / "with", table) == rows(runs(method) / "without", table)


@pytest.mark.parametrize("method", ["at", pytest.param("awp", marks=pytest.mark.slow)])
def test_an_ensemble_is_that_of_the_command_from_the_checkpoint(runs, method, tmp_path, monkeypatch):
    """Which reads weights, statistics, optimiser, data and settings from files."""
    run_dir = runs(method) / "with"
    given = [f"{key}={value}" for key, value in SMALL.items()]
    arguments = [f"checkpoint={run_dir}/checkpoints/last.ckpt", f"output={tmp_path / 'file'}", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["robustdyn-replicas", *arguments, *given])
    replicas()
    live = run_dir / "replicas" / f"epoch_{EPOCHS:04d}"
    assert same_ensembles(live, tmp_path / "file")
    ours, theirs = (dict(read_ensemble(path).settings) for path in (live, tmp_path / "file"))
    assert ours.pop("checkpoint") != theirs.pop("checkpoint")  # a digest of the state, one of the file
    assert ours == theirs
    assert read_ensemble(live).path_steps.tolist() == [3]
    assert (read_ensemble(live).buffer[:, 0] != 0).all()  # training's momentum


@pytest.mark.slow  # a run of its own
def test_the_rate_is_that_of_the_next_step(runs, tmp_path):
    assert train(tmp_path, *WCI, *ENSEMBLE, "ensemble.epochs=0") == 0
    for run_dir in (runs("at") / "with", tmp_path):
        begun, decayed = (row["lr"] for row in rows(run_dir, "epochs"))
        assert decayed < begun
        found = read_ensemble(run_dir / "replicas" / "epoch_0001")
        np.testing.assert_allclose(found.learning_rate, [decayed] * SMALL["steps"], rtol=1e-12)
    assert decayed < 0.01 * begun  # by what was measured, not by the decay alone
    assert [p.name for p in (tmp_path / "replicas").iterdir()] == ["epoch_0001"]


def test_their_time_counts_as_measurement(runs):
    shares = {}
    for which in ("with", "without"):
        lines = (runs("at") / which / "records" / "timing.jsonl").read_text().splitlines()
        shares[which] = [json.loads(line)["measurement_share"] for line in lines]
    assert min(shares["with"]) > 0
    assert shares["without"] == [0, 0]


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_is_missing(runs, tmp_path, monkeypatch):
    """With an average of the weights beside them: it is not what replicas start from."""
    arguments = (*METHODS["at"], *ALL, "averaging=ema")
    add, started = EnsembleRecord.add, []

    def dies(self, numbers, arrays):
        if self.directory.name == "epoch_0002" and numbers.start:
            raise ZeroDivisionError
        add(self, numbers, arrays)

    monkeypatch.setattr(EnsembleRecord, "add", dies)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, *arguments)
    finished = [*tmp_path.glob("replicas/*/chunks/*.npz"), *tmp_path.glob("replicas/*/start.npz")]
    before = {path: path.stat().st_mtime_ns for path in finished}
    assert len(before) == 5

    def noted(self, numbers, arrays):
        started.append((self.directory.name, numbers.start))
        add(self, numbers, arrays)

    monkeypatch.setattr(EnsembleRecord, "add", noted)
    assert train(tmp_path, *arguments) == 0
    assert started == [("epoch_0002", 2)]
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    for name in ("epoch_0001", "epoch_0002"):
        undisturbed = runs("at") / "with" / "replicas" / name
        assert same_ensembles(tmp_path / "replicas" / name, undisturbed)
        assert read_ensemble(tmp_path / "replicas" / name).settings == read_ensemble(undisturbed).settings


@pytest.mark.slow
def test_a_finished_run_may_get_another_ensemble_when_it_goes_on(runs, tmp_path, capsys):
    """Ensembles change nothing that training computes: no setting of theirs needs resume=changed."""
    arguments = (*METHODS["at"], f"hydra.run.dir={tmp_path}")
    assert train(tmp_path, *arguments, "trainer.max_epochs=1") == 0
    capsys.readouterr()
    assert train(tmp_path, *arguments, *ENSEMBLE) == 0
    assert (
        ": replicas    0 to " in capsys.readouterr().err
    )  # it takes long: one wants to see that it continues
    assert same_ensembles(
        tmp_path / "replicas" / "epoch_0002", runs("at") / "with" / "replicas" / "epoch_0002"
    )


def test_out_of_memory_says_what_to_lower(callback_of, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    callback, trainer, module = callback_of("ensemble.epochs=0")
    callback.on_train_start(trainer, module)
    monkeypatch.setattr(EnsembleRun, "run", full)
    monkeypatch.setattr("robustdyn.run.ensemble_callback._next_rate", lambda module: 0.1)
    with pytest.raises(
        TrainingError, match=r"^out of memory in the ensemble after epoch 0: CUDA .*ensemble\.chunk"
    ):
        callback.on_train_epoch_end(trainer, module)


# ---------------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def configured():
    """The configuration with values changed; composing takes longer than all that is done with it."""
    composed = compose(*TRAINED, *ENSEMBLE)

    def changed(*settings):
        cfg = copy.deepcopy(composed)
        for setting in settings:
            key, _, value = setting.partition("=")
            OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=True)
        return cfg

    return changed


@pytest.fixture
def callback_of(configured, tmp_path):
    """The callback, a trainer at the end of epoch 0 and the module, for settings or choices of groups."""

    def made(*settings, groups=()):
        cfg = compose(*TRAINED, *ENSEMBLE, *groups) if groups else configured(*settings)
        check_ensemble(cfg)
        data = build(cfg, "data")
        data.prepare_data()
        data.setup("fit")
        module = build_module(cfg, data)
        (callback,) = ensemble_callbacks(cfg, tmp_path)
        optimizer = build(cfg, "optimizer")(module.regularizer.parameter_groups(module.model))
        trainer = SimpleNamespace(max_epochs=EPOCHS, datamodule=data, optimizers=[optimizer])
        trainer.current_epoch = trainer.global_step = trainer.global_rank = 0
        trainer.world_size, trainer.strategy = 1, SimpleNamespace(barrier=None)
        trainer.progress_bar_callback = None
        return callback, trainer, module

    return made


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("replicas=5", r"^ensemble\.replicas=5 is not a multiple of chunk=2; choose 6$"),
        ("engine=fast", r"^ensemble\.engine=fast must be vmapped or looped$"),
        ("record.steps=every", r"^ensemble\.record\.steps=every must be a list of whole numbers"),
        ("record.mean_steps=[3,1]", r"^ensemble\.record\.mean_steps must increase strictly"),
        ("start.noise_batches=1", r"^ensemble\.start\.noise_batches must be 0 or at least 2"),
        ("schedule.milestones=[0]", r"^ensemble\.schedule\.milestones must increase strictly from 1"),
    ],
)
def test_wrong_settings_are_refused_when_composed(configured, setting, message):
    cfg = configured(f"ensemble.{setting}")
    with pytest.raises(ConfigError, match=message):
        check_ensemble(cfg)


def test_wrong_runs_are_refused_when_composed(configured):
    cfg = configured("regularizer.l1=0.5")
    with pytest.raises(ConfigError, match=r"^regularizer\.l1=0.5 .* choose 0, or ensemble=none"):
        check_ensemble(cfg)
    cfg = configured("added_noise.factor=9.0")
    with pytest.raises(ConfigError, match=r"^added_noise\.factor=9.0 .* choose 0, or ensemble=none"):
        check_ensemble(cfg)
    cfg = configured("curvature_penalty.strength=0.1")
    with pytest.raises(ConfigError, match=r"^curvature_penalty\.strength=0.1 .* or ensemble=none"):
        check_ensemble(cfg)
    cfg = configured("batchnorm.frozen_from=0", "ensemble.batchnorm=train")
    with pytest.raises(ConfigError, match=r"^batchnorm\.frozen_from=0 of the run .* choose batchnorm=eval"):
        check_ensemble(cfg)
    for setting in ("accumulate_grad_batches=2", "gradient_clip_val=0.5"):
        with pytest.raises(ConfigError, match=rf"^trainer\.{setting} of the run .* train without it"):
            check_ensemble(configured(f"trainer.{setting}"))
    cfg = configured()
    cfg.ensemble = {"chunk": 2}
    with pytest.raises(ConfigError, match=r"^ensemble\.chunk is set but ensemble=none takes no settings"):
        check_ensemble(cfg)
    cfg = compose("experiment=ground_truth", "ensemble=none")
    with pytest.raises(
        ConfigError, match=r"ensemble=none takes no settings; .* ensemble\.epochs=\[\] to run none"
    ):
        check_ensemble(cfg)
    cfg = compose(*TRAINED)
    check_ensemble(cfg)
    assert ensemble_callbacks(cfg, Path("unused")) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("ensemble.epochs=[2]", r"^ensemble\.epochs: epoch 2 is outside the run's epochs 0\.\.1"),
        ("ensemble.epochs=often", r"^ensemble\.epochs=often cannot be read"),
        ("optimizer.nesterov=true", r"^optimizer: replicas support SGD without Nesterov"),
        ("ensemble.sampling.batch_size=41", r"^ensemble\.sampling\.batch_size must lie in \[1, 40\]"),
        ("optimizer=adamw", r"^optimizer: replicas support SGD and Adam, not AdamW"),
        ("method=trades", r"^objective: the Hessian of TRADES"),
        ("schedule=cosine", r"^ensemble\.learning_rate=null is the rate of the next step, which is 0"),
    ],
)
def test_what_only_the_training_shows_is_refused_before_its_first_step(
    callback_of, setting, message, tmp_path
):
    group = "." not in setting
    callback, trainer, module = callback_of(groups=[setting]) if group else callback_of(setting)
    with pytest.raises(ConfigError, match=message):
        callback.on_train_start(trainer, module)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- several devices


@pytest.mark.slow  # two processes of the real command
@pytest.mark.timeout(900)
def test_two_ranks_share_the_chunks(tmp_path, monkeypatch):
    """Of three chunks, with BatchNorm in train mode: that of replicas must not wait for the other rank's."""
    changes = {"replicas": 6, "batchnorm": "train"}
    arguments = [*METHODS["at"], *ENSEMBLE, *(f"ensemble.{key}={value}" for key, value in changes.items())]
    line = [sys.executable, "-m", "robustdyn.commands.train", *TRAINED, *arguments]
    line = [a for a in line if a != "trainer.accelerator=cpu"] + ["trainer=ddp_cpu"]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [*line, f"hydra.run.dir={tmp_path / 'two'}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=True,
        timeout=600,
    )
    live = tmp_path / "two" / "replicas" / "epoch_0002"
    log = [json.loads(entry) for entry in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    said = [entry["message"] for entry in log if entry["message"].startswith("replicas ")]
    assert [message.split()[1] for message in said] == ["0", "4"]  # the first rank's; 2 and 3 are the other's
    given = [f"{key}={value}" for key, value in (SMALL | changes).items()]
    checkpoint = f"checkpoint={tmp_path / 'two' / 'checkpoints' / 'last.ckpt'}"
    monkeypatch.setattr(
        sys, "argv", ["robustdyn-replicas", checkpoint, f"output={tmp_path / 'one'}", "device=cpu", *given]
    )
    replicas()
    found, alone = read_ensemble(live), read_ensemble(tmp_path / "one")
    assert found.replicas.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.path_steps.tolist() == [3]
    np.testing.assert_allclose(found.position, alone.position, **EXACT32)
    np.testing.assert_allclose(found.robust_loss, alone.robust_loss, **EXACT32)
