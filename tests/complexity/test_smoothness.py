"""Smoothness measures against closed forms on linear networks and brute force on two-layer ones."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustdyn.attacks import PGD
from robustdyn.complexity import ComplexityMeasure
from robustdyn.complexity.smoothness import (
    MEASURES,
    gradient_alignment,
    input_gradient_norm,
    local_lipschitz,
    prediction_divergence,
)
from tests.complexity.two_layer import (
    EXAMPLES,
    INPUTS,
    REPARAMETRISATIONS,
    initialised,
    on_examples,
    relu_network,
    state_of,
)
from tests.tolerances import EXACT64

BY_NAME = {measure.name: measure for measure in MEASURES}


class Opposite(nn.Module):
    """Logits w·x and −w·x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        return torch.cat([z, -z], dim=1)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_local_lipschitz_of_a_linear_network_is_twice_the_dual_norm_of_its_weight(norm, dual):
    # a wide range: no point of the ball is cut off
    attack = PGD(norm=norm, eps=0.1, valid_range=(-10.0, 10.0))
    network = on_examples(initialised(Opposite), attack=attack)
    exact = 2 * float(network.model.linear.weight.detach().norm(p=dual))
    value = local_lipschitz(network).value
    assert value <= exact * (1 + 1e-9)
    # signed steps of the ratio keep the largest coordinate a step or two behind: 20 % at a step of a tenth
    assert value > 0.8 * exact


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_local_lipschitz_beats_random_search_on_every_two_layer_network(norm):
    attack = PGD(norm=norm, eps=0.1, random_start="uniform")
    network = on_examples(initialised(relu_network), attack=attack)
    generator = torch.Generator().manual_seed(0)
    best = torch.zeros(EXAMPLES, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(100):
            near = attack.start(network.clean, generator)
            rise = (network.model(near) - network.model(network.clean)).abs().sum(dim=1)
            run = (near - network.clean).norm(p=math.inf if norm == "linf" else 2, dim=1)
            best = torch.maximum(best, rise / run)
    assert local_lipschitz(network).value > float(best.mean())


def test_prediction_divergence_is_the_sum_over_classes_and_examples():
    network = on_examples(initialised(relu_network))
    p, q = (network.model(x).softmax(dim=1).tolist() for x in (network.clean, network.adversarial))
    each = [sum(a * math.log(a / b) for a, b in zip(*row, strict=True)) for row in zip(p, q, strict=True)]
    found = prediction_divergence(network)
    assert found.value == pytest.approx(sum(each) / EXAMPLES, rel=1e-10)
    assert found.standard_error == pytest.approx(
        float(torch.tensor(each, dtype=torch.float64).std()) / EXAMPLES**0.5, rel=1e-10
    )


@pytest.mark.parametrize("order", [1, 2])
def test_input_gradient_of_softmax_regression_is_known(order):
    network = on_examples(initialised(lambda: nn.Linear(INPUTS, 3)))
    with torch.no_grad():
        errors = network.model(network.clean).softmax(dim=1)
        errors[range(EXAMPLES), network.targets] -= 1
        norms = (errors @ network.model.weight).norm(p=order, dim=1)
    found = input_gradient_norm(network, order=order)
    assert found.value == pytest.approx(float(norms.mean()), **_approx())
    assert found.standard_error == pytest.approx(float(norms.std()) / EXAMPLES**0.5, **_approx())


def test_gradients_of_a_linear_network_with_two_classes_are_aligned():
    assert gradient_alignment(on_examples(initialised(Opposite))).value == pytest.approx(1, abs=1e-12)


def test_gradient_alignment_is_the_mean_cosine_between_the_input_and_a_random_point_of_the_cube():
    network = on_examples(initialised(relu_network))
    noise = torch.empty_like(network.clean).uniform_(
        -network.attack.eps, network.attack.eps, generator=network.generator("gradient-alignment")
    )
    cosines = []
    for i in range(EXAMPLES):
        slopes = []
        for x in (network.clean[i], network.clean[i] + noise[i]):
            x = x.clone().requires_grad_()
            loss = nn.functional.cross_entropy(network.model(x[None]), network.targets[i : i + 1])
            slopes.append(torch.autograd.grad(loss, x)[0])
        cosines.append(float(torch.cosine_similarity(*slopes, dim=0)))
    assert gradient_alignment(network).value == pytest.approx(sum(cosines) / EXAMPLES, **_approx())
    # on this network some examples cross a kink within the ball, so that the test is not trivial
    assert min(cosines) < 0.99


@pytest.mark.parametrize("name", ["local_lipschitz", "gradient_alignment"])
def test_the_ball_is_searched_also_of_an_attack_that_leaves_it(name):
    network = on_examples(initialised(relu_network))
    assert network.attack.random_start == "uniform"
    leaving = replace(network, attack=replace(network.attack, relative_start=2.0, projection="range"))
    assert BY_NAME[name](leaving) == BY_NAME[name](network)


def test_examples_without_an_input_gradient_have_no_direction():
    model = initialised(relu_network)
    network = on_examples(model)
    with torch.no_grad():
        model[0].weight[:] = 0.0
    assert "no direction" in BY_NAME["gradient_alignment"](network).undefined
    with torch.no_grad():
        model[0].weight[:, 0] = 1.0
        model[0].bias[:] = -0.5
    network = on_examples(model, like=network)
    active = (network.clean[:, 0] > 0.5 + network.attack.eps) | (
        network.clean[:, 0] < 0.5 - network.attack.eps
    )
    assert 0 < int(active.sum()) < EXAMPLES  # some are on both sides of the kink
    found = gradient_alignment(network)
    assert abs(found.value) == pytest.approx(1, abs=1e-9)  # only one input matters


@pytest.mark.parametrize("name", ["local_lipschitz", "gradient_alignment"])
def test_without_a_ball_a_measure_of_the_ball_is_undefined(name):
    network = on_examples(initialised(relu_network), attack=None)
    for without in (network, replace(network, attack=PGD(eps=0.0))):
        found = BY_NAME[name](without)
        assert math.isnan(found.value)
        assert "no attack" in found.undefined


@pytest.mark.parametrize("change", REPARAMETRISATIONS)
@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_smoothness_depends_on_the_function_only(measure: ComplexityMeasure, change: str):
    build, reparametrise = REPARAMETRISATIONS[change]
    assert change in measure.invariances
    network = on_examples(initialised(build))
    before = measure(network)
    reparametrise(network.model)
    after = measure(on_examples(network.model, like=network))
    assert after.value == pytest.approx(before.value, rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_smoothness_is_the_same_for_every_chunk_size_and_leaves_the_model_as_it_was(measure):
    network = on_examples(initialised(relu_network))
    before = state_of(network.model)
    value = measure(network).value
    assert state_of(network.model) == before
    assert math.isfinite(value)
    whole = on_examples(network.model, chunk_size=None)
    assert measure(whole).value == pytest.approx(value, **_approx())


def test_a_logit_that_is_not_finite_is_named():
    network = on_examples(initialised(relu_network))
    with torch.no_grad():
        network.model[2].bias[0] = math.inf
    found = BY_NAME["prediction_divergence"](network)
    assert math.isnan(found.value)
    assert "not finite on 40 of 40 examples" in found.undefined


def _approx() -> dict[str, float]:
    return {"rel": EXACT64["rtol"], "abs": EXACT64["atol"]}
