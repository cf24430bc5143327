"""Each profiler preset writes its files into RUN/profile when a run is trained with it."""

import json
from operator import itemgetter

import pytest

from tests.runs import UNMEASURED, command

SMALL = ("model.blocks=[1]", "model.strides=[2]")


def profiled(monkeypatch, run_dir, profiler, *overrides):
    """The files of a run, by name."""
    arguments = (f"profiler={profiler}", f"hydra.run.dir={run_dir}")
    assert command(monkeypatch, *UNMEASURED, *SMALL, *arguments, *overrides) == 0
    return {path.name: path.read_text() for path in (run_dir / "profile").iterdir()}


def test_simple_has_the_seconds_of_every_hook(monkeypatch, tmp_path):
    files = profiled(monkeypatch, tmp_path, "simple", "trainer.max_epochs=1")
    (line,) = (line for line in files["fit-profile.txt"].splitlines() if "run_training_batch" in line)
    assert line.split("|")[3].strip() == "3"  # calls
    assert "RecordTiming.on_train_epoch_end" in files["fit-profile.txt"]


@pytest.mark.slow  # profiles every function
def test_advanced_has_the_functions_within_the_hooks(monkeypatch, tmp_path):
    files = profiled(monkeypatch, tmp_path, "advanced", "trainer.max_epochs=1")
    report = files["fit-profile.txt"]
    assert "Profile stats for: run_training_batch" in report
    assert "(_attacked)" in report


@pytest.mark.slow  # traces every operation
@pytest.mark.parametrize(("batch_size", "epochs"), [(32, 3), (8, 1)])
def test_pytorch_traces_training_steps(batch_size, epochs, monkeypatch, tmp_path):
    """Steps five to seven are traced: in the second epoch, after an evaluation, or all in the first epoch."""
    overrides = (f"data.batch_size={batch_size}", f"trainer.max_epochs={epochs}")
    files = profiled(monkeypatch, tmp_path, "pytorch", *overrides)
    sums = files.pop("fit-profile.txt")
    assert "attack" in {line.split()[0] for line in sums.splitlines() if line.strip()}
    ((name, trace),) = files.items()
    assert name.split(".")[1] == "training_step"
    assert name.endswith(".pt.trace.json")
    spans = [event for event in json.loads(trace)["traceEvents"] if "dur" in event]
    steps = sorted((e for e in spans if e["name"].endswith(".training_step")), key=itemgetter("ts"))
    attacks = sorted((e for e in spans if e["name"] == "attack"), key=itemgetter("ts"))
    assert len(steps) == len(attacks) == 3
    for step, attack in zip(steps, attacks, strict=True):
        assert step["ts"] <= attack["ts"]
        assert attack["ts"] + attack["dur"] <= step["ts"] + step["dur"]
        kernels = [e["name"] for e in spans if attack["ts"] <= e["ts"] <= attack["ts"] + attack["dur"]]
        assert kernels.count("aten::sign_") == 2  # one for each of the attack's steps


@pytest.mark.slow  # generates code
@pytest.mark.timeout(900)
def test_pytorch_traces_compiled_networks_in_one_piece(monkeypatch, tmp_path):
    """Lightning labels layers with hooks, each of which would break a graph."""
    from torch._dynamo.utils import counters

    counters.clear()
    overrides = ("execution=compiled", "data.batch_size=20", "trainer.max_epochs=2")
    files = profiled(monkeypatch, tmp_path, "pytorch", *overrides)
    assert len(files) == 2
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]
