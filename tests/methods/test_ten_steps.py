"""Tests every preset, with configuration, module and Trainer, against the algorithm of its paper.

The recipes repeat the papers' numbers here, so that a changed default makes a test fail.
"""

import copy

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from robustdyn.measure import RecordEpochs
from robustdyn.records import RunRecords
from robustdyn.run.config import build
from robustdyn.run.parts import build_module
from tests.data.official import SHARED, needs_shared
from tests.methods.rendering import Recipe, train
from tests.runs import TINY, compose, rows
from tests.tolerances import EXACT32, EXACT64

# twelve steps, every fourth with a batch of four images; a tenth of the rate from the ninth on
DIGITS = (*TINY, "data.train_size=100", "data.test_size=20", "trainer.precision=64-true")


class Recorder(Callback):
    """Keeps every step's loss and batch, and every epoch's metrics."""

    def __init__(self):
        self.losses, self.epochs, self.metrics = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.epochs[-1].append((batch.images.clone(), batch.targets.clone()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append(pl_module.epoch_metrics())


def run(*overrides, callbacks=()):
    """A run in float64: the network before and after, and what was recorded on the way."""
    cfg = compose(*overrides)
    lightning.seed_everything(cfg.seed, verbose=False)
    data = build(cfg, "data")
    data.setup("fit")
    module = build_module(cfg, data)
    before = copy.deepcopy(module.model).double()
    recorder = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = build(cfg, "trainer", callbacks=[recorder, *callbacks], **quiet)
    trainer.fit(module, datamodule=data)
    return before, module.model, recorder


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_follows(recipe, *overrides):
    model, trained, recorder = run(*overrides)
    assert len(recorder.losses) >= 10
    trace = train(recipe, model, recorder.epochs, seed=0)
    torch.testing.assert_close(float64(recorder.losses), float64(trace.losses), **EXACT64)
    for name, value in model.state_dict().items():  # parameters and BatchNorm's buffers
        torch.testing.assert_close(
            trained.state_dict()[name], value, **EXACT64, msg=lambda m, n=name: f"{n}: {m}"
        )
    for ours, theirs in zip(recorder.metrics, trace.epochs, strict=True):
        recorded = {key: value for key, value in ours.items() if key.startswith("train_")}
        assert recorded == pytest.approx(
            theirs, rel=EXACT32["rtol"], abs=EXACT32["atol"]
        )  # metrics are float32


GAUSSIAN = {"start": "gaussian", "attacked_in": "eval"}
TRADES = {"objective": "trades", "beta": 6.0, **GAUSSIAN}
MART = {"objective": "mart", "beta": 5.0, **GAUSSIAN}
ADAM = {"lr": 1e-3, "weight_decay": 0.0}

RECIPES = {
    "method=at": {},
    "method=standard": {"objective": "standard"},
    "method=awp": {"ascent": "awp", "size": 0.01},
    "method=awp perturbation.warmup_epochs=1": {"ascent": "awp", "size": 0.01, "warmup_epochs": 1},
    "method=awp_global": {"ascent": "awp_global", "size": 0.01},
    "method=sam": {"ascent": "sam", "size": 0.05},
    "method=trades": TRADES,
    "method=mart": MART,
    "method=trades_awp perturbation.warmup_epochs=0": {**TRADES, "ascent": "awp", "size": 0.005},
    "method=mart_awp perturbation.warmup_epochs=0": {**MART, "ascent": "awp", "size": 0.005},
    "attack.train.batchnorm=eval": {"attacked_in": "eval"},
    "method=trades attack.train.batchnorm=train": {**TRADES, "attacked_in": "train"},
    "attack=l2": {"norm": "l2", "eps": 1.0, "step": 0.25},
    "regularizer.l1=5e-4": {"l1": 5e-4},
    "regularizer.weight_decay_on=weights": {"decay_all": False},
    "objective.label_smoothing=0.1": {"label_smoothing": 0.1},
    "method=standard objective.label_smoothing=0.1": {"objective": "standard", "label_smoothing": 0.1},
    "optimizer.nesterov=true": {"optimizer": "nesterov"},
    "optimizer=adam": {"optimizer": "adam", **ADAM},
    "optimizer=adam optimizer.weight_decay=0.1": {"optimizer": "adam", **ADAM, "weight_decay": 0.1},
    "optimizer=adamw": {"optimizer": "adamw", **ADAM, "weight_decay": 0.01},
    "method=trades perturbation=sam optimizer=adamw": {
        **TRADES, "ascent": "sam", "size": 0.05, "optimizer": "adamw", **ADAM, "weight_decay": 0.01,
    },
}  # fmt: skip


SLOW = (  # other recipes cover each of their choices
    "method=awp",
    "method=trades",
    "method=mart",
    "attack.train.batchnorm=eval",
    "method=standard objective.label_smoothing=0.1",
    "optimizer=adam optimizer.weight_decay=0.1",
    "method=trades perturbation=sam optimizer=adamw",
)


@pytest.mark.parametrize(
    "overrides", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RECIPES]
)
def test_follows_its_paper_for_twelve_steps(overrides):
    assert_follows(Recipe(decay_epoch=2, **RECIPES[overrides]), *DIGITS, *overrides.split())


CIFAR10 = (
    *(override for override in DIGITS if not override.startswith("data")),
    "data=cifar10",
    f"data.root={SHARED}",
    "data.download=false",
    "data.partial=true",
    "data.batch_size=16",
    "data.train_size=80",
    "data.test_size=16",
    "model.strides=[2,2]",
    "trainer.max_epochs=2",
    "schedule.milestones=[1]",
)


@needs_shared
@pytest.mark.parametrize(
    "method", ["awp", *(pytest.param(method, marks=pytest.mark.slow) for method in ("at", "trades", "mart"))]
)
def test_follows_its_paper_on_cifar10(method):
    recipe = Recipe(decay_epoch=1, **(RECIPES[f"method={method}"] | {"eps": 8 / 255, "step": 2 / 255}))
    assert_follows(recipe, *CIFAR10, f"method={method}")


def test_standard_training_has_robust_test_metrics_only(tmp_path):
    run(*DIGITS, "method=standard", "trainer.max_epochs=1", callbacks=[RecordEpochs(RunRecords(tmp_path))])
    (row,) = rows(tmp_path, "epochs")
    for kind in ("loss", "error"):
        assert row[f"train_robust_{kind}"] is None
        assert row[f"robust_{kind}_gap"] is None
        assert row[f"test_robust_{kind}"] >= row[f"test_clean_{kind}"] >= 0
        assert row[f"train_clean_{kind}"] >= 0
