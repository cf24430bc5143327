"""Adversarial training as a LightningModule.

The step, in the order of the code: attack the batch, descend on the objective at the adversarial images.
What distinguishes one method from another (objective, learning-rate rule) is handed in; the loop exists once.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import lightning
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.methods.metrics import RobustMetrics
from robustdyn.methods.objectives import Objective
from robustdyn.methods.schedules import Schedule
from robustdyn.models.modes import mode

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Batch(Protocol):
    """What a training or evaluation loader yields."""

    images: Tensor  # (B, C, H, W) in [0, 1]
    labels: Tensor  # (B,)


class OptimizerState(NamedTuple):
    """Settings of the optimiser's last step, as momentum SGD knows them."""

    learning_rate: float
    momentum: float
    weight_decay: float


class AdversarialTraining(lightning.LightningModule):
    """Trains ``model`` on adversarial images and evaluates it on clean and adversarial ones.

    Random numbers of the attack are a function of (seed, step) in training and of (seed, split, batch) in
    evaluation, so they do not depend on what else the run does and every epoch is evaluated from the same
    random starts.

    Args:
        model: Network from images in [0, 1] to logits.
        objective: What the attack climbs and the optimiser descends.
        attack: Makes the training examples.
        evaluation_attack: Makes the evaluation examples.
        optimizer: Builds the optimiser from the parameters.
        schedule: Learning-rate rule, applied after every step.
        num_classes: K.
        evaluation_splits: Names of the validation loop's loaders, in order, e.g. ``("test",)``.
        seed: The run's seed.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        attack: PGD,
        evaluation_attack: PGD,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        num_classes: int,
        evaluation_splits: tuple[str, ...],
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.attack = attack
        self.evaluation_attack = evaluation_attack
        self.schedule = schedule
        self.seed = seed
        self.evaluation_splits = evaluation_splits
        # a list, since a ModuleDict cannot have a key "train"
        self._metrics = nn.ModuleList(RobustMetrics(num_classes) for _ in ("train", *evaluation_splits))
        self._optimizer_factory = optimizer
        self._epoch_metrics: dict[str, float] | None = None
        self._evaluated = False
        self.last_step: OptimizerState | None = None

    def configure_optimizers(self) -> Any:
        """The optimiser, its rate set by ``schedule`` at every step."""
        optimizer = self._optimizer_factory(self.model.parameters())
        # num_training_batches is not known yet here; the estimate makes the trainer look at the data
        steps_per_epoch = int(self.trainer.estimated_stepping_batches) // int(self.trainer.max_epochs or 1)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step / steps_per_epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Start the epoch's metrics afresh."""
        self._epoch_metrics = None
        self._evaluated = False
        for split in ("train", *self.evaluation_splits):
            self._metrics_of(split).reset()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Attack, then the objective at the adversarial images; clean metrics ride along without gradient."""
        images, labels = batch.images, batch.labels
        adversarial = self.attack.perturb(
            self.model,
            images,
            labels,
            self._generator("attack", self.global_step),
            self.objective.attack_loss,
        )
        loss, robust_logits = self.objective(self.model, images, adversarial, labels)
        self._update("train", images, labels, robust_logits.detach())
        self._note_optimizer()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Clean and robust loss and error of one evaluation batch."""
        split = self.evaluation_splits[dataloader_idx]
        images, labels = batch.images, batch.labels
        adversarial = self.evaluation_attack.perturb(
            self.model, images, labels, self._generator(f"attack-{split}", batch_idx)
        )
        with torch.no_grad():
            self._update(split, images, labels, self.model(adversarial))
        self._evaluated = True

    def on_train_epoch_end(self) -> None:
        """Hand the epoch's metrics to the loggers."""
        self.log_dict(self.epoch_metrics(), sync_dist=False)

    def epoch_metrics(self) -> dict[str, float]:
        """Metrics of the epoch that just ended, named as in the ``epochs`` table; the same on every rank.

        Train metrics are running averages over the epoch's batches; the gaps are test − train.
        """
        if self._epoch_metrics is None:
            splits = ("train", *self.evaluation_splits) if self._evaluated else ("train",)
            metrics: dict[str, float] = {}
            for split in splits:
                metrics |= self._metrics_of(split).compute(split)
            if self._evaluated and "test" in self.evaluation_splits:
                for kind in ("loss", "error"):
                    gap = metrics[f"test_robust_{kind}"] - metrics[f"train_robust_{kind}"]
                    metrics[f"robust_{kind}_gap"] = gap
            self._epoch_metrics = metrics
        return self._epoch_metrics

    def _update(self, split: str, images: Tensor, labels: Tensor, robust_logits: Tensor) -> None:
        metrics = self._metrics_of(split)
        metrics.robust.update(robust_logits, labels)
        with torch.no_grad(), mode(self.model, training=False):
            metrics.clean.update(self.model(images), labels)

    def _metrics_of(self, split: str) -> RobustMetrics:
        metrics = self._metrics[("train", *self.evaluation_splits).index(split)]
        assert isinstance(metrics, RobustMetrics)
        return metrics

    def _generator(self, stream: str, counter: int) -> torch.Generator:
        return streams.generator(self.seed, stream, counter, self.global_rank, device=self.device)

    def _note_optimizer(self) -> None:
        # The scheduler moves on before any end-of-epoch hook runs: what the step used is known only here.
        group = self.trainer.optimizers[0].param_groups[0]
        self.last_step = OptimizerState(group["lr"], group.get("momentum", 0.0), group["weight_decay"])
