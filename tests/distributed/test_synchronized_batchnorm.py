"""Synchronised BatchNorm on two processes: PyTorch's own BatchNorm on all examples in one."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from robustdyn.launch.ranks import Ranks
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
