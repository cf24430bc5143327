"""Records of every column of every table, made up, and what a run publishes of them."""

import json
from types import SimpleNamespace

from robustdyn.records import TABLES, RunRecords, summarise
from robustdyn.records.reader import read_table
from robustdyn.run.publishing import Publisher

STEPS = 4  # of an epoch, in records made up here
FIRST_RANK = SimpleNamespace(is_global_zero=True)


def warnings_in(caplog):
    """What the terminal would show."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("robustdyn")
            and record.levelname == "WARNING"]  # fmt: skip


def row_of(table, epoch, **keys):
    """Every column, all numbers different."""
    filled = {"float": 0.5, "int": 7, "str": "layer.0.weight", "bool": True}
    row = {
        column.name: filled[column.kind] + (i + 100 * epoch) / 7
        if column.kind == "float"
        else filled[column.kind]
        for i, column in enumerate(TABLES[table].columns)
    }
    return row | {"epoch": epoch, "step": STEPS * (epoch + 1)} | keys


KEYS = {"spectrum": "index", "slopes": "index", "layers": "layer", "costs": "part", "measures": "measure"}
"""The column that tells the rows of an epoch apart."""


def write_epoch(records, epoch):
    """Rows in the order in which a run writes them."""
    records.append("rates", {"epoch": epoch, "step": STEPS * epoch, "lr": 0.1 / (epoch + 1)})
    for table in ("wci", "alignment", "bounds", "whole_space", "timing"):
        records.append(table, row_of(table, epoch))
    for index in range(2):
        records.append("spectrum", row_of("spectrum", epoch, index=index, curvature_term=None))
        records.append("slopes", row_of("slopes", epoch, index=index))
        for kind in ("hessian", "noise"):
            records.append("density", row_of("density", epoch, kind=kind, probe=0, index=index))
    records.append("layers", row_of("layers", epoch))
    records.append("measures", row_of("measures", epoch, measure="path_norm"))
    records.append("costs", row_of("costs", epoch, part="all"))
    # the minimum lies in the middle of the run
    records.append("epochs", row_of("epochs", epoch, test_robust_loss=1.0 + abs(epoch - 1)))
    records.write_summary(summarise(read_table(records.run_dir, "epochs")))


def write_posterior(records, epochs):
    records.replace("posterior", [row_of("posterior", epoch, index=0) for epoch in range(epochs)])


def recorded(run_dir, *, but=()):
    """(wandb's step, metric) -> number, read from the files with nothing of the package's own."""
    found = {}
    for path in (run_dir / "records").glob("*.jsonl"):
        table = path.stem
        if table in ("density", "posterior", *but):
            continue
        extra = KEYS.get(table)
        for line in path.read_text().splitlines():
            row = json.loads(line)
            step = row["step"] + 1 if table == "rates" else row["step"]
            found[step, "epoch"] = row["epoch"]
            suffix = "" if extra is None else "/" + str(row[extra]).replace(".", "/")
            for column, value in row.items():
                if column in ("epoch", extra) or (column == "step" and table != "rates"):
                    continue
                if isinstance(value, bool | int | float):
                    found[step, f"{table}/{column}{suffix}"] = value
    return found


def train(logger, run_dir, epochs, *, end=True, figures=(), between=lambda: None):
    """What a run does with its publisher; ``end=False``: it is interrupted."""
    records = RunRecords(run_dir)
    publisher = Publisher([logger], run_dir, {"seed": 3, "attack": {"eps": 8}})
    _ = logger.experiment  # as Lightning does, before anything else
    try:
        with publisher:
            publisher.setup(FIRST_RANK, None, "fit")
            publisher.on_train_start(FIRST_RANK, None)
            for epoch in epochs:
                write_epoch(records, epoch)
                publisher.on_train_epoch_end(FIRST_RANK, None)
                between()
            if not end:
                raise KeyboardInterrupt
            write_posterior(records, epochs[-1] + 1 if epochs else 1)
            publisher.on_train_end(FIRST_RANK, None)
            publisher.show(figures)
    except KeyboardInterrupt:
        assert not end
