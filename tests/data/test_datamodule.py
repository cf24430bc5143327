import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from robustdyn.errors import ConfigError, DataFileError
from tests.data.official import (
    SHARED,
    cifar10,
    cifar100,
    digits,
    needs_shared,
    svhn,
    write_cifar10,
    write_svhn,
)

AUGMENT = {"crop_padding": 4, "padding_mode": "zeros", "flip": True, "cutout": 0}


@pytest.fixture
def root(tmp_path):
    write_cifar10(tmp_path, "binary", counts=(40,) * 5, test=30)
    write_svhn(tmp_path / "train_32x32.mat", 50)
    return tmp_path


def test_digits_are_scikit_learns():
    data = digits()
    train, test = data.split("train"), data.split("test")
    assert (len(train), len(test)) == (1257, 540)
    assert train.images.shape[1:] == (1, 8, 8)
    bunch = load_digits()
    expected = {
        (label, bytes(round(v * 255 / 16) for v in image.ravel()))
        for label, image in zip(bunch.target.tolist(), bunch.images, strict=True)
    }
    found = [
        (label.item(), image.numpy().tobytes())
        for part in (train, test)
        for label, image in zip(part.labels, part.images, strict=True)
    ]
    assert set(found) == expected
    assert len(found) == 1797
    counts = np.bincount(bunch.target)
    assert (abs(test.labels.bincount().numpy() - counts * 540 / 1797) <= 1.1).all()


def test_digits_split_is_a_function_of_split_seed():
    assert torch.equal(digits(seed=5).split("test").images, digits().split("test").images)
    assert not torch.equal(digits(split_seed=1).split("test").images, digits().split("test").images)


def test_setup_is_idempotent(root):
    data = cifar10(root)
    data.setup("fit")
    before = data.split("train")
    data.setup("test")
    assert data.split("train").images.data_ptr() == before.images.data_ptr()


def test_validation_is_held_out_before_train_size(root):
    everything = cifar10(root).split("train").images.flatten(1)
    for train_size in (None, 50):
        data = cifar10(root, validation_size=20, train_size=train_size)
        assert data.evaluation_splits == ("validation", "test")
        validation, train = data.split("validation").images.flatten(1), data.split("train").images.flatten(1)
        assert (len(validation), len(train)) == (20, train_size or 180)
        rows = {row.numpy().tobytes() for row in torch.cat([validation, train])}
        assert len(rows) == 20 + len(train)
        assert rows <= {row.numpy().tobytes() for row in everything}
        if train_size is None:
            first = validation
    assert torch.equal(first, validation)


def test_train_sizes_are_nested(root):
    def rows(size):
        return {image.numpy().tobytes() for image in cifar10(root, train_size=size).split("train").images}

    assert rows(30) < rows(100)


def test_test_size_is_a_balanced_part(root):
    data = svhn(root, test_from_train=30, test_size=10)
    assert data.split("test").labels.bincount().tolist() == [1] * 10


def test_test_from_train_takes_the_last(root):
    whole = svhn(root, test_from_train=1)
    data = svhn(root, test_from_train=20)
    images = torch.cat([whole.split("train").images, whole.split("test").images])
    assert torch.equal(data.split("train").images, images[:30])
    assert torch.equal(data.split("test").images, images[30:])


def test_missing_test_file_is_named(root):
    with pytest.raises(DataFileError, match=r"looked for test_32x32\.mat or svhn/.* data\.test_from_train"):
        svhn(root).setup()


def test_loaders(root):
    data = cifar10(root, validation_size=20, eval_batch_size=12)
    validation, test = data.val_dataloader()
    assert [len(batch.targets) for batch in validation] == [12, 8]
    assert torch.equal(torch.cat([b.targets for b in test]), data.split("test").labels)
    assert torch.equal(torch.cat([b.targets for b in data.test_dataloader()]), data.split("test").labels)
    assert len(data.train_dataloader()) == 23
    (only,) = cifar10(root).val_dataloader()
    assert len(only.data) == 30


def test_only_training_batches_are_augmented_and_mixed(root):
    data = cifar10(root, validation_size=20, augment=AUGMENT | {"cutout": 8}, mixup=1.0)
    for loader, name in zip(
        [*data.val_dataloader(), data.test_dataloader()], ["validation", "test", "test"], strict=True
    ):
        split = data.split(name)
        assert torch.equal(torch.cat([b.images for b in loader]), split.images.float() / 255)
        assert torch.equal(torch.cat([b.targets for b in loader]), split.labels)
    for batch in data.train_dataloader():
        assert batch.targets.dtype == torch.float32
        assert batch.targets.shape == (len(batch.images), 10)
    data = cifar10(root, augment=AUGMENT | {"padding_mode": "reflect", "cutout": 8})
    for batch in data.train_dataloader():
        assert torch.equal(batch.targets, data.split("train").labels[batch.indices])
        black = (batch.images == 0).all(dim=1)  # no other pixel of the random images is
        assert (black.sum(dim=(1, 2)) == 64).all()


def test_measurement_subset(root):
    data = cifar10(root, augment=AUGMENT | {"cutout": 8}, mixup=1.0)
    batch = data.measurement_subset(40, seed=7)
    assert batch.images.dtype == torch.float32
    assert len(batch.indices.unique()) == 40
    assert torch.equal(batch.images, data.split("train").images[batch.indices].float() / 255)
    assert torch.equal(batch.targets, data.split("train").labels[batch.indices])
    assert torch.equal(data.measurement_subset(15, seed=7).indices, batch.indices[:15])
    assert not torch.equal(data.measurement_subset(40, seed=8).indices, batch.indices)
    with pytest.raises(ConfigError, match=r"^measure\.examples=201 .* 200 training images"):
        data.measurement_subset(201, seed=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1000}, "data.batch_size=1000 exceeds the 200 training images; choose at most 200"),
        ({"train_size": 60, "batch_size": 61}, "data.batch_size=61 exceeds the 60 training images"),
        ({"train_size": 201}, "data.train_size=201 exceeds the 200 training images; choose at most 200"),
        (
            {"train_size": 181, "validation_size": 20},
            "data.train_size=181 exceeds the 180 training images left by data.validation_size=20",
        ),
        ({"validation_size": 200}, "data.validation_size=200 leaves none .* choose at most 199"),
        ({"test_size": 31}, "data.test_size=31 exceeds the 30 test images; choose at most 30"),
        ({"test_from_train": 200}, "data.test_from_train=200 leaves none .* choose at most 199"),
        ({"batch_size": 0}, "data.batch_size=0 must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "data.batch_size=2.5 must be a whole number"),
        ({"validation_size": -1}, "data.validation_size=-1 must be a whole number of at least 0"),
        ({"num_classes": 100}, "data.num_classes=100, but CIFAR-10 has 10"),
        ({"channels": 1, "mean": [0.5], "std": [0.5]}, "data.channels=1, but CIFAR-10 images have 3"),
        ({"image_size": 28}, "data.image_size=28, but CIFAR-10 images are 32x32"),
        ({"mean": [0.5]}, "data.mean has 1 values; give one for each of data.channels=3"),
        ({"std": [0.5, 0, 0.5]}, "data.std=.* must be positive"),
        (
            {"augment": AUGMENT | {"crop_padding": 32}},
            "data.augment.crop_padding=32 must be smaller than the image, 32 pixels",
        ),
        ({"augment": AUGMENT | {"cutout": 32}}, "data.augment.cutout=32 must be smaller than the image"),
        ({"mixup": -0.1}, "data.mixup=-0.1 must be a number of at least 0; 0 is none"),
        ({"mixup": float("inf")}, "data.mixup=inf must be a number"),
        ({"mixup": float("nan")}, "data.mixup=nan must be a number"),
    ],
)
def test_settings_that_cannot_work(root, changes, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        cifar10(root, **changes).setup()
    assert "\n" not in str(caught.value)


def test_digits_settings_that_cannot_work():
    with pytest.raises(ConfigError, match=r"data\.test_size=1797 leaves none .* choose at most 1796"):
        digits(test_size=1797).setup()
    with pytest.raises(ConfigError, match=r"data\.test_size=null"):
        digits(test_size=None).setup()


def test_no_such_split(root):
    with pytest.raises(ConfigError, match=r"data\.validation_size=0: there is no validation split"):
        cifar10(root).split("validation")


@needs_shared
def test_excerpts():
    data = cifar10(SHARED, validation_size=438, batch_size=128)
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [5000, 438, 1017]
    data = svhn(SHARED, test_from_train=219)
    assert [len(data.split(name)) for name in ("train", "test")] == [864, 219]
    data = cifar100(SHARED, train_size=1000)
    assert len(data.split("train").labels.unique()) == 100
