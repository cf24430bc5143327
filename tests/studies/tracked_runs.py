"""Runs of 12 epochs, decays at 4 and 8, two tracked directions, whose every number is known."""

import json
import math
from pathlib import Path

import numpy as np

from tests.records.synthetic import config, write_hydra

STEEPER = 1.5  # J / λ
EPOCHS, DECAYS, MEASURED, K = 12, (4, 8), (0, 3, 4, 7, 8, 11), 2


def rate(epoch):
    return 0.1 * 0.1 ** sum(epoch >= decay for decay in DECAYS)


def flat(epoch):
    return 1.0


def write_run(
    path,
    method="at",
    seed=0,
    *,
    curvature=flat,
    variance=0.5,
    loss=flat,
    above=lambda epoch: 0.0,
    lacking=(),
    unstable=(),
    measured=MEASURED,
    lr=rate,
    **changed,
):
    """λ = 2a and a/2, a = curvature(epoch); noise ten times smaller; σ² = ``variance`` η.

    The time-resolved σ² is twice that, and three times that by the papers' law. ``above(epoch)`` is how many
    spreads the commutator is above its null.
    """
    path = Path(path)
    write_hydra(path, config(method, seed, **changed), [], {"method": method})
    tables = {name: [] for name in ("epochs", "spectrum", "posterior", "alignment", "bounds")}
    for epoch in range(EPOCHS):
        value = loss(epoch) if epoch % 2 else None  # evaluated every second epoch
        row = {"epoch": epoch, "step": epoch + 1, "lr": lr(epoch)}
        for name in ("test_robust_loss", "robust_loss_gap", "test_robust_error", "robust_error_gap"):
            row[name] = value
        tables["epochs"].append(row | {"test_clean_error": value})
        for index in range(K):
            sigma = variance * lr(epoch)
            gone = epoch in unstable and index == 1
            eigenvalue = curvature(epoch) * (2.0, 0.5)[index]
            tables["posterior"].append(
                {
                    "epoch": epoch,
                    "step": epoch + 1,
                    "index": index,
                    "slope": STEEPER * eigenvalue,
                    "attack_follows": True,
                    "posterior_variance": 2 * sigma,
                    "posterior_variance_independent": 3 * sigma,
                    "posterior_variance_stationary": None if gone else sigma,
                }
            )
            if epoch in measured:
                tables["spectrum"].append(
                    {
                        "epoch": epoch,
                        "index": index,
                        "hessian_eigenvalue": eigenvalue,
                        "curvature": eigenvalue,
                        "gradient_noise": eigenvalue / 10,
                        "noise_eigenvalue": eigenvalue / 5,
                        "posterior_variance_stationary": None if gone else sigma,
                        "curvature_term": None if gone else eigenvalue * sigma,
                        "log_variance_term": None if gone else -math.log(sigma),
                    }
                )
        if epoch in measured:
            row = {"epoch": epoch, "commutator_null": 0.1, "commutator_null_spread": 0.02, "cosine": 0.5}
            row |= {"commutator": 0.1 + 0.02 * above(epoch), "subspace_overlap": 0.7, "captured_noise": 0.8}
            row |= {"total_correlation": 0.3, "total_correlation_null": 0.3}
            tables["alignment"].append(row | {"total_correlation_null_spread": 0.1})
    (path / "records").mkdir()
    for name, rows in tables.items():
        if name not in lacking:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (path / "records" / f"{name}.jsonl").write_text(text)
    return path


def drawn(figure):
    """All heights of a figure's lines that follow data: as a sorted array."""
    lines = [line for ax in figure.axes for line in ax.get_lines() if line.get_linewidth() > 1.5]
    return np.sort(np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines]))


def row_of(table, **where):
    """The one row of a table with these values."""
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]
