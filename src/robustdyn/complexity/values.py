"""How a measure turns numbers into its value, or says why it has none."""

import math
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from torch import Tensor

from robustdyn.complexity.network import MeasureValue

Arguments = ParamSpec("Arguments")


def mean_over_examples(numbers: Tensor, *, gradients: float) -> MeasureValue:
    """The mean of one number for each example, with its standard error for a sample of examples.

    Args:
        numbers: (m,), of the examples of all processes.
        gradients: Cost of the measure.

    Returns:
        NaN if a number is not finite.
    """
    numbers = numbers.detach().double().cpu()
    bad = numbers.isfinite().logical_not().nonzero().flatten().tolist()
    if bad:
        return undefined(f"it is not finite on {len(bad)} examples, the first of which is number {bad[0]}")
    return mean_of_samples(numbers, gradients=gradients)


def mean_of_samples(samples: Tensor, *, gradients: float) -> MeasureValue:
    """The mean of (n,) independent samples, with its standard error if there are two or more."""
    count = len(samples)
    error = float(samples.std()) / math.sqrt(count) if count > 1 else None
    return MeasureValue(value=float(samples.mean()), standard_error=error, gradients=gradients)


def undefined(why: str) -> MeasureValue:
    """The value of a measure that this network does not have.

    Args:
        why: A sentence.
    """
    return MeasureValue(value=math.nan, undefined=why)


def undefined_unless_finite(measure: Callable[Arguments, MeasureValue]) -> Callable[Arguments, MeasureValue]:
    """The measure, but NaN where a loss or a derivative is not finite; the error's words say why."""

    @wraps(measure)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> MeasureValue:
        try:
            return measure(*args, **kwargs)
        except FloatingPointError as error:
            return undefined(str(error))

    return guarded
