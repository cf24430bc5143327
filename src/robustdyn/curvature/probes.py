"""Random vectors, drawn from the caller's generator only."""

import torch
from torch import Tensor


def gaussian(
    shape: tuple[int, ...], generator: torch.Generator, like: torch.dtype, to: torch.device
) -> Tensor:
    """Independent standard normal numbers.

    Args:
        shape: Shape of the result.
        generator: Source of randomness; numbers are drawn on its device, so a CPU generator gives the same
            numbers on any target device.
        like: Precision of the result.
        to: Device of the result.
    """
    return torch.randn(shape, generator=generator, device=generator.device, dtype=like).to(to)


def rademacher(
    shape: tuple[int, ...], generator: torch.Generator, like: torch.dtype, to: torch.device
) -> Tensor:
    """Independent random signs ±1; arguments as ``gaussian``."""
    bits = torch.randint(2, shape, generator=generator, device=generator.device, dtype=torch.int8)
    return (2 * bits - 1).to(device=to, dtype=like)


def source(generator: torch.Generator | None) -> torch.Generator:
    """The caller's generator, or without one a new generator on the CPU that is always seeded with 0."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def child(generator: torch.Generator) -> torch.Generator:
    """A new generator on the same device, seeded by one draw."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(generator.device).manual_seed(seed)
