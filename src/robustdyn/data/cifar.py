"""CIFAR-10 and CIFAR-100 in both official layouts, binary and Python pickle.

Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, technical report, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html describes the layouts.
"""

import pickle
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

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

LabelledArrays = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (N, 3, 32, 32), labels (N,)


@dataclass(frozen=True)
class ArchiveLayout:
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
        label_key: Of the labels in a pickled dictionary.
        archive: Official archive, in the first layout.
        archives: Names of the official archives of all layouts.
    """

    title: str
    num_classes: int
    layouts: tuple[ArchiveLayout, ...]
    records: dict[Split, int]
    label_bytes: int
    label_key: str
    archive: Download
    archives: tuple[str, ...]

    def missing(self, root: Path, splits: Sequence[Split]) -> str:
        """Empty if one layout is complete; files of two layouts are not mixed."""
        absent = [layout.absent(root, splits) for layout in self.layouts]
        return " or ".join(map(_names, absent)) if all(absent) else ""

    def downloads(self, root: Path, splits: Sequence[Split]) -> Sequence[Download]:
        """The one archive holds both splits."""
        return (self.archive,)

    def read(self, root: Path, splits: Sequence[Split], *, partial: bool) -> dict[Split, ImageTensors]:
        """See ``Source.read``; of complete layouts the first that can be read, with a warning."""
        damaged: DataFileError | None = None
        for layout in self.layouts:
            if layout.absent(root, splits):
                continue
            try:
                found = {split: self._read_split(layout, root, split, partial=partial) for split in splits}
            except DataFileError as error:
                damaged = damaged or error
                continue
            if damaged is not None:
                warnings.warn(f"{damaged}; {root / layout.folder} is read instead", stacklevel=2)
            return found
        assert damaged is not None  # a layout is there
        raise damaged

    def _read_split(self, layout: ArchiveLayout, root: Path, split: Split, *, partial: bool) -> ImageTensors:
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

    def _read_binary(self, path: Path, expected: int) -> LabelledArrays:
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

    def _read_pickle(self, path: Path, expected: int) -> LabelledArrays:
        content = _load_inert(path)
        pixels, labels = (_array(_entry(content, key)) for key in ("data", self.label_key))
        if not (
            pixels is not None
            and pixels.dtype == np.uint8
            and pixels.ndim == 2
            and pixels.shape[1] == PIXELS
            and labels is not None
            and labels.shape == (len(pixels),)
        ):
            raise DataFileError(
                f"{path}: expected a dictionary with uint8 data of shape ({expected}, {PIXELS}) and as many"
                f" {self.label_key}, found something else; {DOWNLOAD_AGAIN}"
            )
        check_labels(path, labels, 0, self.num_classes - 1)
        return pixels.reshape(-1, *SHAPE), labels.astype(np.int64)


class _Inert:
    """What a pickle requested: its arguments and state, with which nothing is done."""

    arguments: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *arguments: Any) -> Self:
        token = super().__new__(cls)
        token.arguments = arguments
        return token

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Class(_Inert):
    """``numpy.ndarray``, which is only named."""


class _Dtype(_Inert):
    """(name, ...); state (version, byte order, ...)."""


class _Reconstruct(_Inert):
    """State (version, shape, dtype, in Fortran's order, content)."""


class _FromBuffer(_Inert):
    """(content, dtype, shape, order)."""


class _Scalar(_Inert):
    """(dtype, content)."""


class _Encode(_Inert):
    """Bytes that Python 3 wrote as encoded text, in protocols below 3."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it asks for text in {encoding}")
        return text.encode("latin1")


_TOKENS: dict[str, type[_Inert]] = {
    "numpy.ndarray": _Class,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _Encode,
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 wrote the official files; its name since NumPy 2
    _TOKENS |= {
        f"{_core}.multiarray._reconstruct": _Reconstruct,
        f"{_core}.multiarray.scalar": _Scalar,
        f"{_core}.numeric._frombuffer": _FromBuffer,  # protocol 5
    }


class _InertUnpickler(pickle.Unpickler):
    """Reads plain containers, returns tokens for what NumPy's arrays need and refuses every other global.

    A pickle is a program that can call whatever ``find_class`` returns. NumPy's own functions would let it
    make arrays of objects out of any bytes, which crash the interpreter.
    """

    def find_class(self, module: str, name: str) -> type[_Inert]:
        try:
            return _TOKENS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _load_inert(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return _InertUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataFileError(f"{path}: not a pickled array file, refused ({why}); {DOWNLOAD_AGAIN}") from error


def _entry(content: object, key: str) -> object:
    """Python 2 wrote its keys as bytes."""
    return content.get(key.encode(), content.get(key)) if isinstance(content, dict) else None


def _array(told: object) -> NDArray[Any] | None:
    """The array of whole numbers that was pickled, as one or as a list; None for anything else."""
    content: Any
    dtype: Any
    shape: Any
    order: Any
    try:
        if isinstance(told, list):
            numbers: list[Any] = [_array(item) if isinstance(item, _Scalar) else item for item in told]
            if not all(type(number) is int or isinstance(number, np.ndarray) for number in numbers):
                return None
            return np.array([int(number) for number in numbers], dtype=np.int64)
        if isinstance(told, _Scalar):
            dtype, content = told.arguments
            shape, order = (), "C"
        elif isinstance(told, _FromBuffer):
            content, dtype, shape, order = told.arguments
        elif isinstance(told, _Reconstruct):
            _, shape, dtype, fortran, content = told.state
            order = "F" if fortran else "C"
        else:
            return None
        if not isinstance(content, bytes | bytearray):
            return None
        return np.frombuffer(content, _dtype(dtype)).reshape(shape, order=order)
    except (TypeError, ValueError, OverflowError, LookupError):
        return None


def _dtype(told: object) -> np.dtype[Any]:
    """Whole numbers alone.

    Raises:
        TypeError: Of anything else.
    """
    name = told.arguments[0] if isinstance(told, _Dtype) else None
    name = name.decode() if isinstance(name, bytes) else name
    if not isinstance(name, str) or not isinstance(told, _Dtype) or not re.fullmatch("[iu][1248]", name):
        raise TypeError(name)
    order: Any = told.state[1]
    order = order.decode() if isinstance(order, bytes) else order
    return np.dtype(name).newbyteorder(order)


def _names(paths: Sequence[Path]) -> str:
    """Files of one folder in one word, as a shell would take them."""
    names = ",".join(path.name for path in paths)
    return f"{paths[0].parent.name}/" + (f"{{{names}}}" if len(paths) > 1 else names)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

CIFAR10_FILES = Cifar(
    title="CIFAR-10",
    num_classes=10,
    layouts=(
        ArchiveLayout(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in _BATCHES),
            ("test_batch.bin",),
            pickled=False,
        ),
        ArchiveLayout("cifar-10-batches-py", _BATCHES, ("test_batch",), pickled=True),
    ),
    records={"train": 10_000, "test": 10_000},
    label_bytes=1,
    label_key="labels",
    archive=Download(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        known_hash="md5:c32a1d4ab5d03f1284b67883e8d87530",
        folder=".",
        unpack=True,
    ),
    archives=("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"),
)

CIFAR100_FILES = Cifar(
    title="CIFAR-100",
    num_classes=100,
    layouts=(
        ArchiveLayout("cifar-100-binary", ("train.bin",), ("test.bin",), pickled=False),
        ArchiveLayout("cifar-100-python", ("train",), ("test",), pickled=True),
    ),
    records={"train": 50_000, "test": 10_000},
    label_bytes=2,  # coarse, then fine
    label_key="fine_labels",
    archive=Download(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        known_hash="md5:03b5dce01913d631647c71ecec9e9cb8",
        folder=".",
        unpack=True,
    ),
    archives=("cifar-100-binary.tar.gz", "cifar-100-python.tar.gz"),
)
