import math

import pytest
import torch
from torch import nn

from robustdyn.methods import Regularizer, is_plain_momentum
from robustdyn.run.config import build
from tests.runs import compose
from tests.tolerances import EXACT64


def network():
    """Weights that sum to round numbers; the convolution has a bias, the linear layer a frozen one."""
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -2.0, 3.0, -4.0, 0.5, -0.5, 0.25, -0.25]).view(2, 1, 2, 2))
        net[0].bias.fill_(100.0)
        net[1].weight.fill_(100.0)
        net[1].bias.fill_(-100.0)
        net[3].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, -2.0], [0.0, 0.5]]))
        net[3].bias.fill_(100.0)
    net[3].bias.requires_grad_(False)
    return net


def test_l1_sums_the_absolute_weights_without_biases_and_batchnorm():
    net = network()
    penalty = Regularizer(l1=0.1, weight_decay_on="all").penalty(net)
    assert float(penalty.detach()) == pytest.approx(0.1 * (11.5 + 6.5), rel=EXACT64["rtol"])
    penalty.backward()
    for name, parameter in net.named_parameters():
        if name in ("0.weight", "3.weight"):
            torch.testing.assert_close(parameter.grad, 0.1 * parameter.detach().sign(), **EXACT64)
        else:
            assert parameter.grad is None, name


def test_no_l1_costs_nothing():
    assert Regularizer(l1=0.0, weight_decay_on="weights").penalty(network()) == 0.0


def names(net, group):
    known = {id(parameter): name for name, parameter in net.named_parameters()}
    return [known[id(parameter)] for parameter in group["params"]]


def test_all_trained_parameters_decay():
    net = network()
    (group,) = Regularizer(l1=0.0, weight_decay_on="all").parameter_groups(net)
    assert names(net, group) == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"]
    assert "weight_decay" not in group  # the optimiser's own


def test_only_weights_decay():
    net = network()
    weights, rest = Regularizer(l1=0.0, weight_decay_on="weights").parameter_groups(net)
    assert names(net, weights) == ["0.weight", "3.weight"]
    assert "weight_decay" not in weights
    assert names(net, rest) == ["0.bias", "1.weight", "1.bias"]
    assert rest["weight_decay"] == 0.0


@pytest.mark.parametrize("choice", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("decaying", ["all", "weights"])
def test_a_step_without_gradient_shrinks_what_decays(choice, decaying):
    cfg = compose(
        f"optimizer={choice}",
        "optimizer.lr=0.1",
        "optimizer.weight_decay=0.5",
        f"regularizer.weight_decay_on={decaying}",
    )
    net = network()
    optimizer = build(cfg, "optimizer")(build(cfg, "regularizer").parameter_groups(net))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        decays = parameter.requires_grad and (decaying == "all" or parameter.dim() > 1)
        w = before[name]
        # Adam's first step has length lr whatever its gradient 0.5 w, up to eps = 1e-8
        shrunk = w - 0.1 * (0.5 * w) / ((0.5 * w).abs() + 1e-8) if choice == "adam" else w - 0.1 * 0.5 * w
        torch.testing.assert_close(parameter.detach(), shrunk if decays else w, **EXACT64)
    # the stationary laws require one decay for all parameters
    assert is_plain_momentum(optimizer) == (choice == "sgd" and decaying == "all")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1": -1e-4, "weight_decay_on": "all"}, "l1 must be at least 0, got -0.0001"),
        ({"l1": math.nan, "weight_decay_on": "all"}, "l1 must be at least 0, got nan"),
        ({"l1": 0.0, "weight_decay_on": "biases"}, "weight_decay_on must be all or weights, got biases"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Regularizer(**settings)
