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
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import common
import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import TABLES
from robustdyn.run.config import register_resolvers

SECONDS, MEBIBYTES, PAGE_MEBIBYTES = 60.0, 2048.0, 12.0  # the aims for 200 runs of 200 epochs
SWEPT: dict[str, tuple[object, ...]] = {
    "optimizer.lr": (0.05, 0.1),
    "optimizer.weight_decay": (0.0, 1e-4, 5e-4, 1e-3),
    "attack.eps_255": (8, 25.5, 38, 51, 64),
    "seed": (0, 1, 2, 3, 4),
}
RATES = {"optimizer.lr": tuple(round(0.001 * (1 + i), 3) for i in range(200))}
MEASURED_EVERY = 5
STEPS = 100  # of an epoch
LAYERS = ("conv1", *(f"layer{s}.{b}.conv{c}" for s, b, c in product((1, 2, 3, 4), (0, 1), (1, 2))), "linear")
PARTS = ("all", "attack", "hessian", "noise", "alignment", "weight_curvature")
OTHER_KINDS = {"int": 10, "bool": True, "str": "eval"}


def write_sweep(folder: Path, swept: Mapping[str, Sequence[object]] = SWEPT, **shape: Any) -> None:
    """One run directory for each combination of the values, with the records of a finished run."""
    register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base=None):
        hydra = OmegaConf.to_yaml(compose("train", return_hydra_config=True), resolve=False)
        config = compose("train")
    for job, values in enumerate(product(*swept.values())):
        chosen = dict(zip(swept, values, strict=True))
        write_run(folder / f"run={job:03d}", config, hydra, chosen, seed=job, **shape)


def write_run(
    path: Path,
    config: DictConfig,
    hydra: str,
    chosen: Mapping[str, object],
    *,
    seed: int,
    epochs: int = 200,
    directions: int = 10,
    decays: bool = True,
) -> None:
    """A finished run whose test loss rises late; without ``decays`` its rate goes up and down."""
    own = RunDirectory(path)
    own.hydra.mkdir(parents=True)
    own.records.mkdir()
    for key, value in {**chosen, "trainer.max_epochs": epochs}.items():
        OmegaConf.update(config, key, value)
    own.config.write_text(OmegaConf.to_yaml(config))
    own.hydra_config.write_text(hydra)
    own.overrides.write_text(json.dumps([f"{key}={value}" for key, value in chosen.items()]))
    own.status.write_text(json.dumps({"state": "done", "settings": {}}))
    own.environment.write_text(
        json.dumps({"python": "3.11", "device": "cpu", "packages": {"torch": "2.6.0"}})
    )
    every, measured = np.arange(epochs), np.arange(0, epochs, MEASURED_EVERY)
    rates = np.where(every // 2 % 2, 0.05, 0.1)
    if decays:
        rates = np.select([every < epochs // 2, every < 3 * epochs // 4], [0.1, 0.01], 0.001)
    changes = every[np.diff(rates, prepend=0.0) != 0]
    indices = [{"index": index} for index in range(directions)]
    rng = np.random.default_rng(seed)
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
        lines = map(json.dumps, rows(table, rng, when, within, rates, directions))
        own.table(table).write_text("".join(f"{line}\n" for line in lines))


def rows(
    table: str,
    rng: np.random.Generator,
    when: Any,
    within: Sequence[Mapping[str, object]],
    rates: Any,
    directions: int,
) -> Iterator[dict[str, Any]]:
    """The rows of a table: every number falls, those on test data rise again, and later rows are smaller."""
    columns = TABLES[table].columns
    fallen, late = np.exp(-6 * when / len(rates)), np.maximum(0, when / len(rates) - 0.5)
    signs = np.array([1 if "test" in column.name else -1 for column in columns])
    errors = np.array([0.1 if column.name.endswith("_se") else 1.0 for column in columns])
    level = (0.4 + fallen[:, None] + rng.uniform(0.1, 0.6) * signs * late[:, None])[:, None] * errors
    numbers = level / np.arange(1, len(within) + 1)[:, None]
    numbers = numbers * rng.lognormal(sigma=0.03, size=numbers.shape)
    for epoch, of_epoch in zip(when.tolist(), numbers.tolist(), strict=True):
        for key, values in zip(within, of_epoch, strict=True):
            row: dict[str, Any] = {
                c.name: OTHER_KINDS.get(c.kind, v) for c, v in zip(columns, values, strict=True)
            }
            row |= {"epoch": epoch, "step": STEPS * (epoch + (table != "rates"))} | dict(key)
            if "lr" in row:
                row["lr"] = float(rates[epoch])
            if "tracked_directions" in row:
                row["tracked_directions"] = directions
            if table == "epochs":
                row["robust_loss_gap"] = row["test_robust_loss"] - row["train_robust_loss"]
            yield row


def report(folder: Path, output: Path) -> dict[str, float]:
    """The command's time, processor time, peak memory of its largest process, and the size of its page."""
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


ONE: dict[str, Any] = {"swept": {"seed": (0,)}}
CASES: dict[str, dict[str, Any]] = {
    "200 runs of 200 epochs, 40 settings with five seeds": {},
    "200 runs of 200 epochs, a setting each": {"swept": RATES},
    "one run of 10,000 epochs": ONE | {"epochs": 10_000, "directions": 2},
    "one run of 10,000 epochs, up and down": ONE | {"epochs": 10_000, "directions": 2, "decays": False},
    "one run of 200 epochs, 1,000 directions": ONE | {"directions": 1000},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="keeps runs and reports here, and uses the runs that are there"
    )
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
