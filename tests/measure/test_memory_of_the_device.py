"""Tests how much memory a measurement takes where none is set."""

import pytest
import torch

from robustdyn.measure.plan import memory_of

GIB = 2**30


def test_on_a_cpu_it_is_fixed():
    assert memory_of(torch.device("cpu")) == 256 * 2**20


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "taken"),
    [
        (100 * GIB, 0, 0, 32 * GIB),  # half is 50
        (101 * GIB, 0, 0, 32 * GIB),  # as much although another process took less
        (20 * GIB, 60 * GIB, 10 * GIB, 32 * GIB),  # what PyTorch keeps for later is free too
        (0, 0, 0, 1),
    ],
)
def test_on_a_gpu_it_is_up_to_half_of_what_is_free(monkeypatch, free, reserved, allocated, taken):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    assert memory_of(torch.device("cuda", 0)) == taken
