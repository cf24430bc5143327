"""One training carried out in several ways: float32, bfloat16, compiled.

Runs of equal seed share initial weights, batches and attacks, and differ in rounding alone. They are compared
pair by pair with those of ``execution=default``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run
from robustdyn.records.schema import (
    HESSIAN_EIGENVALUE,
    HESSIAN_TRACE,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
    TRAIN_ROBUST_LOSS,
)
from robustdyn.report import style
from robustdyn.report.plotting import Cast, finish, group_legend, log_axis, mark_decays
from robustdyn.studies.shared.comparing import (
    COLUMNS,
    INDEX,
    LEVEL,
    RATE,
    against,
    data_set,
    paired,
    require_complete,
    values,
)
from robustdyn.studies.shared.one_factor import OUTCOME, outcomes, summary
from robustdyn.studies.shared.study import Answer, Picture, Study

REFERENCE = "default"
CURVES = (TRAIN_ROBUST_LOSS, TEST_ROBUST_LOSS)
CURVE = ["panel", "setting", "quantity"]


def execution(run: Run) -> str:
    """How the run was carried out: the preset, and the memory layout where it is not the presets'."""
    layout = "" if run.config["execution"]["channels_last"] else ", channels first"
    return run.choices["execution"] + layout


def curve_differences(rows: pd.DataFrame) -> pd.DataFrame:
    """How far mean curves come apart, in standard errors of their difference paired by seed.

    Returns:
        For each of ``CURVE`` that two seeds have: ``epochs`` compared; ``largest``, the maximum over these of
        |mean difference| / its standard error, and its epoch, ``at``; ``limit``, which the largest exceeds in
        5 % of cases at most if no epoch differs (Bonferroni); ``outside``, the share of epochs whose own 95 %
        interval leaves out 0, 5 % on average if none differs.
    """
    found = []
    apart = against(rows[rows["quantity"].isin(CURVES)], REFERENCE, ["panel", "quantity", "epoch"])
    for head, own in apart.groupby(CURVE, sort=False):
        own = own[own["seeds"] == own["seeds"].max()].set_index("epoch")
        law = stats.t(int(own["seeds"].max()) - 1)
        ratios = (own["mean"].abs() / (own["high"] - own["mean"])).fillna(0.0)  # equal curves: 0 / 0
        if own["high"].notna().all():
            largest = ratios.max() * law.ppf((1 + LEVEL) / 2)
            limit = law.ppf(1 - (1 - LEVEL) / 2 / len(ratios))
            found.append((*head, len(ratios), largest, ratios.idxmax(), limit, (ratios > 1).mean()))
    return pd.DataFrame(found, columns=[*CURVE, "epochs", "largest", "at", "limit", "outside"])


def answer(runs: Sequence[Run]) -> Answer:
    """Outcomes and curves of each way against the reference, pair by pair.

    Raises:
        RecordError: An unfinished run, or a data set without a run of the reference or of anything else.
    """
    runs = sorted(runs, key=lambda run: execution(run) != REFERENCE)
    require_complete(runs)
    for name in {data_set(run) for run in runs}:
        kinds = {execution(run) for run in runs if data_set(run) == name}
        if REFERENCE not in kinds:
            raise RecordError(f"no run of {name} with execution={REFERENCE}; give its directory too")
        if len(kinds) == 1:
            raise RecordError(f"all runs of {name} have execution={REFERENCE}; give others to compare")
    rows = values(
        runs, [TEST_ROBUST_ERROR, *CURVES], execution, optional=[INDEX, HESSIAN_TRACE, HESSIAN_EIGENVALUE]
    )
    found = outcomes(rows)
    tables = {
        "outcomes": summary(found),
        "differences": against(found, REFERENCE, OUTCOME).assign(baseline=REFERENCE),
        "curves": curve_differences(rows),
    }
    curves = rows[rows["quantity"].isin([RATE, *CURVES])].reset_index(drop=True)
    return Answer(tables, [Picture("curves", curves, draw_curves)], findings_of(tables))


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Whether anything differs by more than seeds explain."""
    known = tables["differences"].dropna(subset=["low"])
    clear = known[(known["low"] > 0) | (known["high"] < 0)]
    curves = tables["curves"]
    beyond = int((curves["largest"] > curves["limit"]).sum())
    return [
        f"Of {len(known)} differences to execution={REFERENCE}, paired by seed, {len(clear)} have a 95 % "
        "interval that leaves out 0.",
        f"Of {len(curves)} curves, {beyond} come further apart than 5 % of equal ones would.",
    ]


@style.styled
def draw_curves(table: pd.DataFrame) -> Figure:
    """A row per data set: train and test robust loss, and the test loss's difference paired by seed."""
    settings, panels = (list(dict.fromkeys(table[name])) for name in ("setting", "panel"))
    colours = dict(zip(settings, style.colours(len(settings)), strict=True))
    cast = Cast(colours, sizes=dict.fromkeys(settings, 1))  # of seeds, which the title speaks of
    figure = style.new_figure(
        "Robust loss by way of execution: mean and range over seeds", 0.7 + 2.7 * len(panels)
    )
    for axes, name in zip(figure.subplots(len(panels), 3, squeeze=False), panels, strict=True):
        own = table[table["panel"] == name]
        for ax, quantity in zip(axes, CURVES, strict=False):
            curve = own[own["quantity"] == quantity]
            for setting, shade in colours.items():
                _draw_range(ax, curve[curve["setting"] == setting], shade)
            finish(ax, f"{name}: {COLUMNS[quantity].label}", f"robust loss ({COLUMNS[quantity].unit})")
        log_axis(axes[0])  # memorisation continues at a small loss
        test = own[own["quantity"] == TEST_ROBUST_LOSS]
        apart = paired(test, test[test["setting"] == REFERENCE], ["epoch", SEED])
        apart["value"] -= apart["reference"]
        for setting in settings[1:]:
            _draw_range(axes[2], apart[apart["setting"] == setting], colours[setting])
        axes[2].axhline(0.0, color=style.MARK, linewidth=0.8)
        finish(
            axes[2],
            f"{name}: test, paired by seed",
            f"loss − {REFERENCE}'s ({COLUMNS[TEST_ROBUST_LOSS].unit})",
        )
        _zoom(axes[2])
        rates = own[own["quantity"] == RATE].rename(columns={"value": RATE})
        mark_decays(
            axes, rates.assign(group=rates["setting"], run=rates["setting"] + rates[SEED].map(str)), cast
        )
    group_legend(figure, cast, single_seeds=False)
    return figure


def _draw_range(ax: Axes, curves: pd.DataFrame, shade: str) -> None:
    """Mean and range over the seeds, at epochs that all of them have."""
    by_epoch = curves.pivot(index="epoch", columns=SEED, values="value").dropna(axis=1, how="all").dropna()
    if not by_epoch.empty:
        low, high = by_epoch.min(axis=1), by_epoch.max(axis=1)
        ax.fill_between(by_epoch.index, low, high, color=shade, alpha=0.18, linewidth=0)
        ax.plot(by_epoch.index, by_epoch.mean(axis=1), color=shade, linewidth=1.6)


def _zoom(ax: Axes) -> None:
    """Limits for all but the first fifth of the epochs, in which networks that learn fast differ most."""
    points = np.concatenate([np.asarray(line.get_xydata()) for line in ax.lines[:-1]])
    late = points[points[:, 0] >= 0.2 * points[:, 0].max(), 1]
    ax.set_ylim(-(limit := 4 * np.abs(late).max() or 1.0), limit)


STUDY = Study(
    "Does half precision change what adversarial training converges to, memorisation at the end included?",
    answer,
)
