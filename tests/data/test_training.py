"""Tests cutout and mixup in runs of ``robustdyn-train``."""

import lightning
import pytest
import torch

from robustdyn.run.config import build
from tests.runs import UNMEASURED, command, compose, rows, weights

MIXED = (*UNMEASURED, "data.mixup=0.4", "data.augment.cutout=3")


def run(monkeypatch, run_dir, *overrides):
    return command(monkeypatch, *MIXED, f"hydra.run.dir={run_dir}", *overrides)


@pytest.mark.slow  # three runs; tests/commands/test_resume.py kills one with mixup
def test_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole, broken_off = tmp_path / "whole", tmp_path / "broken_off"
    assert run(monkeypatch, whole, "trainer.max_epochs=2") == 0
    assert [row["epoch"] for row in rows(whole, "epochs")] == [0, 1]
    for length in (1, 2):
        assert run(monkeypatch, broken_off, f"trainer.max_epochs={length}") == 0
    assert rows(broken_off, "epochs") == rows(whole, "epochs")
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(broken_off).items())


def test_training_error_is_the_expected_one_under_mixed_targets(tmp_path, monkeypatch):
    # with no attack and a tiny learning rate, the network does not change in the epoch
    overrides = ("attack.steps=0", "attack.train.random_start=none", "optimizer.lr=1e-30",
                 "trainer.max_epochs=1")  # fmt: skip
    assert run(monkeypatch, tmp_path, *overrides) == 0
    (row,) = rows(tmp_path, "epochs")

    cfg = compose(*MIXED, *overrides)
    lightning.seed_everything(cfg.seed, verbose=False)
    model, data = build(cfg, "model"), build(cfg, "data")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights(tmp_path)[name], rtol=0, atol=1e-28)
    error, loss, count = 0.0, 0.0, 0
    for batch in data.train_dataloader():
        with torch.no_grad():
            logits = model.train()(batch.images)
        for row_of_logits, targets in zip(logits.double(), batch.targets.double(), strict=True):
            error += 1 - targets[row_of_logits.argmax()].item()
            loss -= (targets * row_of_logits.log_softmax(0)).sum().item()
            count += 1
    assert count == 80
    # float32 means over three batches
    assert row["train_robust_error"] == pytest.approx(error / count, rel=1e-5)
    assert row["train_robust_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert abs(error - round(error)) > 1e-3  # no count of wrong labels gives that


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.augment.cutout=8", "data.augment.cutout=8 must be smaller than the image, 8 pixels"),
        ("data.augment.cutout=-1", "data.augment.cutout=-1 must be a whole number of at least 0"),
        ("data.augment.cutout=2.5", "data.augment.cutout=2.5 must be a whole number of at least 0"),
        ("data.mixup=-0.1", "data.mixup=-0.1 must be a number of at least 0; 0 is none"),
        ("data.mixup=much", "data.mixup=much must be a number"),
    ],
)
def test_a_mistake_is_one_clear_line(override, message, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path, override) == 1
    error = capsys.readouterr().err
    assert error == f"error: {message}\n"
    assert not (tmp_path / "records").exists()
