from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from robustdyn import streams
from robustdyn.methods import AWP, TRADES
from robustdyn.replicas import MeasuredPoint, PointSettings, StackedNetwork, measure_point
from robustdyn.replicas.sampled_batches import gradient_slopes, second_moment
from robustdyn.replicas.training_step import batch_gradients
from robustdyn.theory import minibatch_noise_factor
from tests.replicas.problems import EXAMPLES, attack, momentum, network, sampling, training
from tests.tolerances import EXACT64, MC_SIGMAS

STILL = attack(random_start="none")  # an attack without noise


def settings(**changes):
    given = {
        "eigenvectors": 3,
        "random_directions": 2,
        "attack_draws": 1,
        "noise_batches": 0,
        "slope_batches": 0,
        "slope_distance": 1.0,
        "tolerance": 1e-9,
        "max_products": 300,
        "memory": 2**24,
    }
    return PointSettings(**(given | changes))


def measure(problem, preconditioner=None, chunk=4, model=None, **changes):
    return measure_point(
        network() if model is None else model,
        problem,
        settings(**changes),
        engine="vmapped",
        chunk=chunk,
        preconditioner=preconditioner,
    )


def loss_of(problem, moves=None):
    """θ -> losses (n,) of the examples attacked at θ_0 from no random start; θ_0."""
    model = network()
    adversarial = problem.attack.climb(model, problem.images, problem.targets, problem.images)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def losses(theta):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return F.cross_entropy(
            functional_call(model, named, (adversarial,)), problem.targets, reduction="none"
        )

    return losses, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_the_start_is_what_dense_matrices_say():
    problem = training(attack=STILL)
    found = measure(problem)
    losses, theta = loss_of(problem)
    whole = hessian(lambda t: losses(t).mean())(theta).detach().numpy()
    gradients = jacrev(losses)(theta).detach().numpy()
    u = found.directions.positions.numpy()
    np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-10)
    np.testing.assert_allclose(found.eigenvalues[:3], np.linalg.eigvalsh(whole)[::-1][:3], rtol=1e-8)
    np.testing.assert_allclose(found.hessian, u.T @ whole @ u, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.mean_gradient, gradients.mean(axis=0) @ u, **EXACT64)
    np.testing.assert_allclose(found.decay_gradient, 5e-3 * theta.numpy() @ u, **EXACT64)
    expected = np.cov(gradients @ u, rowvar=False, bias=True)
    np.testing.assert_allclose(found.example_covariance, expected, **EXACT64)
    factor = minibatch_noise_factor(EXAMPLES, 4, replacement=False)
    np.testing.assert_allclose(found.noise, factor * expected, **EXACT64)
    assert found.loss == pytest.approx(float(losses(theta).mean()), rel=1e-12)
    assert found.converged
    assert not found.curvature_has_decay
    again = MeasuredPoint.from_arrays(found.arrays(), torch.device("cpu"))
    for name, value in found.arrays().items():
        np.testing.assert_array_equal(value, again.arrays()[name])


@pytest.mark.parametrize("replacement", [True, False])
def test_sampled_noise_agrees_with_the_examples_and_the_attack_s(replacement):
    """Two ways to measure C along every direction agree, both with the attack's noise."""
    problem = training(attack=attack(eps=1.0, steps=0), sampling=sampling(replacement=replacement))
    draws = torch.Generator().manual_seed(6)
    linear = torch.nn.Linear(72, 3, bias=False).double()  # gradients proportional to the images
    torch.nn.init.normal_(linear.weight, std=0.2, generator=draws)
    model = torch.nn.Sequential(torch.nn.Flatten(), linear)
    found = measure(problem, attack_draws=200, noise_batches=800, chunk=100, model=model)
    ratio = np.diag(found.sampled_noise) / np.diag(found.noise)
    # the attack's part has a relative error of at most √(2/199), if one example makes it all
    assert (np.abs(ratio - 1) < MC_SIGMAS * np.sqrt(2 / 799 + 2 / 199)).all(), ratio
    assert (np.diag(found.attack_covariance) > 0.1 * np.diag(found.example_covariance)).any()
    error = np.sqrt(np.diag(found.noise) * (1 / 800 + 1 / 200))
    assert (np.abs(found.sampled_gradients.mean(axis=0) - found.mean_gradient) < MC_SIGMAS * error).all()


def test_values_along_eigenvectors_do_not_come_from_the_examples_these_come_from():
    """With few examples in many dimensions, the eigenvectors of one attack fit its noise."""
    problem = training(attack=attack(eps=1.0, steps=0))
    draws = torch.Generator().manual_seed(6)
    linear = torch.nn.Linear(72, 3, bias=False).double()
    torch.nn.init.normal_(linear.weight, std=0.2, generator=draws)
    model = torch.nn.Sequential(torch.nn.Flatten(), linear)
    ratios, own = [], []
    for seed in range(12):
        found = measure(replace(problem, seed=seed), model=model, random_directions=0)
        u = found.directions.positions.T.reshape(-1, 3, 72)

        def along(generator, u=u):
            """uᵀHu and the variance over examples along u, of one attack, in closed form."""
            x = problem.attack.start(problem.images, generator).flatten(1)
            p = (x @ linear.weight.detach().T).softmax(dim=1)
            moves = torch.einsum("nd,kcd->nkc", x, u)  # of the logits
            gradients = (moves * (p - F.one_hot(problem.targets, 3))[:, None]).sum(dim=2)
            mean, square = ((moves**power * p[:, None]).sum(dim=2) for power in (1, 2))
            return np.stack([(square - mean**2).mean(dim=0), gradients.var(dim=0, correction=0)])

        truth = np.mean([along(torch.Generator().manual_seed(k)) for k in range(1000, 1100)], axis=0)
        ratios.append(np.stack([found.eigenvalues, np.diag(found.example_covariance)]) / truth)
        # the same attack from which the eigenvectors come
        own.append(along(streams.generator(seed, "replica-start-attack", 0)) / truth)
    error = np.std(ratios, axis=0, ddof=1) / np.sqrt(12)
    assert (np.abs(np.mean(ratios, axis=0) - 1) < MC_SIGMAS * error).all()
    assert (np.mean(own, axis=0)[:, 0] > 1.1).all()  # curvature and noise alike


def test_under_a_weight_perturbation_the_start_is_the_perturbed_one():
    gamma = 0.05
    problem = training(attack=STILL, perturbation=AWP(gamma=gamma, warmup_epochs=0))
    found = measure(problem)
    losses, theta = loss_of(problem)
    model = network()
    gradient = jacrev(lambda t: losses(t).mean())(theta)
    moved, first = theta.clone(), 0
    for p in model.parameters():
        part = slice(first, first + p.numel())
        if p.dim() > 1:
            moved[part] += gamma * theta[part].norm() * gradient[part] / gradient[part].norm()
        first += p.numel()
    at = jacrev(lambda t: losses(t).mean())(moved).detach()
    np.testing.assert_allclose(found.mean_gradient, (at @ found.directions.positions).numpy(), **EXACT64)
    assert found.loss > float(losses(theta).mean())


def test_a_preconditioner_gives_the_eigenvectors_of_the_scaled_problem():
    problem = training(attack=STILL)
    losses, theta = loss_of(problem)
    scale = 0.5 + torch.rand(len(theta), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = measure(problem, preconditioner=scale)
    whole = hessian(lambda t: losses(t).mean())(theta).detach() + 5e-3 * torch.eye(len(theta))
    root = scale.sqrt()
    scaled = (root[:, None] * whole * root).numpy()
    np.testing.assert_allclose(found.eigenvalues[:3], np.linalg.eigvalsh(scaled)[::-1][:3], rtol=1e-8)
    product = found.directions.positions.T @ found.directions.forces
    np.testing.assert_allclose(product.numpy(), np.eye(5), atol=1e-10)
    assert found.curvature_has_decay
    with pytest.raises(ValueError, match="preconditioner must be positive"):
        measure(problem, preconditioner=-scale)


def test_batchnorm_in_train_mode_has_sampled_noise_only():
    found = measure(training(batchnorm="train"), noise_batches=6)
    assert np.isnan(found.example_covariance).all()
    assert np.isfinite(found.sampled_gradients).all()
    assert found.sampled_noise.shape == (5, 5)


def test_second_moment():
    """With batches of all examples there is only one gradient."""
    update = momentum(weight_decay=0.3)
    problem = training(attack=STILL, sampling=sampling(batch_size=EXAMPLES), update=update)
    losses, theta = loss_of(problem)
    gradient = jacrev(lambda t: losses(t).mean())(theta).detach() + 0.3 * theta
    found = second_moment(StackedNetwork(network(), "vmapped"), problem, batches=3, chunk=2)
    torch.testing.assert_close(found, gradient**2, **EXACT64)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="noise_batches must be 0 or at least 2"):
        settings(noise_batches=1)
    with pytest.raises(ValueError, match="max_products must be at least"):
        settings(max_products=2)
    with pytest.raises(ValueError, match="the Hessian of TRADES"):
        measure(training(objective=TRADES(beta=6.0, label_smoothing=0.0)))


def test_slopes_of_a_fixed_attack_are_the_hessian_of_the_batches():
    """With batches of all examples and no attack, the slope of the gradient is H, apart from kinks."""
    still = training(attack=attack(eps=0.0, random_start="none"), sampling=sampling(batch_size=EXAMPLES))
    found = measure(still)
    # close by: both ends lie between the same kinks
    slopes, errors = gradient_slopes(
        StackedNetwork(network(), "vmapped"), still, found.directions, np.full(5, 1e-6), batches=2, chunk=4
    )
    np.testing.assert_allclose(slopes, found.hessian, rtol=1e-5, atol=1e-6 * found.eigenvalues[0])
    np.testing.assert_allclose(errors, 0, atol=1e-6)  # all batches are the same examples
    with pytest.raises(ValueError, match="no noise"):
        measure(still, slope_batches=2)


def test_slopes_see_the_attack_and_the_perturbation_move():
    """The reference takes batch gradients one by one at both ends, with AWP and a random start."""
    problem = training(perturbation=AWP(gamma=0.05, warmup_epochs=0))
    found = measure(problem, slope_batches=3, chunk=4, random_directions=0)
    net = StackedNetwork(network(), "looped")
    theta, u = net.theta(), found.directions.positions
    each = []
    for batch in (-1, -2, -3):
        slopes = np.empty((3, 3))
        for j, h in enumerate(found.slope_distances):
            ends = [
                batch_gradients(
                    net, (theta + sign * h * u[:, j])[None], net.statistics(1), problem, [batch], 0
                )
                for sign in (1, -1)
            ]
            slopes[:, j] = ((ends[0][0] - ends[1][0]) @ u).numpy()[0] / (2 * h)
        each.append(slopes)
    np.testing.assert_allclose(found.slopes, np.mean(each, axis=0), rtol=1e-7, atol=1e-9)
    errors = np.std(each, axis=0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(found.slope_errors, errors, rtol=1e-6, atol=1e-9)
    assert np.abs(found.slopes - found.hessian).max() > 1e-3 * found.eigenvalues[0]


def test_a_point_is_measured_along_given_directions():
    problem = training(attack=STILL)
    start = measure(problem)
    again = measure_point(
        network(), problem, settings(), engine="vmapped", chunk=4, directions=start.directions
    )
    for name in ("eigenvalues", "hessian", "noise", "mean_gradient"):
        np.testing.assert_allclose(getattr(again, name), getattr(start, name), rtol=1e-12, atol=1e-14)
    assert np.isnan(again.residuals).all()
