"""Examples in the forms in which people hold them: tensors, arrays, structures of these, and loaders.

Inside the package, inputs and targets are a tensor or a tuple or dictionary of tensors whose first dimensions
agree. A tuple's entries are the model's positional arguments, and a dictionary's are its keyword arguments.
"""

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Structure = Any
"""A tensor, or a tuple or dictionary of structures."""

_BATCH = 256  # examples that are read from a data set at a time


def structure(values: object, name: str) -> Structure:
    """Tensors in place of NumPy arrays, dictionaries of other mappings, and tuples of lists.

    Args:
        values: What the caller gave.
        name: What it is, for error messages.

    Raises:
        TypeError: It contains something else.
    """
    if isinstance(values, Tensor):
        return values
    if isinstance(values, np.ndarray):
        # torch shares the memory, and warns where it must not write to it
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    if isinstance(values, Mapping) and values:
        return {str(key): structure(value, f"{name}[{key!r}]") for key, value in values.items()}
    if isinstance(values, list) and values and isinstance(values[0], int | float):
        raise TypeError(f"{name} must be a tensor, not a list of numbers: give torch.tensor(...) of it")
    if isinstance(values, tuple | list) and values:
        return tuple(structure(value, f"{name}[{place}]") for place, value in enumerate(values))
    raise TypeError(
        f"{name} must be a tensor, a NumPy array, or a tuple or dictionary of these, not a "
        f"{type(values).__name__}"
    )


def leaves(values: Structure) -> list[Tensor]:
    """The tensors of a structure, in order."""
    if isinstance(values, Tensor):
        return [values]
    parts = values.values() if isinstance(values, dict) else values
    return [leaf for part in parts for leaf in leaves(part)]


def mapped(function: Callable[[Tensor], Tensor], values: Structure) -> Structure:
    """The structure with another tensor in place of each."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {key: mapped(function, value) for key, value in values.items()}
    return tuple(mapped(function, value) for value in values)


def rebuilt(tensors: Iterable[Tensor], like: Structure) -> Structure:
    """The inverse of ``leaves``: the tensors in the structure of ``like``."""
    following = iter(tensors)
    return mapped(lambda _: next(following), like)


def length(values: Structure) -> int:
    """How many examples there are; 0 where there is no first dimension."""
    first = leaves(values)[0]
    return len(first) if first.dim() else 0


def take(values: Structure, which: Any) -> Structure:
    """Some examples, by a slice or by their numbers (n,)."""
    if isinstance(which, Tensor):
        return mapped(lambda tensor: tensor[which.to(tensor.device)], values)
    return mapped(lambda tensor: tensor[which], values)


def shapes(values: Structure) -> str:
    """The shapes of the tensors, in words."""
    return ", ".join(str(tuple(leaf.shape)) for leaf in leaves(values))


def batches(inputs: Any, targets: Any = None, size: int = _BATCH) -> Iterator[tuple[Structure, Structure]]:
    """Inputs and targets, some examples at a time.

    Args:
        inputs: A structure; or with no ``targets`` a Dataset, a DataLoader or any other iterable of pairs
            (inputs, targets). Each batch of a loader is passed on as it is.
        targets: A structure, or None.
        size: Examples at a time, except for loaders.

    Raises:
        TypeError: Inputs or targets are none of these.
        ValueError: There are not as many targets as inputs, or no examples.
    """
    if targets is not None:
        if isinstance(inputs, Dataset | DataLoader):
            raise TypeError(
                f"inputs is a {type(inputs).__name__}, which has the targets, too: leave out targets"
            )
        inputs, targets = structure(inputs, "inputs"), structure(targets, "targets")
        check_lengths(inputs, targets)
        for start in range(0, length(inputs), size):
            part = slice(start, start + size)
            yield take(inputs, part), take(targets, part)
        return
    if isinstance(inputs, Tensor | np.ndarray | Mapping):
        raise TypeError("targets are missing: only a data set or a loader has inputs and targets together")
    loader = DataLoader(inputs, size) if isinstance(inputs, Dataset) else inputs
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"inputs must be tensors, arrays, a Dataset or a loader, not a {type(inputs).__name__}"
        )
    empty = True
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"each batch must be a pair (inputs, targets), not a {type(batch).__name__}: give a "
                "generator that makes pairs, such as ((b['x'], b['y']) for b in loader)"
            )
        pair = structure(batch[0], "inputs"), structure(batch[1], "targets")
        check_lengths(*pair)
        yield pair
        empty = False
    if empty:
        raise ValueError("the loader gives no batch")


def check_lengths(inputs: Structure, targets: Structure) -> None:
    """Refuse tensors whose first dimensions differ.

    Raises:
        ValueError: With the shapes.
    """
    sizes = {len(leaf) if leaf.dim() else None for leaf in (*leaves(inputs), *leaves(targets))}
    if len(sizes) > 1 or None in sizes:
        raise ValueError(
            f"inputs and targets must agree in their first dimension, got {shapes(inputs)} and "
            f"{shapes(targets)}"
        )


class Spool:
    """Collects examples in a file, and gives them back as tensors that the operating system reads on demand.

    The examples may exceed the memory. The file is a temporary one (``TMPDIR`` chooses the disk), and it goes
    when the tensors do.
    """

    def __init__(self) -> None:
        self._files: list[Any] = []
        self._like: Structure = None
        self._count = 0

    def add(self, *structures: Structure) -> None:
        """Append some examples.

        Raises:
            ValueError: Their shapes or types differ from those of the first ones.
        """
        parts = [leaf.detach().cpu().contiguous() for leaf in leaves(structures)]
        if self._like is None:
            self._like = rebuilt([part[:0] for part in parts], structures)
            self._files = [tempfile.TemporaryFile() for _ in parts]  # noqa: SIM115 (open until the end)
        kinds = [(leaf.shape[1:], leaf.dtype) for leaf in leaves(self._like)]
        if [(part.shape[1:], part.dtype) for part in parts] != kinds:
            raise ValueError(
                f"a batch has examples of another shape or type, {shapes(structures)}, than the first, "
                f"{shapes(self._like)}: pad or convert them"
            )
        for file, part in zip(self._files, parts, strict=True):
            # as bytes, because NumPy knows no bfloat16
            file.write(part.reshape(-1).view(torch.uint8).numpy().tobytes())
        self._count += len(parts[0])

    def examples(self) -> tuple[Structure, ...]:
        """What was added, in the order of ``add``'s arguments; nothing can be added afterwards.

        Raises:
            ValueError: Nothing was added.
        """
        if self._like is None:
            raise ValueError("there are no examples")
        tensors = []
        for file, like in zip(self._files, leaves(self._like), strict=True):
            shape = (self._count, *like.shape[1:])
            content: Any = b""
            if file.tell():
                file.flush()
                # private: nothing that is written to the tensors reaches the file
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flat = torch.frombuffer(content, dtype=like.dtype) if content else like
            tensors.append(flat.view(shape))
            file.close()  # the mapping keeps the content
        result: tuple[Structure, ...] = rebuilt(tensors, self._like)
        return result
