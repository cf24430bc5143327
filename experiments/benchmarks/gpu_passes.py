"""How long a pass forward and back to the images takes on a GPU, and how long the GPU itself is busy with it.

PreActResNet-18, eager, channels last, one batch. The host's time is what launching takes: where it exceeds
the kernels' time, the GPU waits for the host, and only fewer launches (CUDA graphs) make a step faster.

    python experiments/benchmarks/gpu_passes.py [--width 64] [--batch 128]
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from study_loops import kernels, network
from torch.profiler import ProfilerActivity, profile

from robustdyn.models.modes import frozen_parameters

WARM, COUNTED = 5, 20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64, help="of the network; the papers' is 64")
    parser.add_argument("--batch", type=int, default=128, help="images of a pass")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU, and PyTorch finds none")
    model = network(args.width).cuda().train()
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    images = torch.rand(args.batch, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    targets = torch.arange(args.batch, device="cuda") % 10

    def one_pass(half: bool) -> None:
        inputs = images.clone().requires_grad_(True)
        with torch.autocast("cuda", torch.bfloat16, enabled=half), frozen_parameters(model):
            loss = F.cross_entropy(model(inputs), targets)
        torch.autograd.grad(loss, inputs)

    def milliseconds(half: bool) -> dict[str, float]:
        for _ in range(WARM):
            one_pass(half)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(COUNTED):
            one_pass(half)
        host = time.perf_counter() - started
        torch.cuda.synchronize()
        total = time.perf_counter() - started
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(WARM):
                one_pass(half)
            torch.cuda.synchronize()
        busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e3 / WARM
        return {
            "host": round(1e3 * host / COUNTED, 2),
            "until done": round(1e3 * total / COUNTED, 2),
            "GPU busy": round(busy, 2),
        }

    summary = {}
    for deterministic in (True, False):
        for benchmark in (False, True):
            for half in (True, False):
                name = f"{'bf16' if half else 'float32'}, {deterministic=}, {benchmark=}"
                with kernels(deterministic=deterministic, benchmark=benchmark):
                    summary[name] = milliseconds(half)
    common.write_result(
        Path(__file__).stem,
        question="Milliseconds of a pass forward and back to the images: host, total, and the GPU's own work",
        settings=vars(args),
        summary=summary,
    )


if __name__ == "__main__":
    main()
