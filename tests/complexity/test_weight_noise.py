"""PAC-Bayes sigma against a network whose error under noise is known, and against public code."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

from robustdyn.complexity import NetworkOnExamples, UndefinedMeasure
from robustdyn.complexity.weight_noise import MEASURES, magnitude_aware, pacbayes_sigma
from robustdyn.curvature import EmpiricalRisk
from tests.complexity.two_layer import (
    assert_model_is_as_before,
    on_examples,
)
from tests.tolerances import MC_SIGMAS

WEIGHT = 0.7


class OneWeight(nn.Module):
    """Logits w s(x) and −w s(x) with s > 0: all examples are of class 0 as long as w > 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(WEIGHT))

    def forward(self, x: Tensor) -> Tensor:
        z = self.weight * (0.1 + x.mean(dim=1, keepdim=True))
        return torch.cat([z, -z], dim=1)


def known_network(seed: int = 0):
    """Its examples are those of the predicted class, so that the error is 0 before the noise."""
    network = on_examples(OneWeight().double().eval(), seed=seed, chunk_size=None)
    network.targets.zero_()
    return network


def test_sigma_is_where_a_normal_weight_changes_its_sign_in_a_tenth_of_the_cases():
    exact = (WEIGHT / NormalDist().inv_cdf(0.9)) ** -2
    found = pacbayes_sigma(known_network(), samples=200)
    assert abs(found.value - exact) < MC_SIGMAS * found.standard_error
    assert found.standard_error < 0.3 * exact


def test_the_magnitude_aware_sigma_is_relative_to_the_weight():
    # σ² w² + 10⁻⁶ takes the place of σ²
    exact = (1 / NormalDist().inv_cdf(0.9) ** 2 - 1e-6 / WEIGHT**2) ** -1
    found = pacbayes_sigma(known_network(), spread=magnitude_aware, samples=200)
    assert abs(found.value - exact) < MC_SIGMAS * found.standard_error


def published_network(seed: int = 0):
    """Two layers with weights 1.5 sin k², k = 1, 2, ..., on 100 inputs cos k² of the predicted classes."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    first = 1
    with torch.no_grad():
        for p in model.parameters():
            k = torch.arange(first, first + p.numel(), dtype=torch.float64)
            p.copy_(1.5 * torch.sin(k**2).view_as(p))
            first += p.numel()
        inputs = torch.cos(torch.arange(1, 401, dtype=torch.float64) ** 2).view(100, 4)
        targets = model(inputs).argmax(dim=1)
    return NetworkOnExamples(
        model=model,
        clean=inputs,
        adversarial=inputs,
        targets=targets,
        risk=EmpiricalRisk(model, inputs, targets),
        seed=seed,
    )


def test_public_code_finds_the_same_sigma():
    # nitarshan/robust-generalization-measures, _pacbayes_sigma(model, loader, 1.0, seed, search_depth=25,
    # montecarlo_samples=1000, displacement_tolerance=1e-4) for the seeds 0 to 3. Its noise has the standard
    # deviation σ², as if σ were the root of ours.
    theirs = torch.tensor([0.50244140625, 0.4999656677246094, 0.5054931640625, 0.5036985278129578]) ** -4.0
    found = pacbayes_sigma(published_network(), samples=300)
    error = math.hypot(found.standard_error, float(theirs.std()) / 2)
    assert abs(found.value - float(theirs.mean())) < MC_SIGMAS * error
    assert error < 0.1 * found.value


@pytest.mark.slow  # many samples
def test_the_standard_error_is_the_spread_over_seeds():
    found = [pacbayes_sigma(published_network(seed)) for seed in range(16)]
    spread = float(torch.tensor([one.value for one in found]).std())
    stated = (sum(one.standard_error**2 for one in found) / len(found)) ** 0.5
    # the spread of 16 values has a standard error of 18 %
    assert 0.5 < spread / stated < 1.6


def test_more_samples_cost_more():
    assert pacbayes_sigma(published_network(), samples=10).gradients == pytest.approx((11 * 10 + 1) / 3)


def test_a_network_that_is_always_wrong_bears_any_noise():
    network = known_network()
    network.targets.fill_(1)  # now the error is 1, and noise can only lower it
    with pytest.raises(UndefinedMeasure, match=r"not even σ = 8 raises the error, 1, by 0\.1"):
        pacbayes_sigma(network)


def test_a_network_that_bears_no_noise_at_all():
    network = known_network()
    with torch.no_grad():
        network.model.weight.fill_(1e-9)
    with pytest.raises(UndefinedMeasure, match=r"even σ = 3\.1e-05"):
        pacbayes_sigma(network)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_the_model_is_as_before_even_if_a_pass_fails(measure):
    assert_model_is_as_before(measure, passes=5)


def test_all_samples_see_the_same_noise_at_every_size():
    network = published_network()
    assert pacbayes_sigma(network) == pacbayes_sigma(network)
    # with noise of its own at every size, this would hold on average only
    values = [pacbayes_sigma(network, increase=increase).value for increase in (0.08, 0.1, 0.12, 0.2)]
    assert values == sorted(values, reverse=True)
