"""A run's append-only record, and how many runs become one table.

``schema`` is the vocabulary (every table and column, once), ``writer`` writes a run's rows, ``reader`` reads
them back and finds runs, ``labels`` says what tells runs apart.
"""

from robustdyn.records.reader import Run, combine, find_runs, read_table
from robustdyn.records.schema import TABLES, Column, Table
from robustdyn.records.writer import RunRecords, summarise

__all__ = [
    "TABLES",
    "Column",
    "Run",
    "RunRecords",
    "Table",
    "combine",
    "find_runs",
    "read_table",
    "summarise",
]
