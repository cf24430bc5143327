"""Tests half precision: autocast's cache, float16's loss scale, and every method in the trainer."""

import copy
import functools
import math

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from robustdyn.errors import ConfigError
from robustdyn.methods import AWP, SAM, GlobalAWP
from robustdyn.run.config import build
from robustdyn.run.parts import build_module
from tests.runs import UNMEASURED, compose
from tests.tolerances import EXACT32

PERTURBATIONS = {
    "awp": lambda: AWP(gamma=0.3, warmup_epochs=0),
    "awp_global": lambda: GlobalAWP(gamma=0.3, warmup_epochs=0),
    "sam": lambda: SAM(rho=0.7, warmup_epochs=0),
}
every_perturbation = pytest.mark.parametrize("name", PERTURBATIONS)
EXACTLY = {"rtol": 0.0, "atol": 0.0}


class Net(nn.Module):
    """A network whose last layer is computed in float32, as in careful networks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        hidden = F.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        hidden = F.relu(self.linear(hidden))
        with torch.autocast("cpu", enabled=False):
            return self.head(hidden.float())


def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Net(), torch.rand(6, 1, 8, 8), torch.arange(6) % 3


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def half(*, cached):
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=cached)


# ---------------------------------------------------------------------- what autocast keeps


@every_perturbation
def test_moved_weights_are_used_where_autocast_caches(name):
    model, x, y = problem()
    perturbation = PERTURBATIONS[name]()

    def loss():
        return F.cross_entropy(model(x), y)

    def uncached():
        with half(cached=False), torch.no_grad():
            return loss()

    with half(cached=True):  # one scope, as a training step is
        before = loss()
        perturbation.apply(model, before)
        perturbed = loss().detach()
        perturbed_uncached = uncached()
        perturbation.restore()
        after = loss().detach()
    assert torch.equal(perturbed, perturbed_uncached)
    assert torch.equal(after, uncached())
    assert float(perturbed) > float(before.detach()) + 0.01  # it is an ascent


@every_perturbation
def test_ascends_with_the_gradient_that_a_descent_would_have(name):
    """The backward pass inside autocast's scope is that of one outside it, to the bit."""
    model, x, y = problem()
    twin = copy.deepcopy(model)
    with half(cached=True):
        perturbation = PERTURBATIONS[name]()
        perturbation.apply(model, F.cross_entropy(model(x), y))
    with half(cached=False):
        loss = F.cross_entropy(twin(x), y)
    PERTURBATIONS[name]().apply(twin, loss)
    assert_close(values(model), values(twin), **EXACTLY)


# ---------------------------------------------------------------------- the loss scale


@every_perturbation
@pytest.mark.parametrize("scale", [1.0, 2.0**-10, 2.0**16])
def test_the_move_does_not_depend_on_the_loss_scale(name, scale):
    moved = []
    for loss_scale in (None, scale):
        model, x, y = problem()
        PERTURBATIONS[name]().apply(model, F.cross_entropy(model(x), y), loss_scale=loss_scale)
        moved.append(values(model))
    assert_close(*moved, **EXACTLY)  # powers of two
    assert not torch.equal(moved[0]["linear.weight"], problem()[0].linear.weight)


@every_perturbation
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_an_overflow_perturbs_nothing(name, bad, scale):
    """The overflow is in one tensor only; it can still occur when the scale is down to 1."""
    model, x, y = problem()
    before = values(model)
    model.head.weight.register_hook(lambda gradient: gradient * bad)
    perturbation = PERTURBATIONS[name]()
    perturbation.apply(model, F.cross_entropy(model(x), y), loss_scale=scale)
    assert_close(values(model), before, **EXACTLY)
    perturbation.restore()
    assert_close(values(model), before, **EXACTLY)


# ---------------------------------------------------------------------- through the trainer

METHODS = ["awp", "trades_awp", *(pytest.param(m, marks=pytest.mark.slow) for m in ("at", "sam", "trades"))]
every_method = pytest.mark.parametrize("method", METHODS)


class Cached(MixedPrecision):
    """Uses autocast's cache, as Lightning once did and as a loop in plain PyTorch does by default."""

    def autocast_context_manager(self):
        return torch.autocast(self.device, dtype=torch.bfloat16, cache_enabled=True)


class Steps(lightning.Callback):
    """The gradients and, afterwards, the weights of every step."""

    def __init__(self):
        self.gradients, self.weights = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = {k: p.grad for k, p in pl_module.model.named_parameters()}
        assert None not in found.values()
        self.gradients.append({name: gradient.clone() for name, gradient in found.items()})

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.weights.append(values(pl_module.model))


def fit(method, tmp_path, *overrides, callbacks=(), **settings):
    warm = ("perturbation.warmup_epochs=0",) if method.endswith(("awp", "sam")) else ()
    cfg = compose(*UNMEASURED, f"method={method}", *warm, "trainer.max_epochs=1", *overrides)
    lightning.seed_everything(cfg.seed, verbose=False)
    data = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")
    module, steps = build_module(cfg, data), Steps()
    trainer = build(
        cfg,
        "trainer",
        callbacks=[steps, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        **({"precision": None} | settings if "plugins" in settings else settings),
    )
    trainer.fit(module, datamodule=data)
    return steps, module.epoch_metrics(), trainer


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def deviation(found, wanted):
    """‖found − wanted‖ / ‖wanted‖."""
    return float((flat(found) - flat(wanted)).norm() / flat(wanted).norm())


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory):
    """The run of each method in bfloat16, as the command trains it."""
    folder = tmp_path_factory.mktemp("runs")
    return functools.cache(lambda method: fit(method, folder, "trainer.precision=bf16-mixed"))


@every_method
def test_bfloat16_is_float32_but_for_its_rounding(method, in_bfloat16, tmp_path):
    half_steps, metrics, trainer = in_bfloat16(method)
    assert isinstance(trainer.precision_plugin, MixedPrecision)
    steps, expected, _ = fit(method, tmp_path)
    assert len(half_steps.weights) == len(steps.weights) == 3
    assert all(bool(flat(weights).isfinite().all()) for weights in half_steps.weights)
    assert all(value.dtype == torch.float32 for value in half_steps.weights[-1].values())
    # The attack's signs of small gradients flip, and TRADES' divergence, a small difference of logarithms, is
    # rounded itself: deviations of 0.18 to 0.28 were seen. A gradient of nothing deviates by 1.
    assert 0 < deviation(half_steps.gradients[0], steps.gradients[0]) < 0.5
    losses = [name for name in expected if name.endswith("loss")]
    assert len(losses) == 2
    assert [metrics[name] for name in losses] == pytest.approx([expected[name] for name in losses], rel=0.01)


# At equal weights: two forward passes share one copy of each weight, so that its gradient is summed in
# bfloat16 (2^-8); v from such a gradient rounds to other copies of w + v (0.04 was seen).
CACHE_ERROR = {"trades": 2**-8, "trades_awp": 0.1}


@every_method
def test_what_autocast_caches_changes_nothing(method, in_bfloat16, tmp_path):
    """Copies of weights made in the attack, in the ascent or without gradient never serve the descent."""
    cached, _, trainer = fit(method, tmp_path, plugins=[Cached("bf16-mixed", "cpu")])
    assert isinstance(trainer.precision_plugin, Cached)
    plain, _, trainer = in_bfloat16(method)
    assert not trainer.precision_plugin.autocast_context_manager()._cache_enabled
    if method in CACHE_ERROR:
        assert deviation(cached.gradients[0], plain.gradients[0]) < CACHE_ERROR[method]
    else:
        assert_close(cached.gradients, plain.gradients, **EXACTLY)
        assert_close(cached.weights, plain.weights, **EXACTLY)


class Events(lightning.Callback):
    """Records each step's forward passes with (g) and without (n) gradient, and emptying of the cache (|)."""

    def __init__(self, monkeypatch):
        self.steps = []
        clear = torch.clear_autocast_cache
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (self._note("|"), clear())[1])

    def _note(self, event):
        if self.steps:
            self.steps[-1] += event

    def on_fit_start(self, trainer, pl_module):
        pl_module.model.register_forward_hook(lambda *_: self._note("g" if torch.is_grad_enabled() else "n"))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append("")


# Two PGD steps; then the ascent, if there is one, and the descent, one of them with the clean metrics' pass.
PASSES = {
    "at": ["gg", "gn"],
    "awp": ["gg", "gn", "g"],
    "sam": ["gg", "gn", "g"],
    "trades": ["ngg", "ggn"],
    "trades_awp": ["ngg", "ggn", "gg"],
}


@every_method
def test_no_copy_made_without_gradient_is_left_for_the_descent(method, tmp_path, monkeypatch):
    """Older versions of PyTorch cache casts made under no_grad, and weights get no gradient through them.

    In any version, the pass that finds an empty cache in the ascent or in the descent has a gradient.
    """
    events = Events(monkeypatch)
    fit(method, tmp_path, plugins=[Cached("bf16-mixed", "cpu")], callbacks=[events], limit_train_batches=1)
    (step,) = events.steps
    assert [passes for passes in step.split("|") if passes] == PASSES[method]


@pytest.mark.parametrize("method", ["awp", "sam"])
def test_float16_skips_overflows_and_goes_on(method, tmp_path):
    """It starts with a scale that overflows even in the ascent, which is halved until training starts.

    The fused optimiser is excluded: see the next test.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    steps, metrics, _ = fit(method, tmp_path, "data.batch_size=8", "optimizer.fused=false", plugins=[plugin])
    taken = [bool(flat(gradients).isfinite().all()) for gradients in steps.gradients]
    assert taken.count(False) >= 2
    assert taken.count(True) >= 2
    assert scaler.get_scale() == 2.0 ** (20 - taken.count(False))
    assert all(math.isfinite(value) for value in metrics.values())
    for step in range(1, len(taken)):
        before, after = steps.weights[step - 1], steps.weights[step]
        assert bool(flat(after).isfinite().all())
        if taken[step]:
            assert deviation(after, before) > 1e-4
        else:
            assert_close(after, before, **EXACT32)  # w + v - v


def test_fused_sgd_is_refused_where_losses_are_scaled(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigError, match=r"optimizer.fused=true .* set optimizer.fused=false"):
        fit("at", tmp_path, plugins=[plugin])


def test_why_fused_sgd_is_refused():
    """PyTorch's own behaviour: if this fails, the refusal can go."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale((weight * math.inf).sum()).backward()
    scaler.step(optimizer)
    assert optimizer.state[weight].get("momentum_buffer") is not None  # made by a step that was not taken
