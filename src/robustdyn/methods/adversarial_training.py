"""Adversarial training as a LightningModule.

A step attacks the batch, perturbs the weights, descends on the objective at the adversarial images, and
removes the perturbation. The loop exists once. What distinguishes one method from another (objective, weight
perturbation, learning-rate rule) is passed in.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import lightning
import torch
from torch import Tensor, nn

from robustdyn import streams
from robustdyn.attacks import PGD, AttackLoss, summed_cross_entropy
from robustdyn.data import Part, TensorBatches
from robustdyn.errors import CheckpointError, ConfigError
from robustdyn.methods.curvature_penalty import GaussNewtonPenalty
from robustdyn.methods.execution import Execution, keep_layout
from robustdyn.methods.gradient_noise import GradientNoise
from robustdyn.methods.metrics import RobustMetrics
from robustdyn.methods.objectives import Objective, StepLoss
from robustdyn.methods.optimizer_state import OptimizerState, Rates, is_plain_momentum, optimizer_state
from robustdyn.methods.perturbations import WeightPerturbation
from robustdyn.methods.regularizer import Regularizer
from robustdyn.methods.schedules import Schedule
from robustdyn.methods.stopwatch import Stopwatch
from robustdyn.models.modes import frozen_statistics, mode, running_statistics
from robustdyn.models.sync_batchnorm import share_buffers

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
"""From parameter groups to an optimiser."""


class LoaderBatch(Protocol):
    """What a training or evaluation loader yields."""

    images: Tensor  # (B, C, H, W) in [0, 1]
    targets: Tensor  # (B,) classes, or (B, K) probabilities where images are mixed


class _Examples(NamedTuple):
    """A batch in the memory layout of the network."""

    images: Tensor
    targets: Tensor


class AdversarialTraining(lightning.LightningModule):
    """Trains ``model`` on adversarial images and evaluates it on clean and adversarial ones.

    Random numbers of the attack are a function of (seed, step) in training and of (seed, split, batch) in
    evaluation. They do not depend on what else the run does, and every epoch is evaluated from the same
    random starts. They are drawn for the whole batch before a rank takes its part, and the loss of a part is
    weighted by its number of examples, so that a data-parallel step equals the step of one process. The
    batches that ``Trainer(accumulate_grad_batches=N)`` adds up to one step are weighted in the same way:
    their step equals the step of one large batch, except for BatchNorm's statistics.

    Args:
        model: Network from images in [0, 1] to logits.
        objective: What the attack maximises and the optimiser minimises.
        attack: Makes the training examples.
        evaluation_attack: Makes the evaluation examples.
        perturbation: Moves the weights before each descent step; None for none.
        added_noise: Adds noise to the gradient of each descent step; None for none.
        curvature_penalty: Penalty on the trace of the Hessian; None for none.
        regularizer: Penalty on the weights, and which of them decay.
        optimizer: Builds the optimiser from parameter groups.
        schedule: Learning-rate rule, applied before every step.
        batchnorm_frozen_from: First epoch, counted from 0, in which BatchNorm normalises with its running
            statistics in training and attack, and no longer updates them; None for never.
        execution: Memory layout and compilation of the network.
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
        perturbation: WeightPerturbation | None,
        added_noise: GradientNoise | None,
        curvature_penalty: GaussNewtonPenalty | None,
        regularizer: Regularizer,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        batchnorm_frozen_from: int | None,
        execution: Execution,
        evaluation_splits: tuple[str, ...],
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.execution = execution
        self.stopwatch = Stopwatch()
        self.objective = objective
        self.attack = attack
        self.evaluation_attack = evaluation_attack
        self.perturbation = perturbation
        self.added_noise = added_noise
        self.curvature_penalty = curvature_penalty
        self.regularizer = regularizer
        self.schedule = schedule
        self.batchnorm_frozen_from = batchnorm_frozen_from
        self.seed = seed
        self.evaluation_splits = evaluation_splits
        # a list, since a ModuleDict cannot have a key "train"
        self._metrics = nn.ModuleList(RobustMetrics() for _ in ("train", *evaluation_splits))
        self._optimizer_factory = optimizer
        self._epoch_metrics: dict[str, float] | None = None
        self._evaluated = False
        self.last_step: OptimizerState | None = None
        execution.prepare(model)

    @property
    def plain_momentum(self) -> bool:
        """Whether the theory's laws hold for the trainer's steps: plain momentum SGD, nothing clipped."""
        return is_plain_momentum(self.trainer.optimizers[0]) and not self.trainer.gradient_clip_val

    def configure_optimizers(self) -> Any:
        """The optimiser, its rate set by ``schedule`` at every step."""
        optimizer = self._optimizer_factory(self.regularizer.parameter_groups(self.model))
        keep_layout(optimizer)
        # the rule is evaluated at the middle of the step, so that a rule which starts or ends at 0 wastes no
        # step
        scheduler = Rates(
            optimizer, lambda step: self.schedule.factor((step + 0.5) / self._steps_per_epoch())
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Refuse what cannot work together.

        Raises:
            ConfigError: Gradients accumulated over batches, and a perturbation or CUDA graphs; fused SGD and
                a loss scale.
        """
        if self.perturbation is not None and self.trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches} cannot be combined "
                "with a weight perturbation, which belongs to one batch; choose 1 or perturbation=none"
            )
        if self.execution.replays_graphs and self.trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches} cannot be combined "
                "with CUDA graphs, which overwrite the gradients of the batch before; set "
                "execution.compile=default"
            )
        if self._loss_scale() is not None and any(
            isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]
            for optimizer in self.trainer.optimizers
            for group in optimizer.param_groups
        ):
            # PyTorch 2.13 makes the momentum with empty_like, and an overflow in the first step leaves it so
            raise ConfigError(
                f"optimizer.fused=true cannot be combined with trainer.precision={self.trainer.precision}: a "
                "first step that overflows leaves the momentum uninitialised; set optimizer.fused=false, or "
                "trainer.precision=bf16-mixed"
            )
        self.stopwatch.use(self.device)

    def on_train_start(self) -> None:
        """Check that an epoch's last batch can be normalised, before long work starts.

        Raises:
            ConfigError: It holds one image, and BatchNorm needs two values of each channel, or gradient noise
                two examples.
        """
        loader = self.trainer.train_dataloader
        if not isinstance(loader, TensorBatches) or loader.part(len(loader) - 1).whole > 1:
            return
        one = (
            f"data.batch_size={loader.batch_size} leaves one of {len(loader.data)} training images for the "
            "last batch of an epoch"
        )
        if self.added_noise is not None:
            raise ConfigError(
                f"{one}, whose gradient has no covariance for added_noise; change data.batch_size or "
                "data.train_size"
            )
        image = self.execution.images(loader.data.batch(torch.zeros(1, dtype=torch.int64)).images)
        try:
            with (
                torch.no_grad(),
                frozen_statistics(self.model),
                mode(self.model, training=True),
                self._batchnorm(),
                self.execution.eager(),
            ):
                self.model(image.to(self.dtype))
        except ValueError as error:
            raise ConfigError(
                f"{one}, which BatchNorm cannot normalise; change data.batch_size or data.train_size"
            ) from error

    def on_train_epoch_start(self) -> None:
        """Reset the epoch's metrics, and set the rate that follows from the last measurement."""
        self._epoch_metrics = None
        self._evaluated = False
        self._metrics_of("train").reset()
        # the scheduler set the rate when the last step ended, before the epoch's end was measured, and a
        # resumed run may have had batches of another size
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, Rates)
        scheduler.set_rates(round(self.current_epoch * self._steps_per_epoch()))

    def on_train_batch_start(self, batch: LoaderBatch, batch_idx: int) -> None:
        """Seed what draws from the global generators, such as dropout, by seed, step, rank and its batch."""
        number = batch_idx % self.trainer.accumulate_grad_batches
        counters = (self.global_step, self.global_rank, *([number] if number else []))
        streams.seed_global(self.seed, "global", *counters)

    def on_train_batch_end(self, outputs: Any, batch: LoaderBatch, batch_idx: int) -> None:
        """At an epoch's end all ranks take the first one's statistics: one network is measured."""
        if self.trainer.world_size > 1 and self.trainer.is_last_batch:
            share_buffers(self.model)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: with ``Trainer(val_check_interval=...)`` the last evaluation of an epoch counts.

        All ranks also take the first one's statistics for the average that replaces the weights.
        """
        for split in self.evaluation_splits:
            self._metrics_of(split).reset()
        if self.trainer.world_size > 1:
            share_buffers(self.model)

    def training_step(self, batch: LoaderBatch, batch_idx: int) -> Tensor:
        """Attack, perturb the weights, and return the objective there; add to the clean metrics.

        The epoch's training metrics are taken at the unperturbed weights, with any perturbation.
        """
        part = self._part(self.trainer.train_dataloader, batch_idx, batch, self.attack)
        number = batch_idx % self.trainer.accumulate_grad_batches
        with self._batchnorm(), self.execution.step(len(batch.images), "train"):
            loss = self._train_on(_Examples(self.execution.images(batch.images), batch.targets), part, number)
        self._note_optimizer()
        of_examples, of_batches = self._accumulation(batch_idx - number, part)
        return of_examples * loss + of_batches * self.regularizer.penalty(self.model)

    def _accumulation(self, first: int, part: Part) -> tuple[float, float]:
        """The weights of a batch's loss and of the penalty in a step whose first batch has this number.

        Lightning divides each by the number of batches that a step should have. The last step of an epoch may
        have fewer, and its last batch fewer images.
        """
        wanted, loader = self.trainer.accumulate_grad_batches, self.trainer.train_dataloader
        if wanted == 1 or not isinstance(loader, TensorBatches):
            return 1.0, 1.0
        numbers = range(first, min(first + wanted, int(self.trainer.num_training_batches)))
        images = sum(loader.part(number).whole for number in numbers)
        return wanted * part.whole / images, wanted / len(numbers)

    def _train_on(self, batch: _Examples, part: Part, number: int) -> Tensor:
        """The loss whose gradient, averaged over ranks, is the gradient of the whole batch's mean loss.

        ``number`` counts the batches of one optimiser step.
        """
        weight = self.trainer.world_size * len(batch.images) / part.whole
        with self.stopwatch.section("attack"):
            adversarial = self._attacked(batch, part, number)
        descent = self._descent_model(part, number)
        if self.perturbation is None or self.current_epoch < self.perturbation.warmup_epochs:
            outcome = self._outcome(descent, batch, adversarial)
            self._update("train", batch, outcome.robust_logits)
        else:
            with frozen_statistics(self.model):
                at_weights = self._outcome(self.model, batch, adversarial)
            self._update("train", batch, at_weights.robust_logits)
            self.perturbation.apply(self.model, weight * at_weights.loss, loss_scale=self._loss_scale())
            outcome = self._outcome(descent, batch, adversarial)
        loss = weight * outcome.loss
        return loss if self.curvature_penalty is None else loss + self._penalty(adversarial, part, number)

    def _penalty(self, adversarial: Tensor, part: Part, number: int) -> Tensor:
        """The curvature penalty's share of this rank, for an average over ranks."""
        assert self.curvature_penalty is not None
        generator = self._generator("curvature-penalty", self.global_step, number)
        with self.execution.eager():
            share = self.curvature_penalty(self.model, adversarial, part, generator)
        return self.trainer.world_size * share

    def on_after_backward(self) -> None:
        """Remove the perturbation, if the optimiser has to step at the unperturbed weights."""
        if self.perturbation is not None and self.perturbation.step_at == "original":
            self.perturbation.restore()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step; afterwards the perturbation is removed."""
        super().optimizer_step(*args, **kwargs)
        if self.perturbation is not None:
            self.perturbation.restore()

    def validation_step(self, batch: LoaderBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Clean and robust loss and error of one evaluation batch."""
        split = self.evaluation_splits[dataloader_idx]
        loaders = self.trainer.val_dataloaders
        assert loaders is not None
        part = self._part(loaders[dataloader_idx], batch_idx, batch, self.evaluation_attack)
        generator = self._generator(f"attack-{split}", batch_idx)
        with self.execution.step(len(batch.images), split):
            examples = _Examples(self.execution.images(batch.images), batch.targets)
            adversarial = self._perturbed(self.evaluation_attack, examples, part, generator)
            with torch.no_grad():
                self._update(split, examples, self.model(adversarial))
        self._evaluated = True

    def observe(self, table: str, row: Mapping[str, Any]) -> None:
        """Pass a measured row to the learning-rate rule, if the rule reads that table."""
        if table == self.schedule.reads:
            self.schedule.observe(row)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint also contains the state of the rule and the sums of the epoch so far.

        A collective call, because the sums are over all ranks.
        """
        checkpoint["schedule"] = self.schedule.state_dict()
        checkpoint["epoch_sums"] = self._metrics_of("train").sums()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resume the rule where the checkpoint left it, and take the precision of the checkpoint's weights.

        Raises:
            CheckpointError: It is of another network.
        """
        saved = checkpoint["state_dict"]
        for name, value in self.state_dict().items():
            if not isinstance(saved.get(name), Tensor) or saved[name].shape != value.shape:
                raise CheckpointError(
                    f"the checkpoint has no {name} of shape {tuple(value.shape)}, which this network has; "
                    "choose another hydra.run.dir, or the settings of the run that it is of"
                )
        # before the weights are read: Lightning converts the network only after it
        self.trainer.precision_plugin.convert_module(self)
        self.schedule.load_state_dict(checkpoint["schedule"])
        self._metrics_of("train").take_sums(checkpoint["epoch_sums"] if self.global_rank == 0 else {})

    def on_train_epoch_end(self) -> None:
        """Give the epoch's metrics to callbacks that watch one; loggers get them from the record."""
        self.log_dict(self.epoch_metrics(), sync_dist=False, logger=False)

    def epoch_metrics(self) -> dict[str, float]:
        """Metrics of the epoch that just ended, named as in the ``epochs`` table; the same on every rank.

        Train metrics are running averages over the epoch's batches; the gaps are test − train.
        """
        if self._epoch_metrics is None:
            splits = ("train", *self.evaluation_splits) if self._evaluated else ("train",)
            metrics: dict[str, float] = {}
            for split in splits:
                metrics |= self._metrics_of(split).compute(split)
            if {"test_robust_loss", "train_robust_loss"} <= metrics.keys():
                for kind in ("loss", "error"):
                    gap = metrics[f"test_robust_{kind}"] - metrics[f"train_robust_{kind}"]
                    metrics[f"robust_{kind}_gap"] = gap
            self._epoch_metrics = metrics
        return self._epoch_metrics

    def _steps_per_epoch(self) -> float:
        # Infinite until the trainer has seen the data. The first factor is requested before that, but its
        # rate is never used. trainer.estimated_stepping_batches would make the trainer look too early: the
        # loaders that it then makes are not set to where a checkpoint left them (Lightning 2.6).
        batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        return batches if math.isinf(batches) else math.ceil(batches)

    def _part(self, loader: Any, number: int, batch: LoaderBatch, attack: PGD) -> Part:
        """Which part of batch ``number`` this rank has; all of it if there is only one rank.

        Raises:
            ValueError: The loader is not ours, and images are outside ``attack``'s range.
        """
        if not isinstance(loader, TensorBatches):  # ours yields bytes, and the host waits for the check
            attack.check(batch.images)
        if self.trainer.world_size == 1:
            return Part(slice(None), len(batch.images))
        assert isinstance(loader, TensorBatches)
        part = loader.part(number)
        assert part.places.stop - part.places.start == len(batch.images)
        return part

    def _attacked(self, batch: _Examples, part: Part, number: int) -> Tensor:
        """The adversarial images, made once per step; the batch's own images where there is no attack."""
        with torch.no_grad(), self.attack.mode(self.model):
            loss = self.objective.attack_loss(self.model, batch.images)
        if loss is None:
            return batch.images
        adversarial = self._perturbed(
            self.attack, batch, part, self._generator("attack", self.global_step, number), loss
        )
        # half-precision copies of the weights that autocast made without gradient must not serve the descent
        torch.clear_autocast_cache()
        return adversarial

    def _perturbed(
        self,
        attack: PGD,
        batch: _Examples,
        part: Part,
        generator: torch.Generator,
        loss: AttackLoss = summed_cross_entropy,
    ) -> Tensor:
        """As ``attack.perturb``, from the random starts that these images have in the whole batch."""
        whole = batch.images
        if part.whole > len(whole):
            whole = batch.images.new_zeros((part.whole, *batch.images.shape[1:]))
            whole[part.places] = batch.images
        start = attack.start(whole, generator)[part.places]
        return attack.climb(self.execution.repeated(self.model), batch.images, batch.targets, start, loss)

    def _batchnorm(self) -> AbstractContextManager[None]:
        """Scope of an epoch's training passes."""
        frozen = self.batchnorm_frozen_from is not None and self.current_epoch >= self.batchnorm_frozen_from
        return running_statistics(self.model) if frozen else nullcontext()

    def _descent_model(self, part: Part, number: int) -> nn.Module:
        """The network; with gradient noise, one through which the loss has the gradient with noise."""
        if self.added_noise is None:
            return self.model
        generator = self._generator("gradient-noise", self.global_step, number)
        return self.added_noise.weighted(self.model, part, generator)

    def _outcome(self, model: nn.Module, batch: _Examples, adversarial: Tensor) -> StepLoss:
        outcome = self.objective(model, batch.images, adversarial, batch.targets)
        if not isinstance(outcome, StepLoss):
            raise ConfigError(
                f"objective: {type(self.objective).__name__} returns a {type(outcome).__name__}; return "
                "robustdyn.methods.StepLoss(loss, logits)"
            )
        return outcome

    def _update(self, split: str, batch: _Examples, robust_logits: Tensor | None) -> None:
        metrics = self._metrics_of(split)
        if robust_logits is not None:
            metrics.robust.update(robust_logits.detach(), batch.targets)
        with torch.no_grad(), mode(self.model, training=False):
            metrics.clean.update(self.model(batch.images), batch.targets)

    def _loss_scale(self) -> float | None:
        """What float16 training multiplies losses with; None in other precisions."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else float(scaler.get_scale())

    def _metrics_of(self, split: str) -> RobustMetrics:
        metrics = self._metrics[("train", *self.evaluation_splits).index(split)]
        assert isinstance(metrics, RobustMetrics)
        return metrics

    def _generator(self, stream: str, counter: int, number: int = 0) -> torch.Generator:
        return streams.generator(self.seed, stream, counter, number, device=self.device)

    def _note_optimizer(self) -> None:
        # The scheduler advances before any end-of-epoch hook runs, so the rate of the step is known only
        # here.
        state = optimizer_state(self.trainer.optimizers[0])
        self.last_step = state._replace(plain=self.plain_momentum)
