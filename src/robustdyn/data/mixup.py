"""mixup: convex combinations of the images of a batch and of their labels.

Legend: B images of a batch over all ranks, b of them on this rank, K classes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustdyn.errors import ConfigError


@dataclass(frozen=True)
class Mixup:
    """mixup of Zhang et al. (ICLR 2018, eq. 1): x = λ x_a + (1 - λ) x_b and the same for one-hot labels.

    λ ~ Beta(α, α), one for the whole batch; the partners are a random permutation of the batch, so that
    an image may be its own. Both as in Rice et al., ICML 2020, code.

    Attributes:
        alpha: α, > 0.
        num_classes: K.

    Raises:
        ConfigError: ``alpha`` outside its range.
    """

    alpha: float
    num_classes: int

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"data.mixup={self.alpha} must be a number of at least 0; 0 is none")

    def draw(self, count: int, seed: int) -> tuple[float, Tensor]:
        """Random choices for a batch of ``count`` images, a function of the arguments alone.

        Returns:
            λ in [0, 1], and each image's partner: int64, (count,), a permutation of the places in the batch,
            on the CPU.
        """
        draws = np.random.default_rng(seed)  # PyTorch's Beta takes no generator
        weight = draws.beta(self.alpha, self.alpha)
        return weight, torch.from_numpy(draws.permutation(count))

    def images(self, images: Tensor, partners: Tensor, weight: float) -> Tensor:
        """λ ``images`` + (1 - λ) ``partners``, both float32 (b, C, H, W) in [0, 1], as is the result."""
        # not fused into one operation: whether a kernel then rounds once or twice may depend on where its
        # vectorised part ends, and the ranks' shares must be those of one process to the last bit
        return images * weight + partners * (1 - weight)

    def targets(self, labels: Tensor, partners: Tensor, weight: float) -> Tensor:
        """Probabilities float32, (b, K): λ on class ``labels`` and 1 - λ on ``partners``, int64 (b,)."""
        return self._one_hot(labels) * weight + self._one_hot(partners) * (1 - weight)

    def _one_hot(self, labels: Tensor) -> Tensor:
        return (labels[:, None] == torch.arange(self.num_classes, device=labels.device)).to(torch.float32)
