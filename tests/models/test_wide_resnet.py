import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.testing import assert_close

from robustdyn.curvature import EmpiricalRisk, layer_traces
from robustdyn.models import PreActResNet, WideResNet
from tests.curvature.reference import dense_hessian
from tests.tolerances import EXACT32, MC_SIGMAS

CONF = Path(__file__).parents[2] / "conf"
CIFAR10 = {"num_classes": 10, "channels": 3, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
DIGITS = {"num_classes": 10, "channels": 1, "mean": [0.3], "std": [0.4]}


def net(**changes):
    settings = {
        "num_classes": 10,
        "in_channels": 3,
        "depth": 10,
        "widen_factor": 2,
        "base_channels": 4,
        "dropout": 0.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
    }
    return WideResNet(**(settings | changes))


def from_conf(name, data, **changes):
    model = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    cfg = OmegaConf.create({"data": data, "model": OmegaConf.merge(model, changes)})
    return instantiate(cfg.model)


def parameters(stem, channels, blocks):
    """Count: stem, BatchNorm before each 3x3 conv, 1x1 projections, last BatchNorm, linear layer."""
    total, inputs = 9 * 3 * stem, stem
    for outputs, count in zip(channels, blocks, strict=True):
        for _ in range(count):
            total += 2 * inputs + 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs
            total += inputs * outputs if inputs != outputs else 0
            inputs = outputs
    return total + 2 * inputs + 10 * inputs + 10


@pytest.mark.parametrize(
    ("name", "expected", "millions"),
    [
        # millions as in Zagoruyko & Komodakis, BMVC 2016, Table 4, and, for 34-10, in RobustBench's table
        ("wide_resnet28_10", parameters(16, (160, 320, 640), (4, 4, 4)), 36.5),
        ("wide_resnet34_10", parameters(16, (160, 320, 640), (5, 5, 5)), 46.2),
        ("preact_resnet34", parameters(64, (64, 128, 256, 512), (3, 4, 6, 3)), 21.3),
    ],
)
def test_configured_networks_have_the_papers_sizes(name, expected, millions):
    with torch.device("meta"):
        model = from_conf(name, CIFAR10)
    count = sum(p.numel() for p in model.parameters())
    assert count == expected
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("wide_resnet28_10", {"widen_factor": 1, "base_channels": 4}),
        ("wide_resnet34_10", {"depth": 10, "widen_factor": 1}),
        ("preact_resnet34", {"width": 4, "strides": [1, 2, 2, 1]}),
    ],
)
@pytest.mark.parametrize(("data", "size"), [(DIGITS, 8), (CIFAR10, 32)], ids=["digits", "cifar10"])
def test_narrow_networks_map_images_to_logits(name, changes, data, size):
    model = from_conf(name, data, **changes)
    assert model(torch.rand(3, data["channels"], size, size)).shape == (3, 10)


def test_last_map_is_a_quarter_of_the_image():
    sizes = []
    model = net()
    model.bn.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))
    model(torch.rand(2, 3, 32, 32))
    assert sizes == [(2, 32, 8, 8)]


def test_without_widening_it_is_a_preact_resnet_of_three_stages():
    torch.manual_seed(0)
    wide = net(depth=16, widen_factor=1).eval()
    narrow = PreActResNet(
        num_classes=10,
        in_channels=3,
        width=4,
        blocks=(2, 2, 2),
        strides=(1, 2, 2),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    ).eval()
    narrow.load_state_dict(wide.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(wide(x), narrow(x))


def test_normalises_inside_without_a_trace_in_the_state_dict():
    torch.manual_seed(0)
    plain = net(mean=(0, 0, 0), std=(1, 1, 1)).eval()
    inside = net(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)).eval()
    inside.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    assert_close(inside(x), plain((x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)), **EXACT32)


def test_starts_as_the_authors_do():
    torch.manual_seed(0)
    model = net(base_channels=16)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            kernel, n = module.weight, module.weight.numel()
            variance = 2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels)
            # of n normal draws, the mean square has relative standard error √(2/n), the mean √(variance/n)
            assert kernel.square().mean().item() == pytest.approx(variance, rel=MC_SIGMAS * math.sqrt(2 / n))
            assert abs(kernel.mean().item()) < MC_SIGMAS * math.sqrt(variance / n)
            assert kernel.abs().max().item() > 2 * math.sqrt(variance)  # not a uniform distribution
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert (model.linear.bias == 0).all()
    assert model.linear.weight.std() > 0


def test_dropout_is_between_the_convolutions_and_in_training_only():
    torch.manual_seed(0)
    model = net(dropout=0.5)
    seen = []
    block = model.layers[1][0]
    block.conv2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block.bn2.register_forward_hook(lambda module, inputs, output: seen.append(output.relu()))
    x = torch.rand(8, 3, 16, 16)
    model(x)
    activated, dropped = seen
    kept = dropped != 0
    assert_close(dropped[kept], 2 * activated[kept], **EXACT32)  # 1 / (1 − 0.5)
    positive = int((activated > 0).sum())
    share = int(kept.sum()) / positive
    assert abs(share - 0.5) < MC_SIGMAS * 0.5 / math.sqrt(positive)
    model.eval()
    without = net().eval()
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(x), without(x))


def test_without_dropout_there_is_no_such_module():
    """In train mode, even with share 0, it would make the layer traces use Hutchinson's estimator."""
    assert not any(isinstance(module, nn.Dropout) for module in net().modules())
    assert sum(isinstance(module, nn.Dropout) for module in net(dropout=0.1).modules()) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 30}, r"depth must be 10, 16, 22, \.\.\. \(6n \+ 4\), got 30"),
        ({"depth": 4}, "depth must be 10"),
        ({"widen_factor": 0}, "widen_factor and base_channels must be at least 1, got 0 and 4"),
        ({"base_channels": 0}, "widen_factor and base_channels must be at least 1, got 2 and 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"mean": (0.5,)}, "mean and std need 3 entries"),
    ],
)
def test_refuses_sizes_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        net(**change)


@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.3, False)])
def test_layer_traces_are_exact(dropout, training):
    torch.manual_seed(0)
    model = net(
        num_classes=3,
        in_channels=1,
        widen_factor=1,
        base_channels=2,
        dropout=dropout,
        mean=(0.3,),
        std=(0.4,),
    ).double()
    model(torch.rand(20, 1, 8, 8, dtype=torch.float64))  # BatchNorm's statistics away from (0, 1)
    model.train(training)  # BatchNorm's mode in the risk is eval either way
    risk = EmpiricalRisk(model, torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    result = layer_traces(
        risk,
        method="auto",
        probes=2,
        exact_classes_up_to=10,
        generator=torch.Generator().manual_seed(0),
        weights_only=False,
    )
    assert result.estimator == "gauss_newton_exact"
    model.eval()
    diagonal = dense_hessian(risk).diagonal()
    truth = torch.stack([diagonal[risk.blocks[name]].sum() for name in result.names])
    # float64 rounding of double backward through some fifteen layers, as in tests/curvature
    assert_close(result.traces, truth, rtol=1e-9, atol=1e-12)
