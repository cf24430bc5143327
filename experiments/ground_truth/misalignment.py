"""Gradient noise turned against the Hessian by a controlled angle: how the bound's terms move.

    python experiments/ground_truth/misalignment.py --output experiments/ground_truth/results/misalignment

Two problems: a quadratic one, and a small network trained on adversarial handwritten digits. Replicas of
momentum SGD start at the minimum and follow the full-batch gradient plus Gaussian noise whose covariance C,
in the eigenbasis of the Hessian H, is set to each of

- ``neighbours rotated``: spectrum held, planes of neighbouring eigenvectors (1, 2), (3, 4), ...
- ``ends rotated``: spectrum held, planes of the sharpest with the flattest, (1, k), (2, k - 1), ...
- ``neighbours correlated``: diagonal held, correlation sin 2φ in planes of neighbours

by every angle. The covariance of the replicas after five of the slowest relaxation times is compared with
the closed form. Writes tables, a figure (PNG and PDF), findings.md and settings.json into the folder given;
misalignment.md beside this script says what is in them.

All angles see the same random numbers, which makes changes with the angle sharper than levels, and the points
of one problem dependent on each other.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from misalignment_problems import FAMILIES, NetworkSettings, Problem, digits_network, quadratic
from misalignment_tables import ANY, TERMS, Tables, compare

from robustdyn.report import style
from robustdyn.run.environment import processor

FEWEST = 5  # replicas for each direction; fewer, and a bootstrap resample may be singular

# ---------------------------------------------------------------------- findings


def findings(tables: Tables) -> list[str]:
    """Sentences with the numbers, a list item each."""
    lines = []
    for problem, terms in tables.terms.groupby("problem", sort=False):
        variances = tables.variances[tables.variances["problem"] == problem]
        pairs = tables.pairs[tables.pairs["problem"] == problem]
        ratio = np.exp(np.log(variances["measured"] / variances["predicted"]).mean())
        lines.append(
            f"{problem}: geometric mean of measured / predicted variance {ratio:.3f}; the closed form is "
            f"within the 95 % interval of {inside(variances)} variances, {inside(pairs)} correlations and "
            f"{inside(turned(terms), 'change_')} changes of terms (all angles share random numbers)."
        )
        lines += [
            family_line(str(problem), str(name), rows) for name, rows in terms.groupby("family", sort=False)
        ]
        lines.append(commuting_line(str(problem), terms))
        lines.append(reference_line(str(problem), tables.references))
    return lines


def inside(rows: pd.DataFrame, prefix: str = "") -> str:
    """How many predictions lie in their intervals, as ``n of N``."""
    expected = rows["predicted_change" if prefix else "predicted"]
    # an angle of 0 and a term that cannot move have intervals of no width
    slack = 1e-9
    within = (rows[f"{prefix}low"] - slack <= expected) & (expected <= rows[f"{prefix}high"] + slack)
    return f"{int(within.sum())} of {len(rows)}"


def turned(terms: pd.DataFrame) -> pd.DataFrame:
    return terms[terms["angle_deg"] != 0]


def family_line(problem: str, family: str, rows: pd.DataFrame) -> str:
    """Change of every term at the angle where −ln det Σ is furthest from its start."""
    moved = rows[rows["term"] == "log_determinant"].set_index("angle_deg")["predicted_change"]
    angle = float(moved.index[np.abs(moved.to_numpy()).argmax()])
    at = rows[rows["angle_deg"] == angle].set_index("term")
    start = rows[rows["angle_deg"] == 0].set_index("term")["predicted"]
    parts = []
    for name, shown in TERMS.items():
        row = at.loc[name]
        scale, unit = (100 / start[name], " %") if name == "curvature" else (1.0, "")
        parts.append(
            f"{shown} {scale * row['predicted_change']:+.3g}{unit}, "
            f"measured {scale * row['measured_change']:+.3g} "
            f"[{scale * row['change_low']:+.3g}, {scale * row['change_high']:+.3g}]"
        )
    return f"{problem}, {family}, φ = {angle:g}° against 0° (nats): {'; '.join(parts)}."


def commuting_line(problem: str, terms: pd.DataFrame) -> str:
    """Is what the commuting approximation misses 2 TC?"""
    wide = terms.pivot_table(index=["family", "angle_deg"], columns="term", values=["measured", "predicted"])
    missed = wide["measured"]["log_determinant"] - wide["measured"]["log_variance"]
    error = missed - wide["predicted"]["twice_total_correlation"]
    return (
        f"{problem}: measured −ln det Σ less measured −Σ ln σ², what the commuting form leaves out, differs "
        f"from the closed form's 2 TC by at most {error.abs().max():.3f} nats (root mean square "
        f"{np.sqrt((error**2).mean()):.3f}); 2 TC goes up to "
        f"{wide['predicted']['twice_total_correlation'].max():.2f}."
    )


def reference_line(problem: str, table: pd.DataFrame) -> str:
    own = table[table["problem"] == problem]
    parts = [
        f"{row['noise']}: −ln det Σ {row['log_determinant']:.2f}, 2 TC {row['twice_total_correlation']:.3f}"
        for _, row in own.dropna().iterrows()
    ]
    limit = own.loc[own["noise"] == ANY, "twice_total_correlation"].item()
    parts.append(f"2 TC of any noise at most {limit:.1f}")
    return f"{problem}, closed form for other orientations: {'; '.join(parts)}."


# ---------------------------------------------------------------------- the figure

COLOURS = {
    "log_variance": style.PALETTE[0],
    "log_determinant": style.PALETTE[1],
    "twice_total_correlation": style.PALETTE[2],
    "curvature": style.PALETTE[4],
    "kl_prior_at_minimum": style.NEUTRAL,
    "kl_prior_at_start": style.MARK,
}
DASHED = {"twice_total_correlation", "kl_prior_at_start"}  # they lie on others


@style.styled
def draw(terms: pd.DataFrame, curves: pd.DataFrame, labels: dict[str, str]) -> Figure:
    """Rows of problems, columns of families: lines are the closed form, points the replicas."""
    figure = style.new_figure("Gradient noise turned against the Hessian", height=3.1 * len(labels) + 0.6)
    axes = figure.subplots(len(labels), len(FAMILIES), sharex=True, squeeze=False)
    for row, (problem, label) in zip(axes, labels.items(), strict=True):
        for ax, family in zip(row, FAMILIES, strict=True):
            draw_terms(
                ax,
                *(t[(t["problem"] == problem) & (t["family"] == family.name)] for t in (terms, curves)),
            )
            if ax in axes[0]:
                ax.set_title(f"{family.name}\n({family.held} of C held)")
            if ax in axes[-1]:
                ax.set_xlabel("angle φ (degrees)")
        row[0].set_ylabel(f"{label}\nchange from φ = 0 (nats; Σ λσ²: loss)")
    axes[0, 0].set_xticks(range(0, 91, 15))
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(COLOURS), fontsize=8.5)
    return figure


def draw_terms(ax: Axes, terms: pd.DataFrame, curves: pd.DataFrame) -> None:
    for name, colour in COLOURS.items():
        rows, line = (table[table["term"] == name] for table in (terms, curves))
        found = rows["measured_change"].to_numpy()
        bars = np.abs(rows[["change_low", "change_high"]].to_numpy().T - found)
        dashes = "--" if name in DASHED else "-"
        ax.plot(line["angle_deg"], line["predicted_change"], dashes, color=colour, label=TERMS[name])
        ax.errorbar(rows["angle_deg"], found, yerr=bars, fmt="o", color=colour, elinewidth=1.2, capsize=2)


# ---------------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the results; made if absent")
    add("--problems", nargs="+", choices=("quadratic", "network"), default=["quadratic", "network"])
    add(
        "--angles", nargs="+", type=float, default=[15, 30, 45, 60, 75, 90], help="degrees; 0 is always there"
    )
    add("--directions", type=int, default=10, help="eigenvectors of H that are tracked")
    add("--seed", type=int, default=0, help="of everything random")
    add("--resamples", type=int, default=500, help="bootstrap resamples of the replicas")
    add(
        "--quadratic-rate", type=float, default=0.01, help="learning rate: the papers', after the first decay"
    )
    add("--quadratic-replicas", type=int, default=10_000)
    add("--network-rate", type=float, default=0.03, help="learning rate of the replicas")
    add("--network-replicas", type=int, default=512)
    add(
        "--batch-size", type=int, default=64, help="whose noise along H's eigenvectors the network's C(0) has"
    )
    add("--examples", type=int, default=200, help="training images of the network")
    add("--hidden", type=int, default=16, help="hidden units")
    add("--training-steps", type=int, default=500, help="of full-batch adversarial training")
    add(
        "--attack",
        choices=("held", "refreshed"),
        default="held",
        help="the replicas' adversarial examples: held as at the minimum, or recomputed at each step",
    )
    args = parser.parse_args(arguments)
    fewest = FEWEST * args.directions
    if min(args.quadratic_replicas, args.network_replicas) < fewest:
        parser.error(f"{args.directions} directions need at least {fewest} replicas to have a covariance")
    return args


def problems(args: argparse.Namespace) -> Iterator[tuple[Problem, str]]:
    """The problems asked for, and what the figure calls them."""
    if "quadratic" in args.problems:
        problem = quadratic(args.directions, args.quadratic_rate, args.quadratic_replicas, args.seed)
        yield problem, f"quadratic, {args.quadratic_replicas} replicas"
    if "network" in args.problems:
        settings = NetworkSettings(
            directions=args.directions,
            examples=args.examples,
            hidden=args.hidden,
            training_steps=args.training_steps,
            batch_size=args.batch_size,
            learning_rate=args.network_rate,
            replicas=args.network_replicas,
            attack=args.attack,
            seed=args.seed,
        )
        yield digits_network(settings), f"network, attack {args.attack}, {args.network_replicas} replicas"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    degrees = [0.0, *sorted({float(angle) for angle in args.angles} - {0.0})]
    parts, labels, facts = [], {}, {}
    for problem, label in problems(args):
        began = time.process_time()
        parts.append(compare(problem, degrees, args.resamples, args.seed))
        labels[problem.name] = label
        facts[problem.name] = problem.facts | {
            "eigenvalues": problem.eigenvalue.tolist(),
            "noise": problem.noise.tolist(),
            **problem.options,
            "distance_sq": problem.distance_sq,
            "replica_cpu_seconds": round(time.process_time() - began, 1),
        }
        print(f"{problem.name}: {facts[problem.name]['replica_cpu_seconds']} s of CPU time", flush=True)
    tables = Tables(*(pd.concat([getattr(part, name) for part in parts]) for name in Tables.__annotations__))
    write(args, tables, labels, facts)


def write(args: argparse.Namespace, tables: Tables, labels: dict[str, str], facts: dict[str, Any]) -> None:
    """All files of the results, and the findings on the terminal."""
    question = "How do the bound's terms move as gradient noise is turned against the Hessian?"
    args.output.mkdir(parents=True, exist_ok=True)
    for name in Tables.__annotations__:
        getattr(tables, name).to_csv(args.output / f"{name}.csv", index=False, float_format="%.6g")
    style.save(draw(tables.terms, tables.curves, labels), args.output / "misalignment")
    lines = findings(tables)
    (args.output / "findings.md").write_text(
        "\n".join([question, "", *(f"- {line}" for line in lines)]) + "\n", encoding="utf-8"
    )
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    record = {
        "question": question,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "settings": settings,
        "problems": facts,
    }
    (args.output / "settings.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print("\n".join(lines))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
