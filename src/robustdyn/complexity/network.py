"""A trained network, the examples on which its complexity is measured, and what one measure returns."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.complexity.layers import FoldedLayers, UndefinedMeasure, folded_layers
from robustdyn.curvature import EmpiricalRisk, LayerTraces, layer_traces

Invariance = Literal["relu_rescaling", "batchnorm_scale"]
INVARIANCES: frozenset[Invariance] = frozenset(get_args(Invariance))
"""Those of every measure that depends on the network's function only."""
Family = Literal["norm", "margin", "smoothness", "flatness", "index"]


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkOnExamples:
    """A trained network and the m examples on which its complexity is measured.

    Attributes:
        model: The network in eval mode; a measure leaves its weights and gradients as they were.
        clean: Unperturbed inputs (m, ...), on the model's device and in its precision.
        adversarial: The same examples under the attack, (m, ...).
        targets: Classes (m,).
        risk: Mean cross-entropy over the adversarial examples as a function of the weights.
        attack: The attack; it gives measures that attack again their norm and radius. None if there is none.
        initial: The parameters before training by name; None if they are not known.
        known: Values that are known already, by the name of the measure, which are not computed again.
        seed: Of all random numbers.
    """

    model: nn.Module
    clean: Tensor
    adversarial: Tensor
    targets: Tensor
    risk: EmpiricalRisk
    attack: PGD | None = None
    initial: Mapping[str, Tensor] | None = None
    known: Mapping[str, "MeasureValue"] = field(default_factory=dict)
    seed: int = 0

    def generator(self, stream: str) -> torch.Generator:
        """Random stream of one measure, a function of (seed, stream)."""
        return streams.generator(self.seed, f"complexity-{stream}", device=self.clean.device)

    @property
    def ball(self) -> PGD:
        """The attack, whose ball around an input has a radius.

        Raises:
            UndefinedMeasure: There is none.
        """
        if self.attack is None or self.attack.eps == 0:
            raise UndefinedMeasure(
                "there is no attack, or its radius is zero, so that the ball around an input is a point"
            )
        return self.attack

    @cached_property
    def layer_traces(self) -> LayerTraces:
        """Tr H_kk of every parameter tensor, which the index and the trace of H share."""
        return layer_traces(self.risk, generator=self.generator("layer-traces"), weights_only=False)

    @cached_property
    def clean_logits(self) -> Tensor:
        """Logits (m, K) of the unperturbed examples."""
        return self.logits(self.clean)

    @cached_property
    def adversarial_logits(self) -> Tensor:
        """Logits (m, K) of the adversarial examples.

        Raises:
            UndefinedMeasure: Nothing attacked the examples.
        """
        if self.attack is None and torch.equal(self.clean, self.adversarial):
            raise UndefinedMeasure("the examples are not attacked")
        return self.logits(self.adversarial)

    @cached_property
    def layers(self) -> FoldedLayers:
        """The convolutions and linear layers, with the scale of BatchNorm folded into them.

        Raises:
            UndefinedMeasure: They do not say what the network does; see ``folded_layers``.
        """
        with self.risk.guard():
            return folded_layers(self.model, self.clean[:1], self.initial)

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits of any inputs (B, ...)."""
        with self.risk.guard(), torch.no_grad():
            return torch.cat([self.model(part) for part in inputs.split(self.risk.chunk_size)])


@dataclass(frozen=True, kw_only=True)
class MeasureValue:
    """What a complexity measure returns.

    Attributes:
        value: The measure; NaN if it is undefined for this network.
        standard_error: Over whatever the measure samples: examples or random directions. None if it samples
            nothing.
        gradients: Cost, in gradients: one is a forward and a backward pass over all m examples.
        undefined: Why the value is NaN, in a sentence; empty otherwise.
    """

    value: float
    standard_error: float | None = None
    gradients: float = 0.0
    undefined: str = ""

    def __post_init__(self) -> None:
        if math.isnan(self.value) and not self.undefined:
            raise ValueError("a measure without a value says why it is undefined")


@dataclass(frozen=True, kw_only=True)
class ComplexityMeasure:
    """One complexity measure, with what docs/measures.md says about it; calling it computes it.

    Attributes:
        name: In records and settings, such as ``frobenius_sum``.
        label: In figures.
        family: What it measures.
        source: Paper and equation.
        function: Computes it; raises ``UndefinedMeasure`` where it has no value.
        needs_initial: Whether it compares the weights with those before training.
        searches: Whether it searches for a perturbation of weights or inputs, which costs many gradients.
        invariances: Changes of the weights that leave the network's function and this measure as they were:
            ``"relu_rescaling"`` (a layer times c, the next one by 1/c) and ``"batchnorm_scale"`` (a layer in
            front of a BatchNorm times c).
    """

    name: str
    label: str
    family: Family
    source: str
    function: Callable[[NetworkOnExamples], MeasureValue]
    needs_initial: bool = False
    searches: bool = False
    invariances: frozenset[Invariance] = frozenset()

    def __call__(self, network: NetworkOnExamples) -> MeasureValue:
        """The known value, or else a computed one; NaN with a reason where the measure is undefined."""
        if self.name in network.known:
            return network.known[self.name]
        try:
            result = self.function(network)
        except (UndefinedMeasure, FloatingPointError) as error:
            return MeasureValue(value=math.nan, undefined=" ".join(str(error).split()))
        if math.isinf(result.value):
            return MeasureValue(value=math.nan, gradients=result.gradients, undefined="its value overflows")
        return result
