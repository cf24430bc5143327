"""``robustdyn-posterior``: the posterior at every epoch of finished runs, from their records."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from robustdyn.entrypoints.status import status_of
from robustdyn.errors import RecordError
from robustdyn.measure import posterior_rows
from robustdyn.records import Run, RunRecords, find_runs, read_table
from robustdyn.theory.trajectory import Interpolation

DESCRIPTION = """\
Propagate momentum SGD's covariance through the learning rates and the Hessian and noise spectra that
runs have recorded, and write each run's table `posterior` anew. Training does this at its end; use the
command for another interpolation between measured epochs, or for runs that were stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 1 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="robustdyn-posterior", description=DESCRIPTION)
    parser.add_argument("path", nargs="+", type=Path, help="a run directory, or a folder to search for runs")
    parser.add_argument(
        "--interpolation",
        choices=("log_linear", "piecewise_constant"),
        help="of curvature and noise between measured epochs (default: the run's measure.interpolation)",
    )
    arguments = parser.parse_args(argv)

    def write() -> None:
        for run in find_runs(arguments.path):
            count = write_posterior(run, arguments.interpolation)
            print(f"{run.path}: {count} rows")

    return status_of(write)


def write_posterior(run: Run, interpolation: Interpolation | None) -> int:
    """Write one run's ``posterior`` table; the number of its rows.

    Raises:
        RecordError: The run recorded no spectrum, or its configuration lacks the optimiser's settings.
    """
    tables = {name: read_table(run.path, name) for name in ("epochs", "rates", "spectrum")}
    if tables["spectrum"].empty:
        raise RecordError(f"{run.path}: no spectrum was recorded; train with measure.measurements.spectrum")
    try:
        optimizer, measure = run.config["optimizer"], run.config["measure"]
        rows = posterior_rows(
            tables,
            momentum=float(optimizer["momentum"]),
            weight_decay=float(optimizer["weight_decay"]),
            interpolation=interpolation or measure["interpolation"],
        )
    except KeyError as error:
        raise RecordError(
            f"{run.path}: its configuration has no {error}; was it made by robustdyn-train?"
        ) from error
    return RunRecords(run.path).replace("posterior", rows)


if __name__ == "__main__":
    sys.exit(main())
