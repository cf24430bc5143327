"""Smoothness: how fast the network changes with its input.

Every measure here depends on the network's function only, and therefore has all the invariances that leave
the function as it is. Shapes: m examples, D numbers of an input, K classes.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustdyn.attacks import summed_cross_entropy
from robustdyn.complexity.layers import UndefinedMeasure
from robustdyn.complexity.network import (
    INVARIANCES,
    ComplexityMeasure,
    MeasureValue,
    NetworkOnExamples,
)
from robustdyn.complexity.values import mean_over_examples
from robustdyn.models.modes import frozen_parameters

_LIPSCHITZ_STEPS = 10
_SMALLEST_DISTANCE = 1e-12  # an input that the attack did not move has the slope zero


def local_lipschitz(network: NetworkOnExamples) -> MeasureValue:
    """(1/m) Σ_i max ‖f(x') − f(x_i)‖₁ / ‖x' − x_i‖_p over x' in the attack's ball around x_i.

    Source: Yang et al. (NeurIPS 2020), the empirical Lipschitz constant of section 5, and its public code: f
    are the logits, p is the norm of the ball, and the maximum is searched by ten signed gradient steps of the
    ratio itself from a point near x_i. The code's step of 0.003 and its start's standard deviation of 0.001,
    for a ball of 0.031, are here ε/10 and ε/30. In an l2 ball the steps are l2 steps.

    Cost: 10 2/3 gradients; one for each step, and two forward passes. The standard error is over examples.
    """
    attack = network.ball
    search = replace(
        attack,
        steps=_LIPSCHITZ_STEPS,
        step_size=attack.eps / _LIPSCHITZ_STEPS,
        random_start="gaussian",
        relative_start=1.0,
        start_std=attack.eps / 30,
        projection="ball",
        batchnorm="eval",
    )
    order = math.inf if attack.norm == "linf" else 2.0
    starts = search.start(network.clean, network.generator("local-lipschitz"))
    slopes = []
    with network.risk.guard():
        for clean, logits, start in _chunks(network, network.clean, network.clean_logits, starts):
            slope = _Slope(network.model, clean, logits, order)
            steepest = search.climb(slope, clean, clean, start, lambda ratios, _: ratios.sum())
            with torch.no_grad():
                slopes.append(slope(steepest))
    return mean_over_examples(torch.cat(slopes), gradients=_LIPSCHITZ_STEPS + 2 / 3)


class _Slope(nn.Module):
    """x' (B, ...) -> ‖f(x') − f(x)‖₁ / ‖x' − x‖ (B,)."""

    def __init__(self, model: nn.Module, clean: Tensor, logits: Tensor, order: float) -> None:
        super().__init__()
        self._model, self._clean, self._logits, self._order = model, clean, logits, order

    def forward(self, inputs: Tensor) -> Tensor:
        rise = (self._model(inputs) - self._logits).abs().sum(dim=1)
        run = torch.linalg.vector_norm((inputs - self._clean).flatten(1), ord=self._order, dim=1)
        slope: Tensor = rise / run.clamp_min(_SMALLEST_DISTANCE)
        return slope


def prediction_divergence(network: NetworkOnExamples) -> MeasureValue:
    """(1/m) Σ_i KL(p(x_i) ‖ p(x_i')), p the softmax of the logits and x_i' the given adversarial example.

    Source: Zhang et al. (TRADES, ICML 2019), the second term of their objective, equation 5, without its
    maximum: x' is the example of the attack that the other measures see, too.

    Cost: two forward passes, 2/3 of a gradient. The standard error is over examples.
    """
    clean = F.log_softmax(network.clean_logits.double(), dim=1)
    attacked = F.log_softmax(network.adversarial_logits.double(), dim=1)
    divergences = F.kl_div(attacked, clean, log_target=True, reduction="none").sum(dim=1)
    return mean_over_examples(divergences, gradients=2 / 3)


def input_gradient_norm(network: NetworkOnExamples, *, order: Literal[1, 2]) -> MeasureValue:
    """(1/m) Σ_i ‖∇_x ℓ(f(x_i), y_i)‖ at the clean inputs, ℓ the cross-entropy.

    Source: Simon-Gabriel et al. (ICML 2019), section 2: the mean increase of the loss under a small
    perturbation is ε times the mean of the dual norm, l1 for the l∞ ball and l2 for the l2 ball. Ross &
    Doshi-Velez (AAAI 2018) penalise the square of the l2 norm.

    Args:
        network: The network on its examples.
        order: 1 or 2.

    Cost: one gradient. The standard error is over examples.
    """
    slopes = _input_gradients(network, network.clean)
    norms = torch.linalg.vector_norm(slopes, ord=order, dim=1)
    return mean_over_examples(norms, gradients=1.0)


def gradient_alignment(network: NetworkOnExamples) -> MeasureValue:
    """(1/m) Σ_i cos(∇_x ℓ(x_i), ∇_x ℓ(x_i + η_i)), η_i uniform in the attack's ball.

    Source: Andriushchenko & Flammarion (NeurIPS 2020), equation 4. Their regulariser is λ times one minus
    this value. Their noise is uniform in the l∞ ball and not cut to the range of pixels, as here; for an l2
    attack it is uniform in the l2 ball. As in their code for training, examples with a zero gradient at
    either point are left out. The loss there is smaller than rounding.

    Cost: two gradients. The standard error is over examples, each with noise of its own.
    """
    attack = network.ball
    noise = replace(attack, random_start="uniform", relative_start=1.0, valid_range=(-math.inf, math.inf))
    shifted = noise.start(network.clean, network.generator("gradient-alignment"))
    here, there = _input_gradients(network, network.clean), _input_gradients(network, shifted)
    lengths = here.norm(dim=1) * there.norm(dim=1)
    directed = lengths > 0
    if not bool(directed.any()):
        raise UndefinedMeasure("the loss has no input gradient on any example, so that there is no direction")
    cosines = (here * there).sum(dim=1)[directed] / lengths[directed]
    return mean_over_examples(cosines, gradients=2.0)


def _input_gradients(network: NetworkOnExamples, inputs: Tensor) -> Tensor:
    """∇_x ℓ of every example, (m, D) float64."""
    rows = []
    with network.risk.guard(), frozen_parameters(network.model):
        for part, targets in _chunks(network, inputs, network.targets):
            leaf = part.detach().clone().requires_grad_()
            (slopes,) = torch.autograd.grad(summed_cross_entropy(network.model(leaf), targets), leaf)
            rows.append(slopes.flatten(1).double())
    return torch.cat(rows)


def _chunks(network: NetworkOnExamples, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The chunks of tensors that have an entry for each example."""
    return zip(*(tensor.split(network.risk.chunk_size) for tensor in tensors), strict=True)


MEASURES: tuple[ComplexityMeasure, ...] = (
    ComplexityMeasure(
        name="local_lipschitz",
        label="local Lipschitz",
        family="smoothness",
        source="Yang et al., NeurIPS 2020, section 5",
        function=local_lipschitz,
        searches=True,
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="prediction_divergence",
        label="KL(clean, adversarial)",
        family="smoothness",
        source="Zhang et al., ICML 2019, eq. 5",
        function=prediction_divergence,
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="input_gradient_l1",
        label="input gradient, l1",
        family="smoothness",
        source="Simon-Gabriel et al., ICML 2019, section 2",
        function=partial(input_gradient_norm, order=1),
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="input_gradient_l2",
        label="input gradient, l2",
        family="smoothness",
        source="Simon-Gabriel et al., ICML 2019, section 2",
        function=partial(input_gradient_norm, order=2),
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="gradient_alignment",
        label="gradient alignment",
        family="smoothness",
        source="Andriushchenko & Flammarion, NeurIPS 2020, eq. 4",
        function=gradient_alignment,
        invariances=INVARIANCES,
    ),
)
