"""Tests that products leave the model, its gradients and torch's state unchanged, also after an error."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from robustdyn.curvature import (
    DiagonallyScaled,
    EmpiricalRisk,
    GaussNewton,
    GradientCovariance,
    Hessian,
    projected_covariance,
)
from tests.cases import CASES, PreActNet
from tests.curvature.reference import (
    OPERATORS,
    PLENTY,
    alive,
    assert_unchanged,
    generator,
    random,
    risk_of,
    snapshot,
    without_garbage_collection,
)
from tests.tolerances import EXACT64

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


@pytest.mark.parametrize("memory", [None, PLENTY])
@pytest.mark.parametrize("name", [name for name in MEASUREMENTS if name != "forgotten"])
def test_products_inside_inference_mode(name, memory):
    """As in Lightning's validation hooks."""
    # to the bit, but for a product of matrices, for which PyTorch may choose another kernel there
    tolerance = EXACT64 if name == "projected" else {"rtol": 0.0, "atol": 0.0}
    wanted = MEASUREMENTS[name](risk_of(CASES["preact"]))
    model, inputs, targets = CASES["preact"].problem()
    with torch.inference_mode():
        risk = EmpiricalRisk(model, inputs.clone(), targets.clone(), chunk_size=3, memory=memory)
        for _ in range(2):
            assert_close(MEASUREMENTS[name](risk), wanted, **tolerance)
    assert_close(MEASUREMENTS[name](risk), wanted, **tolerance)
