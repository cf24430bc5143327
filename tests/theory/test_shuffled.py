"""Tests shuffled epochs against all orders of a few examples, with everything changing at every step."""

from itertools import permutations, product

import numpy as np
import pytest

from robustdyn.theory import propagated_variance, shuffled_covariance

MU, OMEGA = 0.6, 0.1
EXAMPLES = np.array([1.5, -0.4, 0.3, -1.1, 0.9])  # gradients of five examples; batches of two, two and one
BATCHES = (slice(0, 2), slice(2, 4), slice(4, 5))
STEPS = 6  # two epochs
RATE = np.array([0.3, 0.2, 0.25, 0.1, 0.3, 0.15])
CURVED = np.array([1.0, 1.4, -0.2, 0.8, 2.0, 0.5])
SCALE = np.array([1.0, 2.0, 0.5, 1.5, 3.0, 0.7])  # of all examples' gradients, step by step


def every_order():
    """Noise (14400, STEPS) of the orders of two epochs, each equally probable."""
    orders = list(permutations(range(5)))
    means = np.array([[EXAMPLES[list(order)[b]].mean() for b in BATCHES] for order in orders])
    drawn = np.array(list(product(range(120), repeat=2)))
    return np.concatenate([means[drawn[:, 0]], means[drawn[:, 1]]], axis=1) * SCALE


def covariance():
    return shuffled_covariance(
        CURVED,
        EXAMPLES.var() * SCALE**2,
        np.zeros(STEPS),
        RATE,
        examples=5,
        sizes=[2, 2, 1, 2, 2, 1],
        epoch_ends=[3, 6],
        momentum=MU,
        weight_decay=OMEGA,
        initial_covariance=np.zeros((2, 2)),
    )


def test_every_order_of_the_examples():
    noise, found = every_order(), covariance()
    x, v = np.zeros((2, len(noise)))
    for step in range(STEPS):
        v = MU * v + (CURVED[step] + OMEGA) * x + noise[:, step]
        x = x - RATE[step] * v
        np.testing.assert_allclose(found[step], np.cov(x, v, ddof=0), rtol=1e-12)


@pytest.mark.parametrize("since", [2, 3])  # within an epoch, and at its end
def test_what_the_noise_up_to_a_step_left(since):
    """The variance over all orders if the noise ends there."""
    noise, found = every_order(), covariance()
    left = propagated_variance(
        found[since - 1], CURVED[since:], RATE[since:], momentum=MU, weight_decay=OMEGA
    )
    x, v = np.zeros((2, len(noise)))
    for step in range(STEPS):
        v = MU * v + (CURVED[step] + OMEGA) * x + noise[:, step] * (step < since)
        x = x - RATE[step] * v
        if step >= since:
            np.testing.assert_allclose(left[step - since], x.var(), rtol=1e-12)


def test_what_cannot_be_is_refused():
    given = {
        "sizes": [1.0],
        "epoch_ends": [1],
        "momentum": MU,
        "weight_decay": OMEGA,
        "initial_covariance": np.zeros((2, 2)),
    }
    with pytest.raises(ValueError, match="examples is 1"):
        shuffled_covariance([1.0], [1.0], [0.0], [0.1], examples=1, **given)
    with pytest.raises(ValueError, match="initial_covariance has shape"):
        shuffled_covariance(
            [1.0], [1.0], [0.0], [0.1], examples=5, **given | {"initial_covariance": np.zeros(2)}
        )
    four = {"sizes": np.full(4, 4), "epoch_ends": [4]}
    with pytest.raises(ValueError, match=r"an epoch's sizes add up to 16; .* at most 10"):
        shuffled_covariance(*np.ones((3, 4)), np.full(4, 0.1), examples=10, **given | four)
    with pytest.raises(ValueError, match=r"sizes is 1.5 at index 0; it must be a whole number"):
        shuffled_covariance([1.0], [1.0], [0.0], [0.1], examples=5, **given | {"sizes": [1.5]})
    with pytest.raises(ValueError, match=r"initial_covariance is .* it must be a covariance"):
        shuffled_covariance(
            [1.0], [1.0], [0.0], [0.1], examples=5, **given | {"initial_covariance": -np.eye(2)}
        )
    many = {"sizes": np.ones(4000), "epoch_ends": np.arange(1, 4001)}
    with pytest.raises(ValueError, match="the variance left the range of float64"):
        shuffled_covariance(
            np.full(4000, -1.0), np.ones(4000), np.ones(4000), np.full(4000, 0.5), examples=5, **given | many
        )
