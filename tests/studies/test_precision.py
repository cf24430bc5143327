"""Differences between ways of execution against SciPy, and curves with a known answer."""

import numpy as np
import pytest
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records import RunRecords, find_runs
from robustdyn.studies.precision import STUDY
from tests.records.synthetic import config, write_hydra
from tests.runs import compose

EPOCHS = 12
REFERENCE = np.array([[2.0, 2.1, 1.9]]).repeat(EPOCHS, axis=0) - 0.1 * np.arange(EPOCHS)[:, None]


def write_runs(folder, execution, test_loss, *, channels_last=True, seeds=(0, 1, 2), data="Digits"):
    """A run per column of ``test_loss`` (epochs, seeds), known every second epoch; half is its train loss."""
    for seed, curve in zip(seeds, np.transpose(test_loss), strict=True):
        settings = config(seed=seed, trainer__max_epochs=EPOCHS)
        settings["data"]["_target_"] = f"robustdyn.data.{data}"
        settings["execution"] = {"channels_last": channels_last, "compile": "none"}
        path = folder / f"{data}_{execution}_{channels_last}_{seed}"
        write_hydra(path, settings, choices={"execution": execution})
        records = RunRecords(path)
        for epoch, loss in enumerate(curve):
            row = {"epoch": epoch, "step": epoch + 1, "lr": 0.1, "seconds": 1.0}
            for split, value in (("train", loss / 2), ("test", loss if epoch % 2 else None)):
                for inputs in ("robust", "clean"):
                    row[f"{split}_{inputs}_loss"] = value
                    row[f"{split}_{inputs}_error"] = None if value is None else value / 10
            gap = {"robust_loss_gap": None, "robust_error_gap": None}
            records.append("epochs", row | gap)


def moved(by):
    """The reference's curves, each seed moved by its own amount from epoch 6 on."""
    return REFERENCE + np.where(np.arange(EPOCHS) >= 6, 1.0, 0.0)[:, None] * np.array(by)


def tables_of(folder):
    found = STUDY.answer(find_runs(folder)).tables
    by_outcome = (found[name].set_index(["outcome", "setting"]) for name in ("outcomes", "differences"))
    return (*by_outcome, found["curves"].set_index(["quantity", "setting"]))


def test_differences_are_those_of_a_paired_t_test(tmp_path):
    shift = [0.01, -0.02, 0.04]
    write_runs(tmp_path, "default", REFERENCE)
    write_runs(tmp_path, "bf16", moved(shift))
    write_runs(tmp_path, "default", moved([0.1, 0.1, 0.1001]), channels_last=False)
    outcomes, differences, _ = tables_of(tmp_path)
    expected = stats.ttest_rel(REFERENCE[-1] + shift, REFERENCE[-1]).confidence_interval(0.95)
    for outcome in ("best robust loss", "final robust loss"):  # the curves fall to the end
        row = differences.loc[outcome, "bf16"]
        assert row["mean"] == pytest.approx(np.mean(shift), rel=1e-10)
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), rel=1e-8)
        row = outcomes.loc[outcome, "bf16"]
        assert row["mean"] == pytest.approx(np.mean(REFERENCE[-1] + shift), rel=1e-10)
        error = stats.sem(REFERENCE[-1] + shift)
        assert row["high"] - row["mean"] == pytest.approx(stats.t.ppf(0.975, 2) * error, rel=1e-8)
    assert differences.loc["final robust error", "bf16"]["mean"] == pytest.approx(
        np.mean(shift) / 10, rel=1e-8
    )
    train = differences.loc["final train robust loss", "bf16"]
    assert train["mean"] == pytest.approx(np.mean(shift) / 2, rel=1e-8)
    assert differences.loc["final robust loss", "default, channels first"]["low"] > 0
    assert set(differences["baseline"]) == {"default"}
    assert not any("WCI" in outcome for outcome, _ in outcomes.index)  # nothing was measured


def test_how_far_curves_part(tmp_path):
    shift = [0.01, 0.02, 0.04]
    write_runs(tmp_path, "default", REFERENCE)
    write_runs(tmp_path, "bf16", moved(shift))
    write_runs(tmp_path, "fast", moved([0.02, 0.021, 0.022]))
    write_runs(tmp_path, "equal", REFERENCE)
    *_, curves = tables_of(tmp_path)
    ratio = abs(stats.ttest_1samp(shift, 0).statistic)
    for quantity, epochs in (("train_robust_loss", EPOCHS), ("test_robust_loss", EPOCHS // 2)):
        row = curves.loc[quantity, "bf16"]
        assert row["epochs"] == epochs
        assert row["largest"] == pytest.approx(ratio, rel=1e-6)
        assert row["at"] >= 6
        assert 2 * epochs * stats.t(2).sf(row["limit"]) == pytest.approx(0.05, rel=1e-6)
        assert row["outside"] == 0  # 3.3 < 4.3
        assert curves.loc[quantity, "equal"]["largest"] == 0
    assert curves.loc["train_robust_loss", "fast"]["outside"] == 0.5


def test_a_missing_seed_and_a_lone_one(tmp_path):
    write_runs(tmp_path, "default", REFERENCE)
    write_runs(tmp_path, "bf16", moved([0.1, 0.3, 0.0])[:, :2], seeds=(0, 1))
    write_runs(tmp_path, "fast", moved([0.5, 0.0, 0.0])[:, :1], seeds=(0,))
    _, differences, curves = tables_of(tmp_path)
    two, one = (differences.loc["final robust loss", name] for name in ("bf16", "fast"))
    assert (two["seeds"], two["mean"]) == (2, pytest.approx(0.2))
    assert (one["seeds"], one["mean"]) == (1, pytest.approx(0.5))
    assert np.isnan(one["low"])
    assert set(curves.index.get_level_values("setting")) == {"bf16"}


def test_finds_and_draws_every_data_set(tmp_path):
    for data in ("Digits", "CIFAR10"):
        write_runs(tmp_path, "default", REFERENCE, data=data)
        write_runs(tmp_path, "bf16", moved([0.0, 0.1, 0.05]), data=data)
    found = STUDY.answer(find_runs(tmp_path))
    assert found.findings == [
        "Of 14 differences to execution=default, paired by seed, 0 have a 95 % interval that leaves out 0.",
        "Of 4 curves, 0 come further apart than 5 % of equal ones would.",
    ]
    (picture,) = found.pictures
    axes = picture.draw(picture.data).axes
    assert len(axes) == 6
    for ax, first in zip(
        axes[:2], (0, 1), strict=True
    ):  # mean of three seeds, of the train and the test loss
        wanted = REFERENCE[first :: first + 1].mean(axis=1) / (2 - first)
        np.testing.assert_allclose(ax.lines[0].get_ydata(), wanted)
    np.testing.assert_allclose(axes[2].lines[0].get_ydata(), [0, 0, 0, 0.05, 0.05, 0.05], atol=1e-12)


@pytest.mark.parametrize(
    ("executions", "message"),
    [
        (("bf16",), "no run of digits with execution=default"),
        (("default",), "all runs of digits have execution=default"),
        (("default", "bf16", "bf16"), "seed 0 of bf16 on digits is that of .* too"),
    ],
)
def test_refuses_what_cannot_be_compared(executions, message, tmp_path):
    for number, execution in enumerate(executions):
        write_runs(tmp_path / str(number), execution, REFERENCE)
    with pytest.raises(RecordError, match=message):
        STUDY.answer(find_runs(tmp_path))


def test_a_run_that_goes_on_has_no_final_loss(tmp_path):
    write_runs(tmp_path, "default", REFERENCE)
    write_runs(tmp_path, "bf16", REFERENCE[:-1])
    with pytest.raises(RecordError, match=r"bf16_True_0: evaluated up to epoch 10 of 12; finish it"):
        STUDY.answer(find_runs(tmp_path))


def test_last_epoch_is_evaluated():
    cfg = compose("experiment=precision")
    assert cfg.trainer.max_epochs % cfg.trainer.check_val_every_n_epoch == 0
