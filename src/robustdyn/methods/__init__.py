"""Training methods as combinations of an objective, a weight perturbation and a learning-rate rule."""

from robustdyn.methods.adversarial_training import AdversarialTraining
from robustdyn.methods.averaging import EpochAveraging
from robustdyn.methods.curvature_penalty import GaussNewtonPenalty
from robustdyn.methods.execution import Execution
from robustdyn.methods.gradient_noise import GradientNoise
from robustdyn.methods.objectives import (
    MART,
    TRADES,
    AdversarialCrossEntropy,
    CrossEntropy,
    Objective,
    StepLoss,
)
from robustdyn.methods.optimizer_state import OptimizerState, is_plain_momentum, optimizer_state
from robustdyn.methods.perturbations import AWP, SAM, GlobalAWP, WeightPerturbation
from robustdyn.methods.regularizer import Regularizer
from robustdyn.methods.schedules import (
    BoundRate,
    Constant,
    Cosine,
    Interpolated,
    MultiDecay,
    Piecewise,
    Schedule,
    WCIRate,
)

__all__ = [
    "AWP",
    "MART",
    "SAM",
    "TRADES",
    "AdversarialCrossEntropy",
    "AdversarialTraining",
    "BoundRate",
    "Constant",
    "Cosine",
    "CrossEntropy",
    "EpochAveraging",
    "Execution",
    "GaussNewtonPenalty",
    "GlobalAWP",
    "GradientNoise",
    "Interpolated",
    "MultiDecay",
    "Objective",
    "OptimizerState",
    "Piecewise",
    "Regularizer",
    "Schedule",
    "StepLoss",
    "WCIRate",
    "WeightPerturbation",
    "is_plain_momentum",
    "optimizer_state",
]
