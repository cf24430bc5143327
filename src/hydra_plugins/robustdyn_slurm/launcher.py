"""``hydra/launcher=slurm``: the runs of a sweep as SLURM jobs, and all that failed named at the end.

Hydra looks for launchers in the package ``hydra_plugins`` and imports this module whenever a command starts,
so that what is slow is imported where it is used.
"""

import copy
import json
import logging
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from robustdyn.errors import ConfigError
from robustdyn.launch.cluster import INTERACTIVE, check_tasks
from robustdyn.launch.cluster_jobs import ENDED, SubmittedRun, as_job_return, job_states, report, wait

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

JOB = re.compile(r"\d+(_\d+)?")

REQUEUE = ["scontrol", "requeue"]
END_S = 120.0
"""Seconds within which SLURM ends the processes of a job that it has requeued; its KillWait is 30."""

AT_LEAST_ONE = ("timeout_min", "nodes", "tasks_per_node", "array_parallelism")


class SlurmSweep(Launcher if SlurmLauncher is None else SlurmLauncher):  # type: ignore[misc]
    """Submits every run of a sweep, waits for all, and tells which failed.

    Beyond hydra-submitit-launcher, whose class it extends: a run that raises is a failed job for SLURM, too,
    with the stack trace in its log; the others go on, and all failures are listed at the end; a job that dies
    without a word is noticed, with SLURM's accounting or without; what a job asks for is read from its own
    configuration; what is done already is not queued again; and requests that cannot work are refused.

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
        try:
            _ = ended.return_value  # raises what the run raised, which Hydra had put aside
        except Exception as error:
            _leave_if_requeued(error)
            raise
        return ended

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit, wait, report.

        Returns:
            One result for each run, in order; reading a failed one's value raises ``JobFailed``.

        Raises:
            ConfigError: A request cannot work, SLURM refuses it, or jobs of an earlier command still run.
        """
        configs = [
            self._compose(list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)
        ]
        requests = {i: _request(cfg) for i, cfg in enumerate(configs) if not _is_done(cfg)}
        _refuse_second_writers(requests.values())
        runs = self._submit(requests, job_overrides, initial_job_idx)
        try:
            outcomes = wait(list(runs.values()))
        except KeyboardInterrupt:
            ids = dict.fromkeys(run.job.job_id.partition("_")[0] for run in runs.values())
            log.warning(f"the jobs go on without this command; to end them: scancel {' '.join(ids)}")
            raise
        report(list(runs.values()), outcomes)
        returned = dict(zip(runs, map(as_job_return, runs.values(), outcomes), strict=True))
        return [
            returned.get(i) or JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
            for i, overrides in enumerate(job_overrides)
        ]

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        """The configuration that one run will have."""
        assert self.hydra_context is not None
        cfg: DictConfig = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.job.num = number
        return cfg

    def _submit(
        self,
        requests: Mapping[int, Mapping[str, Any]],
        job_overrides: Sequence[Sequence[str]],
        initial_job_idx: int,
    ) -> dict[int, SubmittedRun]:
        """One array for all runs that ask for the same; in their order."""
        import submitit

        labels = _labels(job_overrides)
        runs: dict[int, SubmittedRun] = {}
        for request, members in _alike(requests):
            arguments = [
                (list(job_overrides[i]), "hydra.sweep.dir", number, str(number), Singleton.get_state())
                for i in members
                for number in [initial_job_idx + i]
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
            for i, job in zip(members, jobs, strict=True):
                runs[i] = SubmittedRun(initial_job_idx + i, tuple(job_overrides[i]), labels[i], job)
                log.info(f"job {job.job_id}: {labels[i]}")
        if len(runs) < len(job_overrides):
            log.info(f"{len(job_overrides) - len(runs)} runs are done already")
        if runs:
            log.info(f"{len(runs)} jobs submitted; their logs: {_jobs_folder(request)}")
        return dict(sorted(runs.items()))


def _leave_if_requeued(error: BaseException | None) -> None:
    """Wait for SLURM to end this process, if the error comes from asking it to requeue a job it already has.

    A job can be preempted between the warning of its time limit and submitit's request. An error left behind
    would count as the end of a run that goes on. submitit asks in a signal handler, so that whatever code the
    signal interrupted may have turned the refusal into an error of its own (``inspect`` does).
    """
    while error is not None and not (
        isinstance(error, subprocess.CalledProcessError) and error.cmd[:2] == REQUEUE
    ):
        error = error.__cause__ or error.__context__
    if error is None:
        return
    state = ["squeue", "--noheader", "--jobs", error.cmd[2], "--format", "%T"]
    found = subprocess.run(state, capture_output=True, text=True, check=False)
    if found.stdout.strip() in ("PENDING", "COMPLETING"):
        time.sleep(END_S)


def _request(cfg: DictConfig) -> dict[str, Any]:
    """What a run with this configuration asks SLURM for."""
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
            f"hydra.launcher.additional_parameters.signal={request['additional_parameters']['signal']} would "
            "replace SIGUSR2, upon which a run is requeued; leave it out: how early it comes is "
            "hydra.launcher.signal_delay_s"
        )
    if request["gpus_per_node"] == "auto":
        on_cpu = OmegaConf.select(cfg, "trainer.accelerator", default=cfg.get("device")) == "cpu"
        request["gpus_per_node"] = None if on_cpu else request["tasks_per_node"]
    return request


def _is_done(cfg: DictConfig) -> bool:
    """Whether the run of an earlier command is there, so that no job need queue to find that out."""
    from robustdyn.records.progress import is_done

    settings = copy.deepcopy(cfg)
    with read_write(settings), open_dict(settings):
        del settings["hydra"]
    present = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(cfg)  # the run's name is of its own choices
        run_dir = Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir
        resolved: Any = OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException:
        return False  # its job will say what is wrong
    finally:
        HydraConfig.instance().cfg = present
    return is_done(run_dir, resolved)


def _refuse_second_writers(requests: Iterable[Mapping[str, Any]]) -> None:
    """Jobs of a command that was interrupted may still write the folders of these runs."""
    folders = {_jobs_folder(request) for request in requests}
    earlier = [path.name for folder in folders for path in folder.glob("*") if JOB.fullmatch(path.name)]
    if not earlier:
        return
    active = sorted(job for job, (state, _) in job_states(earlier).items() if state not in ENDED)
    if active:
        raise ConfigError(
            f"hydra.sweep.dir: jobs of an earlier command still run there ({' '.join(active[:5])}"
            f"{' ...' if len(active) > 5 else ''}); wait until they are over, or end them with scancel"
        )


def _jobs_folder(request: Mapping[str, Any]) -> Path:
    """Where every job has a folder of its own."""
    return Path(request["submitit_folder"].partition("%")[0])


def _alike(requests: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
    """Every different request, and who makes it."""
    groups: dict[str, list[int]] = {}
    for index, request in requests.items():
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
