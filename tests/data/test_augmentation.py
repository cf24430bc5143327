import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from robustdyn.data import Augmentation
from robustdyn.errors import ConfigError

COMPLETE = {"crop_padding": 4, "padding_mode": "zeros", "flip": True, "cutout": 0}


def naive(image, row, column, flip, top, left, padding, mode, cutout):
    """One image, NumPy, as the reference implementation does it: pad, crop, flip, blacken."""
    width = [(0, 0), (padding, padding), (padding, padding)]
    padded = np.pad(image, width, mode={"reflect": "reflect", "zeros": "constant"}[mode])
    window = padded[:, row : row + image.shape[1], column : column + image.shape[2]]
    window = (window[:, :, ::-1] if flip else window).copy()
    for i in range(top, top + cutout):
        for j in range(left, left + cutout):
            window[:, i, j] = 0
    return window


@pytest.mark.parametrize("cutout", [0, 1, 4])
@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize(("padding", "size"), [(4, (32, 32)), (3, (5, 7)), (0, (6, 6))])
def test_equals_one_image_at_a_time(mode, padding, size, cutout):
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (20, 3, *size), dtype=torch.uint8, generator=draws)
    indices = torch.randint(20, (64,), generator=draws)
    augmentation = Augmentation(padding, mode, flip=True, cutout=cutout)
    choices = augmentation.draw(64, size, draws)
    before = images.clone()
    result = augmentation.apply(images, indices, choices)
    assert result.dtype == torch.uint8
    for image, index, choice in zip(result, indices, choices.tolist(), strict=True):
        expected = naive(images[index].numpy(), *choice, padding, mode, cutout)
        np.testing.assert_array_equal(image.numpy(), expected)
    assert torch.equal(images, before)


def test_draws_cover_every_window_evenly():
    augmentation = Augmentation(4, "zeros", flip=True, cutout=0)
    choices = augmentation.draw(9 * 9 * 200, (32, 32), torch.Generator().manual_seed(1))
    windows = (choices[:, 0] * 9 + choices[:, 1]).bincount(minlength=81)
    assert windows.sum() == len(choices)
    assert (windows - 200).abs().max() < 5 * 200**0.5
    assert abs(choices[:, 2].float().mean() - 0.5) < 5 * 0.5 / len(choices) ** 0.5


def drawn(flip, cutout):
    augmentation = Augmentation(2, "zeros", flip=flip, cutout=cutout)
    return augmentation.draw(50, (8, 8), torch.Generator().manual_seed(1))


def test_without_flip_the_windows_are_the_same():
    with_flip, without = drawn(True, 0), drawn(False, 0)
    assert torch.equal(with_flip[:, :2], without[:, :2])
    assert not without[:, 2].any()


def test_without_cutout_windows_and_flips_are_the_same():
    with_square, without = drawn(True, 3), drawn(True, 0)
    assert torch.equal(with_square[:, :3], without[:, :3])
    assert with_square[:, 3:].any()
    assert not without[:, 3:].any()


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
def test_cutout_blackens_one_square_inside_every_image(mode):
    white = torch.full((1, 3, 9, 7), 255, dtype=torch.uint8)
    augmentation = Augmentation(0, mode, flip=True, cutout=4)
    choices = augmentation.draw(300, (9, 7), torch.Generator().manual_seed(2))
    black = augmentation.apply(white, torch.zeros(300, dtype=torch.int64), choices) == 0
    assert black.float().mean() == pytest.approx(4 * 4 / (9 * 7))
    assert (black.any(dim=3).sum(dim=2) == 4).all()  # rows with a black pixel: with 16 pixels, a square
    assert (black.any(dim=2).sum(dim=2) == 4).all()
    assert (black.sum(dim=(2, 3)) == 16).all()
    assert (black == black[:, :1]).all()  # of all channels


def test_cutout_is_uniform_over_the_places_inside():
    augmentation = Augmentation(4, "reflect", flip=True, cutout=5)
    choices = augmentation.draw(8 * 6 * 200, (12, 10), torch.Generator().manual_seed(3))
    places = (choices[:, 3] * 6 + choices[:, 4]).bincount(minlength=8 * 6)
    assert len(places) == 8 * 6
    assert choices[:, 4].max() == 5
    assert chisquare(places.numpy()).pvalue > 1e-3  # one fixed seed
    # and is independent of the window: a table of 3x3 coarse places each, 1,066 in a cell on average
    window, square = choices[:, 0] // 3 * 3 + choices[:, 1] // 3, choices[:, 3] % 3 * 3 + choices[:, 4] % 3
    expected = torch.outer(window.bincount().double(), square.bincount().double()) / len(choices)
    table = (window * 9 + square).bincount(minlength=81)
    # the margins were estimated: 8 * 8 degrees of freedom
    assert chisquare(table.numpy(), expected.flatten().numpy(), ddof=16).pvalue > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_padding": -1}, "data.augment.crop_padding=-1"),
        ({"padding_mode": "wrap"}, "data.augment.padding_mode=wrap"),
        ({"cutout": -1}, "data.augment.cutout=-1 must be a whole number of at least 0"),
        ({"cutout": 2.5}, "data.augment.cutout=2.5 must be a whole number of at least 0"),
        ({"rotate": 15}, "data.augment.rotate is not known; the keys are .*, cutout$"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation.from_config(COMPLETE | settings)


@pytest.mark.parametrize("key", COMPLETE)
def test_every_key_is_needed(key):
    with pytest.raises(ConfigError, match=f"^data.augment.{key} is missing"):
        Augmentation.from_config({k: v for k, v in COMPLETE.items() if k != key})
