"""``robustdyn-certify``: a PAC-Bayes certificate with the posterior that an ensemble of replicas measured."""

import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from robustdyn.attacks import PGD
from robustdyn.data import ImageDataModule, ImageTensors
from robustdyn.data.tensors import to_unit
from robustdyn.entrypoints.checkpoint import (
    RUN_CONFIG,
    changed_run,
    checkpoint_of,
    device_of,
    load_config,
    required_run_of,
    type_name,
)
from robustdyn.entrypoints.config import COUNT, NON_NEGATIVE, POSITIVE, WHOLE, Rule, build, check_rules
from robustdyn.entrypoints.environment import processor
from robustdyn.entrypoints.terminal import run_app
from robustdyn.errors import ConfigError, RecordError
from robustdyn.evaluation.gibbs import GibbsSampling, WeightPosterior, gibbs_errors, robust_error
from robustdyn.models import load_weights
from robustdyn.records.files import replace_file
from robustdyn.records.writer import plain
from robustdyn.replicas import RecordedEnsemble, StackedNetwork, read_ensemble
from robustdyn.theory import (
    RiskCertificate,
    SubspaceKL,
    binary_kl_upper,
    risk_certificate,
    subspace_kl,
)

NAME = "certify"
ASSUMPTIONS = (
    "given the prior's examples, those of S are drawn independently from the distribution that the bound "
    "speaks of, or at random without replacement from a finite set of images; class-balanced draws serve as "
    "well, and the bound is then of the same balance",
    "nothing that the prior depends on has seen S: neither the run, its settings, nor the grid of prior.std",
    "the bound is of the error under this attack, in expectation over its random start; a stronger attack "
    "may find more",
    "pseudo-random numbers count as random, and weights rounded to float32 as Gaussian",
)


def _all_of(rule: Rule) -> Rule:
    return Rule(
        lambda v: isinstance(v, ListConfig) and len(v) > 0 and all(map(rule.holds, v)),
        f"must be a list; each {rule.requirement}",
    )


_SHARE = Rule(lambda v: POSITIVE.holds(v) and v < 1, "must lie between 0 and 1")
RULES: Mapping[str, Rule] = {
    "seed": WHOLE,
    "engine": Rule(lambda v: v in ("vmapped", "looped"), "must be vmapped or looped"),
    "chunk": COUNT,
    "batch_size": COUNT,
    "step": Rule(lambda v: v is None or COUNT.holds(v), f"{COUNT.requirement}, or null"),
    "posterior.shift": _all_of(NON_NEGATIVE),
    "posterior.scale": _all_of(POSITIVE),
    "prior.std": _all_of(POSITIVE),
    "alpha": _SHARE,
    "alpha_sampling": _SHARE,
    **{
        f"{part}.{key}": COUNT
        for part in ("screening", "sampling", "test")
        for key in ("networks", "examples")
    },
}


def main() -> None:
    """The ``robustdyn-certify`` command."""
    run_app(run_certify, NAME)


def run_certify(cfg: DictConfig) -> None:
    """Certify the posterior that an ensemble measured, and say what the bound is made of.

    Raises:
        UserError: The configuration, the checkpoint, the data or the ensemble cannot be used.
    """
    checkpoint = checkpoint_of(cfg)
    run_dir = required_run_of(checkpoint)
    _check(cfg)
    folder = Path(cfg.replicas) if cfg.replicas else run_dir / "replicas" / checkpoint.stem
    output = Path(cfg.output) if cfg.output else run_dir / "certificate" / f"{checkpoint.stem}.json"
    device = device_of(cfg.device)
    measured = _measured(read_ensemble(folder), folder, checkpoint, cfg.step)
    run, examples = _examples(cfg, run_dir, measured.images, folder)
    for part in ("screening", "sampling"):
        _at_most(cfg, f"{part}.examples", len(examples["S"]), "examples of S")
    _at_most(cfg, "test.examples", len(examples["test"]), "test images")
    certifier = _Certifier(cfg, run, checkpoint, measured, examples, device)
    result = certifier.certify()
    result["settings"] |= {"ensemble": str(folder), "checkpoint": str(checkpoint)}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, (json.dumps(plain(result), indent=1) + "\n").encode())
    except OSError as error:
        raise RecordError(
            f"{output}: cannot write ({error.strerror}); free space or choose another output=FILE"
        ) from error
    for line in report(result):
        _say(line)
    _say(f"certificate: {output}")


def report(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines for people: a table of certificates, and what limits the best."""
    yield ""
    heads = (
        "posterior",
        "prior std",
        "KL (nats)",
        "of the mean",
        "error on S",
        "upper limit",
        "bound",
        "test",
    )
    yield f"{heads[0]:<28}" + "".join(f"{head:>12}" for head in heads[1:])
    for row in result["certificates"]:
        q, kl = row["posterior"], row["kl"]
        numbers = (
            f"{q['prior_std']:.3g}",
            f"{kl['total']:.1f}",
            f"{kl['mean']:.1f}",
            *(f"{row[key]:.3f}" for key in ("sampled_error", "empirical_upper", "risk_bound")),
            f"{row['test']['error']:.3f}",
        )
        yield f"{q['name']:<28}" + "".join(f"{number:>12}" for number in numbers)
    held = result["held_out"]
    yield (
        f"{'checkpoint, S as a test set':<28}{'':>36}{held['error']:>12.3f}{'':>12}"
        f"{held['risk_bound']:>12.3f}{held['test_error']:>12.3f}"
    )
    best = result["certificates"][result["best"]]
    yield ""
    yield (
        f"bound: {best['risk_bound']:.3f} with probability {result['confidence']:g}, n = {best['n']}; "
        f"largest part: {best['limited_by']}. With KL = 0 it would be {best['bound_at_zero_kl']:.3f}, with "
        f"no error on S {best['bound_at_zero_error']:.3f}"
    )


# ---------------------------------------------------------------------- the configuration


def _check(cfg: DictConfig) -> None:
    check_rules(cfg, RULES)
    if cfg.alpha + cfg.alpha_sampling >= 1:
        raise ConfigError(
            f"alpha={cfg.alpha} and alpha_sampling={cfg.alpha_sampling} must add up to less than 1"
        )


def _at_most(cfg: DictConfig, key: str, most: int, what: str) -> None:
    if OmegaConf.select(cfg, key) > most:
        raise ConfigError(f"{key}={OmegaConf.select(cfg, key)} exceeds the {most} {what}; choose fewer")


# ---------------------------------------------------------------------- what was measured


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """What the ensemble says of the posterior at one step."""

    step: int
    replicas: int
    images: str
    move: Tensor
    directions: Tensor
    covariance: NDArray[np.float64]
    complement_std: float


def _measured(ensemble: RecordedEnsemble, folder: Path, checkpoint: Path, step: int | None) -> _Measured:
    """The posterior at the step.

    Raises:
        RecordError: The ensemble is of another checkpoint, or cannot tell.
    """
    settings = ensemble.settings
    if settings["checkpoint"] != hashlib.sha256(checkpoint.read_bytes()).hexdigest():
        raise RecordError(f"{folder}: an ensemble of another checkpoint; say replicas=DIR")
    if str(settings["optimizer"]["_target_"]).rpartition(".")[2] != "SGD":
        raise RecordError(f"{folder}: directions of a preconditioned optimiser; give an ensemble of SGD")
    if settings["batchnorm"] != "eval":
        raise RecordError(
            f"{folder}: replicas moved the running statistics, which are no weights; run them with "
            "batchnorm=eval"
        )
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
            f"{folder}: {replicas} replicas tell no covariance of {k} directions; run robustdyn-replicas "
            f"with replicas={2 * k} or more"
        )
    row = ensemble.steps.tolist().index(at)
    move = ensemble.mean_move[ensemble.mean_steps.tolist().index(at)]
    covariance = np.atleast_2d(np.cov(ensemble.position[:, row], rowvar=False))
    spread = (ensemble.distance[:, row] ** 2).mean() - np.sum(move.astype(np.float64) ** 2)
    others = spread * replicas / (replicas - 1) - np.trace(covariance)
    return _Measured(
        step=at,
        replicas=replicas,
        images=settings["images"],
        move=torch.from_numpy(move),
        directions=ensemble.start.directions.positions,
        covariance=covariance,
        complement_std=math.sqrt(max(others, 0.0) / (len(move) - k)),
    )


# ---------------------------------------------------------------------- the examples


def _examples(
    cfg: DictConfig, run_dir: Path, images: str, folder: Path
) -> tuple[DictConfig, dict[str, ImageTensors]]:
    """The run's configuration with its changes, and the examples: of the prior, S, of the test.

    Raises:
        UserError: The ensemble's examples are not those, or leave none that the prior has not seen.
    """
    run = load_config(run_dir / RUN_CONFIG)
    changed = changed_run(run, cfg.run)
    seen, trained, test = _split(run, "train"), _split(changed, "train"), _split(changed, "test")
    if _fingerprint(trained) != images:
        raise ConfigError(
            f"run.data: not the images of the ensemble {folder}; repeat what robustdyn-replicas was told, "
            "such as +run.data.train_size=null"
        )
    rest, unknown = _difference(trained, seen)
    if unknown:
        raise ConfigError(
            f"run.data: {unknown} examples of the prior are not among the ensemble's; leave data.split_seed "
            "and the other settings of the split as they were, and raise data.train_size alone"
        )
    if len(rest) < 8:
        raise ConfigError(
            f"run.data: the prior has seen all but {len(rest)} of the ensemble's {len(trained)} examples, "
            f"and only the others count; train it with data.train_size={len(trained) // 2}, the replicas "
            "with +run.data.train_size=null"
        )
    held = [_split(run, "validation")] if run.data.validation_size else []
    for name, split in [*(("validation", part) for part in held), ("test", _split(run, "test"))]:
        if len(_difference(rest, split)[0]) < len(rest):
            raise ConfigError(
                f"run.data: examples of S were in the run's {name} set, by which its checkpoint may have "
                f"been chosen; train the prior with a smaller data.train_size in place of data.{name}_size"
            )
    return changed, {"prior": seen, "S": rest, "test": test}


def _split(run: DictConfig, name: str) -> ImageTensors:
    module: ImageDataModule = build(run, "data")
    module.prepare_data()
    module.setup("fit")
    return module.split(name)


def _fingerprint(split: ImageTensors) -> str:
    content = split.images.cpu().numpy().tobytes() + split.labels.cpu().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def _difference(examples: ImageTensors, seen: ImageTensors) -> tuple[ImageTensors, int]:
    """``examples`` without those of ``seen``, each as often as it is there; how many of these were absent."""
    left = Counter(_keys(seen))
    kept = []
    for place, key in enumerate(_keys(examples)):
        if left[key]:
            left[key] -= 1
        else:
            kept.append(place)
    return examples.take(torch.tensor(kept, dtype=torch.int64)), left.total()


def _keys(split: ImageTensors) -> list[bytes]:
    labels = split.labels.tolist()
    return [
        image.numpy().tobytes() + str(label).encode()
        for image, label in zip(split.images.cpu(), labels, strict=True)
    ]


# ---------------------------------------------------------------------- the certificate


@dataclass(frozen=True)
class _Choice:
    """A point of the grid; ``scale`` None for the prior's own noise along the directions, too."""

    shift: float
    scale: float | None
    prior_std: float

    @property
    def group(self) -> tuple[float, bool]:
        """Of each group the best is certified."""
        return self.shift, self.scale is None

    @property
    def name(self) -> str:
        if self.scale is None:
            return "the prior itself"
        return f"shift {self.shift:g}, scale {self.scale:g}"


class _Certifier:
    def __init__(
        self,
        cfg: DictConfig,
        run: DictConfig,
        checkpoint: Path,
        measured: _Measured,
        examples: Mapping[str, ImageTensors],
        device: torch.device,
    ) -> None:
        self.cfg, self.run, self.measured, self.device = cfg, run, measured, device
        model: nn.Module = build(run, "model")
        load_weights(model, checkpoint, layout="robustdyn")
        self.network = StackedNetwork(model.to(device).eval(), cfg.engine)
        self.attack: PGD = build(run, "attack.evaluation")
        if self.attack.batchnorm != "eval":
            raise ConfigError("attack.evaluation.batchnorm=train would move statistics; say eval")
        self.theta, self.statistics = self.network.theta(), self.network.statistics(1)
        self.move, self.directions = (part.to(self.theta) for part in (measured.move, measured.directions))
        self.data = {
            name: (to_unit(s.images).to(device), s.labels.to(device)) for name, s in examples.items()
        }
        self.n = len(examples["S"])
        self.alpha = cfg.alpha / len(cfg.prior.std)

    def certify(self) -> dict[str, Any]:
        """Screen the grid, certify the best of every shift, and compare."""
        cfg = self.cfg
        screened = self._screened()
        chosen = self._chosen(screened)
        _say(f"certifying  {len(chosen)} posteriors, {cfg.sampling.networks} networks each")
        rows = [self._row(choice, cfg.alpha_sampling / len(chosen)) for choice in chosen]
        bounds = [row["risk_bound"] for row in rows]
        return {
            "best": int(np.argmin(bounds)),
            "risk_bound": min(bounds),
            "confidence": round(1 - cfg.alpha - cfg.alpha_sampling, 12),
            "vacuous": min(bounds) >= 1 - 1 / self.run.data.num_classes,
            "certificates": rows,
            "held_out": self._held_out(),
            "measured": self._as_measured(),
            "screening": screened,
            "assumptions": list(ASSUMPTIONS),
            "settings": self._settings(),
        }

    def _grid(self) -> list[_Choice]:
        cfg = self.cfg
        stds = list(cfg.prior.std)
        measured = itertools.product(cfg.posterior.shift, cfg.posterior.scale, stds)
        return [*(_Choice(*point) for point in measured), *(_Choice(0.0, None, std) for std in stds)]

    def _screened(self) -> list[dict[str, Any]]:
        """Error and bound of the grid; where KL alone makes the bound worse than another's, not measured.

        All points with the same random numbers: their differences are less noisy than their errors.
        """
        choices = sorted(
            ((self._kl(choice).total, choice) for choice in self._grid()), key=lambda pair: pair[0]
        )
        _say(f"screening   {len(choices)} posteriors, {self.cfg.screening.networks} networks each")
        least: dict[tuple[float, bool], float] = {}
        found = []
        for kl, choice in choices:
            budget = (kl + math.log(2 * math.sqrt(self.n) / self.alpha)) / self.n
            bound, error = float(binary_kl_upper(0.0, budget)), None
            if bound < least.get(choice.group, math.inf):
                error = float(self._errors(choice, "screening", "S", "certify-screening").mean())
                bound = float(binary_kl_upper(error, budget))
                least[choice.group] = min(bound, least.get(choice.group, math.inf))
            found.append({**asdict(choice), "kl": kl, "error": error, "bound": bound})
        return found

    def _chosen(self, screened: Sequence[Mapping[str, Any]]) -> list[_Choice]:
        """Of every shift what promises most, and the prior itself; among equals that of least KL."""
        best: dict[tuple[float, bool], tuple[float, _Choice]] = {}
        for row in screened:
            choice = _Choice(row["shift"], row["scale"], row["prior_std"])
            if row["error"] is not None and row["bound"] < best.get(choice.group, (math.inf, choice))[0]:
                best[choice.group] = row["bound"], choice
        return [choice for _, choice in sorted(best.values(), key=lambda pair: pair[1].group[::-1])]

    def _row(self, choice: _Choice, alpha_sampling: float) -> dict[str, Any]:
        kl = self._kl(choice)
        stream = f"certify-{choice.name}"
        errors = self._errors(choice, "sampling", "S", stream)

        def bound(sampled: NDArray[np.float64], distance: float) -> RiskCertificate:
            return risk_certificate(
                sampled, kl=distance, n=self.n, alpha=self.alpha, alpha_sampling=alpha_sampling
            )

        found = bound(errors, kl.total)
        no_kl, no_error = bound(errors, 0.0).risk_bound, bound(0 * errors, kl.total).risk_bound
        tested = self._errors(choice, "test", "test", f"{stream}-test")
        mean = self.theta + choice.shift * self.move
        return {
            "posterior": {"name": choice.name, **asdict(choice)},
            **asdict(found),
            "kl": {**asdict(kl), "total": kl.total},
            "sampled_error_se": float(errors.std(ddof=1) / math.sqrt(len(errors)))
            if len(errors) > 1
            else None,
            "kl_per_example": kl.total / self.n,
            "bound_at_zero_kl": no_kl,
            "bound_at_zero_error": no_error,
            "limited_by": _largest(found, no_kl),
            "test": {
                "error": float(tested.mean()),
                "error_se": float(tested.std(ddof=1) / math.sqrt(len(tested))) if len(tested) > 1 else None,
                "mean_network_error": self._error_of(mean, "test"),
            },
            "mean_network_error": self._error_of(mean, "S"),
        }

    def _held_out(self) -> dict[str, Any]:
        """What S certifies as a test set of the checkpoint: what the PAC-Bayes bound has to beat."""
        error = self._error_of(self.theta, "S")
        risk = self.cfg.alpha + self.cfg.alpha_sampling
        return {
            "error": error,
            "n": self.n,
            "risk_bound": float(binary_kl_upper(error, math.log(1 / risk) / self.n)),
            "alpha": risk,
            "test_error": self._error_of(self.theta, "test"),
            "prior_examples_error": self._error_of(self.theta, "prior"),
        }

    def _as_measured(self) -> dict[str, Any]:
        """The replicas' law with its own noise outside the directions; its KL with a prior of that noise."""
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
            found["bound_at_zero_error"] = float(
                binary_kl_upper(0.0, (kl.total + math.log(2 * math.sqrt(self.n) / self.alpha)) / self.n)
            )
        return found

    def _settings(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()
        given = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(given, dict)
        kept = (
            "seed",
            "engine",
            "posterior",
            "prior",
            "alpha",
            "alpha_sampling",
            "screening",
            "sampling",
            "test",
        )
        return {
            **{key: given[key] for key in kept},
            "run": given["run"],
            "attack": asdict(self.attack),
            "data": type_name(self.run.data),
            "examples": {name: len(labels) for name, (_, labels) in self.data.items()},
            "versions": {package: version(package) for package in ("robustdyn", "torch")},
            "device": name,
        }

    # -- parts

    def _distance_sq(self) -> float:
        return float(self.move.double().square().sum())

    def _covariance(self, choice: _Choice) -> NDArray[np.float64]:
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

    def _errors(self, choice: _Choice, part: str, split: str, stream: str) -> NDArray[np.float64]:
        posterior = WeightPosterior(
            mean=self.theta + choice.shift * self.move,
            directions=self.directions,
            covariance=self._covariance(choice),
            complement_std=choice.prior_std,
        )
        return gibbs_errors(
            self.network,
            self.statistics,
            posterior,
            *self.data[split],
            self.attack,
            GibbsSampling(networks=self.cfg[part].networks, examples=self.cfg[part].examples),
            chunk=self.cfg.chunk,
            seed=self.cfg.seed,
            stream=stream,
        )

    def _error_of(self, theta: Tensor, split: str) -> float:
        return robust_error(
            self.network,
            self.statistics,
            theta,
            *self.data[split],
            self.attack,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            stream=f"certify-fixed-{split}",
        )


def _largest(found: RiskCertificate, bound_at_zero_kl: float) -> str:
    """Which step from nothing to the bound is the largest."""
    steps = {
        "error on S": found.sampled_error,
        "number of weights sampled": found.empirical_upper - found.sampled_error,
        "number of examples, even without KL": bound_at_zero_kl - found.empirical_upper,
        "KL": found.risk_bound - bound_at_zero_kl,
    }
    return max(steps, key=lambda name: steps[name])


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    from robustdyn.entrypoints.certify import (
        main as command,
    )  # by its name: a launcher's workers look for it there

    command()
