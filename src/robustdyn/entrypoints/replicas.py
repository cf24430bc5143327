"""``robustdyn-replicas``: an ensemble of replicas of a run's checkpoint."""

import copy
import hashlib
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from robustdyn.data import ImageDataModule, ImageTensors
from robustdyn.data.tensors import to_unit
from robustdyn.entrypoints.checkpoint import (
    RUN_CONFIG,
    checkpoint_of,
    device_of,
    load_config,
    run_of,
    type_name,
)
from robustdyn.entrypoints.config import (
    COUNT,
    POSITIVE,
    SWITCH,
    WHOLE,
    Rule,
    build,
    check,
    config_dir,
)
from robustdyn.entrypoints.environment import processor
from robustdyn.entrypoints.terminal import run_app
from robustdyn.errors import ConfigError, RecordError
from robustdyn.methods import Regularizer
from robustdyn.models import load_weights
from robustdyn.replicas import (
    AdamUpdate,
    Directions,
    Ensemble,
    EnsembleRecord,
    MeasuredPoint,
    MomentumUpdate,
    PointSettings,
    Recorded,
    Sampling,
    StackedNetwork,
    Training,
    measure_point,
    second_moment,
)
from robustdyn.replicas.updates import Update
from robustdyn.theory import adam_scale

NAME = "replicas"
_SGD, _ADAM = ("torch.optim.SGD", "torch.optim.sgd.SGD"), ("torch.optim.Adam", "torch.optim.adam.Adam")


def _one_of(*choices: str) -> Rule:
    return Rule(lambda v: v in choices, f"must be {' or '.join(choices)}")


RULES: Mapping[str, Rule] = {
    "seed": WHOLE,
    "replicas": COUNT,
    "chunk": COUNT,
    "engine": _one_of("vmapped", "looped"),
    "initial_state": _one_of("zero", "checkpoint"),
    "freeze_preconditioner": SWITCH,
    "batchnorm": _one_of("eval", "train"),
    "steps": COUNT,
    "learning_rate": Rule(lambda v: v is None or POSITIVE.holds(v), "must be a positive number, or null"),
    "sampling.batch_size": Rule(lambda v: v is None or COUNT.holds(v), "must be a whole number ≥ 1, or null"),
    "sampling.replacement": SWITCH,
    "sampling.drop_last": SWITCH,
    "record.loss_examples": COUNT,
    "start.memory_mib": COUNT,
}


def main() -> None:
    """The ``robustdyn-replicas`` command."""
    run_app(run_replicas, NAME)


def run_replicas(cfg: DictConfig) -> None:
    """Run what is missing of an ensemble, or of one shard of it.

    Raises:
        UserError: The configuration, the checkpoint, the data or the record cannot be used.
    """
    checkpoint = checkpoint_of(cfg)
    run_dir = run_of(checkpoint)
    if run_dir is None:
        raise ConfigError(f"checkpoint={checkpoint} does not lie in a run directory; give a run's checkpoint")
    _check(cfg)
    shard, shards = _shard(cfg.shard)
    run = _run_config(cfg, run_dir)
    device = device_of(cfg.device)
    problem = _problem(cfg, run, checkpoint, device)
    output = Path(cfg.output) if cfg.output else run_dir / "replicas" / checkpoint.stem
    record = EnsembleRecord(output, problem.settings, _provenance(cfg, device), chunk=cfg.chunk)
    todo = list(record.missing(cfg.replicas, shard=shard, shards=shards))
    try:
        start = record.start(lambda: problem.measure(cfg), device)
        _say(
            f"start       loss {start.loss:.4f}, eigenvalues {start.eigenvalues[0]:.4g} to "
            f"{start.eigenvalues[cfg.start.eigenvectors - 1]:.4g}"
            + ("" if start.converged else " (not all converged: raise start.max_products)")
        )
        ensemble = Ensemble(
            problem.model,
            problem.training,
            directions=start.directions,
            recorded=problem.recorded,
            engine=cfg.engine,
        )
        for number, replicas in enumerate(todo, start=1):
            began = time.perf_counter()
            record.add(replicas, ensemble.run(replicas))
            seconds = time.perf_counter() - began
            each = 1e3 * seconds / (len(replicas) * cfg.steps)
            _say(
                f"replicas    {replicas.start} to {replicas.stop - 1} done, {each:.1f} ms a step "
                f"({number} of {len(todo)} chunks)"
            )
    except FloatingPointError as error:
        raise ConfigError(
            f"learning_rate={problem.training.learning_rate[0]:g}: {error}; choose less"
        ) from error
    left = sum(1 for _ in record.missing(cfg.replicas))
    if problem.recorded.mean_steps and not left:
        _say("path        measuring curvature and noise along the replicas' mean")
        record.path(
            cfg.replicas,
            problem.recorded.mean_steps,
            lambda move: problem.measure_at(cfg, torch.from_numpy(move), start.directions),
        )
    _say(f"ensemble: {output}" + (f" ({left} chunks are still missing)" if left else ""))


# ---------------------------------------------------------------------- the configuration


def _check(cfg: DictConfig) -> None:
    for key, rule in RULES.items():
        value = OmegaConf.select(cfg, key)
        if not rule.holds(value):
            raise ConfigError(f"{key}={value} {rule.requirement}")


def _shard(typed: str | None) -> tuple[int, int]:
    """Which part of the chunks is ours: as typed, or as the launcher of the processes says."""
    if typed is None:
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in os.environ and size in os.environ:
                return int(os.environ[rank]), int(os.environ[size])
        return 0, 1
    first, slash, last = str(typed).partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ConfigError(f"shard={typed} must be I/N with 0 <= I < N, such as 0/2")
    return int(first), int(last)


def _run_config(cfg: DictConfig, run_dir: Path) -> DictConfig:
    """The run's configuration with what this command changes."""
    run = load_config(run_dir / RUN_CONFIG)
    for group in ("perturbation", "optimizer"):
        name = cfg.method[group]
        if name == "run":
            continue
        path = config_dir() / group / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
            raise ConfigError(f"method.{group}={name} is not known; choose run, {known}")
        run[group] = OmegaConf.load(path)
    try:
        changed = OmegaConf.merge(run, cfg.run)
        assert isinstance(changed, DictConfig)
        check(changed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"run: {' '.join(str(error).split())}") from error
    if OmegaConf.select(changed, "regularizer.l1"):
        raise ConfigError(
            "regularizer.l1 of the run is not 0, which replicas do not know; say +run.regularizer.l1=0"
        )
    return changed


# ---------------------------------------------------------------------- what is trained


@dataclass(frozen=True)
class _Problem:
    model: nn.Module
    training: Training
    recorded: Recorded
    settings: Mapping[str, object]
    preconditioner: Tensor | None

    def measure(self, cfg: DictConfig) -> MeasuredPoint:
        _say("start       measuring curvature and noise at the checkpoint")
        return measure_point(
            self.model,
            self.training,
            _start_settings(cfg),
            engine=cfg.engine,
            chunk=cfg.chunk,
            preconditioner=self.preconditioner,
        )

    def measure_at(self, cfg: DictConfig, move: Tensor, directions: Directions) -> MeasuredPoint:
        """The point at θ_0 + ``move`` (P,), along the directions of the start."""
        moved = copy.deepcopy(self.model)
        learned = [p for p in moved.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, part in zip(learned, move.to(learned[0]).split([p.numel() for p in learned]), strict=True):
                p.add_(part.view_as(p))
        return measure_point(
            moved,
            self.training,
            _start_settings(cfg),
            engine=cfg.engine,
            chunk=cfg.chunk,
            preconditioner=self.preconditioner,
            directions=directions,
        )


def _problem(cfg: DictConfig, run: DictConfig, checkpoint: Path, device: torch.device) -> _Problem:
    model: nn.Module = build(run, "model")
    load_weights(model, checkpoint, layout="robustdyn")
    model.to(device).eval()
    split = _train_split(run).to(device)
    objective, attack = build(run, "objective"), build(run, "attack.train")
    perturbation = build(run, "perturbation") if run.get("perturbation") else None
    schedule = build(cfg, "schedule")
    state = _optimizer_state(checkpoint)
    rate = cfg.learning_rate if cfg.learning_rate is not None else state["param_groups"][0]["lr"]
    rates = [float(rate) * schedule.factor(step + 0.5) for step in range(cfg.steps)]
    decay = _decay(run, model)
    try:
        sampling = Sampling(
            examples=len(split),
            batch_size=cfg.sampling.batch_size or run.data.batch_size,
            replacement=cfg.sampling.replacement,
            drop_last=cfg.sampling.drop_last,
        )
        recorded = Recorded(
            steps=tuple(step for step in cfg.record.steps if step <= cfg.steps),
            loss_steps=tuple(step for step in cfg.record.loss_steps if step <= cfg.steps),
            loss_examples=min(cfg.record.loss_examples, len(split)),
            mean_steps=tuple(step for step in cfg.record.mean_steps if step <= cfg.steps),
        )
        _start_settings(cfg)

        def training(update: Update) -> Training:
            return Training(
                images=to_unit(split.images),
                targets=split.labels,
                objective=objective,
                attack=attack,
                perturbation=perturbation,
                update=update,
                learning_rate=rates,
                sampling=sampling,
                batchnorm=cfg.batchnorm,
                seed=cfg.seed,
            )

        update, preconditioner = _update(cfg, run, model, state, decay, training)
        trained = training(update)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{NAME}: {error}") from error
    settings = _settings(cfg, run, checkpoint, split, trained, recorded)
    return _Problem(model, trained, recorded, settings, preconditioner)


def _start_settings(cfg: DictConfig) -> PointSettings:
    try:
        given = {key: value for key, value in cfg.start.items() if key != "memory_mib"}
        return PointSettings(memory=cfg.start.memory_mib * 2**20, **given)
    except ValueError as error:
        raise ConfigError(f"start: {error}") from error


def _train_split(run: DictConfig) -> ImageTensors:
    module: ImageDataModule = build(run, "data")
    module.prepare_data()
    module.setup("fit")
    return module.split("train")


def _optimizer_state(checkpoint: Path) -> dict[str, Any]:
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    try:
        state: dict[str, Any] = content["optimizer_states"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise RecordError(
            f"{checkpoint}: holds no optimiser; give one of a run's checkpoints that training goes on from"
        ) from error
    return state


def _decay(run: DictConfig, model: nn.Module) -> float | Tensor:
    """ω, or of each parameter where only weights decay."""
    decay = float(run.optimizer.weight_decay)
    if not decay or run.regularizer.weight_decay_on == "all":
        return decay
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([torch.full((p.numel(),), decay * (p.dim() > 1)) for p in learned]).to(learned[0])


def _update(
    cfg: DictConfig,
    run: DictConfig,
    model: nn.Module,
    state: dict[str, Any],
    decay: float | Tensor,
    training: Any,
) -> tuple[Update, Tensor | None]:
    """The optimiser's rule and, of Adam, the preconditioner at the start."""
    options, target = run.optimizer, run.optimizer._target_
    buffer = second = None
    count = 0
    held = _in_order(run, model, state)
    if target in _SGD:
        if options.get("nesterov") or options.get("dampening"):
            raise ConfigError(
                "optimizer: replicas know SGD without Nesterov and dampening; say method.optimizer=sgd"
            )
        if cfg.initial_state == "checkpoint":
            buffer = _held(held, "momentum_buffer")
        return MomentumUpdate(momentum=options.momentum, weight_decay=decay, initial_buffer=buffer), None
    if target not in _ADAM:
        raise ConfigError(
            f"optimizer: replicas know SGD and Adam, not {target}; say method.optimizer=sgd or adam"
        )
    beta1, beta2 = options.betas
    if held and all("exp_avg_sq" in entry for entry in held):
        second, count = _held(held, "exp_avg_sq"), int(held[0]["step"])
        estimate = second / (1 - beta2**count)
        buffer = _held(held, "exp_avg") if cfg.initial_state == "checkpoint" else None
    else:
        if cfg.initial_state == "checkpoint":
            raise ConfigError("initial_state=checkpoint: the checkpoint holds no state of Adam; choose zero")
        plain = training(MomentumUpdate(momentum=0.0, weight_decay=decay, initial_buffer=None))
        network = StackedNetwork(model, cfg.engine)
        second = second_moment(network, plain, batches=max(cfg.start.noise_batches, 1), chunk=cfg.chunk)
        # so many steps that nothing is left to correct
        estimate, count = second, 10**6
    scale = adam_scale(estimate.double().cpu().numpy(), options.eps)
    rule = AdamUpdate(
        beta1=beta1,
        beta2=beta2,
        epsilon=options.eps,
        weight_decay=decay,
        initial_buffer=buffer,
        second_moment=estimate if cfg.freeze_preconditioner else second,
        initial_count=count,
        frozen=cfg.freeze_preconditioner,
    )
    return rule, torch.as_tensor(scale).to(estimate)


def _in_order(run: DictConfig, model: nn.Module, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The optimiser's state of each parameter, in the order of the network's; empty where it holds none."""
    regularizer: Regularizer = build(run, "regularizer")
    order = [id(p) for group in regularizer.parameter_groups(model) for p in group["params"]]
    entries = state["state"]
    if len(entries) != len(order):
        return []
    by_parameter = {key: entries[number] for number, key in enumerate(order)}
    return [by_parameter[id(p)] for p in model.parameters() if p.requires_grad]


def _held(entries: list[dict[str, Any]], name: str) -> Tensor:
    if not entries or any(entry.get(name) is None for entry in entries):
        raise ConfigError(
            f"initial_state=checkpoint: the checkpoint's optimiser holds no {name}; choose zero"
        )
    return torch.cat([entry[name].contiguous().reshape(-1) for entry in entries])


# ---------------------------------------------------------------------- the record


def _settings(
    cfg: DictConfig,
    run: DictConfig,
    checkpoint: Path,
    split: ImageTensors,
    training: Training,
    recorded: Recorded,
) -> dict[str, object]:
    """What the numbers depend on."""
    images = hashlib.sha256(split.images.cpu().numpy().tobytes() + split.labels.cpu().numpy().tobytes())
    of_run = {key: _plain(run, key) for key in ("model", "objective", "perturbation", "optimizer")}
    return {
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "images": images.hexdigest(),
        "data": type_name(run.data),
        "examples": len(split),
        **of_run,
        "attack": _plain(run, "attack.train"),
        "weight_decay_on": run.regularizer.weight_decay_on,
        "initial_state": cfg.initial_state,
        "freeze_preconditioner": cfg.freeze_preconditioner,
        "batchnorm": cfg.batchnorm,
        "steps": cfg.steps,
        "learning_rate": list(training.learning_rate),
        "sampling.batch_size": training.sampling.batch_size,
        "sampling.replacement": training.sampling.replacement,
        "sampling.drop_last": training.sampling.drop_last,
        "record.steps": list(recorded.steps),
        "record.loss_steps": list(recorded.loss_steps),
        "record.loss_examples": recorded.loss_examples,
        "record.mean_steps": list(recorded.mean_steps),
        "start": {key: value for key, value in cfg.start.items() if key != "memory_mib"},
        "seed": cfg.seed,
    }


def _plain(run: DictConfig, key: str) -> Any:
    node = OmegaConf.select(run, key)
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node


def _provenance(cfg: DictConfig, device: torch.device) -> dict[str, str]:
    versions = {name: version(name) for name in ("robustdyn", "torch")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {**versions, "device": name, "engine": cfg.engine}


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    from robustdyn.entrypoints.replicas import (
        main as command,
    )  # by its name: a launcher's workers look for it there

    command()
