"""How long ``robustdyn-measure`` takes for one checkpoint of the papers' network, and its peak memory.

Trains PreActResNet-18 without attack on part of CIFAR-10 for a few epochs, because the leading eigenvalues of
an untrained network lie so close together that the solver does not converge. Then it measures the checkpoint
with the default measurements, in a process of its own.

    python experiments/benchmarks/checkpoint_measurement.py [--root FOLDER] [--width 64] [--train 2560]

FOLDER (else $ROBUSTDYN_DATA, else data/) holds CIFAR-10 in one of its official layouts, whole or the first
images of each file.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from measurement_cost import rows
from measurement_memory import peak_mib

MINUTES, GIB = 30, 6  # aims


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=os.environ.get("ROBUSTDYN_DATA", "data"), help="CIFAR-10's folder")
    parser.add_argument("--width", type=int, default=64, help="64 is the papers' network")
    parser.add_argument("--train", type=int, default=2560, help="images trained on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--examples", type=int, default=256, help="measure.examples")
    parser.add_argument("--memory", type=int, default=2048, help="measure.memory_mib")
    args = parser.parse_args()
    if not any(Path(args.root).glob("cifar-10-batches-*")):
        print(f"--root={args.root} has no cifar-10-batches-bin or -py: nothing measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        run, measured = Path(folder) / "run", Path(folder) / "measured"
        train = [
            *(sys.executable, "-m", "robustdyn.commands.train", "method=standard", "data=cifar10"),
            *(f"data.root={args.root}", "data.partial=true", f"data.train_size={args.train}"),
            *("data.test_size=128", f"model.width={args.width}", f"trainer.max_epochs={args.epochs}"),
            *("measure=none", "report=false", f"hydra.run.dir={run}"),
        ]
        subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
        began = time.perf_counter()
        peak = peak_mib(
            [
                *(
                    sys.executable,
                    "-m",
                    "robustdyn.commands.measure",
                    f"checkpoint={run}/checkpoints/last.ckpt",
                ),
                *(f"data.root={args.root}", f"measure.examples={args.examples}", "report=false"),
                *(f"measure.memory_mib={args.memory}", f"output={measured}"),
            ]
        )
        minutes = (time.perf_counter() - began) / 60
        parts = {row["part"]: row for row in rows(measured, "costs")}
    names = ("seconds", "products", "converged")
    common.write_result(
        Path(__file__).stem,
        question="Time and peak memory of robustdyn-measure for one checkpoint of the papers' network",
        settings={name: value for name, value in vars(args).items() if name != "root"},
        summary={
            "minutes": common.verdict(minutes, at_most=MINUTES),
            "peak memory, GiB": common.verdict(peak / 1024, at_most=GIB),
            **{part: {name: row[name] for name in names} for part, row in parts.items()},
        },
    )


if __name__ == "__main__":
    main()
