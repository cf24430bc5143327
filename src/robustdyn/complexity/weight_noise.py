"""Flatness by random weights: the Gaussian noise that a network bears (PAC-Bayes sigma)."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robustdyn.complexity.layers import UndefinedMeasure
from robustdyn.complexity.network import ComplexityMeasure, MeasureValue, NetworkOnExamples
from robustdyn.curvature import EmpiricalRisk
from robustdyn.curvature.probes import gaussian

_WEAKEST, _STRONGEST = -15.0, 3.0  # log2 σ, where the search begins
_BISECTIONS = 9  # to 18/2^9 = 0.035 octaves, 2.5 % of σ
_SLOPE_OCTAVES = 0.25  # over less, the difference of two errors is mostly noise
_MAGNITUDE_FLOOR = 1e-3  # Jiang et al.; Dziugaite et al., code

Spread = Callable[[Tensor, float], Tensor]


def isotropic(theta: Tensor, sigma: float) -> Tensor:
    """The standard deviations (P,) of noise that has the same one in every weight."""
    return torch.full_like(theta, sigma)


def magnitude_aware(theta: Tensor, sigma: float) -> Tensor:
    """The standard deviations (P,) √(σ² w² + 10⁻⁶) of noise that grows with the weight."""
    return (sigma**2 * theta.square() + _MAGNITUDE_FLOOR**2).sqrt()


def pacbayes_sigma(
    network: NetworkOnExamples,
    *,
    spread: Spread = isotropic,
    increase: float = 0.1,
    samples: int = 10,
) -> MeasureValue:
    """1/σ², σ the largest noise in the weights under which the expected error rises by at most ``increase``.

    E_u [err(w + u)] − err(w) = 0.1 with u ~ N(0, σ²) in every weight, or N(0, σ² w² + 10⁻⁶) in the
    magnitude-aware form; err is the error on the adversarial examples, which are held fixed.

    Source: Jiang et al. (ICLR 2020), equations 53 and 61 of the appendix, with the search of Dziugaite et al.
    (NeurIPS 2020). Their code hands σ² to a function that expects a standard deviation, so that its σ is the
    square root of this one; it also folds BatchNorm, and here nothing is folded. The search is a bisection of
    log σ from 2⁻¹⁵ to 2³. All its steps use the same ten noise vectors, times σ, and log σ is interpolated in
    the last interval.

    Args:
        network: The network on its examples.
        spread: Standard deviations from (θ, σ): ``isotropic`` or ``magnitude_aware``.
        increase: Of the error, a share of the examples.
        samples: Noise vectors, at least two.

    Cost: a forward pass for each of ten noise vectors at 11 values of σ, 37 gradients. The standard error is
    over noise vectors: that of the mean error, divided by the error's slope in log σ.
    """
    risk = network.risk
    theta = risk.theta()
    before = _error(risk, theta)

    def rises(log_sigma: float) -> Tensor:
        scale = spread(theta, 2.0**log_sigma)
        errors = []
        for sample in range(samples):
            generator = network.generator(f"pacbayes-{sample}")
            noise = gaussian(tuple(theta.shape), generator, theta.dtype, theta.device)
            errors.append(_error(risk, theta + scale * noise))
        return torch.tensor(errors, dtype=torch.float64) - before

    low, high = _WEAKEST, _STRONGEST
    below, above = rises(low), rises(high)
    if float(below.mean()) > increase:
        raise UndefinedMeasure(f"even σ = {2**low:.2g} raises the error by more than {increase:g}")
    if float(above.mean()) <= increase:
        raise UndefinedMeasure(f"not even σ = {2**high:g} raises the error, {before:.2g}, by {increase:g}")
    for _ in range(_BISECTIONS):
        if high - low >= _SLOPE_OCTAVES:
            slope = float(above.mean() - below.mean()) / (high - low)  # by log2 σ
        middle = (low + high) / 2
        there = rises(middle)
        if float(there.mean()) > increase:
            high, above = middle, there
        else:
            low, below = middle, there
    share = (increase - float(below.mean())) / float(above.mean() - below.mean())
    value = 2.0 ** (-2 * (low + share * (high - low)))
    error = float((below.std() + above.std()) / 2) / math.sqrt(samples)
    return MeasureValue(
        value=value,
        standard_error=2 * math.log(2) * value * error / slope,
        gradients=((_BISECTIONS + 2) * samples + 1) / 3,
    )


def _error(risk: EmpiricalRisk, theta: Tensor) -> float:
    """Share of the examples that the network at θ (P,) gets wrong; logits that are not finite are wrong."""
    moved = risk.at(theta)
    with moved.guard(), torch.no_grad():
        wrong = torch.zeros((), dtype=torch.float64, device=risk.device)
        parameters = moved.parameters()
        for inputs, targets in moved.chunks():
            logits = moved.outputs(parameters, inputs)
            right = (logits.argmax(dim=1) == targets) & logits.isfinite().all(dim=1)
            wrong += (~right).sum()
    return float(risk.shards.sum(wrong)) / risk.examples


MEASURES: tuple[ComplexityMeasure, ...] = (
    ComplexityMeasure(
        name="pacbayes_sigma",
        label="PAC-Bayes 1/σ²",
        family="flatness",
        source="Jiang et al., ICLR 2020, eq. 53",
        function=pacbayes_sigma,
        searches=True,
    ),
    ComplexityMeasure(
        name="pacbayes_sigma_magnitude",
        label="PAC-Bayes 1/σ², magnitude-aware",
        family="flatness",
        source="Jiang et al., ICLR 2020, eq. 61",
        function=partial(pacbayes_sigma, spread=magnitude_aware),
        searches=True,
    ),
)
