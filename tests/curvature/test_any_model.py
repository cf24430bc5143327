"""Tests products for many kinds of models, losses and targets: each is right, or it is refused."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from robustdyn.curvature import EmpiricalRisk, GaussNewton, GradientCovariance, Hessian, gradient_projections
from tests.cases import CASES
from tests.curvature.reference import (
    DENSE,
    OPERATORS,
    PLENTY,
    assert_same_bits,
    assert_unchanged,
    check_operator_contract,
    dense_covariance,
    dense_gradients,
    dense_hessian,
    generator,
    products_of,
    random,
    snapshot,
)
from tests.tolerances import EXACT64, FD

LABELS = torch.arange(7) % 3


class Made(nn.Module):
    """A model of some parts with the given forward pass."""

    def __init__(self, function: Callable[..., object], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def mlp(outputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def without_a_second_dimension() -> nn.Module:
    """Outputs of shape (B,)."""
    return Made(lambda self, x: self.body(x)[:, 0], body=mlp(1))


def with_an_idle_parameter() -> nn.Module:
    idle = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    return Made(lambda self, x: self.body(x), body=mlp(3), idle=idle)


def words() -> nn.Module:
    torch.manual_seed(3)
    parts = {"words": nn.Embedding(6, 4), "head": nn.Linear(4, 3)}
    return Made(lambda self, x: self.head(self.words(x).tanh().mean(dim=1)), **parts).double()


def tied() -> nn.Module:
    parts = {"first": mlp(4), "second": nn.Linear(4, 5).double(), "head": mlp(3)}
    parts["second"].weight = parts["first"][0].weight
    return Made(lambda self, x: self.head(self.second(self.first(x)).tanh()[:, :4]), **parts)


def viewing() -> nn.Module:
    """Flattens with .view, which takes contiguous tensors only."""
    torch.manual_seed(3)
    parts = {"conv": nn.Conv2d(2, 3, 3), "head": nn.Linear(48, 3)}
    return Made(lambda self, x: self.head(self.conv(x).relu().view(len(x), -1)), **parts).double()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().reshape(len(targets), -1).sum(dim=1)


def linear_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * targets).sum(dim=1)


def loss_of_positions(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none").mean(dim=1)


def risk_on(
    model: nn.Module, inputs: Tensor | None = None, targets: Tensor = LABELS, **settings: object
) -> EmpiricalRisk:
    inputs = random(7, 4) if inputs is None else inputs
    return EmpiricalRisk(model, inputs, targets, **{"chunk_size": 3, **settings})


PROBLEMS: dict[str, tuple[Callable[..., EmpiricalRisk], str]] = {  # and the operators that are exactly zero
    "squared error": (lambda **s: risk_on(mlp(2), None, random(7, 2, seed=1), loss=squared_error, **s), ""),
    "outputs without a second dimension": (
        lambda **s: risk_on(without_a_second_dimension(), None, random(7, seed=1), loss=squared_error, **s),
        "",
    ),
    "a label for each of three positions": (
        lambda **s: risk_on(
            mlp(2),
            random(7, 3, 4),
            torch.randint(2, (7, 3), generator=generator()),
            **{"loss": loss_of_positions, **s, "chunk_size": 4},
        ),
        "",
    ),
    # Λ = 0, and the slopes do not depend on the outputs
    "a loss linear in the outputs": (
        lambda **s: risk_on(mlp(3), None, random(7, 3, seed=1), loss=linear_loss, **s),
        "gauss_newton",
    ),
    "a loss that is the output": (
        lambda **s: risk_on(without_a_second_dimension(), None, random(7), loss=lambda z, y: z, **s),
        "gauss_newton",
    ),
    # H = G = 0, while C₁ is the covariance of the inputs
    "nothing to differentiate twice": (
        lambda **s: risk_on(
            nn.Linear(4, 3, bias=False).double(), None, random(7, 3, seed=1), loss=linear_loss, **s
        ),
        "hessian gauss_newton",
    ),
    "a parameter without effect": (lambda **s: risk_on(with_an_idle_parameter(), **s), ""),
    "only a parameter without effect": (
        lambda **s: risk_on(with_an_idle_parameter(), parameters=["idle"], **s),
        "hessian gauss_newton covariance",
    ),
    "integer inputs": (
        lambda **s: risk_on(words(), torch.randint(6, (7, 5), generator=generator()), **s),
        "",
    ),
    "probabilities as targets": (
        lambda **s: risk_on(mlp(3), None, random(7, 3, seed=1).softmax(dim=1), **s),
        "",
    ),
    "tied weights": (lambda **s: risk_on(tied(), **s), ""),
    "flattened by view": (lambda **s: risk_on(viewing(), *CASES["conv"].problem()[1:], **s), ""),
}


@pytest.mark.parametrize("memory", [None, PLENTY])
@pytest.mark.parametrize("name", PROBLEMS)
def test_operators_are_dense(name, memory):
    build, zero = PROBLEMS[name]
    risk = build(memory=memory)
    vector, directions = random(risk.numel), random(risk.numel, 2)
    for kind, operator in OPERATORS.items():
        check_operator_contract(operator(risk), DENSE[kind](risk))
        size = (operator(risk) @ vector).norm()
        assert size == 0.0 if kind in zero.split() else size > 0.01
    gradients = dense_gradients(risk)
    assert_close(gradient_projections(risk, directions), gradients @ directions, **EXACT64)
    assert_close(risk.gradient(), gradients.mean(dim=0), **EXACT64)
    if "idle" in risk.names:
        assert not (Hessian(risk) @ vector)[risk.blocks["idle"]].any()
        assert not risk.gradient()[risk.blocks["idle"]].any()


def two_names() -> nn.Module:
    """Modules, one with a buffer, that are each reached by two names."""
    torch.manual_seed(3)
    parts = {"backbone": nn.Linear(4, 5), "norm": nn.BatchNorm1d(5), "head": nn.Linear(5, 3)}
    layers = nn.Sequential(parts["backbone"], parts["norm"], nn.Tanh(), parts["head"])
    return Made(lambda self, x: self.layers(x), **parts, layers=layers).double().eval()


def test_modules_with_two_names():
    model, inputs = two_names(), random(7, 4)
    before = snapshot(model)
    kinds = {name: type(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    own = [module.weight for module in (model.backbone, model.norm, model.head)]
    risk = risk_on(model, inputs)
    for kind in OPERATORS.values():
        _ = kind(risk) @ random(risk.numel)
    assert_unchanged(model, before)
    assert {name: type(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == kinds
    assert all(a is b.weight for a, b in zip(own, (model.backbone, model.norm, model.head), strict=True))
    F.cross_entropy(model(inputs), LABELS).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # PyTorch's functional_call, the reference's, would leave such a model changed: one name for each module
    same = risk_on(nn.Sequential(*copy.deepcopy(model.layers)), inputs)
    for name, kind in OPERATORS.items():
        assert_close(kind(risk) @ random(risk.numel), DENSE[name](same) @ random(risk.numel), **EXACT64)


class Pair(nn.Module):
    """Two inputs, and two outputs of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.aside = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, object]:
        hidden = self.body(x).tanh()
        return {"logits": hidden * scale, "rest": (self.aside(hidden).view(-1, 2, 2),)}


def test_several_inputs_outputs_and_targets():
    """The same as a model with one tensor of each."""

    def loss(outputs: dict[str, object], targets: tuple[Tensor, Tensor]) -> Tensor:
        apart = F.cross_entropy(outputs["logits"], targets[0], reduction="none")
        return apart + (outputs["rest"][0] - targets[1]).square().sum(dim=(1, 2))

    def flat(self: Made, z: Tensor) -> Tensor:
        outputs = self.pair(z[:, :4], z[:, 4:])
        return torch.cat([outputs["logits"], outputs["rest"][0].flatten(1)], dim=1)

    def one_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        logits, rest = outputs[:, :3], outputs[:, 3:]
        return F.cross_entropy(logits, labels_of(targets), reduction="none") + (
            rest - targets[:, 1:]
        ).square().sum(dim=1)

    def labels_of(targets: Tensor) -> Tensor:
        return targets[:, 0].long()

    model, x, scale, image = Pair().double(), random(7, 4), random(7, 1, seed=1), random(7, 2, 2, seed=2)
    joined = Made(flat, pair=model)
    packed = torch.cat([LABELS[:, None].double(), image.flatten(1)], dim=1)
    expected = risk_on(joined, torch.cat([x, scale], dim=1), packed, loss=one_loss)
    for inputs in ((x, scale), {"scale": scale.numpy(), "x": x}, [x.numpy(), scale.numpy()]):
        risk = risk_on(model, inputs, (LABELS, image), loss=loss)
        assert risk.value() == pytest.approx(expected.value(), rel=1e-12)
        assert_close(risk.gradient(), expected.gradient(), **EXACT64)
        for kind in OPERATORS.values():
            vector = random(risk.numel)
            assert_close(kind(risk) @ vector, kind(expected) @ vector, **EXACT64)


def test_outputs_that_cannot_be_packed_are_refused():
    parts = {"body": mlp(3), "aside": nn.Linear(4, 3).double()}
    model = Made(lambda self, x: (self.body(x), self.aside(x).sum()), **parts)
    with pytest.raises(ValueError, match="one of them is no floating-point tensor with the 7 examples first"):
        risk_on(
            model, loss=lambda outputs, y: F.cross_entropy(outputs[0], y, reduction="none"), chunk_size=None
        )


@pytest.mark.parametrize("length", [4, 7])
def test_noise_of_outputs_that_do_not_begin_with_the_examples(length):
    """Refused, or right; but never silently another matrix."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.mean(dim=0), targets, reduction="none")

    time_first = Made(lambda self, x: self.body(x).transpose(0, 1), body=mlp(3))
    risk = risk_on(time_first, random(7, length, 4), loss=loss, chunk_size=None)
    vector = random(risk.numel)
    assert_close(Hessian(risk) @ vector, dense_hessian(risk) @ vector, **EXACT64)
    try:
        found = GradientCovariance(risk) @ vector
    except ValueError:
        found = dense_covariance(risk) @ vector
    assert_close(found, dense_covariance(risk) @ vector, **EXACT64)


@pytest.mark.parametrize(
    "middle", [nn.Linear(6, 6), nn.Conv2d(2, 2, 3, padding=1)], ids=lambda middle: type(middle).__name__
)
def test_activation_checkpointing(middle):
    """The middle is computed again in the backward pass."""
    _, inputs, targets = CASES["conv"].problem()
    body = nn.Sequential(middle, nn.Tanh()).double().eval()
    head = nn.Linear(72, 3).double()
    kept = Made(lambda self, x: self.head(self.body(x).flatten(1)), body=body, head=head)
    again = Made(
        lambda self, x: self.head(checkpoint(self.body, x, use_reentrant=False).flatten(1)),
        body=body,
        head=head,
    )
    wanted, found = (products_of(EmpiricalRisk(model, inputs, targets)) for model in (kept, again))
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_close(found[name], wanted[name], **EXACT64)


def test_attention():
    """PyTorch's default kernel, flash attention, has no second derivative."""
    torch.manual_seed(3)
    block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu")
    model = Made(lambda self, x: self.head(self.block(x).mean(dim=1)), block=block, head=nn.Linear(4, 3))
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    risk = risk_on(model.double().eval(), random(7, 5, 4))
    found = {name: kind(risk) @ random(risk.numel) for name, kind in OPERATORS.items()}
    after = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    assert after == before
    with sdpa_kernel(SDPBackend.MATH):
        for name in ("gauss_newton", "covariance"):
            assert_close(found[name], DENSE[name](risk) @ random(risk.numel), **EXACT64)
    # torch.func.hessian, the reference's, is off by a tenth here
    theta, step = risk.theta(), 1e-5 * random(risk.numel)
    slope = (risk.at(theta + step).gradient() - risk.at(theta - step).gradient()) / 2e-5
    assert_close(found["hessian"], slope, **FD)
    check_operator_contract(Hessian(risk))


@pytest.mark.parametrize("kind", ["parametrizations", "old"])
def test_weight_normalisation(kind):
    """PyTorch's own second derivative of it is wrong; central differences know better."""
    torch.manual_seed(0)
    normalise = nn.utils.weight_norm if kind == "old" else nn.utils.parametrizations.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = normalise(nn.Linear(6, 3).double())
    risk = EmpiricalRisk(model, random(9, 6), torch.arange(9) % 3, chunk_size=4)
    theta, step, identity = risk.theta(), 1e-5, torch.eye(risk.numel).double()
    ahead, behind = (
        torch.stack([risk.at(theta + sign * e).gradient() for e in step * identity]) for sign in (1, -1)
    )
    assert_close(Hessian(risk) @ identity, (ahead - behind) / (2 * step), **FD)
    for operator in (Hessian, GaussNewton, GradientCovariance):
        check_operator_contract(operator(risk))


def strided() -> nn.Sequential:
    torch.manual_seed(3)
    layers = (nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("where", ["whole", "part", "in place", "parallel", "parallel and compiled"])
def test_wrapped_models(where):
    _, inputs, targets = CASES["conv"].problem()
    wanted = EmpiricalRisk(strided(), inputs, targets, chunk_size=3)
    model: nn.Module = strided()
    if where == "part":
        model[2] = torch.compile(model[2], backend="eager")
    if where == "in place":
        model.compile(backend="eager")
    if "parallel" in where:
        model = nn.DataParallel(model)
    if where in ("whole", "parallel and compiled"):
        model = torch.compile(model, backend="eager")
    risk = EmpiricalRisk(model, inputs, targets, chunk_size=3)
    if where != "part":
        assert risk.names == wanted.names
    assert_same_bits(products_of(risk), products_of(wanted))


@pytest.mark.parametrize("memory", [None, PLENTY])
def test_models_that_change_their_inputs(memory):
    inputs = random(7, 4)
    before = inputs.clone()
    in_place = Made(lambda self, x: self.body(x.sub_(0.5).div_(2.0)), body=mlp(3))
    on_a_copy = Made(lambda self, x: self.body(x.clone().sub_(0.5).div_(2.0)), body=mlp(3))
    results = [products_of(risk_on(model, inputs, memory=memory)) for model in (on_a_copy, in_place)]
    assert_same_bits(*results)
    assert torch.equal(inputs, before)


def test_a_last_softmax_is_noticed():
    inputs = random(7, 5, seed=0)
    logits = nn.Linear(5, 3).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EmpiricalRisk(logits, inputs, LABELS)
        # log-probabilities are logits; probabilities with a loss of probabilities are meant so
        EmpiricalRisk(nn.Sequential(logits, nn.LogSoftmax(dim=1)), inputs, LABELS)
        softmax = nn.Sequential(logits, nn.Softmax(dim=1))
        advised = EmpiricalRisk(softmax, inputs, LABELS, loss=lambda p, y: -p[range(len(y)), y].log())
    with pytest.warns(UserWarning, match="leave out the model's last softmax"):
        EmpiricalRisk(softmax, inputs, LABELS)
    direction = random(advised.numel, seed=1)
    plain = Hessian(EmpiricalRisk(logits, inputs, LABELS)) @ direction
    assert_close(Hessian(advised) @ direction, plain, **EXACT64)
