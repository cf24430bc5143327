"""Which measure ranks runs by their robust generalisation gap, and where the WCI stands among them.

Kim et al. (NeurIPS 2023) asked this of 1,300 adversarially trained networks, before there was a WCI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustdyn.complexity import MEASURES
from robustdyn.errors import RecordError
from robustdyn.records.columns import FRACTION, FRACTION_DIFFERENCE
from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run, read_table
from robustdyn.records.schema import (
    EPOCHS,
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
    TEST_ROBUST_ERROR,
    TRAIN_ROBUST_LOSS,
)
from robustdyn.report import style
from robustdyn.report.factors import factors
from robustdyn.report.plotting import key
from robustdyn.studies.shared.comparing import INDEX, require_complete, require_repetitions
from robustdyn.studies.shared.comparison_figures import name_rows
from robustdyn.studies.shared.ranking import (
    Design,
    FloatArray,
    average,
    concordance,
    conditional_information,
    granulated,
    hoeffding_weights,
    interval_over_seeds,
    interval_over_settings,
    sign_errors,
    tau,
    within_category,
)
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.studies.shared.wording import sentence

TARGETS = (ROBUST_LOSS_GAP, ROBUST_ERROR_GAP, TEST_ROBUST_ERROR)
TEST_EXAMPLES = {"CIFAR10": 10_000, "CIFAR100": 10_000, "SVHN": 26_032}
"""Of the official test sets, by class of data; other runs say how many there are (``data.test_size``)."""
LEADING = 5  # measures in the short table
TAU, GRANULATED = "tau", "granulated"
BASELINE = TRAIN_ROBUST_LOSS
"""The runs have the same number of epochs and not the same loss, so that the training loss alone, which every
run has, ranks their gaps too; a measure has to do better."""
ENDS = tuple(f"{over}_{end}" for over in ("seeds", "settings") for end in ("low", "high"))


def measured(runs: Sequence[Run]) -> tuple[Design, pd.DataFrame, pd.DataFrame]:
    """Settings, targets and measures of all runs, at the last epoch that each of them measured.

    Args:
        runs: Finished runs, each of its own setting or seed.

    Returns:
        The design; a row per run with ``seed``, ``epoch``, ``TARGETS`` and a column for each measure and the
        ``BASELINE``; and for each of these its mean cost in ``gradients`` and ``seconds``, and the first
        reason why it is ``undefined`` anywhere.

    Raises:
        RecordError: Fewer than three runs, a run that is not finished, has no measures or was not evaluated
            when they were taken, or two runs of one setting and seed.
    """
    if len(runs) < 3:
        raise RecordError(
            f"{runs[0].path}: {len(runs)} of the three runs or more that can be ranked; "
            "robustdyn-train experiment=measures trains them"
        )
    require_repetitions(runs, lambda run: run.group)
    require_complete(runs)
    columns = [factor for factor in factors(runs, runs) if factor.key != SEED]
    levels = pd.DataFrame({factor.key: factor.column for factor in columns}, index=range(len(runs)))
    rows, costs = [], []
    for run in runs:
        measures = read_table(run.path, "measures")
        if measures.empty:
            raise RecordError(f"{run.path}: no measures recorded; train with measure=measures")
        last = int(measures["epoch"].max())
        own = measures[measures["epoch"] == last]
        epoch = read_table(run.path, "epochs").set_index("epoch").reindex([last])[[*TARGETS, BASELINE]]
        if epoch.isna().any(axis=None):
            raise RecordError(
                f"{run.path}: not evaluated at epoch {last}, the last one measured; let measure.epochs hold "
                "one that is (trainer.check_val_every_n_epoch)"
            )
        head = {SEED: run.config[SEED], "epoch": last} | epoch.iloc[0].to_dict()
        rows.append(head | dict(zip(own["measure"], own["value"], strict=True)))
        costs.append(own)
    cost = pd.concat(costs, ignore_index=True).groupby("measure", sort=False)
    details = cost.agg({"gradients": "mean", "seconds": "mean", "undefined": "first"})
    details.loc[BASELINE] = {"gradients": 0.0, "seconds": 0.0, "undefined": None}
    values = pd.DataFrame(rows)
    return Design(levels, values[SEED].tolist()), values, details


def ranked(
    design: Design, measure: pd.Series, target: pd.Series, weights: FloatArray
) -> tuple[dict[str, object], pd.DataFrame]:
    """All coefficients of one measure and one target, of the runs that have both.

    Args:
        design: Of the runs.
        measure: Its value in each run.
        target: Its value in each run.
        weights: Of pairs of runs, for ``robustdyn.studies.shared.ranking.sign_errors``, (n, n).

    Returns:
        A row of the table ``ranking``, and the rows of ``by_factor``: ``factor``, ``granulated``,
        ``within_category``, and mean and largest ``sign_error``.
    """
    known = (measure.notna() & target.notna()).to_numpy()
    own = design.of(known)
    x, y = measure[known].to_numpy(dtype=float), target[known].to_numpy(dtype=float)
    concordant = concordance(x, y)

    def over_all(often: FloatArray) -> FloatArray:
        return tau(concordant, often)

    def over_factors(often: FloatArray) -> FloatArray:
        return average(granulated(own, concordant, often).values())

    row: dict[str, object] = {"runs": int(known.sum())}
    once = np.ones(len(x))
    for name, statistic in ((TAU, over_all), (GRANULATED, over_factors)):
        ends = (*interval_over_seeds(own, statistic), *interval_over_settings(own, statistic))
        named = zip(ENDS, ends, strict=True)
        row |= {name: float(statistic(once))} | {f"{name}_{end}": value for end, value in named}
    errors = sign_errors(own, concordant, weights[np.ix_(known, known)])
    within = within_category(own, concordant)
    row |= {
        "within_category": float(average(within.values())),
        "conditional_information": conditional_information(own, x, y),
        "sign_error_mean": errors["sign_error"].mean(),
        "sign_error_max": errors["sign_error"].max(),
        "environments": len(errors),
    }
    parts = pd.DataFrame({GRANULATED: granulated(own, concordant), "within_category": within})
    of_factor = errors.groupby("factor")["sign_error"].agg(["mean", "max"]).add_prefix("sign_error_")
    parts = parts.join(of_factor).rename_axis("factor").reset_index()
    return row, parts


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``."""
    design, values, details = measured(runs)
    examples = min(_test_examples(run) for run in runs)
    rows, parts = [], []
    for target in TARGETS:
        bounded = EPOCHS[target].unit in (FRACTION, FRACTION_DIFFERENCE)
        everything = np.ones((len(values), len(values)))
        weights = hoeffding_weights(values[target], examples) if bounded else everything
        for measure in details.index:
            row, by_factor = ranked(design, values[measure], values[target], weights)
            head = {"target": target, "measure": measure}
            family = MEASURES[measure].family if measure in MEASURES else None
            rows.append(head | {"family": family} | row | details.loc[measure].to_dict())
            parts.append(by_factor.assign(**head))
    ranking = pd.DataFrame(rows)
    strength = ranking[TAU].abs().mask(ranking["measure"] == BASELINE)
    ranking.insert(2, "rank", strength.groupby(ranking["target"]).rank(ascending=False, method="min"))
    by_factor = pd.concat(parts, ignore_index=True)
    by_factor = by_factor[
        ["target", "measure", *by_factor.columns.difference(["target", "measure"], sort=False)]
    ]
    tables = {
        "standing": standing(ranking),
        "ranking": ranking,
        "by_factor": by_factor,
        "values": pd.concat([design.levels, values], axis=1),
    }
    return Answer(tables, [Picture("ranking", drawn(ranking, by_factor), draw_ranking)], findings_of(tables))


def standing(ranking: pd.DataFrame) -> pd.DataFrame:
    """The measures with the largest |τ| for each target, the WCI and the ``BASELINE``, from ``ranking``."""
    names = {TAU: TAU, **{f"{TAU}_{end}": end for end in ENDS}}
    columns = [
        "target",
        "rank",
        "measure",
        "family",
        *names,
        GRANULATED,
        "sign_error_max",
        "gradients",
        "seconds",
    ]
    top = ranking[(ranking["rank"] <= LEADING) | ranking["measure"].isin([INDEX, BASELINE])]
    order = [TARGETS.index(target) for target in top["target"]]
    ordered = top.assign(order=order).sort_values(["order", "rank"], kind="stable")
    return ordered[columns].rename(columns=names).reset_index(drop=True)


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which measure goes with each target the most, and where the WCI and the training loss stand."""
    every = tables["ranking"].dropna(subset=[TAU])
    ranking, baseline = every.dropna(subset=["rank"]), every[every["measure"] == BASELINE]
    number = ranking["measure"].nunique()
    best, index = [], []
    for target, own in ranking.groupby("target", sort=False):
        label = EPOCHS[str(target)].label
        first = own.sort_values("rank", kind="stable")
        best.append(f"{first['measure'].iloc[0]} for the {label} ({_said(first)})")
        row = own[own["measure"] == INDEX]
        if len(row):
            index.append(f"{int(row['rank'].iloc[0])} of {len(own)} for the {label} ({_said(row)})")
    where = f"the WCI has rank {', '.join(index)}" if index else "the WCI is not among the measures"
    alone = ", ".join(f"{value:.2f}" for value in baseline[TAU])
    return [
        sentence(f"of {number} measures, the one with the largest |τ| is {', '.join(best)}"),
        sentence(f"{where}; the training loss alone has τ {alone} for the same targets"),
    ]


def _said(rows: pd.DataFrame) -> str:
    """``τ 0.41, 95 % over settings [0.30, 0.52], Ψ 0.12`` of the first row."""
    row = rows.iloc[0]
    low, high = row[f"{TAU}_settings_low"], row[f"{TAU}_settings_high"]
    return f"τ {row[TAU]:.2f}, 95 % over settings [{low:.2f}, {high:.2f}], Ψ {row[GRANULATED]:.2f}"


def drawn(ranking: pd.DataFrame, by_factor: pd.DataFrame) -> pd.DataFrame:
    """What the figure shows: τ and Ψ of each measure with their intervals, and ψ of each factor.

    Returns:
        ``target``, ``measure``, ``coefficient`` (``tau``, ``granulated`` or ``factor``), ``factor``,
        ``value`` and the four ends of the intervals; measures by τ for the first target.
    """
    parts = []
    for name in (TAU, GRANULATED):
        ends = {f"{name}_{end}": end for end in ENDS}
        own = ranking[["target", "measure", name, *ends]].rename(columns={name: "value", **ends})
        parts.append(own.assign(coefficient=name))
    single = by_factor[["target", "measure", "factor", GRANULATED]].rename(columns={GRANULATED: "value"})
    both = pd.concat([*parts, single.assign(coefficient="factor")], ignore_index=True)
    first = ranking[ranking["target"] == TARGETS[0]].sort_values(TAU, ascending=False, kind="stable")
    place = {measure: i for i, measure in enumerate(first["measure"])}
    both = both.assign(place=both["measure"].map(place)).sort_values(["place", "target"], kind="stable")
    columns = ["target", "measure", "coefficient", "factor", "value", *ENDS]
    return both[columns].dropna(subset=["value"]).reset_index(drop=True)


@style.styled
def draw_ranking(table: pd.DataFrame) -> Figure:
    """A panel for each target and a row for each measure, those with the largest τ on top.

    Args:
        table: As ``drawn`` returns it.
    """
    names = list(dict.fromkeys(table["measure"]))
    figure = style.new_figure("Which measure ranks runs by their robust gap", 1.6 + 0.2 * len(names))
    axes = figure.subplots(1, len(TARGETS), sharey=True, squeeze=False)[0]
    for ax, target in zip(axes, TARGETS, strict=True):
        _draw_target(ax, table[table["target"] == target], names)
        ax.set_title(EPOCHS[target].label.capitalize())
    name_rows(axes[0], names)
    for label in axes[0].get_yticklabels():
        label.set_fontsize(8.0)
        label.set_fontweight("bold" if label.get_text() in (INDEX, BASELINE) else "normal")
    handles = [
        key("τ, all pairs", "", "o", style.PALETTE[0]),
        key("95 % over settings", colour=style.PALETTE[0], linewidth=1.0),
        key("over seeds", colour=style.PALETTE[0], linewidth=3.5, alpha=0.4),
        key("Ψ, pairs that differ in one factor", "", "D", style.PALETTE[1], fillstyle="none"),
        key("ψ of each factor", "", "|", style.MARK),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _draw_target(ax: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    height = rows["measure"].map({name: len(names) - 1 - i for i, name in enumerate(names)})
    rows = rows.assign(height=height.astype(float))
    looks: dict[str, dict[str, Any]] = {
        "factor": {"marker": "|", "color": style.MARK, "markersize": 5.0},
        GRANULATED: {"marker": "D", "color": style.PALETTE[1], "fillstyle": "none", "markersize": 4.0},
        TAU: {"marker": "o", "color": style.PALETTE[0]},
    }
    overall = rows[rows["coefficient"] == TAU]
    ax.hlines(
        overall["height"],
        overall["settings_low"],
        overall["settings_high"],
        color=style.PALETTE[0],
        linewidth=1,
    )
    ax.hlines(
        overall["height"], overall["seeds_low"], overall["seeds_high"], color=style.PALETTE[0], linewidth=3.5,
        alpha=0.4,
    )  # fmt: skip
    for coefficient, look in looks.items():
        own = rows[rows["coefficient"] == coefficient]
        ax.plot(own["value"], own["height"], linestyle="", **look)
    ax.axvline(0.0, color=style.MARK, linewidth=0.8)
    ax.set_xlim(-1.05, 1.05)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("rank correlation")


def _test_examples(run: Run) -> int:
    """How many test images the run's errors are of.

    Raises:
        RecordError: The run does not say.
    """
    data = run.config["data"]
    size = data.get("test_size") or TEST_EXAMPLES.get(str(data["_target_"]).rpartition(".")[2])
    if size is None:
        raise RecordError(
            f"{run.path}: how many test images there are is not known; train with data.test_size"
        )
    return int(size)


STUDY = Study(
    "Which measure ranks runs by their robust generalisation gap, over all factors and within one, and where "
    "does the WCI stand?",
    answer,
)
