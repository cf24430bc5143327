"""The launcher where no SLURM is; on a real one: test_slurm.py."""

import inspect
import os
import pickle
import re
import subprocess
import time

import pytest
from hydra.core.utils import JobReturn, JobStatus
from submitit import SlurmJob

from hydra_plugins.robustdyn_slurm import launcher
from robustdyn.errors import ConfigError
from robustdyn.launch import cluster_jobs
from robustdyn.launch.cluster_jobs import Failure, last_line, read_outcome, wait
from tests.runs import TINY, command, tiny_but
from tests.slurm.conftest import program


def sweep(monkeypatch, folder, *arguments):
    fixed = (*TINY, "report=false", f"hydra.sweep.dir={folder / 'sweep'}")
    return command(monkeypatch, "-m", "hydra/launcher=slurm", *fixed, *arguments)


def options(script):
    """What was asked of sbatch."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), flags=re.MULTILINE)
    return {key: value.strip("'") for key, value in found}


def test_asks_for_what_was_said(refusing, tmp_path, monkeypatch, capsys):
    arguments = (
        "trainer.accelerator=gpu",
        "trainer.devices=4",
        "++trainer.num_nodes=2",
        "seed=0,1",
        "hydra.launcher.partition=long",
        "hydra.launcher.account=physics",
        "hydra.launcher.timeout_min=90",
        "hydra.launcher.setup=[module load cuda]",
        "+hydra.launcher.additional_parameters.mail-type=END",
    )
    assert sweep(monkeypatch, tmp_path, *arguments) == 1
    (script,) = refusing.iterdir()
    asked = options(script)
    expected = {
        "partition": "long",
        "account": "physics",
        "time": "90",
        "nodes": "2",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "array": "0-1%2",
        "signal": "USR2@120",
        "mail-type": "END",
        "job-name": "robustdyn",
        "open-mode": "append",
    }
    assert asked.items() >= expected.items()
    lines = script.read_text().splitlines()
    assert "module load cuda" in lines
    assert "--kill-on-bad-exit=1" in lines[-1]
    error = capsys.readouterr().err
    assert error.startswith(
        "2 of 2 jobs failed:\n  70_0  seed=0  ended without a result; SLURM says FAILED  "
    )
    log = tmp_path / "sweep" / "slurm" / "70_1" / "70_1_0_log.out"
    assert f"  70_1  seed=1  ended without a result; SLURM says FAILED  {log}\n" in error
    assert (
        "job 70_0 (seed=0): ended without a result; SLURM says FAILED; log: " in error
    )  # of Hydra's sweeper


def test_runs_that_need_different_jobs_get_them(refusing, tmp_path, monkeypatch):
    """Resources follow the settings that are swept, not those of the first run."""
    assert sweep(monkeypatch, tmp_path, "trainer.devices=1,2") == 1
    asked = [options(script) for script in sorted(refusing.iterdir())]
    assert [one["ntasks-per-node"] for one in asked] == ["1", "2"]
    assert not any("gpus-per-node" in one or "array" in one for one in asked)  # one job each, on the CPU


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.launcher.tasks_per_node=2", "trainer.devices=1, but SLURM starts 2 tasks on each node"),
        ("hydra.launcher.nodes=2", "trainer.num_nodes=1, but SLURM's job has 2"),
        ("trainer.devices=auto", "hydra.launcher.tasks_per_node=auto must be a whole number of at least 1"),
        ("hydra.launcher.timeout_min=0", "hydra.launcher.timeout_min=0 must be a whole number of at least 1"),
        (
            "hydra.launcher.name=bash",
            "hydra.launcher.name=bash tells Lightning that this is a terminal session",
        ),
        (
            "+hydra.launcher.additional_parameters.signal=USR1@120",
            "hydra.launcher.additional_parameters.signal=USR1@120 would replace SIGUSR2",
        ),
    ],
)
def test_a_request_that_cannot_work_is_refused_before_it_is_queued(
    override, message, refusing, tmp_path, monkeypatch, capsys
):
    assert sweep(monkeypatch, tmp_path, override) == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(refusing.iterdir())


class Interrupted:
    """Raises when its signature is read."""

    def __init__(self, error):
        self.error = error

    @property
    def __signature__(self):
        raise self.error

    def __call__(self): ...


@pytest.mark.parametrize(
    ("state", "command", "waits"),
    [
        ("PENDING", ["scontrol", "requeue", "7_1"], True),
        ("COMPLETING", ["scontrol", "requeue", "7_1"], True),
        ("RUNNING", ["scontrol", "requeue", "7_1"], False),
        ("PENDING", ["make", "coffee"], False),
    ],
)
def test_a_job_that_slurm_has_requeued_already_leaves_no_error(
    state, command, waits, programs, tmp_path, monkeypatch
):
    """Preempted while it asks to be requeued before its time limit: SLURM refuses, and ends the process."""
    program(programs, "squeue", f'echo "$@" > {tmp_path}/asked; echo {state}')
    slept = []
    monkeypatch.setattr(launcher.time, "sleep", slept.append)
    refusal = subprocess.CalledProcessError(1, command)
    launcher._leave_if_requeued(refusal)
    assert slept == [launcher.END_S] * waits
    assert (tmp_path / "asked").exists() == (command[0] == "scontrol")
    with pytest.raises(TypeError) as swallowed:  # the signal came while Lightning read a signature
        inspect.getfullargspec(Interrupted(refusal))
    launcher._leave_if_requeued(swallowed.value)
    assert slept == [launcher.END_S] * 2 * waits


@pytest.mark.slow
def test_what_is_done_is_not_queued_again(refusing, tmp_path, monkeypatch):
    """Not even what was done without SLURM."""
    folder = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    short = ("trainer.max_epochs=1", "measure=none")
    tiny = tiny_but("measure.", "trainer.max_epochs")
    assert command(monkeypatch, "-m", *tiny, *short, "report=false", folder, "seed=1,2") == 0
    launcher = ("-m", "hydra/launcher=slurm", *tiny, *short, "report=false", folder)
    assert command(monkeypatch, *launcher, "seed=1,2") == 0
    assert not list(refusing.iterdir())
    assert command(monkeypatch, *launcher, "seed=1,3,2,4") == 1
    (script,) = refusing.iterdir()
    assert options(script)["array"] == "0-1%2"


def test_a_sweep_whose_jobs_still_run_is_not_started_again(refusing, programs, tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep" / "slurm" / "70_1").mkdir(parents=True)
    program(programs, "squeue", "echo '70_0|COMPLETED|None'; echo '70_1|PENDING|Priority'")
    assert sweep(monkeypatch, tmp_path, "seed=0,1") == 1
    assert (
        "error: hydra.sweep.dir: jobs of an earlier command still run there (70_1)" in capsys.readouterr().err
    )
    assert not list(refusing.iterdir())


def test_a_machine_without_slurm_is_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sweep(monkeypatch, tmp_path) == 1
    assert "error: hydra/launcher=slurm: there is no SLURM on this machine" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(launcher, "SlurmLauncher", None)
    with pytest.raises(ConfigError, match=r"install robustdyn\[slurm\]"):
        launcher.SlurmSweep().setup(hydra_context=None, task_function=None, config=None)


@pytest.mark.parametrize(
    ("trace", "line"),
    [
        ("Traceback (most recent call last):\n  ...\nKeyError\n", "KeyError"),
        ("Traceback ...\na.b.Error: what happened\n", "Error: what happened"),
        ("A: cause\n\nTraceback ...\nx.RunFailed: ValueError: one two\n", "ValueError: one two"),
    ],
)
def test_the_error_of_a_stack_trace(trace, line):
    assert last_line(trace) == line


def states(*jobs, queue=None):
    """What is known of these jobs after one look."""
    queue = queue or cluster_jobs.Queue()
    for job in jobs:
        queue.register_job(job)
    return [queue.get_state(job) for job in jobs]


def test_states_come_from_the_queue(programs, caplog):
    lines = r"5_0|RUNNING|None\n5_1|PENDING|launch failed requeued held\n9|FAILED|None\n"
    program(programs, "squeue", f'case "$*" in *--user={os.getuid()}*) printf "{lines}";; esac')
    assert states("5_0", "5_1", "6") == ["RUNNING", "PENDING", cluster_jobs.GONE]
    assert "SLURM holds job 5_1 back (launch failed requeued held)" in caplog.text


def test_a_controller_that_does_not_answer_ends_nothing(programs, monkeypatch):
    monkeypatch.setattr(cluster_jobs, "GRACE_S", 0.0)
    program(programs, "squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    queue = cluster_jobs.Queue()
    assert states("5", queue=queue) == ["UNKNOWN"]
    assert not queue.is_done("5", mode="force")


def leave(task, kind, result, when=0):
    path = task.paths.result_pickle
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps((kind, result)))
    os.utime(path, (when, when))


def test_an_error_on_another_process_is_the_run_s(tmp_path):
    job = SlurmJob(tmp_path / "%j", "5_0", tasks=[0, 1, 2])
    leave(job.task(0), "error", "RuntimeError: connection closed by peer", when=20)
    leave(job.task(1), "error", "ValueError: the cause", when=10)
    assert not job.done()  # the job runs; a requeued one would write the others again
    assert read_outcome(job) == Failure("ValueError: the cause", job.task(1).paths.stdout)


def test_a_process_that_left_nothing(tmp_path, monkeypatch):
    job = SlurmJob(tmp_path / "%j", "5_0", tasks=[0, 1])
    leave(job.task(1), "success", None)
    monkeypatch.setattr(SlurmJob, "state", "OUT_OF_MEMORY")
    assert read_outcome(job) == Failure(
        "ended without a result; SLURM says OUT_OF_MEMORY", job.task(0).paths.stdout
    )


def test_waits_through_a_requeue_and_a_silent_controller_until_all_processes_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_jobs, "SHORTEST_PAUSE_S", 0.0)
    monkeypatch.setattr(cluster_jobs, "GRACE_S", 60.0)
    job, returned = SlurmJob(tmp_path / "%j", "5_0", tasks=[0, 1]), JobReturn(status=JobStatus.COMPLETED)
    said = iter(["RUNNING", "PREEMPTED", "PENDING", None, "RUNNING", "COMPLETED", "COMPLETED"])
    looks = []

    def look(queue, mode):
        state = next(said)
        looks.append(state)
        if state == "COMPLETED":
            leave(job.task(looks.count(state) - 1), "success", returned)
        if state is not None:
            queue.read_info(f"5_0|{state}|None")

    monkeypatch.setattr(cluster_jobs.Queue, "update_if_long_enough", look)
    assert wait({3: job}) == {3: returned}
    assert list(said) == []


@pytest.mark.parametrize(("ago", "over"), [(0.0, False), (cluster_jobs.GRACE_S, True)])
def test_a_job_is_over_a_while_after_it_has_ended(ago, over, monkeypatch):
    queue = cluster_jobs.Queue()
    queue.register_job("5")
    began = time.monotonic()
    queue.read_info("5|FAILED|None")
    monkeypatch.setattr(time, "monotonic", lambda: began + ago + 1)
    queue.read_info("")  # the queue has forgotten it
    assert queue.is_done("5", mode="cache") == over
