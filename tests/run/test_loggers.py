"""What loggers show is what the records say: CSV and TensorBoard, and loggers that fail."""

import csv

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from robustdyn.records import RunRecords
from robustdyn.records.points import points
from robustdyn.run.publishing import Publisher
from tests.run.published import FIRST_RANK, recorded, train, warnings_in
from tests.runs import TINY, command


class Broken(Logger):
    name = version = experiment = ""

    def log_hyperparams(self, *args, **kwargs):
        """Fine."""

    def finalize(self, status):
        raise OSError("no space")

    def log_metrics(self, metrics, step=None):
        raise OSError("no space\nleft")


def test_any_logger_may_fail(tmp_path, caplog):
    train(Broken(), tmp_path, range(2))
    assert warnings_in(caplog) == [
        "a logger stopped (no space); training and its records continue without it"
    ]


def test_csv_has_every_number_once_even_after_a_resumption(tmp_path):
    def logger():
        return CSVLogger(tmp_path, name="csv", version="")

    train(logger(), tmp_path, range(3), end=False)
    RunRecords(tmp_path).truncate(2)
    train(logger(), tmp_path, range(2, 4))
    again = logger()
    _ = again.experiment
    with Publisher([again], tmp_path, {}) as publisher:  # nothing is left to train
        publisher.setup(FIRST_RANK, None, "fit")
    found = {}
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch") and not name.startswith("posterior"):
                    assert (int(row["step"]), name) not in found
                    found[int(row["step"]), name] = float(value)
    expected = {key: value for key, value in recorded(tmp_path).items() if key[1] != "epoch"}
    assert found == expected


def test_tensorboard_has_every_number_once_even_after_a_resumption(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def logger():
        return TensorBoardLogger(tmp_path, name="tensorboard", version="", default_hp_metric=False)

    train(logger(), tmp_path, range(2), end=False)
    RunRecords(tmp_path).truncate(1)
    last = logger()
    train(last, tmp_path, range(1, 3))
    last.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in ("epochs/test_robust_loss", "spectrum/gradient_noise/1", "rates/lr"):
        expected = [(step, value) for (step, n), value in sorted(recorded(tmp_path).items()) if n == name]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]  # float32


def test_curves_leave_out_what_is_no_number():
    row = {"epoch": 1, "step": 4, "layer": "a.b", "wci_term": None, "numel": 3, "stable": True, "part": "x"}
    assert points("layers", row) == {"layers/numel/a/b": 3, "layers/stable/a/b": 1}


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    assert command(monkeypatch, *TINY, "logger=tensorboard", f"hydra.run.dir={tmp_path}") == 1
    assert (
        "logger.tensorboard: Neither `tensorboard` nor `tensorboardX` is available" in capsys.readouterr().err
    )
