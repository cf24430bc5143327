"""The Weight-Curvature Index, the terms of the bound that the papers discuss, and the norm of the gradient.

Parameters are taken as they are: BatchNorm is not folded.
"""

from dataclasses import dataclass

from robustdyn.complexity.layers import UndefinedMeasure
from robustdyn.complexity.network import (
    INVARIANCES,
    ComplexityMeasure,
    MeasureValue,
    NetworkOnExamples,
)
from robustdyn.complexity.values import trace_gradients
from robustdyn.curvature import EmpiricalRisk, LayerTraces
from robustdyn.curvature.gradient_covariance import gradient_projections
from robustdyn.theory import WeightCurvatureIndex, weight_curvature_index


@dataclass(frozen=True, eq=False)
class IndexOfLayers:
    """The index with what it was computed from.

    Attributes:
        index: Its value, error and terms.
        weights: Which of the tensors are weight matrices.
        norms: ‖W_k‖²_F of these.
    """

    index: WeightCurvatureIndex
    weights: list[int]
    norms: list[float]


def index_of_layers(risk: EmpiricalRisk, traces: LayerTraces) -> IndexOfLayers:
    """The Weight-Curvature Index over weight matrices, equation (39) of docs/theory.md.

    Args:
        risk: On the adversarial examples.
        traces: Of all its parameter tensors.
    """
    tensors = risk.parameters()
    weights = [index for index, name in enumerate(traces.names) if tensors[name].dim() > 1]
    norms = [float(tensors[traces.names[k]].detach().double().square().sum()) for k in weights]
    examples = traces.per_example
    index = weight_curvature_index(
        norms,
        traces.traces[weights].numpy(),
        standard_error=traces.standard_errors[weights].numpy() if examples is None else None,
        example_traces=None if examples is None else examples[:, weights].numpy(),
    )
    return IndexOfLayers(index, weights, norms)


def wci(network: NetworkOnExamples) -> MeasureValue:
    """Σ_k sqrt(‖W_k‖²_F · Tr H_k) over weight matrices, the Weight-Curvature Index.

    Source: arXiv 2410.07719 v1, definition 2.6. H_k is the Hessian block of the mean adversarial loss.

    Cost: a reverse pass for each class, or for each of 8 probes above ten classes, and a gradient's worth for
    the checks. The standard error is over examples, and over probes where there are any.
    """
    traces = network.layer_traces
    index = index_of_layers(network.risk, traces).index
    return MeasureValue(
        value=index.value,
        standard_error=index.standard_error,
        gradients=trace_gradients(traces.estimator, traces.products),
    )


def gradient_norm(network: NetworkOnExamples) -> MeasureValue:
    """‖∇L‖₂ of the mean adversarial loss by all parameters (Zhao, Zhang & Hu, ICML 2022).

    Cost: one gradient and one product with its graph. The standard error is over examples, to first order;
    where it is as large as the value, that is mostly noise of the examples.
    """
    gradient = network.risk.gradient()
    norm = gradient.norm()
    if not norm > 0:
        return MeasureValue(value=0.0, standard_error=0.0, gradients=1.0)
    along = gradient_projections(network.risk, (gradient / norm)[:, None])[:, 0].double()
    error = float(along.std()) / len(along) ** 0.5 if len(along) > 1 else None
    return MeasureValue(value=float(norm), standard_error=error, gradients=8 / 3)


def curvature_term(network: NetworkOnExamples) -> MeasureValue:
    """Σ λσ² over the tracked directions, from the measurement ``spectrum`` of the same epoch."""
    raise UndefinedMeasure(_NOT_KNOWN)


def log_variance_term(network: NetworkOnExamples) -> MeasureValue:
    """−Σ ln σ² over the tracked directions, from the measurement ``spectrum`` of the same epoch."""
    raise UndefinedMeasure(_NOT_KNOWN)


_NOT_KNOWN = (
    "it needs a stationary posterior variance along every tracked direction, and so the measurement spectrum "
    "and momentum SGD at a stable rate"
)

MEASURES: tuple[ComplexityMeasure, ...] = (
    ComplexityMeasure(
        name="wci",
        label="WCI",
        family="index",
        source="arXiv 2410.07719 v1, definition 2.6",
        function=wci,
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="curvature_term_top_k",
        label="Σ λσ²",
        family="index",
        source="docs/theory.md",
        function=curvature_term,
    ),
    ComplexityMeasure(
        name="log_variance_term_top_k",
        label="−Σ ln σ²",
        family="index",
        source="docs/theory.md",
        function=log_variance_term,
    ),
    ComplexityMeasure(
        name="weight_gradient_norm",
        label="‖∇L‖₂",
        family="index",
        source="Zhao, Zhang & Hu, ICML 2022",
        function=gradient_norm,
    ),
)
