"""SVHN, the cropped digits, in the official MATLAB files.

Netzer et al., *Reading Digits in Natural Images with Unsupervised Feature Learning*, NIPS Workshop on Deep
Learning and Unsupervised Feature Learning, 2011; http://ufldl.stanford.edu/housenumbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

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


@dataclass(frozen=True)
class Svhn(Source):
    """SVHN cropped digits; the files are in the root or in its folder ``svhn``.

    Attributes:
        title: Name in messages.
        num_classes: Labels are 0 ... 9, each the digit itself.
        files: The official file of each split.
        images: Official number of images of each split.
    """

    title: str
    num_classes: int
    files: dict[Split, Download]
    images: dict[Split, int]

    def missing(self, root: Path, splits: Sequence[Split]) -> str:
        """See ``Source.missing``."""
        absent = [self.files[split].name for split in splits if self._path(root, split) is None]
        return " and ".join(f"{name} or svhn/{name}" for name in absent)

    def downloads(self, root: Path, splits: Sequence[Split]) -> Sequence[Download]:
        """One file for each missing split."""
        return tuple(self.files[split] for split in splits if self._path(root, split) is None)

    def read(self, root: Path, splits: Sequence[Split], *, partial: bool) -> dict[Split, ImageTensors]:
        """See ``Source.read``."""
        paths = {split: self._path(root, split) for split in splits}
        return {split: self._read(path, split, partial=partial) for split, path in paths.items() if path}

    def _path(self, root: Path, split: Split) -> Path | None:
        name = self.files[split].name
        return next((path for path in (root / name, root / "svhn" / name) if path.is_file()), None)

    def _read(self, path: Path, split: Split, *, partial: bool) -> ImageTensors:
        images, labels = _load_matlab(path)
        if not (
            images.dtype == np.uint8
            and images.ndim == 4
            and images.shape[:3] == (32, 32, 3)
            and labels.dtype.kind in "iu"
            and labels.shape == (images.shape[3], 1)
        ):
            raise DataFileError(
                f"{path}: expected X uint8 (32, 32, 3, N) and y integer (N, 1), found X {images.dtype}"
                f" {images.shape} and y {labels.dtype} {labels.shape}; {DOWNLOAD_AGAIN}"
            )
        digits = labels[:, 0].astype(np.int64)
        check_count(path, len(digits), self.images[split], partial=partial)
        check_labels(path, digits, 1, 10)  # the file writes the digit 0 as 10
        return to_tensors(images.transpose(3, 2, 0, 1), digits % 10)


def _load_matlab(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        variables = loadmat(path, variable_names=("X", "y"))
        return np.asarray(variables["X"]), np.asarray(variables["y"])
    except Exception as error:  # a damaged file can raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise DataFileError(f"{path}: not a MATLAB file with X and y ({why}); {DOWNLOAD_AGAIN}") from error


SVHN_FILES = Svhn(
    title="SVHN",
    num_classes=10,
    files={
        "train": Download(
            url="http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
            known_hash="md5:e26dedcc434d2e4c54c9b2d4a06d8373",
            folder="svhn",
            unpack=False,
        ),
        "test": Download(
            url="http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
            known_hash="md5:eb5a983be6a315427106f1b164d9cef3",
            folder="svhn",
            unpack=False,
        ),
    },
    images={"train": 73_257, "test": 26_032},
)
