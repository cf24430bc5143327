"""What an objective is.

Shapes: B batch, C x H x W image, K classes. Targets are class numbers (B,), int64, or probabilities (B, K)
where images were mixed.
"""

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from robustdyn.attacks import AttackLoss


class StepLoss(NamedTuple):
    """The result of one training pass through the network.

    Attributes:
        loss: The training loss, a scalar, mean over B.
        robust_logits: (B, K), of the adversarial images; None if the objective uses none.
    """

    loss: Tensor
    robust_logits: Tensor | None


class Objective(Protocol):
    """One axis of a method. The adversarial example is made once per step, by the module, and shared."""

    takes_probabilities: ClassVar[bool]
    """Whether targets may be probabilities; where not, mixed images are refused when the run is composed."""

    def attack_loss(self, model: nn.Module, images: Tensor) -> AttackLoss | None:
        """What the training attack maximises, a sum over examples; None to train without an attack.

        Called once per step, in the mode in which the attack runs and without gradient. Whatever depends only
        on the unperturbed ``images`` (B, C, H, W) is computed here.
        """

    def __call__(self, model: nn.Module, images: Tensor, adversarial: Tensor, targets: Tensor) -> StepLoss:
        """The training loss; ``adversarial`` is ``images`` itself if there is no attack."""
