"""Compares the posterior that a run recorded with replicas of that run.

    python experiments/ground_truth/recorded_posterior.py RUN --output FOLDER

The run has a posterior (``measure=slopes``). Each ensemble in RUN/replicas continues it from one of its
checkpoints, at the run's learning rates and with shuffled epochs of other orders. At every recorded step at
which an epoch of the run ends, the variance of the replicas along the leading eigenvectors of their start is
compared with the variances that the run recorded, direction by direction in descending order of curvature.
Writes and prints ``recorded_posterior.csv``.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from robustdyn.errors import UserError
from robustdyn.records import read_table
from robustdyn.records.schema import INDEPENDENT, POSTERIOR_VARIANCE
from robustdyn.replicas import RecordedEnsemble, read_ensemble
from robustdyn.replicas.agreement import agreement
from robustdyn.replicas.prediction import Law

LAWS = {"training": POSTERIOR_VARIANCE, "papers": f"{POSTERIOR_VARIANCE}{INDEPENDENT}"}


def compared(posterior: pd.DataFrame, ensemble: RecordedEnsemble, began: int) -> pd.DataFrame:
    """Measured / recorded variance at the ends of epochs.

    Args:
        posterior: The run's table ``posterior``.
        ensemble: Replicas that continue the run.
        began: The run's steps before the replicas start.

    Returns:
        A row for every law and every recorded step at which an epoch ends: ``batchnorm``, ``epoch`` (which
        has ended), ``steps`` since the replicas' start, ``law``, ``directions``, and ``ratio`` with its 95 %
        bootstrap interval over replicas, ``low`` and ``high``: the geometric mean over the directions.

    Raises:
        ValueError: The replicas draw their batches with replacement, or no epoch ends at a recorded step.
    """
    if ensemble.settings["sampling.replacement"]:
        raise ValueError("sampling.replacement is true, but a run shuffles its epochs")
    epoch_of = posterior.drop_duplicates("step").set_index("step")["epoch"]
    ends = [row for row, step in enumerate(ensemble.steps) if step > 0 and began + step in epoch_of.index]
    if not ends:
        raise ValueError("no epoch of the run ends at a recorded step; set record.steps")
    steps = ensemble.steps[ends]
    parts = []
    for law, column in LAWS.items():
        variance = posterior.pivot(index="step", columns="index", values=column).loc[began + steps]
        k = min(ensemble.position.shape[2], variance.shape[1])
        recorded = variance.to_numpy()[:, :k]
        covariance = np.stack([np.diag(variances) for variances in recorded])
        predicted = Law(name=law, mean=np.zeros_like(recorded), covariance=covariance)
        seen = agreement(ensemble.position[:, ends, :k], predicted, confidence=0.95, resamples=1000, seed=0)
        parts.append(
            pd.DataFrame(
                {
                    "batchnorm": ensemble.settings["batchnorm"],
                    "epoch": epoch_of.reindex(began + steps).to_numpy(),
                    "steps": steps,
                    "law": law,
                    "directions": seen.directions,
                    "ratio": seen.geometric_mean,
                    "low": seen.geometric_low,
                    "high": seen.geometric_high,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        posterior = read_table(args.run, "posterior")
        directories = sorted(path.parent for path in args.run.glob("replicas/*/settings.json"))
        if posterior.empty or not directories:
            raise SystemExit(
                f"{args.run}: has no {'posterior' if posterior.empty else 'replicas'}; see --help"
            )
        found = []
        for directory in directories:
            provenance = json.loads((directory / "settings.json").read_text(encoding="utf-8"))["provenance"]
            try:
                table = compared(posterior, read_ensemble(directory), int(provenance["step"]))
            except ValueError as error:
                raise SystemExit(f"{directory}: {error}") from error
            found.append(table.assign(ensemble=directory.name))
    except UserError as error:
        raise SystemExit(str(error)) from error
    table = pd.concat(found, ignore_index=True)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "recorded_posterior.csv"
    table.to_csv(path, index=False, float_format="%.5g")
    print(table.to_string(index=False))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
