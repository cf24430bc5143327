"""Tests noise-free paths and the laws that use them against closed forms and simulations in NumPy."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from robustdyn.methods import AWP
from robustdyn.methods.objectives.objective import StepLoss
from robustdyn.replicas import Directions, MeanPaths, MomentumUpdate, NoiseFreeSettings, StackedNetwork
from robustdyn.replicas.noise_free import Children, decays, full_gradients, mean_path
from robustdyn.replicas.prediction import predicted_laws, refreshed_covariance
from robustdyn.theory import BatchSampling, MeasuredDrift, propagate_coupled
from tests.replicas.ensembles import BATCH, EXAMPLES, MU, OMEGA, point, recorded
from tests.replicas.problems import Quadratic, attack, directions, network, sampling, training
from tests.replicas.test_ensemble import ensemble
from tests.tolerances import EXACT64, MC_SIGMAS

SETTINGS = {"repetitions": 2, "pairs": 3, "every": 2, "children": 0}


class MeanOutput:
    """The network's output is the loss; nothing is attacked."""

    takes_probabilities = False

    def attack_loss(self, model, images):
        return None

    def __call__(self, model, images, adversarial, targets):
        return StepLoss(model(images).mean(), None)


class Cubic(nn.Module):
    """The loss ½ h (θ − z)² + c θ³ / 6 of examples z, with the gradient h (θ − z) + ½ c θ²."""

    def __init__(self, steepness, third):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.steepness, self.third = steepness, third

    def forward(self, z):
        return 0.5 * self.steepness * (self.theta - z) ** 2 + self.third * self.theta**3 / 6


def plain_problem(z, rates, batch, **changes):
    return training(
        images=z,
        targets=torch.zeros(len(z), dtype=torch.int64),
        objective=MeanOutput(),
        attack=attack(valid_range=(-50.0, 50.0)),
        update=MomentumUpdate(momentum=MU, weight_decay=OMEGA, initial_buffer=None),
        learning_rate=rates,
        sampling=sampling(examples=len(z), batch_size=batch, replacement=True),
        **changes,
    )


def test_settings_say_what_they_allow():
    with pytest.raises(ValueError, match="repetitions must be 0 or at least 2, got 1"):
        NoiseFreeSettings(**SETTINGS | {"repetitions": 1})
    with pytest.raises(ValueError, match="children must be 0 or at least 3, got 2"):
        NoiseFreeSettings(**SETTINGS | {"children": 2})
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        NoiseFreeSettings(**SETTINGS | {"every": 0})
    assert decays([1.0, 1.0, 0.9, 0.5, 0.5, 0.6, 0.1]) == [3, 6]


def test_the_path_of_a_quadratic_loss_is_the_affine_map_and_has_no_drift():
    """Equation (21), with the antithetic pairs' displacements cancelling."""
    hessian = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    z = torch.randn(10, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1
    rates = [0.05] * 8 + [0.005] * 4
    problem = plain_problem(z, rates, 4)
    unit, steps = torch.eye(2, dtype=torch.float64), [0, 1, 5, 12]
    plain, drifting = mean_path(
        StackedNetwork(Quadratic(hessian, torch.zeros(2, dtype=torch.float64)), "vmapped"),
        problem,
        Directions(positions=unit, forces=unit),
        np.broadcast_to(np.eye(2), (13, 2, 2)),
        NoiseFreeSettings(**SETTINGS),
        repetition=0,
        record_steps=steps,
        chunk=3,
    )
    drift = MeasuredDrift(
        step=[0],
        slope=hessian.numpy()[None],
        example_noise=np.zeros((1, 2, 2)),
        attack_noise=np.zeros((1, 2, 2)),
        gradient=(-hessian @ z.mean(dim=0)).numpy(),
        interpolation="linear",
    )
    law = propagate_coupled(
        drift,
        rates,
        sampling=problem.sampling.batches(12),
        momentum=MU,
        weight_decay=OMEGA,
        record_steps=steps,
    )
    np.testing.assert_allclose(plain, law.position, **EXACT64)
    np.testing.assert_allclose(drifting, law.position, **EXACT64)


def test_the_drift_takes_the_mean_to_that_of_replicas_of_a_cubic_loss():
    """100,000 replicas in NumPy, whose mean the cubic term moves by a tenth of a deviation."""
    steepness, third, batch, count = 2.0, 1.2, 4, 100_000
    z = torch.randn(40, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rates = np.full(60, 0.04)
    draws, values = np.random.default_rng(3), z[:, 0].numpy()
    x, v, variance = np.zeros(count), np.zeros(count), [0.0]
    for rate in rates:
        noise = steepness * values.std() / np.sqrt(batch) * draws.standard_normal(count)
        v = MU * v + steepness * (x - values.mean()) + third * x**2 / 2 + noise + OMEGA * x
        x = x - rate * v
        variance.append(x.var())
    unit = torch.ones(1, 1, dtype=torch.float64)
    plain, drifting = mean_path(
        StackedNetwork(Cubic(steepness, third), "vmapped"),
        plain_problem(z, rates.tolist(), len(z)),  # the parts of the set make no difference
        Directions(positions=unit, forces=unit),
        np.array(variance)[:, None, None],
        NoiseFreeSettings(repetitions=2, pairs=2000, every=2, children=0),
        repetition=0,
        record_steps=[60],
        chunk=5000,
    )
    missed, left = ((path[0, 0] - x.mean()) / x.std() for path in (plain, drifting))
    assert missed > 0.08
    # the replicas' mean has an error of 0.003, and every D one of 3 % from its pairs
    assert abs(left) < 0.01


@pytest.mark.parametrize("perturbed", [False, True])
def test_gradients_over_all_examples_are_pytorch_s(perturbed):
    """With a batch of all examples a weight perturbation is AWP's own."""
    rule = AWP(gamma=0.05, warmup_epochs=0) if perturbed else None
    problem = training(
        perturbation=rule, attack=attack(steps=0, random_start="none"), sampling=sampling(batch_size=10)
    )
    model = network()
    stacked = StackedNetwork(model, "vmapped")
    theta = stacked.theta().expand(3, -1)
    gradient, moves = full_gradients(stacked, theta, problem, whose=0, step=0, chunk=2)
    other = copy.deepcopy(model)

    def loss():
        return nn.functional.cross_entropy(other(problem.images), problem.targets)

    if perturbed:
        before = torch.cat([p.detach().reshape(-1) for p in other.parameters()])
        rule.apply(other, loss())
        after = torch.cat([p.detach().reshape(-1) for p in other.parameters()])
        np.testing.assert_allclose(moves[1].numpy(), (after - before).numpy(), atol=1e-12)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), list(other.parameters()))])
    for row in gradient:
        np.testing.assert_allclose(row.numpy(), expected.numpy(), **EXACT64)
    small = training(
        perturbation=rule, attack=attack(steps=0, random_start="none"), sampling=sampling(batch_size=3)
    )
    parts, _ = full_gradients(stacked, theta[:1], small, whose=0, step=0, chunk=2)
    assert torch.allclose(parts[0], expected) is not perturbed  # each part has a perturbation of its own


def test_children_go_on_from_the_replica_s_state_without_noise():
    """Batches of mini-batches up to a decay, then of all examples: ``torch.optim`` with its momentum kept."""
    problem, model = training(attack=attack(steps=0, random_start="none")), network()
    along = directions(model)
    made = ensemble(problem, model=model)
    children = Children(made.network, problem)
    measured = made.run([2, 5], watch=children)["position"]
    steps = [0, 3, 4, 5, 7]
    found = children.positions(along, steps)
    assert np.isnan(found[:, :3]).all()
    for row, replica in enumerate((2, 5)):
        copied = copy.deepcopy(model)
        start = torch.cat([p.detach().reshape(-1) for p in copied.parameters()])
        optimizer = torch.optim.SGD(copied.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-3)
        places = []
        for step, rate in enumerate(problem.learning_rate):
            which = problem.sampling.indices(problem.seed, replica, step) if step < 4 else slice(None)
            optimizer.zero_grad()
            nn.functional.cross_entropy(copied(problem.images[which]), problem.targets[which]).backward()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            moved = torch.cat([p.detach().reshape(-1) for p in copied.parameters()]) - start
            places.append((moved @ along.positions).numpy())
        np.testing.assert_allclose(measured[row, 4], places[3], **EXACT64)
        np.testing.assert_allclose(found[row, 3:], [places[4], places[6]], **EXACT64)


# ---------------------------------------------------------------------- the laws

LAM = np.array([20.0, 3.0])
NOISE = np.diag(0.6 * LAM)
RATES, STEPS = np.array([0.01] * 50 + [0.001] * 50), [0, 10, 50, 51, 60, 100]


def two_wells(replicas, seed):
    """Places (R, S, k) of replicas of g = λ (x − sign x), and of their noise-free children, in NumPy."""
    draws = np.random.default_rng(seed)
    x, v = 0.01 * draws.standard_normal((replicas, 2)), np.zeros((replicas, 2))
    places = np.full((2, replicas, len(STEPS), 2), np.nan)
    places[0, :, 0] = x
    for step, rate in enumerate(RATES):
        if step == 50:
            child, momentum = x.copy(), v.copy()
        noise = draws.multivariate_normal(np.zeros(2), NOISE / BATCH, size=replicas)
        v = MU * v + LAM * (x - np.sign(x)) + noise
        x = x - rate * v
        if step >= 50:
            momentum = MU * momentum + LAM * (child - np.sign(child))
            child = child - rate * momentum
        if step + 1 in STEPS:
            row = STEPS.index(step + 1)
            places[0, :, row] = x
            if step >= 50:
                places[1, :, row] = child
    return places


def test_laws_of_the_mean_are_those_of_the_paths_with_their_error():
    start = point(np.diag(LAM), NOISE, np.zeros(2), slopes=np.diag(LAM))
    paths = np.random.default_rng(0).standard_normal((2, 4, len(STEPS), 2))
    e = recorded(start, np.zeros((5, len(STEPS), 2)), STEPS, RATES)
    e = dataclasses.replace(e, mean_paths=MeanPaths(plain=paths[0], drifting=paths[1]))
    laws = predicted_laws(e)
    for name, path in zip(("noise_free", "drift"), paths, strict=True):
        np.testing.assert_allclose(laws[name].mean, path.mean(axis=0), **EXACT64)
        np.testing.assert_allclose(laws[name].mean_error, path.std(axis=0, ddof=1) / 2, **EXACT64)
        np.testing.assert_array_equal(laws[name].covariance, laws["refreshed"].covariance)
    assert "mixture" not in laws
    np.testing.assert_allclose(refreshed_covariance(e)[STEPS], laws["refreshed"].covariance, **EXACT64)


def test_after_a_decay_runs_in_two_wells_are_a_mixture():
    measured, child = two_wells(400, seed=4)
    child[300:] = np.nan  # replicas without children
    optimizer = {"_target_": "torch.optim.SGD", "momentum": MU, "weight_decay": 0.0}
    start = point(np.diag(LAM), NOISE, np.zeros(2), slopes=np.diag(LAM))
    e = recorded(start, measured, STEPS, RATES, optimizer=optimizer)
    laws = predicted_laws(dataclasses.replace(e, child=child))
    one, runs = laws["injected"], laws["mixture"]
    before = [0, 1, 2]
    np.testing.assert_array_equal(one.covariance[before], laws["refreshed"].covariance[before])
    variance = measured.var(axis=0, ddof=1)
    assert (variance[3:] > 20 * one.variance[3:]).all()
    # two places of equal weight leave a variance with hardly any error; the noise has one of 6 %
    np.testing.assert_allclose(variance[3:], runs.variance[3:], rtol=0.05)
    about = (measured - child)[:300, 3:].var(axis=0, ddof=1)
    np.testing.assert_allclose(about, one.variance[3:], rtol=MC_SIGMAS * np.sqrt(2 / 299))
    np.testing.assert_allclose(runs.mean[3:], child[:300, 3:].mean(axis=0), **EXACT64)
    # the noise at the mean replaces that of the start, if it was measured at the decay
    louder = point(np.diag(LAM), 4 * NOISE, np.zeros(2), slopes=np.diag(LAM))
    e = recorded(start, measured, STEPS, RATES, optimizer=optimizer, path=[louder], path_steps=[50])
    again = predicted_laws(dataclasses.replace(e, child=child))["injected"]
    np.testing.assert_allclose(again.variance[3:], 4 * one.variance[3:], **EXACT64)


def test_the_error_of_a_mixture_s_variance_is_that_over_children():
    """Of Gaussian children, ln s² has the variance 2 / (N − 1), and the mean of two half of it."""
    child = np.full((300, len(STEPS), 2), np.nan)
    child[:, 3:] = np.random.default_rng(5).standard_normal((300, 3, 2)) * 100  # far more than the noise
    start = point(np.diag(LAM), NOISE, np.zeros(2), slopes=np.diag(LAM))
    e = recorded(start, np.zeros((300, len(STEPS), 2)), STEPS, RATES)
    law = predicted_laws(dataclasses.replace(e, child=child))["mixture"]
    np.testing.assert_allclose(law.log_variance_error[3:], np.sqrt(1 / 299), rtol=0.2)
    assert np.isnan(law.log_variance_error[:3]).all()
    np.testing.assert_allclose(law.mean_error[3:], 100 / np.sqrt(300), rtol=0.2)


@pytest.mark.parametrize("replacement", [True, False])
def test_noise_since_a_decay_is_that_of_replicas_that_start_there(replacement):
    """The decay is at the end of the seventh epoch, so that the law of the rest alone is the same."""
    epoch = -(-EXAMPLES // BATCH)
    rates, steps = np.array([0.01] * 7 * epoch + [0.001] * 20), [7 * epoch + s for s in (0, 1, 5, 20)]
    slopes = np.array([[24.0, 3.0], [1.0, 5.0]])
    start = point(np.diag(LAM), NOISE, np.ones(2), slopes=slopes, attack=0.3 * NOISE)
    e = recorded(start, np.zeros((3, 4, 2)), steps, rates, **{"sampling.replacement": replacement})
    child = np.broadcast_to(np.array([np.nan, 0, 0, 0])[:, None], (3, 4, 2))
    found = predicted_laws(dataclasses.replace(e, child=child))["injected"].covariance
    drift = MeasuredDrift(
        step=[0],
        slope=slopes[None],
        example_noise=NOISE[None],
        attack_noise=0.3 * NOISE[None],
        gradient=np.zeros(2),
        interpolation="linear",
    )
    sizes = BatchSampling(
        examples=EXAMPLES,
        sizes=sampling(examples=EXAMPLES, batch_size=BATCH, replacement=replacement).sizes(20),
        epoch=None if replacement else epoch,
    )
    expected = propagate_coupled(
        drift,
        rates[-20:],
        sampling=sizes,
        momentum=MU,
        weight_decay=OMEGA,
        record_steps=[1, 5, 20],
    )
    np.testing.assert_allclose(found[1:], expected.position_covariance, **EXACT64)
