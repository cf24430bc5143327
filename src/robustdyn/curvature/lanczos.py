"""Leading eigenpairs of a symmetric operator by thick-restart Lanczos.

Sources: Lanczos (1950) with full reorthogonalisation, twice (Giraud et al., Numer. Math. 2005: twice is
enough); thick restart after Wu & Simon (SIAM J. Matrix Anal. Appl. 2000), the symmetric form of Krylov-Schur
(Stewart 2001).

Letters: A the operator, P its size, q_j the orthonormal basis (rows of Q here, n of them), T = Q A Qᵀ the
small projected matrix in float64, β the norm of what A q_n leaves outside the basis, (θ, s) an eigenpair of
T, which gives the Ritz pair (θ, Qᵀ s) with residual norm β |s_n|.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from robustdyn.curvature.operators import LinearOperator
from robustdyn.curvature.probes import gaussian, source
from robustdyn.curvature.vectors import norm, project_off
from robustdyn.defaults import default

Which = Literal["largest", "magnitude"]

_log = logging.getLogger(__name__)

QUIET_SECONDS = 60.0
"""A search that takes longer says once in this time how far it is, at level INFO."""

_BLOCK_ROWS = 8  # the basis grows by this many vectors at a time
_SLAB_NUMBERS = 2**22  # work space of a rotation
# A chain is closed when β falls below this part of the tolerance, or below the rounding of a product (in
# units of eps ‖A‖; 5e-7 = 4 eps was measured on float32 networks). The part is small enough for the sum of
# what is then neglected to stay within the tolerance.
_CLOSED_TOL = 0.1
_CLOSED_EPS = 64
_BEYOND = (
    1  # pairs sought beyond the wanted ones, so that a neighbour cannot take a wanted one's place unseen
)


@dataclass(frozen=True, eq=False)
class EigenResult:
    """Leading eigenpairs; which end of the spectrum they are from is ``which``.

    Attributes:
        eigenvalues: (k,) float64 on the CPU, descending: in value for ``"largest"``, in |λ| for
            ``"magnitude"``.
        eigenvectors: (P, k), orthonormal columns, in the operator's dtype and on its device.
        residuals: (k,) float64, ‖A u − λ u‖. From the recursion, not below rounding; with ``verify``
            recomputed.
        converged: (k,) bool, residual ≤ tol · (largest |λ| seen); the last pair also needs the search to have
            ended before its budget. ``lanczos`` describes what this does not promise.
        products: Products with the operator, those of ``verify`` included.
        restarts: Thick restarts.
        seconds: Wall time.
        which: ``"largest"`` or ``"magnitude"``.
        warm_start: (P,), the sum of the eigenvectors and of the next one that was sought: a ``start`` for a
            nearby operator. It saves only what the two spaces have in common: a single-vector Krylov space
            from it still has to separate k directions. A block of k starting vectors took more products than
            a cold start (experiments/benchmarks/README.md).
    """

    eigenvalues: Tensor
    eigenvectors: Tensor = field(repr=False)
    residuals: Tensor
    converged: Tensor
    products: int
    restarts: int
    seconds: float
    which: Which
    warm_start: Tensor = field(repr=False)

    @property
    def all_converged(self) -> bool:
        """Whether every pair met the tolerance, and so did the next one."""
        return bool(self.converged.all())


def lanczos(
    operator: LinearOperator,
    k: int = default("measure/default", "eigenpairs.directions"),
    *,
    which: Which = "largest",
    tol: float = default("measure/default", "eigenpairs.tolerance"),
    max_products: int = default("measure/default", "eigenpairs.max_products"),
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    max_basis: int | None = None,
    verify: bool = False,
) -> EigenResult:
    """The k leading eigenpairs of a symmetric operator.

    Stops when every wanted pair, and the next one, has a residual ≤ tol times the largest |Ritz value|, or
    when ``max_products`` are spent. In the latter case ``converged`` says which pairs met the tolerance, and
    the last wanted pair never counts as converged. When the Krylov space closes, the solver continues with a
    new random vector orthogonal to everything found, so that repeated eigenvalues and null spaces are found
    with their multiplicity. If the space does *not* close before the tolerance is met, no single-vector
    Krylov method can see a repeated eigenvalue.

    ``converged`` promises that an eigenvalue is within the residual, but not that none was missed. A
    leading direction that the start hardly contains appears late, and its lower neighbour may have taken its
    place. The solver seeks the next pair, too, to make this rare. With eigenvalues 100, 20, 9, 6, 5.4, 4.8
    and a bulk of 494 up to 1, k = 5 and tol=1e-3, 2 of 100 random starts missed one (7 if the next pair is
    not sought, for 2 % fewer products). With k = 10 on two small networks, none of 50 starts did (2 and 0,
    for 2 and 7 % fewer products). A loose tolerance does not find them: at 1e-2, 39 of 100 starts were off by
    more than 5 % in some eigenvalue. A tighter tolerance or a second start shows whether one was missed.

    Args:
        operator: Symmetric A.
        k: Number of pairs, at most P.
        which: ``"largest"`` for the algebraically largest eigenvalues, ``"magnitude"`` for the largest |λ|.
            On a network's Hessian the two differ once negative curvature is comparable to the k-th
            eigenvalue.
        tol: Residual tolerance relative to the largest |λ|.
        max_products: Budget of products.
        generator: Source of all randomness; it is used for the starting vector and after a closed space. None
            gives the same numbers at every call.
        start: (P,) starting vector, for instance an earlier result's ``warm_start``; None draws one.
        max_basis: Most basis vectors held at a time, at least k + 2; None holds them all. The basis is the
            only large object: memory is max_basis · P numbers plus a few vectors.
        verify: Recompute the residuals from k further products rather than trust the recursion.

    Raises:
        ValueError: If k, max_products, max_basis or start cannot work.
        FloatingPointError: If a product is not finite.
    """
    began = time.perf_counter()
    _check_arguments(operator, k, which, max_products, max_basis)
    krylov = _Krylov(operator, k, which, tol, source(generator), max_basis)
    krylov.begin(start)
    finished, said = False, began
    while krylov.products < max_products and not finished:
        finished = krylov.step()
        now = time.perf_counter()
        if now - said > QUIET_SECONDS:
            said, each = now, (now - began) / krylov.products
            counts = krylov.products, max_products, each
            _log.info("eigenpairs: product %d of at most %d, %.3g s each", *counts)
    allowed = tol * krylov.scale()
    eigenvalues, eigenvectors, residuals, warm_start = krylov.pairs()
    products = krylov.products
    if verify:
        residuals = eigen_residuals(operator, eigenvalues, eigenvectors)
        products += k
    converged = residuals <= allowed
    converged[-1] &= finished
    return EigenResult(
        eigenvalues=eigenvalues,
        eigenvectors=eigenvectors,
        residuals=residuals,
        converged=converged,
        products=products,
        restarts=krylov.restarts,
        seconds=time.perf_counter() - began,
        which=which,
        warm_start=warm_start,
    )


def eigen_residuals(operator: LinearOperator, eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    """‖A u_i − λ_i u_i‖ computed from k products.

    Args:
        operator: A.
        eigenvalues: (k,).
        eigenvectors: (P, k).

    Returns:
        (k,) float64 on the CPU.
    """
    norms = [
        (operator.matvec(u) - float(value) * u).double().norm().cpu()
        for value, u in zip(eigenvalues, eigenvectors.unbind(dim=1), strict=True)
    ]
    return torch.stack(norms)


class _Krylov:
    """The basis, the projected matrix, and one step of the recursion.

    The first ``locked`` basis vectors V span a space that was found invariant when earlier chains closed. The
    rest is the active chain. The part of A V outside that space is E, and nothing else is neglected. Only a
    bound on it is kept, EᵀE ⪯ ``leak``. Unlike a sum of norms, this bound does not grow when V is rotated,
    which repeated eigenvalues allow at every lock.
    """

    def __init__(
        self,
        operator: LinearOperator,
        k: int,
        which: Which,
        tol: float,
        generator: torch.Generator,
        max_basis: int | None,
    ) -> None:
        self.operator, self.k, self.which, self.tol, self.generator = operator, k, which, tol, generator
        self.size = operator.shape[0]
        self.sought = min(k + _BEYOND, self.size)
        self.max_basis = self.size if max_basis is None else min(max_basis, self.size)
        self.basis = _Basis(self.size, operator.dtype, operator.device)
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.next: Tensor | None = None
        self.beta = 0.0
        self.leak = torch.zeros(0, 0, dtype=torch.float64)
        self.products = 0
        self.restarts = 0
        self.norm_seen = 0.0  # a lower bound of ‖A‖ that needs no eigendecomposition

    def begin(self, start: Tensor | None) -> None:
        """Set the first basis vector."""
        if start is None:
            self.next = self._fresh_vector()
            return
        vector = start.detach().to(dtype=self.operator.dtype, device=self.operator.device)
        length = norm(vector)
        if vector.shape != (self.size,) or not length > 0.0:
            raise ValueError(f"start must be a non-zero vector of shape ({self.size},)")
        self.next = vector / length

    def step(self) -> bool:
        """Extend the basis by one product; True when there is nothing left to do."""
        if len(self.basis) == self.max_basis < self.size:
            self._restart()
        assert self.next is not None
        self.basis.append(self.next)
        image = self.operator.matvec(self.next).clone()
        self.products += 1
        before = norm(image)
        if not before < float("inf"):
            raise FloatingPointError(f"product {self.products} with the operator is not finite")
        self.norm_seen = max(self.norm_seen, before)
        coefficients, self.beta = self.basis.orthogonalise(image)
        self._extend_projected(coefficients)

        if len(self.basis) == self.size:
            self.beta = 0.0
            self.leak.zero_()
            return True
        verdict = self._verdict()
        if verdict == "lock":
            self._lock()
            self.next = self._fresh_vector()
        else:
            self.next = image.div_(self.beta) if self.beta > 0.0 else None
        return verdict == "stop"

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The k leading Ritz values, vectors (P, k) and residuals, and the sum (P,) of all vectors sought.

        Ends the iteration, of k steps or more.
        """
        values, vectors = self._ritz(0)
        total = vectors[:, : self.sought].sum(dim=1)
        values, vectors = values[: self.k], vectors[:, : self.k]
        rounding = torch.finfo(self.operator.dtype).eps * self.scale()
        residuals = self._residuals(vectors).clamp(min=rounding)
        warm_start = self.basis.combined(total)
        return values, self.basis.become(vectors), residuals, warm_start

    def scale(self) -> float:
        """The largest |Ritz value|: what the tolerance is relative to."""
        return float(self._ritz(0)[0].abs().max())

    # ------------------------------------------------------------------ the small problem

    def _ritz(self, first: int) -> tuple[Tensor, Tensor]:
        """Eigenpairs of T without its first rows, leading ones first."""
        values, vectors = torch.linalg.eigh(self.projected[first:, first:])
        order = self._rank(values).argsort(descending=True, stable=True)
        return values[order], vectors[:, order]

    def _rank(self, values: Tensor) -> Tensor:
        return values if self.which == "largest" else values.abs()

    def _verdict(self) -> Literal["extend", "lock", "stop"]:
        """Extend the active chain, lock it and begin a fresh one, or stop.

        The first chain proves nothing about repetitions when it closes, so it is followed by another, random
        in the complement of what is locked. Such a chain sees every eigenvalue of the complement once: if its
        best, once converged, is not among the leading k (or only ties with the last), nothing is missing.
        """
        n, closed = len(self.basis), self.beta <= self._closed()
        # The eigenproblem of T is free while it is small; later it is solved at every 5 % of growth.
        if not closed and (n < self.k or self.products % max(1, n // 20)):
            return "extend"
        if closed and (n < self.k or self.locked == 0):
            return "lock"
        values, vectors = self._ritz(0)
        allowed = self.tol * float(values.abs().max())
        residuals = self._residuals(vectors[:, : self.sought])
        worst = float(residuals[: self.k].max())
        settled = closed or worst <= _CLOSED_TOL * allowed
        if self.locked == 0:
            if self.beta > allowed:
                return "stop" if n >= self.sought and bool((residuals <= allowed).all()) else "extend"
            return "lock" if settled else "extend"  # closed to within the tolerance
        chain_values, chain_vectors = self._ritz(self.locked)
        if self._rank(chain_values)[0] > self._rank(values)[self.k - 1] + self._closed():
            return "lock" if settled else "extend"
        if worst <= allowed and self.beta * float(chain_vectors[-1, 0].abs()) <= allowed:
            return "stop"
        return "lock" if closed else "extend"

    def _closed(self) -> float:
        """The β at which a chain counts as closed."""
        rounding = _CLOSED_EPS * torch.finfo(self.operator.dtype).eps
        return max(_CLOSED_TOL * self.tol, rounding) * self.norm_seen

    def _residuals(self, vectors: Tensor) -> Tensor:
        """Residual norms of Ritz pairs; an upper bound once something was neglected."""
        inside = vectors[: self.locked]
        return (
            self.beta * vectors[-1].abs() + (inside * (self.leak @ inside)).sum(dim=0).clamp(min=0.0).sqrt()
        )

    @property
    def locked(self) -> int:
        """Basis vectors that belong to closed chains."""
        return len(self.leak)

    def _extend_projected(self, coefficients: Tensor) -> None:
        n = len(self.basis)
        grown = torch.zeros(n, n, dtype=torch.float64)
        grown[:-1, :-1] = self.projected
        grown[:, -1] = coefficients
        grown[-1, :] = coefficients
        self.projected = grown

    # ------------------------------------------------------------------ closing and restarting

    def _lock(self) -> None:
        """Keep the leading k pairs (or all, if fewer) as an invariant space."""
        values, vectors = self._ritz(0)
        values, vectors = values[: self.k], vectors[:, : self.k]
        inside, last = vectors[: self.locked], self.beta * vectors[-1]
        before, added = inside.T @ self.leak @ inside, last.outer(last)
        # (x + y)² ≤ (a + b)(x²/a + y²/b) for any a, b > 0: what is added at every lock adds up, no more.
        a, b = (max(math.sqrt(float(part.trace())), 1e-300) for part in (before, added))
        self.leak = (a + b) * (before / a + added / b)
        self.beta = 0.0
        self.basis.rotate(vectors)
        self.projected = torch.diag(values)

    def _restart(self) -> None:
        """Shrink the active chain to its leading Ritz vectors; ``next`` and β stay valid."""
        values, vectors = self._ritz(self.locked)
        active = len(values)
        wanted = min(self.k, active - 1)
        # Half of the remaining space is kept: the neighbours of the wanted pairs speed up the next cycle.
        keep = min(active - 1, wanted + (active - wanted) // 2)
        rotation = torch.block_diag(torch.eye(self.locked, dtype=torch.float64), vectors[:, :keep])
        self.projected = rotation.T @ self.projected @ rotation
        self.basis.rotate(rotation)
        self.restarts += 1

    def _fresh_vector(self) -> Tensor:
        """A random unit vector orthogonal to the basis."""
        vector = gaussian((self.size,), self.generator, self.operator.dtype, self.operator.device)
        _, norm = self.basis.orthogonalise(vector)
        return vector.div_(norm)


class _Basis:
    """Orthonormal vectors of length P, held as the rows of a few blocks."""

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.length, self.dtype, self.device = length, dtype, device
        self.storage: list[Tensor] = []
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def append(self, vector: Tensor) -> None:
        """Add a unit vector that is orthogonal to the others."""
        block, row = divmod(self.count, _BLOCK_ROWS)
        if block == len(self.storage):
            rows = min(_BLOCK_ROWS, self.length - self.count)
            self.storage.append(torch.empty(rows, self.length, dtype=self.dtype, device=self.device))
        self.storage[block][row] = vector
        self.count += 1

    def orthogonalise(self, vector: Tensor) -> tuple[Tensor, float]:
        """Remove the basis from a vector, in place.

        Returns:
            The removed coefficients (n,) float64 on the CPU, and the norm of what is left.
        """
        return project_off(self._filled(), vector)

    def combined(self, weights: Tensor) -> Tensor:
        """The linear combination (P,) of the basis with weights (n,)."""
        total = torch.zeros(self.length, dtype=self.dtype, device=self.device)
        weights = weights.to(total)
        start = 0
        for rows in self._filled():
            total += weights[start : start + len(rows)] @ rows
            start += len(rows)
        return total

    def become(self, weights: Tensor) -> Tensor:
        """Linear combinations of the basis, weights (n, k) to columns (P, k), in the basis's own memory.

        If they were kept in addition to the basis, they would determine the solver's peak memory. The basis
        must not be used afterwards.
        """
        self.rotate(weights)
        kept = self._filled()
        self.storage.clear()
        return (kept[0] if len(kept) == 1 else torch.cat(kept)).T

    def rotate(self, weights: Tensor) -> None:
        """Replace the basis by combinations of itself, weights (n, l), without a second basis in memory."""
        for slab, columns in self._slabs(weights):
            for block, rows in zip(self.storage, columns.split(_BLOCK_ROWS), strict=False):
                block[: len(rows), slab] = rows
        self.count = weights.shape[1]

    def _filled(self) -> list[Tensor]:
        counts = (min(_BLOCK_ROWS, self.count - i * _BLOCK_ROWS) for i in range(len(self.storage)))
        return [block[:rows] for block, rows in zip(self.storage, counts, strict=True) if rows > 0]

    def _slabs(self, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The combinations (k, width), a slab of columns at a time."""
        filled = self._filled()
        weights = weights.to(dtype=self.dtype, device=self.device)
        width = max(1, _SLAB_NUMBERS // self.count)
        for start in range(0, self.length, width):
            slab = slice(start, start + width)
            yield slab, weights.T @ torch.cat([rows[:, slab] for rows in filled])


def _check_arguments(
    operator: LinearOperator, k: int, which: Which, max_products: int, max_basis: int | None
) -> None:
    size = operator.shape[0]
    if which not in ("largest", "magnitude"):
        raise ValueError(f"which must be 'largest' or 'magnitude', not {which!r}")
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the operator's size {size}, not {k}")
    if max_products < k:
        raise ValueError(f"max_products={max_products} cannot give k={k} eigenpairs: allow at least k")
    if max_basis is not None and max_basis < min(k + 2, size):
        raise ValueError(f"max_basis={max_basis} is too small for k={k}: allow at least k + 2")
