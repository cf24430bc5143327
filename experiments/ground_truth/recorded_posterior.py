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
from numpy.typing import NDArray

from robustdyn.errors import UserError
from robustdyn.measure.posterior import rate_of_each_step
from robustdyn.records import read_table
from robustdyn.records.schema import INDEPENDENT, POSTERIOR_VARIANCE
from robustdyn.replicas import RecordedEnsemble, read_ensemble
from robustdyn.replicas.agreement import agreement
from robustdyn.replicas.prediction import Law

Array = NDArray[np.float64]

LAWS = {"training": POSTERIOR_VARIANCE, "papers": f"{POSTERIOR_VARIANCE}{INDEPENDENT}"}


def compared(posterior: pd.DataFrame, rates: Array, ensemble: RecordedEnsemble, began: int) -> pd.DataFrame:
    """Measured / recorded variance at the ends of epochs, as long as replicas have the rates of the run.

    Args:
        posterior: The run's table ``posterior``.
        rates: (N,), the run's learning rate at every step.
        ensemble: Replicas that continue the run.
        began: The run's steps before the replicas start.

    Returns:
        A row for every law and every recorded step at which an epoch ends: ``batchnorm``, ``epoch`` (which
        has ended), ``steps`` since the replicas' start, ``law``, ``directions``, and ``ratio`` with its 95 %
        bootstrap interval over replicas, ``low`` and ``high``: the geometric mean over the directions.

    Raises:
        ValueError: The replicas draw their batches with replacement, or no epoch ends at a recorded step with
            the rates of the run.
    """
    if ensemble.settings["sampling.replacement"]:
        raise ValueError("sampling.replacement is true, but a run shuffles its epochs")
    own = rates[began : began + len(ensemble.learning_rate)]
    same = np.isclose(ensemble.learning_rate[: len(own)], own, rtol=1e-6, atol=0)
    comparable = len(same) if same.all() else int(np.argmin(same))
    epoch_of = posterior.drop_duplicates("step").set_index("step")["epoch"]
    ends = [
        row
        for row, step in enumerate(ensemble.steps)
        if 0 < step <= comparable and began + step in epoch_of.index
    ]
    if not ends:
        raise ValueError(
            "no epoch of the run ends at a recorded step with the run's learning rates; set record.steps and "
            "learning_rate"
        )
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
        rates = rate_of_each_step(read_table(args.run, "rates"), int(posterior["step"].max()))
        found = []
        for directory in directories:
            ensemble = read_ensemble(directory)
            settings = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
            began = settings.get("provenance", {}).get("step")
            if not isinstance(began, int):
                raise SystemExit(f"{directory}: does not say at which step it starts; make it again")
            try:
                table = compared(posterior, rates, ensemble, began)
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
