"""What is measured of a network and how, whoever trains it; and the examples on which it is measured."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustdyn.attacks import PGD
from robustdyn.curvature import EmpiricalRisk, Precision, cross_entropy
from robustdyn.curvature.examples import Structure
from robustdyn.curvature.risk_function import PerExampleLoss, call_with
from robustdyn.defaults import default
from robustdyn.measure.snapshot import Eigenpairs, Snapshot
from robustdyn.methods import OptimizerState
from robustdyn.models.modes import mode
from robustdyn.models.sync_batchnorm import desynchronized

_ON_A_CPU = 256 * 2**20  # bytes

TableRow = tuple[str, Mapping[str, Any]]
"""(table, columns) of one record."""


class Measurement(Protocol):
    """A measurement, which turns a snapshot of the training into rows of the record."""

    tables: ClassVar[tuple[str, ...]]
    """The tables that its rows belong to."""

    def measure(self, snapshot: Snapshot) -> Iterable[TableRow]:
        """Rows for the record, computed from the snapshot alone."""


@dataclass(frozen=True, kw_only=True)
class MeasurementPlan:
    """Which measurements are taken, and with which settings.

    Attributes:
        measurements: The measurements by name, in the order in which they run.
        eigenpairs: How leading eigenpairs are found.
        second_attack: How many of the examples, or all, are attacked a second time, over all processes.
        memory_mib: Memory on each process for one pass and for the graphs that are kept for the next product;
            None for what ``memory_of`` says.
        precision: Precision of the products; see ``robustdyn.curvature.EmpiricalRisk``.

    Raises:
        ValueError: Fewer than two examples are attacked a second time, and two are needed for a spread.
    """

    measurements: Mapping[str, Measurement]
    eigenpairs: Eigenpairs = field(default_factory=Eigenpairs)
    second_attack: int = default("measure/default", "second_attack")
    memory_mib: int | None = default("measure/default", "memory_mib")
    precision: Precision = default("measure/default", "precision")

    def __post_init__(self) -> None:
        if self.second_attack < 2:
            raise ValueError(f"second_attack={self.second_attack} examples have no spread; choose at least 2")

    @property
    def needs_initial(self) -> bool:
        """Whether a measurement compares the weights with those before training."""
        # not a part of the protocol: most measurements do not
        return any(getattr(measurement, "needs_initial", False) for measurement in self.measurements.values())

    def snapshot(
        self,
        model: nn.Module,
        examples: Callable[[nn.Module, int], tuple[Structure, Structure]],
        *,
        loss: PerExampleLoss = cross_entropy,
        epoch: int,
        step: int,
        optimizer: OptimizerState,
        train_examples: int,
        batch_size: int | None,
        seed: int,
        starts: Mapping[str, Tensor],
        unperturbed: Callable[[], Structure] | None = None,
        attack: object = None,
        initial: Mapping[str, Tensor] | None = None,
        added_noise: float = 0.0,
        past: Callable[[str], pd.DataFrame] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Snapshot:
        """The state of a run that measurements see.

        Args:
            model: In the mode in which it is measured.
            examples: Attacks a network and returns this process's inputs and targets, by the number of the
                attack: all of them under attack 0, and the first ``second_attack`` under attack 1.
            loss: Per-example loss.
            epoch: As the attribute of ``Snapshot``, and so are the others.
            step: See above.
            optimizer: See above.
            train_examples: See above.
            batch_size: See above.
            seed: See above.
            starts: See above.
            unperturbed: See above.
            attack: What attacked the examples; PGD of radius 0 counts as none.
            initial: See above.
            added_noise: See above.
            past: See above.
            group: Processes that share the measurement.
        """
        fixed = examples(model, 0)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        risk = EmpiricalRisk(
            model,
            *fixed,
            loss=loss,
            memory=memory_of(device) if self.memory_mib is None else self.memory_mib * 2**20,
            precision=self.precision,
            batchnorm="eval",
            group=group,
        )

        def again(theta: Tensor | None) -> EmpiricalRisk:
            if theta is None:
                return risk.over(*examples(model, 1))
            moved = risk.at(theta)
            return moved.over(*examples(NetworkAt(moved), 1))

        return Snapshot(
            epoch=epoch,
            step=step,
            risk=risk,
            again=again,
            optimizer=optimizer,
            train_examples=train_examples,
            batch_size=batch_size,
            seed=seed,
            eigenpairs=self.eigenpairs,
            starts=starts,
            unperturbed=unperturbed,
            attack=attack if isinstance(attack, PGD) and attack.eps else None,
            initial=initial,
            added_noise=added_noise,
            past=past,
        )

    def rows(
        self, snapshot: Snapshot, began: float, measurements: Iterable[Measurement] | None = None
    ) -> Iterator[TableRow]:
        """The rows of all measurements, or of the given ones, and what they cost.

        Args:
            snapshot: The state that is measured.
            began: ``time.perf_counter()`` before the snapshot was made, because its attack is a part of the
                cost.
            measurements: Some of the plan's; None for all.
        """
        for measurement in self.measurements.values() if measurements is None else measurements:
            for table, row in measurement.measure(snapshot):
                snapshot.rows.setdefault(table, []).append(row)
                yield table, row
        seconds = time.perf_counter() - began
        when = {"epoch": snapshot.epoch, "step": snapshot.step}
        for name, pairs in snapshot.solved.items():
            yield (
                "costs",
                {
                    **when,
                    "part": f"{name} eigenpairs",
                    "products": pairs.products,
                    "converged": pairs.all_converged,
                    "warm": snapshot.eigenpairs.warm_start and name in snapshot.starts,
                    "seconds": pairs.seconds,
                },
            )
        whole = {"part": "all", "products": None, "converged": None, "warm": None, "seconds": seconds}
        yield "costs", {**when, **whole}

    def next_starts(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Starting vectors (P,) for the next measurement, half precision on the CPU; none without warm start.

        A start needs no more digits, and float32 would take twice the memory.
        """
        if not self.eigenpairs.warm_start:
            return {}
        return {name: pairs.warm_start.bfloat16().cpu() for name, pairs in snapshot.solved.items()}


def memory_of(device: torch.device) -> int:
    """Bytes for passes and kept graphs: 256 MiB on a CPU, and on a GPU at most half of what is free now.

    On a GPU it is a power of two. How examples are divided into passes changes the rounding of sums, and two
    runs should divide them alike although not exactly the same memory is free.
    """
    if device.type != "cuda":
        return _ON_A_CPU
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(2 ** (max(1, free // 2).bit_length() - 1))


class NetworkAt(nn.Module):
    """The network of a risk as a module, at the risk's own point; the network's weights stay as they are.

    Args:
        risk: At a fixed point.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__()
        self._network, self._parameters_there = risk.model, risk.parameters()

    def forward(self, inputs: Any) -> Any:
        """What the network returns at that point."""
        return call_with(self._network, self._parameters_there, inputs)


def parameters_now(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name, on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


@contextmanager
def deployed(model: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """The model as it is used after training: eval mode, and on all processes the first one's statistics.

    Running statistics may differ between ranks until DDP's next forward pass.

    Args:
        model: Afterwards modes and buffers are as before.
        group: Processes that train it together; None for one process.
    """
    own = [] if group is None else [(buffer, buffer.clone()) for buffer in model.buffers()]
    for buffer, _ in own:
        dist.broadcast(buffer, src=0, group=group)
    try:
        # synchronising BatchNorm makes no difference in this mode
        with mode(model, training=False), desynchronized(model):
            yield
    finally:
        for buffer, value in own:
            buffer.copy_(value)
