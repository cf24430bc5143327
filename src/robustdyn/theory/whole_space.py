"""The law of momentum SGD along all directions at once, from spectral measures of H and of the noise.

Shapes: j nodes of a quadrature, c cells of the curvature axis, N optimiser steps.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustdyn.theory._validation import Array, IntArray, finite, non_negative, positive, vector
from robustdyn.theory.stationary import stationary_state_covariance
from robustdyn.theory.trajectory import Interpolation, MeasuredSpectrum, propagate

_PER_DECADE, _DECADES = 4, 6  # of the cells' grid, on either side of zero
_LEAST = 0.5  # directions that a cell must hold


@dataclass(frozen=True, eq=False)
class SpectralMeasure:
    """A measure on the curvature axis: the nodes of the quadratures from several random vectors.

    Attributes:
        curvature: λ (j,).
        mass: (j,) ≥ 0, of each vector's own quadrature; the measure is the mean over vectors.
        probe: (j,), the number of the random vector.

    Raises:
        ValueError: Shapes that disagree, a negative mass, or a value that is not finite.
    """

    curvature: Array
    mass: Array
    probe: IntArray

    def __post_init__(self) -> None:
        curvature = vector("curvature", finite("curvature", self.curvature))
        object.__setattr__(self, "curvature", curvature)
        object.__setattr__(self, "mass", vector("mass", non_negative("mass", self.mass), curvature.size))
        object.__setattr__(self, "probe", np.asarray(self.probe))

    @property
    def probes(self) -> list[int]:
        """The random vectors."""
        return [int(probe) for probe in np.unique(self.probe)]

    @property
    def share(self) -> Array:
        """What each node adds to the mean over vectors (j,)."""
        return self.mass / len(self.probes)

    def without(self, probe: int) -> "SpectralMeasure":
        """The measure of the other random vectors."""
        kept = self.probe != probe
        return SpectralMeasure(self.curvature[kept], self.mass[kept], self.probe[kept])

    def without_zeros(self, count: float) -> "SpectralMeasure":
        """The measure without ``count`` eigenvalues that are known to be zero.

        They are taken from the nodes next to zero of each vector, where a quadrature puts them.
        """
        mass = self.mass.copy()
        for probe in self.probes:
            left = count
            own = np.flatnonzero(self.probe == probe)
            for node in own[np.argsort(np.abs(self.curvature[own]))]:
                taken = min(left, mass[node])
                mass[node] -= taken
                left -= taken
        return replace(self, mass=mass)

    def shortened(self) -> "SpectralMeasure":
        """What the same vectors would have given with half the steps.

        Nodes and masses determine the recursion that they come from: it is that of the diagonal matrix of the
        nodes, started from the roots of the masses.
        """
        parts = []
        for probe in self.probes:
            own = self.probe == probe
            nodes, masses = _half_of(self.curvature[own], self.mass[own])
            parts.append((nodes, masses, np.full(nodes.size, probe)))
        return SpectralMeasure(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def in_cells(self, edges: Array) -> Array:
        """The mass in each cell (c,)."""
        cell = cells_of(self.curvature, edges)
        return np.bincount(cell, weights=self.share, minlength=len(edges) - 1).astype(np.float64)


def _half_of(nodes: Array, masses: Array) -> tuple[Array, Array]:
    """Nodes and masses after half the Lanczos steps, from those after all of them."""
    total = masses.sum()
    basis = [np.sqrt(masses / total)]
    for _ in range(nodes.size // 2 - 1):
        image = nodes * basis[-1]
        for _ in range(2):  # reorthogonalised in full
            image = image - np.array(basis).T @ (np.array(basis) @ image)
        length = np.linalg.norm(image)
        if not length > np.finfo(float).eps * np.abs(nodes).max():
            break
        basis.append(image / length)
    rows = np.array(basis)
    values, vectors = np.linalg.eigh((rows * nodes) @ rows.T)
    return values, total * vectors[0] ** 2


def cells_of(curvature: Array, edges: Array) -> IntArray:
    """The cell (j,) of each node; ``edges`` (c + 1,) fall, and cell 0 holds the largest curvature."""
    rising = np.searchsorted(edges[::-1], curvature, side="left")
    return np.asarray((len(edges) - 1 - rising).clip(0, len(edges) - 2))


def cell_edges(plain: SpectralMeasure, noise: SpectralMeasure) -> Array:
    """Edges (c + 1,), falling, of cells in which the noise of a direction can be told.

    The cells are four to a decade on either side of zero. From outside to the centre, a cell joins the next
    one unless it holds half a direction, and nodes with a mass of at least two vectors of both measures, so
    that the ratio of the measures exists, and also without any one vector.
    """
    largest = float(np.abs(np.concatenate([plain.curvature, noise.curvature])).max())
    grid = largest * 10.0 ** (-np.arange(1, _PER_DECADE * _DECADES + 1) / _PER_DECADE)

    def resolved(low: float, high: float) -> bool:
        inside = []
        for measure in (plain, noise):
            held = (measure.curvature > low) & (measure.curvature <= high) & (measure.mass > 0)
            if len(np.unique(measure.probe[held])) < 2:
                return False
            inside.append(measure.share[held].sum())
        return bool(inside[0] >= _LEAST)

    above, below = [np.inf], [-np.inf]
    for edge in grid:
        if resolved(edge, above[-1]):
            above.append(edge)
        if resolved(below[-1], -edge):
            below.append(-edge)
    while not resolved(below[-1], above[-1]) and len(above) + len(below) > 2:
        (above if len(above) > 1 else below).pop()
    return np.array([*above, *below[::-1]])


@dataclass(frozen=True, eq=False)
class CurvatureCells:
    """All directions at one step, gathered by curvature: what is needed to follow them on.

    Attributes:
        directions: (c,) > 0, how many each cell holds; the first one holds the sharpest.
        curvature: Mean λ (c,).
        noise: Mean γ (c,) > 0.
        covariance: Mean covariance of (x, v) (c, 2, 2); NaN where there is no law.
    """

    directions: Array
    curvature: Array
    noise: Array
    covariance: Array

    def at_ranks(self, rank: Array, directions: float) -> "CurvatureCells":
        """What was known of the directions of these ranks.

        Ranks count from the sharper end in the sharper half and from the other end in the other half, because
        the number of directions may differ by those at zero.

        Args:
            rank: (j,), numbers of directions that are sharper.
            directions: Of all cells of the other step.
        """
        edges = np.cumsum(self.directions)
        shifted = np.where(rank < directions / 2, rank, rank + edges[-1] - directions)
        cell = np.searchsorted(edges, shifted, side="right").clip(0, len(edges) - 1)
        return CurvatureCells(*(part[cell] for part in vars(self).values()))


@dataclass(frozen=True, eq=False)
class WholeSpaceLaw:
    """Sums over all directions of the posterior at one step, and its cells.

    Attributes:
        curvature_sum: Σ λσ² over the directions of positive curvature.
        negative_curvature_sum: The same over those of negative curvature; together they are Tr(HΣ).
        variance_sum: Tr Σ.
        log_variance_sum: ln det Σ, if the noise is a function of the curvature.
        directions: How many the sums cover.
        cells: What is carried on; ``cells.noise`` is γ as a function of λ.
    """

    curvature_sum: float
    negative_curvature_sum: float
    variance_sum: float
    log_variance_sum: float
    directions: float
    cells: CurvatureCells


def whole_space_law(
    plain: SpectralMeasure,
    noise: SpectralMeasure,
    edges: Array,
    learning_rate: ArrayLike,
    *,
    momentum: float,
    weight_decay: float,
    interpolation: Interpolation,
    before: CurvatureCells | None = None,
) -> WholeSpaceLaw:
    """The law along all directions after some steps, equations (47) to (50) of docs/theory.md.

    γ is the ratio of the two measures in each cell. Every node of either measure is a direction whose λ and γ
    run from those of the same rank ``before`` to its own. The past γ of a node of the noise is the mean over
    its present cell. A direction of negative curvature is followed as
    if it were flat. One that was too sharp for the rate starts from the stationary law as soon as it has one;
    while it is too sharp, the sums are NaN.

    Args:
        plain: Spectral measure of H; its mass is the number of directions.
        noise: The same, weighted with the mini-batch noise; its mass is Tr C.
        edges: As from ``cell_edges``.
        learning_rate: η (N,) > 0 of the steps since ``before``.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.
        interpolation: As of ``MeasuredSpectrum``.
        before: All directions before these steps; None for a run that starts from one point, and then λ and
            γ are held at their present values.

    Raises:
        ValueError: Invalid hyperparameters or rates.

    Source: ours.
    """
    rates = vector("learning_rate", positive("learning_rate", learning_rate))
    count = plain.in_cells(edges)
    gamma = noise.in_cells(edges) / count
    curvature = np.concatenate([plain.curvature, noise.curvature])
    cell = cells_of(curvature, edges)
    of_plain, of_noise = np.split(np.arange(curvature.size), [plain.curvature.size])
    if before is not None:
        before = before.at_ranks(_ranks(plain, curvature), float(count.sum()))
        # σ² of a noise node is divided by the γ of its cell. Its past is therefore that of its rank per unit
        # of noise, times the past γ of the cell: else a rank from a much louder cell would make the sums
        past = np.bincount(cell[of_plain], plain.share * before.noise[of_plain], count.size) / count
        scale = np.ones(curvature.size)
        scale[of_noise] = past[cell[of_noise]] / before.noise[of_noise]
        before = replace(
            before, noise=scale * before.noise, covariance=scale[:, None, None] * before.covariance
        )
    covariance = _followed(curvature, gamma[cell], before, rates, momentum, weight_decay, interpolation)
    loud = noise.share > 0
    per_noise = (noise.share * covariance[of_noise, 0, 0] / gamma[cell[of_noise]])[loud]
    weights = plain.share / count[cell[of_plain]]
    mean = np.zeros((count.size, 2, 2))
    held = weights > 0  # no direction of a node without mass is followed
    np.add.at(mean, cell[of_plain][held], weights[held, None, None] * covariance[of_plain][held])
    middle = np.bincount(cell[of_plain], weights=weights * plain.curvature, minlength=count.size)
    heard = noise.curvature[loud]
    return WholeSpaceLaw(
        curvature_sum=float(per_noise @ heard.clip(min=0.0)),
        negative_curvature_sum=float(per_noise @ heard.clip(max=0.0)),
        variance_sum=float(per_noise.sum()),
        log_variance_sum=float(plain.share[held] @ np.log(covariance[of_plain, 0, 0][held])),
        directions=float(count.sum()),
        cells=CurvatureCells(count, middle.astype(np.float64), gamma, mean),
    )


def _ranks(plain: SpectralMeasure, curvature: Array) -> Array:
    """How many directions are sharper than each λ (j,); half of those of a node at λ itself count."""
    order = np.argsort(-plain.curvature)
    falling, mass = -plain.curvature[order], plain.share[order]
    total = np.append(0.0, np.cumsum(mass))
    above, not_below = (np.searchsorted(falling, -curvature, side=side) for side in ("left", "right"))
    return np.asarray((total[above] + total[not_below]) / 2)


def _followed(
    curvature: Array,
    noise: Array,
    before: CurvatureCells | None,
    rates: Array,
    momentum: float,
    weight_decay: float,
    interpolation: Interpolation,
) -> Array:
    """The covariance of (x, v) of each direction (j, 2, 2) after the steps; NaN where there is no law."""
    pull = curvature.clip(min=0.0)
    if before is None:
        known, lam, gamma = [0], pull[None], noise[None]
        start = np.zeros((pull.size, 2, 2))
    else:
        known = [0, rates.size]
        lam = np.stack([before.curvature.clip(min=0.0), pull])
        gamma = np.stack([before.noise, noise])
        start = before.covariance

    def along(chosen: NDArray[np.bool_]) -> MeasuredSpectrum:
        return MeasuredSpectrum(np.array(known), lam[:, chosen], gamma[:, chosen], interpolation)

    limit = 2 * (1 + momentum)
    sharpest = float(rates.max()) * (lam.max(axis=0) + weight_decay)
    suspect = sharpest >= limit  # unless the largest λ and the largest η were not of one step
    if before is not None and suspect.any():
        each = along(suspect).between(0, rates.size)[0] + weight_decay
        sharpest[suspect] = (rates[:, None] * each).max(axis=0)
    lawful = (sharpest < limit) & np.isfinite(start).all(axis=(1, 2))
    now = float(rates[-1])
    settled = ~lawful & (now * (pull + weight_decay) < limit) & (pull + weight_decay > 0)
    found = np.full((pull.size, 2, 2), np.nan)
    if lawful.any():
        path = propagate(
            along(lawful),
            rates,
            momentum=momentum,
            weight_decay=weight_decay,
            record_steps=[rates.size],
            initial_covariance=start[lawful],
        )
        found[lawful] = path.covariance[0]
    if settled.any():
        found[settled] = stationary_state_covariance(
            pull[settled], noise[settled], learning_rate=now, momentum=momentum, weight_decay=weight_decay
        )
    return found
