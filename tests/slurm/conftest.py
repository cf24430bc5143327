"""A real SLURM on this machine for as long as the tests of this folder run, and a pretended one."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from robustdyn.launch import cluster_jobs

SCRIPT = Path(__file__).with_name("single_node.sh")
TRAIN = ("-c", "from robustdyn.commands.train import main; main()")  # as robustdyn-train does
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PATIENCE_S = 240  # for what takes seconds where nothing else runs
SKIPPED = pytest.StashKey[str]()


class Cluster:
    """The running SLURM.

    Args:
        folder: All its files.
        environment: For processes that use it.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def call(self, *command: str) -> str:
        """Standard output of a command that succeeds."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, folder: Path, *arguments: str, program: Sequence[str] = TRAIN) -> "Driver":
        """Start a Python program that submits jobs and waits for them."""
        return Driver(self, folder, [sys.executable, *program, *arguments])

    def states(self) -> dict[str, str]:
        """How all jobs have ended; results are there a little before their jobs are over."""
        end = time.monotonic() + PATIENCE_S
        while self.call("squeue", "--noheader") and time.monotonic() < end:
            time.sleep(0.2)
        lines = self.call("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)


def until(happened: Callable[[], object], context: Callable[[], str] = str) -> str:
    """Wait for it; what it returned, as text."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        result = happened()
        if result:
            return str(result)
        time.sleep(0.1)
    raise AssertionError(f"nothing happened in {PATIENCE_S} s: {context()}")


class Driver:
    """A command that waits for its jobs, as a process of its own."""

    def __init__(self, cluster: Cluster, folder: Path, command: list[str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {name: folder / f"{name}.txt" for name in ("stdout", "stderr")}
        with self._files["stdout"].open("w") as stdout, self._files["stderr"].open("w") as stderr:
            self._process = subprocess.Popen(
                command, cwd=folder, env=cluster.environment, stdout=stdout, stderr=stderr
            )

    @property
    def said(self) -> str:
        return "".join(file.read_text() for file in self._files.values())

    @property
    def stderr(self) -> str:
        return self._files["stderr"].read_text()

    def job(self, containing: str) -> str:
        """SLURM's number of the job with these overrides, once it is submitted."""

        def find() -> str:
            lines = [line for line in self.said.splitlines() if "job " in line and line.endswith(containing)]
            return lines[0].partition("job ")[2].partition(":")[0] if lines else ""

        return self.until(find)

    def until(self, happened: Callable[[], object]) -> str:
        """Wait for it, while the command runs; what it returned, as text."""

        def look() -> object:
            result = happened()
            assert result or self._process.poll() is None, self.said
            return result

        return until(look, lambda: self.said)

    def wait(self) -> int:
        """Its exit status."""
        return self._process.wait(PATIENCE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def unavailable() -> str | None:
    """Why there can be no SLURM here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    return None


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    reason = unavailable()
    if reason:
        request.config.stash[SKIPPED] = reason
        pytest.skip(f"no SLURM: {reason}")
    # not tmp_path: the path of a socket is at most 108 characters long
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as parent:
        folder = Path(parent) / "c"
        command = [SCRIPT, "start", folder, str(os.getpid())]
        started = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert started.returncode == 0, started.stderr
        environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # nodes n1 and n2 have no address
            "OMP_NUM_THREADS": "1",
            "HYDRA_FULL_ERROR": "",
        }
        try:
            yield Cluster(folder, environment)
        finally:
            subprocess.run([SCRIPT, "stop", folder], check=True, timeout=120)
        assert subprocess.run([SCRIPT, "daemons", folder], capture_output=True, text=True).stdout == ""


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Callable[..., Driver]]:
    """``cluster.start``, for commands that must not outlive the test."""
    drivers: list[Driver] = []

    def start_one(folder: Path, *arguments: str, program: Sequence[str] = TRAIN) -> Driver:
        drivers.append(cluster.start(folder, *arguments, program=program))
        return drivers[-1]

    yield start_one
    for driver in drivers:
        driver.kill()
    cluster.call("scancel", "--quiet", f"--user={os.getuid()}")


def program(folder, name, script):
    """An executable shell script."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder whose programs go before all others."""
    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def refusing(programs, tmp_path, monkeypatch):
    """Programs that look like SLURM's: jobs are taken, kept as files, and fail at once."""
    program(programs, "srun", "exit 1")
    taken = tmp_path / "taken"
    taken.mkdir()
    count = f"$(ls {taken} | wc -l)"
    program(programs, "sbatch", f'n={count}; cp "$1" {taken}/$n; echo "Submitted batch job 7$n"')
    listed = "; ".join(f"echo '7{n}{task}|FAILED|NonZeroExitCode'" for n in "01" for task in ("", "_0", "_1"))
    program(programs, "squeue", listed)
    for name in ("GRACE_S", "SHORTEST_PAUSE_S"):
        monkeypatch.setattr(cluster_jobs, name, 0.0)
    return taken


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A run without SLURM must not be read as a run that passed."""
    reason = config.stash.get(SKIPPED, None)
    if reason:
        terminalreporter.write_line(f"SLURM TESTS SKIPPED, NOT PASSED: {reason}", yellow=True, bold=True)
