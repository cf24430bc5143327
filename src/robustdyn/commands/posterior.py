"""``robustdyn-posterior``: computes the posterior at every epoch of finished runs from their records."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustdyn.errors import RecordError
from robustdyn.run.config import RULES, register_resolvers
from robustdyn.run.status import say, status_of

if TYPE_CHECKING:
    from robustdyn.records import Run
    from robustdyn.theory.trajectory import Interpolation

DESCRIPTION = """\
Propagate momentum SGD's covariance through the learning rates and the Hessian and noise spectra that
runs have recorded, and rewrite each run's table `posterior`. Training does this at its end; use the
command for another interpolation between measured epochs, or for runs that were stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 for an error that the user can correct."""
    parser = argparse.ArgumentParser(prog="robustdyn-posterior", description=DESCRIPTION)
    parser.add_argument("path", nargs="+", type=Path, help="a run directory, or a folder to search for runs")
    parser.add_argument(
        "--interpolation",
        choices=("log_linear", "piecewise_constant"),
        help="of curvature and noise between measured epochs (default: the run's measure.interpolation)",
    )
    arguments = parser.parse_args(argv)
    from robustdyn.records import find_runs  # after the arguments, as it loads slowly

    register_resolvers()  # the runs' configurations use them

    found: list[Run] = []
    failed = status_of(lambda: found.extend(find_runs(arguments.path)))

    def write(run: "Run") -> None:
        count = write_posterior(run, arguments.interpolation)
        say(f"{run.path}: {count} rows")

    # an error in one run must not stop the other runs of its sweep
    return max([failed, *(status_of(partial(write, run)) for run in found)])


def write_posterior(run: "Run", interpolation: "Interpolation | None") -> int:
    """Write one run's ``posterior`` table and return the number of its rows.

    Raises:
        RecordError: The run recorded no spectrum, or was not trained with momentum SGD, or its configuration
            lacks the optimiser's settings or has values there that cannot be.
    """
    from robustdyn.measure import POSTERIOR_TABLES, posterior_rows
    from robustdyn.records import RunRecords, read_table
    from robustdyn.records.labels import flatten
    from robustdyn.records.run_directory import RunDirectory

    _require_plain_momentum(run)
    tables = {name: read_table(run.path, name) for name in POSTERIOR_TABLES}
    if tables["spectrum"].empty:
        raise RecordError(f"{run.path}: no spectrum was recorded; train with measure.measurements.spectrum")
    for name in ("epochs", "rates"):
        if (tables[name]["step"].diff() <= 0).any():
            raise RecordError(
                f"{run.path}: the steps of the table {name} do not increase; restore its record"
            )
    recorded, found = flatten(run.config), []
    for key in ("optimizer.momentum", "optimizer.weight_decay", "measure.interpolation"):
        value: Any = interpolation if key == "measure.interpolation" and interpolation else recorded.get(key)
        if value is None:
            raise RecordError(f"{run.path}: its configuration has no {key}; was it made by robustdyn-train?")
        if not RULES[key].holds(value):
            file = RunDirectory(run.path).config
            raise RecordError(f"{file}: {key}={value} {RULES[key].requirement}; restore it")
        found.append(value)
    momentum, weight_decay, between = found
    rows = posterior_rows(tables, momentum=momentum, weight_decay=weight_decay, interpolation=between)
    return RunRecords(run.path).replace("posterior", rows)


def _require_plain_momentum(run: "Run") -> None:
    """Refuse optimisers that ``AdversarialTraining.plain_momentum`` refuses, by the configuration alone."""
    optimizer = run.config.get("optimizer", {})
    if not isinstance(optimizer, Mapping) or "_target_" not in optimizer:
        return  # made by another program: a later error names the missing settings
    decay, on = optimizer.get("weight_decay"), run.config.get("regularizer", {}).get("weight_decay_on", "all")
    found = None
    if optimizer["_target_"] not in ("torch.optim.SGD", "torch.optim.sgd.SGD"):
        found = f"optimizer={str(optimizer['_target_']).rpartition('.')[2]}"
    elif optimizer.get("nesterov"):
        found = "optimizer.nesterov=true"
    elif optimizer.get("dampening"):
        found = f"optimizer.dampening={optimizer['dampening']}"
    elif decay and on != "all":
        found = f"regularizer.weight_decay_on={on}"
    elif clip := run.config.get("trainer", {}).get("gradient_clip_val"):
        found = f"trainer.gradient_clip_val={clip}"
    if found is not None:
        raise RecordError(
            f"{run.path}: trained with {found}, but the posterior is that of momentum SGD without Nesterov, "
            "dampening, several weight decays or clipped gradients; train with optimizer=sgd"
        )


if __name__ == "__main__":
    sys.exit(main())
