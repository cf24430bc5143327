"""Learning-rate rules: the factor on the optimiser's rate as a function of the epoch, or of a measurement."""

from robustdyn.methods.schedules.fixed import Constant, Cosine, Interpolated, MultiDecay, Piecewise
from robustdyn.methods.schedules.measured import BoundRate, WCIRate
from robustdyn.methods.schedules.schedule import Schedule

__all__ = [
    "BoundRate",
    "Constant",
    "Cosine",
    "Interpolated",
    "MultiDecay",
    "Piecewise",
    "Schedule",
    "WCIRate",
]
