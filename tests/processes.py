"""Runs a test module in two or more processes, waits for them, and collects their results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNCHECKED = (
    "from robustdyn.commands import train; from robustdyn.launch.application import run_app; "
    "train.run_app = lambda *args, check, **kwargs: run_app(*args, **kwargs); "
)
"""The first lines of a program whose sweep starts what its check would refuse; the runs still refuse it."""


def run_processes(module: str, out: Path, count: int, limit: float) -> list[Path]:
    """Run ``python -m module RANK STORE OUT`` in ``count`` processes, numbered as torchrun would.

    Returns:
        ``OUT/RANK.pt`` of each, which it is to write; the test fails with their last words if one is missing.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0, "OMP_NUM_THREADS": 1}
    common |= {"TORCHELASTIC_RUN_ID": 0}  # tells Lightning not to start processes itself
    logs = [(out / f"{rank}.log").open("w") for rank in range(count)]
    processes = []
    try:
        for rank in range(count):
            numbers = common | {"RANK": rank, "LOCAL_RANK": rank}
            environment = os.environ | {name: str(number) for name, number in numbers.items()}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(rank), str(out / "store"), str(out)],
                    cwd=ROOT,
                    env=environment | {"PYTHONPATH": path},
                    stdout=logs[rank],
                    stderr=subprocess.STDOUT,
                )
            )
        for process in processes:
            process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        pass  # missing files make the test fail below
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    paths = [out / f"{rank}.pt" for rank in range(count)]
    if not all(path.exists() for path in paths):
        words = "\n".join((out / f"{rank}.log").read_text()[-3000:] for rank in range(count))
        pytest.fail(f"the processes did not finish:\n{words}")
    return paths
