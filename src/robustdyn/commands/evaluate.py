"""``robustdyn-evaluate``: measures clean and robust accuracy of a checkpoint, which may be from elsewhere."""

import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from robustdyn.data import ImageDataModule, ImageTensors
from robustdyn.errors import ConfigError
from robustdyn.evaluation import Ball, EvaluationRecord, Result, evaluate
from robustdyn.launch.application import run_app
from robustdyn.launch.of_run import Typed, deferred, of_run
from robustdyn.models import load_weights
from robustdyn.records.files import file_digest
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import ACCURACY_SE, EVALUATION
from robustdyn.run.config import (
    COUNT,
    POSITIVE,
    SEED,
    Rule,
    build,
    check,
    check_rules,
)
from robustdyn.run.environment import device_name, versions
from robustdyn.run.of_checkpoint import (
    checkpoint_of,
    device_of,
    run_of,
    type_name,
)
from robustdyn.run.status import say

NAME = "evaluate"
OF_THE_RUN = ("data", "model", "attack")
THREAT = ("norm", "eps_255")
LINES_WITHOUT_TERMINAL = 60.0  # seconds between two lines

RULES: Mapping[str, Rule] = {
    "seed": SEED,
    "evaluation.batch_size": COUNT,
    "evaluation.split": Rule(
        lambda v: v in ("test", "validation", "train"), "must be test, validation or train"
    ),
}


def main() -> None:
    """The ``robustdyn-evaluate`` command."""
    sys.argv[1:] = deferred(sys.argv[1:], OF_THE_RUN)
    run_app(evaluate_checkpoint, NAME)


def evaluate_checkpoint(given: DictConfig) -> None:
    """Evaluate one checkpoint, then record and print the result; a killed evaluation is resumed.

    Raises:
        UserError: The configuration, the checkpoint, the data or the record cannot be used.
    """
    checkpoint = checkpoint_of(given)
    run_dir = run_of(checkpoint)
    cfg, allow = of_run(NAME, checkpoint, run_dir, Typed.now(OF_THE_RUN), OF_THE_RUN, _refuse)
    _check(cfg)
    device = device_of(cfg.device)

    evaluators = {name: build(cfg, f"evaluation.attacks.{name}") for name in cfg.evaluation.attacks}
    sanity = build(cfg, "evaluation.sanity")
    ball = Ball(cfg.attack.norm, cfg.attack.eps_255 / 255)
    model: nn.Module = build(cfg, "model", allow=allow)
    layout = load_weights(model, checkpoint, layout=cfg.layout)
    split = _split(cfg, allow)
    data = split.take(torch.arange(cfg.evaluation.examples or len(split))).to(device)
    default = RunDirectory(run_dir or checkpoint.parent).evaluations / checkpoint.stem
    output = Path(cfg.output) if cfg.output else default
    settings = _settings(cfg, checkpoint, layout, ball, data)
    # another device rounds differently, which hardly changes the outcomes
    provenance = {**versions(), "device": device_name(device)}

    say(f"checkpoint  {checkpoint} ({layout})")
    which = "all" if len(data) == len(split) else f"the first {len(data):,} of"
    say(f"examples    {which} {len(split):,} of the {cfg.evaluation.split} split of {type_name(cfg.data)}")
    say(f"ball        {ball.norm}, radius {cfg.attack.eps_255:g}/255")
    with EvaluationRecord.open(output, settings, provenance) as record, _Progress() as progress:
        try:
            result = evaluate(
                model.to(device),
                data,
                evaluators,
                ball=ball,
                sanity=sanity,
                batch_size=cfg.evaluation.batch_size,
                seed=cfg.seed,
                record=record,
                progress=progress,
            )
        except ValueError as error:
            raise ConfigError(f"evaluation.attacks: {error}") from error
    for line in evaluation_lines(result):
        say(line)
    say(f"record: {output}")


def evaluation_lines(result: Result) -> Iterator[str]:
    """Lines to print: a table of accuracies, then every warning."""
    width = max(len(row["evaluator"]) for row in result.rows)
    accuracy = EVALUATION["accuracy"]
    yield ""
    yield f"{'attack':<{width}}  {accuracy.shown:>12}  {'s.e.':>5}  {'time (s)':>9}"
    for row in sorted(result.rows, key=lambda row: row["evaluator"] in result.checks):
        mean, error = (row[key] * accuracy.scale for key in ("accuracy", ACCURACY_SE))
        aside = "  (a check, not the threat model: should be 0)" if row["evaluator"] in result.checks else ""
        yield f"{row['evaluator']:<{width}}  {mean:>12.2f}  {error:>5.2f}  {row['seconds']:>9.1f}{aside}"
    yield ""
    for (name, evaluator), message in result.warnings.items():
        yield f"warning: {evaluator}: {message} [{name}]"
    if result.warnings:
        many = "this warning" if len(result.warnings) == 1 else f"these {len(result.warnings)} warnings"
        yield f"robustness may be overstated: look into {many} before quoting the figures above"


# ---------------------------------------------------------------------- the configuration


def _refuse(key: str) -> None:
    """Refuse a typed key that has no effect on an evaluation.

    Raises:
        ConfigError: It has none.
    """
    section, _, leaf = key.partition(".")
    if section == "attack" and leaf not in THREAT:
        raise ConfigError(
            f"{key} belongs to training; an evaluation takes attack.norm and attack.eps_255, and "
            "steps and the like from evaluation.attacks, e.g. evaluation.attacks.pgd20.steps=100"
        )


def _check(cfg: DictConfig) -> None:
    check(cfg)
    check_rules(cfg, RULES)
    examples = cfg.evaluation.examples
    if examples is not None and not COUNT.holds(examples):
        raise ConfigError(f"evaluation.examples={examples} {COUNT.requirement}, or null for all")
    if not POSITIVE.holds(cfg.attack.eps_255):
        raise ConfigError(
            f"attack.eps_255={cfg.attack.eps_255} {POSITIVE.requirement}; evaluation=clean attacks nothing"
        )


# ---------------------------------------------------------------------- what is evaluated


def _split(cfg: DictConfig, allow: Collection[str] | None) -> ImageTensors:
    """All images of the split, in its order.

    Raises:
        ConfigError: There is no such split, or it has fewer images than are to be evaluated.
        DataFileError: A file is missing or has the wrong content.
    """
    module: ImageDataModule = build(cfg, "data", allow=allow)
    module.prepare_data()
    module.setup("test")
    split, wanted = module.split(cfg.evaluation.split), cfg.evaluation.examples
    if wanted is not None and wanted > len(split):
        raise ConfigError(
            f"evaluation.examples={wanted} exceeds the {len(split)} images of the {cfg.evaluation.split} "
            "split; choose fewer, or null for all"
        )
    return split


def _settings(
    cfg: DictConfig, checkpoint: Path, layout: str, ball: Ball, data: ImageTensors
) -> dict[str, Any]:
    """The settings on which the outcomes of every attack depend; compared when an evaluation resumes."""
    return {
        "checkpoint": file_digest(checkpoint),
        "layout": layout,
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "data": type_name(cfg.data),
        "evaluation.split": cfg.evaluation.split,
        "evaluation.examples": len(data),
        "images": data.digest(),
        "evaluation.batch_size": cfg.evaluation.batch_size,
        "attack.norm": ball.norm,
        "attack.eps_255": cfg.attack.eps_255,
        "seed": cfg.seed,
    }


# ---------------------------------------------------------------------- the terminal


class _Progress:
    """One progress bar for each attack, or an occasional line if there is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._name = ""
        self._said = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, name: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            if name != self._name:
                self.__exit__()
                self._bar = tqdm(total=total, desc=name, unit="example", dynamic_ncols=True, leave=False)
            assert self._bar is not None
            self._bar.n = done
            self._bar.refresh()
        elif time.monotonic() - self._said > LINES_WITHOUT_TERMINAL:
            print(f"{name}: {done}/{total} examples", file=sys.stderr, flush=True)
            self._said = time.monotonic()
        self._name = name


if __name__ == "__main__":
    # imported by name, so that a launcher's workers find it
    from robustdyn.commands.evaluate import main as command

    command()
