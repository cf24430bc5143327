"""Data sets as Lightning data modules, and the tensors and batches that they provide.

``conf/data`` names ``Digits``, ``CIFAR10``, ``CIFAR100`` and ``SVHN``, and has their defaults. ``NpzFile``,
``ImageFolder`` and ``TorchDataset`` read the user's own images.
"""

from robustdyn.data.augmentation import Augmentation
from robustdyn.data.datamodule import ImageDataModule
from robustdyn.data.datasets import CIFAR10, CIFAR100, SVHN, Digits, ImageFiles
from robustdyn.data.mixup import Mixup
from robustdyn.data.own import ImageFolder, NpzFile, OwnImages, TorchDataset
from robustdyn.data.tensors import Batch, ImageTensors, Part, ShuffledBatches, TensorBatches

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "SVHN",
    "Augmentation",
    "Batch",
    "Digits",
    "ImageDataModule",
    "ImageFiles",
    "ImageFolder",
    "ImageTensors",
    "Mixup",
    "NpzFile",
    "OwnImages",
    "Part",
    "ShuffledBatches",
    "TensorBatches",
    "TorchDataset",
]
