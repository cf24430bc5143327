"""Objectives: what the attack maximises and what the optimiser minimises."""

from robustdyn.methods.objectives.adversarial import AdversarialCrossEntropy
from robustdyn.methods.objectives.mart import MART
from robustdyn.methods.objectives.objective import Objective, StepLoss
from robustdyn.methods.objectives.standard import CrossEntropy
from robustdyn.methods.objectives.trades import TRADES

__all__ = ["MART", "TRADES", "AdversarialCrossEntropy", "CrossEntropy", "Objective", "StepLoss"]
