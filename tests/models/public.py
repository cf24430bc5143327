"""The networks of two public repositories, written as functions of their named parameters.

``robust_overfitting`` (Rice et al., ICML 2020) and ``AWP`` (Wu et al., NeurIPS 2020) share them. Neither
normalises its input, and both pool a 32x32 image's last map with a window of its size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def preact_resnet_state(*, width: int, blocks: tuple[int, ...] = (2, 2, 2, 2), classes: int = 10) -> State:
    state, inputs = {"conv1.weight": _kernel(width, 3, 3)}, width
    for stage, count in enumerate(blocks, start=1):
        outputs = width * 2 ** (stage - 1)
        for block in range(count):
            name = f"layer{stage}.{block}."
            state |= _norm(f"{name}bn1", inputs) | {f"{name}conv1.weight": _kernel(outputs, inputs, 3)}
            state |= _norm(f"{name}bn2", outputs) | {f"{name}conv2.weight": _kernel(outputs, outputs, 3)}
            if inputs != outputs:
                state[f"{name}shortcut.0.weight"] = _kernel(outputs, inputs, 1)
            inputs = outputs
    return state | _norm("bn", inputs) | _linear("linear", inputs, classes)


def preact_resnet_logits(state: State, x: Tensor) -> Tensor:
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in range(1, 5):
        for block in range(_count(state, f"layer{stage}.")):
            stride = 2 if stage > 1 and block == 0 else 1
            x = _block(state, f"layer{stage}.{block}.", "shortcut.0", x, stride)
    x = F.avg_pool2d(_activated(state, "bn", x), 4).flatten(1)
    return x @ state["linear.weight"].T + state["linear.bias"]


def wide_resnet_state(*, depth: int, widen_factor: int, classes: int = 10) -> State:
    state, inputs = {"conv1.weight": _kernel(16, 3, 3)}, 16
    for stage in (1, 2, 3):
        outputs = 16 * widen_factor * 2 ** (stage - 1)
        for block in range((depth - 4) // 6):
            name = f"block{stage}.layer.{block}."
            state |= _norm(f"{name}bn1", inputs) | {f"{name}conv1.weight": _kernel(outputs, inputs, 3)}
            state |= _norm(f"{name}bn2", outputs) | {f"{name}conv2.weight": _kernel(outputs, outputs, 3)}
            if inputs != outputs:
                state[f"{name}convShortcut.weight"] = _kernel(outputs, inputs, 1)
            inputs = outputs
    return state | _norm("bn1", inputs) | _linear("fc", inputs, classes)


def wide_resnet_logits(state: State, x: Tensor) -> Tensor:
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for block in range(_count(state, f"block{stage}.layer.")):
            stride = 2 if stage > 1 and block == 0 else 1
            x = _block(state, f"block{stage}.layer.{block}.", "convShortcut", x, stride)
    x = F.avg_pool2d(_activated(state, "bn1", x), 8).flatten(1)
    return x @ state["fc.weight"].T + state["fc.bias"]


def _block(state: State, name: str, projection: str, x: Tensor, stride: int) -> Tensor:
    active = _activated(state, f"{name}bn1", x)
    kernel = state.get(f"{name}{projection}.weight")
    shortcut = x if kernel is None else F.conv2d(active, kernel, stride=stride)
    out = F.conv2d(active, state[f"{name}conv1.weight"], stride=stride, padding=1)
    return shortcut + F.conv2d(_activated(state, f"{name}bn2", out), state[f"{name}conv2.weight"], padding=1)


def _activated(state: State, name: str, x: Tensor) -> Tensor:
    """ReLU(γ (x − μ) / √(σ² + 1e-5) + β) with running statistics."""
    column = {key: state[f"{name}.{key}"].view(-1, 1, 1) for key in ("weight", "bias", "running_mean")}
    std = (state[f"{name}.running_var"] + 1e-5).sqrt().view(-1, 1, 1)
    return (column["weight"] * (x - column["running_mean"]) / std + column["bias"]).clamp(min=0)


def _count(state: State, stage: str) -> int:
    return len({name[len(stage) :].split(".")[0] for name in state if name.startswith(stage)})


def _kernel(outputs: int, inputs: int, size: int) -> Tensor:
    kernel = torch.randn(outputs, inputs, size, size, dtype=torch.float64)
    return kernel / (inputs * size * size) ** 0.5


def _norm(name: str, channels: int) -> State:
    return {
        f"{name}.weight": torch.rand(channels, dtype=torch.float64) + 0.5,
        f"{name}.bias": 0.3 * torch.randn(channels, dtype=torch.float64),
        f"{name}.running_mean": 0.3 * torch.randn(channels, dtype=torch.float64),
        f"{name}.running_var": torch.rand(channels, dtype=torch.float64) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


def _linear(name: str, inputs: int, outputs: int) -> State:
    return {
        f"{name}.weight": torch.randn(outputs, inputs, dtype=torch.float64) / inputs**0.5,
        f"{name}.bias": torch.randn(outputs, dtype=torch.float64),
    }
