"""Tests run directories made from logs and tables of other programs."""

import json
import shutil
from pathlib import Path

import pytest

from robustdyn.commands.import_ import main
from robustdyn.errors import RecordError
from robustdyn.records import find_runs, read_table
from robustdyn.records import imported as module
from robustdyn.records.imported import write_runs
from robustdyn.records.progress import run_states
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.training_logs import LoggedRun, read_logs
from robustdyn.report import page as analysis
from robustdyn.report.describe import provenance, what_was_run
from robustdyn.report.page import build_report
from robustdyn.report.statistics import decay_epochs
from robustdyn.studies.decay_timing import STUDY
from tests.records.logs import AWP_ARGUMENTS, log_text, table_text, write_log

NAME = "cifar10_standard/preactresnet18"


def imported(folder, output, **options):
    (path,) = write_runs(read_logs([folder]), output, **options)
    (run,) = find_runs(path)
    return run


def everything_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_log_becomes_a_run_with_our_keys(tmp_path):
    write_log(tmp_path / "logs" / NAME)
    run = imported(tmp_path / "logs", tmp_path / "out")
    assert run.path == (tmp_path / "out" / "robust_overfitting" / NAME).resolve()
    assert run.config == {
        "name": NAME,
        "source": {"study": "robust_overfitting"},
        "seed": 0,
        "data": {"_target_": "robustdyn.data.CIFAR10", "batch_size": 128},
        "model": {"name": "PreActResNet18"},
        "attack": {"norm": "linf", "eps_255": 8, "step_255": 2, "steps": 10},
        "objective": {"_target_": "robustdyn.methods.AdversarialCrossEntropy"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "schedule": {"name": "piecewise"},
        "trainer": {"max_epochs": 200},
    }
    assert run.choices == {"method": "at", "data": "CIFAR10", "schedule": "piecewise"}
    (state,) = run_states([run])
    assert (state.state, state.remark) == ("done", "3 of 200 epochs finished (stopped early)")
    told = dict(provenance([run]))
    assert told["imported.source"] == "robust_overfitting"
    assert "nats" in told["imported.units"]
    assert len(told["imported.sha256"]) == 64


def test_attack_and_method_of_the_awp_study(tmp_path):
    write_log(
        tmp_path / "logs" / "svhn_l2" / "preactresnet18_awp", arguments=AWP_ARGUMENTS | {"fname": "'x'"}
    )
    run = imported(tmp_path / "logs", tmp_path / "out")
    assert run.choices["method"] == "awp"
    assert run.config["perturbation"] == {
        "_target_": "robustdyn.methods.AWP",
        "gamma": 0.01,
        "warmup_epochs": 5,
    }
    assert run.config["data"]["_target_"] == "robustdyn.data.SVHN"
    assert dict(what_was_run([run]))["attack"] == "PGD-10, l∞, ε = 8/255, step 2/255, tested with PGD-20"


SETTINGS = {
    "cutout": ({"cutout": "True", "cutout_len": "14"}, {"data.augment": {"cutout": 14}}),
    "mixup": ({"mixup": "True", "mixup_alpha": "1.4"}, {"data.mixup": 1.4}),
    "l1": ({"l1": "5e-06"}, {"regularizer.l1": 5e-6}),
    "l2": ({"l2": "0.005"}, {"regularizer.weight_decay_on": "weights", "optimizer.weight_decay": 0.005}),
    "validation": ({"val": "True"}, {"data.validation_size": 1000}),
    "one drop": (
        {"lr_schedule": "'onedrop'", "lr_drop_epoch": "60", "lr_one_drop": "0.01"},
        {"schedule.milestones": [60], "schedule.lr_one_drop": 0.01},
    ),
    "wide": ({"model": "'WideResNet'", "width_factor": "2"}, {"model.widen_factor": 2}),
    "wide, early log": ({"model": "None", "fname": "'cifar10/wideresnet_3'"}, {"model.name": "WideResNet"}),
    "l2 threat": ({"norm": "'l_2'", "epsilon": "128"}, {"attack.norm": "l2", "attack.eps_255": 128}),
    "fgsm": (
        {"attack": "'fgsm'", "fgsm_alpha": "0.75"},
        {"attack.steps": 1, "attack.step_255": 6, "attack.evaluation": {"steps": 10, "step_255": 2}},
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_have_the_keys_of_our_configuration(tmp_path, case):
    arguments, wanted = SETTINGS[case]
    write_log(tmp_path / "logs" / "cifar10_x" / "run", arguments=arguments)
    config = imported(tmp_path / "logs", tmp_path / "out").config
    for key, value in wanted.items():
        section, _, leaf = key.partition(".")
        assert config[section][leaf] == value


def test_without_an_attack_nothing_is_robust(tmp_path):
    write_log(tmp_path / "logs" / NAME, arguments={"attack": "'none'"})
    run = imported(tmp_path / "logs", tmp_path / "out")
    epochs = read_table(run.path, "epochs")
    assert epochs.filter(like="robust").isna().all(axis=None)
    assert (epochs["test_clean_error"] == 0.5).all()
    assert run.choices["method"] == "standard"
    assert "attack" not in run.config


def test_a_loss_with_the_l1_penalty_in_it_is_left_out(tmp_path):
    write_log(tmp_path / "logs" / NAME, arguments={"l1": "5e-06"})
    epochs = read_table(imported(tmp_path / "logs", tmp_path / "out").path, "epochs")
    assert epochs[["train_robust_loss", "robust_loss_gap"]].isna().all(axis=None)
    assert epochs[["train_robust_error", "robust_error_gap", "test_robust_loss"]].notna().all(axis=None)


def test_a_table_without_settings_says_only_what_is_known(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text(table_text("a/b", [0.9, 0.6, 0.7]))
    run = imported(table, tmp_path / "out", data="Imagenette")
    assert run.path == (tmp_path / "out" / "mine" / "a" / "b").resolve()
    assert run.config == {
        "name": "a/b",
        "source": {"study": "mine"},
        "seed": 0,
        "data": {"_target_": "Imagenette"},
        "trainer": {"max_epochs": 3},
    }
    summary = json.loads(RunDirectory(run.path).summary.read_text())
    assert (summary["best_on_test"]["epoch"], summary["final"]["epoch"]) == (1, 2)


def test_reports_and_studies_read_imported_runs_and_mark_their_decays(tmp_path, monkeypatch):
    rates = {4: [0.1] * 4 + [0.01] * 4, 6: [0.1] * 6 + [0.01] * 2}
    for at, rate in rates.items():
        errors = [0.9, 0.8, 0.7, 0.6, 0.5, 0.52, 0.54, 0.5 + at / 100]
        table = tmp_path / f"cifar10_{at}.csv"
        table.write_text(table_text(f"at_{at}", errors, rate))
        (path,) = write_runs(read_logs([table], study="mine"), tmp_path / "out", "cifar10")
        assert decay_epochs(read_table(path, "epochs")) == [at]
    answer = STUDY.answer(find_runs(tmp_path / "out"))
    assert set(answer.tables["outcomes"]["setting"]) == {"decay at 4", "decay at 6"}
    monkeypatch.setattr(
        analysis, "FIGURES", [spec for spec in analysis.FIGURES if spec.name == "learning_rate"]
    )
    report = build_report(tmp_path / "out", tmp_path / "report")
    assert not report.skipped
    assert "mine" in report.html.read_text(encoding="utf-8")


# ---------------------------------------------------------------------- what is refused, and leaves nothing


def refused(tmp_path, match, *arguments):
    before = everything_in(tmp_path)
    with pytest.raises(RecordError, match=match) as caught:
        write_runs(*arguments)
    assert "\n" not in str(caught.value)
    assert everything_in(tmp_path) == before


def test_never_over_a_run_that_is_there(tmp_path):
    write_log(tmp_path / "logs" / "cifar10_a" / "one")
    output = tmp_path / "out"
    write_runs(read_logs([tmp_path / "logs"]), output)
    write_log(tmp_path / "logs" / "cifar10_a" / "another")
    runs = read_logs([tmp_path / "logs"])
    refused(tmp_path, "one: is there already; delete it, or choose another --output", runs, output)
    refused(tmp_path, "one: is a run itself", runs[:1], output / "robust_overfitting" / "cifar10_a" / "one")


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a//b", "a/..", ".hidden", "a\\b", "${oc.env:HOME}", "a\nb", ""]
)
def test_names_cannot_leave_the_output_or_refer_to_anything(tmp_path, name):
    refused(tmp_path, "cannot name a folder", _runs([name]), tmp_path / "out", "cifar10")


def _runs(names):
    row = {"epoch": 0}
    return [LoggedRun(name, "mine", Path(__file__), "table of epochs", (row,), {}, "here") for name in names]


def test_runs_of_one_name_or_one_within_another_are_refused(tmp_path):
    refused(tmp_path, "has a run mine/a too", _runs(["a", "a"]), tmp_path / "out", "cifar10")
    refused(tmp_path, "run a/b would lie in run a", _runs(["a/b", "a"]), tmp_path / "out", "cifar10")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"epsilon": "eight"}, "epsilon='eight' is not a number"),
        ({"l2": "nan"}, "l2='nan' is not a number"),
        ({"norm": "'l_1'"}, "norm=l_1; known are l_inf, linf, l_2, l2"),
        ({"attack": "'free'"}, "attack=free; known are pgd, fgsm, none"),
        ({"lr_schedule": "'${oc.env:HOME}'"}, "is not a name"),
        ({"fname": "'x'"}, "nothing says on which data set run ran; say it with --data NAME"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, arguments, reason):
    write_log(tmp_path / "logs" / "run", arguments=arguments)
    refused(tmp_path, reason, read_logs([tmp_path / "logs"]), tmp_path / "out")


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    for name in ("cifar10_a/one", "cifar10_a/two"):
        write_log(tmp_path / "logs" / name)
    runs, output = read_logs([tmp_path / "logs"]), tmp_path / "out"
    output.mkdir()
    written = []

    def summarise(epochs):
        written.append(epochs)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return {}

    monkeypatch.setattr(module, "summarise", summarise)
    refused(tmp_path, "cannot write .No space left on device.; pick another --output", runs, output)
    assert len(written) == 2


# ---------------------------------------------------------------------- the command


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    write_log(tmp_path / "logs" / NAME)
    arguments = [str(tmp_path / "logs"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'robust_overfitting' / NAME}: 3 epochs\n"
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_broken_log_ends_the_command_with_one_line_and_no_file(tmp_path, capsys):
    write_log(tmp_path / "logs" / NAME)
    broken = tmp_path / "logs" / "cifar10_x" / "run"
    shutil.copytree(tmp_path / "logs" / NAME, broken)
    (broken / "output.log").write_text(log_text().replace("0.1", "?"))
    assert main([str(tmp_path / "logs"), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {broken / 'output.log'}, line 3: lr='?' is not a number; expected")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
