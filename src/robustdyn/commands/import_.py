"""``robustdyn-import``: turns training logs of other programs into runs for reports and studies."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from robustdyn.run.status import say, status_of

EPILOG = """\
examples:
  robustdyn-import robust_overfitting/experiments --output imported      every output.log in a folder
  robustdyn-import epochs.csv --runs runs.csv --output imported          many runs in one table
  robustdyn-import my_epochs.csv --data cifar10 --study mine --output imported
  robustdyn-report imported/mine

reads the logs of the robust-overfitting study (locuslab/robust_overfitting) and of the AWP study
(csdongxian/AWP), and tables of epochs in CSV; docs/importing.md describes the columns.
writes a run directory DIR/STUDY/RUN for each run, and never overwrites an existing one.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 for an error that the user can correct."""
    arguments = _parser().parse_args(argv)
    # imported after parsing: they load slowly, and --help does not need them
    from robustdyn.records.imported import write_runs
    from robustdyn.records.training_logs import read_logs

    def write() -> None:
        runs = read_logs(arguments.path, arguments.runs, arguments.study)
        written = write_runs(runs, arguments.output, arguments.data)
        for run, directory in zip(runs, written, strict=True):
            say(f"{directory}: {len(run.epochs)} epochs")

    return status_of(write)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robustdyn-import",
        description="Run directories from training logs of other programs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        nargs="+",
        type=Path,
        help="a log, a CSV table of epochs, or a folder to search for output.log",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("imported"),
        help="where to write (default: imported/)",
    )
    parser.add_argument(
        "--runs", type=Path, metavar="CSV", help="the settings of the runs in a table of epochs"
    )
    parser.add_argument(
        "--data",
        metavar="NAME",
        help="the data set: cifar10, cifar100, svhn or another (default: as names say)",
    )
    parser.add_argument(
        "--study", metavar="NAME", help="where the runs come from (default: as the files say)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
