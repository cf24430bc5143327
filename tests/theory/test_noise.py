import itertools

import numpy as np
import pytest
from numpy.testing import assert_allclose

from robustdyn.theory import minibatch_noise_factor
from tests.tolerances import EXACT64


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("replacement", [False, True])
def test_factor_against_every_possible_batch(batch, replacement):
    gradients = np.array([0.3, -1.0, 2.0, 5.0, 0.7])
    batches = (
        itertools.product(gradients, repeat=batch)
        if replacement
        else itertools.combinations(gradients, batch)
    )
    truth = np.var([np.mean(b) for b in batches]) / np.var(gradients)
    assert_allclose(minibatch_noise_factor(5, batch, replacement=replacement), truth, **EXACT64)


def test_one_example_has_no_noise():
    assert minibatch_noise_factor(1, 1, replacement=False) == 0


@pytest.mark.parametrize(
    ("n", "batch", "message"),
    [
        (0, 1, r"n is 0; it must be a whole number >= 1"),
        (10, 0, r"batch_size is 0; it must be a whole number >= 1"),
        (10, 2.5, r"batch_size is 2.5; it must be a whole number >= 1"),
        (10, 11, r"batch_size is 11; without replacement it must be in \[1, 10\]"),
    ],
)
def test_impossible_batches_are_refused(n, batch, message):
    with pytest.raises(ValueError, match=message):
        minibatch_noise_factor(n, batch, replacement=False)
