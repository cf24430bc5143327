"""Sweeps on a real SLURM: ``make slurm-test``."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from robustdyn.commands.sweep import main as sweep_command
from robustdyn.launch.submitted import SubmittedJobs
from tests.processes import UNCHECKED
from tests.runs import TINY, command, rows, weights
from tests.slurm.conftest import SCRIPT, until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

LAUNCHER = ("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1")
TABLES = ("epochs", "rates", "wci", "layers", "spectrum", "alignment", "bounds", "posterior", "costs")
LONG = (
    "trainer.max_epochs=60",
    "measure.epochs=[0,15,59]",
    "report=false",
)  # not over before it is taken down


def log_of(folder, job, rank=0):
    return (folder / "slurm" / job / f"{job}_{rank}_log.out").read_text()


def epochs_in(run_dir):
    table = run_dir / "records" / "epochs.jsonl"
    return len(table.read_text().splitlines()) if table.exists() else 0


def assert_same_run(run_dir, reference):
    for table in TABLES:
        assert rows(run_dir, table) == rows(reference, table), table
    assert all(torch.equal(value, weights(reference)[name]) for name, value in weights(run_dir).items())


def test_every_way_to_end(start, cluster, tmp_path):
    """Jobs that raise, die, are cancelled or run out of time are all named; the others come to their end."""
    cases = {
        "returns": "COMPLETED",
        "raises": "FAILED",
        "raises_what_cannot_be_read": "FAILED",
        "leaves_with_status_0": "FAILED",
        "killed": "FAILED",
        "cancelled": "CANCELLED",
        "out_of_time": "FAILED",
        "requeued": "COMPLETED",
        "raises_on_rank_1": "FAILED",
    }
    errors = {
        "raises": "ValueError: first line second line",
        "raises_what_cannot_be_read": "Unreadable: 1 and 2",
        "leaves_with_status_0": "RuntimeError: the run ended this process before it was done",
        "killed": "ended without a result; SLURM says FAILED",
        "cancelled": "ended without a result; SLURM says CANCELLED",
        "out_of_time": "UncompletedJobError: Job not requeued because: timed-out too many times.",
        "raises_on_rank_1": "RuntimeError: only here",
    }
    # settings of their own for some: the sweep becomes several arrays
    more = {"out_of_time": ",timeouts:0", "raises_on_rank_1": ",devices:2"}
    swept = ",".join(f"{{end:{end}{more.get(end, '')}}}" for end in cases)
    sweep = start(
        tmp_path,
        "-m",
        *LAUNCHER,
        f"+case={swept}",
        "+trainer.accelerator=cpu",
        "+trainer.devices=${oc.select:case.devices,1}",
        "hydra.launcher.max_num_timeout=${oc.select:case.timeouts,1}",
        "hydra.launcher.timeout_min=5",  # in the last ten minutes submitit takes SIGUSR2 for the time limit
        "hydra.sweep.dir=sweep",
        program=[str(SCRIPT.with_name("app.py"))],
    )
    jobs = {end: sweep.job(f"{{end:{end}{more.get(end, '')}}}") for end in cases}
    for end, signal in (("cancelled", "TERM"), ("out_of_time", "USR2"), ("requeued", "USR2")):
        sweep.until((tmp_path / f"started_{end}").exists)
        signals = [] if end == "cancelled" else [f"--signal={signal}"]
        cluster.call("scancel", *signals, jobs[end])

    assert sweep.wait() == 1
    states = cluster.states()
    assert {end: states[job] for end, job in jobs.items()} == cases
    assert (tmp_path / "started_requeued").read_text() == "0 0\n0 1\n"

    lines = sweep.stderr.splitlines()
    assert lines[0] == f"{len(errors)} of {len(cases)} jobs failed:"
    for line, (end, error) in zip(lines[1:], errors.items(), strict=False):
        job, rank = jobs[end], int(end == "raises_on_rank_1")
        log = tmp_path / "sweep" / "slurm" / job / f"{job}_{rank}_log.out"
        assert line == f"  {job}  +case={{end:{end}{more.get(end, '')}}}  {error}  {log}"
        if "ended without" not in error:
            assert "Traceback (most recent call last)" in log.read_text()
            assert error.rpartition(" ")[2] in log.read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that the jobs below repeat, in this process and from beginning to end."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, *TINY, *LONG, f"hydra.run.dir={run_dir}") == 0
    return run_dir


def test_runs_that_are_taken_down_go_on_and_end_as_if_nothing_had_happened(
    start, cluster, tmp_path, undisturbed
):
    folder = tmp_path / "sweep"
    sweep = start(
        tmp_path,
        "-m",
        *LAUNCHER,
        *TINY,
        *LONG,
        "checkpoint.every_minutes=0.002,10,-1",  # also within epochs; at their end only; a mistake
        "hydra.sweep.dir=sweep",
        "hydra.sweep.subdir=${checkpoint.every_minutes}",
        program=("-c", UNCHECKED + "train.main()"),
    )
    warned, preempted, mistaken = (sweep.job(f"minutes={value}") for value in ("0.002", "10", "-1"))

    sweep.until(lambda: epochs_in(folder / "0.002") >= 2)
    cluster.call("scancel", "--signal=TERM", warned)  # as before a grace time, which is there to be used
    sweep.until(lambda: epochs_in(folder / "0.002") >= 5)
    cluster.call("scancel", "--signal=USR2", warned)  # as before the time limit
    sweep.until(lambda: epochs_in(folder / "10") >= 2)
    everything = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.call("sbatch", *everything, "--wrap=true")

    assert sweep.wait() == 1
    states = cluster.states()
    assert [states[job] for job in (warned, preempted, mistaken)] == ["COMPLETED", "COMPLETED", "FAILED"]
    for job, run_dir in ((warned, folder / "0.002"), (preempted, folder / "10")):
        assert re.search(r"Restarts=[1-9]", cluster.call("scontrol", "show", "job", job))
        assert not list(run_dir.rglob("hpc_ckpt*"))  # Lightning's own requeueing
        assert_same_run(run_dir, undisturbed)
    assert "Caught signal SIGUSR2" in log_of(folder, warned)
    assert "PREEMPTION" in log_of(folder, preempted)
    assert "checkpoint.every_minutes=-1" in log_of(folder, mistaken)
    assert "Traceback" in log_of(folder, mistaken)
    (line,) = [line for line in sweep.stderr.splitlines() if line.startswith(f"  {mistaken}  ")]
    assert "checkpoint.every_minutes=-1" in line
    assert "1 of 3 jobs failed" in sweep.stderr


AND_STAY = UNCHECKED + "import time; train.main(); print('left', flush=True); time.sleep(600)"


def test_a_sweep_that_is_left_alone_loses_nothing_and_reports_itself(
    start, cluster, tmp_path, undisturbed, monkeypatch, capsys
):
    """Its shell is killed, a job is requeued, a run fails and one is cancelled; then it is extended."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", [])  # which extend replaces
    folder = tmp_path / "sweep"
    settings = (*TINY, *LONG[:2], "seed=0,1,-1", "hydra.sweep.dir=sweep")
    detach = ("hydra.launcher.detach=true", "hydra.launcher.report_job.cpus_per_task=1")
    shell = start(tmp_path, "-m", *LAUNCHER, *detach, *settings, program=("-c", AND_STAY))
    shell.until(lambda: "left" in shell.said.splitlines())
    shell.kill()

    def folder_of(seed):
        return next(iter(folder.glob(f"seed={seed}*")), folder)

    requeued, cancelled, mistaken = SubmittedJobs.read(folder).runs
    until(lambda: epochs_in(folder_of(1)) >= 1)
    cluster.call("scancel", cancelled)
    until(lambda: epochs_in(folder_of(0)) >= 2)
    cluster.call("scancel", "--signal=USR2", requeued)  # as before the time limit
    assert sweep_command(["status", str(folder)]) == 0
    report = SubmittedJobs.read(folder).report
    assert f"report: job {report} builds it when all jobs have ended" in capsys.readouterr().out
    states = cluster.states()
    assert [states[job] for job in (requeued, cancelled, mistaken)] == ["COMPLETED", "CANCELLED", "FAILED"]
    assert states[report] == "COMPLETED"  # after the job that was requeued: one run is done
    assert (
        "runs: 1 done, 1 failed, 1 unfinished"
        in (folder / "slurm/report" / f"{report}_0_log.out").read_text()
    )
    assert re.search(r"Restarts=[1-9]", cluster.call("scontrol", "show", "job", requeued))
    assert_same_run(folder_of(0), undisturbed)
    page = folder / "report" / "index.html"
    assert sweep_command(["status", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "runs: 1 done, 2 failed" in said
    assert f"job {cancelled} ended without a result; SLURM says CANCELLED" in said
    assert f"report: {page}" in said

    page.unlink()
    assert not sweep_command(["extend", str(folder), "seed=0,1,2"])
    assert sweep_command(["cancel", str(folder)]) == 0
    states = cluster.states()
    jobs = SubmittedJobs.read(folder)
    ended = [states.get(job) for job in [*jobs.runs, jobs.report]][3:]
    assert len(ended) == 3
    assert {*ended} <= {"CANCELLED", None}  # squeue forgets a waiting part of an array
    assert not sweep_command(["extend", str(folder), "seed=0,1"])
    states = cluster.states()
    jobs = SubmittedJobs.read(folder)
    assert [states[job] for job in [*jobs.runs, jobs.report][5:]] == ["COMPLETED"] * 2
    assert page.is_file()


@pytest.mark.parametrize(
    ("devices", "nodes"), [(2, 1), (1, 2)], ids=["two tasks on a node", "one on each of two nodes"]
)
def test_two_processes_train_one_run(devices, nodes, start, cluster, tmp_path):
    sweep = start(
        tmp_path,
        "-m",
        *LAUNCHER,
        *TINY,
        "trainer.max_epochs=12",
        "measure.epochs=[0,11]",
        "++trainer.strategy=ddp",
        f"trainer.devices={devices}",
        f"++trainer.num_nodes={nodes}",
        "report=false",
        "hydra.sweep.dir=sweep",
        "hydra.sweep.subdir=run",
    )
    run_dir, job = tmp_path / "sweep" / "run", sweep.job("run 0")
    if devices == 2:
        sweep.until(lambda: epochs_in(run_dir) >= 2)
        cluster.call("scancel", "--signal=USR2", job)
    assert sweep.wait() == 0, sweep.said
    assert cluster.states()[job] == "COMPLETED"
    assert json.loads((run_dir / "environment.json").read_text())["devices"] == 2
    assert [row["epoch"] for row in rows(run_dir, "epochs")] == list(range(12))
    assert [row["epoch"] for row in rows(run_dir, "wci")] == [0, 11]
    assert rows(run_dir, "epochs")[-1]["step"] == 36  # of 24 images, half of them on each device
    for rank in range(2):
        log = log_of(tmp_path / "sweep", job, rank)
        assert log.count(f"global_rank={rank}(2)") == 1 + (devices == 2)
        assert log.rstrip().endswith("Exiting after successful completion")


def test_a_request_that_slurm_refuses_is_one_line(cluster, tmp_path, monkeypatch, capsys):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    arguments = ("-m", *LAUNCHER, *TINY, f"hydra.sweep.dir={tmp_path}", "report=false")
    assert command(monkeypatch, *arguments, "hydra.launcher.partition=nowhere") == 1
    error = capsys.readouterr().err
    assert "error: hydra/launcher=slurm: sbatch: error: invalid partition specified: nowhere" in error
    assert not cluster.call("squeue", "--noheader")


CHECK = """
import os, sys
from omegaconf import OmegaConf
from robustdyn.launch.cluster import check_slurm, in_slurm
from robustdyn.errors import ConfigError
cfg = OmegaConf.create({"trainer": {"devices": int(sys.argv[1]), "num_nodes": 1}})
try:
    check_slurm(cfg, os.environ)
    print("accepted as", "SLURM" if in_slurm(os.environ) else "local")
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("options", "devices", "says"),
    [
        ("srun --ntasks-per-node=2 --nodes=1", 2, "accepted as SLURM"),
        ("srun --ntasks=1", 1, "accepted as SLURM"),
        ("salloc --quiet --ntasks=2", 2, "accepted as local"),
        ("srun --ntasks-per-node=2 --nodes=1", 1, "2 full copies of the run would write one folder"),
        ("srun --ntasks=2 --nodes=1", 2, "use --ntasks-per-node=N"),
        ("srun --ntasks=1", 2, "SLURM starts 1 task on each node"),
        ("srun --ntasks-per-node=1 --nodes=2", 1, "trainer.num_nodes=1, but SLURM's job has 2"),
        ("srun --ntasks-per-node=2 --nodes=1 --job-name=bash", 2, "means a terminal session"),
        ("salloc --quiet --job-name=j --ntasks-per-node=2 --nodes=1", 2, "put srun before it"),
        ("salloc --quiet --job-name=j --ntasks-per-node=2 --nodes=1 srun --ntasks=1", 2, "would stay idle"),
    ],
)
def test_ways_to_start_a_run_by_hand(options, devices, says, cluster):
    said = cluster.call(*options.split(), sys.executable, "-c", CHECK, str(devices))
    assert says in said


def test_nothing_is_left_when_the_tests_are_killed(cluster, tmp_path):
    """``cluster`` only says that SLURM is installed; this is another one, whose owner dies without a word."""
    environment = {**os.environ, "PORT": "17817"}
    folder = cluster.folder.parent / "d"
    owner = subprocess.Popen(["sleep", "600"])
    try:
        subprocess.run([SCRIPT, "start", folder, str(owner.pid)], env=environment, check=True, timeout=60)
        daemons = [SCRIPT, "daemons", folder]
        running = subprocess.run(daemons, capture_output=True, text=True, check=True).stdout.split()
        assert running == ["munged", "slurmctld", "slurmd.n1", "slurmd.n2"]
    finally:
        owner.kill()
        owner.wait()
    end = time.monotonic() + 60
    while subprocess.run(daemons, capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < end
        time.sleep(0.2)
