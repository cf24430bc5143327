"""Pre-activation residual networks.

Shapes: B batch, C channels, H x W pixels, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Basic pre-activation block: BN, ReLU, conv 3x3, twice, plus a shortcut (He et al., ECCV 2016).

    As in the code of Rice et al. (ICML 2020), a projecting shortcut starts after the first BN and ReLU, an
    identity shortcut starts before it.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        result: Tensor = out + shortcut
        return result


class PreActResNet(nn.Module):
    """PreActResNet with the input normalisation inside, so that attacks live on the [0, 1] pixel scale.

    With ``width=64``, ``blocks=(2, 2, 2, 2)`` and ``strides=(1, 2, 2, 2)`` this is the PreActResNet-18 of
    Rice et al. (ICML 2020), with a BatchNorm before pooling: 11.17 M parameters for ten classes.

    Args:
        num_classes: K.
        in_channels: Image channels C.
        width: Channels of the first stage; stage s has ``width * 2**s``.
        blocks: Number of basic blocks in each stage.
        strides: Stride of the first block in each stage.
        mean: Per-channel mean on the [0, 1] scale, length C.
        std: Per-channel standard deviation on the [0, 1] scale, length C.

    Raises:
        ValueError: Sizes that do not fit together or are not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        width: int,
        blocks: Sequence[int],
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if len(blocks) != len(strides):
            raise ValueError(f"blocks and strides need the same length, got {len(blocks)} and {len(strides)}")
        if len(mean) != in_channels or len(std) != in_channels:
            raise ValueError(f"mean and std need {in_channels} entries, got {len(mean)} and {len(std)}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        stages, channels = [], width
        for stage, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
            out_channels = width * 2**stage
            layers = [PreActBlock(channels, out_channels, stride)]
            layers += [PreActBlock(out_channels, out_channels, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*layers))
            channels = out_channels
        self.layers = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1]."""
        out = self.conv1((x - self.mean) / self.std)
        out = F.relu(self.bn(self.layers(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits
