"""How long does ``robustdyn-report`` take for many or long runs, and how large are its memory and the page?

    python experiments/benchmarks/report_of_many_runs.py [--folder DIR]

The records are synthetic: the tables of the default measurement, with the columns of their schema. Each case
is one command in a process of its own, so that its start counts. Writes
``experiments/benchmarks/results/report_of_many_runs.json`` with the hardware and the date.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import common
import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import TABLES
from robustdyn.run.config import register_resolvers

SECONDS, MEBIBYTES, PAGE_MEBIBYTES = 60.0, 2048.0, 12.0  # the aims for 200 runs of 200 epochs
SWEPT = {
    "method": ("at", "awp", "trades", "wci_lr"),
    "optimizer.lr": (0.05, 0.1),
    "attack.eps_255": (8, 25.5, 38, 51, 64),
    "seed": (0, 1, 2, 3, 4),
}
MEASURED_EVERY = 5
STEPS = 100  # of an epoch
LAYERS = ("conv1", *(f"layer{s}.{b}.conv{c}" for s, b, c in product((1, 2, 3, 4), (0, 1), (1, 2))), "linear")
PARTS = ("all", "attack", "hessian", "noise", "alignment", "weight_curvature")

Row = dict[str, object]


def write_sweep(folder: Path, swept: Mapping[str, tuple[object, ...]] = SWEPT, **shape: Any) -> None:
    """One run directory for each combination of the values, with the records of a finished run."""
    register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base=None):
        for job, values in enumerate(product(*swept.values())):
            chosen = dict(zip(swept, values, strict=True))
            words = [f"{key}={value}" for key, value in chosen.items()]
            write_run(folder / f"run={job:03d}", words, seed=job, **shape)


def write_run(
    path: Path,
    words: list[str],
    *,
    seed: int,
    epochs: int = 200,
    directions: int = 10,
    rate: str = "piecewise",
) -> None:
    """A finished run whose robust loss rises after the decays, unless ``rate`` changes every epoch."""
    own = RunDirectory(path)
    own.hydra.mkdir(parents=True)
    own.records.mkdir()
    config = compose("train", [*words, f"trainer.max_epochs={epochs}"])
    own.config.write_text(OmegaConf.to_yaml(config))
    own.overrides.write_text(json.dumps(words))
    chosen = dict(word.split("=") for word in words if "." not in word and not word.startswith("seed"))
    own.hydra_config.write_text(json.dumps({"hydra": {"runtime": {"choices": chosen}}}))
    own.status.write_text(json.dumps({"state": "done", "settings": {}}))
    own.environment.write_text(
        json.dumps({"python": "3.11", "device": "cpu", "packages": {"torch": "2.6.0"}})
    )
    rng = np.random.default_rng(seed)
    every, measured = range(epochs), range(0, epochs, MEASURED_EVERY)
    indices = [{"index": index} for index in range(directions)]
    rates = [rate_at(epoch, epochs, rate) for epoch in every]
    changes = [epoch for epoch in every if epoch == 0 or rates[epoch] != rates[epoch - 1]]
    for table, when, within in (
        ("epochs", every, [{}]),
        ("timing", every, [{}]),
        ("rates", changes, [{}]),
        ("wci", measured, [{}]),
        ("alignment", measured, [{}]),
        ("bounds", measured, [{}]),
        ("spectrum", measured, indices),
        ("posterior", every, indices),
        ("layers", measured, [{"layer": f"{name}.weight"} for name in LAYERS]),
        ("costs", measured, [{"part": part} for part in PARTS]),
    ):
        with own.table(table).open("w") as file:
            for row in rows(table, rng, when, within, rates, directions):
                file.write(json.dumps(row) + "\n")


def rate_at(epoch: int, epochs: int, rate: str) -> float:
    """A rate with two decays, or one that goes up and down every epoch."""
    if rate == "zigzag":
        return 0.1 if epoch // 2 % 2 else 0.05
    return 0.1 * 0.1 ** ((epoch >= epochs // 2) + (epoch >= 3 * epochs // 4))


def rows(
    table: str,
    rng: np.random.Generator,
    when: range | list[int],
    within: list[Row],
    rates: list[float],
    directions: int,
) -> Iterator[Row]:
    """Rows in which every number drifts, by direction smaller ones, and the test loss turns after a decay."""
    columns = TABLES[table].columns
    turn = len(rates) // 2
    strength = rng.uniform(0.1, 0.6)
    for epoch in when:
        fallen, late = np.exp(-6 * epoch / len(rates)), max(0, epoch - turn) / len(rates)
        noise = rng.lognormal(sigma=0.03, size=(len(within), len(columns)))
        for rank, key in enumerate(within):
            row: Row = {
                "epoch": epoch,
                "step": STEPS * epoch if table == "rates" else STEPS * (epoch + 1),
                **key,
            }
            for column, factor in zip(columns, noise[rank], strict=True):
                if column.name in row:
                    continue
                sign = 1 if "test" in column.name else -1
                level = (0.4 + fallen + sign * strength * late) / (1 + rank)
                row[column.name] = {
                    "float": float(level * factor * (0.1 if column.name.endswith("_se") else 1.0)),
                    "int": 10,
                    "bool": True,
                    "str": "eval",
                }[column.kind]
            if "lr" in row:
                row["lr"] = rates[epoch]
            if table == "epochs":
                row["robust_loss_gap"] = row["test_robust_loss"] - row["train_robust_loss"]  # type: ignore[operator]
            if "tracked_directions" in row:
                row["tracked_directions"] = directions
            yield row


def report(folder: Path, output: Path) -> dict[str, float]:
    """The command's time, processor time, peak memory, and the size of the page that it wrote."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "robustdyn.commands.report", str(folder), "--output", str(output)],
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"the report of {folder} failed")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mebibytes": round(used.ru_maxrss / 1024),
        "page_mebibytes": round((output / "index.html").stat().st_size / 2**20, 2),
    }


CASES: dict[str, dict[str, Any]] = {
    "200 runs of 200 epochs, 40 settings with five seeds": {},
    "200 runs of 200 epochs, each with other settings": {
        "swept": {"optimizer.lr": tuple(round(0.001 * (1 + i), 3) for i in range(200))}
    },
    "one run of 10,000 epochs": {"swept": {"seed": (0,)}, "epochs": 10_000, "directions": 2},
    "one run of 10,000 epochs, a rate that goes up and down": {
        "swept": {"seed": (0,)},
        "epochs": 10_000,
        "directions": 2,
        "rate": "zigzag",
    },
    "one run of 200 epochs with 1,000 directions": {"swept": {"seed": (0,)}, "directions": 1000},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep records and pages here, and use what is there")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases, from 0; writes no result")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, case) in enumerate(CASES.items()):
            if arguments.only is not None and number not in arguments.only:
                continue
            folder = (arguments.folder or Path(temporary)) / f"case{number}"
            if not (folder / "runs").is_dir():
                write_sweep(folder / "runs", **case)
            found[name] = report(folder / "runs", folder / "report")
            print(f"{name}: {found[name]}", flush=True)
    if arguments.only is None:
        many = found[next(iter(CASES))]
        common.write_result(
            Path(__file__).stem,
            question="Time and memory of the report of many or long runs, and the size of its page",
            settings={"measured_every": MEASURED_EVERY, "swept": {key: len(v) for key, v in SWEPT.items()}},
            summary={
                "seconds": common.verdict(many["seconds"], at_most=SECONDS),
                "peak_mebibytes": common.verdict(many["peak_mebibytes"], at_most=MEBIBYTES),
                "page_mebibytes": common.verdict(many["page_mebibytes"], at_most=PAGE_MEBIBYTES),
                "cases": found,
            },
        )


if __name__ == "__main__":
    main()
