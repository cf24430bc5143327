"""Synthetic runs under learning-rate schedules, with known numbers."""

import numpy as np

from robustdyn.records import RunRecords
from robustdyn.records.schema import EPOCHS, TIMED, TIMING, WCI
from tests.records.synthetic import config, write_hydra

START, ETA = 10, 0.1  # first epoch at the lower rate η₁, and η₀
EPOCHS_OF_RUN = 40


def error(epoch, final_slope, seed, lowest=0.40):
    """Falls to ``lowest`` (and a hundredth per seed) at the decay, then changes by ``final_slope``."""
    early = 0.3 * max(0, START - epoch) / START
    return lowest + 0.01 * seed + early + final_slope * max(0, epoch - START)


def write(
    path,
    schedule,
    seed,
    *,
    choice,
    slope,
    rate,
    index=None,
    epochs=EPOCHS_OF_RUN,
    timed=True,
    every=2,
    **changed,
):
    """A run; ``rate`` and ``index`` (None: not measured) are functions of the epoch.

    Of ten seconds an epoch, evaluating takes 2 where it does, measuring 3, and what is left the training.
    """
    settings = config(seed=seed, **changed) | {"schedule": schedule}
    settings["decay_epochs"] = [START, 30]
    settings["trainer"]["max_epochs"] = changed.get("trainer__max_epochs", EPOCHS_OF_RUN)
    write_hydra(path, settings, [f"schedule={choice}", f"seed={seed}"], {"schedule": choice, "method": "at"})
    records = RunRecords(path)
    for epoch in range(epochs):
        stamp = {"epoch": epoch, "step": epoch + 1}
        row = dict.fromkeys(EPOCHS.required) | stamp | {"seconds": 10.0, "lr": rate(epoch)}
        evaluated = (epoch + 1) % every == 0
        if evaluated:
            robust = error(epoch, slope, seed)
            row |= {
                "test_robust_error": robust,
                "test_clean_error": robust / 4,
                "test_robust_loss": 3 * robust,
            }
            row |= {"robust_error_gap": robust - 0.3, "robust_loss_gap": 2 * (robust - 0.3)}
        records.append("epochs", row)
        measured = None if index is None else index(epoch)
        if measured is not None:
            records.append("wci", dict.fromkeys(WCI.required) | stamp | {"wci": measured})
        if timed:
            shares = dict.fromkeys(TIMED, 0.0) | {"evaluation": 0.2 * evaluated}
            shares |= {"measurement": 0.3 * (measured is not None)}
            shares["attack"] = 1 - sum(shares.values()) - 0.1
            shares["step"] = 0.1
            row = {f"{name}_share": share for name, share in shares.items()}
            records.append("timing", dict.fromkeys(TIMING.required) | stamp | row | {"seconds": 10.0})
    return path


def write_wci_rate(path, threshold, seed, *, slope, growth=2.0, **more):
    """A run of the rule itself: an index of 100 at the decay that grows by ``growth`` an epoch."""
    schedule = {
        "_target_": "robustdyn.methods.WCIRate",
        "start_epoch": "${first:${decay_epochs}}",
        "factor": 0.1,
        "interval": 1,
        "quantity": "wci",
        "threshold": threshold,
        "monotone": False,
    }

    def index(epoch):
        last = more.get("epochs", EPOCHS_OF_RUN) - 1
        return 100 + seed + growth * (epoch - START + 1) if START - 1 <= epoch < last else None

    def rate(epoch):
        return ETA if epoch < START else 0.1 * ETA * min(1.0, threshold / index(epoch - 1))

    choice = {"choice": "wci", "index": index, "rate": rate}
    return write(path, schedule, seed, slope=slope, **choice, **more)


def write_bound_rate(path, beta, seed, *, slope):
    """A run whose rate follows the bound: 0.02 at every epoch after the decay."""
    schedule = {
        "_target_": "robustdyn.methods.BoundRate",
        "start_epoch": "${first:${decay_epochs}}",
        "interval": 5,
        "beta_per_example": beta,
        "learning_rate": "${optimizer.lr}",
        "lowest": 0.01,
        "highest": 1.0,
    }
    return write(path, schedule, seed, choice="bound", slope=slope, rate=lambda e: ETA if e < START else 0.02)


def write_fixed_rate(path, choice, seed, *, slope, **more):
    """A run under another schedule; its rate falls in two steps whatever its name."""

    def rate(epoch):
        return ETA * (0.1 if epoch >= START else 1.0) * (0.1 if epoch >= 30 else 1.0)

    schedule = {"_target_": f"robustdyn.methods.{choice}", "length": EPOCHS_OF_RUN}
    return write(path, schedule, seed, choice=choice, slope=slope, rate=rate, **more)


def interval(values):
    """Half of Student's 95 % interval of the mean of three values."""
    return 4.302652729911275 * np.std(values, ddof=1) / np.sqrt(3)  # t table: 97.5 %, two degrees of freedom
