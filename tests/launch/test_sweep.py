"""Sweeps on one machine: what fails, what is skipped, what continues, and what is said about it."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from robustdyn.commands import train
from robustdyn.launch import sweep as sweeps
from robustdyn.launch import sweep_check, swept_groups
from robustdyn.records.progress import Plan, RunStatus
from robustdyn.run.progress_lines import RunProgress
from tests.runs import command, rows, tiny_but, weights

SMALLER = ("model.blocks=[1]", "model.strides=[2]")
QUICK = (
    *tiny_but("schedule.", "trainer.max_epochs", "measure.", "model.blocks", "model.strides"),
    *SMALLER,
    "attack.steps=1",
    "trainer.max_epochs=2",
    "measure=none",
    "report=false",
)
INDEX = ("measure=index", "measure.examples=24", "measure.epochs=[0]")
CRASH = "model.num_classes=3"  # labels up to 9: an IndexError in the loss, which no one wrote for the user


def sweep(monkeypatch, folder, *arguments):
    return command(monkeypatch, *QUICK, "-m", *arguments, f"hydra.sweep.dir={folder}")


def states(folder):
    """Overrides that differ, or the folder's name -> state, as the report tells it."""
    return {state.name: state.state for state in sweeps.states_of([Path(folder)])}


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def only(folder, text):
    """The one run of a sweep whose folder's name holds this."""
    (found,) = (path for path in Path(folder).iterdir() if text in path.name.replace("-", ",").split(","))
    return found


@pytest.fixture
def trained(monkeypatch):
    """Seeds of the runs that got as far as building a network, which is after the data were read."""
    seeds = []
    original = train.build_module

    def counted(cfg, data):
        seeds.append(cfg.seed)
        return original(cfg, data)

    monkeypatch.setattr(train, "build_module", counted)
    return seeds


# ---------------------------------------------------------------------- failures


def test_failed_runs_stop_no_other_and_all_is_told(tmp_path, monkeypatch, without_figures, capsys):
    arguments = ("optimizer.lr=0.05,1e+30", "model.num_classes=10,3", "report=true")
    assert sweep(monkeypatch, tmp_path, *arguments) == 1
    captured = capsys.readouterr()
    assert states(tmp_path) == {
        "model.num_classes=10 optimizer.lr=0.05": "done",
        "model.num_classes=3 optimizer.lr=0.05": "failed",
        "model.num_classes=10 optimizer.lr=1e+30": "failed",
        "model.num_classes=3 optimizer.lr=1e+30": "failed",
    }
    ending = captured.err[captured.err.index("runs: 1 done, 3 failed\n") :].splitlines()
    lines = [" ".join(line.split()) for line in ending]
    crashed = next(run.path for run in sweeps.states_of([tmp_path]) if "classes=3 optimizer.lr=0" in run.name)
    assert lines[1].startswith("failed model.num_classes=3 optimizer.lr=0.05: IndexError: Target")
    assert lines[2] == f"traceback: {crashed / 'error.txt'}"
    diverged = "failed model.num_classes=10 optimizer.lr=1e+30: the training loss is not finite at step 1"
    assert lines[3].startswith(diverged)
    assert lines[4].startswith("failed model.num_classes=3 optimizer.lr=1e+30: IndexError: Target")
    assert f"hydra.sweep.dir={tmp_path}" in lines[6]
    assert (crashed / "error.txt").read_text().startswith("Traceback (most recent call last)")
    assert "Traceback" not in captured.err
    # the report is of what there is, and names the rest
    assert f"report: {tmp_path / 'report' / 'index.html'}" in captured.out
    page = (tmp_path / "report" / "index.html").read_text()
    assert "1 done, 3 failed." in page
    assert "<strong>failed</strong></td><td>the training loss is not finite at step 1" in page


def test_a_launcher_that_breaks_off_leaves_a_word_on_all_runs(tmp_path, monkeypatch, capsys):
    launcher = Plugins.instance().class_name_to_class[
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    ]
    launch = launcher.launch

    def broken(self, job_overrides, initial_job_idx):
        launch(self, job_overrides[:1], initial_job_idx)
        raise RuntimeError("a worker process\nwas killed")

    monkeypatch.setattr(launcher, "launch", broken)
    assert sweep(monkeypatch, tmp_path, "seed=0,1", CRASH) == 1
    error = capsys.readouterr().err
    assert "runs: 1 failed, 1 missing" in error
    assert error.endswith("error: the sweep ended early: RuntimeError: a worker process was killed\n")
    assert states(tmp_path) == {"seed=0": "failed", "seed=1": "missing"}


def test_a_launcher_of_a_cluster_sees_the_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "LOCAL", ())
    assert sweep(monkeypatch, tmp_path, "data.train_size=2000") == 1
    error = capsys.readouterr().err
    assert "runs: 1 failed" in error
    assert error.splitlines()[-1].startswith("error: data.train_size=2000 exceeds")


def test_a_sweeper_that_optimises_is_told_the_metric(tmp_path, monkeypatch, trained):
    sweeper = Plugins.instance().class_name_to_class[
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    ]
    told = []

    def sweep_of(self, arguments):
        jobs = [[*arguments, "seed=0"], [*arguments, "seed=-1"], [*arguments, "seed=0"]]
        for index, job in enumerate(jobs):
            (returned,) = self.launcher.launch([job], initial_job_idx=index)
            told.append(returned.return_value)

    monkeypatch.setattr(sweeper, "sweep", sweep_of)
    sweep(monkeypatch, tmp_path, "metric=best_on_test.test_robust_error")
    (run_dir,) = (path.parent for path in tmp_path.glob("*/summary.json"))
    summary = json.loads((run_dir / "summary.json").read_text())
    wanted = summary["best_on_test"]["test_robust_error"]
    assert told == [wanted, None, wanted]  # a failed run has none; a finished one keeps its own


def test_a_composition_error_is_one_line_as_ever(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "-m", "seed=0,1", "optimizer.lrr=1", f"hydra.sweep.dir={tmp_path}") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: unknown config key optimizer.lrr; did you mean optimizer.lr")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("seed=0,1,0",), "are the same ("),
        (("seed=0", "data.root=/a,/b"), "differ only in data.root='/a' data.root='/b' and"),
    ],
)
def test_runs_that_would_share_a_folder_are_refused(arguments, reason, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "-m", *arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: two runs of the sweep")
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


# ---------------------------------------------------------------------- refused before the first run


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("seed=0,1", "attack.steps=-1"), "attack.steps=-1 must be"),
        (("optimizer.lr=0.1,-1", "seed=0,1"), "optimizer.lr=-1 must be a positive number"),
        (("objective=at,mart", "data.mixup=0,0.5", "metric=best"), "metric=best is not a number"),
        (("seed=0,1", "ensemble=default", "ensemble.replicas=0"), "ensemble.replicas=0 must be"),
    ],
)
def test_a_value_that_no_run_can_have_is_refused(arguments, reason, tmp_path, monkeypatch, trained, capsys):
    assert command(monkeypatch, "-m", *arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {reason}")
    assert error.endswith(" (no run of the sweep was started)")
    assert not trained
    assert not (tmp_path / "sweep").exists()


def test_a_value_that_suits_some_runs_only_is_not_refused(tmp_path, monkeypatch, trained, capsys):
    """Labels that mixup has mixed suit no MART, but the other three runs of the grid can do."""
    grid = ("objective=mart,at", "data.mixup=0.5,0", CRASH)
    assert sweep(monkeypatch, tmp_path, *grid) == 1
    assert len(trained) == 3
    assert "data.mixup=0.5 mixes labels" in capsys.readouterr().err


def test_a_value_is_possible_if_any_of_its_runs_is(monkeypatch):
    """However many have it: method=at suits the last of 300 seeds only, and no seed is at fault."""
    jobs = [(f"method={method}", f"seed={seed}") for method in ("at", "awp") for seed in range(300)]
    suits = {*jobs[299:]}

    def refusal(config, job, check):
        return None if job in suits else f"refused {' '.join(job)}"

    monkeypatch.setattr(sweep_check, "_refusal", refusal)
    assert sweep_check.impossible_value(None, Plan(tuple(jobs), (), ()), None) is None
    suits.remove(jobs[299])
    refused = sweep_check.impossible_value(None, Plan(tuple(jobs), (), ()), None)
    assert refused == "refused method=at seed=0"


# ---------------------------------------------------------------------- continuing


@pytest.fixture
def restored_signals():
    """Lightning stops listening to Ctrl-C once it came."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def test_an_interrupted_sweep_goes_on_and_equals_runs_alone(
    tmp_path, monkeypatch, trained, restored_signals, capsys
):
    def measured(*arguments):
        return command(monkeypatch, *QUICK, *INDEX, *arguments)

    folder = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    with monkeypatch.context() as patched:
        shown = RunProgress.on_train_epoch_end

        def interrupt(self, trainer, pl_module):
            shown(self, trainer, pl_module)
            if trained[-1] == 1 and trainer.current_epoch == 1:
                raise KeyboardInterrupt

        patched.setattr(RunProgress, "on_train_epoch_end", interrupt)
        assert measured("-m", "seed=0,1,2", folder) == 130
    assert states(tmp_path / "sweep") == {"seed=0": "done", "seed=1": "unfinished", "seed=2": "missing"}
    error = capsys.readouterr().err
    assert "runs: 1 done, 1 unfinished, 1 missing" in error
    assert error.endswith("interrupted\n")

    trained.clear()
    assert measured("-m", "seed=0,1,2", folder) == 0
    assert trained == [1, 2]  # seed 0 is a seed, and done
    assert set(states(tmp_path / "sweep").values()) == {"done"}

    for seed in (1, 2):  # the one that went on, and one after others in the same process
        assert measured(f"seed={seed}", f"hydra.run.dir={tmp_path / str(seed)}") == 0
        swept = only(tmp_path / "sweep", f"seed={seed}")
        for table in ("epochs", "rates", "wci", "layers"):
            assert rows(swept, table) == rows(tmp_path / str(seed), table), table
        assert all(
            torch.equal(value, weights(swept)[name]) for name, value in weights(tmp_path / str(seed)).items()
        )


@pytest.mark.slow
def test_more_seeds_run_alone_and_failed_ones_again(tmp_path, monkeypatch, trained):
    """Also with full stack traces, when other runs' errors would end the command."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    short = ("trainer.max_epochs=1", CRASH)
    assert sweep(monkeypatch, tmp_path, "seed=1,0", *short) == 1
    assert states(tmp_path) == {"seed=1": "failed", "seed=0": "failed"}
    for run_dir in tmp_path.glob("*seed*"):  # as if the cause were removed, for one of them
        if "seed=0" in run_dir.name:
            with RunStatus(run_dir, status(run_dir)["settings"]):
                pass
            assert not (run_dir / "error.txt").exists()
    trained.clear()
    # another order, numbers that have moved, and something that says only where the data lie
    assert sweep(monkeypatch, tmp_path, *short[::-1], "seed=2,0,1", "logger=none") == 1
    assert trained == [2, 1]
    assert states(tmp_path) == {"seed=2": "failed", "seed=0": "done", "seed=1": "failed"}
    # of what is asked for now all is done; the others are still told
    assert sweep(monkeypatch, tmp_path, *short, "seed=0") == 0
    assert states(tmp_path) == {"seed=0": "done", "seed=2": "failed", "seed=1": "failed"}


@pytest.mark.slow  # two sweeps
def test_early_stopping_is_an_end(tmp_path, monkeypatch, trained):
    early = ("stopping=early", "stopping.patience=1", "stopping.min_delta=1", "data.validation_size=40")
    arguments = ("seed=0", "trainer.max_epochs=9", *early)
    assert sweep(monkeypatch, tmp_path, *arguments) == 0
    (state,) = sweeps.states_of([tmp_path])
    assert (state.state, state.epochs, state.remark) == ("done", 2, "2 of 9 epochs finished (stopped early)")
    assert sweep(monkeypatch, tmp_path, *arguments) == 0
    assert trained == [0]


def test_all_runs_of_a_sweep_lie_in_its_directory_whatever_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # as when the command starts
    assert command(monkeypatch, "-m", "method=at,awp", CRASH, "report=false") == 1
    (folder,) = (tmp_path / "multirun" / "digits_at").iterdir()
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
        "method=at,model.num_classes=3",
        "method=awp,model.num_classes=3",
        "multirun.yaml",
    ]


def test_settings_of_a_swept_group_need_not_exist_for_its_default(monkeypatch, tmp_path, capfd):
    """Digits, the default of ``data``, have no root."""
    missing = tmp_path / "nowhere"
    arguments = ("data=cifar10,svhn", f"data.root={missing}", "data.download=false")
    assert sweep(monkeypatch, tmp_path / "swept", *arguments) == 1
    found = {state.name: state.error for state in sweeps.states_of([tmp_path / "swept"])}
    assert set(found) == {"data=cifar10", "data=svhn"}
    assert all("nowhere" in error for error in found.values())
    assert "unknown config key" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("typed", "composed"),
    [
        ("data=cifar10,svhn", "data=cifar10"),
        ("experiment=seeds,decays", "experiment=seeds,decays"),  # each brings a sweep of its own
        ("seed=0,1", "seed=0,1"),  # no group
        ("data=svhn", "data=svhn"),
    ],
)
def test_a_sweep_is_composed_with_the_first_choice_of_a_group(typed, composed):
    groups = SimpleNamespace(group_exists=lambda name: name in ("data", "experiment"))
    (override,) = OverridesParser.create().parse_overrides([typed])
    found = swept_groups._first(override, groups)
    values = found.sweep_string_iterator() if found.is_sweep_override() else [found.value()]
    assert f"{found.key_or_group}={','.join(values)}" == composed
