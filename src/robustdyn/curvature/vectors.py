"""Sums over long vectors, checksums of tensors, and orthogonalisation.

Shapes: k rows of length P, held in one tensor or in several blocks.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_SUMMED = 2**16  # columns that are copied to float64 at once
_HASHED = 2**20  # numbers that are multiplied by random integers at once
_HASH_BASE = 6364136223846793005  # odd: slabs of equal numbers in another order differ
# half the width of the products, in which a sign bit would otherwise meet only one bit of its multiplier
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


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
    """The length of a vector (P,); see ``inner``."""
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


def checksum(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Integers that change with any bit of the tensors, except with a probability of about 2⁻³².

    They are sums of integers, so that they do not depend on threads or devices. Tensors of one kind are
    summed together, because on an accelerator many small kernels would take longer than the numbers do.
    """
    kinds: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    sums = []
    for group in kinds.values():
        device = group[0].device
        with torch.inference_mode(False), torch.no_grad():
            parts = [tensor.detach().reshape(-1) for tensor in group]
            flat = parts[0] if len(parts) == 1 else torch.cat(parts)
            flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
            bits = flat.contiguous().view(_INTEGERS[flat.element_size()])
            total = torch.zeros((), dtype=torch.int64, device=device)
            for part in bits.split(_HASHED):
                total = total * _HASH_BASE + (part * _multipliers(device)[: len(part)]).sum()
        sums.append(total)
    return tuple(int(total) for total in sums)


@cache
def _multipliers(device: torch.device) -> Tensor:
    limits = torch.iinfo(torch.int64)
    with torch.inference_mode(False):
        source = torch.Generator().manual_seed(0)
        return torch.randint(limits.min, limits.max, (_HASHED,), generator=source).to(device)
