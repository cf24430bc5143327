"""Measures the slope of the gradient whose attack follows the weights, along leading Hessian directions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from robustdyn.curvature import gradient_projections
from robustdyn.defaults import default
from robustdyn.measure.plan import TableRow
from robustdyn.measure.snapshot import Snapshot, double_sampling_error
from robustdyn.records.schema import REFRESHED_SLOPE, SLOPE_RATIO

Array = NDArray[np.float64]


class RefreshedSlope:
    """Rows of the ``slopes`` table, over the k algebraically largest Hessian directions.

    Costs 2k gradients of the examples that are attacked a second time, each with its attack.

    Args:
        distance: Distance of the two points of a difference from the weights, as a multiple of
            ``slope_distances``; > 0.

    Raises:
        ValueError: ``distance`` is not positive.
    """

    tables: ClassVar[tuple[str, ...]] = ("slopes",)

    def __init__(
        self, *, distance: float = default("measure/slopes", "measurements.refreshed_slope.distance")
    ) -> None:
        if not distance > 0:
            raise ValueError(f"distance must be positive, got {distance}")
        self._distance = distance

    def measure(self, snapshot: Snapshot) -> Iterator[TableRow]:
        """One ``slopes`` row for each direction."""
        distances = self._distance * slope_distances(snapshot)
        found = refreshed_slopes(snapshot, distances)
        for index in range(len(distances)):
            yield (
                "slopes",
                {
                    "epoch": snapshot.epoch,
                    "step": snapshot.step,
                    "index": index,
                    "distance": distances[index],
                    REFRESHED_SLOPE: found.slopes[index],
                    f"{REFRESHED_SLOPE}_se": found.errors[index],
                    SLOPE_RATIO: found.ratios[index],
                    f"{SLOPE_RATIO}_se": found.ratio_errors[index],
                },
            )


@dataclass(frozen=True, eq=False)
class RefreshedSlopes:
    """Slopes along k directions, J_ii of equation (25a) in docs/theory.md.

    Attributes:
        slopes: (k,), of the mean gradient along the direction, the attack repeated at each point. The
            curvature of ``along`` plus what the motion of the attack adds to it.
        errors: (k,), standard errors over examples.
        ratios: (k,), the mean slope of the examples over their mean slope while they are held fixed, which is
            their λ.
        ratio_errors: (k,), standard errors over examples, to first order.
    """

    slopes: Array
    errors: Array
    ratios: Array
    ratio_errors: Array


def slope_distances(snapshot: Snapshot) -> Array:
    """(k,): how far along a direction the mean gradient changes by one example's standard deviation.

    This is √C₁ / |λ|. It needs no optimiser, and becomes shorter as the examples are fitted, as the range
    does over which the loss is quadratic.
    """
    deviations = snapshot.along.variances**0.5
    return np.asarray(deviations / snapshot.hessian.eigenvalues.abs().numpy())


def refreshed_slopes(snapshot: Snapshot, distances: Array) -> RefreshedSlopes:
    """How the mean gradient changes along the leading directions, if the attack is repeated at each point.

    Central differences, from the same random starts of the attack at both ends, beside the same differences
    with the examples held fixed. What the loss's higher derivatives and its kinks do to both largely cancels,
    so that the motion of the attack remains.

    Args:
        snapshot: Its ``again`` are the examples.
        distances: h (k,) > 0: from the weights to either end.
    """
    along, directions = snapshot.along, snapshot.hessian.eigenvectors
    held = snapshot.again(None)
    theta, s = held.theta(), held.examples
    fixed, refreshed = np.zeros((2, s, len(distances)))
    for index, distance in enumerate(distances):
        direction = directions[:, index : index + 1]
        for sign in (1.0, -1.0):
            there = theta + sign * distance * direction[:, 0]
            for found, risk in ((fixed, held.at(there)), (refreshed, snapshot.again(there))):
                along_it = gradient_projections(risk, direction)[:, 0].double().cpu().numpy()
                found[:, index] += along_it * sign / (2 * distance)
    motion = refreshed - fixed
    ratios = refreshed.mean(axis=0) / fixed.mean(axis=0)
    spread = (refreshed - ratios * fixed).std(axis=0, ddof=1)
    return RefreshedSlopes(
        slopes=along.curvature + motion.mean(axis=0),
        # of the s examples: what the second attack and its motion change, and the whole under it
        errors=double_sampling_error(along.curvature_samples + motion, along.examples),
        ratios=ratios,
        ratio_errors=spread / np.sqrt(s) / np.abs(fixed.mean(axis=0)),
    )
