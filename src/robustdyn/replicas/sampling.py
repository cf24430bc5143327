"""Which examples a replica's mini-batches hold, and the gradient noise that follows.

With C₁ the population covariance of one example's gradient (denominator n), a mini-batch mean has

- with replacement: covariance C₁ / B, independent from step to step;
- without replacement within an epoch: covariance C₁ (n − B) / (B (n − 1)), and −C₁ / (n − 1) between any two
  batches of the same epoch, whatever their sizes: an epoch's gradients at fixed weights sum to n ḡ without
  any noise. Noise along slow directions (relaxation time over an epoch) largely cancels, so that the formula
  for independent batches overestimates their variance; :func:`positions_covariance` has the exact one.

Noise of the attack's random start adds to the former and is independent from step to step in either case.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdyn import streams

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How mini-batches are drawn. What replica r gets at step t is a function of (seed, r, t) alone.

    Attributes:
        examples: n.
        batch_size: B in [1, n].
        replacement: Every example of every batch independently, or shuffled epochs.
        drop_last: Without replacement, leave out an epoch's last batch if it is shorter than B.

    Raises:
        ValueError: A batch size outside its range.
    """

    examples: int
    batch_size: int
    replacement: bool
    drop_last: bool

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.examples:
            raise ValueError(f"batch_size must lie in [1, {self.examples}], got {self.batch_size}")

    @property
    def epoch(self) -> int:
        """Steps after which the batches are drawn anew: of an epoch, or 1 with replacement."""
        if self.replacement:
            return 1
        whole, rest = divmod(self.examples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def indices(self, seed: int, replica: int, step: int) -> Tensor:
        """The examples of a batch, int64 (B,) or fewer; ``step`` counts from 0."""
        if self.replacement:
            draws = streams.generator(seed, "replica-order", replica, step)
            return torch.randint(self.examples, (self.batch_size,), generator=draws)
        epoch, number = divmod(step, self.epoch)
        order = torch.randperm(
            self.examples, generator=streams.generator(seed, "replica-order", replica, epoch)
        )
        return order[number * self.batch_size : (number + 1) * self.batch_size]

    def sizes(self, steps: int) -> NDArray[np.int64]:
        """Examples in the batch of each of the first ``steps`` steps, the same for all replicas: (steps,)."""
        first = np.arange(steps) % self.epoch * self.batch_size
        return np.minimum(self.batch_size, self.examples - first).astype(np.int64)


def positions_covariance(
    steps: Array | list[int],
    eigenvalue: Array,
    example_noise: Array,
    attack_noise: Array,
    sampling: Sampling,
    learning_rate: Array,
    *,
    momentum: float,
    weight_decay: float,
) -> Array:
    """Covariance of the positions of momentum SGD from one point, with the noise that the sampling gives.

    With replacement the same as :func:`robustdyn.theory.propagate`. Without, batches of an epoch are
    correlated: with a_t = ∂x_T/∂ξ_t the response to the noise of step t,

        Cov x_T = n C₁/(n−1) ∘ Σ_t a_t a_tᵀ / B_t − C₁/(n−1) ∘ Σ_epochs (Σ_t a_t)(Σ_t a_t)ᵀ + C_a ∘ Σ_t a_t
        a_tᵀ / B_t

    (∘ entry by entry), exact for a quadratic loss.

    Args:
        steps: (S,) steps T at which to report, ≥ 0.
        eigenvalue: λ (k,), of the loss without weight decay.
        example_noise: C₁ (k, k), population covariance over examples of the gradient, mean over attack
            starts.
        attack_noise: C_a (k, k), mean over examples of the covariance over attack starts.
        sampling: How batches are drawn.
        learning_rate: η (N,) of each step, N at least the last of ``steps``.
        momentum: μ.
        weight_decay: ω.

    Returns:
        (S, k, k), squared unit of θ.

    Raises:
        ValueError: Fewer rates than steps.

    Source: ours; bilinearity of the covariance, and sampling without replacement (Cochran, 1977, section
    2.5).
    """
    times = np.asarray(steps, dtype=np.int64)
    if times.max(initial=0) > len(learning_rate):
        raise ValueError(f"learning_rate has {len(learning_rate)} steps, fewer than {times.max()}")
    curvature, n = np.asarray(eigenvalue) + weight_decay, sampling.examples
    found = np.zeros((len(times), *np.shape(example_noise)))
    for row, last in enumerate(times):
        response = _responses(int(last), curvature, learning_rate, momentum)
        single = np.einsum("ti,tj,t->ij", response, response, 1 / sampling.sizes(int(last)))
        found[row] = attack_noise * single
        if sampling.replacement:
            found[row] += example_noise * single
            continue
        epochs = np.add.reduceat(response, np.arange(0, last, sampling.epoch)) if last else response
        if n > 1:  # one example alone has no noise
            found[row] += example_noise * (n * single - epochs.T @ epochs) / (n - 1)
    return found


def _responses(last: int, curvature: Array, learning_rate: Array, mu: float) -> Array:
    """∂x_last/∂ξ_t for t < last, (last, k): the adjoint of (x, v) run backwards."""
    found = np.empty((last, len(curvature)))
    to_x, to_v = np.ones_like(curvature), np.zeros_like(curvature)
    for step in reversed(range(last)):
        eta = learning_rate[step]
        found[step] = to_v - eta * to_x
        to_x, to_v = (1 - eta * curvature) * to_x + curvature * to_v, mu * (to_v - eta * to_x)
    return found
