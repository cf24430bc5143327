"""Small problems in float64 for tests of curvature, each with the facts that tests rely on.

The inputs stand for frozen adversarial examples, which are ordinary fixed inputs for ``robustdyn.curvature``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    classes: int
    examples: int
    chunk_size: int | None  # None: all at once; otherwise the last chunk is smaller
    piecewise_linear: bool
    smooth: bool

    def problem(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Model in eval mode with non-trivial statistics, inputs and targets; the same in every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20)
            model = self.build().double().eval()
            inputs = torch.randn(self.examples, *self.input_shape, dtype=torch.float64)
            targets = torch.randint(self.classes, (self.examples,))
            _unsettle(model)
        return model, inputs, targets


class Softmax(nn.Module):
    """Linear softmax regression without bias: its Hessian is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class PreActBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice, with a projected shortcut; ReLU as a function, partly in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        out += shortcut
        return out


class PreActNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.block = PreActBlock(3, 4, stride=2)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.block(self.conv1(x))))
        return self.linear(F.avg_pool2d(out, 3).flatten(1))


def _unsettle(model: nn.Module) -> None:
    """Move BatchNorm away from its initial values, with which it is the identity in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


def _mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3))


def _conv(norm: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", dilation=2),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def _norm_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def case(
    name: str,
    build: Callable[[], nn.Module],
    input_shape: tuple[int, ...],
    *,
    examples: int,
    chunk_size: int | None = None,
    piecewise_linear: bool = True,
    smooth: bool = False,
) -> Case:
    return Case(name, build, input_shape, 3, examples, chunk_size, piecewise_linear, smooth)


CASES = {
    c.name: c
    for c in (
        case("softmax", Softmax, (4,), examples=7, smooth=True),
        case("tanh_mlp", lambda: _mlp(nn.Tanh), (4,), examples=9, piecewise_linear=False, smooth=True),
        case("relu_mlp", lambda: _mlp(nn.ReLU), (4,), examples=9),
        case("relu_mlp_uneven", lambda: _mlp(nn.ReLU), (4,), examples=9, chunk_size=4),
        case("norm_mlp", _norm_mlp, (4,), examples=8, chunk_size=3),
        case("conv", lambda: _conv(norm=False), (2, 6, 6), examples=5),
        case("conv_norm_uneven", lambda: _conv(norm=True), (2, 6, 6), examples=5, chunk_size=2),
        case("preact", PreActNet, (2, 6, 6), examples=5, chunk_size=3),
    )
}
