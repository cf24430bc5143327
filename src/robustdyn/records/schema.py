"""The vocabulary of a run's records: every table and every column, once.

Writers validate against it, readers take their column types from it, figures and tables take their labels and
units from it. A label may carry one-letter subscripts written ``_x`` (``‖W‖²_F``); whoever shows it renders
them.

Errors are fractions in [0, 1] in records and per cent wherever people read them (``Column.shown``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "float", "str", "bool"]
Direction = Literal["lower", "higher"]

FRACTION, FRACTION_DIFFERENCE = "fraction", "difference of fractions"
_SHOWN_UNITS = {FRACTION: "%", FRACTION_DIFFERENCE: "percentage points"}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: The key in a record.
        kind: Type of its values; any but a key column may also hold null.
        unit: Unit of the recorded number; empty for a pure number, a name or a flag.
        label: Short label for figures and tables for people.
        meaning: One line that says what the number is.
        better: Which direction is better, for a metric; ``None`` for everything else.
        required: Whether every row must have the key (its value may be null).
    """

    name: str
    kind: Kind
    unit: str
    label: str
    meaning: str
    better: Direction | None = None
    required: bool = True

    @property
    def scale(self) -> float:
        """Factor from the recorded number to the one people read (100 for fractions)."""
        return 100.0 if self.unit in _SHOWN_UNITS else 1.0

    @property
    def shown_unit(self) -> str:
        """Unit of the number people read."""
        return _SHOWN_UNITS.get(self.unit, self.unit)

    @property
    def shown(self) -> str:
        """Label with the unit people read, for an axis or a table heading."""
        return f"{self.label} ({self.shown_unit})" if self.shown_unit else self.label


@dataclass(frozen=True)
class Table:
    """One table of a run: what a row is, which columns make it unique, and its columns in order."""

    name: str
    row: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]

    def __getitem__(self, name: str) -> Column:
        """The column called ``name``.

        Raises:
            KeyError: The table has no such column.
        """
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"table {self.name!r} has no column {name!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns, in order."""
        return tuple(column.name for column in self.columns)

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the columns that every row must have."""
        return tuple(column.name for column in self.columns if column.required)


_EPOCH = Column("epoch", "int", "", "epoch", "epoch the row belongs to, counted from 0")
_STEP = Column("step", "int", "steps", "step", "optimiser steps taken when the row was written")
_STEP_OPTIONAL = Column(_STEP.name, _STEP.kind, _STEP.unit, _STEP.label, _STEP.meaning, required=False)
_SECONDS = Column("seconds", "float", "s", "wall time", "wall time that the row took to compute")

_HOW = {
    "train": "running average over the epoch's training batches, each taken before its own update "
    "(as in the robust-overfitting study)",
    "test": "over the test set with the weights at the end of the epoch",
    "validation": "over the validation set with the weights at the end of the epoch",
}
_INPUTS = {"robust": "adversarial examples", "clean": "unperturbed images"}


def _metrics(split: str, required: bool = True) -> Iterator[Column]:
    """Loss and error on adversarial and unperturbed images of one split."""
    for inputs, on in _INPUTS.items():
        yield Column(
            f"{split}_{inputs}_loss",
            "float",
            "nats",
            f"{split} {inputs} loss",
            f"mean cross-entropy on {on}, {_HOW[split]}",
            "lower",
            required,
        )
        yield Column(
            f"{split}_{inputs}_error",
            "float",
            FRACTION,
            f"{split} {inputs} error",
            f"share of {on} misclassified, {_HOW[split]}",
            "lower",
            required,
        )


EPOCHS = Table(
    "epochs",
    "one finished epoch",
    ("epoch",),
    (
        _EPOCH,
        _STEP,
        Column("lr", "float", "", "learning rate η", "learning rate in force during the epoch's last step"),
        *_metrics("train"),
        *_metrics("test"),
        *_metrics("validation", required=False),
        Column(
            "robust_loss_gap",
            "float",
            "nats",
            "robust loss gap",
            "test_robust_loss − train_robust_loss",
            "lower",
        ),
        Column(
            "robust_error_gap",
            "float",
            FRACTION_DIFFERENCE,
            "robust error gap",
            "test_robust_error − train_robust_error",
            "lower",
        ),
        _SECONDS,
    ),
)


def _estimate(name: str, label: str, meaning: str, *, truncated: bool = False) -> Iterator[Column]:
    """A number estimated from random vectors, its standard error and, on request, what truncation does."""
    yield Column(name, "float", "", label, meaning)
    yield Column(
        f"{name}_se", "float", "", f"s.e. of {label}", f"standard error of {name} over random vectors"
    )
    if truncated:
        said = f"relative change of {name} if half the Lanczos steps had been taken"
        yield Column(f"{name}_truncation", "float", "", f"truncation of {label}", said)


WCI = Table(
    "wci",
    "one measured epoch",
    ("epoch",),
    (
        _EPOCH,
        _STEP,
        Column(
            "wci",
            "float",
            "",
            "WCI",
            "Weight-Curvature Index Σ_k sqrt(‖W_k‖²_F · Tr H_k) over weight matrices",
            "lower",
        ),
        Column("wci_se", "float", "", "s.e. of WCI", "standard error of wci over probes and examples"),
        Column(
            "weight_norm_sq", "float", "", "‖W‖²_F", "sum of the weight matrices' squared Frobenius norms"
        ),
        Column("hessian_trace", "float", "", "Tr H", "sum of the weight matrices' Hessian-block traces"),
        Column("hessian_trace_se", "float", "", "s.e. of Tr H", "standard error of hessian_trace"),
        Column(
            "hessian_trace_all",
            "float",
            "",
            "Tr H, all tensors",
            "Hessian trace over all parameter tensors, BatchNorm and biases included",
        ),
        Column(
            "hessian_trace_all_se",
            "float",
            "",
            "s.e. of Tr H, all tensors",
            "standard error of hessian_trace_all",
            required=False,
        ),
        Column(
            "cauchy_schwarz_bound",
            "float",
            "",
            "Cauchy–Schwarz bound",
            "sqrt(Σ‖W_k‖²_F · Σ Tr H_k), traces ≤ 0 counted as 0: never below the WCI",
        ),
        Column(
            "clamped_layers",
            "int",
            "layers",
            "clamped layers",
            "layers whose trace estimate was ≤ 0 and counted as 0",
        ),
        Column(
            "hvps",
            "int",
            "passes",
            "passes",
            "cost: reverse passes over the examples, or Hessian products restricted to a layer",
        ),
        Column(
            "examples", "int", "examples", "examples", "adversarial examples the measurement was taken on"
        ),
        Column(
            "batchnorm", "str", "", "BatchNorm mode", "BatchNorm mode during the measurement: eval or train"
        ),
        Column("estimator", "str", "", "estimator", "how the layer traces were estimated"),
        _SECONDS,
    ),
)

LAYERS = Table(
    "layers",
    "one weight matrix at one measured epoch",
    ("epoch", "layer"),
    (
        _EPOCH,
        _STEP_OPTIONAL,
        Column("layer", "str", "", "layer", "name of the weight tensor in the model"),
        Column("numel", "int", "weights", "weights", "number of weights in the tensor"),
        Column("weight_norm_sq", "float", "", "‖W_k‖²_F", "squared Frobenius norm of the tensor"),
        Column("hessian_trace", "float", "", "Tr H_k", "trace of the Hessian block of the tensor"),
        Column("hessian_trace_se", "float", "", "s.e. of Tr H_k", "standard error of hessian_trace"),
        Column(
            "wci_term",
            "float",
            "",
            "layer's WCI term",
            "sqrt(‖W_k‖²_F · Tr H_k), the tensor's share of the WCI",
        ),
        Column(
            "optimal_variance",
            "float",
            "",
            "optimal σ²_k",
            "posterior variance of the tensor that minimises the bound at β = 1",
        ),
    ),
)

SPECTRUM = Table(
    "spectrum",
    "one tracked direction at one measured epoch",
    ("epoch", "index"),
    (
        _EPOCH,
        _STEP_OPTIONAL,
        Column("index", "int", "", "direction i", "rank of the direction, 0 for the leading one"),
        Column(
            "hessian_eigenvalue",
            "float",
            "",
            "Hessian eigenvalue λ_i",
            "eigenvalue of the Hessian, adversarial examples held fixed",
        ),
        Column(
            "residual",
            "float",
            "",
            "residual of λ_i",
            "‖H u_i − λ_i u_i‖: distance of λ_i from an exact eigenvalue is at most this",
        ),
        Column(
            "curvature",
            "float",
            "",
            "curvature along u_i",
            "u_iᵀ H u_i of another attack than u_i comes from: what the laws take for λ_i",
        ),
        Column(
            "curvature_se",
            "float",
            "",
            "s.e. of the curvature",
            "standard error over examples of the Gauss–Newton part of curvature",
        ),
        Column(
            "gradient_noise",
            "float",
            "",
            "gradient noise γ_i",
            "u_iᵀ C u_i of another attack than u_i comes from, variance of the mini-batch gradient along u_i",
        ),
        Column(
            "gradient_noise_se",
            "float",
            "",
            "s.e. of γ_i",
            "standard error of gradient_noise over the measured examples",
        ),
        Column(
            "attack_noise",
            "float",
            "",
            "the attack's part of γ_i",
            "the part of gradient_noise that the attack's random start makes, which no shuffling takes back",
        ),
        Column(
            "noise_eigenvalue",
            "float",
            "",
            "noise eigenvalue",
            "the i-th largest eigenvalue of the gradient covariance C itself",
        ),
        Column(
            "noise_residual",
            "float",
            "",
            "residual of the noise eigenvalue",
            "distance of noise_eigenvalue from an exact eigenvalue of the measured C is at most this",
        ),
        Column(
            "posterior_variance_stationary",
            "float",
            "",
            "stationary σ²_i",
            "variance along u_i that momentum SGD settles to at the present learning rate",
        ),
        Column(
            "stable", "bool", "", "stable", "whether a stationary law exists along u_i: 0 < ηλ < 2(1 + μ)"
        ),
        Column("curvature_term", "float", "", "λ_i σ²_i", "the direction's share of Σ λσ²"),
        Column("log_variance_term", "float", "nats", "−ln σ²_i", "the direction's share of −Σ ln σ²"),
    ),
)

ALIGNMENT = Table(
    "alignment",
    "one measured epoch",
    ("epoch",),
    (
        _EPOCH,
        _STEP_OPTIONAL,
        Column(
            "tracked_directions",
            "int",
            "directions",
            "tracked directions",
            "number of directions k the alignment is over",
        ),
        Column(
            "commutator",
            "float",
            "",
            "relative commutator",
            "‖HC − CH‖_F / (2‖H‖_F‖C‖_F) in the tracked subspace: 0 when H and C commute there, at most ½",
        ),
        Column(
            "commutator_se",
            "float",
            "",
            "s.e. of the commutator",
            "standard error of commutator over examples",
        ),
        Column(
            "commutator_null",
            "float",
            "",
            "commutator of commuting H and C",
            "what sampling noise alone would give if H and C commuted: the commutator's zero",
        ),
        Column(
            "commutator_null_spread",
            "float",
            "",
            "spread of the null",
            "standard deviation of commutator under that hypothesis",
        ),
        Column(
            "cosine",
            "float",
            "",
            "cosine of H and C",
            "⟨H, C⟩_F / (‖H‖_F‖C‖_F) in the tracked subspace: 1 when C is a multiple of H there",
        ),
        Column("cosine_se", "float", "", "s.e. of the cosine", "standard error of cosine over examples"),
        Column(
            "subspace_overlap",
            "float",
            "",
            "subspace overlap",
            "mean squared cosine of the angles between the leading subspaces of H and C, 1 when they agree",
        ),
        Column(
            "captured_noise",
            "float",
            "",
            "captured noise",
            "noise along H's tracked directions over the noise along C's own leading directions, at most 1",
        ),
        Column(
            "total_correlation",
            "float",
            "nats",
            "total correlation",
            "½(Σ ln Σ_ii − ln det Σ) over the tracked directions, in H's eigenbasis: what non-commutation "
            "costs the bound",
        ),
        Column(
            "total_correlation_se",
            "float",
            "nats",
            "s.e. of the total correlation",
            "standard error of total_correlation over examples",
        ),
        Column(
            "total_correlation_null",
            "float",
            "nats",
            "total correlation of commuting H and C",
            "what sampling noise alone would give if H and C commuted: the total correlation's zero",
        ),
        Column(
            "total_correlation_null_spread",
            "float",
            "nats",
            "spread of the null",
            "standard deviation of total_correlation under that hypothesis",
        ),
        Column(
            "examples", "int", "examples", "examples", "adversarial examples the measurement was taken on"
        ),
    ),
)

BOUNDS = Table(
    "bounds",
    "one measured epoch",
    ("epoch",),
    (
        _EPOCH,
        _STEP,
        Column("train_examples", "int", "examples", "n", "size of the training set"),
        Column("batch_size", "int", "examples", "B", "examples of a mini-batch, over all devices"),
        Column(
            "tracked_directions",
            "int",
            "directions",
            "tracked directions",
            "number of leading Hessian directions k tracked",
        ),
        Column(
            "unstable_directions",
            "int",
            "directions",
            "unstable directions",
            "tracked directions without a stationary law; with any, the sums have no value",
        ),
        Column(
            "curvature_term_top_k",
            "float",
            "",
            "Σ λσ²",
            "Σ λ_i σ²_i over the tracked top k directions only",
            "lower",
        ),
        Column(
            "log_variance_term_top_k",
            "float",
            "nats",
            "−Σ ln σ²",
            "−Σ ln σ²_i over the tracked top k directions only",
            "lower",
        ),
        Column(
            "dominant_terms_top_k",
            "float",
            "",
            "Σ λσ² − Σ ln σ²",
            "sum of the two dominant terms over the tracked top k directions only: not the bound of the "
            "whole model",
            "lower",
        ),
    ),
)

DENSITY = Table(
    "density",
    "one node of one random vector's quadrature at one measured epoch",
    ("epoch", "kind", "probe", "index"),
    (
        _EPOCH,
        _STEP_OPTIONAL,
        Column("kind", "str", "", "kind", "what is spread over H's spectrum: hessian (eigenvalues) or noise"),
        Column("probe", "int", "", "random vector", "number of the random vector"),
        Column("index", "int", "", "node", "rank of the node, 0 for the smallest"),
        Column(
            "ritz_value",
            "float",
            "",
            "Hessian eigenvalue λ",
            "the node: a Ritz value of the Hessian, adversarial examples held fixed",
        ),
        Column(
            "mass",
            "float",
            "",
            "mass",
            "the node's weight: a number of eigenvalues (hessian) or a part of Tr C (noise), to be averaged "
            "over random vectors",
        ),
    ),
)

WHOLE_SPACE = Table(
    "whole_space",
    "one measured epoch",
    ("epoch",),
    (
        _EPOCH,
        _STEP,
        *_estimate("hessian_trace", "Tr H, sampled", "Hessian trace over all parameters, from random signs"),
        *_estimate("hessian_squared_norm", "‖H‖²_F", "Tr H², sum of all squared Hessian eigenvalues"),
        *_estimate(
            "hessian_negative_trace",
            "Tr H, negative part",
            "sum of the Hessian's negative eigenvalues, over all directions",
            truncated=True,
        ),
        *_estimate(
            "negative_share",
            "share of λ ≤ 0",
            "share of all Hessian eigenvalues at or below zero; read it with negative_share_resolution",
        ),
        Column(
            "negative_share_resolution",
            "float",
            "",
            "resolution of the share",
            "what negative_share may be off by beside its standard error, because eigenvalues about zero are "
            "not told apart",
        ),
        *_estimate(
            "noise_trace", "Tr C", "trace of the mini-batch gradient's covariance, over all directions"
        ),
        *_estimate(
            "noise_share_nonpositive",
            "share of Tr C, λ ≤ 0",
            "share of noise_trace along directions of curvature at or below zero",
        ),
        *_estimate(
            "noise_share_unstable",
            "share of Tr C, unstable",
            "share of noise_trace along directions too sharp for a stationary law, η(λ + ω) ≥ 2(1 + μ)",
        ),
        *_estimate(
            "curvature_term_positive_stable",
            "Σ λσ², λ > 0 and stable",
            "Σ λ_i σ²_i of the stationary posterior over all directions with λ_i > 0 that have one",
            truncated=True,
        ),
        Column("products", "int", "products", "products", "products with the Hessian"),
        _SECONDS,
    ),
)

RATES = Table(
    "rates",
    "one change of the learning rate",
    ("step",),
    (
        Column("epoch", "int", "", "epoch", "epoch in which the rate was first used"),
        Column("step", "int", "steps", "step", "optimiser steps taken before the first one at this rate"),
        Column("lr", "float", "", "learning rate η", "learning rate from this step on"),
    ),
)

POSTERIOR = Table(
    "posterior",
    "one tracked direction after one epoch",
    ("epoch", "index"),
    (
        _EPOCH,
        _STEP,
        Column("index", "int", "", "direction i", "rank of the direction, 0 for the leading one"),
        Column(
            "posterior_variance",
            "float",
            "",
            "σ²_i",
            "variance along u_i at this time, through the run's rates and measured spectra, with shuffled "
            "epochs as in training and curvature at fixed adversarial examples",
        ),
        Column(
            "posterior_variance_independent",
            "float",
            "",
            "σ²_i of independent batches",
            "the same if every step drew its batch independently, as the papers assume",
        ),
        Column(
            "posterior_variance_stationary",
            "float",
            "",
            "stationary σ²_i",
            "variance along u_i that the epoch's last step would settle to",
        ),
    ),
)

COSTS = Table(
    "costs",
    "one part of the measurement at one measured epoch",
    ("epoch", "part"),
    (
        _EPOCH,
        _STEP,
        Column("part", "str", "", "part", "what was computed; 'all' is the whole, its attack included"),
        Column("products", "int", "products", "products", "products with the operator"),
        Column("converged", "bool", "", "converged", "whether every pair met the tolerance"),
        Column("warm", "bool", "", "warm start", "whether it started from the last measured epoch's result"),
        _SECONDS,
    ),
)

TIMED: dict[str, str] = {
    "attack": "making the training examples",
    "step": "the rest of the training steps: forward and backward passes, perturbation, optimiser",
    "data": "between training steps: making the next batch, callbacks, the loop itself",
    "evaluation": "the evaluation, its attack included",
    "measurement": "measuring, its attack included",
}
"""What an epoch's time is divided into, and what each part holds."""

TIMING = Table(
    "timing",
    "one finished epoch",
    ("epoch",),
    (
        _EPOCH,
        _STEP,
        Column(
            "images_per_second",
            "float",
            "images/s",
            "training speed",
            "training images over the time of attack, step and data, all ranks together",
        ),
        *(
            Column(f"{name}_share", "float", FRACTION, f"time in {name}", f"share of the wall time: {holds}")
            for name, holds in TIMED.items()
        ),
        _SECONDS,
    ),
)

OUTCOMES = Table(
    "outcomes",
    "one example under one attack of an evaluation",
    ("evaluator", "index"),
    (
        Column("evaluator", "str", "", "attack", "name of the attack; 'clean' for the unattacked images"),
        Column("index", "int", "", "example", "position in the evaluated split, counted from 0"),
        Column("label", "int", "", "label", "class of the example"),
        Column(
            "prediction", "int", "", "prediction", "class that the model predicts for the unattacked image"
        ),
        Column(
            "attacked",
            "bool",
            "",
            "attacked",
            "false for examples wrong unattacked or broken by an earlier attack of the same ensemble",
        ),
        Column("robust", "bool", "", "robust", "whether the model is still right after this attack"),
        Column(
            "zero_gradient",
            "bool",
            "",
            "zero gradient",
            "whether the cross-entropy's gradient at the unattacked image is exactly zero or not finite",
            required=False,
        ),
        Column("seconds", "float", "s", "wall time", "wall time of the example's batch over its examples"),
    ),
)

EVALUATION = Table(
    "evaluation",
    "one attack, ensemble or summary of an evaluation",
    ("evaluator",),
    (
        Column(
            "evaluator",
            "str",
            "",
            "attack",
            "name of the attack or ensemble; 'clean', or 'worst_case': right under every attack",
        ),
        Column("examples", "int", "", "examples", "number of examples"),
        Column("accuracy", "float", FRACTION, "accuracy", "share of the examples that stay right", "higher"),
        Column(
            "accuracy_se",
            "float",
            FRACTION,
            "s.e. of accuracy",
            "binomial standard error of accuracy, for examples drawn at random",
        ),
        Column("norm", "str", "", "norm", "norm of the ball"),
        Column("eps", "float", "", "ε", "radius of the ball on the [0, 1] pixel scale"),
        Column("loss", "str", "", "loss", "what the attack climbs, where it is ours"),
        Column("step_size", "float", "", "step", "step size on the [0, 1] pixel scale"),
        Column("steps", "int", "", "steps", "gradient steps of a start; queries of a black-box attack"),
        Column("restarts", "int", "", "restarts", "starts, or target classes of a targeted attack"),
        _SECONDS,
    ),
)

WARNINGS = Table(
    "warnings",
    "one sign that an evaluation may overstate robustness",
    ("check", "evaluator"),
    (
        Column("check", "str", "", "check", "name of the check"),
        Column("evaluator", "str", "", "attack", "attack it concerns; 'model' for none"),
        Column("message", "str", "", "message", "what was seen"),
    ),
)

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        EPOCHS,
        RATES,
        WCI,
        LAYERS,
        SPECTRUM,
        ALIGNMENT,
        BOUNDS,
        DENSITY,
        WHOLE_SPACE,
        POSTERIOR,
        COSTS,
        TIMING,
    )
}
"""Tables of a run directory."""

EVALUATION_TABLES: dict[str, Table] = {t.name: t for t in (OUTCOMES, EVALUATION, WARNINGS)}
"""Tables of an evaluation's directory: they have no epochs."""


def table(name: str) -> Table:
    """The table called ``name``, of a run or of an evaluation.

    Raises:
        ValueError: There is no such table; the message lists the known ones.
    """
    known = TABLES | EVALUATION_TABLES
    if name not in known:
        raise ValueError(f"unknown table {name!r}: known are {', '.join(known)}")
    return known[name]
