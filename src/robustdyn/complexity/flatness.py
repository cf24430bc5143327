"""Flatness at the weights: traces and the largest eigenvalue of the Hessian, and the trace of the Fisher.

All are of the mean loss on the adversarial examples, which are held fixed. BatchNorm uses its running
statistics, and its weights and biases are parameters like all others; nothing is folded.
"""

import torch
from torch import Tensor, nn

from robustdyn.complexity.layers import UndefinedMeasure
from robustdyn.complexity.network import (
    INVARIANCES,
    ComplexityMeasure,
    MeasureValue,
    NetworkOnExamples,
)
from robustdyn.complexity.values import FORWARD, HESSIAN_PRODUCT, mean_over_examples, trace_gradients
from robustdyn.curvature import EmpiricalRisk, Hessian, hutchinson_trace, lanczos
from robustdyn.curvature.example_gradients import UnsupportedPassError
from robustdyn.curvature.gauss_newton_blocks import example_gradient_norms, identity_obstacle
from robustdyn.curvature.tape import gradients
from robustdyn.defaults import default

_LANCZOS_TOLERANCE, _LANCZOS_PRODUCTS = 1e-2, 20


def hessian_trace(network: NetworkOnExamples) -> MeasureValue:
    """Tr H = Σ_k Tr H_kk over all parameter tensors.

    Source: Yao et al. (PyHessian, 2020). For piecewise linear networks it is the exact sum over classes of
    ``robustdyn.curvature.layer_traces``, or above ten classes a sampled one. Other networks get Hutchinson's
    estimate with 8 products of the whole Hessian.

    Cost: a reverse pass for each class or probe and a gradient's worth for the checks, 7 2/3 gradients with
    ten classes; with Hutchinson's estimate 24. The standard error is over examples, or over probes with
    Hutchinson's.
    """
    risk, generator = network.risk, network.generator("hessian-trace")
    if identity_obstacle(risk, risk.names, generator) is not None:
        probes = default("measure/default", "measurements.weight_curvature.probes")
        sampled = hutchinson_trace(Hessian(risk), probes, generator)
        return MeasureValue(
            value=sampled.estimate,
            standard_error=sampled.standard_error,
            gradients=HESSIAN_PRODUCT * sampled.products,
        )
    exact = network.layer_traces
    return MeasureValue(
        value=float(exact.traces.sum()),
        standard_error=exact.sum_standard_error(range(len(exact.names))),
        gradients=trace_gradients(exact.estimator, exact.products),
    )


def hessian_lambda_1(network: NetworkOnExamples) -> MeasureValue:
    """λ_1, the largest eigenvalue of H.

    Source: Keskar et al. (ICLR 2017), section 2.2, and Yao et al. (PyHessian, 2020). Lanczos stops once the
    residual is 1 % of the eigenvalue, whose own error is then of the order of 0.01 %.

    Cost: 3 gradients for each of at most 20 products with H; usually 5 to 12 are enough. It samples nothing
    but its start.
    """
    found = lanczos(
        Hessian(network.risk),
        1,
        tol=_LANCZOS_TOLERANCE,
        max_products=_LANCZOS_PRODUCTS,
        generator=network.generator("lambda-1"),
    )
    value, residual = float(found.eigenvalues[0]), float(found.residuals[0])
    if residual > _LANCZOS_TOLERANCE * abs(value):
        raise UndefinedMeasure(
            f"Lanczos found no eigenvalue within {found.products} products: the residual of {value:.3g} is "
            f"still {residual:.2g}"
        )
    return MeasureValue(value=value, gradients=HESSIAN_PRODUCT * found.products)


def fisher_trace(network: NetworkOnExamples) -> MeasureValue:
    """(1/m) Σ_i ‖∇ℓ_i‖², the trace of the empirical Fisher matrix, which takes the true labels.

    Source: Jastrzebski et al. (ICML 2021), section 2, with labels from the data in place of labels drawn from
    the network's predictions. The trace of the latter is Tr H for piecewise linear networks, so that it would
    say nothing new.

    Cost: 1 1/2 gradients; one pass gives the norms of all examples, and the rest is for the checks. Networks
    that these refuse pass example by example, which takes as many operations and more time. The standard
    error is over examples.
    """
    risk, generator = network.risk, network.generator("fisher-trace")
    if not risk.independent:
        raise UndefinedMeasure(
            "an example has no gradient of its own: its loss depends on the other examples"
        )
    if identity_obstacle(risk, risk.names, generator) is None:
        try:
            norms = example_gradient_norms(risk, risk.names).sum(dim=1)
            return mean_over_examples(norms, gradients=1.5)
        except UnsupportedPassError:
            pass  # some examples take another path through the network
    return mean_over_examples(risk.shards.rows(_norms_one_by_one(risk)), gradients=1.5)


def _norms_one_by_one(risk: EmpiricalRisk) -> Tensor:
    """‖∇ℓ_i‖² of this process's examples, (m,) float64."""
    norms = torch.zeros(risk.held, dtype=torch.float64, device=risk.device)
    with risk.guard():
        leaves = risk.leaves()
        for example in range(risk.held):
            loss = risk.losses(leaves, *risk.subset(slice(example, example + 1))).sum()
            for slope in gradients(loss, tuple(leaves.values())):
                norms[example] += slope.double().square().sum()
    return norms


def relative_flatness(network: NetworkOnExamples) -> MeasureValue:
    """κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr H_ss' of the last layer, whose logits are z = W φ + b; w_s is a row of W.

    Source: Petzka et al. (NeurIPS 2021), definition 3, for the layer that maps the features φ before the
    output to the logits. There H_ss' = (1/m) Σ_i Λ_ss' φ φᵀ with Λ = diag(p) − p pᵀ of the softmax p, so that

        κ = (1/m) Σ_i ‖φ_i‖² (Σ_s p_s ‖w_s‖² − ‖Σ_s p_s w_s‖²).

    Cost: a forward pass, 1/3 of a gradient. The standard error is over examples.
    """
    risk, rows = network.risk, []
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def remember(layer: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if arguments:  # a layer called by keywords is not seen
            seen.append((arguments[0], layer.weight.detach(), output))

    layers = [module for module in risk.model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(remember) for layer in layers]
    try:
        with risk.guard(), torch.no_grad():
            for inputs, _ in risk.chunks():
                seen.clear()
                logits = risk.outputs(risk.parameters(), inputs)
                last = [(features, weight) for features, weight, output in seen if output is logits]
                if not last or last[0][0].dim() != 2:
                    raise UndefinedMeasure("the logits are not the output of a linear layer")
                rows.append(_softmax_form(*last[0], logits))
    finally:
        for handle in handles:
            handle.remove()
    return mean_over_examples(risk.shards.rows(torch.cat(rows)), gradients=FORWARD)


def _softmax_form(features: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    """‖φ_i‖² Tr(Wᵀ Λ_i W), (m,), of features (m, d), weight (K, d) and logits (m, K)."""
    weight, p = weight.double(), logits.double().softmax(dim=1)
    spread = p @ weight.square().sum(dim=1) - (p @ weight).square().sum(dim=1)
    form: Tensor = features.double().square().sum(dim=1) * spread.clamp_min(
        0.0
    )  # below zero by rounding only
    return form


MEASURES: tuple[ComplexityMeasure, ...] = (
    ComplexityMeasure(
        name="hessian_trace",
        label="Tr H",
        family="flatness",
        source="Yao et al., PyHessian, 2020",
        function=hessian_trace,
    ),
    ComplexityMeasure(
        name="hessian_lambda_1",
        label="λ₁",
        family="flatness",
        source="Keskar et al., ICLR 2017, section 2.2",
        function=hessian_lambda_1,
        searches=True,
    ),
    ComplexityMeasure(
        name="fisher_trace",
        label="Tr F",
        family="flatness",
        source="Jastrzebski et al., ICML 2021, section 2",
        function=fisher_trace,
    ),
    ComplexityMeasure(
        name="relative_flatness",
        label="relative flatness",
        family="flatness",
        source="Petzka et al., NeurIPS 2021, definition 3",
        function=relative_flatness,
        invariances=INVARIANCES,
    ),
)
