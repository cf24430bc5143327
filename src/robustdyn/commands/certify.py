"""``robustdyn-certify``: bounds a checkpoint's robust error (PAC-Bayes) with a posterior from replicas."""

import json
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
from robustdyn.launch.paths import load_run
from robustdyn.models import load_weights
from robustdyn.records.files import file_digest, replace_file
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.writer import jsonable
from robustdyn.replicas import StackedNetwork, read_ensemble
from robustdyn.replicas.gibbs import GibbsSampling
from robustdyn.replicas.posterior_certificate import CertificateSettings, Certifier, measured_posterior
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
COUNTED = ("screening", "sampling", "test")


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
    "step": Rule(lambda v: v is None or COUNT.holds(v), f"{COUNT.requirement}, or null"),
    "posterior.shift": _all_of(NON_NEGATIVE),
    "posterior.scale": _all_of(POSITIVE),
    "prior.std": _all_of(POSITIVE),
    "alpha": _SHARE,
    "alpha_sampling": _SHARE,
    **{f"{part}.{key}": COUNT for part in COUNTED for key in ("networks", "examples")},
}


def main() -> None:
    """The ``robustdyn-certify`` command."""
    run_app(run_certify, NAME, paths=("replicas",))


def run_certify(cfg: DictConfig) -> None:
    """Certify the posterior that an ensemble measured, and print which parts make up the bound.

    Raises:
        UserError: The configuration, the checkpoint, the data or the ensemble cannot be used.
    """
    checkpoint = checkpoint_of(cfg)
    run_dir = required_run_of(checkpoint)
    _check(cfg)
    folder = Path(cfg.replicas) if cfg.replicas else RunDirectory(run_dir).replicas / checkpoint.stem
    default = RunDirectory(run_dir).certificates / f"{checkpoint.stem}.json"
    output = Path(cfg.output) if cfg.output else default
    device = device_of(cfg.device)
    ensemble = read_ensemble(folder)
    if ensemble.settings["checkpoint"] != file_digest(checkpoint):
        raise RecordError(f"{folder}: an ensemble of another checkpoint; give replicas=DIR")
    measured = measured_posterior(ensemble, folder, cfg.step)
    run, examples = _examples(cfg, run_dir, measured.images, folder)
    for part in ("screening", "sampling"):
        _at_most(cfg, f"{part}.examples", len(examples["S"]), "examples of S")
    _at_most(cfg, "test.examples", len(examples["test"]), "test images")
    model: nn.Module = build(run, "model", allow=allowed(cfg))
    load_weights(model, checkpoint, layout="robustdyn")
    attack: PGD = build(run, "attack.evaluation", allow=allowed(cfg))
    if attack.batchnorm != "eval":
        raise ConfigError(
            "attack.evaluation.batchnorm=train would change the running statistics; choose eval"
        )
    certifier = Certifier(
        StackedNetwork(model.to(device).eval(), cfg.engine),
        measured,
        {name: (to_unit(s.images).to(device), s.labels.to(device)) for name, s in examples.items()},
        attack,
        _settings(cfg),
        classes=run.data.num_classes,
        say=say,
    )
    result = certifier.certify() | {
        "settings": {
            **_provenance(cfg, run, attack, device),
            "examples": {name: len(part) for name, part in examples.items()},
            "ensemble": str(folder),
            "checkpoint": str(checkpoint),
        }
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
    """Lines to print: a table of certificates, and what limits the best one."""
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


def _settings(cfg: DictConfig) -> CertificateSettings:
    counts = {
        part: GibbsSampling(networks=cfg[part].networks, examples=cfg[part].examples) for part in COUNTED
    }
    return CertificateSettings(
        shift=tuple(cfg.posterior.shift),
        scale=tuple(cfg.posterior.scale),
        prior_std=tuple(cfg.prior.std),
        alpha=cfg.alpha,
        alpha_sampling=cfg.alpha_sampling,
        chunk=cfg.chunk,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        **counts,
    )


def _provenance(cfg: DictConfig, run: DictConfig, attack: PGD, device: torch.device) -> dict[str, Any]:
    given = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(given, dict)
    kept = ("seed", "engine", "posterior", "prior", "alpha", "alpha_sampling", *COUNTED, "run")
    return {
        **{key: given[key] for key in kept},
        "attack": asdict(attack),
        "data": type_name(run.data),
        "versions": versions(),
        "device": device_name(device),
    }


# ---------------------------------------------------------------------- the examples


def _examples(
    cfg: DictConfig, run_dir: Path, images: str, folder: Path
) -> tuple[DictConfig, dict[str, ImageTensors]]:
    """The run's configuration with its changes, and the examples of the prior, of S and of the test set.

    Raises:
        UserError: The ensemble used other examples, or the prior has seen all of them.
    """
    run = load_run(run_dir)
    changed, allow = changed_run(run, cfg.run), allowed(cfg)
    seen, trained = _split(run, "train", allow), _split(changed, "train", allow)
    test = _split(changed, "test", allow)
    if trained.digest() != images:
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
    held = [_split(run, "validation", allow)] if run.data.validation_size else []
    for name, split in [*(("validation", part) for part in held), ("test", _split(run, "test", allow))]:
        if len(_difference(rest, split)[0]) < len(rest):
            raise ConfigError(
                f"run.data: examples of S were in the run's {name} set, by which its checkpoint may have "
                f"been chosen; train the prior with a smaller data.train_size in place of data.{name}_size"
            )
    return changed, {"prior": seen, "S": rest, "test": test}


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
