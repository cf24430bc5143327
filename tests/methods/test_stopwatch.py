"""Tests that the stopwatch takes times on the CPU by the clock, and on a GPU by its events."""

import json
import time

import pytest
import torch

from robustdyn.methods.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock whose seconds only pass when a test says so."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_sections_of_a_name_add_up(clock):
    watch = Stopwatch()
    for seconds in (1.0, 2.0):
        with watch.section("attack"):
            clock(seconds)
        clock(8.0)  # outside
    watch.start("data")
    clock(4.0)
    watch.stop("data")
    assert watch.read() == {"attack": 3.0, "data": 4.0}


def test_sections_within_sections(clock):
    watch = Stopwatch()
    watch.start("step")
    clock(1.0)
    with watch.section("attack"):
        clock(2.0)
        with watch.section("start"):
            clock(4.0)
    clock(8.0)
    watch.stop("step")
    assert watch.read() == {"step": 15.0, "attack": 6.0, "start": 4.0}


def test_reading_starts_afresh_but_for_what_is_open(clock):
    watch = Stopwatch()
    with watch.section("attack"):
        clock(1.0)
    watch.start("data")
    clock(2.0)
    assert watch.read() == {"attack": 1.0}
    assert watch.read() == {}
    clock(4.0)
    watch.stop("data")
    assert watch.read() == {"data": 6.0}


def test_stopping_what_is_not_open_is_harmless(clock):
    watch = Stopwatch()
    watch.stop("data")
    watch.start("data")
    clock(1.0)
    watch.stop("data")
    clock(1.0)
    watch.stop("data")
    assert watch.read() == {"data": 1.0}


def test_a_section_that_fails_is_closed(clock):
    watch = Stopwatch()

    @watch.section("attack")
    def fail():
        clock(1.0)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert watch.broken_off == "attack"
    assert watch.read() == {"attack": 1.0}


def test_sections_show_in_traces(tmp_path):
    watch = Stopwatch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with watch.section("attack"):
            torch.ones(3).sum()
        torch.ones(3).prod()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events if "dur" in event}
    assert spans["attack"][0] <= spans["aten::sum"][0] < spans["aten::sum"][1] <= spans["attack"][1]
    assert spans["aten::prod"][0] >= spans["attack"][1]


class Device:
    """A GPU with its own time, which lags behind the host."""

    def __init__(self, monkeypatch):
        self.time_ms, self.waits, self.streams = 0.0, [], []
        device = self

        class Event:
            def __init__(self, *, enable_timing):
                assert enable_timing
                self.at_ms = None

            def record(self, stream):
                device.streams.append(stream)
                self.at_ms = device.time_ms

            def elapsed_time(self, end):
                assert device.waits, "the events may not have happened yet"
                return end.at_ms - self.at_ms

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
        monkeypatch.setattr(torch.cuda, "synchronize", self.waits.append)


def test_on_a_gpu_its_events_count_and_only_reading_waits(monkeypatch, clock):
    device, cuda = Device(monkeypatch), torch.device("cuda", 1)
    watch = Stopwatch()
    watch.use(cuda)
    for _ in range(2):
        watch.start("step")
        with watch.section("attack"):
            device.time_ms += 1500.0
            clock(0.25)  # the host's time does not count
        device.time_ms += 500.0
        watch.stop("step")
    watch.stop("data")
    assert device.waits == []
    assert watch.read() == {"attack": 3.0, "step": 4.0}
    assert device.waits == [cuda]  # once for all of them
    assert set(device.streams) == {("stream of", cuda)}
    assert watch.read() == {}
    assert device.waits == [cuda]  # nothing to wait for
