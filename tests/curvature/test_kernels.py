"""Tests the short forms of layers against PyTorch's layers, with first and second derivatives."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from robustdyn.curvature.kernels import TwiceDifferentiable
from tests.curvature.reference import generator
from tests.tolerances import EXACT64

HALF = torch.finfo(torch.bfloat16).eps / 2  # unit roundoff: 8 significant bits, to nearest


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def leaf(tensor: Tensor, needed: bool = True) -> Tensor:
    return tensor.detach().requires_grad_(needed)


def nodes(tensor: Tensor) -> set[str]:
    """Names of the operations on the graph behind a tensor."""
    found, todo = {}, [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            todo += [following for following, _ in node.next_functions]
    return set(found.values())


def is_short(output: Tensor) -> bool:
    return "_ConvolutionBackward" in nodes(output)


def derivatives(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and first derivatives; and every second derivative, with zeros for those that vanish.

    The output is contracted with a weight c, itself one of the variables, so that derivatives with respect to
    the backward pass's input are among the mixed ones. Each first derivative is contracted with a random
    direction, and each contraction on its own and their sum are differentiated with respect to everything.
    """
    output = function(*tensors)
    c = leaf(randn(*output.shape, seed=8))
    variables = [tensor for tensor in (*tensors, c) if tensor.requires_grad]
    first = torch.autograd.grad((output * c).sum(), variables, create_graph=True)
    # so that a first derivative that is constant has a second one too
    slopes = [
        (gradient * randn(*gradient.shape, seed=9 + index)).sum() + 0.0 * c.sum()
        for index, gradient in enumerate(first)
    ]
    second: list[Tensor] = []
    for slope in (*slopes, torch.stack(slopes).sum()):
        second += torch.autograd.grad(
            slope, variables, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return [output.detach(), *first], second


def assert_same_derivatives(
    function: Callable[..., Tensor], *tensors: Tensor, reference: Callable[..., Tensor] | None = None
) -> None:
    """Compare the function under the mode with PyTorch's own, or with another way to write it."""

    def short(*arguments: Tensor) -> Tensor:
        with TwiceDifferentiable("full"):
            return function(*arguments)

    expected = derivatives(reference or function, *tensors)
    for ours, native in zip(derivatives(short, *tensors), expected, strict=True):
        for mine, theirs in zip(ours, native, strict=True):
            assert_close(mine, theirs, **EXACT64)
        assert all(derivative.isfinite().all() for derivative in native)
        assert any(bool(derivative.any()) for derivative in native)


# ---------------------------------------------------------------------- convolutions

CONVOLUTIONS = {
    "1d": (F.conv1d, (2, 4, 7), (6, 4, 3), {}),
    "1d stride and padding": (F.conv1d, (2, 4, 7), (6, 4, 3), {"stride": 2, "padding": 1}),
    "1d dilated": (F.conv1d, (2, 4, 9), (6, 4, 3), {"dilation": (2,), "padding": "same"}),
    "2d": (F.conv2d, (2, 4, 6, 5), (6, 4, 3, 3), {}),
    "2d pointwise": (F.conv2d, (2, 4, 6, 5), (6, 4, 1, 1), {"stride": 2}),
    "2d all settings": (
        F.conv2d,
        (2, 4, 9, 8),
        (6, 2, 3, 2),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2},
    ),
    "2d lists": (F.conv2d, (2, 4, 6, 5), (6, 4, 3, 3), {"stride": [2, 1], "padding": [1, 0]}),
    "2d one for all axes": (F.conv2d, (2, 4, 6, 5), (6, 4, 3, 3), {"stride": (2,), "padding": (1,)}),
    "2d depthwise": (F.conv2d, (2, 4, 6, 5), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    "2d depthwise multiplied": (F.conv2d, (2, 4, 6, 5), (8, 1, 3, 3), {"groups": 4, "stride": 2}),
    "2d valid": (F.conv2d, (2, 4, 6, 5), (6, 4, 3, 3), {"padding": "valid", "stride": 2}),
    "2d same": (F.conv2d, (2, 4, 6, 5), (6, 4, 3, 5), {"padding": "same"}),
    "2d same, even but dilated": (F.conv2d, (2, 4, 6, 5), (6, 4, 2, 3), {"padding": "same", "dilation": 2}),
    "2d stride leaves a rest": (F.conv2d, (2, 4, 8, 8), (6, 4, 3, 3), {"stride": 3}),
    "2d kernel as large as the image": (F.conv2d, (2, 4, 3, 3), (6, 4, 3, 3), {}),
    "2d one example": (F.conv2d, (1, 4, 6, 5), (6, 4, 3, 3), {"padding": 1}),
    "3d": (F.conv3d, (2, 2, 4, 5, 4), (4, 2, 2, 3, 2), {"stride": (1, 2, 1), "padding": (0, 1, 1)}),
    "3d groups, same": (F.conv3d, (2, 2, 4, 5, 4), (4, 1, 3, 1, 3), {"groups": 2, "padding": "same"}),
}
# asymmetric padding, and inputs without a batch dimension: left to PyTorch
UNTOUCHED = {
    "1d same, even": (F.conv1d, (2, 4, 7), (6, 4, 4), {"padding": "same"}),
    "2d same, even": (F.conv2d, (2, 4, 6, 5), (6, 4, 3, 2), {"padding": "same"}),
    "1d unbatched": (F.conv1d, (4, 7), (6, 4, 3), {"padding": 1}),
    "2d unbatched": (F.conv2d, (4, 6, 5), (6, 4, 3, 3), {"stride": 2}),
    "3d unbatched": (F.conv3d, (2, 4, 5, 4), (4, 2, 2, 3, 2), {"padding": "valid"}),
    "1d transposed": (F.conv_transpose1d, (2, 4, 7), (4, 6, 3), {"stride": 2}),
    "2d transposed": (F.conv_transpose2d, (2, 4, 6, 5), (4, 3, 3, 3), {"groups": 2, "padding": 1}),
    "3d transposed": (F.conv_transpose3d, (2, 2, 3, 3, 3), (2, 2, 2, 2, 2), {"output_padding": 0}),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *UNTOUCHED])
def test_convolution_derivatives(name, bias):
    function, x_shape, w_shape, settings = {**CONVOLUTIONS, **UNTOUCHED}[name]
    x, w = leaf(randn(*x_shape)), leaf(randn(*w_shape, seed=1))
    channels = function(x, w, **settings).shape[0 if x.dim() == w.dim() - 1 else 1]
    variables = (x, w, leaf(randn(channels, seed=2))) if bias else (x, w)
    assert_same_derivatives(partial(function, **settings), *variables)
    with TwiceDifferentiable("full"):
        assert is_short(function(*variables, **settings)) == (name in CONVOLUTIONS)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_derivatives_with_respect_to_some(name):
    """Inputs of a first layer, or weights that are not measured, have no derivative."""
    function, x_shape, w_shape, settings = CONVOLUTIONS[name]
    for needs_x, needs_w in ((True, False), (False, True)):
        x, w = leaf(randn(*x_shape), needs_x), leaf(randn(*w_shape, seed=1), needs_w)
        assert_same_derivatives(partial(function, **settings), x, w)


@pytest.mark.parametrize("name", ["1d dilated", "2d all settings", "2d depthwise", "3d"])
def test_convolution_is_what_finite_differences_see(name):
    function, x_shape, w_shape, settings = CONVOLUTIONS[name]

    def short(x: Tensor, w: Tensor) -> Tensor:
        with TwiceDifferentiable("full"):
            return function(x, w, **settings).square()

    x, w = leaf(0.3 * randn(1, *x_shape[1:])), leaf(0.3 * randn(*w_shape, seed=1))
    # numbers of order one in float64: gradgradcheck's own step 1e-6 leaves errors of 1e-7 or so
    assert gradgradcheck(short, (x, w), fast_mode=True, atol=1e-5)


def test_calls_in_every_style():
    x, w, b = leaf(randn(2, 4, 6, 5)), leaf(randn(4, 2, 3, 3, seed=1)), leaf(randn(4, seed=2))
    plain = F.conv2d(x, w, b, 2, 1, 1, 2)
    styles = [
        lambda: F.conv2d(x, w, b, 2, 1, 1, 2),
        lambda: F.conv2d(x, w, b, (2, 2), (1, 1), groups=2),
        lambda: F.conv2d(groups=2, stride=2, padding=[1, 1], input=x, weight=w, bias=b),
        lambda: torch.conv2d(x, w, bias=b, stride=2, padding=1, groups=2),
        lambda: nn.Conv2d(4, 4, 3, 2, 1, groups=2)._conv_forward(x, w, b),
    ]
    with TwiceDifferentiable("full"):
        for style in styles:
            output = style()
            assert is_short(output)
            assert_close(output, plain, **EXACT64)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Conv1d, (2, 4, 7)), (nn.Conv2d, (2, 4, 6, 7)), (nn.Conv3d, (1, 4, 4, 4, 5))]
)
def test_padding_modules(kind, shape, mode):
    if (kind, mode) == (nn.Conv3d, "reflect"):
        shape = (1, 4, 5, 5, 5)
    layer = kind(4, 3, 3, padding="same" if mode == "circular" else 1, padding_mode=mode).double()
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    weights = [leaf(parameter) for parameter in layer.parameters()]
    assert_same_derivatives(call, leaf(randn(*shape)), *weights)
    with TwiceDifferentiable("full"):
        assert is_short(layer(leaf(randn(*shape))))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_channels_last(groups):
    x = randn(3, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    w = randn(4, 4 // groups, 3, 3, seed=1).contiguous(memory_format=torch.channels_last)
    for input, weight in product((x, x.contiguous()), (w, w.contiguous())):
        call = partial(F.conv2d, stride=2, padding=1, groups=groups)
        assert_same_derivatives(call, leaf(input), leaf(weight))


def test_the_mode_ends_with_its_block():
    x, w = leaf(randn(2, 4, 6, 5)), leaf(randn(6, 4, 3, 3, seed=1))
    with pytest.raises(RuntimeError, match="size"), TwiceDifferentiable("full"):
        F.conv2d(x, w[:, :2])
    assert not is_short(F.conv2d(x, w))
    with TwiceDifferentiable("full"), torch.no_grad():
        silent = F.conv2d(x, w)
    assert not silent.requires_grad


# ---------------------------------------------------------------------- BatchNorm

NORMS = {
    "1d": (nn.BatchNorm1d, (6, 3)),
    "1d with length": (nn.BatchNorm1d, (4, 3, 5)),
    "2d": (nn.BatchNorm2d, (4, 3, 3, 2)),
    "3d": (nn.BatchNorm3d, (2, 3, 2, 3, 2)),
    "sync": (nn.SyncBatchNorm, (4, 3, 3, 2)),
    "one example": (nn.BatchNorm2d, (1, 3, 3, 2)),
}


def norm_layer(kind: type[nn.Module], **settings: object) -> nn.Module:
    layer = kind(3, **settings).double().eval()
    if layer.running_mean is not None:
        layer.running_mean.copy_(randn(3, seed=3))
        layer.running_var.copy_(randn(3, seed=4).square() + 0.1)
    return layer


def norm_variables(layer: nn.Module) -> tuple[Tensor, ...]:
    return tuple(leaf(randn(3, seed=5 + i)) for i, _ in enumerate(layer.parameters()))


def call_norm(layer: nn.Module) -> Callable[..., Tensor]:
    names = [name for name, _ in layer.named_parameters()]
    buffers = dict(layer.named_buffers())

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        tensors = {**{k: b.clone() for k, b in buffers.items()}, **dict(zip(names, parameters, strict=True))}
        return torch.func.functional_call(layer, tensors, (x,))

    return call


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_on_running_statistics(name, affine):
    kind, shape = NORMS[name]
    layer = norm_layer(kind, affine=affine)
    assert_same_derivatives(call_norm(layer), leaf(randn(*shape)), *norm_variables(layer))
    with TwiceDifferentiable("full"):
        output = call_norm(layer)(leaf(randn(*shape)), *norm_variables(layer))
    assert not any("Norm" in node for node in nodes(output))


@pytest.mark.parametrize("given", ["weight", "bias"])
def test_batch_norm_with_only_a_scale_or_a_shift(given):
    """Against the formula: torch 2.13's own second derivative is wrong with a bias and no weight."""
    x, mean, var = leaf(randn(4, 3, 2, 2)), randn(3, seed=3), randn(3, seed=4).square() + 0.1

    def call(x: Tensor, vector: Tensor) -> Tensor:
        return F.batch_norm(input=x, running_mean=mean, running_var=var, eps=0.01, **{given: vector})

    def formula(x: Tensor, vector: Tensor) -> Tensor:
        normalised = (x.movedim(1, -1) - mean) / (var + 0.01).sqrt()
        return (normalised * vector if given == "weight" else normalised + vector).movedim(-1, 1)

    assert_same_derivatives(call, x, leaf(randn(3, seed=5)), reference=formula)


@pytest.mark.parametrize("var", [0.0, 1e-30, 1e-8])
def test_batch_norm_with_a_tiny_variance(var):
    """The scale is up to 1/√eps = 316; a dead channel's statistics are exactly of this kind."""
    layer = norm_layer(nn.BatchNorm2d)
    layer.running_var.fill_(var)
    layer.running_mean.zero_()
    x = leaf(1e-3 * randn(4, 3, 2, 2))
    assert_same_derivatives(call_norm(layer), x, *norm_variables(layer))
    with TwiceDifferentiable("full"):
        assert call_norm(layer)(x, *norm_variables(layer)).isfinite().all()


@pytest.mark.parametrize("name", [name for name in NORMS if name not in ("sync", "one example")])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_on_batch_statistics_is_left_alone(name, tracked):
    kind, shape = NORMS[name]
    layer = norm_layer(kind, track_running_stats=tracked).train(tracked)
    variables = (leaf(randn(*shape)), *norm_variables(layer))
    with TwiceDifferentiable("full"):
        output = call_norm(layer)(*variables)
        assert any("BatchNormBackward" in node for node in nodes(output))
        if tracked:
            layer(variables[0])
    assert torch.equal(output, call_norm(layer)(*variables))
    assert_same_derivatives(call_norm(layer), *variables)
    if tracked:
        assert layer.num_batches_tracked == 1
        expected = 0.9 * randn(3, seed=3) + 0.1 * variables[0].detach().transpose(0, 1).flatten(1).mean(dim=1)
        assert_close(layer.running_mean, expected, **EXACT64)


# ---------------------------------------------------------------------- bfloat16

HALVED = {
    name: CONVOLUTIONS[name]
    for name in ("1d", "2d", "2d all settings", "2d depthwise", "2d same", "2d stride leaves a rest", "3d")
}


def single(*shape: int, seed: int) -> Tensor:
    return leaf(randn(*shape, seed=seed).float())


def assert_rounded_once(result: Tensor, exact: Tensor, size: Tensor) -> None:
    """Check float32 sums of products of bfloat16 numbers that were rounded to bfloat16 at the end.

    ``exact`` is their value and ``size`` the sum of the absolute values. The result may be off by half an ulp
    of bfloat16 and by float32's rounding of the sum, which has at most a hundred terms here.
    """
    assert result.dtype == torch.float32
    assert ((result.double() - exact).abs() <= HALF * exact.abs() + 100 * 2.0**-24 * size).all()


@pytest.mark.parametrize("name", HALVED)
def test_bfloat16_convolution(name):
    function, x_shape, w_shape, settings = HALVED[name]
    x, w = single(*x_shape, seed=0), single(*w_shape, seed=1)
    with TwiceDifferentiable("bfloat16"):
        output = function(x, w, **settings)
    c = randn(*output.shape, seed=2).float()
    gradients = torch.autograd.grad(output, (x, w), c)

    def value_and_gradients(x: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        x, w = leaf(x), leaf(w)
        output = function(x, w, **settings)
        return (output.detach(), *torch.autograd.grad(output, (x, w), c))

    rounded = [tensor.detach().bfloat16().double() for tensor in (x, w, c)]
    exact = value_and_gradients(*rounded)
    sizes = value_and_gradients(*(tensor.abs() for tensor in rounded))
    for found, wanted, size in zip((output, *gradients), exact, sizes, strict=True):
        assert_rounded_once(found, wanted, size)
    # Against unrounded numbers: two factors and the result, each to HALF at worst and HALF/√3 typically, on
    # sums whose terms partly cancel. Neither far less (nothing was rounded) nor far more.
    full = value_and_gradients(x.detach().double(), w.detach().double(), c.double())
    for found, wanted in zip((output, *gradients), full, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert HALF / 4 < error < 3 * HALF


@pytest.mark.parametrize("name", HALVED)
def test_bfloat16_second_derivatives(name):
    """Every factor of every product is rounded once, so that relative errors are a few times HALF."""
    function, x_shape, w_shape, settings = HALVED[name]

    def smooth(x: Tensor, w: Tensor) -> Tensor:
        return function(x, w, **settings).square()

    def half(x: Tensor, w: Tensor) -> Tensor:
        with TwiceDifferentiable("bfloat16"):
            output = function(x, w, **settings)
        assert output.dtype == torch.float32
        return output.square()

    def products(call: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, w = leaf(randn(*x_shape).to(dtype)), leaf(randn(*w_shape, seed=1).to(dtype))
        first = torch.autograd.grad(call(x, w).sum(), (x, w), create_graph=True)
        directions = [randn(*x_shape, seed=2).to(dtype), randn(*w_shape, seed=3).to(dtype)]
        return [*first, *torch.autograd.grad(first, (x, w), directions)]

    for found, wanted in zip(products(half, torch.float32), products(smooth, torch.float64), strict=True):
        assert found.dtype == torch.float32
        # three or four convolutions on every path, of three roundings each, adding at random: √12 HALF; the
        # terms of a product with a Hessian cancel in part, which costs a factor 2 more
        assert HALF / 4 < (found.double() - wanted).norm() / wanted.norm() < 2 * 12**0.5 * HALF


def test_bfloat16_linear():
    x, w, b = single(5, 3, 8, seed=0), single(6, 8, seed=1), single(6, seed=2)
    with TwiceDifferentiable("bfloat16"):
        output, bare = F.linear(x, w, b), F.linear(x, w)
        from_module = nn.Linear(8, 6)(x)
    exact = x.bfloat16().double() @ w.bfloat16().double().T
    assert_rounded_once(bare, exact, x.abs().double() @ w.abs().double().T)
    assert torch.equal(output, bare + b)
    assert from_module.dtype == torch.float32
    gradients = torch.autograd.grad(output.square().sum(), (x, w, b))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_bfloat16_leaves_biases_alone():
    b = torch.tensor([1.0 + 2.0**-20, -3.0 + 2.0**-18])  # both lost in bfloat16
    with TwiceDifferentiable("bfloat16"):
        convolved = F.conv2d(torch.zeros(1, 3, 4, 4), torch.ones(2, 3, 3, 3), b)
        mapped = F.linear(torch.zeros(1, 3), torch.ones(2, 3), b)
    assert torch.equal(convolved, b.view(1, 2, 1, 1).expand_as(convolved))
    assert torch.equal(mapped, b[None])


def test_bfloat16_rounds_nothing_else():
    layers = nn.Sequential(
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.GroupNorm(2, 4),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 3, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Tanh(),
    ).eval()
    layers[0].running_mean.copy_(randn(4, seed=3).float())
    x, w, matrix = single(3, 4, 7, 7, seed=0), single(2, 4, 2, 2, seed=1), single(12, 5, seed=2)

    def values() -> list[Tensor]:
        outputs = layers(x) @ matrix
        losses = F.cross_entropy(outputs, torch.tensor([0, 1, 4]), reduction="none")
        # without a short form: PyTorch's own, in full precision
        same, single_image = F.conv2d(x, w, padding="same"), F.conv2d(x[0], w)
        slopes = torch.autograd.grad(losses.sum(), (x, matrix, *layers.parameters()))
        return [outputs, losses, same, single_image, *slopes]

    with TwiceDifferentiable("full"):
        full = values()
    with TwiceDifferentiable("bfloat16"):
        half = values()
    for one, other in zip(full, half, strict=True):
        assert torch.equal(one, other)


def test_tf32_is_left_to_torch():
    x, w = single(2, 4, 6, 5, seed=0), single(6, 4, 3, 3, seed=1)
    with TwiceDifferentiable("full"):
        full = F.conv2d(x, w)
    with TwiceDifferentiable("tf32"):
        assert torch.equal(F.conv2d(x, w), full)
