"""Sharpness-aware minimisation."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from robustdyn.methods.perturbations.awp import global_norm
from robustdyn.methods.perturbations.perturbation import WeightPerturbation

_TINY = 1e-12


class SAM(WeightPerturbation):
    """v = ρ g / ‖g‖, the norm over all parameters (Foret et al., ICLR 2021, eq. 2 and algorithm 1).

    The gradient is taken at w + v, the optimiser's step at w.

    Args:
        rho: ρ, length of the perturbation, ≥ 0.
        warmup_epochs: First epochs without a perturbation.

    Raises:
        ValueError: A setting outside its range.
    """

    step_at: ClassVar[Literal["perturbed", "original"]] = "original"

    def __init__(self, *, rho: float, warmup_epochs: int) -> None:
        super().__init__(warmup_epochs=warmup_epochs)
        if not rho >= 0:
            raise ValueError(f"rho must be at least 0, got {rho}")
        self._rho = rho

    def selects(self, name: str, parameter: nn.Parameter) -> bool:
        """Every parameter."""
        return True

    def direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """ρ g / ‖g‖."""
        scale = self._rho / (global_norm(gradients) + _TINY)
        return [gradient * scale for gradient in gradients]
