"""robustdyn: why adversarially trained networks overfit.

Symbols, fixed once for the whole package (shapes: B batch, n training examples, m measured examples,
P parameters, k tracked directions, K classes, L layers):

    θ        parameters, flat float vector of shape (P,), in the order of ``model.named_parameters()``
    L_S(θ)   empirical robust loss: *mean* over examples of ℓ(θ, x + δ, y), δ the attack's perturbation
    H        Hessian of L_S at θ with the adversarial examples held fixed; eigenpairs (λ_i, u_i)
    C₁       covariance of one example's gradient (population covariance over the data set)
    C        covariance of the mini-batch gradient the optimiser sees, already divided by the batch size
    γ_i      u_iᵀ C u_i, gradient-noise variance along u_i
    η, μ, ω  learning rate, momentum, weight decay (L2 in the gradient)
    σ_i²     posterior variance of θ along u_i
    ε        attack radius, on the [0, 1] pixel scale everywhere in code (configuration keys end in ``_255``)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing them takes seconds
    from robustdyn.measure import Recorder as Recorder
    from robustdyn.measure import measure_model as measure_model

    __version__: str

_MEASURE = ("Recorder", "measure_model")


def __getattr__(name: str) -> object:
    """Import what measures a model when it is first asked for, and look up the version."""
    if name in _MEASURE:
        from robustdyn import measure

        return getattr(measure, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("robustdyn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
