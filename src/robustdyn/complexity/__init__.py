"""Complexity measures of a trained network: norms, margins, smoothness and flatness (docs/measures.md)."""

from robustdyn.complexity.network import ComplexityMeasure, MeasureValue, NetworkOnExamples, UndefinedMeasure

MEASURES: dict[str, ComplexityMeasure] = {}

__all__ = ["MEASURES", "ComplexityMeasure", "MeasureValue", "NetworkOnExamples", "UndefinedMeasure"]
