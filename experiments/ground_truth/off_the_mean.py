"""Where replicas are: slope and noise of the gradient at the start, at the replicas' mean and at replicas.

    python experiments/ground_truth/off_the_mean.py RUN/replicas/NAME --step 200 --output FOLDER

Repeats the first replicas of an ensemble of momentum SGD up to a step, and measures there along the
ensemble's directions: the slopes J of the gradient whose attack is recomputed, and the noise of mini-batches
at fixed weights. The law of the ensemble is then propagated with each of the three in place of the start's
(from the start's at step 0 in a straight line to these at the step), which tells what the prediction from
the start lacks: the mean's motion, or the replicas' distance from it. Writes and prints
``NAME_step_STEP.csv``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from repeated import opened, repeat, training_of
from torch import nn

from robustdyn.replicas import (
    MeasuredPoint,
    RecordedEnsemble,
    StackedNetwork,
    Training,
    moved,
    sampled_gradients,
)
from robustdyn.replicas.agreement import agreement
from robustdyn.replicas.prediction import REFRESHED_PATH, predicted_laws
from robustdyn.replicas.sampled_batches import gradient_slopes

Array = NDArray[np.float64]


def measured(
    models: Sequence[nn.Module], training: Training, start: MeasuredPoint, batches: int
) -> dict[str, Array]:
    """At each of N networks slopes (N, k, k) and noise (N, k, k) of mini-batches at these weights."""
    slopes, noise = [], []
    for number, model in enumerate(models):
        network = StackedNetwork(model, "vmapped")
        own = replace(training, seed=training.seed + 1000 + number)  # other batches at every network
        found, _ = gradient_slopes(
            network, own, start.directions, start.slope_distances, batches=batches, chunk=16
        )
        slopes.append(found)
        sampled = sampled_gradients(network, own, start.directions, batches=8 * batches, chunk=16)
        noise.append(np.cov(sampled, rowvar=False))
    return {"slopes": np.stack(slopes), "noise": np.stack(noise)}


def summary(found: dict[str, Array], start: dict[str, Array], variance: Array) -> dict[str, float]:
    """Slope and noise relative to the start's, with standard errors over the networks measured."""
    weight = variance / variance.sum()
    slope = np.einsum("nii,i->n", found["slopes"], weight)
    base = np.einsum("nii,i->n", start["slopes"], weight)
    gamma = np.log(np.einsum("nii->ni", found["noise"]))
    first = np.log(np.einsum("nii->ni", start["noise"]))
    n, m = len(slope), len(base)
    noise = np.exp(gamma.mean() - first.mean())

    def relative(values: Array) -> float:
        return float(values.std(ddof=1) / np.sqrt(len(values)) / abs(values.mean()))

    def log_error(values: Array) -> float:
        return float(values.mean(axis=1).std(ddof=1) / np.sqrt(len(values)))

    ratio = slope.mean() / base.mean()
    return {
        "networks": n,
        "trace": float(np.einsum("nii->n", found["slopes"]).mean()),
        "slope": ratio,
        "slope_error": ratio * float(np.hypot(relative(slope), relative(base) if m > 1 else 0)),
        "noise": noise,
        "noise_error": noise * float(np.hypot(log_error(gamma), log_error(first))),
    }


def law_ratio(
    ensemble: RecordedEnsemble, found: dict[str, Array], base: dict[str, Array], step: int
) -> Array:
    """(geometric mean of measured / predicted, its interval) at the step, with slopes and noise as found.

    The start's noise is better known than that of the few batches here: it is scaled, direction by direction.
    """
    start = ensemble.start
    gamma, known = (np.einsum("nii->ni", part["noise"]).mean(axis=0) for part in (found, base))
    scale = np.sqrt(gamma / known)
    middle = (start.sampled_gradients + start.sampled_again).mean(axis=0) / 2
    point = replace(
        start,
        slopes=found["slopes"].mean(axis=0),
        example_covariance=start.example_covariance * np.outer(scale, scale),
        attack_covariance=start.attack_covariance * np.outer(scale, scale),
        sampled_gradients=middle + (start.sampled_gradients - middle) * scale,
        sampled_again=middle + (start.sampled_again - middle) * scale,
    )
    begin = replace(start, slopes=base["slopes"].mean(axis=0))
    path = replace(ensemble, start=begin, path_steps=np.array([step]), path=(point,))
    law = predicted_laws(path)[REFRESHED_PATH]
    seen = agreement(ensemble.position, law, confidence=0.95, resamples=500, seed=0)
    row = ensemble.steps.tolist().index(step)
    return np.array([seen.geometric_mean[row], seen.geometric_low[row], seen.geometric_high[row]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ensemble", type=Path, help="RUN/replicas/NAME, of RUN/checkpoints/last.ckpt")
    parser.add_argument("--step", type=int, required=True, help="one of the ensemble's recorded steps")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8, help="for slopes, at every replica; ≥ 2")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", help="of the file; the ensemble's by default")
    args = parser.parse_args()
    ensemble, state = opened(args.ensemble, args.step, args.replicas)
    training = training_of(ensemble, state, ensemble.learning_rate[: args.step].tolist())
    start, row = ensemble.start, ensemble.steps.tolist().index(args.step)
    moves = repeat(ensemble, state, args.step, args.replicas)
    mean = torch.stack(moves).mean(dim=0)
    networks = args.replicas
    rows, base = [], measured([state.model] * networks, training, start, args.batches)
    variance = ensemble.position[:, row].var(axis=0, ddof=1)
    places = {
        "start": base,
        "mean": measured([moved(state.model, mean)] * networks, training, start, args.batches),
        "replicas": measured([moved(state.model, move) for move in moves], training, start, args.batches),
    }
    for place, found in places.items():
        ratio, low, high = law_ratio(ensemble, found, base, args.step)
        about = summary(found, base, variance)
        rows.append({"place": place, **about, "measured_over_law": ratio, "low": low, "high": high})
    table = pd.DataFrame(rows)
    table.insert(0, "step", args.step)
    table.insert(0, "learning_rate", training.learning_rate[-1])
    table.insert(0, "ensemble", f"{args.ensemble.parent.parent.name}/{args.ensemble.name}")
    table["distance_from_mean"] = float((torch.stack(moves) - mean).norm(dim=1).mean())
    table["distance_in_directions"] = np.sqrt(variance.sum())
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.name or args.ensemble.name}_step_{args.step}.csv"
    table.to_csv(path, index=False, float_format="%.5g")
    print(table.to_string(index=False))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
