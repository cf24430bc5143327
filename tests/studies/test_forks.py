import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.records.labels import SEED
from robustdyn.studies.forks import OVER, STUDY, branch, shares_removed
from tests.records.synthetic import config, write_hydra
from tests.studies.tracked_runs import EPOCHS, row_of, write_run
from tests.tolerances import EXACT64

FORK = 4
RISES = {0: 1.0, 1: 1.2, 2: 0.8}
REMOVED = {"awp": {0: 0.5, 1: 0.6, 2: 0.4}, "averaging": {0: 0.2, 1: 0.5, 2: 0.2}}


def write_branch(path, name, seed, removed=0.0, *, rise=None, halved=False, changed=None, **more):
    """A branch whose loss is 1 up to the fork and then rises; from there its curvature is halved or not."""
    rise = RISES[seed] if rise is None else rise
    folder = path / f"branch={name},trunk={seed}"
    more |= {"fork": {"path": f"/runs/{seed}.ckpt", "epoch": FORK}, "trainer__max_epochs": EPOCHS}
    write_run(
        folder,
        seed=seed,
        loss=lambda epoch: 1.0 if epoch < FORK else 1.0 + rise - removed,
        curvature=lambda epoch: 0.5 if halved and epoch >= FORK else 1.0,
        **more,
    )
    write_hydra(folder, config(seed=seed, **more), [], {"method": "at", "branch": name})
    (folder / "fork.json").write_text(json.dumps({"changed": changed or {}}))
    return folder


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    path = tmp_path_factory.mktemp("branches")
    for seed in RISES:
        write_branch(path, "unchanged", seed)
        for name, removed in REMOVED.items():
            write_branch(path, name, seed, removed[seed], halved=name == "awp")
    return STUDY.answer(find_runs(path))


def test_the_share_is_what_is_removed_of_the_rise(answered):
    shares = answered.tables["shares"]
    row = row_of(shares, setting="awp", metric="test_robust_loss")
    assert row["rise"] == pytest.approx(1.0)
    np.testing.assert_allclose(row[["mean", "low", "high"]].astype(float), 0.5, **EXACT64)  # of every seed
    row = row_of(shares, setting="averaging", metric="test_robust_loss")
    assert row["mean"] == pytest.approx(0.3)
    # what is removed beyond 0.3 of each rise: -0.1, 0.14, -0.04
    half = stats.t.ppf(0.975, 2) * np.sqrt((0.1**2 + 0.14**2 + 0.04**2) / 2 / 3)
    np.testing.assert_allclose(row[["low", "high"]].astype(float), [0.3 - half, 0.3 + half], **EXACT64)
    assert row_of(shares, setting="awp", metric="test_robust_error")["rise"] == pytest.approx(100.0)


def test_the_interval_of_the_share_covers_it():
    """Rises that vary by a fifth and go with what is removed, over five seeds."""
    draws, trials = np.random.default_rng(0), 1000
    rows = []
    for trial in range(trials):
        for seed in range(5):
            rise = draws.normal(1.0, 0.2)
            removed = 0.3 * rise + draws.normal(0.0, 0.1)
            rows.append(("unchanged", seed, str(trial), 0.0, rise))
            rows.append(("other", seed, str(trial), 0.0, rise - removed))
    found = shares_removed(pd.DataFrame(rows, columns=["setting", SEED, "metric", "fork", "end"]))
    covered = ((found["low"] < 0.3) & (found["high"] > 0.3)).sum()
    assert len(found) == trials
    # four standard deviations of the number of successes; the ratio is to first order
    assert abs(covered - 0.95 * trials) < 4 * np.sqrt(trials * 0.95 * 0.05)


def test_differences_are_paired_by_seed(answered):
    row = row_of(answered.tables["differences"], setting="awp", metric="robust_loss_gap")
    assert row["mean"] == pytest.approx(-0.5)
    assert row["seeds"] == 3
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    np.testing.assert_allclose(row[["low", "high"]].astype(float), [-0.5 - half, -0.5 + half], **EXACT64)


@pytest.mark.parametrize("quantity", ["hessian_eigenvalue_top", "gradient_noise_mean"])
@pytest.mark.parametrize("moment", [OVER, "end"])
def test_effects_are_factors_of_the_unchanged_branch(answered, quantity, moment):
    effects = answered.tables["effects"]
    halved = row_of(effects, setting="awp", quantity=quantity, moment=moment)
    np.testing.assert_allclose(halved[["mean", "low", "high"]].astype(float), 0.5, **EXACT64)
    kept = row_of(effects, setting="averaging", quantity=quantity, moment=moment)
    assert kept["mean"] == pytest.approx(1.0)


def test_findings_and_figure_say_what_the_table_says(answered):
    assert answered.findings[0] == (
        "The test robust loss rises by 1.000 nats after the fork: less of it with (awp), not clearly "
        "different with (averaging)."
    )
    (picture,) = answered.pictures
    figure = picture.draw(picture.data)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Test robust loss", "Test robust error"]
    seen = [line.get_xdata()[0] for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(sorted(seen), [30.0, 50.0], **EXACT64)


def test_without_a_rise_there_is_no_share(tmp_path):
    for seed in RISES:
        for name in ("unchanged", "awp"):
            write_branch(tmp_path, name, seed, rise=0.0)
    answer = STUDY.answer(find_runs(tmp_path))
    assert answer.tables["shares"]["mean"].isna().all()
    assert answer.findings[0].endswith("not clearly above 0.")
    assert not answer.pictures


def test_a_branch_without_a_preset_is_named_after_what_was_typed(tmp_path):
    changed = {"optimizer.weight_decay": [5e-4, 0.1]}
    (run,) = find_runs(write_branch(tmp_path, "unchanged", 0, changed=changed))
    assert branch(run) == "optimizer.weight_decay=0.1"
    (run,) = find_runs(write_branch(tmp_path, "no_decay", 0, changed=changed))
    assert branch(run) == "no decay"


def test_what_is_measured_is_no_factor(tmp_path):
    changed = {"measure.epochs": ["every 10", "last"], "measure.examples": [150, 64]}
    (run,) = find_runs(write_branch(tmp_path, "unchanged", 0, changed=changed))
    assert branch(run) == "unchanged"


def test_other_runs_are_refused(tmp_path):
    write_branch(tmp_path / "alone", "unchanged", 0)
    with pytest.raises(RecordError, match="nothing to compare: give branch=unchanged and other"):
        STUDY.answer(find_runs(tmp_path / "alone"))
    write_run(tmp_path / "trunk")
    with pytest.raises(RecordError, match="is no branch of a run; robustdyn-fork makes them"):
        STUDY.answer(find_runs(tmp_path / "trunk"))
