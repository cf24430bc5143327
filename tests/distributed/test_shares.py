"""A rank's part of a batch, the ranks played one after the other in one process: what they do adds up."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from robustdyn.data import TensorBatches
from robustdyn.data.tensors import share
from robustdyn.run.config import build
from robustdyn.run.parts import build_module
from tests.data.official import digits
from tests.runs import TINY, compose
from tests.tolerances import EXACT32, EXACT64

BATCH = 7  # of 27 images: the last batch has 6


def parts_of(split, rank, ranks):
    return TensorBatches(split, BATCH, rank=rank, world_size=ranks)


@pytest.fixture(scope="module")
def split():
    data = digits(train_size=27, batch_size=BATCH)
    data.setup()
    return data.split("train")


def batch(split, number, rank=0, ranks=1):
    found = list(parts_of(split, rank, ranks))[number]
    return found._replace(images=found.images.double())


@functools.cache
def built(*overrides):
    """A run's module and its network, without BatchNorm, in float64."""
    cfg = compose(*TINY, *overrides)
    torch.manual_seed(0)
    module = build_module(cfg, build(cfg, "data"))
    module.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).double()
    return module


def on_rank(rank, ranks, split, *overrides):
    """The module of a rank, with as much of a trainer as a step asks for."""
    module = copy.deepcopy(built(*overrides))
    loader = parts_of(split, rank, ranks)
    module.trainer = SimpleNamespace(
        world_size=ranks,
        global_rank=rank,
        train_dataloader=loader,
        val_dataloaders=[loader],
        global_step=5,
        accumulate_grad_batches=1,
        gradient_clip_val=None,
        current_epoch=0,
        precision_plugin=None,
        optimizers=[torch.optim.SGD(module.parameters(), lr=0.1)],
    )
    return module


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_loader_knows_its_part_of_every_batch(split, ranks):
    for rank in range(ranks):
        loader = parts_of(split, rank, ranks)
        for number, own in enumerate(loader):
            part = loader.part(number)
            assert part.whole == (6 if number == 3 else BATCH)
            assert part.places == share(part.whole, rank, ranks)
            whole = batch(split, number)
            assert torch.equal(own.indices, whole.indices[part.places])


def gradients(module, own, number):
    loss = module.training_step(own, number)
    return torch.autograd.grad(loss, list(module.model.parameters()))


STEPS = [
    ("objective=at", "regularizer.l1=1e-2"),
    ("objective=at", "attack=l2"),
    ("method=trades",),
    ("method=mart",),
    ("objective=standard",),
    ("objective=at", "gradient_noise=gaussian"),
    ("method=trades", "gradient_noise=gaussian"),
]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("overrides", STEPS, ids=" ".join)
def test_averaged_gradients_are_those_of_the_whole_batch(split, overrides, ranks):
    """Seven images on two or three ranks, shares of different size; each attack starts where one's does."""
    alone = on_rank(0, 1, split, *overrides)
    wanted = gradients(alone, batch(split, 0), 0)
    assert all(g.norm() > 0 for g in wanted)
    found = [
        gradients(on_rank(rank, ranks, split, *overrides), batch(split, 0, rank, ranks), 0)
        for rank in range(ranks)
    ]
    for value, *each in zip(wanted, *found, strict=True):
        assert_close(torch.stack(each).mean(0), value, **EXACT64)


def test_with_frozen_statistics_parts_need_no_statistics_of_others(split):
    def on(rank, ranks):
        module = on_rank(rank, ranks, split, "objective=at", "batchnorm.frozen_from=0")
        module.model.insert(2, nn.BatchNorm1d(12)).double()
        nn.init.uniform_(module.model[2].running_var, 0.5, 2.0, generator=torch.Generator().manual_seed(0))
        return gradients(module, batch(split, 0, rank, ranks), 0)

    wanted, first, second = on(0, 1), on(0, 2), on(1, 2)
    for value, one, other in zip(wanted, first, second, strict=True):
        assert_close((one + other) / 2, value, **EXACT64)


@pytest.mark.parametrize("overrides", [("attack=linf",), ("attack=l2",)], ids=" ".join)
def test_evaluation_does_not_depend_on_the_number_of_ranks(split, overrides):
    def sums(rank, ranks):
        module = on_rank(rank, ranks, split, *overrides)
        for number in (0, 3):
            module.validation_step(batch(split, number, rank, ranks), number)
        metrics = module._metrics_of("test")
        return [torch.stack([m.loss, m.right, m.examples]) for m in (metrics.robust, metrics.clean)]

    wanted = sums(0, 1)
    found = [sum(each) for each in zip(*(sums(rank, 2) for rank in range(2)), strict=True)]
    assert_close(found, wanted, **EXACT32)  # kept in float32
    assert int(wanted[0][2]) == 13
