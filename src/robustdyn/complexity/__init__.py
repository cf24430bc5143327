"""Complexity measures of a trained network: norms, margins, smoothness and flatness (docs/measures.md)."""

from itertools import chain

from robustdyn.complexity import (
    flatness,
    index,
    margins,
    norms,
    robust_flatness,
    sharpness,
    smoothness,
    spectral,
    weight_noise,
)
from robustdyn.complexity.layers import UndefinedMeasure
from robustdyn.complexity.network import ComplexityMeasure, MeasureValue, NetworkOnExamples

MEASURES: dict[str, ComplexityMeasure] = {
    measure.name: measure
    for measure in chain(
        norms.MEASURES,
        spectral.MEASURES,
        margins.MEASURES,
        smoothness.MEASURES,
        flatness.MEASURES,
        weight_noise.MEASURES,
        sharpness.MEASURES,
        robust_flatness.MEASURES,
        index.MEASURES,
    )
}

__all__ = ["MEASURES", "ComplexityMeasure", "MeasureValue", "NetworkOnExamples", "UndefinedMeasure"]
