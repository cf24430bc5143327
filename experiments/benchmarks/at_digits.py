"""Adversarial training on digits: robustdyn under Lightning against a bare PyTorch loop, same mathematics.

The bare loop is written out here from the method's description: PGD with input gradients only, cross-entropy,
clean forward for the metrics, SGD, evaluation of the test set after every epoch. It draws the same random
numbers, so both end with the same weights, which is checked, before times are compared. Rounds alternate
between the two in one process.

    python experiments/benchmarks/at_digits.py [--epochs 10] [--rounds 7]
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import hydra
import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor, nn

from robustdyn import streams
from robustdyn.data import ImageDataModule
from robustdyn.defaults import config_dir
from robustdyn.measure import RecordEpochs
from robustdyn.records import RunRecords
from robustdyn.run.config import build
from robustdyn.run.parts import build_module

PLAIN = ("execution.channels_last=false", "optimizer.fused=false")
"""The kernels of a loop that does nothing for its speed: to the bit, rounding depends on them."""


def pgd(cfg: DictConfig, model: nn.Module, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    eps, step = cfg.attack.eps_255 / 255, cfg.attack.step_255 / 255
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps, generator=draws)).clamp_(0, 1)
    for _ in range(cfg.attack.steps):
        x_adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + step * grad.sign()
        x_adv = torch.clamp(x_adv, x - eps, x + eps).clamp_(0, 1)
    return x_adv


def batches(data: ImageDataModule, size: int, order: Tensor, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    tensors = data.split(split)
    for chosen in order.split(size):
        yield tensors.images[chosen].float() / 255, tensors.labels[chosen]


def bare_loop(cfg: DictConfig, data: ImageDataModule, epochs: int) -> tuple[nn.Module, float]:
    """Train and evaluate for ``epochs``; the model and the seconds taken."""
    lightning.seed_everything(cfg.seed, verbose=False)
    model: nn.Module = build(cfg, "model")
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=cfg.optimizer.lr,
        momentum=cfg.optimizer.momentum,
        weight_decay=cfg.optimizer.weight_decay,
    )
    n, step = len(data.split("train").labels), 0
    n_test = len(data.split("test").labels)
    started = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(n, generator=streams.generator(cfg.seed, "shuffle", epoch))
        totals = torch.zeros(4)
        for x, y in batches(data, cfg.data.batch_size, order, "train"):
            model.train(cfg.attack.train.batchnorm == "train")
            x_adv = pgd(cfg, model, x, y, streams.generator(cfg.seed, "attack", step, 0))
            model.train()
            logits = model(x_adv)
            loss = F.cross_entropy(logits, y)
            totals += clean_and_robust(model, x, y, logits.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        model.eval()
        test_order, totals = torch.arange(n_test), torch.zeros(4)
        for i, (x, y) in enumerate(batches(data, cfg.data.eval_batch_size, test_order, "test")):
            x_adv = pgd(cfg, model, x, y, streams.generator(cfg.seed, "attack-test", i, 0))
            with torch.no_grad():
                totals += clean_and_robust(model, x, y, model(x_adv))
    return model, time.perf_counter() - started


def clean_and_robust(model: nn.Module, x: Tensor, y: Tensor, robust_logits: Tensor) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        clean_logits = model(x)
        sums = [
            part
            for logits in (robust_logits, clean_logits)
            for part in (F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) != y).sum())
        ]
    model.train(training)
    return torch.stack([part.float() for part in sums])


class Clock(Callback):
    """Seconds between the start and the end of training, set-up excluded as in the bare loop."""

    seconds = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.seconds += time.perf_counter()


def robustdyn_run(cfg: DictConfig, data: ImageDataModule, epochs: int) -> tuple[nn.Module, float]:
    """The same under Lightning, with the record, the checkpoints and the metrics of a real run."""
    lightning.seed_everything(cfg.seed, verbose=False)
    module = build_module(cfg, data)
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        trainer = build(
            cfg,
            "trainer",
            max_epochs=epochs,
            callbacks=[clock, RecordEpochs(RunRecords(Path(folder))), ModelCheckpoint(dirpath=folder)],
            logger=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, datamodule=data)
    return module.model, clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs of one run")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds")
    args = parser.parse_args()
    common.quiet()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("train", ["data=digits", "name=benchmark", "data.train_size=300", *PLAIN])
    data: ImageDataModule = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")

    models = [run(cfg, data, 2)[0] for run in (bare_loop, robustdyn_run)]
    difference = max(
        float((a - b).detach().abs().max())
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )
    print(f"greatest weight difference after 2 epochs: {difference}")
    if difference > 0:
        raise SystemExit("the two loops do not do the same mathematics: no times are compared")

    times = common.alternate(
        {
            "bare loop": lambda: bare_loop(cfg, data, args.epochs)[1],
            "robustdyn": lambda: robustdyn_run(cfg, data, args.epochs)[1],
        },
        args.rounds,
    )
    common.write_result(
        Path(__file__).stem,
        question="Cost of the framework around an adversarial-training step, digits, narrow PreActResNet-18",
        settings={
            "epochs": args.epochs,
            "train": 300,
            "test": len(data.split("test").labels),
            "batch": cfg.data.batch_size,
            "width": cfg.model.width,
            "pgd_steps": cfg.attack.steps,
            "weight_difference": difference,
        },
        summary=common.compare(times, baseline="bare loop"),
        rounds=times,
    )


if __name__ == "__main__":
    main()
