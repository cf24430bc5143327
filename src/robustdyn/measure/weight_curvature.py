"""Measures the Weight-Curvature Index and its layers."""

import time
from collections.abc import Iterator
from typing import ClassVar

from robustdyn.complexity.index import index_of_layers
from robustdyn.curvature import layer_traces
from robustdyn.defaults import default
from robustdyn.measure.plan import TableRow
from robustdyn.measure.snapshot import Snapshot
from robustdyn.records.schema import CAUCHY_SCHWARZ_BOUND, HESSIAN_TRACE, WCI_SE, WCI_TERM, WEIGHT_NORM_SQ


class WeightCurvature:
    """Rows of the ``wci`` and ``layers`` tables (docs/theory.md, section on the Weight-Curvature Index).

    Args:
        probes: Random probes, if the traces are sampled.
        exact_classes_up_to: With at most so many classes the Gauss–Newton traces are exact, at the cost of
            one reverse pass per class.
    """

    tables: ClassVar[tuple[str, ...]] = ("wci", "layers")

    def __init__(
        self,
        *,
        probes: int = default("measure/default", "measurements.weight_curvature.probes"),
        exact_classes_up_to: int = default(
            "measure/default", "measurements.weight_curvature.exact_classes_up_to"
        ),
    ) -> None:
        self._probes = probes
        self._exact_classes_up_to = exact_classes_up_to

    def measure(self, snapshot: Snapshot) -> Iterator[TableRow]:
        """One ``wci`` row, then one ``layers`` row per convolution kernel or linear weight."""
        started = time.perf_counter()
        traces = layer_traces(
            snapshot.risk,
            method="auto",
            probes=self._probes,
            exact_classes_up_to=self._exact_classes_up_to,
            generator=snapshot.generator("layer-traces"),
            weights_only=False,
            known=snapshot.solved.get("hessian"),
        )
        found = index_of_layers(snapshot.risk, traces)
        index, weights, norms = found.index, found.weights, found.norms
        tensors, names = snapshot.risk.parameters(), [traces.names[k] for k in weights]
        trace, error = traces.traces[weights].numpy(), traces.standard_errors[weights].numpy()
        yield (
            "wci",
            {
                "epoch": snapshot.epoch,
                "step": snapshot.step,
                "wci": index.value,
                WCI_SE: index.standard_error,
                WEIGHT_NORM_SQ: sum(norms),
                HESSIAN_TRACE: float(trace.sum()),
                "hessian_trace_se": traces.sum_standard_error(weights),
                "hessian_trace_all": float(traces.traces.sum()),
                "hessian_trace_all_se": traces.sum_standard_error(range(len(traces.names))),
                CAUCHY_SCHWARZ_BOUND: index.cauchy_schwarz_bound,
                "clamped_layers": index.clamped_layers,
                "hvps": traces.products,
                "examples": snapshot.risk.examples,
                "batchnorm": traces.batchnorm,
                "estimator": traces.estimator,
                "seconds": time.perf_counter() - started,
            },
        )
        variances = index.optimal_layer_variance(beta=1.0)
        for layer, name in enumerate(names):
            yield (
                "layers",
                {
                    "epoch": snapshot.epoch,
                    "step": snapshot.step,
                    "layer": name,
                    "numel": tensors[name].numel(),
                    WEIGHT_NORM_SQ: norms[layer],
                    HESSIAN_TRACE: float(trace[layer]),
                    "hessian_trace_se": float(error[layer]),
                    WCI_TERM: float(index.terms[layer]),
                    "optimal_variance": float(variances[layer]),
                },
            )
