"""Whatever goes wrong in a run, it ends with one line that says what to do, and loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from robustdyn.curvature import EmpiricalRisk
from robustdyn.measure import Measure
from robustdyn.methods import AdversarialTraining
from robustdyn.records.files import sole_process
from robustdyn.run.config import build
from tests.runs import TINY, UNMEASURED, command, compose, rows, tiny_but

MEASURED = (*TINY, "report=false")


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("method", [pytest.param("at", marks=pytest.mark.slow), "awp"])
def test_a_loss_that_is_no_number_stops_the_run(method, tmp_path, monkeypatch, capsys):
    step = AdversarialTraining.training_step

    def training_step(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        return loss * torch.nan if self.global_step == 4 else loss

    run = (*UNMEASURED, f"method={method}", f"hydra.run.dir={tmp_path}")
    monkeypatch.setattr(AdversarialTraining, "training_step", training_step)
    assert command(monkeypatch, *run) == 1
    message = last_line(capsys)
    assert message.startswith("error: the training loss is not finite at step 4 of the run (epoch 1)")
    assert "resume=changed" in message

    snapshot = torch.load(tmp_path / "nonfinite" / "step_4.pt", weights_only=True)
    assert (snapshot["step"], snapshot["epoch"]) == (4, 1)
    cfg = compose(*UNMEASURED, f"method={method}")
    data = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")
    batch = data.split("train").batch(snapshot["indices"])
    assert torch.equal(batch.targets, snapshot["targets"])
    build(cfg, "model").load_state_dict(snapshot["model"])  # it has only the network's keys
    assert all(value.isfinite().all() for value in snapshot["model"].values())

    # the checkpoint is from an earlier step, and the run can resume from it
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
    assert command(monkeypatch, *MEASURED, f"hydra.run.dir={tmp_path}") == 1
    message = last_line(capsys)
    assert message.startswith(
        f"error: out of memory in the {where}: CUDA out of memory. Tried to allocate 2.00"
    )
    assert remedy in message
    assert "more" not in message.split("GiB.")[1].split()[:1]


def test_the_log_is_one_object_a_line(tmp_path, monkeypatch):
    assert command(monkeypatch, *UNMEASURED, f"hydra.run.dir={tmp_path}") == 0
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
        command(monkeypatch, *UNMEASURED, f"hydra.run.dir={tmp_path}")
    *_, last = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert last["level"] == "ERROR"
    assert "that was zero" in last["traceback"]
    assert "broken" in last["traceback"]


def test_a_full_disk_under_the_records_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "records").write_text("a file where the folder should be")
    assert command(monkeypatch, *UNMEASURED, f"hydra.run.dir={tmp_path}") == 1
    message = last_line(capsys)
    assert message.startswith("error: ")
    assert "records" in message
    assert "cannot write" in message


def test_a_run_directory_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert command(monkeypatch, *UNMEASURED, f"hydra.run.dir={tmp_path}/file/run") == 1
    line = last_line(capsys)
    assert line.startswith(f"error: {tmp_path}/file/run: cannot write (")
    assert str(tmp_path / "file") in line
    assert "hydra.run.dir" in line


def test_a_run_directory_that_is_removed_meanwhile_is_one_line(tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    step = AdversarialTraining.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 4:
            shutil.rmtree(run_dir)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AdversarialTraining, "training_step", training_step)
    assert command(monkeypatch, *UNMEASURED, f"hydra.run.dir={run_dir}") == 1
    assert "was removed while the run was in progress" in last_line(capsys)


def test_what_a_killed_process_was_writing_does_not_stay(tmp_path, monkeypatch):
    left = [tmp_path / "records" / ".rates.jsonl.123.tmp", tmp_path / "checkpoints" / ".last.ckpt.tmp"]
    left.append(tmp_path / ".status.json.123.tmp")
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    # before anything is read
    assert command(monkeypatch, *UNMEASURED, "seed=-1", f"hydra.run.dir={tmp_path}") == 1
    assert not any(path.exists() for path in left)


def test_a_notebook_s_backend_that_is_not_here_does_not_matter():
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    line = [sys.executable, "-c", "import robustdyn.commands, matplotlib.pyplot"]
    subprocess.run(line, env=environment, check=True)


@pytest.mark.parametrize("typed", ["hydra/launcher=parallel", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=x"])
def test_what_is_of_sweeps_is_refused_for_a_run(typed, tmp_path, monkeypatch, capsys):
    also = ["hydra/launcher=parallel"] if typed == "hydra.launcher.n_jobs=2" else []
    assert command(monkeypatch, *UNMEASURED, typed, *also, f"hydra.run.dir={tmp_path / 'run'}") == 1
    assert f"error: {typed.partition('=')[0]} takes effect with -m only" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


LONG = (
    *tiny_but("trainer.max_epochs", "measure.", "schedule."),
    "measure=none",
    "report=false",
    "trainer.max_epochs=2000",
    "data.test_size=10",
    "attack.steps=1",
)


def started(*arguments, **streams):
    """Start the real command in its own process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "robustdyn.commands.train", *arguments]
    return subprocess.Popen(
        line, env=environment, **{"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL} | streams
    )


def wait_for(path, process):
    while not (path.exists() and path.read_text()):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)


def state(run_dir):
    return json.loads((run_dir / "status.json").read_text())["state"]


@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_a_directory_takes_one_process_at_a_time(sweep, tmp_path, monkeypatch, capsys):
    arguments = (
        ["-m", *UNMEASURED, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
        if sweep
        else [*UNMEASURED, f"hydra.run.dir={tmp_path}"]
    )
    with sole_process(tmp_path, "unused"):
        before = sorted(tmp_path.iterdir())
        assert command(monkeypatch, *arguments) == 1
        assert sorted(tmp_path.iterdir()) == before  # also none of Hydra's files
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}: running in process {os.getpid()} on host ")
    assert f"choose another hydra.{'sweep' if sweep else 'run'}.dir" in error
    assert error.count("\n") == 1


def test_a_lock_goes_with_its_process_however_it_ends(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from robustdyn.records.files import sole_process\n"
        "with sole_process(Path(sys.argv[1]), ''): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode
        == -signal.SIGKILL
    )
    with sole_process(tmp_path, "unused"):
        pass


@pytest.mark.slow  # a process of its own
@pytest.mark.parametrize(
    "sweep", [pytest.param(False, id="run"), pytest.param(True, id="serial sweep", marks=pytest.mark.slow)]
)
def test_sigterm_interrupts_as_ctrl_c_does(sweep, tmp_path):
    where = ["-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir='${hydra.job.num}'"]
    run_dir = tmp_path / "0" if sweep else tmp_path
    process = started(*LONG, *(where if sweep else [f"hydra.run.dir={tmp_path}"]))
    wait_for(run_dir / "records" / "epochs.jsonl", process)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.decode().endswith("interrupted\n")
    assert state(run_dir) == "running"  # it can be resumed
    assert (not sweep) or b"the same command with hydra.sweep.dir=" in said


@pytest.mark.slow  # a process of its own
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    process = started(*UNMEASURED, f"hydra.run.dir={tmp_path}", stdout=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert state(tmp_path) == "done"


@pytest.mark.slow  # a process of its own
def test_a_terminal_that_lacks_characters_does_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = started(*UNMEASURED, "name='\u00fcn\u00ef \u2192'", f"hydra.run.dir={tmp_path}")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    assert b"\\xfcn\\xef \\u2192 seed=0" in said


@pytest.mark.slow  # a parallel sweep
def test_workers_of_a_parallel_sweep_end_with_it(tmp_path):
    where = ["-m", "seed=0,1", "hydra/launcher=parallel", f"hydra.sweep.dir={tmp_path}"]
    process = started(*LONG, *where, "hydra.sweep.subdir='${hydra.job.num}'", stderr=subprocess.DEVNULL)
    owners = [tmp_path / number / ".lock.owner" for number in "01"]
    for owner in owners:
        wait_for(owner, process)
    workers = [int(owner.read_text().split()[1]) for owner in owners]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("weight", [torch.inf, 1e30], ids=["infinite", "huge"])
def test_a_diverged_network_that_is_measured_is_one_line(weight, tmp_path, monkeypatch, capsys):
    measure = Measure.on_train_epoch_end

    def diverged(self, trainer, module):
        with torch.no_grad():
            module.model.linear.weight.fill_(weight)
        measure(self, trainer, module)

    monkeypatch.setattr(Measure, "on_train_epoch_end", diverged)
    assert command(monkeypatch, *MEASURED, f"hydra.run.dir={tmp_path}") == 1
    message = last_line(capsys)
    assert message.startswith("error: the network cannot be measured after epoch 0: ")
    assert "a lower optimizer.lr may help" in message


def test_an_image_alone_in_the_last_batch_is_refused_before_training(tmp_path, monkeypatch, capsys):
    small = ("data.train_size=33", "data.batch_size=32", "model.blocks=[1,1,1,1]", "model.strides=[1,2,2,2]")
    assert command(monkeypatch, *UNMEASURED, *small, f"hydra.run.dir={tmp_path}") == 1
    assert last_line(capsys).startswith(
        "error: data.batch_size=32 leaves one of 33 training images for the last"
    )
    assert not list((tmp_path / "records").glob("epochs*"))
