"""What a data set in files must be able to do, and the checks that every reader makes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from robustdyn.data.tensors import ImageTensors
from robustdyn.errors import DataFileError

Split = Literal["train", "test"]

DOWNLOAD_AGAIN = "delete the file and set data.download=true, or put the official file in its place"


@dataclass(frozen=True)
class Download:
    """One official file on the web.

    Attributes:
        url: Where it is; the last part of the path is the name it is kept under.
        known_hash: Checksum of the complete file, ``"md5:<hex>"``.
        folder: Below the data root, where the file is kept.
        unpack: Whether it is a tar archive that has to be unpacked in its folder.
    """

    url: str
    known_hash: str
    folder: str
    unpack: bool

    @property
    def name(self) -> str:
        """File name."""
        return self.url.rsplit("/", 1)[-1]


class Source(ABC):
    """A data set in files under a root folder."""

    title: str
    num_classes: int
    archives: tuple[str, ...] = ()
    """Names under which the official files are handed on packed."""

    @abstractmethod
    def missing(self, root: Path, splits: Sequence[Split]) -> str:
        """The files of ``splits`` that are missing in ``root``; empty if all are there."""

    @abstractmethod
    def downloads(self, root: Path, splits: Sequence[Split]) -> Sequence[Download]:
        """The official files that hold what is missing of ``splits`` in ``root``."""

    @abstractmethod
    def read(self, root: Path, splits: Sequence[Split], *, partial: bool) -> dict[Split, ImageTensors]:
        """Reads ``splits``, of which no file is missing.

        Args:
            root: The data root.
            splits: Which to read.
            partial: Whether files may hold only the first so many of the official images.

        Raises:
            DataFileError: A file cannot be read or is not what it should be.
        """


def check_count(path: Path, found: int, expected: int, *, partial: bool) -> None:
    """Refuses a file without the official number of images, or with ``partial`` one that cannot be a part.

    Raises:
        DataFileError: Naming the file, what was found and expected, and the remedy.
    """
    if found == expected or (partial and 0 < found < expected):
        return
    remedy = DOWNLOAD_AGAIN
    if 0 < found < expected:
        remedy = f"set data.partial=true if you meant an excerpt, or {remedy}"
    raise DataFileError(f"{path}: found {found:,} images, expected {expected:,}; {remedy}")


def check_labels(path: Path, labels: NDArray[np.int64], first: int, last: int) -> None:
    """Refuses labels outside ``first`` ... ``last``.

    Raises:
        DataFileError: Naming the file and the first such label.
    """
    wrong = labels[(labels < first) | (labels > last)]
    if wrong.size:
        raise DataFileError(f"{path}: found label {wrong[0]}, expected {first} to {last}; {DOWNLOAD_AGAIN}")


def to_tensors(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> ImageTensors:
    """uint8 (N, C, H, W) and int64 (N,) arrays as tensors, contiguous."""
    return ImageTensors(
        torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(np.ascontiguousarray(labels))
    )
