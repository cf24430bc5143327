import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from robustdyn.curvature import (
    EmpiricalRisk,
    GradientCovariance,
    Hessian,
    cross_entropy,
    hutchinson_trace,
    lanczos,
    layer_traces,
    projected_covariance,
)
from tests.cases import CASES
from tests.curvature.reference import (
    SMOOTH,
    assert_unchanged,
    check_operator_contract,
    dense_gradients,
    flat,
    generator,
    per_example_losses,
    random,
    risk_of,
    snapshot,
)
from tests.tolerances import EXACT64, FD


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_value_and_gradient(case):
    risk = risk_of(case)
    assert risk.value() == pytest.approx(per_example_losses(risk, flat(risk)).mean().item(), rel=1e-12)
    assert_close(risk.gradient(), dense_gradients(risk).mean(dim=0), **EXACT64)


@pytest.mark.parametrize("case", SMOOTH, ids=lambda c: c.name)
def test_gradient_is_the_slope_of_value(case):
    risk = risk_of(case)
    theta, direction, step = risk.theta(), random(risk.numel), 1e-5
    slope = (risk.at(theta + step * direction).value() - risk.at(theta - step * direction).value()) / (
        2 * step
    )
    assert slope == pytest.approx(
        (risk.at(theta).gradient() @ direction).item(), rel=FD["rtol"], abs=FD["atol"]
    )


def test_theta_is_named_parameters_in_order():
    risk = risk_of(CASES["preact"])
    assert risk.names == tuple(name for name, _ in risk.model.named_parameters())
    assert torch.equal(risk.theta(), flat(risk))
    parts = risk.split(risk.theta())
    for name, parameter in risk.model.named_parameters():
        assert torch.equal(parts[name], parameter)
        assert torch.equal(risk.theta()[risk.blocks[name]], parameter.reshape(-1))
    with pytest.raises(ValueError, match="shape"):
        risk.split(torch.zeros(risk.numel + 1))


def test_parameter_filters():
    model, inputs, targets = CASES["preact"].problem()
    matrices = EmpiricalRisk(model, inputs, targets, parameters=lambda name, p: p.dim() >= 2)
    assert set(matrices.names) == {n for n, p in model.named_parameters() if p.dim() >= 2}
    one = EmpiricalRisk(model, inputs, targets, parameters=["linear.bias"])
    assert one.names == ("linear.bias",)
    full = EmpiricalRisk(model, inputs, targets)
    assert_close(one.gradient(), full.gradient()[full.blocks["linear.bias"]], **EXACT64)
    model.conv1.requires_grad_(False)
    assert "conv1.weight" not in EmpiricalRisk(model, inputs, targets).names
    with pytest.raises(ValueError, match="no 'missing'"):
        EmpiricalRisk(model, inputs, targets, parameters=["missing"])
    with pytest.raises(ValueError, match="no tensor is chosen"):
        EmpiricalRisk(model, inputs, targets, parameters=lambda name, p: False)


def test_train_batchnorm_uses_batch_statistics():
    model, inputs, targets = CASES["preact"].problem()
    risk = EmpiricalRisk(model, inputs, targets, batchnorm="train")
    reference = copy.deepcopy(model).train()
    loss = F.cross_entropy(reference(inputs), targets)
    loss.backward()
    assert risk.value() == pytest.approx(loss.item(), rel=1e-12)
    assert_close(risk.gradient(), torch.cat([p.grad.reshape(-1) for p in reference.parameters()]), **EXACT64)
    assert abs(risk.value() - EmpiricalRisk(model, inputs, targets).value()) > 1e-3


def _measure_everything(risk: EmpiricalRisk) -> None:
    hessian, g = Hessian(risk), generator()
    risk.value()
    risk.gradient()
    vectors = lanczos(hessian, 2, which="largest", tol=1e-2, max_products=9, generator=g).eigenvectors
    hutchinson_trace(hessian, 2, g)
    settings = {"probes": 2, "exact_classes_up_to": 10, "generator": g, "weights_only": False}
    layer_traces(risk, method="hutchinson", **settings)
    if risk.batchnorm == "eval":
        layer_traces(risk, method="gauss_newton", **settings)
        _ = GradientCovariance(risk) @ vectors[:, 0]
        projected_covariance(risk, vectors)


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(batchnorm, training):
    model, inputs, targets = CASES["preact"].problem()
    model.train(training)
    model.block.bn2.train(not training)
    model.linear.bias.requires_grad_(False)
    F.cross_entropy(model(inputs), targets).backward()
    before, frozen_inputs = snapshot(model), inputs.clone()
    with torch.no_grad():  # as in a validation hook: measuring must switch gradients on for itself
        risk = EmpiricalRisk(model, inputs, targets, batchnorm=batchnorm)
        _measure_everything(risk)
        assert not torch.is_grad_enabled()
    assert_unchanged(model, before)
    assert torch.equal(inputs, frozen_inputs)
    assert not inputs.requires_grad


def test_guard_restores_after_an_error():
    model, inputs, targets = CASES["norm_mlp"].problem()
    model.train()
    risk = EmpiricalRisk(model, inputs, targets)
    rng = torch.get_rng_state()

    def fail_inside() -> None:
        with risk.guard():
            assert not model[1].training
            torch.rand(3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    inputs, targets = torch.ones(4, 3), torch.arange(4) % 3
    with pytest.raises(ValueError, match=r"copy\.deepcopy\(model\)"):
        EmpiricalRisk(model, inputs, targets)
    assert EmpiricalRisk(copy.deepcopy(model), inputs, targets).gradient().isfinite().all()


def test_autocast_and_inference_mode_do_not_matter():
    model, inputs, targets = CASES["norm_mlp"].problem()
    model, inputs = model.float(), inputs.float()
    plain = EmpiricalRisk(model, inputs, targets).gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(EmpiricalRisk(model, inputs, targets).gradient(), plain)
    with torch.inference_mode():
        made_inside = inputs.clone()
        assert torch.equal(EmpiricalRisk(model, made_inside, targets).gradient(), plain)


UNTRACKED = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double()


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("one chunk", {"chunk_size": 3, "batchnorm": "train"}),
        ("batchnorm must be 'eval' or 'train', not 'frozen'", {"batchnorm": "frozen"}),
        ("precision must be 'full', 'tf32' or 'bfloat16', not 'half'", {"precision": "half"}),
        ("first dimension", {"targets": lambda targets: targets[:-1]}),
        (
            "at least one example",
            {"inputs": lambda inputs: inputs[:0], "targets": lambda targets: targets[:0]},
        ),
        ("chunk_size", {"chunk_size": 0}),
        ("reduction='none'", {"loss": F.cross_entropy}),
        ("not finite", {"inputs": lambda inputs: inputs * float("inf")}),
        (r"model\.float", {"model": lambda model: model.bfloat16()}),
        ("keeps none", {"model": lambda model: UNTRACKED}),
    ],
)
def test_refusals(words, changed):
    given = dict(zip(("model", "inputs", "targets"), CASES["norm_mlp"].problem(), strict=True))
    given |= {name: value(given[name]) if name in given else value for name, value in changed.items()}
    with pytest.raises(ValueError, match=words):
        EmpiricalRisk(**given)


def test_a_dropout_left_on_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    inputs, targets = random(6, 4), torch.zeros(6, dtype=torch.long)
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"Dropout is on in '1'.*model\.eval\(\)"):
        EmpiricalRisk(model, inputs, targets)
    assert torch.equal(torch.get_rng_state(), rng)
    EmpiricalRisk(model.eval(), inputs, targets)


def test_cross_entropy_is_per_example():
    logits, targets = random(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert_close(cross_entropy(logits, targets), -logits.log_softmax(dim=1)[torch.arange(5), targets])


def per_example(outputs, targets):
    return F.mse_loss(outputs, targets, reduction="none")


@pytest.mark.filterwarnings("ignore:Using a target size")  # PyTorch's, on the broadcast
def test_messages_name_the_argument_and_the_remedy():
    model, inputs, targets = nn.Linear(4, 1).double(), random(442, 4), random(442, 1, seed=1)
    for bad, loss, words in (
        (targets, per_example, r"for 16 of the 442 examples.*returned \(16, 1\).*\.flatten\(\)"),
        (targets[:, 0], per_example, r"outputs \(16, 1\) and targets \(16,\).*\(16, 16\).*broadcast"),
        (targets[:, 0], cross_entropy, r"class indices as integers.*float64 of shape \(16,\).*\.long\(\)"),
    ):
        with pytest.raises(ValueError, match=words):
            EmpiricalRisk(model, inputs, bad, loss=loss)
    late = inputs.clone()
    late[300, 2] = float("nan")
    with pytest.raises(ValueError, match="inputs has numbers that are not finite, first in example 300"):
        EmpiricalRisk(model, late, targets)
    late = targets.clone()
    late[7] = float("inf")
    with pytest.raises(ValueError, match="targets has numbers that are not finite, first in example 7"):
        EmpiricalRisk(model, inputs, late)
    for settings in ({"memory": "1GB"}, {"memory": 1e9}, {"chunk_size": 2.5}):
        with pytest.raises(TypeError, match=f"{next(iter(settings))} must be a whole number"):
            EmpiricalRisk(model, inputs, targets, **settings)
    for wrong in ("inputs", [], [inputs, None], DataLoader(TensorDataset(inputs, targets))):
        with pytest.raises(TypeError, match="must be a tensor, a NumPy array, or a tuple or dictionary"):
            EmpiricalRisk(model, wrong, targets)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_labels_of_any_integer_type(dtype):
    logits, targets = random(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(cross_entropy(logits, targets.to(dtype)), cross_entropy(logits, targets))


MEASURES = {
    "value": EmpiricalRisk.value,
    "gradient": EmpiricalRisk.gradient,
    "hessian": lambda risk: Hessian(risk) @ torch.ones(risk.numel, dtype=risk.dtype),
    "covariance": GradientCovariance,
    "projected": lambda risk: projected_covariance(risk, random(risk.numel, 2)),
}


@pytest.mark.parametrize("memory", [None, 10**9])
@pytest.mark.parametrize("name", MEASURES)
def test_a_late_example_that_is_not_finite_is_named(name, memory):
    inputs, targets = random(40, 4), torch.arange(40) % 3
    risk = EmpiricalRisk(nn.Linear(4, 3).double(), inputs, targets, chunk_size=7, memory=memory)
    broken = EmpiricalRisk(Overflowing(), inputs, targets, chunk_size=7, memory=memory)
    bad = inputs.clone()
    bad[[33, 37], 0] = 1e3
    MEASURES[name](risk.over(bad, targets))
    with pytest.raises(FloatingPointError, match="not finite: neither is the loss of example 33 and 1 more"):
        MEASURES[name](broken.over(bad, targets))


class Overflowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x):
        return self.linear(x) * torch.where(x[:, :1] > 100, torch.nan, 1.0)


class Rooted(nn.Module):
    """The root of |w| has no derivative where w is zero, while its value is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return self.linear(x) + self.w.abs().sqrt()


def test_a_derivative_that_does_not_exist():
    risk = EmpiricalRisk(Rooted(), random(6, 4), torch.arange(6) % 3)
    assert risk.value() > 0
    with pytest.raises(FloatingPointError, match="although every example's loss is"):
        risk.gradient()


class OwnBatchNorm(nn.Module):
    """Normalises by the batch, without PyTorch's BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x):
        z = self.linear(x)
        return (z - z.mean(dim=0)) / (z.var(dim=0) + 1e-5).sqrt()


def contrastive(outputs, targets):
    similarity = F.normalize(outputs, dim=1) @ F.normalize(outputs, dim=1).T
    return F.cross_entropy(similarity, torch.arange(len(outputs)), reduction="none")


def pairwise(outputs, targets):
    """A loss of neighbouring pairs: 0 with 1, 2 with 3, ..."""
    other = torch.stack([outputs[1::2], outputs[0::2]], dim=1).flatten(0, 1)
    return (outputs - other).square().sum(dim=1)


MIXING = {
    "own batch norm": (OwnBatchNorm, cross_entropy),
    "contrastive": (lambda: nn.Linear(4, 3).double(), contrastive),
    "pairs": (lambda: nn.Linear(4, 3).double(), pairwise),
}


@pytest.mark.parametrize("name", MIXING)
def test_examples_that_depend_on_each_other(name):
    build, loss = MIXING[name]
    model, inputs, targets = build(), random(40, 4), torch.arange(40) % 3
    with pytest.raises(ValueError, match="no mean over chunks: leave chunk_size"):
        EmpiricalRisk(model, inputs, targets, loss=loss, chunk_size=20)
    risk = EmpiricalRisk(model, inputs, targets, loss=loss, memory=1000)  # less than one example needs
    assert not risk.independent
    assert risk.chunk_size == 40
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(loss(model(inputs), targets).mean(), list(parameters.values()))
    assert_close(risk.gradient(), torch.cat([g.reshape(-1) for g in wanted]), **EXACT64)
    check_operator_contract(Hessian(risk))
    for refused in (GradientCovariance, lambda risk: projected_covariance(risk, random(risk.numel, 2))):
        with pytest.raises(ValueError, match="gradient of one example is not defined"):
            refused(risk)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_ordinary_examples_are_independent(case, scale):
    """Also in float32, and with logits so large that the losses are only rounding."""
    model, inputs, targets = case.problem()
    model, inputs = model.float(), (scale * inputs).float()
    assert EmpiricalRisk(model, inputs, targets, chunk_size=2).independent
    fitted = model(inputs).argmax(dim=1)
    assert EmpiricalRisk(model, inputs, fitted, chunk_size=2).independent


class OneSided(torch.autograd.Function):
    """x Wᵀ with a backward pass that forgets that dW depends on x."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, slopes):
        x, weight = ctx.saved_tensors
        return slopes @ weight, slopes.T @ x.detach()


class WrongTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        return OneSided.apply(self.first(x).tanh(), self.second.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_derivative_that_is_not_symmetric_is_refused(dtype):
    torch.manual_seed(0)
    model, targets = WrongTwice().to(dtype), torch.arange(6) % 3
    with pytest.raises(ValueError, match="products with the Hessian are not symmetric"):
        EmpiricalRisk(model, random(6, 4).to(dtype), targets)


def test_an_embedding_with_a_largest_norm_is_refused_unchanged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 3)).double()
    before = copy.deepcopy(model.state_dict())
    words = torch.randint(5, (9, 3), generator=generator())
    with pytest.raises(ValueError, match=r"changes the parameter '0\.weight' in place.*max_norm"):
        EmpiricalRisk(model, words, torch.arange(9) % 3)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
