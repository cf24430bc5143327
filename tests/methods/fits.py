"""Trains in the test's own process, for tests of memory layout and compilation."""

import lightning
import torch

from robustdyn.run.config import build
from robustdyn.run.parts import build_module
from tests.runs import UNMEASURED, compose

SMALLER = ("model.blocks=[1]", "model.strides=[2]")
# wide enough for the channels-last layout
WIDE = (*UNMEASURED, "model.width=8")
EXACTLY = {"rtol": 0.0, "atol": 0.0}


class SaveWithin(lightning.Callback):
    """Saves a checkpoint after the second of three batches of the first epoch."""

    def __init__(self, path):
        self._path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self._path)


def values(module):
    """Weights and BatchNorm statistics."""
    return {name: value.detach().clone() for name, value in module.model.state_dict().items()}


def prepared(*overrides):
    cfg = compose(*WIDE, *overrides)
    lightning.seed_everything(cfg.seed, verbose=False)
    data = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")
    return cfg, data, build_module(cfg, data)


def fit(*overrides, callbacks=(), resume=None, **settings):
    """Train in this process; return the trained module and its trainer."""
    cfg, data, module = prepared(*overrides)
    averaging = build(cfg, "averaging")
    trainer = build(
        cfg,
        "trainer",
        callbacks=[*callbacks, *([averaging] if averaging else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, trainer


def deviation(found, wanted):
    """‖found - wanted‖ / ‖wanted‖ over all tensors."""
    found, wanted = (
        torch.cat([t.double().flatten() for t in tensors.values()]) for tensors in (found, wanted)
    )
    return float((found - wanted).norm() / wanted.norm())


def momenta(trainer):
    (optimizer,) = trainer.optimizers
    return [state["momentum_buffer"] for state in optimizer.state.values()]
