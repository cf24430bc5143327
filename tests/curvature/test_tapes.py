"""Kept graphs, the operators that run through them, and what must not change on the way."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import vector_to_parameters
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from robustdyn.curvature import (
    DiagonallyScaled,
    EmpiricalRisk,
    GaussNewton,
    GradientCovariance,
    Hessian,
    gradient_projections,
    hutchinson_trace,
    lanczos,
    layer_traces,
    projected_covariance,
)
from robustdyn.curvature.tape import Tape, count_saved_bytes
from robustdyn.theory import adam_scale, whiten
from tests.cases import CASES, PreActNet
from tests.curvature.reference import (
    check_operator_contract,
    dense_gradients,
    dense_hessian,
    flat,
    generator,
    random,
    risk_of,
)
from tests.tolerances import EXACT64, FD, MC_SIGMAS

PLENTY = 10**9  # bytes: all graphs of these problems many times over
OPERATORS = {"hessian": Hessian, "gauss_newton": GaussNewton, "covariance": GradientCovariance}

Made = list[weakref.ref]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """A reference to every tape ever recorded."""
    references: Made = []
    record = Tape.__init__

    def note(tape: Tape, *arguments: object, **settings: object) -> None:
        references.append(weakref.ref(tape))
        record(tape, *arguments, **settings)

    monkeypatch.setattr(Tape, "__init__", note)
    return references


def alive(made: Made) -> int:
    return sum(reference() is not None for reference in made)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Only reference counts free memory: what is in a cycle stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def products_of(risk: EmpiricalRisk) -> dict[str, Tensor]:
    """Everything that runs through tapes, in an order that mixes the operators."""
    directions = random(risk.numel, 2)
    results = {name: kind(risk) @ directions[:, 0] for name, kind in OPERATORS.items()}
    results["projections"] = gradient_projections(risk, directions)
    results |= {f"{name} again": kind(risk) @ directions for name, kind in reversed(OPERATORS.items())}
    settings = {"probes": 2, "exact_classes_up_to": 0, "generator": generator(), "weights_only": False}
    results["traces"] = layer_traces(risk, method="hutchinson", **settings).traces
    return results


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    assert all(tensor.any() for name, tensor in wanted.items() if name != "gauss_newton")


def losses_at(risk: EmpiricalRisk, theta: Tensor) -> Tensor:
    """Losses as a function of the measured parameters, flat, without the code under test."""
    return risk.loss(outputs_at(risk, theta), risk.targets)


def outputs_at(risk: EmpiricalRisk, theta: Tensor) -> Tensor:
    present = dict(risk.model.named_parameters())
    parts = theta.split([present[name].numel() for name in risk.names])
    tensors = {name: part.view_as(present[name]) for name, part in zip(risk.names, parts, strict=True)}
    return functional_call(risk.model, tensors, (risk.inputs,))


def theta_of(risk: EmpiricalRisk) -> Tensor:
    present = dict(risk.model.named_parameters())
    return torch.cat([present[name].detach().reshape(-1) for name in risk.names])


def dense_curvature(risk: EmpiricalRisk) -> Tensor:
    """H of any loss."""
    return hessian(lambda theta: losses_at(risk, theta).mean())(theta_of(risk))


def dense_gauss_newton(risk: EmpiricalRisk) -> Tensor:
    """G of any loss, from the outputs' Jacobian and the loss's own second derivative."""
    theta = theta_of(risk)
    outputs = outputs_at(risk, theta).detach()
    jacobian = jacrev(lambda t: outputs_at(risk, t).reshape(len(outputs), -1))(theta)
    total = torch.zeros(len(theta), len(theta), dtype=theta.dtype)
    for index in range(len(outputs)):

        def loss(z: Tensor, index: int = index) -> Tensor:
            return risk.loss(z.view_as(outputs[index])[None], risk.targets[index : index + 1])[0]

        curvature = hessian(loss)(outputs[index].reshape(-1))
        total += jacobian[index].T @ curvature @ jacobian[index] / len(outputs)
    return total


def dense_covariance(risk: EmpiricalRisk) -> Tensor:
    """C₁ of any loss."""
    gradients = jacrev(lambda theta: losses_at(risk, theta))(theta_of(risk))
    return torch.cov(gradients.T, correction=0)


DENSE = {"hessian": dense_curvature, "gauss_newton": dense_gauss_newton, "covariance": dense_covariance}


DENSE_OF = {kind: DENSE[name] for name, kind in OPERATORS.items()}


def assert_operators_are_dense(risk: EmpiricalRisk) -> None:
    for name, kind in OPERATORS.items():
        check_operator_contract(kind(risk), DENSE[name](risk))


# ---------------------------------------------------------------------- kept graphs


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_kept_graphs_change_no_bit(case, made):
    """Recording is the same whether the graph is kept or not, so this asks for equality."""
    chunk = case.chunk_size or case.examples
    chunks = -(-case.examples // chunk)
    fresh, keeping = risk_of(case), risk_of(case, memory=PLENTY)
    assert (fresh.chunk_size, keeping.chunk_size) == (chunk, chunk)
    wanted = products_of(fresh)
    made.clear()
    for _ in range(3):
        assert_same_bits(products_of(keeping), wanted)
    assert len(made) == alive(made) == chunks  # recorded once for all operators


def test_any_number_of_chunks_may_be_kept(made):
    """Five examples in chunks of 2, 2 and 1: none, some or all of them find room."""
    wanted = products_of(risk_of(CASES["conv_norm_uneven"]))
    seen: dict[int, int] = {}
    for memory in (round(1e4 * 1.3**step) for step in range(24)):
        risk = risk_of(CASES["conv_norm_uneven"], memory=memory)
        made.clear()
        _ = Hessian(risk) @ random(risk.numel)
        kept = alive(made)
        assert kept >= max(seen, default=0)
        if kept not in seen:
            seen[kept] = memory
            assert_same_bits(products_of(risk), wanted)
            assert alive(made) == kept
    assert set(seen) == {0, 1, 2, 3}


def test_no_memory_keeps_nothing(made):
    """One example at a time, so that sums are rounded differently."""
    wanted = products_of(risk_of(CASES["preact"], chunk_size=1))
    risk = risk_of(CASES["preact"], chunk_size=None, memory=0)
    assert risk.chunk_size == 1
    assert_same_bits(products_of(risk), wanted)
    assert alive(made) == 0
    with pytest.raises(ValueError, match="number of bytes"):
        risk_of(CASES["preact"], memory=-1)


def images(examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = CASES["conv_norm_uneven"].problem()[0]
    return model, random(examples, 2, 6, 6), torch.arange(examples) % 3


def saved_bytes(risk: EmpiricalRisk, examples: int) -> int:
    with risk.guard(), count_saved_bytes() as counted:
        risk.tape(*risk.subset(slice(0, examples)))
    return counted[0]


def test_the_chunk_follows_the_memory(made):
    model, inputs, targets = images(64)
    one = saved_bytes(EmpiricalRisk(model, inputs, targets), 1)
    chosen = []
    for memory in (round(one * 2**power) for power in range(12)):
        risk = EmpiricalRisk(model, inputs, targets, memory=memory)
        made.clear()
        _ = Hessian(risk) @ random(risk.numel)
        chosen.append(risk.chunk_size)
        kept, working = alive(made), saved_bytes(risk, risk.chunk_size)
        # half: the design's quarter, and as much again because a graph is not quite linear in its examples
        assert risk.chunk_size == 1 or working <= memory / 2
        assert kept == 0 or (kept + 1) * working <= 1.1 * memory
    assert chosen[0] == 1
    assert all(first <= second for first, second in pairwise(chosen))
    assert sum(first < second for first, second in pairwise(chosen)) >= 4
    assert (chosen[-1], kept) == (64, 1)  # 32 times what all examples need
    assert EmpiricalRisk(model, inputs, targets, memory=PLENTY, chunk_size=7).chunk_size == 7


def test_memory_for_everything_keeps_everything(made):
    model, inputs, targets = images(64)
    everything = saved_bytes(EmpiricalRisk(model, inputs, targets), 64)
    risk = EmpiricalRisk(model, inputs, targets, memory=3 * everything)
    made.clear()
    _ = Hessian(risk) @ random(risk.numel)
    assert alive(made) == len(made) == -(-64 // risk.chunk_size)


@pytest.mark.parametrize(("kind", "memory"), [("flat", 30_000), ("images", 400_000)])
def test_the_choice_does_not_depend_on_how_many_examples_there_are(kind, memory):
    if kind == "flat":
        model, inputs = (
            nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 3)),
            random(4096, 40).float(),
        )
    else:
        model, inputs, _ = images(4096)
    targets = torch.arange(4096) % 3
    few, many = (
        EmpiricalRisk(model, inputs[:count].clone(), targets[:count].clone(), memory=memory).chunk_size
        for count in (64, 4096)
    )
    assert 1 < few == many < 64


def test_a_tape_that_is_used_up():
    """The last product frees what it passes, rather than leave it to the tape's end."""
    risk = risk_of(CASES["preact"])
    with risk.guard():
        parts = tuple(risk.split(random(risk.numel)).values())
        for use_up in (
            lambda tape: tape.hessian_product(parts, last=True),
            lambda tape: tape.jacobian_transpose_product(torch.ones_like(tape.slopes), last=True),
        ):
            tape = risk.tape(risk.inputs, risk.targets)
            wanted = tape.hessian_product(parts, last=False)
            assert_close(tape.hessian_product(parts, last=False), wanted, rtol=0.0, atol=0.0)
            use_up(tape)
            with pytest.raises(RuntimeError, match="second time"):
                tape.hessian_product(parts, last=False)


def test_a_graph_is_gone_before_the_next_one_is_made(monkeypatch):
    """The memory set aside for work is that of one chunk."""
    living: weakref.WeakSet[Tape] = weakref.WeakSet()
    most = []
    record = Tape.__init__

    def note(tape: Tape, *arguments: object, **settings: object) -> None:
        most.append(sum(hasattr(other, "gradient") and bool(other.gradient) for other in living))
        living.add(tape)
        record(tape, *arguments, **settings)

    monkeypatch.setattr(Tape, "__init__", note)
    risk = risk_of(CASES["preact"], chunk_size=1)
    for kind in OPERATORS.values():
        most.clear()
        _ = kind(risk) @ random(risk.numel)
        assert len(most) == 5
        assert max(most) == 0, kind


# ---------------------------------------------------------------------- when graphs must go


def _scale_in_place(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    with torch.no_grad():
        model.linear.weight.mul_(1.5)


def _optimise(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def _load(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.load_state_dict({key: 1.5 * tensor for key, tensor in model.state_dict().items()})


def _load_assigning(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.load_state_dict({key: 1.5 * t for key, t in model.state_dict().items()}, assign=True)


def _new_parameter(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.linear.weight = nn.Parameter(1.5 * model.linear.weight.detach())


def _new_parameter_at_the_old_address(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Python gives the same id to an object that takes another's place."""
    address, values = id(model.linear.weight), 1.5 * model.linear.weight.detach()
    model.linear.weight = None
    candidates = []
    while not candidates or (id(candidates[-1]) != address and len(candidates) < 100):
        candidates.append(nn.Parameter(values))
    # at another address if something still holds the old one
    model.linear.weight = candidates[-1]


def _settle(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.train()
    model(inputs)
    model.eval()


def _new_buffer(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.bn.running_mean = model.bn.running_mean + 1.0


def _new_layer(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.linear = copy.deepcopy(model.linear)
    _scale_in_place(model, inputs, targets)


def _vector_to_parameters(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    vector_to_parameters(1.5 * flat_of(model), model.parameters())


def _data_in_place(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.linear.weight.data.mul_(1.5)


def _data_that_keeps_the_norms(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.linear.weight.data.neg_()
    model.conv1.weight.data.copy_(model.conv1.weight.flip(0))


def _statistics_through_data(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    model.bn.running_mean.data.neg_()


def _inputs_through_data(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    inputs.data.neg_()


def _targets_through_numpy(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    targets.numpy()[:] = (targets.numpy() + 1) % 3


def _inputs_in_place(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    inputs.mul_(1.5)


def _targets_in_place(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    targets.copy_((targets + 1) % 3)


def flat_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


CHANGES = [
    _scale_in_place,
    _optimise,
    _load,
    _load_assigning,
    _new_parameter,
    _settle,
    _new_buffer,
    _new_layer,
    _new_parameter_at_the_old_address,
    _vector_to_parameters,
    _data_in_place,
    _data_that_keeps_the_norms,
    _statistics_through_data,
    _inputs_through_data,
    _inputs_in_place,
    _targets_in_place,
    _targets_through_numpy,
]


@pytest.mark.parametrize("memory", [None, PLENTY])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_of_the_weights_is_noticed(change, memory, made):
    model, inputs, targets = CASES["preact"].problem()
    # once assigned, a parameter's version is 0: the only kind that could be mistaken for another one
    model.linear.weight = nn.Parameter(model.linear.weight.detach().clone())
    risk = EmpiricalRisk(model, inputs, targets, memory=memory)
    vector = random(risk.numel)
    operators = [kind(risk) for kind in OPERATORS.values()]
    scaled = DiagonallyScaled(operators[0], torch.ones_like(vector))
    before = [operator @ vector for operator in operators]
    recorded = list(made)

    change(model, inputs, targets)
    for operator in (*operators, scaled):
        with pytest.raises(RuntimeError, match="make a new one"):
            operator.matvec(vector)
        with pytest.raises(RuntimeError, match="make a new one"):
            _ = operator @ vector[:, None]
    with pytest.raises(RuntimeError, match="make a new one"):
        operators[2].sample(generator())

    fresh = EmpiricalRisk(model, inputs, targets)
    for kind, old in zip(OPERATORS.values(), before, strict=True):
        found = kind(risk) @ vector
        assert torch.equal(found, kind(fresh) @ vector)
        # the model's own labels do not care about the given ones
        labels_only = change in (_targets_in_place, _targets_through_numpy)
        assert torch.equal(found, old) == (labels_only and kind is GaussNewton)
    assert alive(recorded) == 0


def test_a_change_of_an_unmeasured_parameter_is_noticed():
    model, inputs, targets = CASES["preact"].problem()
    risk = EmpiricalRisk(model, inputs, targets, parameters=["linear.bias"], memory=PLENTY)
    operator, vector = Hessian(risk), random(3)
    _ = operator @ vector
    _scale_in_place(model, inputs, targets)
    with pytest.raises(RuntimeError, match="make a new one"):
        _ = operator @ vector
    fresh = EmpiricalRisk(model, inputs, targets, parameters=["linear.bias"])
    assert torch.equal(Hessian(risk) @ vector, Hessian(fresh) @ vector)


def test_forget_frees_the_graphs(made):
    with without_garbage_collection():
        risk = risk_of(CASES["preact"], memory=PLENTY)
        wanted = products_of(risk)
        assert alive(made) == 2
        risk.forget()
        assert alive(made) == 0
        assert_same_bits(products_of(risk), wanted)
        assert alive(made) == 2


@pytest.mark.parametrize("memory", [None, PLENTY])
@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_nothing_outlives_the_risk(case, memory, made):
    """No reference cycles: memory is free at once, not at the next garbage collection."""
    with without_garbage_collection():
        risk = risk_of(case, memory=memory)
        operators = [kind(risk) for kind in OPERATORS.values()]
        for operator in operators:
            _ = operator @ random(risk.numel, 2)
        gradient_projections(risk, random(risk.numel, 1))
        reference = weakref.ref(risk)
        assert bool(alive(made)) == bool(memory)
        del operator, operators, risk
        assert reference() is None
        assert alive(made) == 0


@pytest.mark.parametrize("memory", [None, PLENTY])
def test_fifty_products_leave_no_tensor_behind(memory):
    risk = risk_of(CASES["preact"], memory=memory)
    operators, vector = [kind(risk) for kind in OPERATORS.values()], random(risk.numel)

    def count() -> tuple[int, int]:
        gc.collect()
        kinds = [type(thing) for thing in gc.get_objects()]
        return sum(issubclass(kind, Tensor) for kind in kinds), kinds.count(Tape)

    for operator in operators:
        operator.matvec(vector)
    before = count()
    for _ in range(50):
        for operator in operators:
            operator.matvec(vector)
    assert count() == before
    assert before[1] == (0 if memory is None else 2)


# ---------------------------------------------------------------------- leaving the model alone


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "state": {key: (id(t), t.clone()) for key, t in model.state_dict(keep_vars=True).items()},
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "needs": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "flags": {name: module.training for name, module in model.named_modules()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
        "gradients on": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    torch.testing.assert_close(snapshot(model), before, rtol=0.0, atol=0.0)


MEASUREMENTS: dict[str, Callable[[EmpiricalRisk], object]] = {
    "hessian": lambda risk: Hessian(risk) @ random(risk.numel),
    "gauss_newton": lambda risk: GaussNewton(risk) @ random(risk.numel, 2),
    "covariance": lambda risk: GradientCovariance(risk) @ random(risk.numel),
    "sample": lambda risk: GradientCovariance(risk).sample(generator()),
    "scaled": lambda risk: DiagonallyScaled(Hessian(risk), random(risk.numel)) @ random(risk.numel),
    "projected": lambda risk: projected_covariance(risk, random(risk.numel, 2)).covariance,
    "elsewhere": lambda risk: Hessian(risk.at(2.0 * risk.theta())) @ random(risk.numel),
    "forgotten": lambda risk: risk.forget(),
}


@pytest.mark.parametrize("memory", [None, PLENTY])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_products_leave_the_model_alone(name, memory):
    model, inputs, targets = CASES["preact"].problem()
    model.train()
    model.block.bn2.eval()
    model.linear.bias.requires_grad_(False)
    F.cross_entropy(model(inputs), targets).backward()
    before = snapshot(model)
    risk = EmpiricalRisk(model, inputs, targets, memory=memory)
    for _ in range(2):
        MEASUREMENTS[name](risk)
    assert_unchanged(model, before)


class Breakable(PreActNet):
    """Raises where it is told to: on the way forward, or in the backward passes of graphs made before."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks == "forward":
            torch.rand(3)
            raise RuntimeError("broken")
        out = super().forward(x)
        if out.requires_grad:
            out.register_hook(self._backward)
        return out

    def _backward(self, gradient: Tensor) -> None:
        if self.breaks == "backward":
            raise RuntimeError("broken")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.breaks == "loss":
            raise RuntimeError("broken")
        return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize(
    ("where", "memory"), [*product(("forward", "backward", "loss"), (None,)), ("backward", PLENTY)]
)
@pytest.mark.parametrize("kind", OPERATORS.values(), ids=list(OPERATORS))
def test_an_error_inside_a_product_leaves_no_trace(kind, where, memory, made):
    _, inputs, targets = CASES["preact"].problem()
    torch.manual_seed(0)
    model = Breakable().double().train()
    risk = EmpiricalRisk(model, inputs, targets, loss=model.loss, chunk_size=2, memory=memory)
    operator, vector = kind(risk), random(risk.numel)
    wanted = operator @ vector
    before = snapshot(model)
    with without_garbage_collection():
        model.breaks = where
        with pytest.raises(RuntimeError, match="broken"):
            operator.matvec(vector)
        model.breaks = None
        assert_unchanged(model, before)
        assert torch.equal(operator @ vector, wanted)
        assert torch.equal(kind(risk) @ vector, wanted)
        assert alive(made) == (0 if memory is None else 3)


# ---------------------------------------------------------------------- other points, other examples


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_at_another_point(case, made):
    model, inputs, targets = case.problem()
    risk = EmpiricalRisk(model, inputs, targets, chunk_size=case.chunk_size, memory=PLENTY)
    made.clear()
    theta = flat(risk) + 0.1 * random(risk.numel, seed=3)
    here = products_of(risk)
    own = list(made)

    moved = copy.deepcopy(model)
    vector_to_parameters(theta.clone(), moved.parameters())  # makes them views
    wanted_risk = EmpiricalRisk(moved, inputs, targets, chunk_size=case.chunk_size)
    there = risk.at(theta)
    kept = theta.clone()
    theta.zero_()  # the point is a copy
    assert torch.equal(there.theta(), kept)
    assert there.value() == pytest.approx(wanted_risk.value(), rel=1e-12)
    assert_close(there.gradient(), wanted_risk.gradient(), **EXACT64)
    made.clear()
    found, wanted = products_of(there), products_of(wanted_risk)
    for name in wanted:
        assert_close(found[name], wanted[name], **EXACT64)
        assert not torch.equal(found[name], here[name])

    # graphs of either point are its own
    assert alive(own) == len(own)
    assert alive(made) == len(own)
    assert_same_bits(products_of(risk), here)
    del there
    assert alive(made) == 0
    assert alive(own) == len(own)


def test_at_refuses_and_converts():
    risk = risk_of(CASES["softmax"])
    with pytest.raises(ValueError, match="shape"):
        risk.at(torch.zeros(risk.numel - 1))
    with pytest.raises(ValueError, match="shape"):
        risk.at(torch.zeros(1, risk.numel))
    there = risk.at(risk.theta().float())
    assert there.theta().dtype == torch.float64
    # the model's weights do not matter there, those of an unmeasured part do
    value = there.value()
    with torch.no_grad():
        risk.model.linear.weight.zero_()
    assert there.value() == value


def test_over_other_examples():
    model, inputs, targets = CASES["preact"].problem()
    risk = EmpiricalRisk(model, inputs, targets, chunk_size=2, memory=PLENTY)
    here = products_of(risk)
    others, labels = 1.5 * inputs, (targets + 1) % 3
    other = risk.over(others, labels)
    assert_same_bits(products_of(other), products_of(EmpiricalRisk(model, others, labels, chunk_size=2)))
    assert_same_bits(products_of(risk), here)
    fewer = EmpiricalRisk(model, inputs[:3], targets[:3], chunk_size=2)
    assert_same_bits(products_of(risk.over(inputs[:3], targets[:3])), products_of(fewer))
    with pytest.raises(ValueError, match="5 examples and targets 4"):
        risk.over(inputs, targets[:4])


# ---------------------------------------------------------------------- matrices


@pytest.mark.parametrize("memory", [None, PLENTY])
@pytest.mark.parametrize("kind", [*OPERATORS, "scaled"])
def test_a_matrix_is_its_columns(kind, memory):
    risk = risk_of(CASES["preact"], memory=memory)
    if kind == "scaled":
        operator = DiagonallyScaled(GradientCovariance(risk), random(risk.numel, seed=5))
    else:
        operator = OPERATORS[kind](risk)
    matrix = random(risk.numel, 3)
    for given in (matrix, matrix.T.contiguous().T, matrix.clone().requires_grad_()):
        columns = torch.stack([operator @ column for column in matrix.T], dim=1)
        image = operator @ given
        assert not image.requires_grad
        # the same numbers are added in the same order, but ḡ (ḡᵀ V) is a matrix product
        if kind in ("hessian", "gauss_newton"):
            assert torch.equal(image, columns)
        assert_close(image, columns, **EXACT64)
    assert (operator @ matrix[:, :0]).shape == (risk.numel, 0)
    assert_close(operator @ matrix[:, :1], columns[:, :1], **EXACT64)
    for wrong in (matrix[:-1], matrix.float(), torch.zeros((), dtype=torch.float64)):
        with pytest.raises(ValueError, match="expected"):
            _ = operator @ wrong


@pytest.mark.parametrize("memory", [None, PLENTY])
@pytest.mark.parametrize(
    "name",
    [name for name in MEASUREMENTS if name != "forgotten"],
)
def test_products_inside_inference_mode(name, memory):
    """As in Lightning's validation hooks."""
    wanted = MEASUREMENTS[name](risk_of(CASES["preact"]))
    model, inputs, targets = CASES["preact"].problem()
    with torch.inference_mode():
        risk = EmpiricalRisk(model, inputs.clone(), targets.clone(), chunk_size=3, memory=memory)
        for _ in range(2):
            assert torch.equal(MEASUREMENTS[name](risk), wanted)
    assert torch.equal(MEASUREMENTS[name](risk), wanted)


# ---------------------------------------------------------------------- the operators themselves


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_gauss_newton_is_dense(case):
    risk = risk_of(case)
    dense = dense_gauss_newton(risk)
    operator = GaussNewton(risk)
    check_operator_contract(operator, dense)
    eigenvalues = torch.linalg.eigvalsh(operator @ torch.eye(risk.numel, dtype=torch.float64))
    assert eigenvalues[-1] > 0.0
    assert eigenvalues[0] > -1e-13 * eigenvalues[-1] * risk.numel  # P eps, the rounding of eigvalsh
    if case.name == "softmax":
        assert_close(dense, dense_hessian(risk), **EXACT64)
        vector = random(risk.numel)
        assert_close(operator @ vector, Hessian(risk) @ vector, **EXACT64)


def test_gauss_newton_is_the_models_own_fisher_information():
    """For cross-entropy: the mean over inputs and over the model's own labels of ∇ℓ ∇ℓᵀ."""
    model, inputs, _ = CASES["conv_norm_uneven"].problem()
    risk = EmpiricalRisk(model, inputs, torch.zeros(5, dtype=torch.long))
    probabilities = model(inputs).softmax(dim=1).detach()
    fisher = torch.zeros(risk.numel, risk.numel, dtype=torch.float64)
    for label in range(3):
        gradients = dense_gradients(EmpiricalRisk(model, inputs, torch.full((5,), label)))
        fisher += gradients.T @ (probabilities[:, label, None] * gradients) / 5
    check_operator_contract(GaussNewton(risk), fisher)


def test_diagonally_scaled():
    risk = risk_of(CASES["preact"])
    scale = random(risk.numel, seed=4)
    scale[3] = 0.0
    dense = dense_curvature(risk)
    for name, kind in OPERATORS.items():
        operator = DiagonallyScaled(kind(risk), scale)
        assert (operator.shape, operator.dtype, operator.device) == (
            (risk.numel, risk.numel),
            torch.float64,
            risk.device,
        )
        matrix = dense if name == "hessian" else DENSE[name](risk)
        check_operator_contract(operator, scale[:, None] * matrix * scale)
    twice = DiagonallyScaled(DiagonallyScaled(Hessian(risk), scale), scale)
    check_operator_contract(twice, scale[:, None] ** 2 * dense * scale**2)


def test_diagonally_scaled_refusals():
    hessian_ = Hessian(risk_of(CASES["softmax"]))
    scale = random(12)
    for wrong in (scale[:-1], scale[:, None], scale[0]):
        with pytest.raises(ValueError, match="shape"):
            DiagonallyScaled(hessian_, wrong)
    with pytest.raises(ValueError, match="float64 tensor"):
        DiagonallyScaled(hessian_, scale.float())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            DiagonallyScaled(hessian_, torch.where(scale > 0, scale, bad))
    operator = DiagonallyScaled(hessian_, scale)
    with pytest.raises(ValueError, match="shape"):
        operator.matvec(scale[:-1])
    with pytest.raises(ValueError, match="float64 tensor"):
        operator.matvec(scale.float())


def test_diagonally_scaled_does_not_follow_the_callers_tensor():
    scale, vector = random(12), random(12, seed=1)
    operator = DiagonallyScaled(Hessian(risk_of(CASES["softmax"])), scale)
    before = operator @ vector
    scale.mul_(2.0)
    assert torch.equal(operator @ vector, before)


def test_diagonally_scaled_is_what_adam_sees():
    """The theory's whitened problem, computed there with dense numpy matrices."""
    risk = risk_of(CASES["tanh_mlp"])
    second_moment = random(risk.numel, seed=6).square().numpy()
    diagonal = adam_scale(second_moment, 1e-2)
    curved, noise = dense_curvature(risk).numpy(), dense_covariance(risk).numpy()
    problem = whiten(curved, noise, diagonal, weight_decay=0.0)

    root = torch.from_numpy(np.sqrt(diagonal))
    curvature = DiagonallyScaled(Hessian(risk), root)
    identity = torch.eye(risk.numel, dtype=torch.float64)
    found = torch.linalg.eigvalsh(curvature @ identity)
    wanted = torch.from_numpy(problem.eigenvalue)
    # rounding of an eigenvalue is relative to the largest one
    assert_close(found, wanted, rtol=0.0, atol=1e-12 * float(wanted.abs().max()))
    top = lanczos(
        curvature, 5, which="magnitude", tol=1e-10, max_products=200, generator=generator(), verify=True
    )
    assert top.all_converged
    order = wanted.abs().argsort(descending=True)
    # for a symmetric operator the error is at most the residual
    assert_close(top.eigenvalues, wanted[order[:5]], rtol=0.0, atol=1e-10 * float(wanted.abs().max()))

    # y = D^{−1/2} θ = basis of the problem in these coordinates, orthonormal there
    basis = torch.from_numpy(problem.basis) / root[:, None]
    assert_close(basis.T @ basis, identity, rtol=0.0, atol=1e-12)
    projected = basis.T @ (DiagonallyScaled(GradientCovariance(risk), root) @ basis)
    assert_close(projected, torch.from_numpy(problem.noise), rtol=1e-9, atol=1e-11)


def test_sampled_noise_has_the_covariance(monkeypatch):
    """All 2⁵ sign vectors of five examples: E z = 0 and E z zᵀ = C₁ without any chance."""
    from robustdyn.curvature import gradient_covariance

    risk = risk_of(CASES["preact"])
    operator = GradientCovariance(risk)
    drawn = operator.sample(generator(3))
    choices = [torch.tensor(signs, dtype=torch.float64) for signs in product((-1.0, 1.0), repeat=5)]
    queue = iter(choices)
    monkeypatch.setattr(gradient_covariance, "rademacher", lambda *arguments: next(queue))
    samples = torch.stack([operator.sample(generator()) for _ in choices])
    assert_close(samples.mean(dim=0), torch.zeros(risk.numel, dtype=torch.float64), **EXACT64)
    assert_close(samples.T @ samples / len(samples), dense_covariance(risk), **EXACT64)
    # and what is drawn by itself is one of these
    distances = (samples - drawn).norm(dim=1)
    assert distances.min() < 1e-12 * drawn.norm()
    gradients = dense_gradients(risk)
    centred = gradients - gradients.mean(dim=0)
    signs = choices[int(distances.argmin())]
    assert_close(drawn, signs @ centred / 5**0.5, **EXACT64)


def test_sampled_noise_is_drawn_from_the_generator_alone():
    risk = risk_of(CASES["norm_mlp"])
    operator = GradientCovariance(risk)
    torch.manual_seed(1)
    first = operator.sample(generator(7))
    torch.manual_seed(2)
    assert torch.equal(operator.sample(generator(7)), first)
    source = generator(7)
    assert torch.equal(operator.sample(source), first)
    assert not torch.equal(operator.sample(source), first)
    # Tr C₁ = E‖z‖²; a sum over pairs of examples, so far from constant
    draws = torch.stack([operator.sample(source).square().sum() for _ in range(200)])
    trace = dense_covariance(risk).trace()
    assert (draws.mean() - trace).abs() < MC_SIGMAS * draws.std() / 200**0.5
    assert hutchinson_trace(operator, 4, generator()).estimate > 0


# ---------------------------------------------------------------------- other losses and models


def mlp(outputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


class Squeezed(nn.Module):
    """Outputs of shape (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, 0]


class Idle(nn.Module):
    """A parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3)
        self.idle = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(6, 4).double()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).tanh().mean(dim=1))


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().reshape(len(targets), -1).sum(dim=1)


@pytest.mark.parametrize("memory", [None, PLENTY])
def test_squared_error(memory):
    risk = EmpiricalRisk(
        mlp(2), random(7, 4), random(7, 2, seed=1), loss=squared_error, chunk_size=3, memory=memory
    )
    assert_operators_are_dense(risk)


def test_outputs_without_a_second_dimension():
    risk = EmpiricalRisk(Squeezed(), random(7, 4), random(7, seed=1), loss=squared_error, chunk_size=3)
    for name in ("hessian", "gauss_newton"):
        check_operator_contract(OPERATORS[name](risk), DENSE[name](risk))


def test_noise_with_outputs_without_a_second_dimension():
    risk = EmpiricalRisk(Squeezed(), random(7, 4), random(7, seed=1), loss=squared_error, chunk_size=3)
    check_operator_contract(GradientCovariance(risk), dense_covariance(risk))
    directions = random(risk.numel, 2)
    gradients = jacrev(lambda t: losses_at(risk, t))(flat(risk))
    assert_close(gradient_projections(risk, directions), gradients @ directions, **EXACT64)


def test_outputs_with_more_dimensions():
    """A label for each of three positions."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none").mean(dim=1)

    targets = torch.randint(2, (7, 3), generator=generator())
    assert_operators_are_dense(
        EmpiricalRisk(Positions(), random(7, 3, 4), targets, loss=loss, chunk_size=4, memory=PLENTY)
    )


def test_a_loss_linear_in_the_outputs():
    """Then Λ = 0, and the slopes do not depend on the outputs."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).sum(dim=1)

    risk = EmpiricalRisk(mlp(3), random(7, 4), random(7, 3, seed=1), loss=loss, chunk_size=3, memory=PLENTY)
    assert_operators_are_dense(risk)
    assert dense_curvature(risk).norm() > 0.01
    assert not (GaussNewton(risk) @ random(risk.numel)).any()


def test_a_loss_that_is_the_output():
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)[:, 0]

    risk = EmpiricalRisk(First(), random(7, 4), random(7), loss=lambda outputs, targets: outputs)
    check_operator_contract(Hessian(risk), dense_curvature(risk))
    assert not (GaussNewton(risk) @ random(risk.numel)).any()


@pytest.mark.parametrize("memory", [None, PLENTY])
def test_nothing_to_differentiate_twice(memory):
    """A linear model with a linear loss: H = G = 0, while C₁ is the covariance of the inputs."""
    inputs, targets = random(7, 4), random(7, 3, seed=1)
    model = nn.Linear(4, 3, bias=False).double()
    risk = EmpiricalRisk(
        model, inputs, targets, loss=lambda z, y: (z * y).sum(dim=1), chunk_size=3, memory=memory
    )
    zero = torch.zeros(12, dtype=torch.float64)
    for _ in range(2):
        assert torch.equal(Hessian(risk) @ random(12), zero)
        assert torch.equal(GaussNewton(risk) @ random(12), zero)
        gradients = (targets[:, :, None] * inputs[:, None, :]).flatten(1)
        check_operator_contract(GradientCovariance(risk), torch.cov(gradients.T, correction=0))


@pytest.mark.parametrize("memory", [None, PLENTY])
def test_a_parameter_without_effect(memory):
    targets = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    risk = EmpiricalRisk(Idle(), random(7, 4), targets, chunk_size=3, memory=memory)
    assert_operators_are_dense(risk)
    assert not (Hessian(risk) @ random(risk.numel))[risk.blocks["idle"]].any()


@pytest.mark.parametrize(
    "kind",
    [Hessian, GaussNewton, GradientCovariance],
)
def test_only_a_parameter_without_effect(kind):
    targets = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    alone = EmpiricalRisk(Idle(), random(7, 4), targets, chunk_size=3, parameters=["idle"])
    zero = torch.zeros(6, dtype=torch.float64)
    assert torch.equal(alone.gradient(), zero)
    assert not gradient_projections(alone, random(6, 2)).any()
    assert torch.equal(kind(alone) @ random(6), zero)


@pytest.mark.parametrize("memory", [None, PLENTY])
def test_integer_inputs(memory):
    words = torch.randint(6, (7, 5), generator=generator())
    targets = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    assert_operators_are_dense(EmpiricalRisk(Words(), words, targets, chunk_size=3, memory=memory))


def test_probabilities_as_targets():
    targets = random(7, 3, seed=1).softmax(dim=1)
    assert_operators_are_dense(EmpiricalRisk(mlp(3), random(7, 4), targets, chunk_size=3))


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = mlp(4), nn.Linear(4, 5).double(), mlp(3)
            self.second.weight = self.first[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)).tanh()[:, :4])

    risk = EmpiricalRisk(Tied(), random(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0]), chunk_size=3)
    assert_operators_are_dense(risk)


class TwoNames(nn.Module):
    """Modules, one with a buffer, that are each reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.backbone, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.layers = nn.Sequential(self.backbone, self.norm, nn.Tanh(), self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_modules_with_two_names():
    model, inputs, targets = TwoNames().double().eval(), random(7, 4), torch.arange(7) % 3
    before = snapshot(model)
    kinds = {name: type(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    own = [module.weight for module in (model.backbone, model.norm, model.head)]
    risk = EmpiricalRisk(model, inputs, targets, chunk_size=3)
    for kind in OPERATORS.values():
        _ = kind(risk) @ random(risk.numel)
    assert_unchanged(model, before)
    assert {name: type(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == kinds
    assert all(a is b.weight for a, b in zip(own, (model.backbone, model.norm, model.head), strict=True))
    F.cross_entropy(model(inputs), targets).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # PyTorch's functional_call, the reference's, would leave such a model changed: one name for each module
    plain = nn.Sequential(*copy.deepcopy(model.layers))
    same = EmpiricalRisk(plain, inputs, targets, chunk_size=3)
    for kind in OPERATORS.values():
        assert_close(kind(risk) @ random(risk.numel), DENSE_OF[kind](same) @ random(risk.numel), **EXACT64)


class Viewing(nn.Module):
    """Flattens with .view, which takes contiguous tensors only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.head = nn.Conv2d(2, 3, 3).double(), nn.Linear(48, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x).relu()
        return self.head(hidden.view(hidden.size(0), -1))


def test_models_that_flatten_by_view():
    _, inputs, targets = CASES["conv"].problem()
    assert_operators_are_dense(EmpiricalRisk(Viewing(), inputs, targets))


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside = mlp(3), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), self.aside(x)


def test_models_with_several_outputs_are_refused():
    def loss(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return sum(F.cross_entropy(z, targets, reduction="none") for z in outputs)

    risk = EmpiricalRisk(Auxiliary(), random(7, 4), torch.arange(7) % 3, loss=loss)
    with pytest.raises(ValueError, match="returns a tuple, but products need one tensor"):
        _ = Hessian(risk) @ random(risk.numel)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).transpose(0, 1)


@pytest.mark.parametrize("length", [4, 7])
def test_noise_of_outputs_that_do_not_begin_with_the_examples(length):
    """Refused, or right; but never silently another matrix."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.mean(dim=0), targets, reduction="none")

    risk = EmpiricalRisk(TimeFirst(), random(7, length, 4), torch.arange(7) % 3, loss=loss)
    vector = random(risk.numel)
    assert_close(Hessian(risk) @ vector, dense_curvature(risk) @ vector, **EXACT64)
    try:
        found = GradientCovariance(risk) @ vector
    except ValueError:
        found = dense_covariance(risk) @ vector
    assert_close(found, dense_covariance(risk) @ vector, **EXACT64)


class Checkpointed(nn.Module):
    """Recomputes its middle in the backward pass."""

    def __init__(self, middle: nn.Module, *, recomputes: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = copy.deepcopy(middle).double().eval(), nn.Linear(72, 3).double()
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=False) if self.recomputes else self.body(x)
        return self.head(hidden.flatten(1))


@pytest.mark.parametrize(
    "middle",
    [
        nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh()),
    ],
    ids=lambda middle: type(middle[0]).__name__,
)
def test_activation_checkpointing(middle):
    _, inputs, targets = CASES["conv"].problem()
    results = [
        products_of(EmpiricalRisk(Checkpointed(middle, recomputes=recomputes), inputs, targets))
        for recomputes in (False, True)
    ]
    for name, wanted in results[0].items():
        assert_close(results[1][name], wanted, **EXACT64)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(dim=1))


def test_attention():
    """PyTorch's default kernel, flash attention, has no second derivative."""
    model, inputs, targets = Attention().double().eval(), random(7, 5, 4), torch.arange(7) % 3
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    risk = EmpiricalRisk(model, inputs, targets, chunk_size=3)
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
    layer = nn.Linear(6, 3).double()
    if kind == "old":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = nn.utils.weight_norm(layer)
    else:
        model = nn.utils.parametrizations.weight_norm(layer)
    risk = EmpiricalRisk(model, random(9, 6), torch.arange(9) % 3, chunk_size=4)
    theta, step = risk.theta(), 1e-5
    ahead, behind = (
        torch.stack([risk.at(theta + sign * e).gradient() for e in step * torch.eye(risk.numel).double()])
        for sign in (1, -1)
    )
    assert_close(Hessian(risk) @ torch.eye(risk.numel).double(), (ahead - behind) / (2 * step), **FD)
    check_operator_contract(Hessian(risk))
    check_operator_contract(GaussNewton(risk))
    check_operator_contract(GradientCovariance(risk))


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


class InPlace(nn.Module):
    """Normalises the images it is given in place."""

    def __init__(self, *, copies: bool) -> None:
        super().__init__()
        self.body, self.copies = mlp(3), copies

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if self.copies else x
        return self.body(x.sub_(0.5).div_(2.0))


@pytest.mark.parametrize("memory", [None, PLENTY])
def test_models_that_change_their_inputs(memory):
    inputs, targets = random(7, 4), torch.arange(7) % 3
    before = inputs.clone()
    results = [
        products_of(EmpiricalRisk(InPlace(copies=copies), inputs, targets, chunk_size=3, memory=memory))
        for copies in (True, False)
    ]
    assert_same_bits(*results)
    assert torch.equal(inputs, before)


# ---------------------------------------------------------------------- cost


def flops(function: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def costs() -> dict[str, float]:
    """Multiplications of convolutions and matrices in one product, in units of one gradient's."""
    torch.manual_seed(0)
    width = 8
    blocks = [
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        for _ in range(6)
    ]
    stem, head = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, 3)
    model = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    inputs, targets = torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    risk, fresh = (EmpiricalRisk(model, inputs, targets, memory=memory) for memory in (PLENTY, None))
    vector = torch.randn(risk.numel)
    operators = {name: kind(risk) for name, kind in OPERATORS.items()}
    measured = {name: lambda o=operator: o.matvec(vector) for name, operator in operators.items()}
    measured["projections"] = lambda: gradient_projections(risk, vector[:, None])
    measured["hessian, graph not kept"] = lambda: Hessian(fresh).matvec(vector)
    _ = operators["hessian"] @ vector
    gradient = flops(lambda: F.cross_entropy(model(inputs), targets).backward())
    assert flops(risk.gradient) == gradient
    return {name: flops(measure) / gradient for name, measure in measured.items()}


# What the docstrings promise in gradients' time. A forward pass is a third of a gradient's; products with J
# and Jᵀ are two thirds each.
@pytest.mark.parametrize(
    ("name", "promised"),
    [
        ("hessian", 2),
        ("hessian, graph not kept", 3),
        ("gauss_newton", 4 / 3),
        ("covariance", 4 / 3),
        ("projections", 2 / 3),
    ],
)
def test_cost_of_a_product(costs, name, promised):
    # 5 % for the first layer, whose input has no derivative: 1/8 of the others' work, in a third of the terms
    assert promised / 1.05 < costs[name] < 1.05 * promised
