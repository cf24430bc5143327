"""What measuring costs a run, against the full CIFAR-10 epoch it belongs to: PreActResNet-18, PGD-10.

Runs ``robustdyn-train`` as a process of its own: on part of CIFAR-10, without evaluation, for a few epochs,
measured after each from ``--first`` on, the first time from random starts and then warm. The seconds of the
training steps are scaled to the 50,000 images of a full epoch; evaluation, which would make the epoch dearer,
is not counted. One sample-gradient is 1 / 550,000 of it: ten attack steps and one descent step per image.

A second run measures the WCI alone on 1,024 examples, one random probe each.

    python experiments/benchmarks/measurement_cost.py [--root FOLDER] [--width 16] [--train 2560] [--epochs 5]

FOLDER (else $ROBUSTDYN_DATA, else data/) holds CIFAR-10 in one of its official layouts, whole or the first
images of each file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

FULL_EPOCH, PASSES = 50_000, 11


def rows(run_dir: Path, table: str) -> list[dict[str, Any]]:
    lines = (run_dir / "records" / f"{table}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def run(command: Sequence[str]) -> None:
    """Run it in a process of its own, and be silent unless it fails."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def train(run_dir: Path, args: argparse.Namespace, *overrides: str) -> float:
    """Run; the seconds of a full epoch of training steps, from the fastest epoch."""
    command = [
        *(sys.executable, "-m", "robustdyn.commands.train", "data=cifar10", f"data.root={args.root}"),
        *("data.partial=true", f"data.train_size={args.train}", "data.test_size=128"),
        *(f"model.width={args.width}", "trainer.check_val_every_n_epoch=1000", "report=false"),
        *(f"hydra.run.dir={run_dir}", f"measure.memory_mib={args.memory or 'null'}", *overrides),
    ]
    run(command)
    seconds = min(float(row["seconds"]) for row in rows(run_dir, "epochs"))
    return seconds * FULL_EPOCH / int(args.train)


def share(seconds: float, epoch: float) -> dict[str, float]:
    return {
        "seconds": round(seconds, 1),
        "sample_gradients": round(seconds / epoch * FULL_EPOCH * PASSES),
        "per cent of an epoch": round(100 * seconds / epoch, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=os.environ.get("ROBUSTDYN_DATA", "data"), help="CIFAR-10's folder")
    parser.add_argument("--width", type=int, default=16, help="64 is the papers' network")
    parser.add_argument("--train", type=int, default=2560, help="images trained on")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--first", type=int, default=2, help="first measured epoch")
    parser.add_argument("--memory", type=int, default=2048, help="measure.memory_mib")
    parser.add_argument(
        "--examples", type=int, default=256, help="measure.examples of the default measurement"
    )
    args = parser.parse_args()
    if not any(Path(args.root).glob("cifar-10-batches-*")):
        print(f"--root={args.root} has no cifar-10-batches-bin or -py: nothing measured")
        return
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        default, alone = Path(folder) / "default", Path(folder) / "wci"
        measured = list(range(args.first, args.epochs))
        epoch = train(
            default,
            args,
            f"trainer.max_epochs={args.epochs}",
            f"measure.examples={args.examples}",
            f"measure.epochs={measured}",
        )
        summary["full epoch of training steps, s"] = round(epoch, 1)
        traces = {row["epoch"]: row["seconds"] for row in rows(default, "wci")}
        for row in rows(default, "costs"):
            start = "cold" if row["epoch"] == args.first else "warm"
            entry = share(row["seconds"], epoch)
            if row["products"] is not None:
                entry |= {"products": row["products"], "converged": row["converged"]}
            summary[f"epoch {row['epoch']}, {start}: {row['part']}"] = entry
            if row["part"] == "all":
                summary[f"epoch {row['epoch']}: layer traces"] = share(traces[row["epoch"]], epoch)
        epoch_alone = train(
            alone,
            args,
            "trainer.max_epochs=1",
            "measure.examples=1024",
            "measure.epochs=[0]",
            "~measure.measurements.spectrum",
            "~measure.measurements.alignment",
            "measure.measurements.weight_curvature.exact_classes_up_to=2",
            "measure.measurements.weight_curvature.probes=1",
        )
        (wci,) = rows(alone, "wci")
        (whole,) = rows(alone, "costs")
        summary["WCI on 1,024 examples"] = share(wci["seconds"], epoch_alone) | {
            "relative standard error": round(wci["wci_se"] / wci["wci"], 4)
        }
        summary["WCI on 1,024 examples, with their PGD-10 attack"] = share(whole["seconds"], epoch_alone)
    common.write_result(
        Path(__file__).stem,
        question="Cost of measuring, as a share of the work of one full CIFAR-10 PGD-10 epoch",
        settings={name: value for name, value in vars(args).items() if name != "root"},
        summary=summary,
    )


if __name__ == "__main__":
    main()
