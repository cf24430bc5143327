"""Norms of the layers as linear maps.

‖W_l‖₂ is the spectral norm of layer l: that of a linear layer's matrix, and that of a convolution with
circular padding on images of the size that it gets here, which ``convolution_norm`` computes exactly. Where
the source takes the weight tensor as a matrix (out, in · kernel) instead, the name ends in ``reshaped``. As
in the sources BatchNorm is folded (``robustdyn.complexity.layers``).
"""

import math

from robustdyn.complexity.layers import FoldedLayer
from robustdyn.complexity.network import (
    INVARIANCES,
    ComplexityMeasure,
    Invariance,
    MeasureValue,
    NetworkOnExamples,
)
from robustdyn.complexity.norms import log_sum


def spectral_log_product(network: NetworkOnExamples) -> MeasureValue:
    """Σ_l ln ‖W_l‖²₂ (Jiang et al., ICLR 2020, equation 32; Sedghi, Gupta & Long, ICLR 2019)."""
    return MeasureValue(value=2 * log_sum([layer.spectral for layer in network.layers.each]))


def spectral_log_product_reshaped(network: NetworkOnExamples) -> MeasureValue:
    """Σ_l ln ‖W_l‖²₂ of the reshaped weights (Jiang et al., ICLR 2020, equation 32)."""
    return MeasureValue(value=2 * log_sum([layer.spectral_reshaped for layer in network.layers.each]))


def spectral_distance(network: NetworkOnExamples) -> MeasureValue:
    """Σ_l ‖W_l − W_l⁰‖²₂ (Jiang et al., ICLR 2020, equation 41).

    BatchNorm is folded into the weights W_l⁰ before training, too, with the statistics that it had then, 0
    and 1.
    """
    return MeasureValue(value=sum(layer.spectral_distance**2 for layer in network.layers.each))


def frobenius_over_spectral(network: NetworkOnExamples) -> MeasureValue:
    """Σ_l ‖W_l‖²_F / ‖W_l‖²₂ (Jiang et al., ICLR 2020, equation 33).

    ‖W_l‖_F is the norm of the weight tensor, as in the source. The convolution's own Frobenius norm is larger
    by the root of its output positions.
    """
    log_sum([layer.spectral for layer in network.layers.each])  # none is zero
    return MeasureValue(value=sum(layer.frobenius_sq / layer.spectral**2 for layer in network.layers.each))


def spectral_complexity(network: NetworkOnExamples) -> MeasureValue:
    """The logarithm of Π_l ‖W_l‖₂ · (Σ_l (‖W_lᵀ‖_{2,1} / ‖W_l‖₂)^{2/3})^{3/2}.

    Source: Bartlett, Foster & Telgarsky, NeurIPS 2017, equation 1.2. The reference matrices are zero and ReLU
    has the Lipschitz constant 1. ‖Wᵀ‖_{2,1} is the sum over output units of the norms of their weights; a
    convolution has a unit for each output channel and position. The logarithm keeps deep networks finite.
    """
    layers = network.layers.each
    product = log_sum([layer.spectral for layer in layers])
    ratios = sum((_two_one_norm(layer) / layer.spectral) ** (2 / 3) for layer in layers)
    return MeasureValue(value=product + 1.5 * math.log(ratios))


def _two_one_norm(layer: FoldedLayer) -> float:
    """‖Wᵀ‖_{2,1} of the layer as a linear map."""
    return layer.positions * float(layer.weight.flatten(1).norm(dim=1).sum())


_JIANG = "Jiang et al., ICLR 2020, eq."

MEASURES: tuple[ComplexityMeasure, ...] = (
    ComplexityMeasure(
        name="spectral_log_product",
        label="ln Π ‖W‖²₂",
        family="norm",
        source=f"{_JIANG} 32; Sedghi et al., ICLR 2019",
        function=spectral_log_product,
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="spectral_log_product_reshaped",
        label="ln Π ‖W‖²₂, reshaped",
        family="norm",
        source=f"{_JIANG} 32",
        function=spectral_log_product_reshaped,
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="spectral_distance",
        label="Σ ‖W − W⁰‖²₂",
        family="norm",
        source=f"{_JIANG} 41",
        function=spectral_distance,
        needs_initial=True,
        invariances=frozenset[Invariance]({"batchnorm_scale"}),
    ),
    ComplexityMeasure(
        name="frobenius_over_spectral",
        label="Σ ‖W‖²_F / ‖W‖²₂",
        family="norm",
        source=f"{_JIANG} 33",
        function=frobenius_over_spectral,
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="spectral_complexity",
        label="ln spectral complexity",
        family="norm",
        source="Bartlett, Foster & Telgarsky, NeurIPS 2017, eq. 1.2",
        function=spectral_complexity,
        invariances=INVARIANCES,
    ),
)
