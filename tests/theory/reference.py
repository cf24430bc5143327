"""Independent references for tests/theory: full-size linear systems and PyTorch's own optimisers.

Nothing here calls robustdyn. The 2d x 2d system is written in parameter coordinates, not in an eigenbasis.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from hypothesis import settings
from scipy.linalg import solve_discrete_lyapunov

# The same examples on every machine, no time limit (which a loaded machine would exceed), nothing on disk.
properties = settings(deadline=None, derandomize=True, database=None)


def random_orthogonal(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def random_covariance(rng, d):
    factor = rng.normal(size=(d, d))
    return factor @ factor.T / d + 0.1 * np.eye(d)


def full_system(hessian, eta, mu, omega=0.0):
    """(A, B) of (θ, v)⁺ = A (θ, v) + B ξ for v ← μv + (H + ωI)θ + ξ, θ ← θ − ηv."""
    d = len(hessian)
    unit, curved = np.eye(d), hessian + omega * np.eye(d)
    a = np.block([[unit - eta * curved, -eta * mu * unit], [curved, mu * unit]])
    return a, np.vstack([-eta * unit, unit])


def lyapunov(hessian, noise, eta, mu, omega=0.0):
    """Stationary covariance (2d, 2d) of (θ, v) by SciPy."""
    a, b = full_system(hessian, eta, mu, omega)
    return solve_discrete_lyapunov(a, b @ noise @ b.T)


def rotate(state_covariance, basis):
    """A (2d, 2d) covariance in the coordinates of ``basis`` (d, d), columns the directions."""
    both = np.kron(np.eye(2), basis)
    return both.T @ state_covariance @ both


def as_full(blocks):
    """Blocks (k, k, 2, 2) as one (2k, 2k) matrix ordered (x, v)."""
    k = len(blocks)
    return blocks.transpose(2, 0, 3, 1).reshape(2 * k, 2 * k)


def simulate(
    optimiser_class: type[torch.optim.Optimizer],
    hessian,
    noise,
    *,
    rates: Sequence[float],
    record: Sequence[int],
    replicas: int,
    seed: int,
    start=None,
    prepare=None,
    **options,
) -> Iterator[tuple[int, np.ndarray, torch.optim.Optimizer]]:
    """Run a torch optimiser on ½ θᵀHθ + ξᵀθ, ξ ~ N(0, C) new at each step; replicas are rows.

    Yields (t, θ (replicas, d), optimiser) after t updates for t in ``record``.
    """
    generator = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small; more threads only wait for one another
    h = torch.as_tensor(hessian, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.as_tensor(noise, dtype=torch.float64))
    theta = torch.zeros(replicas, len(h), dtype=torch.float64)
    if start is not None:
        theta += torch.as_tensor(start, dtype=torch.float64)
    theta.requires_grad_(True)
    optimiser = optimiser_class([theta], lr=rates[0], **options)
    if prepare is not None:
        prepare(optimiser, theta)
    for t, rate in enumerate(rates, start=1):
        optimiser.param_groups[0]["lr"] = rate
        xi = torch.randn(theta.shape, generator=generator, dtype=torch.float64) @ factor.T
        optimiser.zero_grad()
        (0.5 * ((theta @ h) * theta).sum() + (xi * theta).sum()).backward()
        optimiser.step()
        if t in record:
            yield t, theta.detach().numpy().copy(), optimiser
    torch.set_num_threads(threads)


def covariance_z(samples, truth):
    """z-scores of a sample covariance (d, d) of Gaussian samples (R, d) against the truth."""
    variance = np.diag(truth)
    error = np.sqrt((np.outer(variance, variance) + truth**2) / (len(samples) - 1))
    return (np.cov(samples.T) - truth) / error


def mean_z(samples, truth):
    """z-scores of a sample mean (d,)."""
    return (samples.mean(axis=0) - truth) / (samples.std(axis=0, ddof=1) / np.sqrt(len(samples)))


def exact_pair(first, second, eta, mu, noise):
    """Stationary covariance (2, 2) of (x_i, v_i) with (x_j, v_j) in exact rationals, rounded at the end.

    Gauss-Jordan elimination solves the four equations S = A_i S A_jᵀ + C_ij b bᵀ. The arguments are converted
    to rationals exactly.
    """
    eta, mu, noise = Fraction(eta), Fraction(mu), Fraction(noise)
    left, right = (
        [[1 - eta * Fraction(c), -eta * mu], [Fraction(c), mu]] for c in (float(first), float(second))
    )
    kick = [-eta, Fraction(1)]
    rows = []
    for a in range(2):
        for b in range(2):
            terms = [(a == c and b == d) - left[a][c] * right[b][d] for c in range(2) for d in range(2)]
            rows.append([*terms, noise * kick[a] * kick[b]])
    for at in range(4):
        pivot = next(row for row in range(at, 4) if rows[row][at])
        rows[at], rows[pivot] = rows[pivot], rows[at]
        rows[at] = [value / rows[at][at] for value in rows[at]]
        for other in range(4):
            if other != at:
                factor = rows[other][at]
                rows[other] = [x - factor * y for x, y in zip(rows[other], rows[at], strict=True)]
    return np.array([float(row[4]) for row in rows]).reshape(2, 2)
