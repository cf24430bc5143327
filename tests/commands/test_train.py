import itertools
import json
import shutil

import pytest
import torch

from robustdyn.commands.posterior import main as posterior_command
from robustdyn.report import page
from tests.runs import TINY, UNMEASURED, command, rows, tiny_but, weights


def run(monkeypatch, run_dir, *overrides):
    return command(monkeypatch, *TINY, f"hydra.run.dir={run_dir}", "report=false", *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of three epochs, measured after epochs 0 and 2, with a validation split."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(page, "FIGURES", ())
        assert command(monkeypatch, *TINY, f"hydra.run.dir={run_dir}", "data.validation_size=40") == 0
    return run_dir


@pytest.mark.filterwarnings("error:Mean of empty slice")  # a processor has no utilisation to report
def test_leaves_the_unit_of_truth_behind(finished):
    assert (finished / ".hydra" / "config.yaml").exists()
    assert {path.stem for path in (finished / "checkpoints").iterdir()} == {
        "last",
        "best_on_test",
        "best_on_validation",
    }
    assert "1 unfinished" not in (finished / "report" / "index.html").read_text(encoding="utf-8")
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__


def test_records_every_epoch_and_every_measurement(finished):
    epochs = rows(finished, "epochs")
    assert [row["epoch"] for row in epochs] == [0, 1, 2]
    assert [row["lr"] for row in epochs] == pytest.approx([0.1, 0.1, 0.01])  # in force, not the next one
    for row in epochs:
        gap = row["test_robust_loss"] - row["train_robust_loss"]
        assert row["robust_loss_gap"] == pytest.approx(gap, abs=1e-12)
        assert 0 <= row["validation_robust_error"] <= 1
    assert [row["epoch"] for row in rows(finished, "wci")] == [0, 2]
    assert [(row["epoch"], row["index"]) for row in rows(finished, "spectrum")] == [
        (0, 0),
        (0, 1),
        (2, 0),
        (2, 1),
    ]
    assert len(rows(finished, "bounds")) == 2
    rates = [(row["epoch"], row["step"], row["lr"]) for row in rows(finished, "rates")]
    assert rates == [(0, 0, pytest.approx(0.1)), (2, 6, pytest.approx(0.01))]  # three steps an epoch
    assert [(row["epoch"], row["index"]) for row in rows(finished, "posterior")] == [
        (epoch, index) for epoch in range(3) for index in range(2)
    ]


def test_summary_names_how_the_best_was_selected(finished):
    summary = json.loads((finished / "summary.json").read_text())
    epochs = rows(finished, "epochs")
    assert summary["final"]["epoch"] == 2
    best = min(epochs, key=lambda row: row["test_robust_error"])
    assert summary["best_on_test"]["test_robust_error"] == best["test_robust_error"]
    best = min(epochs, key=lambda row: row["validation_robust_error"])
    assert summary["best_on_validation"]["epoch"] == best["epoch"]


def test_the_posterior_can_be_computed_again(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "records" / "posterior.jsonl").unlink()
    assert posterior_command([str(copy)]) == 0
    assert rows(copy, "posterior") == rows(finished, "posterior")
    assert posterior_command([str(copy), "--interpolation", "piecewise_constant"]) == 0
    assert rows(copy, "posterior") != rows(finished, "posterior")
    config = copy / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("momentum: 0.9", "momentum: most"))
    assert posterior_command([str(copy)]) == 1
    said = capsys.readouterr().err
    assert said == f"error: {config}: optimizer.momentum=most must lie in [0, 1); restore it\n"
    (copy / "records" / "spectrum.jsonl").unlink()
    assert posterior_command([str(copy)]) == 1
    assert "no spectrum was recorded" in capsys.readouterr().err


def test_a_sweep_has_no_configuration_to_show(monkeypatch, capsys):
    assert command(monkeypatch, "-m", "seed=0,1", "--cfg", "job") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: Only one of --run")
    assert said.endswith("for --cfg leave out -m, and give every setting one value\n")


def test_group_of_nothing(monkeypatch, capsys):
    assert command(monkeypatch, "model=null") == 1
    assert (
        capsys.readouterr().err
        == "error: a group cannot be null: give it one of its options, which --help lists\n"
    )


def test_measuring_moves_nothing(finished, tmp_path, monkeypatch):
    arguments = ("data.validation_size=40", f"hydra.run.dir={tmp_path}")
    assert command(monkeypatch, *UNMEASURED, *arguments) == 0
    assert rows(tmp_path, "epochs") == rows(finished, "epochs")
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(tmp_path).items())


@pytest.mark.slow
def test_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    # The last epoch is always measured, so that a run stopped after epoch 0 measures at the same epoch.
    assert run(monkeypatch, tmp_path, "data.validation_size=40", "trainer.max_epochs=1", "measure.epochs=[0]",
               "schedule.milestones=[2]") == 0  # fmt: skip
    (tmp_path / "records" / "wci.jsonl").open("a").write('{"epoch": 1, "wci"')  # killed while writing
    assert run(monkeypatch, tmp_path, "data.validation_size=40", "resume=changed") == 0
    tables = ("epochs", "rates", "wci", "layers", "spectrum", "alignment", "bounds", "posterior", "costs")
    for table in tables:
        assert rows(tmp_path, table) == rows(finished, table), table
    # the second measurement started from the first one's eigenvectors, which came with the checkpoint
    eigenproblems = [row for row in rows(finished, "costs") if row["part"] != "all"]
    assert [(row["epoch"], row["warm"]) for row in eigenproblems] == [(0, False)] * 2 + [(2, True)] * 2
    assert all(row["converged"] for row in eigenproblems)
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(tmp_path).items())


def test_fewer_images_than_were_recorded_are_refused_before_training(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    changed = ("data.train_size=70", "trainer.max_epochs=4")
    assert command(monkeypatch, f"resume={tmp_path / 'run'}", *changed) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        "error: data.train_size: the run was trained on 80 images and would continue with 70"
    )
    assert len(rows(tmp_path / "run", "epochs")) == 3


def test_of_several_evaluations_within_an_epoch_the_last_one_counts(tmp_path, monkeypatch):
    for folder, more in (("once", ()), ("twice", ("+trainer.val_check_interval=0.5",))):
        assert command(monkeypatch, *UNMEASURED, *more, f"hydra.run.dir={tmp_path / folder}") == 0
    assert rows(tmp_path / "twice", "epochs") == rows(tmp_path / "once", "epochs")


def test_seeds_differ_and_zero_is_one(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 2**32), ("d", 2**63 - 1)):
        arguments = (f"seed={seed}", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path / name}")
        assert command(monkeypatch, *UNMEASURED, *arguments) == 0
    a, b, *others = (rows(tmp_path / name, "epochs") for name in "abcd")
    assert a == b
    assert all(one != other for one, other in itertools.combinations([a, *others], 2))


def test_a_sweep_ends_in_one_report(without_figures, tmp_path, monkeypatch, capsys):
    short = tiny_but("trainer.max_epochs", "schedule.", "measure.")
    arguments = ("-m", "seed=0,1", "trainer.max_epochs=1", "measure=none", f"hydra.sweep.dir={tmp_path}")
    assert command(monkeypatch, *short, *arguments) == 0
    text = (tmp_path / "report" / "index.html").read_text()
    assert "seed=0" in text
    assert "seed=1" in text
    assert str(tmp_path / "report" / "index.html") in capsys.readouterr().out


MISTAKES = [
    ("optimizer.lrr=0.1", "unknown config key optimizer.lrr; did you mean optimizer.lr"),
    ("+epochs=3", "nothing reads epochs; did you mean decay_epochs or measure.epochs or"),
    ("attack.eps_255=-8", "attack.eps_255=-8 must be a number of at least 0"),
    ("data.batch_size=1000", "data.batch_size=1000 exceeds the 80 training images; choose at most 80"),
    ("measure.examples=81", "measure.examples=81 must be between 1 and the 80 training images"),
    ("measure.epochs=often", "measure.epochs=often cannot be read; use 'every N'"),
    ("data=cifar11", "Available options in 'data'"),
    ("attack.eps_255=[", "cannot read the override attack.eps_255=["),
    ("optimizer._target_=torch.optim.SGDD", "did you mean torch.optim.SGD?"),
    ("optimizer._target_=mypackage.SGD", "there is no module mypackage on Python's path or in"),
    (
        "stopping=early",
        "stopping=early watches held-out training images, but data.validation_size=0; choose a size",
    ),
    ("trainer.accelerator=abacus", "trainer: You selected an invalid accelerator name"),
    ("schedule.milestones=[2,1]", "schedule.milestones must increase strictly from 1 on, got [2, 1]"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_mistake_is_one_clear_line(override, message, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path, override) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "records").exists()


def test_missing_files_are_named_and_the_way_out_too(tmp_path, monkeypatch, capsys):
    overrides = tiny_but("data")
    arguments = ("data=cifar10", f"data.root={tmp_path / 'nothing'}", "data.download=false", "report=false")
    assert command(monkeypatch, *overrides, *arguments, f"hydra.run.dir={tmp_path / 'run'}") == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "nothing") in error
    assert "data=digits" in error
    assert error.count("\n") == 1


def test_full_errors_keep_their_stack_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match=r"attack\.eps_255=-8"):
        run(monkeypatch, tmp_path, "attack.eps_255=-8")


def test_progress_lines_can_be_left_out(tmp_path, monkeypatch, capsys):
    arguments = (*UNMEASURED, "trainer.max_epochs=1")
    assert command(monkeypatch, *arguments, f"hydra.run.dir={tmp_path / 'with'}") == 0
    assert "elapsed" in capsys.readouterr().err
    without = "+trainer.enable_progress_bar=false"
    assert command(monkeypatch, *arguments, without, f"hydra.run.dir={tmp_path / 'without'}") == 0
    assert "elapsed" not in capsys.readouterr().err
