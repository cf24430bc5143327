"""How many Hessian products do the five leading eigenpairs take, and how right are they?

Asked is a residual ‖Hu − λu‖ of at most 1e-3 λ₁. Ours from random starts, with the whole basis in memory and
with the least that is allowed; ours from the eigenvectors of an earlier moment of training; PyHessian's power
iteration as it comes and with a smaller tolerance; SciPy's eigsh. Residuals of all are recomputed with our
product, eigenvalues are compared with a run to 1e-7. Ours and SciPy's eigenvalues are the largest ones,
PyHessian's those of largest magnitude: each is held against its own truth.

    python experiments/benchmarks/leading_eigenpairs.py [--width 16] [--examples 64] [--starts 3]
"""

import argparse
import importlib
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import numpy as np
import pyhessian
import torch
import torch.nn.functional as F
from curvature_problem import PLENTY, Problem, add_arguments, chosen, settings
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from robustdyn.curvature import EigenResult, Hessian, eigen_residuals, lanczos, principal_angles
from robustdyn.curvature.lanczos import Which

TOP, TOLERANCE, TRUTH_TOLERANCE = 5, 1e-3, 1e-7
TRUE_ENOUGH = 1e-5  # residual in λ₁: eigenvalue errors are its square over the gap
MOST_PRODUCTS = 200
COLD_TARGET, WARM_TARGET = 14, 7
COLD, LEAN, WARM = "ours, cold", f"ours, cold, {TOP + 2} basis vectors", "ours, warm"


class Moment:
    """One moment of training: its Hessian, and the true eigenpairs to judge others by."""

    def __init__(self, problem: Problem, chunk: int | None) -> None:
        self.problem = problem
        self.hessian = Hessian(problem.risk(chunk, memory=PLENTY))
        self.hessian @ torch.ones(self.hessian.shape[0])  # the graphs are recorded before anything is timed
        self.truth = self._long_run("largest", TOP + 1)

    def solve(
        self, seed: int, *, start: Tensor | None = None, max_basis: int | None = None
    ) -> tuple[EigenResult, dict[str, Any]]:
        found = lanczos(
            self.hessian,
            TOP,
            which="largest",
            tol=TOLERANCE,
            max_products=MOST_PRODUCTS,
            generator=torch.Generator().manual_seed(seed),
            start=start,
            max_basis=max_basis,
        )
        judged = self.judge(found.eigenvalues, found.eigenvectors, self.truth.eigenvalues)
        cost = {"products": found.products, "seconds": round(found.seconds, 3)}
        return found, {**cost, **judged, "converged": found.all_converged}

    def judge(self, eigenvalues: Tensor, eigenvectors: Tensor, truth: Tensor) -> dict[str, Any]:
        """Worst residual, in λ₁, and worst relative eigenvalue error of pairs in their truth's order."""
        residuals = eigen_residuals(self.hessian, eigenvalues, eigenvectors) / self.truth.eigenvalues[0]
        truth = truth[: len(eigenvalues)]
        errors = (eigenvalues - truth).abs() / truth.abs()
        return {"residual": three_digits(residuals.max()), "eigenvalue_error": three_digits(errors.max())}

    def largest_in_magnitude(self) -> EigenResult:
        return self._long_run("magnitude", TOP)

    def space(self) -> Tensor:
        return self.truth.eigenvectors[:, :TOP]

    def _long_run(self, which: Which, pairs: int) -> EigenResult:
        found = lanczos(
            self.hessian,
            pairs,
            which=which,
            tol=TRUTH_TOLERANCE,
            max_products=MOST_PRODUCTS,
            generator=torch.Generator().manual_seed(1000),
        )
        if not float(found.residuals.max()) <= TRUE_ENOUGH * float(found.eigenvalues[0].abs()):
            raise SystemExit(f"the long run did not converge, there is no truth to compare with: {found}")
        return found


def three_digits(value: Tensor) -> float:
    return float(f"{float(value):.2e}")


def gathered(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All runs' figures, one list for each."""
    return {key: [run[key] for run in runs] for key in (runs[0] if runs else ())}


def warm_starts(earlier: Sequence[EigenResult], later: Moment, first: Moment) -> dict[str, Any]:
    """From the sum of the eigenvectors that each earlier run ended with, as training starts the next one."""
    warm = [later.solve(seed, start=found.warm_start)[1] for seed, found in enumerate(earlier)]
    _, cold = later.solve(0)
    angles = principal_angles(first.space(), later.space())
    return {
        WARM: gathered(warm),
        COLD: cold,
        "cosines of the principal angles to the earlier space": [round(float(c), 4) for c in angles.cos()],
        "eigenvalues": [round(float(value), 3) for value in later.truth.eigenvalues],
    }


def by_pyhessian(moment: Moment, truth: EigenResult, seed: int, **asked: float) -> dict[str, Any]:
    """Its eigenvalues method on ``data``, whose graph it keeps; its products are counted as they are made."""
    problem = moment.problem
    other = pyhessian.hessian(
        deepcopy(problem.model), F.cross_entropy, data=(problem.inputs, problem.targets), cuda=False
    )
    module = importlib.import_module("pyhessian.hessian")
    product = module.hessian_vector_product
    with torch.random.fork_rng(devices=[]), patch.object(module, product.__name__, wraps=product) as counted:
        torch.manual_seed(seed)
        started = time.perf_counter()
        values, vectors = other.eigenvalues(top_n=TOP, **asked)
        seconds = time.perf_counter() - started
    columns = [torch.cat([part.detach().reshape(-1) for part in vector]) for vector in vectors]
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    order = eigenvalues.abs().argsort(descending=True)
    judged = moment.judge(eigenvalues[order], torch.stack(columns, dim=1)[:, order], truth.eigenvalues)
    return {"products": counted.call_count, "seconds": round(seconds, 3), **judged}


def by_scipy(moment: Moment, seed: int, ncv: int | None) -> dict[str, Any]:
    """ARPACK on our product; its tolerance is relative to each eigenvalue, not to the largest."""
    products = 0

    def matvec(vector: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal products
        products += 1
        return (moment.hessian @ torch.from_numpy(vector.reshape(-1).copy())).numpy()

    size = moment.hessian.shape[0]
    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float32)
    start = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    started = time.perf_counter()
    values, vectors = eigsh(operator, k=TOP, which="LA", tol=TOLERANCE, ncv=ncv, v0=start)
    seconds = time.perf_counter() - started
    order = np.argsort(values)[::-1]
    judged = moment.judge(
        torch.from_numpy(values[order].astype(np.float64)),
        torch.from_numpy(vectors[:, order]),
        moment.truth.eigenvalues,
    )
    return {"products": products, "seconds": round(seconds, 3), **judged}


def repeated(run: Callable[[int], dict[str, Any]], times: int) -> dict[str, Any]:
    runs = []
    for seed in range(times):
        runs.append(run(seed))
        print(runs[-1], flush=True)
    return gathered(runs)


def targets(cold: dict[str, Any], warm: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The worst of all starts counts."""
    return {
        COLD: common.verdict(max(cold["products"]), at_most=COLD_TARGET),
        **{
            f"{WARM}, {name}": common.verdict(max(found[WARM]["products"]), at_most=WARM_TARGET)
            for name, found in warm.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, examples=64, moments=True)
    parser.add_argument("--later", type=int, nargs="*", default=[1, 5], help="epochs of more training")
    parser.add_argument("--starts", type=int, default=3, help="random starts of ours")
    parser.add_argument("--their-starts", type=int, default=1, help="random starts of SciPy and PyHessian")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="Using backward.. with create_graph")
    problem, *later = chosen(args, args.later)

    first = Moment(problem, args.chunk)
    magnitude = first.largest_in_magnitude()
    earlier, cold_runs = zip(*(first.solve(seed) for seed in range(args.starts)), strict=True)
    summary: dict[str, Any] = {
        "eigenvalues": [round(float(value), 3) for value in first.truth.eigenvalues],
        "eigenvalues, largest in magnitude": [round(float(value), 3) for value in magnitude.eigenvalues],
        "residuals of the two truths": [
            first.judge(truth.eigenvalues, truth.eigenvectors, truth.eigenvalues)["residual"]
            for truth in (first.truth, magnitude)
        ],
        COLD: gathered(cold_runs),
        LEAN: repeated(lambda seed: first.solve(seed, max_basis=TOP + 2)[1], args.starts),
        "SciPy eigsh, tol=1e-3": repeated(lambda seed: by_scipy(first, seed, None), args.their_starts),
        "SciPy eigsh, tol=1e-3, ncv=11": repeated(lambda seed: by_scipy(first, seed, 11), args.their_starts),
        "PyHessian, defaults": repeated(lambda seed: by_pyhessian(first, magnitude, seed), args.their_starts),
        "PyHessian, tol=1e-4": repeated(
            lambda seed: by_pyhessian(first, magnitude, seed, tol=1e-4), args.their_starts
        ),
    }
    first.hessian.risk.forget()
    warm = {
        str(moment.description["problem"]): warm_starts(earlier, Moment(moment, args.chunk), first)
        for moment in later
    }
    common.write_result(
        Path(__file__).stem,
        question=f"Hessian products to the {TOP} leading eigenpairs, residuals at most {TOLERANCE} λ1",
        settings={**settings(args, problem), "tolerance": TOLERANCE, "true_tolerance": TRUTH_TOLERANCE},
        summary={**summary, **warm, "targets": targets(summary[COLD], warm)},
    )


if __name__ == "__main__":
    main()
