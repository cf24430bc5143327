"""Do replicas have places of their own after a decay, and is it the directions not tracked that set them?

    python experiments/ground_truth/own_places.py RUN/replicas/NAME --step 500 --output FOLDER

Repeats the first replicas of an ensemble of momentum SGD up to its decay. From where each one then is, its
children train on at the rate after the decay, each with mini-batches and attack starts of its own. Their
spread about their parent's mean is noise alone; what parents' means differ by is no noise. Two more families
start from a point put together from parts, x along the tracked directions and the rest of the weights:

* ``whole``: the parent's x and rest;
* ``rest``: the parent's rest, x of the parents' mean;
* ``tracked``: the parent's x, rest of the parents' mean.

If the loss were quadratic, with one minimum along the tracked directions, means would come together in all
three as the slopes say. If the rest sets a place for each parent, ``rest`` goes to where ``whole`` is, though
it starts elsewhere, and ``tracked`` forgets where it started. Writes ``NAME_step_STEP`` as CSV, PNG and PDF,
and the children of ``whole`` into the ensemble's directory, from which ``robustdyn-study ground_truth`` reads
them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from repeated import opened, repeat, training_of
from torch import Tensor

from robustdyn.replicas import (
    Directions,
    Ensemble,
    MeasuredPoint,
    Recorded,
    RecordedEnsemble,
    TrainingState,
    moved,
)
from robustdyn.replicas.ensemble_record import write_families
from robustdyn.replicas.families import Families, between, jackknifed, within
from robustdyn.replicas.prediction import example_noise, momentum_dynamics, sampling_of
from robustdyn.report import style
from robustdyn.theory import MeasuredDrift, propagate_coupled

Array = NDArray[np.float64]

FAMILIES = ("whole", "rest", "tracked")
APART = 1_000_000  # between the numbers of families' children and those of the ensemble's replicas


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What a law of one minimum says after the decay.

    Attributes:
        variance: (S, k), of children about their parent's mean.
        kept: (S, k, k), what is left of x at the decay.
    """

    variance: Array
    kept: Array


def starts(moves: Sequence[Tensor], directions: Directions) -> dict[str, list[Tensor]]:
    """By family the moves θ − θ_0 (P,) from which the parents' children start."""
    mean = torch.stack(list(moves)).double().mean(dim=0)
    found: dict[str, list[Tensor]] = {family: [] for family in FAMILIES}
    for move in moves:
        away = move.double() - mean
        tracked = directions.forces.double() @ (directions.positions.double().T @ away)
        found["whole"].append(move)
        found["rest"].append((mean + away - tracked).float())
        found["tracked"].append((mean + tracked).float())
    return found


def children(
    ensemble: RecordedEnsemble,
    state: TrainingState,
    move: Tensor,
    *,
    first: int,
    count: int,
    rate: float,
    steps: Sequence[int],
) -> Array:
    """Places x (count, S, k) of children from θ_0 + move, in the ensemble's coordinates."""
    directions = ensemble.start.directions
    recorded = Recorded(
        steps=tuple(steps),
        loss_steps=(),
        loss_examples=1,
        mean_steps=(),
        loss_draws=1,
        expansion=False,
        weights=False,
    )
    family = Ensemble(
        moved(state.model, move),
        training_of(ensemble, state, [rate] * steps[-1]),
        directions=directions,
        recorded=recorded,
        engine="vmapped",
    )
    begin = (directions.positions.double().T @ move.double()).numpy()
    return np.asarray(family.run(range(first, first + count))["position"] + begin, dtype=np.float64)


def predicted(
    ensemble: RecordedEnsemble, point: MeasuredPoint, rate: float, steps: Sequence[int]
) -> Prediction:
    """With slopes and noise as they are at a point."""
    unit, factor = momentum_dynamics(ensemble)
    examples, attack = example_noise(ensemble, point)
    k = len(point.slopes)
    drift = MeasuredDrift(
        step=np.zeros(1, dtype=np.int64),
        slope=point.slopes[None],
        example_noise=examples[None],
        attack_noise=attack[None],
        gradient=np.zeros(k),
        interpolation="piecewise_constant",
    )
    kept = []
    for direction in np.eye(k):
        law = propagate_coupled(
            drift,
            [rate * factor] * steps[-1],
            sampling=sampling_of(ensemble).batches(steps[-1]),
            momentum=unit.momentum,
            weight_decay=unit.weight_decay,
            record_steps=list(steps),
            initial_mean=np.stack([direction, np.zeros(k)], axis=1),
            allow_unstable=True,
        )
        kept.append(law.position)
    variance = np.einsum("sii->si", law.position_covariance)
    return Prediction(variance=np.asarray(variance), kept=np.stack(kept, axis=2))


def rows(found: dict[str, Array], law: Prediction, steps: Sequence[int]) -> pd.DataFrame:
    """By family and step, with jackknife errors over parents; means over directions.

    ``apart`` and ``expected``: variance between parents' places, found and left by the slopes, in the unit of
    the law's variance at the last step. ``like_whole``: coefficient of the regression on the whole parents'
    places. ``within``: variance about the parent's mean, measured / predicted.
    """
    unit = law.variance[-1]
    table = []
    for family in FAMILIES:

        def apart(x: dict[str, Array], family: str = family) -> Array:
            return np.asarray((between(x[family], x[family], same=True) / unit).mean(axis=-1))

        def expected(x: dict[str, Array], family: str = family) -> Array:
            begin = x[family].mean(axis=1)[:, 0]
            left = np.einsum("skj,nj->nsk", law.kept, begin - begin.mean(axis=0))
            return np.asarray(((left**2).sum(axis=0) / (len(left) - 1) / unit).mean(axis=-1))

        def like_whole(x: dict[str, Array], family: str = family) -> Array:
            shared = between(x[family], x["whole"], same=family == "whole") / unit
            own = between(x["whole"], x["whole"], same=True) / unit
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.asarray(shared.mean(axis=-1) / own.mean(axis=-1))

        def about(x: dict[str, Array], family: str = family) -> Array:
            spread = within(x[family])
            ratio = np.divide(spread, law.variance, where=law.variance > 0, out=np.full(spread.shape, np.nan))
            return np.asarray(ratio.mean(axis=-1))

        named = {"apart": apart, "expected": expected, "like_whole": like_whole, "within": about}
        values = {name: jackknifed(statistic, found) for name, statistic in named.items()}
        for row, step in enumerate(steps):
            line: dict[str, object] = {"family": family, "steps_after": step}
            for name, (value, error) in values.items():
                line[name] = value[row]
                if name != "expected":
                    line[f"{name}_error"] = error[row]
            table.append(line)
    return pd.DataFrame(table)


@style.styled
def drawn(table: pd.DataFrame, title: str) -> Figure:
    """Spread of the parents' places, and of children about them, over the steps after the decay."""
    figure = style.new_figure(title, height=4.2)
    left, right = figure.subplots(1, 2)
    for family, colour in zip(FAMILIES, style.colours(len(FAMILIES)), strict=True):
        part = table[table["family"] == family]
        label = {"whole": "whole parent", "rest": "its rest alone", "tracked": "its x alone"}[family]
        for ax, name in ((left, "apart"), (right, "within")):
            shown = part[part[name] > 1e-3]
            ax.errorbar(
                shown["steps_after"], shown[name], shown[f"{name}_error"], fmt="o-", color=colour, label=label
            )
    whole = table[table["family"] == "whole"]
    left.plot(
        whole["steps_after"], whole["expected"], "--", color=style.MARK, label="what the slopes leave of x"
    )
    left.set_yscale("log")
    left.set(title="between parents", ylabel="variance / the noise's at the last step")
    left.legend(title="started from", fontsize=8.5)
    right.axhline(1, color=style.MARK, linewidth=0.8)
    right.set(title="of children about their parent's mean", ylabel="variance, measured / predicted")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xlabel("steps after the decay")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ensemble", type=Path, help="RUN/replicas/NAME, of RUN/checkpoints/last.ckpt")
    parser.add_argument("--step", type=int, required=True, help="a recorded step after which the rate decays")
    parser.add_argument("--replicas", type=int, default=8, help="parents, ≥ 3")
    parser.add_argument("--children", type=int, default=4, help="of a parent in each family, ≥ 2")
    parser.add_argument("--after", type=int, nargs="+", default=[25, 50, 100, 200, 300, 500], metavar="STEPS")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", help="of the files; the ensemble's by default")
    args = parser.parse_args()
    if args.replicas < 3 or args.children < 2:
        raise SystemExit("give at least --replicas 3 and --children 2")
    if args.after != sorted(set(args.after)) or args.after[0] < 1:
        raise SystemExit(f"--after must increase from 1 on, got {args.after}")
    ensemble, state = opened(args.ensemble, args.step, args.replicas)
    rates = ensemble.learning_rate[args.step :]
    if not len(rates) or not rates[0] < ensemble.learning_rate[args.step - 1]:
        raise SystemExit(f"--step={args.step} has no decay after it")
    at = ensemble.path_steps.tolist()
    point = ensemble.path[at.index(args.step)] if args.step in at else ensemble.start
    steps = [0, *args.after]
    if not np.isfinite(point.slopes).all():
        raise SystemExit(f"{args.ensemble} has no slopes; make it with start.slope_batches=64")
    law = predicted(
        ensemble, point, float(rates[0]), steps
    )  # what it cannot do, it says before the long work
    moves = repeat(ensemble, state, args.step, args.replicas)
    found = {}
    for number, (family, begin) in enumerate(starts(moves, ensemble.start.directions).items(), start=1):
        each = []
        for parent, move in enumerate(begin):
            print(f"{family} of parent {parent}", flush=True)
            first = number * APART + parent * args.children
            each.append(
                children(
                    ensemble,
                    state,
                    move,
                    first=first,
                    count=args.children,
                    rate=float(rates[0]),
                    steps=steps,
                )
            )
        found[family] = np.stack(each)
    write_families(
        args.ensemble,
        Families(
            step=args.step,
            learning_rate=float(rates[0]),
            steps=np.array(steps),
            places=found["whole"],
        ),
    )
    table = rows(found, law, steps)
    run = args.ensemble.parent.parent.name
    table.insert(0, "parents", args.replicas)
    table.insert(0, "children", args.children)
    table.insert(0, "law", "path" if args.step in at else "start")
    table.insert(0, "learning_rate", float(rates[0]))
    table.insert(0, "ensemble", f"{run}/{args.ensemble.name}")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.name or args.ensemble.name}_step_{args.step}.csv"
    table.to_csv(path, index=False, float_format="%.5g")
    figure = drawn(
        table, f"Places after a decay: {args.name or args.ensemble.name}, from step {args.step} on"
    )
    style.save(figure, path.with_suffix(""))
    print(table.to_string(index=False))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
