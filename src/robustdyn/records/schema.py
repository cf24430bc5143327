"""Declares every table and every column of a run's records, each once.

Writers validate against it, readers take their column types from it, and figures and tables take their labels
and units from it. A label may have one-letter subscripts, written ``_x`` as in ``‖W‖²_F``, which are rendered
where the label is shown.

Errors are fractions in [0, 1] in records and per cent wherever people read them (``Column.shown``).
"""

from __future__ import annotations

from robustdyn.records.columns import FRACTION, Table, parse_table

# The names of columns that several modules read or write.
TRAIN_ROBUST_LOSS = "train_robust_loss"
TRAIN_ROBUST_ERROR = "train_robust_error"
TEST_ROBUST_LOSS = "test_robust_loss"
TEST_ROBUST_ERROR = "test_robust_error"
TEST_CLEAN_ERROR = "test_clean_error"
ROBUST_LOSS_GAP = "robust_loss_gap"
ROBUST_ERROR_GAP = "robust_error_gap"
WCI_SE = "wci_se"
WEIGHT_NORM_SQ = "weight_norm_sq"
HESSIAN_TRACE = "hessian_trace"
CAUCHY_SCHWARZ_BOUND = "cauchy_schwarz_bound"
WCI_TERM = "wci_term"
HESSIAN_EIGENVALUE = "hessian_eigenvalue"
GRADIENT_NOISE = "gradient_noise"
NOISE_EIGENVALUE = "noise_eigenvalue"
POSTERIOR_VARIANCE_STATIONARY = "posterior_variance_stationary"
CURVATURE_TERM = "curvature_term"
LOG_VARIANCE_TERM = "log_variance_term"
BEST_RATE = "best_rate_top_k"
BEST_RATE_SE = "best_rate_top_k_se"
TRACKED_DIRECTIONS = "tracked_directions"
COMMUTATOR_NULL = "commutator_null"
SUBSPACE_OVERLAP = "subspace_overlap"
CAPTURED_NOISE = "captured_noise"
TOTAL_CORRELATION = "total_correlation"
TOTAL_CORRELATION_NULL = "total_correlation_null"
RITZ_VALUE = "ritz_value"
REFRESHED_SLOPE = "refreshed_slope"
SLOPE_RATIO = "refreshed_slope_ratio"
POSTERIOR_VARIANCE = "posterior_variance"
PROPAGATED_VARIANCE = "propagated_variance"
INJECTED_VARIANCE = "injected_variance"
INDEPENDENT = "_independent"  # ending of the columns of the papers' law
ACCURACY_SE = "accuracy_se"

_HOW = {
    "train": "running average over the epoch's training batches, each taken before its own update "
    "(as in the robust-overfitting study)",
    "test": "over the test set with the weights at the end of the epoch",
    "validation": "over the validation set with the weights at the end of the epoch",
}
_INPUTS = {"robust": "adversarial examples", "clean": "unperturbed images"}


def _metrics(split: str, flag: str = "") -> str:
    """Loss and error on adversarial and unperturbed images of one split."""
    return "\n    ".join(
        f"{split}_{inputs}_loss float nats | {split} {inputs} loss"
        f" | mean cross-entropy on {on}, {_HOW[split]} | lower{flag}\n"
        f"    {split}_{inputs}_error float {FRACTION} | {split} {inputs} error"
        f" | share of {on} misclassified, {_HOW[split]} | lower{flag}"
        for inputs, on in _INPUTS.items()
    )


EPOCHS = parse_table(f"""
    epochs | one finished epoch | epoch
    epoch
    step
    lr float | learning rate η | learning rate in force during the epoch's last step
    {_metrics("train")}
    {_metrics("test")}
    {_metrics("validation", " | optional")}
    robust_loss_gap float nats | robust loss gap | test_robust_loss − train_robust_loss | lower
    robust_error_gap float difference of fractions | robust error gap | test_robust_error −
        train_robust_error | lower
    seconds
""")

RATES = parse_table("""
    rates | one change of the learning rate | step
    epoch int | epoch | epoch in which the rate was first used
    step int steps | step | optimiser steps taken before the first one at this rate
    lr float | learning rate η | learning rate from this step on
""")

WCI = parse_table("""
    wci | one measured epoch | epoch
    epoch
    step
    wci float | WCI | Weight-Curvature Index Σ_k sqrt(‖W_k‖²_F · Tr H_k) over weight matrices | lower
    wci_se float | s.e. of WCI | standard error of wci over probes and examples
    weight_norm_sq float | ‖W‖²_F | sum of the weight matrices' squared Frobenius norms
    hessian_trace float | Tr H | sum of the weight matrices' Hessian-block traces
    hessian_trace_se float | s.e. of Tr H | standard error of hessian_trace
    hessian_trace_all float | Tr H, all tensors | Hessian trace over all parameter tensors, BatchNorm and
        biases included
    hessian_trace_all_se float | s.e. of Tr H, all tensors | standard error of hessian_trace_all | optional
    cauchy_schwarz_bound float | Cauchy–Schwarz bound | sqrt(Σ‖W_k‖²_F · Σ Tr H_k), traces ≤ 0 counted as 0:
        never below the WCI
    clamped_layers int layers | clamped layers | layers whose trace estimate was ≤ 0 and counted as 0
    hvps int passes | passes | cost: reverse passes over the examples, or Hessian products restricted to a
        layer
    examples int examples | examples | adversarial examples the measurement was taken on
    batchnorm str | BatchNorm mode | BatchNorm mode during the measurement: eval or train
    estimator str | estimator | how the layer traces were estimated
    seconds
""")

LAYERS = parse_table("""
    layers | one weight matrix at one measured epoch | epoch layer
    epoch
    step | optional
    layer str | layer | name of the weight tensor in the model
    numel int weights | weights | number of weights in the tensor
    weight_norm_sq float | ‖W_k‖²_F | squared Frobenius norm of the tensor
    hessian_trace float | Tr H_k | trace of the Hessian block of the tensor
    hessian_trace_se float | s.e. of Tr H_k | standard error of hessian_trace
    wci_term float | layer's WCI term | sqrt(‖W_k‖²_F · Tr H_k), the tensor's share of the WCI
    optimal_variance float | optimal σ²_k | posterior variance of the tensor that minimises the bound at β =
        1
""")

SPECTRUM = parse_table("""
    spectrum | one tracked direction at one measured epoch | epoch index
    epoch
    step | optional
    index int | direction i | rank of the direction, 0 for the leading one
    hessian_eigenvalue float | Hessian eigenvalue λ_i | eigenvalue of the Hessian, adversarial examples held
        fixed
    residual float | residual of λ_i | ‖H u_i − λ_i u_i‖: distance of λ_i from an exact eigenvalue is at most
        this
    curvature float | curvature along u_i | u_iᵀ H u_i of another attack than u_i comes from: what the laws
        take for λ_i
    curvature_se float | s.e. of the curvature | standard error over examples of the Gauss–Newton part of
        curvature
    gradient_noise float | gradient noise γ_i | u_iᵀ C u_i of another attack than u_i comes from, variance of
        the mini-batch gradient along u_i
    gradient_noise_se float | s.e. of γ_i | standard error of gradient_noise over the measured examples
    attack_noise float | the attack's part of γ_i | the part of gradient_noise that the attack's random start
        makes, with all added noise, which no shuffling takes back
    noise_eigenvalue float | noise eigenvalue | the i-th largest eigenvalue of the gradient covariance C
        itself
    noise_residual float | residual of the noise eigenvalue | distance of noise_eigenvalue from an exact
        eigenvalue of the measured C is at most this
    posterior_variance_stationary float | stationary σ²_i | variance along u_i that momentum SGD settles to
        at the present learning rate
    posterior_variance_stationary_se float | s.e. of stationary σ²_i | standard error of
        posterior_variance_stationary over examples, to first order | optional
    stable bool | stable | whether a stationary law exists along u_i: 0 < ηλ < 2(1 + μ)
    curvature_term float | λ_i σ²_i | the direction's share of Σ λσ²
    curvature_term_se float | s.e. of λ_i σ²_i | standard error of curvature_term over examples, to first
        order | optional
    log_variance_term float nats | −ln σ²_i | the direction's share of −Σ ln σ²
    log_variance_term_se float nats | s.e. of −ln σ²_i | standard error of log_variance_term over examples,
        to first order | optional
""")

SLOPES = parse_table("""
    slopes | one tracked direction at one measured epoch | epoch index
    epoch
    step
    index int | direction i | rank of the direction, 0 for the leading one
    distance float | distance | from the weights to either point of the central difference
    refreshed_slope float | slope J_i | slope along u_i of the gradient whose attack follows the weights
    refreshed_slope_se float | s.e. of J_i | standard error of refreshed_slope over examples
    refreshed_slope_ratio float | slope ratio J_i/λ_i | slope of some examples' gradient whose attack follows
        the weights over their slope while they are held fixed; 1 without an attack
    refreshed_slope_ratio_se float | s.e. of the slope ratio | standard error of refreshed_slope_ratio over
        examples, to first order
""")

ALIGNMENT = parse_table("""
    alignment | one measured epoch | epoch
    epoch
    step | optional
    tracked_directions int directions | tracked directions | number of directions k the alignment is over
    commutator float | relative commutator | ‖HC − CH‖_F / (2‖H‖_F‖C‖_F) in the tracked subspace: 0 when H
        and C commute there, at most ½
    commutator_se float | s.e. of the commutator | standard error of commutator over examples
    commutator_null float | commutator of commuting H and C | what sampling noise alone would give if H and C
        commuted: the commutator's zero
    commutator_null_spread float | spread of the null | standard deviation of commutator under that
        hypothesis
    cosine float | cosine of H and C | ⟨H, C⟩_F / (‖H‖_F‖C‖_F) in the tracked subspace: 1 when C is a
        multiple of H there
    cosine_se float | s.e. of the cosine | standard error of cosine over examples
    subspace_overlap float | subspace overlap | mean squared cosine of the angles between the leading
        subspaces of H and C, 1 when they agree
    captured_noise float | captured noise | noise along H's tracked directions over the noise along C's own
        leading directions, at most 1
    total_correlation float nats | total correlation | ½(Σ ln Σ_ii − ln det Σ) over the tracked directions,
        in H's eigenbasis: what non-commutation costs the bound
    total_correlation_se float nats | s.e. of the total correlation | standard error of total_correlation
        over examples
    total_correlation_null float nats | total correlation of commuting H and C | what sampling noise alone
        would give if H and C commuted: the total correlation's zero
    total_correlation_null_spread float nats | spread of the null | standard deviation of total_correlation
        under that hypothesis
    examples int examples | examples | adversarial examples the measurement was taken on
""")

BOUNDS = parse_table("""
    bounds | one measured epoch | epoch
    epoch
    step
    train_examples int examples | n | size of the training set
    batch_size int examples | B | examples of a mini-batch, over all devices
    tracked_directions int directions | tracked directions | number of leading Hessian directions k tracked
    unstable_directions int directions | unstable directions | tracked directions without a stationary law;
        with any, the sums have no value
    curvature_term_top_k float | Σ λσ² | Σ λ_i σ²_i over the tracked top k directions only | lower
    curvature_term_top_k_se float | s.e. of Σ λσ² | standard error of curvature_term_top_k over examples, to
        first order | optional
    log_variance_term_top_k float nats | −Σ ln σ² | −Σ ln σ²_i over the tracked top k directions only | lower
    log_variance_term_top_k_se float nats | s.e. of −Σ ln σ² | standard error of log_variance_term_top_k over
        examples, to first order | optional
    dominant_terms_top_k float | Σ λσ² − Σ ln σ² | sum of the two dominant terms over the tracked top k
        directions only: not the bound of the whole model | lower
    dominant_terms_top_k_se float | s.e. of the sum | standard error of dominant_terms_top_k over examples, to
        first order | optional
    best_rate_top_k float | η* at β = 1 | learning rate that minimises Σ λσ² − Σ ln σ² / β over those of the
        tracked top k directions with λ_i > 0, to leading order, times β | optional
    best_rate_top_k_se float | s.e. of η* | standard error of best_rate_top_k over examples, to first order |
        optional
""")

CATONI = parse_table("""
    catoni | one measured epoch | epoch
    epoch
    step
    empirical_loss float nats | L_S | mean loss of the measured examples, on the training set | lower
    empirical_loss_se float nats | s.e. of L_S | standard error of empirical_loss over the measured examples
    curvature float | ½ Tr(H₊Σ) | expected rise of the loss over the posterior, along directions of positive
        curvature | s.e. | truncation
    negative_curvature float | ½ Tr(H₋Σ) | the same along directions of negative curvature, which is not in
        the total | s.e. | truncation
    kl_mean float nats | KL, mean | ‖μ − θ_P‖² / (2σ_P²) | lower
    kl_trace float nats | KL, trace | ½ Tr(Σ/σ_P² − 1) | s.e. | truncation
    kl_log_determinant float nats | KL, log determinant | −½ ln det(Σ/σ_P²) | s.e. | truncation
    kl_total_correlation float nats | KL, total correlation | what correlated tracked directions cost, in the
        stationary law; null, and not in the sum, where it is not known or infinite | lower
    kl float nats | KL(Q‖P) | sum of its four parts | lower | s.e. | truncation
    kl_over_beta float nats | KL / β | the part of the bound that the distance from the prior makes | lower
    confidence float nats | confidence | ln(grid points / α) / β
    complexity float nats | complexity | β c² / (8n)
    total float nats | Catoni bound | bound on the expected loss, clipped at c, for a posterior over what
        covers names | lower | truncation
    total_se float nats | s.e. of the bound | standard error of total over random vectors, and of its
        empirical loss over examples
    vacuous bool | vacuous | whether the bound is no better than c
    beta float | β | the β of the grid with the lowest bound
    prior_variance float | σ_P² | the prior variance of the grid with the lowest KL
    loss_range float nats | c | where the loss is clipped
    alpha float | α | the bound may fail with this probability
    covers str | covers | the directions over which the sums run, in words
    directions int directions | directions | number of directions summed over
    parameters int parameters | parameters | number of parameters of the model
    noise_free_parameters int parameters | noise-free parameters | parameters along which no example's
        gradient varies; there the posterior has the prior's variance
    negative_directions float directions | λ < 0 | directions of negative curvature, as far as the nodes
        tell them from flat ones; the law takes them to be flat
""")

CURVATURE_CELLS = parse_table("""
    curvature_cells | one interval of curvature at one measured epoch | epoch cell
    epoch
    step
    cell int | cell | number of the interval, 0 for the sharpest
    directions float directions | directions | H's eigenvalues in it, without noise-free parameters
    curvature float | mean λ | mean eigenvalue of these directions
    gradient_noise float | γ(λ) | mean noise of the mini-batch gradient along one of these directions | s.e.
    posterior_variance float | σ²(λ) | mean posterior variance along one of these directions at this time,
        through the run's rates; null where one is too sharp | s.e.
    buffer_covariance float | Cov(x, v) | mean covariance with the momentum buffer
    buffer_variance float | Var v | mean variance of the momentum buffer
""")

DENSITY = parse_table("""
    density | one node of one random vector's quadrature at one measured epoch | epoch kind probe index
    epoch
    step | optional
    kind str | kind | what is spread over H's spectrum: hessian (eigenvalues) or noise
    probe int | random vector | number of the random vector
    index int | node | rank of the node, 0 for the smallest
    ritz_value float | Hessian eigenvalue λ | the node: a Ritz value of the Hessian, adversarial examples
        held fixed
    mass float | mass | the node's weight: a number of eigenvalues (hessian) or a part of Tr C (noise), to be
        averaged over random vectors
""")

WHOLE_SPACE = parse_table("""
    whole_space | one measured epoch | epoch
    epoch
    step
    hessian_trace float | Tr H, sampled | Hessian trace over all parameters, from random signs | s.e.
    hessian_squared_norm float | ‖H‖²_F | Tr H², sum of all squared Hessian eigenvalues | s.e.
    hessian_negative_trace float | Tr H, negative part | sum of the Hessian's negative eigenvalues, over all
        directions | s.e. | truncation
    negative_share float | share of λ ≤ 0 | share of all Hessian eigenvalues at or below zero; read it with
        negative_share_resolution | s.e.
    negative_share_resolution float | resolution of the share | what negative_share may be off by beside its
        standard error, because eigenvalues about zero are not told apart
    noise_trace float | Tr C | trace of the mini-batch gradient's covariance, over all directions | s.e.
    noise_share_nonpositive float | share of Tr C, λ ≤ 0 | share of noise_trace along directions of curvature
        at or below zero | s.e.
    noise_share_unstable float | share of Tr C, unstable | share of noise_trace along directions too sharp
        for a stationary law, η(λ + ω) ≥ 2(1 + μ) | s.e.
    noise_free_parameters int parameters | noise-free parameters | parameters along which no example's
        gradient varies | optional
    curvature_term_positive_stable float | Σ λσ², λ > 0 and stable | Σ λ_i σ²_i of the stationary posterior
        over all directions with λ_i > 0 that have one | s.e. | truncation
    products int products | products | products with the Hessian
    seconds
""")

POSTERIOR = parse_table("""
    posterior | one tracked direction after one epoch | epoch index
    epoch
    step
    index int | direction i | rank of the direction, 0 for the leading one
    slope float | slope of training's law | slope of the gradient along u_i at the epoch's end, for
        posterior_variance: J_i if the run measured it at every measured epoch, else the curvature
    attack_follows bool | attack follows the weights | whether slope is J_i, for an attack that follows the
        weights as in training, and not the curvature at fixed adversarial examples
    posterior_variance float | σ²_i | variance along u_i at this time by training's law: through the run's
        rates and measured noise, with shuffled epochs, a short last batch and the slope given
    posterior_variance_se float | s.e. of σ²_i | standard error of posterior_variance over the measured
        examples, to first order, as if the errors of all epochs had one sign | optional
    propagated_variance float | propagated σ²_i | the part of posterior_variance left by the noise before the
        last sudden fall of the learning rate; 0 before the first one | optional
    injected_variance float | injected σ²_i | the rest of posterior_variance, made by the noise since then |
        optional
    posterior_variance_independent float | σ²_i by the papers' law | variance along u_i at this time if every
        step drew its batch independently and the curvature were that at fixed adversarial examples
    posterior_variance_independent_se float | s.e. of σ²_i by the papers' law | standard error of
        posterior_variance_independent, as for posterior_variance | optional
    propagated_variance_independent float | propagated σ²_i by the papers' law | the propagated part of
        posterior_variance_independent | optional
    injected_variance_independent float | injected σ²_i by the papers' law | the injected part of
        posterior_variance_independent | optional
    posterior_variance_stationary float | stationary σ²_i | variance along u_i that the epoch's last step
        would settle to, by the papers' law
""")

MEASURES = parse_table("""
    measures | one complexity measure at one measured epoch | epoch measure
    epoch
    step
    measure str | measure | name of the measure; docs/measures.md says what it is
    value float | value | the measure; null where it is undefined
    value_se float | s.e. of the value | standard error of value over the examples or random directions that
        the measure samples; null where it samples nothing | optional
    gradients float gradients | cost in gradients | cost: one is a forward and a backward pass over the
        measured examples; 0 where another measurement of the epoch had the value
    undefined str | why undefined | why there is no value | optional
    seconds
""")

COSTS = parse_table("""
    costs | one part of the measurement at one measured epoch | epoch part
    epoch
    step
    part str | part | what was computed; 'all' is the whole, its attack included
    products int products | products | products with the operator
    converged bool | converged | whether every pair met the tolerance
    warm bool | warm start | whether it started from the last measured epoch's result
    seconds
""")

TIMED: dict[str, str] = {
    "attack": "making the training examples",
    "step": "the rest of the training steps: forward and backward passes, perturbation, optimiser",
    "data": "between training steps: making the next batch, callbacks, the loop itself",
    "evaluation": "the evaluation, its attack included",
    "measurement": "measuring, its attack included",
}
"""The parts into which an epoch's time is divided, and what each part covers."""
_SHARES = "\n    ".join(
    f"{name}_share float {FRACTION} | time in {name} | share of the wall time: {holds}"
    for name, holds in TIMED.items()
)

TIMING = parse_table(f"""
    timing | one finished epoch | epoch
    epoch
    step
    images_per_second float images/s | training speed | training images over the time of attack, step and
        data, all ranks together
    model_flop_utilisation float {FRACTION} | model FLOP utilisation | operations that attack, perturbation
        and descent need, over those that the GPUs can do in bfloat16 in the time of attack, step and data;
        null where the card's peak is not known or the operations cannot be counted | optional
    {_SHARES}
    seconds
""")

OUTCOMES = parse_table("""
    outcomes | one example under one attack of an evaluation | evaluator index
    evaluator str | attack | name of the attack; 'clean' for the unattacked images
    index int | example | position in the evaluated split, counted from 0
    label int | label | class of the example
    prediction int | prediction | class that the model predicts for the unattacked image
    attacked bool | attacked | false for examples wrong unattacked or broken by an earlier attack of the same
        suite
    robust bool | robust | whether the model is still right after this attack
    zero_gradient bool | zero gradient | whether the cross-entropy's gradient at the unattacked image is
        exactly zero or not finite | optional
    seconds float s | wall time | wall time of the example's batch over its examples
""")

EVALUATION = parse_table("""
    evaluation | one attack, suite of attacks or summary of an evaluation | evaluator
    evaluator str | attack | name of the attack or suite; 'clean', or 'worst_case': right under every
        attack
    examples int | examples | number of examples
    accuracy float fraction | accuracy | share of the examples that stay right | higher
    accuracy_se float fraction | s.e. of accuracy | binomial standard error of accuracy, for examples drawn
        at random
    norm str | norm | norm of the ball
    eps float | ε | radius of the ball on the [0, 1] pixel scale
    loss str | loss | what the attack climbs, where it is ours
    step_size float | step | step size on the [0, 1] pixel scale
    steps int | steps | gradient steps of a start; queries of a black-box attack
    restarts int | restarts | starts, or target classes of a targeted attack
    seconds
""")

WARNINGS = parse_table("""
    warnings | one sign that an evaluation may overstate robustness | check evaluator
    check str | check | name of the check
    evaluator str | attack | attack it concerns; 'model' for none
    message str | message | what was seen
""")

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        EPOCHS,
        RATES,
        WCI,
        LAYERS,
        SPECTRUM,
        SLOPES,
        ALIGNMENT,
        BOUNDS,
        CATONI,
        CURVATURE_CELLS,
        DENSITY,
        WHOLE_SPACE,
        POSTERIOR,
        MEASURES,
        COSTS,
        TIMING,
    )
}
"""Tables of a run directory."""

EVALUATION_TABLES: dict[str, Table] = {t.name: t for t in (OUTCOMES, EVALUATION, WARNINGS)}
"""Tables of an evaluation's directory, which have no epochs."""


def table(name: str) -> Table:
    """The table called ``name``, of a run or of an evaluation.

    Raises:
        ValueError: There is no such table; the message lists the known ones.
    """
    known = TABLES | EVALUATION_TABLES
    if name not in known:
        raise ValueError(f"unknown table {name!r}: known are {', '.join(known)}")
    return known[name]


def add_table(text: str) -> Table:
    """Declare the table of a measurement from outside the package; call it where the measurement is defined.

    Its rows can then be written, and read wherever that module has been imported.

    Args:
        text: As for ``parse_table``, with an ``epoch`` column.

    Raises:
        ValueError: Another table has this name, or there is no column ``epoch``.
    """
    added = parse_table(text)
    if (TABLES | EVALUATION_TABLES).get(added.name, added) != added:
        raise ValueError(f"table {added.name!r} exists already; choose another name")
    if "epoch" not in added.names:
        raise ValueError(f"table {added.name!r} has no column epoch, by which a resumed run finds its rows")
    TABLES[added.name] = added
    return added
