"""Measures a network in training: Lightning callbacks that call curvature/ and theory/ and write records."""

from robustdyn.measure.alignment import Alignment
from robustdyn.measure.callback import Measure, Measurement
from robustdyn.measure.density import Density
from robustdyn.measure.epochs import RecordEpochs
from robustdyn.measure.posterior import RecordPosterior, posterior_rows
from robustdyn.measure.snapshot import Eigenpairs, Snapshot
from robustdyn.measure.spectrum import Spectrum
from robustdyn.measure.timing import RecordTiming
from robustdyn.measure.watch import StopOnNonFinite
from robustdyn.measure.weight_curvature import WeightCurvature
from robustdyn.measure.when import measured_epochs

__all__ = [
    "Alignment",
    "Density",
    "Eigenpairs",
    "Measure",
    "Measurement",
    "RecordEpochs",
    "RecordPosterior",
    "RecordTiming",
    "Snapshot",
    "Spectrum",
    "StopOnNonFinite",
    "WeightCurvature",
    "measured_epochs",
    "posterior_rows",
]
