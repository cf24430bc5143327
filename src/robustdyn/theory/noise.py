"""From one example's gradient covariance C₁ to the mini-batch covariance C the optimiser sees."""

from robustdyn.theory._validation import count


def minibatch_noise_factor(n: int, batch_size: int, *, replacement: bool) -> float:
    """The factor f in C = f · C₁, equation (3) of docs/theory.md.

    Without replacement, f = (n − B) / (B (n − 1)): a whole epoch's batch has no noise. With replacement,
    f = 1 / B. C₁ is the population covariance (denominator n) of one example's gradient.

    Args:
        n: Training examples the batches are drawn from.
        batch_size: B, examples in one batch.
        replacement: Whether a batch may hold the same example twice. A shuffling loader draws without.

    Returns:
        f ≥ 0, without unit.

    Raises:
        ValueError: ``n`` or ``batch_size`` below 1, or more than n drawn without replacement.

    Source: survey sampling, finite-population correction (Cochran, Sampling Techniques, theorem 2.2).
    """
    n, batch_size = count("n", n), count("batch_size", batch_size)
    if replacement:
        return 1.0 / batch_size
    if batch_size > n:
        raise ValueError(f"batch_size is {batch_size}; without replacement it must be in [1, {n}]")
    return 0.0 if batch_size == n else (n - batch_size) / (batch_size * (n - 1))
