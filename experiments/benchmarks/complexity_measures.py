"""What do the complexity measures of docs/measures.md cost, in gradients on the same 256 examples?

A PreActResNet-18 of width 12 on digits, trained adversarially for a few epochs, under PGD-10. Each measure is
timed alone, and then all of them together, which share what they can. Before each of these, a few gradients
are timed: forward and backward passes in plain PyTorch.

    python experiments/benchmarks/complexity_measures.py [--examples 256] [--rounds 3] [--gradients 5]
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Collection

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
    parser.add_argument("--gradients", type=int, default=5)
    args = parser.parse_args()

    measured = network(args.examples)
    parts: dict[str, list[str]] = {name: [name] for name in MEASURES}
    parts |= {"all without searches": CHEAP, "all": list(MEASURES)}
    weights = tuple(measured.model.parameters())

    def gradient() -> None:
        logits = measured.model(measured.adversarial)
        torch.autograd.grad(nn.functional.cross_entropy(logits, measured.targets), weights)

    gradient()
    ratios: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.rounds):
        for name, names in parts.items():
            began = time.perf_counter()
            for _ in range(args.gradients):
                gradient()
            one = (time.perf_counter() - began) / args.gradients
            ratios[name].append(seconds(measured, names) / one)
            print(f"{name}: {ratios[name][-1]:.2f} gradients of {one:.3f} s", flush=True)
    cost = {name: statistics.median(values) for name, values in ratios.items()}
    said = {name: measure(measured).gradients for name, measure in MEASURES.items()}
    common.write_result(
        "complexity_measures",
        question="What do the complexity measures cost, in gradients on the same examples?",
        settings=vars(args)
        | {"epochs": EPOCHS, "model": "PreActResNet-18, width 12, digits", "attack": str(ATTACK)},
        summary={
            "all without searches": common.verdict(cost["all without searches"], at_most=MOST),
            "all": common.verdict(cost["all"], at_most=MOST_WITH_SEARCHES),
            "each, in gradients": {
                name: {"measured": round(cost[name], 2), "stated": round(said[name], 2)} for name in MEASURES
            },
        },
        rounds=ratios,
    )


if __name__ == "__main__":
    main()
