"""The examples that a model is measured on: read from tensors or loaders, and attacked."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.curvature.examples import Spool, Structure, batches, length, mapped, structure, take
from robustdyn.curvature.risk_function import PerExampleLoss

Attack = PGD | Callable[[nn.Module, Any, Any], Any]
"""PGD, or a function of (model, inputs, targets) that returns other inputs."""


class Examples:
    """The examples that a model is measured on, attacked again at every call.

    Args:
        model: As it is measured.
        inputs: As for ``measure_model``.
        targets: As for ``measure_model``.
        loss: Per-example loss.
        attack: As for ``measure_model``.
        seed: Of the attack's random starts.
        count: Use only the first so many; None for all.

    Raises:
        TypeError: Inputs, targets or attack cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any,
        *,
        loss: PerExampleLoss,
        attack: Attack | None,
        seed: int,
        count: int | None,
    ) -> None:
        if not (attack is None or isinstance(attack, PGD) or callable(attack)):
            raise TypeError(f"attack must be a PGD, a function or None, not {attack!r}")
        self._model, self._loss, self._attack, self._seed = model, loss, attack, seed
        if targets is None:
            # a loader that shuffles or augments would give other examples to the second attack
            whole = first_examples(batches(inputs), count)
            inputs, targets = attacked(model, None, whole, loss=loss, seed=seed, draw=0)
        self._inputs, self._targets, self._count = inputs, targets, count

    def __call__(self, model: nn.Module, draw: int, count: int | None) -> tuple[Structure, Structure]:
        """The first ``count`` examples, or all, under the attack with this number on a network."""
        wanted = self._count if count is None else count
        part = first_examples(batches(self._inputs, self._targets), wanted)
        return attacked(model, self._attack, part, loss=self._loss, seed=self._seed, draw=draw)

    def unperturbed(self) -> Structure:
        """The inputs of all examples without the attack."""
        part = first_examples(batches(self._inputs, self._targets), self._count)
        return attacked(self._model, None, part, loss=self._loss, seed=self._seed, draw=0)[0]

    def count(self) -> int:
        """How many examples there are, which a loader says only when it is read."""
        part = first_examples(batches(self._inputs, self._targets), self._count)
        return sum(length(inputs) for inputs, _ in part)


def attacked(
    model: nn.Module,
    attack: Attack | None,
    batches: Iterable[tuple[Structure, Structure]],
    *,
    loss: PerExampleLoss,
    seed: int,
    draw: int,
) -> tuple[Structure, Structure]:
    """Attack examples batch by batch, and collect them in a temporary file.

    Args:
        model: Network, in the mode in which a function attacks it; PGD chooses its own. Floating-point
            numbers are converted to its precision.
        attack: PGD climbs the sum of ``loss``; a function returns the inputs that it likes; None leaves the
            inputs as they are.
        batches: Inputs and targets.
        loss: Per-example loss.
        seed: Of the random starts, which are a function of (seed, draw, batch). A function finds PyTorch's,
            NumPy's and Python's global generators seeded in this way, and they continue afterwards as before.
        draw: Number of the attack.

    Returns:
        All inputs and targets, on the CPU.

    Raises:
        TypeError: PGD is to attack inputs that are not one floating-point tensor.
        ValueError: Inputs are outside PGD's range.
    """
    first = next(model.parameters(), torch.zeros(0))

    def converted(tensor: Tensor) -> Tensor:
        # arrays are often of double precision, in which a model of single precision cannot compute
        return tensor.to(first.device, first.dtype if tensor.is_floating_point() else None)

    spool = Spool()
    for number, (inputs, targets) in enumerate(batches):
        inputs, targets = mapped(converted, inputs), mapped(converted, targets)
        if isinstance(attack, PGD):
            if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
                raise TypeError(
                    "PGD attacks inputs that are one floating-point tensor, such as images / 255: give "
                    "these, or attack=None, or a function of (model, inputs, targets) that returns the "
                    "attacked inputs"
                )
            source = streams.generator(seed, "measure-attack", draw, number, device=first.device)
            inputs = attack.perturb(model, inputs, targets, source, lambda z, y: loss(z, y).sum())
        elif attack is not None:
            with streams.global_numbers(seed, "measure-attack", draw, number):
                inputs = structure(attack(model, inputs, targets), "the attack's inputs")
        spool.add(inputs, targets)
    return spool.examples()


def first_examples(
    batches: Iterable[tuple[Structure, Structure]], count: int | None
) -> Iterator[tuple[Structure, Structure]]:
    """The first ``count`` examples of some batches; None for all."""
    left = count
    for inputs, targets in batches:
        if left is None:
            yield inputs, targets
            continue
        part = take((inputs, targets), slice(left))
        yield part
        left -= length(part)
        if left <= 0:
            return
