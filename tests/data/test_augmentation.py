import numpy as np
import pytest
import torch

from robustdyn.data import Augmentation
from robustdyn.errors import ConfigError


def naive(image, row, column, flip, padding, mode):
    """One image, NumPy, as the reference implementation does it: pad, crop, flip."""
    width = [(0, 0), (padding, padding), (padding, padding)]
    padded = np.pad(image, width, mode={"reflect": "reflect", "zeros": "constant"}[mode])
    window = padded[:, row : row + image.shape[1], column : column + image.shape[2]]
    return window[:, :, ::-1] if flip else window


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
@pytest.mark.parametrize(("padding", "size"), [(4, (32, 32)), (3, (5, 7)), (0, (6, 6))])
def test_equals_one_image_at_a_time(mode, padding, size):
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, *size), dtype=torch.uint8, generator=draws)
    indices = torch.randint(20, (64,), generator=draws)
    augmentation = Augmentation(padding, mode, flip=True)
    choices = augmentation.draw(64, draws)
    before = images.clone()
    result = augmentation.apply(images, indices, choices)
    assert result.dtype == torch.uint8
    for image, index, (row, column, flip) in zip(result, indices, choices.tolist(), strict=True):
        expected = naive(images[index].numpy(), row, column, flip, padding, mode)
        np.testing.assert_array_equal(image.numpy(), expected)
    assert torch.equal(images, before)


def test_draws_cover_every_window_evenly():
    choices = Augmentation(4, "zeros", flip=True).draw(9 * 9 * 200, torch.Generator().manual_seed(1))
    windows = (choices[:, 0] * 9 + choices[:, 1]).bincount(minlength=81)
    assert windows.sum() == len(choices)
    assert (windows - 200).abs().max() < 5 * 200**0.5
    assert abs(choices[:, 2].float().mean() - 0.5) < 5 * 0.5 / len(choices) ** 0.5


def test_without_flip_the_windows_are_the_same():
    with_flip = Augmentation(2, "zeros", flip=True).draw(50, torch.Generator().manual_seed(1))
    without = Augmentation(2, "zeros", flip=False).draw(50, torch.Generator().manual_seed(1))
    assert torch.equal(with_flip[:, :2], without[:, :2])
    assert not without[:, 2].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_padding": -1, "padding_mode": "zeros", "flip": True}, "data.augment.crop_padding=-1"),
        ({"crop_padding": 4, "padding_mode": "wrap", "flip": True}, "data.augment.padding_mode=wrap"),
        ({"crop_padding": 4, "padding_mode": "zeros"}, "data.augment.flip is missing"),
        (
            {"crop_padding": 4, "padding_mode": "zeros", "flip": True, "rotate": 15},
            "data.augment.rotate is not",
        ),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation.from_config(settings)
