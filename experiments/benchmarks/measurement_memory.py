"""What measuring adds to the peak memory of a run: PreActResNet-18 at CIFAR-10 size, batch 128, on a CPU.

Runs ``robustdyn-train`` as a process of its own, without measurement and with it at several settings of the
two keys that bound memory, on images made up in CIFAR-10's official layout, and compares the greatest
resident sizes in units of one gradient of the model.

    python experiments/benchmarks/measurement_memory.py [--width 64]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np

RECORD = 1 + 3 * 32 * 32
LEAN = ("measure.eigenpairs.extra_vectors=2", "~measure.measurements.alignment")
SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {  # products that fill the Lanczos basis, and overrides
    "the default": (22, ()),
    "directions=5 extra_vectors=2, no alignment": (9, ("measure.eigenpairs.directions=5", *LEAN)),
}


def write_images(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        records = draws.integers(0, 256, (64, RECORD), dtype=np.uint8)
        records[:, 0] = np.arange(64) % 10
        records.tofile(folder / name)


def peak_mib(arguments: list[str]) -> float:
    """Greatest resident size of the command, in MiB."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with status {status}")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64, help="64 is the papers' network")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root)
        base = [
            *(sys.executable, "-m", "robustdyn.commands.train", "data=cifar10", f"data.root={root}"),
            *("data.partial=true", "data.train_size=128", "data.test_size=64", f"model.width={args.width}"),
            *("data.eval_batch_size=64", "attack.steps=1", "trainer.max_epochs=1", "report=false"),
        ]
        without = peak_mib([*base, "measure.epochs=[]", f"hydra.run.dir={root}/without"])
        text = (root / "without" / "environment.json").read_text()
        gradient = json.loads(text)["parameters"] * 4 / 2**20
        summary = {"peak without measurement, MiB": round(without, 1)}
        for number, (name, (products, overrides)) in enumerate(SETTINGS.items()):
            # the peak is reached once the basis is full; accuracy is not asked
            measured = [f"measure.eigenpairs.max_products={products}", "measure.examples=32", *overrides]
            peak = peak_mib([*base, "measure.epochs=[0]", *measured, f"hydra.run.dir={root}/{number}"])
            summary[f"added at {name}, in gradients"] = round((peak - without) / gradient, 1)
            print(summary, flush=True)
    common.write_result(
        Path(__file__).stem,
        question="Peak memory that a measurement adds to training, in gradients of the model",
        settings={"width": args.width, "batch": 128, "examples": 32, "gradient_mib": gradient},
        summary=summary,
    )


if __name__ == "__main__":
    main()
