"""Turns rows of a record into points of curves, for loggers."""

from collections.abc import Mapping
from typing import Any

from robustdyn.records.schema import TABLES

NODES = ("density", "curvature_cells")
"""Tables whose rows are the nodes of a distribution and not points of curves."""


def points(table: str, row: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the numbers of a row by the names of their curves.

    Returns:
        By ``table/column``, followed by ``/key`` where an epoch has several rows: ``wci/wci``,
        ``spectrum/hessian_eigenvalue/0``, ``layers/wci_term/fc/weight``. Flags are 0 and 1. Text, null, the
        epoch and the step are left out; only ``rates`` keeps its step.
    """
    if table in NODES:
        return {}
    keys = [key for key in TABLES[table].key if key not in ("epoch", "step")]
    # a dot in a metric's name means a nested value to wandb
    suffix = "".join(f"/{str(row[key]).replace('.', '/')}" for key in keys)
    left_out = {"epoch", *keys} | (set() if table == "rates" else {"step"})
    return {
        f"{table}/{column}{suffix}": int(value) if isinstance(value, bool) else value
        for column, value in row.items()
        if column not in left_out and isinstance(value, int | float)
    }
