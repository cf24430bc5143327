"""Writes small data files in the official layouts, and returns their content."""

import io
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from scipy.io import savemat

from robustdyn.data import CIFAR10, CIFAR100, SVHN, Digits

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the excerpts of the official files are not here"
)

TRAIN_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, the form of the official pickles."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, data):
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes


def python2_pickle(content) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def random_images(count: int, num_classes: int, seed: int):
    draws = np.random.default_rng(seed)
    pixels = draws.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, draws.integers(0, num_classes, count, dtype=np.uint8)


def write_cifar10(root: Path, layout: str, counts=(7, 5, 6, 4, 8), test=9) -> None:
    folder = root / {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}[layout]
    folder.mkdir(parents=True)
    for number, (name, count) in enumerate(zip([*TRAIN_BATCHES, "test_batch"], [*counts, test], strict=True)):
        pixels, labels = random_images(count, 10, seed=number)
        if layout == "binary":
            np.concatenate([labels[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")
        else:
            content = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": pixels}
            (folder / name).write_bytes(python2_pickle(content))


def write_cifar100(root: Path, layout: str, train=23, test=11) -> None:
    folder = root / {"binary": "cifar-100-binary", "python": "cifar-100-python"}[layout]
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        pixels, fine = random_images(count, 100, seed=count)
        coarse = fine // 5
        if layout == "binary":
            np.concatenate([coarse[:, None], fine[:, None], pixels], axis=1).tofile(folder / f"{name}.bin")
        else:
            content = {b"coarse_labels": coarse.tolist(), b"fine_labels": fine.tolist(), b"data": pixels}
            (folder / name).write_bytes(python2_pickle(content))


def write_svhn(path: Path, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns X (32, 32, 3, N) and y (N, 1) as written: y in 1 ... 10."""
    draws = np.random.default_rng(seed)
    x = draws.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    y = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"X": x, "y": y})
    return x, y


COMMON = {
    "batch_size": 8,
    "eval_batch_size": 8,
    "train_size": None,
    "validation_size": 0,
    "test_size": None,
    "split_seed": 0,
    "augment": None,
    "mixup": 0.0,
    "seed": 0,
}
FILES = {"download": False, "partial": True, "test_from_train": None}
COLOUR = {"channels": 3, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
DIGITS = COMMON | {
    "num_classes": 10,
    "channels": 1,
    "image_size": 8,
    "mean": [0.5],
    "std": [0.5],
    "test_size": 540,
    "batch_size": 64,
}


def cifar10(root: Path, **changes):
    return CIFAR10(**(COMMON | FILES | COLOUR | {"root": str(root), "num_classes": 10} | changes))


def cifar100(root: Path, **changes):
    return CIFAR100(**(COMMON | FILES | COLOUR | {"root": str(root), "num_classes": 100} | changes))


def svhn(root: Path, **changes):
    return SVHN(**(COMMON | FILES | COLOUR | {"root": str(root), "num_classes": 10} | changes))


def digits(**changes):
    return Digits(**(DIGITS | changes))
