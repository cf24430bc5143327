import json

import numpy as np
import pytest
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.run.combinations import check_combinations
from robustdyn.run.config import build
from robustdyn.studies.regimes import DEFAULT, STUDY
from tests.runs import compose
from tests.studies.curve_runs import decayed, write_curves
from tests.studies.tracked_runs import row_of

EPOCHS = 4
LEVELS = {
    "default": {},
    "radius ×0": {"attack.eps_255": 0},
    "radius ×0.5": {"attack.eps_255": 25.5, "attack.step_255": 6.375},
    "training images 600": {"data.train_size": 600},
    "batch size 128": {"data.batch_size": 128},
    "norm l2": {"attack.norm": "l2", "attack.eps_255": 255, "attack.step_255": 63.75},
}
GAPS = dict(zip(LEVELS, (0.4, 0.05, 0.2, 0.3, 0.35, 0.4), strict=True))
NOISE = np.array([0.0, 0.01, -0.02])  # of a seed, the same at every level


def write(root, level, seed, *, own=0.0, measured=True, settings=()):
    """The final error gap is the level's, plus what its seed and it alone add; the best error is 0.3."""
    gap = GAPS[level] + NOISE[seed] + own
    path = write_curves(
        root / f"{level} {seed}",
        lr=decayed(EPOCHS, 2),
        test=[0.6, 0.3, 0.5, 0.1 + gap],
        train=[0.5, 0.3, 0.2, 0.1],
        seed=seed,
        settings={"trainer.max_epochs": EPOCHS, **LEVELS[level], **dict(settings)},
    )
    if measured:
        total = [{"epoch": epoch, "step": epoch, "total": 3.0 - epoch + seed, "kl": None} for epoch in (0, 3)]
        slopes = [
            {"epoch": epoch, "step": epoch, "index": index, "refreshed_slope": 4.0 * (1 + index * gap)}
            for epoch in (0, 3)
            for index in (0, 2)
        ]
        curved = [{"epoch": row["epoch"], "index": row["index"], "curvature": 4.0} for row in slopes]
        for table, rows in (("catoni", total), ("slopes", slopes), ("spectrum", curved)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (path / "records" / f"{table}.jsonl").write_text(text)
    return path


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    root = tmp_path_factory.mktemp("regimes")
    for level in LEVELS:
        for seed in range(3):
            write(root, level, seed, own=0.01 * seed if level == "radius ×0.5" else 0.0)
    return STUDY.answer(find_runs(root))


def test_effects_are_paired_by_seed(answered):
    effects = answered.tables["effects"]
    gap = effects[effects["outcome"] == "final robust_error_gap"]
    assert [f"{row.factor} {row.level}" for row in gap.itertuples()] == [
        *("radius ×0", "radius ×0.5", "training images 600", "batch size 128", "norm l2")
    ]
    halved = row_of(gap, factor="radius", level="×0.5")
    apart = -0.2 + 0.01 * np.arange(3)
    half = stats.t.ppf(0.975, 2) * apart.std(ddof=1) / 3**0.5
    assert halved["mean"] == pytest.approx(apart.mean())
    assert [halved["low"], halved["high"]] == pytest.approx([apart.mean() - half, apart.mean() + half])
    assert halved["seeds"] == 3
    more = row_of(gap, factor="training images")  # the seeds' own differences cancel
    assert [more["low"], more["high"]] == pytest.approx([-0.1, -0.1])


def test_levels_stand_beside_the_default_in_order(answered):
    levels = answered.tables["levels"]
    gap = levels[levels["outcome"] == "final robust_loss_gap"]
    shown = {factor: list(own["level"]) for factor, own in gap.groupby("factor", sort=False)}
    assert shown == {
        "radius": ["×0", "×0.5", "×1"],
        "training images": ["300", "600"],
        "batch size": ["32", "128"],
        "norm": ["l∞", "l2"],
    }
    usual = gap[gap["level"].isin(["×1", "300", "32", "l∞"])]["mean"]
    assert usual.to_list() == pytest.approx(
        [4 * (0.4 + NOISE.mean())] * 4
    )  # losses are four times the errors


def test_outcomes_are_those_after_the_last_epoch(answered):
    runs = answered.tables["runs"]
    own = runs[(runs["level"] == "×0") & (runs["seed"] == 2)].set_index("outcome")["value"]
    gap = 0.05 + NOISE[2]
    assert own["best test_robust_error"] == pytest.approx(min(0.3, 0.1 + gap))
    assert own["final test_robust_error"] == pytest.approx(0.1 + gap)
    assert own["final train_robust_loss"] == pytest.approx(0.4)
    assert own["total"] == pytest.approx(2.0)
    assert own["refreshed_slope_ratio"] == pytest.approx(1 + gap)  # over two directions
    assert "kl" not in own  # it has no value


def test_slope_ratios_are_compared_as_factors(answered):
    ratios = answered.tables["runs"].query("outcome == 'refreshed_slope_ratio'").set_index(["level", "seed"])
    own, usual = (np.log(ratios.loc[level, "value"].to_numpy()) for level in ("×0", DEFAULT))
    effects = answered.tables["effects"].set_index(["level", "outcome"])
    row = effects.loc["×0", "refreshed_slope_ratio"]
    change, half = own - usual, stats.t.ppf(0.975, 2) * stats.sem(own - usual)
    expected = np.exp([change.mean(), change.mean() - half, change.mean() + half])
    np.testing.assert_allclose(row[["mean", "low", "high"]].astype(float), expected, rtol=1e-9)
    assert row["change"] == "factor"
    assert effects.loc["×0", "final robust_loss_gap"]["change"] == "difference"
    levels = answered.tables["levels"].set_index(["level", "outcome"])
    assert levels.loc["×0", "refreshed_slope_ratio"]["mean"] == pytest.approx(np.exp(own.mean()))


def test_rank_correlations_are_those_of_each_seed(answered):
    runs, found = answered.tables["runs"], answered.tables["rank_correlations"]
    wide = runs.pivot(index=["seed", "factor", "level"], columns="outcome", values="value")
    own = [
        stats.spearmanr(seed["refreshed_slope_ratio"], seed["final robust_loss_gap"]).statistic
        for _, seed in wide.groupby("seed")
    ]
    row = found.set_index("outcome").loc["refreshed_slope_ratio"]
    assert (row["mean"], row["seeds"]) == (pytest.approx(np.mean(own)), 3)
    assert row["high"] - row["mean"] == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(own))
    assert "final robust_loss_gap" not in set(found["outcome"])  # 1 with itself


def test_findings_and_figures(answered):
    assert answered.findings[0] == (
        "The final robust loss gap against the default, seed by seed: on digits, it is lower (radius ×0, "
        "radius ×0.5, training images 600, batch size 128), not clearly different (norm l2)."
    )
    assert answered.findings[1] == (  # the bound is the same in all regimes, and has no rank
        "Over the regimes, the rank correlation with this gap is 1.00 [1.00, 1.00] on digits for the slope "
        "ratio."
    )
    for picture in answered.pictures:
        figure = picture.draw(picture.data)
        assert [ax.get_title(loc="left") for ax in figure.axes] == [
            "radius",
            "training images",
            "batch size",
            "norm",
        ]
    error = next(p for p in answered.pictures if p.name == "final_test_robust_error")
    (line, *_) = error.draw(error.data).axes[0].get_lines()
    drawn = 100 * (0.1 + np.array([0.05, 0.21, 0.4]) + NOISE.mean())
    assert line.get_ydata() == pytest.approx(drawn)  # per cent


def test_runs_that_measured_nothing_have_gaps(tmp_path):
    for level in ("default", "radius ×0"):
        write(tmp_path, level, 0, measured=False)
    answer = STUDY.answer(find_runs(tmp_path))
    assert "total" not in set(answer.tables["levels"]["outcome"])
    assert answer.tables["effects"]["low"].isna().all()  # one seed
    assert answer.tables["rank_correlations"].empty  # of two regimes


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"data.batch_size": 128},
            "differs from the most frequent regime in radius and batch size; leave it out",
        ),
        ({"optimizer.lr": 0.5}, r"differ in more than their seed, .*optimizer\.lr"),
    ],
)
def test_runs_that_change_something_else_are_refused(tmp_path, settings, said):
    for level in ("default", "radius ×0.5"):
        write(tmp_path, level, 0)
        write(tmp_path, level, 1)
    write(tmp_path, "radius ×0", 0, settings=settings)
    with pytest.raises(RecordError, match=said):
        STUDY.answer(find_runs(tmp_path))


def test_a_missing_default_is_refused(tmp_path):
    for level in ("radius ×0.5", "training images 600", "batch size 128"):
        write(tmp_path, level, 0)
    with pytest.raises(RecordError, match="no run on digits has the most frequent level of every factor"):
        STUDY.answer(find_runs(tmp_path))


@pytest.mark.parametrize(("name", "radius", "images"), [("regimes", 51, 300), ("regimes_images", 8, 400)])
def test_a_run_of_the_sweep_changes_one_factor(name, radius, images):
    for regime, changed in (
        ("{train_size:150}", {"train_size": 150}),
        (
            f"{{eps_255:{radius / 2},step_255:{radius / 8}}}",
            {"eps": radius / 2 / 255, "step": radius / 8 / 255},
        ),
        ("{eps_255:0}", {"eps": 0.0}),
    ):
        cfg = compose(f"experiment={name}", f"regime={regime}")
        check_combinations(cfg)
        for attack in (build(cfg, "attack.train"), build(cfg, "attack.evaluation")):
            found = {
                "train_size": cfg.data.train_size,
                "batch_size": cfg.data.batch_size,
                "eps": attack.eps,
                "step": attack.step_size,
            }
            usual = {"train_size": images, "batch_size": 32, "eps": radius / 255, "step": radius / 1020}
            assert found == pytest.approx(usual | changed)
