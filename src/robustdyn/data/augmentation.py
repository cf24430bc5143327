"""Random crop and flip of whole batches.

Legend: N images of a split, B images of a batch, C channels, H and W rows and columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Generator, Tensor

from robustdyn.errors import ConfigError

PADDING_MODES = ("reflect", "zeros")


@dataclass(frozen=True)
class Augmentation:
    """Pad, cut a window of the original size, mirror.

    Attributes:
        crop_padding: Pixels added on every side before the crop; 0 for no crop.
        padding_mode: ``"reflect"`` (mirrored, the border pixel not repeated) or ``"zeros"`` (black).
        flip: Whether to mirror half of the images left to right.
    """

    crop_padding: int
    padding_mode: str
    flip: bool

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ConfigError(f"data.augment.crop_padding={self.crop_padding} must be at least 0")
        if self.padding_mode not in PADDING_MODES:
            raise ConfigError(
                f"data.augment.padding_mode={self.padding_mode} is not known;"
                f" choose one of {', '.join(PADDING_MODES)}"
            )

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> Self:
        """From the mapping ``data.augment``; every attribute must be there.

        Raises:
            ConfigError: A key is unknown or missing, or a value cannot work.
        """
        names = [field.name for field in fields(cls)]
        for key in settings:
            if key not in names:
                raise ConfigError(f"data.augment.{key} is not known; the keys are {', '.join(names)}")
        for name in names:
            if name not in settings:
                raise ConfigError(f"data.augment.{name} is missing; the keys are {', '.join(names)}")
        return cls(**{name: settings[name] for name in names})

    def draw(self, count: int, generator: Generator) -> Tensor:
        """Random choices for ``count`` images, on the generator's device.

        Returns:
            int64, (count, 3): first row and first column of the window in the padded image
            (0 ... 2 * ``crop_padding``) and whether it is mirrored (0 or 1).
        """
        corners = torch.randint(
            2 * self.crop_padding + 1, (count, 2), generator=generator, device=generator.device
        )
        flips = torch.randint(2, (count, 1), generator=generator, device=generator.device)
        return torch.cat([corners, flips if self.flip else torch.zeros_like(flips)], dim=1)

    def apply(self, images: Tensor, indices: Tensor, choices: Tensor) -> Tensor:
        """Augmented copies of some images of a split, in one gather.

        Args:
            images: (N, C, H, W), any dtype.
            indices: int64, (B,), which of them, on the same device.
            choices: int64, (B, 3), from :meth:`draw`, on any device.

        Returns:
            (B, C, H, W), dtype and device of ``images``.
        """
        height, width = images.shape[-2:]
        top, left, flip = choices.to(images.device, non_blocking=True).T.unsqueeze(2)  # each (B, 1)
        rows = top + torch.arange(height, device=images.device) - self.crop_padding  # (B, H)
        columns = left + torch.arange(width, device=images.device) - self.crop_padding  # (B, W)
        columns = torch.where(flip.bool(), columns.flip(1), columns)
        window = images[
            indices[:, None, None, None],
            torch.arange(images.shape[1], device=images.device)[:, None, None],
            self._inside(rows, height)[:, None, :, None],
            self._inside(columns, width)[:, None, None, :],
        ]
        if self.padding_mode == "zeros":
            window *= _valid(rows, height)[:, None, :, None] & _valid(columns, width)[:, None, None, :]
        return window

    def _inside(self, positions: Tensor, size: int) -> Tensor:
        """The pixel of the image that a position of the padded image shows (any pixel where it is black)."""
        if self.padding_mode == "zeros":
            return positions.clamp(0, size - 1)
        return size - 1 - (size - 1 - positions.abs()).abs()


def _valid(positions: Tensor, size: int) -> Tensor:
    return (positions >= 0) & (positions < size)
