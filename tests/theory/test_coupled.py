from itertools import permutations

import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov

from robustdyn.theory import BatchSampling, MeasuredDrift, MeasuredSpectrum, propagate, propagate_coupled
from tests.tolerances import EXACT64

MU, OMEGA = 0.9, 5e-3
RATES = np.array([0.05] * 30 + [0.005] * 20)


def some_matrices(k=3, seed=0):
    draws = np.random.default_rng(seed)
    slope = draws.normal(size=(k, k)) * 0.3 + np.diag([4.0, 2.0, 0.5][:k])
    examples, attack = (a @ a.T for a in draws.normal(size=(2, k, k)))
    return slope, examples, 0.2 * attack, draws.normal(size=k)


def drift_of(slope, examples, attack, gradient, step=(0,), interpolation="piecewise_constant"):
    lead = (len(step), *np.shape(slope)[-2:])
    return MeasuredDrift(
        step=np.array(step),
        slope=np.broadcast_to(slope, lead),
        example_noise=np.broadcast_to(examples, lead),
        attack_noise=np.broadcast_to(attack, lead),
        gradient=gradient,
        interpolation=interpolation,
    )


def law(drift, sampling, steps, rates=RATES):
    return propagate_coupled(
        drift, rates, sampling=sampling, momentum=MU, weight_decay=OMEGA, record_steps=steps
    )


def independent(size=8, n=40, steps=50):
    return BatchSampling(examples=n, sizes=np.full(steps, size), epoch=None)


def test_uncoupled_directions_are_those_of_propagate():
    _, examples, attack, gradient = some_matrices()
    lam, steps = np.array([4.0, 1.0, -0.1]), [0, 1, 7, 30, 31, 50]
    begin = np.array([[0.1, 2.0], [0.0, -1.0], [0.3, 0.0]])
    found = propagate_coupled(
        drift_of(np.diag(lam), examples, attack, gradient),
        RATES,
        sampling=independent(),
        momentum=MU,
        weight_decay=OMEGA,
        record_steps=steps,
        initial_mean=begin,
    )
    spectrum = MeasuredSpectrum(
        np.array([0]),
        lam[None],
        ((examples + attack) / 8)[None],
        "piecewise_constant",
        gradient=gradient[None],
    )
    expected = propagate(
        spectrum, RATES, momentum=MU, weight_decay=OMEGA, record_steps=steps, initial_mean=begin
    )
    np.testing.assert_allclose(found.mean, expected.mean, **EXACT64)
    np.testing.assert_allclose(found.covariance, expected.covariance, **EXACT64)


def test_the_limit_solves_the_lyapunov_equation():
    slope, examples, attack, gradient = some_matrices()
    assert np.abs(slope - slope.T).max() > 0.1  # not symmetric
    steps = 4000  # ρ^4000 < 1e-16
    found = law(
        drift_of(slope, examples, attack, gradient), independent(steps=steps), [steps], np.full(steps, 0.05)
    )
    pull, unit = slope + OMEGA * np.eye(3), np.eye(3)
    move = np.block([[unit - 0.05 * pull, -0.05 * MU * unit], [pull, MU * unit]])
    kick = np.concatenate([-0.05 * unit, unit])
    expected = solve_discrete_lyapunov(move, kick @ ((examples + attack) / 8) @ kick.T)
    blocks = expected.reshape(2, 3, 2, 3).transpose(1, 3, 0, 2)
    np.testing.assert_allclose(found.covariance[0], blocks, rtol=1e-9)
    np.testing.assert_allclose(found.position[0], -np.linalg.solve(pull, gradient), rtol=1e-9)


@pytest.mark.parametrize("last", [1, 5, 6, 17, 50])
def test_shuffled_epochs_against_the_covariance_of_all_noise_vectors(last):
    """With 37 examples in batches of 8, the last of 5, one large matrix holds all noise vectors."""
    slope, examples, attack, gradient = some_matrices()
    n, epoch = 37, 5
    sizes = np.array([8, 8, 8, 8, 5] * 10)
    found = law(
        drift_of(slope, examples, attack, gradient),
        BatchSampling(examples=n, sizes=sizes, epoch=epoch),
        [last],
    )
    noise = np.zeros((last, 3, last, 3))
    for s in range(last):
        for t in range(last):
            if s == t:
                size = sizes[s]
                noise[s, :, t] = examples * (n - size) / (size * (n - 1)) + attack / size
            elif s // epoch == t // epoch:
                noise[s, :, t] = -examples / (n - 1)
    # ∂(x, v)_last / ∂ξ_t by running the recursion from each kick
    response = np.zeros((6, last, 3))
    pull = slope + OMEGA * np.eye(3)
    for t in range(last):
        for j in range(3):
            x, v = np.zeros(3), np.zeros(3)
            for s in range(t, last):
                v = MU * v + pull @ x + (np.eye(3)[j] if s == t else 0)
                x = x - RATES[s] * v
            response[:, t, j] = np.concatenate([x, v])
    flat = response.reshape(6, -1)
    expected = flat @ noise.reshape(3 * last, 3 * last) @ flat.T
    blocks = expected.reshape(2, 3, 2, 3).transpose(1, 3, 0, 2)
    np.testing.assert_allclose(found.covariance[0], blocks, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_shuffled_epochs_while_the_noise_changes_against_all_orders(factor):
    """There are six examples in batches of two, three epochs, and C₁ falls to a quarter or grows fourfold."""
    draws = np.random.default_rng(3)
    n, k, steps, epoch = 6, 2, 9, 3
    vectors = draws.normal(size=(n, k))
    vectors -= vectors.mean(axis=0)
    first, slope = vectors.T @ vectors / n, draws.normal(size=(k, k)) + 2 * np.eye(k)
    rates = np.full(steps, 0.1)
    sizes = np.full(steps, 2)
    drift = drift_of(
        slope, np.stack([first, factor * first]), np.zeros((k, k)), np.zeros(k), (0, 8), "linear"
    )
    lengths = np.sqrt(1 + (factor - 1) * np.arange(steps) / 8)
    for last in (1, 2, 3, 5, 8, 9):
        expected = np.zeros((2 * k, 2 * k))
        for begin in range(0, last, epoch):  # epochs are independent, so their covariances add
            ends = []
            for order in permutations(range(n)):
                x, v = np.zeros(k), np.zeros(k)
                for t in range(begin, last):
                    place = 2 * (t - begin)
                    drawn = vectors[list(order[place : place + 2])] if place < n else np.zeros((2, k))
                    v = MU * v + (slope + OMEGA * np.eye(k)) @ x + lengths[t] * drawn.mean(axis=0)
                    x = x - rates[t] * v
                ends.append(np.concatenate([x, v]))
            expected += np.cov(np.array(ends), rowvar=False, bias=True)
        found = law(drift, BatchSampling(examples=n, sizes=sizes, epoch=epoch), [last], rates)
        blocks = expected.reshape(2, k, 2, k).transpose(1, 3, 0, 2)
        np.testing.assert_allclose(found.covariance[0], blocks, rtol=1e-9, atol=1e-12)
        assert np.linalg.eigvalsh(expected)[0] > -1e-12


def test_an_example_part_with_a_negative_eigenvalue_is_kept_as_it_is():
    """Sampled C₁ can be indefinite where C₁ + C_a is not; held in time, E is still G C₁ Gᵀ / (n − 1)."""
    slope, _, _, gradient = some_matrices()
    examples, attack = np.diag([1.0, -0.2, 0.5]), np.eye(3)
    shuffled = BatchSampling(examples=16, sizes=np.full(50, 8), epoch=2)
    parts = [
        law(drift_of(slope, a, b, gradient), shuffled, [7]).covariance
        for a, b in ((examples, attack), (np.diag([1.0, 0, 0.5]), attack), (np.diag([0, 0.2, 0]), 0 * attack))
    ]
    np.testing.assert_allclose(parts[0], parts[1] - parts[2], rtol=1e-9, atol=1e-12)


def test_an_epoch_of_one_batch_has_the_attacks_noise_alone():
    slope, examples, attack, gradient = some_matrices()
    whole = BatchSampling(examples=8, sizes=np.full(len(RATES), 8), epoch=1)
    found = law(drift_of(slope, examples, attack, gradient), whole, [3, 40])
    expected = law(drift_of(slope, 0 * examples, attack, gradient), independent(), [3, 40])
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-12)


def test_straight_lines_between_measurements():
    slope, examples, attack, gradient = some_matrices()
    drift = drift_of(
        np.stack([slope, 3 * slope]), examples, attack, gradient, step=(10, 20), interpolation="linear"
    )
    for step, factor in ((0, 1.0), (10, 1.0), (13, 1.6), (20, 3.0), (40, 3.0)):
        np.testing.assert_allclose(drift.at(step)[0], factor * slope, **EXACT64)
    held = drift_of(np.stack([slope, 3 * slope]), examples, attack, gradient, step=(10, 20))
    np.testing.assert_array_equal(held.at(19)[0], slope)
    np.testing.assert_array_equal(held.at(20)[0], 3 * slope)


def test_what_cannot_be_is_named():
    slope, examples, attack, gradient = some_matrices()
    with pytest.raises(ValueError, match="step is"):
        drift_of(slope, examples, attack, gradient, step=(3, 3))
    with pytest.raises(ValueError, match=r"slope has shape \(1, 3, 2\)"):
        drift_of(slope[:, :2], examples[:, :2], attack[:, :2], gradient)
    with pytest.raises(ValueError, match="example_noise has shape"):
        MeasuredDrift(
            step=[0],
            slope=slope[None],
            example_noise=examples[None, :2, :2],
            attack_noise=attack[None],
            gradient=gradient,
            interpolation="linear",
        )
    with pytest.raises(ValueError, match=r"example_noise \+ attack_noise"):
        drift_of(slope, -examples, 0 * attack, gradient)
    with pytest.raises(ValueError, match="interpolation is 'cubic'"):
        drift_of(slope, examples, attack, gradient, interpolation="cubic")
    good = drift_of(slope, examples, attack, gradient)
    with pytest.raises(ValueError, match="record_steps"):
        law(good, independent(), [51])
    with pytest.raises(ValueError, match=r"record_steps is 1.5 at index 0; it must be a whole number"):
        law(good, independent(), [1.5])
    with pytest.raises(ValueError, match=r"record_steps has shape \(0,\)"):
        law(good, independent(), [])
    with pytest.raises(ValueError, match=r"an epoch's sizes add up to 32; .* at most 10"):
        BatchSampling(examples=10, sizes=np.full(16, 4), epoch=8)
    with pytest.raises(ValueError, match=r"sizes is 1.5 at index 0; it must be a whole number >= 1"):
        BatchSampling(examples=10, sizes=[1.5, 2], epoch=None)
    with pytest.raises(ValueError, match="sizes"):
        law(good, independent(steps=3), [1])
    with pytest.raises(ValueError, match="epoch"):
        BatchSampling(examples=4, sizes=np.ones(3), epoch=0)


def test_slopes_that_make_it_grow_are_refused_unless_asked_for():
    _, examples, attack, gradient = some_matrices()
    options = {"momentum": MU, "weight_decay": 0.0, "record_steps": [50]}
    turning = np.array([[0.1, 5.0, 0.0], [-5.0, 0.1, 0.0], [0.0, 0.0, 1.0]])  # 0.1 ± 5i
    for slope in (np.diag([1.0, 2.0, 800.0]), turning):
        drift = drift_of(slope, examples, attack, gradient)
        with pytest.raises(ValueError, match=r"eigenvalue .* at step 0, along which momentum SGD with"):
            propagate_coupled(drift, RATES, sampling=independent(), **options)
        grown = propagate_coupled(drift, RATES, sampling=independent(), allow_unstable=True, **options)
        assert np.isfinite(grown.covariance).all()
    negative = drift_of(-np.eye(3), examples, attack, gradient)
    assert propagate_coupled(negative, RATES, sampling=independent(), **options).variance.max() > 1
    with pytest.raises(ValueError, match="the law left the range of float64 before step 4000"):
        propagate_coupled(
            negative,
            np.full(4000, 0.5),
            sampling=independent(steps=4000),
            **options | {"record_steps": [4000]},
        )


@pytest.mark.parametrize(("share", "grows"), [(0.99, False), (1.01, True)])
def test_growth_begins_where_equation_6_says(share, grows):
    slope = np.array([[share * 2 * (1 + MU) / 0.1]])
    drift = drift_of(slope, np.eye(1), np.eye(1), np.zeros(1))
    run = {"sampling": independent(), "momentum": MU, "weight_decay": 0.0, "record_steps": [5]}
    if grows:
        with pytest.raises(ValueError, match="grows"):
            propagate_coupled(drift, np.full(50, 0.1), **run)
    else:
        propagate_coupled(drift, np.full(50, 0.1), **run)


@pytest.mark.parametrize(
    ("sizes", "left"), [([50] * 8, 0.0), ([64] * 6 + [16], 0.37), ([64] * 6, 0.05)], ids=str
)
def test_what_a_shuffled_epoch_leaves_along_a_flat_direction(sizes, left):
    """The unit is as many independent batches of the first's size, of variance (n − B) / (B (n − 1)) each."""
    n, one = 400, np.ones((1, 1))
    found = propagate_coupled(
        drift_of(0 * one, one, 0 * one, np.zeros(1)),
        np.ones(len(sizes)),
        sampling=BatchSampling(examples=n, sizes=sizes, epoch=len(sizes)),
        momentum=0.0,
        weight_decay=0.0,
        record_steps=[len(sizes)],
    ).variance[0, 0]
    independent = len(sizes) * (n - sizes[0]) / (sizes[0] * (n - 1))
    assert abs(found / independent - left) < 0.005
