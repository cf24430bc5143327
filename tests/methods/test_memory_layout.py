"""Tests that memory layout and bfloat16 change only rounding."""

import functools

import lightning
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from robustdyn.attacks import PGD
from robustdyn.methods import Execution
from robustdyn.methods.execution import keep_layout
from tests.methods.fits import deviation, fit, momenta, values
from tests.tolerances import EXACT32, EXACT64

LAYOUTS = {True: torch.channels_last, False: torch.contiguous_format}
DOUBLE = ("trainer.precision=64-true", "trainer.max_epochs=2")
# EXACT64 holds: sums in another order differ by a few ulp a step, and no gradient whose sign the attack takes
# is so near to 0. Metrics are summed in float32.


def in_layout(channels_last, tensors):
    return all(t.is_contiguous(memory_format=LAYOUTS[channels_last]) for t in tensors if t.dim() == 4)


class Gradients(lightning.Callback):
    """The gradients of the last step, as the optimiser finds them."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.last = [parameter.grad for parameter in pl_module.model.parameters()]


@pytest.fixture(scope="module")
def in_both():
    """For each layout: the trained module, its gradients and momenta after two epochs in float64."""
    found = {}
    for channels_last in LAYOUTS:
        gradients = Gradients()
        module, trainer = fit(*DOUBLE, f"execution.channels_last={channels_last}", callbacks=[gradients])
        found[channels_last] = module, gradients.last, momenta(trainer)
    return found


def test_the_layout_changes_rounding_only(in_both):
    module, expected = in_both[True][0], in_both[False][0]
    assert module.model.conv1.weight.dtype == torch.float64
    assert_close(values(module), values(expected), **EXACT64)
    metrics, expected_metrics = module.epoch_metrics(), expected.epoch_metrics()
    assert metrics == pytest.approx(expected_metrics, rel=EXACT32["rtol"], abs=EXACT32["atol"])


@pytest.mark.parametrize("channels", [2, 4, 7, 8])
def test_a_narrow_strided_convolution_keeps_the_network_contiguous(channels):
    """Channels-last, its weights' gradient overwrites other memory on processors without AVX-512."""
    model = nn.Sequential(nn.Conv2d(8, channels, 3), nn.Conv2d(channels, 16, 1, stride=2))
    execution = Execution(channels_last=True, compile="none")
    execution.prepare(model)
    images = execution.images(torch.rand(2, 8, 6, 6))
    assert in_layout(channels == 8, [*model.parameters(), images])
    assert not in_layout(channels < 8, [*model.parameters(), images])


@pytest.mark.parametrize("channels", [4, 8])
def test_nor_does_the_compiler_put_its_channels_innermost(channels, monkeypatch):
    """It would do so by itself; the other options are those of the mode."""
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **settings: asked.append(settings))
    model = nn.Sequential(nn.Conv2d(8, channels, 3), nn.Conv2d(channels, 16, 1, stride=2))
    Execution(channels_last=True, compile="reduce-overhead").prepare(model)
    expected = {"triton.cudagraphs": True} | ({} if channels == 8 else {"layout_optimization": False})
    assert asked == [{"options": expected, "dynamic": False}]


@pytest.mark.parametrize("channels_last", LAYOUTS)
def test_weights_gradients_and_momenta_stay_in_their_layout(in_both, channels_last):
    module, gradients, momentum = in_both[channels_last]
    for tensors in (list(module.model.parameters()), gradients, momentum):
        assert in_layout(channels_last, tensors)
        assert not in_layout(not channels_last, tensors)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Train the second of two epochs from a checkpoint, in the same layout or in another."""
    paths = {}
    for channels_last in LAYOUTS:
        paths[channels_last] = tmp_path_factory.mktemp("layout") / "one.ckpt"
        _, trainer = fit(*DOUBLE, f"execution.channels_last={channels_last}", "trainer.max_epochs=1")
        trainer.save_checkpoint(paths[channels_last])

    def run(wrote, reads, fused):
        execution = f"execution.channels_last={reads}"
        return fit(*DOUBLE, execution, f"optimizer.fused={fused}", resume=paths[wrote])

    return functools.cache(run)


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrote", LAYOUTS)
def test_goes_on_from_a_checkpoint_in_the_other_layout(resumed, wrote, fused):
    module, trainer = resumed(wrote, not wrote, fused)
    assert trainer.global_step == 6
    assert_close(values(module), values(resumed(wrote, wrote, False)[0]), **EXACT64)
    assert in_layout(not wrote, [*module.model.parameters(), *momenta(trainer)])


OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.1, fused=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1, fused=True),
}


def resumed_in_the_other_layout(optimizer, *, kept):
    """A weight after two steps, the second after loading into the other layout and into the same one."""
    draws = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(3, 2, 3, 2, 2, generator=draws, dtype=torch.float64).unbind()
    ends = []
    for layout in (torch.channels_last, torch.contiguous_format):
        weight = nn.Parameter(start.clone())
        first = OPTIMIZERS[optimizer]([weight])
        weight.grad = gradients[0].clone()
        first.step()
        again = nn.Parameter(weight.detach().clone(memory_format=layout))
        second = OPTIMIZERS[optimizer]([again])
        if kept:
            keep_layout(second)
        second.load_state_dict(first.state_dict())
        again.grad = gradients[1].clone(memory_format=layout)
        second.step()
        ends.append(again.detach().contiguous())
    return ends


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loaded_state_takes_the_weights_layout(optimizer):
    found, expected = resumed_in_the_other_layout(optimizer, kept=True)
    assert_close(found, expected, **EXACT64)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_why_loaded_state_is_laid_out(optimizer):
    """PyTorch's own behaviour: if this fails, keep_layout can go."""
    found, expected = resumed_in_the_other_layout(optimizer, kept=False)
    assert float((found - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", ["uniform", "gaussian", "none"])
def test_random_starts_do_not_depend_on_the_layout(norm, random_start):
    images = torch.rand(5, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    attack = PGD(norm=norm, eps=0.5, step_size=0.1, steps=0, random_start=random_start, start_std=0.3,
                 batchnorm="eval")  # fmt: skip
    found = []
    for channels_last in LAYOUTS:
        laid_out = Execution(channels_last=channels_last, compile="none").images(images)
        assert in_layout(channels_last, [laid_out])
        start = attack.perturb(nn.Identity(), laid_out, images, torch.Generator().manual_seed(1))
        assert in_layout(channels_last, [start])  # as it enters the network
        found.append(start)
    assert torch.equal(*found)
    assert torch.equal(found[0], images) == (random_start == "none")


def test_other_inputs_are_let_alone():
    execution = Execution(channels_last=True, compile="none")
    for shape in ((4, 7), (4, 3, 5)):
        inputs = torch.rand(shape)
        assert execution.images(inputs) is inputs
    linear = nn.Linear(7, 3)
    before = linear.weight.data_ptr()
    execution.prepare(linear)
    assert linear.weight.data_ptr() == before


@pytest.mark.slow  # two runs
def test_averages_do_not_depend_on_the_layout():
    """This is in float32, because Lightning makes the average before the weights become double."""
    ends = {}
    for channels_last in LAYOUTS:
        averaging = ("averaging=ema", "averaging.decay=0.5", "trainer.max_epochs=1")
        module, _ = fit(*averaging, f"execution.channels_last={channels_last}")
        ends[channels_last] = values(module)
        assert in_layout(channels_last, module.model.parameters())
    assert deviation(ends[True], ends[False]) < 1e-6  # 2e-8 was seen


def test_bf16_is_float32_but_for_its_rounding():
    half, trainer = fit("execution=bf16", "trainer.max_epochs=1")
    full, _ = fit("trainer.max_epochs=1")
    assert trainer.precision == "bf16-mixed"
    held = [*half.model.state_dict().values(), *momenta(trainer)]
    assert {t.dtype for t in held} == {torch.float32, torch.int64}  # batches are counted
    seen = []
    half.model.conv1.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = half.model(torch.rand(2, 1, 8, 8))
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32
    found, expected = half.epoch_metrics(), full.epoch_metrics()
    losses = [name for name in expected if name.endswith("_loss")]
    assert len(losses) == 4
    # logits of size 1 are rounded to 2^-9 at some ten layers; 0.2 % was seen
    assert [found[name] for name in losses] == pytest.approx([expected[name] for name in losses], rel=0.02)
    assert found != expected
