"""Training methods as combinations of an objective and a learning-rate rule."""

from robustdyn.methods.adversarial_training import AdversarialTraining, OptimizerState
from robustdyn.methods.objectives import AdversarialCrossEntropy
from robustdyn.methods.schedules import Constant, Piecewise

__all__ = ["AdversarialCrossEntropy", "AdversarialTraining", "Constant", "OptimizerState", "Piecewise"]
