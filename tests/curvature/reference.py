"""Dense references and the checks that every operator must pass."""

import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacrev
from torch.testing import assert_close

from robustdyn.curvature import EmpiricalRisk, LinearOperator, cross_entropy
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


def per_example_losses(risk: EmpiricalRisk, theta: Tensor) -> Tensor:
    """The losses as a function of the flat θ, written without the code under test (eval mode)."""
    tensors, start = {}, 0
    for name, parameter in risk.model.named_parameters():
        tensors[name] = theta[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return cross_entropy(functional_call(risk.model, tensors, (risk.inputs,)), risk.targets)


def flat(risk: EmpiricalRisk) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in risk.model.parameters()])


def dense_hessian(risk: EmpiricalRisk) -> Tensor:
    return hessian(lambda theta: per_example_losses(risk, theta).mean())(flat(risk))


def dense_gradients(risk: EmpiricalRisk) -> Tensor:
    """Gradients of single examples, (m, P)."""
    return jacrev(lambda theta: per_example_losses(risk, theta))(flat(risk))


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
