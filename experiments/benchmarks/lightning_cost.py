"""What Lightning costs around a step at CIFAR-10's size: our module under a Trainer against a bare loop.

The two do the same mathematics: the same batches, attack, passes, optimiser and metrics. They take turns, a
few batches each, and the ratio is taken round by round.

    python experiments/benchmarks/lightning_cost.py [--width 16] [--rounds 15] [--batches 2] [--device auto]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import common
from at_step import BareLoop, Ours, add_arguments, batches_of, compose, images_in, sizes, told, warmed
from study_loops import chosen_device

from robustdyn.run.config import build

AIM = 1.03  # times the bare loop


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, rounds=15, batches=2)
    args = parser.parse_args(arguments)
    common.quiet()
    device = chosen_device(args.device)
    with images_in(args.data_root, args.batch * (1 + args.batches), args.batch) as root:
        cfg = compose(root, device, **sizes(args))
        start = warmed(args.width, batches_of(build(cfg, "data"), device), device)
        calls = {
            "bare loop": BareLoop(cfg, start, device).seconds,
            "under Lightning": Ours(cfg, start, device).seconds,
        }
        for call in calls.values():
            call()
        times = common.alternate(calls, args.rounds)
    ratio = common.median_ratio(times, "under Lightning", "bare loop")
    common.write_result(
        Path(__file__).stem,
        question="A step of adversarial training under Lightning against a bare loop of the same mathematics",
        settings=told(args, device),
        summary=common.compare(times, baseline="bare loop")
        | {"targets": {"under Lightning / bare loop": common.verdict(ratio, at_most=AIM)}},
        rounds=times,
    )


if __name__ == "__main__":
    main()
