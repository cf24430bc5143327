"""What do the Hessian-block traces of a PreActResNet-18's 21 weight tensors cost, and how right are they?

Ours, exact and sampled, against the usual per-layer Hutchinson estimator (double backward through a kept
graph, random signs on one tensor at a time) and against the shortcut that reads all layers off one product.
Exact traces and single products take turns. What the noisy estimators cost to a standard error of 10 % on
every tensor is extrapolated: (measured standard deviation of one probe / 10 %)² probes, times the measured
seconds of one.

    python experiments/benchmarks/layer_traces.py [--width 16] [--examples 128] [--probes 100]
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from curvature_problem import PLENTY, Plain, Problem, add_arguments, chosen, settings
from torch import Tensor

from robustdyn.curvature import EmpiricalRisk, Hessian, LayerTraces, layer_traces
from robustdyn.curvature.probes import rademacher

EXACT, PLAIN_PRODUCT, OUR_PRODUCT = (
    "exact traces",
    "plain PyTorch's Hessian product, graph not kept",
    "our Hessian product, graph not kept",
)
CLASSES = 10  # at most so many are exact
ERROR = 0.1
TOO_FAR = 4.5  # standard errors; of 21 honest differences the largest is about 2.3, more with skewed probes
MOST_PRODUCTS, LEAST_GAIN = 5.0, 25.0


def measure(risk: EmpiricalRisk, *, exact_up_to: int, probes: int, seed: int) -> LayerTraces:
    return layer_traces(
        risk,
        method="auto",
        probes=probes,
        exact_classes_up_to=exact_up_to,
        generator=torch.Generator().manual_seed(seed),
        weights_only=True,
    )


@dataclass(frozen=True)
class Samples:
    """Single-probe estimates (probes, L) of the L traces, and the seconds of each."""

    values: Tensor
    seconds: Tensor

    def spread(self, truth: Tensor) -> Tensor:
        """Standard deviation of one probe relative to the trace (L,)."""
        return self.values.std(dim=0) / truth.abs()

    def needed(self, truth: Tensor) -> Tensor:
        """Probes to the wanted standard error (L,)."""
        return (self.spread(truth) / ERROR).square().ceil().clamp(min=1)

    def standard_scores(self, truth: Tensor) -> Tensor:
        """Distance of the mean from the trace in its standard errors (L,)."""
        errors = self.values.std(dim=0) / math.sqrt(len(self.values))
        return (self.values.mean(dim=0) - truth) / errors


def per_layer_hutchinson(plain: Plain, names: Sequence[str], probes: int) -> tuple[Samples, float]:
    """One tensor at a time through kept graphs; and the seconds that recording the graphs took."""
    parameters = dict(plain.model.named_parameters())
    weights = tuple(parameters[name] for name in names)
    started = time.perf_counter()
    graphs = plain.kept_gradients(weights)
    recording = time.perf_counter() - started
    draws = torch.Generator().manual_seed(1)
    values = torch.zeros(probes + 1, len(names), dtype=torch.float64)
    seconds = torch.zeros_like(values)
    for probe in range(probes + 1):
        for layer, weight in enumerate(weights):
            started = time.perf_counter()
            signs = rademacher(tuple(weight.shape), draws, weight.dtype, weight.device)
            for gradient in graphs:
                (product,) = torch.autograd.grad(gradient[layer], weight, signs, retain_graph=True)
                values[probe, layer] += float((signs * product).sum()) / plain.examples
            seconds[probe, layer] = time.perf_counter() - started
    return Samples(values[1:], seconds[1:]), recording  # the first probe warmed up


def one_product_shortcut(problem: Problem, chunk: int | None, names: Sequence[str], probes: int) -> Samples:
    """v_kᵀ(Hv)_k of every tensor from one product with a whole random sign vector."""
    risk = problem.risk(chunk, memory=PLENTY)
    hessian = Hessian(risk)
    draws = torch.Generator().manual_seed(2)
    values = torch.zeros(probes, len(names), dtype=torch.float64)
    seconds = torch.zeros(probes, 1, dtype=torch.float64)
    for probe in range(probes):
        started = time.perf_counter()
        signs = rademacher((risk.numel,), draws, risk.dtype, risk.device)
        forms = risk.split(signs * (hessian @ signs))
        values[probe] = torch.stack([forms[name].double().sum() for name in names])
        seconds[probe] = time.perf_counter() - started
    return Samples(values, seconds)


def sampled_errors(risk: EmpiricalRisk, truth: LayerTraces, probes: int, draws: int) -> dict[str, Any]:
    """Root-mean-square error over fresh draws, relative to the exact trace."""
    found = [measure(risk, exact_up_to=0, probes=probes, seed=seed) for seed in range(draws)]
    deviations = torch.stack([(traces.traces - truth.traces) / truth.traces for traces in found])
    errors = deviations.square().mean(dim=0).sqrt()
    return {
        "relative error, median tensor": round(float(errors.median()), 4),
        "relative error, worst tensor": round(float(errors.max()), 4),
        "seconds, median": round(statistics.median(traces.seconds for traces in found), 4),
        "draws": draws,
    }


def hutchinson_report(
    samples: Samples, recording: float, truth: LayerTraces, exact_seconds: float
) -> dict[str, Any]:
    """What the usual estimator would cost."""
    each = samples.seconds.median(dim=0).values
    needed = samples.needed(truth.traces)
    total = float((needed * each).sum()) + recording
    return {
        "seconds per probe, all tensors": round(float(each.sum()), 4),
        "relative sd per probe, median tensor": round(float(samples.spread(truth.traces).median()), 4),
        "relative sd per probe, worst tensor": round(float(samples.spread(truth.traces).max()), 4),
        "probes, all tensors, to 10 % each": int(needed.sum()),
        "seconds to 10 % on every tensor, extrapolated": round(total, 2),
        "seconds, in exact traces": round(total / exact_seconds, 2),
        "largest distance from the exact traces, in standard errors": round(
            float(samples.standard_scores(truth.traces).abs().max()), 2
        ),
        "measured probes": len(samples.values),
    }


def shortcut_report(samples: Samples, truth: LayerTraces, exact_seconds: float) -> dict[str, Any]:
    """What reading every layer off one product would cost."""
    spread, needed = samples.spread(truth.traces), samples.needed(truth.traces)
    each = float(samples.seconds[1:].median())  # the first records the graph
    return {
        "relative sd per product, median tensor": round(float(spread.median()), 3),
        "relative sd per product, worst tensor": round(float(spread.max()), 3),
        "products to 10 % on every tensor, extrapolated": int(needed.max()),
        "seconds, in exact traces": round(float(needed.max()) * each / exact_seconds, 2),
        "measured products": len(samples.values),
    }


def per_tensor(truth: LayerTraces, samples: Samples) -> dict[str, dict[str, float]]:
    spread, needed = samples.spread(truth.traces), samples.needed(truth.traces)
    each = samples.seconds.median(dim=0).values
    return {
        name: {
            "trace": round(float(truth.traces[place]), 4),
            "hutchinson_relative_sd": round(float(spread[place]), 4),
            "hutchinson_probes_to_10_percent": int(needed[place]),
            "hutchinson_seconds_per_probe": round(float(each[place]), 5),
        }
        for place, name in enumerate(truth.names)
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, examples=128)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds of traces and products")
    parser.add_argument("--probes", type=int, default=100, help="per tensor, of the usual estimator")
    parser.add_argument("--draws", type=int, default=10, help="of our sampled estimator, to see its error")
    parser.add_argument("--products", type=int, default=20, help="of the one-product shortcut")
    args = parser.parse_args(arguments)
    (problem,) = chosen(args)

    risk, plain = problem.risk(args.chunk), Plain(problem, args.chunk)
    hessian = Hessian(risk)
    vector = rademacher((risk.numel,), torch.Generator().manual_seed(0), risk.dtype, risk.device)
    truth = measure(risk, exact_up_to=CLASSES, probes=1, seed=0)
    if truth.estimator != "gauss_newton_exact":
        raise SystemExit(f"no exact traces here: {truth.reason}")
    variants = {
        EXACT: lambda: measure(risk, exact_up_to=CLASSES, probes=1, seed=0),
        "sampled traces, 1 probe": lambda: measure(risk, exact_up_to=0, probes=1, seed=0),
        "sampled traces, 4 probes": lambda: measure(risk, exact_up_to=0, probes=4, seed=0),
        PLAIN_PRODUCT: lambda: plain.product(vector),
        OUR_PRODUCT: lambda: hessian @ vector,
    }
    for call in variants.values():
        call()
    times = common.alternate({name: common.timed(call) for name, call in variants.items()}, args.rounds)
    exact_seconds = statistics.median(times[EXACT])

    usual, recording = per_layer_hutchinson(plain, truth.names, args.probes)
    hutchinson = hutchinson_report(usual, recording, truth, exact_seconds)
    if not float(usual.standard_scores(truth.traces).abs().max()) <= TOO_FAR:
        raise SystemExit(f"the usual estimator and the exact traces do not agree: {hutchinson}")
    shortcut = one_product_shortcut(problem, args.chunk, truth.names, args.products)
    common.write_result(
        Path(__file__).stem,
        question="Cost and error of the Hessian-block traces of all weight tensors (no BatchNorm, no biases)",
        settings={**settings(args, problem), "tensors": len(truth.names), "rounds": args.rounds},
        summary={
            **{
                f"against {unit}": common.compare(times, baseline=unit)
                for unit in (PLAIN_PRODUCT, OUR_PRODUCT)
            },
            "sampled, 1 probe": sampled_errors(risk, truth, 1, args.draws),
            "sampled, 4 probes": sampled_errors(risk, truth, 4, args.draws),
            "usual per-layer Hutchinson": hutchinson,
            "one-product shortcut": shortcut_report(shortcut, truth, exact_seconds),
            "by tensor": per_tensor(truth, usual),
            "targets": {
                "exact traces, in plain products": common.verdict(
                    common.median_ratio(times, EXACT, PLAIN_PRODUCT), at_most=MOST_PRODUCTS
                ),
                "exact traces, in our products": common.verdict(
                    common.median_ratio(times, EXACT, OUR_PRODUCT), at_most=MOST_PRODUCTS
                ),
                "usual estimator at 10 %, in exact traces": common.verdict(
                    hutchinson["seconds, in exact traces"], at_least=LEAST_GAIN
                ),
            },
        },
        rounds=times,
    )


if __name__ == "__main__":
    main()
