"""Projected gradient descent on the input.

Shapes: B batch, C channels, H x W pixels, K classes. ε and the step are in the unit of the inputs: on the
[0, 1] pixel scale unless ``valid_range`` says otherwise.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustdyn.defaults import default
from robustdyn.models.modes import frozen_parameters, mode

AttackLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K), targets (B,) or (B, K)) -> scalar that the attack climbs; a sum over examples, so that one
example's step does not depend on the batch it stands in."""


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ_b cross-entropy, the loss of Madry et al. (ICLR 2018)."""
    return F.cross_entropy(logits, targets, reduction="sum")


@dataclass(frozen=True, kw_only=True)
class PGD:
    """PGD of Madry et al. (ICLR 2018): x ← Π_{B(x₀, ε) ∩ range} (x + step · direction(∇_x ℓ)).

    The direction is sign(∇) for ``linf`` and ∇/‖∇‖₂ for ``l2``. Only input gradients are computed:
    parameters receive none, and their ``.grad`` is not touched.

    One step is FGSM (Goodfellow et al., ICLR 2015) without a random start, and RS-FGSM (Wong et al., ICLR
    2020) from a uniform one. N-FGSM (de Jorge et al., NeurIPS 2022) starts from noise that is larger than the
    ball and is not projected onto it: ``steps=1``, ``step_size=eps``, ``relative_start=2`` and
    ``projection="range"``.

    Attributes:
        norm: ``"linf"`` or ``"l2"``.
        eps: Radius ε ≥ 0. With 0 the images stay as they are and the network is not run.
        step_size: Step, > 0.
        steps: Number of gradient steps ≥ 0.
        random_start: Where to start: ``"uniform"`` in a ball (``l2``: in volume); ``"gaussian"``, x₀ plus
            normal noise, as TRADES and MART do; ``"none"``, at x₀.
        relative_start: Radius of the uniform start as a multiple of ε, ≥ 0, and at most 1 with ``"ball"``.
        start_std: Standard deviation of the Gaussian start, > 0.
        projection: ``"ball"`` projects every step onto the ball and the valid range, ``"range"`` onto the
            range alone, so that the result may leave the ball.
        batchnorm: ``"eval"`` attacks the network with its running statistics. ``"train"`` uses the statistics
            of the batch and also updates the running statistics at every step, as the robust-overfitting
            study (Rice et al., ICML 2020) does.
        valid_range: (low, high), the least and the greatest value an input may have. Inputs that a data
            pipeline has normalised have another range than pixels.

    Raises:
        ValueError: A setting outside its range, or an l∞ ball wider than ``valid_range``.
    """

    norm: Literal["linf", "l2"] = default("attack/linf", "norm")
    eps: float = default("attack/linf", "eps_255") / 255
    step_size: float = default("attack/linf", "step_255") / 255
    steps: int = default("attack/linf", "steps")
    random_start: Literal["uniform", "gaussian", "none"] = default("attack/linf", "evaluation.random_start")
    relative_start: float = default("attack/linf", "train.relative_start")
    start_std: float = default("attack/linf", "evaluation.start_std")
    projection: Literal["ball", "range"] = default("attack/linf", "train.projection")
    batchnorm: Literal["train", "eval"] = default("attack/linf", "evaluation.batchnorm")
    valid_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be linf or l2, got {self.norm}")
        if not self.eps >= 0:
            raise ValueError(f"eps must be at least 0, got {self.eps}")
        if not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}")
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        if self.random_start not in ("uniform", "gaussian", "none"):
            raise ValueError(f"random_start must be uniform, gaussian or none, got {self.random_start}")
        if not 0 <= self.relative_start < math.inf:
            raise ValueError(f"relative_start must be at least 0 and finite, got {self.relative_start}")
        if self.relative_start != 1 and self.random_start != "uniform":
            raise ValueError(
                f"relative_start={self.relative_start:g} is the radius of a uniform start, but random_start="
                f"{self.random_start}; choose random_start=uniform, or relative_start=1"
            )
        if not self.start_std > 0:
            raise ValueError(f"start_std must be positive, got {self.start_std}")
        if self.projection not in ("ball", "range"):
            raise ValueError(f"projection must be ball or range, got {self.projection}")
        if self.projection == "ball" and self.relative_start > 1:
            raise ValueError(
                f"relative_start={self.relative_start:g} starts outside the ball onto which projection=ball "
                "projects; choose at most 1, or projection=range"
            )
        if self.batchnorm not in ("train", "eval"):
            raise ValueError(f"batchnorm must be train or eval, got {self.batchnorm}")
        low, high = self.valid_range
        if not low < high:
            raise ValueError(f"valid_range must be (low, high) with low < high, got {self.valid_range}")
        check_radius(self.norm, self.eps, high - low)

    def perturb(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        generator: torch.Generator,
        loss: AttackLoss = summed_cross_entropy,
    ) -> Tensor:
        """Adversarial images (B, C, H, W) in ``valid_range``, and with ``projection="ball"`` within ε.

        Args:
            model: Network; its mode flags are as before afterwards.
            images: (B, C, H, W) in ``valid_range``.
            targets: (B,) classes, or (B, K) probabilities.
            generator: Source of the random start, on the images' device.
            loss: What the attack maximises.

        Raises:
            ValueError: ``images`` are outside ``valid_range``.
            RuntimeError: Called under ``torch.inference_mode``, where no input gradient exists.
        """
        self.check(images)
        return self.climb(model, images, targets, self.start(images, generator), loss)

    def climb(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        start: Tensor,
        loss: AttackLoss = summed_cross_entropy,
    ) -> Tensor:
        """As ``perturb``, but unchecked and from a starting point (B, C, H, W), which is not changed."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "an attack needs gradients: leave torch.inference_mode, or construct the Trainer with "
                "inference_mode=False"
            )
        images = images.detach()
        adversarial = torch.empty_like(images).copy_(start.detach())  # in the images' memory layout
        step = self.stepper(images)
        with torch.enable_grad(), self.mode(model), frozen_parameters(model):
            for _ in range(self.steps if self.eps else 0):
                adversarial.requires_grad_(True)
                objective = loss(model(adversarial), targets)
                # backward passes belong outside autocast, as the optimiser's
                with torch.autocast(images.device.type, enabled=False):
                    (gradient,) = torch.autograd.grad(objective, adversarial)
                adversarial = step(adversarial.detach(), gradient)
        return adversarial

    def check(self, images: Tensor) -> None:
        """Refuse ``images`` that this attack would clamp out of their ball. On a GPU the host waits for it.

        Raises:
            ValueError: ``images`` are outside ``valid_range``.
        """
        if self.eps and (self.steps or self.random_start != "none"):
            check_range(images, self.valid_range)

    def mode(self, model: nn.Module) -> AbstractContextManager[None]:
        """The scope in which the attack uses ``model``: train or eval, according to ``batchnorm``."""
        return mode(model, training=self.batchnorm == "train")

    def start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Where the attack begins: a random point near ``images`` (B, C, H, W), or a copy of them."""
        if self.random_start == "none" or self.eps == 0:
            return images.clone()
        # numbers are drawn in memory order: one order, so that they do not depend on the images' layout
        noise = torch.empty_like(images, memory_format=torch.contiguous_format)
        if self.random_start == "gaussian":
            noise.normal_(generator=generator)
            return self._project(images, noise.mul_(self.start_std))
        reach = self.relative_start * self.eps
        if self.norm == "linf":
            noise.uniform_(-reach, reach, generator=generator)
            return (images + noise).clamp_(*self.valid_range)
        noise.normal_(generator=generator)
        radius = torch.rand(len(images), generator=generator, device=images.device, dtype=images.dtype)
        scale = reach * radius.pow(1 / images[0].numel()) / _norms(noise)
        return (images + noise * _per_example(scale, noise)).clamp_(*self.valid_range)

    def stepper(self, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """One step of the attack on ``images`` (B, C, H, W), for those that climb something else as well.

        Returns:
            (adversarial, the objective's gradient there), both of which may be overwritten, -> the next
            adversarial images.
        """
        if self.norm == "linf":
            # the ball cut with the box is a box
            least, greatest = self.valid_range
            low, high = (images - self._bound).clamp_(min=least), (images + self._bound).clamp_(max=greatest)
            return lambda adversarial, gradient: torch.clamp(
                adversarial.add_(gradient.sign_(), alpha=self.step_size), low, high
            )

        def step(adversarial: Tensor, gradient: Tensor) -> Tensor:
            scale = self.step_size / _norms(gradient)
            return self._project(images, adversarial + gradient * _per_example(scale, gradient) - images)

        return step

    @property
    def _bound(self) -> float:
        """Radius of the ball onto which steps are projected."""
        return self.eps if self.projection == "ball" else math.inf

    def _project(self, images: Tensor, delta: Tensor) -> Tensor:
        """The point of the ball and the box next to ``images`` + ``delta``."""
        if self.norm == "linf":
            return (images + delta.clamp(-self._bound, self._bound)).clamp_(*self.valid_range)
        shrink = (self._bound / _norms(delta)).clamp_(max=1)
        # The box is convex and holds x₀, so clamping only shortens delta: the ball is kept.
        return (images + delta * _per_example(shrink, delta)).clamp_(*self.valid_range)


def check_radius(norm: str, eps: float, width: float) -> None:
    """Refuse an ε, usually one in another unit, whose ball holds more than all inputs in a range.

    In l2 the number of inputs is not known, and there is no such bound. Only an infinite radius is refused.
    """
    if (norm == "linf" and eps > width) or eps == math.inf:
        raise ValueError(
            f"eps={eps} exceeds the width {width} of the valid range: divide it by 255 if it is in pixels"
        )


def check_range(images: Tensor, valid_range: tuple[float, float]) -> None:
    """Refuse inputs outside their range, which clamping would move out of the ball, or not finite.

    Raises:
        ValueError: With the range that the inputs have.
    """
    if images.numel() == 0:
        return
    least, greatest = (float(value) for value in images.detach().aminmax())
    low, high = valid_range
    if not (least >= low and greatest <= high):
        raise ValueError(
            f"inputs lie in [{least:.4g}, {greatest:.4g}], outside valid_range=({low:g}, {high:g}): "
            "scale them, or give PGD(valid_range=...) the range that they can have, or normalise inside the "
            "model"
        )


def _norms(x: Tensor) -> Tensor:
    """Per-example l2 norms (B,), bounded away from zero so that a vanishing gradient gives no step."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.clamp_min(1e-12)


def _per_example(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.dim() - 1))
