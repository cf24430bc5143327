"""Own images: arrays in a file, image files in folders, torch data sets."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from robustdyn.data import ImageFolder, NpzFile, TorchDataset
from robustdyn.data.own import labelled
from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError, DataFileError

DRAWS = np.random.default_rng(0)
IMAGES = DRAWS.integers(256, size=(30, 3, 6, 6), dtype=np.uint8)
LABELS = np.arange(30) % 3


def settings(name, **changes):
    """Of the constructor: those of conf/, for these images."""
    defaults = OmegaConf.to_container(OmegaConf.load(config_dir() / "data" / f"{name}.yaml"))
    own = {key: value for key, value in defaults.items() if key not in ("_target_", "train", "test")}
    return own | {"seed": 0, "batch_size": 4, "image_size": 6, "num_classes": 3, **changes}


def npz(tmp_path, arrays, **changes):
    np.savez(tmp_path / "x.npz", **arrays)
    return NpzFile(**settings("npz", path=str(tmp_path / "x.npz"), **changes))


ARRAYS = {
    "train_images": IMAGES[:20],
    "train_labels": LABELS[:20],
    "test_images": IMAGES[20:],
    "test_labels": LABELS[20:],
}


def test_arrays_are_what_the_file_holds(tmp_path):
    data = npz(tmp_path, ARRAYS)
    for name, part in (("train", slice(20)), ("test", slice(20, 30))):
        assert np.array_equal(data.split(name).images, IMAGES[part])
        assert np.array_equal(data.split(name).labels, LABELS[part])


def test_without_test_arrays_images_are_held_out(tmp_path):
    train = {"train_images": IMAGES, "train_labels": LABELS}
    with pytest.raises(ConfigError, match=r"^data.test_size=null, but .*x.npz has no test images"):
        npz(tmp_path, train).setup()
    data = npz(tmp_path, train, test_size=6, train_size=12, validation_size=3)
    sizes = {name: len(data.split(name)) for name in ("train", "validation", "test")}
    assert sizes == {"train": 12, "validation": 3, "test": 6}
    assert data.split("test").labels.bincount().tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "images",
    [
        IMAGES.transpose(0, 2, 3, 1),
        IMAGES / 255,
        (IMAGES / 255).astype(np.float32),
        (IMAGES / 255).astype(np.float16),
    ],
    ids=["channels last", "float64", "float32", "float16"],
)
def test_layouts_and_types_of_the_same_images(images):
    assert np.array_equal(labelled(images, LABELS[:, None], "x").images, IMAGES)


def test_grey_images_need_no_channel_axis():
    assert labelled(IMAGES[:, 0], LABELS, "x").images.shape == (30, 1, 6, 6)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES / 255 * 2 - 1, LABELS, "are not multiples of 1/255 in \\[0, 1\\]; leave out normalisation"),
        (IMAGES / 255 + 1, LABELS, "are not multiples"),
        (IMAGES / 200, LABELS, "are not multiples"),
        (np.full_like(IMAGES, np.nan, dtype=float), LABELS, "are not multiples"),
        (IMAGES.astype(np.int32), LABELS, "are int32; store them as uint8"),
        (IMAGES[:, :2], LABELS, "have shape"),
        (IMAGES[:0], LABELS[:0], "have shape"),
        (IMAGES, LABELS[:5], "30 images but labels int64 \\(5,\\)"),
        (IMAGES, LABELS + 0.5, "30 images but labels float64"),
        (IMAGES, np.eye(3)[LABELS], "30 images but labels float64 \\(30, 3\\)"),
    ],
)
def test_other_arrays_are_refused(images, labels, message):
    with pytest.raises(DataFileError, match=message):
        labelled(images, labels, "x")


def test_settings_that_do_not_fit_are_named_with_those_that_do(tmp_path):
    grey = {**ARRAYS, "train_images": IMAGES[:20, 0], "test_images": IMAGES[20:, 0]}
    with pytest.raises(ConfigError) as refusal:
        npz(tmp_path, grey, image_size=32, num_classes=10).setup()
    message = str(refusal.value)
    assert "data.num_classes=10 and data.channels=3 and data.image_size=32 do not fit" in message
    remedy = dict(part.split("=") for part in message.partition("; give ")[2].split())
    pixels = IMAGES[:20, 0] / 255
    assert float(remedy["data.mean"][1:-1]) == pytest.approx(pixels.mean(), rel=1e-3)  # four digits
    assert float(remedy["data.std"][1:-1]) == pytest.approx(pixels.std(), rel=1e-3)
    fitting = {"num_classes": 3, "channels": 1, "image_size": 6, "mean": [0.5], "std": [0.3]}
    assert {key.removeprefix("data.") for key in remedy} == fitting.keys()
    npz(tmp_path, grey, **fitting).setup()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": LABELS[:20] - 1}, "found label -1; number the classes from 0"),
        ({"test_images": IMAGES[20:, :, :5]}, "training images are 3x6x6, but test images are 3x5x6"),
        ({"train_images": IMAGES[:20, :, :5], "test_images": IMAGES[20:, :, :5]}, "images are 5x6; crop"),
        ({"test_labels": None}, "has no array test_labels, only"),
        ({"train_images": None}, "has no array train_images, only"),
        ({"train_labels": np.array([object()] * 20)}, "not an .npz file of plain arrays"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(change, message, tmp_path):
    arrays = {name: array for name, array in (ARRAYS | change).items() if array is not None}
    with pytest.raises(DataFileError, match=f"x.npz.*{message}") as refusal:
        npz(tmp_path, arrays).setup()
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_missing_or_damaged_is_named(tmp_path):
    data = npz(tmp_path, ARRAYS)
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[:100])
    with pytest.raises(DataFileError, match=r"x.npz: not an .npz file"):
        data.setup()
    (tmp_path / "x.npz").unlink()
    with pytest.raises(DataFileError, match=r"^data.path=.*x.npz: no such file"):
        data.setup()


@pytest.fixture
def images(tmp_path):
    for number, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        folder = tmp_path / ("train" if number < 20 else "test") / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:02}.png")
    return tmp_path


def test_folders_are_classes_and_pngs_are_read_exactly(images):
    data = ImageFolder(**settings("image_folder", root=str(images)))
    for name, part in (("train", slice(20)), ("test", slice(20, 30))):
        order = np.argsort(LABELS[part], kind="stable")
        assert np.array_equal(data.split(name).images, IMAGES[part][order])
        assert np.array_equal(data.split(name).labels, np.sort(LABELS[part]))


def test_folders_of_classes_alone_and_grey_images(images):
    grey = {"channels": 1, "mean": [0.5], "std": [0.5], "test_size": 5}
    data = ImageFolder(**settings("image_folder", root=str(images / "train"), **grey))
    assert (len(data.split("train")), len(data.split("test"))) == (15, 5)
    assert data.split("train").images.shape[1] == 1


def test_files_that_cannot_be_used_are_named(images):
    def refused(message):
        with pytest.raises(DataFileError, match=message):
            ImageFolder(**settings("image_folder", root=str(images))).setup()

    (images / "train/a/99.png").write_text("no image")
    refused("99.png: not an image that can be read")
    Image.new("RGB", (5, 6)).save(images / "train/a/99.png")
    refused("99.png: 6x5 pixels, but 00.png has 6x6; resize")
    Image.new("RGB", (6, 6)).save(
        images / "train/a/99.png", format="GIF"
    )  # outside the formats that are read
    refused("99.png: not an image that can be read")
    (images / "train/a/99.png").unlink()
    (images / "test/d").mkdir()
    refused("test: class d has no folder in .*train")
    with pytest.raises(DataFileError, match=r"^data.root=.*nowhere: no such folder"):
        ImageFolder(**settings("image_folder", root=str(images / "nowhere"))).setup()
    with pytest.raises(ConfigError, match=r"data\.channels=2 must be 1"):
        ImageFolder(**settings("image_folder", root="x", channels=2, mean=[0, 0], std=[1, 1]))


@pytest.mark.parametrize("kind", ["tensors", "pil", "floats"])
def test_a_torch_dataset_is_read_once_in_its_order(kind):
    made = {
        "tensors": lambda image: torch.from_numpy(image),
        "pil": lambda image: Image.fromarray(image.transpose(1, 2, 0)),
        "floats": lambda image: torch.from_numpy(image).float() / 255,
    }[kind]
    pairs = [(made(image), label) for image, label in zip(IMAGES, LABELS, strict=True)]
    data = TorchDataset(train=lambda: pairs[:20], test=lambda: pairs[20:], **settings("dataset"))
    assert np.array_equal(data.split("train").images, IMAGES[:20])
    assert np.array_equal(data.split("test").labels, LABELS[20:])
    held = TorchDataset(train=lambda: pairs, test=None, **settings("dataset", test_size=9))
    assert len(held.split("test")) == 9


def test_a_dataset_without_a_length_or_images_is_refused():
    with pytest.raises(ConfigError, match="generator has no length; give a map-style Dataset"):
        TorchDataset(train=lambda: (pair for pair in ()), test=None, **settings("dataset")).setup()
    with pytest.raises(ConfigError, match="list is empty"):
        TorchDataset(train=list, test=None, **settings("dataset")).setup()
