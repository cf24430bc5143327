"""Replica ensembles: many copies of a network trained on from one point, to see where its weights go.

Knows torch, attacks, objectives and weight perturbations; no Hydra and no Lightning. In short:

    training = Training(images=..., targets=..., objective=..., attack=..., perturbation=None,
                        update=MomentumUpdate(momentum=0.9, weight_decay=5e-4, initial_buffer=None),
                        learning_rate=[0.005] * 500, sampling=Sampling(...), batchnorm="eval", seed=0)
    start = measure_point(model, training, PointSettings(...), engine="vmapped", chunk=8)
    ensemble = Ensemble(model, training, directions=start.directions, recorded=Recorded(...),
    engine="vmapped") arrays = ensemble.run(range(8))
    covariance = np.cov(arrays["position"][:, -1], rowvar=False)

``robustdyn-replicas`` does this for a run's checkpoint, in chunks that are written as they finish.
"""

from robustdyn.replicas.ensemble import Directions, Ensemble, Recorded, Training
from robustdyn.replicas.network import Engine, StackedNetwork
from robustdyn.replicas.point import (
    MeasuredPoint,
    PointSettings,
    measure_point,
    sampled_gradients,
    second_moment,
)
from robustdyn.replicas.record import EnsembleRecord, RecordedEnsemble, read_ensemble
from robustdyn.replicas.sampling import Sampling, positions_covariance
from robustdyn.replicas.updates import AdamUpdate, MomentumUpdate, Update

__all__ = [
    "AdamUpdate",
    "Directions",
    "Engine",
    "Ensemble",
    "EnsembleRecord",
    "MeasuredPoint",
    "MomentumUpdate",
    "PointSettings",
    "Recorded",
    "RecordedEnsemble",
    "Sampling",
    "StackedNetwork",
    "Training",
    "Update",
    "measure_point",
    "positions_covariance",
    "read_ensemble",
    "sampled_gradients",
    "second_moment",
]
