"""Seconds of a training step against batch size, width of the network and steps of the attack.

Ours, under a real Trainer (see at_step.py), one quantity at a time away from the middle: batch 128, width 16,
PGD-10. Every setting has its turn in every round.

    python experiments/benchmarks/step_scaling.py [--compile] [--rounds 3] [--device auto]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import common
from at_step import EXECUTIONS, Ours, add_arguments, compiling, compose, images_in, sizes, told
from study_loops import CLASSES, chosen_device, markdown, network


class Setting(NamedTuple):
    """What the work of a step depends on."""

    batch: int
    width: int
    steps: int


def settings(
    middle: Setting, batches: Sequence[int], widths: Sequence[int], steps: Sequence[int]
) -> list[Setting]:
    """Each quantity at each of its values, the others in the middle."""
    found = [middle._replace(batch=value) for value in batches]
    found += [middle._replace(width=value) for value in widths]
    found += [middle._replace(steps=value) for value in steps]
    return list(dict.fromkeys(found))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, rounds=3, batches=1)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--widths", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--attack-steps", type=int, nargs="*", default=[1, 5, 10, 20])
    parser.add_argument("--compile", action="store_true", help="time bf16 compiled too, a minute for each")
    args = parser.parse_args(arguments)
    common.quiet()
    device = chosen_device(args.device)
    middle = Setting(args.batch, args.width, args.steps)
    asked = settings(middle, args.batch_sizes, args.widths, args.attack_steps)
    executions = ("default", "bf16", "fast") if args.compile else ("default", "bf16")
    images = max(setting.batch for setting in asked) * (1 + args.batches)
    with images_in(args.data_root, images, max(CLASSES, args.batch)) as root, compiling():
        runs = {}
        for setting in asked:
            for execution in executions:
                cfg = compose(root, device, execution=execution, **(sizes(args) | setting._asdict()))
                runs[name(setting, execution)] = Ours(cfg, network(setting.width).state_dict(), device)
        for run in runs.values():
            run.seconds()
        times = common.alternate({key: run.seconds for key, run in runs.items()}, args.rounds)
    rows: list[dict[str, Any]] = []
    for setting in asked:
        row: dict[str, Any] = setting._asdict()
        for execution in executions:
            seconds = median(times[name(setting, execution)])
            row[f"{EXECUTIONS[execution]}, s a step"] = round(seconds, 4)
            row[f"{EXECUTIONS[execution]}, images/s"] = round(setting.batch / seconds, 1)
        rows.append(row)
    common.write_result(
        Path(__file__).stem,
        question="A step of PGD adversarial training against batch size, width and steps of the attack",
        settings=told(args, device),
        summary={"table": rows},
        rounds=times,
    )
    print(markdown(list(rows[0]), [list(row.values()) for row in rows]))


def name(setting: Setting, execution: str) -> str:
    return f"batch {setting.batch}, width {setting.width}, PGD-{setting.steps}, {EXECUTIONS[execution]}"


if __name__ == "__main__":
    main()
