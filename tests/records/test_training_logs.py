"""Tests the reading of logs and tables of other programs."""

import math
import warnings
from pathlib import Path

import pytest

from robustdyn.errors import RecordError
from robustdyn.records.training_logs import ARGUMENTS, HEADINGS, TABLE_COLUMNS, read_logs
from tests.records.logs import AWP_ARGUMENTS, epoch_line, log_text, stamped, table_text, write_log

EXPECTED = ", ".join(HEADINGS)


def only(path, **options):
    (run,) = read_logs([path], **options)
    return run


def test_a_log_becomes_errors_losses_and_settings(tmp_path):
    run = only(write_log(tmp_path / "cifar10_standard" / "preactresnet18", epochs=2))
    assert (run.name, run.study, run.kind) == ("preactresnet18", "robust_overfitting", "training log")
    assert run.epochs[1] == {
        "epoch": 1,
        "step": None,
        "lr": 0.1,
        "train_clean_loss": 1.5,
        "train_clean_error": 0.6,  # of the accuracy 0.4
        "train_robust_loss": 1.9,
        "train_robust_error": 0.7,
        "test_clean_loss": 1.4,
        "test_clean_error": 0.5,
        "test_robust_loss": 1.8,
        "test_robust_error": 0.75,
        "robust_loss_gap": -0.1,
        "robust_error_gap": 0.05,
        "seconds": 204.5,  # of training and testing
    }
    wanted = {"norm": "l_inf", "epsilon": "8", "lr_schedule": "piecewise", "seed": "0", "pgd_alpha": "2"}
    assert wanted.items() <= run.arguments.items()
    assert "cutout_len" not in run.arguments  # it is None


def test_the_logs_of_the_awp_study_are_known_by_their_arguments(tmp_path):
    path = write_log(tmp_path / "preactresnet18_awp", arguments=AWP_ARGUMENTS)
    run = only(path)
    assert run.study == "awp"
    assert run.arguments["awp_size"] == "0.01"
    assert run.arguments["attack_iters_test"] == "20"
    assert only(path, study="mine").study == "mine"


def test_runs_in_a_folder_are_called_after_the_folders_below_it(tmp_path):
    for name in ("b/two", "a/one"):
        write_log(tmp_path / "logs" / name)
    (tmp_path / "logs" / "notes.txt").write_text("nothing")
    assert [run.name for run in read_logs([tmp_path / "logs"])] == ["a/one", "b/two"]


def test_a_restart_begins_again_and_a_resumed_run_goes_on(tmp_path):
    rate = {"lr_max": "0.3"}
    parts = [log_text(epochs=5, lr=9.0), log_text(epochs=4, lr=0.1)]  # the first one was given up
    parts += [log_text(epochs=3, first=3), log_text(epochs=5, first=3, lr=0.01, arguments=rate)]
    parts += [log_text(epochs=0, arguments={"lr_max": "0.7"})]  # never finished an epoch
    path = tmp_path / "run.log"
    path.write_text("".join(parts))
    run = only(path)
    assert [(row["epoch"], row["lr"]) for row in run.epochs] == [
        *((epoch, 0.1) for epoch in range(3)),
        *((epoch, 0.01) for epoch in (3, 4)),
    ]
    assert run.arguments["lr_max"] == "0.3"
    assert run.name == "run"


def test_validation_belongs_to_the_epoch_above(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(log_text(epochs=1) + stamped("validation 1.25 \t 0.5 \t 1.5 \t 0.25"))
    row = only(path).epochs[0]
    assert [row[f"validation_{name}"] for name in ("clean_loss", "clean_error")] == [1.25, 0.5]
    assert [row[f"validation_{name}"] for name in ("robust_loss", "robust_error")] == [1.5, 0.75]


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(log_text(epochs=0) + epoch_line(0, test=("nan", "0.1", "inf", "0.1")))
    row = only(path).epochs[0]
    assert row["test_clean_loss"] is row["test_robust_loss"] is row["robust_loss_gap"] is None
    assert row["test_robust_error"] == 0.9


def test_a_last_line_that_may_be_cut_off_is_left_out(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(log_text(epochs=2).rstrip("\n")[:-2])  # the last number would read as another one
    with pytest.warns(UserWarning, match="line 4: last line left out"):
        assert len(only(path).epochs) == 1


BROKEN = {
    "a word": (epoch_line(0, rate="fast"), 3, "lr='fast' is not a number"),
    "too few": (stamped("0 \t 1.0 \t 2.0"), 3, "has 3 values"),
    "no epoch": ("", 2, "ends the log before an epoch"),
    "negative": (stamped("0.5" + epoch_line(0).split("] - 0", 1)[1].rstrip()), 3, "not a whole number"),
    "validation": (epoch_line(0) + stamped("validation 1.0 \t 2.0"), 4, "has 2 values"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_log_that_cannot_be_parsed_names_file_line_and_columns(tmp_path, case):
    text, number, reason = BROKEN[case]
    path = tmp_path / "run.log"
    path.write_text(log_text(epochs=0) + text)
    with pytest.raises(RecordError, match=reason) as caught:
        read_logs([path])
    said = str(caught.value)
    assert said.startswith(f"{path}, line {number}")
    assert "expected the columns" in said
    assert "\n" not in said


def test_other_columns_or_none_are_refused(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(log_text(epochs=1).replace("Test Robust Acc", "Test AA"))
    with pytest.raises(
        RecordError, match=f"line 2 has the columns .*Test AA; expected the columns {EXPECTED}"
    ):
        read_logs([path])
    path.write_text(epoch_line(0))
    with pytest.raises(RecordError, match="line 1 is an epoch without the names of its columns"):
        read_logs([path])


def test_an_accuracy_in_per_cent_is_refused(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(log_text(epochs=0) + epoch_line(0, test=("1.0", "53.49", "1.0", "0.5")))
    with pytest.raises(RecordError, match=r"line 3: test_clean_accuracy=53\.49; give it as a fraction"):
        read_logs([path])


def test_arguments_are_text_and_never_run(tmp_path):
    path, touched = tmp_path / "run.log", tmp_path / "touched"
    evil = f"__import__('pathlib').Path({str(touched)!r}).touch()"
    path.write_text(log_text(epochs=1, arguments={"seed": evil, "lr_schedule": f"'{evil}'"}))
    read_logs([path])
    assert not touched.exists()


def test_switched_off_strengths_do_not_count(tmp_path):
    path = tmp_path / "run.log"
    off = {"cutout": "False", "cutout_len": "14", "mixup": "True", "mixup_alpha": "1.4"}
    path.write_text(log_text(epochs=1, arguments=off))
    given = only(path).arguments
    assert "cutout_len" not in given
    assert given["mixup_alpha"] == "1.4"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe\x00", "not a text file"), (b"", "line 1 is not there: the file is empty")],
)
def test_files_that_are_no_text_or_empty_are_refused(tmp_path, content, reason):
    path = tmp_path / "some.log"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=reason):
        read_logs([path])


def test_missing_files_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(RecordError, match="cannot read"):
        read_logs([tmp_path / "absent.log"])
    with pytest.raises(RecordError, match=r"no output\.log in it"):
        read_logs([tmp_path])


def test_a_line_that_no_script_writes_takes_no_time(tmp_path):
    """Brackets that never close, and a word without an end: either takes a careless pattern hours."""
    path = tmp_path / "run.log"
    for arguments in ("a=[," * 10_000, "a" * 40_000):
        path.write_text(stamped(f"Namespace({arguments})") + log_text(epochs=1))
        assert len(only(path).epochs) == 1
    path.write_text(log_text(epochs=1) + stamped("x" * 2**16))
    with pytest.raises(RecordError, match="line 4: is longer than 65536 characters"):
        read_logs([path])


# ---------------------------------------------------------------------- tables


def test_a_table_holds_several_runs_and_their_settings(tmp_path):
    table, runs = tmp_path / "epochs.csv", tmp_path / "runs.csv"
    table.write_text(
        "run,study,epoch,lr,test_robust_accuracy,train_robust_error,test_seconds\n"
        "b,mine,1,0.01,0.25,0.5,3\n"
        "b,mine,0,0.1,0.125,,\n"
        "a,mine,0,,0.5,0.25,\n"
    )
    runs.write_text("run,norm,epsilon,epochs_logged,l1\na,l_2,128,1,None\nb,l_inf,8,2,\nc,l_2,1,9,\n")
    first, second = read_logs([table], runs)
    assert (first.name, first.study, first.kind) == ("b", "mine", "table of epochs")
    assert [(row["epoch"], row["test_robust_error"]) for row in first.epochs] == [(0, 0.875), (1, 0.75)]
    assert [row["robust_error_gap"] for row in first.epochs] == [None, 0.25]
    assert [row["seconds"] for row in first.epochs] == [None, 3.0]
    assert first.arguments == {"run": "b", "norm": "l_inf", "epsilon": "8", "epochs_logged": "2"}
    assert second.arguments["norm"] == "l_2"
    assert second.arguments_at == f"{runs}, line 2"


def test_one_run_is_called_after_its_file(tmp_path):
    table = tmp_path / "my run.csv"
    table.write_text("epoch,test_robust_error\n0,0.5\n")
    run = only(table)
    assert (run.name, run.study, run.arguments) == ("my run", "my run", {})


TABLES = {
    "no header": ("0,0.5\n", "line 1 has the columns 0, 0.5"),
    "a typing error": ("epoch,test_robust_acc\n0,0.5\n", "line 1 has the columns test_robust_acc"),
    "twice": ("epoch,epoch\n0,0\n", "line 1 has the columns epoch, epoch"),
    "no error": ("epoch,lr\n0,0.1\n", "line 2 lacks epoch or test_robust_error"),
    "a value too few": ("epoch,test_robust_error\n0\n", "line 2 has 1 values for 2 columns"),
    "a word": ("epoch,test_robust_error\n0,0.5\n1,bad\n", "line 3: test_robust_error='bad' is not a number"),
    "a quote": ('epoch,test_robust_error\n0,"0.5"x\n', "line 2 is no CSV"),
    "no rows": ("epoch,test_robust_error\n", "line 1 is not followed by an epoch"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_cannot_be_parsed_names_file_line_and_columns(tmp_path, case):
    text, reason = TABLES[case]
    path = tmp_path / "epochs.csv"
    path.write_text(text)
    with pytest.raises(RecordError) as caught:
        read_logs([path])
    assert str(caught.value).startswith(f"{path}, {reason}")
    assert str(caught.value).endswith(f"; expected the columns {', '.join(TABLE_COLUMNS)}")


def test_an_epoch_twice_and_both_kinds_of_one_number_are_refused(tmp_path):
    path = tmp_path / "epochs.csv"
    path.write_text("epoch,test_robust_error\n0,0.5\n0,0.6\n")
    with pytest.raises(RecordError, match="line 3: epoch 0 of the run is there twice"):
        read_logs([path])
    path.write_text("epoch,test_robust_error,test_robust_accuracy\n0,0.5,0.5\n")
    with pytest.raises(RecordError, match="has both test_robust_accuracy and test_robust_error"):
        read_logs([path])


def test_settings_must_fit_the_epochs(tmp_path):
    table, runs = tmp_path / "epochs.csv", tmp_path / "runs.csv"
    table.write_text(table_text("a", [0.5, 0.4]))
    for text, reason in {
        "run\nb\n": "no run a, which",
        "run,epochs_logged\na,3\n": "line 2: epochs_logged=3, but .* has 2 epochs of a",
        "run\na\na\n": "line 3 names a run a second time",
        "run,colour\na,red\n": "line 1 has the columns colour; expected the columns run",
    }.items():
        runs.write_text(text)
        with pytest.raises(RecordError, match=reason):
            read_logs([table], runs)


def test_settings_for_logs_are_refused(tmp_path):
    runs = tmp_path / "runs.csv"
    runs.write_text("run,seed\nrun,1\n")
    with pytest.raises(RecordError, match=r"runs\.csv: is for tables of epochs"):
        read_logs([write_log(tmp_path / "run")], runs)


def test_the_documentation_names_every_column_of_a_table_of_runs():
    page = (Path(__file__).parents[2] / "docs" / "importing.md").read_text(encoding="utf-8")
    assert [name for name in ARGUMENTS if f"`{name}`" not in page] == []
    assert [name for name in TABLE_COLUMNS[:6] if f"`{name}`" not in page] == []


def test_a_study_tells_runs_of_one_name_apart(tmp_path):
    table, runs = tmp_path / "epochs.csv", tmp_path / "runs.csv"
    table.write_text("study,run,epoch,test_robust_error\nx,a,0,0.5\ny,a,0,0.4\n")
    runs.write_text("study,run,lr_max\ny,a,0.2\nx,a,0.1\n")
    assert [(run.study, run.arguments["lr_max"]) for run in read_logs([table], runs)] == [
        ("x", "0.1"),
        ("y", "0.2"),
    ]


def test_errors_have_the_digits_of_their_accuracies(tmp_path):
    path = tmp_path / "epochs.csv"
    path.write_text("epoch,test_robust_accuracy\n0,0.5349\n")
    error = only(path).epochs[0]["test_robust_error"]
    assert error == 0.4651
    assert 1 - 0.5349 != 0.4651  # in binary
    assert math.isclose(1 - error, 0.5349)


def test_a_whole_log_gives_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        only(write_log(tmp_path / "run"))
