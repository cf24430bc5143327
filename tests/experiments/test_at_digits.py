"""The benchmark's bare loop is an independent rendering of adversarial training: use it as a reference."""

import importlib
import sys
from pathlib import Path

import pytest

from robustdyn.run.config import build
from tests.runs import TINY, compose

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("at_digits")
    for name in ("at_digits", "common"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", ["train", "eval"])
def test_training_equals_a_bare_loop_bit_for_bit(benchmark, batchnorm):
    changes = ("schedule.milestones=[50]", f"attack.train.batchnorm={batchnorm}", *benchmark.PLAIN)
    cfg = compose(*TINY, *changes)
    data = build(cfg, "data")
    data.setup("fit")
    bare, _ = benchmark.bare_loop(cfg, data, epochs=2)
    ours, _ = benchmark.robustdyn_run(cfg, data, epochs=2)
    bare_state, our_state = bare.state_dict(), ours.state_dict()
    assert bare_state.keys() == our_state.keys()
    for name, value in bare_state.items():
        assert value.equal(our_state[name]), name
