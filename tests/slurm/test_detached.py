"""Sweeps that are left to SLURM, where no SLURM is; on a real one: test_slurm.py."""

import json

import pytest
import yaml

from robustdyn.commands import sweep as sweep_command
from robustdyn.errors import ConfigError
from robustdyn.launch.submitted import SubmittedJobs, SubmittedRun
from tests.runs import TINY, command
from tests.slurm.conftest import program
from tests.slurm.test_launcher import options

DETACH = ("-m", "hydra/launcher=slurm", "hydra.launcher.detach=true")


def queue(programs, **states):
    """What ``squeue`` will say, ``j70_0="RUNNING"`` of job 70_0."""
    program(
        programs, "squeue", "\n".join(f"echo '{job[1:]}|{s}|None'" for job, s in states.items()) or "true"
    )


def said(capsys, *arguments):
    assert sweep_command.main([str(word) for word in arguments]) in (None, 0)
    return capsys.readouterr().out.splitlines()


def test_a_sweep_is_left_to_slurm_extended_and_cancelled(refusing, programs, tmp_path, monkeypatch, capsys):
    folder, cancelled = tmp_path / "sweep", tmp_path / "cancelled"
    program(programs, "scancel", f'echo "$@" >> {cancelled}')
    where = f"hydra.sweep.dir={folder}"
    assert command(monkeypatch, *DETACH, *TINY, where, "hydra.launcher.mem_gb=3", "seed=0,1") == 0
    _, report = sorted(refusing.iterdir())
    asked = options(report)
    assert (
        asked.items()
        >= {
            "dependency": "afterany:70",
            "job-name": "robustdyn-report",
            "ntasks-per-node": "1",
            "mem": "3GB",
        }.items()
    )
    assert not {"array", "gpus-per-node"} & {*asked}

    queue(programs, j70_0="RUNNING", j70_1="PENDING", j71="PENDING")
    assert said(capsys, "status", folder)[-4:] == [
        "runs: 1 running, 1 waiting",
        "  running     seed=0: job 70_0",
        "  waiting     seed=1: job 70_1",
        "report: job 71 builds it when all jobs have ended",
    ]

    queue(programs, j70_0="RUNNING", j70_1="OUT_OF_MEMORY", j71="PENDING")
    (line,) = (line for line in said(capsys, "status", folder) if "seed=1" in line)
    assert line.startswith(
        "  failed      seed=1: job 70_1 ended without a result; SLURM says OUT_OF_MEMORY; log"
    )
    monkeypatch.setattr("sys.argv", [])
    said(capsys, "extend", folder, "seed=0,1,2")
    again, new_report = sorted(refusing.iterdir())[2:]
    assert options(again).items() >= {"array": "0-1%2", "mem": "3GB"}.items()  # seeds 1 and 2
    assert options(new_report)["dependency"] == "afterany:70:72"
    assert cancelled.read_text() == "--quiet 71\n"

    queue(programs, j70_0="RUNNING", j72_0="COMPLETED", j72_1="PENDING", j73="PENDING")
    assert said(capsys, "cancel", folder)[-1].startswith("3 jobs cancelled; robustdyn-sweep extend ")
    assert cancelled.read_text().splitlines()[1:] == ["--quiet 73 70_0 72_1"]


def test_the_report_comes_after_every_batch(refusing, programs, tmp_path, monkeypatch):
    program(programs, "scancel", f'echo "$@" >> {tmp_path / "cancelled"}')
    queue(programs, j70="RUNNING", j72="PENDING")
    where = (f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.sweeper.max_batch_size=1")
    assert command(monkeypatch, *DETACH, *TINY, *where, "seed=0,1") == 0
    asked = [options(script).get("dependency") for script in sorted(refusing.iterdir())]
    assert asked == [None, "afterany:70", None, "afterany:70:72"]
    assert (tmp_path / "cancelled").read_text() == "--quiet 71\n"
    assert SubmittedJobs.read(tmp_path / "sweep").report == "73"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("hydra.launcher.detach=true",),
            "hydra.launcher.detach is a setting of another launcher: give hydra/",
        ),
        (("detach=true",), "give hydra/launcher=slurm hydra.launcher.detach=..."),
        ((*DETACH[1:], "hydra.launcher.detach=2"), "hydra.launcher.detach=2 must be true or false"),
    ],
)
def test_a_sweep_that_cannot_be_left_is_refused(arguments, message, refusing, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "-m", *TINY, f"hydra.sweep.dir={tmp_path / 'sweep'}", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not list(refusing.iterdir())


def recorded(folder, task=(), hydra=(), sources=()):
    """A sweep's folder with this command in it, perhaps a stranger's."""
    SubmittedJobs(folder, {"70_0": SubmittedRun(("seed=0",), "log")}).write()
    overrides = {"task": ["seed=0", *task], "hydra": ["hydra/launcher=slurm", "hydra.mode=MULTIRUN", *hydra]}
    runtime = {"config_sources": [{"path": path, "provider": "command-line"} for path in sources]}
    content = {"hydra": {"overrides": overrides, "runtime": runtime}}
    (folder / "multirun.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize(
    "written",
    [
        {"task": ["optimizer._target_=os.system"]},
        {"task": ["+a={b: {_target_: os.system}}"]},
        {"task": ["name=${oc.env:HOME}"]},
        {"task": ["+a=${oc.create:b}"]},
        {"hydra": ["hydra/launcher=mine"]},
        {"hydra": ["hydra.launcher.setup=[make coffee]"]},
        {"hydra": ["hydra.launcher.report_job={setup: [make coffee]}"]},
        {"hydra": ["hydra.launcher.report_job.setup=x"]},
        {"hydra": ["hydra.launcher.additional_parameters.chdir=/tmp"]},
        {"hydra": ["hydra.launcher.comment='a\nmake coffee'"]},
        {"hydra": ["hydra.launcher._target_=os.system"]},
        {"hydra": ["hydra.searchpath=[file:///tmp]"]},
        {"sources": ["/tmp/conf"]},
    ],
)
def test_nothing_that_a_folder_holds_runs_a_program_unless_it_is_typed(written, tmp_path):
    folder = recorded(tmp_path / "sweep", **written)
    ((kind, (text,)),) = written.items()
    again = ["--config-dir", text] if kind == "sources" else [text]
    with pytest.raises(ConfigError, match="type it after the folder"):
        sweep_command._command(folder, [])
    assert sweep_command._command(folder, again)[-len(again) - 2 : -2] == again


def test_what_a_command_chose_is_kept_unless_it_is_typed(tmp_path):
    task = ["method=at,awp", "decay_epochs=${at_fractions:${trainer.max_epochs},[0.5]}"]
    hydra = [
        "hydra.launcher.partition=gpu",
        "hydra.launcher.report_job.timeout_min=5",
        "hydra.sweep.dir=gone",
    ]
    folder = recorded(tmp_path / "sweep", task, hydra)
    assert sweep_command._command(folder, ["method=trades"]) == [
        "-m", "seed=0", task[1], "hydra/launcher=slurm", *hydra[:2], "method=trades",
        f"hydra.sweep.dir={folder}", "hydra.launcher.detach=true",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no jobs were submitted for it"),
        ({"runs": {"--user=me": {"run": [], "log": ""}}, "report": None}, "jobs.json: not a list of jobs"),
        ({"runs": {"7": {"run": "seed=0", "log": ""}}, "report": None}, "jobs.json: not a list of jobs"),
        ({"runs": {}, "report": "7;8"}, "jobs.json: not a list of jobs"),
    ],
)
def test_a_folder_without_jobs_is_named(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "jobs.json").write_text(json.dumps(content))
    for verb in ("status", "cancel", "extend"):
        assert sweep_command.main([verb, str(tmp_path)]) == 1
        assert message in capsys.readouterr().err


def test_only_extend_takes_settings(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        sweep_command.main(["status", str(tmp_path), "seed=1"])
    assert "seed=1: settings go with extend" in capsys.readouterr().err
