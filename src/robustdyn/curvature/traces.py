"""The trace of an operator from random probes: three unbiased estimators, each with its standard error.

Sources: Hutchinson (Commun. Stat. Simul. 1990), here with known eigenpairs as a control variate; Hutch++
(Meyer, Musco, Musco & Woodruff, SOSA 2021); XTrace (Epperly, Tropp & Webber, SIAM J. Matrix Anal. Appl.
2024).

Letters: A the operator, P its size, v or ω a probe, Q an orthonormal basis (its vectors are rows in the code)
of what a sketch A Ω spans. All three average quadratic forms of what is left of A once its large directions
are treated exactly. They differ in where these come from: eigenpairs that the caller has, a sketch of its
own, or the other probes.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustdyn.curvature.operators import LinearOperator
from robustdyn.curvature.probes import gaussian, rademacher, source
from robustdyn.curvature.vectors import inner, norm, project_off
from robustdyn.defaults import default

TraceEstimator = Literal["hutchinson", "hutch++", "xtrace"]

_MIN_JUDGED = 4  # with fewer probes the standard error is too uncertain to stop on


@dataclass(frozen=True)
class TraceResult:
    """An estimated trace.

    Attributes:
        estimate: Tr(A).
        standard_error: Of the estimate, over probes (and not over examples, because the operator is fixed).
        probes: Random vectors averaged over; those that only span a sketch are not counted.
        products: Products with the operator, those of sketches included.
        deflated: Directions treated exactly: known eigenpairs, columns of Hutch++'s sketch, or the m − 1
            other probes of each of XTrace's m estimates. All P when the diagonal was measured instead, with
            no probe and no error.
        estimator: ``"hutchinson"``, ``"hutch++"`` or ``"xtrace"``.
        converged: standard_error ≤ tol · |estimate| over four probes or more. True if no tolerance was given.
        seconds: Wall time.
    """

    estimate: float
    standard_error: float
    probes: int
    products: int
    deflated: int
    estimator: TraceEstimator
    converged: bool
    seconds: float


def hutchinson_trace(
    operator: LinearOperator,
    probes: int = default("measure/full", "measurements.density.probes"),
    generator: torch.Generator | None = None,
    *,
    eigenvalues: Tensor | None = None,
    eigenvectors: Tensor | None = None,
    tol: float | None = None,
) -> TraceResult:
    """Tr(A) ≈ mean of vᵀ A v over random signs v.

    The variance of one probe is 2 Σ_{i≠j} A_ij². Eigenpairs replace A by A − Σ_i λ_i u_i u_iᵀ in it, at no
    further product. They may be of any quality, stale or not even orthonormal: the estimate stays unbiased,
    only its noise grows.

    Args:
        operator: Symmetric A.
        probes: Number of random vectors, at least two; with ``tol`` the most that are used.
        generator: Source of all randomness; None gives the same numbers at every call.
        eigenvalues: (k,) known eigenvalues, together with ``eigenvectors``.
        eigenvectors: (P, k), on the operator's device.
        tol: Stop as soon as, with at least four probes, standard error ≤ tol · |estimate|. Small spreads by
            luck stop it too: errors of stopped runs were 1.1 to 1.4 times the standard errors they stated
            (root mean square). Give None where these must be calibrated.

    Raises:
        ValueError: If probes, tol or the eigenpairs cannot work.
        FloatingPointError: If a product is not finite.
    """
    began = time.perf_counter()
    generator = source(generator)
    if probes < 2:
        raise ValueError(f"probes must be at least 2 to have a standard error, not {probes}")
    if tol is not None and not 0.0 < tol < float("inf"):
        raise ValueError(f"tol must be positive and finite, not {tol}: give None to use all the probes")
    values, rows = _known_pairs(operator, eigenvalues, eigenvectors)
    # Σ λ ‖u‖² + vᵀ(A − Σ λ u uᵀ)v has the mean Tr(A) whatever the pairs are. The other way, Σ λ and a probe
    # projected off the given directions, has the mean Tr(A) − Σ (uᵀAu − λ), and correcting that takes k more
    # products. They would only remove the cross terms between span(u) and the rest. Here these terms add at
    # most about 4 Σ ‖A u − λ u‖² to the variance of a probe, which is negligible compared with the bulk for
    # pairs that Lanczos calls converged.
    known = sum(value * norm(row) ** 2 for value, row in zip(values.tolist(), rows, strict=True))
    samples = torch.empty(probes, dtype=torch.float64)
    used, met = 0, False
    while used < probes and not met:
        probe = rademacher(operator.shape[:1], generator, operator.dtype, operator.device)
        form = _quadratic(operator, probe, used + 1)
        samples[used] = form + known - float(values @ inner(rows, probe).square())
        used += 1
        met = tol is not None and used >= _MIN_JUDGED and _meets(samples[:used], tol)
    return _result(samples[:used], used, len(values), "hutchinson", began, converged=met or tol is None)


def hutch_plus_plus(operator: LinearOperator, products: int, generator: torch.Generator) -> TraceResult:
    """Tr(A) = Tr(QᵀAQ) + the trace of the rest, whose probes are kept off Q.

    A third of the products each make the sketch, the first term, and the estimate of the second (which gets
    what the division by three leaves over). All random vectors are signs. Only the rest has an error, and its
    probes are independent of Q: estimate and squared standard error are unbiased.

    Memory: one P×(products/3) matrix and a few vectors.

    Args:
        operator: Symmetric A.
        products: Number of products, at least four. From P on the diagonal is measured instead, with P
            products.
        generator: Source of all randomness.

    Raises:
        ValueError: With fewer than four products.
        FloatingPointError: If a product is not finite.
    """
    began = time.perf_counter()
    _check_products(products)
    if products >= operator.shape[0]:
        return _diagonal(operator, "hutch++", began)
    size, probes = products // 3, products - 2 * (products // 3)
    basis = torch.empty(size, *operator.shape[:1], dtype=operator.dtype, device=operator.device)
    for i in range(size):
        probe = rademacher(operator.shape[:1], generator, operator.dtype, operator.device)
        basis[i] = _product(operator, probe, i + 1)
    _orthonormalise(basis, generator)
    known = sum(_quadratic(operator, row, size + i + 1) for i, row in enumerate(basis))
    samples = torch.empty(probes, dtype=torch.float64)
    for i in range(probes):
        probe = rademacher(operator.shape[:1], generator, operator.dtype, operator.device)
        project_off([basis], probe)
        samples[i] = known + _quadratic(operator, probe, 2 * size + i + 1)
    return _result(samples, products, size, "hutch++", began)


def xtrace(operator: LinearOperator, products: int, generator: torch.Generator) -> TraceResult:
    """The mean of m = products/2 estimates, each Hutch++ with one probe off the sketch of the m − 1 others.

    Every probe serves both purposes, which makes the most of few products when the spectrum decays. What is
    left of a probe off the sketch is scaled to the length √(P − m + 1), as the paper does: it takes out the
    noise of the length, which is all the noise there is if the rest of the spectrum is flat. It needs probes
    whose remainder has a uniform direction, so they are Gaussian; with signs it would bias the estimate.

    The standard error is the paper's: the spread of the m estimates over √m. They share most of their
    sketches, which correlates them, so it is somewhat too small: errors were 1.0 to 1.5 times what it states
    (root mean square), the most where the spectrum decays steadily. Hutch++'s does not have this fault.

    Memory: two P×(products/2) matrices and a few vectors.

    Args:
        operator: Symmetric A.
        products: Number of products, at least four; an odd one is left over. From P on the diagonal is
            measured instead, with P products.
        generator: Source of all randomness.

    Raises:
        ValueError: With fewer than four products.
        FloatingPointError: If a product is not finite.
    """
    began = time.perf_counter()
    _check_products(products)
    if products >= operator.shape[0]:
        return _diagonal(operator, "xtrace", began)
    m = products // 2
    probes = torch.empty(m, *operator.shape[:1], dtype=operator.dtype, device=operator.device)
    basis = torch.empty_like(probes)
    for i in range(m):
        probes[i] = gaussian(operator.shape[:1], generator, operator.dtype, operator.device)
        basis[i] = _product(operator, probes[i], i + 1)
    # From here on everything is m×m: the sketch is Q R, column i for probe i.
    r = _orthonormalise(basis, generator)
    w = torch.stack([inner(basis, probe) for probe in probes], dim=1)
    h = torch.stack([inner(basis, _product(operator, q, m + i + 1)) for i, q in enumerate(basis)], dim=1)
    squares = torch.tensor([norm(probe) ** 2 for probe in probes], dtype=torch.float64)
    samples = _leave_one_out(r, w, h, squares, operator.shape[0], torch.finfo(operator.dtype).eps)
    return _result(samples, 2 * m, m - 1, "xtrace", began)


def _leave_one_out(r: Tensor, w: Tensor, h: Tensor, squares: Tensor, size: int, eps: float) -> Tensor:
    """XTrace's m estimates, without a basis for each.

    Without sketch vector i, the span of Q loses one direction Q s_i, the one orthogonal to all other sketch
    vectors: Rᵀ s_i ∝ e_i. What is left of probe i is then μ_i = ω_i − Q x_i, x_i = (1 − s_i s_iᵀ) w_i, and
    since A is symmetric, Qᵀ A ω_i = R e_i: no further product is needed for μ_iᵀ A μ_i.

    Args:
        r: (m, m), R.
        w: (m, m), the probes in the basis, Qᵀ Ω.
        h: (m, m), Qᵀ A Q.
        squares: (m,), ‖ω_i‖².
        size: P.
        eps: Rounding of the products.

    Returns:
        (m,).
    """
    s = _inverse_transpose(r, eps)
    s = s / s.norm(dim=0)
    along = (s * w).sum(dim=0)
    x = w - s * along
    known = h.trace() - (s * (h @ s)).sum(dim=0)
    rest = (r * (w - 2 * x)).sum(dim=0) + (x * (h @ x)).sum(dim=0)
    lengths = squares - w.square().sum(dim=0) + along.square()
    samples: Tensor = known + (size - len(r) + 1) * rest / lengths
    return samples


def _inverse_transpose(matrix: Tensor, eps: float) -> Tensor:
    """The transposed inverse up to a factor, with singular values below rounding lifted to it.

    An operator of low rank gives dependent sketch vectors and a singular R. The directions to leave out are
    then among those that the sketch has by rounding only, and this finds them.
    """
    u, values, vh = torch.linalg.svd(matrix)
    relative = values / values[0].clamp(min=torch.finfo(values.dtype).tiny)
    inverse: Tensor = (u / relative.clamp(min=eps)) @ vh
    return inverse


# ---------------------------------------------------------------------- products and vectors


def _product(operator: LinearOperator, vector: Tensor, number: int) -> Tensor:
    image = operator.matvec(vector)
    if not bool(image.isfinite().all()):
        raise FloatingPointError(f"product {number} with the operator is not finite")
    return image


def _quadratic(operator: LinearOperator, vector: Tensor, number: int) -> float:
    return float(inner(vector[None], _product(operator, vector, number)))


def _orthonormalise(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Replace rows (m, P), m ≤ P, by an orthonormal basis that spans them, in place.

    A row that depends on those before it leaves no direction of its own; a random one takes its place.

    Returns:
        R (m, m) float64 on the CPU, upper triangular: row j was Σ_i R_ij (basis row i).
    """
    r = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    rounding = torch.finfo(rows.dtype).eps
    for j, row in enumerate(rows):
        before = norm(row)
        r[:j, j], left = project_off([rows[:j]], row)
        if left > rounding * before:
            r[j, j] = left
        else:
            row.copy_(gaussian(tuple(row.shape), generator, row.dtype, row.device))
            _, left = project_off([rows[:j]], row)
        row.div_(left)
    return r


# ---------------------------------------------------------------------- arguments and results


def _known_pairs(
    operator: LinearOperator, eigenvalues: Tensor | None, eigenvectors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Checked eigenpairs: values (k,) float64 on the CPU and vectors as rows (k, P); k = 0 without any."""
    if eigenvalues is None and eigenvectors is None:
        empty = torch.zeros(0, *operator.shape[:1], dtype=operator.dtype, device=operator.device)
        return torch.zeros(0, dtype=torch.float64), empty
    if eigenvalues is None or eigenvectors is None:
        raise ValueError("eigenvalues and eigenvectors go together: give both or neither")
    if eigenvalues.dim() != 1 or eigenvectors.shape != (operator.shape[0], len(eigenvalues)):
        raise ValueError(
            f"eigenvalues {tuple(eigenvalues.shape)} and eigenvectors {tuple(eigenvectors.shape)} must have "
            f"the shapes (k,) and ({operator.shape[0]}, k)"
        )
    if eigenvectors.device != operator.device:
        raise ValueError(f"eigenvectors are on {eigenvectors.device}: move them to {operator.device}")
    values, rows = eigenvalues.detach().to(dtype=torch.float64, device="cpu"), eigenvectors.detach().T
    if not bool(values.isfinite().all()) or not all(bool(row.isfinite().all()) for row in rows):
        raise ValueError("eigenvalues and eigenvectors must be finite: leave out the pairs that are not")
    return values, rows


def _check_products(products: int) -> None:
    if products < 4:
        raise ValueError(f"products must be at least 4 to have a standard error, not {products}")


def _meets(samples: Tensor, tol: float) -> bool:
    return _standard_error(samples) <= tol * abs(samples.mean().item())


def _standard_error(samples: Tensor) -> float:
    return float(samples.std()) / math.sqrt(len(samples))


def _result(
    samples: Tensor,
    products: int,
    deflated: int,
    estimator: TraceEstimator,
    began: float,
    *,
    converged: bool = True,
) -> TraceResult:
    return TraceResult(
        estimate=float(samples.mean()),
        standard_error=_standard_error(samples),
        probes=len(samples),
        products=products,
        deflated=deflated,
        estimator=estimator,
        converged=converged,
        seconds=time.perf_counter() - began,
    )


def _diagonal(operator: LinearOperator, estimator: TraceEstimator, began: float) -> TraceResult:
    """The trace from P unit vectors, for budgets that allow it: nothing random is better."""
    size = operator.shape[0]
    unit = torch.zeros(size, dtype=operator.dtype, device=operator.device)
    total = 0.0
    for i in range(size):
        unit[i] = 1.0
        total += float(_product(operator, unit, i + 1)[i])
        unit[i] = 0.0
    return TraceResult(
        estimate=total,
        standard_error=0.0,
        probes=0,
        products=size,
        deflated=size,
        estimator=estimator,
        converged=True,
        seconds=time.perf_counter() - began,
    )
