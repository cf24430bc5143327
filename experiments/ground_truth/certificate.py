"""Draws what the certificates are made of: ``python experiments/ground_truth/certificate.py``."""

import itertools
import json
from pathlib import Path
from typing import Any

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


@styled
def figure(results: dict[str, dict[str, Any]]) -> Figure:
    """One panel for each method, one bar for each certificate."""
    drawn = new_figure("What the certificates are made of", 6.8)
    panels = drawn.subplots(len(results), 1, sharex=True)
    for axes, (method, result) in zip(panels, results.items(), strict=True):
        _panel(axes, result, f"{method.upper()}, n = {result['held_out']['n']}")
        axes.label_outer()
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return drawn


def main() -> None:
    """Read both certificates, draw, save beside them."""
    results = {
        method: json.loads((RESULTS / f"{method}.json").read_text(encoding="utf-8")) for method in METHODS
    }
    for path in save(figure(results), RESULTS / "certificate"):
        print(path)


if __name__ == "__main__":
    main()
