import weakref
from collections.abc import Iterator

import pytest
import torch

from robustdyn.curvature.tape import Tape
from tests.curvature.reference import Made


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: the problems are so small that more threads are up to ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """A reference to every tape ever recorded."""
    references: Made = []
    record = Tape.__init__

    def note(tape: Tape, *arguments: object, **settings: object) -> None:
        references.append(weakref.ref(tape))
        record(tape, *arguments, **settings)

    monkeypatch.setattr(Tape, "__init__", note)
    return references
