"""The records of measured checkpoints: complete for every epoch in them, and resumed after a kill."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdyn.errors import RecordError
from robustdyn.records import RunRecords
from robustdyn.records.files import replace_file
from robustdyn.records.labels import changes
from robustdyn.records.lines import parse_lines
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import TABLES

COMPLETE = ("costs", "part", "all")  # table, column and value of the row that ends the rows of an epoch
_ANOTHER = "choose another output=DIR, or remove this one"
_OF_THE_RUN = ("epochs", "rates", "posterior", "timing")  # written as a whole, not measured


class MeasuredSeries:
    """Measured epochs of one training, in a directory that ``robustdyn-report`` reads.

    An epoch whose rows are not all there is dropped and measured again. The solver's starting vectors are
    kept beside the records, so that a resumed series continues with the same numbers.

    Args:
        directory: The directory; made if absent.
        settings: Everything that the numbers depend on, flat. A resumed series must have the same.

    Raises:
        RecordError: The directory holds a series with other settings, or cannot be read.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self._run = RunDirectory(directory)
        self._records = RunRecords(directory)
        self._settings = dict(settings)
        self._files: dict[str, str] = {}  # the digest of each epoch's checkpoint
        self._starts_file = directory / "warm_starts.pt"
        if self._run.settings.is_file():
            self._compare()
        self._keep_complete()

    @property
    def done(self) -> frozenset[int]:
        """The epochs that are measured."""
        return frozenset(map(int, self._files))

    def check(self, epoch: int, path: Path, digest: str) -> None:
        """Compare a checkpoint with the one that was measured for its epoch, if one was.

        Raises:
            RecordError: It is another one.
        """
        if self._files.get(str(epoch), digest) != digest:
            raise RecordError(
                f"{self._run.path}: epoch {epoch} was measured from another file than {path}; {_ANOTHER}"
            )

    def starts(self) -> dict[str, Tensor]:
        """The starting vectors that the last measured epoch left; none before the first."""
        if not self.done or not self._starts_file.is_file():
            return {}
        try:
            kept = torch.load(self._starts_file, map_location="cpu", weights_only=True)
            # the file is a step ahead where the process was killed before the epoch was complete
            return dict(kept["after" if kept["epoch"] in self.done else "before"])
        except Exception as error:  # whatever a damaged file makes torch raise
            raise RecordError(f"{self._starts_file}: cannot be read; {_ANOTHER}") from error

    def add(
        self,
        epoch: int,
        digest: str,
        rows: Sequence[tuple[str, Mapping[str, Any]]],
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> None:
        """Record an epoch: first the starting vectors that it leaves, then its rows.

        Args:
            epoch: The epoch.
            digest: Of its checkpoint.
            rows: Table and row; the last one says that the epoch is complete.
            before: The starting vectors that it began with.
            after: Those for the next epoch.
        """
        self._run.path.mkdir(parents=True, exist_ok=True)
        if after:
            partial = self._starts_file.with_suffix(".tmp")
            torch.save({"epoch": epoch, "before": dict(before), "after": dict(after)}, partial)
            partial.replace(self._starts_file)
        by_table: dict[str, list[Mapping[str, Any]]] = {}
        for table, row in rows:
            by_table.setdefault(table, []).append(row)
        self._store(self._files | {str(epoch): digest})
        for table in sorted(by_table, key=lambda name: name == COMPLETE[0]):
            self._records.extend(table, by_table[table])
        self._records.sync()
        if any(other > epoch for other in self.done):  # a checkpoint that came later than its successors
            self._rewrite(self.done | {epoch})
        self._files[str(epoch)] = digest

    def _compare(self) -> None:
        path = self._run.settings
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            before, files = stored["measured"], stored["checkpoints"]
            assert isinstance(before, dict)
            assert isinstance(files, dict)
            self._files = {str(int(epoch)): str(digest) for epoch, digest in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
            raise RecordError(f"{path}: not the settings of measured checkpoints; {_ANOTHER}") from error
        now = json.loads(json.dumps(self._settings))
        if before != now:
            raise RecordError(f"{self._run.path}: holds measurements with {changes(before, now)}; {_ANOTHER}")

    def _keep_complete(self) -> None:
        """Drop the rows of epochs that are not complete, and half-written lines."""
        table, column, value = COMPLETE
        rows = parse_lines(self._records.path(table), warn=False)
        complete = {row["epoch"] for row in rows if row.get(column) == value}
        self._files = {epoch: digest for epoch, digest in self._files.items() if int(epoch) in complete}
        self._rewrite(self.done)

    def _rewrite(self, epochs: frozenset[int]) -> None:
        """All tables with the rows of these epochs, in their order."""
        for name in TABLES:
            path = self._records.path(name)
            if path.is_file() and name not in _OF_THE_RUN:
                rows = [row for row in parse_lines(path, warn=False) if row["epoch"] in epochs]
                rows.sort(key=lambda row: int(row["epoch"]))
                self._records.replace(name, rows)

    def _store(self, files: Mapping[str, str]) -> None:
        content = {"measured": self._settings, "checkpoints": files}
        try:
            replace_file(self._run.settings, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise RecordError(
                f"{self._run.settings}: cannot write ({error.strerror}); choose another output=DIR"
            ) from error
