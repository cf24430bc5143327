"""Measures the Hessian's whole spectrum, plain and weighted with the gradient noise, and sums over it."""

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from robustdyn.curvature import GradientCovariance, Hessian, SpectralDensity, spectral_density
from robustdyn.defaults import default
from robustdyn.measure.plan import TableRow
from robustdyn.measure.snapshot import Snapshot
from robustdyn.methods import OptimizerState
from robustdyn.records.schema import HESSIAN_TRACE, RITZ_VALUE, WHOLE_SPACE
from robustdyn.theory import MomentumDynamics, curvature_term_per_noise


class Density:
    """Rows of the ``density`` and ``whole_space`` tables, over all directions (docs/theory.md, section 7).

    The rows contain the nodes and weights of the quadrature. From these a density of any resolution can be
    drawn and any other function of the spectrum summed, with its error, without measuring again.

    Args:
        probes: Random sign vectors for the plain spectrum.
        steps: Lanczos steps from each vector, a product with H each; they determine the resolution of the
            bulk.
        noise_probes: Random vectors with the noise's covariance; each costs one gradient besides the steps.
    """

    tables: ClassVar[tuple[str, ...]] = ("density", "whole_space")

    def __init__(
        self,
        *,
        probes: int = default("measure/full", "measurements.density.probes"),
        steps: int = default("measure/full", "measurements.density.steps"),
        noise_probes: int = default("measure/full", "measurements.density.noise_probes"),
    ) -> None:
        for name, value in (("probes", probes), ("noise_probes", noise_probes)):
            if value < 2:
                raise ValueError(f"{name} must be at least 2, to have standard errors, got {value}")
        if steps < 4:
            raise ValueError(f"steps must be at least 4, for half of them give the trace too, got {steps}")
        self._probes, self._steps, self._noise_probes = probes, steps, noise_probes

    def measure(self, snapshot: Snapshot) -> Iterator[TableRow]:
        """The ``density`` rows of both kinds, then one ``whole_space`` row."""
        hessian, covariance = Hessian(snapshot.risk), GradientCovariance(snapshot.risk)
        plain = spectral_density(
            hessian, probes=self._probes, steps=self._steps, generator=snapshot.generator("density-hessian")
        )
        draws = _Draws(snapshot, covariance)
        noise = spectral_density(
            hessian,
            probes=self._noise_probes,
            steps=self._steps,
            generator=snapshot.generator("density-noise"),
            draw=draws.draw,
        )
        # draws have the denominator m, an unbiased C₁ has m − 1
        examples = snapshot.risk.examples
        factor = snapshot.noise_factor * examples / (examples - 1)
        yield from _nodes(snapshot, "hessian", plain, 1.0)
        yield from _nodes(snapshot, "noise", noise, factor)
        yield (
            "whole_space",
            {
                "epoch": snapshot.epoch,
                "step": snapshot.step,
                **_of_hessian(plain),
                **_of_noise(noise, draws, factor, snapshot.optimizer),
                "noise_free_parameters": draws.noise_free,
                "products": plain.products + noise.products,
                "seconds": plain.seconds + noise.seconds,
            },
        )


class _Draws:
    """Draws of the noise, and tracked eigenpairs as a control variate of sums over it.

    The part of a draw z along the eigenpairs, Σ_i (u_iᵀz)² h(λ_i), has the known mean Σ_i γ_i h(λ_i). The
    leading directions are few and noisy, and without this control most of the error would come from them. The
    estimate is unbiased for eigenpairs of any quality. It does without where no measurement before has found
    the eigenpairs.
    """

    def __init__(self, snapshot: Snapshot, covariance: GradientCovariance) -> None:
        self._covariance = covariance
        self._squares: list[Tensor] = []
        self._moved: Tensor | None = None
        self._pairs = snapshot.solved.get("hessian")
        if self._pairs is not None:
            projected = snapshot.projected
            # draws have the denominator m, the projected variances m − 1
            self._expected = projected.variances * (projected.examples - 1) / projected.examples

    def draw(self, generator: torch.Generator) -> Tensor:
        """A draw of the noise (P,); its components along the eigenvectors are kept."""
        z = self._covariance.sample(generator)
        self._moved = z != 0 if self._moved is None else self._moved | (z != 0)
        if self._pairs is not None:
            self._squares.append((z @ self._pairs.eigenvectors).double().square().cpu())
        return z

    @property
    def noise_free(self) -> int:
        """Parameters that no draw has moved, because no example's gradient differs along them.

        Examples whose gradients differ would have to cancel exactly in every draw to be missed.
        """
        assert self._moved is not None
        return int((~self._moved).sum())

    def trace_of(self, density: SpectralDensity, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The same as the density's own ``trace_of``, but with the control variate."""
        samples = density.masses * (density.weights * function(density.nodes)).sum(dim=1)
        if self._pairs is not None:
            samples -= (torch.stack(self._squares) - self._expected) @ function(self._pairs.eigenvalues)
        return float(samples.mean()), float(samples.std() / len(samples) ** 0.5)


def _nodes(snapshot: Snapshot, kind: str, density: SpectralDensity, factor: float) -> Iterator[TableRow]:
    """A row for each node of each random vector."""
    masses = factor * density.masses[:, None] * density.weights
    for probe, length in enumerate(density.lengths.tolist()):
        for index in range(length):
            yield (
                "density",
                {
                    "epoch": snapshot.epoch,
                    "step": snapshot.step,
                    "kind": kind,
                    "probe": probe,
                    "index": index,
                    RITZ_VALUE: float(density.nodes[probe, index]),
                    "mass": float(masses[probe, index]),
                },
            )


def _of_hessian(density: SpectralDensity) -> dict[str, float]:
    """The columns of ``whole_space`` that concern only H."""
    return {
        **_with_error(HESSIAN_TRACE, density.trace_of(lambda values: values)),
        **_with_error("hessian_squared_norm", density.trace_of(torch.square)),
        **_truncated(
            "hessian_negative_trace", lambda part: part.trace_of(lambda v: v.clamp(max=0.0)), density
        ),
        **_with_error("negative_share", density.cumulative(torch.zeros(1))),
        "negative_share_resolution": _resolution_at_zero(density),
    }


def _of_noise(
    density: SpectralDensity, draws: _Draws, factor: float, optimizer: OptimizerState
) -> dict[str, float | None]:
    """Columns of ``whole_space`` on C, whose draws lack ``factor``; some are null except for momentum SGD."""
    law_free = {
        **_with_error("noise_trace", draws.trace_of(density, lambda v: torch.full_like(v, factor))),
        **_with_error("noise_share_nonpositive", density.cumulative(torch.zeros(1))),
    }
    if not optimizer.plain:
        unknown = [n for n in WHOLE_SPACE.names if n.startswith(("noise_share_unstable", "curvature_term_"))]
        return dict.fromkeys(unknown) | law_free
    dynamics = MomentumDynamics(*optimizer[:3])
    edge = torch.tensor([dynamics.stable_eigenvalues[1]], dtype=torch.float64)
    stable, error = density.cumulative(edge)
    return {
        **law_free,
        **_with_error("noise_share_unstable", (1.0 - stable, error)),
        **_truncated(
            "curvature_term_positive_stable",
            lambda part: draws.trace_of(part, _curvature_term(factor, dynamics)),
            density,
        ),
    }


def _curvature_term(factor: float, dynamics: MomentumDynamics) -> Callable[[Tensor], Tensor]:
    """λσ² of a direction in which the draws have unit variance."""

    def term(values: Tensor) -> Tensor:
        return factor * torch.from_numpy(
            curvature_term_per_noise(
                values.numpy(),
                learning_rate=dynamics.learning_rate,
                momentum=dynamics.momentum,
                weight_decay=dynamics.weight_decay,
            )
        )

    return term


def _resolution_at_zero(density: SpectralDensity) -> float:
    """Possible error of the share at or below zero: the larger weight of the two nodes around zero."""
    widths = []
    for nodes, weights, length in zip(density.nodes, density.weights, density.lengths, strict=True):
        below = nodes[:length] <= 0.0
        about = torch.cat([weights[:length][below][-1:], weights[:length][~below][:1]])
        widths.append(float(about.max()))
    return sum(widths) / len(widths)


def _truncated(
    name: str, trace: Callable[[SpectralDensity], tuple[float, float]], density: SpectralDensity
) -> dict[str, float]:
    """A trace that depends on the number of steps, its error, and its relative change with half the steps."""
    whole, error = trace(density)
    half, _ = trace(density.shortened(density.steps // 2))
    change = abs(half / whole - 1.0) if whole else float("nan")
    return {**_with_error(name, (whole, error)), f"{name}_truncation": change}


def _with_error(name: str, estimate: tuple[float | Tensor, float | Tensor]) -> dict[str, float]:
    return {name: float(estimate[0]), f"{name}_se": float(estimate[1])}
