"""A penalty on the trace of the loss's Hessian, by an unbiased estimate of its Gauss-Newton form.

For networks that are piecewise linear in each parameter tensor, such as ReLU networks, and the cross-entropy
the trace of the Hessian is the trace of the Gauss-Newton matrix; see
``robustdyn.curvature.gauss_newton_blocks``. For other networks the latter is what is penalised.

Shapes: m examples, C x H x W image, K classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustdyn.curvature.probes import rademacher
from robustdyn.data import Part
from robustdyn.models.modes import mode


def estimated_trace(model: nn.Module, images: Tensor, signs: Callable[[int], Tensor]) -> Tensor:
    """An estimate of Tr(H) over all learned parameters, a scalar that can be differentiated by them.

    Tr(H) = (1/m) Σ_x Tr(J_xᵀ Λ_x J_x), where J_x is the derivative of the logits and Λ = diag(p) − p pᵀ the
    second derivative of the cross-entropy by them, which does not depend on the target. With Λ = L Lᵀ,
    L = diag(√p) − p √pᵀ, and random signs ξ_x, independent over examples and classes,

        Tr(H) = E m ‖(1/m) Σ_x J_xᵀ L_x ξ_x‖²,

    because the products of different examples have mean 0. This takes a forward pass and one backward pass
    for all examples, and its gradient the derivatives of both. The relative standard deviation of the
    estimate is at most √2, and less if the trace is spread over several directions.

    The network is in eval mode, so that BatchNorm normalises with its running statistics. These are constants
    for the derivatives, and no example's logits depend on other examples. Autocast is off, because float16
    would lose the small products.

    Args:
        model: From images to logits (m, K); its mode flags are as before afterwards.
        images: (m, C, H, W).
        signs: From K to ξ (m, K), +1 or −1.
    """
    with torch.autocast(images.device.type, enabled=False), mode(model, training=False):
        logits = model(images)
        root = (F.log_softmax(logits, dim=1) / 2).exp()  # √p, whose derivative is finite where p rounds to 0
        along = root * signs(logits.shape[1]).to(root)
        tangent = along - root.square() * along.sum(dim=1, keepdim=True)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(
            logits, parameters, tangent / len(images), create_graph=True, allow_unused=True
        )
    norms = [gradient.square().sum() for gradient in gradients if gradient is not None]
    return len(images) * torch.stack(norms).sum()


class GaussNewtonPenalty:
    """Adds ρ Tr(H) to the training loss, with the Hessian H of the adversarial examples' cross-entropy.

    Whatever the objective and the targets are, H is that of the cross-entropy. It is estimated at the weights
    at which the step's gradient is taken, with new random signs at every step; see ``estimated_trace``.

    Args:
        strength: ρ, ≥ 0; with 0 nothing is computed.
        examples: Number of a batch's examples from which the trace is estimated; None for all.

    Raises:
        ValueError: A setting outside its range.
    """

    def __init__(self, *, strength: float, examples: int | None) -> None:
        if not strength >= 0:
            raise ValueError(f"strength must be at least 0, got {strength}")
        if examples is not None and not (isinstance(examples, int) and examples >= 1):
            raise ValueError(f"examples must be a whole number of at least 1, or null, got {examples}")
        self.strength, self.examples = strength, examples

    def __call__(self, model: nn.Module, images: Tensor, part: Part, generator: torch.Generator) -> Tensor:
        """A part's share of the penalty, a scalar; the shares of all parts sum to the whole batch's.

        Several processes leave out the products of examples on different ones, which have mean 0. Their
        penalty is therefore equal to that of one process in expectation only, and varies less.

        Args:
            model: The network.
            images: Adversarial images of the part, (B, C, H, W).
            part: Which part of the batch they are.
            generator: Source of the signs, which are drawn for the whole batch.
        """
        places = range(part.whole)[part.places]
        chosen = part.whole if self.examples is None else min(self.examples, part.whole)
        own = range(places.start, min(places.stop, chosen))
        if not own or self.strength == 0:
            return images.new_zeros(())

        def signs(classes: int) -> Tensor:
            drawn = rademacher((chosen, classes), generator, images.dtype, images.device)
            return drawn[own.start : own.stop]

        trace = estimated_trace(model, images[: len(own)], signs)
        return self.strength * len(own) / chosen * trace
