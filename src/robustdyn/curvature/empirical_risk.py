"""The empirical risk over fixed examples, as a function of the flat parameter vector θ.

Everything in this package is derived from ``EmpiricalRisk``. Only this class handles the model and the
examples, divides the examples into chunks and over processes, and leaves the model exactly as it was.
"""

import copy
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import chain
from numbers import Integral
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from robustdyn.curvature.kernels import Precision
from robustdyn.curvature.memory_layout import curves_channels_last
from robustdyn.curvature.sharding import Shards
from robustdyn.curvature.tape import Tape, count_saved_bytes, gradients
from robustdyn.curvature.vectors import checksum, inner, norm

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
ParameterFilter = Callable[[str, nn.Parameter], bool] | Collection[str]
BatchNormMode = Literal["eval", "train"]

_CHECKED_EXAMPLES = 16  # enough for any random layer to show; the checks cost four passes over these
_PROBED_EXAMPLES = 4  # on these the memory of a pass is measured, and the symmetry of products
_GROUPS = 3  # parts in which the checked examples pass once more; neighbours and halves are separated
# How far uᵀHv and vᵀHu may differ, relatively. Rounding stays orders below, a wrong derivative orders above.
_SYMMETRY_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
_WORKING_SHARE = 2  # part of the memory for a working chunk: products need memory besides its graph


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each example.

    Args:
        logits: (B, K).
        targets: Class indices (B,), or class probabilities (B, K).

    Returns:
        (B,) losses in nats.

    Raises:
        ValueError: If there is one number for each example, and it is no integer.
    """
    if targets.is_floating_point():
        if targets.dim() < 2:
            raise ValueError(
                "cross_entropy needs class indices as integers, or probabilities (B, K), but the targets are "
                f"{targets.dtype} of shape {tuple(targets.shape)}: use targets.long(), or another loss for "
                "regression"
            )
        return F.cross_entropy(logits, targets.to(logits), reduction="none")
    return F.cross_entropy(logits, targets.long(), reduction="none")


class EmpiricalRisk:
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
        inputs: Tensor,
        targets: Tensor,
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
            model: Any module that maps a batch of inputs to what ``loss`` takes.
            inputs: (m, ...), kept fixed: the dependence of an attack on θ is not differentiated.
            targets: (m, ...), first dimension as ``inputs``.
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
            TypeError: If inputs or targets are not tensors, or chunk_size or memory not whole numbers.
            ValueError: If sizes disagree, numbers are not finite, no parameter is chosen, precision or device
                are mixed or too low, BatchNorm does not support the requested mode, processes hold different
                weights, two passes over the same inputs disagree, a pass changes the weights, examples that
                depend on each other would be divided into chunks, or PyTorch's second derivatives are not
                symmetric. All processes raise together.
        """
        _check_types(inputs, targets, chunk_size, memory)
        self.model = model = _unwrapped(model)
        self.loss = loss
        self.inputs, self.targets = plain(inputs), plain(targets)
        self.batchnorm: BatchNormMode = batchnorm
        self.precision: Precision = precision
        self._point: Tensor | None = None
        self._kept: dict[int, Tape] = {}
        self._kept_state: object = None
        self._room = 0
        self.independent = not (batchnorm == "train" and self.has_batchnorm)  # the checks look closer
        self.channels_last = False  # whether 4-d inputs may come in that layout; settled by the checks

        chosen = _select(model, parameters)
        self.names = tuple(chosen)
        self.shapes = {name: parameter.shape for name, parameter in chosen.items()}
        self.blocks: dict[str, slice] = {}
        self.numel = 0
        for name, parameter in chosen.items():
            self.blocks[name] = slice(self.numel, self.numel + parameter.numel())
            self.numel += parameter.numel()
        self.dtype, self.device = _common_type(chosen)

        self.shards = Shards(len(inputs) if inputs.dim() else 0, self.device, group)
        self.examples = self.shards.total
        own = self.shards.counts[self.shards.rank]
        self.chunk_size = max(1, own if chunk_size is None else min(chunk_size, own))
        complaint = self.shards.first_complaint(self._complaint(chunk_size, memory))
        if complaint is not None:
            raise ValueError(complaint)
        self._check_same_weights()
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
        if theta.shape != (self.numel,):
            raise ValueError(f"expected a vector of shape ({self.numel},), got {tuple(theta.shape)}")
        moved = copy.copy(self)
        with torch.inference_mode(False):
            moved._point = plain(theta).to(device=self.device, dtype=self.dtype, copy=True)
        moved._kept = {}
        return moved

    def over(self, inputs: Tensor, targets: Tensor) -> "EmpiricalRisk":
        """The same risk over other examples, without the cost of checking them; collective.

        Raises:
            ValueError: If there are not as many targets as inputs.
        """
        if len(inputs) != len(targets):
            raise ValueError(f"inputs has {len(inputs)} examples and targets {len(targets)}")
        other = copy.copy(self)
        other.inputs, other.targets, other._kept = plain(inputs), plain(targets), {}
        other.shards = Shards(len(inputs), self.device, self.shards.group)
        other.examples = other.shards.total
        if not self.independent:
            other.chunk_size = max(1, len(inputs))
        return other

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
        bad = self.shards.rows(own).isfinite().logical_not().nonzero()[:, 0].tolist()
        others = f" and {len(bad) - 1} more of {self.examples}" if len(bad) > 1 else ""
        return FloatingPointError(
            f"{what} is not finite: neither is the loss of example {bad[0]}{others}"
            if bad
            else f"{what} is not finite, although every example's loss is: a derivative overflows or does "
            "not exist there, like that of a square root at zero"
        )

    def theta(self) -> Tensor:
        """A copy of θ, shape (P,)."""
        return self.flatten(tuple(self.parameters().values()))

    # ------------------------------------------------------------------ θ as one vector and as tensors

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector, one per parameter tensor.

        Args:
            flat: (P,).

        Raises:
            ValueError: If the length is not P.
        """
        if flat.shape != (self.numel,):
            raise ValueError(f"expected a vector of shape ({self.numel},), got {tuple(flat.shape)}")
        return {name: flat[self.blocks[name]].view(self.shapes[name]) for name in self.names}

    def flatten(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The inverse of ``split``: one tensor per name, in order, to a (P,) vector."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def add(self, flat: Tensor, tensors: Iterable[Tensor]) -> None:
        """Add one tensor per name, in order, to a (P,) vector in place."""
        torch._foreach_add_(list(self.split(flat).values()), [tensor.detach() for tensor in tensors])

    # ------------------------------------------------------------------ building blocks for operators

    @contextmanager
    def guard(self, *, products: bool = False) -> Iterator[None]:
        """The context in which every measurement runs; it restores the previous state at its end.

        Inside, gradients are on. Inference mode, autocast and compiled code are off, BatchNorm has the chosen
        mode, attention uses its mathematical kernel, and TensorFloat-32 is off unless ``products`` may use
        it. Afterwards training flags, torch's random state and its settings are as before. Weights, buffers,
        ``.grad`` and ``requires_grad`` are never changed, because the model only receives detached parameters
        and copies of its buffers.
        """
        flags = [(module, module.training) for module in self.model.modules()]
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.random.fork_rng(devices=[self.device]))
                stack.enter_context(_tensor_float_32(products and self.precision == "tf32"))
            else:
                stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # flash attention has no second derivative
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                for module, _ in flags:
                    if isinstance(module, _BatchNorm):
                        module.training = self.batchnorm == "train"
                yield
            finally:
                for module, training in flags:
                    module.training = training

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
                if index < self._room:
                    self._kept[index] = tape
            yield tape, index >= self._room
            if index >= self._room:
                tape.release()  # before the next one is recorded

    def tape(self, inputs: Tensor, targets: Tensor) -> Tape:
        """A chunk's passes, recorded; inside ``guard``.

        Args:
            inputs: (b, ...).
            targets: (b, ...).
        """
        leaves = self.leaves()
        if self.channels_last:
            # measured on a PreActResNet-18: products take 15 % less time in this layout
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return Tape(
            tuple(leaves.values()),
            lambda: self.outputs(leaves, inputs),
            lambda outputs: self.losses_of(outputs, targets),
            examples=len(inputs),
            precision=self.precision,
        )

    def forget(self) -> None:
        """Free all kept graphs."""
        self._kept.clear()

    def state(self) -> object:
        """Unequal to an earlier one once weights, running statistics or examples have changed."""
        return _State([*self.model.parameters(), *self.model.buffers()], [self.inputs, self.targets])

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's examples in order, ``chunk_size`` at a time, on the parameters' device."""
        for start in range(0, len(self.inputs), self.chunk_size):
            yield self.subset(slice(start, start + self.chunk_size))

    def rows_of_chunks(self, values: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Views of ``values``, which has an entry for each of this process's examples along ``dim``.

        Empty, as ``tapes`` and ``chunks`` are, where this process has no examples.
        """
        return values.split(self.chunk_size, dim) if len(self.inputs) else ()

    def subset(self, which: slice) -> tuple[Tensor, Tensor]:
        """Copies of some of this process's inputs and targets, on the parameters' device.

        Copies, because a model may normalise its inputs in place.
        """
        with torch.inference_mode(False):
            inputs = self.inputs[which].to(self.device, copy=True)
            return inputs, self.targets[which].to(self.device, copy=True)

    def few(self, count: int) -> slice:
        """At most so many of this process's examples, spread over all of them."""
        step = max(1, len(self.inputs) // count)
        return slice(0, step * count, step)

    def parameters(self) -> dict[str, Tensor]:
        """The measured tensors by name, detached: the model's own, or views of the fixed point."""
        if self._point is not None:
            return self.split(self._point)
        present = dict(self.model.named_parameters())
        return {name: present[name].detach() for name in self.names}

    def leaves(self) -> dict[str, Tensor]:
        """As ``parameters``, but fresh leaves of the autograd graph that require gradients."""
        return {name: tensor.detach().requires_grad_() for name, tensor in self.parameters().items()}

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """f(x; θ) as a pure function; call it inside ``guard``.

        Args:
            parameters: A tensor for each of ``names``, or for more of the model's parameters.
            inputs: (B, ...).

        Returns:
            The model's output, usually (B, K) logits.
        """
        everything = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        everything.update(parameters)
        buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        return call_with(self.model, {**everything, **buffers}, inputs)

    def losses(self, parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """ℓ of each example, shape (B,), as a pure function of the parameters.

        Raises:
            ValueError: If ``loss`` does not return one number per example.
        """
        return self.losses_of(self.outputs(parameters, inputs), targets)

    def losses_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As ``losses``, of outputs."""
        losses = self.loss(outputs, targets)
        count = len(targets)
        if losses.shape != (count,):
            if losses.dim() == 0:
                remedy = "use reduction='none'"
            elif losses.numel() == count:
                remedy = "drop the dimensions of size one, for instance by .flatten()"
            else:
                remedy = (
                    "average over all dimensions but the first; where outputs and targets differ in shape, "
                    "PyTorch has broadcast them"
                )
            given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"loss must return one number per example: for {count} of the {len(self.inputs)} examples, "
                f"outputs {given} and targets {tuple(targets.shape)}, it returned {tuple(losses.shape)}, not "
                f"({count},): {remedy}"
            )
        return losses

    @property
    def has_batchnorm(self) -> bool:
        """Whether the model contains a BatchNorm layer."""
        return any(isinstance(module, _BatchNorm) for module in self.model.modules())

    @cached_property
    def separable(self) -> bool:
        """Whether each loss depends only on its own row of the outputs, as checked on a few examples."""
        inputs, targets = self.subset(slice(0, 3))
        with self.guard():
            outputs = self.outputs(self.parameters(), inputs).requires_grad_()
            (slopes,) = gradients(self.losses_of(outputs, targets)[0], (outputs,))
        return len(slopes) == len(inputs) and not bool(slopes[1:].any())

    # ------------------------------------------------------------------ memory

    def _fit(self, memory: int, chunk_size: int | None) -> None:
        """Choose the chunk and how many graphs are kept, from the memory that a few examples need."""
        whole = not self.independent
        probed = len(self.inputs) if whole else min(_PROBED_EXAMPLES, len(self.inputs))
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
            room = memory - 2 * gradient
            self.chunk_size = max(1, min(len(self.inputs), room // (_WORKING_SHARE * needed)))
        graph = needed * self.chunk_size
        self._room = max(0, (memory - 2 * gradient - graph) // (graph + gradient))

    # ------------------------------------------------------------------ refusals

    def _complaint(self, chunk_size: int | None, memory: int | None) -> str | None:
        """Why this process cannot measure."""
        try:
            _check_examples(self.inputs, self.targets, chunk_size, memory)
            _check_settings(self.batchnorm, self.precision, self.dtype)
            self._check_batchnorm()
            self._check_passes()
            self._check_symmetry()
        except ValueError as error:
            return str(error)
        except Exception as error:
            if self.shards.group is None:
                raise
            return f"{type(error).__name__}: {error}"  # the others must not wait for this process
        return None

    def _check_batchnorm(self) -> None:
        if not self.has_batchnorm:
            return
        if self.batchnorm == "train" and self.shards.processes > 1:
            raise ValueError(
                "batchnorm='train' needs all examples in one process, because every process would have its "
                "own statistics: leave group unset, or use batchnorm='eval'"
            )
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.batchnorm == "train" and several:
            for name, module in self.model.named_modules():
                if isinstance(module, nn.SyncBatchNorm):
                    raise ValueError(
                        f"batchnorm='train' with SyncBatchNorm {name!r} would mix the examples of all "
                        "processes, and has no second derivative: use batchnorm='eval'"
                    )
        if self.batchnorm == "train" and self.chunk_size < self.examples:
            raise ValueError(
                f"batchnorm='train' needs all {self.examples} examples in one chunk, because every chunk "
                f"would have its own statistics: leave chunk_size unset (it is {self.chunk_size}), measure "
                "fewer examples, or use batchnorm='eval'"
            )
        for name, module in self.model.named_modules():
            untracked = isinstance(module, _BatchNorm) and module.running_mean is None
            if untracked and self.batchnorm == "eval":
                raise ValueError(
                    f"batchnorm='eval' needs running statistics, but {name!r} keeps none "
                    "(track_running_stats=False): use batchnorm='train'"
                )

    def _check_passes(self) -> None:
        """Check on a few examples for writes, numbers that are not finite, randomness and mixing."""
        few = self.few(_CHECKED_EXAMPLES)
        inputs, targets = self.subset(few)
        with self.guard(), torch.no_grad():
            # copies, because the pass may write to them
            parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            outputs = self.outputs(parameters, inputs)
            written = [name for name, parameter in parameters.items() if parameter._version]
            if written:
                raise ValueError(
                    f"a forward pass changes the parameter {written[0]!r} in place, as Embedding(max_norm=) "
                    "does, so measuring would change the model: leave max_norm unset"
                )
            first = self.losses_of(outputs, targets)
            self.channels_last = self._takes_channels_last(parameters, *self.subset(few))
            second = self.losses(parameters, *self.subset(few))
        bad = first.isfinite().logical_not().nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(
                f"the loss is not finite at the present weights (example {bad[0] * few.step}): nothing can "
                "be measured here"
            )
        # sqrt(eps): far above what another summation order does, far below what a random layer does.
        if not torch.allclose(first, second, rtol=torch.finfo(self.dtype).eps ** 0.5, atol=0.0):
            raise ValueError(
                "two passes over the same inputs disagree, so the loss is not a function of the weights: "
                f"{_random_layers(self.model)}; call model.eval() (or .eval() on these layers) before "
                "measuring"
            )
        if self.independent:
            self.independent = self._independent(parameters, outputs, first, few)
            chunks = self.chunk_size < len(self.inputs) or self.shards.processes > 1
            if not self.independent and chunks:
                raise ValueError(
                    "the losses of examples depend on which others pass through the model with them (a "
                    "normalisation by the batch, or a loss that compares examples), so the risk is no mean "
                    "over chunks: leave chunk_size and group unset"
                )

    def _independent(
        self, parameters: Mapping[str, Tensor], outputs: Tensor, losses: Tensor, few: slice
    ) -> bool:
        """Whether outputs and losses of a few examples are the same when these pass in smaller groups."""
        inputs, targets = self.subset(few)
        groups = range(min(_GROUPS, len(targets)))
        tolerance = torch.finfo(self.dtype).eps ** 0.5
        single = isinstance(outputs, Tensor)
        # the rounding of a loss is that of its outputs
        scale = max(_largest(outputs) if single else 0.0, _largest(losses))
        with self.guard(), torch.no_grad():
            for start in groups:
                part = slice(start, None, len(groups))
                try:
                    alone = self.outputs(parameters, inputs[part].contiguous())
                    theirs = self.losses_of(alone, targets[part].contiguous())
                except (RuntimeError, ValueError):  # such as batch statistics of one example
                    return False
                same = _largest(theirs - losses[part]) <= tolerance * scale
                if single and alone.shape == outputs[part].shape:  # the examples come first
                    same &= _largest(alone - outputs[part]) <= tolerance * _largest(outputs)
                if not same:
                    return False
        return True

    def _check_symmetry(self) -> None:
        """Compare uᵀHv with vᵀHu, over a few examples: some second derivatives in PyTorch are wrong."""
        full = copy.copy(self)
        full.precision = "full"
        source = torch.Generator().manual_seed(0)
        vectors = torch.randn(2, self.numel, generator=source, dtype=self.dtype).to(self.device)
        with self.guard():
            try:
                tape = full.tape(*self.subset(self.few(_PROBED_EXAMPLES)))
                images = torch.stack(
                    [
                        self.flatten(tape.hessian_product(tuple(self.split(v).values()), last=False))
                        for v in vectors
                    ]
                )
            except (RuntimeError, ValueError):
                return  # products are impossible and will raise an error; values and gradients may exist
        first, second = float(inner(images[:1], vectors[1])), float(inner(images[1:], vectors[0]))
        size = max(map(norm, images))
        if abs(first - second) > _SYMMETRY_TOLERANCE[self.dtype] * size:
            raise ValueError(
                f"products with the Hessian are not symmetric, uᵀHv = {second:.6g} but vᵀHu = {first:.6g}: "
                "the second derivative of some function in the model or the loss is wrong (its backward pass "
                "cannot be differentiated, or PyTorch is at fault); write it with plain operations"
            )

    def _takes_channels_last(self, parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> bool:
        """Images in this layout are faster on a CPU, but a model that flattens by ``view`` refuses them."""
        if inputs.device.type != "cpu" or inputs.dim() != 4 or not curves_channels_last(self.model):
            return False
        try:
            self.losses(parameters, inputs.contiguous(memory_format=torch.channels_last), targets)
        except RuntimeError:
            return False
        return True

    def _check_same_weights(self) -> None:
        if not self.shards.same([*self.model.parameters(), *self.model.buffers()]):
            raise ValueError("the processes of group hold different weights or running statistics")


class _State:
    """What tensors were: the objects, their storage, their versions and a checksum.

    ``tensor.data`` has a version of its own, so versions alone do not see everything.
    """

    def __init__(self, weights: list[Tensor], examples: list[Tensor]) -> None:
        self.tensors = [*weights, *examples]
        self.versions = [(tensor._version, tensor.data_ptr()) for tensor in self.tensors]
        self.content = checksum(self.tensors)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _State)
            and len(self.tensors) == len(other.tensors)
            and all(mine is theirs for mine, theirs in zip(self.tensors, other.tensors, strict=True))
            and self.versions == other.versions
            and self.content == other.content
        )

    __hash__ = None  # type: ignore[assignment]


def _check_types(inputs: object, targets: object, chunk_size: object, memory: object) -> None:
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be one tensor, not a {type(value).__name__}: convert it (torch.as_tensor), or "
                "wrap the model so that it takes one tensor"
            )
    for name, value in (("chunk_size", chunk_size), ("memory", memory)):
        if value is not None and not isinstance(value, Integral):
            unit = " of bytes, such as 2**30" if name == "memory" else ""
            raise TypeError(f"{name} must be a whole number{unit}, or None, not {value!r}")


def _check_examples(inputs: Tensor, targets: Tensor, chunk_size: int | None, memory: int | None) -> None:
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
        raise ValueError(
            f"inputs and targets must agree in their first dimension, got {tuple(inputs.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if len(inputs) == 0:
        raise ValueError("inputs is empty: the mean loss needs at least one example")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive or None, not {chunk_size}")
    if memory is not None and memory < 0:
        raise ValueError(f"memory must be a number of bytes or None, not {memory}")
    for name, numbers in (("inputs", inputs), ("targets", targets)):
        finite = torch.isfinite(numbers)
        if not bool(finite.all()):
            bad = finite.flatten(1).all(dim=1) if numbers.dim() > 1 else finite
            first = int(bad.logical_not().nonzero()[0])
            raise ValueError(f"{name} has numbers that are not finite, first in example {first}")


def _check_settings(batchnorm: str, precision: str, dtype: torch.dtype) -> None:
    if batchnorm not in ("eval", "train"):
        raise ValueError(f"batchnorm must be 'eval' or 'train', not {batchnorm!r}")
    if precision not in ("full", "tf32", "bfloat16"):
        raise ValueError(f"precision must be 'full', 'tf32' or 'bfloat16', not {precision!r}")
    if precision != "full" and dtype != torch.float32:
        raise ValueError(f"precision={precision!r} is for float32 parameters, these are {dtype}")


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and of data parallelism."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """The model's output with other tensors in place of its parameters and buffers.

    ``functional_call`` finds out by itself which names share a tensor, but then leaves the model changed
    where one module has two names. Here each module is visited once.

    Args:
        model: Left as it is.
        tensors: By their names in ``named_parameters()`` and ``named_buffers()``.
        inputs: (B, ...).
    """
    present = chain(model.named_parameters(), model.named_buffers())
    replacement = {id(tensor): tensors[name] for name, tensor in present if name in tensors}
    everywhere = {
        f"{prefix}.{key}" if prefix else key: replacement[id(tensor)]
        for prefix, module in model.named_modules()
        for key, tensor in chain(module._parameters.items(), module._buffers.items())
        if id(tensor) in replacement
    }
    outputs: Tensor = functional_call(model, everywhere, (inputs,), tie_weights=False)
    return outputs


def plain(tensor: Tensor) -> Tensor:
    """The tensor detached, and copied if it was made under inference_mode, which autograd cannot use."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor.detach()


@contextmanager
def _tensor_float_32(allowed: bool) -> Iterator[None]:
    """Switch TensorFloat-32 on or off: PyTorch uses it for convolutions on NVIDIA GPUs by default."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


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


def _random_layers(model: nn.Module) -> str:
    active = [name for name, m in model.named_modules() if "Dropout" in type(m).__name__ and m.training]
    return f"Dropout is on in {', '.join(map(repr, active))}" if active else "the model draws random numbers"
