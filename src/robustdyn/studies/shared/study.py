"""A study: runs in; the tables, figures and findings that answer its question out.

Each module of ``robustdyn.studies`` is one study and has a ``STUDY``. A figure is drawn from one
tidy table, which is written beside it, and from nothing else.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from robustdyn import studies
from robustdyn.errors import RecordError
from robustdyn.records.reader import Run, find_runs
from robustdyn.report import style
from robustdyn.studies.shared.wording import seeds_said

FINDINGS = "findings.md"
SHORT = 40  # rows of a table that findings show in full
ASSUMED = (
    "Student's intervals take the values of different seeds for independent draws from one normal "
    "distribution. If a quantity is skewed over seeds or falls into two groups, they cover it in 70 to "
    "90 % of cases only."
)
_STUDENT = " with Student's 95 % interval"


@dataclass(frozen=True)
class Picture:
    """A figure and the tidy table it is drawn from.

    Attributes:
        name: File name without ending.
        data: One row per drawn number.
        draw: Draws the table.
    """

    name: str
    data: pd.DataFrame
    draw: Callable[[pd.DataFrame], Figure]


@dataclass(frozen=True)
class Answer:
    """What a study found.

    Attributes:
        tables: File name without ending -> table.
        pictures: The figures.
        findings: The answer in at most three sentences; all numbers are in the tables.
    """

    tables: Mapping[str, pd.DataFrame]
    pictures: Sequence[Picture]
    findings: Sequence[str]


@dataclass(frozen=True)
class Study:
    """A question to runs.

    Attributes:
        question: What it answers, one sentence.
        answer: Answers it from runs; raises RecordError where they lack what it needs, saying what.
    """

    question: str
    answer: Callable[[Sequence[Run]], Answer]


@dataclass(frozen=True)
class Written:
    """The files of an answered study."""

    tables: tuple[Path, ...]
    figures: tuple[Path, ...]
    findings: Path


def load(name: str) -> Study:
    """The study of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in studies.names():
        raise ValueError(f"no study {name}; there are {', '.join(studies.names())}")
    study = importlib.import_module(f"{studies.__name__}.{name}").STUDY
    assert isinstance(study, Study)
    return study


def conduct(
    name: str,
    paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> Written:
    """Answer a study from runs and write the answer; see ``write_answer``.

    Args:
        name: Of the study.
        paths: Run or sweep directories.
        output: Where to.

    Raises:
        RecordError: No run is found, the runs lack what the study needs, or ``output`` cannot be written.
        ValueError: There is no such study.
    """
    study = load(name)
    return write_answer(study.question, study.answer(find_runs(paths)), Path(output))


def write_answer(question: str, answer: Answer, output: Path) -> Written:
    """Write ``tables/``, ``figures/`` and ``findings.md`` under ``output``.

    The directory is made if absent, files of the same names are replaced. Findings are the question, the
    answer, the tables (short ones in full, long ones by file name) and the figures.

    Raises:
        RecordError: ``output`` cannot be written.
    """
    tables, figures = output / "tables", output / "figures"
    try:
        for folder in (tables, figures):
            folder.mkdir(parents=True, exist_ok=True)
        written = []
        for stem, table in answer.tables.items():
            written.append(tables / f"{stem}.csv")
            table.to_csv(written[-1], index=False)
        drawn: list[Path] = []
        for picture in answer.pictures:
            drawn += style.save(picture.draw(picture.data), figures / picture.name)
            drawn.append(figures / f"{picture.name}.csv")
            picture.data.to_csv(drawn[-1], index=False)
        findings = output / FINDINGS
        names = [picture.name for picture in answer.pictures]
        findings.write_text(findings_page(question, answer.findings, answer.tables, names), encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{output}: cannot write ({error.strerror}); pick another --output") from error
    return Written(tuple(written), tuple(drawn), findings)


def findings_page(
    question: str, findings: Sequence[str], tables: Mapping[str, pd.DataFrame], pictures: Sequence[str]
) -> str:
    """The Markdown of ``findings.md``: question, answer, tables, figures."""
    lines = [question, "", " ".join(findings)]
    for stem, table in tables.items():
        lines += ["", f"`tables/{stem}.csv`, {len(table)} rows{_averaged(table)}", *_markdown(table)]
    if any(_STUDENT in _averaged(table) for table in tables.values()):
        lines += ["", ASSUMED]
    if pictures:
        lines += ["", *(f"![{name}](figures/{name}.png)" for name in pictures)]
    return "\n".join(lines) + "\n"


def _averaged(table: pd.DataFrame) -> str:
    """What the rows of a table of means are, for its caption."""
    if table.empty or not {"mean", "low", "high", "seeds"} <= set(table):
        return ""
    interval = _STUDENT if table["seeds"].max() > 1 else ""
    return f": means over {seeds_said(table)}{interval}"


def _markdown(table: pd.DataFrame) -> list[str]:
    """The lines of a short table, numbers with four digits; nothing for a long one."""
    if not 0 < len(table) <= SHORT:
        return []
    rows: list[Iterable[object]] = [table.columns, ["---"] * len(table.columns)]
    rows += table.itertuples(index=False, name=None)
    return ["", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    return "" if value is None or value is pd.NA else str(value)
