import numpy as np
import pytest
import torch

from robustdyn.data import Augmentation, ImageTensors, Mixup, ShuffledBatches, TensorBatches

AUGMENTATION = Augmentation(crop_padding=2, padding_mode="reflect", flip=True, cutout=3)
MIXUPS = [None, Mixup(alpha=0.7, num_classes=10)]


def image_tensors(count=37):
    # 105 pixels: no whole number of vector registers
    images = torch.randint(
        256, (count, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    return ImageTensors(images, torch.arange(count) % 10)


def shuffled(epoch=0, rank=0, world_size=1, seed=0, augmentation=AUGMENTATION, data=None, mixup=None):
    return ShuffledBatches(
        data or image_tensors(),
        8,
        rank=rank,
        world_size=world_size,
        seed=seed,
        epoch=lambda: epoch,
        augmentation=augmentation,
        mixup=mixup,
    )


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def merge(parts):
    """The union of the ranks' batches, in rank order."""
    return [[torch.cat(fields) for fields in zip(*ranks, strict=True)] for ranks in zip(*parts, strict=True)]


def test_in_order_every_image_once():
    data = image_tensors()
    loader = TensorBatches(data, 8, rank=0, world_size=1)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    assert [len(batch.targets) for batch in batches] == [8, 8, 8, 8, 5]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(37))
    images = torch.cat([batch.images for batch in batches])
    assert images.dtype == torch.float32
    assert torch.equal(images, data.images.float() / 255)


def test_shuffled_every_image_once_with_its_label():
    data = image_tensors()
    loader = shuffled(augmentation=None, data=data)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    indices = torch.cat([batch.indices for batch in batches])
    assert indices.sort().values.tolist() == list(range(37))
    assert indices.tolist() != list(range(37))
    assert torch.equal(torch.cat([b.targets for b in batches]), data.labels[indices])
    assert torch.equal(torch.cat([b.images for b in batches]), data.images[indices].float() / 255)


@pytest.mark.parametrize("mixup", MIXUPS)
def test_pure_function_of_seed_and_epoch(mixup):
    again = shuffled(mixup=mixup)
    assert_same(list(shuffled(mixup=mixup)), list(again))
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002 (the global state is what must not matter)
    assert_same(list(shuffled(mixup=mixup)), list(again))
    for other in (shuffled(epoch=1), shuffled(seed=1)):
        assert not torch.equal(next(iter(other)).indices, next(iter(again)).indices)


@pytest.mark.parametrize("mixup", MIXUPS)
def test_global_random_state_is_untouched(mixup):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(shuffled(mixup=mixup))
    assert torch.equal(before, torch.get_rng_state())
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_augmentation_differs_between_batches_and_epochs():
    one_image = ImageTensors(
        image_tensors(1).images.expand(64, -1, -1, -1), torch.zeros(64, dtype=torch.int64)
    )
    first, second, *_ = shuffled(data=one_image)
    other, *_ = shuffled(data=one_image, epoch=1)
    assert not torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("augmentation", [None, AUGMENTATION])
@pytest.mark.parametrize("mixup", MIXUPS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_union_of_ranks_is_one_process(world_size, mixup, augmentation):
    settings = {"mixup": mixup, "augmentation": augmentation}
    parts = [list(shuffled(rank=rank, world_size=world_size, **settings)) for rank in range(world_size)]
    assert_same(merge(parts), list(shuffled(**settings)))
    assert all(len(batch.targets) for batches in parts for batch in batches)


@pytest.mark.parametrize("world_size", [2, 3])
def test_union_of_ranks_is_one_process_in_evaluation(world_size):
    data = image_tensors()
    parts = [list(TensorBatches(data, 6, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert_same(merge(parts), list(TensorBatches(data, 6, rank=0, world_size=1)))


def test_epoch_is_asked_at_the_first_batch():
    now = {"epoch": 0}
    loader = shuffled()
    loader.epoch = lambda: now["epoch"]
    iterator = iter(loader)
    now["epoch"] = 5
    assert torch.equal(next(iterator).indices, next(iter(shuffled(epoch=5))).indices)


@pytest.mark.parametrize("mixup", MIXUPS)
def test_resumes_within_an_epoch(mixup):
    whole = list(shuffled(epoch=3, mixup=mixup))
    broken_off = shuffled(epoch=3, mixup=mixup)
    iterator = iter(broken_off)
    for _ in range(2):
        next(iterator)
    resumed = shuffled(epoch=3, mixup=mixup)
    resumed.load_state_dict(broken_off.state_dict())
    assert_same(list(resumed), whole[2:])


def test_a_finished_epoch_does_not_shorten_the_next():
    finished = shuffled(epoch=3)
    list(finished)
    resumed = shuffled(epoch=4)
    resumed.load_state_dict(finished.state_dict())
    assert_same(list(resumed), list(shuffled(epoch=4)))
