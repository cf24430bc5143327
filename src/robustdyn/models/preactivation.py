"""What pre-activation residual networks share.

Shapes: B batch, C channels, H x W pixels, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Basic pre-activation block: BN, ReLU, conv 3x3, twice, plus a shortcut (He et al., ECCV 2016).

    As in the codes of Zagoruyko & Komodakis (BMVC 2016) and Rice et al. (ICML 2020), a projecting shortcut
    starts after the first BN and ReLU, an identity shortcut starts before it.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Of the first convolution and of the projection.
        dropout: Share of the second convolution's inputs set to zero in training (Zagoruyko & Komodakis,
            Section 2.4).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # no module at 0: an idle one in train mode would bar the exact curvature measurements
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        if self.dropout is not None:
            out = self.dropout(out)
        result: Tensor = self.conv2(out) + shortcut
        return result


class PreActNetwork(nn.Module):
    """Stem convolution, stages of pre-activation blocks, BN, ReLU, global average pooling, linear layer.

    The input normalisation is inside, so that attacks live on the [0, 1] pixel scale; it has no entry in the
    ``state_dict``.

    Args:
        num_classes: K.
        in_channels: Image channels C.
        stem: Channels after the first convolution.
        channels: Channels of each stage.
        blocks: Number of basic blocks in each stage.
        strides: Stride of the first block in each stage.
        dropout: Of every block, in [0, 1).
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
        stem: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int],
        dropout: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if len(blocks) != len(strides):
            raise ValueError(f"blocks and strides need the same length, got {len(blocks)} and {len(strides)}")
        if min([*blocks, *strides], default=0) < 1:
            raise ValueError(f"blocks and strides must be at least 1, got {list(blocks)} and {list(strides)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if len(mean) != in_channels or len(std) != in_channels:
            raise ValueError(f"mean and std need {in_channels} entries, got {len(mean)} and {len(std)}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        stages, inputs = [], stem
        for outputs, count, stride in zip(channels, blocks, strides, strict=True):
            layers = [PreActBlock(inputs, outputs, stride, dropout)]
            layers += [PreActBlock(outputs, outputs, 1, dropout) for _ in range(count - 1)]
            stages.append(nn.Sequential(*layers))
            inputs = outputs
        self.layers = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1]."""
        out = self.conv1((x - self.mean) / self.std)
        out = F.relu(self.bn(self.layers(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        # losses in half precision are too coarse: a divergence of two outputs close together is all rounding
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
