"""Tests that gradients accumulated over several batches give the step and noise of one large batch."""

import pytest
import torch
from torch import nn

from robustdyn.attacks import PGD
from robustdyn.measure import Eigenpairs, Measure, MeasurementPlan, Spectrum
from robustdyn.records import RunRecords
from robustdyn.run.config import build
from robustdyn.run.parts import build_module
from tests.runs import TINY, compose, rows
from tests.tolerances import EXACT64

PAIRS = Eigenpairs(directions=2, tolerance=1e-9, max_products=60, extra_vectors=10, warm_start=False)


def trained(tmp_path, *overrides, callbacks=()):
    """A run on digits without BatchNorm, whose statistics would be those of the small batches."""
    cfg = compose(*TINY, "trainer.precision=64-true", "attack.train.random_start=none", *overrides)
    data = build(cfg, "data")
    data.setup("fit")
    module = build_module(cfg, data)
    torch.manual_seed(0)
    module.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    build(cfg, "trainer", callbacks=list(callbacks), **quiet).fit(module, datamodule=data)
    return module


# the last step of an epoch has one batch of four images, or a whole one and one of ten
@pytest.mark.parametrize("images", [100, 90])
def test_the_step_is_that_of_the_large_batch(images, tmp_path):
    settings = (f"data.train_size={images}", "regularizer.l1=1e-3")
    small = trained(tmp_path, *settings, "data.batch_size=16", "+trainer.accumulate_grad_batches=2")
    large = trained(tmp_path, *settings, "data.batch_size=32")
    assert small.global_step == large.global_step > 6
    for name, value in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], value, **EXACT64)


def test_the_recorded_noise_is_that_of_the_large_batch(tmp_path):
    def measured(name, *settings):
        records = RunRecords(tmp_path / name)
        measure = Measure(
            epochs=[1],
            examples=24,
            inputs="clean",
            weights="trained",
            plan=MeasurementPlan(measurements={"spectrum": Spectrum()}, eigenpairs=PAIRS, second_attack=24),
            records=records,
        )
        trained(tmp_path, "trainer.max_epochs=2", *settings, callbacks=[measure])
        return [row["gradient_noise"] for row in rows(tmp_path / name, "spectrum") if row["epoch"] == 1]

    small = measured("small", "data.batch_size=16", "+trainer.accumulate_grad_batches=2")
    assert small == pytest.approx(measured("large", "data.batch_size=32"), rel=1e-6)
    assert small != pytest.approx(measured("single", "data.batch_size=16"), rel=0.2)


def test_every_batch_of_a_step_starts_its_attack_elsewhere(tmp_path, monkeypatch):
    seeds = []
    start = PGD.start

    def noted(self, images, generator):
        if self.batchnorm == "train":  # the training attack
            seeds.append(generator.initial_seed())
        return start(self, images, generator)

    monkeypatch.setattr(PGD, "start", noted)
    trained(tmp_path, "data.batch_size=16", "+trainer.accumulate_grad_batches=2", "trainer.max_epochs=1")
    assert len(seeds) == len(set(seeds)) == 5
