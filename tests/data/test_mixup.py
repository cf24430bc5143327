"""Tests mixed batches against mixing one image at a time, and the draws against their distributions."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import beta, chisquare, kstest

from robustdyn.data import Mixup
from robustdyn.streams import stream_seed
from tests.data.test_tensors import AUGMENTATION, image_tensors, shuffled
from tests.tolerances import EXACT32

ALPHAS = [0.2, 1.0, 1.4]


def mixed_and_not(alpha, augmentation=AUGMENTATION):
    """Pairs of a mixed batch and the same batch without mixing; every image has a different class."""
    data = image_tensors()
    data = type(data)(data.images, torch.arange(len(data)))
    mixup = Mixup(alpha=alpha, num_classes=len(data))
    for epoch in range(4):
        settings = {"epoch": epoch, "augmentation": augmentation, "data": data}
        yield from zip(shuffled(mixup=mixup, **settings), shuffled(**settings), strict=True)


def partners_of(mixed, plain):
    """λ and the partner of each image, read off the probabilities alone."""
    weights, partners = [], []
    for row, own in zip(mixed.targets.tolist(), plain.targets.tolist(), strict=True):
        others = [label for label, probability in enumerate(row) if probability and label != own]
        assert len(others) <= 1
        partners.append(others[0] if others else own)
        if others:
            weights.append(row[own])
            assert row[others[0]] == pytest.approx(1 - row[own], abs=1e-6)  # float32
        else:
            assert row[own] == pytest.approx(1, abs=1e-6)
    return weights, [plain.targets.tolist().index(label) for label in partners]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("augmentation", [None, AUGMENTATION])
def test_equals_one_image_at_a_time(alpha, augmentation):
    strangers = 0
    for mixed, plain in mixed_and_not(alpha, augmentation):
        weights, partners = partners_of(mixed, plain)
        assert sorted(partners) == list(range(len(plain.targets)))  # a permutation of this very batch
        assert torch.equal(mixed.indices, plain.indices)
        if not weights:
            continue
        assert set(weights) == {weights[0]}  # one λ for the batch
        strangers += len(weights)
        for i, j in enumerate(partners):
            # the partner, augmented as in its own place
            expected = (
                weights[0] * plain.images[i].double().numpy()
                + (1 - weights[0]) * plain.images[j].double().numpy()
            )
            np.testing.assert_allclose(mixed.images[i].numpy(), expected, **EXACT32)
    assert strangers > 100


def test_stays_in_range_and_keeps_type():
    data = image_tensors()
    data = type(data)(torch.full_like(data.images, 255), data.labels)  # rounding must not lead above 1
    for seed in range(50):
        for batch in shuffled(
            mixup=Mixup(alpha=1.0, num_classes=10), data=data, augmentation=None, seed=seed
        ):
            assert batch.images.dtype == batch.targets.dtype == torch.float32
            assert batch.images.max() <= 1
            assert (batch.targets >= 0).all()
            torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(len(batch.targets)), **EXACT32)


def test_every_batch_is_mixed_in_its_own_way():
    settings = {"mixup": Mixup(alpha=0.7, num_classes=10), "augmentation": None}
    shares = [
        batch.targets.max(dim=1).values.min().item()  # max(λ, 1 - λ), unless all partners share a label
        for seed, epoch in itertools.product(range(2), range(2))
        for batch in shuffled(seed=seed, epoch=epoch, **settings)
    ]
    assert len(set(shares)) == len(shares) == 20


def draws(alpha, count, repetitions=2400):
    mixup = Mixup(alpha=alpha, num_classes=10)
    drawn = [mixup.draw(count, stream_seed(0, "mixup", *divmod(n, 40))) for n in range(repetitions)]
    return np.array([weight for weight, _ in drawn]), torch.stack([partners for _, partners in drawn])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_are_beta(alpha):
    weights, _ = draws(alpha, 4)
    assert kstest(weights, beta(alpha, alpha).cdf).pvalue > 1e-3  # one fixed seed each
    other = 2 * alpha  # a different α, which the test must detect
    assert kstest(weights, beta(other, other).cdf).pvalue < 1e-6


def test_partners_are_a_uniform_permutation_independent_of_the_weight():
    weights, partners = draws(1.0, 4)
    orders = {order: number for number, order in enumerate(itertools.permutations(range(4)))}
    for some in (weights < 0.5, weights >= 0.5):
        found = np.bincount([orders[tuple(row.tolist())] for row in partners[some]], minlength=24)
        assert chisquare(found).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1e-3, 100.0])
def test_extreme_alpha(alpha):
    weights, _ = draws(alpha, 4, 50)
    assert ((weights >= 0) & (weights <= 1)).all()
    distance = np.abs(weights - 0.5)
    assert (distance > 0.49).mean() > 0.9 if alpha < 1 else (distance < 0.2).all()
