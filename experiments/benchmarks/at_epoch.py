"""An epoch of PGD-10 adversarial training with all that belongs to it: ours against the study's.

The robust-overfitting study's loop loads with two workers, trains, evaluates the test set and saves what its
code saves. Ours is ``robustdyn-train`` as anyone starts it, a process of its own, with all its callbacks and
no measurement: data, steps, evaluation, records and checkpoints. Its epoch is the time between the rows that
two epochs leave in the record; the first, which warms up and compiles, is told apart. Runs take turns, round
by round.

    python experiments/benchmarks/at_epoch.py [--train 2560] [--test 512] [--device auto]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from at_step import (
    EXECUTIONS,
    STUDY_NAMES,
    add_arguments,
    cell,
    compiling,
    composed,
    images_in,
    ratio,
    spread,
    told,
)
from at_step import overrides as step_overrides
from study_loops import (
    RobustOverfitting,
    StudyBatches,
    StudyNetwork,
    chosen_device,
    kernels,
    markdown,
    network,
    now,
    study_epoch,
)

from robustdyn.data import ImageDataModule
from robustdyn.records import read_table
from robustdyn.run.config import build

STUDY = STUDY_NAMES["at"]
FAST, FAST_TARGET = "fast", 4.0
POLL = 0.02  # seconds between two looks at the record


def overrides(args: argparse.Namespace, root: Path, execution: str, device: torch.device) -> list[str]:
    """What is asked of ``robustdyn-train``."""
    return [
        *step_overrides(
            root, device, execution=execution, width=args.width, batch=args.batch, steps=args.steps
        ),
        *(f"data.train_size={args.train}", f"data.test_size={args.test}", "report=false"),
    ]


def our_epochs(args: argparse.Namespace, asked: Sequence[str]) -> tuple[list[float], dict[str, float]]:
    """Seconds of every epoch, the first one's from the command's start; medians of the table ``timing``."""
    with tempfile.TemporaryDirectory() as folder, compiling():
        record = Path(folder) / "records" / "epochs.jsonl"
        log = Path(folder) / "output"
        command = [sys.executable, "-m", "robustdyn.commands.train", *asked]
        command += [f"trainer.max_epochs={1 + args.epochs}", f"hydra.run.dir={folder}"]
        stamps = [time.perf_counter()]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None:
                if record.exists() and record.read_text().count("\n") >= len(stamps):
                    stamps.append(time.perf_counter())
                time.sleep(POLL)
        if process.returncode or len(stamps) != args.epochs + 2:
            raise SystemExit(f"{' '.join(command)}: status {process.returncode}\n{log.read_text()[-2000:]}")
        timing = read_table(Path(folder), "timing").iloc[1:]
        shares = {name: float(timing[name].median()) for name in map(str, timing) if name.endswith("_share")}
    return [after - before for before, after in pairwise(stamps)], shares


def study_epochs(args: argparse.Namespace, data: ImageDataModule, device: torch.device) -> list[float]:
    """Seconds of every epoch of the study's loop."""
    train, test = (
        StudyBatches(
            data.split(name).images,
            data.split(name).labels,
            args.batch,
            train=name == "train",
            workers=args.workers,
            device=device,
        )
        for name in ("train", "test")
    )
    study = RobustOverfitting(model=network(args.width, StudyNetwork).to(device), steps=args.steps)
    seconds = []
    fastest = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder, kernels(deterministic=False, benchmark=fastest):
        for _ in range(1 + args.epochs):
            started = now(device)
            study_epoch(study, train, test, Path(folder))
            seconds.append(now(device) - started)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, rounds=2, batches=None)
    parser.add_argument("--train", type=int, default=2560, help="training images")
    parser.add_argument("--test", type=int, default=512, help="test images")
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs of a run, after a first one")
    parser.add_argument("--workers", type=int, default=2, help="of the study's loader, as in its code")
    parser.add_argument("--executions", nargs="*", default=["default", FAST], choices=EXECUTIONS)
    args = parser.parse_args(arguments)
    common.quiet()
    device = chosen_device(args.device)
    runs: dict[str, list[list[float]]] = {}
    shares: dict[str, dict[str, float]] = {}
    with images_in(args.data_root, args.train, args.test) as root:
        data: ImageDataModule = build(composed(overrides(args, root, "default", device)), "data")

        def ours(execution: str) -> Callable[[], float]:
            def run() -> float:
                seconds, shares[name_of(execution)] = our_epochs(
                    args, overrides(args, root, execution, device)
                )
                return kept(name_of(execution), seconds)

            return run

        def kept(name: str, seconds: list[float]) -> float:
            runs.setdefault(name, []).append(seconds)
            return median(seconds[1:])

        calls: dict[str, Callable[[], float]] = {
            STUDY: lambda: kept(STUDY, study_epochs(args, data, device)),
            **{name_of(execution): ours(execution) for execution in args.executions},
        }
        times = common.alternate(calls, args.rounds)
    summary: dict[str, Any] = {}
    for name, epochs in runs.items():
        summary[name] = {
            "seconds an epoch": spread([seconds for run in epochs for seconds in run[1:]]),
            "seconds of the first epoch, with what comes before it": spread([run[0] for run in epochs]),
            "times as fast as the study": ratio(times[STUDY], times[name]),
        }
        if name in shares:
            summary[name]["shares of an epoch"] = {key: round(v, 4) for key, v in shares[name].items()}
    if FAST in args.executions:
        faster = ratio(times[STUDY], times[name_of(FAST)])["median"]
        summary["targets"] = {"fast: speed-up": common.verdict(faster, at_least=FAST_TARGET)}
    common.write_result(
        Path(__file__).stem,
        question="An epoch of adversarial training, everything included: ours against the study's",
        settings=told(args, device),
        summary=summary,
        rounds=times,
    )
    columns = list(summary[STUDY])
    print(markdown(["", *columns], [[name, *(cell(summary[name][key]) for key in columns)] for name in runs]))


def name_of(execution: str) -> str:
    return f"ours, {EXECUTIONS[execution]}"


if __name__ == "__main__":
    main()
