"""The empirical risk over fixed examples, as a function of the flat parameter vector θ.

Everything in this package is derived from ``EmpiricalRisk``. Only this class handles the model and the
examples, divides the examples into chunks and over processes, and leaves the model exactly as it was.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise, starmap

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustdyn.curvature.examples import Structure, check_lengths, leaves, length, mapped, structure
from robustdyn.curvature.kernels import Precision
from robustdyn.curvature.risk_checks import PROBED_EXAMPLES, check_types, complaint
from robustdyn.curvature.risk_function import (
    BatchNormMode,
    PerExampleLoss,
    RiskFunction,
    cross_entropy,
    plain,
    rows_not_finite,
)
from robustdyn.curvature.sharding import Shards
from robustdyn.curvature.tape import Tape, count_saved_bytes, gradients
from robustdyn.curvature.vectors import checksum

ParameterFilter = Callable[[str, nn.Parameter], bool] | Collection[str]

_WORKING_SHARE = 2  # part of the memory for a working chunk: products need memory besides its graph


class EmpiricalRisk(RiskFunction):
    """L_S(θ) = (1/m) Σ_i ℓ(f(x_i; θ), y_i) over m fixed, already adversarial, inputs.

    θ is the concatenation of the measured parameter tensors in ``model.named_parameters()`` order. It is the
    model's present weights, read at every call, or a fixed point (``at``). The mean is exact for any chunk
    size and any division over processes.

    A call leaves the model, its gradients and torch's global state as they were (see ``guard``). Modules
    other than BatchNorm keep their training flag. A Dropout that was left on is therefore refused, and not
    switched off. Autocast and compilation are off while measuring, and attention uses its mathematical
    kernel, the one that can be differentiated twice.

    Attributes:
        model: The measured model, without the wrappers of torch.compile, DataParallel and
            DistributedDataParallel.
        inputs: (m_r, ...), this process's fixed examples, wherever the caller keeps them.
        targets: (m_r, ...).
        held: m_r, how many these are.
        loss: The per-example loss.
        names: Names of the measured tensors, in the order of θ.
        blocks: For each name its slice of θ.
        shapes: For each name its tensor's shape.
        numel: P, the length of θ.
        examples: m, over all processes.
        shards: How the examples are spread over processes.
        chunk_size: Examples per pass.
        batchnorm: Which statistics BatchNorm used; part of every measurement's meaning.
        independent: Whether the loss of an example does not depend on the other examples in its pass, as
            checked on a few examples.
        precision: Precision of convolutions and linear layers in products.
        dtype: Precision of θ and of everything computed from it.
        device: Where θ lives; chunks are moved there.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Structure,
        targets: Structure,
        *,
        loss: PerExampleLoss = cross_entropy,
        chunk_size: int | None = None,
        memory: int | None = None,
        parameters: ParameterFilter | None = None,
        batchnorm: BatchNormMode = "eval",
        precision: Precision = "full",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Fix the examples, choose the parameters and refuse what cannot be measured.

        Args:
            model: Any module that maps a batch of inputs to what ``loss`` takes: one tensor, or several in a
                tuple or dictionary.
            inputs: (m, ...), kept fixed: the dependence of an attack on θ is not differentiated. A tensor or
                NumPy array, or a tuple of the model's positional or a dictionary of its keyword arguments.
            targets: (m, ...), first dimension as ``inputs``; may be a tuple or dictionary, too.
            loss: ``(outputs, targets) -> (B,)``.
            chunk_size: Examples per forward and backward pass; None follows ``memory``, or takes all at once.
            memory: Bytes that the graphs of passes may use. What a chunk does not need is used to keep graphs
                for the next product, which then takes two thirds of the time; None keeps no graphs. The
                temporaries of a product come on top: the peak was 1.5 times as much for 100 to 400 MiB, and
                2.2 times for 30 MiB.
            parameters: Which tensors make up θ: None for all that require gradients, a predicate
                ``(name, parameter) -> bool`` that chooses among those, or a collection of names.
            batchnorm: ``"eval"`` uses the running statistics, ``"train"`` the statistics of the whole
                measurement set, in one chunk on one process. Neither moves the running statistics.
            precision: Precision of products with H, G and C₁ (values and gradients are in full precision):
                ``"full"``, the parameters' own; ``"tf32"``, NVIDIA's TensorFloat-32 in matrix products;
                ``"bfloat16"``, products of numbers rounded to bfloat16, the sums in float32. What the last
                costs in accuracy is in experiments/benchmarks/README.md.
            group: Processes that share the measurement, each with its own ``inputs`` (shards of any size, see
                ``robustdyn.curvature.shard``) and the same weights. Every method that returns a number
                about the risk is then collective and returns the same bits everywhere.

        Raises:
            TypeError: If inputs or targets are not tensors or structures of these, or chunk_size or memory
                not whole numbers.
            ValueError: If sizes disagree, numbers are not finite, no parameter is chosen, precision or device
                are mixed or too low, BatchNorm does not support the requested mode, processes hold different
                weights, two passes over the same inputs disagree, a pass changes the weights, examples that
                depend on each other would be divided into chunks, or PyTorch's second derivatives are not
                symmetric. All processes raise together.
        """
        check_types(chunk_size, memory)
        self.model = model = unwrapped(model)
        self.loss = loss
        self._several = None
        self.batchnorm, self.precision = batchnorm, precision
        self.point = None
        self._kept: dict[int, Tape] = {}
        self._kept_state: object = None
        self._most_kept = 0
        self.independent = not (batchnorm == "train" and self.has_batchnorm)  # the checks look closer
        self.channels_last = False  # whether 4-d inputs may come in that layout; settled by the checks

        chosen = _select(model, parameters)
        self.names = tuple(chosen)
        self.shapes = {name: parameter.shape for name, parameter in chosen.items()}
        ends = list(accumulate((parameter.numel() for parameter in chosen.values()), initial=0))
        self.blocks = dict(zip(chosen, starmap(slice, pairwise(ends)), strict=True))
        self.numel = ends[-1]
        self.dtype, self.device = _common_type(chosen)

        self.inputs, self.targets = self._examples(inputs, targets)
        self.held = length(self.inputs)
        self.shards = Shards(self.held, self.device, group)
        self.examples = self.shards.total
        own = self.shards.counts[self.shards.rank]
        self.chunk_size = max(1, own if chunk_size is None else min(chunk_size, own))
        refused = self.shards.first_complaint(complaint(self, chunk_size, memory))
        if refused is not None:
            raise ValueError(refused)
        if not self.shards.same([*model.parameters(), *model.buffers()]):
            raise ValueError("the processes of group hold different weights or running statistics")
        if memory is not None:
            self._fit(memory, chunk_size)

    def at(self, theta: Tensor) -> "EmpiricalRisk":
        """The same risk at a fixed point, whatever the model's weights.

        The point may be θ + v, for instance, with v from adversarial weight perturbation (Wu et al., NeurIPS
        2020). The inputs remain those that were attacked at θ. Once the model changes, the operators of this
        risk refuse to continue, too.

        Args:
            theta: (P,).

        Raises:
            ValueError: If the length is not P.
        """
        self.split(theta)
        moved = copy.copy(self)
        with torch.inference_mode(False):
            moved.point = plain(theta).to(device=self.device, dtype=self.dtype, copy=True)
        moved._kept = {}
        return moved

    def over(self, inputs: Structure, targets: Structure) -> "EmpiricalRisk":
        """The same risk over other examples, without the cost of checking them; collective.

        Raises:
            ValueError: If there are not as many targets as inputs.
        """
        other = copy.copy(self)
        other.inputs, other.targets = self._examples(inputs, targets)
        check_lengths(other.inputs, other.targets)
        other.held, other._kept = length(other.inputs), {}
        other.shards = Shards(other.held, self.device, self.shards.group)
        other.examples = other.shards.total
        if not self.independent:
            other.chunk_size = max(1, other.held)
        return other

    def _examples(self, inputs: object, targets: object) -> tuple[Structure, Structure]:
        """Plain tensors; arrays of floating-point numbers in the precision of θ."""

        def converted(values: object, name: str) -> Structure:
            tensors = mapped(plain, structure(values, name))
            if isinstance(values, Tensor):
                return tensors
            return mapped(lambda t: t.to(self.dtype) if t.is_floating_point() else t, tensors)

        return converted(inputs, "inputs"), converted(targets, "targets")

    # ------------------------------------------------------------------ the function

    def value(self) -> float:
        """L_S(θ), summed in float64.

        Raises:
            FloatingPointError: If it is not finite; all processes raise together.
        """
        with self.guard(), torch.no_grad():
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            parameters = self.parameters()
            for inputs, targets in self.chunks():
                total += self.losses(parameters, inputs, targets).double().sum()
        if not bool(self.shards.sum(total).isfinite()):
            raise self.not_finite("the mean loss")
        return float(total) / self.examples

    def gradient(self) -> Tensor:
        """∇L_S(θ), shape (P,)."""
        return self.weighted_gradient(None)

    def weighted_gradient(self, weights: Tensor | None) -> Tensor:
        """(1/m) Σ_i w_i ∇ℓ_i, shape (P,).

        Args:
            weights: w, (m,) over all processes, the same on each; None for ones.

        Raises:
            FloatingPointError: If it is not finite; all processes raise together.
        """
        with self.guard():
            total = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
            own = None if weights is None else self.rows_of_chunks(plain(weights)[self.shards.own].to(total))
            leaves = self.leaves()
            for index, (inputs, targets) in enumerate(self.chunks()):
                losses = self.losses(leaves, inputs, targets)
                if own is not None:
                    losses = losses * own[index]
                self.add(total, gradients(losses.sum(), tuple(leaves.values())))
        if not bool(self.shards.sum(total).isfinite().all()):
            raise self.not_finite("the gradient")
        return total.div_(self.examples)

    def not_finite(self, what: str) -> FloatingPointError:
        """An error that names the examples whose loss is not finite; collective.

        Args:
            what: Which result was not finite on all processes.
        """
        with self.guard(), torch.no_grad():
            parameters = self.parameters()
            own = torch.cat([self.losses(parameters, *chunk) for chunk in self.chunks()])
        bad = rows_not_finite(self.shards.rows(own))
        if not bad:
            return FloatingPointError(
                f"{what} is not finite, although every example's loss is: a derivative overflows or does "
                "not exist there, like that of a square root at zero"
            )
        others = f" and {len(bad) - 1} more of {self.examples}" if len(bad) > 1 else ""
        return FloatingPointError(f"{what} is not finite: neither is the loss of example {bad[0]}{others}")

    def theta(self) -> Tensor:
        """A copy of θ, shape (P,)."""
        return self.flatten(tuple(self.parameters().values()))

    def tapes(self, state: object = None) -> Iterator[tuple[Tape, bool]]:
        """A tape for each of this process's chunks, and whether it may be used up; inside ``guard``.

        Within the memory given, tapes are kept from one call to the next, for all operators on this risk,
        until weights, running statistics or examples change.

        Args:
            state: The present ``state``, if the caller has it.
        """
        state = self.state() if state is None else state
        if state != self._kept_state:
            self.forget()
            self._kept_state = state
        for index, (inputs, targets) in enumerate(self.chunks()):
            tape = self._kept.get(index)
            if tape is None:
                tape = self.tape(inputs, targets)
                if index < self._most_kept:
                    self._kept[index] = tape
            yield tape, index >= self._most_kept
            if index >= self._most_kept:
                tape.release()  # before the next one is recorded

    def forget(self) -> None:
        """Free all kept graphs."""
        self._kept.clear()

    def state(self) -> object:
        """Unequal to an earlier one once weights, running statistics or examples have changed."""
        tensors = [
            *self.model.parameters(),
            *self.model.buffers(),
            *leaves(self.inputs),
            *leaves(self.targets),
        ]
        places = [(id(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors]
        return _State(tensors, places, checksum(tensors))

    @cached_property
    def separable(self) -> bool:
        """Whether each loss depends only on its own row of the outputs, as checked on a few examples."""
        inputs, targets = self.subset(slice(0, 3))
        with self.guard():
            outputs = self.outputs(self.parameters(), inputs).requires_grad_()
            (slopes,) = gradients(self.losses_of(outputs, targets)[0], (outputs,))
        return len(slopes) == length(inputs) and not bool(slopes[1:].any())

    # ------------------------------------------------------------------ memory

    def _fit(self, memory: int, chunk_size: int | None) -> None:
        """Choose the chunk and how many graphs are kept, from the memory that a few examples need."""
        whole = not self.independent
        probed = self.held if whole else min(PROBED_EXAMPLES, self.held)
        with self.guard(products=True), count_saved_bytes() as counted:
            self.tape(*self.subset(slice(0, probed)))
        needed = max(1, counted[0] // probed)
        if probed > 1 and not whole:
            # the difference of two sizes, because memory that does not grow with the examples does not count
            with self.guard(products=True), count_saved_bytes() as fewer:
                self.tape(*self.subset(slice(0, probed // 2)))
            needed = max(1, (counted[0] - fewer[0]) // (probed - probed // 2))
        # every tape holds its chunk's gradient and what autograd saves, and a product is as large again
        gradient = self.numel * self.dtype.itemsize
        if chunk_size is None and not whole:
            free = memory - 2 * gradient
            self.chunk_size = max(1, min(self.held, free // (_WORKING_SHARE * needed)))
        graph = needed * self.chunk_size
        self._most_kept = max(0, (memory - 2 * gradient - graph) // (graph + gradient))


@dataclass
class _State:
    """What tensors were: the objects, their versions, their storage and a checksum.

    ``tensor.data`` has a version of its own, so versions alone do not see everything. The tensors are kept,
    so that no other object can take the place of one and with it its id.
    """

    tensors: list[Tensor] = field(compare=False)
    places: list[tuple[int, int, int]]
    content: tuple[int, ...]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and of data parallelism.

    Raises:
        TypeError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, not a {type(model).__name__}"
            + (": load the weights into their network first" if isinstance(model, Mapping) else "")
        )
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def _select(model: nn.Module, wanted: ParameterFilter | None) -> dict[str, nn.Parameter]:
    present = dict(model.named_parameters())
    if wanted is None:
        chosen = {name: p for name, p in present.items() if p.requires_grad}
    elif callable(wanted):
        chosen = {name: p for name, p in present.items() if p.requires_grad and wanted(name, p)}
    else:
        unknown = sorted(set(wanted) - set(present))
        if unknown:
            raise ValueError(f"parameters: the model has no {', '.join(map(repr, unknown))}")
        chosen = {name: p for name, p in present.items() if name in set(wanted)}
    if not chosen:
        raise ValueError("parameters: no tensor is chosen; check the filter and requires_grad")
    return chosen


def _common_type(chosen: Mapping[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    if any(p.is_inference() for p in chosen.values()):
        raise ValueError(
            "the model was made under torch.inference_mode, so that autograd cannot use its weights: measure "
            "copy.deepcopy(model), copied outside of it"
        )
    kinds = {(p.dtype, p.device) for p in chosen.values()}
    if len(kinds) > 1:
        raise ValueError(f"the measured parameters mix precisions or devices: {sorted(map(str, kinds))}")
    dtype, device = kinds.pop()
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"curvature in {dtype} is dominated by rounding: convert the model with model.float()"
        )
    return dtype, device
