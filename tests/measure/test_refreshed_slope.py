"""Tests the slope of the gradient whose attack follows the weights, by differentiating through the attack."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

from robustdyn.attacks import PGD
from robustdyn.measure import Eigenpairs, MeasurementPlan, RefreshedSlope, Spectrum
from robustdyn.methods import OptimizerState
from robustdyn.streams import generator
from tests.tolerances import EXACT64, FD

EXAMPLES, SECOND, K, SEED = 12, 7, 3, 5
ATTACK = PGD(norm="l2", eps=0.2, step_size=0.08, steps=3)


@pytest.fixture(scope="module")
def problem():
    """A smooth network in float64, and images that the attack does not move out of the pixel range."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    images = 0.4 + 0.2 * torch.rand(EXAMPLES, 1, 2, 2, dtype=torch.float64)
    return model.eval(), images, torch.randint(0, 3, (EXAMPLES,))


def measured(problem, attack, distance):
    model, images, targets = problem

    def examples(network, draw):
        some = slice(SECOND if draw else EXAMPLES)
        source = generator(SEED, "measure-attack", draw)
        return attack.perturb(network, images[some], targets[some], source), targets[some]

    plan = MeasurementPlan(
        measurements={"spectrum": Spectrum(), "refreshed_slope": RefreshedSlope(distance=distance)},
        eigenpairs=Eigenpairs(directions=K, tolerance=1e-10, max_products=200, extra_vectors=20),
        second_attack=SECOND,
    )
    before = [tensor.clone() for tensor in model.state_dict().values()]
    snapshot = plan.snapshot(
        model,
        examples,
        epoch=4,
        step=80,
        optimizer=OptimizerState(0.1, 0.9, 0.0),
        train_examples=100,
        batch_size=10,
        seed=SEED,
        starts={},
        attack=attack,
    )
    rows = {"spectrum": [], "slopes": []}
    for table, row in plan.rows(snapshot, 0.0):
        rows.setdefault(table, []).append(row)
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert all(parameter.requires_grad for parameter in model.parameters())
    return snapshot, rows


def column(rows, table, name):
    return np.array([row[name] for row in rows[table]])


def test_agrees_with_the_gradient_differentiated_through_the_attack(problem):
    snapshot, rows = measured(problem, ATTACK, distance=1e-4)
    model, images, targets = problem
    images, targets = images[:SECOND], targets[:SECOND]
    starts = ATTACK.start(images, generator(SEED, "measure-attack", 1))
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]

    def loss(theta, image, target):
        parts = theta.split([shape.numel() for shape in shapes])
        named = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, named, (image[None],)), target[None])

    def adversarial(theta, image, target, start):
        """PGD in the l2 ball, written out as Madry et al. (ICLR 2018) do."""
        here = start
        for _ in range(ATTACK.steps):
            up = grad(loss, argnums=1)(theta, here, target)
            moved = here + ATTACK.step_size * up / up.norm() - image
            here = image + moved * torch.clamp(ATTACK.eps / moved.norm(), max=1.0)
        return here

    def refreshed(theta, image, target, start):
        return grad(loss)(theta, adversarial(theta, image, target, start), target)

    theta = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    fixed = vmap(adversarial, (None, 0, 0, 0))(theta, images, targets, starts)
    assert float(fixed.min()) > 0
    assert float(fixed.max()) < 1
    u = snapshot.hessian.eigenvectors
    moving = vmap(jacrev(refreshed), (None, 0, 0, 0))(theta, images, targets, starts)
    curved = vmap(hessian(loss), (None, 0, 0))(theta, fixed, targets)
    j, h = (torch.einsum("pk,ipq,qk->ik", u, each, u).numpy() for each in (moving, curved))
    ratio = j.mean(axis=0) / h.mean(axis=0)
    assert (np.abs(ratio - 1) > 0.01).all()  # the attack does move
    np.testing.assert_allclose(column(rows, "slopes", "refreshed_slope_ratio"), ratio, **FD)
    np.testing.assert_allclose(
        column(rows, "slopes", "refreshed_slope") - column(rows, "spectrum", "curvature"),
        (j - h).mean(axis=0),
        **FD,
    )
    error = (j - ratio * h).std(axis=0, ddof=1) / SECOND**0.5 / np.abs(h.mean(axis=0))
    np.testing.assert_allclose(column(rows, "slopes", "refreshed_slope_ratio_se"), error, **FD)


def test_without_an_attack_it_is_the_curvature(problem):
    _, rows = measured(problem, PGD(norm="linf", eps=0.0, step_size=0.1, steps=3), distance=0.1)
    np.testing.assert_allclose(column(rows, "slopes", "refreshed_slope_ratio"), 1.0, **EXACT64)
    np.testing.assert_allclose(column(rows, "slopes", "refreshed_slope_ratio_se"), 0.0, **EXACT64)
    np.testing.assert_allclose(
        column(rows, "slopes", "refreshed_slope"), column(rows, "spectrum", "curvature"), **EXACT64
    )


def test_refuses_no_distance():
    with pytest.raises(ValueError, match="distance must be positive, got 0"):
        RefreshedSlope(distance=0.0)
