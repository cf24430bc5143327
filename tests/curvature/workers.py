"""Runs one of the processes of test_processes.py: python -m tests.curvature.workers RANK STORE OUT.

Called without a group, the same functions give the reference from one process.
"""

import copy
import datetime
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustdyn.curvature import (
    DiagonallyScaled,
    EmpiricalRisk,
    GaussNewton,
    GradientCovariance,
    Hessian,
    LayerTraces,
    alignment,
    cross_entropy,
    gradient_projections,
    hutchinson_trace,
    lanczos,
    layer_traces,
    projected_covariance,
    spectral_density,
    xtrace,
)
from robustdyn.curvature.minibatch_covariance import MinibatchCovariance
from tests.cases import CASES
from tests.curvature.reference import generator, random
from tests.curvature.test_minibatch_covariance import covariance
from tests.curvature.test_minibatch_covariance import problem as examples

PROCESSES = 2
PATIENCE = 20  # seconds that a process waits for the other one

Results = dict[str, object]


@dataclass(frozen=True)
class Spread:
    """A case with other numbers of examples, and how many each process holds."""

    case: str
    counts: tuple[int, ...]
    chunk_size: int
    aligned: bool  # cut into the same chunks as in one process, and added in the same order

    @property
    def name(self) -> str:
        return f"{self.case}-{'+'.join(map(str, self.counts))}-by-{self.chunk_size}"

    def problem(self) -> tuple[nn.Module, Tensor, Tensor]:
        """All examples."""
        model = CASES[self.case].problem()[0]
        examples = sum(self.counts)
        return model, random(examples, 2, 6, 6, seed=11), torch.arange(examples) % 3

    def own(self, rank: int | None) -> slice:
        """A rank's examples, or all of them."""
        if rank is None:
            return slice(None)
        first = sum(self.counts[:rank])
        return slice(first, first + self.counts[rank])

    def risk(self, group: dist.ProcessGroup | None, **changes: object) -> EmpiricalRisk:
        model, inputs, targets = self.problem()
        own = self.own(None if group is None else dist.get_rank(group))
        settings = {"chunk_size": self.chunk_size, "group": group, **changes}
        return EmpiricalRisk(model, inputs[own], targets[own], **settings)  # type: ignore[arg-type]


SPREADS = (
    Spread("preact", (5, 2), 3, aligned=False),
    Spread("preact", (5, 2), 5, aligned=True),
    Spread("conv_norm_uneven", (2, 8), 3, aligned=False),
    Spread("conv_norm_uneven", (8, 2), 4, aligned=True),
)


def measure(spread: Spread, group: dist.ProcessGroup | None) -> Results:
    """All measurements of the risk."""
    risk = spread.risk(group)
    directions = random(risk.numel, 3)
    hessian, covariance = Hessian(risk), GradientCovariance(risk)
    found: Results = {"value": risk.value(), "gradient": risk.gradient(), "examples": risk.examples}
    weights = random(risk.examples, seed=4)
    found["weighted gradient"] = risk.weighted_gradient(weights)
    found["H v"] = hessian @ directions[:, 0]
    found["H V"] = hessian @ directions
    found["G v"] = GaussNewton(risk) @ directions[:, 0]
    found["C v"] = covariance @ directions[:, 0]
    found["C sample"] = covariance.sample(generator(1))
    found["projections"] = gradient_projections(risk, directions)
    projected = projected_covariance(risk, directions)
    found["projected covariance"] = (projected.covariance, projected.standard_errors, projected.mean)

    kept = spread.risk(group, memory=10**9)
    for _ in range(2):
        found["H v, kept"] = Hessian(kept) @ directions[:, 0]
    moved = kept.at(kept.theta() + 0.1 * directions[:, 1])
    found["elsewhere"] = (moved.value(), moved.gradient(), Hessian(moved) @ directions[:, 0])

    found["exact traces"] = traces(risk, method="gauss_newton", exact_classes_up_to=10)
    found["sampled traces"] = traces(risk, method="gauss_newton", exact_classes_up_to=0)
    if spread.aligned:  # each chunk has probes of its own
        found["probed traces"] = traces(risk, method="hutchinson", exact_classes_up_to=10)

    settings = {"which": "largest", "tol": 1e-10, "max_products": 60}
    top = lanczos(hessian, 3, generator=generator(2), **settings)
    noise = lanczos(covariance, 3, generator=generator(3), **settings)
    found["eigenvalues"] = (top.eigenvalues, noise.eigenvalues)
    # signs are a matter of rounding, directions are not
    found["eigenvectors"] = [u @ u.T for u in (top.eigenvectors, noise.eigenvectors)]
    found["products"] = (top.products, noise.products)
    for name, estimator in (("hutchinson", hutchinson_trace), ("xtrace", xtrace)):
        result = estimator(hessian, 8, generator(5))
        found[name] = (result.estimate, result.standard_error, result.products)
    for name, draw in (("density", None), ("noise density", covariance.sample)):
        density = spectral_density(hessian, probes=2, steps=5, generator=generator(6), draw=draw)
        found[name] = (density.nodes, density.weights, density.masses)
    shared = alignment(
        top.eigenvalues,
        top.eigenvectors,
        gradient_projections(risk, top.eigenvectors),
        noise.eigenvalues,
        noise.eigenvectors,
        groups=4,
        randomisations=3,
        generator=generator(7),
    )
    found["alignment"] = [getattr(shared, name) for name in vars(shared) if name != "seconds"]
    return found


def traces(risk: EmpiricalRisk, **changes: object) -> Results:
    settings = {
        "method": "auto",
        "probes": 3,
        "exact_classes_up_to": 10,
        "generator": generator(8),
        "weights_only": False,
    }
    source = settings["generator"]
    result: LayerTraces = layer_traces(risk, **{**settings, **changes})
    found: Results = {key: value for key, value in vars(result).items() if key != "seconds"}
    # a generator that advanced differently on two processes would spoil later measurements
    return found | {"next": random_number(source)}


def random_number(source: object) -> Tensor:
    assert isinstance(source, torch.Generator)
    return torch.randn(1, generator=source)


# ---------------------------------------------------------------------- communication


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "reduce", "gather")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts calls of torch.distributed's collectives."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., object]:
        def call(*arguments: object, **settings: object) -> object:
            calls[name] += 1
            return originals[name](*arguments, **settings)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def communication(group: dist.ProcessGroup) -> Results:
    """The collectives of one call each."""
    risk = SPREADS[0].risk(group, memory=10**9)
    operators = {"H": Hessian(risk), "G": GaussNewton(risk), "C": GradientCovariance(risk)}
    directions = random(risk.numel, 3)
    measures: dict[str, Callable[[], object]] = {
        **{
            f"{name} v": lambda o=operator: o.matvec(directions[:, 0]) for name, operator in operators.items()
        },
        **{f"{name} V": lambda o=operator: o @ directions for name, operator in operators.items()},
        "scaled H v": lambda: DiagonallyScaled(operators["H"], directions[:, 1]).matvec(directions[:, 0]),
        "value": risk.value,
        "gradient": risk.gradient,
        "sample": lambda: operators["C"].sample(generator()),
        "projections": lambda: gradient_projections(risk, directions),
    }
    found: Results = {}
    for name, function in measures.items():
        with counted() as calls:
            function()
        found[name] = dict(calls)
    return found


# ---------------------------------------------------------------------- refusals and obstacles


def outcome(function: Callable[[], object]) -> object:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refusals(group: dist.ProcessGroup) -> Results:
    """The messages of all refusals, with a measurement in between to show that the group still works."""
    spread, rank = SPREADS[0], dist.get_rank(group)
    model, inputs, targets = spread.problem()
    own = spread.own(rank)

    def build(
        change: Callable[[nn.Module, Tensor, Tensor], None] | None = None, **settings: object
    ) -> EmpiricalRisk:
        """Build the risk, with something changed on rank 1."""
        own_model, own_inputs, own_targets = copy.deepcopy(model), inputs[own].clone(), targets[own].clone()
        if change is not None and rank == 1:
            with torch.no_grad():
                change(own_model, own_inputs, own_targets)
        return EmpiricalRisk(own_model, own_inputs, own_targets, group=group, **settings)  # type: ignore[arg-type]

    def statistics(m: nn.Module, x: Tensor, y: Tensor) -> None:
        m.bn.running_mean[0] += 1.0

    def weights(m: nn.Module, x: Tensor, y: Tensor) -> None:
        m.conv1.weight[0] += 1.0

    def infinite(m: nn.Module, x: Tensor, y: Tensor) -> None:
        x[0] = float("inf")

    def permuted(m: nn.Module, x: Tensor, y: Tensor) -> None:
        m.conv1.weight.copy_(m.conv1.weight.flip(0))

    def empty() -> EmpiricalRisk:
        count = len(inputs) if rank == 0 else 0
        return EmpiricalRisk(model, inputs[:count], targets[:count], group=group)

    def invalid_memory() -> EmpiricalRisk:
        return EmpiricalRisk(model, inputs[own], targets[own], group=group, memory=-rank)

    attempts: dict[str, Callable[[], object]] = {
        "not finite": lambda: build(infinite),
        "weights": lambda: build(weights),
        "statistics": lambda: build(statistics),
        "batch statistics": lambda: build(batchnorm="train"),
        "one empty": empty,
        "memory": invalid_memory,
        "unmeasured weights": lambda: build(weights, parameters=["linear.bias"]),
        "permuted weights": lambda: build(permuted),
    }
    found: Results = {}
    for name, attempt in attempts.items():
        result = outcome(attempt)
        found[name] = "accepted" if isinstance(result, EmpiricalRisk) else result
        found[f"{name}, afterwards"] = spread.risk(group).value()
    return found


def obstacles(group: dist.ProcessGroup) -> Results:
    """Layer traces where the Gauss-Newton identity fails on rank 1 only."""
    spread, rank = SPREADS[0], dist.get_rank(group)
    model, inputs, targets = spread.problem()
    own = spread.own(rank)
    hooked = copy.deepcopy(model)
    losses = {"hook": cross_entropy, "loss": cross_entropy}
    if rank == 1:
        layer = next(module for module in hooked.modules() if isinstance(module, torch.nn.Linear))
        layer.register_forward_hook(lambda module, inputs, output: None)
        losses["loss"] = not_convex
    found: Results = {}
    for name, measured in (("hook", hooked), ("loss", model)):
        loss = losses[name]
        risk = EmpiricalRisk(measured, inputs[own], targets[own], loss=loss, group=group, chunk_size=2)
        found[name] = traces(risk)
        found[f"{name}, demanded"] = outcome(lambda risk=risk: traces(risk, method="gauss_newton"))
    return found


def not_convex(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the probability of the target."""
    return 1 - logits.softmax(dim=1).gather(1, targets[:, None])[:, 0]


# ---------------------------------------------------------------------- minibatches


MINIBATCHES = (slice(0, 14), slice(14, 24))  # three batches of four and two over; two and two over


def minibatches(group: dist.ProcessGroup) -> Results:
    """The covariance of minibatches, each within a process, and what is refused on both."""
    rank = dist.get_rank(group)
    model, inputs, targets = examples("preact", 24)
    own = MINIBATCHES[rank]
    model.bn.running_mean += rank  # not used with batch statistics, so not compared
    found = of_minibatches(covariance(model, inputs[own], targets[own], 4, "train", group=group))
    refusals = []
    for change in ("examples", "statistics", "weights"):
        count = 3 if change == "examples" and rank == 1 else 14
        batchnorm = "train" if change == "weights" else "eval"
        if change == "weights" and rank == 1:
            model.linear.bias.data += 1.0
        few, labels = inputs[own][:count], targets[own][:count]
        refusals.append(
            outcome(lambda x=few, y=labels, b=batchnorm: covariance(model, x, y, 4, b, group=group))
        )
    return found | {"refusals": refusals}


def of_minibatches(operator: MinibatchCovariance) -> Results:
    directions = random(operator.shape[0], 2)
    top, projected, trace = operator.eigenpairs(4), operator.variances(directions), operator.trace()
    return {
        "counts": torch.tensor([operator.batches, operator.examples]),
        "product": operator @ directions,
        "mean": operator.mean,
        "gram": operator.gram(),
        "eigenvalues": top.eigenvalues,
        "projectors": torch.einsum("ik,jk->kij", top.eigenvectors, top.eigenvectors),
        "residuals": top.residuals,
        "trace": torch.tensor([trace.estimate, trace.standard_error], dtype=torch.float64),
        "variances": projected.covariance,
        "errors": projected.standard_errors,
        "projections": projected.projections,
    }


def broken(group: dist.ProcessGroup) -> Results:
    """Use a class that the model does not have, on rank 1 only; the group may lose its connection."""
    spread, rank = SPREADS[0], dist.get_rank(group)
    model, inputs, targets = spread.problem()
    own = spread.own(rank)
    labels = targets[own].clone()
    if rank == 1:
        labels[0] = 3
    result = outcome(lambda: EmpiricalRisk(model, inputs[own], labels, group=group))
    return {"class": "accepted" if isinstance(result, EmpiricalRisk) else result}


def main(rank: int, store: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    group = dist.new_group(list(range(PROCESSES)))  # not the default one
    assert group is not None
    found: Results = {spread.name: measure(spread, group) for spread in SPREADS}
    found["communication"] = communication(group)
    found["refusals"] = refusals(group)
    found["obstacles"] = obstacles(group)
    found["minibatches"] = minibatches(group)
    torch.save(found, out / f"{rank}.pt")
    found["broken"] = broken(group)
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
