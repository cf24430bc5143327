"""What a risk refuses to measure, and what it learns about the model from a few examples."""

import copy
import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustdyn.curvature.examples import Structure, check_lengths, leaves, length, mapped, take
from robustdyn.curvature.kernels import Precision
from robustdyn.curvature.memory_layout import curves_channels_last
from robustdyn.curvature.risk_function import BatchNormMode, RiskFunction, cross_entropy, rows_not_finite
from robustdyn.curvature.vectors import inner, norm

PROBED_EXAMPLES = 4  # on these the memory of a pass is measured, and the symmetry of products
CHECKED_EXAMPLES = 16  # enough for any random layer to show; the checks cost four passes over these
_GROUPS = 3  # parts in which the checked examples pass once more; neighbours and halves are separated
# How far uᵀHv and vᵀHu may differ, relatively. Rounding stays orders below, a wrong derivative orders above.
_SYMMETRY_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}


def check_types(chunk_size: object, memory: object) -> None:
    """Refuse arguments of another type.

    Raises:
        TypeError: chunk_size or memory are not whole numbers.
    """
    for name, value in (("chunk_size", chunk_size), ("memory", memory)):
        if value is not None and not isinstance(value, Integral):
            unit = " of bytes, such as 2**30" if name == "memory" else ""
            raise TypeError(f"{name} must be a whole number{unit}, or None, not {value!r}")


def complaint(risk: RiskFunction, chunk_size: int | None, memory: int | None) -> str | None:
    """Why this process cannot measure; None, if it can.

    Sets ``independent`` and ``channels_last`` of the risk to what its passes show.
    """
    try:
        _check_examples(risk.inputs, risk.targets, chunk_size, memory)
        _check_settings(risk)
        _check_batchnorm(risk)
        _check_passes(risk)
        _check_symmetry(risk)
    except ValueError as error:
        return str(error)
    except Exception as error:
        if risk.shards.group is None:
            raise
        return f"{type(error).__name__}: {error}"  # the others must not wait for this process
    return None


def _check_examples(
    inputs: Structure, targets: Structure, chunk_size: int | None, memory: int | None
) -> None:
    check_lengths(inputs, targets)
    if length(inputs) == 0:
        raise ValueError("inputs is empty: the mean loss needs at least one example")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive or None, not {chunk_size}")
    if memory is not None and memory < 0:
        raise ValueError(f"memory must be a number of bytes or None, not {memory}")
    for name, numbers in (("inputs", inputs), ("targets", targets)):
        bad = [row for leaf in leaves(numbers) for row in rows_not_finite(leaf)]
        if bad:
            raise ValueError(f"{name} has numbers that are not finite, first in example {bad[0]}")


def _check_settings(risk: RiskFunction) -> None:
    for name, choices in (("batchnorm", BatchNormMode), ("precision", Precision)):
        given, (*first, last) = getattr(risk, name), map(repr, get_args(choices))
        if repr(given) not in (*first, last):
            raise ValueError(f"{name} must be {', '.join(first)} or {last}, not {given!r}")
    if risk.precision != "full" and risk.dtype != torch.float32:
        raise ValueError(f"precision={risk.precision!r} is for float32 parameters, these are {risk.dtype}")


def _check_batchnorm(risk: RiskFunction) -> None:
    layers = {n: module for n, module in risk.model.named_modules() if isinstance(module, _BatchNorm)}
    if not layers:
        return
    if risk.batchnorm == "eval":
        untracked = [name for name, module in layers.items() if module.running_mean is None]
        if untracked:
            raise ValueError(
                f"batchnorm='eval' needs running statistics, but {untracked[0]!r} keeps none "
                "(track_running_stats=False): use batchnorm='train'"
            )
        return
    if risk.shards.processes > 1:
        raise ValueError(
            "batchnorm='train' needs all examples in one process, because every process would have its "
            "own statistics: leave group unset, or use batchnorm='eval'"
        )
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    mixed = [name for name, module in layers.items() if isinstance(module, nn.SyncBatchNorm)]
    if several and mixed:
        raise ValueError(
            f"batchnorm='train' with SyncBatchNorm {mixed[0]!r} would mix the examples of all "
            "processes, and has no second derivative: use batchnorm='eval'"
        )
    if risk.chunk_size < risk.examples:
        raise ValueError(
            f"batchnorm='train' needs all {risk.examples} examples in one chunk, because every chunk "
            f"would have its own statistics: leave chunk_size unset (it is {risk.chunk_size}), measure "
            "fewer examples, or use batchnorm='eval'"
        )


def _check_passes(risk: RiskFunction) -> None:
    """Check on a few examples for writes, numbers that are not finite, randomness and mixing."""
    few = risk.few(CHECKED_EXAMPLES)
    inputs, targets = risk.subset(few)
    with risk.guard(), torch.no_grad():
        # copies, because the pass may write to them
        parameters = {name: p.detach().clone() for name, p in risk.model.named_parameters()}
        outputs = risk.outputs(parameters, inputs)
        written = [name for name, parameter in parameters.items() if parameter._version]
        if written:
            raise ValueError(
                f"a forward pass changes the parameter {written[0]!r} in place, as Embedding(max_norm=) "
                "does, so measuring would change the model: leave max_norm unset"
            )
        first = risk.losses_of(outputs, targets)
        risk.channels_last = _takes_channels_last(risk, parameters, *risk.subset(few))
        second = risk.losses(parameters, *risk.subset(few))
    bad = rows_not_finite(first)
    if bad:
        raise ValueError(
            f"the loss is not finite at the present weights (example {bad[0] * few.step}): nothing can "
            "be measured here"
        )
    if risk.loss is cross_entropy and _are_probabilities(outputs):
        warnings.warn(
            "the model's outputs are probabilities (not negative, with the sum 1), but cross_entropy takes "
            "logits and applies softmax a second time: leave out the model's last softmax, or give a loss of "
            "probabilities, such as loss=lambda p, y: -p[range(len(y)), y].log()",
            stacklevel=2,
        )
    # sqrt(eps): far above what another summation order does, far below what a random layer does.
    if not torch.allclose(first, second, rtol=torch.finfo(risk.dtype).eps ** 0.5, atol=0.0):
        raise ValueError(
            "two passes over the same inputs disagree, so the loss is not a function of the weights: "
            f"{_random_layers(risk.model)}; call model.eval() (or .eval() on these layers) before "
            "measuring"
        )
    if risk.independent:
        risk.independent = _independent(risk, parameters, outputs, first, few)
        chunks = risk.chunk_size < risk.held or risk.shards.processes > 1
        if not risk.independent and chunks:
            raise ValueError(
                "the losses of examples depend on which others pass through the model with them (a "
                "normalisation by the batch, or a loss that compares examples), so the risk is no mean "
                "over chunks: leave chunk_size and group unset"
            )


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether every row (B, K) looks like the output of a softmax."""
    if outputs.dim() != 2 or outputs.min() < 0:
        return False
    return torch.allclose(outputs.sum(dim=1), torch.ones(()).to(outputs), rtol=1e-3)  # also in bfloat16


def _independent(
    risk: RiskFunction, parameters: Mapping[str, Tensor], outputs: Tensor, losses: Tensor, few: slice
) -> bool:
    """Whether outputs and losses of a few examples are the same when these pass in smaller groups."""
    inputs, targets = risk.subset(few)
    groups = min(_GROUPS, length(targets))
    tolerance = torch.finfo(risk.dtype).eps ** 0.5
    # the rounding of a loss is that of its outputs
    scale = max(_largest(outputs), _largest(losses))
    with risk.guard(), torch.no_grad():
        for start in range(groups):
            part = slice(start, None, groups)
            try:
                alone = risk.outputs(parameters, mapped(Tensor.contiguous, take(inputs, part)))
                theirs = risk.losses_of(alone, mapped(Tensor.contiguous, take(targets, part)))
            except (RuntimeError, ValueError):  # such as batch statistics of one example
                return False
            same = _largest(theirs - losses[part]) <= tolerance * scale
            if alone.shape == outputs[part].shape:  # the examples come first
                same &= _largest(alone - outputs[part]) <= tolerance * _largest(outputs)
            if not same:
                return False
    return True


def _check_symmetry(risk: RiskFunction) -> None:
    """Compare uᵀHv with vᵀHu, over a few examples: some second derivatives in PyTorch are wrong."""
    full = copy.copy(risk)
    full.precision = "full"
    source = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, risk.numel, generator=source, dtype=risk.dtype).to(risk.device)
    with risk.guard():
        try:
            tape = full.tape(*risk.subset(risk.few(PROBED_EXAMPLES)))
            parts = [tuple(risk.split(v).values()) for v in vectors]
            images = torch.stack([risk.flatten(tape.hessian_product(p, last=False)) for p in parts])
        except (RuntimeError, ValueError):
            return  # products are impossible and will raise an error; values and gradients may exist
    first, second = float(inner(images[:1], vectors[1])), float(inner(images[1:], vectors[0]))
    size = max(map(norm, images))
    if abs(first - second) > _SYMMETRY_TOLERANCE[risk.dtype] * size:
        raise ValueError(
            f"products with the Hessian are not symmetric, uᵀHv = {second:.6g} but vᵀHu = {first:.6g}: "
            "the second derivative of some function in the model or the loss is wrong (its backward pass "
            "cannot be differentiated, or PyTorch is at fault); write it with plain operations"
        )


def _takes_channels_last(
    risk: RiskFunction, parameters: Mapping[str, Tensor], inputs: Structure, targets: Structure
) -> bool:
    """Images in this layout are faster on a CPU, but a model that flattens by ``view`` refuses them."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return False
    if inputs.device.type != "cpu" or not curves_channels_last(risk.model):
        return False
    try:
        risk.losses(parameters, inputs.contiguous(memory_format=torch.channels_last), targets)
    except RuntimeError:
        return False
    return True


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _random_layers(model: nn.Module) -> str:
    active = [name for name, m in model.named_modules() if "Dropout" in type(m).__name__ and m.training]
    return f"Dropout is on in {', '.join(map(repr, active))}" if active else "the model draws random numbers"
