"""Measures any model in one call."""

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from robustdyn.curvature import EigenResult, cross_entropy
from robustdyn.curvature.empirical_risk import unwrapped
from robustdyn.curvature.examples import length
from robustdyn.curvature.risk_function import PerExampleLoss
from robustdyn.defaults import default
from robustdyn.errors import RecordError
from robustdyn.measure.alignment import Alignment
from robustdyn.measure.examples import Attack, Examples
from robustdyn.measure.plan import Measurement, MeasurementPlan, deployed
from robustdyn.measure.snapshot import Eigenpairs
from robustdyn.measure.spectrum import Spectrum
from robustdyn.measure.weight_curvature import WeightCurvature
from robustdyn.methods import OptimizerState, optimizer_state
from robustdyn.records import RunRecords
from robustdyn.records.progress import RunStatus
from robustdyn.records.reader import typed_frame
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import (
    COMMUTATOR_NULL,
    EPOCHS,
    GRADIENT_NOISE,
    HESSIAN_EIGENVALUE,
    HESSIAN_TRACE,
    POSTERIOR_VARIANCE_STATIONARY,
    TRACKED_DIRECTIONS,
)
from robustdyn.records.writer import jsonable

UNKNOWN_OPTIMIZER = OptimizerState(float("nan"), float("nan"), float("nan"), plain=False)


def standard_measurements() -> dict[str, Measurement]:
    """The measurements of ``measure_model`` where none are given: index, spectrum and alignment."""
    return {
        "spectrum": Spectrum(),
        "alignment": Alignment(),
        "weight_curvature": WeightCurvature(),
    }


@dataclass(frozen=True, eq=False)
class ModelMeasurement:
    """What ``measure_model`` found.

    Attributes:
        rows: The rows of each table, by its name in ``robustdyn.records.TABLES``.
        hessian: Leading eigenpairs of the Hessian, as they were found on the measured examples; None if no
            measurement asked for them.
        noise: Leading eigenpairs of C₁, the covariance of one example's gradient; None if no measurement
            asked for them.
        settings: How it was measured, for ``save``.
    """

    rows: Mapping[str, tuple[Mapping[str, Any], ...]] = field(repr=False)
    hessian: EigenResult | None = field(repr=False)
    noise: EigenResult | None = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)

    @property
    def wci(self) -> float:
        """The Weight-Curvature Index.

        Raises:
            KeyError: It was not measured.
        """
        return float(self.rows["wci"][0]["wci"])

    def to_frames(self) -> dict[str, pd.DataFrame]:
        """Each table as a data frame, with the columns that ``robustdyn.records.TABLES`` describes."""
        return {name: typed_frame(name, rows) for name, rows in self.rows.items()}

    def summary(self) -> str:
        """The main numbers with their standard errors, one on a line."""
        return "\n".join(summary_lines(self.rows, self.settings))

    def save(self, run_dir: str | os.PathLike[str]) -> Path:
        """Write the rows as the record of a run, which ``robustdyn-report`` and ``read_table`` read.

        Returns:
            The run directory.

        Raises:
            RecordError: The directory has records already.
        """
        directory = new_run_directory(run_dir, self.settings)
        records = RunRecords(directory.path)
        optimizer = self.settings["optimizer"] or {}
        seconds = self.rows["costs"][-1]["seconds"]
        row = {"epoch": 0, "step": 0, "lr": optimizer.get("lr"), "seconds": seconds}
        with RunStatus(directory.path, self.settings):
            for table, rows in self.rows.items():
                records.extend(table, rows)
            records.append("epochs", dict.fromkeys(EPOCHS.required) | row)
        return directory.path


def measure_model(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    loss: PerExampleLoss = cross_entropy,
    attack: Attack | None = None,
    optimizer: torch.optim.Optimizer | OptimizerState | None = None,
    train_examples: int | None = None,
    batch_size: int | None = None,
    examples: int | None = None,
    measurements: Mapping[str, Measurement] | None = None,
    eigenpairs: Eigenpairs | None = None,
    second_attack: int = default("measure/default", "second_attack"),
    memory_mib: int | None = default("measure/default", "memory_mib"),
    initial: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> ModelMeasurement:
    """Measure the curvature, the gradient noise and the implied posterior of a model at its present weights.

    The model is measured as it is deployed (in eval mode), and is left as it was: weights, buffers, gradients
    and modes. The wrappers of torch.compile and of data parallelism are looked through. θ consists of the
    parameters that require gradients. The examples, attacked if ``attack`` says so, are kept in a temporary
    file and read on demand, so that they may exceed the memory.

    Args:
        model: Any module.
        inputs: A tensor or NumPy array (m, ...), or a tuple of the model's positional or a dictionary of its
            keyword arguments. Without ``targets``, a Dataset, a DataLoader or another iterable of pairs
            (inputs, targets), which is read once.
        targets: (m, ...), in any of these forms.
        loss: ``(outputs, targets) -> (B,)``, one number per example.
        attack: PGD, which climbs ``loss``; or a function of (model, inputs, targets) that returns the inputs
            to measure on; or None to measure on the inputs as they are.
        optimizer: The optimiser that trains the model, or the settings of its last step. Without it there is
            no stationary law.
        train_examples: n, size of the training set; None takes the number of examples given.
        batch_size: B, over which one optimiser step averages. Without it the noise of a mini-batch is not
            known, nor what follows from it.
        examples: Use only so many, the first ones; None uses all.
        measurements: What is measured; None for ``standard_measurements()``.
        eigenpairs: How leading eigenpairs are found.
        second_attack: So many of the examples, or all, are attacked a second time, because values along
            eigenvectors are too large on the examples from which the eigenvectors come.
        memory_mib: For passes and kept graphs; None for 256 on a CPU, or half of a GPU's free memory.
        initial: The parameters before training by name, for measures of the distance from them.
        seed: Of all random numbers.

    Returns:
        All rows, with their standard errors.

    Raises:
        TypeError: Inputs, targets or model cannot be used; the message says what to give instead.
        ValueError: The model cannot be measured at these weights; the message says why and what to do.
        FloatingPointError: A loss or a derivative is not finite.
    """
    began = time.perf_counter()
    model = unwrapped(model)
    plan = MeasurementPlan(
        measurements=standard_measurements() if measurements is None else measurements,
        eigenpairs=Eigenpairs() if eigenpairs is None else eigenpairs,
        second_attack=second_attack,
        memory_mib=memory_mib,
    )
    state = _state(optimizer)
    with deployed(model):
        drawn = Examples(model, inputs, targets, loss=loss, attack=attack, seed=seed, count=examples)
        first = drawn(model, 0, None)
        count = length(first[0])
        train_examples = checked_sizes(count, train_examples, batch_size)
        snapshot = plan.snapshot(
            model,
            lambda network, draw: drawn(network, draw, min(second_attack, count)) if draw else first,
            loss=loss,
            epoch=0,
            step=0,
            optimizer=state,
            train_examples=train_examples,
            batch_size=batch_size,
            seed=seed,
            starts={},
            unperturbed=drawn.unperturbed,
            attack=attack,
            initial=initial,
        )
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for table, row in plan.rows(snapshot, began):
            rows.setdefault(table, []).append(jsonable(row))
    return ModelMeasurement(
        rows=MappingProxyType({table: tuple(found) for table, found in rows.items()}),
        hessian=snapshot.solved.get("hessian"),
        noise=snapshot.solved.get("noise"),
        settings=settings_of(model, plan, state, snapshot.train_examples, batch_size, count, attack, seed),
    )


def checked_sizes(examples: int, train_examples: int | None, batch_size: int | None) -> int:
    """The size of the training set; where it is not given, the number of examples.

    Raises:
        ValueError: It is smaller than the number of examples, or the batch is no part of it.
    """
    n = examples if train_examples is None else train_examples
    if n < examples:
        raise ValueError(
            f"train_examples={n} is smaller than the {examples} examples given: it is the size of the "
            "training set from which they were drawn"
        )
    if batch_size is not None and not 1 <= batch_size <= n:
        given = "the number of examples given, since train_examples is not" if train_examples is None else n
        raise ValueError(
            f"batch_size={batch_size} must be at least 1 and at most train_examples, {given}: give both as "
            "they are in training"
        )
    return n


def settings_of(
    model: nn.Module,
    plan: MeasurementPlan,
    optimizer: OptimizerState,
    train_examples: int,
    batch_size: int | None,
    examples: int,
    attack: Attack | None,
    seed: int,
) -> dict[str, Any]:
    """How a model is measured, as the configuration of a run directory."""
    known = not math.isnan(optimizer.learning_rate)
    return {
        "model": type(model).__name__,
        "attack": getattr(attack, "__name__", None if attack is None else str(attack)),
        "data": {"train_size": train_examples, "batch_size": batch_size},
        "optimizer": {
            "lr": optimizer.learning_rate,
            "momentum": optimizer.momentum,
            "weight_decay": optimizer.weight_decay,
        }
        if known
        else None,
        "measure": {
            "examples": examples,
            "second_attack": min(plan.second_attack, examples),
            "directions": plan.eigenpairs.directions,
            "tolerance": plan.eigenpairs.tolerance,
            "measurements": list(plan.measurements),
        },
        "seed": seed,
    }


def new_run_directory(run_dir: str | os.PathLike[str], settings: Mapping[str, Any]) -> RunDirectory:
    """Make a run directory with these settings as its configuration.

    Raises:
        RecordError: It has records already.
    """
    directory = RunDirectory(run_dir)
    if directory.config.is_file():
        raise RecordError(f"{directory.path}: holds another record; choose a new directory, or delete it")
    directory.hydra.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(dict(settings)), directory.config)
    return directory


def summary_lines(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]
) -> Iterator[str]:
    """The main numbers of one measurement with their standard errors, a line each."""
    measure = settings["measure"]
    yield f"{settings['model']}, measured on {measure['examples']} examples"

    def line(label: str, row: Mapping[str, Any], column: str, unit: str = "") -> str:
        value, error = row.get(column), row.get(f"{column}_se")
        if value is None:
            return f"  {label:<34} not known"
        return f"  {label:<34} {value:.4g}" + ("" if error is None else f" ± {error:.2g}") + unit

    for row in rows.get("wci", ()):
        yield line("Weight-Curvature Index", row, "wci")
        yield line("Tr H of the weight matrices", row, HESSIAN_TRACE)
    for row in rows.get("spectrum", ())[:1]:
        values = [f"{r[HESSIAN_EIGENVALUE]:.4g}" for r in rows["spectrum"]]
        shown = ", ".join(values[:5] + ["..."] * (len(values) > 5))
        yield f"  {'largest eigenvalues of H':<34} {shown}"
        yield line("curvature along the first one", row, "curvature")
        yield line("mini-batch noise γ along it", row, GRADIENT_NOISE)
        yield line("stationary variance σ² along it", row, POSTERIOR_VARIANCE_STATIONARY)
    for row in rows.get("alignment", ()):
        yield line("commutator of H and C", row, "commutator") + f", {row[COMMUTATOR_NULL]:.2g} by chance"
    for row in rows.get("bounds", ()):
        k = row[TRACKED_DIRECTIONS]
        yield line(f"Σ λσ² over {k} directions", row, "curvature_term_top_k")
        yield line(f"−Σ ln σ² over {k} directions", row, "log_variance_term_top_k", " nats")
    if settings["optimizer"] is None:
        yield "  Give optimizer= for the stationary variances."
    if settings["data"]["batch_size"] is None:
        yield "  Give batch_size= for the noise of a mini-batch."
    variances = [row.get(POSTERIOR_VARIANCE_STATIONARY) for row in rows.get("spectrum", ())]
    if None not in (settings["optimizer"], settings["data"]["batch_size"]) and set(variances) == {None}:
        yield "  No direction has a stationary variance: the law needs momentum SGD and stable steps."


def _state(optimizer: torch.optim.Optimizer | OptimizerState | None) -> OptimizerState:
    if optimizer is None:
        return UNKNOWN_OPTIMIZER
    return optimizer if isinstance(optimizer, OptimizerState) else optimizer_state(optimizer)
