"""TEMPORARY stand-in for the core."""

import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from robustdyn import streams
from robustdyn.curvature import EmpiricalRisk
from robustdyn.data import ImageDataModule
from robustdyn.measure import Snapshot
from robustdyn.measure.callback import _costs
from robustdyn.methods import OptimizerState
from robustdyn.models.modes import mode
from robustdyn.run.config import build

UNKNOWN = OptimizerState(float("nan"), float("nan"), float("nan"), plain=False)


class Measurements:
    def __init__(
        self, cfg: DictConfig, allow: Collection[str] | None, data: ImageDataModule, device: torch.device
    ):
        self.cfg, self.data, self.device = cfg, data, device
        self.attack = build(cfg, "attack.evaluation", allow=allow)
        self.eigenpairs = build(cfg, "measure.eigenpairs", allow=allow)
        self.measurements = {
            name: build(cfg, f"measure.measurements.{name}", allow=allow)
            for name, chosen in cfg.measure.measurements.items()
            if chosen is not None
        }

    def __call__(
        self,
        model: nn.Module,
        *,
        epoch: int,
        step: int,
        optimizer: OptimizerState,
        starts: Mapping[str, Tensor],
    ):
        cfg = self.cfg
        dtype = next(model.parameters()).dtype

        def attacked(count, *draw):
            subset = self.data.measurement_subset(count, cfg.seed)
            images = subset.images.to(self.device)
            s = self.attack.start(
                images, streams.generator(cfg.seed, "measure-attack", *draw, device=self.device)
            )
            images, labels, s = images.to(dtype), subset.targets.to(self.device), s.to(dtype)
            if cfg.measure.inputs == "adversarial":
                batches = zip(*(t.split(self.data.eval_batch_size) for t in (images, labels, s)), strict=True)
                images = torch.cat([self.attack.climb(model, *batch) for batch in batches])
            return images, labels

        began = time.perf_counter()
        with mode(model, training=False):
            risk = EmpiricalRisk(
                model,
                *attacked(cfg.measure.examples),
                memory=cfg.measure.memory_mib * 2**20,
                precision=cfg.measure.precision,
                batchnorm="eval",
            )
            snapshot = Snapshot(
                epoch=epoch,
                step=step,
                risk=risk,
                again=lambda: risk.over(*attacked(min(cfg.measure.second_attack, cfg.measure.examples), 1)),
                optimizer=optimizer,
                train_examples=len(self.data.split("train").labels),
                batch_size=cfg.batch_size,
                seed=cfg.seed,
                eigenpairs=self.eigenpairs,
                starts=starts,
            )
            rows: list[Any] = []
            for m in self.measurements.values():
                rows += list(m.measure(snapshot))
        rows += [("costs", row) for row in _costs(snapshot, time.perf_counter() - began)]
        after = {
            n: p.warm_start.bfloat16().cpu() for n, p in snapshot.solved.items() if self.eigenpairs.warm_start
        }
        return rows, {**starts, **after}
