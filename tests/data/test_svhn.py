import numpy as np
import pytest
import torch
from scipy.io import savemat

from robustdyn.data.svhn import SVHN_FILES
from robustdyn.errors import DataFileError
from tests.data.official import SHARED, needs_shared, write_svhn


def read(root, partial=True):
    return SVHN_FILES.read(root, ("train",), partial=partial)["train"]


@pytest.mark.parametrize("folder", [".", "svhn"])
def test_images_and_labels(tmp_path, folder):
    x, y = write_svhn(tmp_path / folder / "train_32x32.mat", 21)
    data = read(tmp_path)
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    for image in range(21):
        assert data.labels[image] == (0 if y[image, 0] == 10 else y[image, 0])
        np.testing.assert_array_equal(data.images[image, 1], x[:, :, 1, image])


def test_an_excerpt_must_be_asked_for(tmp_path):
    write_svhn(tmp_path / "train_32x32.mat", 3)
    with pytest.raises(DataFileError, match=r"found 3 images, expected 73,257; set data\.partial=true"):
        read(tmp_path, partial=False)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "train_32x32.mat"
    write_svhn(path, 21)
    for content in (path.read_bytes()[:5000], b"", b"something else " * 20):
        path.write_bytes(content)
        with pytest.raises(DataFileError, match=r"train_32x32\.mat: .*delete the file") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "not a MATLAB file with X and y"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))}, "expected X uint8"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1), np.uint8)}, "expected X uint8"),
        (
            {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.zeros((2, 1), np.uint8)},
            "found label 0, expected 1 to 10",
        ),
    ],
)
def test_wrong_contents_are_refused(tmp_path, variables, message):
    savemat(tmp_path / "train_32x32.mat", variables)
    with pytest.raises(DataFileError, match=message):
        read(tmp_path)


def test_missing_names_both_places(tmp_path):
    write_svhn(tmp_path / "svhn" / "train_32x32.mat", 3)
    assert SVHN_FILES.missing(tmp_path, ("train",)) == ""
    missing = SVHN_FILES.missing(tmp_path, ("train", "test"))
    assert missing == "test_32x32.mat or svhn/test_32x32.mat"
    assert [item.name for item in SVHN_FILES.downloads(tmp_path, ("train", "test"))] == ["test_32x32.mat"]


@needs_shared
def test_excerpt():
    data = read(SHARED)
    assert data.images.shape == (1083, 3, 32, 32)
    assert data.labels.bincount().tolist() == [66, 227, 141, 134, 110, 112, 78, 70, 78, 67]
