import json
import os
import re
import shutil
import sys
from contextlib import suppress

import pytest
from omegaconf import OmegaConf

from robustdyn.commands import posterior
from robustdyn.commands.report import main
from robustdyn.report import page as analysis
from tests.records.synthetic import write_run


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "run"
    return write_run(path, epochs=25, measured=(18, 24), trainer__max_epochs=25)


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def test_one_path_gets_its_report_inside(without_figures, run, capsys):
    assert main([str(run)]) == 0
    *numbers, last = capsys.readouterr().out.splitlines()
    assert last == f"report: {run / 'report' / 'index.html'}"
    assert (run / "report" / "index.html").is_file()
    assert [line.partition(":")[0] for line in numbers] == ["test robust loss", "robust loss gap", "WCI"]


def test_several_paths_report_here(without_figures, run, tmp_path, monkeypatch, capsys):
    other = write_run(tmp_path / "other", seed=1, epochs=25, measured=(), trainer__max_epochs=25)
    monkeypatch.chdir(tmp_path)
    assert main([str(run), str(other)]) == 0
    assert (tmp_path / "report" / "index.html").is_file()
    assert "mean of 2 seeds" in capsys.readouterr().out


def test_output_goes_where_it_is_told(without_figures, run, tmp_path):
    assert main([str(run), "--output", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "index.html").is_file()
    assert not (run / "report").exists()


def test_a_mistake_is_one_line_and_status_one(tmp_path, monkeypatch, capsys):
    assert main([str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path}: no run in it")
    assert captured.err.count("\n") == 1
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(OSError, match="no run in it"):
        main([str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n", "not a configuration"),
        (b"\xff\x00", "cannot read"),
        (b"a: " + b"[" * 500, "nested more than 50 deep"),
        (
            b"hydra: {sweeper: {_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper}, "
            b"overrides: {task: ['a=range(5000)', 'b=range(10000)']}}",
            "a sweep of more than 100,000 runs; choose fewer values, or give the run directories alone",
        ),
        (
            b"hydra: {sweeper: {_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper}, "
            b"overrides: {task: ['a=range(10000000000)']}}",
            "a sweep of more than 100,000 runs",
        ),
    ],
)
def test_a_sweep_s_file_that_is_none_is_one_line(run, capsys, content, message):
    (run.parent / "multirun.yaml").write_bytes(content)
    assert main([str(run.parent)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run.parent / 'multirun.yaml'}: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("hydra", ["5", "{sweeper: 5, overrides: 3}", "{sweeper: [], overrides: {task: 1}}"])
def test_a_sweep_s_file_without_a_plan_is_passed_over(without_figures, run, hydra):
    (run.parent / "multirun.yaml").write_text(f"hydra: {hydra}\n")
    assert main([str(run.parent)]) == 0


def test_nothing_of_this_machine_stands_on_the_page(without_figures, run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "a secret of this machine")
    config = run / ".hydra" / "config.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.load(config)) + "leak: ${oc.env:SECRET_TOKEN}\n")
    (run / ".hydra" / "overrides.yaml").write_text("- +leak=${oc.env:SECRET_TOKEN}\n")
    (run.parent / "multirun.yaml").write_text(
        "hydra: {sweeper: {_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper, "
        "params: {seed: '${oc.env:SECRET_TOKEN}'}}, "
        "overrides: {task: ['+leak=${oc.env:SECRET_TOKEN}'], hydra: []}}"
    )
    assert main([str(run.parent)]) == 0
    page = (run.parent / "report" / "index.html").read_text()
    assert "a secret of this machine" not in page
    assert "${oc.env:SECRET_TOKEN}" in page


def test_a_reference_that_is_not_known_is_one_line_before_any_work(run, capsys):
    assert main([str(run), "--reference", "published:cifar11"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: --reference published:cifar11: not known; give one of: published:")
    assert captured.err.count("\n") == 1
    assert not (run / "report").exists()


def test_a_reference_is_held_against_the_run(without_figures, run):
    assert main([str(run), "--reference", "published:cifar10_standard"]) == 0
    assert "Against published:cifar10_standard" in (run / "report" / "index.html").read_text()


def test_help_shows_examples_and_outputs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("--output DIR", "index.html", "a sweep: runs overlaid", "tables/"):
        assert words in text
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_settings_that_follow_from_others_are_shown_resolved(without_figures, run, tmp_path):
    other = write_run(tmp_path / "b", seed=1, epochs=25, measured=(), trainer__max_epochs=25)
    for path in (run, other):
        settings = json.loads((path / ".hydra/config.yaml").read_text())
        settings["decay_epochs"] = "${at_fractions:${trainer.max_epochs},[0.5,0.8]}"
        settings["schedule"]["milestones"] = "${decay_epochs}"
        (path / ".hydra/config.yaml").write_text(json.dumps(settings))
    OmegaConf.clear_resolver("at_fractions")  # as in a new process
    assert main([str(run), str(other), "--output", str(tmp_path / "report")]) == 0
    assert "milestones [12,20]" in (tmp_path / "report/index.html").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"test_robust_loss": 1e308, "train_robust_loss": 1e308},
        pytest.param({"lr": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_a_figure_that_cannot_be_drawn_costs_no_report(rendered, run, tmp_path, monkeypatch, change):
    drawn = ("robust_loss", "learning_rate")
    monkeypatch.setattr(analysis, "FIGURES", [spec for spec in analysis.FIGURES if spec.name in drawn])
    path = run / "records" / "epochs.jsonl"
    rows = [json.loads(line) | change for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main([str(run)]) == 0
    text = (run / "report/index.html").read_text()
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S).group(1)
    json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_reader_that_has_gone_ends_nothing(without_figures, run, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([str(run)]) == 0
    with suppress(BrokenPipeError):
        stream.close()
    assert (run / "report/index.html").is_file()


@pytest.mark.parametrize("table", ["epochs", "rates"])
def test_a_posterior_needs_steps_that_increase(run, table, capsys):
    path = run / "records" / f"{table}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [row["step"] for row in reversed(rows)]
    path.write_text("".join(f"{json.dumps(row | {'step': s})}\n" for row, s in zip(rows, steps, strict=True)))
    assert posterior.main([str(run)]) == 1
    assert f"the steps of the table {table} do not increase" in capsys.readouterr().err
