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
from misalignment_tables import TERMS, Tables, compare

from robustdyn.report import style
from robustdyn.run.environment import processor

FEWEST = 5  # replicas for each direction; fewer, and a bootstrap resample may be singular

# ---------------------------------------------------------------------- findings


def findings(tables: Tables) -> list[str]:
    """How often the closed form is right, and how far what the commuting form leaves out is 2 TC."""
    right, missed = [], []
    for problem, terms in tables.terms.groupby("problem", sort=False):
        variances = tables.variances[tables.variances["problem"] == problem]
        pairs = tables.pairs[tables.pairs["problem"] == problem]
        changes = inside(terms[terms["angle_deg"] != 0], "change_")
        right.append(
            f"of {inside(variances)} variances, {inside(pairs)} correlations and {changes} changes of terms "
            f"in the {problem} problem"
        )
        wide = terms.pivot_table(
            index=["family", "angle_deg"], columns="term", values=["measured", "predicted"]
        )
        left_out = wide["measured"]["log_determinant"] - wide["measured"]["log_variance"]
        twice = wide["predicted"]["twice_total_correlation"]
        missed.append(
            f"{(left_out - twice).abs().max():.3f} nats in the {problem} problem, where 2 TC goes up to "
            f"{twice.max():.2f}"
        )
    return [
        f"The closed form lies within the 95 % interval {', and '.join(right)}.",
        "What the commuting form leaves out, measured −ln det Σ less measured −Σ ln σ², differs from the "
        f"closed form's 2 TC by at most {', and by at most '.join(missed)}.",
    ]


def findings_page(question: str, tables: Tables) -> str:
    """The question, the answer in two sentences, the tables and the figure."""
    listed = (f"`{name}.csv`, {len(getattr(tables, name))} rows" for name in Tables.__annotations__)
    return (
        "\n\n".join([question, " ".join(findings(tables)), *listed, "![misalignment](misalignment.png)"])
        + "\n"
    )


def inside(rows: pd.DataFrame, prefix: str = "") -> str:
    """How many predictions lie in their intervals, as ``n of N``."""
    expected = rows["predicted_change" if prefix else "predicted"]
    # an angle of 0 and a term that cannot move have intervals of no width
    slack = 1e-9
    within = (rows[f"{prefix}low"] - slack <= expected) & (expected <= rows[f"{prefix}high"] + slack)
    return f"{int(within.sum())} of {len(rows)}"


# ---------------------------------------------------------------------- the figure

COLOURS = {
    "log_variance": style.PALETTE[0],
    "log_determinant": style.PALETTE[1],
    "twice_total_correlation": style.PALETTE[2],
    "curvature": style.ORANGE,
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
    page = findings_page(question, tables)
    (args.output / "findings.md").write_text(page, encoding="utf-8")
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
    print(page)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
