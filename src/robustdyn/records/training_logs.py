"""Reads training logs of other programs: those of two public studies' scripts, and tables of epochs as CSV.

The scripts of the robust-overfitting study (Rice et al., ICML 2020) write a line with their arguments, a line
with the names of twelve columns, and a line per epoch; those of the AWP study (Wu et al., NeurIPS 2020) came
from them and write the same. Everything is read as text and numbers, and nothing is evaluated.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustdyn.errors import RecordError
from robustdyn.records.lines import LAST_EPOCH, warn_once
from robustdyn.records.schema import EPOCHS, TEST_ROBUST_ERROR

ROBUST_OVERFITTING, AWP = "robust_overfitting", "awp"
"""The studies whose scripts' logs are read; what their arguments leave out is known."""
LOG_NAME = "output.log"
"""What the scripts call a log. Its folder names the run."""

SPLITS, INPUTS = ("train", "test", "validation"), ("clean", "robust")
HEADINGS = {"Epoch": "epoch", "Train Time": "train_seconds", "Test Time": "test_seconds", "LR": "lr"} | {
    f"{split.title()}{shown} {short}": f"{split}_{inputs}_{metric}"
    for split in SPLITS[:2]
    for inputs, shown in (("clean", ""), ("robust", " Robust"))
    for short, metric in (("Loss", "loss"), ("Acc", "accuracy"))
}
"""The columns of a log, in order, and what a table of epochs calls them."""
_VALIDATION = [f"validation_{inputs}_{metric}" for inputs in INPUTS for metric in ("loss", "accuracy")]
TABLE_COLUMNS = (
    *("epoch", "run", "study", "train_seconds", "test_seconds", "lr"),
    *(f"{s}_{i}_{metric}" for s in SPLITS for i in INPUTS for metric in ("loss", "accuracy", "error")),
)
"""The columns that a table of epochs may have, in any order."""
ARGUMENTS = (
    *("run", "study", "data", "model", "width_factor", "seed", "epochs", "epochs_logged", "batch_size"),
    *("attack", "norm", "epsilon", "attack_iters", "pgd_alpha", "fgsm_alpha", "attack_iters_test"),
    *("lr_max", "lr_schedule", "lr_one_drop", "lr_drop_epoch", "weight_decay", "l1", "l2"),
    *("cutout_len", "mixup_alpha", "awp_gamma", "awp_size", "awp_warmup"),
)
"""The columns that a table of runs may have: the names of the scripts' arguments, and a few more."""

LONGEST_LINE = 1 << 16  # characters; the scripts' lines have a few hundred
LONGEST_SAID = 200  # characters of a message that come from a file

_LINE = re.compile(r"\[[^\]]*\] - (.*)")
_ARGUMENT = re.compile(r"\b(\w{1,60})=('[^']*'|\"[^\"]*\"|\[[^\]]*\]|[^,()]*)")


@dataclass(frozen=True)
class LoggedRun:
    """A training run as a log or a table of epochs holds it.

    Attributes:
        name: Names its directory: one folder or several, with slashes between them.
        study: Where it comes from.
        file: What was read.
        kind: What that is.
        epochs: Rows of the table ``epochs``, by epoch: losses in nats, errors as fractions.
        arguments: The settings as text, by the names of ``ARGUMENTS``; none that was left blank.
        arguments_at: File and line of the settings, for messages.
    """

    name: str
    study: str
    file: Path
    kind: str
    epochs: tuple[Mapping[str, float | None], ...]
    arguments: Mapping[str, str]
    arguments_at: str


def read_logs(
    paths: Sequence[Path], runs_file: Path | None = None, study: str | None = None
) -> list[LoggedRun]:
    """The runs in training logs, in folders of them, and in tables of epochs.

    Args:
        paths: Files, or folders that are searched for files called ``output.log``.
        runs_file: CSV with the settings of the runs in tables of epochs.
        study: Where the runs come from; None to take what the log's format or the table says.

    Raises:
        RecordError: A file cannot be read or parsed; the message names file, line and expected columns.
    """
    settings = _table_of_runs(runs_file) if runs_file is not None else {}
    found: list[LoggedRun] = []
    tables = False
    for path in paths:
        if path.is_dir():
            logs = sorted(path.rglob(LOG_NAME))
            if not logs:
                raise RecordError(f"{path}: no {LOG_NAME} in it; give training logs or tables of epochs")
            found += [_log(log, _below(log, path), study) for log in logs]
        elif any(_LINE.match(line) for _, line in _lines(path)):
            found.append(_log(path, path.parent.name if path.name == LOG_NAME else path.stem, study))
        else:
            tables = True
            found += _table(path, settings, runs_file, study)
    if runs_file is not None and not tables:
        raise RecordError(
            f"{runs_file}: is for tables of epochs, and logs have their own settings; leave it out"
        )
    return found


def _below(log: Path, folder: Path) -> str:
    parent = log.parent
    return parent.name if parent == folder else parent.relative_to(folder).as_posix()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers.

    Raises:
        RecordError: It cannot be read, is no text, or a line is too long.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if len(line) > LONGEST_LINE:
                    raise RecordError(
                        f"{path}, line {number}: is longer than {LONGEST_LINE} characters; shorten it"
                    )
                if line.strip():
                    yield number, line
    except RecordError:
        raise
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not a text file; give a training log or a CSV table") from error
    except OSError as error:
        raise RecordError(
            f"{path}: cannot read ({error.strerror}); give a training log or a table"
        ) from error


# ---------------------------------------------------------------------- logs


def _log(path: Path, name: str, study: str | None) -> LoggedRun:
    """The run in a log.

    A script that was started again, or resumed, logs some epochs again: from there on the later start counts,
    with its settings.
    """
    rows: dict[int, Mapping[str, float | None]] = {}
    cells: dict[str, str] = {}
    given: tuple[dict[str, str], str] = ({}, str(path))
    arguments, begun, number = given, False, 1
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        message = _LINE.match(line)
        text = message[1].strip() if message else ""
        if text.startswith("Namespace("):
            given = (_arguments(text), where)
        elif text.startswith("Epoch"):
            headings = [heading.strip() for heading in text.split("\t") if heading.strip()]
            if headings != list(HEADINGS):
                raise _unexpected(where, f"has the columns {', '.join(headings)}", HEADINGS)
            begun = True
        elif text.startswith("validation ") and cells:
            values = text.split()[1:]
            if len(values) != len(_VALIDATION):
                raise _unexpected(where, f"has {len(values)} values", _VALIDATION)
            row = _row(cells | dict(zip(_VALIDATION, values, strict=True)), where, HEADINGS)
            rows[int(row["epoch"] or 0)] = row
        elif text[:1].isdigit():
            if not line.endswith("\n"):
                warn_once(f"{where}: last line left out, which may be cut off")
                continue
            values = text.split()
            if not begun or len(values) != len(HEADINGS):
                said = (
                    f"has {len(values)} values" if begun else "is an epoch without the names of its columns"
                )
                raise _unexpected(where, said, HEADINGS)
            cells = dict(zip(HEADINGS.values(), values, strict=True))
            row, arguments = _row(cells, where, HEADINGS), given
            now = int(row["epoch"] or 0)
            rows = {epoch: old for epoch, old in rows.items() if epoch < now} | {now: row}
    if not rows:
        raise _unexpected(f"{path}, line {number}", "ends the log before an epoch", HEADINGS)
    own = AWP if any(key.startswith("awp_") for key in arguments[0]) else ROBUST_OVERFITTING
    return LoggedRun(
        name=name,
        study=study or own,
        file=path,
        kind="training log",
        epochs=tuple(rows[epoch] for epoch in sorted(rows)),
        arguments=arguments[0],
        arguments_at=arguments[1],
    )


def _arguments(text: str) -> dict[str, str]:
    """``{"norm": "l_inf", "lr_max": "0.1"}`` of ``Namespace(norm='l_inf', lr_max=0.1, cutout_len=None)``."""
    given = {key: value.strip("'\" ") for key, value in _ARGUMENT.findall(text)}
    for switch, strength in (("cutout", "cutout_len"), ("mixup", "mixup_alpha")):
        if given.get(switch) == "False":
            given.pop(strength, None)
    return {key: value for key, value in given.items() if value not in ("", "None")}


# ---------------------------------------------------------------------- tables


def _table(
    path: Path,
    settings: Mapping[tuple[str, str], tuple[Mapping[str, str], str]],
    runs_file: Path | None,
    study: str | None,
) -> list[LoggedRun]:
    """The runs in a table of epochs, in the order in which they come."""
    rows: dict[tuple[str, str], dict[int, Mapping[str, float | None]]] = {}
    for where, cells in _records(path, TABLE_COLUMNS):
        if "epoch" not in cells or not {TEST_ROBUST_ERROR, "test_robust_accuracy"} & set(cells):
            raise _unexpected(where, f"lacks epoch or {TEST_ROBUST_ERROR} (or _accuracy)", TABLE_COLUMNS)
        own = rows.setdefault((cells.get("study", ""), cells.get("run") or path.stem), {})
        row = _row(cells, where, TABLE_COLUMNS)
        if own.setdefault(int(row["epoch"] or 0), row) is not row:
            raise RecordError(
                f"{where}: epoch {cells['epoch']} of the run is there twice; remove one of them"
            )
    if not rows:
        raise _unexpected(f"{path}, line 1", "is not followed by an epoch", TABLE_COLUMNS)
    found = []
    for (source, name), own in rows.items():
        place = next((key for key in ((source, name), ("", name)) if key in settings), None)
        if runs_file is not None and place is None:
            raise RecordError(f"{runs_file}: no run {name}, which {path} has; add a line for it")
        arguments, arguments_at = ({}, str(path)) if place is None else settings[place]
        logged = arguments.get("epochs_logged", str(len(own)))
        if logged != str(len(own)):
            raise RecordError(
                f"{arguments_at}: epochs_logged={logged}, but {path} has {len(own)} epochs of {name}; "
                "correct one of them"
            )
        epochs = tuple(own[epoch] for epoch in sorted(own))
        of = study or source or path.stem
        found.append(LoggedRun(name, of, path, "table of epochs", epochs, arguments, arguments_at))
    return found


def _table_of_runs(path: Path) -> dict[tuple[str, str], tuple[Mapping[str, str], str]]:
    """By study and run, its settings and where they stand."""
    found: dict[tuple[str, str], tuple[Mapping[str, str], str]] = {}
    for where, cells in _records(path, ARGUMENTS):
        place = cells.get("study", ""), cells.get("run", "")
        if not place[1] or place in found:
            raise _unexpected(where, "names a run a second time" if place[1] else "names no run", ARGUMENTS)
        found[place] = ({key: value for key, value in cells.items() if value not in ("", "None")}, where)
    return found


def _records(path: Path, known: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each line of a CSV after the first, with its place, by the names of the first."""
    numbers: list[int] = []

    def texts() -> Iterator[str]:
        for number, line in _lines(path):
            numbers.append(number)
            yield line

    names: list[str] | None = None
    try:
        for values in csv.reader(texts(), strict=True):
            where = f"{path}, line {numbers[-1]}"
            if names is None:
                names = [name.strip() for name in values]
                foreign = [name for name in names if name not in known]
                if foreign or len(set(names)) < len(names):
                    raise _unexpected(where, f"has the columns {', '.join(foreign or names)}", known)
                continue
            if len(values) != len(names):
                raise _unexpected(where, f"has {len(values)} values for {len(names)} columns", known)
            yield where, {name: value.strip() for name, value in zip(names, values, strict=True)}
    except csv.Error as error:
        raise _unexpected(f"{path}, line {numbers[-1]}", f"is no CSV ({error})", known) from error
    if names is None:
        raise _unexpected(f"{path}, line 1", "is not there: the file is empty", known)


# ---------------------------------------------------------------------- one epoch


def _row(
    cells: Mapping[str, str], where: str, expected: Mapping[str, str] | Sequence[str]
) -> dict[str, float | None]:
    """A row of the table ``epochs``. What is blank or not finite is null."""

    def number(name: str) -> float | None:
        text = cells.get(name, "")
        try:
            value = float(text) if text else math.nan
        except ValueError:
            raise _unexpected(f"{where}:", f"{name}={text[:40]!r} is not a number", expected) from None
        return value if math.isfinite(value) else None

    def error(name: str) -> float | None:
        kinds = [kind for kind in ("accuracy", "error") if cells.get(f"{name}_{kind}")]
        if len(kinds) == 2:
            raise RecordError(f"{where}: has both {name}_accuracy and {name}_error; give one of them")
        value = number(f"{name}_{kinds[0]}") if kinds else None
        if value is not None and not 0 <= value <= 1:
            raise RecordError(f"{where}: {name}_{kinds[0]}={value:g}; give it as a fraction from 0 to 1")
        # rounded because 1 - 0.5349 is 0.46509999999999996; no source has twelve digits
        return value if value is None or kinds == ["error"] else round(1 - value, 12)

    epoch = number("epoch")
    if epoch is None or epoch != int(epoch) or not 0 <= epoch <= LAST_EPOCH:
        raise _unexpected(
            f"{where}:", f"epoch={cells['epoch'][:40]!r} is not a whole number from 0", expected
        )
    row: dict[str, float | None] = dict.fromkeys(EPOCHS.required)
    row |= {"epoch": int(epoch), "lr": number("lr")}
    for name in (f"{split}_{inputs}" for split in SPLITS for inputs in INPUTS):
        loss, share = number(f"{name}_loss"), error(name)
        if not name.startswith("validation") or (loss, share) != (None, None):
            row |= {f"{name}_loss": loss, f"{name}_error": share}
    times = [value for value in map(number, ("train_seconds", "test_seconds")) if value is not None]
    row["seconds"] = sum(times) if times else None
    return with_gaps(row)


def with_gaps(row: Mapping[str, float | None]) -> dict[str, float | None]:
    """The row with its robust gaps, test − train; null where one of the two is not known."""
    gaps: dict[str, float | None] = {}
    for metric in ("loss", "error"):
        test, train = row[f"test_robust_{metric}"], row[f"train_robust_{metric}"]
        gaps[f"robust_{metric}_gap"] = None if test is None or train is None else round(test - train, 12)
    return {**row, **gaps}


def _unexpected(where: str, said: str, expected: Mapping[str, str] | Sequence[str]) -> RecordError:
    shown = " ".join(said.split())[:LONGEST_SAID]
    return RecordError(f"{where} {shown}; expected the columns {', '.join(expected)}")
