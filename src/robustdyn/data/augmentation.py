"""Random crop, flip and cutout of whole batches.

Legend: N images of a split, B images of a batch, C channels, H and W rows and columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Generator, Tensor

from robustdyn.errors import ConfigError

PADDING_MODES = ("reflect", "zeros")


@dataclass(frozen=True)
class Augmentation:
    """Pad, cut a window of the original size, mirror, blacken a square.

    Attributes:
        crop_padding: Pixels added on every side before the crop; 0 for no crop.
        padding_mode: ``"reflect"`` (mirrored, the border pixel not repeated) or ``"zeros"`` (black).
        flip: Whether to mirror half of the images left to right.
        cutout: Side in pixels of the black square, wholly inside the image and uniformly placed (DeVries &
            Taylor, arXiv 1708.04552, whose square may hang over the border; inside as in Rice et al., ICML
            2020, code); 0 for none.
    """

    crop_padding: int
    padding_mode: str
    flip: bool
    cutout: int

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ConfigError(f"data.augment.crop_padding={self.crop_padding} must be at least 0")
        if self.padding_mode not in PADDING_MODES:
            raise ConfigError(
                f"data.augment.padding_mode={self.padding_mode} is not known;"
                f" choose one of {', '.join(PADDING_MODES)}"
            )
        if not isinstance(self.cutout, int) or self.cutout < 0:
            raise ConfigError(f"data.augment.cutout={self.cutout} must be a whole number of at least 0")

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

    def draw(self, count: int, size: Sequence[int], generator: Generator) -> Tensor:
        """Random choices for ``count`` images of ``size`` (H, W), on the generator's device.

        Returns:
            int64, (count, 5): first row and first column of the window in the padded image
            (0 ... 2 * ``crop_padding``), whether it is mirrored (0 or 1), first row and first column of the
            black square in the mirrored window (0 ... H - ``cutout`` and 0 ... W - ``cutout``).
        """

        def uniform(values: int, columns: int) -> Tensor:
            return torch.randint(values, (count, columns), generator=generator, device=generator.device)

        corners, flips = uniform(2 * self.crop_padding + 1, 2), uniform(2, 1)
        if not self.flip:
            flips.zero_()
        if not self.cutout:
            return torch.cat([corners, flips, torch.zeros_like(corners)], dim=1)
        # drawn last: windows and flips are the same with and without a square
        squares = [uniform(length - self.cutout + 1, 1) for length in size]
        return torch.cat([corners, flips, *squares], dim=1)

    def apply(self, images: Tensor, indices: Tensor, choices: Tensor) -> Tensor:
        """Augmented copies of some images of a split, in one gather.

        Args:
            images: (N, C, H, W), any dtype.
            indices: int64, (B,), which of them, on the same device.
            choices: int64, (B, 5), from ``draw``, on any device.

        Returns:
            (B, C, H, W), dtype and device of ``images``.
        """
        height, width = images.shape[-2:]
        places = choices.to(images.device, non_blocking=True).T.unsqueeze(2)
        top, left, flip, square_top, square_left = places  # each (B, 1)
        row = torch.arange(height, device=images.device)
        column = torch.arange(width, device=images.device)
        rows = top + row - self.crop_padding  # (B, H)
        columns = left + column - self.crop_padding  # (B, W)
        columns = torch.where(flip.bool(), columns.flip(1), columns)
        window = images[
            indices[:, None, None, None],
            torch.arange(images.shape[1], device=images.device)[:, None, None],
            self._inside(rows, height)[:, None, :, None],
            self._inside(columns, width)[:, None, None, :],
        ]
        if self.padding_mode == "zeros":
            window *= _rectangle(rows, height, columns, width)
        if self.cutout:
            square = _rectangle(row - square_top, self.cutout, column - square_left, self.cutout)
            window.masked_fill_(square, 0)
        return window

    def _inside(self, positions: Tensor, size: int) -> Tensor:
        """The pixel of the image that a position of the padded image shows (any pixel where it is black)."""
        if self.padding_mode == "zeros":
            return positions.clamp(0, size - 1)
        return size - 1 - (size - 1 - positions.abs()).abs()


def _rectangle(rows: Tensor, height: int, columns: Tensor, width: int) -> Tensor:
    """bool, (B, 1, H, W): where 0 <= ``rows`` (B, H) < ``height``, and the same for the columns (B, W)."""
    inside_rows, inside_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    return inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
