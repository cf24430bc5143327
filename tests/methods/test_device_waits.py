"""Tests that training steps never wait for the device."""

import traceback

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from robustdyn.measure.watch import StopOnNonFinite
from tests.methods.fits import SMALLER, WIDE, fit
from tests.runs import command

aten = torch.ops.aten
READING = {
    getattr(aten, name).default
    for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")
}
FETCHING = {
    getattr(torch.Tensor, name)
    for name in (
        *("cpu", "item", "numpy", "tolist", "__bool__", "__float__", "__int__"),
        *("__index__", "__array__", "__format__", "__repr__"),
    )
}


class Operations(TorchDispatchMode):
    """Notes operations that need a value or a size that only the device knows."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is aten.index.Tensor and any(t is not None and t.dtype is torch.bool for t in args[1])
        if func in READING or masked:
            self.notes.append((str(func), traceback.format_stack()))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Notes calls that bring a tensor to the host; on the CPU nothing is copied, so no operation shows it.

    Among moves it notes those to "cpu" by name, because a device in a variable is the one that trains.
    """

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wanted = [*args[1:], *(kwargs or {}).values()] if func is torch.Tensor.to else []
        if func in FETCHING or any(isinstance(value, str) and value == "cpu" for value in wanted):
            self.notes.append((getattr(func, "__name__", str(func)), traceback.format_stack()))
        return func(*args, **(kwargs or {}))


def watched(monkeypatch):
    """Notes of all training steps, each from making the batch to the last hook at its end."""
    notes, steps, advance = [], [], _TrainingEpochLoop.advance

    def watch(loop, data_fetcher):
        with Operations(notes), Calls(notes):
            advance(loop, data_fetcher)
        steps.append(loop.batch_idx)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", watch)
    return notes, steps


METHODS = {
    "at": (),
    "awp": ("method=awp", "perturbation.warmup_epochs=0"),
    "sam": ("method=sam",),
    "trades": ("method=trades",),
    "mart": ("method=mart",),
    "mixup": ("data.mixup=1.0", "data.augment.cutout=2", "data.augment.crop_padding=1"),
    "bf16": ("execution=bf16",),
    "adamw": ("optimizer=adamw",),
    "noise and penalty": ("added_noise=gaussian", "curvature_penalty=gauss_newton"),
    "frozen": ("batchnorm.frozen_from=0",),
}


COVERED = ("at", "sam")  # by the command below, and by AWP


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in COVERED else []) for case in METHODS]
)
def test_the_host_never_waits_within_a_step(case, monkeypatch):
    """Neither Lightning's loop nor the module nor the optimiser waits."""
    notes, steps = watched(monkeypatch)
    fit(*SMALLER, *METHODS[case], "trainer.max_epochs=1", limit_val_batches=0)
    assert steps == [0, 1, 2]
    assert not notes, "\n".join(["", notes[0][0], *notes[0][1][-25:]])


def test_the_host_never_waits_within_a_step_of_the_command(monkeypatch, tmp_path):
    """The run has all callbacks and a logger."""
    # on a CPU it checks every loss, which costs nothing here; on a GPU it checks every so many steps
    monkeypatch.setattr(StopOnNonFinite, "on_before_backward", lambda *_: None)
    notes, steps = watched(monkeypatch)
    arguments = ("measure=none", "trainer.max_epochs=1", "logger=csv", "report=false")
    assert command(monkeypatch, *WIDE, *SMALLER, *arguments, f"hydra.run.dir={tmp_path}") == 0
    assert steps == [0, 1, 2]
    assert not notes, "\n".join(["", notes[0][0], *notes[0][1][-25:]])


def test_waiting_is_noticed():
    notes, x = [], torch.arange(3.0)
    waits = (
        lambda: x[0].item(),
        lambda: float(x.sum()),
        lambda: bool(x.isfinite().all()),
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: x.to(device="cpu"),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x[x > 1],
        lambda: torch.equal(x, x),
        lambda: x.nonzero(),
        lambda: f"{x[0]:.2f}",
    )
    with Operations(notes), Calls(notes):
        for wait in waits:
            before = len(notes)
            wait()
            assert len(notes) > before
        before = len(notes)
        x.to(torch.float64).to(x.device).add_(1)[1:].sum()
        assert len(notes) == before
