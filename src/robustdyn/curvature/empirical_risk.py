"""The empirical risk over fixed examples, as a function of the flat parameter vector θ.

Everything in this room is derived from :class:`EmpiricalRisk`: it alone knows the model, the examples, how
they are cut into chunks, and how to leave the model exactly as it was found.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
ParameterFilter = Callable[[str, nn.Parameter], bool] | Collection[str]
BatchNormMode = Literal["eval", "train"]

_CHECKED_EXAMPLES = 16  # enough for any random layer to show; the check costs two passes over these


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each example.

    Args:
        logits: (B, K).
        targets: Class indices (B,), or class probabilities (B, K).

    Returns:
        (B,) losses in nats.
    """
    return F.cross_entropy(logits, targets, reduction="none")


class EmpiricalRisk:
    """L_S(θ) = (1/m) Σ_i ℓ(f(x_i; θ), y_i) over m fixed, already adversarial, inputs.

    θ is the concatenation of the measured parameter tensors in ``model.named_parameters()`` order. Without an
    explicit θ, the model's present weights are used, read at every call. The mean is exact for any chunk
    size.

    Nothing about the model, its gradients or torch's global state differs after a call (see :meth:`guard`).
    Modules other than BatchNorm keep the training flag they have: a Dropout left on is refused, not switched
    off. Numbers are computed in the precision of the parameters: autocast is off while measuring.

    Attributes:
        model: The measured model.
        inputs: (m, ...), the fixed examples, wherever the caller keeps them.
        targets: (m, ...).
        loss: The per-example loss.
        names: Names of the measured tensors, in the order of θ.
        blocks: For each name its slice of θ.
        shapes: For each name its tensor's shape.
        numel: P, the length of θ.
        examples: m.
        chunk_size: Examples per pass.
        batchnorm: Which statistics BatchNorm used; part of every measurement's meaning.
        dtype: Precision of θ and of everything computed from it.
        device: Where θ lives; chunks are moved there.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        loss: PerExampleLoss = cross_entropy,
        chunk_size: int | None = None,
        parameters: ParameterFilter | None = None,
        batchnorm: BatchNormMode = "eval",
    ) -> None:
        """Fix the examples, choose the parameters and refuse what cannot be measured.

        Args:
            model: Any module that maps a batch of inputs to what ``loss`` takes.
            inputs: (m, ...), kept fixed: the dependence of an attack on θ is not differentiated.
            targets: (m, ...), first dimension as ``inputs``.
            loss: ``(outputs, targets) -> (B,)``.
            chunk_size: Examples per forward and backward pass; None takes all at once.
            parameters: Which tensors make up θ: None for all that require gradients, a predicate
                ``(name, parameter) -> bool`` that chooses among those, or a collection of names.
            batchnorm: ``"eval"`` uses the running statistics, ``"train"`` the statistics of the whole
                measurement set, in one chunk. Neither moves the running statistics.

        Raises:
            ValueError: If sizes disagree, no parameter is chosen, precision or device are mixed or too low,
                BatchNorm cannot do what was asked, or two passes over the same inputs disagree.
        """
        _check_examples(inputs, targets, chunk_size)
        self.model = model
        self.loss = loss
        self.examples = len(inputs)
        self.chunk_size = self.examples if chunk_size is None else min(chunk_size, self.examples)
        self.batchnorm: BatchNormMode = batchnorm
        self.inputs, self.targets = plain(inputs), plain(targets)
        self._check_batchnorm()

        chosen = _select(model, parameters)
        self.names = tuple(chosen)
        self.shapes = {name: parameter.shape for name, parameter in chosen.items()}
        self.blocks: dict[str, slice] = {}
        self.numel = 0
        for name, parameter in chosen.items():
            self.blocks[name] = slice(self.numel, self.numel + parameter.numel())
            self.numel += parameter.numel()
        self.dtype, self.device = _common_type(chosen)
        self._check_deterministic()

    # ------------------------------------------------------------------ the function

    def value(self, theta: Tensor | None = None) -> float:
        """L_S(θ), summed in float64.

        Args:
            theta: (P,) or None for the model's present weights.
        """
        total = 0.0
        with self.guard(), torch.no_grad():
            parameters = self.parameters(theta)
            for inputs, targets in self.chunks():
                total += self.losses(parameters, inputs, targets).double().sum().item()
        return total / self.examples

    def gradient(self, theta: Tensor | None = None) -> Tensor:
        """∇L_S(θ), shape (P,).

        Args:
            theta: (P,) or None for the model's present weights.
        """
        with self.guard():
            total = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
            leaves = self.leaves(theta)
            for inputs, targets in self.chunks():
                loss = self.losses(leaves, inputs, targets).sum()
                total += self.flatten(gradients(loss, tuple(leaves.values())))
            return total / self.examples

    def theta(self) -> Tensor:
        """A copy of the model's present weights, shape (P,)."""
        return self.flatten(tuple(self.parameters().values()))

    # ------------------------------------------------------------------ θ as one vector and as tensors

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector, one per parameter tensor.

        Args:
            flat: (P,).

        Raises:
            ValueError: If the length is not P.
        """
        if flat.shape != (self.numel,):
            raise ValueError(f"expected a vector of shape ({self.numel},), got {tuple(flat.shape)}")
        return {name: flat[self.blocks[name]].view(self.shapes[name]) for name in self.names}

    def flatten(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The inverse of :meth:`split`: one tensor per name, in order, to a (P,) vector."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    # ------------------------------------------------------------------ building blocks for operators

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Everything that measures runs inside; it sets the stage and puts everything back.

        Inside: gradients are on, inference mode and autocast are off, BatchNorm has the chosen mode.
        Afterwards training flags and torch's random state are as before. Weights, buffers, ``.grad`` and
        ``requires_grad`` are never touched, because the model only ever sees detached parameters and copies
        of its buffers.
        """
        flags = [(module, module.training) for module in self.model.modules()]
        with ExitStack() as stack:
            cuda = [self.device] if self.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            try:
                for module, _ in flags:
                    if isinstance(module, _BatchNorm):
                        module.training = self.batchnorm == "train"
                yield
            finally:
                for module, training in flags:
                    module.training = training

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The examples in order, ``chunk_size`` at a time, on the parameters' device."""
        for start in range(0, self.examples, self.chunk_size):
            yield self.subset(slice(start, start + self.chunk_size))

    def subset(self, which: slice) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some examples, on the parameters' device."""
        return self.inputs[which].to(self.device), self.targets[which].to(self.device)

    def parameters(self, theta: Tensor | None = None) -> dict[str, Tensor]:
        """The measured tensors by name, detached: the model's own, or views of ``theta`` (P,)."""
        if theta is not None:
            return self.split(theta.detach().to(device=self.device, dtype=self.dtype))
        present = dict(self.model.named_parameters())
        return {name: present[name].detach() for name in self.names}

    def leaves(self, theta: Tensor | None = None) -> dict[str, Tensor]:
        """As :meth:`parameters`, but fresh leaves of the autograd graph that require gradients."""
        return {name: tensor.detach().requires_grad_() for name, tensor in self.parameters(theta).items()}

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """f(x; θ) as a pure function; call it inside :meth:`guard`.

        Args:
            parameters: A tensor for each of ``names``.
            inputs: (B, ...).

        Returns:
            The model's output, usually (B, K) logits.
        """
        everything = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        everything.update(parameters)
        buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        outputs: Tensor = functional_call(self.model, (everything, buffers), (inputs,))
        return outputs

    def losses(self, parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """ℓ of each example, shape (B,), as a pure function of the parameters.

        Raises:
            ValueError: If ``loss`` does not return one number per example.
        """
        losses = self.loss(self.outputs(parameters, inputs), targets)
        if losses.shape != inputs.shape[:1]:
            raise ValueError(
                f"loss must return one number per example, shape ({len(inputs)},), but returned "
                f"{tuple(losses.shape)}: use reduction='none'"
            )
        return losses

    @property
    def has_batchnorm(self) -> bool:
        """Whether the model contains a BatchNorm layer."""
        return any(isinstance(module, _BatchNorm) for module in self.model.modules())

    # ------------------------------------------------------------------ refusals

    def _check_batchnorm(self) -> None:
        if self.batchnorm not in ("eval", "train"):
            raise ValueError(f"batchnorm must be 'eval' or 'train', not {self.batchnorm!r}")
        if self.batchnorm == "train" and self.has_batchnorm and self.chunk_size < self.examples:
            raise ValueError(
                f"batchnorm='train' needs all {self.examples} examples in one chunk, because every chunk "
                f"would have its own statistics: leave chunk_size unset (it is {self.chunk_size}), measure "
                "fewer examples, or use batchnorm='eval'"
            )
        for name, module in self.model.named_modules():
            untracked = isinstance(module, _BatchNorm) and module.running_mean is None
            if untracked and self.batchnorm == "eval":
                raise ValueError(
                    f"batchnorm='eval' needs running statistics, but {name!r} keeps none "
                    "(track_running_stats=False): use batchnorm='train'"
                )

    def _check_deterministic(self) -> None:
        inputs, targets = self.subset(slice(0, _CHECKED_EXAMPLES))
        with self.guard(), torch.no_grad():
            parameters = self.parameters()
            first = self.losses(parameters, inputs, targets)
            second = self.losses(parameters, inputs, targets)
        if not torch.isfinite(first).all():
            raise ValueError("the loss is not finite at the present weights: nothing can be measured here")
        # sqrt(eps): far above what another summation order does, far below what a random layer does.
        if not torch.allclose(first, second, rtol=torch.finfo(self.dtype).eps ** 0.5, atol=0.0):
            raise ValueError(
                "two passes over the same inputs disagree, so the loss is not a function of the weights: "
                f"{_random_layers(self.model)}; call model.eval() (or .eval() on these layers) before "
                "measuring"
            )


def gradients(
    output: Tensor, inputs: tuple[Tensor, ...], *, differentiable: bool = False
) -> tuple[Tensor, ...]:
    """∂output/∂inputs with zeros where there is no dependence (torch would raise or return None).

    Args:
        output: Scalar.
        inputs: Leaves or intermediate tensors.
        differentiable: Keep the graph so that the result can be differentiated again.
    """
    if not output.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(
        output, inputs, create_graph=differentiable, allow_unused=True, materialize_grads=True
    )


def _check_examples(inputs: Tensor, targets: Tensor, chunk_size: int | None) -> None:
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
        raise ValueError(
            f"inputs and targets must agree in their first dimension, got {tuple(inputs.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if len(inputs) == 0:
        raise ValueError("inputs is empty: the mean loss needs at least one example")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive or None, not {chunk_size}")


def plain(tensor: Tensor) -> Tensor:
    """The tensor detached, and copied if it was made under inference_mode, which autograd cannot use."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor.detach()


def _select(model: nn.Module, wanted: ParameterFilter | None) -> dict[str, nn.Parameter]:
    present = dict(model.named_parameters())
    if wanted is None:
        chosen = {name: p for name, p in present.items() if p.requires_grad}
    elif callable(wanted):
        chosen = {name: p for name, p in present.items() if p.requires_grad and wanted(name, p)}
    else:
        unknown = sorted(set(wanted) - set(present))
        if unknown:
            raise ValueError(f"parameters: the model has no {', '.join(map(repr, unknown))}")
        chosen = {name: p for name, p in present.items() if name in set(wanted)}
    if not chosen:
        raise ValueError("parameters: no tensor is chosen; check the filter and requires_grad")
    return chosen


def _common_type(chosen: Mapping[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    kinds = {(p.dtype, p.device) for p in chosen.values()}
    if len(kinds) > 1:
        raise ValueError(f"the measured parameters mix precisions or devices: {sorted(map(str, kinds))}")
    dtype, device = kinds.pop()
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"curvature in {dtype} is dominated by rounding: convert the model with model.float()"
        )
    return dtype, device


def _random_layers(model: nn.Module) -> str:
    active = [name for name, m in model.named_modules() if "Dropout" in type(m).__name__ and m.training]
    return f"Dropout is on in {', '.join(map(repr, active))}" if active else "the model draws random numbers"
