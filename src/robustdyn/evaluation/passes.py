"""Evaluates one model: clean accuracy, accuracy under each attack, the worst case, and warnings.

An example counts as robust if it is classified correctly without an attack and at every attacked image that
an evaluator shows the model. Examples that are wrong without an attack, or that an earlier attack of the same
evaluator broke, are not attacked. Shapes: N examples, B examples of a batch.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from robustdyn.attacks.pgd import check_range
from robustdyn.data import Batch, ImageTensors
from robustdyn.evaluation.ball import Ball
from robustdyn.evaluation.evaluation_record import EvaluationRecord, Row
from robustdyn.evaluation.evaluators import Attack, Evaluator, right
from robustdyn.evaluation.sanity import COMPARISONS, AttackOutcome, Sanity, zero_gradients
from robustdyn.models.modes import mode
from robustdyn.records.schema import ACCURACY_SE

CLEAN, WORST_CASE = "clean", "worst_case"
MODEL = "model"  # stands for no attack in the table of warnings

Columns = Mapping[str, Sequence[object]]
Progress = Callable[[str, int, int], None]
"""(attack, examples done, examples to do), after every batch."""


@dataclass(frozen=True)
class Result:
    """The result of an evaluation.

    Attributes:
        rows: Rows of the table ``evaluation``: clean, every attack, every suite of attacks, the worst case.
        warnings: (check, evaluator) -> message; see ``robustdyn.evaluation.sanity``.
        checks: Names of the attacks outside the ball, which do not count for the worst case.
    """

    rows: Sequence[Row]
    warnings: Mapping[tuple[str, str], str]
    checks: frozenset[str]

    def accuracy(self, evaluator: str) -> float:
        """Share of the examples that are still right under ``evaluator``.

        Raises:
            KeyError: The evaluator did not run.
        """
        for row in self.rows:
            if row["evaluator"] == evaluator:
                return float(row["accuracy"])
        raise KeyError(evaluator)


def evaluate(
    model: nn.Module,
    data: ImageTensors,
    evaluators: Mapping[str, Evaluator],
    *,
    ball: Ball,
    sanity: Sanity,
    batch_size: int,
    seed: int,
    record: EvaluationRecord,
    progress: Progress = lambda attack, done, total: None,
) -> Result:
    """Attack ``model`` with every evaluator and record each example's outcome.

    Outcomes that ``record`` already holds are not computed again. During the evaluation the model is in eval
    mode and its parameters require no gradient. The state of the global random numbers does not change.

    Args:
        model: From images in [0, 1] (B, C, H, W) to logits (B, K), on the device of ``data``.
        data: The N examples.
        evaluators: The evaluators by name, in the order in which they run.
        ball: The threat model.
        sanity: When to warn.
        batch_size: Examples attacked at once. Outcomes of PGD do not depend on it, except for rounding. Those
            of AutoAttack do, because it draws random numbers for a whole batch.
        seed: Seed of all random numbers.
        record: Receives the outcomes.
        progress: Called after every batch.

    Raises:
        ValueError: A name is not allowed, an evaluator is not defined for these data, or images are outside
            [0, 1].
        RuntimeError: An attack left the ball.
        RecordError: The record belongs to other settings, or cannot be written.
    """
    for name in evaluators:
        if name in (CLEAN, WORST_CASE, MODEL) or "/" in name:
            raise ValueError(f"an evaluator cannot be called {name}; choose another name, without a slash")
    with _attackable(model):
        run = _Run(model, data, batch_size, record, progress)
        first = run.batch(range(min(batch_size, len(data))))
        sanity.check_model(model, first.images, lambda check, text: record.warn(check, MODEL, text))
        with torch.no_grad():
            num_classes = model(first.images[:1]).shape[1]
        attacks = {
            name: evaluator.attacks(name, ball, num_classes, first.images, seed)
            for name, evaluator in evaluators.items()
        }  # all are made before the first one runs, so that errors show at once
        for name, evaluator in evaluators.items():
            settings = {"kind": type(evaluator).__name__, **evaluator.settings()}
            record.describe(name, settings, {k: asdict(a.description) for k, a in attacks[name].items()})
        right_unattacked = run.clean()
        for parts in attacks.values():
            standing = right_unattacked
            for name, attack in parts.items():
                standing = run.attack(name, attack, standing)
        return _summarise(record, len(data), sanity)


class _Run:
    """The passes of one evaluation over its examples."""

    def __init__(
        self,
        model: nn.Module,
        data: ImageTensors,
        batch_size: int,
        record: EvaluationRecord,
        progress: Progress,
    ) -> None:
        self.model, self.data, self.batch_size = model, data, batch_size
        self.record, self.progress = record, progress
        self.predictions: list[int] = []

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = self.data.batch(torch.tensor(list(indices)))
        check_range(batch.images, (0.0, 1.0))  # the ball's range, which other packages' attacks also need
        return batch

    def clean(self) -> Tensor:
        """Which examples are right without an attack, bool (N,)."""
        chunks = self._split(range(len(self.data)))
        for chunk in self._left(CLEAN, chunks):
            started = time.monotonic()
            batch = self.batch(chunk)
            with torch.no_grad():
                logits = self.model(batch.images)
            columns: Columns = {
                "prediction": logits.argmax(dim=1).tolist(),
                "robust": right(logits, batch.targets).tolist(),
                "zero_gradient": zero_gradients(self.model, batch.images, batch.targets).tolist(),
            }
            self._add(CLEAN, batch, columns, attacked=False, seconds=time.monotonic() - started)
        rows = self.record.outcomes(CLEAN)
        self.predictions = [row["prediction"] for row in rows]
        return torch.tensor([row["robust"] for row in rows])

    def attack(self, name: str, attack: Attack, standing: Tensor) -> Tensor:
        """Which examples are still right after this attack on those ``standing``, both bool (N,)."""
        skipped, attacked = (which.nonzero()[:, 0].tolist() for which in (~standing, standing))
        chunks = [skipped, *self._split(attacked)] if skipped else self._split(attacked)
        for chunk in self._left(name, chunks):
            started, spared = time.monotonic(), chunk is skipped
            batch = self.batch(chunk)
            robust = [False] * len(chunk) if spared else self._robust(name, attack, batch).tolist()
            columns: Columns = {"prediction": [self.predictions[i] for i in chunk], "robust": robust}
            seconds = 0.0 if spared else time.monotonic() - started
            self._add(name, batch, columns, attacked=not spared, seconds=seconds)
        return _flags(self.record.outcomes(name), len(self.data))

    def _robust(self, name: str, attack: Attack, batch: Batch) -> Tensor:
        """At which adversarial images the model is right, bool (B,)."""
        adversarial = attack(self.model, batch, lambda check, text: self.record.warn(check, name, text))
        broken = ~adversarial.flatten(1).isfinite().all(dim=1)
        if broken.any():
            # an image with a NaN is no image: the attack failed, not the model
            adversarial = torch.where(broken[:, None, None, None], batch.images, adversarial)
            text = "gradients that are not finite ended attacks: the examples count as right"
            self.record.warn("not_finite", name, text)
        ball = Ball(attack.description.norm, attack.description.eps)
        if not ball.holds(batch.images, adversarial).all():
            raise RuntimeError(f"{name} left the {ball.norm} ball of radius {ball.eps}")
        with torch.no_grad():
            return right(self.model(adversarial), batch.targets)

    def _left(self, name: str, chunks: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """The chunks that are not recorded yet, reporting progress."""
        done = self.record.whole_chunks(name, chunks)
        total, count = sum(map(len, chunks)), sum(map(len, chunks[:done]))
        for chunk in chunks[done:]:
            yield chunk
            count += len(chunk)
            self.progress(name, count, total)

    def _split(self, indices: Sequence[int]) -> list[Sequence[int]]:
        return [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]

    def _add(self, name: str, batch: Batch, columns: Columns, *, attacked: bool, seconds: float) -> None:
        count = len(batch.targets)
        columns = {"index": batch.indices.tolist(), "label": batch.targets.tolist(), **columns}
        shared = {"evaluator": name, "attacked": attacked, "seconds": seconds / count}
        self.record.add([shared | {key: values[i] for key, values in columns.items()} for i in range(count)])


@contextmanager
def _attackable(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and its parameters require no gradients."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with mode(model, training=False):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _summarise(record: EvaluationRecord, examples: int, sanity: Sanity) -> Result:
    """Compute and write accuracies, suites, the worst case and warnings from all finished attacks."""
    recorded = {name: record.outcomes(name) for name in (CLEAN, *record.attacks)}
    finished = {name: found for name, found in recorded.items() if len(found) >= examples}
    robust = {name: _flags(found, examples) for name, found in finished.items()}
    suites = _suites(record.attacks, robust)

    rows: list[Row] = []
    outcomes: dict[str, AttackOutcome] = {}
    for name, flags in robust.items():
        described = record.attacks.get(name, {})
        rows.append(_row(name, flags, _seconds(recorded[name]), described))
        outcomes[name] = AttackOutcome(
            robust=flags,
            access=described.get("access"),
            in_ball=described.get("in_ball", True),
            tied=described.get("tied"),
            effort=(described.get("steps", 0), described.get("restarts", 0)),
            suite=suites.get(name) if _follows_gradients(record, suites.get(name)) else None,
            zero_gradients=sum(bool(row.get("zero_gradient")) for row in recorded[name]),
        )
        if suite := suites.get(name):
            parts = [part for part in robust if part.startswith(f"{suite}/")]
            spent = sum(_seconds(recorded[part]) for part in parts)
            rows.append(_row(suite, flags, spent, {}))
    bounded = [outcome.robust for outcome in outcomes.values() if outcome.in_ball]
    total = sum(float(row["seconds"]) for row in rows if row["evaluator"] in robust)
    rows.append(_row(WORST_CASE, torch.stack(bounded).all(dim=0), total, {}))

    warnings = {key: text for key, text in record.warnings.items() if key[0] not in COMPARISONS}
    for check, evaluator, message in sanity.compare(outcomes):
        warnings[check, evaluator] = message
    summary = {
        "accuracy": {row["evaluator"]: row["accuracy"] for row in rows},
        "warnings": [{"check": c, "evaluator": e, "message": text} for (c, e), text in warnings.items()],
    }
    record.write_results(rows, warnings, summary)
    return Result(rows, warnings, frozenset(n for n, o in outcomes.items() if not o.in_ball))


def _flags(rows: Sequence[Row], examples: int) -> Tensor:
    """Robustness by example, bool (N,)."""
    flags = torch.zeros(examples, dtype=torch.bool)
    for row in rows:
        flags[row["index"]] = row["robust"]
    return flags


def _suites(attacks: Mapping[str, object], robust: Mapping[str, Tensor]) -> dict[str, str]:
    """Last attack of each finished suite of attacks -> the suite."""
    last: dict[str, str] = {}
    for name in attacks:
        suite, slash, _ = name.partition("/")
        if slash:
            last[suite] = name
    return {name: suite for suite, name in last.items() if name in robust}


def _follows_gradients(record: EvaluationRecord, suite: str | None) -> bool:
    """Whether some attack of the suite follows gradients."""
    parts = [a for name, a in record.attacks.items() if name.startswith(f"{suite}/")]
    return any(part["access"] == "white_box" for part in parts)


def _seconds(rows: Sequence[Row]) -> float:
    return sum(float(row["seconds"]) for row in rows)


def _row(name: str, robust: Tensor, seconds: float, described: Mapping[str, Any]) -> Row:
    count = len(robust)
    accuracy = robust.double().mean().item()
    columns = ("norm", "eps", "loss", "step_size", "steps", "restarts")
    return {
        "evaluator": name,
        "examples": count,
        "accuracy": accuracy,
        ACCURACY_SE: sqrt(accuracy * (1 - accuracy) / count),
        "seconds": seconds,
        **{column: described.get(column) for column in columns},
    }
