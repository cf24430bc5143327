"""The speed benchmarks refuse to time what disagrees, and write what they promise."""

import importlib
import json
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.tolerances import EXACT64

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"
MODULES = ("common", "study_loops", "at_step", "at_epoch", "step_scaling", "step_memory")
TINY = ["--width=4", "--batch=8", "--steps=2", "--rounds=2", "--device=cpu"]
CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """A benchmark by name, writing elsewhere."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def result(tmp_path, name):
    return json.loads((tmp_path / f"{name}.json").read_text())


@pytest.mark.slow
def test_a_step(benchmark, tmp_path, monkeypatch, capsys):
    at_step = benchmark("at_step")
    monkeypatch.setattr(at_step, "WARM", 2)
    at_step.main([*TINY, "--no-compile", "--batches=1", "--updates=2", "--compared=4"])
    written = result(tmp_path, "at_step")
    summary = written["summary"]
    found = summary["relative differences to the study in float64"]
    assert found.keys() == {"robust-overfitting study", "AWP study"}
    # the same roundings but for the optimiser's, where the fused kernel may contract a product and a sum
    assert found["robust-overfitting study"]["weights, the study's attack holding images"] < 1e-15
    for differences in found.values():
        assert max(differences.values()) < EXACT64["atol"]
    ours = {f"ours, {method}, {kind}" for method in ("AT", "AWP") for kind in ("float32", "bf16")}
    limits = {f"limit of {name}" for name in ours}
    assert written["rounds"].keys() == ours | limits | found.keys() | {"bare loop, AT, float32"}
    assert all(len(times) == 2 and min(times) > 0 for times in written["rounds"].values())
    for name in ours:
        assert summary[name]["limit / ours"]["median"] > 0
        assert 0 < summary[name]["share within the step"]["max"] <= 1
    targets = {f"{name}: limit" for name in ours} | {"cost of Lightning"}
    targets |= {f"ours, {name}: speed-up" for name in ("AT, float32", "AT, bf16", "AWP, float32")}
    assert summary["targets"].keys() == targets
    assert summary["graphs compiled during the rounds"] == 0
    assert "data_root" not in written["settings"]
    assert "| ours, AWP, bf16 |" in capsys.readouterr().out


@pytest.mark.slow
def test_no_times_of_a_step_that_differs(benchmark, monkeypatch):
    at_step = benchmark("at_step")
    monkeypatch.setattr(at_step, "WARM", 1)
    monkeypatch.setattr(benchmark("study_loops"), "WEIGHT_DECAY", 6e-4)
    with pytest.raises(SystemExit, match="no times are compared"):
        at_step.main([*TINY, "--no-compile", "--batches=1", "--updates=1", "--compared=4"])


@pytest.mark.slow
def test_the_limit_is_as_many_passes_as_it_says(benchmark):
    at_step = benchmark("at_step")
    with at_step.images_in(None, 16, 8) as root:
        cfg = at_step.compose(root, CPU, width=4, batch=8, batches=2, steps=3)
        run = at_step.Ours(cfg, at_step.network(4).state_dict(), CPU)
    forward, to_weights = [], []
    run.module.model.register_forward_pre_hook(lambda model, args: forward.append(args[0].requires_grad))
    run.module.model.conv1.weight.register_hook(lambda gradient: to_weights.append(gradient))
    before = [parameter.clone() for parameter in run.module.model.parameters()]
    at_step.Limit(run, 2, 1, CPU).seconds()  # a step to warm up, a step that counts
    assert forward == [True, True, True, False, False] * 2
    assert len(to_weights) == 4
    assert all(p.equal(q) for p, q in zip(before, run.module.model.parameters(), strict=True))


@pytest.mark.slow
def test_the_bare_loop_is_ours_bit_for_bit(benchmark):
    at_step = benchmark("at_step")
    with at_step.images_in(None, 24, 8) as root:
        cfg = at_step.compose(root, CPU, width=4, batch=8, batches=3, steps=2)
        start = at_step.network(4).state_dict()
        run, bare = at_step.Ours(cfg, start, CPU), at_step.BareLoop(cfg, start, CPU)
        run.seconds()
        bare.seconds()
    mine, theirs = run.module.model.state_dict(), bare.model.state_dict()
    for name, value in mine.items():
        assert value.equal(theirs[name]), name


def test_the_studys_images_are_crops_of_the_mirrored_border(benchmark):
    loops = benchmark("study_loops")
    images, labels = loops.smooth_images(6, seed=1)
    batches = loops.StudyBatches(images, labels, 6, train=True, workers=0, device=CPU)
    (drawn, drawn_labels), *_ = list(batches)
    padded = F.pad(images.float() / 255, [4] * 4, mode="reflect")
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5).reshape(6 * 81, 3, 32, 32)
    either = torch.cat([windows, windows.flip(3)])
    for image, label in zip(drawn, drawn_labels, strict=True):
        places = (either == image).flatten(1).all(dim=1).nonzero().flatten()
        assert len(places) >= 1
        assert label in labels[places % len(windows) // 81]
    (again, _), *_ = list(batches)
    assert not again.equal(drawn)
    whole = loops.StudyBatches(images, labels, 4, train=False, workers=0, device=CPU)
    shown = torch.cat([part for part, _ in whole])
    np.testing.assert_array_equal(shown.numpy(), images.numpy().astype(np.float32) / 255)


@pytest.mark.slow
def test_an_epoch(benchmark, tmp_path, monkeypatch):
    at_epoch = benchmark("at_epoch")
    monkeypatch.setattr(
        at_epoch, "our_epochs", lambda args, asked: ([9.0, 1.0, 2.0, 3.0], {"data_share": 0.1})
    )
    at_epoch.main([*TINY, "--train=16", "--test=8", "--epochs=1", "--workers=0"])
    summary = result(tmp_path, "at_epoch")["summary"]
    assert summary["robust-overfitting study"]["seconds an epoch"]["min"] > 0
    for name in ("ours, float32", "ours, bf16 compiled"):
        assert summary[name]["seconds an epoch"] == {"median": 2.0, "min": 1.0, "max": 3.0}
        assert summary[name]["seconds of the first epoch, with what comes before it"]["median"] == 9.0
        assert summary[name]["shares of an epoch"] == {"data_share": 0.1}
    assert summary["targets"].keys() == {"fast: speed-up"}


@pytest.mark.slow
def test_an_epoch_of_the_command(benchmark, tmp_path):
    at_epoch = benchmark("at_epoch")
    arguments = ["--train=20", "--test=10", "--epochs=2", "--workers=2", "--executions", "default"]
    at_epoch.main([*TINY, "--rounds=1", "--batch=10", *arguments])
    ours = result(tmp_path, "at_epoch")["summary"]["ours, float32"]
    first = ours["seconds of the first epoch, with what comes before it"]
    assert first["median"] > ours["seconds an epoch"]["max"] > 0
    assert sum(ours["shares of an epoch"].values()) == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_scaling(benchmark, tmp_path):
    scaling = benchmark("step_scaling")
    grid = ["--batch-sizes", "8", "16", "--widths", "4", "--attack-steps", "1", "2"]
    scaling.main([*TINY, "--rounds=1", *grid])
    rows = result(tmp_path, "step_scaling")["summary"]["table"]
    assert [(row["batch"], row["width"], row["steps"]) for row in rows] == [(8, 4, 2), (16, 4, 2), (8, 4, 1)]
    for row in rows:
        for kind in ("float32", "bf16"):
            seconds, images = row[f"{kind}, s a step"], row[f"{kind}, images/s"]
            assert images == pytest.approx(row["batch"] / seconds, rel=0.05)  # both are rounded


def test_memory(benchmark, tmp_path, monkeypatch):
    memory = benchmark("step_memory")
    found = {"study": 300.0, "default": 150.0, "bf16": 100.0}
    monkeypatch.setattr(memory, "own_process", lambda args, root, variant: found[variant[1]])
    memory.main(TINY)
    summary = result(tmp_path, "step_memory")["summary"]
    for method in ("AT", "AWP"):
        assert summary[f"ours, {method}, float32"] == {"MiB": 150.0, "of the study's": 0.5}
        assert summary[f"ours, {method}, bf16"] == {"MiB": 100.0, "of the study's": 0.333}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
def test_the_peak_is_that_of_the_process(benchmark):
    memory = benchmark("step_memory")
    before = memory.resident("VmRSS")
    assert memory.resident("VmHWM") >= before > 0
    with mmap.mmap(-1, 64 * 2**20) as room:  # new pages: an allocator may have some of its own to give again
        room.write(b"x" * len(room))
        assert memory.resident("VmRSS") - before > 60
    assert memory.resident("VmHWM") >= before + 60
