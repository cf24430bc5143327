"""Estimates the robust error of a Gibbs classifier, which draws its weights from a Gaussian.

Shapes: P parameters, k directions, R networks that pass together, N networks in all, n examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdyn.attacks import PGD
from robustdyn.evaluation.evaluators import right
from robustdyn.replicas.network import StackedNetwork, project
from robustdyn.streams import generator

Array = NDArray[np.floating[Any]]

_ORTHONORMAL = 1e-5  # float32 directions, products summed in float64: the rounding times a hundred


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightPosterior:
    """Q = N(μ, U Σ Uᵀ + σ² (I − U Uᵀ)): any covariance in k directions, and equal variance in all others.

    Attributes:
        mean: μ (P,).
        directions: U (P, k), orthonormal columns.
        covariance: Σ (k, k), positive definite.
        complement_std: σ > 0, standard deviation of every dimension outside the span of U.

    Raises:
        ValueError: Shapes do not fit, directions are not orthonormal, or Σ is not positive definite.
    """

    mean: Tensor
    directions: Tensor
    covariance: Array
    complement_std: float

    def __post_init__(self) -> None:
        numel, k = self.directions.shape
        if self.mean.shape != (numel,) or self.covariance.shape != (k, k):
            raise ValueError(
                f"mean must be ({numel},) and covariance ({k}, {k}), got {tuple(self.mean.shape)} and "
                f"{self.covariance.shape}"
            )
        if np.abs(project(self.directions.T, self.directions) - np.eye(k)).max() > _ORTHONORMAL:
            raise ValueError("directions must have orthonormal columns")
        if not self.complement_std > 0:
            raise ValueError(f"complement_std must be positive, got {self.complement_std}")
        self._root()

    def draw(self, draws: Sequence[torch.Generator]) -> Tensor:
        """Weights (R, P), each row from a generator of its own, on the mean's device."""
        k = self.directions.shape[1]
        numbers = [torch.randn(len(self.mean) + k, generator=each, device=each.device) for each in draws]
        drawn = torch.stack(numbers).to(self.mean)
        white, inside = drawn[:, k:], drawn[:, :k] @ self._root().T
        along = inside - self.complement_std * (white @ self.directions)
        return self.mean + self.complement_std * white + along @ self.directions.T

    def _root(self) -> Tensor:
        """L (k, k) with L Lᵀ = Σ."""
        try:
            return torch.from_numpy(np.linalg.cholesky(self.covariance)).to(self.mean)
        except np.linalg.LinAlgError as error:
            raise ValueError(
                "covariance must be positive definite; more replicas than directions?"
            ) from error


@dataclass(frozen=True, kw_only=True)
class GibbsSampling:
    """How a Gibbs error is estimated.

    Many networks on few examples each are more informative than few networks on all examples, because the
    number of independent draws bounds the error of the estimate.

    Attributes:
        networks: N ≥ 1, number of networks whose weights are drawn.
        examples: Examples that each network classifies, ≥ 1, drawn for it without replacement.

    Raises:
        ValueError: A number is below 1.
    """

    networks: int
    examples: int

    def __post_init__(self) -> None:
        for name in ("networks", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class AttackedNetworks:
    """Networks with the statistics of one network, each attacked on its own.

    Args:
        network: The stacked network; its running statistics are used as they are.
        attack: The attack, with running statistics (``batchnorm="eval"``).
        seed: Seed of all random numbers.

    Raises:
        ValueError: The attack would change the running statistics (train mode).
    """

    def __init__(self, network: StackedNetwork, attack: PGD, *, seed: int) -> None:
        if attack.batchnorm != "eval":
            raise ValueError(f"attack must have batchnorm=eval, got {attack.batchnorm}")
        self.network, self.attack, self.seed = network, attack, seed

    def gibbs_errors(
        self,
        posterior: WeightPosterior,
        images: Tensor,
        targets: Tensor,
        sampling: GibbsSampling,
        *,
        chunk: int,
        stream: str,
    ) -> NDArray[np.float64]:
        """Robust 0-1 errors of networks drawn from Q, each with its own examples and attack starts.

        Given the n examples, the N numbers are independent and in [0, 1], and their mean is Q's empirical
        error, in expectation over the attack's start. This is what ``robustdyn.theory.risk_certificate``
        requires. All random numbers of network j are a function of (seed, stream, j).

        Args:
            posterior: Q.
            images: (n, ...) in [0, 1], on the network's device.
            targets: (n,) classes.
            sampling: How many networks and examples.
            chunk: R, networks in one pass; affects only memory, speed and rounding.
            stream: Different for draws that must be independent.

        Returns:
            (N,).

        Raises:
            ValueError: There are fewer images than examples.
        """
        if sampling.examples > len(images):
            raise ValueError(f"examples must be at most {len(images)}, got {sampling.examples}")
        errors = np.empty(sampling.networks)

        def draws(
            of: str, numbers: range, device: torch.device | str = images.device
        ) -> list[torch.Generator]:
            return [generator(self.seed, f"{stream}-{of}", j, device=device) for j in numbers]

        for first in range(0, sampling.networks, chunk):
            numbers = range(first, min(first + chunk, sampling.networks))
            theta = posterior.draw(draws("weights", numbers))
            orders = [
                torch.randperm(len(images), generator=each) for each in draws("examples", numbers, "cpu")
            ]
            chosen = torch.stack(orders)[:, : sampling.examples].to(images.device)
            robust = self._robust(theta, images[chosen], targets[chosen], draws("starts", numbers))
            errors[first : numbers.stop] = 1 - robust.double().mean(dim=1).cpu().numpy()
        return errors

    def error(self, theta: Tensor, images: Tensor, targets: Tensor, *, batch_size: int, stream: str) -> float:
        """Robust 0-1 error of one network θ (P,) on all examples; arguments as in ``gibbs_errors``."""
        draws = [generator(self.seed, stream, device=images.device)]
        return float(self._wrong(theta[None], images, targets, draws, batch_size).mean())

    def wrong(
        self,
        theta: Tensor,
        images: Tensor,
        targets: Tensor,
        *,
        batch_size: int,
        stream: str,
        first: int = 0,
    ) -> NDArray[np.bool_]:
        """Which examples (R, n) each of the networks θ (R, P) misclassifies under an attack of its own.

        All random numbers of network j are a function of (seed, stream, first + j). Every network and example
        has its own start of the attack, so that given the networks, a column depends on its example alone.

        Args:
            theta: (R, P), the weights of networks that pass together.
            images: (n, ...) in [0, 1], on the network's device.
            targets: (n,) classes.
            batch_size: Examples of one pass; affects only memory, speed and rounding.
            stream: Different for draws that must be independent.
            first: Number of the first network.
        """
        draws = [generator(self.seed, stream, first + j, device=images.device) for j in range(len(theta))]
        return self._wrong(theta, images, targets, draws, batch_size)

    def _wrong(
        self,
        theta: Tensor,
        images: Tensor,
        targets: Tensor,
        draws: Sequence[torch.Generator],
        batch_size: int,
    ) -> NDArray[np.bool_]:
        many = len(theta)
        robust = [
            self._robust(theta, part.expand(many, *part.shape), labels.expand(many, -1), draws)
            for part, labels in zip(images.split(batch_size), targets.split(batch_size), strict=True)
        ]
        return ~torch.cat(robust, dim=1).cpu().numpy()

    def _robust(
        self, theta: Tensor, images: Tensor, targets: Tensor, draws: Sequence[torch.Generator]
    ) -> Tensor:
        """Which of their examples (R, B, ...) the networks θ (R, P) classify correctly, bool (R, B)."""
        self.network.use(theta, self.network.statistics(len(theta)))
        self.network.eval()
        start = torch.cat([self.attack.start(part, each) for part, each in zip(images, draws, strict=True)])
        labels = targets.flatten(0, 1)
        adversarial = self.attack.climb(self.network, images.flatten(0, 1), labels, start)
        with torch.no_grad():
            return right(self.network(adversarial), labels).view_as(targets)
