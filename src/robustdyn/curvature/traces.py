"""The trace of an operator from random probes."""

import time
from dataclasses import dataclass

import torch

from robustdyn.curvature.operators import LinearOperator
from robustdyn.curvature.probes import rademacher


@dataclass(frozen=True)
class TraceResult:
    """An estimated trace.

    Attributes:
        estimate: Tr(A).
        standard_error: Of the estimate, over probes (not over examples: the operator is what it is).
        probes: Random vectors used.
        products: Products with the operator.
        seconds: Wall time.
    """

    estimate: float
    standard_error: float
    probes: int
    products: int
    seconds: float


def hutchinson_trace(operator: LinearOperator, probes: int, generator: torch.Generator) -> TraceResult:
    """Tr(A) ≈ mean of vᵀ A v over random signs v (Hutchinson, Commun. Stat. Simul. 1990).

    Args:
        operator: Symmetric A.
        probes: Number of random vectors, at least two.
        generator: Source of all randomness.

    Raises:
        ValueError: With fewer than two probes: there would be no standard error.
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2 to have a standard error, not {probes}")
    began = time.perf_counter()
    samples = torch.empty(probes, dtype=torch.float64)
    for i in range(probes):
        probe = rademacher(operator.shape[:1], generator, operator.dtype, operator.device)
        samples[i] = torch.dot(probe.double(), operator.matvec(probe).double()).cpu()
    return TraceResult(
        estimate=samples.mean().item(),
        standard_error=(samples.std() / probes**0.5).item(),
        probes=probes,
        products=probes,
        seconds=time.perf_counter() - began,
    )
