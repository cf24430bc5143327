"""What a recorded graph says about a network: is each weight's way to the outputs piecewise linear?

The type of a module does not answer this, because a forward method, a hook or a branch can do anything. The
graph that autograd recorded is what was computed on these examples. It contains every operation between a
weight and the outputs.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Names of autograd's nodes without "Backward" and their number. Linear in all tensors together:
_LINEAR = frozenset(
    [
        "Add",
        "Sub",
        "Neg",
        "Sum",
        "Mean",
        "View",
        "UnsafeView",
        "Reshape",
        "ReshapeAlias",
        "Alias",
        "Clone",
        "ToCopy",
        "T",
        "Transpose",
        "Permute",
        "Expand",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Select",
        "Split",
        "SplitWithSizes",
        "Unbind",
        "Cat",
        "Stack",
        "Flip",
        "Roll",
        "Unfold",
        "Index",
        "IndexSelect",
        "Gather",
        "AsStrided",
        "AvgPool2D",
        "AdaptiveAvgPool2D",
        "ConstantPadNd",
        "ReflectionPad2D",
        "ReplicationPad2D",
        "PixelShuffle",
        "PixelUnshuffle",
        "UpsampleNearest2D",
        "UpsampleBilinear2D",
    ]
)
# ... with slopes that jump where a comparison of numbers turns over:
_PIECEWISE = frozenset(
    [
        "Relu",
        "LeakyRelu",
        "Threshold",
        "Hardtanh",
        "Clamp",
        "ClampMin",
        "ClampMax",
        "Abs",
        "Max",
        "Min",
        "Maximum",
        "Minimum",
        "Amax",
        "Amin",
        "Where",
        "MaskedFill",
        "MaxPool2DWithIndices",
        "AdaptiveMaxPool2D",
    ]
)
# ... in each tensor while the others are held:
_MULTILINEAR = frozenset(
    [
        "Mul",
        "Mm",
        "Bmm",
        "Mv",
        "Dot",
        "Addmm",
        "Addmv",
        "Baddbmm",
        "Addcmul",
        "Convolution",
        "NativeBatchNorm",
        "CudnnBatchNorm",
        "MiopenBatchNorm",
        "PreluKernel",
    ]
)
_OVERWRITING = frozenset(
    [
        "copy_",
        "add_",
        "sub_",
        "neg_",
        "zero_",
        "fill_",
        "relu_",
        "leaky_relu_",
        "hardtanh_",
        "threshold_",
        "clamp_",
    ]
)
_RESHAPING = frozenset(
    [
        "View",
        "UnsafeView",
        "Reshape",
        "ReshapeAlias",
        "Transpose",
        "T",
        "Permute",
        "Unsqueeze",
        "Squeeze",
        "Alias",
    ]
)


class Overwrites(TorchDispatchMode):
    """Notes which operations overwrite a tensor: autograd does not name one that overwrites a view.

    Attributes:
        found: Names of the operations so far, such as ``relu_``; "a custom function" for what autograd was
            asked not to see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name.endswith("_"):
            self.found.add(name if torch.is_grad_enabled() else "a custom function")
        return function(*args, **(kwargs or {}))


class GradientAccess(TorchFunctionMode):
    """Notes whether a forward pass reaches for its own graph: the graph does not show the hooks it has.

    Attributes:
        found: How it did so, such as ``register_hook``, or None.
    """

    _WAYS: ClassVar[Mapping[Any, str]] = {
        Tensor.register_hook: "register_hook",
        Tensor.grad_fn.__get__: "grad_fn",  # type: ignore[union-attr]  # whose nodes take hooks, too
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.found = self.found or self._WAYS.get(function)
        return function(*args, **(kwargs or {}))


def nonlinearity(outputs: Tensor, weights: Mapping[str, Tensor], overwrites: Overwrites) -> str | None:
    """Why the outputs may not be piecewise linear in each of the weights alone; None if they are.

    Args:
        outputs: On the graph.
        weights: Leaves of the graph, by name.
        overwrites: What was active while the graph was recorded.

    Returns:
        A clause that names the operation and a weight.
    """
    bits = {id(weight): 1 << place for place, weight in enumerate(weights.values())}
    names = list(weights)
    below: dict[Any, int] = {}  # node -> the weights that it depends on, one bit each
    for node in _leaves_first(outputs.grad_fn):
        variable = getattr(node, "variable", None)
        if variable is not None:
            below[node] = bits.get(id(variable), 0)
            continue
        arguments = [below.get(child, 0) for child, _ in node.next_functions]
        below[node] = seen = _union(arguments)
        if not seen:
            continue
        kind = _kind(node)
        twice = _overlap(arguments)
        name = names[_first(twice or seen)]
        if kind in _MULTILINEAR:
            if twice:
                return f"{kind} multiplies two numbers that both depend on {name!r}"
            if getattr(node, "_saved_training", False):
                return f"a BatchNorm uses batch statistics behind {name!r}"
        elif kind == "Div":
            if arguments[-1] and len(arguments) > 1:
                return f"Div divides by a number that depends on {names[_first(arguments[-1])]!r}"
        elif kind == "CopySlices":
            if unknown := overwrites.found - _OVERWRITING:
                return f"{min(unknown)} overwrites a part of a tensor that depends on {name!r}"
        elif kind not in _LINEAR | _PIECEWISE or (kind == "Abs" and node._saved_self.is_complex()):
            return f"{kind} is not known to be piecewise linear, and {name!r} comes before it"
    return None


def stray_use(outputs: Tensor, weights: Mapping[str, Tensor], layers: Mapping[str, Any]) -> str | None:
    """Which weight the outputs depend on other than through its own layer's output; None for none.

    Args:
        outputs: On the graph.
        weights: Leaves of the graph, by name.
        layers: For each name the node that made its layer's output.
    """
    names = {id(weight): name for name, weight in weights.items()}
    parents: dict[Any, set[Any]] = {}
    leaves: dict[str, Any] = {}
    for node in _leaves_first(outputs.grad_fn):
        for child, _ in node.next_functions:
            parents.setdefault(child, set()).add(node)
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            leaves[name] = node
    for name, leaf in leaves.items():
        users = set(parents.get(leaf, ()))
        while reshaped := {user for user in users if _kind(user) in _RESHAPING}:
            users = (users - reshaped).union(*(parents[node] for node in reshaped))
        own, node = set(), layers[name]
        while node is not None and node not in own:
            own.add(node)
            if _kind(node) in _RESHAPING | {"Add"}:  # of sequences, and of a bias that is added last
                node = next((child for child, _ in node.next_functions if child is not None), None)
        if len(users) != 1 or not users <= own:
            return f"{name!r} is used outside of its layer"
    return None


def _leaves_first(root: Any) -> Iterator[Any]:
    """Every node of a graph once, after all that it depends on."""
    seen: set[Any] = set()
    stack = [(root, False)] if root is not None else []
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None)


def _kind(node: Any) -> str:
    # autograd numbers its own nodes; without a number it is a custom function, whatever its name
    return re.sub(r"^torch::autograd::|Backward\d+$", "", node.name())


def _union(masks: Sequence[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _overlap(masks: Sequence[int]) -> int:
    """The weights that more than one argument depends on."""
    seen = twice = 0
    for mask in masks:
        twice |= seen & mask
        seen |= mask
    return twice


def _first(mask: int) -> int:
    """The place of the lowest bit."""
    return (mask & -mask).bit_length() - 1
