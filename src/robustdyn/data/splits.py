"""Seeded, class-balanced parts of a labelled set."""

import torch
from torch import Tensor

from robustdyn.data.tensors import ImageTensors
from robustdyn.streams import generator


def stratified_order(labels: Tensor, draws: torch.Generator) -> Tensor:
    """A random permutation whose every beginning has the classes in their proportions.

    Each class is shuffled and spread evenly over [0, 1]; sorting the places merges the classes. Among the
    first n of N positions are n N_c / N images of class c, to within 1/2 + K N_c / 2N (one image, if the K
    classes are of equal size), and the first n for a smaller n are the first of those for a larger one.

    Args:
        labels: int64, (N,), on the CPU.
        draws: Generator on the CPU.

    Returns:
        int64, (N,), a permutation of 0 ... N - 1.
    """
    shuffled = torch.randperm(len(labels), generator=draws)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    # Equal places (classes of equal size) stay in the shuffled order: no class is always first.
    return shuffled[place[shuffled].argsort(stable=True)]


def hold_out(data: ImageTensors, count: int, *, seed: int, stream: str) -> tuple[ImageTensors, ImageTensors]:
    """Splits off ``count`` images, class-balanced and drawn by (seed, stream).

    Returns:
        The remaining images and the ``count`` images, each in the order of ``data``.
    """
    order = stratified_order(data.labels, generator(seed, stream))
    return data.take(order[count:].sort().values), data.take(order[:count].sort().values)
