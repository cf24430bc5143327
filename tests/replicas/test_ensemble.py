import numpy as np
import pytest
import torch
from scipy import stats
from torch.optim import SGD, Adam

from robustdyn.methods import AWP, SAM
from robustdyn.methods.objectives.objective import StepLoss
from robustdyn.replicas import AdamUpdate, Directions, Ensemble, MomentumUpdate, Recorded, Sampling
from robustdyn.theory import MeasuredDrift, MeasuredSpectrum, propagate, propagate_coupled
from tests.replicas.problems import (
    EXAMPLES,
    Quadratic,
    attack,
    by_hand,
    directions,
    momentum,
    network,
    sampling,
    training,
)
from tests.tolerances import EXACT64

EVERY = Recorded(
    steps=tuple(range(8)),
    loss_steps=(0, 7),
    loss_examples=EXAMPLES,
    mean_steps=(),
    loss_draws=1,
    expansion=False,
    weights=True,
)
SETTINGS = {
    "at": {},
    "replacement": {"sampling": sampling(replacement=True)},
    "drop_last": {"sampling": sampling(drop_last=True)},
    "train": {"batchnorm": "train", "attack": attack(batchnorm="train")},
    "train_attacked_in_eval": {"batchnorm": "train"},
    "awp": {"perturbation": AWP(gamma=0.05, warmup_epochs=0)},
    "awp_train": {"perturbation": AWP(gamma=0.05, warmup_epochs=0), "batchnorm": "train"},
    "sam": {"perturbation": SAM(rho=0.1, warmup_epochs=0)},
}


def ensemble(problem, engine="vmapped", recorded=EVERY, model=None, along=None):
    model = network() if model is None else model
    along = directions(model) if along is None else along
    return Ensemble(model, problem, directions=along, recorded=recorded, engine=engine)


def sgd(parameters):
    return SGD(parameters, lr=1.0, momentum=0.9, weight_decay=5e-3)


def adam(parameters):
    return Adam(parameters, lr=1.0, betas=(0.8, 0.9), eps=1e-3, weight_decay=5e-3)


@pytest.mark.parametrize("engine", ["vmapped", "looped"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_replica_is_a_plain_pytorch_loop(name, engine):
    """It is exactly momentum SGD through a decay, with the weight perturbation."""
    problem, model = training(**SETTINGS[name]), network()
    found = ensemble(problem, engine, model=model).run([3, 5])
    along = directions(model).positions
    for row, replica in enumerate((3, 5)):
        path = by_hand(model, problem, sgd, replica, problem.perturbation)
        moved = path - path[0]
        np.testing.assert_allclose(found["position"][row], (moved @ along).numpy(), **EXACT64)
        np.testing.assert_allclose(found["distance"][row], moved.norm(dim=1).numpy(), **EXACT64)
        # v = (θ_t − θ_{t+1}) / η where the optimiser steps at θ
        velocity = -path.diff(dim=0) / torch.tensor(problem.learning_rate, dtype=torch.float64)[:, None]
        np.testing.assert_allclose(
            found["buffer"][row, 1:], (velocity @ along).numpy(), rtol=1e-8, atol=1e-10
        )
        np.testing.assert_allclose(found["weights"][row], path[-1].numpy(), **EXACT64)


def test_the_model_is_never_changed():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ensemble(training(batchnorm="train"), model=model).run([0, 1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_adam_is_pytorch_s():
    update = AdamUpdate(
        beta1=0.8,
        beta2=0.9,
        epsilon=1e-3,
        weight_decay=5e-3,
        initial_buffer=None,
        second_moment=None,
        initial_count=0,
        frozen=False,
    )
    problem, model = training(update=update), network()
    found = ensemble(problem, model=model).run([0, 1])
    for row in range(2):
        path = by_hand(model, problem, adam, row)
        expected = ((path - path[0]) @ directions(model).positions).numpy()
        np.testing.assert_allclose(found["position"][row], expected, **EXACT64)


def test_frozen_adam_is_momentum_sgd_in_other_coordinates():
    """Equation (27): y = D^{-1/2} θ follows v ← β₁ v + D^{1/2} g, y ← y − η (1 − β₁) v."""
    model = network()
    size = sum(p.numel() for p in model.parameters())
    moment = torch.rand(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    update = AdamUpdate(
        beta1=0.8,
        beta2=0.9,
        epsilon=1e-3,
        weight_decay=0.0,
        initial_buffer=None,
        second_moment=moment,
        initial_count=0,
        frozen=True,
    )
    root = (1 / (moment.sqrt() + 1e-3)).sqrt()
    vectors = directions(model).positions
    along = Directions(positions=vectors / root[:, None], forces=vectors * root[:, None])
    found = ensemble(training(update=update), model=model, along=along).run([0])
    y, v = np.zeros(5), np.zeros(5)
    for step, rate in enumerate(training().learning_rate, start=1):
        v = 0.8 * v + found["gradient"][0, step]
        y = y - rate * 0.2 * v
        np.testing.assert_allclose(found["position"][0, step], y, **EXACT64)
        np.testing.assert_allclose(found["buffer"][0, step], 0.2 * v, **EXACT64)


def test_recorded_gradients_drive_the_buffer():
    """v ← μ v + g + ω θ, along each direction."""
    model, problem = network(), training()
    found = ensemble(problem, model=model).run([2])
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) @ directions(model).positions
    assert np.isnan(found["gradient"][0, 0]).all()
    for step in range(1, 8):
        decay = 5e-3 * (theta.numpy() + found["position"][0, step - 1])
        expected = 0.9 * found["buffer"][0, step - 1] + found["gradient"][0, step] + decay
        np.testing.assert_allclose(found["buffer"][0, step], expected, **EXACT64)


def test_decay_of_some_parameters_only():
    model = network()
    groups = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() <= 1]
    decays = [torch.full((p.numel(),), 0.02 * (p.dim() > 1), dtype=torch.float64) for p in model.parameters()]
    decay = torch.cat(decays)
    problem = training(update=momentum(weight_decay=decay))
    found = ensemble(problem, model=model).run([0])

    def optimizer(parameters):
        weights, rest = [], []
        for parameter in parameters:
            (weights if parameter.dim() > 1 else rest).append(parameter)
        assert (len(weights), len(rest)) == tuple(map(len, groups))
        return SGD([{"params": weights, "weight_decay": 0.02}, {"params": rest}], lr=1.0, momentum=0.9)

    path = by_hand(model, problem, optimizer, 0)
    expected = ((path - path[0]) @ directions(model).positions).numpy()
    np.testing.assert_allclose(found["position"][0], expected, **EXACT64)


def test_the_robust_loss_is_that_of_the_deployed_network():
    """At the start all replicas have the same loss, with running statistics even in train mode."""
    eval_mode = ensemble(training()).run([0, 1])["robust_loss"]
    train_mode = ensemble(training(batchnorm="train")).run([0, 1])["robust_loss"]
    np.testing.assert_allclose(eval_mode[0, 0], eval_mode[1, 0], **EXACT64)
    np.testing.assert_allclose(train_mode[:, 0], eval_mode[:, 0], **EXACT64)
    assert abs(eval_mode[0, 1] - eval_mode[1, 1]) > 1e-6


@pytest.mark.parametrize("replacement", [True, False])
def test_batches(replacement):
    drawn = sampling(replacement=replacement)
    seen = [drawn.indices(1, 0, step) for step in range(6)]
    assert [len(batch) for batch in seen] == drawn.sizes(6).tolist()
    assert not torch.equal(seen[0], drawn.indices(1, 1, 0))
    assert not torch.equal(seen[0], drawn.indices(2, 0, 0))
    if replacement:
        assert drawn.epoch == 1
        return
    assert drawn.sizes(6).tolist() == [4, 4, 2, 4, 4, 2]
    for epoch in (seen[:3], seen[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(EXAMPLES))
    assert sampling(drop_last=True).sizes(3).tolist() == [4, 4, 4]


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        training(learning_rate=[0.1, 0.0])
    with pytest.raises(ValueError, match="steps has 9, but there are 7"):
        ensemble(
            training(),
            recorded=Recorded(
                steps=(9,),
                loss_steps=(),
                loss_examples=1,
                mean_steps=(),
                loss_draws=1,
                expansion=False,
                weights=False,
            ),
        )
    with pytest.raises(ValueError, match="directions must be"):
        ensemble(training(), along=Directions(positions=torch.zeros(3, 1), forces=torch.zeros(3, 1)))
    with pytest.raises(ValueError, match="steps must increase"):
        Recorded(
            steps=(3, 1),
            loss_steps=(),
            loss_examples=1,
            mean_steps=(),
            loss_draws=1,
            expansion=False,
            weights=False,
        )
    with pytest.raises(ValueError, match=r"batch_size must lie in \[1, 10\]"):
        sampling(batch_size=11)
    with pytest.raises(ValueError, match="frozen needs"):
        AdamUpdate(
            beta1=0.9,
            beta2=0.9,
            epsilon=0.0,
            weight_decay=0.0,
            initial_buffer=None,
            second_moment=None,
            initial_count=0,
            frozen=True,
        )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.1), torch.nn.Linear(72, 3)).double()
    with pytest.raises(ValueError, match="Dropout in '1'"):
        ensemble(training(batchnorm="train"), model=model)
    diverging = training(learning_rate=[1e200] * 3)
    nothing = Recorded(
        steps=(), loss_steps=(), loss_examples=1, mean_steps=(), loss_draws=1, expansion=False, weights=False
    )
    with pytest.raises(FloatingPointError, match="diverged within 3 steps"):
        ensemble(diverging, recorded=nothing).run([0, 1])


# ---------------------------------------------------------------------- against the theory


class _MeanOutput:
    """The network's output is the loss; nothing is attacked."""

    takes_probabilities = False

    def attack_loss(self, model, images):
        return None

    def __call__(self, model, images, adversarial, targets):
        return StepLoss(model(images).mean(), None)


@pytest.mark.parametrize("replacement", [True, False])
def test_a_quadratic_loss_has_the_predicted_covariance(replacement):
    """Mean and covariance of 600 replicas, before and after a decay, are within χ² and normal limits."""
    draws = torch.Generator().manual_seed(1)
    k, n, replicas = 3, 12, 600
    lam = torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64)
    centre = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64)
    z = centre + torch.randn(n, k, generator=draws, dtype=torch.float64)
    start = torch.zeros(k, dtype=torch.float64)
    rates, mu, omega = np.array([0.08] * 40 + [0.008] * 20), 0.8, 0.05
    drawn = Sampling(examples=n, batch_size=5, replacement=replacement, drop_last=False)
    problem = training(
        images=z,
        targets=torch.zeros(n, dtype=torch.int64),
        objective=_MeanOutput(),
        attack=attack(valid_range=(-5.0, 5.0)),
        update=MomentumUpdate(momentum=mu, weight_decay=omega, initial_buffer=None),
        learning_rate=rates.tolist(),
        sampling=drawn,
    )
    unit = torch.eye(k, dtype=torch.float64)
    recorded = Recorded(
        steps=(1, 3, 10, 40, 43, 60),
        loss_steps=(),
        loss_examples=1,
        mean_steps=(),
        loss_draws=1,
        expansion=False,
        weights=False,
    )
    found = ensemble(
        problem,
        recorded=recorded,
        model=Quadratic(torch.diag(lam), start),
        along=Directions(positions=unit, forces=unit),
    ).run(range(replicas))["position"]

    gradients = (-z * lam).numpy()  # at θ = 0
    noise = np.cov(gradients, rowvar=False, bias=True)
    drift = MeasuredDrift(
        step=[0],
        slope=np.diag(lam.numpy())[None],
        example_noise=noise[None],
        attack_noise=np.zeros((1, k, k)),
        gradient=gradients.mean(axis=0),
        interpolation="piecewise_constant",
    )
    expected = propagate_coupled(
        drift,
        rates,
        sampling=drawn.batches(len(rates)),
        momentum=mu,
        weight_decay=omega,
        record_steps=recorded.steps,
    ).position_covariance
    if replacement:
        spectrum = MeasuredSpectrum(
            np.array([0]),
            lam.numpy()[None],
            (noise / 5)[None],
            "piecewise_constant",
            gradient=gradients.mean(axis=0)[None],
        )
        law = propagate(
            spectrum, rates, momentum=mu, weight_decay=omega, record_steps=np.array(recorded.steps)
        )
        np.testing.assert_allclose(expected, law.position_covariance, **EXACT64)
        error = np.sqrt(law.variance / replicas)
        assert (np.abs(found.mean(axis=0) - law.position) < 4 * error).all()
    measured = np.stack([np.cov(found[:, s], rowvar=False) for s in range(len(recorded.steps))])
    # (R − 1) s² / σ² ~ χ²; 18 variances at 1e-4 each side
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], replicas - 1) / (replicas - 1)
    ratio = np.einsum("sii->si", measured) / np.einsum("sii->si", expected)
    assert ((low < ratio) & (ratio < high)).all(), ratio
    # off the diagonal, s_ij has variance (σ_ii σ_jj + σ_ij²) / (R − 1)
    deviation = np.einsum("sii->si", expected) ** 0.5
    error = (
        np.sqrt((deviation[:, :, None] * deviation[:, None, :]) ** 2 + expected**2) / (replicas - 1) ** 0.5
    )
    assert (np.abs(measured - expected) < 4 * error).all()


def test_shuffled_epochs_are_quieter_than_independent_batches():
    """Along a slow direction an epoch's noise cancels, and the formula for independent batches is far off."""
    settings = {"examples": 100, "batch_size": 10, "drop_last": False}
    one, steps = np.ones((1, 1, 1)), 200
    drift = MeasuredDrift(
        step=[0],
        slope=0.01 * one,
        example_noise=one,
        attack_noise=0 * one,
        gradient=[0.0],
        interpolation="piecewise_constant",
    )
    shuffled, independent = (
        propagate_coupled(
            drift,
            np.full(steps, 0.01),
            sampling=Sampling(replacement=replacement, **settings).batches(steps),
            momentum=0.0,
            weight_decay=0.0,
            record_steps=[steps],
        ).variance[0, 0]
        for replacement in (False, True)
    )
    assert shuffled < 1e-3 * independent
