"""Curvature and gradient noise of any ``torch.nn.Module``: linear operators and the solvers on them.

This package needs only torch. Five lines measure a model on fixed (already adversarial) examples:

    risk = EmpiricalRisk(model.eval(), inputs, targets, memory=2**30)
    generator = torch.Generator().manual_seed(0)
    top = lanczos(Hessian(risk), 5, which="largest", tol=1e-3, max_products=100, generator=generator)
    noise = projected_covariance(risk, top.eigenvectors)
    print(top.eigenvalues, top.residuals, noise.variances, noise.standard_errors)

``noise`` is C₁, the covariance of one example's gradient. ``robustdyn.theory.minibatch_noise_factor``
converts it to the covariance of a mini-batch gradient. Every result is frozen and carries its uncertainty
(standard errors or residuals) and its cost (products, seconds).
"""

from robustdyn.curvature.alignment import (
    AlignmentEstimate,
    alignment,
    covariance_jackknife,
    principal_angles,
    sign_flipped_covariances,
    subspace_overlap,
)
from robustdyn.curvature.empirical_risk import EmpiricalRisk
from robustdyn.curvature.gradient_covariance import (
    GradientCovariance,
    ProjectedCovariance,
    gradient_projections,
    projected_covariance,
)
from robustdyn.curvature.hessian import GaussNewton, Hessian
from robustdyn.curvature.kernels import Precision
from robustdyn.curvature.lanczos import EigenResult, eigen_residuals, lanczos
from robustdyn.curvature.layer_traces import LayerTraces, layer_traces
from robustdyn.curvature.minibatch_covariance import (
    MinibatchCovariance,
    MinibatchTrace,
    MinibatchVariances,
)
from robustdyn.curvature.operators import DiagonallyScaled, LinearOperator, RiskOperator
from robustdyn.curvature.quadrature import SpectralDensity, spectral_density
from robustdyn.curvature.risk_function import cross_entropy
from robustdyn.curvature.sharding import shard
from robustdyn.curvature.traces import (
    TraceEstimator,
    TraceResult,
    hutch_plus_plus,
    hutchinson_trace,
    xtrace,
)

__all__ = [
    "AlignmentEstimate",
    "DiagonallyScaled",
    "EigenResult",
    "EmpiricalRisk",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "LayerTraces",
    "LinearOperator",
    "MinibatchCovariance",
    "MinibatchTrace",
    "MinibatchVariances",
    "Precision",
    "ProjectedCovariance",
    "RiskOperator",
    "SpectralDensity",
    "TraceEstimator",
    "TraceResult",
    "alignment",
    "covariance_jackknife",
    "cross_entropy",
    "eigen_residuals",
    "gradient_projections",
    "hutch_plus_plus",
    "hutchinson_trace",
    "lanczos",
    "layer_traces",
    "principal_angles",
    "projected_covariance",
    "shard",
    "sign_flipped_covariances",
    "spectral_density",
    "subspace_overlap",
    "xtrace",
]
