"""Measures the complexity measures of docs/measures.md."""

import difflib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from robustdyn.complexity import MEASURES, ComplexityMeasure, MeasureValue, NetworkOnExamples
from robustdyn.complexity.values import HESSIAN_PRODUCT, trace_gradients
from robustdyn.curvature import EmpiricalRisk
from robustdyn.defaults import default
from robustdyn.measure.plan import TableRow
from robustdyn.measure.snapshot import Snapshot
from robustdyn.records.schema import HESSIAN_TRACE

_MEASURED_ELSEWHERE = {
    "wci": ("wci", "wci"),
    HESSIAN_TRACE: ("wci", "hessian_trace_all"),
    "curvature_term_top_k": ("bounds", "curvature_term_top_k"),
    "log_variance_term_top_k": ("bounds", "log_variance_term_top_k"),
}
"""Measures that other measurements compute as well: the table and column that have their values."""


class ComplexityMeasures:
    """Rows of the ``measures`` table, one for each measure.

    What another measurement of the plan has computed before is taken from it, and a measure that has its row
    already gets no second one. Several processes gather the
    examples, and each computes all measures: they cost little, and so need nothing from each other.

    Args:
        names: ``"without_searches"`` for all measures but those that search for a perturbation and that no
            other measurement has found, ``"all"``, or a list of names.

    Raises:
        ValueError: A name is not known, or there is none.
    """

    tables: ClassVar[tuple[str, ...]] = ("measures",)

    def __init__(
        self,
        *,
        names: Literal["all", "without_searches"] | Sequence[str] = default(
            "measure/measures", "measurements.measures.names"
        ),
    ) -> None:
        self._names = _chosen(names)
        self._searches = names != "without_searches"

    @property
    def measures(self) -> tuple[ComplexityMeasure, ...]:
        """The measures that were chosen."""
        return tuple(MEASURES[name] for name in self._names)

    @property
    def needs_initial(self) -> bool:
        """Whether a measure compares the weights with those before training."""
        return any(measure.needs_initial for measure in self.measures)

    def measure(self, snapshot: Snapshot) -> Iterator[TableRow]:
        """One ``measures`` row for each measure; without a value where it is undefined."""
        network = _network(snapshot)
        recorded = {row["measure"] for row in snapshot.rows.get("measures", ())}
        for measure in self.measures:
            if measure.name in recorded:
                continue
            known = not isinstance(network, str) and measure.name in network.known
            if measure.searches and not (self._searches or known):
                continue
            started = time.perf_counter()
            result = (
                MeasureValue(value=math.nan, undefined=network)
                if isinstance(network, str)
                else measure(network)
            )
            yield (
                "measures",
                {
                    "epoch": snapshot.epoch,
                    "step": snapshot.step,
                    "measure": measure.name,
                    "value": result.value,
                    "value_se": result.standard_error,
                    "gradients": result.gradients,
                    "undefined": result.undefined or None,
                    "seconds": time.perf_counter() - started,
                },
            )


def _chosen(names: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        if names in ("all", "without_searches"):
            return tuple(MEASURES)
        raise ValueError(f"names={names} is not all, without_searches or a list of names")
    for name in names:
        if name not in MEASURES:
            near = difflib.get_close_matches(str(name), MEASURES, n=3)
            known = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(MEASURES)}"
            raise ValueError(f"names has {name}, which is no measure; {known}")
    if not names:
        raise ValueError("names is empty; give all, without_searches or a list of names")
    return tuple(dict.fromkeys(names))


def _network(snapshot: Snapshot) -> NetworkOnExamples | str:
    """The network on all examples of all processes; or why it has no measures."""
    risk = snapshot.risk
    if snapshot.unperturbed is None:
        return "the unperturbed examples are not known"
    adversarial, clean, targets = risk.inputs, snapshot.unperturbed(), risk.targets
    if not (
        isinstance(adversarial, Tensor) and isinstance(clean, Tensor) and adversarial.is_floating_point()
    ):
        return "the measures are of networks whose input is one floating-point tensor"
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        return "the measures are of networks whose targets are classes, one for each example"
    adversarial, clean = (part.to(risk.device, risk.dtype) for part in (adversarial, clean))
    targets = targets.to(risk.device).long()
    if risk.shards.processes > 1:
        adversarial, clean, targets = map(risk.shards.rows, (adversarial, clean, targets))
        risk = EmpiricalRisk(
            risk.model,
            adversarial,
            targets,
            loss=risk.loss,
            chunk_size=max(risk.shards.each(risk.chunk_size)),
            precision=risk.precision,
        )
    return NetworkOnExamples(
        model=risk.model,
        clean=clean,
        adversarial=adversarial,
        targets=targets,
        risk=risk,
        attack=snapshot.attack,
        initial=snapshot.initial,
        known=_known(snapshot),
        seed=snapshot.seed,
    )


def _known(snapshot: Snapshot) -> Mapping[str, MeasureValue]:
    """What other measurements of this epoch have found, at the cost of finding it."""
    known = {}
    pairs = snapshot.solved.get("hessian")
    search = 0.0 if pairs is None else HESSIAN_PRODUCT * pairs.products
    for name, (table, column) in _MEASURED_ELSEWHERE.items():
        for row in snapshot.rows.get(table, ()):
            value = float(row[column])
            if not math.isnan(value):
                cost = trace_gradients(row["estimator"], row["hvps"]) if table == "wci" else search
                known[name] = MeasureValue(
                    value=value, standard_error=row.get(f"{column}_se"), gradients=cost
                )
    if pairs is not None and bool(pairs.converged[0]):
        known["hessian_lambda_1"] = MeasureValue(value=float(pairs.eigenvalues[0]), gradients=search)
    return known
