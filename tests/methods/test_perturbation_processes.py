"""Tests that two data-parallel processes perturb weights as one process does with the union of the batches.

All checks run in one pair of processes, python -m tests.methods.test_perturbation_processes RANK STORE OUT,
whose results the tests below read. Called without a group, the same functions give the reference.
"""

import copy
import datetime
import sys
from pathlib import Path

import lightning
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from robustdyn.models.modes import frozen_statistics
from robustdyn.run.config import build, register_resolvers
from robustdyn.run.parts import build_module
from tests.curvature.workers import counted
from tests.methods.test_perturbations import PERTURBATIONS, buffers, problem, values
from tests.processes import run_processes
from tests.runs import UNMEASURED, compose
from tests.tolerances import EXACT32, EXACT64

ROOT = Path(__file__).parents[2]
PROCESSES = 2
LIMIT = 150  # seconds for both processes; they need twenty
PATIENCE = 60  # seconds that a process waits for the other one
EXACTLY = {"rtol": 0.0, "atol": 0.0}


def share(rank, *tensors):
    """A rank's half of a batch, or all of it."""
    return tensors if rank is None else tuple(tensor.chunk(PROCESSES)[rank] for tensor in tensors)


# ---------------------------------------------------------------------- what each process does


def moved(name, rank, overflow_on=None):
    """Weights after ``apply`` with running statistics, and the communication that this took."""
    model, x, y = problem()
    model(x)  # gives non-trivial statistics
    model.eval()
    x, y = share(rank, x, y)
    loss = F.cross_entropy(model(x), y)
    scale = None
    if overflow_on is not None:
        scale = 2.0**10
        if rank == overflow_on:
            model.second.weight.register_hook(lambda gradient: gradient * float("inf"))
    with counted() as calls:
        PERTURBATIONS[name]().apply(model, loss, loss_scale=scale)
    return values(model), dict(calls)


class Step(nn.Module):
    """Makes the whole training step one forward pass, as Lightning's wrapper sees it."""

    def __init__(self, model, perturbation):
        super().__init__()
        self.model, self.perturbation = model, perturbation

    def forward(self, x, y):
        with frozen_statistics(self.model):
            loss = F.cross_entropy(self.model(x), y)
        self.perturbation.apply(self.model, loss)
        return F.cross_entropy(self.model(x), y)


class Settled(nn.Module):
    """A network with BatchNorm in which every parameter gets a gradient, as the wrapper requires."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(F.relu(self.norm(self.first(x))))


def averaged(tensors):
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= PROCESSES
    return tensors


def wrapped(name, rank):
    """Gradients and statistics of three steps, by the wrapper and with gradients averaged by hand."""
    _, x, y = problem()
    torch.manual_seed(0)
    model = Settled().double()
    by_hand, perturbation, other = copy.deepcopy(model), PERTURBATIONS[name](), PERTURBATIONS[name]()
    ddp = DistributedDataParallel(Step(model, perturbation))
    steps = []
    for number in range(3):
        own_x, own_y = share(rank, x.roll(number, dims=0) * (1 + number), y.roll(number))
        ddp.zero_grad(set_to_none=number == 1)
        ddp(own_x, own_y).backward()
        perturbation.restore()
        found = {k: p.grad.clone() for k, p in model.named_parameters()}

        for buffer in by_hand.buffers():
            dist.broadcast(buffer, 0)
        weights = [p for k, p in by_hand.named_parameters() if other.selects(k, p)]
        with frozen_statistics(by_hand):
            loss = F.cross_entropy(by_hand(own_x), own_y)
        ascent = averaged(list(torch.autograd.grad(loss, weights)))
        before = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, move in zip(weights, other.direction(before, ascent), strict=True):
                weight += move
        loss = F.cross_entropy(by_hand(own_x), own_y)
        descent = averaged(list(torch.autograd.grad(loss, list(by_hand.parameters()))))
        wanted = dict(zip(found, descent, strict=True))
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
            for network, gradients in ((model, found), (by_hand, wanted)):
                for key, parameter in network.named_parameters():
                    parameter -= 0.3 * gradients[key]
        steps.append(((found, buffers(model)), (wanted, buffers(by_hand))))
    return steps


def trained(method, rank, *overrides, plain_network=False):
    """Weights and metrics after one epoch of a run."""
    cfg = compose(*UNMEASURED, f"method={method}", "trainer.max_epochs=1", *overrides)
    lightning.seed_everything(cfg.seed, verbose=False)
    data = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")
    module = build_module(cfg, data)
    if plain_network:  # BatchNorm's statistics would be those of each rank's share
        module.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    # statistics of each rank's own share, as without the plugin that robustdyn-train gives its trainer
    settings = {} if rank is None else {"devices": PROCESSES, "strategy": "ddp", "sync_batchnorm": False}
    trainer = build(
        cfg, "trainer", logger=False, enable_checkpointing=False, enable_progress_bar=False, **settings
    )
    trainer.fit(module, datamodule=data)
    assert trainer.world_size == (1 if rank is None else PROCESSES)
    assert trainer.global_step == 3
    return values(module.model), module.epoch_metrics()


def on_the_union(method, rank):
    """Train in float64 with attacks without randomness, which would differ between ranks."""
    overrides = ("attack.train.random_start=none", "attack.evaluation.random_start=none")
    return trained(method, rank, *overrides, "trainer.precision=64-true", plain_network=True)


def main(rank, store, out):
    torch.set_num_threads(1)
    register_resolvers()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    found = {}
    for name in PERTURBATIONS:
        found[name] = {
            "moved": moved(name, rank),
            "overflow": moved(name, rank, overflow_on=1),
            "wrapped": wrapped(name, rank),
            "trained": trained(name, rank),
            "on the union": on_the_union(name, rank),
        }
    torch.save(found, out / f"{rank}.pt")


# ---------------------------------------------------------------------- what the tests read

pytestmark = pytest.mark.slow  # starts two processes


@pytest.fixture(scope="module")
def everybody(tmp_path_factory):
    """The results of each rank."""
    out = tmp_path_factory.mktemp("processes")
    paths = run_processes("tests.methods.test_perturbation_processes", out, PROCESSES, LIMIT)
    return [torch.load(path, weights_only=True) for path in paths]


every_perturbation = pytest.mark.parametrize("name", PERTURBATIONS)


@every_perturbation
def test_both_ranks_move_as_one_process_on_the_union(everybody, name):
    first, second = (found[name]["moved"] for found in everybody)
    assert_close(second[0], first[0], **EXACTLY)
    wanted, calls = moved(name, None)
    assert_close(first[0], wanted, **EXACT64)
    assert not torch.equal(wanted["first.weight"], problem()[0].first.weight)
    assert calls == {}


@every_perturbation
def test_one_reduction_for_all_tensors(everybody, name):
    assert [found[name]["moved"][1] for found in everybody] == [{"all_reduce": 1}] * PROCESSES


@every_perturbation
def test_an_overflow_on_one_rank_is_everybodys(everybody, name):
    for found in everybody:
        assert_close(found[name]["overflow"][0], values(problem()[0]), **EXACTLY)


@every_perturbation
def test_the_ascent_leaves_the_wrappers_reduction_alone(everybody, name):
    for found in everybody:
        for step in found[name]["wrapped"]:
            assert_close(step[0], step[1], **EXACT64)
    # gradients are shared, the statistics of one's own batch are not
    first, second = (found[name]["wrapped"] for found in everybody)
    assert_close([step[0][0] for step in first], [step[0][0] for step in second], **EXACTLY)
    assert not torch.equal(first[0][0][1]["norm.running_mean"], second[0][0][1]["norm.running_mean"])
    assert [int(step[0][1]["norm.num_batches_tracked"]) for step in first] == [1, 2, 3]


@every_perturbation
def test_runs_end_with_the_same_weights_on_both_ranks(everybody, name):
    first, second = (found[name]["trained"] for found in everybody)
    assert_close(second[0], first[0], **EXACTLY)
    assert second[1] == first[1]
    assert all(bool(value.isfinite().all()) for value in first[0].values())


@every_perturbation
def test_runs_are_those_of_one_process(everybody, name):
    """This holds without BatchNorm, because each rank has its own statistics."""
    weights, metrics = everybody[0][name]["on the union"]
    alone, wanted = on_the_union(name, None)
    assert_close(weights, alone, **EXACT64)
    assert metrics == pytest.approx(wanted, rel=EXACT32["rtol"], abs=EXACT32["atol"])  # kept in float32


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
