"""Refusals with the offending value and the admissible range, in one place."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

# A covariance assembled in float32 from some thousand samples is symmetric and positive up to this share
# of its largest eigenvalue: sqrt(1e4) * 6e-8, times two.
_PSD_SLACK = 1e-5
_LARGEST = 2**53  # up to here float64 holds every whole number


def first_offender(values: Array, ok: NDArray[np.bool_]) -> str:
    """Name the first entry that fails, as ``value at index i`` (only the value for a scalar)."""
    if values.ndim == 0:
        return f"{float(values):g}"
    index = tuple(int(i) for i in np.argwhere(~ok)[0])
    place = index[0] if len(index) == 1 else index
    return f"{float(values[index]):g} at index {place}"


def finite(name: str, values: ArrayLike) -> Array:
    """``values`` as float64.

    Raises:
        ValueError: An entry is NaN or infinite.
    """
    array = np.asarray(values, dtype=np.float64)
    ok = np.isfinite(array)
    if not ok.all():
        raise ValueError(f"{name} is {first_offender(array, ok)}; it must be finite")
    return array


def within(name: str, values: ArrayLike, allowed: Callable[[Array], NDArray[np.bool_]], wanted: str) -> Array:
    """``values`` as float64.

    Args:
        name: Of the values, for the message.
        values: Any shape.
        allowed: Which of the finite numbers are in the range.
        wanted: The range in words: ``it must be <wanted>``.

    Raises:
        ValueError: An entry is not finite, or outside the range.
    """
    array = finite(name, values)
    ok = allowed(array)
    if not ok.all():
        raise ValueError(f"{name} is {first_offender(array, ok)}; it must be {wanted}")
    return array


def positive(name: str, values: ArrayLike) -> Array:
    """``values`` as float64, all in (0, inf)."""
    return within(name, values, lambda x: x > 0, "> 0")


def non_negative(name: str, values: ArrayLike) -> Array:
    """``values`` as float64, all in [0, inf)."""
    return within(name, values, lambda x: x >= 0, ">= 0")


def momentum_range(values: ArrayLike) -> Array:
    """``values`` as float64, all in [0, 1)."""
    return within("momentum", values, lambda x: (x >= 0) & (x < 1), "in [0, 1)")


def probability(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ValueError: It is not strictly between 0 and 1.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value:g}; it must be in (0, 1)")
    return float(value)


def count(name: str, value: int, minimum: int = 1) -> int:
    """``value`` as an int.

    Raises:
        ValueError: It is not a whole number, or smaller than ``minimum``.
    """
    if not np.isfinite(value) or value != int(value) or value < minimum:
        raise ValueError(f"{name} is {value}; it must be a whole number >= {minimum}")
    return int(value)


def scalar(name: str, values: ArrayLike) -> float:
    """``values`` as a float.

    Raises:
        ValueError: It is an array of numbers.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim:
        raise ValueError(f"{name} has shape {array.shape}; it must be one number")
    return float(array)


def whole(name: str, values: ArrayLike, minimum: int = 0) -> IntArray:
    """``values`` as int64.

    Raises:
        ValueError: An entry is not a whole number in [``minimum``, 2**53].
    """
    array = within(
        name,
        values,
        lambda x: (x == np.rint(x)) & (x >= minimum) & (x <= _LARGEST),
        f"a whole number >= {minimum}",
    )
    return array.astype(np.int64)


def shuffled_sizes(sizes: IntArray, epoch_starts: IntArray, examples: int) -> None:
    """Refuse epochs in which an example would have to come twice.

    Args:
        sizes: B (N,).
        epoch_starts: First steps of the epochs, increasing from 0.
        examples: n.

    Raises:
        ValueError: The batches of an epoch have more than n examples.
    """
    drawn = int(np.add.reduceat(sizes, epoch_starts).max())
    if drawn > examples:
        raise ValueError(
            f"an epoch's sizes add up to {drawn}; without replacement they must have at most {examples}"
        )


def recorded_steps(record_steps: ArrayLike, first: int, last: int) -> IntArray:
    """``record_steps`` as an int64 vector (R,).

    Raises:
        ValueError: They are not whole numbers in [``first``, ``last``] that increase.
    """
    steps = within(
        "record_steps",
        record_steps,
        lambda x: (x >= first) & (x <= last) & (x == np.rint(x)),
        f"a whole number in [{first}, {last}]",
    )
    record = vector("record_steps", np.atleast_1d(steps))
    if not (np.diff(record) > 0).all():
        raise ValueError(f"record_steps is {record.tolist()}; it must be strictly increasing")
    return record.astype(np.int64)


def vector(name: str, values: Array, size: int | None = None) -> Array:
    """``values`` if they form a vector.

    Raises:
        ValueError: Not one-dimensional, empty, or not of length ``size``.
    """
    if values.ndim != 1 or values.size == 0 or (size is not None and values.size != size):
        wanted = "(k,) with k >= 1" if size is None else f"({size},)"
        raise ValueError(f"{name} has shape {values.shape}; it must be {wanted}")
    return values


def state_covariances(name: str, blocks: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Covariances of (x, v), (k, 2, 2) of single directions or (k, k, 2, 2) of all pairs, as float64.

    Raises:
        ValueError: Another shape, or no covariances, to the accuracy of ``covariance_matrix``.
    """
    array = finite(name, blocks)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}")
    if array.ndim == 4:
        covariance_matrix(name, array.transpose(0, 2, 1, 3).reshape(2 * shape[0], 2 * shape[0]))
        return array
    # in units of each variable's own deviation, because those of x and v differ by a factor of η
    deviation = np.sqrt(np.maximum(np.einsum("kii->ki", array), 0))
    product, mixed = deviation.prod(axis=1), (array[:, 0, 1], array[:, 1, 0])
    good = (np.einsum("kii->ki", array) >= 0).all(axis=1) & (
        np.abs(mixed).max(axis=0) <= (1 + _PSD_SLACK) * product
    )
    good &= np.abs(mixed[0] - mixed[1]) <= _PSD_SLACK * product
    if not good.all():
        index = int(np.argmin(good))
        raise ValueError(f"{name} is {array[index].tolist()} at index {index}; it must be a covariance")
    return array


def covariance_matrix(name: str, matrix: ArrayLike, size: int | None = None) -> Array:
    """``matrix`` as a float64 symmetric positive semi-definite matrix, symmetrised exactly.

    Raises:
        ValueError: Not square, not of side ``size``, not symmetric or with a negative eigenvalue (both up
            to 1e-5 of the largest entry or eigenvalue, the rounding of a float32 estimate).
    """
    array = finite(name, matrix)
    side = array.shape[0] if array.ndim else 0
    if array.ndim != 2 or array.shape != (side, side) or side == 0 or (size is not None and side != size):
        wanted = "(k, k)" if size is None else f"({size}, {size})"
        raise ValueError(f"{name} has shape {array.shape}; it must be {wanted}")
    asymmetry = float(np.abs(array - array.T).max())
    if asymmetry > _PSD_SLACK * float(np.abs(array).max()):
        raise ValueError(f"{name} differs from its transpose by {asymmetry:g}; it must be symmetric")
    symmetric = (array + array.T) / 2
    spectrum = np.linalg.eigvalsh(symmetric)
    if spectrum[0] < -_PSD_SLACK * abs(spectrum[-1]):
        raise ValueError(f"{name} has the eigenvalue {spectrum[0]:g}; all must be >= 0")
    return symmetric
