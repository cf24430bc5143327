"""Margins and confidence of the predictions, on unperturbed and adversarial examples.

The output margin of example i is γ_i = f_y(x_i) − max_{j ≠ y} f_j(x_i) of the logits f, negative where the
network is wrong. Divided by Π_l ‖W_l‖₂ it no longer changes with the size of the logits; as in the source
BatchNorm is folded into the weights (``robustdyn.complexity.layers``). All functions here are properties of
the outputs otherwise, for which BatchNorm makes no difference.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from robustdyn.complexity.layers import UndefinedMeasure
from robustdyn.complexity.network import (
    INVARIANCES,
    ComplexityMeasure,
    MeasureValue,
    NetworkOnExamples,
)
from robustdyn.complexity.norms import log_sum
from robustdyn.complexity.values import FORWARD, mean_over_examples

_OfLogits = Callable[[NetworkOnExamples, Tensor], MeasureValue]
_LOW, _HIGH = 0.0, 0.75  # of the boundary's thickness, as in its source
_POINTS, _PAIRS = 32, 64  # on each segment; at most so many segments


def output_margins(logits: Tensor, targets: Tensor) -> Tensor:
    """γ of each example, (m,), from logits (m, K) and classes (m,)."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise UndefinedMeasure(
            f"margins need logits (m, K) of two or more classes, not {tuple(logits.shape)}"
        )
    logits = logits.double()
    own = logits.gather(1, targets[:, None])
    margins: Tensor = own[:, 0] - logits.scatter(1, targets[:, None], -math.inf).amax(dim=1)
    return margins


def mean_margin(network: NetworkOnExamples, logits: Tensor) -> MeasureValue:
    """(1/m) Σ_i γ_i; the standard error is over examples.

    Args:
        network: Has the classes.
        logits: (m, K), of its unperturbed or adversarial examples.
    """
    return mean_over_examples(output_margins(logits, network.targets), gradients=FORWARD)


def low_margin(network: NetworkOnExamples, logits: Tensor) -> MeasureValue:
    """The 10th percentile of γ, its ⌊m/10⌋-th smallest value (Jiang et al., ICLR 2020, equation 22).

    The standard error is over examples: half the distance of the order statistics one standard deviation of
    their number away.

    Args:
        network: Has the classes.
        logits: (m, K), of its unperturbed or adversarial examples.
    """
    ordered = output_margins(logits, network.targets).sort().values
    m = len(ordered)
    index, spread = max(1, m // 10) - 1, math.sqrt(0.09 * m)
    above, below = min(m - 1, round(index + spread)), max(0, round(index - spread))
    return MeasureValue(
        value=float(ordered[index]),
        standard_error=float(ordered[above] - ordered[below]) * spread / (above - below)
        if above > below
        else None,
        gradients=FORWARD,
    )


def over_spectral(network: NetworkOnExamples, margin: MeasureValue) -> MeasureValue:
    """A margin over Π_l ‖W_l‖₂ (Bartlett, Foster & Telgarsky, NeurIPS 2017)."""
    product = math.exp(log_sum([layer.spectral for layer in network.layers.each]))
    error = margin.standard_error
    return MeasureValue(
        value=margin.value / product,
        standard_error=None if error is None else error / product,
        gradients=margin.gradients,
        undefined=margin.undefined,
    )


def mean_entropy(network: NetworkOnExamples, logits: Tensor) -> MeasureValue:
    """(1/m) Σ_i H(p_i) in nats, of the predicted probabilities p_i; the standard error is over examples.

    Args:
        network: Not read.
        logits: (m, K), of its unperturbed or adversarial examples.
    """
    log_p = logits.double().log_softmax(dim=1)
    return mean_over_examples(-torch.special.xlogy(log_p.exp(), log_p.exp()).sum(dim=1), gradients=FORWARD)


def boundary_thickness(network: NetworkOnExamples) -> MeasureValue:
    """Mean over pairs of ‖x_s − x_r‖₂ ∫₀¹ 1{α < g(x(t)) < β} dt (Yang et al., NeurIPS 2020, definition 1).

    x_r is an unperturbed example that the network puts into class i, x_s its adversarial example if that is
    put into another class j, x(t) = (1 − t) x_r + t x_s the segment between them, and g = p_i − p_j the
    difference of the predicted probabilities; α = 0 and β = 0.75, as in the source. The integral is over the
    midpoints of 32 intervals, and at most 64 pairs are used. The adversarial examples are those of the
    network's own attack, where the source has an l2 attack of radius 1 on each image.

    Cost: a pass for each point of each pair, at most 3.3 gradients for 256 examples. The standard error is
    over pairs.

    Raises:
        UndefinedMeasure: The attack changes no prediction.
    """
    before, after = network.clean_logits.argmax(dim=1), network.adversarial_logits.argmax(dim=1)
    changed = (before != after).nonzero().flatten()[:_PAIRS]
    if len(changed) == 0:
        raise UndefinedMeasure("the attack changes the prediction of no example, so that there is no segment")
    start, end = network.clean[changed], network.adversarial[changed]
    i, j = before[changed, None], after[changed, None]
    inside = torch.zeros(len(changed), dtype=torch.float64, device=start.device)
    for point in range(_POINTS):
        at = start + (point + 0.5) / _POINTS * (end - start)
        p = network.logits(at).double().softmax(dim=1)
        g = (p.gather(1, i) - p.gather(1, j))[:, 0]
        inside += ((g > _LOW) & (g < _HIGH)).double() / _POINTS
    lengths = (end - start).double().flatten(1).norm(dim=1)
    passes = 2 + _POINTS * len(changed) / len(network.clean)
    return mean_over_examples(lengths * inside, gradients=FORWARD * passes)


def _over_spectral(
    margin: Callable[[NetworkOnExamples], MeasureValue], network: NetworkOnExamples
) -> MeasureValue:
    return over_spectral(network, margin(network))


def _on_clean(measure: _OfLogits, network: NetworkOnExamples) -> MeasureValue:
    return measure(network, network.clean_logits)


def _on_adversarial(measure: _OfLogits, network: NetworkOnExamples) -> MeasureValue:
    return measure(network, network.adversarial_logits)


def _both(
    measure: _OfLogits,
) -> Iterator[tuple[str, Callable[[NetworkOnExamples], MeasureValue]]]:
    """The measure on unperturbed and on adversarial examples."""
    yield "clean", partial(_on_clean, measure)
    yield "robust", partial(_on_adversarial, measure)


def _margins() -> Iterator[ComplexityMeasure]:
    function: Callable[[NetworkOnExamples], MeasureValue]
    for measure, name, label, source in (
        (low_margin, "margin_p10", "10th percentile of margins", "Jiang et al., ICLR 2020, eq. 22"),
        (mean_margin, "margin_mean", "mean margin", "Bartlett, Foster & Telgarsky, NeurIPS 2017"),
    ):
        for kind, function in _both(measure):
            yield ComplexityMeasure(
                name=f"{name}_{kind}",
                label=f"{label}, {kind}",
                family="margin",
                source=source,
                function=function,
                invariances=INVARIANCES,
            )
            yield ComplexityMeasure(
                name=f"{name}_{kind}_over_spectral",
                label=f"{label} / Π ‖W‖₂, {kind}",
                family="margin",
                source="Bartlett, Foster & Telgarsky, NeurIPS 2017",
                function=partial(_over_spectral, function),
                invariances=INVARIANCES,
            )
    for kind, function in _both(mean_entropy):
        yield ComplexityMeasure(
            name=f"entropy_{kind}",
            label=f"entropy, {kind}",
            family="margin",
            source="Pereyra et al., ICLR workshop 2017",
            function=function,
            invariances=INVARIANCES,
        )
    yield ComplexityMeasure(
        name="boundary_thickness",
        label="boundary thickness",
        family="margin",
        source="Yang et al., NeurIPS 2020, definition 1",
        function=boundary_thickness,
        invariances=INVARIANCES,
    )


MEASURES: tuple[ComplexityMeasure, ...] = tuple(_margins())
