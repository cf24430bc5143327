"""Images as tensors and the loaders that cut them into batches.

Legend: N images of a split, B images of a batch, C channels, H and W rows and columns.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from robustdyn.data.augmentation import Augmentation
from robustdyn.data.mixup import Mixup
from robustdyn.streams import generator, stream_seed


class Batch(NamedTuple):
    """One batch, on the device of its split."""

    images: Tensor
    """float32, (B, C, H, W), in [0, 1]; not normalised, the model does that."""
    targets: Tensor
    """What to learn: classes, int64, (B,); or, where images are mixed, probabilities, float32, (B, K)."""
    indices: Tensor
    """int64, (B,), positions in the split; for mixed images the position of the first of the two."""


@dataclass(frozen=True, eq=False)
class ImageTensors:
    """A labelled set of images.

    Attributes:
        images: uint8, (N, C, H, W).
        labels: int64, (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Self:
        """The same set on ``device``."""
        return type(self)(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> Self:
        """The images at ``indices`` (int64, any length), in that order."""
        return type(self)(self.images[indices], self.labels[indices])

    def digest(self) -> str:
        """SHA-256 of the images and labels, in hexadecimal digits."""
        content = self.images.cpu().numpy().tobytes() + self.labels.cpu().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()

    def batch(self, indices: Tensor) -> Batch:
        """The images at ``indices`` (int64, (B,)) as a batch, un-augmented."""
        indices = indices.to(self.labels.device)
        return Batch(to_unit(self.images[indices]), self.labels[indices], indices)


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 as float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def share(count: int, rank: int, world_size: int) -> slice:
    """The contiguous part of ``count`` items of ``rank``; the parts differ by at most one item."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


class Part(NamedTuple):
    """What a rank has of a batch."""

    places: slice
    """In the whole batch."""
    whole: int
    """Images of the whole batch, over all ranks."""


class TensorBatches:
    """A split in its own order, cut into batches; the last may be short. A rank gets its share of each.

    Not a torch ``DataLoader``: nothing to wait for, and Lightning injects no ``DistributedSampler``, which
    would repeat images to make the ranks even.
    """

    def __init__(self, data: ImageTensors, batch_size: int, *, rank: int, world_size: int) -> None:
        """Holds on to ``data``, copies nothing.

        Args:
            data: The split, on the device that the batches are wanted on.
            batch_size: Images of a batch over all ranks together.
            rank: Of this process, 0 ... world_size - 1.
            world_size: Number of processes.
        """
        self.data = data
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Batches in an epoch, the same on every rank."""
        return -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.arange(len(self.data), device=self.data.labels.device)
        for batch in order.split(self.batch_size):
            yield self.data.batch(batch[self._share(batch)])

    def part(self, number: int) -> Part:
        """This rank's part of batch ``number`` of an epoch."""
        whole = min(self.batch_size, len(self.data) - number * self.batch_size)
        return Part(share(whole, self.rank, self.world_size), whole)

    def _share(self, batch: Tensor) -> slice:
        return share(len(batch), self.rank, self.world_size)


class ShuffledBatches(TensorBatches):
    """A split in a new random order every epoch, augmented; what is drawn depends on (seed, epoch) alone.

    Permutation, augmentation and mixing are drawn on the CPU and for the whole batch before a rank takes its
    share, so the union over ranks is the batch of a single process, bit for bit, on any device. A partner to
    mix with may belong to another rank; every rank holds all images.
    """

    def __init__(
        self,
        data: ImageTensors,
        batch_size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        epoch: Callable[[], int],
        augmentation: Augmentation | None,
        mixup: Mixup | None,
    ) -> None:
        """Holds on to ``data``, copies nothing.

        Args:
            data: The split, on the device that the batches are wanted on.
            batch_size: Images of a batch over all ranks together.
            rank: Of this process, 0 ... world_size - 1.
            world_size: Number of processes.
            seed: The run's seed.
            epoch: Asked when the first batch of an epoch is fetched, not when the iterator is made: Lightning
                makes the first iterator before it has restored the epoch of a resumed run.
            augmentation: None for none.
            mixup: Mixes the augmented images of a batch; None for none.
        """
        super().__init__(data, batch_size, rank=rank, world_size=world_size)
        self.seed = seed
        self.epoch = epoch
        self.augmentation = augmentation
        self.mixup = mixup
        self._position = {"epoch": -1, "batches": 0}  # what was handed out so far
        self._resume_at = self._position

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that nothing below runs before the first batch is requested (see ``epoch``).
        epoch = self.epoch()
        order = torch.randperm(len(self.data), generator=generator(self.seed, "shuffle", epoch))
        order = order.to(self.data.labels.device)
        first = self._resume_at["batches"] if epoch == self._resume_at["epoch"] else 0
        for number, batch in enumerate(order.split(self.batch_size)):
            if number >= first:
                self._position = {"epoch": epoch, "batches": number + 1}
                yield self._training_batch(batch, epoch, number)

    def _training_batch(self, batch: Tensor, epoch: int, number: int) -> Batch:
        augmented = self._augmented(batch, epoch, number)
        mine = self._share(batch)
        if self.mixup is None:
            return augmented(mine)
        weight, partners = self.mixup.draw(len(batch), stream_seed(self.seed, "mixup", epoch, number))
        first, second = augmented(mine), augmented(partners[mine])
        return Batch(
            self.mixup.images(first.images, second.images, weight),
            self.mixup.targets(first.targets, second.targets, weight),
            first.indices,
        )

    def _augmented(self, batch: Tensor, epoch: int, number: int) -> Callable[[slice | Tensor], Batch]:
        """Returns the images at any places of ``batch`` (int64, (B,)), each with its own augmentation."""
        augmentation, data = self.augmentation, self.data

        def chosen(places: slice | Tensor) -> Tensor:
            # an index on the CPU would be moved to the GPU by a copy for which the host waits
            on_device = places if isinstance(places, slice) else places.to(batch.device, non_blocking=True)
            return batch[on_device]

        if augmentation is None:
            return lambda places: data.batch(chosen(places))
        draws = generator(self.seed, "augment", epoch, number)
        choices = augmentation.draw(len(batch), data.images.shape[-2:], draws)

        def at(places: slice | Tensor) -> Batch:
            indices = chosen(places)
            images = augmentation.apply(data.images, indices, choices[places])
            return Batch(to_unit(images), data.labels[indices], indices)

        return at

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch; Lightning saves it in checkpoints made within an epoch."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resumes after the batches that ``state_dict`` counted, if their epoch is the one that resumes."""
        self._position = self._resume_at = dict(state)
