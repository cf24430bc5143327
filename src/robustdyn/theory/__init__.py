"""The mathematics: linear dynamics, posterior covariances, bounds and the Weight-Curvature Index.

Pure NumPy and SciPy, float64, vectorised over directions. Numbers in brackets are equations of
docs/theory.md.
"""

from robustdyn.theory.bounds import (
    CatoniBound,
    DominantTerms,
    GaussianKL,
    PosteriorSums,
    bound_of_sums,
    catoni_bound,
    dominant_terms,
    gaussian_kl,
)
from robustdyn.theory.certificate import (
    FiniteCertificate,
    RiskCertificate,
    SubspaceKL,
    binary_kl,
    binary_kl_upper,
    finite_certificate,
    risk_certificate,
    subspace_kl,
)
from robustdyn.theory.coupled import BatchSampling, MeasuredDrift, propagate_coupled
from robustdyn.theory.misalignment import (
    CovarianceTerms,
    bound_terms_under_rotation,
    correlated_noise,
    covariance_terms,
    largest_total_correlation,
    rotated_noise,
)
from robustdyn.theory.momentum import MomentumDynamics, is_stable, regularised_minimum
from robustdyn.theory.noise import minibatch_noise_factor
from robustdyn.theory.preconditioned import (
    WhitenedProblem,
    adam_dynamics,
    adam_scale,
    preconditioned_covariance,
    whiten,
)
from robustdyn.theory.rate import bound_minimising_rate
from robustdyn.theory.shuffled import shuffled_covariance
from robustdyn.theory.stationary import (
    curvature_term_per_noise,
    stationary_block_covariance,
    stationary_covariance,
    stationary_state_covariance,
    stationary_variance,
    total_correlation,
)
from robustdyn.theory.trajectory import MeasuredSpectrum, PosteriorTrajectory, propagate
from robustdyn.theory.transient import (
    DecayTransient,
    covariance_after,
    decay_transient,
    mean_after,
    propagated_variance,
    slow_mode_variance,
    sudden_decays,
)
from robustdyn.theory.weight_curvature_index import (
    WeightCurvatureIndex,
    optimal_layer_variance,
    weight_curvature_index,
)
from robustdyn.theory.whole_space import (
    CurvatureCells,
    SpectralMeasure,
    WholeSpaceLaw,
    cell_edges,
    whole_space_law,
)

__all__ = [
    "BatchSampling",
    "CatoniBound",
    "CovarianceTerms",
    "CurvatureCells",
    "DecayTransient",
    "DominantTerms",
    "FiniteCertificate",
    "GaussianKL",
    "MeasuredDrift",
    "MeasuredSpectrum",
    "MomentumDynamics",
    "PosteriorSums",
    "PosteriorTrajectory",
    "RiskCertificate",
    "SpectralMeasure",
    "SubspaceKL",
    "WeightCurvatureIndex",
    "WhitenedProblem",
    "WholeSpaceLaw",
    "adam_dynamics",
    "adam_scale",
    "binary_kl",
    "binary_kl_upper",
    "bound_minimising_rate",
    "bound_of_sums",
    "bound_terms_under_rotation",
    "catoni_bound",
    "cell_edges",
    "correlated_noise",
    "covariance_after",
    "covariance_terms",
    "curvature_term_per_noise",
    "decay_transient",
    "dominant_terms",
    "finite_certificate",
    "gaussian_kl",
    "is_stable",
    "largest_total_correlation",
    "mean_after",
    "minibatch_noise_factor",
    "optimal_layer_variance",
    "preconditioned_covariance",
    "propagate",
    "propagate_coupled",
    "propagated_variance",
    "regularised_minimum",
    "risk_certificate",
    "rotated_noise",
    "shuffled_covariance",
    "slow_mode_variance",
    "stationary_block_covariance",
    "stationary_covariance",
    "stationary_state_covariance",
    "stationary_variance",
    "subspace_kl",
    "sudden_decays",
    "total_correlation",
    "weight_curvature_index",
    "whiten",
    "whole_space_law",
]
