"""Tests that layout, compilation and half precision change only rounding, and steps never wait for a GPU."""

import datetime
import functools
import os
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from robustdyn.attacks import PGD
from robustdyn.errors import ConfigError
from robustdyn.measure.watch import StopOnNonFinite
from robustdyn.methods import AdversarialTraining, Execution
from robustdyn.methods.execution import keep_layout
from robustdyn.run.config import build
from robustdyn.run.parts import build_module
from tests.processes import run_processes
from tests.runs import TINY, command, compose, rows
from tests.tolerances import EXACT32, EXACT64

# wide enough for the channels-last layout
UNMEASURED = (*(o for o in TINY if not o.startswith("measure.")), "model.width=8")
EXACTLY = {"rtol": 0.0, "atol": 0.0}


def values(module):
    """Weights and BatchNorm statistics."""
    return {name: value.detach().clone() for name, value in module.model.state_dict().items()}


def prepared(*overrides):
    cfg = compose(*UNMEASURED, *overrides)
    lightning.seed_everything(cfg.seed, verbose=False)
    data = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")
    return cfg, data, build_module(cfg, data)


def fit(*overrides, callbacks=(), resume=None, **settings):
    """Train in this process; return the trained module and its trainer."""
    cfg, data, module = prepared(*overrides)
    averaging = build(cfg, "averaging")
    trainer = build(
        cfg,
        "trainer",
        callbacks=[*callbacks, *([averaging] if averaging else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, trainer


def deviation(found, wanted):
    """‖found - wanted‖ / ‖wanted‖ over all tensors."""
    found, wanted = (
        torch.cat([t.double().flatten() for t in tensors.values()]) for tensors in (found, wanted)
    )
    return float((found - wanted).norm() / wanted.norm())


# ---------------------------------------------------------------------- memory layout

LAYOUTS = {True: torch.channels_last, False: torch.contiguous_format}
DOUBLE = ("trainer.precision=64-true", "trainer.max_epochs=2")
# EXACT64 holds: sums in another order differ by a few ulp a step, and no gradient whose sign the attack takes
# is so near to 0. Metrics are summed in float32.


def in_layout(channels_last, tensors):
    return all(t.is_contiguous(memory_format=LAYOUTS[channels_last]) for t in tensors if t.dim() == 4)


def momenta(trainer):
    (optimizer,) = trainer.optimizers
    return [state["momentum_buffer"] for state in optimizer.state.values()]


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


@pytest.mark.parametrize("fused", [True, False])
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


def test_averages_do_not_depend_on_the_layout():
    """This is in float32, because Lightning makes the average before the weights become double."""
    ends = {}
    for channels_last in LAYOUTS:
        averaging = ("averaging=ema", "averaging.decay=0.5", "trainer.max_epochs=1")
        module, _ = fit(*averaging, f"execution.channels_last={channels_last}")
        ends[channels_last] = values(module)
        assert in_layout(channels_last, module.model.parameters())
    assert deviation(ends[True], ends[False]) < 1e-6  # 2e-8 was seen


def test_there_are_four_kinds_of_compilation():
    with pytest.raises(
        ValueError, match="compile must be one of none, default, reduce-overhead, max-autotune"
    ):
        Execution(channels_last=True, compile="fastest")


# ---------------------------------------------------------------------- compilation


@pytest.fixture
def graphs(monkeypatch):
    """The number of images of each compiled pass, and whether it has gradients of weights.

    Only the generation of code, which takes minutes, is left out: PyTorch's own kernels compute the passes,
    so that an eager run has the same bits.
    """
    from torch._dynamo.backends.registry import lookup_backend

    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        images = [len(t) for t in tensors if t.shape[1:] == (1, 8, 8)]
        learning = torch.is_grad_enabled() and any(
            isinstance(t, nn.Parameter) and t.requires_grad for t in tensors
        )
        seen.append((max(images, default=None), learning))
        return lookup_backend("aot_eager")(graph, inputs)

    def compile_in_place(module, *, mode, dynamic):
        assert mode == "default"
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    yield seen
    torch._dynamo.reset()


# 80 training images in batches of 32, 32 and 16; 60 test images in one.
# Attack and clean metrics, and the descent; attack and metrics of the evaluation.
PASSES = {(32, False): 2, (32, True): 1, (60, False): 2}
WARM = "perturbation.warmup_epochs=1"
SMALLER = ("model.blocks=[1]", "model.strides=[2]")


def counted(monkeypatch, graphs):
    """The number of passes compiled by the end of each epoch, its measurement included."""
    counts, end = [], AdversarialTraining.on_train_epoch_end
    monkeypatch.setattr(
        AdversarialTraining, "on_train_epoch_end", lambda self: (end(self), counts.append(len(graphs)))[0]
    )
    return counts


TABLES = ("epochs", "rates", "wci", "layers", "spectrum", "alignment", "bounds", "posterior")


def weights_of(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}


def test_compiles_training_once_and_changes_nothing(graphs):
    """AWP in the second epoch; the last batch of each epoch is short."""
    overrides = (*SMALLER, "method=awp", WARM, "trainer.max_epochs=2")
    found = fit(*overrides, "execution=compiled", limit_val_batches=0)[0]
    assert Counter(graphs) == {kind: count for kind, count in PASSES.items() if kind[0] == 32}
    expected = fit(*overrides, limit_val_batches=0)[0]
    assert_close(values(found), values(expected), **EXACTLY)
    assert found.epoch_metrics() == expected.epoch_metrics()


@pytest.mark.slow  # compiles
def test_compiles_each_kind_of_pass_in_the_first_epoch_and_changes_nothing(monkeypatch, tmp_path, graphs):
    """AWP from the second epoch on; measured, with the Hessian, after the first and the third."""
    counts = counted(monkeypatch, graphs)
    for name, execution in (("eager", "default"), ("compiled", "compiled")):
        arguments = ("method=awp", WARM, f"execution={execution}", f"hydra.run.dir={tmp_path / name}")
        assert command(monkeypatch, *TINY, *SMALLER, *arguments, "report=false") == 0
    assert Counter(graphs) == PASSES
    assert counts == [0] * 3 + [5] * 3
    assert_close(weights_of(tmp_path / "compiled"), weights_of(tmp_path / "eager"), **EXACTLY)
    for table in TABLES:
        assert rows(tmp_path / "compiled", table) == rows(tmp_path / "eager", table), table


@pytest.mark.slow  # compiles twice
@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_averages_of_compiled_runs(averaging, graphs):
    overrides = (*SMALLER, f"averaging={averaging}", "trainer.max_epochs=2")
    if averaging == "swa":
        overrides = (*overrides, "averaging.start_epoch=1")
    found, expected = fit(*overrides, "execution=compiled")[0], fit(*overrides)[0]
    assert Counter(graphs) == PASSES  # the average is evaluated by the same code
    assert_close(values(found), values(expected), **EXACTLY)
    assert found.epoch_metrics() == expected.epoch_metrics()


class SaveWithin(lightning.Callback):
    """Saves a checkpoint after the second of three batches of the first epoch."""

    def __init__(self, path):
        self._path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self._path)


@pytest.mark.slow  # compiles twice
def test_a_run_that_resumes_at_a_short_batch(graphs, tmp_path):
    """It first compiles for that size, since it cannot know that it is short, and then for the full size."""
    path = tmp_path / "within.ckpt"
    expected, _ = fit(*SMALLER, callbacks=[SaveWithin(path)])
    found, trainer = fit(*SMALLER, "execution=compiled", resume=path)
    assert trainer.global_step == 9
    assert Counter(graphs) == PASSES | {(16, False): 2, (16, True): 1}
    assert_close(values(found), values(expected), **EXACTLY)


@pytest.mark.slow  # compiles three times
def test_many_networks_in_one_process(graphs):
    """Three times as many passes as PyTorch allows in two of these networks; all are kept, so all count."""
    kept = []
    for width in (2, 3, 4):
        found, expected = (
            fit(*SMALLER, f"model.width={width}", f"execution={execution}", "trainer.max_epochs=1")
            for execution in ("compiled", "default")
        )
        assert_close(values(found[0]), values(expected[0]), **EXACTLY)
        kept.append(found)
    assert Counter(graphs) == {kind: 3 * count for kind, count in PASSES.items()}


@pytest.mark.slow  # generates code, for minutes the first time
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        ("at", 1e-5),  # float32 over nine steps; 1e-8 was seen after three
        ("awp", 1e-5),
        ("mart", 1e-5),
        (
            "trades",
            1e-3,
        ),  # the divergence next to x is all but flat and signs of its gradient flip: 4e-5 seen
    ],
)
def test_generated_code_is_right(method, tolerance):
    """Use PyTorch's own backend, whose kernels round differently from the eager ones."""
    torch._dynamo.reset()
    overrides = (*SMALLER, f"method={method}", *((WARM,) if method == "awp" else ()))
    found, expected = fit(*overrides, "execution=compiled")[0], fit(*overrides)[0]
    torch._dynamo.reset()
    assert 0 < deviation(values(found), values(expected)) < tolerance
    metrics, expected_metrics = found.epoch_metrics(), expected.epoch_metrics()
    losses = [name for name in metrics if name.endswith("_loss")]
    assert [metrics[name] for name in losses] == pytest.approx(
        [expected_metrics[k] for k in losses], rel=tolerance
    )


@pytest.fixture
def alone():
    """Make a process group of one process; it is destroyed afterwards."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow  # compiles in pieces
@pytest.mark.parametrize("method", ["at", "awp"])
def test_passes_in_pieces(method, graphs, alone):
    """Networks larger than a bucket of gradients are cut: reducing one overlaps with making the next."""
    warm = ("perturbation.warmup_epochs=0",) if method == "awp" else ()
    # one process; PyTorch synchronises BatchNorm on GPUs only
    overrides = (
        f"method={method}",
        *warm,
        "model.width=96",
        "trainer.max_epochs=1",
        "trainer.sync_batchnorm=false",
    )
    strategy = DDPStrategy(process_group_backend="gloo", bucket_cap_mb=1)
    found = fit(*overrides, "execution=compiled", strategy=strategy)[0]
    assert sum(learning for _, learning in graphs) > 1  # the descent is cut, ...
    assert graphs[0] == (32, False)
    assert graphs[1][1]  # ... the attack before it, which needs no gradient of a weight, is not
    assert_close(values(found), values(fit(*overrides)[0]), **EXACTLY)


# ---------------------------------------------------------------------- compilation on two processes

ROOT = Path(__file__).parents[2]
PROCESSES = 2
LIMIT = 800  # seconds for both processes, which generate code
PATIENCE = 600  # seconds that a process waits for the other one
EVERY_METHOD = ("at", "awp")


def main(rank, store, out):
    """Run one of the processes: python -m tests.methods.test_execution RANK STORE OUT."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    found = {}
    for method in EVERY_METHOD:
        for execution in ("default", "compiled"):
            overrides = (*SMALLER, f"method={method}", *((WARM,) if method == "awp" else ()))
            module, trainer = fit(
                *overrides,
                f"execution={execution}",
                "trainer.max_epochs=2",
                devices=PROCESSES,
                strategy="ddp",
                sync_batchnorm=False,
            )
            assert trainer.world_size == PROCESSES
            found[method, execution] = {k: p.detach().clone() for k, p in module.model.named_parameters()}
    torch.save(found, out / f"{rank}.pt")


@pytest.fixture(scope="module")
def everybody(tmp_path_factory):
    """The results of each rank."""
    out = tmp_path_factory.mktemp("processes")
    paths = run_processes("tests.methods.test_execution", out, PROCESSES, LIMIT)
    return [torch.load(path, weights_only=True) for path in paths]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_compiled_on_two_processes(everybody, method):
    first, second = (found[method, "compiled"] for found in everybody)
    assert_close(second, first, **EXACTLY)
    expected = everybody[0][method, "default"]
    assert deviation(first, expected) < 1e-5  # as on one process
    _, _, module = prepared(*SMALLER)
    assert deviation(expected, dict(module.model.named_parameters())) > 0.01  # trained


# ---------------------------------------------------------------------- waiting for the device

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
}
FETCHING = {
    torch.Tensor.cpu,
    torch.Tensor.item,
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__index__,
    torch.Tensor.__array__,
    torch.Tensor.__format__,
    torch.Tensor.__repr__,
}


class Operations(TorchDispatchMode):
    """Notes operations that need a value or a size that only the device knows."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is aten.index.Tensor and any(t is not None and t.dtype is torch.bool for t in args[1])
        if func in READING or masked:
            self.notes.append((str(func), traceback.format_stack()))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Notes calls that bring a tensor to the host; on the CPU nothing is copied, so no operation shows it.

    Among moves it notes those to "cpu" by name, because a device in a variable is the one that trains.
    """

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wanted = [*args[1:], *(kwargs or {}).values()] if func is torch.Tensor.to else []
        if func in FETCHING or any(isinstance(value, str) and value == "cpu" for value in wanted):
            self.notes.append((getattr(func, "__name__", str(func)), traceback.format_stack()))
        return func(*args, **(kwargs or {}))


def watched(monkeypatch):
    """Notes of all training steps, each from making the batch to the last hook at its end."""
    notes, steps, advance = [], [], _TrainingEpochLoop.advance

    def watch(loop, data_fetcher):
        with Operations(notes), Calls(notes):
            advance(loop, data_fetcher)
        steps.append(loop.batch_idx)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", watch)
    return notes, steps


METHODS = {
    "at": (),
    "awp": ("method=awp", "perturbation.warmup_epochs=0"),
    "sam": ("method=sam",),
    "trades": ("method=trades",),
    "mart": ("method=mart",),
    "mixup": ("data.mixup=1.0", "data.augment.cutout=2", "data.augment.crop_padding=1"),
    "bf16": ("execution=bf16",),
    "adamw": ("optimizer=adamw",),
}


@pytest.mark.parametrize("case", METHODS)
def test_the_host_never_waits_within_a_step(case, monkeypatch):
    """Neither Lightning's loop nor the module nor the optimiser waits."""
    notes, steps = watched(monkeypatch)
    fit(*SMALLER, *METHODS[case], "trainer.max_epochs=1", limit_val_batches=0)
    assert steps == [0, 1, 2]
    assert not notes, "\n".join(["", notes[0][0], *notes[0][1][-25:]])


def test_the_host_never_waits_within_a_step_of_the_command(monkeypatch, tmp_path):
    """The run has all callbacks and a logger."""
    # on a CPU it checks every loss, which costs nothing here; on a GPU it checks every so many steps
    monkeypatch.setattr(StopOnNonFinite, "on_before_backward", lambda *_: None)
    notes, steps = watched(monkeypatch)
    arguments = ("measure=none", "trainer.max_epochs=1", "logger=csv", "report=false")
    assert command(monkeypatch, *UNMEASURED, *SMALLER, *arguments, f"hydra.run.dir={tmp_path}") == 0
    assert steps == [0, 1, 2]
    assert not notes, "\n".join(["", notes[0][0], *notes[0][1][-25:]])


def test_waiting_is_noticed():
    notes, x = [], torch.arange(3.0)
    waits = (
        lambda: x[0].item(),
        lambda: float(x.sum()),
        lambda: bool(x.isfinite().all()),
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: x.to(device="cpu"),
        lambda: x.tolist(),
        lambda: x.numpy(),
        lambda: x[x > 1],
        lambda: torch.equal(x, x),
        lambda: x.nonzero(),
        lambda: f"{x[0]:.2f}",
    )
    with Operations(notes), Calls(notes):
        for wait in waits:
            before = len(notes)
            wait()
            assert len(notes) > before
        before = len(notes)
        x.to(torch.float64).to(x.device).add_(1)[1:].sum()
        assert len(notes) == before


# ---------------------------------------------------------------------- half precision


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


@pytest.mark.parametrize(
    ("preset", "precision", "compile_"),
    [
        ("default", "32-true", "none"),
        ("bf16", "bf16-mixed", "none"),
        ("compiled", "32-true", "default"),
        ("fast", "bf16-mixed", "default"),
    ],
)
def test_presets(preset, precision, compile_):
    cfg = compose(f"execution={preset}")
    assert cfg.trainer.precision == precision
    assert cfg.execution.compile == compile_
    assert cfg.execution.channels_last


def test_compiling_without_a_compiler_is_one_clear_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"execution.compile=default needs .* set execution.compile=none"):
        Execution(channels_last=True, compile="default").prepare(nn.Linear(2, 2))
    Execution(channels_last=True, compile="none").prepare(nn.Linear(2, 2))
    assert command(monkeypatch, *TINY, "execution=compiled", f"hydra.run.dir={tmp_path}") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: execution.compile=default")
    assert error.count("\n") == 1


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
