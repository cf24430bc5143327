"""A dry run of the GPU pack on the CPU, at a small size."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from tests.runs import command

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"
MODULES = (
    *("common", "study_loops", "at_step", "gpu", "curvature_problem", "curvature_products"),
    "measurement_cost",
)
SMALL = (
    *("--device=cpu", "--width=2", "--steps=1", "--rounds=1", "--batches=1", "--no-compile"),
    *("--batch=8", "--batch-sizes", "8", "--examples=8", "--measured-steps=2"),
)
FEW = ("--overrides", "model.blocks=[1,1,1,1]", "measure.eigenpairs.directions=1", "measure.second_attack=4")
TESTS = """<testsuites><testsuite>
<testcase name="right[gpu]"><properties><property name="weights" value="1e-10"/></properties></testcase>
<testcase name="wrong[gpu]"><failure message="off by 1"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def pack(monkeypatch, tmp_path):
    """The pack, which writes elsewhere."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path / "results")
    yield importlib.import_module("gpu")
    for name in MODULES:
        sys.modules.pop(name, None)


def notes(pack, tmp_path):
    return pack.Notes(tmp_path / "found.json")


def test_steps(pack, tmp_path):
    found = notes(pack, tmp_path)
    pack.steps(pack.parsed(SMALL), found)
    bf16 = pack.EXECUTIONS["bf16"]
    limits = [f"limit of {pack.EXECUTIONS[key]}" for key in ("default", "bf16")]
    for name in (pack.STUDY, pack.STUDY_FULL, pack.EXECUTIONS["default"], bf16, *limits):
        assert min(found.found[name]) > 0
    assert not any("failed" in name for name in found.found)
    assert json.loads((tmp_path / "found.json").read_text()) == found.found
    said = pack.summary({"steps of 8": found.found}, "NVIDIA H200")
    row = said["steps of 8"][bf16]
    assert row["images a second"] == pytest.approx(8 / found.found[bf16][0], abs=0.051)
    assert row["share of the bare passes"] > 0
    used = 8 / found.found[bf16][0] * found.found["flops of an image"] / 989e12
    assert row["model FLOP utilisation"] == round(used, 4)
    assert f"| {bf16} |" in pack.tables(said)


@pytest.mark.slow
def test_products_and_a_measurement(pack, tmp_path, monkeypatch):
    import measurement_cost

    def run(words):
        assert command(monkeypatch, *words[3:]) == 0

    monkeypatch.setattr(measurement_cost, "run", run)
    found = notes(pack, tmp_path)
    pack.curvature(pack.parsed([*SMALL, *FEW]), found)
    assert not any("failed" in name for name in found.found)
    assert max(found.found["relative difference to an independent product"].values()) < 1e-4
    for part in ("all", "hessian eigenpairs", "noise eigenpairs"):
        for start in ("cold", "warm"):
            assert found.found[f"measurement, {start}: {part}"]["seconds"] > 0
    steps = {pack.EXECUTIONS["fast"]: [0.1]}
    said = pack.summary({"steps of 128": steps, "curvature": found.found}, "a card")["curvature"]
    whole = said["measurement, cold: all"]
    # an epoch of 50,000 images at 1,280 images a second
    share = 100 * found.found["measurement, cold: all"]["seconds"] / (50_000 / 1280)
    assert whole[f"per cent of an epoch, {pack.EXECUTIONS['fast']}"] == pytest.approx(share, abs=1e-3)
    assert said["ours, graph kept"]["gradients"] > 0


def test_a_part_that_fails_leaves_the_others(pack, tmp_path, monkeypatch, capsys):
    class Stub:
        """Steps of 8 end well, curvature is stopped halfway, and steps of 16 find no time."""

        def __init__(self, words, seconds, said):
            self.words = [str(word) for word in words]

        def finish(self):
            into = next((Path(w[7:]) for w in self.words if w.startswith("--into=")), None)
            if into is None:
                path = next(word[11:] for word in self.words if word.startswith("--junitxml="))
                Path(path).write_text(TESTS)
                return "exit status 1"
            into.write_text(json.dumps({pack.EXECUTIONS["default"]: [0.5]}))
            if "--part=curvature" in self.words:
                clock[0] += 340
                return "stopped, as its time was up"
            return None

    clock = [0.0]
    monkeypatch.setattr(pack, "Process", Stub)
    monkeypatch.setattr(pack.time, "monotonic", lambda: clock[0])
    with pytest.raises(SystemExit, match="not all tests of correctness passed: exit status 1"):
        pack.main(["--device=cpu", "--batch-sizes", "8", "16"])
    summary = json.loads((tmp_path / "results" / "gpu_dry_run.json").read_text())["summary"]
    assert summary["tests"] == {"passed": 1, "failure": 1}
    assert summary["found"]["correctness"]["right[gpu]"] == {"outcome": "passed", "weights": "1e-10"}
    assert summary["found"]["correctness"]["wrong[gpu]"]["said"] == "off by 1"
    assert summary["steps of 8"][pack.EXECUTIONS["default"]]["images a second"] == 16
    assert summary["found"]["curvature"]["failed"] == "stopped, as its time was up"
    assert "10 s of the budget were left" in summary["found"]["steps of 16"]["skipped"]
    assert "steps of 8" in capsys.readouterr().out


def test_a_process_that_hangs_is_stopped(pack, tmp_path):
    said = tmp_path / "said"
    hangs = pack.Process([sys.executable, "-c", "import time; time.sleep(60)"], 0.1, said)
    fails = pack.Process([sys.executable, "-c", "raise ValueError('no')"], 60, said.with_suffix(".other"))
    assert hangs.finish() == "stopped, as its time was up"
    assert re.search("(?s)exit status 1.*ValueError: no", fails.finish())


def test_without_a_gpu_it_says_so(pack, monkeypatch):
    monkeypatch.setattr(pack.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        pack.main([])


def test_what_was_tested_until_it_was_stopped(pack, tmp_path):
    log = tmp_path / "log"
    log.write_text("[gw0] [ 5%] PASSED tests/gpu/test_gpu.py::test_a[gpu]\n[gw1] [ 9%] FAILED t.py::test_b\n")
    assert pack.said_so_far(log) == {"test_a[gpu]": {"outcome": "passed"}, "test_b": {"outcome": "failed"}}
