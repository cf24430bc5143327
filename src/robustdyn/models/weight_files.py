"""Reads the files that training codes save: weights, the epoch, and the settings of the optimiser.

Files of ``torch.save`` are read with ``weights_only=True`` and nothing else, and safetensors hold no code, so
no code in a file is ever run.
"""

import json
import math
import mmap
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustdyn.errors import DataFileError

SUFFIXES = (".ckpt", ".pt", ".pth", ".pth.tar", ".tar", ".bin", ".safetensors")
"""Endings of the names that weights are saved under."""
# Entries under which checkpoints keep their weights, the first that is there counts
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "ema")
_LIGHTNING = "pytorch-lightning_version"
_TRAINED = "current_model_state"  # in Lightning's checkpoints, where the entry state_dict is their average
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of a safetensors file: https://huggingface.co/docs/safetensors."""


@dataclass(frozen=True, eq=False)
class WeightFile:
    """What a file of weights, or of an optimiser's state, says.

    Attributes:
        path: The file.
        entry: The entry of the file that holds the weights; empty if the file holds nothing else.
        weights: Tensors by name, still in the file until they are used; none in a file of an optimiser alone.
        epoch: The entry ``epoch``, if it has one.
        step: Optimiser steps taken, if it says so.
        groups: The optimiser's parameter groups without their parameters; none if it has no optimiser.
        averaged: Whether it holds an average of the weights beside the weights that were trained.
    """

    path: Path
    entry: str
    weights: Mapping[str, Tensor]
    epoch: int | None
    step: int | None
    groups: Sequence[Mapping[str, Any]]
    averaged: bool


def read_weight_file(path: Path, *, trained: bool = False) -> WeightFile:
    """Read a file of ``torch.save`` or of safetensors.

    Args:
        path: The file.
        trained: Of a file with both, take the weights that were trained and not their average.

    Raises:
        DataFileError: The file cannot be read, holds more than tensors and plain values, or has neither
            weights nor an optimiser's state.
    """
    content = _read(path)
    averaged = (
        isinstance(content, Mapping) and _LIGHTNING in content and _holds_weights(content.get(_TRAINED))
    )
    if averaged and trained:
        assert isinstance(content, Mapping)
        content = {**content, "state_dict": content[_TRAINED]}
    groups = _groups(content)
    try:
        entry, weights = _weights(content, path)
    except DataFileError:
        if not groups:
            raise
        entry, weights = "", {}
    named = content if isinstance(content, Mapping) else {}
    return WeightFile(
        path=path,
        entry=entry,
        weights=weights,
        epoch=_whole(named.get("epoch")),
        step=_whole(named.get("global_step")),
        groups=groups,
        averaged=averaged,
    )


def why_not_loaded(error: Exception) -> str:
    """In a few words; torch's own message advises to load the file unsafely."""
    if (name := _refused(error)) is not None:
        return f"loading it could run code (it holds {name})"
    return f"not a complete file of torch.save ({type(error).__name__})"


def some(names: Iterable[object]) -> str:
    """The first three names, for a message."""
    words = [str(name) for name in names]
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")


# ---------------------------------------------------------------------- formats


def _read(path: Path) -> object:
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return _safetensors(path, file.fileno())
            # the newer format can be mapped into memory, so that only the tensors in use are read
            if zipfile.is_zipfile(file):
                return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except DataFileError:
        raise
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # a damaged file can raise anything
        if _refused(error) is not None:
            raise DataFileError(
                f"{path}: refused, since {why_not_loaded(error)}; where you trust it, save its tensors "
                "alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise DataFileError(f"{path}: {why_not_loaded(error)}; copy or download it again") from error


def _refused(error: Exception) -> str | None:
    """What the file wanted to call."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return None if found is None else found[1]


def _safetensors(path: Path, descriptor: int) -> dict[str, object]:
    """The tensors, and the entries of the file's metadata unless a tensor has the name.

    The format: a header's length in 8 bytes, the header as JSON, then the tensors' bytes.

    Raises:
        DataFileError: The header is not of this format, or it places a tensor outside the file.
    """
    try:
        content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(content[:8], "little")
        if start > len(content):
            raise ValueError("its header is cut off")
        header = json.loads(content[8:start])
        metadata: dict[str, object] = dict(header.pop("__metadata__", {}))
        return metadata | {
            name: _tensor(name, content, start, entry["dtype"], entry["shape"], *entry["data_offsets"])
            for name, entry in header.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = f"{error}" if type(error) is ValueError else type(error).__name__
        raise DataFileError(
            f"{path}: not a complete safetensors file ({said}); copy or download it again"
        ) from error


def _tensor(
    name: str, content: mmap.mmap, start: int, kind: str, shape: Sequence[int], begin: int, end: int
) -> Tensor:
    if kind not in _DTYPES:
        raise ValueError(f"{name} has the type {kind}")
    dtype, count = _DTYPES[kind], math.prod(shape)
    inside = 0 <= begin <= end <= len(content) - start and all(size >= 0 for size in shape)
    if not inside or end - begin != count * dtype.itemsize:
        raise ValueError(f"{name} lies outside it")
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin).view(tuple(shape))


# ---------------------------------------------------------------------- contents


def _weights(content: object, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The entry that holds the ``state_dict``, and the latter; of our own checkpoints only the network."""
    state, entry = content, ""
    if isinstance(content, Mapping) and not _holds_weights(content):
        named = [name for name in _ENTRIES if _holds_weights(content.get(name))]
        entries = named[:1] or [name for name, value in content.items() if _holds_weights(value)]
        if len(entries) > 1:
            raise DataFileError(
                f"{path}: several of its entries hold tensors ({some(entries)}); save the network's alone: "
                "torch.save(checkpoint[ENTRY], FILE)"
            )
        if entries:
            entry, state = str(entries[0]), content[entries[0]]
        elif path.suffix == ".safetensors":  # its metadata stands beside the tensors
            state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        else:
            state = None
    if not isinstance(state, Mapping) or not _holds_weights(state):
        names = f" ({some(content)})" if isinstance(content, Mapping) else ""
        raise DataFileError(
            f"{path}: found a {type(content).__name__}{names}, not a state_dict; give the file of the "
            "network's weights, not of the optimiser's"
        )
    if isinstance(content, Mapping) and _LIGHTNING in content:
        state = {name: value for name, value in state.items() if str(name).startswith("model.")} or state
    return entry, {str(name): value for name, value in state.items()}


def _holds_weights(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _groups(content: object) -> tuple[dict[str, Any], ...]:
    """The parameter groups of the one optimiser in a file, at its top level or in one of its entries."""
    if not isinstance(content, Mapping):
        return ()
    states = [content, *content.values()]
    states += [state for value in states if isinstance(value, list) for state in value]
    found = [
        state["param_groups"]
        for state in states
        if isinstance(state, Mapping) and isinstance(state.get("param_groups"), list)
    ]
    if len(found) != 1 or not all(isinstance(group, Mapping) for group in found[0]):
        return ()
    return tuple({key: value for key, value in group.items() if key != "params"} for group in found[0])


def _whole(value: object) -> int | None:
    """A whole number of at least 0, which some codes save as a float, a tensor or (safetensors) text."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str) and re.fullmatch(r"\d{1,15}", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
