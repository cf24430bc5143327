"""Shows on a terminal how far a loop has come, if it takes longer than a moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

PATIENCE = 1.0  # seconds


def with_bar(items: Iterable[T], doing: str, total: int | None = None) -> Iterable[T]:
    """The items, with a progress bar on standard error that appears after ``PATIENCE`` and goes at the end.

    Args:
        items: What is worked on one by one.
        doing: What is done with them, for the bar.
        total: How many there are, if the items cannot say it.
    """
    return tqdm(items, desc=doing, total=total, delay=PATIENCE, leave=False, disable=None, dynamic_ncols=True)
