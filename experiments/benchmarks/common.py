"""What every benchmark shares: alternating rounds in one process, a result file that names its hardware."""

import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from robustdyn.run.environment import processor

RESULTS = Path(__file__).parent / "results"


def alternate(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per variant and round; the order reverses every round, so that drift favours no one."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        order = list(variants) if index % 2 == 0 else list(variants)[::-1]
        for name in order:
            times[name].append(variants[name]())
        latest = ", ".join(f"{name} {times[name][-1]:.2f} s" for name in variants)
        print(f"round {index + 1}/{rounds}: {latest}")
    return times


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """A variant for ``alternate``: makes the call and returns the seconds it took."""

    def seconds() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return seconds


def verdict(
    measured: float, *, at_most: float | None = None, at_least: float | None = None
) -> dict[str, Any]:
    """A measured number beside its target, an upper or a lower bound, and whether it was reached."""
    if at_most is not None:
        return {"target": f"<= {at_most}", "measured": round(measured, 4), "reached": measured <= at_most}
    assert at_least is not None
    return {"target": f">= {at_least}", "measured": round(measured, 4), "reached": measured >= at_least}


def compare(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, Any]:
    """Median and range of every variant's seconds, and of their ratio to ``baseline`` round by round."""
    summary = {}
    for variant, times in seconds.items():
        ratios = [time / base for time, base in zip(times, seconds[baseline], strict=True)]
        summary[variant] = {"seconds": _spread(times), f"ratio to {baseline}": _spread(ratios)}
    return summary


def median_ratio(seconds: Mapping[str, list[float]], variant: str, baseline: str) -> float:
    """Of a variant's seconds to the baseline's, round by round."""
    pairs = zip(seconds[variant], seconds[baseline], strict=True)
    return statistics.median(time / base for time, base in pairs)


def write_result(
    name: str,
    *,
    question: str,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
    rounds: Mapping[str, list[float]] | None = None,
    silent: bool = False,
) -> None:
    """Write ``results/{name}.json``, with the hardware and the date, and print its summary unless silent."""
    result = {
        "question": question,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "settings": dict(settings),
        "summary": dict(summary),
    }
    if rounds is not None:
        result["rounds"] = dict(rounds)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    if silent:
        return
    for key, value in summary.items():
        print(f"{key}: {value}")
    print(f"written to {path}")


def hardware() -> dict[str, Any]:
    """Processor, cores, threads, accelerator and the versions that matter for speed."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def quiet() -> None:
    """No advice from Lightning between the figures."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }
