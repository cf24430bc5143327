"""How long does the posterior of a whole run take? 80,000 steps × 1,000 directions, three schedules.

    python experiments/benchmarks/theory_propagation.py

Writes ``experiments/benchmarks/results/theory_propagation.json`` with the hardware and the date.
"""

import time
from pathlib import Path

import common
import numpy as np
from numpy.typing import NDArray

from robustdyn.theory import MeasuredSpectrum, propagate
from robustdyn.theory.trajectory import Interpolation, Method

Array = NDArray[np.float64]
STEPS, DIRECTIONS, EPOCHS, ROUNDS = 80_000, 1_000, 200, 5


def spectrum(interpolation: Interpolation) -> MeasuredSpectrum:
    """One measurement per epoch: curvatures over four decades, growing by half over the run."""
    growth = np.linspace(1, 1.5, EPOCHS)[:, None]
    eigenvalue = growth * np.geomspace(1e-3, 10, DIRECTIONS)
    return MeasuredSpectrum(
        np.arange(EPOCHS) * (STEPS // EPOCHS), eigenvalue, 0.01 * eigenvalue, interpolation
    )


def seconds(measured: MeasuredSpectrum, learning_rate: Array, method: Method) -> float:
    start = time.perf_counter()
    propagate(
        measured,
        learning_rate,
        momentum=0.9,
        weight_decay=5e-4,
        record_steps=np.arange(1, EPOCHS + 1) * (STEPS // EPOCHS),
        method=method,
    )
    return time.perf_counter() - start


def main() -> None:
    t = np.arange(STEPS)
    piecewise = np.select([t < STEPS // 2, t < 3 * STEPS // 4], [0.1, 0.01], 0.001)
    cosine = 0.05 * (1 + np.cos(np.pi * t / STEPS))
    held, drawn = spectrum("piecewise_constant"), spectrum("log_linear")
    single_steps = "piecewise rate, single steps"
    times = common.alternate(
        {
            "piecewise rate": lambda: seconds(held, piecewise, "auto"),
            single_steps: lambda: seconds(held, piecewise, "recurrence"),
            "cosine rate per step": lambda: seconds(held, cosine, "auto"),
            "cosine rate, log-linear spectrum": lambda: seconds(drawn, cosine, "auto"),
        },
        ROUNDS,
    )
    common.write_result(
        Path(__file__).stem,
        question="Time to propagate the posterior of a whole run, diagonal noise, one record per epoch",
        settings={"steps": STEPS, "directions": DIRECTIONS, "epochs": EPOCHS},
        summary=common.compare(times, baseline=single_steps),
        rounds=times,
    )


if __name__ == "__main__":
    main()
