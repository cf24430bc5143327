"""Certifies the robust error of replicas that were trained without the examples that count.

Such replicas are a prior on finitely many networks, fixed before S is seen. A posterior that weights them
equally has a KL of 0, and one that has all its weight on the best replica has a KL of ln R.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdyn.replicas.gibbs import AttackedNetworks
from robustdyn.theory import binary_kl_upper, finite_certificate

Examples = Mapping[str, tuple[Tensor, Tensor]]

ASSUMPTIONS = (
    "given the prior's examples, those of S are drawn independently from the distribution for which the "
    "bound holds, or at random without replacement from a finite set of images; class-balanced draws are "
    "also allowed, and the bound then holds for the same balance",
    "nothing on which the prior depends has seen S: not the run, its settings, the replicas or their number, "
    "or the grid of gaussian.prior_std",
    "the bound holds for the error under this attack, in expectation over its random start; a stronger "
    "attack may find more errors",
    "pseudo-random numbers count as random, and weights rounded to float32 as Gaussian",
)


def certify_replicas(
    networks: AttackedNetworks,
    weights: Iterable[NDArray[np.float32]],
    data: Examples,
    *,
    alpha: float,
    batch_size: int,
) -> dict[str, Any]:
    """Bounds for a replica drawn at random and for the best one, and their errors on test examples.

    Every replica classifies every example of S, so that nothing is left to sampling except the start of the
    attack. The bounds are for its expectation over the start, and they cover the start that was drawn:
    given the replicas, the losses of one example are independent of those of the others.

    Args:
        networks: Networks with the replicas' running statistics.
        weights: θ (R, P) of the replicas, chunk by chunk.
        data: ``S`` (examples that no replica saw) and ``test``: images (n, ...) in [0, 1] and classes
            (n,), on the network's device.
        alpha: Probability over the draw of S with which one of the bounds may fail.
        batch_size: Examples of one pass, over all replicas that pass together; affects only memory.

    Returns:
        ``bounds``: a row for each of the two, and ``errors``: of every replica on S and on the test examples.
    """
    wrong: dict[str, list[NDArray[np.bool_]]] = {"S": [], "test": []}
    first = 0
    for chunk in weights:
        theta = torch.from_numpy(chunk).to(data["S"][0].device)
        for split, chunks in wrong.items():
            size, stream = max(batch_size // len(theta), 1), f"certify-replicas-{split}"
            chunks.append(networks.wrong(theta, *data[split], batch_size=size, stream=stream, first=first))
        first += len(theta)
    losses, tested = (np.concatenate(chunks).astype(np.float64) for chunks in wrong.values())
    found = finite_certificate(losses, alpha=alpha)
    best = tested[found.best]
    return {
        "bounds": [
            {
                "posterior": "a replica drawn at random",
                "kl": 0.0,
                "error": found.uniform_error,
                "risk_bound": found.uniform_bound,
                "test": _mean(tested.mean(axis=0)),
            },
            {
                "posterior": f"the best replica, number {found.best}",
                "kl": math.log(found.networks),
                "error": found.best_error,
                "risk_bound": found.best_bound,
                "test": _mean(best),
            },
        ],
        "networks": found.networks,
        "n": found.n,
        "alpha": found.alpha,
        "errors": {"S": losses.mean(axis=1).tolist(), "test": tested.mean(axis=1).tolist()},
    }


def held_out_bound(
    networks: AttackedNetworks, theta: Tensor, data: Examples, *, alpha: float, batch_size: int
) -> dict[str, Any]:
    """The bound from S as a test set of the checkpoint θ (P,), claimed alone, to compare with.

    Args:
        networks: Networks with the checkpoint's running statistics.
        theta: (P,), the checkpoint.
        data: ``S``, ``test`` and ``prior`` (the examples on which the checkpoint was trained).
        alpha: Probability over the draw of S with which the bound may fail.
        batch_size: Examples of one pass; affects only memory.
    """
    error, test, prior = (
        networks.error(theta, *data[split], batch_size=batch_size, stream=f"certify-fixed-{split}")
        for split in ("S", "test", "prior")
    )
    n = len(data["S"][1])
    return {
        "error": error,
        "n": n,
        "risk_bound": float(binary_kl_upper(error, math.log(1 / alpha) / n)),
        "alpha": alpha,
        "test_error": test,
        "prior_examples_error": prior,
    }


def _mean(each: NDArray[np.float64]) -> dict[str, float | None]:
    """The mean over examples, and its standard error; None with one example."""
    error = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    return {"error": float(each.mean()), "error_se": error}
