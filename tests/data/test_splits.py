import pytest
import torch

from robustdyn.data.splits import hold_out, stratified_order
from robustdyn.data.tensors import ImageTensors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "sizes", [[20] * 10, [3, 50, 17, 1], [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]]
)
def test_every_beginning_is_balanced(sizes):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = stratified_order(labels, generator())
    assert order.sort().values.tolist() == list(range(len(labels)))
    seen = torch.nn.functional.one_hot(labels[order]).cumsum(0)
    share = torch.tensor(sizes) / len(labels)
    expected = torch.arange(1, len(labels) + 1)[:, None] * share
    assert ((seen - expected).abs() <= 0.5 + len(sizes) * share / 2 + 1e-4).all()


def test_order_is_random_in_each_class_and_among_them():
    labels = torch.arange(1000) % 10
    orders = [stratified_order(labels, generator(seed)) for seed in (0, 1)]
    assert not torch.equal(*orders)
    firsts = {stratified_order(labels, generator(seed))[0].item() % 10 for seed in range(60)}
    assert firsts == set(range(10))


def test_hold_out_parts_the_set():
    labels = torch.arange(60) % 3
    data = ImageTensors(torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1), labels)
    rest, held = hold_out(data, 15, seed=0, stream="x")
    assert held.labels.bincount().tolist() == [5, 5, 5]
    both = torch.cat([rest.images.flatten(), held.images.flatten()])
    assert both.sort().values.tolist() == list(range(60))
    for part in (rest, held):
        assert part.images.flatten().tolist() == sorted(part.images.flatten().tolist())
        assert torch.equal(part.labels, part.images.flatten().long() % 3)
    _, smaller = hold_out(data, 6, seed=0, stream="x")
    assert set(smaller.images.flatten().tolist()) < set(held.images.flatten().tolist())
    _, other = hold_out(data, 15, seed=1, stream="x")
    assert not torch.equal(other.images, held.images)
