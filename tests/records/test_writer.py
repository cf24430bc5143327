import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from robustdyn.errors import RecordError
from robustdyn.records import RunRecords, read_table, summarise
from robustdyn.records.schema import ALIGNMENT, EPOCHS
from tests.records.synthetic import write_run


def alignment(epoch, **values):
    counts = {"tracked_directions": 4, "examples": 100}
    floats = dict.fromkeys(ALIGNMENT.required, 1.0) | {"commutator": 0.5, "subspace_overlap": 0.25}
    return floats | counts | {"epoch": epoch} | values


def epoch_row(epoch, **values):
    return dict.fromkeys(EPOCHS.required, 1.0) | {"epoch": epoch, "step": epoch} | values


@pytest.fixture
def records(tmp_path):
    return RunRecords(tmp_path)


def test_a_row_comes_back_as_written(records, tmp_path):
    records.append("alignment", alignment(3, commutator=1 / 3))
    records.append("alignment", alignment(5, tracked_directions=10))
    frame = read_table(tmp_path, "alignment")
    assert frame["epoch"].tolist() == [3, 5]
    assert frame["commutator"].tolist() == [1 / 3, 0.5]
    assert frame["tracked_directions"].tolist()[1] == 10
    assert frame["step"].isna().all()


def test_scalars_of_array_libraries_are_numbers(records):
    row = alignment(
        np.int64(3),
        commutator=np.float32(0.5),
        subspace_overlap=torch.tensor(0.25),
        total_correlation=np.array(2.0),
    )
    records.append("alignment", row)
    written = json.loads(records.path("alignment").read_text())
    assert written == alignment(3, total_correlation=2.0)


def test_a_writer_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, robustdyn.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, np.float64("nan"), torch.tensor(math.inf), None]
)
def test_what_is_no_number_is_null(records, tmp_path, value):
    records.append("alignment", alignment(0, commutator=value))
    assert '"commutator": null' in records.path("alignment").read_text()
    assert read_table(tmp_path, "alignment")["commutator"].isna().all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (alignment(0, comutator=1.0), "table 'alignment': unknown comutator"),
        ({"epoch": 0, "commutator": 1.0}, "missing tracked_directions, commutator_se, "),
        (alignment(None), "'epoch': a key column cannot be null"),
        (alignment(0.5), "'epoch': 0.5 is not of kind int"),
        (alignment(0, commutator="big"), "'commutator': 'big' is not of kind float"),
        (alignment(0, commutator=True), "'commutator': True is not of kind float"),
        (alignment(0, commutator=np.ones(2)), "'commutator': an array of several numbers"),
        (alignment(0, commutator=object()), "'commutator': object cannot be recorded"),
    ],
)
def test_a_wrong_row_is_refused_and_leaves_no_trace(records, row, message):
    with pytest.raises(ValueError, match=message):
        records.append("alignment", row)
    assert not records.path("alignment").exists()


def test_extend_writes_all_rows_or_none(records, tmp_path):
    with pytest.raises(ValueError, match="missing"):
        records.extend("alignment", [alignment(0), {"epoch": 1}])
    records.extend("alignment", [alignment(0), alignment(1)])
    assert len(read_table(tmp_path, "alignment")) == 2


def test_truncate_drops_later_epochs_from_every_table(tmp_path):
    run = write_run(tmp_path / "run", epochs=12)
    untouched = {path.name: path.read_bytes() for path in (run / "records").iterdir()}
    records = RunRecords(run)
    records.truncate(12)
    assert {path.name: path.read_bytes() for path in (run / "records").iterdir()} == untouched
    records.truncate(5)
    assert read_table(run, "epochs")["epoch"].tolist() == [0, 1, 2, 3, 4]
    for table in ("wci", "layers", "spectrum", "bounds"):
        assert read_table(run, table)["epoch"].unique().tolist() == [0], table


def test_a_resumed_record_equals_an_undisturbed_one(tmp_path):
    for name, interrupted in (("whole", False), ("resumed", True)):
        records = RunRecords(tmp_path / name)
        for epoch in range(4):
            records.append("epochs", epoch_row(epoch))
        if interrupted:
            with records.path("epochs").open("a") as file:
                file.write('{"epoch": 4, "st')  # killed while writing
            records = RunRecords(tmp_path / name)
            records.truncate(2)
            for epoch in (2, 3):
                records.append("epochs", epoch_row(epoch))
    assert (tmp_path / "resumed/records/epochs.jsonl").read_bytes() == (
        tmp_path / "whole/records/epochs.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    ("tail", "epochs"), [('{"epoch": 1, "com', [0, 2]), (json.dumps(alignment(1)), [0, 1, 2])]
)
def test_appending_after_a_kill_mends_the_last_line(records, tmp_path, tail, epochs):
    records.append("alignment", alignment(0))
    with records.path("alignment").open("a") as file:
        file.write(tail)
    RunRecords(tmp_path).append("alignment", alignment(2))
    assert read_table(tmp_path, "alignment")["epoch"].tolist() == epochs


def test_truncate_refuses_a_broken_middle_line(records, tmp_path):
    records.path("alignment").parent.mkdir()
    lines = [json.dumps(alignment(0)), "garbage", json.dumps(alignment(1))]
    records.path("alignment").write_text("\n".join(lines) + "\n")
    with pytest.raises(RecordError, match=r"alignment\.jsonl, line 2"):
        records.truncate(1)
    assert "garbage" in records.path("alignment").read_text()


def test_an_unwritable_record_names_the_file(tmp_path):
    (tmp_path / "records").write_text("in the way")
    with pytest.raises(RecordError, match=r"alignment\.jsonl: cannot write"):
        RunRecords(tmp_path).append("alignment", alignment(0))


def test_sync_and_summary(records, tmp_path):
    records.append("alignment", alignment(0))
    records.sync()
    path = records.write_summary(
        {"final": {"epoch": np.int64(3), "loss": math.nan}, "list": [np.float32(0.5)]}
    )
    assert json.loads(path.read_text()) == {"final": {"epoch": 3, "loss": None}, "list": [0.5]}
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith("tmp")] == []


def test_a_summary_is_replaced_whole_or_not_at_all(records, monkeypatch):
    path = records.write_summary({"final": 1})

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(RecordError, match=r"summary\.json: cannot write \(No space left on device\)"):
        records.write_summary({"final": 2})
    assert json.loads(path.read_text()) == {"final": 1}


def curve(losses, errors, **columns):
    pairs = enumerate(zip(losses, errors, strict=True))
    rows = [
        epoch_row(epoch, test_robust_loss=loss, test_robust_error=error) for epoch, (loss, error) in pairs
    ]
    return pd.DataFrame(rows).assign(**columns)


def test_summary_of_a_run():
    frame = curve([2.0, 0.9, 1.1, 1.3], [0.9, 0.6, 0.5, 0.5], validation_robust_error=[0.9, 0.4, 0.5, 0.6])
    summary = summarise(frame)
    assert summary["final"]["epoch"] == 3
    assert summary["best_on_test"]["epoch"] == 2  # the first of equals
    assert summary["best_on_test"]["test_robust_loss"] == 1.1
    assert summary["best_on_validation"]["epoch"] == 1
    assert summary["min_test_robust_loss"] == {"epoch": 1, "value": 0.9}
    assert summary["robust_loss_rise"] == pytest.approx(0.4)
    json.dumps(summary, allow_nan=False)


def test_summary_without_validation_or_evaluation():
    frame = curve([math.nan] * 2, [math.nan] * 2, validation_robust_error=[math.nan] * 2)
    summary = summarise(frame)
    assert "best_on_validation" not in summary
    assert "validation_robust_error" not in summary["final"]
    assert summary["best_on_test"] is None
    assert summary["min_test_robust_loss"] == {"epoch": None, "value": None}
    assert summary["robust_loss_rise"] is None
    with pytest.raises(ValueError, match="without a finished epoch"):
        summarise(frame.head(0))
