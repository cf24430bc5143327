"""Runs whose curves are given: learning rate, robust errors, and what is measured, by epoch."""

from pathlib import Path

import numpy as np

from robustdyn.records import RunRecords
from tests.records.synthetic import config, write_hydra


def write_curves(
    path, *, lr, test, train, seed=0, trace=None, norm=None, ratio=0.8, every=1, measured=None, settings=()
):
    """A run directory; losses are four times the errors.

    Args:
        lr, test, train: By epoch: learning rate, robust test and train error.
        trace, norm: Tr H and ‖W‖²_F by epoch; without a trace nothing is measured.
        ratio: WCI over its Cauchy–Schwarz bound.
        every: Evaluated are epochs ``every - 1``, ``2 every - 1``, ...
        measured: Measured epochs; all if None.
        settings: Mapping of ``section.leaf`` to its value.
    """
    changed = config(seed=seed)
    for name, value in dict(settings).items():
        section, _, leaf = name.partition(".")
        changed[section][leaf] = value
    write_hydra(path, changed)
    records = RunRecords(Path(path))
    for epoch, (rate, own, shown) in enumerate(zip(lr, test, train, strict=True)):
        known = (epoch + 1) % every == 0
        row = {"epoch": epoch, "step": epoch + 1, "lr": rate, "seconds": 1.0}
        for split, error in (("train", shown), ("test", own if known else None)):
            for inputs in ("robust", "clean"):
                row[f"{split}_{inputs}_error"] = error
                row[f"{split}_{inputs}_loss"] = None if error is None else 4 * error
        row["robust_error_gap"] = own - shown if known else None
        row["robust_loss_gap"] = 4 * (own - shown) if known else None
        records.append("epochs", row)
        if trace is not None and (measured is None or epoch in measured):
            bound = np.sqrt(norm[epoch] * trace[epoch])
            records.append(
                "wci",
                {
                    "epoch": epoch,
                    "step": epoch + 1,
                    "wci": ratio * bound,
                    "wci_se": 0.01,
                    "weight_norm_sq": norm[epoch],
                    "hessian_trace": trace[epoch],
                    "hessian_trace_se": 0.01,
                    "hessian_trace_all": trace[epoch],
                    "cauchy_schwarz_bound": bound,
                    "clamped_layers": 0,
                    "hvps": 10,
                    "examples": 256,
                    "batchnorm": "eval",
                    "estimator": "gauss_newton_exact",
                    "seconds": 0.1,
                },
            )
    return path


def decayed(epochs, at, rates=(0.1, 0.01)):
    """A learning rate that falls once."""
    return [rates[epoch >= at] for epoch in range(epochs)]
