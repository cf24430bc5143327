"""Tests the norms against brute force, against other code, and under changes that keep the function."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from robustdyn.complexity import MEASURES
from robustdyn.complexity.convolution import convolution_norm
from robustdyn.complexity.index import MEASURES as INDEX
from robustdyn.complexity.margins import MEASURES as MARGINS
from robustdyn.complexity.norms import MEASURES as NORMS
from robustdyn.complexity.spectral import MEASURES as SPECTRAL
from robustdyn.models import PreActResNet
from tests.complexity.plain_network import images, on, plain, trained, unsettled
from tests.tolerances import EXACT64

# Raw values of the other code, which takes their roots or halves after a division by m, in float64. They go
# through a root or an exponential and back, so that a few of their last digits are lost.
OTHERS = {
    "frobenius_sum": 28.85860766524609,
    "frobenius_log_product": 4.975199625122131,
    "frobenius_distance": 39.20617429692669,
    "spectral_log_product": 4.780176191342331,
    "spectral_log_product_reshaped": 3.285671927110785,
    "spectral_distance": 36.74619525898184,
    "frobenius_over_spectral": 3.3582167211217833,
    "path_norm": 23.331092442299134,
}


@pytest.mark.parametrize("name", OTHERS)
def test_value_of_the_public_code(name):
    network = on(trained(), images(), initial=dict(plain(1.4).named_parameters()))
    # its BatchNorm keeps an ε of 1e-12 after folding
    assert MEASURES[name](network).value == pytest.approx(OTHERS[name], rel=1e-10)


def test_low_margin_of_the_public_code():
    """It has 1/γ², which loses the sign."""
    value = MEASURES["margin_p10_clean"](on(trained(), images())).value
    assert value < 0
    assert 1 / value**2 == pytest.approx(0.9412652137358181, rel=1e-10)


# ---------------------------------------------------------------- two layers, by brute force


@pytest.fixture
def two_layers():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    clean = torch.randn(20, 4, dtype=torch.float64)
    start = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    return model, on(model, clean, initial=start)


def weights(model):
    return model[0].weight.detach(), model[2].weight.detach()


def test_norms_of_two_layers(two_layers):
    model, network = two_layers
    matrices = weights(model)
    changes = [w - network.initial[f"{k}.weight"] for w, k in zip(matrices, (0, 2), strict=True)]
    squares = [float(sum(x**2 for x in w.flatten())) for w in matrices]
    top = [float(torch.linalg.eigvalsh(w @ w.T)[-1]) for w in matrices]
    expected = {
        "frobenius_sum": sum(squares),
        "frobenius_log_product": math.log(squares[0] * squares[1]),
        "frobenius_distance": sum(float((d**2).sum()) for d in changes),
        "spectral_log_product": math.log(top[0] * top[1]),
        "spectral_log_product_reshaped": math.log(top[0] * top[1]),
        "spectral_distance": sum(float(torch.linalg.eigvalsh(d @ d.T)[-1]) for d in changes),
        "frobenius_over_spectral": squares[0] / top[0] + squares[1] / top[1],
    }
    rows = [sum(float(row.norm()) for row in w) for w in matrices]
    ratios = sum((r / t**0.5) ** (2 / 3) for r, t in zip(rows, top, strict=True))
    expected["spectral_complexity"] = math.log((top[0] * top[1]) ** 0.5 * ratios**1.5)
    for name, value in expected.items():
        assert MEASURES[name](network).value == pytest.approx(value, rel=1e-10), name


def test_path_norm_is_the_sum_over_all_paths(two_layers):
    model, network = two_layers
    (w, b), (v, c) = [(layer.weight.detach(), layer.bias.detach()) for layer in (model[0], model[2])]
    paths = [(w[h, i] * v[k, h]) ** 2 for i, h, k in itertools.product(range(4), range(5), range(3))]
    paths += [(b[h] * v[k, h]) ** 2 for h, k in itertools.product(range(5), range(3))]
    paths += [c[k] ** 2 for k in range(3)]
    assert MEASURES["path_norm"](network).value == pytest.approx(float(sum(paths)), rel=1e-10)


def fisher_rao(network):
    """⟨θ, ∇ℓ_i⟩² of every example, from its own gradient."""
    parameters = dict(network.model.named_parameters())
    total = []
    for x, y in zip(network.adversarial, network.targets, strict=True):
        loss = F.cross_entropy(network.model(x[None]), y[None])
        slopes = torch.autograd.grad(loss, list(parameters.values()))
        total.append(sum((p * g).sum().item() for p, g in zip(parameters.values(), slopes, strict=True)) ** 2)
    return torch.tensor(total, dtype=torch.float64)


def test_fisher_rao_norm_is_that_of_each_gradient(two_layers):
    _, network = two_layers
    found, each = MEASURES["fisher_rao"](network), fisher_rao(network)
    assert found.value == pytest.approx(float(each.mean()), rel=1e-10)
    assert found.standard_error == pytest.approx(float(each.std()) / len(each) ** 0.5, rel=1e-8)


def test_fisher_rao_norm_without_biases_is_the_theorem_of_its_source():
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 3, bias=False),
    ).double()
    network = on(model, torch.randn(30, 4, dtype=torch.float64))
    logits = model(network.adversarial).detach()
    slopes = logits.softmax(dim=1) - F.one_hot(network.targets, 3)
    truth = 3**2 * ((logits * slopes).sum(dim=1) ** 2).mean()
    assert MEASURES["fisher_rao"](network).value == pytest.approx(float(truth), rel=1e-10)


def test_gradient_norm_and_index_of_two_layers(two_layers):
    model, network = two_layers
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def losses(p):
        return F.cross_entropy(
            functional_call(model, p, (network.adversarial,)), network.targets, reduction="none"
        )

    slopes = jacrev(losses)(parameters)
    each = torch.cat([s.flatten(1) for s in slopes.values()], dim=1)
    mean = each.mean(dim=0)
    found = MEASURES["weight_gradient_norm"](network)
    assert found.value == pytest.approx(float(mean.norm()), rel=1e-10)
    along = each @ mean / mean.norm()
    assert found.standard_error == pytest.approx(float(along.std()) / len(along) ** 0.5, rel=1e-8)

    second = jacrev(jacrev(lambda p: losses(p).mean()))(parameters)
    index = 0.0
    for name in ("0.weight", "2.weight"):
        size = parameters[name].numel()
        trace = second[name][name].reshape(size, size).trace().clamp(min=0)
        index += float((parameters[name].square().sum() * trace).sqrt())
    assert MEASURES["wci"](network).value == pytest.approx(index, rel=1e-8)


# ---------------------------------------------------------------- convolutions


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_norm_of_a_circular_convolution_is_that_of_its_dense_matrix(stride, kernel, groups, dilation):
    torch.manual_seed(7)
    size = (6, 6)
    weight = torch.randn(4, 6 // groups, kernel, kernel, dtype=torch.float64)

    def convolved(x):
        around = dilation * (kernel - 1)  # padding of one side; it may be as wide as the image
        wide = x
        while wide.shape[-1] < size[0] + around:
            wide = torch.cat([wide, x], dim=-1)
        tall = wide
        while tall.shape[-2] < size[1] + around:
            tall = torch.cat([tall, wide], dim=-2)
        padded = tall[..., : size[0] + around, : size[1] + around]
        return F.conv2d(padded, weight, stride=stride, dilation=dilation, groups=groups)

    basis = torch.eye(6 * 36, dtype=torch.float64).view(-1, 6, *size)
    dense = convolved(basis).flatten(1).T
    found = convolution_norm(weight, size, stride=stride, dilation=(dilation, dilation), groups=groups)
    assert found == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-10)


def test_norm_of_a_circular_convolution_in_one_and_three_dimensions():
    torch.manual_seed(7)
    for dims, size in ((1, (8,)), (3, (4, 2, 4))):
        weight = torch.randn(3, 2, *[2] * dims, dtype=torch.float64)
        inputs = torch.eye(2 * math.prod(size), dtype=torch.float64).view(-1, 2, *size)
        padded = F.pad(inputs, [0, 1] * dims, mode="circular")
        dense = (F.conv1d if dims == 1 else F.conv3d)(padded, weight, stride=2).flatten(1).T
        found = convolution_norm(weight, size, stride=(2,) * dims, dilation=(1,) * dims, groups=1)
        assert found == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-10)


def test_zero_padding_does_not_exceed_circular_padding_of_a_larger_image():
    torch.manual_seed(7)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    basis = torch.eye(3 * 36, dtype=torch.float64).view(-1, 3, 6, 6)
    dense = F.conv2d(basis, weight, padding=1).flatten(1).T
    larger = convolution_norm(weight, (8, 8), stride=(1, 1), dilation=(1, 1), groups=1)
    assert float(torch.linalg.matrix_norm(dense, 2)) < larger


# ---------------------------------------------------------------- BatchNorm


def test_folded_weights_make_the_same_network():
    """Behind each layer BatchNorm is replaced by its shift, and weights by the folded ones."""
    network = on(trained(), images())
    x = network.clean
    for layer, norm in zip(network.layers.each, network.layers.norms, strict=True):
        assert norm.front is layer.call
        bias = norm.shift + norm.scale * layer.call.arguments["bias"].detach()
        x = F.conv2d(x, layer.weight, bias, padding=layer.weight.shape[-1] // 2)
        x = x if layer.name == "6.weight" else F.relu(x)
    torch.testing.assert_close(x.mean(dim=(2, 3)), network.clean_logits, **EXACT64)


def preact():
    torch.manual_seed(9)
    return unsettled(
        PreActResNet(
            num_classes=3, in_channels=1, width=4, blocks=(1, 1), strides=(1, 2), mean=(0.4,), std=(0.3,)
        )
    )


def pictures():
    torch.manual_seed(10)
    return torch.rand(24, 1, 6, 6, dtype=torch.float64)


def test_folded_weights_of_a_preactivation_network():
    """γ/√v of a BatchNorm behind a sum goes to the layers behind it, as its size."""
    model = preact()
    layers = on(model, pictures()).layers
    folded = {layer.name: layer.weight for layer in layers.each}
    first, second = model.layers[0][0], model.layers[1][0]

    def scale(norm):
        return (norm.weight / norm.running_var.sqrt()).detach()

    def columns(weight, norm):
        return weight.detach() * scale(norm).abs().view(1, -1, *[1] * (weight.dim() - 2))

    truth = {
        "conv1.weight": model.conv1.weight,
        "layers.0.0.conv1.weight": columns(first.conv1.weight, first.bn1)
        * scale(first.bn2).view(-1, 1, 1, 1),
        "layers.0.0.conv2.weight": first.conv2.weight,
        "layers.1.0.conv1.weight": columns(second.conv1.weight, second.bn1)
        * scale(second.bn2).view(-1, 1, 1, 1),
        "layers.1.0.conv2.weight": second.conv2.weight,
        "layers.1.0.shortcut.0.weight": columns(second.shortcut[0].weight, second.bn1),
        "linear.weight": columns(model.linear.weight, model.bn),
    }
    assert set(folded) == set(truth)
    for name, weight in truth.items():
        torch.testing.assert_close(folded[name], weight.detach(), rtol=1e-10, atol=1e-12)


def test_path_norm_of_a_preactivation_network():
    """Against the network with squared parameters, in which BatchNorm has the statistics 0 and 1."""
    model = preact()
    network = on(model, pictures())
    squared = preact()
    with torch.no_grad():
        for module, original in zip(squared.modules(), model.modules(), strict=True):
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.square_()
            if isinstance(module, nn.Linear):
                module.bias.square_()
            if isinstance(module, nn.BatchNorm2d):
                scale = original.weight / (original.running_var + original.eps).sqrt()
                module.weight.copy_(scale.square())
                module.bias.copy_((original.bias - scale * original.running_mean).square())
                module.running_mean.zero_()
                module.running_var.fill_(1 - module.eps)
        ones = torch.ones_like(network.clean[:1]) * squared.std + squared.mean
        truth = float(squared(ones).sum())
    assert MEASURES["path_norm"](network).value == pytest.approx(truth, rel=1e-10)


def _rescaled(model):
    """The first layer times 3, the next one by 3."""
    with torch.no_grad():
        model[0].weight *= 3
        model[0].bias *= 3
        model[2].weight /= 3
    return model


def _scaled(model):
    """The layers in front of a BatchNorm times 4, whose statistics follow."""
    with torch.no_grad():
        for layer, norm in ((model[0], model[1]), (model[3], model[4])):
            layer.weight *= 4
            layer.bias *= 4
            norm.running_mean *= 4
            norm.running_var *= 16
    return model


def _relu_network():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


CHANGES = {"relu_rescaling": (_relu_network, _rescaled), "batchnorm_scale": (trained, _scaled)}
HERE = [measure for measure in (*NORMS, *SPECTRAL, *MARGINS, *INDEX) if not measure.name.endswith("top_k")]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("measure", HERE, ids=lambda measure: measure.name)
def test_invariances_are_those_stated(measure, change):
    build, changed = CHANGES[change]
    before, after = build(), changed(build())
    inputs = images() if change == "batchnorm_scale" else torch.randn(40, 4, dtype=torch.float64)
    start = {name: p.detach() for name, p in build().named_parameters()}
    start = {name: 0.3 * p + 0.1 if "weight" in name else p for name, p in start.items()}
    adversarial = 5 * inputs.flip(0) - 3  # far enough to change predictions
    first = on(before, inputs, adversarial=adversarial, initial=start)
    second = on(after, inputs, targets=first.targets, adversarial=adversarial, initial=start)
    torch.testing.assert_close(first.clean_logits, second.clean_logits, rtol=1e-9, atol=1e-11)
    values = [measure(network) for network in (first, second)]
    assert not values[0].undefined, values[0].undefined
    same = values[1].value == pytest.approx(values[0].value, rel=1e-8)
    assert same == (change in measure.invariances)


# ---------------------------------------------------------------- what has no value


def undefined(name, network):
    found = MEASURES[name](network)
    assert math.isnan(found.value)
    return found.undefined


def test_a_network_outside_the_definition_says_why():
    inputs = torch.randn(20, 4, dtype=torch.float64)
    smooth = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double()
    assert undefined("path_norm", on(smooth, inputs)) == (
        "the path norm is one of ReLU networks, and this network has gelu"
    )
    assert MEASURES["frobenius_sum"](on(smooth, inputs)).value > 0
    assert "weights before training are not known" in undefined("spectral_distance", on(smooth, inputs))

    late = unsettled(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    assert "the BatchNorm 2 cannot be folded" in undefined("frobenius_sum", on(late, inputs))

    silent = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    nn.init.zeros_(silent[0].weight)
    for name in (
        "spectral_log_product",
        "spectral_complexity",
        "frobenius_over_spectral",
        "frobenius_log_product",
    ):
        assert "zero" in undefined(name, on(silent, inputs))

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
            self.linear = nn.Linear(3, 3).double()

        def forward(self, x):
            return self.linear(x @ self.table)

    assert undefined("frobenius_sum", on(Weighted(), inputs)) == (
        "table is not the weight of a convolution or linear layer"
    )
    for name in ("curvature_term_top_k", "log_variance_term_top_k"):
        assert "stationary posterior variance" in undefined(name, on(silent, inputs))


def test_a_measure_leaves_the_network_as_it_was():
    model = preact()
    network = on(model, pictures(), initial={name: p.clone() for name, p in model.named_parameters()})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for measure in HERE:
        measure(network)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
