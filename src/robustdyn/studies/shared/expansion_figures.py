"""Where the second-order expansion of the robust loss breaks, in units of the posterior's deviation.

The error of an expansion is counted in its own second-order term: (L − L_0 − g·Δ − ½ Δᵀ A Δ) / |½ Δᵀ A Δ|. It
says by how much the curvature would have to be another one for the loss to be right, and stays finite where
the loss neither rises nor falls. Three expansions are compared: the loss on held adversarial examples with
its Hessian H; the loss with recomputed examples with the slopes J of its own gradient; and the latter with H,
as the theory has it. Weight decay is no part of these losses.

The loss with recomputed examples is known up to the random starts of its attack: its standard errors are
over draws of these, with the differences to L_0 taken draw by draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from robustdyn.errors import RecordError
from robustdyn.replicas import Lines, RecordedEnsemble
from robustdyn.report import style
from robustdyn.report.plotting import key, log_axis

Array = NDArray[np.float64]

EIGENVECTOR, RANDOM, REPLICA = "eigenvector", "random", "replica"
HELD, RECOMPUTED = "held", "recomputed"
BREAKS = 0.2  # of the second-order term; ours: a fifth of the curvature
RESOLVED = BREAKS / 2  # ours: the largest standard error with which an error counts for where it breaks
FLOOR = 1e-6  # of L_0: a second-order term below is lost in the rounding of float32 losses

_CASE = ["ensemble", "kind", "attack", "curvature"]


@dataclass(frozen=True)
class _Case:
    """Which loss is compared with the expansion by which curvature."""

    attack: str
    curvature: str


CASES = (_Case(HELD, "H"), _Case(RECOMPUTED, "J"), _Case(RECOMPUTED, "H"))


def expansion_tables(ensembles: Mapping[str, RecordedEnsemble]) -> dict[str, pd.DataFrame]:
    """The loss against its expansions, along lines and at replicas.

    Args:
        ensembles: Label -> an ensemble whose lines were measured.

    Returns:
        ``expansion``, a row for each point, loss and curvature: ``ensemble``; ``kind``, of the direction, or
        ``replica``; ``attack``, held or recomputed; ``curvature``, H or J; ``direction``, its number, or the
        replica's; ``step`` (replicas); ``distance`` in the lines' units, predicted deviations
        σ (along random directions √P σ; ``robustdyn.replicas.line_units``), of a replica
        √(mean (x_i/σ_i)²) over the eigenvectors; ``side``, −1 or 1 (0: a replica); ``rise``, L − L_0 in
        nats; ``expanded``, what the expansion says; ``first_order`` and ``second_order``, its parts;
        ``error``, the rest over the size of the second-order term, missing where that is lost in rounding;
        ``error_se``, over draws of the attack's starts, 0 for held examples, missing with one draw.

        ``expansion_means``, a row for each kind, distance or step, loss and curvature: means over ``points``
        (directions and both sides, in which odd orders cancel, or replicas) of ``distance``, ``beyond`` (rise
        without the first-order part) with its standard error ``beyond_se``, and ``second_order``; ``error``
        and ``error_se`` of these means. For lines with recomputed examples, ``slope_ratio``, Σ σ² J_ii /
        Σ σ² H_ii with J measured between ± that distance, and ``gradient_ratio``, the loss's own slopes
        s_i between these points, Σ σ² s_i g_i / Σ σ² g_i² (1 by Danskin, to first order), with
        ``gradient_ratio_se``. At replicas ``outside``, share of the squared distance that the directions do
        not span. Standard errors at replicas are over these for held examples and over draws for recomputed
        examples.

        ``expansion_limits``, a row for each direction, loss and curvature: ``limit``, the distance from which
        the error is above a fifth on the worse side, and ``limit_of_mean``, in the mean of both sides;
        ``bound`` and ``bound_of_mean`` say ``at least`` or ``at most`` where that lies outside of the
        distances at which the error is known to a tenth. Missing where it is at none.

        ``expansion_breaks``, for each kind, loss and curvature: the median of ``limit`` over the directions
        that have one, with its ``bound``, which is ``not known`` where none has.

    Raises:
        RecordError: An ensemble without lines, or with lines over other examples than its losses.
    """
    points, means = [], []
    for label, ensemble in ensembles.items():
        for part in _parts(label, ensemble):
            points.append(part.points().assign(ensemble=label))
            means.append(part.means().assign(ensemble=label))
    every, pooled = pd.concat(points, ignore_index=True), pd.concat(means, ignore_index=True)
    first = [*_CASE, "direction", "step", "distance", "side"]
    limits = _limits(every)
    return {
        "expansion": every[[*first, *(c for c in every if c not in first)]],
        "expansion_means": pooled[[*_CASE, "step", *(c for c in pooled if c not in (*_CASE, "step"))]],
        "expansion_limits": limits,
        "expansion_breaks": expansion_breaks(limits),
    }


def expansion_breaks(limits: pd.DataFrame) -> pd.DataFrame:
    """``expansion_breaks`` of ``expansion_tables``, from its ``expansion_limits``."""
    found = []
    for head, own in limits.groupby(_CASE, sort=False):
        known = own.dropna(subset=["limit"]).sort_values("limit", kind="stable")[["limit", "bound"]]
        found.append((*head, *(known.iloc[(len(known) - 1) // 2] if len(known) else (np.nan, "not known"))))
    return pd.DataFrame(found, columns=[*_CASE, "limit", "bound"])


@dataclass(frozen=True, eq=False)
class _Part:
    """Points of one kind that are averaged together, with one loss and one curvature.

    All (N,), but ``by_draw`` (A, N), the rise of each draw, or None where it does not depend on draws.
    """

    kind: str
    case: _Case
    step: int | None
    direction: NDArray[np.int64]
    distance: Array
    side: NDArray[np.int64]
    rise: Array
    by_draw: Array | None
    first: Array
    second: Array
    floor: float
    more: Mapping[str, float]  # further columns of the means

    def points(self) -> pd.DataFrame:
        known = np.where(np.abs(self.second) > self.floor, np.abs(self.second), np.nan)
        noise = np.zeros(len(known)) if self.by_draw is None else _standard_error(self.by_draw)
        return self._named(
            {
                "direction": self.direction,
                "distance": self.distance,
                "side": self.side,
                "rise": self.rise,
                "expanded": self.first + self.second,
                "first_order": self.first,
                "second_order": self.second,
                "error": (self.rise - self.first - self.second) / known,
                "error_se": noise / known,
            }
        )

    def means(self) -> pd.DataFrame:
        beyond, second = self.rise - self.first, float(self.second.mean())
        if self.by_draw is not None:
            noise = float(_standard_error(self.by_draw.mean(axis=1, keepdims=True))[0])
        elif self.kind == REPLICA:
            noise = float(np.std(beyond - self.second, ddof=1) / np.sqrt(len(beyond)))
        else:
            noise = 0.0
        size = abs(second) if abs(second) > self.floor else np.nan
        return self._named(
            {
                "distance": self.distance.mean(),
                "beyond": beyond.mean(),
                "beyond_se": noise,
                "second_order": second,
                "error": (beyond.mean() - second) / size,
                "error_se": noise / size,
                "points": len(beyond),
                **dict.fromkeys(("slope_ratio", "gradient_ratio", "gradient_ratio_se", "outside"), np.nan),
                **self.more,
            }
        )

    def _named(self, columns: Mapping[str, object]) -> pd.DataFrame:
        frame = pd.DataFrame({name: np.atleast_1d(np.asarray(value)) for name, value in columns.items()})
        return frame.assign(
            kind=self.kind,
            attack=self.case.attack,
            curvature=self.case.curvature,
            step=pd.array([self.step] * len(frame), dtype="Int64"),
        )


def _standard_error(by_draw: Array) -> Array:
    """Of the mean over draws (A, N) -> (N,); NaN with one draw."""
    draws = len(by_draw)
    if draws == 1:
        return np.full(by_draw.shape[1], np.nan)
    found: Array = by_draw.std(axis=0, ddof=1) / np.sqrt(draws)
    return found


def _parts(label: str, ensemble: RecordedEnsemble) -> Iterator[_Part]:
    lines = ensemble.lines
    if lines is None:
        raise RecordError(f"{label}: the loss along its directions was not measured; leave this ensemble out")
    # random directions have no residual of an eigenpair
    random = np.isnan(ensemble.start.residuals)
    for kind, which in ((EIGENVECTOR, ~random), (RANDOM, random)):
        if which.any():
            yield from _along_lines(lines, kind, np.flatnonzero(which))
    if ensemble.recomputed_loss is not None:
        of_replicas = ensemble.settings["record.loss_examples"], ensemble.recomputed_loss.shape[2]
        if of_replicas != (lines.examples, len(lines.starts)):
            raise RecordError(
                f"{label}: lines and replicas have losses over other examples or draws "
                f"({lines.examples}, {len(lines.starts)} and {of_replicas[0]}, {of_replicas[1]}); leave this "
                "ensemble out"
            )
        yield from _at_replicas(ensemble, lines)


def _along_lines(lines: Lines, kind: str, which: NDArray[np.intp]) -> Iterator[_Part]:
    far = len(lines.multiples) // 2
    deviations, slope, curved = (
        values[which] for values in (lines.deviations, lines.gradient, np.diag(lines.hessian))
    )
    for j in range(far, 2 * far):
        low, high = 2 * far - 1 - j, j
        x = deviations[:, None] * lines.multiples[[low, high]]
        rises = lines.recomputed[:, which][:, :, [low, high]] - lines.starts[:, None, None]
        by_draw = rises.reshape(len(rises), -1)
        weights = deviations**2
        gradient = lines.recomputed_gradient[which]
        between = (gradient[:, high] - gradient[:, low]) / (x[:, 1] - x[:, 0])
        own = (rises[:, :, 1] - rises[:, :, 0]) / (x[:, 1] - x[:, 0])
        ratio = own @ (weights * slope) / (weights @ slope**2)
        of_recomputed = {
            "slope_ratio": float(weights @ between / (weights @ curved)),
            "gradient_ratio": float(ratio.mean()),
            "gradient_ratio_se": float(_standard_error(ratio[:, None])[0]),
        }
        for case in CASES:
            curvature = curved if case.curvature == "H" else np.diag(lines.slopes)[which]
            held = lines.held[which][:, [low, high]].ravel() - lines.loss
            recomputed = case.attack == RECOMPUTED
            yield _Part(
                kind=kind,
                case=case,
                step=None,
                direction=np.repeat(which, 2).astype(np.int64),
                distance=np.full(2 * len(which), lines.multiples[high]),
                side=np.tile(np.array([-1, 1], dtype=np.int64), len(which)),
                rise=by_draw.mean(axis=0) if recomputed else held,
                by_draw=by_draw if recomputed else None,
                first=(slope[:, None] * x).ravel(),
                second=(curvature[:, None] * x**2 / 2).ravel(),
                floor=FLOOR * lines.loss,
                more=of_recomputed if recomputed else {},
            )


def _at_replicas(ensemble: RecordedEnsemble, lines: Lines) -> Iterator[_Part]:
    """Along the tracked directions J, elsewhere H: what J is there is not known."""
    recomputed, held, linear = ensemble.recomputed_loss, ensemble.held_loss, ensemble.linear_loss
    expanded, outside = ensemble.expanded_loss, ensemble.outside
    assert recomputed is not None
    assert held is not None
    assert linear is not None
    assert expanded is not None
    assert outside is not None
    steps, known = ensemble.steps.tolist(), ~np.isnan(ensemble.start.residuals)
    for column, step in enumerate(ensemble.loss_steps.tolist()):
        if step == 0:
            continue  # all replicas are at θ_0
        x, total = ensemble.position[:, steps.index(step)], ensemble.distance[:, steps.index(step)]
        share = float((outside[:, column] ** 2).sum() / (total**2).sum())
        extra = np.einsum("ri,ij,rj->r", x, lines.slopes - lines.hessian, x) / 2
        by_draw = recomputed[:, column].T - lines.starts[:, None]
        for case in CASES:
            yield _Part(
                kind=REPLICA,
                case=case,
                step=step,
                direction=ensemble.replicas,
                distance=np.sqrt(((x / lines.deviations)[:, known] ** 2).mean(axis=1)),
                side=np.zeros(len(x), dtype=np.int64),
                rise=by_draw.mean(axis=0) if case.attack == RECOMPUTED else held[:, column] - lines.loss,
                by_draw=by_draw if case.attack == RECOMPUTED else None,
                first=linear[:, column] - lines.loss,
                second=expanded[:, column] - linear[:, column] + (case.curvature == "J") * extra,
                floor=FLOOR * lines.loss,
                more={"outside": share},
            )


def _limits(points: pd.DataFrame) -> pd.DataFrame:
    found = []
    by = [*_CASE, "direction"]
    for names, rows in points[points["kind"] != REPLICA].groupby(by, sort=False):
        known = rows.assign(error=rows["error"].where(rows["error_se"] <= RESOLVED))
        sides = known.set_index(["distance", "side"])["error"].unstack("side").sort_index()
        distance = sides.index.to_numpy(dtype=float)
        worse, bound = _limit(distance, sides.abs().max(axis=1, skipna=False).to_numpy())
        mean, bound_of_mean = _limit(distance, sides.mean(axis=1, skipna=False).abs().to_numpy())
        limits = {"limit": worse, "bound": bound, "limit_of_mean": mean, "bound_of_mean": bound_of_mean}
        found.append(dict(zip(by, names, strict=True)) | limits)
    return pd.DataFrame(found)


def _limit(distance: Array, error: Array) -> tuple[float, str]:
    """Where the error first exceeds the fifth, by linear interpolation; NaN if no error is known."""
    known = np.isfinite(error)
    distance, error = distance[known], error[known]
    if not len(distance):
        return np.nan, ""
    above = np.flatnonzero(error > BREAKS)
    if not len(above):
        return float(distance[-1]), "at least"
    first = above[0]
    if first == 0:
        return float(distance[0]), "at most"
    near, far = error[first - 1], error[first]
    share = (BREAKS - near) / (far - near)
    return float(distance[first - 1] + share * (distance[first] - distance[first - 1])), ""


# ---------------------------------------------------------------------- the figure

_TITLES = {
    EIGENVECTOR: "Eigenvectors, mean of {}",
    RANDOM: "Random directions, mean of {}",
    REPLICA: "Replicas, mean of {}",
}
_UNITS = {
    EIGENVECTOR: "distance (predicted deviation σ)",
    RANDOM: "distance (predicted norm √P σ)",
    REPLICA: "r.m.s. distance (σ)",
}
_COLOURS = {HELD: style.PALETTE[0], RECOMPUTED: style.PALETTE[1]}
_OWN = {HELD: "H", RECOMPUTED: "J"}


@style.styled
def draw_expansion(data: pd.DataFrame) -> Figure:
    """The loss beyond its first-order part against distance, a row of panels for each ensemble.

    Args:
        data: ``expansion_means`` of ``expansion_tables``.
    """
    labels = list(dict.fromkeys(data["ensemble"]))
    kinds = [kind for kind in _TITLES if (data["kind"] == kind).any()]
    figure = style.new_figure(
        "Robust loss beyond first order, against its second-order expansion", 1.0 + 2.8 * len(labels)
    )
    axes = figure.subplots(len(labels), len(kinds), squeeze=False)
    for row, label in zip(axes, labels, strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            rows = data[(data["ensemble"] == label) & (data["kind"] == kind)]
            _draw_panel(ax, rows, lines=kind != REPLICA)
            points = int(rows["points"].max()) if len(rows) else 0
            title = _TITLES[kind].format(points if kind == REPLICA else points // 2)
            ax.set_title(f"{label}\n{title}" if len(labels) > 1 and ax is row[0] else title)
            ax.set_xlabel(_UNITS[kind])
        row[0].set_ylabel("rise beyond first order (nats)")
    handles = [key(f"examples {attack}", "", "o", colour) for attack, colour in _COLOURS.items()]
    handles += [key(f"expansion with {name}", "--", "", _COLOURS[attack]) for attack, name in _OWN.items()]
    bars = key("error bars: standard errors; open: the loss falls", "", "o", fillstyle="none")
    figure.legend(handles=[*handles, bars], loc="outside lower center", ncols=3)
    return figure


def _draw_panel(ax: Axes, rows: pd.DataFrame, *, lines: bool) -> None:
    for attack, curvature in _OWN.items():
        own = rows[(rows["attack"] == attack) & (rows["curvature"] == curvature)].sort_values("distance")
        place, value, noise = (own[name].to_numpy(float) for name in ("distance", "beyond", "beyond_se"))
        colour = _COLOURS[attack]
        # a logarithmic axis has no place for a fall: its size, in an open circle
        low = np.minimum(np.nan_to_num(noise), 0.7 * np.abs(value))
        up = value > 0
        for which, style_of in ((up, "full"), (~up, "none")):
            ax.errorbar(
                place[which],
                np.abs(value[which]),
                yerr=np.stack([low, np.nan_to_num(noise)])[:, which],
                fmt="o",
                fillstyle=style_of,
                color=colour,
                markersize=4.5,
                linewidth=1.2,
            )
        # a dash of its own for each point, where lines do not join them
        ax.plot(
            place,
            own["second_order"].where(own["second_order"] > 0),
            linestyle="--" if lines else "",
            marker="" if lines else "_",
            markersize=14,
            color=colour,
            linewidth=1.4,
        )
    if lines:
        ax.set_xscale("log")
        ticks = sorted(set(np.round(rows["distance"], 2)))
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)
    else:
        ax.set_xlim(0.8 * rows["distance"].min(), 1.1 * rows["distance"].max())
        ax.margins(y=0.15)
        for step, place in rows.groupby("step")["distance"].first().items():
            ax.annotate(
                f"step {step}",
                (place, 0.03),
                xycoords=("data", "axes fraction"),
                xytext=(-14, 0),  # beside the points: neighbours may be close
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=8,
                color=style.MARK,
            )
    log_axis(ax)
