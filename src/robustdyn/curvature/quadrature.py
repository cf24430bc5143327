"""The whole spectrum of a symmetric operator, smoothed: stochastic Lanczos quadrature.

Sources: Gauss quadrature from the Lanczos recursion, Golub & Meurant, Matrices, Moments and Quadrature with
Applications (2010); its mean over random vectors, Ubaru, Chen & Saad (SIAM J. Matrix Anal. Appl. 2017); on
networks' Hessians, Ghorbani, Krishnan & Xiao (ICML 2019) and Yao et al., PyHessian (IEEE Big Data 2020).
Random vectors with a covariance C other than the identity, which measure the gradient noise over the whole
spectrum, are the same identity E[zᵀ h(A) z] = Tr(C h(A)) read with E[zzᵀ] = C.

Letters: A the operator with eigenpairs (λ_i, u_i), P its size, z a random vector, T the k×k tridiagonal
matrix of k Lanczos steps from z/‖z‖ with eigenpairs (θ_j, s_j); then zᵀ h(A) z ≈ ‖z‖² Σ_j s_{1j}² h(θ_j),
with equality for polynomials h of degree below 2k. γ_i = u_iᵀ C u_i; the measure that is estimated is
Σ_i γ_i δ(λ − λ_i), with γ_i = 1 for plain signs.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustdyn.curvature.lanczos import _Basis
from robustdyn.curvature.operators import LinearOperator
from robustdyn.curvature.probes import rademacher, source
from robustdyn.defaults import default

# A chain ends when β falls below the rounding of a product, about 4 eps ‖A‖ on float32 networks; a much lower
# bar than that of ``robustdyn.curvature.lanczos``. Steps taken in rounding do no harm, since T stays a
# projection of A. Steps not taken lose the bulk: behind outliers 10⁶ times as large β is 8 eps ‖A‖, and a bar
# of 16 eps left an error of 14 % where continuing left 3e-4.
_CLOSED_EPS = 4
_SLAB_NUMBERS = 2**20  # summed in float64 at a time
_MARGIN = 6.0  # widths of a Gaussian that a grid reaches beyond the outermost nodes: all but 2e-9
_POINTS_PER_WIDTH = 4  # the trapezoid rule then has an error of 2 exp(−2π² 4²), below rounding
_MOST_POINTS = 100_000
_NARROWEST = 1e-6  # width of a line, in units of the largest |λ|


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """n independent estimates of the measure Σ_i γ_i δ(λ − λ_i), one from each random vector.

    Every estimate comes with its standard error over the n random vectors: nan when n = 1, which shows no
    spread. That error does not cover the truncation of the chains at k steps; ``shortened`` shows its
    size at no cost.

    Attributes:
        nodes: (n, k) float64 on the CPU, each row ascending; where a chain closed early the last node is
            repeated, with weight 0.
        weights: (n, k) float64, non-negative; each row sums to 1.
        masses: (n,) float64, ‖z‖². Exactly P for plain signs; their mean estimates Tr(C).
        lengths: (n,) Lanczos steps taken, at most k.
        closed: (n,) bool, whether the Krylov space closed, so that the row is exact, to rounding.
        recursion: (n, 2, k) float64, the diagonal of T and the β below it; the last β is what was cut off.
        products: Products with the operator.
        seconds: Wall time.
    """

    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    masses: Tensor
    lengths: Tensor
    closed: Tensor
    recursion: Tensor = field(repr=False)
    products: int
    seconds: float

    @property
    def probes(self) -> int:
        """Random vectors used, n."""
        return self.nodes.shape[0]

    @property
    def steps(self) -> int:
        """Lanczos steps allowed to each, k."""
        return self.nodes.shape[1]

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Tr(C h(A)) = Σ_i γ_i h(λ_i), for plain signs Tr(h(A)); and its standard error.

        Unbiased up to the error of the quadrature, which falls geometrically in k at a rate set by the
        distance from the spectrum to the nearest pole of h. An h with a pole inside the spectrum has no
        trace to converge to.

        Args:
            function: h, element by element from a float64 tensor to one of the same shape.

        Returns:
            The trace, and its standard error over random vectors. The error includes the directions and, if C
            is not the identity, the masses ‖z‖².

        Raises:
            ValueError: If h changes the shape or is not finite at a node.
        """
        samples = self.masses * (self.weights * _evaluated(function, self.nodes)).sum(dim=1)
        error = float(samples.std()) / math.sqrt(self.probes) if self.probes > 1 else math.nan
        return float(samples.mean()), error

    def density(self, grid: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """The measure divided by its mass, every node spread into a Gaussian, and its standard error.

        Its integral over the real line is one; the trapezoid rule on a grid agrees if the grid reaches
        some widths beyond the nodes and has a point or more for each width (``default_grid``).

        Args:
            grid: (g,) points.
            width: Standard deviation of the Gaussian, which is the resolution.

        Returns:
            (g,) and (g,) float64 on the CPU, in the inverse unit of A.

        Raises:
            ValueError: If the grid is not one-dimensional or the width not positive.
        """
        points = _points(grid)
        _check_width(width)
        height = 1.0 / (width * math.sqrt(2.0 * math.pi))
        samples = [
            height * torch.exp(-0.5 * ((points[:, None] - nodes) / width) ** 2) @ weights
            for nodes, weights in zip(self.nodes, self.weights, strict=True)
        ]
        return self._share(torch.stack(samples))

    def cumulative(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """The fraction of the mass at or below each point, and its standard error.

        For one random vector it is right to within the larger weight of the two nodes about the point
        (Chebyshev-Markov-Stieltjes). Rounding decides on which side of a point an eigenvalue at the point
        falls, so choose points between eigenvalues.

        Args:
            grid: (g,) points.

        Returns:
            (g,) and (g,) float64 on the CPU, between 0 and 1.

        Raises:
            ValueError: If the grid is not one-dimensional.
        """
        points = _points(grid)
        samples = [
            (nodes <= points[:, None]).double() @ weights
            for nodes, weights in zip(self.nodes, self.weights, strict=True)
        ]
        estimate, error = self._share(torch.stack(samples))
        return estimate.clamp(0.0, 1.0), error

    def default_grid(self, width: float | None = None) -> tuple[Tensor, float]:
        """A grid and a width for ``density`` that show all nodes and integrate to one.

        Args:
            width: The resolution; None takes the range of the nodes divided by the length of the chains,
                about the mean distance of nodes, below which a smooth spectrum would break up into lines.

        Returns:
            (g,) evenly spaced points, four to a width, from 6 widths below the nodes to 6 above; the width.

        Raises:
            ValueError: If the width is not positive, or so small that the grid would have more than 100 000
                points.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        if width is None:
            line = _NARROWEST * max(abs(low), abs(high))
            width = max((high - low) / int(self.lengths.max()), line) or 1.0
        _check_width(width)
        intervals = math.ceil(((high - low) / width + 2.0 * _MARGIN) * _POINTS_PER_WIDTH)
        if intervals >= _MOST_POINTS:
            raise ValueError(
                f"width={width} needs more than {_MOST_POINTS} even points from {low} to {high}: "
                "widen it, or lay a grid over the part of interest"
            )
        reach = _MARGIN * width
        return torch.linspace(low - reach, high + reach, intervals + 1, dtype=torch.float64), width

    def shortened(self, steps: int) -> "SpectralDensity":
        """What the same random vectors would have given with fewer steps; no products are needed.

        A result that moves by less than its standard error between k/2 and k steps is deep enough.

        Args:
            steps: Between 1 and k.

        Raises:
            ValueError: If steps is out of this range.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps must be between 1 and the {self.steps} that were run, not {steps}")
        lengths = self.lengths.clamp(max=steps)
        return _assemble(
            self.recursion[:, :, :steps].clone(),
            self.masses,
            lengths,
            self.closed & (self.lengths <= steps),
            self.seconds,
        )

    def _share(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over random vectors of samples (n, g) in proportion to their masses, and its standard error.

        A ratio of two means, so the error is the jackknife's: for equal masses the usual one, for unequal
        ones right where linearisation is a third too low in the variance (measured with six vectors).
        """
        masses, total = self.masses[:, None], self.masses.sum()
        estimate = (masses * samples).sum(dim=0) / total
        if self.probes == 1:
            return estimate, torch.full_like(estimate, math.nan)
        moves = masses * (samples - estimate) / (total - masses)  # when one vector is left out
        return estimate, ((self.probes - 1) / self.probes * moves.square().sum(dim=0)).sqrt()


def spectral_density(
    operator: LinearOperator,
    *,
    probes: int = default("measure/full", "measurements.density.probes"),
    steps: int = default("measure/full", "measurements.density.steps"),
    generator: torch.Generator | None = None,
    draw: Callable[[torch.Generator], Tensor] | None = None,
) -> SpectralDensity:
    """The spectrum of a symmetric operator, each eigenvalue weighted by the noise along its eigenvector.

    In a precision of eps nothing is resolved within about 4 eps ‖A‖ of an eigenvalue, zero included.

    Memory, for any number of probes: a vector of length P in the operator's dtype for each step, rounded up
    to a multiple of eight, and about five more. Time in addition to the products: 4 · steps² · P
    multiplications for each probe.

    Args:
        operator: Symmetric A.
        probes: Random vectors n, at least 2 to have standard errors.
        steps: Lanczos steps k for each. A chain whose Krylov space closes earlier, or that has spanned all
            of R^P, ends there and is exact.
        generator: Source of all randomness; None gives the same numbers at every call.
        draw: Returns a random z (P,) with E[zzᵀ] = C, independent at every call, drawing from the generator
            it is given; for instance (m − 1)^−½ Σ_i ε_i (g_i − ḡ) with random signs ε_i, for the covariance
            of m per-example gradients. None takes random signs, for which C is the identity.

    Raises:
        ValueError: If probes or steps is below 1, or draw returns no vector (P,) or the zero vector.
        FloatingPointError: If a product or a drawn vector is not finite.
    """
    began = time.perf_counter()
    if probes < 1:
        raise ValueError(f"probes must be at least 1, and 2 to have standard errors, not {probes}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    generator = source(generator)
    size = operator.shape[0]
    recursion = torch.zeros(probes, 2, steps, dtype=torch.float64)
    masses = torch.empty(probes, dtype=torch.float64)
    lengths = torch.empty(probes, dtype=torch.int64)
    closed = torch.empty(probes, dtype=torch.bool)
    for i in range(probes):
        if draw is None:
            probe = rademacher((size,), generator, operator.dtype, operator.device)
        else:
            probe = _drawn(draw(generator), operator)
        masses[i] = _dot(probe, probe)
        start = (probe / math.sqrt(float(masses[i]))).to(operator.dtype)
        del probe
        coefficients, closed[i] = _chain(operator, start, steps)
        lengths[i] = length = coefficients.shape[1]
        recursion[i, :, :length] = coefficients
    return _assemble(recursion, masses, lengths, closed, time.perf_counter() - began)


def _chain(operator: LinearOperator, start: Tensor, steps: int) -> tuple[Tensor, bool]:
    """The Lanczos recursion from a unit vector, reorthogonalised in full, twice.

    Returns:
        The diagonal of T and the β below it (2, length), and whether the Krylov space closed.
    """
    size = operator.shape[0]
    basis = _Basis(size, operator.dtype, operator.device)
    diagonal, below = [], []
    norm_seen, closed = 0.0, False
    following = start
    while not closed and len(basis) < steps:
        basis.append(following)
        image = operator.matvec(following).clone()
        squared = _dot(image, image)
        if not squared < math.inf:
            raise FloatingPointError(f"product {len(basis)} of a chain with the operator is not finite")
        norm_seen = max(norm_seen, math.sqrt(squared))
        # The basis may be float32, but what T is made of is summed in float64.
        diagonal.append(_dot(following, image))
        basis.orthogonalise(image)
        beta = math.sqrt(_dot(image, image))
        if len(basis) == size:
            beta = 0.0
        below.append(beta)
        closed = beta <= _CLOSED_EPS * torch.finfo(operator.dtype).eps * norm_seen
        if not closed:
            following = image.div_(beta)
    return torch.tensor([diagonal, below], dtype=torch.float64), closed


def _assemble(
    recursion: Tensor, masses: Tensor, lengths: Tensor, closed: Tensor, seconds: float
) -> SpectralDensity:
    """Nodes and weights from the recursions: eigenvalues of T, squared first entries of its eigenvectors."""
    nodes = torch.zeros(recursion.shape[0], recursion.shape[2], dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    for i, length in enumerate(lengths.tolist()):
        diagonal, below = recursion[i, 0, :length], recursion[i, 1, : length - 1]
        # eigh reads the lower triangle
        values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(below, -1))
        nodes[i, :length], nodes[i, length:] = values, values[-1]
        weights[i, :length] = vectors[0].square()
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        masses=masses,
        lengths=lengths,
        closed=closed,
        recursion=recursion,
        products=int(lengths.sum()),
        seconds=seconds,
    )


def _drawn(vector: Tensor, operator: LinearOperator) -> Tensor:
    """A vector from the caller's ``draw``, checked, on the operator's device and in its own precision."""
    if vector.shape != operator.shape[:1] or not vector.is_floating_point():
        raise ValueError(
            f"draw must return a floating-point vector of shape {operator.shape[:1]}, "
            f"not {vector.dtype} of shape {tuple(vector.shape)}"
        )
    vector = vector.detach().to(operator.device)
    if not bool(vector.isfinite().all()):
        raise FloatingPointError("draw returned a vector that is not finite")
    if not bool(vector.any()):
        raise ValueError(
            "draw returned the zero vector, which has no spectral measure: draw has to give a non-zero vector"
        )
    return vector


def _dot(left: Tensor, right: Tensor) -> float:
    """The inner product, summed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    for a, b in zip(left.split(_SLAB_NUMBERS), right.split(_SLAB_NUMBERS), strict=True):
        total += torch.dot(a.double(), b.double())
    return float(total)


def _evaluated(function: Callable[[Tensor], Tensor], nodes: Tensor) -> Tensor:
    values = torch.as_tensor(function(nodes.clone()))
    if values.shape != nodes.shape:
        raise ValueError(
            f"function must return one value for each node: {tuple(nodes.shape)} went in, "
            f"{tuple(values.shape)} came out"
        )
    values = values.detach().to(device="cpu", dtype=torch.float64)
    if not bool(values.isfinite().all()):
        where = float(nodes[~values.isfinite()][0])
        raise ValueError(
            f"function is not finite at the node {where:.6g}: give it a value there, for instance with "
            "torch.where"
        )
    return values


def _points(grid: Tensor) -> Tensor:
    if grid.dim() != 1:
        raise ValueError(f"grid must be one-dimensional, not of shape {tuple(grid.shape)}")
    return grid.detach().to(device="cpu", dtype=torch.float64)


def _check_width(width: float) -> None:
    if not 0.0 < width < math.inf:
        raise ValueError(f"width must be positive and finite, not {width}")
