"""CIFAR-10 and CIFAR-100 in both official layouts, binary and Python pickle.

Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, technical report, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html describes the layouts.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustdyn.data.source import (
    DOWNLOAD_AGAIN,
    Download,
    Source,
    Split,
    check_count,
    check_labels,
    to_tensors,
)
from robustdyn.data.tensors import ImageTensors
from robustdyn.errors import DataFileError

SHAPE = (3, 32, 32)  # red, green, blue planes; rows from the top
PIXELS = 3 * 32 * 32

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (N, 3, 32, 32), labels (N,)


@dataclass(frozen=True)
class Layout:
    """File names of one layout, in the official order of the images."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    pickled: bool

    def paths(self, root: Path, splits: Sequence[Split]) -> list[Path]:
        """The files of ``splits`` under ``root``."""
        return [root / self.folder / name for split in splits for name in getattr(self, split)]

    def absent(self, root: Path, splits: Sequence[Split]) -> list[Path]:
        """Those that are not there."""
        return [path for path in self.paths(root, splits) if not path.is_file()]


@dataclass(frozen=True)
class Cifar(Source):
    """CIFAR-10 or CIFAR-100.

    Attributes:
        title: Name in messages.
        num_classes: Labels are 0 ... ``num_classes`` - 1.
        layouts: In order of preference.
        records: Official number of images in each file of a split.
        label_bytes: Bytes before the pixels of a binary record; the last of them is the label.
        label_key: Of the label list in a pickled dictionary.
        archive: Official archive, in the first layout.
    """

    title: str
    num_classes: int
    layouts: tuple[Layout, ...]
    records: dict[Split, int]
    label_bytes: int
    label_key: bytes
    archive: Download

    def missing(self, root: Path, splits: Sequence[Split]) -> str:
        """Empty if one layout is complete; files of two layouts are not mixed."""
        absent = [layout.absent(root, splits) for layout in self.layouts]
        return " or ".join(map(_names, absent)) if all(absent) else ""

    def downloads(self, root: Path, splits: Sequence[Split]) -> Sequence[Download]:
        """The one archive holds both splits."""
        return (self.archive,)

    def read(self, root: Path, splits: Sequence[Split], *, partial: bool) -> dict[Split, ImageTensors]:
        """See :meth:`Source.read`; where both layouts are complete the binary one is read."""
        layout = next(layout for layout in self.layouts if not layout.absent(root, splits))
        return {split: self._read_split(layout, root, split, partial=partial) for split in splits}

    def _read_split(self, layout: Layout, root: Path, split: Split, *, partial: bool) -> ImageTensors:
        read = self._read_pickle if layout.pickled else self._read_binary
        parts = []
        for path in layout.paths(root, [split]):
            images, labels = read(path, self.records[split])
            check_count(path, len(labels), self.records[split], partial=partial)
            check_labels(path, labels, 0, self.num_classes - 1)
            parts.append((images, labels))
        return to_tensors(
            np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
        )

    def _read_binary(self, path: Path, expected: int) -> Arrays:
        size = self.label_bytes + PIXELS
        try:
            content = np.fromfile(path, np.uint8)
        except OSError as error:
            raise DataFileError(f"{path}: cannot be read ({error.strerror or error})") from error
        if content.size % size:
            raise DataFileError(
                f"{path}: found {content.size:,} bytes, not a whole number of records of {size:,} bytes"
                f" (expected {expected:,} records); {DOWNLOAD_AGAIN}"
            )
        records = content.reshape(-1, size)
        labels = records[:, self.label_bytes - 1].astype(np.int64)
        return records[:, self.label_bytes :].reshape(-1, *SHAPE), labels

    def _read_pickle(self, path: Path, expected: int) -> Arrays:
        content = _load_restricted(path)
        pixels = content.get(b"data") if isinstance(content, dict) else None
        labels = content.get(self.label_key) if isinstance(content, dict) else None
        if not (
            isinstance(pixels, np.ndarray)
            and pixels.dtype == np.uint8
            and pixels.ndim == 2
            and pixels.shape[1] == PIXELS
            and isinstance(labels, list)
            and all(type(label) is int for label in labels)
            and len(labels) == len(pixels)
        ):
            raise DataFileError(
                f"{path}: expected a dictionary with uint8 data of shape ({expected}, {PIXELS}) and as many"
                f" {self.label_key.decode()}, found something else; {DOWNLOAD_AGAIN}"
            )
        return pixels.reshape(-1, *SHAPE), np.array(labels, dtype=np.int64)


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays out of plain containers and refuses every other global.

    A pickle is a program; what it can call is what ``find_class`` hands out. Nothing here has side effects.
    """

    allowed = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),  # NumPy 1 wrote the official files
            ("numpy._core.multiarray", "_reconstruct"),  # its name since NumPy 2
            (
                "_codecs",
                "encode",
            ),  # Python 3 writes bytes as encoded text in protocol 2
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _load_restricted(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataFileError(f"{path}: not a pickled array file, refused ({why}); {DOWNLOAD_AGAIN}") from error


def _names(paths: Sequence[Path]) -> str:
    """Files of one folder in one word, as a shell would take them."""
    names = ",".join(path.name for path in paths)
    return f"{paths[0].parent.name}/" + (f"{{{names}}}" if len(paths) > 1 else names)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

CIFAR10_FILES = Cifar(
    title="CIFAR-10",
    num_classes=10,
    layouts=(
        Layout(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in _BATCHES),
            ("test_batch.bin",),
            pickled=False,
        ),
        Layout("cifar-10-batches-py", _BATCHES, ("test_batch",), pickled=True),
    ),
    records={"train": 10_000, "test": 10_000},
    label_bytes=1,
    label_key=b"labels",
    archive=Download(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        known_hash="md5:c32a1d4ab5d03f1284b67883e8d87530",
        folder=".",
        unpack=True,
    ),
)

CIFAR100_FILES = Cifar(
    title="CIFAR-100",
    num_classes=100,
    layouts=(
        Layout("cifar-100-binary", ("train.bin",), ("test.bin",), pickled=False),
        Layout("cifar-100-python", ("train",), ("test",), pickled=True),
    ),
    records={"train": 50_000, "test": 10_000},
    label_bytes=2,  # coarse, then fine
    label_key=b"fine_labels",
    archive=Download(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        known_hash="md5:03b5dce01913d631647c71ecec9e9cb8",
        folder=".",
        unpack=True,
    ),
)
