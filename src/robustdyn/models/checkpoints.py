"""Weights from files: our own checkpoints, and those that the public codes of the field save.

A layout is a set of parameter names, and whether the network takes the pixels as they are.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robustdyn.errors import ConfigError, DataFileError
from robustdyn.models.preact_resnet import PreActResNet
from robustdyn.models.weight_files import read_weight_file, some
from robustdyn.models.wide_resnet import WideResNet

Layout = Literal["auto", "robustdyn", "robust_overfitting", "awp", "trades", "mart"]
"""Whose names a file's parameters have; ``"auto"`` recognises them."""

Weights = Mapping[str, Tensor]

_STAGES = range(1, 5)
# Beginnings of the names in the public codes and in ours; all other names are the same. The repositories
# share their networks. The first entry of each is what the network is recognised by.
_PREACT_RESNET = {f"layer{stage}.": f"layers.{stage - 1}." for stage in _STAGES}
_WIDE_RESNET = {
    **{f"block{stage}.layer.": f"layers.{stage - 1}." for stage in _STAGES[:3]},
    "bn1.": "bn.",
    "fc.": "linear.",
}
_PUBLIC = ("robust_overfitting", "awp", "trades", "mart")
_SET_BY_DATA = ("num_classes", "in_channels")
_NORMALISATION = {"mean": ("mean", "mu"), "std": ("std", "sigma")}  # our buffers, and how others call them
# A block that TRADES' WideResNet holds but never uses; AWP's evaluation of such files leaves it out too.
_UNUSED = re.compile(r"sub_block\d+\.")
MOST_CHANNELS = 16  # of images: more are no normalisation of pixels
_COUNTER = ".num_batches_tracked"  # of BatchNorm: old files lack it, and it has no effect


def load_weights(model: nn.Module, path: Path, *, layout: Layout, trained: bool = False) -> str:
    """Put the weights and BatchNorm statistics of a file into ``model``; on an error it stays as it was.

    Layouts:
        robustdyn: A run's ``checkpoints/*.ckpt`` (with weight averaging: the average), or the ``state_dict``
            of any model under its own names.
        robust_overfitting: Rice et al. (ICML 2020): PreActResNet and WideResNet, as a ``state_dict``
            (``model_N.pth``) or a dictionary with that entry (``model_best.pth``).
        awp: Wu et al. (NeurIPS 2020): the same; the unused block of TRADES' WideResNet is left out.
        trades, mart: Zhang et al. (ICML 2019) and Wang et al. (ICLR 2020): as ``awp``, for networks that take
            the pixels as they are: mean 0 and standard deviation 1 are set. The ResNet-18 of MART is no
            network of this package; give its own class.

    The files of RobustBench have the names of one of these. The weights may be an entry of a dictionary
    (``state_dict``, ``model_state_dict``, ``model``, ``net``, ``network``, ``weights`` or ``ema``, else the
    only one that holds tensors), and their names may have the prefixes of wrappers (``module.``,
    ``_orig_mod.``, ``model.``, ``net.``, ``1.``), one inside the other, with other tensors beside them.
    ``model`` may itself be a wrapper, for example one that normalises the pixels, of a network that is in the
    file without it. The file may be one of safetensors.

    The repositories normalise outside the network, and their files do not contain how. Except for ``trades``
    and ``mart``, ``model`` must have been built with the mean and standard deviation with which the file was
    trained. These are the statistics of the data for adversarial training, but mean 0 and standard deviation
    1 for the TRADES part of AWP. A wrapper's ``mean`` and ``std`` (or ``mu`` and ``sigma``) are taken from
    the file. Weights do not show strides.

    Args:
        model: Takes the weights, in its own dtype and on its own device.
        path: The file.
        layout: One of the layouts, or ``"auto"``.
        trained: Of a run with weight averaging, take the weights that were trained and not their average.

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
    whole = dict(read_weight_file(path, trained=trained).weights)
    if not whole:
        raise DataFileError(
            f"{path}: it has the state of an optimiser and no weights; give the network's file"
        )
    weights, normalisation = _without_normalisation(whole, own, model)
    network = _network(model, weights)
    own = network.state_dict()
    weights = _unwrapped(weights, own, path)
    _check_none_left(whole, weights, normalisation, path)
    found = _recognise(weights, own)
    if found is None:
        raise DataFileError(
            f"{path}: its names ({some(weights)}) are of no known layout; give a checkpoint of robustdyn, "
            "robust_overfitting, AWP, TRADES or MART, or a state_dict of the network under its own names"
            f" ({some(own)})"
        )
    used = found if layout == "auto" else layout
    if used != found and not (found in _PUBLIC and used in _PUBLIC[1:]):
        raise ConfigError(
            f"layout={layout} does not fit {path}: its names ({some(weights)}) are those of {found}; "
            f"use layout={found} or auto"
        )
    if used in _PUBLIC:
        weights = _renamed(weights)
    _check(weights, own, network, path)
    for name, value in normalisation.items():
        if not bool(value.isfinite().all()) or (name == "std" and not bool((value > 0).all())):
            raise DataFileError(f"{path}: its {name} of the pixels is {value.tolist()}; get the file again")
    if used in ("trades", "mart") and not normalisation:
        normalisation = {"mean": torch.zeros(1), "std": torch.ones(1)}
    for name, value in normalisation.items():
        buffer = model.get_buffer(name)
        buffer.copy_(value.reshape(-1, 1, 1).expand_as(buffer))
    network.load_state_dict(weights, strict=False)  # checked above; only BatchNorm's counters may be missing
    return used


# ---------------------------------------------------------------------- names


def _recognise(weights: Weights, own: Weights) -> Layout | None:
    if weights.keys() == own.keys():
        return "robustdyn"  # whatever the names look like
    if _names_of_network(weights) is not None and (_ours(own) or own.keys().isdisjoint(weights)):
        return "awp" if any(map(_UNUSED.match, weights)) else "robust_overfitting"
    return None if own.keys().isdisjoint(weights) else "robustdyn"


def _names_of_network(weights: Weights) -> dict[str, str] | None:
    """The public network whose names these are."""
    for names in (_PREACT_RESNET, _WIDE_RESNET):
        if any(name.startswith(next(iter(names))) for name in weights):
            return names
    return None


def _renamed(weights: Weights) -> Weights:
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


def _network(model: nn.Module, weights: Weights) -> nn.Module:
    """The module that the file is of: the model, or what it is a wrapper of."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    inner, numbers = model, len(list(model.parameters()))
    while not any(_parts(plain, inner.state_dict())):
        children = [child for child in inner.children() if len(list(child.parameters())) == numbers]
        if not children or numbers == 0:
            return model
        inner = children[0]
    return inner


def _unwrapped(weights: Weights, own: Weights, path: Path) -> Weights:
    """The network's weights without the names of the wrappers around it, and without what stands beside it.

    Raises:
        DataFileError: Several parts of the file hold all weights of such a network.
    """
    if weights.keys() == own.keys():
        return weights
    plain = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    parts = dict(_parts(plain, own))
    if len(parts) > 1:
        raise DataFileError(
            f"{path}: {' and '.join(parts)} each hold the weights of such a network; save the one to use "
            "alone: torch.save(PART.state_dict(), FILE)"
        )
    for part in parts.values():
        return part
    # a network of another size: what the names have in common is a wrapper's
    while _recognise(plain, own) is None:
        if len({name.partition(".")[0] for name in plain}) != 1 or not all("." in name for name in plain):
            return weights
        plain = {name.partition(".")[2]: value for name, value in plain.items()}
    return plain


def _parts(weights: Weights, own: Weights, prefix: str = "") -> Iterator[tuple[str, Weights]]:
    """The parts of a file under one prefix that have all tensors of the network, by our or public names."""
    renamed = _renamed(weights) if _ours(own) and _names_of_network(weights) is not None else weights
    needed = {name: value.shape for name, value in own.items() if not name.endswith(_COUNTER)}
    if all(name in renamed and renamed[name].shape == shape for name, shape in needed.items()):
        yield prefix, weights
        return
    inside: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        first, dot, rest = name.partition(".")
        if dot:
            inside.setdefault(f"{prefix}{first}.", {})[rest] = value
    for deeper, part in inside.items():
        yield from _parts(part, own, deeper)


def _ours(own: Weights) -> bool:
    """Whether these are the names of a network of this package, which public names can stand for."""
    return "layers.0.0.conv1.weight" in own


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


def _check_none_left(
    whole: Weights, weights: Weights, normalisation: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse a wrapper's normalisation of the pixels that the network has no place for.

    Raises:
        ConfigError: There is one.
    """
    kept = {id(value) for value in [*weights.values(), *normalisation.values()]}
    names = [name for part in _NORMALISATION.values() for name in part]
    left = [
        name
        for name, value in whole.items()
        if name.rpartition(".")[2] in names and value.numel() <= MOST_CHANNELS and id(value) not in kept
    ]
    if left:
        raise ConfigError(
            f"{path}: it normalises the pixels ({some(left)}) outside the network; give a model._target_ "
            "whose state_dict has these names, too"
        )


# ---------------------------------------------------------------------- do they fit?


def _check(weights: Weights, own: Weights, model: nn.Module, path: Path) -> None:
    """Compare names and shapes; where they differ, name one tensor and the settings that would fit."""
    missing = [n for n in own if n not in weights and not n.endswith(_COUNTER)]
    unexpected = [n for n in weights if n not in own]
    reshaped = [n for n, value in own.items() if n in weights and weights[n].shape != value.shape]
    if reshaped:
        name = reshaped[0]
        problem = f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} in the network"
    elif missing:
        problem = f"it has no {some(missing)}"
    elif unexpected:
        problem = f"it has {some(unexpected)}, which the network has not"
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
    if any(name.endswith(".shortcut.1.weight") for name in weights):
        remedy = (
            "it looks like a plain ResNet, as in MART, which this package does not have: give its class with "
            "model._target_"
        )
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
