import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian
from torch.nn import functional as F

from robustdyn import streams
from robustdyn.methods import AWP
from robustdyn.replicas import (
    Ensemble,
    EnsembleRecord,
    Lines,
    PointSettings,
    Recorded,
    RobustLoss,
    StackedNetwork,
    line_units,
    loss_around,
    measure_lines,
    measure_point,
    predicted_deviations,
    read_ensemble,
)
from tests.replicas.problems import (
    EXAMPLES,
    Quadratic,
    attack,
    by_hand,
    directions,
    images,
    momentum,
    network,
    sampling,
    training,
)
from tests.replicas.test_ensemble_record import SETTINGS, arrays, start
from tests.tolerances import EXACT64, FD

MULTIPLES = (0.5, 1.0, 2.0)


def smooth():
    """A network without kinks, with 307 weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Tanh(), nn.Linear(4, 3))
    return model.double().eval()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def outputs(model, theta, inputs):
    shapes = {name: p.shape for name, p in model.named_parameters()}
    parts = theta.split([shape.numel() for shape in shapes.values()])
    named = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    return functional_call(model, named, (inputs,))


def attacked(model, theta, problem, draws=1):
    """PGD on all examples, in plain PyTorch; the starts come batch by batch from one stream."""
    eps, size = problem.attack.eps, problem.attack.step_size
    x, y = problem.images.repeat(draws, 1, 1, 1), problem.targets.repeat(draws)
    generator = streams.generator(problem.seed, "replica-loss")
    batches = [part for _ in range(draws) for part in problem.images.split(4)]
    starts = [torch.empty_like(part).uniform_(-eps, eps, generator=generator) for part in batches]
    adversarial = (x + torch.cat(starts)).clamp(0, 1)
    for _ in range(problem.attack.steps):
        adversarial.requires_grad_()
        loss = F.cross_entropy(outputs(model, theta, adversarial), y)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        moved = adversarial.detach() + size * gradient.sign()
        adversarial = torch.max(torch.min(moved, x + eps), x - eps).clamp(0, 1)
    return adversarial


def loss_on(model, problem, adversarial):
    """θ -> loss on fixed adversarial examples."""
    targets = problem.targets.repeat(len(adversarial) // EXAMPLES)
    return lambda theta: F.cross_entropy(outputs(model, theta, adversarial), targets)


def held_loss(model, problem, draws=1):
    return loss_on(model, problem, attacked(model, flat(model), problem, draws))


def lines_of(model, problem, *, deviations, multiples=MULTIPLES, draws=1, engine="vmapped"):
    loss = loss_around(StackedNetwork(model, engine), problem, EXAMPLES, draws)
    vectors = directions(model, len(deviations)).forces
    return measure_lines(loss, vectors, np.array(deviations), multiples=multiples, chunk=4)


def test_the_expansion_of_a_quadratic_loss_is_the_loss():
    draws = torch.Generator().manual_seed(1)
    root = torch.randn(4, 4, generator=draws, dtype=torch.float64)
    curvature, z = root @ root.T, torch.randn(7, 4, generator=draws, dtype=torch.float64)
    theta = torch.randn(4, generator=draws, dtype=torch.float64)
    net = StackedNetwork(Quadratic(curvature, theta), "vmapped")
    still = attack(eps=0.0, steps=0)
    no_classes = torch.zeros(7, dtype=torch.int64)
    loss = RobustLoss(net, z, no_classes, lambda out, _: out[:, 0], still, draws=2, batch_size=3, seed=0)
    vectors, _ = torch.linalg.qr(torch.randn(4, 2, generator=draws, dtype=torch.float64))
    found = measure_lines(loss, vectors, np.array([0.3, 2.0]), multiples=(0.1, 1.0, 50.0), chunk=5)

    def value(at):
        return 0.5 * torch.einsum("ni,ij,nj->n", at - z, curvature, at - z).mean()

    u, slope = vectors.numpy(), curvature @ (theta - z.mean(dim=0))
    assert found.loss == pytest.approx(float(value(theta)), rel=1e-12)
    assert found.examples == 7
    np.testing.assert_allclose(found.gradient, slope.numpy() @ u, **EXACT64)
    np.testing.assert_allclose(found.hessian, u.T @ curvature.numpy() @ u, **EXACT64)
    np.testing.assert_allclose(found.slopes, found.hessian, **EXACT64)
    assert found.multiples.tolist() == [-50.0, -1.0, -0.1, 0.1, 1.0, 50.0]
    for i, deviation in enumerate((0.3, 2.0)):
        x = found.multiples * deviation
        expected = [float(value(theta + far * vectors[:, i])) for far in x]
        np.testing.assert_allclose(found.held[i], expected, **EXACT64)
        np.testing.assert_allclose(found.recomputed[:, i], [expected, expected], **EXACT64)  # both draws
        expanded = found.loss + found.gradient[i] * x + found.hessian[i, i] * x**2 / 2
        np.testing.assert_allclose(expanded, expected, **EXACT64)
        slopes = found.gradient[i] + found.hessian[i, i] * x
        np.testing.assert_allclose(found.recomputed_gradient[i], slopes, **EXACT64)
    moves = torch.randn(3, 4, generator=draws, dtype=torch.float64)
    linear, expanded = loss.expanded(moves)
    np.testing.assert_allclose(expanded, [float(value(theta + move)) for move in moves], **EXACT64)
    np.testing.assert_allclose(linear, found.loss + moves.numpy() @ slope.numpy(), **EXACT64)


@pytest.mark.parametrize(("engine", "draws"), [("vmapped", 2), ("looped", 1)])
def test_lines_are_what_dense_derivatives_and_plain_attacks_say(engine, draws):
    model, problem = smooth(), training()
    deviations = (0.2, 0.4, 0.1)
    found = lines_of(model, problem, deviations=deviations, draws=draws, engine=engine)
    theta, value = flat(model), held_loss(model, problem, draws)
    u = directions(model, 3).forces
    assert found.starts.shape == (draws,)
    np.testing.assert_allclose(found.loss, value(theta).item(), **EXACT64)
    np.testing.assert_allclose(found.gradient, (grad(value)(theta) @ u).numpy(), **EXACT64)
    np.testing.assert_allclose(found.hessian, (u.T @ hessian(value)(theta) @ u).numpy(), **EXACT64)
    for i, deviation in enumerate(deviations):
        seen = []
        for j, c in enumerate(found.multiples):
            at = theta + c * deviation * u[:, i]
            adversarial = attacked(model, at, problem, draws)
            np.testing.assert_allclose(found.held[i, j], value(at).item(), **EXACT64)
            each = [loss_on(model, problem, part)(at).item() for part in adversarial.chunk(draws)]
            np.testing.assert_allclose(found.recomputed[:, i, j], each, **EXACT64)
            seen.append((grad(loss_on(model, problem, adversarial))(at) @ u).numpy())
        np.testing.assert_allclose(found.recomputed_gradient[i], np.stack(seen)[:, i], **EXACT64)
        (low, high) = seen[1], seen[4]  # ∓ 1 deviation
        np.testing.assert_allclose(found.slopes[:, i], (high - low) / (2 * deviation), **EXACT64)
    assert np.abs(found.recomputed.mean(axis=0) - found.held).max() > 1e-4  # the attack does change


def test_the_held_expansion_errs_as_the_third_power_of_the_distance():
    """Halving the distance divides the error by eight, and the mean error of both sides by sixteen."""
    found = lines_of(smooth(), training(), deviations=(1.0, 1.0, 1.0), multiples=(0.025, 0.05, 0.1))
    c = found.multiples
    errors = (
        found.held - found.loss - np.outer(found.gradient, c) - np.outer(np.diag(found.hessian), c**2 / 2)
    )
    right = errors[:, 3:]
    # the next order is 0.1 times a factor of order one smaller
    np.testing.assert_allclose(right[:, 1:] / right[:, :-1], 8, rtol=0.1)
    even = right + errors[:, 2::-1]
    np.testing.assert_allclose(even[:, 1:] / even[:, :-1], 16, rtol=0.1)


def test_recomputed_the_loss_is_the_closed_form_of_a_linear_classifier():
    """For two classes in l2, max ℓ = log(1 + exp(−y wᵀx + ε ‖w‖)), and one long step finds it for any w."""
    eps = 0.3
    problem = training(
        images=0.3 + 0.4 * images()[0],  # the box is never reached
        targets=torch.arange(EXAMPLES) % 2,
        attack=attack(norm="l2", eps=eps, step_size=9.0, steps=1, random_start="none"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 2, bias=False)).double()
    found = lines_of(model, problem, deviations=(1.0, 0.5, 2.0), multiples=(1e-4,))
    sign = 2.0 * problem.targets - 1

    def closed(theta):
        w = theta[72:] - theta[:72]
        return F.softplus(-sign * (problem.images.flatten(1) @ w) + eps * w.norm()).mean()

    theta, u = flat(model), directions(model, 3).forces
    for i, deviation in enumerate(found.deviations):
        expected = [closed(theta + c * deviation * u[:, i]).item() for c in found.multiples]
        np.testing.assert_allclose(found.recomputed[0, i], expected, **EXACT64)
    # Danskin: the slope of the maximum is that at a fixed maximiser
    np.testing.assert_allclose(found.gradient, (grad(closed)(theta) @ u).numpy(), **EXACT64)
    curved = (u.T @ hessian(closed)(theta) @ u).numpy()
    np.testing.assert_allclose(found.slopes, curved, **FD)
    # which the Hessian at a fixed maximiser falls short of, by some ε ∇²‖w‖
    assert (np.diag(curved) > np.diag(found.hessian) + 1e-3).all()


def test_without_an_attack_held_and_recomputed_are_the_same():
    found = lines_of(network(), training(attack=attack(eps=0.0)), deviations=(0.1, 0.1))
    np.testing.assert_allclose(found.held, found.recomputed[0], **EXACT64)


@pytest.mark.parametrize("engine", ["vmapped", "looped"])
def test_replicas_are_expanded_in_all_of_weight_space(engine):
    """The reference is a dense Hessian at the weights of a PyTorch loop, without AWP and weight decay."""
    perturbation = AWP(gamma=0.05, warmup_epochs=0)
    problem, model = training(perturbation=perturbation), network()
    recorded = Recorded(
        steps=(0, 4, 7),
        loss_steps=(0, 4),
        loss_examples=EXAMPLES,
        mean_steps=(),
        loss_draws=2,
        expansion=True,
        weights=False,
    )
    ensemble = Ensemble(model, problem, directions=directions(model), recorded=recorded, engine=engine)
    found = ensemble.run([3, 5])
    value, theta = held_loss(model, problem, 2), flat(model)
    slope, curvature = grad(value)(theta), hessian(value)(theta)
    for name in ("robust_loss", "held_loss", "linear_loss", "expanded_loss"):
        np.testing.assert_allclose(found[name][:, 0], value(theta).item(), **EXACT64)
    for row, replica in enumerate((3, 5)):
        at = by_hand(model, problem, torch_sgd, replica, perturbation)[4]
        move = at - theta
        linear = value(theta) + slope @ move
        np.testing.assert_allclose(found["held_loss"][row, 1], value(at).item(), **EXACT64)
        np.testing.assert_allclose(found["linear_loss"][row, 1], linear.item(), **EXACT64)
        expanded = linear + move @ curvature @ move / 2
        np.testing.assert_allclose(found["expanded_loss"][row, 1], expanded.item(), **EXACT64)
        adversarial = attacked(model, at, problem, 2)
        each = [loss_on(model, problem, part)(at).item() for part in adversarial.chunk(2)]
        np.testing.assert_allclose(found["recomputed_loss"][row, 1], each, **EXACT64)
        np.testing.assert_allclose(found["robust_loss"][row, 1], np.mean(each), **EXACT64)
    norms = np.sqrt(found["distance"][:, 1] ** 2 - (found["position"][:, 1] ** 2).sum(axis=1))
    np.testing.assert_allclose(found["outside"][:, 1], norms, **EXACT64)
    without = Ensemble(
        model,
        problem,
        directions=directions(model),
        recorded=Recorded(
            steps=(4,),
            loss_steps=(4,),
            loss_examples=EXAMPLES,
            mean_steps=(),
            loss_draws=1,
            expansion=False,
            weights=False,
        ),
        engine=engine,
    ).run([3])
    assert "held_loss" not in without
    np.testing.assert_allclose(without["robust_loss"][0], found["recomputed_loss"][0, 1:, 0], **EXACT64)


def torch_sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=momentum().weight_decay)


def test_targets_may_be_probabilities():
    hard, model = training(), smooth()
    soft = training(targets=F.one_hot(hard.targets, 3).double())
    ours, theirs = (lines_of(model, problem, deviations=(0.2,)) for problem in (hard, soft))
    for name, value in ours.arrays().items():
        np.testing.assert_allclose(value, theirs.arrays()[name], **EXACT64)


def test_what_cannot_be_expanded_is_refused():
    with pytest.raises(ValueError, match=r"steps must hold all loss_steps for an expansion; add \[2\]"):
        Recorded(
            steps=(0, 1),
            loss_steps=(0, 2),
            loss_examples=1,
            mean_steps=(),
            loss_draws=1,
            expansion=True,
            weights=False,
        )
    with pytest.raises(ValueError, match="loss_draws must be at least 1"):
        Recorded(
            steps=(),
            loss_steps=(),
            loss_examples=1,
            mean_steps=(),
            loss_draws=0,
            expansion=False,
            weights=False,
        )
    for multiples in ((), (0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="multiples must increase strictly from above 0"):
            lines_of(smooth(), training(), deviations=(0.1,), multiples=multiples)
    with pytest.raises(ValueError, match="deviations must be 2 positive numbers"):
        lines_of(smooth(), training(), deviations=(0.1, 0.0))


def test_units_are_predicted_deviations():
    """Stationary: σ² = η γ (1+μ) / (λ' (1−μ) (2(1+μ) − η λ')), λ' = λ + ω; along random directions √P σ."""
    model = network()
    problem = training(learning_rate=[0.01] * 5000, sampling=sampling(replacement=True))
    settings = PointSettings(
        eigenvectors=2,
        random_directions=1,
        attack_draws=1,
        noise_batches=0,
        slope_batches=0,
        slope_distance=1.0,
        tolerance=1e-9,
        max_products=300,
        memory=2**24,
    )
    point = measure_point(model, problem, settings, engine="vmapped", chunk=4)
    found = predicted_deviations(point, problem)
    curvature, eta, mu = point.eigenvalues + momentum().weight_decay, 0.01, 0.9
    variance = (
        np.diag(point.noise) * eta * (1 + mu) / (curvature * (1 - mu) * (2 * (1 + mu) - eta * curvature))
    )
    # the largest over the steps: momentum overshoots the stationary law a little at first
    np.testing.assert_allclose(found[:2] ** 2, variance[:2], rtol=0.05)
    # the largest rate tells, at whatever rate replicas begin
    warmed = training(learning_rate=[1e-6] + [0.01] * 4999, sampling=sampling(replacement=True))
    np.testing.assert_array_equal(predicted_deviations(point, warmed), found)
    units = line_units(point, problem)
    np.testing.assert_array_equal(units[:2], found[:2])
    assert units[2] == pytest.approx(found[2] * np.sqrt(len(flat(model))), rel=1e-12)


def test_lines_are_measured_once_and_read_back(tmp_path):
    record = EnsembleRecord(tmp_path, SETTINGS, {}, chunk=2)
    record.start(start, torch.device("cpu"))
    record.add(range(2), arrays(range(2)))
    bare = read_ensemble(tmp_path)
    assert bare.lines is None
    assert bare.held_loss is None
    measured = lines_of(smooth(), training(), deviations=(0.2, 0.3))
    record.lines(lambda: measured)

    def never():
        raise AssertionError

    found = record.lines(never), read_ensemble(tmp_path).lines
    for lines in found:
        assert isinstance(lines, Lines)
        assert isinstance(lines.examples, int)
        for name, value in measured.arrays().items():
            np.testing.assert_array_equal(lines.arrays()[name], value)


def test_expanded_losses_are_read_back(tmp_path):
    record = EnsembleRecord(tmp_path, {**SETTINGS, "record.loss_steps": [2]}, {}, chunk=2)
    record.start(start, torch.device("cpu"))
    names = ("held_loss", "linear_loss", "expanded_loss", "outside")
    for first in (0, 2):
        values = {name: np.full((2, 1), float(i + first)) for i, name in enumerate(names)}
        record.add(range(first, first + 2), {**arrays(range(first, first + 2)), **values})
    found = read_ensemble(tmp_path)
    assert found.expanded_loss.tolist() == [[2.0], [2.0], [4.0], [4.0]]
    assert found.outside.tolist() == [[3.0], [3.0], [5.0], [5.0]]
