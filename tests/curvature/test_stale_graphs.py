"""Tests that kept graphs are freed when weights, statistics or examples change, and with their risk."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from robustdyn.curvature import DiagonallyScaled, EmpiricalRisk, GaussNewton, Hessian, gradient_projections
from robustdyn.curvature.tape import Tape
from tests.cases import CASES
from tests.curvature.reference import (
    OPERATORS,
    PLENTY,
    alive,
    assert_same_bits,
    generator,
    products_of,
    random,
    risk_of,
    without_garbage_collection,
)


@torch.enable_grad()
def optimise(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def scaled(model: nn.Module) -> dict[str, Tensor]:
    return {key: 1.5 * tensor for key, tensor in model.state_dict().items()}


def new_parameter_at_the_old_address(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Python gives the same id to an object that takes another's place."""
    address, values = id(model.linear.weight), 1.5 * model.linear.weight.detach()
    model.linear.weight = None
    candidates = []
    while not candidates or (id(candidates[-1]) != address and len(candidates) < 100):
        candidates.append(nn.Parameter(values))
    # at another address if something still holds the old one
    model.linear.weight = candidates[-1]


CHANGES = {
    "in place": lambda model, x, y: model.linear.weight.mul_(1.5),
    "optimised": optimise,
    "loaded": lambda model, x, y: model.load_state_dict(scaled(model)),
    "loaded and assigned": lambda model, x, y: model.load_state_dict(scaled(model), assign=True),
    "parameter": lambda model, x, y: setattr(
        model.linear, "weight", nn.Parameter(1.5 * model.linear.weight.detach())
    ),
    "parameter at the old address": new_parameter_at_the_old_address,
    "settled": lambda model, x, y: (model.train()(x), model.eval()),
    "buffer": lambda model, x, y: setattr(model.bn, "running_mean", model.bn.running_mean + 1.0),
    "layer": lambda model, x, y: (
        setattr(model, "linear", copy.deepcopy(model.linear)),
        model.linear.weight.mul_(1.5),
    ),
    "vector": lambda model, x, y: vector_to_parameters(
        1.5 * parameters_to_vector(model.parameters()), model.parameters()
    ),
    "data": lambda model, x, y: model.linear.weight.data.mul_(1.5),
    "data that keeps the norms": lambda model, x, y: (
        model.linear.weight.data.neg_(),
        model.conv1.weight.data.copy_(model.conv1.weight.flip(0)),
    ),
    "statistics through data": lambda model, x, y: model.bn.running_mean.data.neg_(),
    "inputs through data": lambda model, x, y: x.data.neg_(),
    "inputs in place": lambda model, x, y: x.mul_(1.5),
    "targets in place": lambda model, x, y: y.copy_((y + 1) % 3),
    "targets through numpy": lambda model, x, y: np.copyto(y.numpy(), (y.numpy() + 1) % 3),
}


@pytest.mark.parametrize("memory", [None, PLENTY])
@pytest.mark.parametrize("change", CHANGES)
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

    with torch.no_grad():
        CHANGES[change](model, inputs, targets)
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
        labels_only = change.startswith("targets")
        assert torch.equal(found, old) == (labels_only and kind is GaussNewton)
    assert alive(recorded) == 0


def test_a_change_of_an_unmeasured_parameter_is_noticed():
    model, inputs, targets = CASES["preact"].problem()
    risk = EmpiricalRisk(model, inputs, targets, parameters=["linear.bias"], memory=PLENTY)
    operator, vector = Hessian(risk), random(3)
    _ = operator @ vector
    with torch.no_grad():
        CHANGES["in place"](model, inputs, targets)
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


@pytest.mark.parametrize("memory", [PLENTY, pytest.param(None, marks=pytest.mark.slow)])
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
