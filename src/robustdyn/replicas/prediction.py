"""Predicts an ensemble by theory: the laws with which its measured replicas are compared.

No law has a free parameter. Curvature, noise and gradient are measured at the replicas' start, or along the
path of their mean. Shapes: S recorded steps, T steps in total, k directions, N replicas with children.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from robustdyn.errors import RecordError
from robustdyn.replicas.ensemble_record import RecordedEnsemble
from robustdyn.replicas.noise_free import decays
from robustdyn.replicas.point import MeasuredPoint
from robustdyn.replicas.sampling import Sampling
from robustdyn.theory import (
    MeasuredDrift,
    MomentumDynamics,
    PosteriorTrajectory,
    is_stable,
    minibatch_noise_factor,
    propagate_coupled,
    stationary_variance,
)

Array = NDArray[np.float64]

STATIONARY, SLOW_MODE = "stationary", "slow_mode"
EXACT, EXACT_PATH = "exact", "exact_path"
REFRESHED, REFRESHED_PATH = "refreshed", "refreshed_path"
NOISE_FREE, DRIFT = "noise_free", "drift"
INJECTED, MIXTURE = "injected", "mixture"

SETTLED = 10  # steps after which replicas have separated enough


@dataclass(frozen=True, kw_only=True, eq=False)
class Law:
    """A predicted distribution of x at the recorded steps.

    Attributes:
        name: The law's name. ``stationary``: σ² at the current rate. ``slow_mode``: the papers' early-phase
            form, joined together at every change of the rate. ``exact``: the time-resolved law with the
            Hessian at fixed adversarial examples. ``refreshed``: the same with the slopes of the gradient
            whose attack follows the weights. ``noise_free`` and ``drift``: the covariance of ``refreshed``
            about a noise-free path of the mean, without and with the third-order drift. ``injected``: the
            posterior of one run, which noise since the last decay makes. ``mixture``: the posterior of runs,
            which adds the covariance of the replicas' noise-free children. Before the first decay both are
            ``refreshed``. A suffix ``_path`` means measurements along the replicas' mean, which are not
            available before the replicas have run.
        mean: (S, k).
        covariance: (S, k, k). The first two laws have only variances: entries are NaN off the diagonal, and
            on it where there is no stationary law.
        mean_error: (S, k), standard error of ``mean``, over repetitions or children; None where the mean is
            no estimate from these.
        log_variance_error: (S,), standard error of the mean over directions of ln σ², a jackknife over the
            children; None where there are none.
    """

    name: str
    mean: Array
    covariance: Array
    mean_error: Array | None = None
    log_variance_error: Array | None = None

    @property
    def variance(self) -> Array:
        """(S, k)."""
        return np.asarray(np.einsum("sii->si", self.covariance))


class Described(Protocol):
    """What is known of an ensemble before its replicas have run; see ``RecordedEnsemble``."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything on which the numbers depend."""

    @property
    def start(self) -> MeasuredPoint:
        """The measured starting point."""

    @property
    def learning_rate(self) -> Array:
        """(T,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedEnsemble:
    """An ensemble whose replicas have not run; the fields are those of ``RecordedEnsemble``."""

    settings: Mapping[str, Any]
    start: MeasuredPoint
    learning_rate: Array


def momentum_dynamics(ensemble: Described) -> tuple[MomentumDynamics, float]:
    """The optimiser as momentum SGD along the ensemble's directions at a rate of 1, and the rate's factor.

    Under Adam μ = β₁ and the factor is 1 − β₁, equation (27) of docs/theory.md.

    Raises:
        KeyError: The settings lack those of the optimiser or of the batches.
    """
    optimizer: Mapping[str, Any] = ensemble.settings["optimizer"]
    decay = 0.0 if ensemble.start.curvature_has_decay else float(optimizer["weight_decay"])
    if "betas" in optimizer:
        beta = float(optimizer["betas"][0])
        return MomentumDynamics(1.0, beta, decay), 1 - beta
    return MomentumDynamics(1.0, float(optimizer["momentum"]), decay), 1.0


def sampling_of(ensemble: Described) -> Sampling:
    """How the ensemble's batches were drawn."""
    settings = ensemble.settings
    return Sampling(
        examples=settings["examples"],
        batch_size=settings["sampling.batch_size"],
        replacement=settings["sampling.replacement"],
        drop_last=settings["sampling.drop_last"],
    )


def example_noise(ensemble: Described, point: MeasuredPoint) -> tuple[Array, Array]:
    """(C₁, C_a) (k, k) of a point: from single examples if they have gradients, else from sampled batches.

    With a weight perturbation, which follows a batch, or with BatchNorm in train mode, only sampled batches
    have the noise of replicas.

    Raises:
        RecordError: Sampled batches are necessary and there are none.
    """
    sampling = sampling_of(ensemble)
    if not ensemble.settings.get("perturbation") and np.isfinite(point.example_covariance).all():
        return point.example_covariance, point.attack_covariance
    if not len(point.sampled_gradients):
        raise RecordError(
            "with a weight perturbation or BatchNorm in train mode no law is known without sampled batches; "
            "run the ensemble with start.noise_batches=256"
        )
    n, size = sampling.examples, sampling.batch_size
    # a batch of all examples has no noise to divide by
    per_batch = minibatch_noise_factor(n, size, replacement=sampling.replacement or n == size)
    attack = point.sampled_attack_noise
    return (point.sampled_noise - attack) / per_batch, attack * size


def predicted_laws(ensemble: RecordedEnsemble) -> dict[str, Law]:
    """All laws for which the necessary measurements exist, by name.

    ``refreshed`` needs slopes, and the laws along the path need a path. The mean paths and the mixture need
    what ``robustdyn.replicas.NoiseFreeSettings`` asks for.

    Raises:
        KeyError: The settings lack those of the optimiser or of the batches.
        RecordError: No noise was measured that is valid for the ensemble.
    """
    start = ensemble.start
    laws = {law.name: law for law in (_stationary(ensemble), _slow_mode(ensemble))}
    steps, points = [0], [start]
    if ensemble.path:
        steps = [0, *(int(step) for step in ensemble.path_steps if step > 0)]
        points += [p for step, p in zip(ensemble.path_steps, ensemble.path, strict=True) if step > 0]
    for name, along, slope in (
        (EXACT, EXACT_PATH, lambda p: p.hessian),
        (REFRESHED, REFRESHED_PATH, lambda p: p.slopes),
    ):
        if not np.isfinite(slope(start)).all():
            continue
        laws[name] = _coupled(ensemble, name, [0], [start], slope)
        if len(points) > 1:
            laws[along] = _coupled(ensemble, along, steps, points, slope)
    if REFRESHED not in laws:
        return laws
    if ensemble.mean_paths is not None:
        for name, path in ((NOISE_FREE, ensemble.mean_paths.plain), (DRIFT, ensemble.mean_paths.drifting)):
            error = path.std(axis=0, ddof=1) / np.sqrt(len(path))
            laws[name] = replace(laws[REFRESHED], name=name, mean=path.mean(axis=0), mean_error=error)
    if ensemble.child is not None and np.isfinite(ensemble.child).any():
        laws |= {law.name: law for law in _mixture(ensemble, laws[REFRESHED])}
    return laws


def refreshed_covariance(ensemble: Described) -> Array:
    """Covariance (T + 1, k, k) of the ``refreshed`` law after each number of steps."""
    steps = np.arange(len(ensemble.learning_rate) + 1)
    law = _propagated(ensemble, [0], [ensemble.start], lambda p: p.slopes, steps)
    return law.position_covariance


def refreshed_with_error(ensemble: RecordedEnsemble, *, draws: int, seed: int) -> Array:
    """Variances (draws, S, k) of the ``refreshed`` law with its slopes drawn within their standard errors.

    Their spread is the error of the prediction that comes from measuring slopes on a few batches.
    """
    generator = np.random.default_rng(seed)
    start = ensemble.start
    found = []
    for _ in range(draws):
        slopes = start.slopes + start.slope_errors * generator.standard_normal(start.slopes.shape)
        drawn = replace(start, slopes=slopes)
        found.append(_coupled(ensemble, REFRESHED, [0], [drawn], lambda p: p.slopes).variance)
    return np.stack(found)


def _coupled(
    ensemble: RecordedEnsemble,
    name: str,
    steps: Sequence[int],
    points: Sequence[MeasuredPoint],
    slope: Callable[[MeasuredPoint], Array],
) -> Law:
    begin = np.zeros((ensemble.start.directions.count, 2))
    begin[:, 1] = _buffer(ensemble)
    law = _propagated(ensemble, steps, points, slope, ensemble.steps, begin)
    return Law(name=name, mean=law.position, covariance=law.position_covariance)


def _propagated(
    ensemble: Described,
    steps: Sequence[int],
    points: Sequence[MeasuredPoint],
    slope: Callable[[MeasuredPoint], Array],
    record_steps: NDArray[np.int64],
    initial_mean: Array | None = None,
    *,
    noise_from: int = 0,
) -> PosteriorTrajectory:
    """The law with what was measured at some steps; before step ``noise_from`` there is no noise."""
    unit, factor = momentum_dynamics(ensemble)
    known = [(step, slope(p), *example_noise(ensemble, p)) for step, p in zip(steps, points, strict=True)]
    if noise_from:
        none = np.zeros_like(known[0][1])
        known = [(noise_from - 1, known[0][1], none, none), (noise_from, *known[0][1:]), *known[1:]]
    at, slopes, examples, attack = (np.array(each) for each in zip(*known, strict=True))
    drift = MeasuredDrift(
        step=at,
        slope=slopes,
        example_noise=examples,
        attack_noise=attack,
        gradient=_gradient(ensemble),
        interpolation="linear",
    )
    return propagate_coupled(
        drift,
        ensemble.learning_rate * factor,
        sampling=sampling_of(ensemble).batches(len(ensemble.learning_rate)),
        momentum=unit.momentum,
        weight_decay=unit.weight_decay,
        record_steps=record_steps,
        initial_mean=initial_mean,
        allow_unstable=True,  # replicas near the edge of stability are compared too
    )


def _mixture(ensemble: RecordedEnsemble, before: Law) -> tuple[Law, Law]:
    """``injected`` and ``mixture``; ``before`` is the law before the first decay.

    Slopes and noise are those of the replicas' mean at the last decay if measured there, or else of the
    start.
    """
    assert ensemble.child is not None
    steps, falls = ensemble.steps, decays(ensemble.learning_rate)
    measured = dict(zip(ensemble.path_steps.tolist(), ensemble.path, strict=True))
    after = steps > falls[0]
    noise = before.covariance.copy()
    for begin, end in zip(falls, [*falls[1:], len(ensemble.learning_rate)], strict=True):
        rows = (steps > begin) & (steps <= end)
        if rows.any():
            point = [measured.get(begin, ensemble.start)]
            law = _propagated(ensemble, [begin], point, lambda p: p.slopes, steps[rows], noise_from=begin)
            noise[rows] = law.position_covariance
    children = ensemble.child[np.isfinite(ensemble.child[:, after]).all(axis=(1, 2))]
    count = len(children)
    mean, mean_error = before.mean.copy(), np.full(before.mean.shape, np.nan)
    mean[after] = children[:, after].mean(axis=0)
    mean_error[after] = children[:, after].std(axis=0, ddof=1) / np.sqrt(count)
    both, log_error = noise.copy(), np.full(len(steps), np.nan)
    for row in np.flatnonzero(after):
        places, own = children[:, row], np.diag(noise[row])
        both[row] += np.cov(places, rowvar=False)
        without = [np.delete(places, child, axis=0).var(axis=0, ddof=1) for child in range(count)]
        log_error[row] = np.sqrt((count - 1) * np.log(own + without).mean(axis=1).var())
    alone = Law(name=INJECTED, mean=mean, covariance=noise, mean_error=mean_error)
    return alone, replace(alone, name=MIXTURE, covariance=both, log_variance_error=log_error)


def _gradient(ensemble: Described) -> Array:
    """Mean gradient at the start, including weight decay."""
    start = ensemble.start
    if not len(start.sampled_gradients):
        return start.mean_gradient + start.decay_gradient
    # averages many starts of the attack; and a batch's perturbation differs from the whole set's
    sampled = (start.sampled_gradients + start.sampled_again).mean(axis=0) / 2
    return np.asarray(sampled + start.decay_gradient)


def _buffer(ensemble: RecordedEnsemble) -> Array:
    """The buffer v (k,) at the start, the same for all replicas; for Adam m / (1 − β₁)."""
    _, factor = momentum_dynamics(ensemble)
    if 0 not in ensemble.steps:
        return np.zeros(ensemble.start.directions.count)
    held: Array = ensemble.buffer[0, list(ensemble.steps).index(0)] / factor
    return held


def _variances(ensemble: RecordedEnsemble) -> Array:
    """γ (k,) of a batch with all its examples."""
    sampling = sampling_of(ensemble)
    examples, attack = example_noise(ensemble, ensemble.start)
    n, size = sampling.examples, sampling.batch_size
    # the papers' formulas are for independent batches
    share = minibatch_noise_factor(n, size, replacement=sampling.replacement)
    return np.asarray(np.diag(examples) * share + np.diag(attack) / size)


def _limits(ensemble: RecordedEnsemble) -> tuple[Array, Array, Array]:
    """σ_∞² and ρ² of each step's rate (T, k), NaN without a stationary law; the minimum x* (k,)."""
    unit, factor = momentum_dynamics(ensemble)
    lam, gamma = ensemble.start.eigenvalues, _variances(ensemble)
    limits = np.full((len(ensemble.learning_rate), len(lam)), np.nan)
    shrink = limits.copy()
    rates, which = np.unique(ensemble.learning_rate * factor, return_inverse=True)
    for number, rate in enumerate(rates):
        now = replace(unit, learning_rate=float(rate))
        ok = is_stable(lam, learning_rate=rate, momentum=now.momentum, weight_decay=now.weight_decay)
        rows = np.ix_(which == number, ok)
        if not ok.any():
            continue
        limits[rows] = stationary_variance(
            lam[ok],
            gamma[ok],
            learning_rate=rate,
            momentum=now.momentum,
            weight_decay=now.weight_decay,
        )
        shrink[rows] = now.spectral_radius(lam[ok]) ** 2
    with np.errstate(divide="ignore"):
        minimum = -_gradient(ensemble) / (lam + unit.weight_decay)
    return limits, shrink, minimum


def _diagonal(name: str, mean: Array, variance: Array) -> Law:
    covariance = np.full((*variance.shape, variance.shape[1]), np.nan)
    np.einsum("sii->si", covariance)[:] = variance
    return Law(name=name, mean=mean, covariance=covariance)


def _stationary(ensemble: RecordedEnsemble) -> Law:
    limits, _, minimum = _limits(ensemble)
    # after t updates, the limits are those of the last update's rate
    variance = limits[np.maximum(ensemble.steps - 1, 0)]
    return _diagonal(STATIONARY, np.broadcast_to(minimum, variance.shape), variance)


def _slow_mode(ensemble: RecordedEnsemble) -> Law:
    limits, shrink, minimum = _limits(ensemble)
    variance, kept = np.zeros(limits.shape[1]), {}
    share, shares = np.ones(limits.shape[1]), {}
    for step in range(len(limits) + 1):
        kept[step], shares[step] = variance, share
        if step < len(limits):
            variance = limits[step] + shrink[step] * (variance - limits[step])
            share = share * np.sqrt(shrink[step])
    steps = ensemble.steps.tolist()
    mean = minimum * (1 - np.stack([shares[step] for step in steps]))
    return _diagonal(SLOW_MODE, mean, np.stack([kept[step] for step in steps]))
