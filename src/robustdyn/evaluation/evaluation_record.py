"""Keeps the record of an evaluation: one directory in which it can be resumed, and more attacks added.

``settings.json`` describes what was evaluated. ``records/*.jsonl`` contains the tables ``outcomes``,
``evaluation`` and ``warnings`` of ``robustdyn.records.schema``, and ``summary.json`` the result.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustdyn.errors import RecordError
from robustdyn.records import RunRecords
from robustdyn.records.files import replace_file, sole_process
from robustdyn.records.labels import changes
from robustdyn.records.lines import parse_lines
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.writer import jsonable

_ANOTHER = "choose another output=DIR, or delete this one"

Row = Mapping[str, Any]
Warnings = dict[tuple[str, str], str]
"""(check, evaluator) -> message."""


class EvaluationRecord:
    """The outcomes in an evaluation's directory, which are read back and appended to; made by ``open``.

    Attributes:
        directory: The evaluation's directory.
        attacks: Descriptions of all attacks recorded so far, by name, including those of earlier sessions.
        warnings: The warnings given while attacking.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.attacks: dict[str, dict[str, Any]] = {}
        self.warnings: Warnings = {}
        self._records = RunRecords(directory)
        self._outcomes: dict[str, list[Row]] = {}

    @classmethod
    @contextmanager
    def open(
        cls, directory: Path, settings: Mapping[str, object], provenance: Mapping[str, object]
    ) -> Iterator["EvaluationRecord"]:
        """Open the record in ``directory``, new or of the same evaluation; only one process may have it open.

        Args:
            directory: The evaluation's directory; made if absent.
            settings: Everything on which the outcomes of all attacks depend, in a form that JSON can hold.
            provenance: Versions, hardware and the like, which are written at first and never compared.

        Raises:
            RecordError: Another process has it open, it cannot be written or read, or its settings differ.
        """
        with sole_process(directory, _ANOTHER):
            record = cls(directory)
            record._begin(jsonable(settings), jsonable(provenance))
            yield record

    def describe(self, evaluator: str, settings: Mapping[str, object], attacks: Mapping[str, Row]) -> None:
        """Record an evaluator's settings and its attacks, before their first outcome.

        Raises:
            RecordError: An evaluator of this name was recorded with other settings.
        """
        stored = self._stored()
        new = jsonable({"settings": settings, "attacks": attacks})
        old = stored["evaluators"].setdefault(evaluator, new)
        if old != new:
            changed = changes(old["settings"], new["settings"])
            raise RecordError(f"{self.directory}: {evaluator} was run with {changed}; {_ANOTHER}")
        self._store(stored)
        self.attacks |= new["attacks"]

    def outcomes(self, attack: str) -> list[Row]:
        """The recorded rows of one attack, in order."""
        return list(self._outcomes.get(attack, ()))

    def whole_chunks(self, attack: str, chunks: Sequence[Sequence[int]]) -> int:
        """How many of the ``chunks`` of examples are recorded completely; rows of a partial one are dropped.

        Raises:
            RecordError: The rows are not those of the first chunks.
        """
        found = [row["index"] for row in self._outcomes.get(attack, ())]
        whole, count = 0, 0
        for chunk in chunks:
            if found[count : count + len(chunk)] != list(chunk):
                break
            whole, count = whole + 1, count + len(chunk)
        rest = found[count:]
        if rest and (whole == len(chunks) or rest != list(chunks[whole])[: len(rest)]):
            raise RecordError(
                f"{self._records.path('outcomes')}: the rows of {attack} are not those of this evaluation; "
                f"{_ANOTHER}"
            )
        if rest:
            self._outcomes[attack] = self._outcomes[attack][:count]
            self._rewrite()
        return whole

    def add(self, rows: Sequence[Row]) -> None:
        """Append the outcomes of one chunk of one attack."""
        self._records.extend("outcomes", rows)
        for row in rows:
            self._outcomes.setdefault(row["evaluator"], []).append(row)

    def warn(self, check: str, evaluator: str, message: str) -> None:
        """Append a warning, unless it was given before."""
        if (check, evaluator) not in self.warnings:
            self.warnings[check, evaluator] = message
            self._records.append("warnings", _warning(check, evaluator, message))

    def write_results(
        self, rows: Sequence[Row], warnings: Mapping[tuple[str, str], str], summary: Mapping[str, object]
    ) -> None:
        """Replace the table ``evaluation``, all warnings and ``summary.json``."""
        self._records.replace("evaluation", rows)
        self._records.replace("warnings", [_warning(*key, text) for key, text in warnings.items()])
        self._records.write_summary(summary)

    def _begin(self, settings: Mapping[str, object], provenance: Mapping[str, object]) -> None:
        path = RunDirectory(self.directory).settings
        if not path.exists():
            if self._records.path("outcomes").exists():
                raise RecordError(f"{path}: missing beside records that are there; {_ANOTHER}")
            self._store({"evaluation": settings, "provenance": provenance, "evaluators": {}})
            return
        stored = self._stored()
        if stored["evaluation"] != settings:
            raise RecordError(
                f"{self.directory}: holds an evaluation with {changes(stored['evaluation'], settings)}; "
                f"{_ANOTHER}"
            )
        for evaluator in stored["evaluators"].values():
            self.attacks |= evaluator["attacks"]
        outcomes, warned = (
            parse_lines(self._records.path(name), warn=False, epochs=False, remedy=_ANOTHER)
            for name in ("outcomes", "warnings")
        )
        for row in outcomes:
            self._outcomes.setdefault(row["evaluator"], []).append(row)
        for row in warned:
            self.warnings.setdefault((row["check"], row["evaluator"]), row["message"])
        self._rewrite()  # drops a half-written line that a killed process left

    def _rewrite(self) -> None:
        self._records.replace("outcomes", [row for rows in self._outcomes.values() for row in rows])
        self._records.replace("warnings", [_warning(*key, text) for key, text in self.warnings.items()])

    def _stored(self) -> dict[str, Any]:
        path = RunDirectory(self.directory).settings
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RecordError(f"{path}: cannot be read; {_ANOTHER}") from error
        if not _are_settings(stored):
            raise RecordError(f"{path}: not the settings of an evaluation; {_ANOTHER}")
        return stored

    def _store(self, content: Mapping[str, object]) -> None:
        path = RunDirectory(self.directory).settings
        try:
            replace_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise RecordError(
                f"{path}: cannot write ({error.strerror}); choose another output=DIR"
            ) from error


def _are_settings(stored: object) -> bool:
    if not isinstance(stored, dict) or not isinstance(stored.get("evaluation"), dict):
        return False
    evaluators = stored.get("evaluators")
    return isinstance(evaluators, dict) and all(
        isinstance(one, dict)
        and isinstance(one.get("settings"), dict)
        and isinstance(one.get("attacks"), dict)
        for one in evaluators.values()
    )


def _warning(check: str, evaluator: str, message: str) -> Row:
    return {"check": check, "evaluator": evaluator, "message": message}
