"""Tests the weight perturbations against their papers' formulas, and their place in the training step."""

import copy
import dataclasses
import functools
import math
from typing import NamedTuple

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from robustdyn.attacks import PGD
from robustdyn.methods import (
    AWP,
    SAM,
    AdversarialCrossEntropy,
    AdversarialTraining,
    Constant,
    Execution,
    GlobalAWP,
    Regularizer,
)
from robustdyn.models.modes import frozen_statistics
from tests.runs import UNMEASURED, command, rows
from tests.tolerances import EXACT32, EXACT64

GAMMA, RHO = 0.3, 0.7  # large, so that nothing hides in a tolerance

PERTURBATIONS = {
    "awp": lambda warmup=0: AWP(gamma=GAMMA, warmup_epochs=warmup),
    "awp_global": lambda warmup=0: GlobalAWP(gamma=GAMMA, warmup_epochs=warmup),
    "sam": lambda warmup=0: SAM(rho=RHO, warmup_epochs=warmup),
}
every_perturbation = pytest.mark.parametrize("name", PERTURBATIONS)


class TwoLayers(nn.Module):
    """Linear, BatchNorm, ReLU, linear, and some parameters that are difficult for a perturbation."""

    def __init__(self, **norm):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6, **norm)
        self.second = nn.Linear(6, 3)
        self.mixing = nn.Parameter(torch.eye(3) + 0.1)  # two dimensions, but not called a weight
        self.unused = nn.Linear(2, 2)  # no gradient at all
        self.dead = nn.Linear(3, 3)  # a gradient of zero
        self.fixed = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.first(x)))
        logits = self.fixed(self.second(hidden) @ self.mixing)
        return logits + 0.0 * self.dead(logits)


MOVES_UNDER_AWP = {"first.weight", "second.weight"}
UNMOVED = {"unused.weight", "unused.bias", "dead.weight", "dead.bias", "fixed.weight", "fixed.bias"}


def problem(**norm):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = TwoLayers(**norm).double()
        nn.init.uniform_(model.norm.weight, 0.5, 2.0)
        nn.init.normal_(model.norm.bias)
        x, y = torch.rand(12, 5, dtype=torch.float64), torch.arange(12) % 3
    return model, x, y


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def gradients(model, x, y):
    """Gradients from a copy, so that the model's statistics and ``.grad`` are not involved."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    F.cross_entropy(twin(x), y).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None and bool(p.grad.any())}


def norm(tensors):
    return sum((tensor**2).sum() for tensor in tensors) ** 0.5


def expected_moves(name, model, x, y):
    """v by the papers' formulas, for the tensors that move."""
    w, g = values(model), gradients(model, x, y)
    if name == "awp":
        return {k: GAMMA * norm([w[k]]) * g[k] / norm([g[k]]) for k in MOVES_UNDER_AWP}
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    length = RHO if name == "sam" else GAMMA * norm(trained)
    return {k: length * gradient / norm(g.values()) for k, gradient in g.items()}


def climb(perturbation, model, x, y, **settings):
    with frozen_statistics(model):
        loss = F.cross_entropy(model(x), y)
    perturbation.apply(model, loss, **settings)


# ---------------------------------------------------------------------- one step


@every_perturbation
@pytest.mark.parametrize("norm_settings", [{}, {"momentum": None}], ids=["moving", "cumulative"])
def test_moves_as_the_paper_says_and_nothing_else(name, norm_settings):
    model, x, y = problem(**norm_settings)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(index)) if parameter.requires_grad else None
    before, statistics = values(model), buffers(model)
    moves = expected_moves(name, model, x, y)
    assert (moves.keys() == MOVES_UNDER_AWP) == (name == "awp")
    assert not moves.keys() & UNMOVED

    climb(PERTURBATIONS[name](), model, x, y)
    for key, value in values(model).items():
        if key in moves:
            assert_close(value - before[key], moves[key], **EXACT64)
        else:
            assert torch.equal(value, before[key]), key
    assert all(torch.equal(value, statistics[key]) for key, value in buffers(model).items())
    for index, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.full_like(parameter, float(index)))
        else:
            assert parameter.grad is None


def test_each_tensor_of_awp_moves_by_gamma_times_itself():
    model, x, y = problem()
    before = values(model)
    climb(PERTURBATIONS["awp"](), model, x, y)
    for key in MOVES_UNDER_AWP:
        length = (values(model)[key] - before[key]).norm() / before[key].norm()
        assert float(length) == pytest.approx(GAMMA, rel=EXACT64["rtol"])


def test_awp_is_one_step_of_the_authors_proxy():
    """In the authors' code, a copy of the model takes an SGD step up the loss; its rate cancels."""
    model, x, y = problem()
    proxy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-F.cross_entropy(proxy(x), y)).backward()
    optimizer.step()
    expected = values(model)
    for key in MOVES_UNDER_AWP:
        difference = values(proxy)[key] - expected[key]
        expected[key] += GAMMA * difference * expected[key].norm() / difference.norm()
    climb(PERTURBATIONS["awp"](), model, x, y)
    # w_proxy - w loses digits: |w| / |0.01 g| is about 1e3
    assert_close(values(model), expected, rtol=1e-8, atol=1e-10)


@every_perturbation
def test_restores_once_from_wherever_the_weights_are(name):
    model, x, y = problem()
    before, perturbation = values(model), PERTURBATIONS[name]()
    perturbation.restore()  # there is nothing to undo
    assert_close(values(model), before, rtol=0.0, atol=0.0)
    climb(perturbation, model, x, y)
    moved = values(model)
    with torch.no_grad():
        model.first.weight.add_(1.0)  # the optimiser's step
    perturbation.restore()
    before["first.weight"] += 1.0
    assert_close(values(model), before, **EXACT64)
    restored = values(model)
    perturbation.restore()
    assert_close(values(model), restored, rtol=0.0, atol=0.0)
    assert not torch.equal(moved["second.weight"], restored["second.weight"])
    climb(perturbation, model, x, y)  # and can be applied again


@every_perturbation
def test_refuses_to_perturb_twice(name):
    model, x, y = problem()
    perturbation = PERTURBATIONS[name]()
    climb(perturbation, model, x, y)
    moved = values(model)
    with pytest.raises(RuntimeError, match="perturbed already"):
        climb(perturbation, model, x, y)
    assert_close(values(model), moved, rtol=0.0, atol=0.0)


@every_perturbation
def test_without_any_gradient_nothing_moves(name):
    model, x, y = problem()
    before = values(model)
    PERTURBATIONS[name]().apply(model, 0.0 * F.cross_entropy(model(x), y))
    assert_close(values(model), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AWP(gamma=-0.1, warmup_epochs=0), "gamma must be at least 0, got -0.1"),
        (lambda: GlobalAWP(gamma=float("nan"), warmup_epochs=0), "gamma must be at least 0, got nan"),
        (lambda: SAM(rho=-1.0, warmup_epochs=0), "rho must be at least 0, got -1.0"),
        (lambda: SAM(rho=1.0, warmup_epochs=-1), "warmup_epochs must be at least 0, got -1"),
    ],
)
def test_refuses_settings_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---------------------------------------------------------------------- the training step


class Batch(NamedTuple):
    images: Tensor
    targets: Tensor


LR, MOMENTUM, DECAY = 0.2, 0.9, 0.1
BATCHES = 3


def batches():
    _, x, y = problem()
    return [Batch(x.roll(k, dims=0)[:8] * (1 + k), y.roll(k)[:8]) for k in range(BATCHES)]


def module_of(model, perturbation, *, steps=0, l1=0.0):
    attack = PGD(
        norm="linf",
        eps=0.1,
        step_size=0.05,
        steps=steps,
        random_start="none",
        start_std=1e-3,
        batchnorm="eval",
        valid_range=(-math.inf, math.inf),
    )
    return AdversarialTraining(
        model=model,
        objective=AdversarialCrossEntropy(label_smoothing=0.0),
        attack=attack,
        evaluation_attack=attack,
        perturbation=perturbation,
        gradient_noise=None,
        curvature_penalty=None,
        regularizer=Regularizer(l1=l1, weight_decay_on="all"),
        optimizer=functools.partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM, weight_decay=DECAY),
        schedule=Constant(),
        batchnorm_frozen_from=None,
        execution=Execution(channels_last=False, compile="none"),
        evaluation_splits=(),
        seed=0,
    )


def fit(module, tmp_path, epochs=1, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=epochs,
        enable_model_summary=False,
        **quiet | settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None, shuffle=False))
    return trainer


def test_training_refuses_images_out_of_range_in_any_batch(tmp_path):
    """The images are in the second of three batches, from a loader that is not the project's own."""
    module = module_of(problem()[0], None, steps=1)
    largest = float(batches()[0].images.max())
    assert float(batches()[1].images.max()) > largest
    module.attack = dataclasses.replace(module.attack, valid_range=(-100.0, largest))
    with pytest.raises(ValueError, match="range"):
        fit(module, tmp_path)
    assert module.trainer.global_step == 1


def by_hand(name, clip=None, l1=0.0):
    """Parameters, statistics and momentum after one epoch, in plain tensors.

    AWP: d = ∇L(w + v) + λ (w + v), SAM and the global variant: d = ∇L(w + v) + λ w; then b ← μ b + d and
    w ← w − η b.
    """
    model, _, _ = problem()
    w = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    statistics = buffers(model)
    momentum = {k: torch.zeros_like(value) for k, value in w.items()}
    for x, y in batches():
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in w:
                    parameter.copy_(w[key])
        v = {k: torch.zeros_like(value) for k, value in w.items()}
        if name is not None:
            v |= expected_moves(name, model, x, y)
        perturbed = {k: (w[k] + v[k]).requires_grad_() for k in w}
        loss = F.cross_entropy(functional_call(model, (perturbed, statistics), (x,)), y)
        if l1:  # it gives unused weights a gradient
            loss = loss + l1 * sum(p.abs().sum() for p in perturbed.values() if p.dim() > 1)
        found = torch.autograd.grad(loss, list(perturbed.values()), allow_unused=True)
        g = {k: d for k, d in zip(perturbed, found, strict=True) if d is not None}
        if clip is not None:
            length = norm(g.values())
            assert length > clip
            g = {k: d * clip / length for k, d in g.items()}
        for key, gradient in g.items():
            at = w[key] + v[key] if name == "awp" else w[key]
            momentum[key] = MOMENTUM * momentum[key] + gradient + DECAY * at
            w[key] = w[key] - LR * momentum[key]
    return w, statistics, {k: momentum[k] for k in g}


@pytest.mark.parametrize("changes", [{}, {"clip": 0.05}, {"l1": 0.01}], ids=["plain", "clipped", "l1"])
@pytest.mark.parametrize("name", [None, *PERTURBATIONS])
def test_steps_of_training_are_those_by_hand(name, changes, tmp_path):
    model, _, _ = problem()
    module = module_of(model, None if name is None else PERTURBATIONS[name](), l1=changes.get("l1", 0.0))
    trainer = fit(module, tmp_path, gradient_clip_val=changes.get("clip"))
    weights, statistics, momentum = by_hand(name, **changes)
    # the norm that clips has 1e-6 added to it
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if "clip" in changes else EXACT64
    found = values(model)
    assert_close({key: found[key] for key in weights}, weights, **tolerance)
    assert_close(buffers(model), statistics, **tolerance)
    state = trainer.optimizers[0].state
    held = {k: state[p]["momentum_buffer"] for k, p in model.named_parameters() if p in state}
    assert_close(held, momentum, **tolerance)


def test_the_reference_tells_the_methods_apart():
    """Without these differences the test above would not notice a wrong place of the weight decay."""
    ends = [by_hand(name)[0]["first.weight"] for name in (None, *PERTURBATIONS)]
    for i, one in enumerate(ends):
        assert all(float((one - other).abs().max()) > 1e-3 for other in ends[:i])


class Passes:
    """Counts forward passes of a model and the backward passes through them; it can be reset."""

    def __init__(self, model):
        self.forward = self.backward = 0
        model.register_forward_hook(self._forward)

    def _forward(self, module, inputs, output):
        self.forward += 1
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient):
        self.backward += 1

    def take(self):
        taken = self.forward, self.backward
        self.forward = self.backward = 0
        return taken


class PerEpoch(lightning.Callback):
    """Notes the passes of every epoch, and whether the weights were perturbed in it."""

    def __init__(self, model, perturbation):
        self.passes, self.perturbed, self.epochs = Passes(model), 0, []
        if perturbation is not None:
            apply = perturbation.apply

            def noted(*arguments, **settings):
                self.perturbed += 1
                apply(*arguments, **settings)

            perturbation.apply = noted

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append((*self.passes.take(), self.perturbed))
        self.perturbed = 0


@pytest.mark.parametrize("name", [None, *PERTURBATIONS])
def test_a_perturbation_costs_one_forward_and_one_backward_pass(name, tmp_path):
    steps, warmup = 4, 1
    model, _, _ = problem()
    perturbation = None if name is None else PERTURBATIONS[name](warmup)
    counts = PerEpoch(model, perturbation)
    fit(module_of(model, perturbation, steps=steps), tmp_path, epochs=2, callbacks=[counts])
    # PGD's pairs, the descent's pair, and a forward pass for the clean metrics
    plain = (BATCHES * (steps + 2), BATCHES * (steps + 1), 0)
    extra = 0 if name is None else BATCHES
    assert counts.epochs == [plain, (plain[0] + extra, plain[1] + extra, extra)]


@every_perturbation
def test_warmup_epochs_are_plain_training(name, tmp_path):
    model, _, _ = problem()
    fit(module_of(model, PERTURBATIONS[name](warmup=1), steps=1), tmp_path)
    plain, _, _ = problem()
    fit(module_of(plain, None, steps=1), tmp_path)
    assert_close(values(model), values(plain), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", [None, *PERTURBATIONS])
def test_training_metrics_are_those_at_the_weights(name, tmp_path):
    model, _, _ = problem()
    (x, y), start = batches()[0], copy.deepcopy(model)
    module = module_of(model, None if name is None else PERTURBATIONS[name]())
    fit(module, tmp_path, limit_train_batches=1)
    found = module.epoch_metrics()
    robust = F.cross_entropy(start(x), y)
    start = start if name is None else problem()[0]  # without a perturbation the statistics have moved by now
    clean = F.cross_entropy(start.eval()(x), y)
    # the metrics are float32
    assert found["train_robust_loss"] == pytest.approx(float(robust.detach()), rel=EXACT32["rtol"])
    assert found["train_clean_loss"] == pytest.approx(float(clean.detach()), rel=EXACT32["rtol"])


# ---------------------------------------------------------------------- the command


def train(monkeypatch, run_dir, *overrides):
    return command(monkeypatch, *UNMEASURED, f"hydra.run.dir={run_dir}", *overrides)


def test_awp_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings = ("method=awp", "perturbation.warmup_epochs=1", "schedule.milestones=[1]")
    for folder, epochs in (("whole", 2), ("halves", 1), ("halves", 2)):
        assert train(monkeypatch, tmp_path / folder, *settings, f"trainer.max_epochs={epochs}") == 0
    for table in ("epochs", "rates"):
        assert rows(tmp_path / "halves", table) == rows(tmp_path / "whole", table)
    whole, halves = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "halves")
    )
    assert_close(halves["state_dict"], whole["state_dict"], rtol=0.0, atol=0.0)
    assert_close(halves["optimizer_states"], whole["optimizer_states"], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("method", ["awp", "sam"])
def test_refuses_accumulated_gradients(method, tmp_path, monkeypatch, capsys):
    overrides = (f"method={method}", "+trainer.accumulate_grad_batches=2", "trainer.max_epochs=1")
    assert train(monkeypatch, tmp_path, *overrides) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: trainer.accumulate_grad_batches=2 cannot be combined")
    assert "choose 1 or perturbation=none" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "records").exists()
