"""Counter-based random streams.

Every consumer of randomness (shuffle, augmentation, attack, measurement, ...) draws from a generator that is
a pure function of (seed, stream name, counters such as epoch or step). Nothing depends on how often another
consumer drew, so measuring cannot move training, and a resumed run needs no saved generator state.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit seed that is a pure function of its arguments.

    Args:
        seed: The run's seed; 0 is a seed like any other.
        stream: Name of the consumer, e.g. ``"shuffle"``.
        *counters: Epoch, step, rank or whatever else tells two draws apart.
    """
    key = ":".join([str(seed), stream, *map(str, counters)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device`` for one (seed, stream, counters); see ``stream_seed``."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, stream, *counters))


def seed_global(seed: int, stream: str, *counters: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, GPUs included, for code that draws from them.

    Dropout, say, which takes no generator of its own.
    """
    number = stream_seed(seed, stream, *counters)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 (the legacy generator is the global one)
    torch.manual_seed(number)


@contextmanager
def global_numbers(seed: int, stream: str, *counters: int) -> Iterator[None]:
    """Inside, global generators are those of ``seed_global``; afterwards they continue where they were."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        seed_global(seed, stream, *counters)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
