"""A run that was interrupted and resumed ends with the same weights and records, bit for bit."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from robustdyn.methods import AdversarialTraining
from robustdyn.records import TABLES
from robustdyn.run.checkpointing import BestCheckpoint
from tests.runs import TINY, UNMEASURED, command, rows

STEPS = 9  # three epochs of three batches, the last one short
VARIANTS = {
    "at": (),
    "dropout, awp, mixup": (
        "model=wide_resnet28_10",
        "model.depth=10",
        "model.dropout=0.3",
        "model.widen_factor=1",
        "model.base_channels=4",
        "method=awp",
        "perturbation.warmup_epochs=1",
        "data.mixup=0.7",
        "averaging=ema",
        "measure.eigenpairs.directions=1",
    ),
    "float64": ("trainer.precision=64-true", "averaging=ema"),
    "wci_lr": ("method=wci_lr", "schedule.start_epoch=1", "schedule.threshold=1e-6", "schedule.interval=1"),
    "bound": (
        "schedule=bound",
        "schedule.start_epoch=1",
        "schedule.interval=1",
        "schedule.beta_per_example=20",
    ),
}
OFTEN = "checkpoint.every_minutes=1e-9"  # after every step


def arguments(variant, *more):
    tiny = [o for o in TINY if variant in ("at", "float64") or not o.startswith(("schedule.", "model."))]
    if "wide" not in " ".join(VARIANTS[variant]):
        tiny = [*tiny, *(o for o in TINY if o.startswith("model.") and o not in tiny)]
    return [*tiny, *VARIANTS[variant], "report=false", *more]


def unmeasured(*more):
    return [*UNMEASURED, *more]


def end_of(run_dir):
    """The results of a run: weights, optimiser, and every table without its times."""
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    tables = {
        name: rows(run_dir, name) for name in TABLES if (run_dir / "records" / f"{name}.jsonl").exists()
    }
    return checkpoint, tables


def assert_same_end(found, wanted):
    (found_state, found_tables), (state, tables) = found, wanted
    assert found_tables == tables
    assert found_state["global_step"] == state["global_step"]
    assert found_state["state_dict"].keys() == state["state_dict"].keys()
    for name, value in state["state_dict"].items():
        assert torch.equal(found_state["state_dict"][name], value), name
    momenta = [s["state"][i]["momentum_buffer"] for s in state["optimizer_states"] for i in s["state"]]
    found_momenta = [
        s["state"][i]["momentum_buffer"] for s in found_state["optimizer_states"] for i in s["state"]
    ]
    assert all(torch.equal(a, b) for a, b in zip(found_momenta, momenta, strict=True))
    assert len(momenta) > 0


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if "mixup" in name else pytest.mark.slow) for name in VARIANTS]
)
def test_interrupted_within_and_between_epochs(variant, tmp_path, monkeypatch):
    assert command(monkeypatch, *arguments(variant, f"hydra.run.dir={tmp_path / 'alone'}")) == 0
    undisturbed = end_of(tmp_path / "alone")
    step = AdversarialTraining.training_step
    taken = []

    def dies_at(fatal):
        def training_step(self, batch, batch_idx):
            if self.global_step == fatal:
                raise ZeroDivisionError
            taken.append(self.global_step)
            return step(self, batch, batch_idx)

        return training_step

    again = arguments(variant, f"hydra.run.dir={tmp_path / 'again'}", OFTEN)
    for fatal in (2, 3, 7):  # before an epoch's last batch, at an epoch's first, in the middle
        monkeypatch.setattr(AdversarialTraining, "training_step", dies_at(fatal))
        with pytest.raises(ZeroDivisionError):
            command(monkeypatch, *again)
    monkeypatch.setattr(AdversarialTraining, "training_step", dies_at(None))
    assert command(monkeypatch, *again) == 0
    assert taken == list(range(STEPS))  # no step is taken twice: the checkpoint within the epoch was used
    assert_same_end(end_of(tmp_path / "again"), undisturbed)


@pytest.mark.slow  # thirty starts of the real command
@pytest.mark.timeout(2400)
def test_killed_at_twenty_random_instants(tmp_path):
    """After each SIGKILL, no row is lost and none is written twice."""
    draws = random.Random(0)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    alone, killed = tmp_path / "alone", tmp_path / "killed"

    def start(run_dir):
        more = (f"hydra.run.dir={run_dir}", "trainer.max_epochs=12", "measure.epochs=every 2", OFTEN)
        line = [sys.executable, "-m", "robustdyn.commands.train", *arguments("at", *more)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def lines():
        log = killed / "log.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    process = start(alone)
    while not (alone / "log.jsonl").exists() or not (alone / "log.jsonl").read_text():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    began = time.monotonic()  # measures the time after the imports
    assert process.wait(timeout=600) == 0
    trained_for = time.monotonic() - began

    kills = done = 0
    while kills < 20:
        before, process = lines(), start(killed)
        while lines() == before and process.poll() is None and kills:  # the first one dies while it imports
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 0.5 * trained_for))
        process.send_signal(signal.SIGKILL)
        status = process.wait(timeout=60)
        assert status in (-signal.SIGKILL, 0), process.stderr.read().decode()
        kills += status != 0
        if status == 0:  # the run was already done: the next kills hit a new run
            assert_same_end(end_of(killed), end_of(alone))
            done += 1
            killed.rename(tmp_path / f"done {done}")
    last = start(killed)
    assert last.wait(timeout=600) == 0, last.stderr.read().decode()
    assert_same_end(end_of(killed), end_of(alone))


def test_a_kill_while_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = (*UNMEASURED, f"hydra.run.dir={tmp_path / 'run'}", "resume=changed")
    assert command(monkeypatch, *run, "trainer.max_epochs=1") == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = path.read_bytes()
    save = torch.save

    def half(value, file, *rest, **more):
        file.write(b"half of it")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", half)
    assert command(monkeypatch, *run) == 1
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["best_on_test.ckpt", "last.ckpt"]
    monkeypatch.setattr(torch, "save", save)
    assert command(monkeypatch, *run) == 0
    assert [row["epoch"] for row in rows(tmp_path / "run", "epochs")] == [0, 1, 2]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", full)
    assert command(monkeypatch, *UNMEASURED, f"hydra.run.dir={tmp_path / 'run'}") == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert "best_on_test.ckpt: cannot write (No space left on device); free space" in line  # there is no file
    assert "run the same command again" in line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        run_dir = tmp_path_factory.mktemp("resume") / "run"
        assert command(patch, *unmeasured(f"hydra.run.dir={run_dir}", "trainer.max_epochs=2")) == 0
    return run_dir


def test_a_finished_run_says_so_and_stays_as_it_is(finished, monkeypatch, capsys):
    records = {p.name: p.read_text() for p in (finished / "records").iterdir()}
    again = unmeasured(f"hydra.run.dir={finished}", "trainer.max_epochs=2")
    assert command(monkeypatch, *again) == 0
    assert "2 of 2 epochs were finished already" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in (finished / "records").iterdir()} == records


def test_other_settings_are_refused_and_nothing_is_lost(finished, monkeypatch, capsys):
    hydra = {p.name: p.read_text() for p in (finished / ".hydra").iterdir()}
    records = {p.name: p.read_text() for p in (finished / "records").iterdir()}
    changed = unmeasured(f"hydra.run.dir={finished}", "trainer.max_epochs=3", "optimizer.lr=0.2")
    assert command(monkeypatch, *changed) == 1
    message = capsys.readouterr().err
    assert "optimizer.lr=0.1 (now 0.2)" in message
    assert "resume=changed" in message
    assert "max_epochs" not in message.partition("; to continue with its own: ")[0]
    assert {p.name: p.read_text() for p in (finished / ".hydra").iterdir()} == hydra
    assert {p.name: p.read_text() for p in (finished / "records").iterdir()} == records


def test_a_run_can_be_made_longer_and_changed_on_request(finished, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    run = unmeasured(f"hydra.run.dir={moved}", "trainer.max_epochs=3")
    assert command(monkeypatch, *run, "optimizer.weight_decay=0.1", "resume=changed") == 0
    assert [row["epoch"] for row in rows(moved, "epochs")] == [0, 1, 2]
    assert (rows(moved, "epochs")[:2]) == rows(finished, "epochs")
    assert "weight_decay: 0.1" in (moved / ".hydra" / "config.yaml").read_text()
    images = {where: training_images(where) for where in (finished, moved)}
    assert len(images[finished]) == 1
    assert images[moved] == images[finished]  # the same images again
    others = (*run, "trainer.max_epochs=4", "data.split_seed=1", "resume=changed")
    assert command(monkeypatch, *others) == 0
    assert set(training_images(moved)) > set(images[finished])


def training_images(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["training_images"]


@pytest.mark.parametrize(
    "typed",
    [
        pytest.param((), id="nothing", marks=pytest.mark.slow),
        pytest.param(("trainer.max_epochs=3",), id="more epochs"),
    ],
)
def test_a_refusal_prints_a_command_that_goes_on(typed, tmp_path, monkeypatch, capsys):
    first = [o for o in arguments("at", "optimizer.lr=0.2", "method=awp") if "milestones" not in o]
    first = [o for o in first if not o.startswith(("trainer.max_epochs", "measure."))]
    where = f"hydra.run.dir={tmp_path / 'a run'}"
    assert command(monkeypatch, *first, "measure=none", "trainer.max_epochs=2", where) == 0
    again = [*first, "measure=none"] if typed else []
    assert command(monkeypatch, *again, *typed, where) == 1
    message = capsys.readouterr().err
    program, *printed = shlex.split(message.partition("to continue with its own: ")[2])
    assert program == "robustdyn-train"
    assert printed == [f"resume={tmp_path / 'a run'}", *typed]
    assert command(monkeypatch, *printed) == 0
    assert [row["epoch"] for row in rows(tmp_path / "a run", "epochs")] == list(range(3 if typed else 2))
    settings = (tmp_path / "a run" / ".hydra" / "config.yaml").read_text()
    assert "lr: 0.2" in settings


@pytest.mark.parametrize("table", ["epochs", "rates", None])
def test_records_that_are_missing_beside_a_checkpoint_are_one_line(
    table, finished, tmp_path, monkeypatch, capsys
):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    shutil.rmtree(moved / "records") if table is None else (moved / "records" / f"{table}.jsonl").unlink()
    run = unmeasured(f"hydra.run.dir={moved}", "trainer.max_epochs=3")
    assert command(monkeypatch, *run) == 1
    assert f"{moved / 'records'}: the records of the checkpoint's 2 epochs are not all there" in (
        capsys.readouterr().err
    )


def test_a_damaged_checkpoint_is_named(finished, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    path = moved / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    assert command(monkeypatch, *unmeasured(f"hydra.run.dir={moved}")) == 1
    assert f"{path}: cannot read" in capsys.readouterr().err


def test_a_checkpoint_writes_hydra_s_own_files_alone(finished, tmp_path, monkeypatch, capsys):
    moved, elsewhere = tmp_path / "moved", tmp_path / "elsewhere"
    shutil.copytree(finished, moved)
    path = moved / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    config = checkpoint["hydra"]["config.yaml"]
    checkpoint["hydra"] |= {str(elsewhere): "x", "../../elsewhere": "x", "hydra.yaml": 5, "other.yaml": "x"}
    torch.save(checkpoint, path)
    assert command(monkeypatch, *unmeasured(f"hydra.run.dir={moved}", "seed=5")) == 1
    assert "is of a run with other settings" in capsys.readouterr().err
    assert not elsewhere.exists()
    assert {p.name for p in (moved / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert (moved / ".hydra" / "config.yaml").read_text() == config


def test_a_checkpoint_s_best_is_a_file_beside_it(finished, tmp_path):
    """Lightning deletes the best checkpoint, and everything below that path, when there is a better one."""
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = (value for key, value in checkpoint["callbacks"].items() if key.startswith("BestCheckpoint"))
    best = BestCheckpoint(dirpath=tmp_path, monitor="x")
    for name in ("/elsewhere/..", "..", "/elsewhere/records"):
        best.load_state_dict(state | {"best_model_path": name, "best_k_models": {name: torch.tensor(0.0)}})
        assert best.best_model_path == ""
    best.load_state_dict(state | {"best_model_path": "/elsewhere/best.ckpt"})
    assert best.best_model_path == str(tmp_path / "best.ckpt")


@pytest.mark.parametrize("damage", ["no config", "weights", "list", "shape", "pickle"])
def test_a_checkpoint_that_is_none_is_one_line(finished, tmp_path, monkeypatch, capsys, damage):
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    path = moved / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    message = f"{path}: not a checkpoint of robustdyn-train; restore it from a copy, or remove it"
    if damage == "no config":
        del content["config"]
    elif damage == "weights":
        content = content["state_dict"]
    elif damage == "list":
        content = [1, 2]
    elif damage == "pickle":
        content = {"config": Path("x")}
        message = f"{path}: cannot read (loading it could run code (it holds "
    else:
        name = next(iter(content["state_dict"]))
        content["state_dict"][name] = torch.zeros(3)
        message = f"the checkpoint has no {name} of shape"
    torch.save(content, path)
    assert command(monkeypatch, *unmeasured(f"hydra.run.dir={moved}", "trainer.max_epochs=3")) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message}")
    assert "weights_only" not in line
