"""What causes robust overfitting: branches of a run that differ in one factor from the decay on.

The branches of one seed are paired: they start from the same weights and see the same batches and the same
random starts of the attack. All of them are compared with the branch that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records.files import read_object
from robustdyn.records.labels import SEED, format_value
from robustdyn.records.reader import Run
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import (
    EPOCHS,
    GRADIENT_NOISE,
    HESSIAN_EIGENVALUE,
    ROBUST_LOSS_GAP,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
)
from robustdyn.report import style
from robustdyn.studies.shared.comparing import (
    BOUNDS,
    COLUMNS,
    INDEX,
    LEVEL,
    METRICS,
    RATE,
    against,
    in_shown_units,
    mean_curves,
    mean_with_interval,
    require_complete,
    require_repetitions,
    values,
)
from robustdyn.studies.shared.comparison_figures import Panel, draw_points, figure_of_curves, name_rows
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.studies.shared.tracked import (
    MEAN,
    TOP,
    changes_between,
    label,
    mean,
    tracked_directions,
    tracked_quantities,
)
from robustdyn.studies.shared.wording import seeds_said, sentence, told_apart

UNCHANGED = "unchanged"
EFFECTS = tuple(
    f"{name}{kind}"
    for name in (HESSIAN_EIGENVALUE, GRADIENT_NOISE, "stationary_variance", "resolved_variance")
    for kind in (TOP, MEAN)
)
"""What a factor did to curvature, noise and posterior: quantities of ``tracked_quantities``."""
OVER, END = "all epochs after the fork", "end"
SHARES = {TEST_ROBUST_LOSS: "Test robust loss", TEST_ROBUST_ERROR: "Test robust error"}


def branch(run: Run) -> str:
    """What the branch changes: its preset, or else the settings that were typed.

    What is measured, and when, is no part of it, because it does not change the training.

    Raises:
        RecordError: The run is no branch.
    """
    origin = read_object(RunDirectory(run.path).fork)
    if origin is None or not isinstance(run.config.get("fork"), Mapping):
        raise RecordError(f"{run.path}: is no branch of a run; robustdyn-fork makes them, or leave it out")
    preset, recorded = run.choices.get("branch", UNCHANGED), origin.get("changed")
    changed = recorded if isinstance(recorded, dict) else {}
    changed = {name: values for name, values in changed.items() if not name.startswith("measure.")}
    if preset != UNCHANGED or not changed:
        return preset.replace("_", " ")
    return ", ".join(f"{name}={format_value(values[-1])}" for name, values in changed.items())


def moments_of(rows: pd.DataFrame, fork: int) -> pd.DataFrame:
    """``METRICS`` of every branch where it left its run, at the lowest point after that, and at its end.

    The lowest point is one epoch for each metric: among those evaluated since the fork, the last one before
    it included, the one at which the mean of the unchanged branches is lowest. So no branch is taken at its
    own lucky epoch.

    Args:
        rows: As ``robustdyn.studies.shared.comparing.values`` returns them, in shown units.
        fork: The first epoch of the branches.

    Returns:
        ``setting``, ``seed``, ``metric``, ``unit``, ``fork``, ``lowest``, ``end``, ``lowest_epoch``.

    Raises:
        RecordError: No epoch before the fork was evaluated.
    """
    found = []
    for metric in METRICS:
        own = rows[rows["quantity"] == metric]
        curves = own.pivot(index=["setting", SEED], columns="epoch", values="value").sort_index(axis=1)
        before = max((int(epoch) for epoch in own["epoch"] if epoch < fork), default=None)
        if before is None:
            raise RecordError(
                "no epoch before the fork was evaluated; train the runs with a smaller "
                "trainer.check_val_every_n_epoch"
            )
        after = curves.loc[:, before:].dropna(axis=1)
        epochs = [int(epoch) for epoch in after.columns]
        lowest = epochs[np.argmin(after.loc[[UNCHANGED]].mean())]
        moments = {"fork": before, "lowest": lowest, "end": epochs[-1]}
        table = pd.DataFrame({name: after[epoch] for name, epoch in moments.items()}).reset_index()
        found.append(table.assign(metric=metric, unit=COLUMNS[metric].shown_unit, lowest_epoch=lowest))
    names = ["setting", SEED, "metric", "unit", "fork", "lowest", "end", "lowest_epoch"]
    return pd.concat(found, ignore_index=True)[names]


def shares_removed(values: pd.DataFrame) -> pd.DataFrame:
    """The share of the rise after the fork that each factor removes, over seeds.

    The rise is that of the unchanged branch, from its lowest point to its end. The share is the mean of what
    a branch ends below the unchanged one, divided by the mean rise. Its interval is Student's, of the ratio
    to first order. Without a rise, that is where its own interval does not lie above 0, there is no share.

    Args:
        values: As ``moments_of`` returns them.

    Returns:
        ``setting``, ``metric``, ``rise``, ``rise_low``, ``rise_high``, ``mean`` (the share), ``low``,
        ``high``, ``seeds``.
    """
    own = values["setting"] == UNCHANGED
    base = values[own].assign(rise=values["end"] - values["lowest"])
    rises = mean_with_interval(base, ["metric"], "rise").set_index("metric")[list(BOUNDS)]
    pairs = values[~own].merge(
        base[[SEED, "metric", "end", "rise"]], on=[SEED, "metric"], suffixes=("", "_base")
    )
    pairs["removed"] = pairs["end_base"] - pairs["end"]
    found = []
    for (setting, metric), rows in pairs.groupby(["setting", "metric"], sort=False):
        rise, low, high = rises.loc[str(metric)].to_numpy(dtype=float)
        removed, own_rise = (rows[name].to_numpy(dtype=float) for name in ("removed", "rise"))
        seeds, share, half = len(rows), np.nan, np.nan
        if (rise if np.isnan(low) else low) > 0:
            share = removed.mean() / own_rise.mean()
            if seeds > 1:
                error = stats.sem(removed - share * own_rise) / own_rise.mean()
                half = error * stats.t.ppf((1 + LEVEL) / 2, seeds - 1)
        found.append((setting, metric, rise, low, high, share, share - half, share + half, seeds))
    names = ["setting", "metric", "rise", "rise_low", "rise_high", "mean", "low", "high", "seeds"]
    return pd.DataFrame(found, columns=names)


def effects(runs: Sequence[Run]) -> pd.DataFrame:
    """Curvature, noise and variance of each branch as factors of the unchanged one's of the same seed.

    Returns:
        ``setting``, ``moment`` (``OVER``: the geometric mean over the epochs that both have; ``END``: the
        last of these), ``quantity``, ``label``, ``mean``, ``low``, ``high``, ``seeds``.
    """
    rows = []
    for run in runs:
        found = tracked_quantities(run)
        after = found["epoch"] >= int(run.config["fork"]["epoch"])
        kept = found[after & found["quantity"].isin(EFFECTS)]
        rows.append(kept.assign(setting=branch(run), **{SEED: run.config[SEED]}))
    frame = pd.concat(rows, ignore_index=True)
    own = frame["setting"] == UNCHANGED
    changes = changes_between(frame[own], frame[~own], [SEED, "epoch"]).dropna(subset=["value"])
    groups = changes.sort_values("epoch").groupby(["setting", SEED, "quantity"], sort=False)["value"]
    parts = [
        groups.agg(how).reset_index().assign(moment=moment) for moment, how in ((OVER, "mean"), (END, "last"))
    ]
    k = tracked_directions(runs)
    means = mean(pd.concat(parts, ignore_index=True), ["setting", "moment"], changes=True)
    means.insert(3, "label", [label(quantity, k) for quantity in means["quantity"]])
    return means


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``.

    Raises:
        RecordError: A run is no branch, is not finished or lacks what is compared; or none is unchanged.
    """
    require_repetitions(runs, branch)
    require_complete(runs)
    ordered = sorted(runs, key=lambda run: (branch(run) != UNCHANGED, branch(run), run.config[SEED]))
    settings = {branch(run) for run in ordered}
    if settings == {UNCHANGED} or UNCHANGED not in settings:
        raise RecordError(
            "nothing to compare: give branch=unchanged and other branches, as experiment=forks trains them"
        )
    rows = values(ordered, METRICS, setting=branch, optional=(INDEX,))
    fork = min(int(run.config["fork"]["epoch"]) for run in ordered)
    moments = moments_of(in_shown_units(rows), fork)
    shares = shares_removed(moments)
    curves = mean_curves(rows[rows["epoch"] >= fork - 1])
    tables = {
        "shares": shares,
        "rises": rises(moments),
        "differences": against(moments.rename(columns={"end": "value"}), UNCHANGED, ["metric", "unit"]),
        "effects": effects(ordered),
        "curves": curves,
        "runs": moments,
    }
    panels = [Panel(COLUMNS[metric].label, metric) for metric in (*SHARES, ROBUST_LOSS_GAP, INDEX)]
    shown = curves[curves["quantity"].isin([RATE, *(panel.quantity for panel in panels)])]
    title = "Branches that differ in one factor"
    pictures = [Picture("curves", shown, partial(figure_of_curves, title=title, panels=panels))]
    drawn = shares[shares["metric"].isin(SHARES)].dropna(subset=["mean"]).reset_index(drop=True)
    if len(drawn):
        pictures.insert(0, Picture("shares", drawn, draw_shares))
    return Answer(tables, pictures, findings_of(tables))


def rises(moments: pd.DataFrame) -> pd.DataFrame:
    """How far each branch itself rises from that epoch to its end: mean over seeds and Student's interval."""
    own = moments.assign(value=moments["end"] - moments["lowest"])
    return mean_with_interval(own, ["setting", "metric", "unit", "lowest_epoch"])


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which factors remove a part of the rise, or add to it, as far as the intervals tell."""
    found = []
    for metric, name in SHARES.items():
        rows = tables["shares"][tables["shares"]["metric"] == metric]
        unit, scale = EPOCHS[metric].shown_unit, EPOCHS[metric].scale
        height = f"{rows['rise'].iloc[0]:.{1 if scale > 1 else 3}f} {unit}"
        known = rows.dropna(subset=["mean"])
        words = ("less of it with", "more of it with", "not clearly different with")
        said = told_apart(known, list(known["setting"]), words) if len(known) else "not clearly above 0"
        found.append(sentence(f"the {name.lower()} rises by {height} in the unchanged branch: {said}"))
    return found


@style.styled
def draw_shares(shares: pd.DataFrame) -> Figure:
    """A row for each factor: the share of the rise that it removes, with its interval."""
    order = list(dict.fromkeys(shares["setting"]))
    panels = [metric for metric in SHARES if (shares["metric"] == metric).any()]
    figure = style.new_figure(
        f"Share of the rise that each factor removes ({seeds_said(shares)}, 95 % interval)",
        1.5 + 0.36 * len(order),
    )
    for ax, metric in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        rows = shares[shares["metric"] == metric]
        rows = rows.assign(**{name: 100 * rows[name] for name in ("mean", "low", "high")})
        for share, line in ((0.0, "-"), (100.0, "--")):
            ax.axvline(share, color=style.MARK, linestyle=line, linewidth=0.8)
        places = [len(order) - 1 - order.index(setting) for setting in rows["setting"]]
        draw_points(ax, places, rows, [style.PALETTE[0]] * len(rows))
        name_rows(ax, order)
        ax.set_xlabel("share removed (%); 100: no rise")
        ax.set_title(SHARES[metric])
    return figure


STUDY = Study(
    "Which factor causes robust overfitting: what share of the rise after the decay is removed by keeping "
    "the rate, restoring the noise, lowering the curvature, shrinking the radius, freezing BatchNorm or "
    "averaging the weights, each by itself?",
    answer,
)
