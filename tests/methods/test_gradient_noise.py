"""Tests the noise that is added to gradients against gradients of single examples."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustdyn.data import Part
from robustdyn.errors import ConfigError
from robustdyn.methods import MART, TRADES, AdversarialCrossEntropy, CrossEntropy, GradientNoise
from tests.methods.fits import EXACTLY, SMALLER, SaveWithin, fit, values
from tests.methods.test_accumulation import trained
from tests.tolerances import EXACT64, MC_SIGMAS

B, FACTOR, DRAWS = 6, 9.0, 3000
OBJECTIVES = {
    "standard": CrossEntropy(label_smoothing=0.1),
    "at": AdversarialCrossEntropy(label_smoothing=0.0),
    "trades": TRADES(beta=6.0, label_smoothing=0.0),
    "mart": MART(beta=5.0),
}
# three steps of an epoch, the last with 20 images
SMALL = (*SMALLER, "data.train_size=84", "attack.steps=1", "trainer.max_epochs=2")
NOISE = "gradient_noise=gaussian"


def problem(norm=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(3) if norm else nn.Identity()
    net = nn.Sequential(nn.Linear(4, 3), middle, nn.Tanh(), nn.Linear(3, 3)).double()
    images = torch.randn(B, 4, dtype=torch.float64)
    return net, images, images + 0.1 * torch.randn_like(images), torch.arange(B) % 3


def gradient(objective, model, net, *batch):
    loss = objective(model, *batch).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def noisy(noise, objective, net, batch, draw):
    part = Part(slice(None), B)
    generator = torch.Generator().manual_seed(draw)
    return gradient(objective, noise.weighted(net, part, generator), net, *batch)


def of_examples(objective, net, batch):
    """The gradients of the examples alone, (B, P)."""
    return torch.stack([gradient(objective, net, net, *(t[i : i + 1] for t in batch)) for i in range(B)])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_weighted_examples(name):
    net, *batch = problem()
    found = noisy(GradientNoise(factor=FACTOR), OBJECTIVES[name], net, batch, draw=5)
    w = torch.randn(B, generator=torch.Generator().manual_seed(5)).double()
    rows = of_examples(OBJECTIVES[name], net, batch)
    added = (FACTOR / (B * (B - 1))) ** 0.5 * (w - w.mean()) @ rows
    # the weights are drawn in float32
    torch.testing.assert_close(found, rows.mean(0) + added, rtol=1e-5, atol=1e-6)
    assert added.norm() > rows.mean(0).norm() / 10


def test_the_noise_has_the_covariance_of_the_gradient():
    net, *batch = problem()
    objective = OBJECTIVES["at"]
    draws = torch.stack([noisy(GradientNoise(factor=FACTOR), objective, net, batch, n) for n in range(DRAWS)])
    rows = of_examples(objective, net, batch)
    wanted = FACTOR * torch.cov(rows.T, correction=1) / B
    error = torch.sqrt((wanted.diag()[:, None] * wanted.diag() + wanted**2) / (DRAWS - 1))
    assert ((torch.cov(draws.T) - wanted).abs() <= MC_SIGMAS * error + EXACT64["atol"]).all()
    mean_error = (wanted.diag() / DRAWS).sqrt()
    assert ((draws.mean(0) - rows.mean(0)).abs() <= MC_SIGMAS * mean_error + EXACT64["atol"]).all()


def test_with_batch_statistics_it_is_the_derivative_of_the_weighted_loss():
    net, *batch = problem(norm=True)
    found = noisy(GradientNoise(factor=FACTOR), OBJECTIVES["at"], net, batch, draw=1)
    w = torch.randn(B, generator=torch.Generator().manual_seed(1))
    weights = 1 + (FACTOR * B / (B - 1)) ** 0.5 * (w - w.mean())
    losses = F.cross_entropy(net(batch[1]), batch[2], reduction="none")
    wanted = torch.autograd.grad((weights * losses).mean(), list(net.parameters()))
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in wanted]), **EXACT64)


def test_the_outputs_are_those_of_the_network():
    net, images, *_ = problem()
    model = GradientNoise(factor=FACTOR).weighted(net, Part(slice(None), B), torch.Generator())
    assert torch.equal(model(images), net(images))
    with torch.no_grad():
        assert torch.equal(model(images), net(images))


def test_images_of_both_kinds_may_pass_together():
    net, images, adversarial, targets = problem()

    def stacked(model, images, adversarial, targets):
        clean, robust = model(torch.cat([images, adversarial])).chunk(2)
        return OBJECTIVES["trades"](lambda x: clean if x is images else robust, images, adversarial, targets)

    found, wanted = (
        noisy(GradientNoise(factor=FACTOR), objective, net, (images, adversarial, targets), draw=2)
        for objective in (stacked, OBJECTIVES["trades"])
    )
    torch.testing.assert_close(found, wanted, **EXACT64)


def test_no_noise_changes_no_bit():
    found, expected = (fit(*SMALL, *more)[0] for more in ((NOISE, "gradient_noise.factor=0"), ()))
    torch.testing.assert_close(values(found), values(expected), **EXACTLY)


def test_a_resumed_run_draws_the_same_noise(tmp_path):
    whole, _ = fit(*SMALL, NOISE, callbacks=[SaveWithin(tmp_path / "within.ckpt")])
    resumed, _ = fit(*SMALL, NOISE, resume=tmp_path / "within.ckpt")
    torch.testing.assert_close(values(resumed), values(whole), **EXACTLY)
    other, _ = fit(*SMALL)
    assert not torch.equal(values(other)["linear.weight"], values(whole)["linear.weight"])


def test_every_batch_of_a_step_has_noise_of_its_own(tmp_path, monkeypatch):
    seeds, weighted = [], GradientNoise.weighted

    def noted(self, model, part, generator):
        seeds.append(generator.initial_seed())
        return weighted(self, model, part, generator)

    monkeypatch.setattr(GradientNoise, "weighted", noted)
    trained(
        tmp_path,
        NOISE,
        "data.batch_size=16",
        "+trainer.accumulate_grad_batches=2",
        "trainer.max_epochs=1",
        "measure=none",
    )
    assert len(seeds) == len(set(seeds)) == 5


def test_a_batch_of_one_image_is_refused_before_long_work():
    with pytest.raises(ConfigError, match=re.escape("leaves one of 65 training images for the last batch")):
        fit(*SMALLER, NOISE, "data.train_size=65", "data.batch_size=32", "batchnorm.frozen_from=0")
    with pytest.raises(ValueError, match="at least two examples"):
        GradientNoise(factor=1.0).weighted(nn.Identity(), Part(slice(None), 1), torch.Generator())


def test_a_negative_factor_is_refused():
    with pytest.raises(ValueError, match="factor must be at least 0, got -1"):
        GradientNoise(factor=-1.0)
