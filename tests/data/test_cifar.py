import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from robustdyn.data.cifar import CIFAR10_FILES, CIFAR100_FILES
from robustdyn.errors import DataFileError
from tests.data.official import (
    SHARED,
    TRAIN_BATCHES,
    needs_shared,
    python2_pickle,
    random_images,
    write_cifar10,
    write_cifar100,
)

BOTH = ("train", "test")


def read(source, root, partial=True):
    return source.read(root, BOTH, partial=partial)


def assert_same(one, other):
    for split in BOTH:
        torch.testing.assert_close(one[split].images, other[split].images, rtol=0, atol=0)
        torch.testing.assert_close(one[split].labels, other[split].labels, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("source", "write"), [(CIFAR10_FILES, write_cifar10), (CIFAR100_FILES, write_cifar100)]
)
def test_both_layouts_hold_the_same_arrays(tmp_path, source, write):
    write(tmp_path / "a", "binary")
    write(tmp_path / "b", "python")
    binary = read(source, tmp_path / "a")
    assert binary["train"].images.dtype == torch.uint8
    assert binary["train"].labels.dtype == torch.int64
    assert_same(binary, read(source, tmp_path / "b"))


def test_cifar10_is_in_the_official_order_and_planes(tmp_path):
    write_cifar10(tmp_path, "binary", counts=(2, 1, 1, 1, 1))
    data = read(CIFAR10_FILES, tmp_path)["train"]
    raw = (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").read_bytes()
    second = raw[3073:]
    assert data.labels[1] == second[0]
    red, green, blue = second[1:1025], second[1025:2049], second[2049:]
    for plane, values in enumerate((red, green, blue)):
        for row, column in ((0, 0), (0, 31), (31, 0), (17, 5)):
            assert data.images[1, plane, row, column] == values[32 * row + column]


def test_cifar100_labels_are_the_fine_ones(tmp_path):
    write_cifar100(tmp_path, "binary", train=23)
    _, fine = random_images(23, 100, seed=23)
    assert read(CIFAR100_FILES, tmp_path)["train"].labels.tolist() == fine.tolist()


def test_binary_is_preferred(tmp_path):
    write_cifar10(tmp_path, "python", counts=(1,) * 5, test=1)
    write_cifar10(tmp_path, "binary", counts=(2,) * 5, test=2)
    assert len(read(CIFAR10_FILES, tmp_path)["train"]) == 10


def test_layouts_are_not_mixed(tmp_path):
    write_cifar10(tmp_path, "binary")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    assert "cifar-10-batches-bin/test_batch.bin or cifar-10-batches-py/{data" in CIFAR10_FILES.missing(
        tmp_path, BOTH
    )
    write_cifar10(tmp_path, "python", counts=(3,) * 5)
    assert CIFAR10_FILES.missing(tmp_path, BOTH) == ""
    assert len(read(CIFAR10_FILES, tmp_path)["train"]) == 15


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_an_excerpt_must_be_asked_for(tmp_path, layout):
    write_cifar100(tmp_path, layout)
    with pytest.raises(
        DataFileError, match=r"/train(\.bin)?: found 23 images, expected 50,000; set data.partial=true"
    ):
        read(CIFAR100_FILES, tmp_path, partial=False)


@pytest.mark.parametrize("partial", [True, False])
def test_a_torn_record_is_refused(tmp_path, partial):
    write_cifar10(tmp_path, "binary")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataFileError, match="not a whole number of records of 3,073 bytes") as caught:
        read(CIFAR10_FILES, tmp_path, partial=partial)
    assert str(caught.value).startswith(f"{path}: found 21,510 bytes")
    assert "delete the file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_no_excerpt(tmp_path):
    write_cifar10(tmp_path, "binary")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"")
    with pytest.raises(DataFileError, match=r"test_batch\.bin: found 0 images, expected 10,000"):
        read(CIFAR10_FILES, tmp_path)


def test_too_many_images_are_no_excerpt(tmp_path):
    write_cifar10(tmp_path, "binary")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(bytes(3073 * 10_001))
    with pytest.raises(DataFileError, match="found 10,001 images, expected 10,000; delete"):
        read(CIFAR10_FILES, tmp_path)


def test_a_label_out_of_range_is_refused(tmp_path):
    write_cifar10(tmp_path, "binary")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.write_bytes(bytes([10]) + path.read_bytes()[1:])
    with pytest.raises(DataFileError, match=r"data_batch_2\.bin: found label 10, expected 0 to 9"):
        read(CIFAR10_FILES, tmp_path)


def test_official_counts_pass_without_partial(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*TRAIN_BATCHES, "test_batch"]:
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(3073 * 10_000)  # zeros: label 0, black
    assert len(CIFAR10_FILES.read(tmp_path, ("test",), partial=False)["test"]) == 10_000


class Command:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def replace_test_file(tmp_path, content: bytes):
    write_cifar100(tmp_path, "python")
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_is_refused(tmp_path, protocol):
    marker = tmp_path / "called"
    path = replace_test_file(tmp_path, pickle.dumps({b"data": Command(marker)}, protocol))
    with pytest.raises(DataFileError, match=r"refused \(it asks for posix.system\)") as caught:
        read(CIFAR100_FILES, tmp_path)
    assert str(caught.value).startswith(str(path))
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",  # a dotted name below an allowed one
        b"",
        b"not a pickle",
        b"\x80\x02}q\x00(U\x04data",  # cut short
    ],
)
def test_other_bad_pickles_are_refused(tmp_path, content):
    replace_test_file(tmp_path, content)
    with pytest.raises(DataFileError, match=r"cifar-100-python/test: .*delete the file") as caught:
        read(CIFAR100_FILES, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {b"data": np.zeros((4, 3072), np.uint8)},
        {b"data": np.zeros((4, 3072)), b"fine_labels": [0] * 4},
        {b"data": np.zeros((4, 3071), np.uint8), b"fine_labels": [0] * 4},
        {b"data": np.zeros((4, 3072), np.uint8), b"fine_labels": [0] * 5},
        {b"data": np.zeros((4, 3072), np.uint8), b"fine_labels": [b"0"] * 4},
        {b"data": np.zeros((4, 3072), np.uint8), b"fine_labels": [10**30] * 4},
        {b"data": np.zeros((4, 3072), np.uint8), b"fine_labels": np.zeros(4)},
        {b"data": np.full((4, 3072), None), b"fine_labels": [0] * 4},
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    replace_test_file(tmp_path, python2_pickle(content))
    with pytest.raises(DataFileError, match="expected a dictionary with uint8 data"):
        read(CIFAR100_FILES, tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", [list, np.array, np.int64, ">i4", np.asfortranarray])
@pytest.mark.parametrize("key", [str.encode, str])
def test_pickles_of_python_3_are_read(tmp_path, protocol, form, key):
    pixels, labels = random_images(6, 100, seed=0)
    if form is list:
        saved = labels.tolist()
    elif form is np.int64:
        saved = list(labels.astype(np.int64))
    else:
        saved = labels.astype(form) if form == ">i4" else labels
    pixels = np.asfortranarray(pixels) if form is np.asfortranarray else pixels
    replace_test_file(tmp_path, pickle.dumps({key("data"): pixels, key("fine_labels"): saved}, protocol))
    data = read(CIFAR100_FILES, tmp_path)["test"]
    assert data.images.flatten(1).tolist() == pixels.tolist()
    assert data.labels.tolist() == labels.tolist()


class Objects:
    """Pickled as an array of Python objects made from bytes, each of which is an invalid address."""

    def __reduce__(self):
        return np.ndarray, ((4,), "O", b"A" * 32)


class Reconstructed:
    """The same as ``Objects``, but pickled in the way of NumPy."""

    def __reduce__(self):
        rebuild, arguments, _ = np.zeros(1).__reduce__()
        return rebuild, arguments, (1, (4,), np.dtype("O"), False, b"A" * 32)


@pytest.mark.parametrize("labels", [Objects(), Reconstructed(), [Objects()] * 4])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_makes_no_objects_of_bytes(tmp_path, protocol, labels):
    """NumPy itself would make them, and touching one crashes the interpreter."""
    content = {b"data": np.zeros((4, 3072), np.uint8), b"fine_labels": labels}
    replace_test_file(tmp_path, pickle.dumps(content, protocol))
    with pytest.raises(DataFileError, match="expected a dictionary with uint8 data"):
        read(CIFAR100_FILES, tmp_path)


@pytest.mark.parametrize("left", [3072, 3073 * 4])  # half a record, or fewer records than there are
def test_a_damaged_layout_does_not_hide_a_good_one(tmp_path, left):
    files = replace(CIFAR10_FILES, records={"train": 5, "test": 5})
    write_cifar10(tmp_path, "python", counts=(5,) * 5, test=5)
    good = read(files, tmp_path, partial=False)
    write_cifar10(tmp_path, "binary", counts=(5,) * 5, test=5)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.warns(UserWarning, match=r"data_batch_3\.bin: found .*cifar-10-batches-py is read instead"):
        assert_same(read(files, tmp_path, partial=False), good)


@needs_shared
def test_excerpt_of_cifar10():
    data = read(CIFAR10_FILES, SHARED)
    assert (len(data["train"]), len(data["test"])) == (5438, 1017)
    assert data["train"].labels.bincount().tolist() == [541, 564, 524, 529, 563, 523, 540, 548, 572, 534]
    assert data["test"].labels.bincount().tolist() == [105, 93, 100, 104, 92, 87, 114, 102, 110, 110]
    raw = np.fromfile(SHARED / "cifar-10-batches-bin" / "data_batch_2.bin", np.uint8).reshape(-1, 3073)
    np.testing.assert_array_equal(data["train"].images[1102:2119], raw[:, 1:].reshape(-1, 3, 32, 32))


@needs_shared
def test_excerpt_of_cifar100():
    data = read(CIFAR100_FILES, SHARED)
    assert (len(data["train"]), len(data["test"])) == (1117, 916)
    names = (SHARED / "cifar-100-binary" / "fine_label_names.txt").read_text().split()
    for split, beaver, boy, whale in (("train", 13, 22, 11), ("test", 8, 11, 9)):
        counts = data[split].labels.bincount(minlength=100)
        assert [counts[names.index(name)] for name in ("beaver", "boy", "whale")] == [beaver, boy, whale]
