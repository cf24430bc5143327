from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robustdyn.records import RunRecords, find_runs
from robustdyn.records.schema import SPECTRUM, TIMING
from robustdyn.studies.methods import EARLY, STUDY, answer_from
from tests.records.synthetic import config, write_hydra

RESULTS = Path(__file__).parents[2] / "experiments" / "methods" / "results" / "tables"
TEST, HELD_OUT = [0.6, 0.4, 0.3, 0.5, 0.45], [0.6, 0.3, 0.35, 0.4, 0.5]


def write(root, method, seed, shift=0.0):
    """Test errors are lowest in epoch 2, held-out ones in epoch 1."""
    settings = config(seed=seed, trainer__max_epochs=5)
    if method == "wci_lr":
        settings["schedule"]["threshold"] = 10.0
    path = root / f"{method}_{seed}"
    write_hydra(path, settings, choices={"method": method})
    records = RunRecords(path)
    for epoch, (test, held_out) in enumerate(zip(TEST, HELD_OUT, strict=True)):
        row = {"epoch": epoch, "step": epoch + 1, "lr": 0.1, "seconds": 1.0}
        row |= {"robust_loss_gap": test, "robust_error_gap": test, "validation_robust_error": held_out}
        for split in ("train", "test"):
            for inputs in ("robust", "clean"):
                error = test + shift + 0.01 * seed
                row |= {f"{split}_{inputs}_error": error, f"{split}_{inputs}_loss": 2 * error}
        records.append("epochs", row)
    direction = dict.fromkeys(SPECTRUM.names) | {"epoch": 4, "step": 5, "stable": True}
    for index in range(2):
        own = {"index": index, "hessian_eigenvalue": 3.0 + seed - index, "gradient_noise": 0.5}
        records.append("spectrum", direction | own)
    for name, value in (("path_norm", 7.0), ("gradient_alignment", 0.9)):
        row = {"epoch": 4, "step": 5, "measure": name, "value": value, "gradients": 2.0, "seconds": 1.0}
        records.append("measures", row)
    for epoch, speed in enumerate((1.0, 100.0 + seed, 900.0)):
        shares = dict.fromkeys((name for name in TIMING.names if name.endswith("_share")), 0.1)
        row = {"epoch": epoch, "step": epoch + 1, "images_per_second": speed, "seconds": 1.0}
        records.append("timing", row | shares)


@pytest.fixture
def found(tmp_path):
    for seed in range(3):
        write(tmp_path, "at", seed)
        write(tmp_path, "wci_lr", seed, shift=0.1)
    return STUDY.answer(find_runs(tmp_path))


def test_early_stopping_ends_where_held_out_images_are_best(found):
    means = found.tables["methods"].set_index(["setting", "metric", "moment"])["mean"].sort_index()
    for setting, final in (("AT", 45 + 1), ("WCI-LR, τ = 10", 55 + 1), (EARLY, 40 + 1)):
        best = 30 + 1 + 10 * setting.startswith("WCI")
        own = means[setting, "test_robust_error"]
        assert own.to_list() == pytest.approx([best, final, final - best])
    apart = found.tables["against_at"].set_index(["setting", "metric", "moment"])
    row = apart.loc["WCI-LR, τ = 10", "test_robust_loss", "final"]
    assert row[["mean", "low", "high"]].to_list() == pytest.approx([0.2] * 3)
    shown = found.tables["methods_shown"].set_index(["metric", "setting"])
    error = 1 / np.sqrt(3)  # seeds are one point apart
    assert shown.loc[("test robust error (%)", EARLY), "final"] == f"41.0 ± {error:.1f}"
    assert "of “AT” at the best epoch (31.0 ± 2.5 %) and of “AT, early stopping” at the" in found.findings[0]
    (picture,) = found.pictures
    assert len(picture.draw(picture.data).axes) == 4


def test_what_the_last_weights_are_and_the_speed_are_compared_where_recorded(found):
    means = found.tables["measured"].set_index(["quantity", "setting"])["mean"]
    quantities = {"hessian_eigenvalue": 4.0, "gradient_noise": 0.5, "gradient_alignment": 0.9}
    quantities["images_per_second"] = 101.0  # the median over epochs
    for quantity, mean in quantities.items():
        assert means[quantity].to_dict() == pytest.approx({"AT": mean, "WCI-LR, τ = 10": mean})
    assert "wci" not in means  # no run measured it


def test_the_stored_tables_are_those_of_the_stored_runs():
    frame = pd.read_csv(RESULTS / "runs.csv")
    for name, table in answer_from(frame).tables.items():
        pd.testing.assert_frame_equal(
            table, pd.read_csv(RESULTS / f"{name}.csv"), check_dtype=False, rtol=1e-12, obj=name
        )
