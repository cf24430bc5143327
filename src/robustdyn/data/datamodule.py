"""Lightning data modules: splits on the training device, batches by indexing.

Every split is one uint8 tensor on the device that trains; there are no workers, no per-image Python and no
copies between devices while training runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule

from robustdyn.data.augmentation import Augmentation
from robustdyn.data.mixup import Mixup
from robustdyn.data.splits import hold_out
from robustdyn.data.tensors import Batch, ImageTensors, ShuffledBatches, TensorBatches
from robustdyn.errors import ConfigError
from robustdyn.streams import generator


class ImageDataModule(LightningDataModule):
    """Train, validation and test images of one data set.

    Subclasses define where the images come from (``read``). Without a trainer the module works as well, with
    one process, on the CPU and in epoch 0.

    Attributes:
        num_classes: K.
        channels: C.
        image_size: H = W, in pixels.
        mean: Of each channel over the training images, in [0, 1]; for the model, which normalises.
        std: Standard deviation of each channel over the training images.
    """

    title: ClassVar[str]
    classes: ClassVar[int]
    """Number of classes of the data set, for comparison with the setting ``num_classes``."""

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        eval_batch_size: int,
        train_size: int | None,
        validation_size: int,
        test_size: int | None,
        split_seed: int,
        augment: Mapping[str, Any] | None,
        mixup: float,
        seed: int,
    ) -> None:
        """Checks the settings; reads nothing.

        Args:
            num_classes: K; checked against the data.
            channels: C; checked against the data.
            image_size: H = W; checked against the data.
            mean: Of each channel, in [0, 1]; not applied here.
            std: Of each channel; not applied here.
            batch_size: Training images of a step over all ranks together.
            eval_batch_size: Validation or test images of a step over all ranks together.
            train_size: Training images to keep, class-balanced and drawn by ``split_seed``; a smaller number
                keeps a part of what a larger one keeps. None for all.
            validation_size: Images held out of the training set, class-balanced and drawn by ``split_seed``,
                before ``train_size`` is applied; 0 for no validation set.
            test_size: Test images to keep, class-balanced and drawn by ``split_seed``; None for all.
            split_seed: Seed of the splits, apart from ``seed`` so that runs with several seeds share them.
            augment: Attributes of ``Augmentation``; None for none.
            mixup: α of ``Mixup``, which mixes training batches; 0 for none.
            seed: The run's seed: order, augmentation and mixing of the training images.

        Raises:
            ConfigError: A value that cannot work, naming its key.
        """
        super().__init__()
        self.num_classes = num_classes
        self.channels = channels
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self.eval_batch_size = whole_number("eval_batch_size", eval_batch_size, least=1)
        self.train_size = None if train_size is None else whole_number("train_size", train_size, least=1)
        self.validation_size = whole_number("validation_size", validation_size, least=0)
        self.test_size = None if test_size is None else whole_number("test_size", test_size, least=1)
        self.split_seed = split_seed
        self.augmentation = None if augment is None else Augmentation.from_config(augment)
        self.mixup = Mixup(mixup, num_classes) if mixup else None
        self.seed = seed
        self._splits: dict[str, ImageTensors] = {}
        self._check_constants()

    def read(self) -> tuple[ImageTensors, ImageTensors]:
        """The training and the test images, on the CPU; subclasses define where they come from."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the images once and puts them on the trainer's device; ``stage`` does not matter.

        Raises:
            ConfigError: A setting does not fit the data or the number of devices.
            DataFileError: The files are not there or not what they should be.
        """
        if not self._splits:
            self._splits = self._split(*self.read())
        self._check_batches()
        self._splits = {name: data.to(self._device) for name, data in self._splits.items()}

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """Names of what ``val_dataloader`` returns, in its order."""
        return ("validation", "test") if self.validation_size else ("test",)

    def split(self, name: str) -> ImageTensors:
        """All images of ``"train"``, ``"validation"`` or ``"test"``, un-augmented.

        Raises:
            ConfigError: There is no such split.
        """
        if not self._splits:
            self.setup()
        if name not in self._splits:
            raise ConfigError(
                f"data.validation_size={self.validation_size}: there is no {name} split, only"
                f" {', '.join(self._splits)}"
            )
        return self._splits[name]

    def measurement_subset(self, n: int, seed: int) -> Batch:
        """Some training images, un-augmented, for measurements.

        A simple random sample without replacement, not balanced: sums over it estimate sums over the training
        set without bias, and so do variances. A smaller ``n`` gives the first of a larger one.

        Args:
            n: Number of images.
            seed: Of the draw.

        Returns:
            Images float32 (n, C, H, W) in [0, 1], labels and positions in the training split, on its device.

        Raises:
            ConfigError: The training split has fewer images.
        """
        train = self.split("train")
        if not 1 <= n <= len(train):
            raise ConfigError(f"measure.examples={n} must be between 1 and the {len(train)} training images")
        return train.batch(torch.randperm(len(train), generator=generator(seed, "measurement"))[:n])

    def train_dataloader(self) -> ShuffledBatches:
        """Shuffled, augmented and mixed batches; asks the trainer for the epoch."""
        return ShuffledBatches(
            self.split("train"),
            self.batch_size,
            rank=self._rank,
            world_size=self._world_size,
            seed=self.seed,
            epoch=self._epoch,
            augmentation=self.augmentation,
            mixup=self.mixup,
        )

    def val_dataloader(self) -> list[TensorBatches]:
        """One loader for each of ``evaluation_splits``."""
        return [self._evaluation_loader(name) for name in self.evaluation_splits]

    def test_dataloader(self) -> TensorBatches:
        """The test images in their order."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, name: str) -> TensorBatches:
        return TensorBatches(
            self.split(name), self.eval_batch_size, rank=self._rank, world_size=self._world_size
        )

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    def _split(self, train: ImageTensors, test: ImageTensors) -> dict[str, ImageTensors]:
        for data in (train, test):
            self._check_images(data)
        splits = {"test": test}
        left = ""
        if self.validation_size:
            leave_one("validation_size", self.validation_size, len(train))
            train, splits["validation"] = self.hold_out("validation_size", train)
            left = f" left by data.validation_size={self.validation_size}"
        if self.train_size is not None:
            at_most(len(train), "train_size", self.train_size, f"training images{left}")
            _, train = self.hold_out("train_size", train)
        return {"train": train, **splits}

    def hold_out(self, key: str, data: ImageTensors) -> tuple[ImageTensors, ImageTensors]:
        """Splits as many images off ``data`` as the setting ``key`` says: the rest and these."""
        return hold_out(data, getattr(self, key), seed=self.split_seed, stream=f"split-{key}")

    def _check_constants(self) -> None:
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ConfigError(
                    f"data.{key} has {len(values)} values; give one for each of data.channels={self.channels}"
                )
        if min(self.std) <= 0:
            raise ConfigError(f"data.std={list(self.std)} must be positive")
        for key in ("crop_padding", "cutout") if self.augmentation else ():
            if (pixels := getattr(self.augmentation, key)) >= self.image_size:
                raise ConfigError(
                    f"data.augment.{key}={pixels} must be smaller than the image, {self.image_size} pixels"
                )

    def _check_images(self, data: ImageTensors) -> None:
        channels, *size = data.images.shape[1:]
        if channels != self.channels:
            raise ConfigError(f"data.channels={self.channels}, but {self.title} images have {channels}")
        if size != [self.image_size] * 2:
            raise ConfigError(
                f"data.image_size={self.image_size}, but {self.title} images are {size[0]}x{size[1]}"
            )
        if self.num_classes != self.classes:
            raise ConfigError(f"data.num_classes={self.num_classes}, but {self.title} has {self.classes}")

    def _check_batches(self) -> None:
        train = len(self._splits["train"])
        at_most(train, "batch_size", self.batch_size, "training images")
        self._check_shares("batch_size", "train")
        for name in self.evaluation_splits:
            self._check_shares("eval_batch_size", name)

    def _check_shares(self, key: str, split: str) -> None:
        """Every rank must get an image of every batch: an empty batch has no mean loss."""
        size: int = getattr(self, key)
        ranks = self._world_size
        if size < ranks:
            raise ConfigError(f"data.{key}={size} is less than one image for each of {ranks} devices")
        last = len(self._splits[split]) % size
        if 0 < last < ranks:
            raise ConfigError(
                f"data.{key}={size} leaves {last} {split} images for {ranks} devices in the last batch;"
                " choose another size"
            )


def whole_number(key: str, value: object, *, least: int) -> int:
    """``value``, if it is an integer of at least ``least``.

    Raises:
        ConfigError: It is not, naming ``data.<key>``.
    """
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"data.{key}={value} must be a whole number of at least {least}")
    return value


def at_most(limit: int, key: str, value: int, what: str) -> None:
    """Refuses more than the ``limit`` images there are.

    Raises:
        ConfigError: Naming ``data.<key>``.
    """
    if value > limit:
        raise ConfigError(f"data.{key}={value} exceeds the {limit} {what}; choose at most {limit}")


def leave_one(key: str, value: int, total: int) -> None:
    """Refuses to hold out so many of ``total`` images that none is left.

    Raises:
        ConfigError: Naming ``data.<key>``.
    """
    if value >= total:
        raise ConfigError(
            f"data.{key}={value} leaves none of the {total} images to train on; choose at most {total - 1}"
        )
