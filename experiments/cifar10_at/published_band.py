"""The band that a whole CIFAR-10 run is judged by, from published training logs; and how well it judges.

    python experiments/cifar10_at/published_band.py PUBLISHED

PUBLISHED is a folder with ``epochs.csv``: columns ``study``, ``run``, ``epoch``, and the clean and robust
loss and accuracy (a fraction) of training and test as the robust-overfitting and AWP studies logged them.
The script writes the band, ``src/robustdyn/report/references/cifar10_standard.csv``, which
``robustdyn-report --reference`` reads. It also writes ``results/band_check.csv``, in how many epochs other
published runs lie within the band, and ``results/shared_fluctuations.csv``, how far they move together.

The band at an epoch is mean ± t s sqrt(1 + 1/n) of n runs. s² is their variance, pooled over the epochs
within ``REACH`` that no decay separates from it. t has Satterthwaite's degrees of freedom for the sum of a
variance between runs (n - 1 of them) and one between epochs: a difference that stays the same counts once,
however many epochs show it, and one that changes from epoch to epoch counts every time.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from robustdyn.errors import DataFileError
from robustdyn.records.schema import ROBUST_ERROR_GAP, ROBUST_LOSS_GAP
from robustdyn.report.reference import REFERENCES
from robustdyn.run.status import status_of

FOLDER = Path(__file__).parent
LEVEL = 0.95
REACH = 10  # epochs to either side
DECAYS = (100, 150)
EPOCHS = 200
LOGGED = (  # not the clean training metrics, which the study takes after the update on the same batch
    "test_robust_loss",
    "test_robust_error",
    "test_clean_loss",
    "test_clean_error",
    "train_robust_loss",
    "train_robust_error",
)
RICE, WU = "robust_overfitting", "awp"
BUILT_FROM = ((RICE, "cifar10_standard/preactresnet18"), (RICE, "cifar10_validation/preactresnet18"))
THIRD = ((RICE, "cifar10_l2/preactresnet18_5e-4"), (WU, "cifar10_linf/preactresnet18_standard"))
CHECKED = (  # study, run, and the epoch at which its protocol leaves the reference's
    *((RICE, f"cifar10_dropepoch/preactresnet_{epoch}", epoch) for epoch in (60, 70, 80, 90)),
    *((RICE, f"cifar10_droplr/preactresnet_{rate}", 100) for rate in ("0.006", "0.008", "0.03", "0.05")),
    (RICE, "cifar10_lr/preactresnet18_piecewisezoom", 100),
    (RICE, "cifar10_lr/preactresnet18_piecewisezoom_long", 100),
    *((study, run, 0) for study, run in THIRD),
    (RICE, "cifar10_cutout/preactresnet18_14", 0),
    (RICE, "cifar10_mixup/preactresnet18_1.4", 0),
    (RICE, "cifar10_lr/preactresnet18_cosine", 0),
    (WU, "cifar10_linf/preactresnet18_awp", 0),
)


def read_curves(path: Path) -> dict[tuple[str, str], pd.DataFrame]:
    """Losses, errors and gaps of every run by epoch; (study, run) -> frame indexed by epoch.

    Raises:
        DataFileError: The file is not there or lacks a column.
    """
    try:
        logged = pd.read_csv(path)
        for name in LOGGED:
            if name.endswith("_error"):
                logged[name] = 1.0 - logged[name.replace("_error", "_accuracy")]
        logged[ROBUST_LOSS_GAP] = logged["test_robust_loss"] - logged["train_robust_loss"]
        logged[ROBUST_ERROR_GAP] = logged["test_robust_error"] - logged["train_robust_error"]
        kept = logged.set_index("epoch")[["study", "run", *LOGGED, ROBUST_LOSS_GAP, ROBUST_ERROR_GAP]]
    except (OSError, KeyError, ValueError) as error:
        raise DataFileError(f"{path}: cannot read the published curves ({error}); see --help") from error
    return {
        (str(s), str(r)): own.drop(columns=["study", "run"]) for (s, r), own in kept.groupby(["study", "run"])
    }


def band(runs: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The band of runs of equal length: ``quantity``, ``epoch``, ``centre``, ``low`` and ``high``."""
    parts = []
    for quantity in runs[0].columns:
        values = np.stack([run[quantity].to_numpy(dtype=float) for run in runs], axis=1)
        centre, half = values.mean(axis=1), half_widths(values)
        columns = {"epoch": runs[0].index, "centre": centre, "low": centre - half, "high": centre + half}
        parts.append(pd.DataFrame({"quantity": quantity} | columns))
    return pd.concat(parts, ignore_index=True)


def half_widths(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half of the band's width at each epoch (E,), of the runs' values (E, n)."""
    deviations = values - values.mean(axis=1, keepdims=True)
    windows = [
        phase[max(0, i - REACH) : i + REACH + 1]
        for phase in np.split(deviations, DECAYS)
        for i in range(len(phase))
    ]
    variance, freedom = np.transpose([pooled(window) for window in windows])
    return half_width(variance, freedom, values.shape[1])


def half_width(variance: NDArray[np.float64], freedom: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Half of the band's width around the mean of n runs of such a variance."""
    times = np.asarray(stats.t.ppf(0.5 + LEVEL / 2, freedom))
    return times * np.sqrt(variance * (1 + 1 / n))


def pooled(deviations: NDArray[np.float64]) -> tuple[float, float]:
    """Variance of a run at an epoch and its degrees of freedom, from deviations from a mean (E, n)."""
    epochs, n = deviations.shape
    means = deviations.mean(axis=0)
    between = float((means**2).sum()) / (n - 1)  # with an epoch's share of the variance between epochs
    within = float(((deviations - means) ** 2).sum()) / ((n - 1) * epochs)
    freedom = (between + within) ** 2 / (between**2 / (n - 1) + within**2 / ((n - 1) * (epochs - 1)))
    return between + within, freedom


def count_within(bounds: pd.DataFrame, run: pd.DataFrame) -> pd.DataFrame:
    """``phase``, ``epochs``, and for each quantity in how many of them the run lies in the band."""
    values = run.reset_index().melt("epoch", var_name="quantity")
    both = values.merge(bounds, on=["quantity", "epoch"])
    both["within"] = (both["low"] <= both["value"]) & (both["value"] <= both["high"])
    edges = [0, *DECAYS, EPOCHS]
    both["phase"] = [f"{edges[i - 1]}-{edges[i] - 1}" for i in np.searchsorted(edges, both["epoch"], "right")]
    counts = both.pivot_table(index="phase", columns="quantity", values="within", aggfunc="sum", sort=False)
    counts.insert(0, "epochs", both.groupby("phase", sort=False)["epoch"].nunique())
    return counts.reset_index()


def checks(curves: Mapping[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """How other runs lie in the band, and each of three runs in the band of the other two.

    Returns:
        ``band`` (the runs it is built from), ``study``, ``run``, ``protocol`` (whether it is still the
        reference's: ``equal`` or ``other``) and the columns of ``count_within``.
    """
    asked = [(BUILT_FROM, (study, run), leaves) for study, run, leaves in CHECKED]
    for third in THIRD:
        first, second = BUILT_FROM
        asked += [((second, third), first, EPOCHS), ((first, third), second, EPOCHS)]
    parts = []
    for built_from, group in itertools.groupby(asked, key=lambda one: one[0]):
        bounds = band([curves[key] for key in built_from])
        for _, (study, run), leaves in group:
            own = curves[study, run]
            for said, part in (("equal", own.loc[: leaves - 1]), ("other", own.loc[leaves:])):
                if len(part):
                    found = count_within(bounds, part)
                    heads = {"band": " + ".join(name for _, name in built_from), "study": study, "run": run}
                    columns = [*heads, "protocol", *found.columns]
                    parts.append(found.assign(**heads, protocol=said)[columns])
    return pd.concat(parts, ignore_index=True)


def shared_fluctuations(curves: Mapping[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """How far other runs move up and down together with the first run of the band.

    Returns:
        ``study``, ``run``, and for two metrics the correlation of the deviations from a running mean over
        eleven epochs, at the epochs in which every run still has the first rate.
    """
    names = ["test_robust_error", "test_robust_loss"]
    moves = {
        key: (own[names] - own[names].rolling(11, center=True).mean()).loc[10:54]
        for key, own in curves.items()
    }
    keys = [BUILT_FROM[1], *((study, run) for study, run, _ in CHECKED)]
    rows = [
        dict(zip(("study", "run"), key, strict=True)) | moves[key].corrwith(moves[BUILT_FROM[0]]).to_dict()
        for key in keys
    ]
    return pd.DataFrame(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("published", type=Path, metavar="PUBLISHED", help="folder of epochs.csv")
    arguments = parser.parse_args()

    def work() -> None:
        curves = read_curves(arguments.published / "epochs.csv")
        bounds = band([curves[key] for key in BUILT_FROM])
        for path, table in (
            (REFERENCES / "cifar10_standard.csv", bounds),
            (FOLDER / "results" / "band_check.csv", checks(curves)),
            (FOLDER / "results" / "shared_fluctuations.csv", shared_fluctuations(curves)),
        ):
            table.to_csv(path, index=False, float_format="%.5f")
            print(f"{path}: {len(table)} rows")

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
