"""Attacks for training and evaluation."""

from robustdyn.attacks.pgd import PGD, AttackLoss, summed_cross_entropy

__all__ = ["PGD", "AttackLoss", "summed_cross_entropy"]
