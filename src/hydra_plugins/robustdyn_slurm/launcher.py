"""``hydra/launcher=slurm``: the runs of a sweep as SLURM jobs, and all that failed named at the end.

Hydra looks for launchers in the package ``hydra_plugins`` and imports this module whenever a command starts,
so that what is slow is imported where it is used.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from robustdyn.entrypoints.cluster import INTERACTIVE, check_tasks
from robustdyn.entrypoints.cluster_jobs import SubmittedRun, as_job_return, report, wait
from robustdyn.errors import ConfigError

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
except ImportError:  # the extra robustdyn[slurm] is not installed
    SlurmLauncher = None

log = logging.getLogger(__name__)

FOR_EVERY_CLUSTER = {
    "cpus_per_task",
    "gpus_per_node",
    "mem_gb",
    "name",
    "nodes",
    "stderr_to_stdout",
    "tasks_per_node",
    "timeout_min",
}
"""What submitit knows for all kinds of clusters; SLURM's own parameters it wants with ``slurm_`` before."""

AT_LEAST_ONE = ("timeout_min", "nodes", "tasks_per_node", "array_parallelism")


class SlurmSweep(Launcher if SlurmLauncher is None else SlurmLauncher):  # type: ignore[misc]
    """Submits every run of a sweep, waits for all, and tells which failed.

    Beyond hydra-submitit-launcher, whose class it extends: a run that raises is a failed job for SLURM, too,
    with the stack trace in its log; the others go on, and all failures are listed at the end; a job that dies
    without a word is noticed, with SLURM's accounting or without; what a job asks for is read from its own
    configuration; and requests that cannot work are refused before anything is queued.

    Args:
        params: The keys of ``conf/hydra/launcher/slurm.yaml``.
    """

    def __init__(self, **params: Any) -> None:
        if SlurmLauncher is not None:
            super().__init__(**params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over.

        Raises:
            ConfigError: The packages are missing.
        """
        if SlurmLauncher is None:
            raise ConfigError("hydra/launcher=slurm needs more packages; install robustdyn[slurm]")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def __call__(
        self,
        sweep_overrides: list[str],
        job_dir_key: str,
        job_num: int,
        job_id: str,
        singleton_state: dict[type, Singleton],
    ) -> JobReturn:
        """One run, inside its job; what it raises ends the job with a status that SLURM sees."""
        import submitit

        # when a job is requeued, a task that notices the others' end first may leave an error behind
        submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)
        try:
            ended: JobReturn = super().__call__(
                sweep_overrides, job_dir_key, job_num, job_id, singleton_state
            )
        except SystemExit as end:
            if (
                not end.code
            ):  # else SLURM sees it; submitit itself leaves that way when it has requeued the job
                raise RuntimeError("the run ended this process before it was done") from end
            raise
        _ = ended.return_value  # raises what the run raised, which Hydra had put aside
        return ended

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit, wait, report.

        Returns:
            One result for each run, in order; reading a failed one's value raises ``JobFailed``.

        Raises:
            ConfigError: A request cannot work, or SLURM refuses it.
        """
        requests = [self._request(overrides) for overrides in job_overrides]
        runs = self._submit(requests, job_overrides, initial_job_idx)
        try:
            outcomes = wait(runs)
        except KeyboardInterrupt:
            ids = dict.fromkeys(run.job.job_id.partition("_")[0] for run in runs)
            log.warning(f"the jobs go on without this command; to end them: scancel {' '.join(ids)}")
            raise
        report(runs, outcomes)
        return [as_job_return(run, outcome) for run, outcome in zip(runs, outcomes, strict=True)]

    def _request(self, overrides: Sequence[str]) -> dict[str, Any]:
        """What one run asks SLURM for, from the configuration that it will have."""
        assert self.hydra_context is not None
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        launcher = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
        assert isinstance(launcher, dict)
        request = {str(key): value for key, value in launcher.items() if key != "_target_"}
        for key in AT_LEAST_ONE:
            if not isinstance(request[key], int) or request[key] < 1:
                raise ConfigError(f"hydra.launcher.{key}={request[key]} must be a whole number of at least 1")
        check_tasks(cfg, tasks_per_node=request["tasks_per_node"], nodes=request["nodes"])
        if request["name"] in INTERACTIVE:
            raise ConfigError(
                f"hydra.launcher.name={request['name']} means a terminal session to Lightning, which then "
                "overlooks SLURM; choose another name"
            )
        if "signal" in request["additional_parameters"]:
            raise ConfigError(
                f"hydra.launcher.additional_parameters.signal={request['additional_parameters']['signal']} "
                "would replace SIGUSR2, upon which a run is requeued; leave it out: how early it comes is "
                "hydra.launcher.signal_delay_s"
            )
        if request["gpus_per_node"] == "auto":
            on_cpu = OmegaConf.select(cfg, "trainer.accelerator", default=cfg.get("device")) == "cpu"
            request["gpus_per_node"] = None if on_cpu else request["tasks_per_node"]
        return request

    def _submit(
        self,
        requests: Sequence[Mapping[str, Any]],
        job_overrides: Sequence[Sequence[str]],
        initial_job_idx: int,
    ) -> list[SubmittedRun]:
        """One array for all runs that ask for the same."""
        import submitit

        labels = _labels(job_overrides)
        runs: dict[int, SubmittedRun] = {}
        for request, members in _alike(requests):
            arguments = [
                (list(job_overrides[index]), "hydra.sweep.dir", number, str(number), Singleton.get_state())
                for index in members
                for number in [initial_job_idx + index]
            ]
            try:
                executor = submitit.AutoExecutor(
                    folder=request["submitit_folder"],
                    cluster="slurm",
                    slurm_max_num_timeout=request["max_num_timeout"],
                )
                executor.update_parameters(**_submitit_names(request))
                jobs = executor.map_array(self, *zip(*arguments, strict=True))
            except (RuntimeError, TypeError, ValueError, submitit.core.utils.FailedJobError) as error:
                queued = f"; queued already: {' '.join(r.job.job_id for r in runs.values())}" if runs else ""
                raise ConfigError(f"hydra/launcher=slurm: {_refusal(error)}{queued}") from error
            for index, job in zip(members, jobs, strict=True):
                number, overrides = initial_job_idx + index, tuple(job_overrides[index])
                runs[index] = SubmittedRun(number, overrides, labels[index], job)
        ordered = [runs[index] for index in range(len(requests))]
        for run in ordered:
            log.info(f"job {run.job.job_id}: {run.label}")
        log.info(f"{len(runs)} jobs submitted; their logs: {ordered[0].job.paths.folder.parent}")
        return ordered


def _alike(requests: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
    """Every different request, and who makes it."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(json.dumps(request, sort_keys=True), []).append(index)
    for members in groups.values():
        yield requests[members[0]], members


def _labels(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """What tells each run from the others."""
    common = set.intersection(*(set(overrides) for overrides in job_overrides))
    return [
        " ".join(text for text in overrides if text not in common) or f"run {index}"
        for index, overrides in enumerate(job_overrides)
    ]


def _submitit_names(request: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key if key in FOR_EVERY_CLUSTER else f"slurm_{key}": value
        for key, value in request.items()
        if key not in ("submitit_folder", "max_num_timeout")
    }


def _refusal(error: BaseException) -> str:
    """Why nothing was submitted, in one line."""
    if 'Could not detect "srun"' in str(error):
        return "there is no SLURM on this machine (no srun on the PATH); leave it out to run here"
    said = [line for line in str(error).splitlines() if line.startswith("sbatch: ")]
    return " ".join(" ".join(said or [str(error)]).split())
