"""Does training on a GPU compute what it computes on a CPU?

Small runs on digits, each a ``robustdyn-train`` of its own, all at once: AT, AWP and TRADES in float64
and float32 on both devices, with measurements; the same run twice on the GPU; and a run that goes on from its
checkpoint beside one that was never stopped. Where devices are compared, the attack has no random start,
because a GPU draws other random numbers than a CPU, and its steps follow the gradient (l2), because the sign
of a gradient that is zero but for rounding differs between devices and moves a pixel by a whole step.

    python experiments/benchmarks/gpu_correctness.py [--device cuda] [--jobs 12]
"""

import argparse
import concurrent.futures
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import torch

METHODS = ("at", "awp", "trades")
PRECISIONS = ("64-true", "32-true")
SIZE = (
    *("data=digits", "data.train_size=256", "data.test_size=128", "model.width=8", "attack.steps=4"),
    *("trainer.max_epochs=3", "schedule.milestones=[2]", "measure.epochs=[0,2]", "measure.examples=64"),
    *("measure.eigenpairs.directions=3", "measure.eigenpairs.tolerance=1e-6", "report=false"),
)
FIXED = (
    *("attack=l2", "attack.train.random_start=none", "attack.evaluation.random_start=none"),
    "execution.channels_last=false",
)
COMPARED = {
    "epochs": ("train_robust_loss", "train_clean_loss", "test_robust_loss", "test_clean_loss"),
    "wci": ("wci", "hessian_trace", "weight_norm_sq"),
    "spectrum": ("hessian_eigenvalue", "gradient_noise", "noise_eigenvalue"),
}
FIRST = "after one epoch"
# float64: some steps of rounding, grown by a network that is not smooth; the eigenpairs' relative residual is
# 1e-6.
# float32: the same growth from 6e-8 instead of 1e-16.
TOLERANCE = {"64-true": 1e-5, "32-true": 5e-2}


def train(folder: Path, *settings: str) -> str:
    """Run ``robustdyn-train`` into ``folder``; what it said if it failed, else nothing."""
    code = "from robustdyn.commands.train import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *SIZE, *settings, f"hydra.run.dir={folder}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    """The rows of one table of a run."""
    return [json.loads(line) for line in (folder / "records" / f"{table}.jsonl").read_text().splitlines()]


def differences(mine: Path, theirs: Path, last_epoch: int) -> dict[str, float]:
    """Greatest relative difference of every compared column in the epochs up to ``last_epoch``."""
    found: dict[str, float] = {}
    for table, columns in COMPARED.items():
        for a, b in zip(rows(mine, table), rows(theirs, table), strict=True):
            if a["epoch"] > last_epoch:
                continue
            for column in columns:
                difference = abs(a[column] - b[column]) / max(abs(b[column]), 1e-12)
                found[column] = max(found.get(column, 0.0), difference)
    return found


def same_weights(mine: Path, theirs: Path) -> bool:
    """Whether the last checkpoints of two runs hold the same bits."""
    a, b = (
        torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
        for folder in (mine, theirs)
    )
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def runs(root: Path, accelerator: str) -> Iterator[tuple[Path, Sequence[str]]]:
    """Folder and settings of every run."""
    for method in METHODS:
        for precision in PRECISIONS:
            for where in ("cpu", accelerator):
                settings = [
                    f"method={method}",
                    f"trainer.precision={precision}",
                    f"trainer.accelerator={where}",
                ]
                yield root / f"{method}-{precision}-{where}", [*FIXED, *settings]
    gpu = f"trainer.accelerator={accelerator}"
    yield root / "first", [gpu]
    yield root / "second", [gpu]
    yield root / "resumed", [gpu, "trainer.max_epochs=2", "measure.epochs=[0]"]


def compared(root: Path, accelerator: str, failures: Mapping[str, str]) -> dict[str, Any]:
    """The verdicts."""
    summary: dict[str, Any] = {}
    for method in METHODS:
        for precision in PRECISIONS:
            cpu, gpu = (root / f"{method}-{precision}-{where}" for where in ("cpu", accelerator))
            if cpu.name in failures or gpu.name in failures:
                continue
            found = {FIRST: differences(gpu, cpu, 0), "after three epochs": differences(gpu, cpu, 2)}
            worst = max(found[FIRST].values())
            limit = TOLERANCE[precision]
            summary[f"{method}, {precision}, GPU against CPU"] = {
                **{when: {k: float(f"{v:.2g}") for k, v in values.items()} for when, values in found.items()},
                FIRST + ", greatest": common.verdict(worst, at_most=limit),
            }
    if not failures.keys() & {"first", "second"}:
        summary["two runs on the GPU, bit for bit"] = same_weights(root / "first", root / "second")
    if not failures.keys() & {"first", "resumed"}:
        summary["a run that went on, bit for bit"] = same_weights(root / "first", root / "resumed")
    return summary | ({"failures": dict(failures)} if failures else {})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="what is compared with the CPU"
    )
    parser.add_argument("--jobs", type=int, default=12, help="runs at a time")
    args = parser.parse_args(arguments)
    accelerator = "gpu" if args.device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        root = Path(folder)
        said = {into.name: pool.submit(train, into, *settings) for into, settings in runs(root, accelerator)}
        failures = {name: future.result() for name, future in said.items() if future.result()}
        if "resumed" not in failures:
            again = train(root / "resumed", f"trainer.accelerator={accelerator}", "resume=changed")
            failures |= {"resumed": again} if again else {}
        summary = compared(root, accelerator, failures)
    common.write_result(
        Path(__file__).stem,
        question="Does training on a GPU compute what it computes on a CPU?",
        settings={"runs": list(SIZE), "compared": list(FIXED), "tolerance": TOLERANCE},
        summary=summary,
    )
    if failures or any(not math.isfinite(value) for value in TOLERANCE.values()):
        raise SystemExit(f"{len(failures)} runs failed")


if __name__ == "__main__":
    main()
