"""What can go wrong with a run ends it with one line that says what to do, and loses nothing."""

import json

import pytest
import torch

from robustdyn.curvature import EmpiricalRisk
from robustdyn.entrypoints.config import build
from robustdyn.methods import AdversarialTraining
from tests.runs import TINY, command, compose, rows

RUN = (*TINY, "report=false")


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("method", ["at", "awp"])
def test_a_loss_that_is_no_number_stops_the_run(method, tmp_path, monkeypatch, capsys):
    step = AdversarialTraining.training_step

    def training_step(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        return loss * torch.nan if self.global_step == 4 else loss

    run = (*RUN, f"method={method}", f"hydra.run.dir={tmp_path}")
    monkeypatch.setattr(AdversarialTraining, "training_step", training_step)
    assert command(monkeypatch, *run) == 1
    message = last_line(capsys)
    assert message.startswith("error: the training loss is not finite at step 4 of the run (epoch 1)")
    assert "resume=changed" in message

    snapshot = torch.load(tmp_path / "nonfinite" / "step_4.pt", weights_only=True)
    assert (snapshot["step"], snapshot["epoch"]) == (4, 1)
    cfg = compose(*RUN, f"method={method}")
    data = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")
    batch = data.split("train").batch(snapshot["indices"])
    assert torch.equal(batch.targets, snapshot["targets"])
    build(cfg, "model").load_state_dict(snapshot["model"])  # the keys of the network alone
    assert all(value.isfinite().all() for value in snapshot["model"].values())

    # the checkpoint is from before, and the run can go on from it
    assert [row["epoch"] for row in rows(tmp_path, "epochs")] == [0]
    monkeypatch.setattr(AdversarialTraining, "training_step", step)
    assert command(monkeypatch, *run, "optimizer.lr=0.01", "resume=changed") == 0
    assert [row["epoch"] for row in rows(tmp_path, "epochs")] == [0, 1, 2]


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


@pytest.mark.parametrize(
    ("where", "owner", "name", "remedy"),
    [
        ("measurement", EmpiricalRisk, "__init__", "lower measure.memory_mib"),
        ("training or evaluation", AdversarialTraining, "training_step", "lower data.batch_size"),
    ],
)
def test_out_of_memory_says_what_to_lower(where, owner, name, remedy, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OUT

    monkeypatch.setattr(owner, name, full)
    assert command(monkeypatch, *RUN, f"hydra.run.dir={tmp_path}") == 1
    message = last_line(capsys)
    assert message.startswith(
        f"error: out of memory in the {where}: CUDA out of memory. Tried to allocate 2.00"
    )
    assert remedy in message
    assert "more" not in message.split("GiB.")[1].split()[:1]


def test_the_log_is_one_object_a_line(tmp_path, monkeypatch):
    assert command(monkeypatch, *RUN, f"hydra.run.dir={tmp_path}") == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert lines[0]["message"] == "training starts"
    epochs = [line for line in lines if line["message"] == "epoch finished"]
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    assert [line["test_robust_loss"] for line in epochs] == [
        row["test_robust_loss"] for row in rows(tmp_path, "epochs")
    ]


def test_an_unexpected_error_is_in_the_log_with_its_traceback(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("that was zero")

    monkeypatch.setattr(AdversarialTraining, "training_step", broken)
    with pytest.raises(ZeroDivisionError):
        command(monkeypatch, *RUN, f"hydra.run.dir={tmp_path}")
    *_, last = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert last["level"] == "ERROR"
    assert "that was zero" in last["traceback"]
    assert "broken" in last["traceback"]


def test_a_full_disk_under_the_records_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "records").write_text("a file where the folder should be")
    assert command(monkeypatch, *RUN, f"hydra.run.dir={tmp_path}") == 1
    message = last_line(capsys)
    assert message.startswith("error: ")
    assert "records" in message
    assert "cannot write" in message


def test_a_run_directory_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert command(monkeypatch, *RUN, f"hydra.run.dir={tmp_path}/file/run") == 1
    line = last_line(capsys)
    assert line.startswith("error: cannot make the run's folder: ")
    assert str(tmp_path / "file") in line
    assert "hydra.run.dir" in line
