"""Records a training loop that is not ours: rates, measurements and the posterior that they imply."""

import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustdyn.curvature import EmpiricalRisk, cross_entropy, shard
from robustdyn.curvature.empirical_risk import unwrapped
from robustdyn.curvature.examples import Structure, leaves, rebuilt
from robustdyn.curvature.risk_checks import CHECKED_EXAMPLES
from robustdyn.curvature.risk_function import PerExampleLoss
from robustdyn.defaults import default
from robustdyn.errors import RecordError
from robustdyn.measure.examples import Attack, Examples
from robustdyn.measure.model_measurement import (
    UNKNOWN_OPTIMIZER,
    checked_sizes,
    new_run_directory,
    settings_of,
    standard_measurements,
)
from robustdyn.measure.plan import Measurement, MeasurementPlan, TableRow, deployed, parameters_now
from robustdyn.measure.posterior import POSTERIOR_TABLES, posterior_rows
from robustdyn.measure.snapshot import Eigenpairs
from robustdyn.methods import OptimizerState, optimizer_state
from robustdyn.records import RunRecords, read_table, summarise
from robustdyn.records.progress import RunStatus
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import EPOCHS, ROBUST_LOSS_GAP, TEST_ROBUST_LOSS, TRAIN_ROBUST_LOSS
from robustdyn.theory.trajectory import Interpolation


class Recorder:
    """Records any training loop in a run directory that ``robustdyn-report`` reads.

    Call ``step(optimizer)`` after each ``optimizer.step()`` and before the learning rate changes, and
    ``measure(epoch)`` at the end of the epochs to measure. Leaving the ``with`` block, or calling
    ``finish()``, computes the posterior:

        with Recorder(model, inputs, targets, "my_run", train_examples=50_000, batch_size=128) as recorder:
            for epoch in range(epochs):
                for batch in loader:
                    ...
                    optimizer.step()
                    recorder.step(optimizer)
                if epoch % 5 == 0:
                    recorder.measure(epoch)

    Args:
        model: Any module; see ``robustdyn.measure_model``, and there also for the arguments that follow.
        inputs: Of training examples, which are attacked again at each measurement, always from the same
            random starts.
        targets: Of the same examples.
        run_dir: Where to write.
        loss: ``(outputs, targets) -> (B,)``.
        attack: PGD, a function, or None.
        train_examples: n, size of the training set; None takes the number of examples given.
        batch_size: B, over which one optimiser step averages, on all processes together.
        examples: Use only so many of the examples; None uses all.
        measurements: What is measured; None for ``standard_measurements()``.
        eigenpairs: How leading eigenpairs are found.
        second_attack: So many examples are attacked a second time.
        memory_mib: For passes and kept graphs; None for 256 on a CPU, or half of a GPU's free memory.
        interpolation: How curvature and noise run between measured epochs.
        seed: Of all random numbers.
        resume: Whether the directory already holds the record of this training; then give the checkpoint's
            ``state_dict()`` back to ``load_state_dict``.
        group: Processes that train together, each with the same weights and the same arguments. The examples
            are spread over them, and the first one writes.

    Raises:
        TypeError: As ``measure_model``; or
        ValueError: the first examples show that the model cannot be measured.
        RecordError: The directory holds a record and ``resume`` is False.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any,
        run_dir: str | os.PathLike[str],
        *,
        loss: PerExampleLoss = cross_entropy,
        attack: Attack | None = None,
        train_examples: int | None = None,
        batch_size: int | None = None,
        examples: int | None = None,
        measurements: Mapping[str, Measurement] | None = None,
        eigenpairs: Eigenpairs | None = None,
        second_attack: int = default("measure/default", "second_attack"),
        memory_mib: int | None = default("measure/default", "memory_mib"),
        interpolation: Interpolation = default("measure/default", "interpolation"),
        seed: int = 0,
        resume: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self._plan = MeasurementPlan(
            measurements=standard_measurements() if measurements is None else measurements,
            eigenpairs=Eigenpairs() if eigenpairs is None else eigenpairs,
            second_attack=second_attack,
            memory_mib=memory_mib,
        )
        self._examples = Examples(
            self.model, inputs, targets, loss=loss, attack=attack, seed=seed, count=examples
        )
        self._loss, self._seed, self._group, self._interpolation = loss, seed, group, interpolation
        self._attack = attack
        self._initial = parameters_now(self.model) if self._plan.needs_initial else None
        count = self._examples.count()
        self._count, self._batch_size = count, batch_size
        self._train_examples = checked_sizes(count, train_examples, batch_size)
        self._check_model()
        self._steps, self._epochs, self._ended_at = 0, 0, 0
        self._state: OptimizerState | None = None
        self._one_law = True  # whether all steps had the same momentum, weight decay and kind
        self._rate: float | None = None
        self._epoch_rate: float | None = None  # at the end of the last epoch recorded
        self._changes: list[tuple[int, float]] = []  # of the rate, in epochs that have not been recorded
        self._starts: dict[str, Tensor] = {}
        self._began = time.perf_counter()
        self.run_dir = Path(run_dir)
        self._records = RunRecords(run_dir) if group is None or dist.get_rank(group) == 0 else None
        settings = settings_of(
            self.model,
            self._plan,
            UNKNOWN_OPTIMIZER,
            self._train_examples,
            batch_size,
            count,
            attack,
            seed,
        )
        refused: list[RecordError | None] = [None]
        if self._records is not None and not (resume and RunDirectory(run_dir).config.is_file()):
            try:
                new_run_directory(run_dir, settings)
            except RecordError as error:
                refused = [error]
        self._raise_together(refused)
        if self._records is not None:
            self._status = RunStatus(run_dir, settings)
            self._status.__enter__()

    def __enter__(self) -> Self:
        """The recorder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish, or record the error with which training ended."""
        if error is None:
            self.finish()
        elif self._records is not None:
            self._status.__exit__(kind, error, trace)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for the record to be continued."""
        return {
            "steps": self._steps,
            "epochs": self._epochs,
            "ended_at": self._ended_at,
            "state": None if self._state is None else tuple(self._state),
            "one_law": self._one_law,
            "rate": self._rate,
            "epoch_rate": self._epoch_rate,
            "changes": list(self._changes),
            "starts": dict(self._starts),
            "initial": self._initial,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue a record from a checkpoint: rows that will be written again are dropped.

        Raises:
            RecordError: The directory does not hold the record up to the checkpoint.
        """
        epochs = int(state_dict["epochs"])
        refused: list[RecordError | None] = [None]
        if self._records is not None and len(read_table(self.run_dir, "epochs")) < epochs:
            refused = [
                RecordError(
                    f"{self.run_dir}: does not hold the record of the {epochs} epochs before the checkpoint; "
                    "give the run directory of the training that continues, or a copy of it"
                )
            ]
        self._raise_together(refused)
        self._steps, self._epochs = int(state_dict["steps"]), epochs
        self._ended_at, self._rate = int(state_dict["ended_at"]), state_dict["rate"]
        self._epoch_rate, self._changes = state_dict["epoch_rate"], list(state_dict["changes"])
        self._initial = state_dict.get("initial", self._initial)
        self._starts, self._one_law = dict(state_dict["starts"]), bool(state_dict["one_law"])
        self._state = None if state_dict["state"] is None else OptimizerState(*state_dict["state"])
        if self._records is not None:
            self._records.truncate(self._epochs, self._steps)

    def step(self, optimizer: torch.optim.Optimizer, *, clipped: bool = False) -> None:
        """Note an optimiser step and its learning rate.

        Args:
            optimizer: The optimiser, with the settings of the step.
            clipped: Whether gradients are clipped, so that the laws of momentum SGD do not hold.
        """
        state = optimizer_state(optimizer)
        state = state._replace(plain=state.plain and not clipped)
        if self._state is not None and self._state[1:] != state[1:]:
            self._one_law = False
        self._state = state
        if self._state.learning_rate != self._rate:
            self._rate = self._state.learning_rate
            self._changes.append((self._steps, self._rate))
        self._steps += 1

    def end_epoch(self, epoch: int, **metrics: float) -> None:
        """Record the end of an epoch that is not measured; ``measure`` calls it for its own.

        If epochs before it were not recorded, the steps since are divided evenly among them.

        Args:
            epoch: Counted from 0.
            **metrics: Columns of the ``epochs`` table, such as ``test_robust_loss``.

        Raises:
            ValueError: The epoch was recorded before, no step was taken, a metric is unknown, or the steps do
                not divide evenly.
        """
        unknown = sorted(set(metrics) - set(EPOCHS.names))
        if unknown:
            raise ValueError(
                f"unknown metrics {', '.join(unknown)}: known are {', '.join(EPOCHS.names[3:-1])}"
            )
        if epoch < self._epochs:
            raise ValueError(f"epoch {epoch} was recorded before: epochs are counted from 0")
        if self._state is None:
            raise ValueError("no optimiser step was recorded: call step(optimizer) after optimizer.step()")
        missing, steps = epoch + 1 - self._epochs, self._steps - self._ended_at
        if steps % missing or not steps:
            raise ValueError(
                f"{steps} steps since epoch {self._epochs - 1} do not divide evenly among {missing} epochs: "
                "call step(optimizer) after every step, and end_epoch(epoch) at the end of every epoch"
            )
        if {TRAIN_ROBUST_LOSS, TEST_ROBUST_LOSS} <= set(metrics):
            metrics.setdefault(ROBUST_LOSS_GAP, metrics[TEST_ROBUST_LOSS] - metrics[TRAIN_ROBUST_LOSS])
        now = time.perf_counter()
        for number in range(self._epochs, epoch + 1):
            self._ended_at += steps // missing
            while self._changes and self._changes[0][0] < self._ended_at:
                step, self._epoch_rate = self._changes.pop(0)
                self._append("rates", {"epoch": number, "step": step, "lr": self._epoch_rate})
            row = {
                "epoch": number,
                "step": self._ended_at,
                "lr": self._epoch_rate,
                "seconds": (now - self._began) / missing,
            }
            given = metrics if number == epoch else {}
            self._append("epochs", dict.fromkeys(EPOCHS.required) | row | given)
        self._epochs, self._began = epoch + 1, now

    def measure(self, epoch: int, **metrics: float) -> dict[str, list[Mapping[str, Any]]]:
        """Measure the model after an epoch, and record the epoch; arguments as for ``end_epoch``.

        Returns:
            The rows of each table.

        Raises:
            ValueError: As ``end_epoch``; or the model cannot be measured, and the message says why.
            FloatingPointError: A loss or a derivative is not finite.
        """
        self.end_epoch(epoch, **metrics)
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for table, row in self._measured(epoch):
            rows.setdefault(table, []).append(row)
            self._append(table, row)
        return rows

    def _raise_together(self, refused: list[RecordError | None]) -> None:
        """Raise the first process's error in all of them, or the others would wait for it."""
        if self._group is not None:
            dist.broadcast_object_list(refused, group=self._group, group_src=0)
        if refused[0] is not None:
            raise refused[0]

    def _check_model(self) -> None:
        """Refuse before training what the first measurement would refuse after an epoch of it."""
        with deployed(self.model):
            few = self._examples(self.model, 0, min(CHECKED_EXAMPLES, self._count))
            EmpiricalRisk(self.model, *few, loss=self._loss)

    def _measured(self, epoch: int) -> Iterator[TableRow]:
        began = time.perf_counter()
        assert self._state is not None
        with deployed(self.model, self._group):
            snapshot = self._plan.snapshot(
                self.model,
                self._drawn,
                loss=self._loss,
                epoch=epoch,
                step=self._steps,
                optimizer=self._state,
                train_examples=self._train_examples,
                batch_size=self._batch_size,
                seed=self._seed,
                starts=self._starts,
                unperturbed=lambda: self._own(self._examples.unperturbed()),
                attack=self._attack,
                initial=self._initial,
                past=None if self._records is None else partial(read_table, self.run_dir),
                group=self._group,
            )
            yield from self._plan.rows(snapshot, began)
            self._starts |= self._plan.next_starts(snapshot)

    def _drawn(self, model: nn.Module, draw: int) -> tuple[Structure, Structure]:
        """This process's examples under an attack; every process attacks them all, from the same starts."""
        whole = self._examples(model, draw, min(self._plan.second_attack, self._count) if draw else None)
        inputs, targets = self._own(whole)
        return inputs, targets

    def _own(self, whole: Structure) -> Structure:
        """This process's part of all examples."""
        if self._group is None:
            return whole
        rank, processes = dist.get_rank(self._group), dist.get_world_size(self._group)
        return rebuilt(shard(leaves(whole), rank, processes), whole)

    def finish(self) -> Path:
        """Record the posterior at the end of every epoch, and the summary.

        There is no posterior if momentum or weight decay changed, as one-cycle schedules of PyTorch do, or if
        any step was not one of plain momentum SGD: the law that is propagated has one of each.

        Returns:
            The run directory.
        """
        if self._records is not None:
            tables = {name: read_table(self.run_dir, name) for name in POSTERIOR_TABLES}
            state = self._state
            lawful = state is not None and state.plain and self._one_law
            if state is not None and lawful and self._batch_size and not tables["spectrum"].empty:
                rows = posterior_rows(
                    tables,
                    momentum=state.momentum,
                    weight_decay=state.weight_decay,
                    interpolation=self._interpolation,
                )
                self._records.replace("posterior", rows)
            if not tables["epochs"].empty:
                self._records.write_summary(summarise(tables["epochs"]))
            self._status.__exit__(None, None, None)
        return self.run_dir

    def _append(self, table: str, row: Mapping[str, Any]) -> None:
        if self._records is not None:
            self._records.append(table, row)
