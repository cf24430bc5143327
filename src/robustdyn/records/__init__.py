"""Writes the record of a run, line by line, and reads the records of many runs back as one table.

``schema`` declares every table and column once, ``writer`` writes a run's rows, ``reader`` reads them back
and finds runs, and ``labels`` names runs by the settings in which they differ.
"""

from robustdyn.records.columns import Column, Table
from robustdyn.records.reader import Run, combine, find_runs, read_table
from robustdyn.records.schema import TABLES, add_table
from robustdyn.records.writer import RunRecords, summarise

__all__ = [
    "TABLES",
    "Column",
    "Run",
    "RunRecords",
    "Table",
    "add_table",
    "combine",
    "find_runs",
    "read_table",
    "summarise",
]
