"""Computes PAC-Bayes certificates of the robust error with a Gaussian posterior that replicas measured.

The prior is N(θ_0, s² I) around the checkpoint, with s from a grid. The mean of the posterior is the
checkpoint plus a fraction of the replicas' mean move. Along the directions the posterior has the replicas'
covariance, scaled, and in all other directions the prior's variance. The grid is screened, and for each
fraction of the move the best point is certified with new draws of the weights.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdyn.errors import ConfigError, RecordError
from robustdyn.replicas import RecordedEnsemble
from robustdyn.replicas.gibbs import AttackedNetworks, GibbsSampling, WeightPosterior
from robustdyn.theory import (
    RiskCertificate,
    SubspaceKL,
    binary_kl_upper,
    risk_certificate,
    subspace_kl,
)

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CertificateSettings:
    """The grid of posteriors, the samples and the confidence of a certificate.

    Attributes:
        shift: Fractions of the mean's move, ≥ 0.
        scale: Factors on the measured standard deviations, > 0.
        prior_std: Standard deviations s of the prior, > 0; ``alpha`` is divided among them, half of
            it for the bounds of the priors themselves.
        alpha: Probability over the draw of S with which a bound may fail.
        alpha_sampling: Probability over the draw of the weights with which a bound may fail.
        screening: Networks and examples for every point of the grid.
        sampling: Networks and examples for the certificates.
        test: Networks and examples for the error on test examples, for comparison.
        chunk: Networks in one pass; affects only memory and speed.
        batch_size: Batch size for passes of one network; affects only memory.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]
    prior_std: tuple[float, ...]
    alpha: float
    alpha_sampling: float
    screening: GibbsSampling
    sampling: GibbsSampling
    test: GibbsSampling
    chunk: int
    batch_size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredPosterior:
    """The posterior that an ensemble measured at one step.

    Attributes:
        step: The step, in steps taken.
        replicas: R.
        move: (P,), mean of θ − θ_0.
        directions: (P, k), orthonormal.
        covariance: (k, k), along the directions.
        complement_std: Standard deviation of each other dimension, if all are equal.
    """

    step: int
    replicas: int
    move: Tensor
    directions: Tensor
    covariance: Array
    complement_std: float


def measured_posterior(ensemble: RecordedEnsemble, folder: Path, step: int | None) -> MeasuredPosterior:
    """The posterior at a step, or at the last step at which the mean of the weights was kept.

    Args:
        ensemble: An ensemble of momentum SGD, with BatchNorm in eval mode.
        folder: Its directory, for messages.
        step: Steps taken; None for the last.

    Raises:
        RecordError: The ensemble lacks what is needed.
    """
    settings = ensemble.settings
    if str(settings["optimizer"]["_target_"]).rpartition(".")[2] != "SGD":
        raise RecordError(f"{folder}: directions of a preconditioned optimiser; give an ensemble of SGD")
    known = [at for at in ensemble.mean_steps.tolist() if at > 0 and at in ensemble.steps]
    if not known or (step is not None and step not in known):
        asked = "a step > 0" if step is None else f"step={step}"
        have = f"; it has {', '.join(map(str, known))}" if known else ""
        raise RecordError(
            f"{folder}: no mean weights and positions of {asked}{have}; run robustdyn-replicas with it among "
            "record.mean_steps and record.steps, in another output=DIR"
        )
    at = known[-1] if step is None else step
    replicas, k = len(ensemble.replicas), ensemble.start.directions.count
    if replicas <= k:
        raise RecordError(
            f"{folder}: {replicas} replicas are too few for a covariance of {k} directions; run "
            f"robustdyn-replicas with replicas={2 * k} or more"
        )
    row = ensemble.steps.tolist().index(at)
    move = ensemble.mean_move[ensemble.mean_steps.tolist().index(at)]
    covariance = np.atleast_2d(np.cov(ensemble.position[:, row], rowvar=False))
    spread = (ensemble.distance[:, row] ** 2).mean() - np.sum(move.astype(np.float64) ** 2)
    others = spread * replicas / (replicas - 1) - np.trace(covariance)
    return MeasuredPosterior(
        step=at,
        replicas=replicas,
        move=torch.from_numpy(move),
        directions=ensemble.start.directions.positions,
        covariance=covariance,
        complement_std=math.sqrt(max(others, 0.0) / (len(move) - k)),
    )


@dataclass(frozen=True)
class _Choice:
    """A point of the grid; with ``scale`` None the prior's variance also applies along the directions."""

    shift: float
    scale: float | None
    prior_std: float

    @property
    def group(self) -> tuple[float, bool]:
        """The best point of each group is certified."""
        return self.shift, self.scale is None

    @property
    def name(self) -> str:
        if self.scale is None:
            return "the prior itself"
        return f"shift {self.shift:g}, scale {self.scale:g}"


class Certifier:
    """Certificates with a Gaussian prior around one checkpoint.

    Args:
        networks: Networks with the checkpoint's running statistics, and the attack of the certified error.
        measured: The posterior.
        data: ``S`` (examples that only these replicas saw) and ``test``: images (n, ...) in [0, 1] and
            classes (n,), on the network's device.
        settings: The grid, the samples and the confidence.
        say: Called with each line of progress.
    """

    def __init__(
        self,
        networks: AttackedNetworks,
        measured: MeasuredPosterior,
        data: Mapping[str, tuple[Tensor, Tensor]],
        settings: CertificateSettings,
        *,
        say: Callable[[str], None],
    ) -> None:
        self.networks, self.measured, self.data = networks, measured, data
        self.settings, self.say = settings, say
        self.theta = networks.network.theta()
        self.move, self.directions = (part.to(self.theta) for part in (measured.move, measured.directions))
        self.n = len(data["S"][1])
        # for each prior, Maurer's bound (for all posteriors) or Chernoff's bound (for the prior) may fail
        self.alpha = settings.alpha / (2 * len(settings.prior_std))

    def certify(self) -> dict[str, Any]:
        """Screen the grid, and certify the best point of every shift and the prior itself."""
        settings = self.settings
        screened = self._screened()
        chosen = self._chosen(screened)
        self.say(f"certifying  {len(chosen)} posteriors, {settings.sampling.networks} networks each")
        rows = [self._row(choice, settings.alpha_sampling / len(chosen)) for choice in chosen]
        bounds = [row["risk_bound"] for row in rows]
        return {
            "best": int(np.argmin(bounds)),
            "risk_bound": min(bounds),
            "confidence": round(1 - settings.alpha - settings.alpha_sampling, 12),
            "certificates": rows,
            "measured": self._as_measured(),
            "screening": screened,
        }

    def _grid(self) -> list[_Choice]:
        settings = self.settings
        stds = list(settings.prior_std)
        measured = itertools.product(settings.shift, settings.scale, stds)
        return [*(_Choice(*point) for point in measured), *(_Choice(0.0, None, std) for std in stds)]

    def _screened(self) -> list[dict[str, Any]]:
        """Error and bound of every point, except points that are worse than another by their KL alone.

        All points use the same random numbers, so that their differences are less noisy than their errors.
        """
        choices = sorted(
            ((self._kl(choice).total, choice) for choice in self._grid()), key=lambda pair: pair[0]
        )
        self.say(f"screening   {len(choices)} posteriors, {self.settings.screening.networks} networks each")
        least: dict[tuple[float, bool], float] = {}
        found = []
        for kl, choice in choices:
            budget = self._budget(None if choice.scale is None else kl)
            bound, error = float(binary_kl_upper(0.0, budget)), None
            if bound < least.get(choice.group, math.inf):
                error = float(self._errors(choice, self.settings.screening, "S", "certify-screening").mean())
                bound = float(binary_kl_upper(error, budget))
                least[choice.group] = min(bound, least.get(choice.group, math.inf))
            found.append({**asdict(choice), "kl": kl, "error": error, "bound": bound})
        return found

    def _chosen(self, screened: Sequence[Mapping[str, Any]]) -> list[_Choice]:
        """The most promising point of every shift, and the prior itself; the least KL among equals."""
        best: dict[tuple[float, bool], tuple[float, _Choice]] = {}
        for row in screened:
            choice = _Choice(row["shift"], row["scale"], row["prior_std"])
            if row["error"] is not None and row["bound"] < best.get(choice.group, (math.inf, choice))[0]:
                best[choice.group] = row["bound"], choice
        return [choice for _, choice in sorted(best.values(), key=lambda pair: pair[1].group[::-1])]

    def _row(self, choice: _Choice, alpha_sampling: float) -> dict[str, Any]:
        kl = self._kl(choice)
        stream = f"certify-{choice.name}"
        errors = self._errors(choice, self.settings.sampling, "S", stream)

        def bound(sampled: Array, distance: float | None) -> RiskCertificate:
            return risk_certificate(
                sampled, kl=distance, n=self.n, alpha=self.alpha, alpha_sampling=alpha_sampling
            )

        distance, none = (kl.total, 0.0) if choice.scale is not None else (None, None)
        found = bound(errors, distance)
        no_kl, no_error = bound(errors, none).risk_bound, bound(0 * errors, distance).risk_bound
        tested = self._errors(choice, self.settings.test, "test", f"{stream}-test")
        mean = self.theta + choice.shift * self.move
        return {
            "posterior": {"name": choice.name, **asdict(choice)},
            **asdict(found),
            "kl": {**asdict(kl), "total": kl.total},
            "sampled_error_se": _standard_error(errors),
            "kl_per_example": kl.total / self.n,
            "bound_at_zero_kl": no_kl,
            "bound_at_zero_error": no_error,
            "limited_by": _largest(found, no_kl),
            "test": {
                "error": float(tested.mean()),
                "error_se": _standard_error(tested),
                "mean_network_error": self._error_of(mean, "test"),
            },
            "mean_network_error": self._error_of(mean, "S"),
        }

    def _as_measured(self) -> dict[str, Any]:
        """The replicas' own law, with their variance outside the directions, and its KL from such a prior."""
        measured = self.measured
        squared = self._distance_sq()
        std = measured.complement_std
        found = {
            "step": measured.step,
            "replicas": measured.replicas,
            "parameters": len(self.theta),
            "mean_move_norm": math.sqrt(squared),
            "mean_move_norm_in_directions": float((self.move @ self.directions).norm()),
            "direction_stds": np.sqrt(np.diag(measured.covariance)).tolist(),
            "complement_std": std,
            "weights_norm": float(self.theta.norm()),
        }
        if std:
            kl = self._kl(_Choice(1.0, 1.0, std))
            found["kl"] = {**asdict(kl), "total": kl.total}
            found["bound_at_zero_error"] = float(binary_kl_upper(0.0, self._budget(kl.total)))
        return found

    # -- parts

    def _budget(self, kl: float | None) -> float:
        """Nats per example, as in ``robustdyn.theory.risk_certificate``."""
        return ((kl or 0.0) + math.log((1 if kl is None else 2 * math.sqrt(self.n)) / self.alpha)) / self.n

    def _distance_sq(self) -> float:
        return float(self.move.double().square().sum())

    def _covariance(self, choice: _Choice) -> Array:
        if choice.scale is None:
            return choice.prior_std**2 * np.eye(len(self.measured.covariance))
        return choice.scale**2 * self.measured.covariance

    def _kl(self, choice: _Choice) -> SubspaceKL:
        try:
            return subspace_kl(
                self._covariance(choice),
                complement_variance=choice.prior_std**2,
                parameters=len(self.theta),
                distance_sq=choice.shift**2 * self._distance_sq(),
                prior_variance=choice.prior_std**2,
            )
        except ValueError as error:
            raise ConfigError(f"replicas: {error}") from error

    def _errors(self, choice: _Choice, sampling: GibbsSampling, split: str, stream: str) -> Array:
        posterior = WeightPosterior(
            mean=self.theta + choice.shift * self.move,
            directions=self.directions,
            covariance=self._covariance(choice),
            complement_std=choice.prior_std,
        )
        data, chunk = self.data[split], self.settings.chunk
        return self.networks.gibbs_errors(posterior, *data, sampling, chunk=chunk, stream=stream)

    def _error_of(self, theta: Tensor, split: str) -> float:
        size, stream = self.settings.batch_size, f"certify-fixed-{split}"
        return self.networks.error(theta, *self.data[split], batch_size=size, stream=stream)


def _standard_error(sampled: Array) -> float | None:
    """Of the mean; None with one number."""
    return float(sampled.std(ddof=1) / math.sqrt(len(sampled))) if len(sampled) > 1 else None


def _largest(found: RiskCertificate, bound_at_zero_kl: float) -> str:
    """Which part of the bound is the largest."""
    steps = {
        "error on S": found.sampled_error,
        "number of weights sampled": found.empirical_upper - found.sampled_error,
        "number of examples, even without KL": bound_at_zero_kl - found.empirical_upper,
        "KL": found.risk_bound - bound_at_zero_kl,
    }
    return max(steps, key=lambda name: steps[name])
