"""Checks that SLURM started the processes that Lightning expects."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from robustdyn.errors import ConfigError

INTERACTIVE = ("bash", "interactive")
"""With these job names Lightning assumes a terminal session and starts its own processes."""


def check_slurm(cfg: DictConfig, environ: Mapping[str, str]) -> None:
    """Refuse to train where SLURM's tasks and Lightning's devices differ.

    Lightning itself would wait for tasks that were never started, train on fewer devices than requested, or
    let every task train a full copy of the run in the same folder.

    Args:
        cfg: The run's configuration; ``trainer.devices`` and ``trainer.num_nodes`` are read.
        environ: The process's environment variables.

    Raises:
        ConfigError: Names the setting, SLURM's option and the remedy.
    """
    if "SLURM_JOB_ID" not in environ or "SLURM_NTASKS" not in environ:
        return
    tasks = int(environ["SLURM_NTASKS"])
    started = int(environ.get("SLURM_STEP_NUM_TASKS", 1))  # set by srun: how many copies of this command run
    if not in_slurm(environ):
        if started > 1:
            raise ConfigError(
                f"hydra.launcher.name={environ['SLURM_JOB_NAME']} means a terminal session to Lightning: "
                f"each of the {started} tasks would train a full copy of the run in one folder; choose "
                "another name (--job-name)"
            )
        return
    if tasks > 1 and "SLURM_STEP_NUM_TASKS" not in environ:
        raise ConfigError(
            f"trainer.devices: SLURM's job has {tasks} tasks, but this command was started only once and "
            "would wait for the others for ever; put srun before it"
        )
    per_node = environ.get("SLURM_NTASKS_PER_NODE")
    if tasks > 1 and per_node is None:
        raise ConfigError(
            f"trainer.devices: SLURM was asked for {tasks} tasks without saying how many on each node; use "
            "--ntasks-per-node=N (hydra.launcher.tasks_per_node) with N=trainer.devices"
        )
    expected = int(per_node or 1) * int(environ.get("SLURM_NNODES", 1))
    if not tasks == started == expected:
        raise ConfigError(
            f"trainer.devices: SLURM's job is of {expected} tasks (--ntasks-per-node times --nodes), but "
            f"{started} of {tasks} were started, so that devices would stay idle; leave --ntasks out, for "
            "sbatch and for srun"
        )
    check_tasks(cfg, tasks_per_node=int(per_node or 1), nodes=int(environ.get("SLURM_NNODES", 1)))


def check_tasks(cfg: DictConfig, *, tasks_per_node: int, nodes: int) -> None:
    """Refuse a number of tasks that differs from the number of devices.

    Args:
        cfg: The run's configuration. A run without ``trainer`` has one process.
        tasks_per_node: The number of processes that SLURM starts on each node.
        nodes: The number of nodes of the job.

    Raises:
        ConfigError: Names the setting, SLURM's option and the remedy.
    """
    devices = _count(OmegaConf.select(cfg, "trainer.devices", default=1))
    if devices != tasks_per_node:
        tasks = "1 task" if tasks_per_node == 1 else f"{tasks_per_node} tasks"
        consequence = (
            f"{tasks_per_node} full copies of the run would write one folder"
            if devices == 1
            else "the run would wait for devices, or leave some idle"
        )
        raise ConfigError(
            f"trainer.devices={devices}, but SLURM starts {tasks} on each node: "
            f"{consequence}; choose trainer.devices={tasks_per_node}, or "
            f"hydra.launcher.tasks_per_node={devices} (--ntasks-per-node)"
        )
    num_nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    if num_nodes != nodes:
        raise ConfigError(
            f"trainer.num_nodes={num_nodes}, but SLURM's job has {nodes}; choose trainer.num_nodes={nodes}, "
            f"or hydra.launcher.nodes={num_nodes} (--nodes)"
        )


def in_slurm(environ: Mapping[str, str]) -> bool:
    """Whether Lightning assumes that SLURM started this process."""
    return "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in INTERACTIVE


def _count(devices: Any) -> int:
    if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
        return devices
    if isinstance(devices, ListConfig | list):
        return len(devices)
    raise ConfigError(
        f"trainer.devices={devices} leaves open how many there are, but SLURM starts one task for each; "
        "choose their number"
    )
