"""The learning rates that follow a measurement beside the usual schedules (WCI paper, tables 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure

from robustdyn.errors import RecordError
from robustdyn.records.reader import Run, combine
from robustdyn.records.schema import (
    EPOCHS,
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
    TEST_CLEAN_ERROR,
    TEST_ROBUST_ERROR,
    TIMED,
)
from robustdyn.report import style
from robustdyn.report.plotting import finish, label_ends, log_axis
from robustdyn.report.statistics import by_run
from robustdyn.studies.shared.comparing import (
    METRICS,
    MOMENT,
    RATE,
    against,
    at_moments,
    mean_with_interval,
    metrics_over_epochs,
    require_alike,
    require_complete,
    values,
)
from robustdyn.studies.shared.comparison_figures import (
    BANDS,
    best_and_final,
    draw_over_epochs,
    of_seeds,
    setting_colours,
)
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.studies.shared.wording import final_said, lowest_said, seeds_said, sentence, shown_table

NAMES = {
    "piecewise": "piecewise",
    "multi_decay": "multiple decays",
    "linear": "linear",
    "cosine": "cosine",
    "cyclic": "one-cycle",
    "one_cycle": "one-cycle",
    "constant": "constant",
}
WCI_RATE, BOUND_RATE = "WCI-LR", "bound"
AGAINST = {"against_wci": WCI_RATE, "against_bound": BOUND_RATE}
MAY_DIFFER = ("schedule", "optimizer.lr")  # one-cycle has a higher peak
CURVES = (TEST_ROBUST_ERROR, TEST_CLEAN_ERROR, RATE)
PANELS = {
    TEST_ROBUST_ERROR: "Robust error",
    TEST_CLEAN_ERROR: "Clean error",
    ROBUST_ERROR_GAP: "Gap in error",
    ROBUST_LOSS_GAP: "Gap in loss",
}
TRAINING, EVALUATION, MEASUREMENT = "training", "evaluation", "measurement"
PARTS = {name: name if name in (EVALUATION, MEASUREMENT) else TRAINING for name in TIMED}
SETTLED = 0.4  # of the run: a barely trained network's errors would flatten the curves
NEGLIGIBLE = 1e-3  # of the highest rate: curves of lower ones are cut


def schedule_names(runs: Sequence[Run]) -> dict[str, str]:
    """Label of each run -> name of its schedule, in the order of the paper's table, measured rates last.

    Raises:
        RecordError: A schedule is not known, runs differ in more, or there is no WCI rate to compare.
    """
    require_alike(runs, MAY_DIFFER)
    names = {}
    for run in runs:
        choice = run.choices.get("schedule", "")
        threshold, beta = (run.config["schedule"].get(key) for key in ("threshold", "beta_per_example"))
        name = NAMES.get(choice)
        if threshold is not None:
            name = f"{WCI_RATE}, τ = {threshold:g}"
        elif beta is not None:
            name = f"{BOUND_RATE}, β = {beta:g} n"
        if name is None:
            raise RecordError(
                f"{run.path}: schedule {choice or 'unknown'} is none of {', '.join(NAMES)}, bound, wci"
            )
        names[run.label] = name
    if len(set(names.values())) < 2 or not any(name.startswith(WCI_RATE) for name in names.values()):
        raise RecordError(f"{runs[0].path} and others: the study needs runs of schedule=wci and of another")
    order = [*dict.fromkeys(NAMES.values()), *sorted(names.values(), key=lambda n: n.startswith(WCI_RATE))]
    return dict(sorted(names.items(), key=lambda item: order.index(item[1])))


def seconds(runs: Sequence[Run], settings: Mapping[str, str]) -> pd.DataFrame:
    """Where the time of a run's epochs went.

    Epochs after the first, which warms up and may compile.

    Returns:
        ``setting``, ``seed`` and, in seconds: ``training``, ``evaluation``, ``measurement`` and ``all`` per
        epoch of the run; ``one_evaluation`` and ``one_measurement`` where there was one;
        ``measurement_share`` in per cent. No rows where times were not recorded.
    """
    timing = by_run(combine(runs, "timing"))
    found = []
    for run in runs:
        own = timing[run.label].iloc[1:]
        if own.empty:
            continue
        spent = {name: own[f"{name}_share"] * own["seconds"] for name in TIMED}
        row: dict[str, object] = {"setting": settings[run.label], "seed": run.config["seed"]}
        row |= {
            part: sum(float(spent[name].mean()) for name in TIMED if PARTS[name] == part)
            for part in dict.fromkeys(PARTS.values())
        }
        row["all"] = float(own["seconds"].mean())
        for part in (EVALUATION, MEASUREMENT):
            row[f"one_{part}"] = float(spent[part][spent[part] > 0].mean())
        row["measurement_share"] = 100 * float(spent[MEASUREMENT].sum() / own["seconds"].sum())
        found.append(row)
    columns = ["setting", "seed", *dict.fromkeys(PARTS.values()), "all", "one_evaluation", "one_measurement"]
    return pd.DataFrame(found, columns=[*columns, "measurement_share"])


def of_training(times: pd.DataFrame) -> pd.DataFrame:
    """The epochs of ``seconds`` in per cent of their run's own training, which slows down with the rest.

    Returns:
        ``setting``, ``seed``, the parts and ``all``.
    """
    names = [*dict.fromkeys(PARTS.values()), "all"]
    shares = 100 * times[names].div(times[TRAINING], axis=0)
    return pd.concat([times[["setting", "seed"]], shares], axis=1)


def cost(times: pd.DataFrame, order: Sequence[str], unit: str = "s") -> pd.DataFrame:
    """Mean and interval over seeds of each column of ``seconds`` or its like, as ``quantity``."""
    long = times.drop(columns="seed").melt("setting", var_name="quantity")
    found = mean_with_interval(long, ["setting", "quantity"])
    found = found.sort_values("setting", key=lambda names: names.map(list(order).index), kind="stable")
    return found.assign(unit=found["quantity"].map({"measurement_share": "%"}).fillna(unit)).reset_index(
        drop=True
    )


def answer(runs: Sequence[Run]) -> Answer:
    """Best and final of each schedule, learning curves, and times."""
    settings = schedule_names(runs)
    require_complete(runs)
    order = list(dict.fromkeys(settings.values()))
    ordered = sorted(runs, key=lambda run: order.index(settings[run.label]))
    rows = values(
        ordered, [TEST_ROBUST_ERROR], lambda run: settings[run.label], None, optional=[*METRICS, *CURVES]
    )
    found = at_moments(rows)
    means = mean_with_interval(found, MOMENT)
    differences = {
        table: against(found, name, MOMENT[1:]).assign(minus=name)
        for table, prefix in AGAINST.items()
        for name in [name for name in order if name.startswith(prefix)][-1:]
    }
    tables = {
        "schedules": means,
        "schedules_shown": shown_table(means),
        **differences,
        "runs": found,
    }
    pictures = [
        best_and_final(means, "Best and final epoch of each schedule", PANELS),
        Picture("learning_curves", metrics_over_epochs(rows, CURVES), draw_curves),
    ]
    times = seconds(runs, settings)
    if len(times):
        tables["cost"] = cost(times, order)
        tables["cost_of_training"] = cost(of_training(times), order, "%")
        pictures.append(Picture("cost", tables["cost_of_training"], draw_cost))
    return Answer(tables, pictures, findings_of(tables))


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which schedule is the most robust, which differ from the measured rates, and what WCI-LR costs."""
    means, apart = tables["schedules"], [tables[name] for name in AGAINST if name in tables]
    reference = apart[0]["minus"].iloc[0]
    said = [lowest_said(means[means["metric"] == TEST_ROBUST_ERROR])]
    said += [final_said(own, [TEST_ROBUST_ERROR], own["minus"].iloc[0]) for own in apart]
    cost_said = "The cost is not known: these runs have no table timing."
    if "cost" in tables:
        mean = tables["cost"].set_index(["setting", "quantity"])["mean"]
        cost_said = (
            f"An epoch of {reference} takes {mean[reference, 'all']:.3g} s, mean over the run, of which "
            f"measuring takes {mean[reference, 'measurement_share']:.0f} %."
        )
    return [sentence("; ".join(said)), cost_said]


@style.styled
def draw_curves(over_epochs: pd.DataFrame) -> Figure:
    """What the rates lead to, and the rates, whose curves end apart (the paper's figure 9 b)."""
    colours = setting_colours(over_epochs)
    figure = style.new_figure(f"Learning curves ({of_seeds(over_epochs, colours)})", 3.6)
    axes = figure.subplots(1, len(CURVES))
    curves = over_epochs.rename(columns={"metric": "quantity"})
    for ax, name, title in zip(axes, CURVES, ("Robust error", "Clean error", "Rate"), strict=True):
        own = curves[curves["quantity"] == name]
        bands = name != RATE and len(colours) <= BANDS
        ends = draw_over_epochs(ax, own, colours, {name: "-"}, bands=bands)
        finish(ax, title, EPOCHS[name].shown)
        if name == RATE:
            log_axis(ax)
            lowest = max(ax.get_ylim()[0], NEGLIGIBLE * own["mean"].max())
            ax.set_ylim(bottom=lowest)
            label_ends(ax, [replace(end, y=max(end.y, 1.5 * lowest)) for end in ends])
            continue
        settled = own.loc[own["epoch"] >= SETTLED * (own["epoch"].max() + 1), ["mean", "high"]]
        limit = 1.05 * settled.max(axis=None)
        ax.set_ylim(bottom=max(0.0, 0.9 * own["mean"].min()))
        if own["mean"].max() > limit:
            ax.set_ylim(top=limit)
            said_top = f"first epochs reach {own['mean'].max():.0f} %"
            ax.text(0.99, 0.98, said_top, transform=ax.transAxes, ha="right", va="top", fontsize=8)
    return figure


@style.styled
def draw_cost(costs: pd.DataFrame) -> Figure:
    """Time per epoch by what took it (the paper's table 2), in per cent of the run's own training."""
    order = list(dict.fromkeys(costs["setting"]))
    figure = style.new_figure(
        f"Time per epoch, mean over the run ({seeds_said(costs)})", 1.4 + 0.36 * len(order)
    )
    ax = figure.subplots()
    start = dict.fromkeys(order, 0.0)
    for part, colour in zip(dict.fromkeys(PARTS.values()), style.PALETTE, strict=False):
        own = costs[costs["quantity"] == part].set_index("setting")["mean"]
        places = [len(order) - 1 - order.index(name) for name in own.index]
        left = [start[name] for name in own.index]
        ax.barh(places, own.to_numpy(), height=0.6, color=colour, left=left, label=part)
        start = {name: start[name] + float(own.get(name, 0.0)) for name in order}
    whole = costs[costs["quantity"] == "all"].set_index("setting")
    for name, row in whole.iterrows():
        y = len(order) - 1 - order.index(str(name))
        if not pd.isna(row["low"]):
            ax.plot([row["low"], row["high"]], [y, y], color=style.NEUTRAL, linewidth=1.2)
    ax.set_yticks(range(len(order)), list(reversed(order)))
    ax.set_xlim(left=0)
    ax.set_xlabel("% of the run's own training; black: 95 % interval of the sum")
    ax.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


STUDY = Study(
    "How does the WCI learning rate compare with the usual schedules, best and final, and what does it cost?",
    answer,
)
