"""Measures clean and robust accuracy of a model, example by example, and warns if they may be overstated.

``evaluate`` attacks a model with the given evaluators and writes an ``EvaluationRecord``.
"""

from robustdyn.evaluation.autoattack import AutoAttackEvaluator
from robustdyn.evaluation.ball import Ball
from robustdyn.evaluation.evaluation_record import EvaluationRecord
from robustdyn.evaluation.evaluators import Attack, Description, Evaluator, PGDEvaluator, UnboundedPGD
from robustdyn.evaluation.passes import Result, evaluate
from robustdyn.evaluation.sanity import Sanity

__all__ = [
    "Attack",
    "AutoAttackEvaluator",
    "Ball",
    "Description",
    "EvaluationRecord",
    "Evaluator",
    "PGDEvaluator",
    "Result",
    "Sanity",
    "UnboundedPGD",
    "evaluate",
]
