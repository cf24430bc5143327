"""Peak memory of a training step: ours against the studies' loops.

Each variant takes some steps in a process of its own. On a CPU it is the greatest resident size, less what
was resident before the first step, when libraries, network and images were there; on a GPU the most that
PyTorch had allocated.

    python experiments/benchmarks/step_memory.py [--width 16] [--batch 128] [--device auto]
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from at_step import (
    STUDIES,
    STUDY_NAMES,
    Ours,
    Study,
    add_arguments,
    batches_of,
    compose,
    images_in,
    ours,
    sizes,
    study,
    told,
)
from study_loops import chosen_device, markdown, network

MIB = 2**20
OURS = {"at": ("default", "bf16"), "awp": ("default", "bf16")}


def variants() -> list[tuple[str, str, str]]:
    """Name, method and execution, "study" for a study's loop."""
    found = []
    for method, executions in OURS.items():
        found.append((STUDY_NAMES[method], method, "study"))
        found += [(ours(method, execution), method, execution) for execution in executions]
    return found


def peak(args: argparse.Namespace, root: Path, method: str, execution: str) -> float:
    """MiB that the steps of one variant add, in this process."""
    device = chosen_device(args.device)
    run = Ours(
        compose(
            root,
            device,
            method=method,
            execution="default" if execution == "study" else execution,
            **sizes(args),
        ),
        network(args.width).state_dict(),
        device,
    )
    take_steps: Callable[[], float] = run.seconds
    if execution == "study":
        loop = study(STUDIES[method], args.width, args.steps, network(args.width).state_dict(), device=device)
        take_steps = Study(loop, batches_of(run.data, device), device).seconds
        del run
    if device.type == "cuda":
        take_steps()
        return torch.cuda.max_memory_allocated(device) / MIB
    before = resident("VmRSS")
    take_steps()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Of this process, in MiB: ``VmRSS`` now, ``VmHWM`` the greatest so far.

    As the kernel says it: ``ru_maxrss`` counts the parent's memory where a process was forked.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status says nothing of {key}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, rounds=3, batches=1)
    parser.add_argument("--variant", nargs=2, help="method and execution to measure in this process")
    args = parser.parse_args(arguments)
    common.quiet()
    if args.variant:
        print(json.dumps(peak(args, args.data_root, *args.variant)))
        return
    device = chosen_device(args.device)
    summary: dict[str, Any] = {}
    with images_in(args.data_root, args.batch * (1 + args.batches), args.batch) as root:
        for name, *variant in variants():
            found = [own_process(args, root, variant) for _ in range(args.rounds)]
            summary[name] = {"MiB": round(sorted(found)[len(found) // 2], 1)}
            print(name, found, flush=True)
    for name, method, execution in variants():
        if execution != "study":
            share = summary[name]["MiB"] / summary[STUDY_NAMES[method]]["MiB"]
            summary[name]["of the study's"] = round(share, 3)
    common.write_result(
        Path(__file__).stem,
        question="Peak memory of a step of adversarial training: ours against the studies' loops",
        settings=told(args, device),
        summary=summary,
    )
    rows = [[name, values["MiB"], values.get("of the study's", "")] for name, values in summary.items()]
    print(markdown(["", "MiB", "of the study's"], rows))


def own_process(args: argparse.Namespace, root: Path, variant: Sequence[str]) -> float:
    chosen = {"width": args.width, "batch": args.batch, "steps": args.steps, "batches": args.batches}
    command = [sys.executable, __file__, *(f"--{key}={value}" for key, value in chosen.items())]
    command += [f"--device={args.device}", f"--data-root={root}", "--variant", *variant]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(variant)} ended with status {done.returncode}")
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
