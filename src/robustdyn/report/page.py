"""Runs in, tables, figures and one self-contained HTML page out."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
from markupsafe import Markup, escape
from omegaconf import OmegaConf
from pyarrow import csv
from pyarrow import parquet as pq

import robustdyn
from robustdyn.errors import RecordError
from robustdyn.records import schema
from robustdyn.records.command_line import command
from robustdyn.records.labels import differences, format_value
from robustdyn.records.progress import RunState, run_states
from robustdyn.records.reader import Run, combine_tables, find_runs, label_runs, natural
from robustdyn.records.waiting import with_bar
from robustdyn.report import style
from robustdyn.report.describe import joined, provenance, what_was_run
from robustdyn.report.figures import FIGURES, FigureSpec
from robustdyn.report.overview import Overview, curves, overview
from robustdyn.report.page_tables import TIMES, Evaluations, evaluations, last_measures, times
from robustdyn.report.reference import COMPARISON, Against, Reference
from robustdyn.report.shown import MOST_SETTINGS, shown_in_figures
from robustdyn.report.statistics import (
    SHOWN_METRICS,
    Headline,
    final_and_best,
    format_metric,
    headlines,
)

PAGE = "index.html"
SCRIPT = "report.js"
FINAL_AND_BEST = "final_and_best"
EVALUATION = "evaluation"


@dataclass(frozen=True)
class Report:
    """What a report wrote.

    Attributes:
        html: The page.
        tables: The table files.
        figures: The figure files.
        skipped: Figure -> why there is none.
        headline: The three numbers that matter, one line each.
    """

    html: Path
    tables: tuple[Path, ...]
    figures: tuple[Path, ...]
    skipped: Mapping[str, str]
    headline: tuple[str, ...]


@dataclass(frozen=True)
class _Drawn:
    """A figure and its files."""

    spec: FigureSpec
    files: tuple[Path, ...]

    @property
    def data_uri(self) -> str:
        """The picture itself, for an ``src`` that needs no file."""
        png = next(file for file in self.files if file.suffix == ".png")
        return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode("ascii")


@dataclass(frozen=True)
class _Row:
    """A row of the final/best table as text."""

    label: str
    span: int
    selection: str
    cells: tuple[str, ...]
    mean: bool


def build_report(
    paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    states: Sequence[RunState] | None = None,
    reference: Reference | None = None,
    processes: int = 1,
) -> Report:
    """Read runs and write ``tables/``, ``figures/`` and ``index.html`` under ``output``.

    Args:
        paths: Run or sweep directories.
        output: Where to; made if absent, files of an earlier report are replaced.
        states: Where the runs at these paths stand; found out if not given. Only the caller can know runs
            that were asked for and never started.
        reference: Published curves to hold the runs against.
        processes: How many processes draw the figures.

    Returns:
        What was written.

    Raises:
        RecordError: No run is found, none has finished an epoch, a record is broken, or ``output`` cannot be
            written.
    """
    given = [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]
    runs, output = _stated(states or ()) or find_runs(given), Path(output)
    frames = combine_tables(runs, schema.TABLES)
    if frames["epochs"].empty:
        raise RecordError(
            f"{runs[0].path}: no run has finished an epoch; train first, or wait for the first epoch"
        )
    summary, page = final_and_best(runs, frames["epochs"]), output / PAGE
    shown = overview(runs, run_states(runs) if states is None else states, frames, summary, page, given)
    evaluated, told = evaluations(runs, page), headlines(shown.counted, frames)
    against = None if reference is None else Against.of(reference, runs, frames["epochs"])
    try:
        tables = _write_tables(
            {
                **frames,
                FINAL_AND_BEST: summary,
                EVALUATION: evaluated.table,
                COMPARISON.name: pd.DataFrame() if against is None else against.table,
            },
            output / "tables",
        )
        counted = summary[summary["run"].isin([run.label for run in shown.counted])]
        drawn, part = shown_in_figures(frames, counted)
        figures, skipped = _write_figures(drawn, part, output / "figures", reference, processes)
        text = _page(runs, frames, summary, part, figures, skipped, shown, told, evaluated, against)
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(
            f"{output}: cannot write the report ({error.strerror}); free space, or write it elsewhere: "
            f"{command('robustdyn-report', *(str(path.absolute()) for path in given))} --output DIR"
        ) from error
    return Report(
        html=page,
        tables=tuple(tables),
        figures=tuple(file for drawn in figures for file in drawn.files),
        skipped=skipped,
        headline=(*map(str, told), *(() if against is None else against.headline)),
    )


def _stated(states: Sequence[RunState]) -> list[Run]:
    """The runs of the states, each once, in natural order of their paths."""
    found = {state.run.path.resolve(): state.run for state in states if state.run is not None}
    return label_runs([found[path] for path in sorted(found, key=natural)])


def _write_tables(frames: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Each table that has rows as Parquet and CSV, without columns that were never recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, frame in frames.items():
        files = [folder / f"{name}.parquet", folder / f"{name}.csv"]
        if frame.empty:
            for file in files:
                file.unlink(missing_ok=True)  # of an earlier report
            continue
        kept = frame.drop(columns=[c for c in _optional(name) if c in frame and frame[c].isna().all()])
        table = pa.Table.from_pandas(kept, preserve_index=False)
        pq.write_table(table, files[0])
        csv.write_csv(table, files[1])
        written += files
    return written


def _optional(table: str) -> list[str]:
    if table not in schema.TABLES:
        return []
    return [column.name for column in schema.TABLES[table].columns if not column.required]


def _write_figures(
    frames: Mapping[str, pd.DataFrame],
    part: str,
    folder: Path,
    reference: Reference | None,
    processes: int,
) -> tuple[list[_Drawn], dict[str, str]]:
    """Every figure whose data are there; the others with the reason. ``part`` says of which settings."""
    folder = folder.absolute()  # the processes that draw may have started in another directory
    folder.mkdir(parents=True, exist_ok=True)
    missing = {spec.name: spec.missing(frames) for spec in FIGURES}
    wanted = [spec for spec in FIGURES if missing[spec.name] is None]
    tasks = [
        joblib.delayed(_draw)(
            spec, {name: frames[name] for name in (spec.table, "epochs")}, part, folder, reference
        )
        for spec in wanted
    ]
    try:
        results = dict(zip(wanted, _done(tasks, processes), strict=True))
    except BrokenProcessPool:  # the system ended a process, probably for its memory
        results = dict(zip(wanted, _done(tasks, 1), strict=True))
    drawn, skipped = [], {}
    for spec in FIGURES:
        found = results.get(spec, missing[spec.name])
        if isinstance(found, _Drawn):
            drawn.append(found)
        else:
            skipped[spec.name] = f"{found}, for {part}" if part and spec not in results else str(found)
            for ending in (".png", ".pdf"):
                (folder / f"{spec.name}{ending}").unlink(missing_ok=True)
    return drawn, skipped


def _done(tasks: Sequence[Any], processes: int) -> list[_Drawn | str]:
    """What the tasks return, in their order. With one process they run in this one."""
    workers = joblib.Parallel(max(1, min(processes, len(tasks))), return_as="generator", max_nbytes=None)
    return list(with_bar(workers(tasks), "drawing figures", len(tasks)))


def _draw(
    spec: FigureSpec,
    frames: Mapping[str, pd.DataFrame],
    part: str,
    folder: Path,
    reference: Reference | None,
) -> _Drawn | str:
    """A figure and its files, or why it cannot be drawn."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return _Drawn(spec, tuple(style.save(spec.draw(frames, reference, part), folder / spec.name)))
    except (ValueError, ArithmeticError) as error:  # numbers that no axis can show, 1e308 say
        return f"cannot be drawn from these numbers ({' '.join(str(error).split())})"


def _page(
    runs: Sequence[Run],
    frames: Mapping[str, pd.DataFrame],
    summary: pd.DataFrame,
    part: str,
    figures: Sequence[_Drawn],
    skipped: Mapping[str, str],
    shown: Overview,
    told: Sequence[Headline],
    evaluated: Evaluations,
    against: Against | None,
) -> str:
    """The HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robustdyn.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["symbols"] = _symbols
    environment.filters["shell"] = lambda words: command(*words)
    assert environment.loader is not None
    script = environment.loader.get_source(environment, SCRIPT)[0]
    titles = {spec.name: spec.title for spec in FIGURES}
    heads, differing = _differing(runs)
    measured, measures = last_measures(runs, frames["measures"])
    return environment.get_template("report.html.j2").render(
        title=_title(runs),
        version=robustdyn.__version__,
        what=what_was_run(runs),
        headlines=[_card(line) for line in told],
        columns=[schema.EPOCHS[name].shown for name in SHOWN_METRICS],
        rows=_final_rows(summary, {run.label for run in shown.counted}),
        shown=shown,
        counted=", ".join(f"{n} {state}" for state, n in shown.counts.items()),
        curves=curves(shown, frames, None if against is None else against.reference),
        script=Markup(script),
        script_hash=_hash(script),
        evaluated=evaluated,
        against=against,
        measured=measured,
        measures=measures,
        timed=times(runs, frames["timing"]),
        times=TIMES,
        part=part,
        figures=figures,
        skipped=[(titles[name], reason) for name, reason in skipped.items()],
        runs=runs,
        heads=heads,
        differing=differing,
        configs=[_yaml(run.config) for run in runs[: None if len(runs) <= MOST_SETTINGS else 1]],
        provenance=provenance(runs),
        tables=[schema.TABLES[name] for name, frame in frames.items() if not frame.empty]
        + ([] if evaluated.table.empty else [schema.EVALUATION])
        + ([] if against is None or against.table.empty else [COMPARISON]),
    )


def _differing(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Settings that differ, with a column for each run; of many runs with one for all distinct values."""
    rows = [(key, [format_value(value) for value in values]) for key, values in differences(runs).items()]
    if len(runs) <= MOST_SETTINGS:
        return [run.label for run in runs], rows
    return ["values"], [(key, [joined(values, ", ")]) for key, values in rows]


def _hash(script: str) -> str:
    """What the page's policy knows its script by: no other one runs on it, whatever a name or error holds."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _title(runs: Sequence[Run]) -> str:
    name = runs[0].config.get("name", runs[0].config.get("experiment_name"))
    given = {run.config.get("name", run.config.get("experiment_name")) for run in runs}
    told = len(given) == 1 and isinstance(name, str) and "${" not in name
    subject = name if told else runs[0].path.resolve().name if len(runs) == 1 else f"{len(runs)} runs"
    return f"robustdyn report: {subject}"


def _card(line: Headline) -> dict[str, object]:
    """A headline for the page: its name and a row of texts per group."""
    changes, which = line.told(MOST_SETTINGS)
    rows = [
        {
            "group": change.group if len(changes) > 1 else "",
            "runs": len(change.pairs),
            "change": change.short(),
            "range": " → ".join((change.spread(False), change.spread(True))) if len(change.pairs) > 1 else "",
            "epochs": " → ".join((change.epochs(False), change.epochs(True))),
        }
        for change in changes
    ]
    sizes = {len(change.pairs) for change in changes}
    seeds = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}" if sizes else ""
    return {
        "name": line.name,
        "start": line.start,
        "rows": rows,
        "which": which,
        "seeds": "" if sizes <= {1} else seeds,
        "missing": line.missing,
    }


def _final_rows(summary: pd.DataFrame, counted: Set[str]) -> list[_Row]:
    """Rows of the final/best table: each run's selections, then means over those ``counted`` of a group."""
    rows = []
    for group, of_group in summary.groupby("group", sort=False):
        parts = [(str(run), own, False) for run, own in of_group.groupby("run", sort=False)]
        of_group = of_group[of_group["run"].isin(counted)]
        n = of_group["run"].nunique()
        if n > 1:
            means = of_group.groupby("selection", sort=False)[list(SHOWN_METRICS)].mean().reset_index()
            label = f"mean of {n} seeds" + (f", {group}" if summary["group"].nunique() > 1 else "")
            parts.append((label, means.assign(epoch=""), True))
        for label, part, mean in parts:
            for i, (_, values) in enumerate(part.iterrows()):
                metrics = (format_metric(schema.EPOCHS[name], values[name]) for name in SHOWN_METRICS)
                cells = (str(values["epoch"]), *metrics)
                rows.append(_Row(label, len(part) if i == 0 else 0, str(values["selection"]), cells, mean))
    return rows


def _symbols(text: str) -> Markup:
    """Subscripts of a schema label as HTML."""
    return Markup(re.sub(r"_(\w)\b", r"<sub>\1</sub>", str(escape(text))))


def _yaml(config: Mapping[str, Any]) -> str:
    """A configuration as YAML; what could not be resolved stays as it was written."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)), resolve=False)
