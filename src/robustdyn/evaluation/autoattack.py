"""Runs AutoAttack (Croce & Hein, ICML 2020) through its authors' package, ``pyautoattack``.

The package runs all batches of all attacks in one call, seeds the global random numbers, traces the
interpreter and warns through a logger of its own. Here it is given one batch of one attack at a time, so that
an evaluation can be recorded while it runs and resumed if it was killed. Its warnings are collected.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustdyn.data import Batch
from robustdyn.evaluation.ball import Ball
from robustdyn.evaluation.evaluators import Access, Attack, Description, Note

try:
    import pyautoattack
    import pyautoattack.checks
except ModuleNotFoundError:  # the extra robustdyn[autoattack] is not installed
    pyautoattack = None

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
BLACK_BOX = ("square",)
NORMS = {"linf": "Linf", "l2": "L2"}
TARGETED = ("apgd-t", "fab-t")
# A part of each text that the package's checks log -> the name of our check, or "" where ours is better.
MESSAGES = {
    "randomized defense": "",
    "probability distribution": "",
    "zero gradient": "zero_dlr_gradient",
    "dynamic defense": "dynamic_model",
    "Square Attack has decreased": "",
}


@dataclass(frozen=True, kw_only=True)
class AutoAttackEvaluator:
    """Successive attacks, each on the examples that the others did not break, with the standard settings.

    The outcomes of each attack equal those of one call of ``AutoAttack(..., version="standard", seed=seed)``
    on the same examples with the same batch size. With K classes the targeted attacks aim at 9 of the other
    K − 1, as in the standard version, or at all of them if there are fewer.

    Attributes:
        attack_list: Names of the attacks, in order, from ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``,
            ``fab-t``, ``square``. The standard version is ``apgd-ce, apgd-t, fab-t, square``.

    Raises:
        ModuleNotFoundError: The package is missing; it is the extra ``robustdyn[autoattack]``.
        ValueError: A name is not known or occurs twice, or the list is empty.
    """

    attack_list: Sequence[str]

    def __post_init__(self) -> None:
        if pyautoattack is None:
            raise ModuleNotFoundError(
                "AutoAttack needs the package pyautoattack; install it with pip install "
                "'robustdyn[autoattack]', or choose an evaluation without AutoAttack, such as evaluation=pgd"
            )
        names = list(self.attack_list)
        unknown = [name for name in names if name not in ATTACKS]
        if unknown or not names:
            found = ", ".join(map(str, unknown)) or "none"
            raise ValueError(f"attack_list has {found}; choose of {', '.join(ATTACKS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"attack_list={names} has a name twice")
        object.__setattr__(self, "attack_list", tuple(names))

    def settings(self) -> Mapping[str, Any]:
        """The attributes, and the version of the package."""
        return {**asdict(self), "pyautoattack": pyautoattack.__version__}

    def attacks(
        self, name: str, ball: Ball, num_classes: int, images: Tensor, seed: int
    ) -> Mapping[str, Attack]:
        """The attacks of the list, as ``name/apgd-ce`` and so on.

        Raises:
            ValueError: Fewer than four classes (three for ``apgd-dlr``), for which the attacks' loss is not
                defined, or images too small for Square Attack.
        """
        least = {"apgd-t": 4, "apgd-dlr": 3}
        for kind in self.attack_list:
            if num_classes < least.get(kind, 2):
                raise ValueError(
                    f"attack_list has {kind}, which needs {least[kind]} classes or more, but there are "
                    f"{num_classes}; leave it out"
                )
            if kind == "square" and ball.norm == "l2" and min(images.shape[-2:]) < 5:
                raise ValueError("attack_list has square, which needs 5x5 pixels or more in l2; leave it out")
        return {f"{name}/{kind}": _Standard(kind, ball, num_classes, seed) for kind in self.attack_list}


class _Standard:
    """One attack of the package, set up as in its standard version."""

    def __init__(self, kind: str, ball: Ball, num_classes: int, seed: int) -> None:
        self._kind, self._ball, self._seed = kind, ball, seed
        self._targets = min(9, num_classes - 1)  # the standard version takes 9
        black_box = kind in BLACK_BOX
        access: Access = "black_box" if black_box else "white_box"
        self.description = Description(
            access=access,
            norm=ball.norm,
            eps=ball.eps,
            loss=None,
            step_size=None,
            steps=5000 if black_box else 100,  # the package's defaults
            restarts=self._targets if kind in TARGETED else 1,
            in_ball=True,
            tied=None,
        )

    def __call__(self, model: nn.Module, batch: Batch, note: Note) -> Tensor:
        images, labels = batch.images, batch.targets
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices), _collected(note), _own_trace():
            attack = pyautoattack.AutoAttack(
                model,
                norm=NORMS[self._ball.norm],
                eps=self._ball.eps,
                version="standard",
                device=images.device,
                seed=self._seed,
            )
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = self._targets
            attack.attacks_to_run = [self._kind]
            adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(labels))
        result: Tensor = adversarial
        return result


@contextmanager
def _collected(note: Note) -> Iterator[None]:
    """Pass the warnings that the package logs to ``note``, and nowhere else."""
    logger = logging.getLogger("auto-attack")
    handler = _Collector(note)
    propagate, disabled = logger.propagate, logger.disabled
    logger.addHandler(handler)
    logger.propagate = logger.disabled = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate, logger.disabled = propagate, disabled


class _Collector(logging.Handler):
    def __init__(self, note: Note) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().partition(" See ")[0]
        for part, check in MESSAGES.items():
            if part in text:
                if check:
                    self._note(check, text)
                return
        self._note("pyautoattack", text)


@contextmanager
def _own_trace() -> Iterator[None]:
    """Confine the package's check for dynamic defences, which ends tracing and counts over all models."""
    trace = sys.gettrace()
    for name in pyautoattack.checks.funcs:
        pyautoattack.checks.funcs[name] = 0
    try:
        yield
    finally:
        sys.settrace(trace)
