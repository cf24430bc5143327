"""Tests the operations of a training step against a count by hand."""

import pytest
import torch
from torch import nn

from robustdyn.measure import timing
from robustdyn.methods import AdversarialCrossEntropy
from robustdyn.methods.flops import bfloat16_peak, training_flops
from tests.measure.test_timing import table
from tests.methods.fits import SMALLER, WIDE, prepared, values
from tests.runs import command


def by_hand(model, image, *, trained, attacked, alone=0):
    """Operations for so many backward passes to weights and images, and forward passes ``alone``.

    A pass forward, one back to a layer's inputs and one back to its weights cost the same, and the layer at
    the images needs no gradient of its inputs when weights are trained.
    """
    costs = []

    def count(layer, inputs, output):
        per_output = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
        costs.append(2 * output[0].numel() * per_output)

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(image)
    for hook in hooks:
        hook.remove()
    return sum(costs) * (alone + 2 * attacked + 3 * trained) - trained * costs[0]


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (("attack.steps=3",), {"trained": 1, "attacked": 3}),
        (("method=awp", "perturbation.warmup_epochs=0"), {"trained": 2, "attacked": 2}),
        (("method=awp", "perturbation.warmup_epochs=1"), {"trained": 1, "attacked": 2}),
        # the attack needs the clean prediction once, and the descent both kinds of images
        (("method=trades",), {"trained": 2, "attacked": 2, "alone": 1}),
        (("objective=standard",), {"trained": 1, "attacked": 0}),
    ],
)
def test_operations_of_a_step(overrides, passes):
    _, data, module = prepared(*SMALLER, *overrides)
    batch = data.split("train").batch(torch.arange(5))
    before = values(module)
    found = training_flops(module.train(), batch.images, batch.targets)
    assert all(value.equal(before[name]) for name, value in values(module).items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert found == by_hand(module.model, batch.images[:1], **passes)


def test_dropout_draws_as_if_nothing_had_been_counted():
    _, data, module = prepared(*SMALLER)
    module.model = nn.Sequential(module.model, nn.Dropout())
    batch = data.split("train").batch(torch.arange(5))
    before = torch.get_rng_state()
    training_flops(module.train(), batch.images, batch.targets)
    assert torch.get_rng_state().equal(before)


def test_cards():
    assert bfloat16_peak("NVIDIA H200") == bfloat16_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert bfloat16_peak("NVIDIA H100 PCIe") == 756e12
    assert bfloat16_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert bfloat16_peak("NVIDIA L40S") != bfloat16_peak("NVIDIA L4")
    assert bfloat16_peak("NVIDIA H200 MIG 1g.18gb") is None
    assert bfloat16_peak("Tesla V100-SXM2-16GB") is None


def test_the_record_has_the_share_of_the_peak(monkeypatch, tmp_path):
    peak = 1e12
    monkeypatch.setattr(timing, "_peak", lambda trainer: peak)
    arguments = ("trainer.max_epochs=1", f"hydra.run.dir={tmp_path}")
    assert command(monkeypatch, *WIDE, *SMALLER, *arguments) == 0
    (row,) = table(tmp_path)
    _, data, module = prepared(*SMALLER)
    image = data.split("train").batch(torch.arange(1)).images
    wanted = row["images_per_second"] * by_hand(module.model, image, trained=1, attacked=2) / peak
    assert row["model_flop_utilisation"] == pytest.approx(wanted, rel=1e-12)


def test_a_run_whose_operations_cannot_be_counted_goes_on(monkeypatch, tmp_path):
    """The objective takes no image twice, as one that compares images with each other might."""
    whole = AdversarialCrossEntropy.__call__

    def distinct(self, model, images, adversarial, targets):
        if images[0].equal(images[1]):
            raise ZeroDivisionError("no distance\nbetween images")
        return whole(self, model, images, adversarial, targets)

    monkeypatch.setattr(AdversarialCrossEntropy, "__call__", distinct)
    monkeypatch.setattr(timing, "_peak", lambda trainer: 1e12)
    arguments = ("trainer.max_epochs=2", f"hydra.run.dir={tmp_path}")
    assert command(monkeypatch, *WIDE, *SMALLER, *arguments) == 0
    assert [row["model_flop_utilisation"] for row in table(tmp_path)] == [None, None]
    log = (tmp_path / "log.jsonl").read_text()
    assert log.count("model_flop_utilisation stays empty") == 1
    assert "ended in ZeroDivisionError: no distance between images" in log
