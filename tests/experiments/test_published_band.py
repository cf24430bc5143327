"""The band holds a further run as often as it says, and the script writes what the report reads."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robustdyn.errors import DataFileError
from robustdyn.report.reference import load_reference

FOLDER = Path(__file__).parents[2] / "experiments" / "cifar10_at"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("published_band")
    sys.modules.pop("published_band", None)


@pytest.mark.parametrize("runs", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("offset", "noise", "lowest", "highest"),
    [
        (1.0, 0.0, 0.94, 0.96),  # one number for each run: Student's t is exact
        (0.0, 1.0, 0.94, 0.97),
        (0.3, 1.0, 0.93, 0.97),  # Satterthwaite's degrees of freedom are an approximation
        (1.0, 1.0, 0.92, 0.97),
    ],
)
def test_a_further_run_lies_within_in_19_of_20_epochs(script, runs, offset, noise, lowest, highest):
    draws, repeats = np.random.default_rng(0), 4000
    shape = (repeats, 21, runs + 1)
    values = offset * draws.normal(size=(repeats, 1, runs + 1)) + noise * draws.normal(size=shape)
    known, new = values[..., :runs], values[..., runs]
    centre = known.mean(axis=-1, keepdims=True)
    half = script.half_width(*np.transpose([script.pooled(own) for own in known - centre]), runs)
    inside = np.abs(new - centre[..., 0]) <= half[:, None]
    assert lowest < inside.mean() < highest


def test_a_window_ends_at_a_decay(script):
    """The runs differ by 2 after the first decay only: no epoch before it knows."""
    gap = np.where(np.arange(200) < 100, 1e-3, 2.0)
    values = np.stack([gap / 2, -gap / 2], axis=1)
    half = script.half_widths(values)
    # one degree of freedom: t = tan(0.475 π); s = gap / √2, and √(1 + 1/2)
    np.testing.assert_allclose(half, np.tan(0.475 * np.pi) * gap / np.sqrt(2) * np.sqrt(1.5), rtol=1e-9)


def test_the_shipped_band_is_what_the_script_writes(script, tmp_path, monkeypatch):
    """From curves made up so that the band is known, through the files, to what the report reads."""
    epochs = np.arange(200)
    rows = []
    for study, run in {*script.BUILT_FROM, *((study, run) for study, run, _ in script.CHECKED)}:
        shift = 0.01 * (run == script.BUILT_FROM[0][1]) - 0.01 * (run == script.BUILT_FROM[1][1])
        columns = {"study": study, "run": run, "epoch": epochs}
        for part, size in (("train", 2.0), ("test", 1.0)):
            for kind in ("clean", "robust"):
                own = {
                    f"{part}_{kind}_loss": 1.0 + size * shift,
                    f"{part}_{kind}_accuracy": 0.5 + size * shift,
                }
                columns |= own
        rows.append(pd.DataFrame(columns))
    pd.concat(rows).to_csv(tmp_path / "epochs.csv", index=False)
    monkeypatch.setattr(script, "REFERENCES", tmp_path)
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(sys, "argv", ["published_band.py", str(tmp_path)])
    assert script.main() == 0
    written = pd.read_csv(tmp_path / "cifar10_standard.csv")
    shipped = load_reference("published:cifar10_standard").bounds
    assert list(written.columns) == list(shipped.columns)
    assert written[["quantity", "epoch"]].equals(shipped[["quantity", "epoch"]])
    error = written[written["quantity"] == "test_robust_error"]
    np.testing.assert_allclose(error["centre"], 0.5)
    np.testing.assert_allclose(error["high"] - 0.5, 12.7062 * 0.01 * np.sqrt(2) * np.sqrt(1.5), atol=1e-5)
    check = pd.read_csv(tmp_path / "results" / "band_check.csv")
    for quantity in shipped["quantity"].unique():
        assert (check[quantity] == check["epochs"]).all()  # runs at the centre


def test_a_file_that_is_no_log_is_named(script, tmp_path):
    with pytest.raises(DataFileError, match=r"epochs.csv: cannot read the published curves"):
        script.read_curves(tmp_path / "epochs.csv")
    (tmp_path / "epochs.csv").write_text("study,run,epoch\na,b,0\n")
    with pytest.raises(DataFileError, match=r"epochs.csv: .*test_robust_accuracy"):
        script.read_curves(tmp_path / "epochs.csv")
