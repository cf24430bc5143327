"""The data sets: one small data module each."""

from pathlib import Path
from typing import Any, ClassVar

from robustdyn.data.cifar import CIFAR10_FILES, CIFAR100_FILES
from robustdyn.data.datamodule import ImageDataModule, at_most, leave_one, whole_number
from robustdyn.data.digits import read_digits
from robustdyn.data.fetch import ensure_files
from robustdyn.data.source import Source, Split
from robustdyn.data.svhn import SVHN_FILES
from robustdyn.data.tensors import ImageTensors
from robustdyn.errors import ConfigError


class Digits(ImageDataModule):
    """scikit-learn's handwritten digits; ``test_size`` of the 1,797 images become the test set."""

    title = "digits"
    classes = 10

    def read(self) -> tuple[ImageTensors, ImageTensors]:
        """See ``ImageDataModule.read``; class-balanced, drawn by ``split_seed``."""
        images = read_digits()
        if self.test_size is None:
            raise ConfigError("data.test_size=null, but digits has no test set; say how many to hold out")
        leave_one("test_size", self.test_size, len(images))
        return self.hold_out("test_size", images)


class ImageFiles(ImageDataModule):
    """A data set in official files; subclasses name the ``Source``."""

    source: ClassVar[Source]

    def __init__(
        self, *, root: str, download: bool, partial: bool, test_from_train: int | None, **common: Any
    ) -> None:
        """Checks the settings; reads nothing.

        Args:
            root: Folder of the official folders or files.
            download: Whether missing files may be downloaded.
            partial: Whether files may hold only the first so many of the official images.
            test_from_train: The last so many images of the training files become the test set, in place of
                the test file, for excerpts that have none; None for the test file.
            **common: Settings of ``ImageDataModule``.

        Raises:
            ConfigError: A value that cannot work, naming its key.
        """
        super().__init__(**common)
        self.root = Path(root).expanduser().absolute()
        self.download = download
        self.partial = partial
        self.test_from_train = (
            None if test_from_train is None else whole_number("test_from_train", test_from_train, least=1)
        )

    @property
    def file_splits(self) -> tuple[Split, ...]:
        """Splits whose files are needed."""
        return ("train", "test") if self.test_from_train is None else ("train",)

    def prepare_data(self) -> None:
        """Downloads missing files; Lightning calls it in one process of each machine, before ``setup``.

        Raises:
            DataFileError: Files are missing and cannot or may not be downloaded.
        """
        ensure_files(self.source, self.root, self.file_splits, download=self.download)

    def read(self) -> tuple[ImageTensors, ImageTensors]:
        """See ``ImageDataModule.read``."""
        self.prepare_data()  # did its work already under a trainer; a notebook may call setup alone
        files = self.source.read(self.root, self.file_splits, partial=self.partial)
        train, test = files["train"], files.get("test")
        if test is None:
            train, test = self._last_of(train)
        if self.test_size is not None:
            at_most(len(test), "test_size", self.test_size, "test images")
            _, test = self.hold_out("test_size", test)
        return train, test

    def _last_of(self, train: ImageTensors) -> tuple[ImageTensors, ImageTensors]:
        count = self.test_from_train or 0
        leave_one("test_from_train", count, len(train))
        border = len(train) - count
        return (
            ImageTensors(train.images[:border], train.labels[:border]),
            ImageTensors(train.images[border:], train.labels[border:]),
        )


class CIFAR10(ImageFiles):
    """CIFAR-10, in the binary or the pickled layout."""

    source = CIFAR10_FILES
    title = source.title
    classes = source.num_classes


class CIFAR100(ImageFiles):
    """CIFAR-100 with its 100 fine labels, in the binary or the pickled layout."""

    source = CIFAR100_FILES
    title = source.title
    classes = source.num_classes


class SVHN(ImageFiles):
    """SVHN, cropped digits."""

    source = SVHN_FILES
    title = source.title
    classes = source.num_classes
