"""The runs that a sweep was asked for, what the report says about each of them, and presets of sweeps."""

import re
from contextlib import suppress
from itertools import product

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from robustdyn.commands.report import main as report_command
from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError
from robustdyn.launch.states import plan_of
from robustdyn.records.progress import RunStatus
from robustdyn.run.combinations import check_combinations
from robustdyn.run.config import check
from tests.records.synthetic import write_run
from tests.runs import compose

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
