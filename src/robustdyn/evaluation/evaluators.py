"""Defines the attacks of an evaluation, each with a name under which its outcomes are recorded.

Shapes: B batch, C channels, H x W pixels, K classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from robustdyn.attacks import PGD, AttackLoss, summed_cross_entropy
from robustdyn.data import Batch
from robustdyn.evaluation.ball import Ball, Norm
from robustdyn.streams import generator

Access = Literal["white_box", "black_box"]
Note = Callable[[str, str], None]
"""(check, message): report what an attack noticed about the model."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is recorded about an attack besides its outcomes; None if a number has no meaning for it.

    Attributes:
        access: ``"white_box"`` attacks follow gradients, ``"black_box"`` ones only see the model's outputs.
        norm: Norm of the ball.
        eps: Radius of the ball on the [0, 1] scale.
        loss: The loss that the attack maximises.
        step_size: Step size on the [0, 1] scale.
        steps: Gradient steps of one start, or queries of a black-box attack.
        restarts: Number of starts.
        in_ball: False for an attack that leaves the threat model in order to check the evaluation.
        tied: Attacks with equal ``tied`` differ only in effort: more steps or restarts should break more.
    """

    access: Access
    norm: Norm
    eps: float
    loss: str | None
    step_size: float | None
    steps: int | None
    restarts: int | None
    in_ball: bool
    tied: str | None


class Attack(Protocol):
    """Makes adversarial images; the evaluation decides whether they fool the model."""

    @property
    def description(self) -> Description:
        """The attack's description for the record."""

    def __call__(self, model: nn.Module, batch: Batch, note: Note) -> Tensor:
        """Adversarial images (B, C, H, W) for a batch that ``model``, in eval mode, classifies correctly."""


class Evaluator(Protocol):
    """One entry of an evaluation: an attack, or successive attacks that each get what the others left."""

    def settings(self) -> Mapping[str, Any]:
        """Everything on which its outcomes depend, besides the model, the data, the ball and the seed."""

    def attacks(
        self, name: str, ball: Ball, num_classes: int, images: Tensor, seed: int
    ) -> Mapping[str, Attack]:
        """The attacks, in order, by the names under which to record them.

        Args:
            name: The evaluator's name.
            ball: The threat model.
            num_classes: K.
            images: A batch (B, C, H, W), for its size and device.
            seed: Seed of all random numbers.

        Raises:
            ValueError: The attack is not defined for these.
        """


def summed_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ_b max_{k≠y} z_k − z_y, the loss of Carlini & Wagner (S&P 2017, f₆ without its floor)."""
    labelled = targets[:, None]
    others = logits.scatter(1, labelled, -torch.inf).amax(dim=1)
    return (others - logits.gather(1, labelled)[:, 0]).sum()


LOSSES: Mapping[str, AttackLoss] = {"cross_entropy": summed_cross_entropy, "margin": summed_margin}


@dataclass(frozen=True, kw_only=True)
class PGDEvaluator:
    """PGD of Madry et al. (ICLR 2018) with restarts: an example is robust if no restart breaks it.

    The random start of an example depends only on (seed, name, restart, example), and not on the device, the
    batch that contains it, or what was attacked before.

    Attributes:
        steps: Gradient steps ≥ 1.
        relative_step: Step size as a share of ε, > 0.
        restarts: Starts ≥ 1; an example once broken is not attacked again.
        loss: ``"cross_entropy"``, or ``"margin"``, ``summed_margin``.
        random_start: As in ``robustdyn.attacks.PGD``.
        start_std: As in ``robustdyn.attacks.PGD``.
        iterates: ``"last"`` counts the example after the last step, as published PGD-k numbers do; ``"any"``
            counts an example as broken if any iterate breaks it, which is stronger and costs a third more.

    Raises:
        ValueError: A setting outside its range.
    """

    steps: int
    relative_step: float
    restarts: int
    loss: Literal["cross_entropy", "margin"]
    random_start: Literal["uniform", "gaussian", "none"]
    start_std: float
    iterates: Literal["last", "any"]

    def __post_init__(self) -> None:
        for key in ("steps", "restarts"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key} must be a whole number of at least 1, got {value}")
        if not self.relative_step > 0:
            raise ValueError(f"relative_step must be positive, got {self.relative_step}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be {' or '.join(LOSSES)}, got {self.loss}")
        if self.iterates not in ("last", "any"):
            raise ValueError(f"iterates must be last or any, got {self.iterates}")
        if self.random_start == "none" and self.restarts > 1:
            raise ValueError(f"restarts={self.restarts} without a random start would all be the same")
        self.pgd(Ball("linf", 0.0))  # PGD checks the other settings

    def settings(self) -> Mapping[str, Any]:
        """The attributes."""
        return asdict(self)

    def attacks(
        self, name: str, ball: Ball, num_classes: int, images: Tensor, seed: int
    ) -> Mapping[str, Attack]:
        """One attack, under the evaluator's own name."""
        return {name: _RestartedPGD(self, ball, f"evaluation/{name}", seed, in_ball=True)}

    def pgd(self, ball: Ball) -> PGD:
        """The attack within ``ball``."""
        return PGD(
            norm=ball.norm,
            eps=ball.eps,
            # any step size will do in a ball of one point
            step_size=self.relative_step * ball.eps if ball.eps else 1.0,
            steps=self.steps,
            random_start=self.random_start,
            start_std=self.start_std,
            batchnorm="eval",
        )


@dataclass(frozen=True, kw_only=True)
class UnboundedPGD(PGDEvaluator):
    """PGD in a ball that contains all images: a check of the evaluation, not of the model.

    No classifier withstands it, so an accuracy clearly above 0 means that gradients mislead the attack
    (Carlini et al. 2019, "On Evaluating Adversarial Robustness"; Athalye et al., ICML 2018).
    """

    def attacks(
        self, name: str, ball: Ball, num_classes: int, images: Tensor, seed: int
    ) -> Mapping[str, Attack]:
        """One attack, under the evaluator's own name."""
        box = ball.whole_box(images)
        return {name: _RestartedPGD(self, box, f"evaluation/{name}", seed, in_ball=False)}


class _RestartedPGD:
    def __init__(self, evaluator: PGDEvaluator, ball: Ball, stream: str, seed: int, *, in_ball: bool) -> None:
        self._pgd = evaluator.pgd(ball)
        self._restarts = evaluator.restarts
        self._loss = LOSSES[evaluator.loss]
        self._any_iterate = evaluator.iterates == "any"
        self._stream, self._seed = stream, seed
        same = (evaluator.loss, evaluator.relative_step, evaluator.random_start, evaluator.iterates, in_ball)
        self.description = Description(
            access="white_box",
            norm=ball.norm,
            eps=ball.eps,
            loss=evaluator.loss,
            step_size=self._pgd.step_size,
            steps=evaluator.steps,
            restarts=evaluator.restarts,
            in_ball=in_ball,
            tied=" ".join(map(str, same)),
        )

    def __call__(self, model: nn.Module, batch: Batch, note: Note) -> Tensor:
        """The adversarial image of the restart that broke an example, otherwise of the last one."""
        adversarial = batch.images.clone()
        standing = torch.arange(len(batch.targets), device=batch.targets.device)
        for restart in range(self._restarts):
            rest = Batch(*(part[standing] for part in batch))
            found, broken = self._once(model, rest, restart)
            adversarial[standing] = found
            standing = standing[~broken]
            if not len(standing):
                break
        return adversarial

    def _once(self, model: nn.Module, batch: Batch, restart: int) -> tuple[Tensor, Tensor]:
        """Adversarial images of one start, and which of them fool the model."""
        current = self._starts(batch, restart)
        if not self._any_iterate:
            current = self._pgd.climb(model, batch.images, batch.targets, current, self._loss)
            return current, ~classified(model, current, batch.targets)
        found, broken = current, ~classified(model, current, batch.targets)
        for _ in range(self._pgd.steps):
            step = replace(self._pgd, steps=1)
            current = step.climb(model, batch.images, batch.targets, current, self._loss)
            found = torch.where(broken[:, None, None, None], found, current)
            broken = broken | ~classified(model, current, batch.targets)
        return found, broken

    def _starts(self, batch: Batch, restart: int) -> Tensor:
        """Random starts, drawn example by example on the CPU, so that they are the same on every device."""
        images = batch.images.cpu()
        starts = [
            self._pgd.start(images[i : i + 1], generator(self._seed, self._stream, restart, example))
            for i, example in enumerate(batch.indices.tolist())
        ]
        return torch.cat(starts).to(batch.images.device)


def classified(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images (B, C, H, W) the model classifies correctly, bool (B,)."""
    with torch.no_grad():
        return right(model(images), labels)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which logits (B, K) are greatest at the label and all finite; argmax alone would accept a NaN."""
    return logits.isfinite().all(dim=1) & (logits.argmax(dim=1) == labels)
