"""What does a Hessian product cost, in gradients, and what does bfloat16 do to it?

All variants compute the product with the same vector over the same examples, in the same passes: ours with
and without kept graphs, plain PyTorch's double backward with and without, and PyHessian's two. They must
agree before times are compared. One gradient, the unit, is plain PyTorch's forward and backward pass, in its
default memory layout; channels last, in which our products run on CPUs, is reported beside it.

    python experiments/benchmarks/curvature_products.py [--width 16] [--examples 256] [--rounds 5]
"""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from curvature_problem import PLENTY, Plain, Problem, add_arguments, chosen, settings
from torch import Tensor
from torch.func import functional_call, jvp, vjp

from robustdyn.curvature import (
    EigenResult,
    EmpiricalRisk,
    GaussNewton,
    GradientCovariance,
    Hessian,
    Precision,
    lanczos,
)
from robustdyn.curvature.memory_layout import trains_channels_last
from robustdyn.curvature.tape import count_saved_bytes

Product = Callable[[Tensor], Tensor]

GRADIENT, CHANNELS_LAST = "gradient", "gradient, channels last"
KEPT, NOT_KEPT = "ours, graph kept", "ours, graph not kept"
PLAIN_KEPT, PLAIN_NOT_KEPT = "plain PyTorch, graph kept", "plain PyTorch, graph not kept"
GAUSS_NEWTON, COVARIANCE = "ours, Gauss-Newton, graph kept", "ours, gradient covariance, graph kept"
BFLOAT16_KEPT, BFLOAT16_NOT_KEPT = "ours, bfloat16, graph kept", "ours, bfloat16, graph not kept"

AGREEMENT = 1e-4  # rounding is some hundred times smaller, another matrix some hundred times larger
TARGETS = {KEPT: 2.2, NOT_KEPT: 3.5}  # gradients
TOP = 5


def ours(problem: Problem, chunk: int | None, precision: Precision) -> tuple[EmpiricalRisk, EmpiricalRisk]:
    """The risk that keeps all graphs, and the one that keeps none."""
    return (
        problem.risk(chunk, memory=PLENTY, precision=precision),
        problem.risk(chunk, precision=precision),
    )


def hessians(problem: Problem, chunk: int | None) -> dict[str, Product]:
    """Ours and plain PyTorch's, and PyTorch's gradient."""
    kept, not_kept = ours(problem, chunk, "full")
    plain = Plain(problem, chunk)
    return {
        GRADIENT: lambda _: plain.gradient(),
        KEPT: Hessian(kept).matvec,
        NOT_KEPT: Hessian(not_kept).matvec,
        PLAIN_KEPT: plain.kept_product,
        PLAIN_NOT_KEPT: plain.product,
    }


def pyhessians(problem: Problem, chunk: int | None) -> dict[str, Product]:
    """PyHessian through its public object; from ``data`` it can only take all examples at once."""
    import pyhessian
    from pyhessian.utils import hessian_vector_product

    warnings.filterwarnings("ignore", message="Using backward.. with create_graph")
    at_once = pyhessian.hessian(
        deepcopy(problem.model), F.cross_entropy, data=(problem.inputs, problem.targets), cuda=False
    )
    in_chunks = pyhessian.hessian(
        deepcopy(problem.model), F.cross_entropy, dataloader=problem.chunks(chunk), cuda=False
    )

    def split(vector: Tensor) -> list[Tensor]:
        sizes = [parameter.numel() for parameter in at_once.params]
        parts = vector.split(sizes)
        return [part.view_as(like) for part, like in zip(parts, at_once.params, strict=True)]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])

    return {
        "PyHessian, data": lambda v: join(hessian_vector_product(at_once.gradsH, at_once.params, split(v))),
        "PyHessian, dataloader": lambda v: join(in_chunks.dataloader_hv_product(split(v))[1]),
    }


def others(problem: Problem, chunk: int | None) -> dict[str, Product]:
    """Products with other matrices or other numbers than the Hessian's."""
    kept, _ = ours(problem, chunk, "full")
    half_kept, half_not_kept = ours(problem, chunk, "bfloat16")
    channels_last = Plain(problem, chunk, channels_last=trains_channels_last(problem.model))
    return {
        CHANNELS_LAST: lambda _: channels_last.gradient(),
        GAUSS_NEWTON: GaussNewton(kept).matvec,
        COVARIANCE: GradientCovariance(kept).matvec,
        BFLOAT16_KEPT: Hessian(half_kept).matvec,
        BFLOAT16_NOT_KEPT: Hessian(half_not_kept).matvec,
    }


def forward_mode(problem: Problem, vector: Tensor) -> dict[str, Tensor]:
    """Gauss-Newton and gradient-covariance products by another route: torch.func's forward mode."""
    weights = {name: parameter.detach() for name, parameter in problem.model.named_parameters()}
    sizes = [weight.numel() for weight in weights.values()]
    parts = [part.view_as(w) for part, w in zip(vector.split(sizes), weights.values(), strict=True)]
    direction = dict(zip(weights, parts, strict=True))
    examples = len(problem.inputs)

    def logits(weights: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = functional_call(problem.model, weights, (problem.inputs,))
        return outputs

    outputs, change = jvp(logits, (weights,), (direction,))[:2]
    pull = vjp(logits, weights)[1]

    def pulled(cotangent: Tensor) -> Tensor:
        return torch.cat([part.reshape(-1) for part in pull(cotangent)[0].values()])

    p = outputs.softmax(dim=1)
    slopes = p - F.one_hot(problem.targets, p.shape[1])
    curved = p * (change - (p * change).sum(dim=1, keepdim=True))
    along = (slopes * change).sum(dim=1, keepdim=True)
    # the projections are centred first: no subtraction of the mean gradient's part afterwards
    return {
        GAUSS_NEWTON: pulled(curved) / examples,
        COVARIANCE: pulled((along - along.mean()) * slopes) / examples,
    }


def disagreements(problem: Problem, products: Mapping[str, Product], vector: Tensor) -> dict[str, float]:
    """Relative differences to plain PyTorch's Hessian product, or for other matrices to forward mode's."""
    truths = forward_mode(problem, vector) if GAUSS_NEWTON in products else {}
    hessian = products[PLAIN_NOT_KEPT](vector)
    exempt = {GRADIENT, CHANNELS_LAST, BFLOAT16_KEPT, BFLOAT16_NOT_KEPT}
    found = {
        name: relative(product(vector), truths.get(name, hessian))
        for name, product in products.items()
        if name not in exempt
    }
    for name, difference in found.items():
        print(f"{name}: relative difference {difference:.1e}")
    wrong = [name for name, difference in found.items() if not difference <= AGREEMENT]
    if wrong:
        raise SystemExit(f"no times are compared, these do not agree: {', '.join(wrong)}")
    return found


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def bfloat16_accuracy(problem: Problem, chunk: int | None, vector: Tensor) -> dict[str, Any]:
    """Errors of products and of the leading eigenvalues that bfloat16 gives."""
    full, half = Hessian(ours(problem, chunk, "full")[0]), Hessian(ours(problem, chunk, "bfloat16")[0])
    truth, found = leading(full), leading(half)
    first = truth.eigenvectors[:, 0]
    changes = (found.eigenvalues - truth.eigenvalues).abs() / truth.eigenvalues.abs()
    return {
        "relative error of a product on a random vector": relative(half @ vector, full @ vector),
        "relative error of a product on the leading eigenvector": relative(half @ first, full @ first),
        f"relative change of the top {TOP} eigenvalues": [round(float(change), 6) for change in changes],
        "products to them, full precision and bfloat16": [truth.products, found.products],
        "all converged, full precision and bfloat16": [truth.all_converged, found.all_converged],
    }


def leading(hessian: Hessian) -> EigenResult:
    draws = torch.Generator().manual_seed(0)
    return lanczos(hessian, TOP, which="largest", tol=1e-3, max_products=60, generator=draws)


def seconds(products: Mapping[str, Product], vector: Tensor, rounds: int) -> dict[str, list[float]]:
    """All were called before: graphs are there and memory is warm."""
    calls = {name: common.timed(partial(call, vector)) for name, call in products.items()}
    return common.alternate(calls, rounds)


def swept(
    problem: Problem, chunks: Sequence[int], vector: Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    """Gradients per product, over as many examples as the largest chunk has; unit and product in these."""
    problem = problem.first(max(chunks, default=0))
    table = {}
    for chunk in chunks:
        products = hessians(problem, chunk)
        disagreements(problem, products, vector)
        products[GRADIENT](vector)
        times = seconds(products, vector, rounds)
        table[f"chunks of {chunk}"] = {
            name: round(common.median_ratio(times, name, GRADIENT), 3)
            for name in products
            if name != GRADIENT
        }
    return table


def targets(times: Mapping[str, list[float]], unit: str) -> dict[str, dict[str, Any]]:
    return {
        name: common.verdict(common.median_ratio(times, name, unit), at_most=most)
        for name, most in TARGETS.items()
    }


def kept_bytes(product: Product, vector: Tensor) -> int:
    """What autograd holds after a first product; counting slows the graph, so time another."""
    with count_saved_bytes() as counted:
        product(vector)
    return counted[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, examples=256)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--chunks", type=int, nargs="*", default=[8, 32, 128], help="sizes of the sweep")
    parser.add_argument("--sweep-rounds", type=int, default=3, help="alternating rounds of the sweep")
    args = parser.parse_args(arguments)
    (problem,) = chosen(args)
    size = sum(parameter.numel() for parameter in problem.model.parameters())
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
    vector /= vector.norm()

    memory = {
        name: round(kept_bytes(product, vector) / len(problem.inputs) / 2**20, 3)
        for name, product in hessians(problem, args.chunk).items()
        if name in (KEPT, PLAIN_KEPT)
    }
    products = hessians(problem, args.chunk)
    products |= pyhessians(problem, args.chunk) | others(problem, args.chunk)
    differences = disagreements(problem, products, vector)
    for product in products.values():
        product(vector)
    times = seconds(products, vector, args.rounds)
    products.clear()  # frees their graphs
    common.write_result(
        Path(__file__).stem,
        question="Cost of one Hessian product in gradients of the same examples, and of bfloat16 in accuracy",
        settings={**settings(args, problem), "rounds": args.rounds, "sweep_rounds": args.sweep_rounds},
        summary={
            **common.compare(times, baseline=GRADIENT),
            "relative difference to an independent product": differences,
            "graph, MiB per example": memory,
            "bfloat16": bfloat16_accuracy(problem, args.chunk, vector),
            "gradients per product, by chunk": swept(problem, args.chunks, vector, args.sweep_rounds),
            "targets, in gradients": targets(times, GRADIENT),
            "targets, in channels-last gradients": targets(times, CHANNELS_LAST),
        },
        rounds=times,
    )


if __name__ == "__main__":
    main()
