"""Perturbations of the weights, towards higher loss, under which the optimiser's gradient is taken."""

from robustdyn.methods.perturbations.awp import AWP, GlobalAWP
from robustdyn.methods.perturbations.perturbation import WeightPerturbation
from robustdyn.methods.perturbations.sam import SAM

__all__ = ["AWP", "SAM", "GlobalAWP", "WeightPerturbation"]
