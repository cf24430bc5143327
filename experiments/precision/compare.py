"""Learning curves of one training carried out in several ways, run by run with the same seed.

    python experiments/precision/compare.py DIR [DIR ...]

reads the runs of ``experiment=precision`` (any number of data sets) and writes ``results/table.md``,
``results/table.csv`` and ``results/curves.png`` beside this script. Each way is compared with the first,
``execution=default``, by the differences between runs of equal seed, which share initial weights, batches and
random starts of the attack, and differ in rounding alone.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records import Run, find_runs, read_table
from robustdyn.records.reader import combine
from robustdyn.records.schema import EPOCHS
from robustdyn.report import style
from robustdyn.report.plotting import Cast, finish, group_legend, log_axis, mark_decays

REFERENCE = "default"
CURVES = ("train_robust_loss", "test_robust_loss")
LEVEL = 0.05  # of the tests, two-sided


@dataclass(frozen=True)
class Metric:
    """A number of each run: a column's lowest or last value, or that of another table's last row."""

    label: str
    column: str
    pick: str
    table: str = "epochs"
    scale: float = 1.0
    digits: int = 3


METRICS = (
    Metric("test robust loss, lowest", "test_robust_loss", "lowest"),
    Metric("test robust loss, final", "test_robust_loss", "last"),
    Metric("test robust error, lowest (%)", "test_robust_error", "lowest", scale=100.0, digits=1),
    Metric("test robust error, final (%)", "test_robust_error", "last", scale=100.0, digits=1),
    Metric("train robust loss, final", "train_robust_loss", "last", digits=4),
    Metric("WCI, final", "wci", "last", table="wci", digits=1),
    Metric("Tr H, final", "hessian_trace", "last", table="wci", digits=1),
    Metric("largest Hessian eigenvalue, final", "hessian_eigenvalue", "last", table="spectrum", digits=2),
)


def execution(run: Run) -> str:
    """How the run was carried out: the preset, and the memory layout where it is not the presets'."""
    layout = "" if run.config["execution"]["channels_last"] else ", channels first"
    return run.choices["execution"] + layout


def data_sets(runs: Sequence[Run]) -> Mapping[str, list[Run]]:
    """The runs of each data set, those of the reference first.

    Raises:
        RecordError: An unfinished run, a data set without a run of the reference or of anything else, or two
            runs alike.
    """
    for run in runs:
        finished, wanted = len(read_table(run.path, "epochs")), run.config["trainer"]["max_epochs"]
        if finished < wanted:
            raise RecordError(
                f"{run.path}: {finished} of {wanted} epochs recorded; go on with hydra.run.dir={run.path}, "
                "or leave it out"
            )
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: execution(run) != REFERENCE):
        found.setdefault(run.choices["data"], []).append(run)
    for name, own in found.items():
        kinds = [(execution(run), run.config["seed"]) for run in own]
        if kinds[0][0] != REFERENCE:
            raise RecordError(
                f"{own[0].path}: no run of {name} with execution={REFERENCE}; give its directory too"
            )
        if kinds[-1][0] == REFERENCE:
            raise RecordError(
                f"{own[0].path}: all runs of {name} have execution={REFERENCE}; give others to compare"
            )
        for run, kind in zip(own, kinds, strict=True):
            if kinds.count(kind) > 1:
                raise RecordError(f"{run.path}: another run has {kind[0]}, seed {kind[1]} too; leave one out")
    return found


def rows(runs: Sequence[Run], table: str) -> pd.DataFrame:
    """A table of the runs, with ``group``, the execution, and ``seed``."""
    frame = combine(runs, table)
    groups, seeds = ({run.label: f(run) for run in runs} for f in (execution, lambda run: run.config["seed"]))
    return frame.assign(group=frame["run"].map(groups), seed=frame["run"].map(seeds))


def values(frame: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """The metric of each run: seeds as rows, executions as columns, in their order of appearance."""
    known = frame.dropna(subset=[metric.column]).sort_values("epoch", kind="stable")
    if metric.table == "spectrum":
        known = known[known["index"] == known["index"].min()]
    of_runs = known.groupby(["seed", "group"], sort=False)[metric.column]
    picked = of_runs.min() if metric.pick == "lowest" else of_runs.last()
    order = [group for group in dict.fromkeys(frame["group"]) if group in set(known["group"])]
    return picked.unstack("group").reindex(columns=order) * metric.scale


@dataclass(frozen=True)
class Difference:
    """Mean of differences paired by seed, and what seeds alone would explain.

    Attributes:
        mean: Over seeds.
        se: Its standard error; NaN for one seed.
        seeds: Their number.
        half_width: Of the 95 % confidence interval (Student's t): differences up to about this size cannot
            be told from none.
    """

    mean: float
    se: float
    seeds: int
    half_width: float

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval holds 0; None where a single seed leaves no interval."""
        return None if np.isnan(self.half_width) else bool(abs(self.mean) <= self.half_width)


def difference(reference: "pd.Series[float]", other: "pd.Series[float]") -> Difference | None:
    """``other`` − ``reference`` over the seeds that both have; None without any."""
    paired = (other - reference).dropna().to_numpy(dtype=float)
    n = len(paired)
    if n == 0:
        return None
    se = float(paired.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    quantile = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) if n > 1 else float("nan")
    return Difference(float(paired.mean()), se, n, quantile * se)


@dataclass(frozen=True)
class CurveDifference:
    """How far two mean curves come apart, in standard errors of their difference paired by seed.

    Attributes:
        epochs: Epochs compared.
        largest: max over epochs of |mean difference| / its standard error.
        at: The epoch of that.
        limit: What the largest exceeds in 5 % of cases at most if no epoch differs (Bonferroni).
        outside: Share of epochs whose own 95 % interval leaves out 0; 5 % on average if none differs.
    """

    epochs: int
    largest: float
    at: int
    limit: float
    outside: float


def curves_of(frame: pd.DataFrame, column: str, group: str) -> pd.DataFrame:
    """A column of one execution: epochs as rows, seeds as columns."""
    own = frame[frame["group"] == group].dropna(subset=[column])
    return own.pivot(index="epoch", columns="seed", values=column)


def paired_curves(frame: pd.DataFrame, column: str, group: str) -> pd.DataFrame:
    """``group`` − reference for every seed that both have, at the epochs that all of these have."""
    apart = curves_of(frame, column, group) - curves_of(frame, column, REFERENCE)
    return apart.dropna(axis=1, how="all").dropna()


def curve_difference(frame: pd.DataFrame, column: str, group: str) -> CurveDifference | None:
    """The curves of ``group`` and of the reference; None unless two seeds have both."""
    paired = paired_curves(frame, column, group)
    n = paired.shape[1]
    if n < 2 or paired.empty:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # equal curves: 0 / 0 is no difference
        ratios = (paired.mean(axis=1).abs() / (paired.std(axis=1, ddof=1) / np.sqrt(n))).fillna(0.0)
    return CurveDifference(
        epochs=len(ratios),
        largest=float(ratios.max()),
        at=int(ratios.idxmax()),
        limit=float(stats.t.ppf(1 - LEVEL / 2 / len(ratios), n - 1)),
        outside=float((ratios > stats.t.ppf(1 - LEVEL / 2, n - 1)).mean()),
    )


def metric_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per metric and execution: mean, s.e. and s.d. over seeds, and difference to the reference."""
    frames = {table: rows(runs, table) for table in dict.fromkeys(metric.table for metric in METRICS)}
    found = []
    for metric in METRICS:
        if frames[metric.table].empty:
            continue
        by_seed = values(frames[metric.table], metric)
        for group in by_seed.columns:
            own = by_seed[group].dropna()
            row = {"metric": metric.label, "execution": group, "seeds": len(own), "mean": own.mean()}
            row |= {"se": own.std(ddof=1) / np.sqrt(len(own)), "sd": own.std(ddof=1)}
            change = None if group == REFERENCE else difference(by_seed[REFERENCE], by_seed[group])
            if change is not None:
                row |= {"difference": change.mean, "difference_se": change.se, "pairs": change.seeds}
                row |= {"half_width": change.half_width, "within_noise": change.within_noise}
            found.append(row)
    return pd.DataFrame(found)


def curve_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per curve and execution other than the reference."""
    frame = rows(runs, "epochs")
    found = []
    for column in CURVES:
        for group in [name for name in dict.fromkeys(frame["group"]) if name != REFERENCE]:
            apart = curve_difference(frame, column, group)
            if apart is not None:
                found.append({"curve": EPOCHS[column].label, "execution": group} | vars(apart))
    return pd.DataFrame(found)


def markdown(name: str, metrics: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Both tables of one data set."""
    digits = {metric.label: metric.digits for metric in METRICS}
    heads = ["", "execution", "seeds", "mean ± s.e.", "difference ± s.e.", "95 % interval", "within noise"]
    lines = [f"**{name}**", "", *_head(heads)]
    for _, row in metrics.iterrows():
        places = digits[row["metric"]]
        first = row["execution"] == REFERENCE
        cells = [row["metric"] if first else "", row["execution"], str(row["seeds"])]
        cells.append(f"{row['mean']:.{places}f} ± {row['se']:.{places}f}")
        if not first and not pd.isna(row.get("difference")):
            mean, half = row["difference"], row["half_width"]
            cells.append(f"{mean:+.{places}f} ± {row['difference_se']:.{places}f}")
            cells.append(f"{mean - half:+.{places}f} to {mean + half:+.{places}f}")
            cells.append({True: "yes", False: "**no**"}.get(row["within_noise"], "one seed"))
        lines.append(_line([*cells, *[""] * (len(heads) - len(cells))]))
    if not curves.empty:
        heads = [
            "curve",
            "execution",
            "epochs",
            "largest difference / s.e.",
            "5 % limit",
            "outside 95 % interval",
        ]
        lines += ["", *_head(heads)]
        for _, row in curves.iterrows():
            cells = [row["curve"], row["execution"], str(row["epochs"])]
            cells += [f"{row['largest']:.1f} (epoch {row['at']})", f"{row['limit']:.1f}"]
            lines.append(_line([*cells, f"{row['outside']:.0%} of epochs"]))
    return "\n".join(lines) + "\n"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@style.styled
def figure(sets: Mapping[str, Sequence[Run]]) -> Figure:
    """A row per data set: train and test robust loss, and the test loss's difference paired by seed."""
    frames = {name: rows(runs, "epochs") for name, runs in sets.items()}
    groups = list(dict.fromkeys(group for frame in frames.values() for group in frame["group"]))
    colours = dict(zip(groups, style.colours(len(groups)), strict=True))
    cast = Cast(colours, sizes=dict.fromkeys(groups, 1))  # of seeds, which the title speaks of
    drawn = style.new_figure(
        "Robust loss by way of execution: mean and range over seeds", 0.7 + 2.7 * len(sets)
    )
    for panels, (name, frame) in zip(
        drawn.subplots(len(sets), 3, squeeze=False, width_ratios=(1, 1, 1)), frames.items(), strict=True
    ):
        for ax, column in zip(panels, CURVES, strict=False):
            for group, shade in cast.colours.items():
                _band(ax, curves_of(frame, column, group), shade)
            finish(ax, f"{name}: {EPOCHS[column].label}", f"robust loss ({EPOCHS[column].unit})")
        log_axis(panels[0])  # memorisation goes on at a small loss
        test = CURVES[1]
        for group, shade in cast.colours.items():
            if group != REFERENCE:
                _band(panels[2], paired_curves(frame, test, group), shade)
        panels[2].axhline(0.0, color=style.MARK, linewidth=0.8)
        finish(panels[2], f"{name}: test, paired by seed", f"loss − {REFERENCE}'s ({EPOCHS[test].unit})")
        _zoom(panels[2])
        mark_decays(panels, frame, cast)
    group_legend(drawn, cast, single_seeds=False)
    return drawn


def _band(ax: Axes, curves: pd.DataFrame, shade: str) -> None:
    """Mean and range over the columns."""
    if not curves.empty:
        ax.fill_between(
            curves.index, curves.min(axis=1), curves.max(axis=1), color=shade, alpha=0.18, linewidth=0
        )
        ax.plot(curves.index, curves.mean(axis=1), color=shade, linewidth=1.6)


def _zoom(ax: Axes) -> None:
    """Limits for all but the first fifth of the epochs, in which networks that learn fast differ most."""
    points = np.concatenate([np.asarray(line.get_xydata()) for line in ax.lines[:-1]])
    late = points[points[:, 0] >= 0.2 * points[:, 0].max(), 1]
    ax.set_ylim(-(limit := 4 * np.abs(late).max() or 1.0), limit)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="+", type=Path, help="run or sweep directories")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    arguments = parser.parse_args()
    sets = data_sets(find_runs(arguments.path))
    metrics = {name: metric_table(runs) for name, runs in sets.items()}
    curves = {name: curve_table(runs) for name, runs in sets.items()}
    arguments.output.mkdir(exist_ok=True)
    together = pd.concat([frame.assign(data=name) for name, frame in metrics.items()])
    together.to_csv(arguments.output / "table.csv", index=False, float_format="%.6g")
    text = "\n".join(markdown(name, metrics[name], curves[name]) for name in sets)
    (arguments.output / "table.md").write_text(text)
    figure(sets).savefig(arguments.output / "curves.png", dpi=style.DPI, metadata={"Software": None})
    print(text)


if __name__ == "__main__":
    main()
