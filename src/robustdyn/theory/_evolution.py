"""The covariance and mean recursions (9) and (13), by doubling and step by step.

Component-first layout inside this module: a transition and a covariance block are (2, 2, ...), a mean is
(2, ...), with ``...`` the directions (k,) or the pairs (k, k). ``left`` and ``right`` are the curvatures
λ + ω of the block's two directions, broadcastable to ``...``; on the diagonal they are the same array.
"""

import numpy as np

from robustdyn.theory._validation import Array, IntArray


def transition(curvature: Array, eta: float, mu: float) -> Array:
    """A of equation (4), component-first (2, 2, ...)."""
    matrix = np.empty((2, 2, *curvature.shape))
    matrix[0, 0] = 1 - eta * curvature
    matrix[0, 1] = -eta * mu
    matrix[1, 0] = curvature
    matrix[1, 1] = mu
    return matrix


def product(first: Array, second: Array) -> Array:
    """Matrix product of (2, 2, ...) stacks."""
    return np.asarray(np.einsum("ab...,bc...->ac...", first, second))


def congruence(left: Array, block: Array, right: Array) -> Array:
    """L S Rᵀ for (2, 2, ...) stacks."""
    return np.asarray(np.einsum("ab...,cb...->ac...", product(left, block), right))


def powers(matrix: Array, exponents: IntArray) -> Array:
    """A^t for every t of ``exponents`` (T,) by repeated squaring: (2, 2, T, ...) from (2, 2, ...)."""
    shape = (2, 2, exponents.size, *matrix.shape[2:])
    unit = np.eye(2).reshape(2, 2, *[1] * (len(shape) - 2))
    result: Array = np.array(np.broadcast_to(unit, shape))
    factor, left = matrix[:, :, None], exponents.copy()
    while left.any():
        odd = (left & 1).astype(bool)
        result[:, :, odd] = product(result[:, :, odd], factor)
        left >>= 1
        if left.any():
            factor = product(factor, factor)
    return result


def leap_covariance(
    block: Array, left: Array, right: Array, noise: Array, *, eta: float, mu: float, steps: int
) -> Array:
    """``steps`` equal steps of (13) in O(log steps) products, equation (22).

    One step is S → L S Rᵀ + Q; two are the same map with (L², R², L Q Rᵀ + Q).
    """
    one_sided = left is right
    b = np.array([-eta, 1.0])
    step_left = transition(left, eta, mu)
    step_right = step_left if one_sided else transition(right, eta, mu)
    added = np.multiply.outer(np.outer(b, b), noise)
    while True:
        if steps & 1:
            block = congruence(step_left, block, step_right) + added
        steps >>= 1
        if not steps:
            return block
        added = congruence(step_left, added, step_right) + added
        step_left = product(step_left, step_left)
        step_right = step_left if one_sided else product(step_right, step_right)


def leap_mean(mean: Array, curvature: Array, force: Array, *, eta: float, mu: float, steps: int) -> Array:
    """``steps`` equal steps of the affine map (21), s → A s + b g, by doubling (A, f) → (A², A f + f)."""
    step = transition(curvature, eta, mu)
    added = np.multiply.outer(np.array([-eta, 1.0]), force)
    while True:
        if steps & 1:
            mean = np.einsum("ab...,b...->a...", step, mean) + added
        steps >>= 1
        if not steps:
            return mean
        added = np.einsum("ab...,b...->a...", step, added) + added
        step = product(step, step)


def walk_covariance(block: Array, left: Array, right: Array, noise: Array, eta: Array, mu: float) -> Array:
    """One step of (13) after the other, everything allowed to change at each.

    With x⁺ = x − η v⁺ the step is written on the four moments a = Cov(x, x'), p = Cov(x, v'),
    q = Cov(v, x'), w = Cov(v, v') in place, without a matrix product.

    Args:
        block: (2, 2, ...).
        left: (N, ...) curvature of the block's first direction at each step.
        right: (N, ...) of its second.
        noise: (N, ...).
        eta: (N,).
        mu: Momentum.
    """
    a, p, q, w = (block[i, j].copy() for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)))
    spare = np.empty_like(a)
    for t, rate in enumerate(eta):
        first, second = left[t], right[t]
        w *= mu
        np.multiply(second, q, out=spare)
        w += spare
        w *= mu
        p *= mu
        np.multiply(second, a, out=spare)
        p += spare  # Cov(x, v'⁺)
        np.multiply(first, p, out=spare)
        w += spare
        w += noise[t]  # Cov(v⁺, v'⁺)
        q *= mu
        np.multiply(first, a, out=spare)
        q += spare  # Cov(v⁺, x')
        np.multiply(w, rate, out=spare)
        q -= spare
        np.subtract(p, spare, out=spare)  # Cov(x⁺, v'⁺)
        p += q
        p *= rate
        a -= p
        p, spare = spare, p
    return np.array([[a, p], [q, w]])


def walk_mean(mean: Array, curvature: Array, force: Array, eta: Array, mu: float) -> Array:
    """One step of the affine map (21) after the other; ``curvature`` and ``force`` (N, ...), ``eta`` (N,)."""
    x, v = mean[0].copy(), mean[1].copy()
    for t, rate in enumerate(eta):
        v *= mu
        v += curvature[t] * x
        v += force[t]
        x -= rate * v
    return np.array([x, v])
