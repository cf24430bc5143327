"""The user's own images: arrays in an ``.npz`` file, a folder of image files, or any torch ``Dataset``.

All of them are read into memory as uint8, as the built-in data sets are. Legend: N images, C channels, H = W
rows and columns, K classes.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustdyn.data.datamodule import ImageDataModule, at_most, leave_one
from robustdyn.data.source import to_tensors
from robustdyn.data.tensors import ImageTensors
from robustdyn.errors import ConfigError, DataFileError

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
"""Pillow's names of the image formats that are read; none of them needs another program."""


class OwnImages(ImageDataModule):
    """Images whose number of classes, channels and size the user states; subclasses define ``load``.

    Without test images, ``test_size`` of the training images become the test set.
    """

    where: str
    """The file or folder, for messages."""

    @abstractmethod
    def load(self) -> tuple[ImageTensors, ImageTensors | None]:
        """The training and the test images, on the CPU; None if there are no test images."""

    def read(self) -> tuple[ImageTensors, ImageTensors]:
        """See ``ImageDataModule.read``.

        Raises:
            ConfigError: The settings do not fit the images; the message gives those that do.
        """
        train, test = self.load()
        self._check_stated(train, test)
        if test is None:
            if self.test_size is None:
                raise ConfigError(
                    f"data.test_size=null, but {self.where} has no test images; say how many to hold out"
                )
            leave_one("test_size", self.test_size, len(train))
            return self.hold_out("test_size", train)
        if self.test_size is not None:
            at_most(len(test), "test_size", self.test_size, "test images")
            _, test = self.hold_out("test_size", test)
        return train, test

    def _check_stated(self, train: ImageTensors, test: ImageTensors | None) -> None:
        _, channels, height, width = train.images.shape
        if test is not None and test.images.shape[1:] != train.images.shape[1:]:
            raise DataFileError(
                f"{self.where}: training images are {_size(train)}, but test images are {_size(test)}; make "
                "them alike"
            )
        if height != width:
            raise DataFileError(f"{self.where}: images are {height}x{width}; crop or pad them to squares")
        labels = train.labels if test is None else torch.cat([train.labels, test.labels])
        if int(labels.min()) < 0:
            raise DataFileError(f"{self.where}: found label {int(labels.min())}; number the classes from 0")
        fits = {"num_classes": int(labels.max()) + 1, "channels": channels, "image_size": height}
        wrong = [key for key, value in fits.items() if getattr(self, key) != value]
        if not wrong:
            return
        remedy = [f"data.{key}={fits[key]}" for key in wrong]
        if "channels" in wrong:  # the model normalises each channel
            pixels = train.images.double().div(255).transpose(0, 1).flatten(1)
            for key, values in (("mean", pixels.mean(dim=1)), ("std", pixels.std(dim=1))):
                remedy.append(f"data.{key}=[{','.join(f'{value:.4g}' for value in values.tolist())}]")
        stated = " and ".join(f"data.{key}={getattr(self, key)}" for key in wrong)
        raise ConfigError(
            f"{stated} {'does' if len(wrong) == 1 else 'do'} not fit {self.where}, which has "
            f"{_size(train)} images of {fits['num_classes']} classes; give {' '.join(remedy)}"
        )

    def _check_images(self, data: ImageTensors) -> None:
        """Nothing: ``read`` has compared the images with the settings."""


class NpzFile(OwnImages):
    """Arrays in a file of ``numpy.savez``.

    ``train_images`` and ``test_images`` are (N, H, W), (N, C, H, W) or (N, H, W, C) with C = 1 or 3, uint8
    from 0 to 255 or floating point in [0, 1]. ``train_labels`` and ``test_labels`` are whole numbers from 0,
    (N,) or (N, 1). Without the arrays of the test set, ``test_size`` images are held out. MedMNIST's files
    have these names.
    """

    def __init__(self, *, path: str, **common: Any) -> None:
        """Checks the settings; reads nothing.

        Args:
            path: The file.
            **common: Settings of ``ImageDataModule``.

        Raises:
            ConfigError: A value that cannot work, naming its key.
        """
        super().__init__(**common)
        self.where = str(Path(path).expanduser().absolute())

    def load(self) -> tuple[ImageTensors, ImageTensors | None]:
        """See ``OwnImages.load``.

        Raises:
            DataFileError: The file is missing, damaged, or lacks an array.
        """
        path = Path(self.where)
        if not path.is_file():
            raise DataFileError(f"data.path={path}: no such file; write it with numpy.savez")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ARRAYS if name in file.files}
                found = ", ".join(file.files)
        except Exception as error:  # a damaged file can raise anything
            why = " ".join(str(error).split()) or type(error).__name__
            raise DataFileError(
                f"{path}: not an .npz file of plain arrays ({why}); write it again"
            ) from error
        for missing in (name for name in ARRAYS if name not in arrays):
            if missing.startswith("train") or missing.replace("labels", "images") in arrays:
                raise DataFileError(f"{path}: has no array {missing}, only {found}; name its arrays {ARRAYS}")
        train = labelled(arrays["train_images"], arrays["train_labels"], f"{path}: train_images")
        if "test_images" not in arrays:
            return train, None
        return train, labelled(arrays["test_images"], arrays["test_labels"], f"{path}: test_images")


class ImageFolder(OwnImages):
    """Image files in a folder for each class: ``ROOT/train/CLASS/*.png`` and ``ROOT/test/CLASS/*.png``.

    The classes are numbered in the order of their names. Without ``ROOT/train``, the folders of the classes
    are in ROOT itself and ``test_size`` images are held out. All images must have the same size; they are
    read as grey with ``channels=1`` and as RGB with ``channels=3``.
    """

    def __init__(self, *, root: str, **common: Any) -> None:
        """Checks the settings; reads nothing.

        Args:
            root: The folder.
            **common: Settings of ``ImageDataModule``.

        Raises:
            ConfigError: A value that cannot work, naming its key.
        """
        super().__init__(**common)
        self.where = str(Path(root).expanduser().absolute())
        if self.channels not in (1, 3):
            raise ConfigError(f"data.channels={self.channels} must be 1 (grey) or 3 (RGB) for image files")

    def load(self) -> tuple[ImageTensors, ImageTensors | None]:
        """See ``OwnImages.load``.

        Raises:
            DataFileError: A folder is missing or empty, or a file cannot be read.
        """
        root = Path(self.where)
        if not root.is_dir():
            raise DataFileError(f"data.root={root}: no such folder; give the one with train/ and test/")
        if not (root / "train").is_dir():
            return self._files(root, _classes(root)), None
        names = _classes(root / "train")
        train = self._files(root / "train", names)
        if not (root / "test").is_dir():
            return train, None
        unknown = sorted({*_classes(root / "test")} - {*names})
        if unknown:
            raise DataFileError(f"{root / 'test'}: class {unknown[0]} has no folder in {root / 'train'}")
        return train, self._files(root / "test", names)

    def _files(self, folder: Path, names: Sequence[str]) -> ImageTensors:
        found = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((folder / name).glob("*"))
            if path.is_file() and not path.name.startswith(".")
        ]
        if not found:
            raise DataFileError(f"{folder}: no image in it; put images into {folder}/CLASS")
        images = [self._image(path) for path, _ in found]
        for (path, _), image in zip(found, images, strict=True):
            if image.shape != images[0].shape:
                raise DataFileError(
                    f"{path}: {image.shape[0]}x{image.shape[1]} pixels, but {found[0][0].name} has "
                    f"{images[0].shape[0]}x{images[0].shape[1]}; resize all images to one size"
                )
        pixels = np.stack(images)
        planes = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        return to_tensors(planes, np.array([label for _, label in found], dtype=np.int64))

    def _image(self, path: Path) -> NDArray[np.uint8]:
        """Grey (H, W) or RGB (H, W, 3)."""
        from PIL import Image  # only here: nothing else reads image files

        try:
            with Image.open(path, formats=FORMATS) as image:
                return np.asarray(image.convert("L" if self.channels == 1 else "RGB"), dtype=np.uint8)
        except Exception as error:  # a damaged file can raise anything
            why = " ".join(str(error).split()) or type(error).__name__
            raise DataFileError(
                f"{path}: not an image that can be read ({why}); remove it or save it as PNG"
            ) from error


class TorchDataset(OwnImages):
    """Any ``torch.utils.data.Dataset`` of pairs (image, label), such as one of torchvision or your own.

    An image is a tensor or array (C, H, W), (H, W, C) or (H, W), uint8 or floating point in multiples of
    1/255, or a PIL image. A label is a whole number from 0. Leave out random augmentation and normalisation:
    every image is read once, and the network normalises.
    """

    def __init__(self, *, train: Callable[[], Any], test: Callable[[], Any] | None, **common: Any) -> None:
        """Checks the settings; reads nothing.

        Args:
            train: Makes the data set of the training images.
            test: Makes that of the test images; None to hold out ``test_size`` training images.
            **common: Settings of ``ImageDataModule``.

        Raises:
            ConfigError: A value that cannot work, naming its key.
        """
        super().__init__(**common)
        self.train, self.test = train, test
        self.where = str(getattr(train, "func", train).__name__)

    def load(self) -> tuple[ImageTensors, ImageTensors | None]:
        """See ``OwnImages.load``."""
        test = None if self.test is None else _read_all(self.test(), "data.test")
        return _read_all(self.train(), "data.train"), test


def labelled(images: NDArray[Any], labels: NDArray[Any], where: str) -> ImageTensors:
    """Checked images and labels; a layout with the channels last is transposed.

    Args:
        images: (N, H, W), (N, C, H, W) or (N, H, W, C), C = 1 or 3, uint8 or floating point in [0, 1].
        labels: Whole numbers, (N,) or (N, 1).
        where: Begins the messages.

    Raises:
        DataFileError: They are of another kind.
    """
    labels = labels.reshape(-1) if labels.shape[1:] in ((), (1,)) else labels
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise DataFileError(
            f"{where} have shape {images.shape}; make it (N, H, W), (N, C, H, W) or (N, H, W, C), C = 1 or 3"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataFileError(
            f"{where}: {len(images)} images but labels {labels.dtype} {labels.shape}; give one whole number "
            "for each"
        )
    if images.dtype.kind == "f":
        levels = np.rint(images.astype(np.float32) * 255)
        # even float16 represents multiples of 1/255 to a sixteenth of a level
        whole = bool((np.abs(images.astype(np.float32) * 255 - levels) < 0.1).all())
        if not (whole and levels.min() >= 0 and levels.max() <= 255):
            raise DataFileError(
                f"{where} are floating-point numbers that are not multiples of 1/255 in [0, 1]; leave out "
                "normalisation, or store them as uint8 from 0 to 255"
            )
        images = levels.astype(np.uint8)
    if images.dtype != np.uint8:
        raise DataFileError(f"{where} are {images.dtype}; store them as uint8 from 0 to 255")
    return to_tensors(images, labels.astype(np.int64))


def _size(data: ImageTensors) -> str:
    return "x".join(map(str, data.images.shape[1:]))


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_all(dataset: Any, key: str) -> ImageTensors:
    if not hasattr(dataset, "__len__"):
        raise ConfigError(f"{key}: {type(dataset).__name__} has no length; give a map-style Dataset")
    pairs: Iterable[Any] = (dataset[index] for index in range(len(dataset)))
    images, labels = [], []
    for image, label in pairs:
        images.append(np.asarray(image))
        labels.append(int(label))
    if not images:
        raise ConfigError(f"{key}: {type(dataset).__name__} is empty; give one with images")
    return labelled(np.stack(images), np.array(labels), key)
