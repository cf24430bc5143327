"""The covariance of one direction if batches are drawn without replacement and everything may change.

This is ``robustdyn.theory.propagate_coupled`` for a single direction and in plain floats: a whole training of
80,000 steps takes a fraction of a second.
"""

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from robustdyn.theory._validation import (
    Array,
    count,
    finite,
    momentum_range,
    non_negative,
    positive,
    scalar,
    shuffled_sizes,
    state_covariances,
    vector,
    whole,
)


def shuffled_covariance(
    eigenvalue: ArrayLike,
    example_noise: ArrayLike,
    attack_noise: ArrayLike,
    learning_rate: ArrayLike,
    *,
    examples: int,
    sizes: ArrayLike,
    epoch_ends: ArrayLike,
    momentum: float,
    weight_decay: float,
    initial_covariance: ArrayLike,
) -> Array:
    """Cov (x, v) of one direction after each step, if no example comes twice in an epoch.

    With s = (x, v), A and b as in (4), G the response of s to one noise vector in all steps of an epoch,

        S ← A S Aᵀ + b (n C₁ / ((n − 1) B) + C_a / B) bᵀ,    G ← A G + b √C₁,    Cov s = S − G Gᵀ / (n − 1)

    and at an epoch's end S ← S − G Gᵀ / (n − 1), G ← 0.

    Args:
        eigenvalue: λ (N,) of each step.
        example_noise: C₁ (N,) ≥ 0, variance over examples of one's gradient (denominator n). Within an epoch
            examples keep their places relative to each other.
        attack_noise: C_a (N,) ≥ 0, of what is drawn independently for each example at each step.
        learning_rate: η (N,) > 0.
        examples: n ≥ 2.
        sizes: B (N,) of each step.
        epoch_ends: Numbers of steps after which the examples are shuffled, increasing; the first epoch starts
            with the first step.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.
        initial_covariance: (2, 2) of (x, v), independent of the batches.

    Returns:
        (N, 2, 2) of (x, v).

    Raises:
        ValueError: Invalid hyperparameter, fewer than two examples, an epoch of more than n, a start that is
            no covariance, shapes that disagree, or a variance that grew out of the range of float64.

    Source: equations (25b) and (25c) of docs/theory.md; (25c) extends Kühn & Rosenow (2023).
    """
    rates = vector("learning_rate", positive("learning_rate", learning_rate))
    columns = (
        vector("eigenvalue", finite("eigenvalue", eigenvalue), rates.size),
        vector("example_noise", non_negative("example_noise", example_noise), rates.size),
        vector("attack_noise", non_negative("attack_noise", attack_noise), rates.size),
        rates,
        vector("sizes", positive("sizes", sizes), rates.size),
    )
    mu = scalar("momentum", momentum_range(momentum))
    omega = scalar("weight_decay", non_negative("weight_decay", weight_decay))
    count("examples", examples, 2)
    ends = np.unique(finite("epoch_ends", epoch_ends)).astype(np.int64)
    inside = ends[(ends > 0) & (ends < rates.size)]
    shuffled_sizes(whole("sizes", columns[-1], minimum=1), np.append(0, inside), examples)
    start = state_covariances("initial_covariance", np.asarray(initial_covariance)[None], (1, 2, 2))[0]
    a, p, w = float(start[0, 0]), float(start[0, 1]), float(start[1, 1])
    of_x = of_v = 0.0  # G
    moments = []
    shuffled_after = set(ends.tolist())
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for step, (lam, one, attack, eta, size) in enumerate(rows, start=1):
        pull = lam + omega
        noise = (one * examples / (examples - 1) + attack) / size
        w = mu * mu * w + 2 * mu * pull * p + pull * pull * a + noise
        crossed = mu * p + pull * a  # Cov(x, v⁺)
        a += eta * (eta * w - 2 * crossed)
        p = crossed - eta * w
        of_v = mu * of_v + pull * of_x + sqrt(one)
        of_x -= eta * of_v
        shared = of_v / (examples - 1)
        moments.append((a - of_x * of_x / (examples - 1), p - of_x * shared, w - of_v * shared))
        if step in shuffled_after:
            a, p, w = moments[-1]
            of_x = of_v = 0.0
    found = np.array(moments)
    good = np.isfinite(found).all(axis=1)
    if not good.all():
        raise ValueError(
            f"the variance left the range of float64 at step {int(np.argmin(good)) + 1}; "
            "eigenvalue must be stable, or the run shorter"
        )
    return found[:, [0, 1, 1, 2]].reshape(-1, 2, 2)
