"""Weights from files: our own checkpoints, and those that the public codes of the field save.

A layout is a set of parameter names. Files are read with ``torch.load(weights_only=True)`` and nothing else,
so no code in them is ever run.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robustdyn.errors import ConfigError, DataFileError
from robustdyn.models.preact_resnet import PreActResNet
from robustdyn.models.wide_resnet import WideResNet

Layout = Literal["auto", "robustdyn", "robust_overfitting", "awp"]
"""Whose names a file's parameters have; ``"auto"`` recognises them."""

Weights = Mapping[str, Tensor]

_STAGES = range(1, 5)
# Beginnings of the names in the public codes and in ours; all other names are the same. The two repositories
# share their networks. The first entry of each is what the network is recognised by.
_PREACT_RESNET = {f"layer{stage}.": f"layers.{stage - 1}." for stage in _STAGES}
_WIDE_RESNET = {
    **{f"block{stage}.layer.": f"layers.{stage - 1}." for stage in _STAGES[:3]},
    "bn1.": "bn.",
    "fc.": "linear.",
}
_PUBLIC = ("robust_overfitting", "awp")
_SET_BY_DATA = ("num_classes", "in_channels")
# Entries under which checkpoints keep their weights, the first that is there counts
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "ema")
_NORMALISATION = {"mean": ("mean", "mu"), "std": ("std", "sigma")}  # our buffers, and how others call them
# A block that TRADES' WideResNet holds but never uses; AWP's evaluation of such files leaves it out too.
_UNUSED = re.compile(r"sub_block\d+\.")


def load_weights(model: nn.Module, path: Path, *, layout: Layout) -> str:
    """Put the weights and BatchNorm statistics of a file into ``model``; on an error it stays as it was.

    Layouts:
        robustdyn: A run's ``checkpoints/*.ckpt`` (with weight averaging: the average), or the ``state_dict``
            of any model under its own names.
        robust_overfitting: Rice et al. (ICML 2020): PreActResNet and WideResNet, as a ``state_dict``
            (``model_N.pth``) or a dictionary with that entry (``model_best.pth``), with or without the
            ``module.`` of ``nn.DataParallel``.
        awp: Wu et al. (NeurIPS 2020): the same; the unused block of TRADES' WideResNet is left out.

    The weights may be an entry of a dictionary (``state_dict``, ``model_state_dict``, ``model``, ``net``,
    ``network``, ``weights`` or ``ema``, else the only one that holds tensors), and all names may have the
    prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``, ``net.``, ``1.``).

    The two repositories normalise outside the network, and their files do not contain how. ``model`` must
    have been built with the mean and standard deviation with which the file was trained. These are the
    statistics of the data for adversarial training, but mean 0 and standard deviation 1 for the TRADES part
    of AWP. A wrapper's ``mean`` and ``std`` (or ``mu`` and ``sigma``) are taken from the file. Weights do not
    show strides.

    Args:
        model: Takes the weights, in its own dtype and on its own device.
        path: The file.
        layout: One of the layouts, or ``"auto"``.

    Returns:
        The layout used. Files of ``"awp"`` without the unused block cannot be distinguished from
        ``"robust_overfitting"``, and ``"auto"`` then returns the latter.

    Raises:
        ConfigError: The layout is unknown or another one, or the model was built with other settings.
        DataFileError: The file cannot be read, holds more than tensors, or no weights of such a model.
    """
    if layout not in get_args(Layout):
        raise ConfigError(f"layout={layout} is not known; choose one of {', '.join(get_args(Layout))}")
    own = model.state_dict()
    weights, normalisation = _without_normalisation(_weights(path), own, model)
    weights = _unwrapped(weights, own)
    found = _recognise(weights, own)
    if found is None:
        raise DataFileError(
            f"{path}: its names ({_some(weights)}) are of no known layout; give a checkpoint of robustdyn, "
            "robust_overfitting or AWP, or a state_dict of the network under its own names"
        )
    used = found if layout == "auto" else layout
    if used != found and (used, found) != ("awp", "robust_overfitting"):
        raise ConfigError(
            f"layout={layout} does not fit {path}: its names ({_some(weights)}) are those of {found}; "
            f"use layout={found} or auto"
        )
    if used in _PUBLIC:
        weights = _renamed(weights)
    _check(weights, own, model, path)
    for name, value in normalisation.items():
        if not bool(value.isfinite().all()) or (name == "std" and not bool((value > 0).all())):
            raise DataFileError(f"{path}: its {name} of the pixels is {value.tolist()}; get the file again")
    for name, value in normalisation.items():
        buffer = model.get_buffer(name)
        buffer.copy_(value.reshape(-1, 1, 1).expand_as(buffer))
    model.load_state_dict(weights, strict=False)  # checked above; only BatchNorm's counters may be missing
    return used


# ---------------------------------------------------------------------- the file


def _weights(path: Path) -> dict[str, Tensor]:
    """The ``state_dict`` in the file, of a Lightning checkpoint the part that is the network."""
    content = _read(path)
    state = content
    if isinstance(content, Mapping) and not _holds_weights(content):
        named = [name for name in _ENTRIES if _holds_weights(content.get(name))]
        entries = named[:1] or [name for name, value in content.items() if _holds_weights(value)]
        if len(entries) > 1:
            raise DataFileError(
                f"{path}: several of its entries hold tensors ({_some(entries)}); save the network's alone: "
                "torch.save(checkpoint[ENTRY], FILE)"
            )
        state = content[entries[0]] if entries else None
    if isinstance(content, Mapping) and isinstance(state, Mapping) and "pytorch-lightning_version" in content:
        state = {name: value for name, value in state.items() if str(name).startswith("model.")}
    if not isinstance(state, Mapping) or not _holds_weights(state):
        names = f" ({_some(content)})" if isinstance(content, Mapping) else ""
        raise DataFileError(
            f"{path}: found a {type(content).__name__}{names}, not a state_dict; give the file of the "
            "network's weights, not of the optimiser's"
        )
    return {str(name): value for name, value in state.items()}


def _holds_weights(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _read(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # a damaged file can raise anything
        if _refused(error) is not None:
            raise DataFileError(
                f"{path}: refused, since {why_not_loaded(error)}; where you trust it, save its tensors "
                "alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise DataFileError(f"{path}: {why_not_loaded(error)}; copy or download it again") from error


def why_not_loaded(error: Exception) -> str:
    """In a few words; torch's own message advises to load the file unsafely."""
    if (name := _refused(error)) is not None:
        return f"loading it could run code (it holds {name})"
    return f"not a complete file of torch.save ({type(error).__name__})"


def _refused(error: Exception) -> str | None:
    """What the file wanted to call."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return None if found is None else found[1]


# ---------------------------------------------------------------------- names


def _recognise(weights: Weights, own: Weights) -> Layout | None:
    if weights.keys() == own.keys():
        return "robustdyn"  # whatever the names look like
    if _names_of_network(weights) is not None:
        return "awp" if any(map(_UNUSED.match, weights)) else "robust_overfitting"
    return None if own.keys().isdisjoint(weights) else "robustdyn"


def _names_of_network(weights: Weights) -> dict[str, str] | None:
    """The public network whose names these are."""
    for names in (_PREACT_RESNET, _WIDE_RESNET):
        if any(name.startswith(next(iter(names))) for name in weights):
            return names
    return None


def _renamed(weights: Weights) -> dict[str, Tensor]:
    beginnings = _names_of_network(weights)
    assert beginnings is not None  # else another layout was recognised
    renamed = {}
    for name, value in weights.items():
        if _UNUSED.match(name):
            continue
        theirs = next((beginning for beginning in beginnings if name.startswith(beginning)), "")
        ours = beginnings.get(theirs, "") + name.removeprefix(theirs)
        renamed[ours.replace(".convShortcut.", ".shortcut.0.")] = value
    return renamed


def _unwrapped(weights: Weights, own: Weights) -> Weights:
    """Without the wrappers' names that all names begin with, if a known network's are left."""
    inner = weights
    if weights.keys() != own.keys():
        inner = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    while _recognise(inner, own) is None:
        if len({name.partition(".")[0] for name in inner}) != 1 or not all("." in name for name in inner):
            return weights
        inner = {name.partition(".")[2]: value for name, value in inner.items()}
    return inner


def _without_normalisation(
    weights: Weights, own: Weights, model: nn.Module
) -> tuple[Weights, dict[str, Tensor]]:
    """The weights, and the mean and standard deviation of the pixels that a wrapper around them holds."""
    buffers = dict(model.named_buffers())
    found: dict[str, str] = {}
    for ours, theirs in _NORMALISATION.items():
        for name, value in weights.items():
            sizes = (1, buffers[ours].numel()) if ours in buffers else ()
            if name not in own and name.rpartition(".")[2] in theirs and value.numel() in sizes:
                found[ours] = name
    if found.keys() != _NORMALISATION.keys():
        return weights, {}
    rest = {name: value for name, value in weights.items() if name not in found.values()}
    return rest, {ours: weights[name] for ours, name in found.items()}


def _some(names: Iterable[object]) -> str:
    words = [str(name) for name in names]
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")


# ---------------------------------------------------------------------- do they fit?


def _check(weights: Weights, own: Weights, model: nn.Module, path: Path) -> None:
    """Compare names and shapes; where they differ, name one tensor and the settings that would fit."""
    missing = [n for n in own if n not in weights and not n.endswith(".num_batches_tracked")]
    unexpected = [n for n in weights if n not in own]
    reshaped = [n for n, value in own.items() if n in weights and weights[n].shape != value.shape]
    if reshaped:
        name = reshaped[0]
        problem = f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} in the network"
    elif missing:
        problem = f"it has no {_some(missing)}"
    elif unexpected:
        problem = f"it has {_some(unexpected)}, which the network has not"
    else:
        return
    count = len(missing) + len(unexpected) + len(reshaped)
    problem += f" ({count} such differences)" if count > 1 else ""

    built, needed = _settings(type(model), own), _settings(type(model), weights)
    differing = [key for key in built if built[key] != needed.get(key)]
    if needed and differing:
        now = ", ".join(f"model.{key}={built[key]}" for key in differing)
        remedy = " ".join(f"model.{key}={needed[key]}" for key in differing)
        if differing[0] in _SET_BY_DATA:
            remedy += " or the data set it was trained on"
        raise ConfigError(f"{now} does not fit {path}: {problem}; choose {remedy}")
    remedy = "it is damaged or of another network: choose the model it was trained with"
    for kind in (PreActResNet, WideResNet) if not needed else ():
        other = _settings(kind, weights)
        if kind is not type(model) and other:
            sizes = " ".join(f"{key}={value}" for key, value in other.items())
            remedy = f"choose the model it was trained with, it looks like a {kind.__name__} of {sizes}"
    raise DataFileError(f"{path} does not fit this {type(model).__name__}: {problem}; {remedy}")


def _settings(kind: type[nn.Module], weights: Weights) -> dict[str, str]:
    """What this class would have to be built with to hold these weights; empty if nothing would do."""
    counts: dict[int, int] = {}
    for name in weights:
        block = re.fullmatch(r"layers\.(\d+)\.\d+\.conv1\.weight", name)
        if block is not None:
            counts[int(block[1])] = counts.get(int(block[1]), 0) + 1
    blocks = [counts[stage] for stage in sorted(counts)]
    try:
        classes, _ = weights["linear.weight"].shape
        stem, images, _, _ = weights["conv1.weight"].shape
        first, _, _, _ = weights["layers.0.0.conv1.weight"].shape
    except (KeyError, ValueError):
        return {}
    settings = dict(zip(_SET_BY_DATA, (str(classes), str(images)), strict=True))
    if kind is PreActResNet and first == stem:
        return settings | {"width": str(stem), "blocks": str(blocks).replace(" ", "")}
    if kind is WideResNet and stem > 0 and first % stem == 0 and blocks == blocks[:1] * 3:
        depth = 6 * blocks[0] + 4
        return settings | {
            "depth": str(depth),
            "widen_factor": str(first // stem),
            "base_channels": str(stem),
        }
    return {}
