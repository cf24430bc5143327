"""Tables of the tests whether replicas are Gaussian."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustdyn.replicas.gaussianity import corrected, joint, of_directions

LEVEL = 0.05
STATISTICS = ("skewness", "kurtosis")
JOINT = [
    *("replicas", "directions"),
    *(f"{name}{of}" for name in STATISTICS for of in ("", "_expected", "_spread", "_p")),
    *("smallest_p", "rejected"),
]


def normality(places: NDArray[np.float64]) -> pd.DataFrame:
    """Mardia's tests of replicas' places (R, S, k), step by step.

    Returns:
        A row for each step: ``replicas`` and ``directions``; ``skewness`` and ``kurtosis`` with their mean
        (``_expected``) and deviation (``_spread``) under normality and the probability of values at least as
        far out (``_p``), null with fewer than k + 2 replicas; ``smallest_p`` of the 2k tests of single
        directions, corrected for their number; ``rejected``, how many of these are at most LEVEL. All are
        null where replicas left the range of numbers or did not spread.
    """
    replicas, _, k = places.shape
    rows = []
    for now in places.swapaxes(0, 1):
        row: dict[str, float] = {"replicas": replicas, "directions": k}
        p = normality_of_directions(now)[[f"{name}_p" for name in STATISTICS]].to_numpy()
        if np.isfinite(p).all():
            row |= {"smallest_p": float(p.min()), "rejected": int((p <= LEVEL).sum())}
            if replicas >= k + 2:
                for name, moment in zip(STATISTICS, joint(now), strict=True):
                    row[name] = moment.value
                    row |= {f"{name}_{of}": getattr(moment, of) for of in ("expected", "spread", "p")}
        rows.append(row)
    return pd.DataFrame(rows, columns=JOINT)


def normality_of_directions(places: NDArray[np.float64]) -> pd.DataFrame:
    """Skewness and kurtosis (3 under normality) of places (R, k) along each direction.

    Returns:
        A row for each ``direction``, from 1 on: ``skewness`` and ``kurtosis``, and the p-values
        ``skewness_p`` and ``kurtosis_p``, corrected for all 2k tests together. All are null with fewer than
        three replicas, and where replicas left the range of numbers or did not spread.
    """
    k = places.shape[1]
    values, p = np.full((2, k, 2), np.nan)
    if len(places) >= 3 and np.isfinite(places).all() and (np.ptp(places, axis=0) > 0).all():
        found = of_directions(places)
        values = np.array([[moment.value for moment in pair] for pair in found])
        p = corrected(np.array([[moment.p for moment in pair] for pair in found]).ravel()).reshape(k, 2)
    frame = pd.DataFrame({"direction": np.arange(1, k + 1)})
    for column, name in enumerate(STATISTICS):
        frame[name], frame[f"{name}_p"] = values[:, column], p[:, column]
    return frame
