"""Checks and builds the settings of replica ensembles, for ``robustdyn-replicas`` and ``robustdyn-train``."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from robustdyn.errors import ConfigError, config_errors
from robustdyn.records.run_directory import RunDirectory
from robustdyn.replicas import EnsembleSettings, NoiseFreeSettings, PointSettings, Recorded
from robustdyn.run.config import COUNT, POSITIVE, SEED, SWITCH, WHOLE, Rule, build, check_rules
from robustdyn.run.ensemble_callback import RunEnsembles
from robustdyn.run.environment import device_name, versions
from robustdyn.run.of_checkpoint import type_name

GROUP = "ensemble"


def _one_of(*choices: str) -> Rule:
    return Rule(lambda v: v in choices, f"must be {' or '.join(choices)}")


def _or_null(rule: Rule) -> Rule:
    return Rule(lambda v: v is None or rule.holds(v), f"{rule.requirement}, or null")


STEPS = Rule(
    lambda v: isinstance(v, list | ListConfig) and all(WHOLE.holds(step) for step in v),
    "must be a list of whole numbers of at least 0",
)

# settings of a run that change its steps unless they are 0
_UNSUPPORTED = ("regularizer.l1", "added_noise.factor", "curvature_penalty.strength")

RULES: Mapping[str, Rule] = {
    "seed": SEED,
    "replicas": COUNT,
    "chunk": COUNT,
    "engine": _one_of("vmapped", "looped"),
    "initial_state": _one_of("zero", "checkpoint"),
    "freeze_preconditioner": SWITCH,
    "batchnorm": _one_of("eval", "train"),
    "steps": COUNT,
    "learning_rate": _or_null(POSITIVE),
    "sampling.batch_size": _or_null(COUNT),
    "sampling.replacement": SWITCH,
    "sampling.drop_last": SWITCH,
    "record.steps": STEPS,
    "record.loss_steps": STEPS,
    "record.mean_steps": STEPS,
    "record.loss_examples": COUNT,
    "record.loss_draws": COUNT,
    "record.weights": SWITCH,
    "expansion.multiples": Rule(
        lambda v: (
            isinstance(v, list | ListConfig)
            and all(POSITIVE.holds(distance) for distance in v)
            and list(v) == sorted(set(v))
        ),
        "must be a list of positive numbers that increase, or []",
    ),
    "start.memory_mib": COUNT,
    "noise_free.repetitions": WHOLE,
    "noise_free.pairs": COUNT,
    "noise_free.every": COUNT,
    "noise_free.children": WHOLE,
}


def ensemble_settings(cfg: DictConfig, prefix: str = "") -> EnsembleSettings:
    """The settings in ``cfg`` under ``prefix``, which is empty for the top level, or ``"ensemble."``.

    Raises:
        ConfigError: A value is not allowed; the message names its key.
    """
    check_rules(cfg, RULES, prefix)
    chosen = OmegaConf.select(cfg, prefix.rstrip(".")) if prefix else cfg
    steps, schedule = chosen.steps, build(cfg, f"{prefix}schedule")
    with config_errors(f"{prefix}start."):
        given = {key: value for key, value in chosen.start.items() if key != "memory_mib"}
        start = PointSettings(memory=chosen.start.memory_mib * 2**20, **given)
    with config_errors(f"{prefix}noise_free."):
        noise_free = NoiseFreeSettings(**chosen.noise_free)
    with config_errors(f"{prefix}record."):
        when: dict[str, Any] = {
            name: tuple(step for step in chosen.record[name] if step <= steps)
            for name in ("steps", "loss_steps", "mean_steps")
        }
        recorded = Recorded(
            loss_examples=chosen.record.loss_examples,
            loss_draws=chosen.record.loss_draws,
            expansion=len(chosen.expansion.multiples) > 0,
            weights=chosen.record.weights,
            **when,
        )
    with config_errors(prefix):
        return EnsembleSettings(
            replicas=chosen.replicas,
            chunk=chosen.chunk,
            engine=chosen.engine,
            seed=chosen.seed,
            initial_state=chosen.initial_state,
            freeze_preconditioner=chosen.freeze_preconditioner,
            batchnorm=chosen.batchnorm,
            learning_rate=None if chosen.learning_rate is None else float(chosen.learning_rate),
            factors=tuple(schedule.factor(step + 0.5) for step in range(steps)),
            batch_size=chosen.sampling.batch_size,
            replacement=chosen.sampling.replacement,
            drop_last=chosen.sampling.drop_last,
            recorded=recorded,
            start=start,
            noise_free=noise_free,
            multiples=tuple(float(distance) for distance in chosen.expansion.multiples),
            prefix=prefix,
        )


def check_run(run: DictConfig, batchnorm: str, remedy: str) -> None:
    """Refuse a run whose training steps replicas do not support.

    Args:
        run: The run's configuration.
        batchnorm: The replicas' setting of this name.
        remedy: What to do about a setting that is not 0; ``{key}`` in it stands for its key.

    Raises:
        ConfigError: A setting is not supported; the message names the key and the remedy.
    """
    for key in _UNSUPPORTED:
        if value := OmegaConf.select(run, key):
            raise ConfigError(
                f"{key}={value} of the run is not 0, which replicas do not support; {remedy.format(key=key)}"
            )
    frozen = OmegaConf.select(run, "batchnorm.frozen_from")
    if frozen is not None and batchnorm == "train":
        raise ConfigError(
            f"batchnorm.frozen_from={frozen} of the run keeps statistics that replicas with batchnorm=train "
            "would update; choose batchnorm=eval for the replicas"
        )
    for key, plain in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
        if (value := run.trainer.get(key, plain)) not in (plain, 0):
            raise ConfigError(
                f"trainer.{key}={value} of the run changes its steps in a way that replicas do not support; "
                "train without it"
            )


def description(run: DictConfig) -> dict[str, object]:
    """The part of a run's configuration on which the replicas' numbers depend."""
    return {
        "data": type_name(run.data),
        **{key: _plain(run, key) for key in ("model", "objective", "perturbation", "optimizer")},
        "attack": _plain(run, "attack.train"),
        "weight_decay_on": run.regularizer.weight_decay_on,
    }


def engine_provenance(engine: str, device: torch.device) -> dict[str, object]:
    """Versions, device and engine, on which the replicas' numbers should not depend."""
    return {**versions(), "device": device_name(device), "engine": engine}


def check_ensemble(cfg: DictConfig) -> None:
    """Refuse settings of a training's ensembles that cannot work, before any data is read.

    Raises:
        ConfigError: A setting cannot work; the message names its key.
    """
    settings = cfg[GROUP]
    if not settings:
        return
    if "epochs" not in settings or "engine" not in settings:  # the command line may remove a preset's group
        raise ConfigError(
            f"{GROUP}.{next(iter(settings))} is set but {GROUP}=none takes no settings; choose "
            f"{GROUP}=default, and {GROUP}.epochs=[] to run none, or leave the settings out"
        )
    ensemble_settings(cfg, f"{GROUP}.")
    check_run(cfg, settings.batchnorm, f"choose 0, or {GROUP}=none")


def ensemble_callbacks(cfg: DictConfig, run_dir: Path) -> list[Callback]:
    """The callback that runs a training's ensembles, or none if there are no ensembles."""
    if not cfg[GROUP]:
        return []
    settings = ensemble_settings(cfg, f"{GROUP}.")
    noted: Callable[[torch.device], Mapping[str, object]] = partial(engine_provenance, settings.engine)
    epochs: Any = OmegaConf.to_container(cfg[GROUP], resolve=True)
    return [
        RunEnsembles(
            epochs=epochs["epochs"],
            settings=settings,
            description=description(cfg),
            provenance=noted,
            folder=RunDirectory(run_dir).replicas,
        )
    ]


def _plain(run: DictConfig, key: str) -> Any:
    node = OmegaConf.select(run, key)
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
