"""What the curvature benchmarks measure, and the plain PyTorch they measure against; no benchmark itself.

The problem is real but small: scikit-learn's handwritten digits, resized to 32x32 pixels in three equal
channels, and a PreActResNet-18 trained on PGD-3 examples of them. Or a file that a longer run has saved.
"""

import argparse
import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.curvature import EmpiricalRisk
from robustdyn.data.digits import read_digits
from robustdyn.models import PreActResNet

SEED, BATCH, SIZE, CLASSES = 0, 128, 32, 10
EPS, STEP = 8 / 255, 2 / 255
EPOCH = 14  # steps: 1,797 digits make so many full batches
ATTACKED_AT_ONCE = 128
PLENTY = 2**60  # bytes: more than any graph takes, so that all are kept


@dataclass(frozen=True)
class Problem:
    """A network in eval mode, fixed adversarial training examples of it, and where both come from."""

    model: PreActResNet
    inputs: Tensor
    targets: Tensor
    description: Mapping[str, Any]

    def risk(self, chunk: int | None, **settings: Any) -> EmpiricalRisk:
        return EmpiricalRisk(self.model, self.inputs, self.targets, chunk_size=chunk, **settings)

    def first(self, examples: int) -> "Problem":
        return replace(self, inputs=self.inputs[:examples], targets=self.targets[:examples])

    def chunks(self, size: int | None) -> list[tuple[Tensor, Tensor]]:
        size = len(self.inputs) if size is None else size
        return list(zip(self.inputs.split(size), self.targets.split(size), strict=True))


class Plain:
    """Gradient and Hessian products as anyone would write them: PyTorch's own layers, double backward."""

    def __init__(self, problem: Problem, chunk: int | None, *, channels_last: bool = False) -> None:
        self.model = copy.deepcopy(problem.model)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.chunks = [(x.contiguous(memory_format=layout), y) for x, y in problem.chunks(chunk)]
        self.examples = len(problem.inputs)
        self.weights = tuple(self.model.parameters())
        for kernel in (weight for weight in self.weights if weight.dim() == 4):
            kernel.data = kernel.data.contiguous(memory_format=layout)
        self._shapes = [weight.shape for weight in self.weights]
        self._kept: list[tuple[Tensor, ...]] = []

    def gradient(self) -> Tensor:
        total = self._zeros()
        for x, y in self.chunks:
            self._add(total, torch.autograd.grad(self._loss(x, y), self.weights))
        return total / self.examples

    def product(self, vector: Tensor) -> Tensor:
        parts, total = self._split(vector), self._zeros()
        for x, y in self.chunks:
            gradient = torch.autograd.grad(self._loss(x, y), self.weights, create_graph=True)
            self._add(total, torch.autograd.grad(gradient, self.weights, parts))
        return total / self.examples

    def kept_product(self, vector: Tensor) -> Tensor:
        """The first call records the graphs, later ones only run through them."""
        if not self._kept:
            self._kept = self.kept_gradients(self.weights)
        parts, total = self._split(vector), self._zeros()
        for gradient in self._kept:
            self._add(total, torch.autograd.grad(gradient, self.weights, parts, retain_graph=True))
        return total / self.examples

    def kept_gradients(self, weights: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Each chunk's summed gradient with respect to some weights, on its graph."""
        return [torch.autograd.grad(self._loss(x, y), weights, create_graph=True) for x, y in self.chunks]

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y, reduction="sum")

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = vector.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _zeros(self) -> Tensor:
        return self.weights[0].new_zeros(sum(shape.numel() for shape in self._shapes))

    def _add(self, total: Tensor, tensors: tuple[Tensor, ...]) -> None:
        for slab, tensor in zip(self._split(total), tensors, strict=True):
            slab += tensor.detach()


def add_arguments(parser: argparse.ArgumentParser, *, examples: int, moments: bool = False) -> None:
    """What all curvature benchmarks ask; with ``moments`` files may be given for several moments of a run."""
    parser.add_argument(
        "--width", type=int, default=16, help="of the network trained here; the papers' is 64"
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--examples", type=int, default=examples, help="the first so many are measured")
    parser.add_argument("--chunk", type=int, help="examples per pass; all at once unless given")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument(
        "--problem",
        type=Path,
        nargs="+" if moments else 1,
        help="measure what a run saved instead; see `load` in curvature_problem.py",
    )


def chosen(args: argparse.Namespace, later_epochs: Sequence[int] = ()) -> tuple[Problem, ...]:
    """The problem that the arguments ask for, and what more training makes of it; sets the threads."""
    torch.set_num_threads(args.threads)
    if args.problem is not None:
        return tuple(load(path, args.examples) for path in args.problem)
    after = (args.steps, *(args.steps + epochs * EPOCH for epochs in later_epochs))
    return digits_run(args.width, args.examples, after)


def settings(args: argparse.Namespace, problem: Problem) -> dict[str, Any]:
    """What a result has to say about the problem."""
    return {
        **problem.description,
        "examples": len(problem.inputs),
        "image": list(problem.inputs.shape[1:]),
        "chunk": args.chunk or len(problem.inputs),
        "parameters": sum(parameter.numel() for parameter in problem.model.parameters()),
        "dtype": "float32",
    }


def load(path: Path, examples: int) -> Problem:
    """What a real run saved with ``torch.save`` for the benchmarks.

    The file holds a dictionary: "state_dict" of a PreActResNet-18 (or of a Lightning module with it as its
    "model"), its input normalisation "mean" and "std" as lists, and its adversarial "inputs" and "targets".
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    state = {name.removeprefix("model."): tensor for name, tensor in saved["state_dict"].items()}
    width, channels = state["conv1.weight"].shape[:2]
    model = _network(width, channels, len(state["linear.weight"]), saved["mean"], saved["std"])
    model.load_state_dict(state)
    return _problem(model, saved["inputs"][:examples], saved["targets"][:examples], {"problem": path.name})


@functools.cache
def digits_run(width: int, examples: int, after: tuple[int, ...]) -> tuple[Problem, ...]:
    """One run's network after these numbers of steps, with examples attacked from the same random starts."""
    images, labels = _digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        # the digits' own mean and standard deviation
        model = _network(width, 3, CLASSES, [0.3053] * 3, [0.3759] * 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    attack = _pgd(steps=3, batchnorm="train")
    measured = torch.randperm(len(images), generator=streams.generator(SEED, "measured"))[:examples]
    problems, done = [], 0
    for steps in after:
        model.train()
        for step in range(done, steps):
            epoch, batch = divmod(step, EPOCH)
            order = torch.randperm(len(images), generator=streams.generator(SEED, "shuffle", epoch))
            picked = order.split(BATCH)[batch]
            draws = streams.generator(SEED, "attack", step)
            adversarial = attack.perturb(model, images[picked], labels[picked], draws)
            optimizer.zero_grad()
            F.cross_entropy(model(adversarial), labels[picked]).backward()
            optimizer.step()
        done = steps
        frozen = copy.deepcopy(model).eval()
        frozen.zero_grad()
        description = {"problem": f"digits after {steps} steps, {EPOCH} an epoch", "width": width}
        problems.append(
            _problem(frozen, attacked(frozen, images, labels, measured), labels[measured], description)
        )
    return tuple(problems)


def _pgd(*, steps: int, batchnorm: Literal["train", "eval"]) -> PGD:
    return PGD(
        norm="linf",
        eps=EPS,
        step_size=STEP,
        steps=steps,
        random_start="uniform",
        start_std=1e-3,
        batchnorm=batchnorm,
    )


def attacked(model: PreActResNet, images: Tensor, labels: Tensor, measured: Tensor) -> Tensor:
    """The images at these places, under PGD-10, a few at a time."""
    attack = _pgd(steps=10, batchnorm="eval")
    draws = streams.generator(SEED, "measure-attack", device=images.device)
    parts = measured.split(ATTACKED_AT_ONCE)
    return torch.cat(
        [attack.perturb(model, images[part], labels[part], draws) for part in parts]
    ).contiguous()


def _digits() -> tuple[Tensor, Tensor]:
    digits = read_digits()
    images = F.interpolate(digits.images.float() / 255, size=(SIZE, SIZE), mode="bilinear")
    return images.expand(-1, 3, -1, -1).contiguous(), digits.labels


def _network(width: int, channels: int, classes: int, mean: list[float], std: list[float]) -> PreActResNet:
    return PreActResNet(
        num_classes=classes,
        in_channels=channels,
        width=width,
        blocks=(2, 2, 2, 2),
        strides=(1, 2, 2, 2),
        mean=mean,
        std=std,
    )


def _problem(model: PreActResNet, inputs: Tensor, targets: Tensor, description: Mapping[str, Any]) -> Problem:
    model.eval()
    with torch.no_grad():
        logits = model(inputs)
        known = {
            "adversarial_loss": round(float(F.cross_entropy(logits, targets)), 4),
            "adversarial_accuracy": round(float((logits.argmax(1) == targets).float().mean()), 4),
        }
    return Problem(model, inputs, targets, {**description, **known})
