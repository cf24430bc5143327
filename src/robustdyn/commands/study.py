"""``robustdyn-study``: makes the tables and figures of a paper from the runs of an experiment."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from robustdyn import studies
from robustdyn.errors import ConfigError
from robustdyn.run.config import register_resolvers
from robustdyn.run.status import say, status_of

if TYPE_CHECKING:
    from robustdyn.studies.shared.study import Study

EPILOG = """\
examples:
  robustdyn-study correlation multirun/correlation         what the runs of that sweep say
  robustdyn-study dynamics run_a run_b --output somewhere
  robustdyn-study mypackage.mystudy DIR                    the STUDY of your own module, see docs/extending.md

`robustdyn-train experiment=NAME` trains the runs for study NAME; experiments/NAME/README.md has their cost.
`robustdyn-import` writes those for the study published.
Writes into the output directory:
  findings.md  the numbers that answer the question
  tables/      CSV
  figures/     PNG, PDF, and the CSV that each was drawn from
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 for an error that the user can correct."""
    arguments = _parser().parse_args(argv)
    paths: list[Path] = arguments.path
    name: str = arguments.study
    output: Path = arguments.output or (paths[0] if len(paths) == 1 else Path()) / name.rpartition(".")[2]
    from robustdyn.records import find_runs  # these load slowly: not for --help
    from robustdyn.studies.shared.study import load, write_answer

    register_resolvers()  # the runs' configurations use them

    def study() -> None:
        chosen = load(name) if name in studies.names() else _own_study(name)
        written = write_answer(chosen.question, chosen.answer(find_runs(paths)), output)
        say(written.findings.read_text(encoding="utf-8").rstrip("\n"))
        say(f"figures and tables: {output}")

    return status_of(study)


def _own_study(module: str) -> "Study":
    """The ``STUDY`` of a module that the user names.

    Raises:
        ConfigError: There is no such module, or it has no study.
    """
    from robustdyn.run.targets import imported
    from robustdyn.studies.shared.study import Study

    found = imported(f"{module}.STUDY", f"study {module}")
    if not isinstance(found, Study):
        raise ConfigError(f"study {module}: its STUDY is a {type(found).__name__}; make it a Study")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robustdyn-study",
        description="Tables and figures of a paper, from runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "study", metavar="STUDY", help=f"{', '.join(studies.names())}, or a module of your own with a STUDY"
    )
    parser.add_argument("path", nargs="+", type=Path, help="a run directory, or a folder to search for runs")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write (default: a folder named like the study in PATH, or here if several are given)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
