"""How long does the posterior of a whole run take? 80,000 steps × 1,000 directions, three schedules.

    python experiments/benchmarks/theory_propagation.py

Writes ``experiments/benchmarks/results/theory_propagation.json`` with the hardware and the date.
"""

import datetime
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import scipy

import robustdyn
from robustdyn.theory import MeasuredSpectrum, propagate
from robustdyn.theory.trajectory import Interpolation

STEPS, DIRECTIONS, EPOCHS, REPEATS = 80_000, 1_000, 200, 5
RESULT = Path(__file__).parent / "results" / "theory_propagation.json"


def spectrum(interpolation: Interpolation) -> MeasuredSpectrum:
    """One measurement per epoch: curvatures over four decades, growing by half over the run."""
    growth = np.linspace(1, 1.5, EPOCHS)[:, None]
    eigenvalue = growth * np.geomspace(1e-3, 10, DIRECTIONS)
    return MeasuredSpectrum(
        np.arange(EPOCHS) * (STEPS // EPOCHS), eigenvalue, 0.01 * eigenvalue, interpolation
    )


def seconds(interpolation: Interpolation, learning_rate: np.ndarray) -> list[float]:
    measured, times = spectrum(interpolation), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        propagate(
            measured,
            learning_rate,
            momentum=0.9,
            weight_decay=5e-4,
            record_steps=np.arange(1, EPOCHS + 1) * (STEPS // EPOCHS),
        )
        times.append(round(time.perf_counter() - start, 4))
    return times


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    t = np.arange(STEPS)
    piecewise = np.select([t < STEPS // 2, t < 3 * STEPS // 4], [0.1, 0.01], 0.001)
    cosine = 0.05 * (1 + np.cos(np.pi * t / STEPS))
    runs = {
        "piecewise_constant_rate_and_spectrum": seconds("piecewise_constant", piecewise),
        "cosine_rate_per_step": seconds("piecewise_constant", cosine),
        "cosine_rate_log_linear_spectrum": seconds("log_linear", cosine),
    }
    record = {
        "what": "propagate() with diagonal noise; one measurement and one record per epoch",
        "steps": STEPS,
        "directions": DIRECTIONS,
        "epochs": EPOCHS,
        "seconds": {
            name: {"median": float(np.median(times)), "rounds": times} for name, times in runs.items()
        },
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": processor(),
        "logical_cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "robustdyn": robustdyn.__version__,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, times in runs.items():
        print(f"{name:40s} median {np.median(times):.3f} s, best {min(times):.3f} s")


if __name__ == "__main__":
    main()
