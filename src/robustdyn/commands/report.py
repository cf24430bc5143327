"""``robustdyn-report``: makes tables, figures and one HTML page from run or sweep directories."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from robustdyn.run.config import register_resolvers
from robustdyn.run.status import status_of

EPILOG = """\
examples:
  robustdyn-report outputs/digits_at/2026-01-31_12-00-00     one run
  robustdyn-report multirun/digits_at/2026-01-31_12-00-00    a sweep: runs overlaid, labelled by what differs
  robustdyn-report run_a run_b --output comparison           any runs side by side
  robustdyn-report run_a --reference published:cifar10_standard   held against a published curve and its band

says which runs are done, failed, unfinished (running, or stopped before their end) and, of a sweep, missing;
writes into the output directory:
  index.html   everything on one page that needs no other file and no network
  figures/     PNG and PDF
  tables/      Parquet and CSV, one row per record, with each run's settings as columns
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 for an error that the user can correct."""
    arguments = _parser().parse_args(argv)
    paths: list[Path] = arguments.path
    # imported after parsing: they load slowly, and --help does not need them
    import joblib

    from robustdyn.launch.states import announce, say_states, states_of
    from robustdyn.records.run_directory import RunDirectory
    from robustdyn.report.page import build_report
    from robustdyn.report.reference import load_reference

    output: Path = arguments.output or RunDirectory(paths[0] if len(paths) == 1 else Path()).report
    register_resolvers()  # the runs' configurations use them

    def report() -> None:
        reference = None if arguments.reference is None else load_reference(arguments.reference)
        states = states_of(paths)
        say_states(states, sys.stdout)
        announce(build_report(paths, output, states, reference, processes=joblib.cpu_count()))

    return status_of(report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robustdyn-report",
        description="Tables, figures and one HTML page of training runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path", nargs="+", type=Path, help="a run directory, or a folder (of a sweep, say) to search for runs"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write (default: report/ in PATH; in the current folder when several are given)",
    )
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help="hold the runs against a published curve; an unknown NAME lists those there are",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
