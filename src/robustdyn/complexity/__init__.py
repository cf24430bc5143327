"""Complexity measures of a trained network: norms, margins, smoothness and flatness (docs/measures.md)."""

from itertools import chain

from robustdyn.complexity import flatness, robust_flatness, sharpness, smoothness, weight_noise
from robustdyn.complexity.network import ComplexityMeasure, MeasureValue, NetworkOnExamples

MEASURES: dict[str, ComplexityMeasure] = {
    measure.name: measure
    for measure in chain(
        smoothness.MEASURES,
        flatness.MEASURES,
        weight_noise.MEASURES,
        sharpness.MEASURES,
        robust_flatness.MEASURES,
    )
}

__all__ = ["MEASURES", "ComplexityMeasure", "MeasureValue", "NetworkOnExamples"]
