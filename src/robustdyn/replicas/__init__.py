"""Trains replica ensembles: many copies of one network trained from the same point, to see where weights go.

This package needs torch, attacks, objectives and weight perturbations, but neither Hydra nor Lightning. In
short:

    training = Training(images=..., targets=..., objective=..., attack=..., perturbation=None,
                        update=MomentumUpdate(momentum=0.9, weight_decay=5e-4, initial_buffer=None),
                        learning_rate=[0.005] * 500, sampling=Sampling(...), batchnorm="eval", seed=0)
    start = measure_point(model, training, PointSettings(...), engine="vmapped", chunk=8)
    ensemble = Ensemble(model, training, directions=start.directions, recorded=Recorded(...),
                        engine="vmapped")
    arrays = ensemble.run(range(8))
    covariance = np.cov(arrays["position"][:, -1], rowvar=False)

``EnsembleRun`` does this from the current state of a training, in chunks that are written as they finish.
``robustdyn-replicas`` uses it from a run's checkpoint, and a callback of ``robustdyn-train`` during training.
"""

from robustdyn.replicas.ensemble import Directions, Ensemble, Recorded, loss_around
from robustdyn.replicas.ensemble_record import EnsembleRecord, RecordedEnsemble, read_ensemble, read_weights
from robustdyn.replicas.expansion import Lines, RobustLoss, measure_lines
from robustdyn.replicas.network import Engine, StackedNetwork
from robustdyn.replicas.noise_free import MeanPaths, NoiseFreeSettings
from robustdyn.replicas.point import (
    MeasuredPoint,
    PointSettings,
    line_units,
    measure_point,
    predicted_deviations,
)
from robustdyn.replicas.sampled_batches import sampled_gradients, second_moment
from robustdyn.replicas.sampling import Sampling
from robustdyn.replicas.simulation import EnsembleRun, EnsembleSettings, TrainingState, fingerprint, moved
from robustdyn.replicas.training_step import Training
from robustdyn.replicas.updates import AdamUpdate, MomentumUpdate, Update

__all__ = [
    "AdamUpdate",
    "Directions",
    "Engine",
    "Ensemble",
    "EnsembleRecord",
    "EnsembleRun",
    "EnsembleSettings",
    "Lines",
    "MeanPaths",
    "MeasuredPoint",
    "MomentumUpdate",
    "NoiseFreeSettings",
    "PointSettings",
    "Recorded",
    "RecordedEnsemble",
    "RobustLoss",
    "Sampling",
    "StackedNetwork",
    "Training",
    "TrainingState",
    "Update",
    "fingerprint",
    "line_units",
    "loss_around",
    "measure_lines",
    "measure_point",
    "moved",
    "predicted_deviations",
    "read_ensemble",
    "read_weights",
    "sampled_gradients",
    "second_moment",
]
