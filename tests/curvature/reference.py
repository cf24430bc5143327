"""Dense references and the checks that every operator must pass."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.testing import assert_close

from robustdyn.curvature import (
    EmpiricalRisk,
    GaussNewton,
    GradientCovariance,
    Hessian,
    LinearOperator,
    gradient_projections,
    layer_traces,
)
from tests.cases import CASES, Case
from tests.tolerances import EXACT64

PIECEWISE_LINEAR = [c for c in CASES.values() if c.piecewise_linear]
SMOOTH = [c for c in CASES.values() if c.smooth]


class Dense(LinearOperator):
    """A matrix as an operator; counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix
        self.count = 0

    def _matvec(self, vector: Tensor) -> Tensor:
        self.count += 1
        return self.matrix @ vector


def risk_of(case: Case, **changes: object) -> EmpiricalRisk:
    model, inputs, targets = case.problem()
    return EmpiricalRisk(model, inputs, targets, **{"chunk_size": case.chunk_size, **changes})  # type: ignore[arg-type]


def outputs_at(risk: EmpiricalRisk, theta: Tensor) -> Tensor:
    """The outputs as a function of the flat θ, written without the code under test (eval mode)."""
    present = dict(risk.model.named_parameters())
    parts = theta.split([present[name].numel() for name in risk.names])
    tensors = {name: part.view_as(present[name]) for name, part in zip(risk.names, parts, strict=True)}
    return functional_call(risk.model, tensors, (risk.inputs,))


def per_example_losses(risk: EmpiricalRisk, theta: Tensor) -> Tensor:
    return risk.loss(outputs_at(risk, theta), risk.targets)


def flat(risk: EmpiricalRisk) -> Tensor:
    present = dict(risk.model.named_parameters())
    return torch.cat([present[name].detach().reshape(-1) for name in risk.names])


def dense_hessian(risk: EmpiricalRisk) -> Tensor:
    return hessian(lambda theta: per_example_losses(risk, theta).mean())(flat(risk))


def dense_gauss_newton(risk: EmpiricalRisk) -> Tensor:
    """G from the outputs' Jacobian and the loss's own second derivative."""
    theta = flat(risk)
    outputs = outputs_at(risk, theta).detach()
    jacobian = jacrev(lambda t: outputs_at(risk, t).reshape(len(outputs), -1))(theta)
    total = torch.zeros(len(theta), len(theta), dtype=theta.dtype)
    for output, target, rows in zip(outputs, risk.targets, jacobian, strict=True):
        curvature = hessian(lambda z, of=output, y=target: risk.loss(z.view_as(of)[None], y[None])[0])
        total += rows.T @ curvature(output.reshape(-1)) @ rows / len(outputs)
    return total


def dense_gradients(risk: EmpiricalRisk) -> Tensor:
    """Gradients of single examples, (m, P)."""
    return jacrev(lambda theta: per_example_losses(risk, theta))(flat(risk))


def dense_covariance(risk: EmpiricalRisk) -> Tensor:
    return torch.cov(dense_gradients(risk).T, correction=0)


OPERATORS = {"hessian": Hessian, "gauss_newton": GaussNewton, "covariance": GradientCovariance}
DENSE = {"hessian": dense_hessian, "gauss_newton": dense_gauss_newton, "covariance": dense_covariance}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def check_operator_contract(operator: LinearOperator, dense: Tensor | None = None) -> None:
    """Check symmetry, linearity, dtype and repeatability, and equality with a dense matrix if given."""
    size = operator.shape[0]
    assert operator.shape == (size, size)
    u, v = random(size, 2, seed=1).to(operator.dtype).unbind(dim=1)
    before = u.clone()
    image = operator.matvec(u)
    assert torch.equal(u, before)
    assert image.shape == (size,)
    assert image.dtype == operator.dtype
    assert image.device == operator.device
    assert not image.requires_grad
    assert torch.equal(image, operator @ u)
    assert_close(v @ image, u @ operator.matvec(v), **EXACT64)
    assert_close(operator.matvec(2.0 * u - 3.0 * v), 2.0 * image - 3.0 * operator.matvec(v), **EXACT64)
    assert_close(operator @ torch.stack([u, v], dim=1), torch.stack([image, operator @ v], dim=1), **EXACT64)
    if dense is not None:
        assert_close(image, dense @ u, **EXACT64)


Made = list[weakref.ref]
PLENTY = 10**9  # bytes: all graphs of these problems many times over


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
