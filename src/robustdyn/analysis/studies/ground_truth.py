"""Is the theory right? The distribution of replicas' weights against what curvature and noise predict.

Xu and Zhang, How Learning Dynamics Drive Adversarially Robust Generalization?, arXiv 2410.07719, predict
posterior variances and do not measure them. Replicas of one checkpoint do: ``robustdyn-replicas``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from robustdyn.analysis import style
from robustdyn.analysis.expansion import draw_expansion, expansion_findings, expansion_tables
from robustdyn.analysis.plotting import End, key, label_ends
from robustdyn.analysis.statistics import DECAY
from robustdyn.analysis.study import Answer, Picture, Study
from robustdyn.errors import RecordError
from robustdyn.records.reader import Run
from robustdyn.replicas.agreement import Agreement, agreement
from robustdyn.replicas.prediction import (
    EXACT,
    EXACT_PATH,
    REFRESHED,
    REFRESHED_PATH,
    SLOW_MODE,
    STATIONARY,
    example_noise,
    predicted_laws,
    refreshed_with_error,
    sampling_of,
)
from robustdyn.replicas.record import RecordedEnsemble, read_ensemble

CONFIDENCE, RESAMPLES, DRAWS = 0.95, 1000, 40
GOAL = (0.9, 1.11)  # of a geometric mean that counts as agreement
SETTLED = 10  # steps from which on it is asked for
SHOWN = 6  # directions in the figure of variances
GAP = 0.25  # decades between what precedes a decay and what follows

NAMES = {
    STATIONARY: "stationary",
    SLOW_MODE: "slow mode",
    EXACT: "exact, attack held fixed",
    REFRESHED: "exact, attack made anew",
    EXACT_PATH: "attack held fixed, along the mean's path",
    REFRESHED_PATH: "attack made anew, along the mean's path",
}
COLOURS = {
    STATIONARY: style.PALETTE[3],
    SLOW_MODE: style.PALETTE[4],
    EXACT: style.PALETTE[0],
    REFRESHED: style.PALETTE[1],
    EXACT_PATH: style.PALETTE[0],
    REFRESHED_PATH: style.PALETTE[1],
}
SEEN = ["ensemble", "step", "learning_rate", "slope", "slope_error", "noise", "noise_error"]
LINES = {EXACT_PATH: ":", REFRESHED_PATH: ":"}
SHORT = {STATIONARY: "stationary", SLOW_MODE: "slow mode", EXACT: "held fixed", REFRESHED: "made anew"}


def label_of(settings: Mapping[str, Any]) -> str:
    """``CIFAR10, AWP``: data, method, and what is unusual about an ensemble."""
    objective = str(settings["objective"]["_target_"]).rpartition(".")[2]
    perturbation = settings.get("perturbation")
    method = (
        str(perturbation["_target_"]).rpartition(".")[2]
        if perturbation
        else {"AdversarialCrossEntropy": "AT", "CrossEntropy": "standard"}.get(objective, objective)
    )
    parts = [str(settings["data"]).rpartition(".")[2], method]
    if "betas" in settings["optimizer"]:
        parts.append("Adam, D held" if settings.get("freeze_preconditioner") else "Adam")
    if not settings["sampling.replacement"]:
        parts.append("shuffled epochs")
    if settings.get("batchnorm") == "train":
        parts.append("BatchNorm in train mode")
    return ", ".join(parts)


def find_ensembles(runs: Sequence[Run]) -> dict[str, RecordedEnsemble]:
    """The runs' ensembles by label, in the runs' order.

    Raises:
        RecordError: There is none, or one cannot be read.
    """
    found: dict[str, RecordedEnsemble] = {}
    for run in runs:
        for settings in sorted((run.path / "replicas").glob("*/settings.json")):
            ensemble = read_ensemble(settings.parent)
            name = label_of(ensemble.settings)
            if name in found:
                name = f"{name} ({run.label} {settings.parent.name})"
            found[name] = ensemble
    if not found:
        raise RecordError(
            f"{', '.join(str(run.path) for run in runs)}: no ensemble of replicas; make one with "
            "robustdyn-replicas checkpoint=RUN/checkpoints/last.ckpt, or train with ensemble=default"
        )
    return found


def answer(runs: Sequence[Run]) -> Answer:
    """Compare every ensemble of the runs with every law."""
    ensembles = find_ensembles(runs)
    agreements = {
        name: {
            law: agreement(e.position, predicted, confidence=CONFIDENCE, resamples=RESAMPLES, seed=0)
            for law, predicted in predicted_laws(e).items()
        }
        for name, e in ensembles.items()
    }
    steps = pd.concat([_steps(name, e, agreements[name]) for name, e in ensembles.items()], ignore_index=True)
    directions = pd.concat(
        [_directions(name, e, agreements[name]) for name, e in ensembles.items()], ignore_index=True
    )
    path = pd.concat([_path(name, e) for name, e in ensembles.items()], ignore_index=True)
    replicas = pd.concat([_seen_at_replicas(name, e) for name, e in ensembles.items()], ignore_index=True)
    described = pd.DataFrame([_described(name, e) for name, e in ensembles.items()])
    pictures = [
        Picture("ratio", steps[steps["step"] >= 1].reset_index(drop=True), _ratio_figure),
        Picture("ratio_by_eigenvalue", _ends(directions, described), _eigenvalue_figure),
        Picture("mean", steps[steps["step"] >= 1].reset_index(drop=True), _mean_figure),
    ]
    for name in ensembles:
        rows = _shown(directions[directions["ensemble"] == name])
        pictures.append(Picture(f"variance_{_slug(name)}", rows, partial(_variance_figure, name=name)))
    if not (path.empty and replicas.empty):
        both = pd.concat([path.assign(source="path"), replicas.assign(source="replicas")], ignore_index=True)
        pictures.append(Picture("drift", both, _drift_figure))
    expanded = {name: e for name, e in ensembles.items() if e.lines is not None}
    tables = expansion_tables(expanded) if expanded else {}
    findings = _findings(described, steps, path, replicas)
    if expanded:
        pictures.append(Picture("expansion", tables["expansion_means"], draw_expansion))
        findings += expansion_findings(tables)
    return Answer(
        tables={
            "ensembles": described,
            "agreement": steps,
            "along_the_path": path,
            "at_the_replicas": replicas,
            **tables,
        },
        pictures=pictures,
        findings=findings,
    )


# ---------------------------------------------------------------------- tables


def _described(name: str, ensemble: RecordedEnsemble) -> dict[str, object]:
    start, rates = ensemble.start, ensemble.learning_rate
    known = np.isfinite(start.slopes).all()
    changes = np.flatnonzero(np.diff(rates) < -DECAY * rates[:-1]) + 1
    return {
        "ensemble": name,
        "replicas": len(ensemble.replicas),
        "steps": len(rates),
        "directions": start.directions.count,
        "learning_rate": rates[0],
        "decay_step": int(changes[0]) if len(changes) == 1 else None,
        "last_learning_rate": rates[-1],
        "robust_loss": start.loss,
        "largest_eigenvalue": start.eigenvalues.max(),
        "smallest_eigenvalue": start.eigenvalues.min(),
        "slope_over_eigenvalue": float(np.mean(np.diag(start.slopes) / start.eigenvalues))
        if known
        else np.nan,
        "slope_asymmetry": _asymmetry(start.slopes) if known else np.nan,
    }


def _asymmetry(slopes: np.ndarray) -> float:
    """‖J − Jᵀ‖ / (2‖J‖), 0 for the gradient of a function."""
    return float(np.linalg.norm(slopes - slopes.T) / (2 * np.linalg.norm(slopes)))


def _steps(name: str, ensemble: RecordedEnsemble, found: Mapping[str, Agreement]) -> pd.DataFrame:
    """One row per law and recorded step."""
    rows = []
    errors = np.zeros(len(ensemble.steps))
    if REFRESHED in found:
        variances = refreshed_with_error(ensemble, draws=DRAWS, seed=0)
        with np.errstate(divide="ignore"):
            logs = np.log(variances)
        moved = ensemble.steps > 0
        errors[moved] = logs[:, moved].mean(axis=2).std(axis=0, ddof=1)
    for law, seen in found.items():
        for row, step in enumerate(ensemble.steps):
            usable = np.isfinite(seen.offset[row]).any()
            rows.append(
                {
                    "ensemble": name,
                    "law": law,
                    "step": int(step),
                    "learning_rate": float(ensemble.learning_rate[max(step - 1, 0)]),
                    "directions": int(seen.directions[row]),
                    "geometric_mean": seen.geometric_mean[row],
                    "low": seen.geometric_low[row],
                    "high": seen.geometric_high[row],
                    "prediction_error": errors[row] if law == REFRESHED else np.nan,
                    "rms_offset": _rms(seen.offset[row]) if usable else np.nan,
                    "rms_move": _rms(seen.move[row]) if usable else np.nan,
                    "rms_offset_of_chance": seen.offset_error,
                    "correlation_misfit": seen.correlation_misfit[row],
                    "commuting_misfit": seen.commuting_misfit[row],
                    "total_correlation": seen.total_correlation[row],
                    "total_correlation_expected": seen.total_correlation_expected[row],
                    "total_correlation_spread": seen.total_correlation_spread[row],
                    "total_correlation_commuting": seen.total_correlation_commuting[row],
                }
            )
    return pd.DataFrame(rows)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.nanmean(values**2)))


def _directions(name: str, ensemble: RecordedEnsemble, found: Mapping[str, Agreement]) -> pd.DataFrame:
    """One row per law, recorded step and direction."""
    start = ensemble.start
    parts = []
    for law, seen in found.items():
        for row, step in enumerate(ensemble.steps):
            if step == 0:
                continue
            parts.append(
                pd.DataFrame(
                    {
                        "ensemble": name,
                        "law": law,
                        "step": int(step),
                        "learning_rate": float(ensemble.learning_rate[step - 1]),
                        "direction": np.arange(1, start.directions.count + 1),
                        "eigenvalue": start.eigenvalues,
                        "slope": np.diag(start.slopes),
                        "measured": seen.variance[row],
                        "low": seen.low[row],
                        "high": seen.high[row],
                        "predicted": seen.predicted[row],
                        "offset": seen.offset[row],
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def _path(name: str, ensemble: RecordedEnsemble) -> pd.DataFrame:
    """Curvature and noise along the mean's path, relative to the start; geometric means over directions."""
    start = ensemble.start
    rows = []
    for step, point in zip([0, *ensemble.path_steps], [start, *ensemble.path], strict=True):
        gamma, first = (np.diag(sum(example_noise(ensemble, p))) for p in (point, start))
        curved = np.diag(point.hessian) / np.diag(start.hessian)
        steep = np.diag(point.slopes) / np.diag(start.slopes)
        rows.append(
            {
                "ensemble": name,
                "step": int(step),
                "learning_rate": float(ensemble.learning_rate[max(step - 1, 0)]),
                "robust_loss": point.loss,
                "curvature": _geometric(curved),
                "slope": _geometric(steep),
                "noise": _geometric(gamma / first),
            }
        )
    return pd.DataFrame(rows).drop_duplicates("step")


def _geometric(values: np.ndarray) -> float:
    good = values[np.isfinite(values) & (values > 0)]
    return float(np.exp(np.log(good).mean())) if len(good) == len(values) else float("nan")


def _seen_at_replicas(name: str, ensemble: RecordedEnsemble) -> pd.DataFrame:
    """Slope and noise as the replicas' own gradients show them, where two steps in a row were recorded.

    A replica's gradient at step t is that at its place x of step t − 1: ``slope`` is Σ cov(g_i, x_i) over Σ
    (J Σ)_ii with the measured Σ, ``noise`` the geometric mean of the variance of g − J x over that of a batch
    at the start. Standard errors by the jackknife over replicas.
    """
    start = ensemble.start
    rows: list[dict[str, object]] = []
    sampling = sampling_of(ensemble)
    if not np.isfinite(start.slopes).all() or not sampling.replacement:
        return pd.DataFrame(columns=SEEN)
    gamma = np.diag(sum(example_noise(ensemble, start))) / sampling.batch_size
    steps = list(ensemble.steps)
    for row, step in enumerate(steps):
        if step < SETTLED or step - 1 not in steps:
            continue
        x, g = ensemble.position[:, steps.index(step - 1)], ensemble.gradient[:, row]
        if not np.isfinite(g).all():
            continue
        found = _slope_and_noise(x, g, start.slopes, gamma)
        left = np.array(
            [
                _slope_and_noise(np.delete(x, r, axis=0), np.delete(g, r, axis=0), start.slopes, gamma)
                for r in range(len(x))
            ]
        )
        error = np.sqrt((len(x) - 1) * left.var(axis=0))
        rows.append(
            {
                "ensemble": name,
                "step": int(step),
                "learning_rate": float(ensemble.learning_rate[step - 1]),
                "slope": found[0],
                "slope_error": error[0],
                "noise": found[1],
                "noise_error": error[1],
            }
        )
    return pd.DataFrame(rows, columns=SEEN)


def _slope_and_noise(x: np.ndarray, g: np.ndarray, slopes: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    x, g = x - x.mean(axis=0), g - g.mean(axis=0)
    expected = np.einsum("ri,ij,rj->", x, slopes, x)
    rest = g - x @ slopes.T
    return np.array([(x * g).sum() / expected, _geometric((rest**2).sum(axis=0) / (len(x) - 1) / gamma)])


def _shown(directions: pd.DataFrame) -> pd.DataFrame:
    """The rows of a few directions, spread evenly over the logarithm of their rank."""
    last = int(directions["direction"].max())
    chosen = np.unique(np.rint(np.geomspace(1, last, min(SHOWN, last))).astype(int))
    laws = directions["law"].isin([STATIONARY, SLOW_MODE, EXACT, REFRESHED])
    rows: pd.DataFrame = directions[laws & directions["direction"].isin(chosen)]
    return rows.reset_index(drop=True)


def _ends(directions: pd.DataFrame, described: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last step before the decay, and of the last of all."""
    parts = []
    for row in described.itertuples():
        own = directions[directions["ensemble"] == row.ensemble]
        steps = sorted(own["step"].unique())
        before = [s for s in steps if row.decay_step is None or s <= row.decay_step]
        chosen = {before[-1]: "at the first rate", steps[-1]: "at the end"}
        if before[-1] == steps[-1]:
            chosen = {steps[-1]: "at the end"}
        for step, when in chosen.items():
            parts.append(own[own["step"] == step].assign(when=f"{when}, step {step}"))
    ends = pd.concat(parts, ignore_index=True)
    kept: pd.DataFrame = ends[ends["law"].isin([EXACT, REFRESHED])].reset_index(drop=True)
    return kept


# ---------------------------------------------------------------------- findings


def _findings(
    described: pd.DataFrame, steps: pd.DataFrame, path: pd.DataFrame, replicas: pd.DataFrame
) -> list[str]:
    said = []
    for about in described.to_dict("records"):
        name, own = about["ensemble"], steps[steps["ensemble"] == about["ensemble"]]
        said += [
            _said_of(about),
            *_said_of_variances(name, own[own["step"] >= SETTLED]),
            _said_at_end(name, own),
        ]
        along = path[(path["ensemble"] == name) & (path["step"] > 0)]
        if len(along):
            end = along.iloc[-1]
            said.append(
                f"{name}, at the replicas' mean after {end['step']:.0f} steps: λ × {end['curvature']:.2f}, "
                f"slope × {end['slope']:.2f}, noise × {end['noise']:.2f}, robust loss "
                f"{end['robust_loss']:.3f} (start {about['robust_loss']:.3f})."
            )
        seen = replicas[replicas["ensemble"] == name]
        if len(seen):
            mean = np.average(seen["noise"], weights=1 / seen["noise_error"] ** 2)
            late = seen.iloc[-1]
            said.append(
                f"{name}, from the replicas' own gradients: noise × {mean:.2f} over all recorded pairs of "
                f"steps, × {late['noise']:.2f} ± {late['noise_error']:.2f} at the last."
            )
    return said


def _said_of(about: Mapping[Any, Any]) -> str:
    rate = f"rate {about['learning_rate']:g}"
    if not pd.isna(about["decay_step"]):
        rate += f", {about['last_learning_rate']:g} from step {about['decay_step']:.0f}"
    spectrum = f"λ from {about['largest_eigenvalue']:.3g} to {about['smallest_eigenvalue']:.2g}"
    text = (
        f"**{about['ensemble']}**: {about['replicas']} replicas × {about['steps']} steps, "
        f"{about['directions']} directions, {spectrum}, {rate}."
    )
    if not pd.isna(about["slope_over_eigenvalue"]):
        text += (
            f" With the attack made anew the gradient is {about['slope_over_eigenvalue']:.2f} times as steep "
            "as λ (mean over directions)."
        )
    return text


def _said_of_variances(name: str, settled: pd.DataFrame) -> list[str]:
    said = []
    for law in NAMES:
        rows = settled[settled["law"] == law].dropna(subset=["geometric_mean"])
        if rows.empty:
            continue
        inside = rows["geometric_mean"].between(*GOAL).sum()
        possible = ((rows["low"] <= GOAL[1]) & (rows["high"] >= GOAL[0])).sum()
        said.append(
            f"{name}, {NAMES[law]}: measured / predicted variance {rows['geometric_mean'].min():.2f} to "
            f"{rows['geometric_mean'].max():.2f} from step {SETTLED} on, {inside} of {len(rows)} recorded "
            f"steps within {GOAL[0]} to {GOAL[1]} ({possible} by their 95 % intervals)."
        )
    return said


def _said_at_end(name: str, own: pd.DataFrame) -> str:
    last = own[own["law"] == (REFRESHED if (own["law"] == REFRESHED).any() else EXACT)].iloc[-1]
    return (
        f"{name}, at the end: the mean has moved {last['rms_move']:.2f} predicted standard deviations (rms "
        f"over directions), {last['rms_offset']:.2f} of them not predicted (chance: "
        f"{last['rms_offset_of_chance']:.2f}); correlations misfit z² = {last['correlation_misfit']:.2f} "
        f"with the full C and {last['commuting_misfit']:.2f} without correlations; total correlation "
        f"{last['total_correlation']:.2f} nats, expected {last['total_correlation_expected']:.2f} ± "
        f"{last['total_correlation_spread']:.2f}, {last['total_correlation_commuting']:.2f} if H and C "
        "commuted."
    )


# ---------------------------------------------------------------------- figures


def _slug(name: str) -> str:
    return "_".join(
        name.lower().replace(",", " ").replace("(", " ").replace(")", " ").replace("=", " ").split()
    )


class _Steps:
    """A step axis, logarithmic from the start and, where the rate falls at once, again from there."""

    def __init__(self, rows: pd.DataFrame) -> None:
        known = rows.drop_duplicates("step").sort_values("step")
        self.last = int(known["step"].max())
        steps, rates = known["step"].to_numpy(), known["learning_rate"].to_numpy()
        falls = np.flatnonzero(rates[1:] < (1 - DECAY) * rates[:-1])
        self.decay = int(steps[falls[0]]) if len(falls) == 1 and steps[falls[0]] > 1 else None

    def place(self, steps: Sequence[int] | np.ndarray | pd.Series) -> np.ndarray:
        """Where steps ≥ 1 lie."""
        values = np.maximum(np.asarray(steps, dtype=np.float64), 1)
        places: np.ndarray = np.log10(values)
        if self.decay is not None:
            since = np.log10(np.maximum(values - self.decay, 1))
            places = np.where(values > self.decay, np.log10(self.decay) + GAP + since, places)
        return places

    def dress(self, ax: Axes) -> None:
        """Ticks, labels and the mark of the decay."""
        first = [step for step in (1, 10, 100, 1000, 10000) if step <= (self.decay or self.last)]
        ticks = [*first]
        texts = [str(step) for step in first]
        ax.set_xlabel("optimiser step")
        if self.decay is not None:
            later = [step for step in (1, 10, 100, 1000) if self.decay + step <= self.last]
            ticks += [self.decay + step for step in later]
            texts += [f"+{step}" for step in later]
            ax.axvline(
                np.log10(self.decay) + GAP / 2,
                color=style.MARK,
                linewidth=0.9,
                linestyle=(0, (4, 3)),
                zorder=1,
            )
            ax.set_xlabel(f"optimiser step, + after {self.decay}")
        ax.set_xticks(self.place(ticks), texts)
        ax.set_xlim(-0.05, float(self.place([self.last])[0]) + 0.05)


def _ratio_axis(ax: Axes, limits: tuple[float, float]) -> None:
    ax.set_yscale("log")
    ax.set_ylim(*limits)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _grid(figure: Figure, count: int, **shared: Any) -> list[Axes]:
    columns = min(2, count)
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, **shared).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    return list(axes[:count])


@style.styled
def _ratio_figure(data: pd.DataFrame) -> Figure:
    names = list(dict.fromkeys(data["ensemble"]))
    rows = -(-len(names) // 2)
    figure = style.new_figure("Variance of the weights, measured / predicted", 0.9 + 3.0 * rows)
    for ax, name in zip(_grid(figure, len(names), sharey=True), names, strict=True):
        own = data[data["ensemble"] == name]
        axis = _Steps(own)
        ax.axhspan(*GOAL, color=style.MARK, alpha=0.15, linewidth=0)
        ax.axhline(1, color=style.MARK, linewidth=0.8)
        for law in NAMES:
            line = own[own["law"] == law].dropna(subset=["geometric_mean"])
            if line.empty:
                continue
            ax.plot(
                axis.place(line["step"]),
                line["geometric_mean"],
                color=COLOURS[law],
                linestyle=LINES.get(law, "-"),
                linewidth=1.3 if law in LINES else 1.8,
                marker="o" if law in (EXACT, REFRESHED) else "",
                markersize=2.5,
            )
            if law in (EXACT, REFRESHED):
                ax.fill_between(
                    axis.place(line["step"]),
                    line["low"],
                    line["high"],
                    color=COLOURS[law],
                    alpha=0.15,
                    linewidth=0,
                )
        _ratio_axis(ax, (0.2, 8.0))
        axis.dress(ax)
        ax.set_title(name)
        ax.set_ylabel("geometric mean over directions")
    present = [law for law in NAMES if (data["law"] == law).any()]
    handles = [key(NAMES[law], LINES.get(law, "-"), colour=COLOURS[law]) for law in present]
    handles.append(key("learning rate falls", "--"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@style.styled
def _variance_figure(data: pd.DataFrame, name: str) -> Figure:
    figure = style.new_figure(f"Variance of the weights along Hessian eigenvectors: {name}", 6.4)
    axis, chosen = _Steps(data), sorted(data["direction"].unique())
    axes = figure.subplots(2, -(-len(chosen) // 2), squeeze=False, sharex=True).ravel()
    for ax in axes[len(chosen) :]:
        ax.set_visible(False)
    for ax, direction in zip(axes, chosen, strict=False):
        own = data[data["direction"] == direction]
        seen = own[own["law"] == EXACT]
        places = axis.place(seen["step"])
        ax.fill_between(places, seen["low"], seen["high"], color="#000000", alpha=0.13, linewidth=0)
        ax.plot(places, seen["measured"], color="#000000", marker="o", markersize=3, linewidth=0)
        for law in (STATIONARY, SLOW_MODE, EXACT, REFRESHED):
            line = own[own["law"] == law].dropna(subset=["predicted"])
            look = "steps-post" if law == STATIONARY else "default"
            ax.plot(
                axis.place(line["step"]), line["predicted"], color=COLOURS[law], linewidth=1.5, drawstyle=look
            )
        low, high = seen["low"].min(), seen["high"].max()
        ax.set_yscale("log")
        ax.set_ylim(low / 2, high * 2)
        axis.dress(ax)
        ax.set_title(f"direction {direction}, λ = {seen['eigenvalue'].iloc[0]:.3g}")
        ax.set_ylabel("variance σ²")
    handles = [key("measured, 95 % interval", "", "o", "#000000")]
    handles += [
        key(NAMES[law], colour=COLOURS[law])
        for law in (STATIONARY, SLOW_MODE, EXACT, REFRESHED)
        if (data["law"] == law).any()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


@style.styled
def _eigenvalue_figure(data: pd.DataFrame) -> Figure:
    panels = list(dict.fromkeys(zip(data["ensemble"], data["when"], strict=True)))
    figure = style.new_figure("Measured / predicted variance against λ", 0.9 + 2.7 * -(-len(panels) // 2))
    for ax, (name, when) in zip(_grid(figure, len(panels), sharey=True), panels, strict=True):
        own = data[(data["ensemble"] == name) & (data["when"] == when)]
        ax.axhline(1, color=style.MARK, linewidth=0.8)
        for law, shift in ((EXACT, 0.985), (REFRESHED, 1.015)):
            rows = own[own["law"] == law]
            ratio = rows["measured"] / rows["predicted"]
            ax.errorbar(
                rows["eigenvalue"] * shift,
                ratio,
                yerr=[ratio - rows["low"] / rows["predicted"], rows["high"] / rows["predicted"] - ratio],
                fmt="o",
                color=COLOURS[law],
                markersize=3.5,
                elinewidth=0.8,
            )
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        _ratio_axis(ax, (0.2, 4.0))
        ax.set_title(f"{name}: {when}")
        ax.set_xlabel("λ of H at the start")
        ax.set_ylabel("measured / predicted")
    handles = [
        key(NAMES[law], "", "o", COLOURS[law]) for law in (EXACT, REFRESHED) if (data["law"] == law).any()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@style.styled
def _mean_figure(data: pd.DataFrame) -> Figure:
    names = list(dict.fromkeys(data["ensemble"]))
    figure = style.new_figure(
        "Mean of the weights, in predicted standard deviations", 0.9 + 2.7 * -(-len(names) // 2)
    )
    for ax, name in zip(_grid(figure, len(names)), names, strict=True):
        own = data[data["ensemble"] == name]
        axis, ends = _Steps(own), []
        right = float(axis.place([axis.last])[0])
        for law in (EXACT, REFRESHED):
            rows = own[own["law"] == law]
            if rows.empty:
                continue
            ax.plot(axis.place(rows["step"]), rows["rms_offset"], color=COLOURS[law])
            ends.append(End(right, rows["rms_offset"].iloc[-1], f"left by {SHORT[law]}", COLOURS[law]))
        rows = own[own["law"] == (REFRESHED if (own["law"] == REFRESHED).any() else EXACT)]
        ax.plot(axis.place(rows["step"]), rows["rms_move"], color="#000000")
        ends.append(End(right, rows["rms_move"].iloc[-1], "moved", "#000000"))
        chance = rows["rms_offset_of_chance"].iloc[0]
        ax.axhline(chance, color=style.MARK, linewidth=0.9, linestyle=":")
        ends.append(End(right, chance, "chance", style.MARK))
        ax.set_ylim(bottom=0)
        axis.dress(ax)
        ax.set_title(name)
        ax.set_ylabel("rms over directions (σ)")
        label_ends(ax, ends)
    return figure


@style.styled
def _drift_figure(data: pd.DataFrame) -> Figure:
    names = list(dict.fromkeys(data["ensemble"]))
    figure = style.new_figure(
        "What drifts while replicas train, relative to the start", 0.9 + 2.7 * -(-len(names) // 2)
    )
    looks = {"curvature": style.PALETTE[0], "slope": style.PALETTE[1], "noise": style.PALETTE[2]}
    for ax, name in zip(_grid(figure, len(names), sharey=True), names, strict=True):
        own = data[data["ensemble"] == name]
        axis = _Steps(own)
        ax.axhline(1, color=style.MARK, linewidth=0.8)
        path = own[own["source"] == "path"].sort_values("step")
        for column, colour in looks.items():
            ax.plot(axis.place(path["step"]), path[column], color=colour, marker="o", markersize=3)
        seen = own[own["source"] == "replicas"].sort_values("step")
        for column in ("slope", "noise"):
            ax.errorbar(
                axis.place(seen["step"]),
                seen[column],
                yerr=2 * seen[f"{column}_error"],
                fmt="D",
                markersize=3.5,
                fillstyle="none",
                elinewidth=0.8,
                color=looks[column],
            )
        axis.dress(ax)
        ax.set_title(name)
        ax.set_ylabel("relative to the start")
    handles = [
        key("λ of H, attack held fixed", colour=looks["curvature"]),
        key("slope, attack made anew", colour=looks["slope"]),
        key("gradient noise", colour=looks["noise"]),
        key("at the replicas' mean", marker="o"),
        key("from the replicas' own gradients, ± 2 s.e.", "", "D", fillstyle="none"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


STUDY = Study(
    question="Do replicas reach the distribution of weights that curvature and noise predict?",
    source="beyond the papers: arXiv 2410.07719 predicts posterior variances and does not measure them",
    answer=answer,
)
