"""Robust flatness against copies of the network that are moved and attacked one by one."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustdyn.attacks import PGD
from robustdyn.complexity import MEASURES as ALL
from robustdyn.complexity.robust_flatness import MEASURES, average_robust_flatness, worst_robust_flatness
from tests.complexity.two_layer import (
    ATTACK,
    REPARAMETRISATIONS,
    assert_model_is_as_before,
    batchnorm_network,
    initialised,
    on_examples,
    relu_network,
)
from tests.tolerances import MC_SIGMAS


def attacked_loss(model: nn.Module, network, generator: torch.Generator) -> float:
    inputs = network.attack.perturb(model, network.clean, network.targets, generator)
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs), network.targets))


@pytest.mark.parametrize("build", [relu_network, batchnorm_network])
def test_the_average_is_that_of_copies_that_are_moved_and_attacked(build):
    network = on_examples(initialised(build))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = float(F.cross_entropy(network.model(network.adversarial), network.targets))
    increases = []
    for _ in range(100):
        moved = copy.deepcopy(network.model)
        with torch.no_grad():
            for module in moved.modules():
                if isinstance(module, nn.Linear):  # BatchNorm's own parameters stay
                    for p in module.parameters():
                        v = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                        p += 0.5 * p.norm() * v / v.norm()
        increases.append(attacked_loss(moved, network, generator) - before)
    increases = torch.tensor(increases)
    found = average_robust_flatness(network, samples=100)
    error = math.hypot(found.standard_error, float(increases.std()) / 100**0.5)
    assert abs(found.value - float(increases.mean())) < MC_SIGMAS * error
    assert found.value > MC_SIGMAS * error  # zero would not pass


@pytest.mark.slow  # many samples
def test_the_standard_error_of_the_average_is_the_spread_over_seeds():
    model = initialised(relu_network)
    like = on_examples(model)
    found = [average_robust_flatness(on_examples(model, like=like, seed=s)) for s in range(24)]
    spread = float(torch.tensor([one.value for one in found]).std())
    stated = (sum(one.standard_error**2 for one in found) / len(found)) ** 0.5
    # the spread of 24 values has a standard error of 15 %
    assert 0.6 < spread / stated < 1.5


def test_attacks_on_the_moved_network_are_stronger_than_the_old_examples():
    network = on_examples(initialised(relu_network))
    found = average_robust_flatness(network).value
    weak = replace(network, attack=replace(ATTACK, eps=1e-9, step_size=1e-9))
    fixed = replace(weak, clean=network.adversarial)  # the attack cannot leave the given examples
    assert found > average_robust_flatness(fixed).value


def test_the_worst_case_of_a_small_ball_is_the_sum_of_the_tensors_gradients():
    # to first order, and with examples that the attack cannot move: Σ_k ξ ‖w_k‖ ‖g_k‖
    tiny = PGD(eps=1e-9, step_size=1e-9)
    network = on_examples(initialised(relu_network), attack=tiny)
    loss = F.cross_entropy(network.model(network.adversarial), network.targets)
    weights = list(network.model.parameters())
    slopes = torch.autograd.grad(loss, weights)
    first_order = sum(float(w.detach().norm() * g.norm()) for w, g in zip(weights, slopes, strict=True))
    xi = 1e-5
    found = worst_robust_flatness(network, xi=xi)
    assert found.value == pytest.approx(xi * first_order, rel=1e-2)  # curvature adds of the order of ξ


def test_batchnorm_does_not_move():
    # without the move of its scale and shift, the sum has the linear layers only
    tiny = PGD(eps=1e-9, step_size=1e-9)
    network = on_examples(initialised(batchnorm_network), attack=tiny)
    loss = F.cross_entropy(network.model(network.adversarial), network.targets)
    weights = [p for m in network.model if isinstance(m, nn.Linear) for p in m.parameters()]
    slopes = torch.autograd.grad(loss, weights)
    first_order = sum(float(w.detach().norm() * g.norm()) for w, g in zip(weights, slopes, strict=True))
    assert worst_robust_flatness(network, xi=1e-5).value == pytest.approx(1e-5 * first_order, rel=1e-2)


def test_the_worst_case_is_worse_than_random_directions():
    network = on_examples(initialised(relu_network))
    random = average_robust_flatness(network, xi=0.05, samples=50)
    worst = worst_robust_flatness(network, xi=0.05)
    assert worst.value > random.value + MC_SIGMAS * random.standard_error * 50**0.5
    assert worst.standard_error is None


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_without_an_attack_there_is_no_robust_flatness(measure):
    found = measure(on_examples(initialised(relu_network), attack=None))
    assert math.isnan(found.value)
    assert "no attack" in found.undefined


@pytest.mark.parametrize("change", REPARAMETRISATIONS)
@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_robust_flatness_does_not_depend_on_scales(measure, change):
    build, reparametrise = REPARAMETRISATIONS[change]
    assert change in measure.invariances
    network = on_examples(initialised(build))
    before = measure(network).value
    reparametrise(network.model)
    after = measure(on_examples(network.model, like=network)).value
    assert after == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_the_model_is_as_before_even_if_a_pass_fails(measure):
    assert_model_is_as_before(measure, passes=5)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_the_value_does_not_depend_on_chunks(measure):
    network = on_examples(initialised(relu_network))
    whole = on_examples(network.model, like=network, chunk_size=None)
    # sums in another order, and signs of gradients that are zero up to rounding: none here
    assert measure(whole).value == pytest.approx(measure(network).value, rel=1e-8)


def test_smoothness_and_flatness_stay_within_their_budget():
    # ten classes and PGD-10, as for CIFAR-10
    model = initialised(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 10)))
    network = on_examples(model, attack=replace(ATTACK, steps=10))
    costs = {"search": 0.0, "pass": 0.0}
    for measure in ALL.values():
        if measure.family in ("smoothness", "flatness"):
            costs["search" if measure.searches else "pass"] += measure(network).gradients
    assert costs["pass"] < 25
    assert costs["pass"] + costs["search"] < 350
