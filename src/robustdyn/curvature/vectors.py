"""Sums over long vectors, and orthogonalisation with them.

Shapes: k rows of length P, held in one tensor or in several blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_SUMMED = 2**16  # columns that are copied to float64 at once


def inner(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products of rows (k, P) with a vector (P,), summed in float64: (k,) on the CPU.

    With 10^7 numbers plain float32 sums are off in the fourth digit on a CPU, and the lengths of eigenvectors
    with them; 2^16 equal ones are off in the fifth. The copies, a slab at a time, cost little.
    """
    total = torch.zeros(len(rows), dtype=torch.float64, device=vector.device)
    for start in range(0, len(vector), _SUMMED):
        slab = slice(start, start + _SUMMED)
        total += rows[:, slab].double() @ vector[slab].double()
    return total.cpu()


def norm(vector: Tensor) -> float:
    """The length of a vector (P,); see :func:`inner`."""
    return float(torch.stack([part.double().norm() for part in vector.split(_SUMMED)]).norm())


def project_off(blocks: Sequence[Tensor], vector: Tensor) -> tuple[Tensor, float]:
    """Remove orthonormal rows from a vector (P,), in place.

    Args:
        blocks: The rows, (k_1, P), (k_2, P), ...; none for nothing to remove.
        vector: (P,).

    Returns:
        The removed coefficients (k_1 + k_2 + ...,) float64 on the CPU, and the norm of what is left.
    """
    total = torch.zeros(sum(map(len, blocks)), dtype=torch.float64)
    left = norm(vector)
    # Two passes are enough (Giraud et al., Numer. Math. 2005) unless almost everything is removed; a third
    # and fourth catch that case.
    for sweep in range(4):
        before, start = left, 0
        for rows in blocks:
            coefficients = inner(rows, vector)
            vector.addmv_(rows.T, coefficients.to(vector), alpha=-1.0)
            total[start : start + len(rows)] += coefficients
            start += len(rows)
        left = norm(vector)
        if sweep > 0 and left > 0.7 * before:
            break
    return total, left
