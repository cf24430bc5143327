"""Sweeps in processes of their own: several runs at a time, Ctrl-C, and a worker that is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from robustdyn.launch.sweep import SWEEP_PROCESS, _end_with_parent
from robustdyn.records import find_runs
from robustdyn.records.progress import run_states
from tests.launch.test_sweep import QUICK, only, states
from tests.processes import UNCHECKED
from tests.runs import command, rows


def processes(pattern):
    """Ids of the processes whose command line holds this."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if pattern in path.read_bytes().replace(b"\0", b" ").decode(errors="ignore"):
                found.append(int(path.parent.name))
    return found


@pytest.fixture
def start():
    """Starts the command as a user does, in a process group of its own that does not outlive the test."""
    started = []

    def begin(folder, *arguments, program=("-m", "robustdyn.commands.train")):
        words = [sys.executable, *program, *QUICK, "-m", f"hydra.sweep.dir={folder}"]
        process = subprocess.Popen(
            [*words, *arguments],
            env={k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "HYDRA_FULL_ERROR")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


PARALLEL = ("hydra/launcher=parallel", "hydra.launcher.n_jobs=2")


@pytest.mark.slow  # 24 runs
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", [(), PARALLEL], ids=["series", "parallel"])
def test_24_runs_of_which_two_fail(launcher, start, tmp_path, monkeypatch):
    """One fails by its setting (seed -1), one by an error of torch's (seed 0, a single class)."""
    arguments = (
        "report=true",
        "model.num_classes='${first_at_fraction:${seed},10}'",
        f"seed=-1,{','.join(map(str, range(23)))}",
    )
    folder, unchecked = tmp_path / "sweep", ("-c", UNCHECKED + "train.main()")
    ended = start(folder, *launcher, *arguments, program=unchecked)
    out, error = ended.communicate(timeout=900)
    assert ended.returncode == 1, error
    expected = {f"seed={seed}": "failed" if seed in (-1, 0) else "done" for seed in range(-1, 23)}
    assert states(folder) == expected
    ending = [
        " ".join(line.split()) for line in error[error.index("runs: 22 done, 2 failed\n") :].splitlines()
    ]
    assert ending[1] == "failed seed=-1: seed=-1 must be a whole number from 0 to 2^63 - 1"
    assert ending[2].startswith("failed seed=0: IndexError: Target")
    assert ending[3] == f"traceback: {only(folder, 'seed=0') / 'error.txt'}"
    assert len(ending) == 5
    assert f"report: {folder / 'report' / 'index.html'}" in out
    page = (folder / "report" / "index.html").read_text()
    assert "22 done, 2 failed." in page
    losses = {str(rows(only(folder, f"seed={seed}"), "epochs")) for seed in range(1, 23)}
    assert len(losses) == 22
    threads = {json.loads(path.read_text())["threads"] for path in folder.glob("*/environment.json")}
    cores = len(os.sched_getaffinity(0))
    assert max(threads) * (2 if launcher else 1) <= cores  # no oversubscription
    # alone, with as many threads: the same bits
    before = torch.get_num_threads()
    torch.set_num_threads(threads.pop())
    try:
        assert (
            command(
                monkeypatch, *QUICK, "seed=22", "model.num_classes=220", f"hydra.run.dir={tmp_path / 'alone'}"
            )
            == 0
        )
    finally:
        torch.set_num_threads(before)
    assert rows(only(folder, "seed=22"), "epochs") == rows(tmp_path / "alone", "epochs")
    # again: the failures only
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/records/epochs.jsonl")}
    ended = start(folder, *launcher, *arguments, program=unchecked)
    _, error = ended.communicate(timeout=900)
    assert ended.returncode == 1
    assert "runs: 22 done, 2 failed" in error
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.slow  # two sweeps
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", [(), PARALLEL], ids=["series", "parallel"])
def test_control_c_ends_every_process_and_the_sweep_goes_on(launcher, start, tmp_path):
    folder = tmp_path / "sweep"
    arguments = (*launcher, "seed=0,1,2", "trainer.max_epochs=30")
    running = start(folder, *arguments)
    deadline = time.monotonic() + 280
    while not any(folder.glob("*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline, running.communicate(timeout=1)
        assert running.poll() is None
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert error.endswith("interrupted\n")
    assert "Traceback" not in error
    deadline = time.monotonic() + 20
    while processes(str(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(str(folder)) == []
    assert set(states(folder).values()) <= {"done", "unfinished", "missing"}
    assert "unfinished" in states(folder).values()
    ended = start(folder, *arguments)
    _, error = ended.communicate(timeout=900)
    assert ended.returncode == 0, error
    assert set(states(folder).values()) == {"done"}
    for run in find_runs(folder):
        assert [row["epoch"] for row in rows(run.path, "epochs")] == list(range(30))


@pytest.mark.slow  # two sweeps
@pytest.mark.timeout(1800)
def test_a_killed_worker_costs_only_what_it_was_doing(start, tmp_path):
    folder = tmp_path / "sweep"
    arguments = (*PARALLEL, "seed=0,1,2", "trainer.max_epochs=30")
    running = start(folder, *arguments)
    deadline = time.monotonic() + 280
    while not any(folder.glob("*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = [pid for pid in children(running.pid) if b"loky" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 1
    assert "error: the sweep ended early: TerminatedWorkerError" in error
    assert "unfinished" in states(folder).values()
    ended = start(folder, *arguments)
    ended.communicate(timeout=900)
    assert ended.returncode == 0
    assert run_states(find_runs(folder))[0].state == "done"
    assert set(states(folder).values()) == {"done"}


def children(pid):
    """Ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_the_process_of_a_sweep_does_not_wait_for_itself(monkeypatch):
    """With n_jobs=1 joblib runs jobs in the process of the sweep, which a worker's watch would kill."""
    monkeypatch.setenv(SWEEP_PROCESS, str(os.getpid()))
    before = threading.active_count()
    _end_with_parent.__wrapped__()
    assert threading.active_count() == before
