"""Synchronised BatchNorm on two processes: PyTorch's own BatchNorm on all examples in one."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from robustdyn.curvature import EmpiricalRisk, layer_traces
from robustdyn.launch.ranks import Ranks
from robustdyn.models.sync_batchnorm import desynchronize, desynchronized, synchronize
from tests.distributed.batchnorm import SHARES, problem, work
from tests.tolerances import EXACT64


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("batchnorm")
    command = (sys.executable, "-m", "tests.distributed.batchnorm", str(out))
    Ranks(command, b"", 2, out).run()
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    return work(*problem())


@pytest.mark.parametrize("what", ["outputs", "input gradients", "evaluated"])
def test_each_rank_has_its_rows(ranks, alone, what):
    assert_close(torch.cat([found[what] for found in ranks]), alone[what], **EXACT64)


@pytest.mark.parametrize("what", ["gradients", "products", "buffers"])
def test_all_ranks_have_what_one_process_has(ranks, alone, what):
    for found in ranks:
        assert_close(found[what], alone[what], **EXACT64)


def test_half_precision_is_computed_in_single(ranks):
    _, x, *_ = problem()
    wanted = nn.BatchNorm2d(2)(x.bfloat16().float())
    for found, share in zip(ranks, SHARES, strict=True):
        assert found["half"].dtype == torch.bfloat16
        # rounded to eight binary digits once, at the end
        assert_close(found["half"].float(), wanted[share].detach(), rtol=2**-8, atol=1e-5)


def test_a_variance_far_from_zero_keeps_its_digits(ranks):
    """1000² fills a float32 number: mean of squares minus square of the mean would leave a digit."""
    _, x, *_ = problem()
    wanted = (x.float() + 1000).double().var(dim=(0, 2, 3))
    for found in ranks:
        assert_close(found["far"].double(), wanted, rtol=1e-4, atol=0)


def test_undone_it_is_each_ranks_own(ranks):
    for found, share in zip(ranks, SHARES, strict=True):
        net, x, *_ = problem()
        assert_close(found["apart"], net(x[share]).detach(), **EXACT64)


def test_a_measurement_finds_layers_whose_traces_are_exact():
    """They are refused for layers with a forward method of their own, which may do anything."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model = model.double().eval()
    risk = EmpiricalRisk(model, torch.rand(6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % 3)

    def estimator():
        generator = torch.Generator().manual_seed(0)
        return layer_traces(
            risk, method="auto", probes=2, exact_classes_up_to=10, generator=generator, weights_only=False
        ).estimator

    synchronize(model)
    assert estimator() == "hutchinson"
    with desynchronized(model):
        assert estimator() == "gauss_newton_exact"
    assert estimator() == "hutchinson"
    desynchronize(model)
    assert estimator() == "gauss_newton_exact"


def test_a_forward_method_of_somebody_else_is_left_alone():
    layer = nn.BatchNorm2d(2)
    layer.forward = own = lambda x: x
    with desynchronized(layer):
        assert layer.forward is own
    desynchronize(layer)
    assert layer.forward is own
