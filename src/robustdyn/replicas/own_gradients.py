"""Estimates slope and noise from the replicas' own gradients, which no measurement at one point can show."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustdyn.replicas.ensemble_record import RecordedEnsemble
from robustdyn.replicas.prediction import SETTLED, example_noise, sampling_of

Array = NDArray[np.float64]

COLUMNS = ("step", "slope", "noise", "slope_error", "noise_error")


def own_gradients(ensemble: RecordedEnsemble) -> pd.DataFrame:
    """Slope and noise of the replicas' gradients at their own places, relative to the start.

    Steps before ``SETTLED`` are left out, because replicas have hardly separated before it.

    Returns:
        A row for each recorded step whose predecessor was also recorded, with its gradients. There is none
        without slopes at the start, or with batches drawn without replacement, whose noise depends on earlier
        ones. ``step``, updates taken: the gradient belongs to the last of them, at the place before it.
        ``slope``, Σ_i cov(g_i, x_i) over Σ_i (J Σ)_ii with J of the start and the measured Σ: the ratio of
        the gradient that pulls replicas back to the linear one. ``noise``, geometric mean over directions of
        the variance of g − J x, divided by a batch's variance at the start; it includes the difference
        between the mean gradient at x and J x. ``slope_error`` and ``noise_error``, standard errors by the
        jackknife over replicas.
    """
    start, sampling, steps = ensemble.start, sampling_of(ensemble), ensemble.steps.tolist()
    rows: list[tuple[float, ...]] = []
    if not np.isfinite(start.slopes).all() or not sampling.replacement:
        return pd.DataFrame(rows, columns=list(COLUMNS))
    gamma = np.diag(sum(example_noise(ensemble, start))) / sampling.batch_size
    for row, step in enumerate(steps):
        g = ensemble.gradient[:, row]
        if step < SETTLED or step - 1 not in steps or not np.isfinite(g).all():
            continue
        x = ensemble.position[:, steps.index(step - 1)]
        left = [
            _slope_and_noise(np.delete(x, r, axis=0), np.delete(g, r, axis=0), start.slopes, gamma)
            for r in range(len(x))
        ]
        error = np.sqrt((len(x) - 1) * np.var(left, axis=0))
        rows.append((step, *_slope_and_noise(x, g, start.slopes, gamma), *error))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _slope_and_noise(x: Array, g: Array, slopes: Array, gamma: Array) -> tuple[float, float]:
    x, g = x - x.mean(axis=0), g - g.mean(axis=0)
    pull = np.einsum("ri,ij,rj->", x, slopes, x)
    noise = ((g - x @ slopes.T) ** 2).sum(axis=0) / (len(x) - 1)
    return float((x * g).sum() / pull), float(np.exp(np.log(noise / gamma).mean()))
