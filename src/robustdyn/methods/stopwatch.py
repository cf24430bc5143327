"""Where the time of an epoch goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds spent in named sections, since the last ``read``.

    On a GPU the times are the GPU's, from events for which the host does not wait. The sections also appear
    under their names in the traces of PyTorch's profiler.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: dict[str, float | torch.cuda.Event] = {}
        self._device = torch.device("cpu")
        self.broken_off: str | None = None  # the innermost section that an exception left

    def use(self, device: torch.device) -> None:
        """Time the work on this device from now on."""
        self._device = device

    def start(self, name: str) -> None:
        """Open a section; it must not be open."""
        self._open[name] = self._now()

    def stop(self, name: str) -> None:
        """Close a section; one that is not open is left alone."""
        began = self._open.pop(name, None)
        ended = self._now()
        if isinstance(began, float):
            assert isinstance(ended, float)
            self._seconds[name] += ended - began
        elif began is not None:
            assert not isinstance(ended, float)
            self._events.append((name, began, ended))

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """The scope is the section."""
        self.start(name)
        try:
            with torch.profiler.record_function(name):
                yield
        except BaseException:
            self.broken_off = self.broken_off or name
            raise
        finally:
            self.stop(name)

    def read(self) -> dict[str, float]:
        """Seconds by section, closed ones only; on a GPU this waits for it. Resets the times."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, began, ended in self._events:
            self._seconds[name] += began.elapsed_time(ended) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
