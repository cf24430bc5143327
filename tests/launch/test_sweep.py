"""Sweeps on one machine: what fails, what is skipped, what goes on, and what is said about it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product
from pathlib import Path

import hydra
import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from robustdyn.commands import train
from robustdyn.commands.report import main as report_command
from robustdyn.errors import ConfigError
from robustdyn.launch import sweep as sweeps
from robustdyn.launch.states import plan_of
from robustdyn.records import find_runs
from robustdyn.records.progress import RunStatus, folder_name, identity, is_done, mark_done, run_states
from robustdyn.report import page as analysis
from robustdyn.run.combinations import check_combinations
from robustdyn.run.config import check, config_dir
from robustdyn.run.progress_lines import RunProgress
from tests.records.synthetic import write_run
from tests.runs import TINY, command, compose, rows

QUICK = (
    *(o for o in TINY if not o.startswith(("schedule.", "trainer.max_epochs", "measure."))),
    "attack.steps=1",
    "trainer.max_epochs=2",
    "measure=none",
    "report=false",
)
MEASURED = (
    *(o for o in TINY if not o.startswith(("trainer.max_epochs", "schedule.", "measure.epochs"))),
    "trainer.max_epochs=2",
    "schedule.milestones=[1]",
    "measure.epochs=[0]",
    "report=false",
)
CRASH = "model.num_classes=3"  # labels up to 9: an IndexError in the loss, which no one wrote for the user


def sweep(monkeypatch, folder, *arguments):
    return command(monkeypatch, *QUICK, "-m", *arguments, f"hydra.sweep.dir={folder}")


def states(folder):
    """Overrides that differ, or the folder's name -> state, as the report tells it."""
    return {state.name: state.state for state in sweeps.states_of([Path(folder)])}


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def weights(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}


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


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr(analysis, "FIGURES", ())


# ---------------------------------------------------------------------- failures


def test_failed_runs_stop_no_other_and_all_is_told(tmp_path, monkeypatch, without_figures, capsys):
    arguments = ("seed=0,-1", "model.num_classes=10,3", "report=true")
    assert sweep(monkeypatch, tmp_path, *arguments) == 1
    captured = capsys.readouterr()
    assert states(tmp_path) == {
        "model.num_classes=10 seed=0": "done",
        "model.num_classes=3 seed=0": "failed",
        "model.num_classes=10 seed=-1": "failed",
        "model.num_classes=3 seed=-1": "failed",
    }
    ending = captured.err[captured.err.index("runs: 1 done, 3 failed\n") :].splitlines()
    lines = [" ".join(line.split()) for line in ending]
    crashed = next(
        run.path for run in sweeps.states_of([tmp_path]) if run.name == "model.num_classes=3 seed=0"
    )
    assert lines[1].startswith("failed model.num_classes=3 seed=0: IndexError: Target")
    assert lines[2] == f"traceback: {crashed / 'error.txt'}"
    assert lines[3:5] == [
        f"failed model.num_classes={n} seed=-1: seed=-1 must be a whole number from 0 to 2^63 - 1"
        for n in (10, 3)
    ]
    assert f"hydra.sweep.dir={tmp_path}" in lines[5]
    assert (crashed / "error.txt").read_text().startswith("Traceback (most recent call last)")
    assert "Traceback" not in captured.err
    # the report is of what there is, and names the rest
    assert f"report: {tmp_path / 'report' / 'index.html'}" in captured.out
    page = (tmp_path / "report" / "index.html").read_text()
    assert "1 done, 3 failed." in page
    assert "<strong>failed</strong></td><td>seed=-1 must be a whole number from 0 to 2^63 - 1" in page


def test_a_launcher_that_breaks_off_leaves_a_word_on_all_runs(tmp_path, monkeypatch, capsys):
    launcher = Plugins.instance().class_name_to_class[
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    ]
    launch = launcher.launch

    def broken(self, job_overrides, initial_job_idx):
        launch(self, job_overrides[:1], initial_job_idx)
        raise RuntimeError("a worker process\nwas killed")

    monkeypatch.setattr(launcher, "launch", broken)
    assert command(monkeypatch, "-m", "seed=-1,0", "report=false", f"hydra.sweep.dir={tmp_path}") == 1
    error = capsys.readouterr().err
    assert "runs: 1 failed, 1 missing" in error
    assert error.endswith("error: the sweep ended early: RuntimeError: a worker process was killed\n")
    assert states(tmp_path) == {"seed=-1": "failed", "seed=0": "missing"}


def test_a_launcher_of_a_cluster_sees_the_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeps, "LOCAL", ())
    assert command(monkeypatch, "-m", "seed=-1", "report=false", f"hydra.sweep.dir={tmp_path}") == 1
    error = capsys.readouterr().err
    assert "runs: 1 failed" in error
    assert error.endswith("error: seed=-1 must be a whole number from 0 to 2^63 - 1\n")


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


# ---------------------------------------------------------------------- going on


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
        return command(monkeypatch, *MEASURED, *arguments)

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
        for table in ("epochs", "rates", "wci", "layers", "spectrum", "alignment", "bounds", "posterior"):
            assert rows(swept, table) == rows(tmp_path / str(seed), table), table
        assert all(
            torch.equal(value, weights(swept)[name]) for name, value in weights(tmp_path / str(seed)).items()
        )


def test_more_seeds_run_alone_and_failed_ones_again(tmp_path, monkeypatch, trained):
    """Also with full stack traces, when other runs' errors would end the command."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    short = ("trainer.max_epochs=1", CRASH)
    assert sweep(monkeypatch, tmp_path, "seed=1,0", *short) == 1
    assert states(tmp_path) == {"seed=1": "failed", "seed=0": "failed"}
    for run_dir in tmp_path.glob("*seed*"):  # as if the cause had been mended, for one of them
        if "seed=0" in run_dir.name:
            with RunStatus(run_dir, status(run_dir)["settings"]):
                pass
            assert not (run_dir / "error.txt").exists()
    trained.clear()
    # another order, numbers that have moved, and something that says only where the data lie
    assert sweep(monkeypatch, tmp_path, *short[::-1], "seed=-1,0,1", "logger=none") == 1
    assert trained == [1]
    assert states(tmp_path) == {"seed=-1": "failed", "seed=0": "done", "seed=1": "failed"}
    # of what is asked for now all is done; the others are still told
    assert sweep(monkeypatch, tmp_path, *short, "seed=0") == 0
    assert states(tmp_path) == {"seed=0": "done", "seed=-1": "failed", "seed=1": "failed"}


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
    assert command(monkeypatch, "-m", "method=at,awp", "trainer.max_epochs=0", "report=false") == 1
    (folder,) = (tmp_path / "multirun" / "digits_at").iterdir()
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
        "method=at,trainer.max_epochs=0",
        "method=awp,trainer.max_epochs=0",
        "multirun.yaml",
    ]


# ---------------------------------------------------------------------- what is asked for, and what there is

REQUESTS = [
    (["seed=0,1"], {}),
    (["seed=range(3)", "method=at,awp", "data.train_size=80"], {}),
    (["decay_epochs=[1,2],[3]", "+trainer.limit=2", "seed=1"], {"seed": "0,1,2", "method": "choice(at,awp)"}),
    (["name='a b,c'", "~logger", "schedule.threshold=10,30"], {"seed": 3}),
]


@pytest.mark.parametrize(("typed", "params"), REQUESTS)
def test_a_plan_is_what_hydras_sweeper_makes_of_it(typed, params):
    keys = {"hydra": {
        "overrides": {"task": typed},
        "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": params},
    }}  # fmt: skip
    lines = [f"{key}={value}" for key, value in params.items()] + typed
    ((*batch,),) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(lines), None)
    plan = plan_of(OmegaConf.create(keys))
    assert [list(job) for job in plan.jobs] == batch


def test_other_sweepers_have_no_plan():
    keys = {"hydra": {"overrides": {"task": ["seed=0,1"]}, "sweeper": {"_target_": "some.Optimiser"}}}
    assert plan_of(OmegaConf.create(keys)) is None


keys = st.sampled_from(["seed", "method", "data.root", "decay_epochs", "optimizer.lr"])
requests = st.dictionaries(keys, st.text("0/9a,[]é", min_size=1, max_size=70), max_size=5).map(
    lambda values: [f"{key}={value}" for key, value in values.items()]
)


@given(requests, requests, st.lists(keys, max_size=2), st.lists(keys, max_size=2), st.randoms())
def test_folders_are_named_after_the_request_alone(first, second, swept, more, random):
    name = folder_name(first, ["data"], swept)
    shuffled = random.sample(first, len(first))
    assert folder_name(shuffled, ["data"], swept) == name
    assert len(name.encode()) <= 255
    assert "/" not in name
    same = identity(first, ["data"]) == identity(second, ["data"])
    assert (folder_name(second, ["data"], more) == name) <= same  # no two requests share one
    assert "data.root" not in name


def test_folders_say_what_is_swept_where_they_cannot_say_all():
    request = ("seed=0", *(f"a.very.long.setting.number_{n}=1" for n in range(5)))
    assert re.fullmatch(r"seed=0-[0-9a-f]{8}", folder_name(request, [], ["seed"]))
    assert folder_name(("seed=0", "method=at"), [], []) == "method=at,seed=0"
    assert folder_name((), [], []) == "default"


def planned(folder, typed):
    """A sweep's directory as Hydra leaves it."""
    keys = {"hydra": {
        "overrides": {"task": typed},
        "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None},
    }}  # fmt: skip
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(keys), folder / "multirun.yaml")


def test_the_report_says_where_every_run_stands(tmp_path, without_figures, capsys):
    """Also where some runs left no record at all."""
    folder = tmp_path / "sweep"
    planned(folder, ["method=at,awp", "seed=0,1,2"])
    ready = {"epochs": 40, "measured": ()}
    old = write_run(folder / "a", "at", 0, **ready)  # of a version without a status: all its epochs are there
    assert not (old / "status.json").exists()
    with RunStatus(write_run(folder / "b", "at", 1, epochs=30, measured=()), {}):
        pass
    with suppress(ZeroDivisionError), RunStatus(write_run(folder / "c", "at", 2, epochs=7, measured=()), {}):
        _ = 1 / 0
    RunStatus(write_run(folder / "d", "awp", 0, **ready), {}).__enter__()  # all epochs, but killed at the end
    bare = write_run(folder / "e", "awp", 1, epochs=1, measured=())
    for table in (bare / "records").iterdir():
        table.unlink()
    with suppress(ConfigError), RunStatus(bare, {}):
        raise ConfigError("seed=x is bad; choose\nanother")

    assert report_command([str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:7] == [
        "runs: 2 done, 2 failed, 1 unfinished, 1 missing",
        "  failed      method=at seed=2: ZeroDivisionError: division by zero",
        f"              traceback: {folder / 'c' / 'error.txt'}",
        "  unfinished  method=awp seed=0: 40 of 40 epochs finished",
        "  failed      method=awp seed=1: seed=x is bad; choose another",
        "  missing     method=awp seed=2: was never started",
        out[6],
    ]
    assert out[-1] == f"report: {folder / 'report' / 'index.html'}"
    page = (folder / "report" / "index.html").read_text()
    row = r'<th scope="row" data-value="([^"]*)">.*?</th><td class="pick" data-value="(\w+)"'
    shown = dict(re.findall(row, page))
    assert {name: state for name, state in shown.items() if "seed" in name} == {
        "method=at seed=0": "done",
        "method=at seed=1": "done",
        "method=at seed=2": "failed",
        "method=awp seed=0": "unfinished",
        "method=awp seed=1": "failed",
        "method=awp seed=2": "missing",
    }
    assert "30 of 40 epochs finished (stopped early)" in page


def test_a_sweep_without_a_finished_epoch_still_says_where_it_stands(tmp_path, capsys):
    planned(tmp_path / "sweep", ["seed=0,1"])
    assert report_command([str(tmp_path / "sweep")]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "runs: 2 missing"
    assert captured.err.startswith("error: ")


def test_finished_runs_are_no_news_when_alone(tmp_path, without_figures, capsys):
    run = write_run(tmp_path / "run", epochs=40, measured=())
    assert report_command([str(run)]) == 0
    assert "runs:" not in capsys.readouterr().out
    assert 'id="runs"' not in (run / "report" / "index.html").read_text()
    other = write_run(tmp_path / "other", seed=1, epochs=40, measured=())
    assert report_command([str(run), str(other), "--output", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "runs: 2 done"
    assert "All 2 runs are done." in (tmp_path / "both" / "index.html").read_text()


# ---------------------------------------------------------------------- the status itself

SETTINGS = {"seed": 0, "optimizer": {"lr": 0.1}, "trainer": {"max_epochs": 2}, "report": True}


def test_done_is_said_at_the_end_and_of_the_same_settings(tmp_path):
    with RunStatus(tmp_path, SETTINGS):
        assert status(tmp_path)["state"] == "running"
        assert not is_done(tmp_path, SETTINGS)
    assert is_done(tmp_path, SETTINGS)
    assert is_done(tmp_path, SETTINGS | {"report": False})
    assert not is_done(tmp_path, SETTINGS | {"seed": 1})
    assert not is_done(tmp_path, SETTINGS | {"trainer": {"max_epochs": 3}})  # it is to go on
    assert not is_done(tmp_path / "elsewhere", SETTINGS)
    (tmp_path / "status.json").write_text('{"state": "do')  # of a machine that went down
    assert not is_done(tmp_path, SETTINGS)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_leaves_the_run_to_go_on(end, tmp_path):
    with suppress(BaseException), RunStatus(tmp_path, SETTINGS):
        raise end
    assert status(tmp_path)["state"] == "running"
    assert not (tmp_path / "error.txt").exists()


def test_a_run_can_say_it_is_done_for_its_own_report(tmp_path):
    mark_done(tmp_path)  # not a run that keeps a status: nothing to say
    assert not (tmp_path / "status.json").exists()
    with RunStatus(tmp_path, SETTINGS):
        mark_done(tmp_path)
        assert is_done(tmp_path, SETTINGS)
    assert is_done(tmp_path, SETTINGS)


def test_a_full_disk_does_not_hide_what_went_wrong(tmp_path):
    def fail():
        with RunStatus(tmp_path / "run", SETTINGS):
            shutil.rmtree(tmp_path / "run")  # the status can no longer be written
            raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        fail()


# ---------------------------------------------------------------------- presets

SWEEPS = {"datasets": "data", "seeds": "seed", "decays": "decay_epochs", "thresholds": "schedule.threshold"}


def composed(*overrides):
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose("train", list(overrides), return_hydra_config=True)


def test_presets_of_sweeps_multiply():
    names = list(SWEEPS)
    one_by_one = [plan_of(composed(f"experiment=[{name}]")) for name in names]
    together = plan_of(composed(f"experiment=[{','.join(names)}]"))
    assert [plan.swept for plan in one_by_one] == [(key,) for key in SWEEPS.values()]

    def swept(job):
        return frozenset(text for text in job if text.partition("=")[0] in SWEEPS.values())

    assert [swept(job) for job in together.jobs] == [
        frozenset.union(*map(swept, jobs)) for jobs in product(*(plan.jobs for plan in one_by_one))
    ]
    assert str(composed("experiment=[seeds]", "name=mine").hydra.sweep.dir) == "multirun/mine"


@pytest.mark.slow  # as many compositions as values
@pytest.mark.parametrize("experiment", ["[datasets,seeds,decays,thresholds]", "[schedules]"])
def test_every_value_of_a_preset_composes(experiment):
    plan = plan_of(composed(f"experiment={experiment}"))
    unseen = {text for job in plan.jobs for text in job}
    for job in plan.jobs:
        if unseen & set(job):
            unseen -= set(job)
            cfg = compose(f"experiment={experiment}", *job)
            check(cfg)
            check_combinations(cfg)


# ---------------------------------------------------------------------- several at a time


def processes(pattern):
    """Ids of the processes whose command line holds this."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if pattern in path.read_bytes().replace(b"\0", b" ").decode(errors="ignore"):
                found.append(int(path.parent.name))
    return found


@pytest.fixture
def start():
    """Starts the command as a user does, in a process group of its own that does not outlive the test."""
    started = []

    def begin(folder, *arguments):
        words = [
            sys.executable,
            "-m",
            "robustdyn.commands.train",
            *QUICK,
            "-m",
            f"hydra.sweep.dir={folder}",
        ]
        process = subprocess.Popen(
            [*words, *arguments],
            env={k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "HYDRA_FULL_ERROR")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


PARALLEL = ("hydra/launcher=parallel", "hydra.launcher.n_jobs=2")


@pytest.mark.slow  # 24 runs
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", [(), PARALLEL], ids=["series", "parallel"])
def test_24_runs_of_which_two_fail(launcher, start, tmp_path, monkeypatch):
    """One fails by its setting (seed -1), one by an error of torch's (seed 7, too few classes)."""
    classes = [3 if seed == 7 else 10 for seed in range(23)]
    arguments = (
        "report=true",
        f"+classes={classes}".replace(" ", ""),
        "model.num_classes='${oc.select:classes.${seed},10}'",
        f"seed=-1,{','.join(map(str, range(23)))}",
    )
    folder = tmp_path / "sweep"
    ended = start(folder, *launcher, *arguments)
    out, error = ended.communicate(timeout=900)
    assert ended.returncode == 1, error
    expected = {f"seed={seed}": "failed" if seed in (-1, 7) else "done" for seed in range(-1, 23)}
    assert states(folder) == expected
    ending = [
        " ".join(line.split()) for line in error[error.index("runs: 22 done, 2 failed\n") :].splitlines()
    ]
    assert ending[1] == "failed seed=-1: seed=-1 must be a whole number from 0 to 2^63 - 1"
    assert ending[2].startswith("failed seed=7: IndexError: Target")
    assert ending[3] == f"traceback: {only(folder, 'seed=7') / 'error.txt'}"
    assert len(ending) == 5
    assert f"report: {folder / 'report' / 'index.html'}" in out
    page = (folder / "report" / "index.html").read_text()
    assert "22 done, 2 failed." in page
    losses = {str(rows(only(folder, f"seed={seed}"), "epochs")) for seed in range(23) if seed != 7}
    assert len(losses) == 22
    threads = {json.loads(path.read_text())["threads"] for path in folder.glob("*/environment.json")}
    cores = len(os.sched_getaffinity(0))
    assert max(threads) * (2 if launcher else 1) <= cores  # no oversubscription
    # alone, with as many threads: the same bits
    before = torch.get_num_threads()
    torch.set_num_threads(threads.pop())
    try:
        assert command(monkeypatch, *QUICK, "seed=22", f"hydra.run.dir={tmp_path / 'alone'}") == 0
    finally:
        torch.set_num_threads(before)
    assert rows(only(folder, "seed=22"), "epochs") == rows(tmp_path / "alone", "epochs")
    # again: the failures only
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/records/epochs.jsonl")}
    ended = start(folder, *launcher, *arguments)
    _, error = ended.communicate(timeout=900)
    assert ended.returncode == 1
    assert "runs: 22 done, 2 failed" in error
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.slow  # two sweeps
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", [(), PARALLEL], ids=["series", "parallel"])
def test_control_c_ends_every_process_and_the_sweep_goes_on(launcher, start, tmp_path):
    folder = tmp_path / "sweep"
    arguments = (*launcher, "seed=0,1,2", "trainer.max_epochs=30")
    running = start(folder, *arguments)
    deadline = time.monotonic() + 280
    while not any(folder.glob("*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline, running.communicate(timeout=1)
        assert running.poll() is None
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert error.endswith("interrupted\n")
    assert "Traceback" not in error
    deadline = time.monotonic() + 20
    while processes(str(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(str(folder)) == []
    assert set(states(folder).values()) <= {"done", "unfinished", "missing"}
    assert "unfinished" in states(folder).values()
    ended = start(folder, *arguments)
    _, error = ended.communicate(timeout=900)
    assert ended.returncode == 0, error
    assert set(states(folder).values()) == {"done"}
    for run in find_runs(folder):
        assert [row["epoch"] for row in rows(run.path, "epochs")] == list(range(30))


@pytest.mark.slow  # two sweeps
@pytest.mark.timeout(1800)
def test_a_killed_worker_costs_only_what_it_was_doing(start, tmp_path):
    folder = tmp_path / "sweep"
    arguments = (*PARALLEL, "seed=0,1,2", "trainer.max_epochs=30")
    running = start(folder, *arguments)
    deadline = time.monotonic() + 280
    while not any(folder.glob("*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = [pid for pid in children(running.pid) if b"loky" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 1
    assert "error: the sweep ended early: TerminatedWorkerError" in error
    assert "unfinished" in states(folder).values()
    ended = start(folder, *arguments)
    ended.communicate(timeout=900)
    assert ended.returncode == 0
    assert run_states(find_runs(folder))[0].state == "done"
    assert set(states(folder).values()) == {"done"}


def children(pid):
    """Ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
