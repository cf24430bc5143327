"""The Weight-Curvature Index (arXiv 2410.07719 v1), with its error and the bounds around it.

Shapes: L weight matrices (convolution kernels and linear weights), m measured examples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from robustdyn.theory._validation import (
    Array,
    covariance_matrix,
    finite,
    non_negative,
    positive,
    vector,
)

# Per-example contributions must average to the given traces. Float32 sums over 1e5 terms stay far inside this
# share; a sum that was passed as a mean does not.
_CONSISTENCY = 1e-2


@dataclass(frozen=True, eq=False)
class WeightCurvatureIndex:
    """WCI = Σ_k √(‖W_k‖²_F Tr H_k), with its error and its parts.

    Attributes:
        value: The index.
        standard_error: Of ``value``, to first order; NaN when no error of the traces was given. Clamped
            layers add nothing to it.
        terms: √(‖W_k‖² Tr H_k) (L,).
        cauchy_schwarz_bound: √(Σ‖W_k‖²) √(Σ Tr H_k) ≥ ``value``.
        clamped_layers: Number of layers whose estimated trace was negative and set to 0.
        weight_norm_sq: ‖W_k‖²_F (L,), as given.
        hessian_trace: Tr H_k (L,), after clamping.
    """

    value: float
    standard_error: float
    terms: Array
    cauchy_schwarz_bound: float
    clamped_layers: int
    weight_norm_sq: Array
    hessian_trace: Array

    @property
    def weight_factor(self) -> float:
        """√(Σ‖W_k‖²), the first factor of the Cauchy–Schwarz bound."""
        return float(np.sqrt(self.weight_norm_sq.sum()))

    @property
    def curvature_factor(self) -> float:
        """√(Σ Tr H_k) over the weight matrices, the second factor of the Cauchy–Schwarz bound."""
        return float(np.sqrt(self.hessian_trace.sum()))

    def optimal_layer_variance(self, beta: float) -> Array:
        """``optimal_layer_variance`` at this index's norms and traces; (L,)."""
        return optimal_layer_variance(self.weight_norm_sq, self.hessian_trace, beta)


def weight_curvature_index(
    weight_norm_sq: ArrayLike,
    hessian_trace: ArrayLike,
    *,
    standard_error: ArrayLike | None = None,
    covariance: ArrayLike | None = None,
    example_traces: ArrayLike | None = None,
) -> WeightCurvatureIndex:
    """The index and its error, equations (39) to (44) of docs/theory.md.

    Give at most one of the three descriptions of the traces' error. A negative trace estimate counts as 0.

    Args:
        weight_norm_sq: ‖W_k‖²_F (L,) ≥ 0.
        hessian_trace: Tr H_k (L,), mean over examples; any sign.
        standard_error: (L,) ≥ 0 or one number, standard errors of the traces, independent between layers.
        covariance: (L, L), covariance of the trace estimates.
        example_traces: (m, L), m ≥ 2, contributions of single examples, whose mean over the first axis is
            ``hessian_trace``; keeps the correlation between layers.

    Returns:
        Frozen result; see ``WeightCurvatureIndex``.

    Raises:
        ValueError: Shapes that do not match, a negative norm, more than one error description, or
            contributions whose mean is not the trace.

    Source: arXiv 2410.07719 v1, definition 2.6; the error is ours (delta method).
    """
    norms = vector("weight_norm_sq", non_negative("weight_norm_sq", weight_norm_sq))
    estimate = vector("hessian_trace", finite("hessian_trace", hessian_trace), norms.size)
    traces = np.maximum(estimate, 0.0)
    terms = np.sqrt(norms * traces)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        gradient = np.where(traces > 0, 0.5 * np.sqrt(norms / traces), 0.0)
    return WeightCurvatureIndex(
        value=float(terms.sum()),
        standard_error=_propagate(gradient, estimate, standard_error, covariance, example_traces),
        terms=terms,
        cauchy_schwarz_bound=float(np.sqrt(norms.sum()) * np.sqrt(traces.sum())),
        clamped_layers=int((estimate < 0).sum()),
        weight_norm_sq=norms,
        hessian_trace=traces,
    )


def _propagate(
    gradient: Array,
    estimate: Array,
    standard_error: ArrayLike | None,
    covariance: ArrayLike | None,
    example_traces: ArrayLike | None,
) -> float:
    """Delta method, equations (42) to (44): ``gradient`` (L,) holds ∂WCI/∂Tr H_k = ½ √(‖W_k‖² / Tr H_k)."""
    given = [x is not None for x in (standard_error, covariance, example_traces)]
    if sum(given) > 1:
        raise ValueError(f"{sum(given)} error descriptions were given; at most 1 may be")
    if standard_error is not None:
        errors = np.broadcast_to(non_negative("standard_error", standard_error), gradient.shape)
        return float(np.linalg.norm(gradient * errors))
    if covariance is not None:
        matrix = covariance_matrix("covariance", covariance, gradient.size)
        return float(np.sqrt(max(0.0, float(gradient @ matrix @ gradient))))
    if example_traces is not None:
        return _over_examples(gradient, estimate, finite("example_traces", example_traces))
    return float("nan")


def _over_examples(gradient: Array, estimate: Array, contributions: Array) -> float:
    """Standard error from contributions (m, L) of single examples, equation (44)."""
    if contributions.ndim != 2 or contributions.shape[0] < 2 or contributions.shape[1] != gradient.size:
        raise ValueError(
            f"example_traces has shape {contributions.shape}; it must be (m, {gradient.size}), m >= 2"
        )
    gap = float(np.abs(contributions.mean(axis=0) - estimate).max())
    if gap > _CONSISTENCY * float(np.abs(estimate).max()):
        raise ValueError(f"the mean of example_traces is {gap:g} away from hessian_trace; they must agree")
    influence = contributions @ gradient
    return float(influence.std(ddof=1) / np.sqrt(influence.size))


def optimal_layer_variance(weight_norm_sq: ArrayLike, hessian_trace: ArrayLike, beta: float) -> Array:
    """σ_k² = ‖W_k‖_F / √(β Tr H_k), equation (38) of docs/theory.md.

    The variance that minimises ‖W_k‖²/(2βσ²) + ½ σ² Tr H_k; the minimum summed over layers is WCI / √β.

    Args:
        weight_norm_sq: ‖W_k‖²_F (L,) ≥ 0.
        hessian_trace: Tr H_k (L,); a trace ≤ 0 has no finite optimum and gives inf.
        beta: β > 0, the bound's inverse temperature.

    Returns:
        (L,), squared unit of the weights.

    Raises:
        ValueError: β ≤ 0, a negative norm, or a non-finite entry.

    Source: arXiv 2410.07719 v1, proof of theorem 2.5.
    """
    norms = non_negative("weight_norm_sq", weight_norm_sq)
    traces = finite("hessian_trace", hessian_trace)
    scale = positive("beta", beta)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.where(traces > 0, np.sqrt(norms / (scale * traces)), np.inf))
