"""Measures networks: any model in one call, and any training through a recorder or Lightning callbacks."""

from robustdyn.measure.alignment import Alignment
from robustdyn.measure.callback import Measure
from robustdyn.measure.catoni_terms import CatoniTerms
from robustdyn.measure.complexity import ComplexityMeasures
from robustdyn.measure.density import Density
from robustdyn.measure.epochs import RecordEpochs
from robustdyn.measure.model_measurement import ModelMeasurement, measure_model, standard_measurements
from robustdyn.measure.plan import Measurement, MeasurementPlan
from robustdyn.measure.posterior import POSTERIOR_TABLES, RecordPosterior, posterior_rows
from robustdyn.measure.recorder import Recorder
from robustdyn.measure.refreshed_slope import RefreshedSlope, RefreshedSlopes, refreshed_slopes
from robustdyn.measure.snapshot import Eigenpairs, Snapshot
from robustdyn.measure.spectrum import Spectrum
from robustdyn.measure.timing import RecordTiming
from robustdyn.measure.watch import StopOnNonFinite
from robustdyn.measure.weight_curvature import WeightCurvature
from robustdyn.measure.when import measured_epochs

__all__ = [
    "POSTERIOR_TABLES",
    "Alignment",
    "CatoniTerms",
    "ComplexityMeasures",
    "Density",
    "Eigenpairs",
    "Measure",
    "Measurement",
    "MeasurementPlan",
    "ModelMeasurement",
    "RecordEpochs",
    "RecordPosterior",
    "RecordTiming",
    "Recorder",
    "RefreshedSlope",
    "RefreshedSlopes",
    "Snapshot",
    "Spectrum",
    "StopOnNonFinite",
    "WeightCurvature",
    "measure_model",
    "measured_epochs",
    "posterior_rows",
    "refreshed_slopes",
    "standard_measurements",
]
