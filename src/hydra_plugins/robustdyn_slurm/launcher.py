"""``hydra/launcher=slurm``: submits the runs of a sweep as SLURM jobs and lists the failed ones at the end.

Hydra looks for launchers in the package ``hydra_plugins`` and imports this module whenever a command starts.
Slow imports are therefore made where they are used.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from robustdyn.errors import ConfigError
from robustdyn.launch.cluster import INTERACTIVE, check_tasks

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job

    from robustdyn.launch.submitted import SubmittedJobs

try:
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
except ImportError:  # the extra robustdyn[slurm] is not installed
    SlurmLauncher = None

log = logging.getLogger(__name__)

OURS = ("_target_", "detach", "report_job")
"""Settings of the launcher that are no part of a job's request."""
REQUEUE = ["scontrol", "requeue"]
END_S = 120.0
"""SLURM ends the processes of a requeued job well within these seconds: its KillWait is 30 by default."""


class SlurmSweep(Launcher if SlurmLauncher is None else SlurmLauncher):  # type: ignore[misc]
    """Submits every run of a sweep, waits for all of them, and reports which failed.

    This class adds to hydra-submitit-launcher's:

    - A run that raises an error is a failed job for SLURM, too, with the stack trace in its log.
    - The other runs continue, and all failures are listed at the end.
    - A job that dies without a result is noticed, even without SLURM's accounting.
    - The resources of a job are read from the configuration of its run.
    - Runs that are done are not queued again.
    - Requests that cannot work are refused.
    - It can return at once, and leave the report to a job that starts when all others have ended.

    Args:
        params: The keys of ``conf/hydra/launcher/slurm.yaml``.
    """

    def __init__(self, **params: Any) -> None:
        if SlurmLauncher is not None:
            super().__init__(**params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the objects that Hydra passes.

        Raises:
            ConfigError: The packages are missing.
        """
        if SlurmLauncher is None:
            raise ConfigError("hydra/launcher=slurm needs more packages; install robustdyn[slurm]")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def __call__(self, *arguments: Any) -> JobReturn:
        """Run one run inside its job. An error ends the job with a status that SLURM sees."""
        import submitit

        from robustdyn.launch.cluster_jobs import RunFailed
        from robustdyn.records.progress import one_line

        # when a job is requeued, a task may see the others end first and leave an error behind
        submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)
        try:
            ended: JobReturn = super().__call__(*arguments)
            _ = ended.return_value  # raises the error of the run, which Hydra has caught
        except SystemExit as end:
            if end.code:  # SLURM sees it; submitit exits in this way when it has requeued the job
                raise
            raise RuntimeError("the run ended this process before it was done") from end
        except Exception as error:
            _leave_if_requeued(error)
            raise RunFailed(one_line(error)) from error
        return ended

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the runs, wait for them unless ``detach`` is set, and report.

        Returns:
            One result for each run, in order; reading a failed one's value raises ``JobFailed``. With
            ``detach`` the values are None.

        Raises:
            ConfigError: A request cannot work, SLURM refuses it, or jobs of an earlier command still run.
        """
        from robustdyn.launch.cluster_jobs import JobFailed, wait
        from robustdyn.launch.submitted import SubmittedJobs

        assert self.config is not None
        detach = self._detaches()
        runs = {number: list(overrides) for number, overrides in enumerate(job_overrides, initial_job_idx)}
        configs = {number: self._compose(number, overrides) for number, overrides in runs.items()}
        requests = {number: _request(cfg) for number, cfg in configs.items() if not _is_done(cfg)}
        record = SubmittedJobs.read(Path(self.config.hydra.sweep.dir))
        active = _active_jobs(requests.values(), record, detach=detach)
        going_on = {record.runs[job].run for job in active}
        requests = {n: request for n, request in requests.items() if self._run(runs[n]) not in going_on}
        labels = _labels(runs)
        jobs = self._submit(runs, requests, labels, record)
        if detach and (jobs or active):
            self._leave(configs[initial_job_idx], record, [*active, *(job.job_id for job in jobs.values())])
            return [JobReturn(overrides, status=JobStatus.COMPLETED) for overrides in runs.values()]
        try:
            outcomes = wait(jobs)
        except KeyboardInterrupt:
            ids = dict.fromkeys(job.job_id.partition("_")[0] for job in jobs.values())
            log.warning(f"the jobs continue without this command; to end them: scancel {' '.join(ids)}")
            raise
        returned = []
        failed = ""
        for number, overrides in runs.items():
            end = outcomes.get(number) or JobReturn(overrides, status=JobStatus.COMPLETED)
            if not isinstance(end, JobReturn):
                job, label = jobs[number].job_id, labels[number]
                failed += f"  {job}  {label}  {end.error}  {end.log}\n"
                error = JobFailed(f"job {job} ({label}): {end.error}; log: {end.log}")
                end = JobReturn(overrides, status=JobStatus.FAILED, _return_value=error)
            returned.append(end)
        if failed:
            sys.stderr.write(f"{failed.count(chr(10))} of {len(jobs)} jobs failed:\n{failed}")
        return returned

    def _compose(self, number: int, overrides: list[str]) -> DictConfig:
        """Compose the configuration of one run."""
        assert self.hydra_context is not None
        cfg: DictConfig = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.job.num = number
        return cfg

    def _detaches(self) -> bool:
        """Whether this command ends once the jobs are submitted."""
        from robustdyn.launch.states import BASIC_SWEEPER

        assert self.config is not None
        detach = self.params["detach"]
        if not isinstance(detach, bool):
            raise ConfigError(f"hydra.launcher.detach={detach} must be true or false")
        if detach and self.config.hydra.sweeper.get("_target_") != BASIC_SWEEPER:
            raise ConfigError(
                "hydra.launcher.detach=true: this sweeper chooses runs by the results of earlier ones, and "
                "has to wait for them; leave detach out"
            )
        if detach and "sweep_report" not in self.config.hydra.callbacks:
            raise ConfigError("hydra.launcher.detach is a setting of robustdyn-train; leave it out here")
        return detach

    def _run(self, overrides: Sequence[str]) -> tuple[str, ...]:
        """What identifies a run in its sweep."""
        from robustdyn.records.progress import identity

        assert self.config is not None
        return identity(overrides, list(self.config.hydra.job.config.override_dirname.exclude_keys))

    def _submit(
        self,
        runs: Mapping[int, list[str]],
        requests: Mapping[int, Mapping[str, Any]],
        labels: Mapping[int, str],
        record: "SubmittedJobs",
    ) -> "dict[int, Job[JobReturn]]":
        """Submit one array for all runs with the same request; the jobs are in the order of the runs."""
        import submitit

        from robustdyn.launch.cluster_jobs import Queue
        from robustdyn.launch.submitted import SubmittedRun

        submitit.SlurmJob.watcher = Queue()
        alike: dict[str, list[int]] = {}
        for number, request in requests.items():
            alike.setdefault(json.dumps(request, sort_keys=True), []).append(number)
        jobs: dict[int, Job[JobReturn]] = {}
        for numbers in alike.values():
            with _refusals([job.job_id for job in jobs.values()]):
                arguments = [
                    (runs[number], "hydra.sweep.dir", number, str(number), Singleton.get_state())
                    for number in numbers
                ]
                submitted = _executor(requests[numbers[0]]).map_array(self, *zip(*arguments, strict=True))
            for number, job in zip(numbers, submitted, strict=True):
                jobs[number] = job
                record.runs[job.job_id] = SubmittedRun(self._run(runs[number]), str(job.paths.stdout))
                log.info(f"job {job.job_id}: {labels[number]}")
            record.write()
        if len(jobs) < len(runs):
            log.info(f"{len(runs) - len(jobs)} runs are done already, or their jobs continue")
        if jobs:
            log.info(f"{len(jobs)} jobs submitted; their logs: {job.paths.folder.parent}")
        return dict(sorted(jobs.items()))

    def _leave(self, cfg: DictConfig, record: "SubmittedJobs", jobs: Sequence[str]) -> None:
        """Submit the job that builds the report after these jobs; it takes the place of an earlier one."""
        from submitit.core.utils import CommandFunction

        from robustdyn.launch.cluster_jobs import cancel
        from robustdyn.launch.sweep import SweepReport

        SweepReport.running = None  # this command does not report
        report = ""
        if cfg.report:
            its_own: Any = OmegaConf.to_container(cfg.hydra.launcher.report_job, resolve=True)
            request = _request(cfg) | its_own
            arrays = dict.fromkeys(job.partition("_")[0] for job in jobs)
            request["dependency"] = ":".join(["afterany", *arrays])
            request["submitit_folder"] = Path(request["submitit_folder"].partition("%")[0], "report")
            command = [sys.executable, "-m", "robustdyn", "report", str(record.folder.absolute())]
            with _refusals(jobs):
                job = _executor(request).submit(CommandFunction(command))
            earlier, record.report = record.report, job.job_id
            record.write()
            if earlier is not None:
                cancel([earlier])
            report = f"job {job.job_id} builds the report when they have ended; "
        log.info(
            f"{len(jobs)} jobs continue without this command; {report}robustdyn-sweep status {record.folder}"
        )


def _executor(request: Mapping[str, Any]) -> "AutoExecutor":
    import submitit

    executor = submitit.AutoExecutor(
        folder=request["submitit_folder"], cluster="slurm", slurm_max_num_timeout=request["max_num_timeout"]
    )
    known = OmegaConf.structured(BaseQueueConf)  # parameters of every kind of cluster
    parameters = {k: v for k, v in request.items() if k not in ("submitit_folder", "max_num_timeout")}
    executor.update_parameters(**{k if k in known else f"slurm_{k}": v for k, v in parameters.items()})
    return executor


@contextmanager
def _refusals(queued: Sequence[str]) -> Iterator[None]:
    """Make one line of whatever keeps submitit from submitting, with the jobs that are queued already."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        already = f"; queued already: {' '.join(queued)}" if queued else ""
        raise ConfigError(f"hydra/launcher=slurm: {_refusal(error)}{already}") from error


def _leave_if_requeued(error: BaseException | None) -> None:
    """Wait for SLURM to end this process if it refused to requeue the job because it had already done so.

    A job can be preempted between the warning of its time limit and submitit's request. An error left behind
    would count as the end of a run that continues. submitit sends the request in a signal handler, and the
    code that the signal interrupted may turn the refusal into another error, as ``inspect`` does.
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
    """The request to SLURM for a run with this configuration, after checking it."""
    launcher = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    assert isinstance(launcher, dict)
    request = {str(key): value for key, value in launcher.items() if key not in OURS}
    for key in ("timeout_min", "nodes", "tasks_per_node", "array_parallelism"):
        if not isinstance(request[key], int) or request[key] < 1:
            raise ConfigError(f"hydra.launcher.{key}={request[key]} must be a whole number of at least 1")
    check_tasks(cfg, tasks_per_node=request["tasks_per_node"], nodes=request["nodes"])
    if request["name"] in INTERACTIVE:
        raise ConfigError(
            f"hydra.launcher.name={request['name']} tells Lightning that this is a terminal session, and it "
            "would ignore SLURM; choose another name"
        )
    if "signal" in request["additional_parameters"]:
        raise ConfigError(
            f"hydra.launcher.additional_parameters.signal={request['additional_parameters']['signal']} would "
            "replace SIGUSR2, which tells a run that it will be requeued; leave it out, and set how early it "
            "comes with hydra.launcher.signal_delay_s"
        )
    if request["gpus_per_node"] == "auto":
        on_cpu = OmegaConf.select(cfg, "trainer.accelerator", default=cfg.get("device")) == "cpu"
        request["gpus_per_node"] = None if on_cpu else request["tasks_per_node"]
    return request


def _is_done(cfg: DictConfig) -> bool:
    """Whether the run was completed by an earlier command, so that it needs no job."""
    from robustdyn.records.progress import is_done

    present = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(cfg)  # the name of the folder depends on the choices of the run
        task_cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        settings: Any = OmegaConf.to_container(task_cfg, resolve=True)
        return is_done(Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir, settings)
    except OmegaConfBaseException:
        return False  # the job will report the error
    finally:
        HydraConfig.instance().cfg = present


def _active_jobs(
    requests: Iterable[Mapping[str, Any]], record: "SubmittedJobs", *, detach: bool
) -> list[str]:
    """The jobs of earlier commands that have not ended.

    Raises:
        ConfigError: They may write to the same folders, and it is not known which does, or this command would
            have to wait for them.
    """
    from robustdyn.launch.cluster_jobs import still_active
    from robustdyn.launch.submitted import JOB

    folders = {Path(request["submitit_folder"].partition("%")[0]) for request in requests}
    jobs = [path.name for folder in folders for path in folder.glob("*") if JOB.fullmatch(path.name)]
    active = sorted(still_active(dict.fromkeys([*record.runs, *jobs])))
    if any(job not in record.runs for job in active) or (active and not detach):
        raise ConfigError(
            f"hydra.sweep.dir: jobs of an earlier command still run there ({' '.join(active[:5])}"
            f"{' ...' if len(active) > 5 else ''}); wait until they are over, or end them with "
            "robustdyn-sweep cancel or scancel"
        )
    return active


def _labels(runs: Mapping[int, list[str]]) -> dict[int, str]:
    """The overrides of each run that not all runs have."""
    common = set.intersection(*map(set, runs.values()))
    return {
        number: " ".join(text for text in overrides if text not in common) or f"run {index}"
        for index, (number, overrides) in enumerate(runs.items())
    }


def _refusal(error: BaseException) -> str:
    """The reason why nothing was submitted, in one line."""
    if 'Could not detect "srun"' in str(error):
        return "there is no SLURM on this machine (no srun on the PATH); leave it out to run here"
    said = dict.fromkeys(line for line in str(error).splitlines() if line.startswith("sbatch: "))  # each once
    return " ".join(" ".join(said or [str(error)]).split())
