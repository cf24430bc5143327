"""How a measure turns samples into its value."""

import math

from torch import Tensor

from robustdyn.complexity.layers import UndefinedMeasure
from robustdyn.complexity.network import MeasureValue

FORWARD, BACKWARD, HESSIAN_PRODUCT = 1 / 3, 2 / 3, 3.0
"""Cost of a pass or product in gradients, where no graph is kept."""


def trace_gradients(estimator: str, products: int) -> float:
    """Cost of ``robustdyn.curvature.layer_traces`` in gradients, one for its checks included."""
    return 1 + (HESSIAN_PRODUCT if estimator == "hutchinson" else BACKWARD) * products


def mean_over_examples(numbers: Tensor, *, gradients: float) -> MeasureValue:
    """The mean of one number for each example, with its standard error for a sample of examples.

    Args:
        numbers: (m,).
        gradients: Cost of the measure.

    Raises:
        UndefinedMeasure: A number is not finite.
    """
    numbers = numbers.detach().double().cpu()
    bad = numbers.isfinite().logical_not().nonzero().flatten().tolist()
    if bad:
        raise UndefinedMeasure(
            f"it is not finite on {len(bad)} of {len(numbers)} examples, first on number {bad[0]}"
        )
    return mean_of_samples(numbers, gradients=gradients)


def mean_of_samples(samples: Tensor, *, gradients: float) -> MeasureValue:
    """The mean of (n,) independent samples, with its standard error if there are two or more."""
    count = len(samples)
    error = float(samples.std()) / math.sqrt(count) if count > 1 else None
    return MeasureValue(value=float(samples.mean()), standard_error=error, gradients=gradients)
