"""Runs of a few seconds with real data and every component, and a network of a few thousand weights."""

import json
import sys
from pathlib import Path

import hydra
import torch
from hydra._internal.hydra import Hydra
from omegaconf import DictConfig

from robustdyn.defaults import config_dir
from robustdyn.records.schema import TIMING

GET_MODE = Hydra.get_mode

PIXEL = bytes.fromhex(  # the smallest PNG: one grey pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63600000000200015e2d12c30000000049454e44ae426082"
)

TINY = (
    "data=digits",
    "data.train_size=80",
    "data.test_size=60",
    "model.width=4",
    "model.blocks=[1,1]",
    "model.strides=[1,2]",
    "attack.steps=2",
    "trainer.max_epochs=3",
    "trainer.accelerator=cpu",
    "schedule.milestones=[2]",
    "measure.examples=24",
    "measure.epochs=[0,2]",
    "measure.eigenpairs.directions=2",
    "measure.measurements.alignment.randomisations=5",
    "name=tiny",
)


def tiny_but(*keys: str) -> tuple[str, ...]:
    """The overrides of ``TINY`` without those that start with ``keys``."""
    return tuple(override for override in TINY if not override.startswith(keys))


UNMEASURED = (*tiny_but("measure."), "measure=none", "report=false")


def compose(*overrides: str) -> DictConfig:
    """Compose the configuration of ``robustdyn-train`` with overrides, as the command does."""
    import robustdyn.run.config  # noqa: F401, registers the resolvers

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose("train", list(overrides), return_hydra_config=False)


def command(monkeypatch, *arguments: str) -> int:
    """Run ``robustdyn-train`` in this process and return its exit status."""
    from robustdyn.commands.train import main

    return invoke(main, monkeypatch, *arguments)


def invoke(entry, monkeypatch, *arguments) -> int:
    """Run a Hydra command in this process and return its exit status."""
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["robustdyn", *words])
    # Hydra composes everything twice, the first time only to read hydra.mode, which nothing else sets
    sets_mode = any(word.lstrip("+").startswith(("experiment=", "hydra.mode=")) for word in words)
    monkeypatch.setattr(Hydra, "get_mode", GET_MODE if sets_mode else lambda *_, **__: None)
    try:
        entry()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def rows(run_dir: Path, table: str) -> list[dict]:
    """The rows of a table's file without the time columns, which differ between any two runs."""
    lines = (run_dir / "records" / f"{table}.jsonl").read_text().splitlines()
    timed = TIMING.names[2:]
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The network's weights in the last checkpoint, under its own names."""
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")}
