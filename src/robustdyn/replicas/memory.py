"""Measures and predicts the memory of replicas: how far their positions depend on their earlier positions.

A linear system forgets: displacements decay with its slopes. Replicas that each move towards a different
place do not forget, for instance if slow directions that are not tracked keep them apart. Their spread is
then not caused by noise alone.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustdyn.replicas.ensemble_record import RecordedEnsemble
from robustdyn.replicas.prediction import momentum_dynamics, sampling_of
from robustdyn.theory.coupled import interpolated

Array = NDArray[np.float64]


def memory(ensemble: RecordedEnsemble, reference: int) -> pd.DataFrame:
    """The replicas' memory, at a recorded step, of all recorded steps before it except the start.

    Args:
        ensemble: The replicas.
        reference: The later step.

    Returns:
        A row for each earlier ``step``: ``reference``; ``correlation``, mean over directions of the
        correlation of x_i at both steps; ``error``, its standard error, by the jackknife over replicas;
        ``expected``, the same if the replicas' states (x, v) only decayed with the slopes: those measured
        along the mean's path, or those of the start if there are none.

    Raises:
        ValueError: The step was not recorded, slopes were not measured, or batches were drawn without
            replacement, whose noise has a memory of its own.
    """
    steps = ensemble.steps.tolist()
    slopes = ensemble.start.slopes
    if reference not in steps:
        raise ValueError(f"reference must be a recorded step, got {reference}")
    if not np.isfinite(slopes).all() or not sampling_of(ensemble).replacement:
        raise ValueError("memory needs slopes at the start and batches drawn with replacement")
    unit, factor = momentum_dynamics(ensemble)
    k = len(slopes)
    decay = unit.weight_decay * np.eye(k)
    moved = [(int(s), p.slopes) for s, p in zip(ensemble.path_steps, ensemble.path, strict=True) if s > 0]
    known_at = np.array([0, *(s for s, _ in moved)])
    known = np.stack([slopes, *(found for _, found in moved)])
    later = _centred(ensemble.position[:, steps.index(reference)])
    left = np.eye(2 * k)  # Φ, from (x, v) at a step to those at the reference
    rows = []
    for step in range(reference - 1, 0, -1):
        rate = ensemble.learning_rate[step] * factor
        pull = interpolated(known_at, known, step) + decay
        left = left @ np.block(
            [[np.eye(k) - rate * pull, -rate * unit.momentum * np.eye(k)], [pull, unit.momentum * np.eye(k)]]
        )
        if step not in steps:
            continue
        row = steps.index(step)
        x, v = _centred(ensemble.position[:, row]), _centred(ensemble.buffer[:, row]) / factor
        carried = x @ left[:k, :k].T + v @ left[:k, k:].T
        each = [_correlation(np.delete(x, r, axis=0), np.delete(later, r, axis=0)) for r in range(len(x))]
        error = np.sqrt((len(x) - 1) * np.var(each))
        scale = np.sqrt((x**2).sum(axis=0) * (later**2).sum(axis=0))
        expected = ((x * carried).sum(axis=0) / scale).mean()
        rows.append((reference, step, _correlation(x, later), error, expected))
    return pd.DataFrame(rows[::-1], columns=["reference", "step", "correlation", "error", "expected"])


def _centred(values: Array) -> Array:
    found: Array = values - values.mean(axis=0)
    return found


def _correlation(x: Array, y: Array) -> float:
    x, y = _centred(x), _centred(y)
    return float(((x * y).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))).mean())
