"""Hessian-block traces, one for each parameter tensor."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from robustdyn.curvature.empirical_risk import EmpiricalRisk
from robustdyn.curvature.example_gradients import UnsupportedPassError
from robustdyn.curvature.gauss_newton_blocks import (
    exact_squared_norms,
    identity_obstacle,
    number_of_outputs,
    sampled_squared_norms,
)
from robustdyn.curvature.lanczos import EigenResult
from robustdyn.curvature.probes import child, rademacher, source
from robustdyn.curvature.risk_function import BatchNormMode
from robustdyn.defaults import default

_FEWEST_CONTROLLED = 6  # with fewer probes the best multiple is too uncertain to help

TraceMethod = Literal["auto", "gauss_newton", "hutchinson"]
Estimator = Literal["gauss_newton_exact", "gauss_newton_sampled", "hutchinson"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LayerTraces:
    """Tr(H_kk) for L parameter tensors, float64 on the CPU.

    Attributes:
        names: The L tensors, in the order of θ.
        traces: (L,). The Gauss-Newton estimates cannot be negative. Hutchinson's can be, and are not changed.
        standard_errors: (L,). Gauss-Newton: over examples, as a sample of a population; when sampled, the
            per-example values contain the probes' noise, so the same spread covers both. Hutchinson: over
            probes only, for the given examples.
        per_example: (m, L), whose mean over examples is ``traces``; None for Hutchinson.
        estimator: The estimator that was used.
        reason: Why it was used.
        deflated: Number of known eigenpairs whose noise was removed.
        batchnorm: The statistics BatchNorm used; with batch statistics the traces are another quantity.
        products: Reverse passes over the examples: K exactly, ``probes`` sampled; for Hutchinson the
            layer-restricted Hessian products, probes · L.
        seconds: Wall time, checks included.
    """

    names: tuple[str, ...]
    traces: Tensor
    standard_errors: Tensor
    per_example: Tensor | None = field(repr=False)
    estimator: Estimator
    reason: str
    deflated: int
    batchnorm: BatchNormMode
    products: int
    seconds: float

    def sum_standard_error(self, tensors: Sequence[int]) -> float:
        """Standard error of the summed traces of some tensors, given by their places in ``names``.

        With per-example values the correlation between tensors is kept; Hutchinson's probes are independent.
        """
        places = list(tensors)
        if self.per_example is None:
            return float(self.standard_errors[places].square().sum().sqrt())
        return float(_spread(self.per_example[:, places].sum(dim=1)))


def layer_traces(
    risk: EmpiricalRisk,
    *,
    method: TraceMethod = "auto",
    probes: int = default("measure/default", "measurements.weight_curvature.probes"),
    exact_classes_up_to: int = default(
        "measure/default", "measurements.weight_curvature.exact_classes_up_to"
    ),
    generator: torch.Generator | None = None,
    weights_only: bool = True,
    known: EigenResult | None = None,
) -> LayerTraces:
    """The trace of every diagonal block of the Hessian, by the best estimator that is valid.

    The Gauss-Newton route (``robustdyn.curvature.gauss_newton_blocks``) is exact for piecewise linear
    networks under cross-entropy. It is used only if the graph that autograd recorded shows that these
    conditions hold, on every chunk. Otherwise Hutchinson's estimator is applied to one block at a time. The
    shortcut v_kᵀ(Hv)_k from whole-model products is not offered, because its noise, Σ_{j≠k}‖H_kj‖_F², is 1 to
    12 times the trace per probe.

    Args:
        risk: The risk.
        method: ``"auto"``, or one route regardless of its cost. ``"gauss_newton"`` is refused if it is not
            exact.
        probes: Random vectors for the sampled and Hutchinson estimators (at least two for Hutchinson).
        exact_classes_up_to: With at most this many classes the Gauss-Newton route is exact, one reverse pass
            for each class; with more it is sampled.
        generator: Source of all randomness; None gives the same numbers at every call.
        weights_only: Measure tensors with two or more dimensions only: convolution kernels and linear
            weights.
        known: Leading eigenpairs of the risk's Hessian, if they are available. They remove their part of the
            noise from Hutchinson's estimator.

    Raises:
        ValueError: If the method is unknown, the Gauss-Newton route is demanded but not valid, probes are too
            few, or no tensor is left to measure.
        FloatingPointError: If a trace is not finite.
    """
    began = time.perf_counter()
    generator = source(generator)
    if method not in ("auto", "gauss_newton", "hutchinson"):
        raise ValueError(f"method must be 'auto', 'gauss_newton' or 'hutchinson', not {method!r}")
    names = tuple(n for n in risk.names if len(risk.shapes[n]) >= 2 or not weights_only)
    if not names:
        raise ValueError(
            "weights_only leaves no tensor: the risk measures no convolution kernel or linear weight"
        )

    reason = "requested"
    if method != "hutchinson":
        obstacle = identity_obstacle(risk, names, generator)
        if obstacle is None:
            try:
                return _finite(_gauss_newton(risk, names, probes, exact_classes_up_to, generator, began))
            except UnsupportedPassError as error:  # some examples take another path through the network
                obstacle = str(error)
        if method == "gauss_newton":
            raise ValueError(
                f"method='gauss_newton' is not exact here: {obstacle}; use 'auto' or 'hutchinson'"
            )
        reason = f"the Gauss-Newton identity does not hold: {obstacle}"
        _log.warning("layer traces by Hutchinson's estimator: %s", reason)
    return _finite(_hutchinson(risk, names, probes, generator, known, reason, began))


def _finite(result: LayerTraces) -> LayerTraces:
    if not bool(result.traces.isfinite().all()):
        worst = result.names[int((~result.traces.isfinite()).nonzero()[0])]
        raise FloatingPointError(
            f"the trace of {worst!r} is not finite: on some examples the loss or its derivatives are not"
        )
    return result


def _gauss_newton(
    risk: EmpiricalRisk,
    names: tuple[str, ...],
    probes: int,
    exact_classes_up_to: int,
    generator: torch.Generator,
    began: float,
) -> LayerTraces:
    classes = number_of_outputs(risk)
    estimator: Estimator
    if classes <= exact_classes_up_to:
        estimator = "gauss_newton_exact"
        per_example, products = exact_squared_norms(risk, names)
        reason = f"the identity holds and {classes} classes are at most {exact_classes_up_to}"
    else:
        if probes < 1:
            raise ValueError(f"probes must be positive to sample {classes} classes, not {probes}")
        estimator = "gauss_newton_sampled"
        per_example, products = sampled_squared_norms(risk, names, probes, generator)
        reason = f"the identity holds and {classes} classes are more than {exact_classes_up_to}"
    # One example has no spread: its standard error is nan, which says so.
    return LayerTraces(
        names=names,
        traces=per_example.mean(dim=0),
        standard_errors=_spread(per_example),
        per_example=per_example,
        estimator=estimator,
        reason=reason,
        deflated=0,
        batchnorm=risk.batchnorm,
        products=products,
        seconds=time.perf_counter() - began,
    )


def _hutchinson(
    risk: EmpiricalRisk,
    names: tuple[str, ...],
    probes: int,
    generator: torch.Generator,
    known: EigenResult | None,
    reason: str,
    began: float,
) -> LayerTraces:
    """v_kᵀ H_kk v_k with the probe restricted to one tensor; one graph serves all tensors and probes.

    Each chunk has its own probes. This is still unbiased, and usually less noisy than shared probes. The
    random numbers therefore depend on ``chunk_size``.

    Known eigenpairs are a control variate: Σ_i λ_i (u_{i,k}ᵀ v_k)² has the known mean Σ_i λ_i ‖u_{i,k}‖², and
    the leading directions often cause most of the noise. The pairs also contain the coupling between layers,
    which is not in H_kk. Therefore the best multiple of the control is subtracted, and not all of it.
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2 to have a standard error, not {probes}")
    deflation = _Deflation(risk, known)
    seeds = _chunk_generators(risk, generator)
    places = [risk.names.index(name) for name in names]
    with risk.guard(products=True):
        samples = torch.zeros(2, probes, len(names), dtype=torch.float64, device=risk.device)
        for (tape, _), draws in zip(risk.tapes(), seeds, strict=True):
            for column, place in enumerate(places):
                for probe in range(probes):
                    vector = rademacher(tuple(risk.shapes[names[column]]), draws, risk.dtype, risk.device)
                    samples[0, probe, column] += tape.block_form(place, vector)
                    samples[1, probe, column] += tape.examples * deflation.form(names[column], vector)
    forms, controls = risk.shards.sum(samples).cpu() / risk.examples
    means = torch.stack([deflation.trace(name) for name in names])
    samples = _controlled(forms, controls - means)
    return LayerTraces(
        names=names,
        traces=samples.mean(dim=0),
        standard_errors=_spread(samples),
        per_example=None,
        estimator="hutchinson",
        reason=reason,
        deflated=deflation.directions if probes >= _FEWEST_CONTROLLED else 0,
        batchnorm=risk.batchnorm,
        products=probes * len(names),
        seconds=time.perf_counter() - began,
    )


def _controlled(samples: Tensor, controls: Tensor) -> Tensor:
    """Samples (n, L) minus the best multiple of controls (n, L) of mean zero.

    The multiple for one sample is the regression slope over the others, so that the mean stays unbiased.
    """
    n = len(samples)
    if n < _FEWEST_CONTROLLED or not bool(controls.any()):
        return samples
    slopes = torch.empty_like(samples)
    for left_out in range(n):
        others = [i for i in range(n) if i != left_out]
        x, y = samples[others] - samples[others].mean(dim=0), controls[others]
        power = y.square().sum(dim=0)
        slopes[left_out] = torch.where(power > 0, (x * y).sum(dim=0) / power, 0.0)
    return samples - slopes * controls


class _Deflation:
    """Σ_i λ_i u_i u_iᵀ of known eigenpairs, block by block."""

    def __init__(self, risk: EmpiricalRisk, known: EigenResult | None) -> None:
        self.directions = 0 if known is None else len(known.eigenvalues)
        self._risk, self._known = risk, known
        if known is not None:
            self._values = known.eigenvalues.to(risk.device)

    def form(self, name: str, vector: Tensor) -> Tensor | float:
        """Its quadratic form with a probe of the tensor's shape."""
        if self._known is None:
            return 0.0
        block = self._known.eigenvectors[self._risk.blocks[name]]
        return self._values @ (vector.reshape(-1) @ block).double().square()

    def trace(self, name: str) -> Tensor:
        """The trace of the tensor's block."""
        if self._known is None:
            return torch.zeros((), dtype=torch.float64)
        block = self._known.eigenvectors[self._risk.blocks[name]]
        return (self._values @ block.double().square().sum(dim=0)).cpu()


def _chunk_generators(risk: EmpiricalRisk, generator: torch.Generator) -> list[torch.Generator]:
    """One for each of this process's chunks, different from all other chunks' everywhere."""
    chunks = risk.shards.each(len(range(0, risk.held, risk.chunk_size)))
    everybody = [child(generator) for _ in range(sum(chunks))]
    first = sum(chunks[: risk.shards.rank])
    return everybody[first : first + chunks[risk.shards.rank]]


def _spread(samples: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension."""
    error: Tensor = samples.std(dim=0) / len(samples) ** 0.5
    return error
