"""``robustdyn-sweep``: shows, extends or cancels a sweep that was submitted to SLURM."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from robustdyn.errors import ConfigError, RecordError
from robustdyn.run.config import register_resolvers
from robustdyn.run.status import say, status_of

if TYPE_CHECKING:
    from robustdyn.launch.submitted import SubmittedJobs
    from robustdyn.records.progress import RunState

EPILOG = """\
examples:
  robustdyn-sweep status multirun/study                  every run: done, running, waiting or failed
  robustdyn-sweep extend multirun/study                  submits what is neither done nor running
  robustdyn-sweep extend multirun/study seed=0,1,2,3,4   the sweep's own command, with these settings changed
  robustdyn-sweep cancel multirun/study                  cancels the jobs of the runs and of the report

docs/cluster.md says how to start such a sweep: hydra/launcher=slurm hydra.launcher.detach=true
"""

PLAIN = re.compile(
    r"hydra/launcher=slurm|hydra\.launcher\.(report_job\.)?"
    r"(?!setup|srun_args|submitit_folder|additional_parameters|_)\w+=[\w.,:@%/+-]*"
)
"""What ``extend`` takes of Hydra's settings from a folder: nothing that could hold a command."""
RENEWED = ("hydra.sweep.dir", "hydra.mode", "hydra.callbacks", "hydra.launcher.detach")
PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command and return its exit status: 0, or 1 for an error that the user can correct."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.path.absolute()
    typed: list[str] = arguments.settings
    if typed and arguments.verb != "extend":
        _parser().error(f"{typed[0]}: settings go with extend")
    register_resolvers()  # the sweep's configuration uses them
    if arguments.verb != "extend":
        return status_of(lambda: {"status": _status, "cancel": _cancel}[arguments.verb](folder))
    command: list[str] = []
    if status := status_of(lambda: command.extend(_command(folder, typed))):
        return status
    from robustdyn.commands.train import main as train

    sys.argv = ["robustdyn-train", *command]
    train()
    return None


def _jobs(folder: Path) -> "SubmittedJobs":
    from robustdyn.launch.submitted import JOBS, SubmittedJobs

    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such directory; check the path")
    jobs = SubmittedJobs.read(folder)
    if not jobs.runs:
        raise ConfigError(
            f"{folder}: no jobs were submitted for it (there is no {JOBS}); give the folder of a sweep with "
            "hydra/launcher=slurm"
        )
    return jobs


def _status(folder: Path) -> None:
    from robustdyn.launch.cluster_jobs import ENDED, queue_states
    from robustdyn.launch.states import states_of
    from robustdyn.records.run_directory import RunDirectory

    jobs, states = _jobs(folder), states_of([folder])
    report = [] if jobs.report is None else [jobs.report]
    queue = queue_states([*jobs.runs, *report])
    newest = {run.run: job for job, run in jobs.runs.items()}
    lines = []
    for state in states:
        job = newest.get(state.overrides)
        if job is None or state.state == "done":
            lines.append((str(state.state), f"{state.name}: {state.remark}"))
        else:
            word, remark = _progress(state, job, queue[job], jobs.runs[job].log)
            lines.append((word, f"{state.name}: {remark}"))
    say("runs: " + ", ".join(f"{n} {word}" for word, n in Counter(word for word, _ in lines).items()))
    for word, text in lines:
        say(f"  {word:<10}  {text}")
    page = RunDirectory(folder).report / "index.html"
    if report and queue[report[0]] not in ENDED:
        say(f"report: job {report[0]} builds it when all jobs have ended")
    else:
        say(f"report: {page}" if page.is_file() else f"no report yet; robustdyn-report {folder} builds it")


def _progress(state: "RunState", job: str, in_queue: str, log: str) -> tuple[str, str]:
    """Where a run stands that is not done, in one word, and a remark."""
    from robustdyn.launch.cluster_jobs import ENDED

    ran = "" if state.path is None else f"; {state.remark}"
    if in_queue == "UNKNOWN":
        return state.state, f"job {job}, of which squeue says nothing{ran}"
    if in_queue not in ENDED:
        return "waiting" if in_queue in PENDING else "running", f"job {job}{ran}"
    if state.state == "failed":
        return "failed", f"{state.remark}; log: {log}"
    return "failed", f"job {job} ended without a result; SLURM says {in_queue}{ran}; log: {log}"


def _cancel(folder: Path) -> None:
    from robustdyn.launch.cluster_jobs import cancel, still_active

    jobs = _jobs(folder)
    report = [] if jobs.report is None else [jobs.report]  # first, because it waits only for the others
    active = still_active([*report, *jobs.runs])
    if active:
        cancel(active)
    say(f"{len(active)} jobs cancelled; robustdyn-sweep extend {folder} runs what is not done")


def _command(folder: Path, typed: Sequence[str]) -> list[str]:
    """The arguments with which ``robustdyn-train`` continues a sweep and leaves it to SLURM.

    Raises:
        RecordError: The sweep's configuration cannot be read.
        ConfigError: A setting of the sweep could run a program; the folder may be a stranger's.
    """
    from robustdyn.records.command_line import at
    from robustdyn.records.progress import is_of
    from robustdyn.records.run_directory import MULTIRUN
    from robustdyn.records.untrusted import read_yaml, untrusted_config

    _jobs(folder)
    file = folder / MULTIRUN
    try:
        recorded: Any = read_yaml(file)["hydra"]
        task, hydra = ([str(text) for text in recorded["overrides"][kind]] for kind in ("task", "hydra"))
        elsewhere = [
            s["path"] for s in recorded["runtime"]["config_sources"] if s["provider"] == "command-line"
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file}: cannot read ({error}); give the sweep's own command again") from error
    keys = {_key(text) for text in typed}
    task = [text for text in task if _key(text) not in keys]
    hydra = [text for text in hydra if _key(text) not in keys and not is_of(text, RENEWED)]
    plain: Any = OmegaConf.to_container(untrusted_config(task), resolve=False)  # escapes what looks things up
    refused = [text for text, same in zip(task, plain, strict=True) if text != same or "_target_" in text]
    refused += [text for text in hydra if not PLAIN.fullmatch(text)]
    if elsewhere and "--config-dir" not in keys:
        refused += [f"--config-dir={path}" for path in elsewhere]
    if refused:
        raise ConfigError(
            f"{file}: {refused[0]} could run a program, or depends on something outside the sweep; if you "
            "trust it, type it after the folder"
        )
    return ["-m", *task, *hydra, *typed, at("hydra.sweep.dir", folder), "hydra.launcher.detach=true"]


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robustdyn-sweep",
        description="Shows, extends or cancels a sweep that was left to SLURM.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("status", "extend", "cancel"), help="what to do")
    parser.add_argument("path", type=Path, metavar="DIR", help="the folder of the sweep")
    parser.add_argument(
        "settings", nargs=argparse.REMAINDER, metavar="KEY=VALUE", help="with extend: settings to change"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
