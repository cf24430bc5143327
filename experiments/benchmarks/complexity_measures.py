"""What do the complexity measures of docs/measures.md cost, in gradients on the same 256 examples?

A PreActResNet-18 of width 12 on digits, trained adversarially for a few epochs, under PGD-10. Each measure is
timed alone, and then all of them together, which share what they can. They take turns with one gradient: a
forward and a backward pass in plain PyTorch.

    python experiments/benchmarks/complexity_measures.py [--examples 256] [--rounds 3]
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Collection
from functools import partial

import common
import torch
from torch import nn

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.complexity import MEASURES, NetworkOnExamples
from robustdyn.curvature import EmpiricalRisk
from robustdyn.data.digits import read_digits
from robustdyn.models import PreActResNet

ATTACK = PGD(norm="linf", eps=0.2, step_size=0.05, steps=10)
EPOCHS = 15
MOST, MOST_WITH_SEARCHES = 40, 400
CHEAP = [name for name, measure in MEASURES.items() if not measure.searches]


def network(examples: int) -> NetworkOnExamples:
    """The trained network under attack."""
    torch.manual_seed(0)
    model = PreActResNet(
        num_classes=10,
        in_channels=1,
        width=12,
        blocks=(2, 2, 2, 2),
        strides=(1, 2, 2, 1),
        mean=(0.3053,),
        std=(0.3759,),
    )
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    digits = read_digits()
    images, labels = digits.images.float() / 255, digits.labels
    draws = streams.generator(0, "benchmark")
    training = dataclasses.replace(ATTACK, steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(128):
            attacked = training.perturb(model, images[batch], labels[batch], draws)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(attacked), labels[batch]).backward()
            optimizer.step()
    model.eval()
    clean, targets = images[:examples], labels[:examples]
    adversarial = ATTACK.perturb(model, clean, targets, draws)
    return NetworkOnExamples(
        model=model,
        clean=clean,
        adversarial=adversarial,
        targets=targets,
        risk=EmpiricalRisk(model, adversarial, targets, memory=2**28),
        attack=ATTACK,
        initial=initial,
    )


def seconds(measured: NetworkOnExamples, names: Collection[str]) -> float:
    """Of these measures, with nothing kept from before."""
    began = time.perf_counter()
    fresh = dataclasses.replace(measured)
    for name in names:
        measure = MEASURES[name]
        measure(fresh)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    measured = network(args.examples)
    parts: dict[str, list[str]] = {name: [name] for name in MEASURES}
    parts |= {"all without searches": CHEAP, "all": list(MEASURES)}
    weights = tuple(measured.model.parameters())

    def gradient() -> None:
        logits = measured.model(measured.adversarial)
        torch.autograd.grad(nn.functional.cross_entropy(logits, measured.targets), weights)

    gradient()
    variants: dict[str, Callable[[], float]] = {"gradient": common.timed(gradient)}
    variants |= {name: partial(seconds, measured, names) for name, names in parts.items()}
    times = common.alternate(variants, args.rounds)
    one = statistics.median(times["gradient"])
    cost = {name: statistics.median(times[name]) / one for name in parts}
    said = {name: measure(measured).gradients for name, measure in MEASURES.items()}
    common.write_result(
        "complexity_measures",
        question="What do the complexity measures cost, in gradients on the same examples?",
        settings=vars(args)
        | {"epochs": EPOCHS, "model": "PreActResNet-18, width 12, digits", "attack": str(ATTACK)},
        summary={
            "gradient, seconds": round(one, 4),
            "all without searches": common.verdict(cost["all without searches"], at_most=MOST),
            "all": common.verdict(cost["all"], at_most=MOST_WITH_SEARCHES),
            "each, in gradients": {
                name: {"measured": round(cost[name], 2), "stated": round(said[name], 2)} for name in MEASURES
            },
        },
    )


if __name__ == "__main__":
    main()
