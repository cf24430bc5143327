import pytest
import torch

from robustdyn.models import PreActResNet
from robustdyn.models.modes import mode
from tests.tolerances import EXACT32


def net(**changes):
    settings = {
        "num_classes": 10,
        "in_channels": 3,
        "width": 64,
        "blocks": (2, 2, 2, 2),
        "strides": (1, 2, 2, 2),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
    }
    return PreActResNet(**(settings | changes))


def test_has_the_papers_size():
    # Counted by hand from the architecture: stem, per stage two 3x3 convs a block with a BatchNorm before
    # each and a 1x1 projection where channels change, final BatchNorm, linear layer.
    total, channels = 9 * 3 * 64, 64
    for out in (64, 128, 256, 512):
        for block in range(2):
            total += 2 * channels + 9 * channels * out + 2 * out + 9 * out * out
            total += channels * out if block == 0 and channels != out else 0
            channels = out
    total += 2 * 512 + 512 * 10 + 10
    count = sum(p.numel() for p in net().parameters())
    assert count == total
    assert round(count / 1e6, 2) == 11.17


@pytest.mark.parametrize(("channels", "size", "strides"), [(3, 32, (1, 2, 2, 2)), (1, 8, (1, 2, 2, 1))])
def test_maps_images_to_logits(channels, size, strides):
    narrow = net(in_channels=channels, width=4, strides=strides, mean=[0.5] * channels, std=[0.2] * channels)
    assert narrow(torch.rand(3, channels, size, size)).shape == (3, 10)


def test_normalises_inside():
    torch.manual_seed(0)
    plain = net(width=4, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    inside = net(width=4, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)).eval()
    inside.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    expected = plain((x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    torch.testing.assert_close(inside(x), expected, **EXACT32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be at least 1"),
        ({"strides": (1, 2)}, "same length"),
        ({"blocks": (2, 0, 2, 2)}, "blocks and strides must be at least 1"),
        ({"mean": (0.5,)}, "mean and std need 3 entries"),
    ],
)
def test_refuses_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        net(**change)


def test_mode_gives_every_flag_back():
    model = net(width=4)
    model.bn.eval()
    flags = [m.training for m in model.modules()]
    with mode(model, training=False):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == flags
