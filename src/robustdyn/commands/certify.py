"""``robustdyn-certify``: bounds the robust error of replicas with examples that they never saw."""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from robustdyn.attacks import PGD
from robustdyn.data import ImageDataModule, ImageTensors
from robustdyn.data.tensors import to_unit
from robustdyn.errors import ConfigError, RecordError
from robustdyn.launch.application import run_app
from robustdyn.launch.of_run import check_complete
from robustdyn.launch.paths import load_run
from robustdyn.models import load_weights
from robustdyn.records.files import file_digest, replace_file
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.writer import jsonable
from robustdyn.replicas import RecordedEnsemble, StackedNetwork, read_ensemble, read_weights
from robustdyn.replicas.gibbs import AttackedNetworks, GibbsSampling
from robustdyn.replicas.posterior_certificate import CertificateSettings, Certifier, measured_posterior
from robustdyn.replicas.replica_certificate import ASSUMPTIONS, certify_replicas, held_out_bound
from robustdyn.run.checkpointing import TRAINING_IMAGES, read_checkpoint
from robustdyn.run.config import COUNT, NON_NEGATIVE, POSITIVE, SEED, Rule, build, check_rules
from robustdyn.run.environment import device_name, versions
from robustdyn.run.of_checkpoint import (
    changed_run,
    checkpoint_of,
    device_of,
    required_run_of,
    type_name,
)
from robustdyn.run.status import say
from robustdyn.run.targets import allowed

NAME = "certify"
GAUSSIAN = "gaussian"
COUNTED = ("screening", "sampling", "test")
_RETRAIN = "train the run again, from its beginning and in a directory of its own"


def _all_of(rule: Rule) -> Rule:
    return Rule(
        lambda v: isinstance(v, ListConfig) and len(v) > 0 and all(map(rule.holds, v)),
        f"must be a list; each {rule.requirement}",
    )


_SHARE = Rule(lambda v: POSITIVE.holds(v) and v < 1, "must lie between 0 and 1")
RULES: Mapping[str, Rule] = {
    "seed": SEED,
    "engine": Rule(lambda v: v in ("vmapped", "looped"), "must be vmapped or looped"),
    "chunk": COUNT,
    "batch_size": COUNT,
    "alpha": _SHARE,
    f"{GAUSSIAN}.step": Rule(lambda v: v is None or COUNT.holds(v), f"{COUNT.requirement}, or null"),
    f"{GAUSSIAN}.shift": _all_of(NON_NEGATIVE),
    f"{GAUSSIAN}.scale": _all_of(POSITIVE),
    f"{GAUSSIAN}.prior_std": _all_of(POSITIVE),
    f"{GAUSSIAN}.alpha": _SHARE,
    f"{GAUSSIAN}.alpha_sampling": _SHARE,
    **{f"{GAUSSIAN}.{part}.{key}": COUNT for part in COUNTED for key in ("networks", "examples")},
}


def main() -> None:
    """The ``robustdyn-certify`` command."""
    run_app(run_certify, NAME, paths=("replicas", f"{GAUSSIAN}.replicas"))


def run_certify(cfg: DictConfig) -> None:
    """Certify replicas that never saw S, and Gaussians about replicas that did, if there are any.

    Raises:
        UserError: The configuration, the checkpoint, the data or an ensemble cannot be used.
    """
    checkpoint = checkpoint_of(cfg)
    run_dir = required_run_of(checkpoint)
    _check(cfg)
    folder = Path(cfg.replicas) if cfg.replicas else RunDirectory(run_dir).replicas / checkpoint.stem
    default = RunDirectory(run_dir).certificates / f"{checkpoint.stem}.json"
    output = Path(cfg.output) if cfg.output else default
    device = device_of(cfg.device)
    ensemble = _ensemble_of(checkpoint, folder, "replicas")
    run, examples = _examples(cfg, run_dir)
    _require_unseen(checkpoint, ensemble, folder, examples["prior"])
    gaussian = cfg[GAUSSIAN]
    measured = None
    if gaussian.replicas:
        informed = Path(gaussian.replicas)
        other = _ensemble_of(checkpoint, informed, f"{GAUSSIAN}.replicas")
        if other.settings["images"] != examples["all"].digest():
            raise ConfigError(
                f"{GAUSSIAN}.replicas={informed}: not trained on the run's images and S together; repeat "
                "here what robustdyn-replicas was told there, such as +run.data.train_size=null"
            )
        measured = measured_posterior(other, informed, gaussian.step)
        for part in ("screening", "sampling"):
            _at_most(cfg, f"{GAUSSIAN}.{part}.examples", len(examples["S"]), "examples of S")
        _at_most(cfg, f"{GAUSSIAN}.test.examples", len(examples["test"]), "test images")
    model: nn.Module = build(run, "model", allow=allowed(cfg))
    load_weights(model, checkpoint, layout="robustdyn")
    attack: PGD = build(run, "attack.evaluation", allow=allowed(cfg))
    if attack.batchnorm != "eval":
        raise ConfigError(
            "attack.evaluation.batchnorm=train would change the running statistics; choose eval"
        )
    data = {
        name: (to_unit(examples[name].images).to(device), examples[name].labels.to(device))
        for name in ("prior", "S", "test")
    }
    stacked = StackedNetwork(model.to(device).eval(), cfg.engine)
    networks = AttackedNetworks(stacked, attack, seed=cfg.seed)
    n = len(examples["S"])
    say(f"certifying  {len(ensemble.replicas)} replicas on {n} examples that none of them saw")
    replicas = certify_replicas(
        networks, read_weights(folder), data, alpha=cfg.alpha, batch_size=cfg.batch_size
    )
    best = min(row["risk_bound"] for row in replicas["bounds"])
    result = {
        "risk_bound": best,
        "confidence": round(1 - cfg.alpha, 12),
        "vacuous": best >= 1 - 1 / run.data.num_classes,
        "replicas": replicas,
        "held_out": held_out_bound(
            networks, stacked.theta(), data, alpha=cfg.alpha, batch_size=cfg.batch_size
        ),
        GAUSSIAN: Certifier(networks, measured, data, _settings(cfg), say=say).certify()
        if measured
        else None,
        "assumptions": list(ASSUMPTIONS),
        "settings": {
            **_provenance(cfg, run, attack, device),
            "examples": {name: len(part) for name, part in examples.items()},
            "ensemble": os.path.relpath(folder),
            "checkpoint": os.path.relpath(checkpoint),
        },
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, (json.dumps(jsonable(result), indent=1) + "\n").encode())
    except OSError as error:
        raise RecordError(
            f"{output}: cannot write ({error.strerror}); free space or choose another output=FILE"
        ) from error
    for line in certificate_lines(result):
        say(line)
    say(f"certificate: {output}")


def certificate_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines to print: the bounds of the replicas, those of the Gaussians, and how confident they are."""
    replicas, gaussian = result["replicas"], result[GAUSSIAN]
    yield ""
    yield _line("posterior", "KL (nats)", "error on S", "bound", "test")
    for row in replicas["bounds"]:
        errors = (row["error"], row["risk_bound"], row["test"]["error"])
        yield _line(row["posterior"], f"{row['kl']:.1f}", *(f"{error:.3f}" for error in errors))
    held = result["held_out"]
    errors = (held["error"], held["risk_bound"], held["test_error"])
    yield _line("checkpoint, S as a test set", "", *(f"{error:.3f}" for error in errors))
    if gaussian:
        yield ""
        heads = ("prior std", "KL (nats)", "of the mean", "error on S", "upper limit", "bound", "test")
        yield _line("Gaussian posterior", *heads)
        for row in gaussian["certificates"]:
            q, kl = row["posterior"], row["kl"]
            shares = (row["sampled_error"], row["empirical_upper"], row["risk_bound"], row["test"]["error"])
            numbers = (f"{q['prior_std']:.3g}", f"{kl['total']:.1f}", f"{kl['mean']:.1f}")
            yield _line(q["name"], *numbers, *(f"{share:.3f}" for share in shares))
    yield ""
    yield (
        f"bound: {result['risk_bound']:.3f}; both bounds of the replicas hold with probability "
        f"{result['confidence']:g}, n = {replicas['n']}"
    )
    if gaussian:
        best = gaussian["certificates"][gaussian["best"]]
        yield (
            f"Gaussian posteriors: {best['risk_bound']:.3f}; all their bounds hold with probability "
            f"{gaussian['confidence']:g}; largest part of the best: {best['limited_by']}. With KL = 0 it "
            f"would be {best['bound_at_zero_kl']:.3f}, with no error on S {best['bound_at_zero_error']:.3f}"
        )


def _line(name: str, *numbers: str) -> str:
    return f"{name:<30}" + "".join(f"{number:>12}" for number in numbers)


# ---------------------------------------------------------------------- the configuration


def _check(cfg: DictConfig) -> None:
    check_rules(cfg, RULES)
    own = cfg[GAUSSIAN]
    if own.alpha + own.alpha_sampling >= 1:
        raise ConfigError(
            f"{GAUSSIAN}.alpha={own.alpha} and {GAUSSIAN}.alpha_sampling={own.alpha_sampling} must add up "
            "to less than 1"
        )


def _at_most(cfg: DictConfig, key: str, most: int, what: str) -> None:
    if OmegaConf.select(cfg, key) > most:
        raise ConfigError(f"{key}={OmegaConf.select(cfg, key)} exceeds the {most} {what}; choose fewer")


def _settings(cfg: DictConfig) -> CertificateSettings:
    own = cfg[GAUSSIAN]
    counts = {
        part: GibbsSampling(networks=own[part].networks, examples=own[part].examples) for part in COUNTED
    }
    return CertificateSettings(
        shift=tuple(own.shift),
        scale=tuple(own.scale),
        prior_std=tuple(own.prior_std),
        alpha=own.alpha,
        alpha_sampling=own.alpha_sampling,
        chunk=cfg.chunk,
        batch_size=cfg.batch_size,
        **counts,
    )


def _provenance(cfg: DictConfig, run: DictConfig, attack: PGD, device: torch.device) -> dict[str, Any]:
    given = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(given, dict)
    return {
        **{key: given[key] for key in ("seed", "engine", "alpha", GAUSSIAN, "run")},
        "attack": asdict(attack),
        "data": type_name(run.data),
        "versions": versions(),
        "device": device_name(device),
    }


# ---------------------------------------------------------------------- the examples


def _ensemble_of(checkpoint: Path, folder: Path, key: str) -> RecordedEnsemble:
    """The ensemble in a folder, which must have started from the checkpoint.

    Raises:
        RecordError: It did not, or cannot be read.
    """
    ensemble = read_ensemble(folder)
    if ensemble.settings["checkpoint"] != file_digest(checkpoint):
        raise RecordError(f"{folder}: an ensemble of another checkpoint; give {key}=DIR")
    if ensemble.settings["batchnorm"] != "eval":
        raise RecordError(
            f"{folder}: replicas moved the running statistics, which are not weights; run them with "
            "batchnorm=eval"
        )
    return ensemble


def _require_unseen(checkpoint: Path, ensemble: RecordedEnsemble, folder: Path, prior: ImageTensors) -> None:
    """Refuse replicas, or a checkpoint, that were trained on anything but the run's own training images.

    Raises:
        UserError: They were, or the checkpoint does not say.
    """
    known = read_checkpoint(checkpoint, _RETRAIN).get(TRAINING_IMAGES, [])
    if known != [prior.digest()]:
        raise RecordError(
            f"{checkpoint}: does not say that its run was trained on the {len(prior)} images of its "
            f"configuration alone, so that it may have seen examples of S; {_RETRAIN}"
        )
    if ensemble.settings["images"] != prior.digest():
        raise ConfigError(
            f"replicas={folder}: not trained on the {len(prior)} images of the run, so that they may have "
            "seen examples of S; run robustdyn-replicas without +run.data, in another output=DIR, and give "
            f"replicas that were trained on S as {GAUSSIAN}.replicas=DIR"
        )


def _examples(cfg: DictConfig, run_dir: Path) -> tuple[DictConfig, dict[str, ImageTensors]]:
    """The run's configuration with its changes, and the examples of the prior, S, both, and the test set.

    Raises:
        UserError: There are no examples that the run has not seen, or they chose its checkpoint.
    """
    run = load_run(run_dir)
    check_complete(run_dir, run, sections=("data", "model", "attack"), typed="")
    changed, allow = changed_run(run, cfg.run), allowed(cfg)
    seen, together = _split(run, "train", allow), _split(changed, "train", allow)
    test = _split(changed, "test", allow)
    rest, unknown = _difference(together, seen)
    if unknown:
        raise ConfigError(
            f"run.data: {unknown} of the run's training images are not among those with +run.data; "
            "leave data.split_seed and the other settings of the split as they were, and raise "
            "data.train_size alone"
        )
    if len(rest) < 8:
        raise ConfigError(
            f"run.data: of {len(together)} training images the run has seen all but {len(rest)}, and only "
            "the others count; give +run.data.train_size=null, for which the run must have been trained with "
            f"a smaller data.train_size, such as {len(together) // 2}"
        )
    held = [_split(run, "validation", allow)] if run.data.validation_size else []
    for name, split in [*(("validation", part) for part in held), ("test", _split(run, "test", allow))]:
        if len(_difference(rest, split)[0]) < len(rest):
            raise ConfigError(
                f"run.data: examples of S were in the run's {name} set, by which its checkpoint may have "
                f"been chosen; train the prior with a smaller data.train_size in place of data.{name}_size"
            )
    return changed, {"prior": seen, "S": rest, "all": together, "test": test}


def _split(run: DictConfig, name: str, allow: Collection[str]) -> ImageTensors:
    module: ImageDataModule = build(run, "data", allow=allow)
    module.prepare_data()
    module.setup("fit")
    return module.split(name)


def _difference(examples: ImageTensors, seen: ImageTensors) -> tuple[ImageTensors, int]:
    """``examples`` without those in ``seen``, as a multiset; and how many of ``seen`` were not among them."""
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


if __name__ == "__main__":
    # imported by name, so that a launcher's workers find it
    from robustdyn.commands.certify import main as command

    command()
