"""Tests that graphs kept between products change no bit and use no more memory than they are given."""

import copy
import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torch.testing import assert_close

from robustdyn.curvature import EmpiricalRisk, Hessian
from robustdyn.curvature.tape import Tape, count_saved_bytes
from tests.cases import CASES
from tests.curvature.reference import (
    OPERATORS,
    PLENTY,
    alive,
    assert_same_bits,
    flat,
    products_of,
    random,
    risk_of,
)
from tests.tolerances import EXACT64


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_kept_graphs_change_no_bit(case, made):
    """Recording is the same whether the graph is kept or not, so this asks for equality."""
    chunk = case.chunk_size or case.examples
    chunks = -(-case.examples // chunk)
    fresh, keeping = risk_of(case), risk_of(case, memory=PLENTY)
    assert (fresh.chunk_size, keeping.chunk_size) == (chunk, chunk)
    wanted = products_of(fresh)
    made.clear()
    for _ in range(3):
        assert_same_bits(products_of(keeping), wanted)
    assert len(made) == alive(made) == chunks  # recorded once for all operators


def test_any_number_of_chunks_may_be_kept(made):
    """With five examples in chunks of 2, 2 and 1, more memory keeps more of the three graphs."""
    wanted = products_of(risk_of(CASES["conv_norm_uneven"]))
    seen: dict[int, int] = {}
    for memory in (round(1e4 * 1.3**step) for step in range(24)):
        risk = risk_of(CASES["conv_norm_uneven"], memory=memory)
        made.clear()
        _ = Hessian(risk) @ random(risk.numel)
        kept = alive(made)
        assert kept >= max(seen, default=0)
        if kept not in seen:
            seen[kept] = memory
            assert_same_bits(products_of(risk), wanted)
            assert alive(made) == kept
    assert set(seen) == {0, 1, 2, 3}


def test_no_memory_keeps_nothing(made):
    """One example at a time, so that sums are rounded differently."""
    wanted = products_of(risk_of(CASES["preact"], chunk_size=1))
    risk = risk_of(CASES["preact"], chunk_size=None, memory=0)
    assert risk.chunk_size == 1
    assert_same_bits(products_of(risk), wanted)
    assert alive(made) == 0
    with pytest.raises(ValueError, match="number of bytes"):
        risk_of(CASES["preact"], memory=-1)


def images(examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = CASES["conv_norm_uneven"].problem()[0]
    return model, random(examples, 2, 6, 6), torch.arange(examples) % 3


def saved_bytes(risk: EmpiricalRisk, examples: int) -> int:
    with risk.guard(), count_saved_bytes() as counted:
        risk.tape(*risk.subset(slice(0, examples)))
    return counted[0]


def test_the_chunk_follows_the_memory(made):
    model, inputs, targets = images(64)
    one = saved_bytes(EmpiricalRisk(model, inputs, targets), 1)
    chosen = []
    for memory in (round(one * 2**power) for power in range(12)):
        risk = EmpiricalRisk(model, inputs, targets, memory=memory)
        made.clear()
        _ = Hessian(risk) @ random(risk.numel)
        chosen.append(risk.chunk_size)
        kept, working = alive(made), saved_bytes(risk, risk.chunk_size)
        # half: the design's quarter, and as much again because a graph is not quite linear in its examples
        assert risk.chunk_size == 1 or working <= memory / 2
        assert kept == 0 or (kept + 1) * working <= 1.1 * memory
    assert chosen[0] == 1
    assert all(first <= second for first, second in pairwise(chosen))
    assert sum(first < second for first, second in pairwise(chosen)) >= 4
    assert (chosen[-1], kept) == (64, 1)  # 32 times what all examples need
    assert EmpiricalRisk(model, inputs, targets, memory=PLENTY, chunk_size=7).chunk_size == 7


def test_memory_for_everything_keeps_everything(made):
    model, inputs, targets = images(64)
    everything = saved_bytes(EmpiricalRisk(model, inputs, targets), 64)
    risk = EmpiricalRisk(model, inputs, targets, memory=3 * everything)
    made.clear()
    _ = Hessian(risk) @ random(risk.numel)
    assert alive(made) == len(made) == -(-64 // risk.chunk_size)


@pytest.mark.parametrize(("kind", "memory"), [("flat", 30_000), ("images", 400_000)])
def test_the_choice_does_not_depend_on_how_many_examples_there_are(kind, memory):
    if kind == "flat":
        model = nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 3))
        inputs = random(4096, 40).float()
    else:
        model, inputs, _ = images(4096)
    targets = torch.arange(4096) % 3
    few, many = (
        EmpiricalRisk(model, inputs[:count].clone(), targets[:count].clone(), memory=memory).chunk_size
        for count in (64, 4096)
    )
    assert 1 < few == many < 64


def test_a_tape_that_is_used_up():
    """The last product frees what it passes, rather than leave it to the tape's end."""
    risk = risk_of(CASES["preact"])
    with risk.guard():
        parts = tuple(risk.split(random(risk.numel)).values())
        for use_up in (
            lambda tape: tape.hessian_product(parts, last=True),
            lambda tape: tape.jacobian_transpose_product(torch.ones_like(tape.slopes), last=True),
        ):
            tape = risk.tape(risk.inputs, risk.targets)
            wanted = tape.hessian_product(parts, last=False)
            assert_close(tape.hessian_product(parts, last=False), wanted, rtol=0.0, atol=0.0)
            use_up(tape)
            with pytest.raises(RuntimeError, match="second time"):
                tape.hessian_product(parts, last=False)


def test_a_graph_is_gone_before_the_next_one_is_made(monkeypatch):
    """The memory set aside for work is that of one chunk."""
    living: weakref.WeakSet[Tape] = weakref.WeakSet()
    most = []
    record = Tape.__init__

    def note(tape: Tape, *arguments: object, **settings: object) -> None:
        most.append(sum(hasattr(other, "gradient") and bool(other.gradient) for other in living))
        living.add(tape)
        record(tape, *arguments, **settings)

    monkeypatch.setattr(Tape, "__init__", note)
    risk = risk_of(CASES["preact"], chunk_size=1)
    for kind in OPERATORS.values():
        most.clear()
        _ = kind(risk) @ random(risk.numel)
        assert len(most) == 5
        assert max(most) == 0, kind


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.name)
def test_at_another_point(case, made):
    model, inputs, targets = case.problem()
    risk = EmpiricalRisk(model, inputs, targets, chunk_size=case.chunk_size, memory=PLENTY)
    made.clear()
    theta = flat(risk) + 0.1 * random(risk.numel, seed=3)
    here = products_of(risk)
    own = list(made)

    moved = copy.deepcopy(model)
    vector_to_parameters(theta.clone(), moved.parameters())  # makes them views
    wanted_risk = EmpiricalRisk(moved, inputs, targets, chunk_size=case.chunk_size)
    there = risk.at(theta)
    kept = theta.clone()
    theta.zero_()  # the point is a copy
    assert torch.equal(there.theta(), kept)
    assert there.value() == pytest.approx(wanted_risk.value(), rel=1e-12)
    assert_close(there.gradient(), wanted_risk.gradient(), **EXACT64)
    made.clear()
    found, wanted = products_of(there), products_of(wanted_risk)
    for name in wanted:
        assert_close(found[name], wanted[name], **EXACT64)
        assert not torch.equal(found[name], here[name])

    # graphs of either point are its own
    assert alive(own) == len(own)
    assert alive(made) == len(own)
    assert_same_bits(products_of(risk), here)
    del there
    assert alive(made) == 0
    assert alive(own) == len(own)


def test_at_refuses_and_converts():
    risk = risk_of(CASES["softmax"])
    with pytest.raises(ValueError, match="shape"):
        risk.at(torch.zeros(risk.numel - 1))
    with pytest.raises(ValueError, match="shape"):
        risk.at(torch.zeros(1, risk.numel))
    there = risk.at(risk.theta().float())
    assert there.theta().dtype == torch.float64
    # the model's weights do not matter there, those of an unmeasured part do
    value = there.value()
    with torch.no_grad():
        risk.model.linear.weight.zero_()
    assert there.value() == value


def test_over_other_examples():
    model, inputs, targets = CASES["preact"].problem()
    risk = EmpiricalRisk(model, inputs, targets, chunk_size=2, memory=PLENTY)
    here = products_of(risk)
    others, labels = 1.5 * inputs, (targets + 1) % 3
    other = risk.over(others, labels)
    assert_same_bits(products_of(other), products_of(EmpiricalRisk(model, others, labels, chunk_size=2)))
    assert_same_bits(products_of(risk), here)
    fewer = EmpiricalRisk(model, inputs[:3], targets[:3], chunk_size=2)
    assert_same_bits(products_of(risk.over(inputs[:3], targets[:3])), products_of(fewer))
    with pytest.raises(ValueError, match="must agree in their first dimension"):
        risk.over(inputs, targets[:4])
