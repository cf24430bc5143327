"""Draws the certificates and writes their table: ``python experiments/ground_truth/certificate.py``."""

import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustdyn.report.style import MARK, NEUTRAL, PALETTE, new_figure, save, styled

RESULTS = Path(__file__).parent / "results" / "certificate"
METHODS = ("at", "awp")
PARTS = ("error on S", "weights sampled", "confidence", "KL")


def shares(row: dict[str, Any]) -> tuple[float, ...]:
    """The steps from the error on S to the bound."""
    steps = (0.0, row["sampled_error"], row["empirical_upper"], row["bound_at_zero_kl"], row["risk_bound"])
    return tuple(after - before for before, after in itertools.pairwise(steps))


def label(row: dict[str, Any]) -> str:
    """Which posterior."""
    q = row["posterior"]
    if q["scale"] is None:
        return f"the prior itself\n$σ_P$ = {q['prior_std']:g}, KL = 0"
    moved = {0.0: "mean not moved", 1.0: "mean as measured"}.get(
        q["shift"], f"{q['shift']:g} of the mean's move"
    )
    return f"{moved}\n$σ_P$ = {q['prior_std']:g}, KL = {row['kl']['total']:.0f} nats"


def _panel(axes: Axes, result: dict[str, Any], title: str) -> None:
    rows = result["gaussian"]["certificates"]
    held = result["held_out"]
    for place, row in enumerate(rows):
        left = 0.0
        for part, width, colour in zip(
            PARTS, shares(row), (PALETTE[0], PALETTE[5], MARK, PALETTE[1]), strict=True
        ):
            axes.barh(place, width, left=left, color=colour, height=0.6, label=part if place == 0 else None)
            left += width
        axes.text(left + 0.01, place, f"{row['risk_bound']:.2f}", va="center", color=NEUTRAL)
        axes.plot(
            row["test"]["error"],
            place,
            "D",
            color="white",
            markeredgecolor=NEUTRAL,
            markersize=6,
            label="error on the test set" if place == 0 else None,
        )
    axes.axvline(held["risk_bound"], color=NEUTRAL, linestyle="--", linewidth=1.2)
    axes.text(
        held["risk_bound"] + 0.008,
        -0.72,
        f"S as a test set of the checkpoint: {held['risk_bound']:.2f}",
        va="center",
        fontsize=8.5,
        color=NEUTRAL,
    )
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -1.0)
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.set_title(title)
    axes.set_xlabel("robust 0-1 error, share of examples")


def replicas_table() -> pd.DataFrame:
    """A row for each method, number of images in A and seed.

    Returns:
        ``method``, ``images``, ``seed``, ``n``; ``drawn`` and ``best``: error on S of a replica drawn at
        random and of the best one, with ``_bound`` and ``_test`` their bounds and errors on the test set;
        ``kl`` of the best, nats; ``held_out_bound``: of the checkpoint, with S as a plain test set.
    """
    found = []
    for path in sorted(RESULTS.glob("a*-*-*.json")):
        method, images, seed = path.stem.split("-")
        result = json.loads(path.read_text(encoding="utf-8"))
        drawn, best = result["replicas"]["bounds"]
        row: dict[str, object] = {"method": method, "images": int(images), "seed": int(seed)}
        row["n"] = result["replicas"]["n"]
        for name, bound in (("drawn", drawn), ("best", best)):
            row[name], row[f"{name}_bound"] = bound["error"], bound["risk_bound"]
            row[f"{name}_test"] = bound["test"]["error"]
        found.append(row | {"kl": best["kl"], "held_out_bound": result["held_out"]["risk_bound"]})
    return pd.DataFrame(found)


@styled
def draw_replicas(table: pd.DataFrame) -> Figure:
    """The bound of each seed above its error on S, by method and number of images in A."""
    drawn = new_figure("Bounds of replicas that never saw S (each seed)", 3.6)
    axes = drawn.subplots(1, table["images"].nunique(), sharey=True)
    for ax, (images, rows) in zip(axes, table.groupby("images"), strict=True):
        for place, method in enumerate(METHODS):
            own = rows[rows["method"] == method]
            x = place + 0.2 * (own["seed"] - own["seed"].mean())
            ax.vlines(x, own["drawn"], own["drawn_bound"], color=PALETTE[place], linewidth=2)
            ax.plot(x, own["drawn"], "o", color=PALETTE[place])
            ax.plot(x, own["drawn_bound"], "_", color=PALETTE[place], markersize=14, markeredgewidth=2.4)
            ax.plot(x, own["drawn_test"], "D", color="white", markeredgecolor=NEUTRAL, markersize=5)
        ax.set_xticks(range(len(METHODS)), [method.upper() for method in METHODS])
        ax.set_xlim(-0.5, len(METHODS) - 0.5)
        ax.set_title(f"{images} images in A, {rows['n'].iloc[0]} in S")
        ax.grid(visible=False, axis="x")
    axes[0].set_ylim(0, 0.4)
    axes[0].set_ylabel("robust error of a replica drawn at random\ndot: on S, bar: bound, diamond: test set")
    return drawn


@styled
def draw_gaussian(results: dict[str, dict[str, Any]]) -> Figure:
    """One panel for each method, one bar for each certificate."""
    drawn = new_figure("What the certificates of Gaussian posteriors are made of", 6.8)
    panels = drawn.subplots(len(results), 1, sharex=True)
    for axes, (method, result) in zip(panels, results.items(), strict=True):
        _panel(axes, result, f"{method.upper()}, n = {result['held_out']['n']}")
        axes.label_outer()
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return drawn


def main() -> None:
    """Read the certificates, draw, save beside them."""
    table = replicas_table()
    table.to_csv(RESULTS / "replicas.csv", index=False, float_format="%.4f")
    results = {
        method: json.loads((RESULTS / f"gaussian-{method}-628-0.json").read_text(encoding="utf-8"))
        for method in METHODS
    }
    for name, figure in (("replicas", draw_replicas(table)), ("gaussian", draw_gaussian(results))):
        for path in save(figure, RESULTS / name):
            print(path)


if __name__ == "__main__":
    main()
