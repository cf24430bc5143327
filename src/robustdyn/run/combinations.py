"""Refuses settings of a run's parts, and choices that do not go together, before any data is read."""

import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.modules.batchnorm import _BatchNorm

from robustdyn.errors import ConfigError
from robustdyn.methods import BoundRate, is_plain_momentum
from robustdyn.methods.averaging import Averaging
from robustdyn.methods.objectives.objective import Objective
from robustdyn.methods.schedules import Schedule
from robustdyn.records.schema import EPOCHS, TABLES
from robustdyn.run.config import build
from robustdyn.run.parts import further_callbacks
from robustdyn.run.targets import named_in_conf

HALF = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")
"""Precisions of Lightning in which the weights themselves are rounded."""

BUILT_TO_CHECK = (
    "data", "attack.train", "attack.evaluation", "objective", "perturbation", "added_noise",
    "curvature_penalty", "optimizer", "regularizer", "schedule", "averaging", "stopping", "execution",
    "measure.eigenpairs",
)  # fmt: skip

SET_HERE = {
    "callbacks": "name each callback: +callbacks.NAME._target_=...",
    "default_root_dir": "choose hydra.run.dir",
    "logger": "choose a logger: logger=csv, tensorboard or wandb",
    "plugins": "leave it out",
}
"""Arguments of Lightning's trainer that robustdyn gives, and what a user who types them should do."""

PROTOCOLS: Mapping[str, Sequence[str]] = defaultdict(
    tuple,
    {
        "data": ("prepare_data", "setup", "split", "evaluation_splits", "measurement_subset"),
        "objective": ("takes_probabilities", "attack_loss", "__call__"),
        "perturbation": ("step_at", "warmup_epochs", "apply", "restore"),
        "added_noise": ("factor", "weighted"),
        "curvature_penalty": ("__call__",),
        "schedule": ("reads", "factor", "decay_epochs", "reading_epochs", "observe"),
        "measure.measurements": ("tables", "measure"),
    },
)
"""What is used of each part that the user may write; docs/extending.md describes it."""


def check_combinations(cfg: DictConfig) -> None:
    """Refuse settings that the constructors of the run's parts refuse, and combinations that cannot work.

    Raises:
        ConfigError: A setting or a combination cannot work; the message names the keys and the remedy.
    """
    _trainer(cfg)
    _settings_of_nothing(cfg)
    further_callbacks(cfg)
    model, parts = _model(cfg), _parts(cfg)
    _protocols(cfg, parts)
    _mixed_targets(cfg, parts["objective"])
    _mixed_noise(cfg)
    _optimizer(parts["optimizer"])
    _rates(cfg, parts["schedule"])
    _measured_rate(cfg, parts)
    _needed_tables(parts)
    _frozen_batchnorm(cfg, model)
    _averaging(cfg, parts["averaging"])
    _evaluation_attack(cfg)
    _early_stopping(cfg)
    _metric(cfg)


def _trainer(cfg: DictConfig) -> None:
    precision = str(cfg.trainer.precision)
    if precision in HALF:
        raise ConfigError(
            f"trainer.precision={precision} holds the weights and the metrics in half precision; choose "
            "bf16-mixed (execution=bf16)"
        )
    if overfit := cfg.trainer.get("overfit_batches"):
        raise ConfigError(
            f"trainer.overfit_batches={overfit} would take other images in every epoch, because the order is "
            f"drawn for all of them; choose data.train_size for a few images"
        )
    for key, remedy in SET_HERE.items():
        if key in cfg.trainer:
            raise ConfigError(f"trainer.{key} is set by robustdyn itself; {remedy}")
    for key in ("max_time", "max_steps"):
        if cfg.trainer.get(key) not in (None, -1):
            raise ConfigError(
                f"trainer.{key}={cfg.trainer[key]} would end the training within an epoch, which would be "
                "recorded and resumed as if it were complete; choose trainer.max_epochs, or stop the command "
                "itself, for instance by timeout 2h robustdyn-train ..., and resume it"
            )
    if cfg.trainer.inference_mode:
        raise ConfigError(
            "trainer.inference_mode=true leaves the attacks of an evaluation without gradients; choose false"
        )


def _settings_of_nothing(cfg: DictConfig) -> None:
    """Refuse settings of a group for which ``none`` was chosen: a preset may set what ``none`` replaces."""
    for group in ("perturbation", "added_noise", "curvature_penalty", "averaging", "stopping"):
        settings = cfg[group]
        if settings and "_target_" not in settings:
            raise ConfigError(
                f"{group}.{next(iter(settings))} is set but {group}=none takes no settings; choose another "
                f"{group}, or leave the settings out"
            )


def _model(cfg: DictConfig) -> torch.nn.Module:
    ours = cfg.model.get("_target_") in named_in_conf("model")
    with torch.device("meta" if ours else "cpu"):  # ours need no memory for weights; others may read tensors
        model: torch.nn.Module = build(cfg, "model")
    return model


def _parts(cfg: DictConfig) -> dict[str, Any]:
    """Build every part of the run; a constructor that refuses its arguments raises ``ConfigError``.

    Returns:
        All parts but the model, by their keys.
    """
    chosen = [name for name, measurement in cfg.measure.measurements.items() if measurement is not None]
    return {
        key: build(cfg, key)
        for key in (*BUILT_TO_CHECK, *(f"measure.measurements.{name}" for name in chosen))
    }


def _protocols(cfg: DictConfig, parts: Mapping[str, Any]) -> None:
    """Refuse an own class that lacks what its part must have."""
    for key, part in parts.items():
        needed = PROTOCOLS["measure.measurements" if key.startswith("measure.measurements.") else key]
        missing = [name for name in needed if not hasattr(part, name)]
        if missing and part is not None:
            raise ConfigError(
                f"{key}._target_={OmegaConf.select(cfg, key)._target_} has no {missing[0]}, which this part "
                f"needs; docs/extending.md says what {key.partition('.')[0]} must have"
            )
        unknown = [name for name in getattr(part, "tables", ()) if name not in TABLES]
        if unknown:
            raise ConfigError(
                f"{key} writes the table {unknown[0]}, which is not declared; declare it with "
                "robustdyn.records.add_table"
            )


def _mixed_targets(cfg: DictConfig, objective: Objective) -> None:
    if OmegaConf.select(cfg, "data.mixup") and not objective.takes_probabilities:
        raise ConfigError(
            f"data.mixup={cfg.data.mixup} mixes labels, but {_choice(cfg, 'objective')} compares the "
            "labelled class with the others; choose data.mixup=0, or objective=at or trades"
        )


def _mixed_noise(cfg: DictConfig) -> None:
    if OmegaConf.select(cfg, "data.mixup") and cfg.added_noise:
        raise ConfigError(
            f"data.mixup={cfg.data.mixup} puts every image into two examples of a batch, whose gradients "
            "then depend on each other, and added_noise takes them as independent; choose data.mixup=0, "
            "or added_noise=none"
        )


def _optimizer(factory: Callable[[list[torch.nn.Parameter]], object]) -> None:
    """Let the optimiser's constructor refuse its settings now, for instance Nesterov without momentum."""
    try:
        factory([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {error}") from error


def _rates(cfg: DictConfig, schedule: Schedule) -> None:
    """Refuse a learning rate of 0, which trains nothing and has no stationary law, or below."""
    ours = "length" in cfg.schedule or "factors" in cfg.schedule
    remedy = (
        f"choose schedule.length={cfg.trainer.max_epochs}, or positive schedule.factors"
        if ours
        else f"the factor of {cfg.schedule._target_} must be positive"
    )
    for epoch in range(cfg.trainer.max_epochs):
        if not schedule.factor(epoch + 0.5) > 0:
            raise ConfigError(
                f"schedule: the learning rate is not positive in epoch {epoch} of trainer.max_epochs="
                f"{cfg.trainer.max_epochs}; {remedy}"
            )


def _measured_rate(cfg: DictConfig, parts: Mapping[str, Any]) -> None:
    schedule: Schedule = parts["schedule"]
    if schedule.reads is None:
        return
    if isinstance(schedule, BoundRate):
        _plain_momentum(cfg, parts)
    measurements = [part for key, part in parts.items() if key.startswith("measure.measurements.")]
    if not any(schedule.reads in measurement.tables for measurement in measurements):
        raise ConfigError(
            f"{_choice(cfg, 'schedule')} follows the measured table {schedule.reads}, but "
            "measure.measurements has nothing that measures it; choose measure=default, or measure=none for "
            "nothing but what the schedule follows, or another schedule"
        )
    if not schedule.reading_epochs(cfg.trainer.max_epochs):
        raise ConfigError(
            f"schedule.start_epoch={cfg.schedule.start_epoch} is not reached by trainer.max_epochs="
            f"{cfg.trainer.max_epochs}, so that no rate follows a measurement; choose an earlier "
            "start_epoch, or schedule=constant"
        )


def _needed_tables(parts: Mapping[str, Any]) -> None:
    """Refuse a measurement that takes what no measurement before it gives."""
    given: set[str] = set()
    for key, part in parts.items():
        if not key.startswith("measure.measurements."):
            continue
        # not a part of the protocol: most measurements need no other
        if missing := set(getattr(part, "needs", ())) - given:
            raise ConfigError(
                f"{key} needs the tables {', '.join(sorted(missing))}, which no measurement before it gives; "
                f"choose measure=bound or measure=full, or {key}=null"
            )
        given.update(part.tables)


def _frozen_batchnorm(cfg: DictConfig, model: torch.nn.Module) -> None:
    start = cfg.batchnorm.frozen_from
    if start is None:
        return
    if start >= cfg.trainer.max_epochs:
        raise ConfigError(
            f"batchnorm.frozen_from={start} is not reached by trainer.max_epochs={cfg.trainer.max_epochs}, "
            "so that no statistics are frozen; choose an earlier epoch, or null"
        )
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ConfigError(
            f"batchnorm.frozen_from={start} freezes the statistics of BatchNorm, and "
            f"{_choice(cfg, 'model')} has no BatchNorm; choose null, or another model"
        )


def _plain_momentum(cfg: DictConfig, parts: Mapping[str, Any]) -> None:
    groups = parts["regularizer"].parameter_groups(torch.nn.Linear(1, 1))
    if cfg.trainer.get("gradient_clip_val") or not is_plain_momentum(parts["optimizer"](groups)):
        raise ConfigError(
            f"{_choice(cfg, 'schedule')} follows the stationary law of momentum SGD; choose optimizer=sgd, "
            "optimizer.nesterov=false, regularizer.weight_decay_on=all and trainer.gradient_clip_val=null, "
            "or another schedule"
        )


def _averaging(cfg: DictConfig, averaging: object) -> None:
    if cfg.measure.weights == "averaged" and not isinstance(averaging, Averaging):
        raise ConfigError(
            "measure.weights=averaged measures the average of the weights, but this run keeps none; choose "
            "averaging=ema or swa, or measure.weights=trained"
        )
    start = cfg.averaging.get("start_epoch")
    if start is not None and start >= cfg.trainer.max_epochs:
        raise ConfigError(
            f"averaging.start_epoch={start} is not reached by trainer.max_epochs={cfg.trainer.max_epochs}, "
            "so that nothing is averaged; choose an earlier start_epoch, or averaging=none"
        )


def _evaluation_attack(cfg: DictConfig) -> None:
    projection = cfg.attack.evaluation.get("projection", "ball")
    if projection != "ball":
        raise ConfigError(
            f"attack.evaluation.projection={projection} lets the attack leave the ball in which "
            "robustness is evaluated; choose ball"
        )


def _early_stopping(cfg: DictConfig) -> None:
    if not cfg.stopping:
        return
    monitor = str(cfg.stopping.get("monitor", ""))
    if monitor not in EPOCHS.names:
        raise ConfigError(
            f"stopping.monitor={monitor} is not a column of the epochs table; choose validation_robust_error "
            "or another one"
        )
    if monitor.startswith("validation_") and not cfg.data.validation_size:
        raise ConfigError(
            "stopping=early watches held-out training images, but data.validation_size=0; choose a size, "
            "or stopping=none"
        )
    if cfg.trainer.check_val_every_n_epoch != 1:
        raise ConfigError(
            f"stopping=early needs an evaluation after every epoch, but trainer.check_val_every_n_epoch="
            f"{cfg.trainer.check_val_every_n_epoch}; choose 1, or stopping=none"
        )


def _choice(cfg: DictConfig, group: str) -> str:
    """``objective MART``: the group and the class it chose."""
    return f"{group} {cfg[group]._target_.rpartition('.')[2]}"


def _metric(cfg: DictConfig) -> None:
    if cfg.metric is None:
        return
    held_out = bool(OmegaConf.select(cfg, "data.validation_size"))
    rows = ("final", "best_on_test", *(["best_on_validation"] if held_out else []))
    columns = [c for c in EPOCHS.names if held_out or not c.startswith("validation_")]
    known = [f"{row}.{column}" for row in rows for column in columns]
    known += ["min_test_robust_loss.value", "min_test_robust_loss.epoch", "robust_loss_rise"]
    if cfg.metric not in known:
        close = difflib.get_close_matches(str(cfg.metric), known, n=3, cutoff=0.3)
        raise ConfigError(
            f"metric={cfg.metric} is not a number in summary.json; choose {' or '.join(close or known)}"
        )
