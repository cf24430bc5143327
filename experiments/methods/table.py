"""Best and final of every method, mean ± standard error over seeds, in the shape of the WCI paper's table 1.

    python experiments/methods/table.py DIR [DIR ...]

reads the runs of ``experiment=methods`` and writes ``results/table.md`` and ``results/table.csv`` beside this
script. Early stopping is plain adversarial training again, its last epoch replaced by the one whose robust
error on held-out training images was lowest.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from robustdyn.records import Run, find_runs
from robustdyn.report.statistics import BEST_ON_TEST, BEST_ON_VALIDATION, FINAL, final_and_best

PLAIN = "AT"
EARLY = "AT, early stopping"
SHOWN = {
    "test_robust_error": ("robust error, %", 100.0, 1),
    "test_clean_error": ("clean error, %", 100.0, 1),
    "test_robust_loss": ("robust loss", 1.0, 3),
    "robust_loss_gap": ("robust loss gap", 1.0, 3),
}


def method(run: Run) -> str:
    """The method's name in the papers, with the threshold where there is one."""
    name = run.choices["method"].replace("wci_lr", "WCI-LR").replace("_", " ")
    threshold = run.config["schedule"].get("threshold")
    return name.upper() if threshold is None else f"{name}, τ = {threshold:g}"


def selected(paths: Sequence[Path]) -> pd.DataFrame:
    """``final_and_best`` of the runs, early stopping as a group of its own, the seed as a column."""
    runs = find_runs(paths)
    seeds = {run.label: run.config["seed"] for run in runs}
    methods = {run.label: method(run) for run in runs}
    frame = final_and_best(runs)
    frame["group"] = frame["run"].map(methods)
    plain = frame[frame["group"] == PLAIN]
    stopped = plain[plain["selection"] == BEST_ON_VALIDATION].assign(selection=FINAL)
    best = plain[plain["selection"] == BEST_ON_TEST]
    early = pd.concat([best, stopped]).assign(group=EARLY)
    frame = pd.concat([frame[frame["selection"] != BEST_ON_VALIDATION], early], ignore_index=True)
    return frame.assign(seed=frame["run"].map(seeds))


def cell(values: "pd.Series[float]", scale: float, digits: int) -> str:
    """Mean ± standard error over seeds."""
    numbers = scale * values.to_numpy(dtype=float)
    error = numbers.std(ddof=1) / np.sqrt(len(numbers)) if len(numbers) > 1 else float("nan")
    return f"{numbers.mean():.{digits}f} ± {error:.{digits}f}"


def rise(frame: pd.DataFrame, column: str) -> "pd.Series[float]":
    """Final minus best of each seed of one group."""
    by_seed = frame.pivot(index="seed", columns="selection", values=column)
    return by_seed[FINAL] - by_seed[BEST_ON_TEST]


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per method: best, final and their difference of each metric, as text."""
    rows = []
    for group, own in frame.groupby("group", sort=False):
        row = {"method": str(group), "seeds": str(own["seed"].nunique())}
        for column, (label, scale, digits) in SHOWN.items():
            for selection in (BEST_ON_TEST, FINAL):
                picked = own.loc[own["selection"] == selection, column]
                row[f"{label}: {selection}"] = cell(picked, scale, digits)
            row[f"{label}: final − best"] = cell(rise(own, column), scale, digits)
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(shown: pd.DataFrame) -> str:
    """One Markdown table for each metric, methods as rows."""
    parts = []
    for label, _, _ in SHOWN.values():
        columns = [name for name in shown.columns if name.startswith(f"{label}:")]
        heads = ["method", "seeds", *(name.partition(": ")[2] for name in columns)]
        lines = [
            f"**{label}**",
            "",
            "| " + " | ".join(heads) + " |",
            "| " + " | ".join("---" for _ in heads) + " |",
        ]
        lines += [
            "| " + " | ".join([row["method"], row["seeds"], *(row[name] for name in columns)]) + " |"
            for _, row in shown.iterrows()
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="+", type=Path, help="run or sweep directories")
    arguments = parser.parse_args()
    frame = selected(arguments.path)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    frame.to_csv(results / "table.csv", index=False, float_format="%.6g")
    text = markdown(table(frame))
    (results / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
