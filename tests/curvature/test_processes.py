"""Tests that two processes, each with a shard of the examples, measure the same curvature as one process.

All checks run in one pair of processes (tests/curvature/workers.py), which the tests below read.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from robustdyn.curvature import shard
from tests.curvature import workers
from tests.curvature.reference import random
from tests.curvature.test_minibatch_covariance import covariance
from tests.curvature.test_minibatch_covariance import problem as examples
from tests.curvature.workers import MINIBATCHES, PROCESSES, SPREADS, Results
from tests.processes import run_processes
from tests.tolerances import EXACT64

pytestmark = pytest.mark.slow  # two processes, and all of it once more in this one
ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds for both processes; they need fifteen


@pytest.fixture(scope="module")
def everybody(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """The results of each rank."""
    out = tmp_path_factory.mktemp("processes")
    paths = run_processes("tests.curvature.workers", out, PROCESSES, LIMIT)
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Results]]:
    """The results of one process with all examples."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {spread.name: workers.measure(spread, None) for spread in SPREADS}
    torch.set_num_threads(before)


def assert_agree(found: object, wanted: object, tolerance: dict[str, float], where: str) -> None:
    """Compare numbers to a tolerance, and text exactly."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_agree(found[key], wanted[key], tolerance, f"{where}, {key}")
    elif isinstance(wanted, list | tuple):
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_agree(one, other, tolerance, f"{where}, {index}")
    elif isinstance(wanted, str | None):
        assert found == wanted, where
    else:
        assert_close(found, wanted, **tolerance, equal_nan=True, msg=lambda message: f"{where}: {message}")


BITS = {"rtol": 0.0, "atol": 0.0}

spreads = pytest.mark.parametrize("spread", SPREADS, ids=lambda spread: spread.name)


@spreads
def test_both_ranks_have_the_same_bits(everybody, spread):
    first, second = (found[spread.name] for found in everybody)
    assert_agree(second, first, BITS, "rank 1")


@spreads
def test_two_processes_measure_what_one_does(everybody, alone, spread):
    """The results are equal bit for bit if the same chunks are added in the same order."""
    found, wanted = everybody[0][spread.name], alone[spread.name]
    assert found["examples"] == sum(spread.counts)
    assert_agree(found, wanted, BITS if spread.aligned else EXACT64, spread.name)


@spreads
def test_the_checks_are_not_empty(alone, spread):
    wanted = alone[spread.name]
    assert wanted["exact traces"]["estimator"] == "gauss_newton_exact"
    assert wanted["sampled traces"]["estimator"] == "gauss_newton_sampled"
    assert ("probed traces" in wanted) == spread.aligned
    for name in ("gradient", "weighted gradient", "H v", "H V", "G v", "C v", "C sample", "projections"):
        assert bool(wanted[name].any()), name
    assert wanted["eigenvalues"][0][2] > 1e-3


def test_one_reduction_for_each_product(everybody):
    """There is no other communication, however many chunks, columns and kept graphs there are."""
    for found in everybody:
        calls = dict(found["communication"])
        assert calls.pop("projections") == {"all_gather": 1}
        assert set(calls) >= {"H v", "G v", "C v", "H V", "G V", "C V", "scaled H v", "value", "gradient"}
        assert all(call == {"all_reduce": 1} for call in calls.values())


REFUSALS = {
    "not finite": "rank 1: inputs has numbers that are not finite",
    "weights": "hold different weights or running statistics",
    "statistics": "hold different weights or running statistics",
    "batch statistics": "rank 0: batchnorm='train' needs all examples in one process",
    "one empty": "rank 1: inputs is empty",
    "memory": "rank 1: memory must be a number of bytes or None, not -1",
    "unmeasured weights": "hold different weights or running statistics",
    "permuted weights": "hold different weights or running statistics",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_both_ranks_refuse_together(everybody, alone, name):
    value = alone[SPREADS[0].name]["value"]
    for found in everybody:
        refusals = found["refusals"]
        assert refusals[name].startswith("ValueError: ")
        assert REFUSALS[name] in refusals[name]
        assert refusals[name] == everybody[0]["refusals"][name]
        # the group still works; chunks are added in another order than in one process
        assert refusals[f"{name}, afterwards"] == pytest.approx(value, rel=EXACT64["rtol"])


def test_both_ranks_fail_together(everybody):
    first, second = (found["broken"]["class"] for found in everybody)
    assert second.startswith(
        "ValueError: rank 1: the targets are classes 0 to 3, but the model has 3 outputs"
    )
    assert first == second


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("hook", "rank 1: Linear 'linear' has forward hooks"),
        ("loss", "rank 1: the loss is not convex in the model's outputs"),
    ],
)
def test_an_obstacle_on_one_rank_is_everybodys(everybody, name, obstacle):
    first, second = (found["obstacles"] for found in everybody)
    assert first[name]["estimator"] == "hutchinson"
    assert obstacle in first[name]["reason"]
    assert first[name]["traces"].isfinite().all()
    assert_agree(second[name], first[name], BITS, name)
    for found in (first, second):
        assert obstacle in found[f"{name}, demanded"]
        assert found[f"{name}, demanded"].startswith("ValueError: method='gauss_newton' is not exact here")


def test_minibatches_of_both_ranks_are_those_of_one_process(everybody):
    first, second = (found["minibatches"] for found in everybody)
    model, inputs, targets = examples("preact", 24)
    used = torch.cat([torch.arange(24)[own][: len(range(24)[own]) // 4 * 4] for own in MINIBATCHES])
    one = workers.of_minibatches(covariance(model, inputs[used], targets[used], 4, "train"))
    for name, expected in one.items():
        assert torch.equal(first[name], second[name])
        assert_close(first[name], expected, **EXACT64)
    for few, statistics, weights in (first["refusals"], second["refusals"]):
        assert few == "ValueError: rank 1: batch_size must be between 1 and the 3 examples here, not 4"
        assert "different weights" in statistics
        assert "different weights" in weights


# ---------------------------------------------------------------------- shards


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("examples", [7, 8, 20, 101])
def test_shards_cover_everything_in_order(examples, processes):
    inputs, targets = random(examples, 3), torch.arange(examples)
    parts = [shard((inputs, targets), rank, processes) for rank in range(processes)]
    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    sizes = [len(part[1]) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert all(part[0].shape == (size, 3) for part, size in zip(parts, sizes, strict=True))


def test_shards_refuse_to_be_empty():
    inputs = random(3, 2)
    assert [len(shard((inputs,), rank, 3)[0]) for rank in range(3)] == [1, 1, 1]
    with pytest.raises(ValueError, match="3 examples cannot be spread over 4 processes"):
        shard((inputs,), 0, 4)
    with pytest.raises(ValueError, match="0 examples"):
        shard((inputs[:0],), 0, 1)
