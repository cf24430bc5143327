"""The interface for the solvers: a symmetric linear map on R^P, given only by its products."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from robustdyn.curvature.empirical_risk import EmpiricalRisk
from robustdyn.curvature.risk_function import plain
from robustdyn.curvature.tape import Tape


class LinearOperator(ABC):
    """A symmetric P×P matrix that is never formed.

    Subclasses implement ``_matvec``; callers use ``matvec`` or ``@``.

    Attributes:
        shape: (P, P).
        dtype: Precision of the products.
        device: Where vectors live.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Fix size, precision and device.

        Args:
            size: P.
            dtype: Precision of vectors and products.
            device: Where vectors live.
        """
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def _matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector (P,) of the right shape, dtype and device."""

    def matvec(self, vector: Tensor) -> Tensor:
        """A v.

        Args:
            vector: (P,), in the operator's dtype and on its device.

        Returns:
            (P,).

        Raises:
            ValueError: If shape, dtype or device are not the operator's.
        """
        self._check(vector, self.shape[:1])
        return self._matvec(plain(vector))

    def _matmat(self, matrix: Tensor) -> Tensor:
        """The product with a matrix (P, k) of the right height, dtype and device."""
        return torch.stack([self._matvec(column.contiguous()) for column in matrix.unbind(dim=1)], dim=1)

    def __matmul__(self, other: Tensor) -> Tensor:
        """A v for a vector (P,), or A V column by column for a matrix (P, k).

        Raises:
            ValueError: As ``matvec``.
        """
        if other.dim() == 1:
            return self.matvec(other)
        self._check(other, (self.shape[0], *other.shape[1:]))
        return self._matmat(plain(other))

    def _check(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise ValueError(f"expected a tensor of shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise ValueError(
                f"expected a {self.dtype} tensor on {self.device}, got {tensor.dtype} on {tensor.device}"
            )


class RiskOperator(LinearOperator):
    """A mean over the examples of an empirical risk, at the weights it has when the operator is made.

    Products are sums over chunks and processes, one all-reduce for each product. One that is not finite is a
    FloatingPointError that names the examples, raised by all processes.

    Attributes:
        risk: The risk.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        """The operator of a risk.

        Args:
            risk: The risk; graphs that it keeps are shared by all its operators.
        """
        super().__init__(risk.numel, risk.dtype, risk.device)
        self.risk = risk
        self._state = risk.state()

    @abstractmethod
    def _apply(self, tape: Tape, parts: tuple[Tensor, ...], *, last: bool) -> tuple[Tensor, ...]:
        """The sum over one chunk's examples; with ``last`` the tape may be used up."""

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._matmat(vector[:, None])[:, 0]

    def _matmat(self, matrix: Tensor) -> Tensor:
        risk = self.risk
        state = self._check_state()
        # rows, so that every product accumulates in contiguous memory; one graph serves all columns
        columns = [column.contiguous() for column in matrix.unbind(dim=1)]
        with risk.guard(products=True):
            total = torch.zeros(len(columns), risk.numel, dtype=self.dtype, device=self.device)
            for tape, expendable in risk.tapes(state):
                for index, column in enumerate(columns):
                    parts = tuple(risk.split(column).values())
                    last = expendable and index == len(columns) - 1
                    risk.add(total[index], self._apply(tape, parts, last=last))
        if not bool(risk.shards.sum(total).isfinite().all()) and bool(matrix.isfinite().all()):
            raise risk.not_finite("a product")
        return total.div_(risk.examples).T

    def _check_state(self) -> object:
        state = self.risk.state()
        if state != self._state:
            raise RuntimeError(
                "the model's weights, its running statistics or the examples changed since this operator was "
                "made: its products would belong to different matrices; make a new one"
            )
        return state


class DiagonallyScaled(LinearOperator):
    """S A S with S = diag(s): with s = D^{1/2} the curvature or noise that a preconditioned optimiser sees.

    For Adam D = 1/(√v̂ + ε), and y = D^{−1/2} θ obeys momentum SGD (docs/theory.md, section 4).
    """

    def __init__(self, operator: LinearOperator, scale: Tensor) -> None:
        """Scale an operator.

        Args:
            operator: A.
            scale: s, (P,), in the operator's dtype and on its device.

        Raises:
            ValueError: If it does not fit the operator, or is not finite.
        """
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self._check(scale, self.shape[:1])
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("scale must be finite")
        self._operator, self._scale = operator, plain(scale).clone()

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._scale * self._operator.matvec(self._scale * vector)

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self._scale[:, None] * (self._operator @ (self._scale[:, None] * matrix))
