"""How well a measure ranks runs by a target, such as their robust gap.

All coefficients compare runs in pairs: do measure and target order the two runs alike? They differ in which
pairs count. A factor is a setting that differs among the runs, such as the method or the batch size; the seed
is none.

Sources:
    Jiang et al., "Fantastic Generalization Measures and Where to Find Them", ICLR 2020: ``tau``,
        ``granulated``, ``conditional_information``.
    Kim et al., "Fantastic Robustness Measures", NeurIPS 2023: ``within_category``.
    Dziugaite et al., "In Search of Robust Measures of Generalization", NeurIPS 2020: ``sign_errors``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from robustdyn.studies.shared.comparing import LEVEL

FloatArray = NDArray[np.float64]
Statistic = Callable[[FloatArray], FloatArray]
"""Of weights of the runs, (..., n), which say how often each run is in a sample: values, (...)."""

CONDITIONING = 2  # factors at most, Jiang et al.
FEWEST = 12.0  # effective pairs of an environment, Dziugaite et al., code
SURE = 0.5  # pairs whose order is less certain do not count, Dziugaite et al., code
DRAWS = 2000  # of seeds; fewer than six seeds have fewer distinct ones


@dataclass(frozen=True)
class Design:
    """The settings of the runs that are ranked.

    Attributes:
        levels: A row per run, a column per factor, and the factor's level as text.
        seeds: The seed of each run.
    """

    levels: pd.DataFrame
    seeds: Sequence[object]

    @property
    def factors(self) -> list[str]:
        """Names of the factors."""
        return [str(factor) for factor in self.levels]

    def of(self, known: NDArray[np.bool_]) -> Design:
        """Only the runs that are marked, (n,)."""
        seeds = [seed for seed, keep in zip(self.seeds, known, strict=True) if keep]
        return Design(self.levels[known].reset_index(drop=True), seeds)

    def codes(self, factors: Sequence[str]) -> NDArray[np.int64]:
        """A number for each run, the same for runs that agree in these factors, (n,)."""
        if not factors:
            return np.zeros(len(self.levels), dtype=np.int64)
        return np.asarray(self.levels.groupby(list(factors), sort=False).ngroup(), dtype=np.int64)

    @cached_property
    def apart(self) -> dict[str, NDArray[np.bool_]]:
        """For each factor the pairs of runs that differ in it and in nothing else, not even the seed, (n, n).

        Runs of one seed share initial weights and the order of the data, so that these pairs differ by the
        factor, and by little noise.
        """
        seed = _alike(pd.factorize(pd.Series(list(self.seeds), dtype=object))[0])
        same = {factor: _alike(self.codes([factor])) for factor in self.factors}
        return {
            factor: np.logical_and.reduce([seed, *(~own if k == factor else own for k, own in same.items())])
            for factor in same
        }


def concordance(measure: ArrayLike, target: ArrayLike) -> FloatArray:
    """1 where measure and target order a pair of runs alike, −1 where not, 0 where either is tied, (n, n)."""
    return _signs(measure) * _signs(target)


def tau(concordant: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """Kendall's τ over all pairs: the mean of ``concordance`` over pairs (Jiang et al.).

    A tie counts as 0, so that this is τ_a; without ties τ_b is the same.

    Args:
        concordant: As ``concordance`` returns it, (n, n).
        weights: How often each run is in the sample, (..., n); once each if None. A run and its own copy are
            no pair.

    Returns:
        (...), missing where there is no pair.
    """
    return _mean(concordant, ~np.eye(len(concordant), dtype=bool), weights)


def granulated(
    design: Design, concordant: FloatArray, weights: FloatArray | None = None
) -> dict[str, FloatArray]:
    """ψ of each factor: the mean of ``concordance`` over the pairs that differ in it only, ``Design.apart``.

    Jiang et al. average Kendall's τ over the settings of the other factors. That is the same where each of
    these settings has a run at every level. The mean over factors is their Ψ.

    Returns:
        (...) for each factor, missing where no pair differs in it only.
    """
    return {factor: _mean(concordant, pairs, weights) for factor, pairs in design.apart.items()}


def within_category(design: Design, concordant: FloatArray) -> dict[str, FloatArray]:
    """π of each factor: τ among the runs that share a level of it, averaged over its levels (Kim et al.).

    It holds one factor fixed and lets the seed and all others vary; ``granulated`` varies one only.
    """
    inside = {
        factor: pd.get_dummies(design.levels[factor]).to_numpy(dtype=float).T for factor in design.factors
    }
    return {factor: average(tau(concordant, of_levels)) for factor, of_levels in inside.items()}


def conditional_information(design: Design, measure: ArrayLike, target: ArrayLike) -> float:
    """How much the order of the measure says about that of the target, whatever is known about factors.

    Over all ordered pairs of runs, V is the sign of the difference in the measure, G that in the target, and
    U_S the levels that both runs have in the factors S. The result is the lowest share of the entropy that V
    explains, min over S of I(V; G | U_S) / H(G | U_S), S having at most two factors (Jiang et al.).
    Probabilities are frequencies, so that an unrelated measure gets slightly more than 0. A measure that
    orders all pairs the wrong way round gets 1. A tie is a value of its own.

    Returns:
        In [0, 1]; missing where nothing is left to explain.
    """
    pairs = ~np.eye(len(design.levels), dtype=bool)
    if not pairs.any():
        return np.nan
    signs = (3 * (_signs(measure) + 1) + _signs(target) + 1)[pairs].astype(np.int64)
    shares = []
    for size in range(min(CONDITIONING, len(design.factors)) + 1):
        for chosen in combinations(design.factors, size):
            codes = design.codes(chosen)
            both = (codes[:, None] * (codes.max() + 1) + codes[None, :])[pairs]
            counts = np.bincount(9 * both + signs, minlength=9 * (codes.max() + 1) ** 2)
            information, entropy = _information(counts.reshape(-1, 3, 3).astype(float))
            if entropy > 0:
                shares.append(max(information, 0.0) / entropy)  # may be −0 by rounding
    return min(shares, default=np.nan)


def hoeffding_weights(target: ArrayLike, examples: int) -> FloatArray:
    """How sure it is that two runs' errors differ, beyond chance, (n, n).

    By Hoeffding's inequality, an error on m test examples is off by half of the observed difference Δ with
    probability p ≤ 2 exp(−m Δ² / 2), so that both are closer with probability (1 − p)². The weight is what
    this exceeds ½ by, and 0 below (Dziugaite et al., and their code).

    Args:
        target: Of each run, an error or a difference of errors, as fractions.
        examples: m, test examples.
    """
    errors = np.asarray(target, dtype=float)
    gap = np.subtract.outer(errors, errors)
    sure = np.clip(1 - 2 * np.exp(-examples * gap**2 / 2), 0, None) ** 2
    return np.asarray(np.clip(sure - SURE, 0, None))


def sign_errors(
    design: Design, concordant: FloatArray, weights: FloatArray, fewest: float = FEWEST
) -> pd.DataFrame:
    """How often the measure predicts the wrong direction, in each environment; the largest is the robust one.

    An environment is a change of one factor from one level to another, at one level of one further factor,
    over the pairs of ``Design.apart``. Dziugaite et al. fix all further factors and average over many seeds;
    with two or three seeds such an environment has too few pairs for its error to mean anything.

    Args:
        design: Of the runs.
        concordant: As ``concordance`` returns it, (n, n).
        weights: Of pairs, such as ``hoeffding_weights``, (n, n).
        fewest: Effective pairs, (Σw)² / Σw², below which an environment is left out.

    Returns:
        ``factor``, ``change`` (both levels), ``given`` (a factor and its level; empty if there is one factor
        only), ``pairs`` (effective number), ``sign_error``: the weighted mean of (1 − concordance) / 2.
    """
    columns = ["factor", "change", "given", "pairs", "sign_error"]
    found = []
    for factor, pairs in design.apart.items():
        level = design.levels[factor]
        for a, b in combinations(dict.fromkeys(level), 2):
            change = pairs & (level == a).to_numpy()[:, None] & (level == b).to_numpy()[None, :]
            for given, inside in _categories(design, but=factor).items():
                chosen = change & inside[:, None]
                weight = weights[chosen]
                effective = weight.sum() ** 2 / (weight**2).sum() if weight.any() else 0.0
                if effective >= fewest:
                    error = np.average((1 - concordant[chosen]) / 2, weights=weight)
                    found.append((factor, f"{a} → {b}", given, effective, error))
    return pd.DataFrame(found, columns=columns)


# ---------------------------------------------------------------------- how well they are known


def interval_over_seeds(design: Design, statistic: Statistic) -> tuple[float, float]:
    """95 % percentile interval of the bootstrap over seeds: whole seeds are drawn, with all their runs.

    It shows what the runs of a seed have in common. With few seeds it is too short: two have three distinct
    draws, both or either of them twice, and the range of two values covers their centre in half of all cases.

    Returns:
        Both ends; missing with one seed.
    """
    codes, seeds = pd.factorize(pd.Series(list(design.seeds), dtype=object))
    if len(seeds) < 2:
        return np.nan, np.nan
    drawn = np.random.default_rng(0).multinomial(len(seeds), [1 / len(seeds)] * len(seeds), DRAWS)
    distinct, times = np.unique(drawn, axis=0, return_counts=True)
    values = np.repeat(statistic(distinct[:, codes].astype(float)), times)
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def interval_over_settings(design: Design, statistic: Statistic) -> tuple[float, float]:
    """95 % interval of the jackknife over settings: each is left out once, with all its seeds.

    It shows how much the number depends on which settings are compared, and on the noise of single runs. It
    takes settings for independent draws from all those of interest, and does not see what all runs of a seed
    have in common.

    Returns:
        Both ends, by Student's t with settings − 1 degrees of freedom; missing for fewer than three settings.
    """
    codes = design.codes(design.factors)
    number = len(np.unique(codes))
    if number < 3:
        return np.nan, np.nan
    left_out = (codes[None, :] != np.arange(number)[:, None]).astype(float)
    values = statistic(left_out)
    error = np.sqrt((number - 1) * np.mean((values - values.mean()) ** 2))
    half = stats.t.ppf((1 + LEVEL) / 2, number - 1) * error
    centre = float(statistic(np.ones(len(codes))))
    return centre - half, centre + half


def average(values: Iterable[FloatArray]) -> FloatArray:
    """Mean over factors, or over levels, of those that have a value, (...); missing where none has."""
    stacked = np.stack([*values] or [np.asarray(np.nan)])
    known = ~np.isnan(stacked)
    with np.errstate(invalid="ignore"):
        mean: FloatArray = np.where(known, stacked, 0.0).sum(axis=0) / known.sum(axis=0)
    return mean


def _signs(values: ArrayLike) -> FloatArray:
    numbers = np.asarray(values, dtype=float)
    return np.asarray(np.sign(np.subtract.outer(numbers, numbers)))


def _alike(codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.equal.outer(codes, codes)


def _mean(concordant: FloatArray, pairs: NDArray[np.bool_], weights: FloatArray | None) -> FloatArray:
    """Of the chosen pairs, each as often as both of its runs are in the sample together."""
    often = np.ones(len(concordant)) if weights is None else weights
    total = ((often @ (concordant * pairs)) * often).sum(axis=-1)
    number = ((often @ pairs.astype(float)) * often).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: FloatArray = np.where(number > 0, total / number, np.nan)[()]
    return mean


def _information(joint: FloatArray) -> tuple[float, float]:
    """I(V; G | U) and H(G | U) in nats times the pairs, from their counts, (groups, 3, 3).

    Counts are whole numbers, so that the entropy of what the group settles is exactly 0.
    """
    group = joint.sum(axis=(1, 2), keepdims=True)
    first, second = joint.sum(axis=2, keepdims=True), joint.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        information = joint * np.log(joint * group / (first * second))
        entropy = -second * np.log(second / group)
    return float(np.nansum(information)), float(np.nansum(entropy))


def _categories(design: Design, but: str) -> dict[str, NDArray[np.bool_]]:
    """The runs at each level of every other factor; all of them if there is none."""
    found = {
        f"{factor}={level}": (design.levels[factor] == level).to_numpy()
        for factor in design.factors
        if factor != but
        for level in dict.fromkeys(design.levels[factor])
    }
    return found or {"": np.ones(len(design.levels), dtype=bool)}
