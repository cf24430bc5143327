"""Publishes a run's records through its loggers.

What loggers show is read back from ``records/`` while the run writes it. A curve on a screen therefore never
differs from the table in the run directory, and a resumed run can send a logger every row that it lacks.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from robustdyn.records import TABLES, RunRecords, read_table
from robustdyn.records.lines import decode
from robustdyn.records.points import points

WHOLE = ("posterior",)
"""Tables that are written as a whole when a run ends."""

_log = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Moment:
    """What was recorded at one step.

    Attributes:
        step: The number of optimiser steps taken.
        rows: The table and the row of each record.
    """

    step: int
    rows: Sequence[tuple[str, Row]]

    @property
    def epoch(self) -> int:
        """The epoch of the step."""
        return max(int(row["epoch"]) for _, row in self.rows)

    def curves(self) -> dict[str, int | float]:
        """All its numbers as points of curves; see ``points``."""
        return {name: value for table, row in self.rows for name, value in points(table, row).items()}


class RecordFeed:
    """Reads a run's records while they grow.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._records = RunRecords(run_dir)
        self._read = dict.fromkeys((name for name in TABLES if name not in WHOLE), 0)  # bytes of each file

    def moments(self) -> list[Moment]:
        """Return what was recorded since the last call, in the order of the steps."""
        by_step: dict[int, list[tuple[str, Row]]] = {}
        for table in self._read:
            for row in self._new_rows(table):
                step = row.get("step")
                if isinstance(step, int):
                    # a rate is recorded with the steps before it, and known when its step has been taken
                    by_step.setdefault(step + (table == "rates"), []).append((table, row))
        return [Moment(step, rows) for step, rows in sorted(by_step.items())]

    def whole(self) -> Iterator[Moment]:
        """Yield the tables that are written as a whole, moment by moment."""
        for table in WHOLE:
            frame = read_table(self.run_dir, table)
            for step, rows in frame.groupby("step", sort=True):
                yield Moment(int(str(step)), [(table, _plain(row)) for row in rows.to_dict("records")])

    def _new_rows(self, table: str) -> Iterator[Row]:
        path = self._records.path(table)
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._read[table])
            for line in file:
                if not line.endswith(b"\n"):
                    break  # an incomplete row, which the next call reads
                self._read[table] += len(line)
                row = decode(line)
                if row is not None:
                    yield row


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the row without its null values."""
    return {str(key): value for key, value in row.items() if value == value and value is not None}


class CurveLogger:
    """Sends a run's records to a logger of Lightning, as curves.

    When a run resumes, the logger's files are written again from the first row.

    Args:
        logger: The logger.

    Attributes:
        shows_figures: Whether it wants the report's figures.
        complete: Whether an earlier session had the whole run.
    """

    shows_figures = False
    complete = False  # Lightning opens the logger, which may empty its files

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._feed: RecordFeed | None = None

    def follow(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Start with the configuration and all rows recorded so far."""
        if isinstance(self._logger, TensorBoardLogger):  # it would show an interrupted run's rows twice
            for file in Path(self._logger.log_dir).glob("events.out.tfevents.*"):
                file.unlink()
        self._feed = RecordFeed(run_dir)
        self._logger.log_hyperparams(dict(config))
        self.update()

    def update(self) -> None:
        """Send the rows recorded since the last call."""
        if self._feed is not None:
            self._take(self._feed.moments())

    def conclude(self) -> None:
        """Send the tables that are written as a whole when training has ended."""
        if self._feed is not None:
            self._take(self._feed.whole())

    def show(self, figures: Mapping[str, Path]) -> None:
        """Send the report's figures, PNG files by name; a logger of curves shows none."""

    def finish(self, *, failed: bool) -> None:
        """Close the logger, so that the next run of a sweep starts its own."""
        self._logger.finalize("failed" if failed else "success")

    def recover(self, error: Exception) -> bool:
        """Report an error in one line, and return whether to start again with ``follow``."""
        _log.warning("a logger stopped (%s); training and its records continue without it", brief(error))
        return False

    def _take(self, moments: Iterable[Moment]) -> None:
        for moment in moments:
            self._logger.log_metrics({"epoch": moment.epoch, **moment.curves()}, step=moment.step)
        self._logger.save()


class Publisher(Callback):
    """Keeps the loggers up to date with the record, on the first rank.

    Place it behind every callback that writes records. A logger that fails starts again if it can, and the
    run continues without it otherwise. One line on the terminal says which. A logger never ends a run.

    As a context manager it closes the loggers at the end of the block, as failed after an exception.

    Args:
        loggers: The loggers of the trainer.
        run_dir: The run directory.
        config: The whole configuration.
    """

    def __init__(self, loggers: Sequence[Logger], run_dir: Path, config: Mapping[str, Any]) -> None:
        self._active: list[CurveLogger] = [
            logger if isinstance(logger, CurveLogger) else CurveLogger(logger) for logger in loggers
        ]
        self._run_dir = run_dir
        self._config = config
        self._first_rank = False
        self._begun = False
        self._pictures: dict[str, Path] = {}
        self._actions: list[Callable[[CurveLogger], None]] = []

    @property
    def shows_figures(self) -> bool:
        """Whether any logger wants the report's figures."""
        return any(logger.shows_figures for logger in self._active)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Note whether this is the first rank."""
        self._first_rank = trainer.is_global_zero

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the loggers; by now the records end where the checkpoint does."""
        if self._first_rank:
            self._begin()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Publish the epoch."""
        if self._first_rank:
            self._each(lambda logger: logger.update())

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Publish what was written at the end of training."""
        if self._first_rank:
            self._each(lambda logger: logger.update())
            self._each(lambda logger: logger.conclude())

    def show(self, figures: Sequence[Path]) -> None:
        """Publish the PNG files among a report's figures at the end of the block."""
        self._pictures = {file.stem: file for file in figures if file.suffix == ".png"}

    def __enter__(self) -> Self:
        """Do nothing yet: the loggers start with the training."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the rest and close the loggers; complete what an earlier, killed process left open."""
        failed = kind is not None
        if self._first_rank:
            if not self._begun and not failed:  # training had ended before
                self._active = [logger for logger in self._active if not logger.complete]
                self._begin()
                self._each(lambda logger: logger.conclude())
            self._each(lambda logger: logger.update())
            self._each(lambda logger: logger.show(self._pictures))
            self._each(lambda logger: logger.finish(failed=failed))

    def _begin(self) -> None:
        self._begun = True
        self._each(lambda logger: logger.follow(self._run_dir, self._config))

    def _each(self, action: Callable[[CurveLogger], None]) -> None:
        self._actions.append(action)
        for logger in list(self._active):
            self._perform([action], logger)

    def _perform(self, actions: Sequence[Callable[[CurveLogger], None]], logger: CurveLogger) -> None:
        try:
            for action in actions:
                action(logger)
        except Exception as error:
            with suppress(Exception):
                logger.finish(failed=True)
            if logger.recover(error):
                self._perform(list(self._actions), logger)
            else:
                self._active.remove(logger)


def brief(error: BaseException) -> str:
    """Return the first line of an error's message, at most about 200 characters."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 200 else f"{text[:200]}..."
