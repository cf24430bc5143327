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


def gibbs_errors(
    network: StackedNetwork,
    statistics: dict[str, Tensor],
    posterior: WeightPosterior,
    images: Tensor,
    targets: Tensor,
    attack: PGD,
    sampling: GibbsSampling,
    *,
    chunk: int,
    seed: int,
    stream: str,
) -> NDArray[np.float64]:
    """Robust 0-1 errors of networks drawn from Q, each with its own examples and attack starts.

    Given the n examples, the N numbers are independent and in [0, 1], and their mean is Q's empirical error,
    in expectation over the attack's start. This is what ``robustdyn.theory.risk_certificate`` requires. All
    random numbers of network j are a function of (seed, stream, j).

    Args:
        network: The stacked network.
        statistics: Its buffers for one network, (1, ...) by name; the running statistics are used as they
            are.
        posterior: Q.
        images: (n, ...) in [0, 1], on the network's device.
        targets: (n,) classes.
        attack: The attack, with running statistics (``batchnorm="eval"``).
        sampling: How many networks and examples.
        chunk: R, networks in one pass; affects only memory, speed and rounding.
        seed: Seed of all random numbers.
        stream: Different for draws that must be independent.

    Returns:
        (N,).

    Raises:
        ValueError: There are fewer images than examples, or the attack would move statistics (train mode).
    """
    if sampling.examples > len(images):
        raise ValueError(f"examples must be at most {len(images)}, got {sampling.examples}")
    errors = np.empty(sampling.networks)
    for first in range(0, sampling.networks, chunk):
        numbers = range(first, min(first + chunk, sampling.networks))
        theta = posterior.draw(
            [generator(seed, f"{stream}-weights", j, device=images.device) for j in numbers]
        )
        which = [
            torch.randperm(len(images), generator=generator(seed, f"{stream}-examples", j))[
                : sampling.examples
            ]
            for j in numbers
        ]
        chosen = torch.stack(which).to(images.device)
        starts = [generator(seed, f"{stream}-starts", j, device=images.device) for j in numbers]
        robust = robustly_classified(
            network, theta, statistics, images[chosen], targets[chosen], attack, starts
        )
        errors[first : numbers.stop] = 1 - robust.double().mean(dim=1).cpu().numpy()
    return errors


def zero_one_error(
    network: StackedNetwork,
    statistics: dict[str, Tensor],
    theta: Tensor,
    images: Tensor,
    targets: Tensor,
    attack: PGD,
    *,
    batch_size: int,
    seed: int,
    stream: str,
) -> float:
    """Robust 0-1 error of one network θ (P,) on all examples; arguments as in ``gibbs_errors``."""
    draws = generator(seed, stream, device=images.device)
    robust = [
        robustly_classified(network, theta[None], statistics, part[None], labels[None], attack, [draws])
        for part, labels in zip(images.split(batch_size), targets.split(batch_size), strict=True)
    ]
    return 1 - float(torch.cat(robust, dim=1).double().mean())


def robustly_classified(
    network: StackedNetwork,
    theta: Tensor,
    statistics: dict[str, Tensor],
    images: Tensor,
    targets: Tensor,
    attack: PGD,
    draws: Sequence[torch.Generator],
) -> Tensor:
    """Which examples R networks, each attacked on its own, classify correctly.

    Args:
        network: The stacked network.
        theta: (R, P).
        statistics: (1, ...) by name.
        images: (R, B, ...).
        targets: (R, B).
        attack: The attack, with ``batchnorm="eval"``.
        draws: R generators for the attack's starts.

    Returns:
        bool (R, B).

    Raises:
        ValueError: The attack would change the running statistics.
    """
    if attack.batchnorm != "eval":
        raise ValueError(f"attack must have batchnorm=eval, got {attack.batchnorm}")
    network.use(
        theta, {name: value.expand(len(theta), *value.shape[1:]) for name, value in statistics.items()}
    )
    network.eval()
    start = torch.cat([attack.start(part, each) for part, each in zip(images, draws, strict=True)])
    flat, labels = images.flatten(0, 1), targets.flatten(0, 1)
    adversarial = attack.climb(network, flat, labels, start)
    with torch.no_grad():
        return right(network(adversarial), labels).view_as(targets)
