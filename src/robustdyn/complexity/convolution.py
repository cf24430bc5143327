"""The spectral norm of a convolution with circular padding, exactly."""

import math

import torch
from torch import Tensor


def convolution_norm(
    weight: Tensor,
    size: tuple[int, ...],
    *,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> float:
    """Largest singular value of a convolution as a linear map between images.

    The Fourier transform turns a circular convolution into a matrix (out, in) at each frequency (Sedghi,
    Gupta & Long, ICLR 2019). A stride keeps every s-th pixel, which adds up the frequencies that are N/s
    apart; side by side, and divided by √s, their matrices make one (out, s · in). Groups are separate maps.

    The value is exact for circular padding on images whose sizes the strides divide; other sizes are
    rounded up. Networks usually pad with zeros. For that the value is the limit of large images and, as the
    map with zero padding is a part of the circular one on a larger image, nearly an upper bound.

    Args:
        weight: (out, in/groups, *kernel).
        size: Of the input, a number for each dimension of the kernel.
        stride: For each dimension.
        dilation: For each dimension.
        groups: As in ``torch.nn.Conv2d``.
    """
    coarse = [-(-n // s) for n, s in zip(size, stride, strict=True)]
    grid = [n * s for n, s in zip(coarse, stride, strict=True)]
    kernel = weight
    for axis, (n, step) in enumerate(zip(grid, dilation, strict=True), start=2):
        kernel = _on_grid(kernel, axis, n, step)
    transform = torch.fft.fftn(kernel, dim=tuple(range(2, kernel.dim())))
    # (out, in/groups, s_1, n_1, s_2, n_2, ...): the frequencies n apart are in the axes s
    shape = [length for pair in zip(stride, coarse, strict=True) for length in pair]
    transform = transform.reshape(*transform.shape[:2], *shape)
    dims = len(size)
    aliases, frequencies = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    transform = transform.permute(*frequencies, 0, 1, *aliases)
    # a real kernel has the same singular values at f and -f
    transform = transform.narrow(dims - 1, 0, coarse[-1] // 2 + 1)
    matrices = transform.reshape(-1, groups, len(weight) // groups, weight.shape[1] * math.prod(stride))
    matrices = matrices / math.sqrt(math.prod(stride))
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    squares = torch.linalg.eigvalsh(matrices @ matrices.mH)  # of the smaller side, in ascending order
    return math.sqrt(max(0.0, float(squares[..., -1].max())))


def _on_grid(kernel: Tensor, axis: int, size: int, dilation: int) -> Tensor:
    """The kernel on a grid of this size along one axis; what lies beyond comes in on the other side."""
    places = torch.arange(kernel.shape[axis], device=kernel.device) * dilation % size
    shape = [*kernel.shape]
    shape[axis] = size
    return kernel.new_zeros(shape).index_add_(axis, places, kernel)
