"""What a measurement takes in this version against another one: the default measurement of a digits run.

Trains in turns with the package of this checkout and with that of another, each as a process of its own, and
compares the seconds of every measured epoch: the first from random starts, the next from the last one's
eigenvectors.

    git worktree add ../before COMMIT
    python experiments/benchmarks/measurement_versions.py ../before [--rounds 5] [--width 16] [--epochs 3]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import common

TRAIN = """
try:
    from robustdyn.commands.train import main
except ImportError:  # as it was called until November 2026
    from robustdyn.entrypoints.train import main
main()
"""
HERE = Path(__file__).parents[2]


def costs(checkout: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds by measured epoch and part."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-c", TRAIN, "data=digits", "report=false"),
            *(f"hydra.run.dir={folder}", f"model.width={args.width}", f"trainer.max_epochs={args.epochs}"),
            *("data.train_size=300", "measure.epochs=every 1"),
        ]
        environ = os.environ | {"PYTHONPATH": str(checkout / "src")}
        # from an empty folder, so that the package is the checkout's
        subprocess.run(command, check=True, env=environ, cwd=folder, capture_output=True)
        lines = (Path(folder) / "records" / "costs.jsonl").read_text().splitlines()
        found = {}
        for row in map(json.loads, lines):
            start = "random starts" if row["epoch"] == 0 else f"epoch {row['epoch']}, warm"
            found[f"{start}: {row['part']}"] = float(row["seconds"])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a checkout of the other version")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    versions = {"this version": HERE, "the other version": args.other.resolve()}
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(args.rounds):
        for name in list(versions)[:: 1 if number % 2 == 0 else -1]:
            for part, taken in costs(versions[name], args).items():
                seconds[part][name].append(taken)
        print(f"round {number + 1} of {args.rounds}")
    common.write_result(
        Path(__file__).stem,
        question="What the default measurement of a digits run takes in this version against another one",
        settings={"rounds": args.rounds, "width": args.width, "epochs": args.epochs},
        summary={
            part: common.compare(taken, "the other version")
            for part, taken in seconds.items()
            if taken.keys() == versions.keys()
        },
    )


if __name__ == "__main__":
    main()
