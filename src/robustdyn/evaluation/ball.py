"""Defines the threat model: the ball around each image that an attack must not leave."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustdyn.attacks.pgd import check_radius

Norm = Literal["linf", "l2"]

# ten times the rounding of an l2 projection, a float32 sum of a few thousand terms near 1: sqrt(3e3) * 6e-8
ROUNDING = 3e-5


@dataclass(frozen=True)
class Ball:
    """Images in [0, 1] within ``eps`` of the clean one.

    Attributes:
        norm: ``"linf"`` or ``"l2"``.
        eps: Radius ≥ 0 on the [0, 1] pixel scale.

    Raises:
        ValueError: An unknown norm, a negative radius, or an l∞ radius above 1.
    """

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be linf or l2, got {self.norm}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")
        check_radius(self.norm, self.eps, 1.0)

    def holds(self, images: Tensor, moved: Tensor) -> Tensor:
        """Which of ``moved`` (B, C, H, W) are in the ball around ``images`` and in [0, 1], bool (B,).

        Deviations by float32 rounding are allowed. An image with a NaN is never in the ball.
        """
        order = torch.inf if self.norm == "linf" else 2
        distance: Tensor = torch.linalg.vector_norm((moved - images).flatten(1), ord=order, dim=1)
        flat = moved.flatten(1)
        in_range: Tensor = (flat.amin(dim=1) >= 0) & (flat.amax(dim=1) <= 1)
        return (distance <= self.eps * (1 + ROUNDING) + 1e-6) & in_range

    def whole_box(self, images: Tensor) -> "Ball":
        """The smallest ball that contains every image of this size (C, H, W), whatever its centre."""
        return Ball(self.norm, 1.0 if self.norm == "linf" else images[0].numel() ** 0.5)
