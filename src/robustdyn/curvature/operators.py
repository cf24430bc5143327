"""What the solvers see: a symmetric linear map on R^P, known only through its products."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from robustdyn.curvature.empirical_risk import plain


class LinearOperator(ABC):
    """A symmetric P×P matrix that is never formed.

    Subclasses implement :meth:`_matvec`; callers use :meth:`matvec` or ``@``.

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
        if vector.shape != self.shape[:1]:
            raise ValueError(f"expected a vector of shape {self.shape[:1]}, got {tuple(vector.shape)}")
        if vector.dtype != self.dtype or vector.device != self.device:
            raise ValueError(
                f"expected a {self.dtype} vector on {self.device}, got {vector.dtype} on {vector.device}"
            )
        return self._matvec(plain(vector))

    def __matmul__(self, other: Tensor) -> Tensor:
        """A v for a vector (P,), or A V column by column for a matrix (P, k)."""
        if other.dim() == 1:
            return self.matvec(other)
        return torch.stack([self.matvec(column) for column in other.unbind(dim=1)], dim=1)
