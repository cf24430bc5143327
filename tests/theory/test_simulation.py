"""Tests the closed forms against the posterior of PyTorch's own optimisers, sampled by many replicas."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from robustdyn.theory import (
    MeasuredSpectrum,
    MomentumDynamics,
    adam_dynamics,
    adam_scale,
    covariance_after,
    preconditioned_covariance,
    propagate,
    stationary_block_covariance,
    stationary_covariance,
    whiten,
)
from tests.theory.reference import covariance_z, mean_z, random_covariance, random_orthogonal, simulate
from tests.tolerances import MC_SIGMAS

# This file compares some 500 scores; at 4 sigmas one family in 30 would fail by chance, at 5 one in 3500.
SIGMAS = MC_SIGMAS + 1

LAM = np.array([0.3, 2.0, 12.0])
OMEGA, MU, HIGH, LOW = 5e-3, 0.9, 0.1, 0.01


# At 5 standard errors, 5,000 replicas see an error of 10 % in a variance, 200,000 one of 1.6 %.
REPLICAS = pytest.mark.parametrize("replicas", [5_000, pytest.param(200_000, marks=pytest.mark.slow)])


def problem(seed):
    """H, C in parameter coordinates, the basis, and C in it."""
    rng = np.random.default_rng(seed)
    basis, noise = random_orthogonal(rng, 3), random_covariance(rng, 3)
    return basis * LAM @ basis.T, noise, basis, basis.T @ noise @ basis


@REPLICAS
@pytest.mark.parametrize("seed", range(3))
def test_sgd_settles_in_the_stationary_law(seed, replicas):
    hessian, noise, basis, in_basis = problem(seed)
    options = {"momentum": MU, "weight_decay": OMEGA}
    # every root is complex here, ρ² = μ = 0.9: 400 steps leave 5e-19 of the start.
    [(_, theta, _)] = simulate(
        torch.optim.SGD,
        hessian,
        noise,
        rates=[HIGH] * 400,
        record=[400],
        replicas=replicas,
        seed=seed,
        **options,
    )
    truth = stationary_covariance(LAM, in_basis, learning_rate=HIGH, **options)
    assert np.abs(covariance_z(theta @ basis, truth)).max() < SIGMAS
    assert np.abs(mean_z(theta @ basis, np.zeros(3))).max() < SIGMAS


@REPLICAS
@pytest.mark.parametrize("seed", range(3))
def test_sgd_through_a_decay_with_pytorchs_buffer(seed, replicas):
    hessian, noise, basis, in_basis = problem(seed)
    options = {"momentum": MU, "weight_decay": OMEGA}
    times = [1, 3, 10, 30, 100]
    samples = simulate(
        torch.optim.SGD,
        hessian,
        noise,
        rates=[HIGH] * 400 + [LOW] * 100,
        record=[400 + t for t in times],
        replicas=replicas,
        seed=10 + seed,
        **options,
    )
    start = stationary_block_covariance(LAM, in_basis, learning_rate=HIGH, **options)
    truth = covariance_after(times, start, LAM, in_basis, MomentumDynamics(LOW, **options))[..., 0, 0]
    # the textbook's velocity carries η: the same continuity there means a buffer ten times as large here.
    velocity = np.array([1.0, HIGH / LOW])
    textbook = covariance_after(
        times, start * np.outer(velocity, velocity), LAM, in_basis, MomentumDynamics(LOW, **options)
    )[..., 0, 0]
    for (t, theta, _), exact, other in zip(samples, truth, textbook, strict=True):
        assert np.abs(covariance_z(theta @ basis, exact)).max() < SIGMAS
        if t == 410:  # the samples tell the two forms apart while the old buffer is still felt
            assert np.abs(covariance_z(theta @ basis, other)).max() > 2 * SIGMAS


@REPLICAS
@pytest.mark.parametrize("seed", range(3))
def test_sgd_under_a_warm_up_and_cosine_from_afar_with_flat_and_negative_curvature(seed, replicas):
    rng = np.random.default_rng(seed)
    lam, basis, noise = np.array([-0.05, 0.0, 4.0]), random_orthogonal(rng, 3), random_covariance(rng, 3)
    start = np.array([0.5, -1.0, 2.0])
    n = 150
    rates = np.concatenate([np.linspace(0.01, 0.1, 30), 0.05 * (1 + np.cos(np.linspace(0, 3, n - 30)))])
    record = [1, 20, 60, n]
    samples = simulate(
        torch.optim.SGD,
        basis * lam @ basis.T,
        noise,
        rates=rates.tolist(),
        record=record,
        replicas=replicas,
        seed=20 + seed,
        start=start,
        momentum=0.8,
    )
    spectrum = MeasuredSpectrum([0], lam[None], (basis.T @ noise @ basis)[None], "piecewise_constant")
    truth = propagate(
        spectrum,
        rates,
        momentum=0.8,
        weight_decay=0.0,
        record_steps=record,
        initial_mean=np.stack([start @ basis, np.zeros(3)], axis=1),
    )
    for i, (_, theta, _) in enumerate(samples):
        assert np.abs(covariance_z(theta @ basis, truth.position_covariance[i])).max() < SIGMAS
        assert np.abs(mean_z(theta @ basis, truth.position[i])).max() < SIGMAS


def frozen(second_moment):
    """Give Adam a fixed second moment: β₂ = 1 − 1e-16 changes it by 1e-16 g², without bias correction."""

    def prepare(optimiser, theta):
        optimiser.state[theta] = {
            "step": torch.tensor(1e18),  # β^step = 0 for β₁, and exp(−111) for β₂
            "exp_avg": torch.zeros_like(theta),
            "exp_avg_sq": torch.as_tensor(second_moment).expand_as(theta).clone(),
        }

    return prepare


@REPLICAS
@pytest.mark.parametrize("seed", range(3))
def test_adam_with_a_fixed_second_moment_through_a_decay(seed, replicas):
    hessian, noise, _, _ = problem(seed)
    second_moment, eps, beta1 = np.array([0.3, 4.0, 1.0]), 1e-3, 0.9
    times = [1, 5, 25, 100]
    samples = simulate(
        torch.optim.Adam,
        hessian,
        noise,
        rates=[0.5] * 400 + [0.05] * 100,
        record=[400] + [400 + t for t in times],
        replicas=replicas,
        seed=30 + seed,
        prepare=frozen(second_moment),
        betas=(beta1, 0.9999999999999999),
        eps=eps,
        weight_decay=OMEGA,
    )
    scale = adam_scale(second_moment, eps)
    fast, slow = adam_dynamics(0.5, beta1), adam_dynamics(0.05, beta1)
    stationary = preconditioned_covariance(
        hessian, noise, scale, learning_rate=fast.learning_rate, momentum=fast.momentum, weight_decay=OMEGA
    )
    white = whiten(hessian, noise, scale, weight_decay=OMEGA)
    start = stationary_block_covariance(
        white.eigenvalue, white.noise, learning_rate=fast.learning_rate, momentum=beta1, weight_decay=0.0
    )
    later = covariance_after(times, start, white.eigenvalue, white.noise, slow)[..., 0, 0]
    for (_, theta, _), truth in zip(samples, [stationary, *white.to_parameters(later)], strict=True):
        assert np.abs(covariance_z(theta, truth)).max() < SIGMAS


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_adam_as_it_is_used(seed):
    hessian, noise, _, _ = problem(seed)
    eps, beta1, beta2 = 1e-8, 0.9, 0.999
    [(_, theta, optimiser)] = simulate(
        torch.optim.Adam,
        hessian,
        noise,
        rates=[0.02] * 10_000,
        record=[10_000],
        replicas=5_000,
        seed=40 + seed,
        betas=(beta1, beta2),
        eps=eps,
    )
    [state] = optimiser.state.values()
    scale = (1 / (state["exp_avg_sq"].sqrt() + eps)).mean(0).numpy()
    dynamics = adam_dynamics(0.02, beta1)
    truth = preconditioned_covariance(
        hessian, noise, scale, learning_rate=dynamics.learning_rate, momentum=beta1, weight_decay=0.0
    )
    # 4 standard errors of a variance, 4 √(2/5000) = 0.08, and 0.02 for v̂'s own fluctuation √((1−β₂)/2).
    deviation = np.sqrt(np.diag(truth))
    error = (np.cov(theta.T) - truth) / np.outer(deviation, deviation)
    assert_allclose(error, 0, atol=0.08 + 0.02)
