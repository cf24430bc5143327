import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustdyn.attacks import PGD, summed_cross_entropy
from robustdyn.streams import generator
from tests.tolerances import EXACT64


def attack(**changes):
    settings = {
        "norm": "linf",
        "eps": 0.1,
        "step_size": 0.03,
        "steps": 5,
        "random_start": "uniform",
        "start_std": 1e-3,
        "batchnorm": "eval",
    }
    return PGD(**(settings | changes))


def conv_net(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )
    return net.to(dtype).eval()


def batch(size=6, dtype=torch.float32):
    draw = torch.Generator().manual_seed(3)
    images = torch.rand(size, 3, 6, 6, generator=draw, dtype=dtype)
    return images, torch.randint(0, 5, (size,), generator=draw)


@settings(max_examples=75, deadline=None)  # 40 images each: 3,000 cases
@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0, 2),  # for l∞ half of it, since no ball may be wider than the range
    step=st.floats(1e-3, 3),
    steps=st.integers(0, 4),
    start=st.sampled_from(["uniform", "gaussian", "none"]),
    seed=st.integers(0, 2**20),
)
def test_stays_in_the_ball_and_in_the_pixel_range(norm, eps, step, steps, start, seed):
    images = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    images = images.round() if seed % 2 else images  # also corners of the box
    eps = eps / 2 if norm == "linf" else eps
    pgd = attack(norm=norm, eps=eps, step_size=step, steps=steps, random_start=start)
    out = pgd.perturb(conv_net(), images, torch.arange(40) % 5, generator(seed, "attack"))
    delta = (out - images).flatten(1)
    radius = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (radius <= eps + 1e-6).all()  # a few float32 ulp of numbers up to 2
    assert ((out >= 0) & (out <= 1)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_the_optimum_of_a_linear_classifier(norm):
    # Two classes, logits (w·x, -w·x): the loss grows monotonically along ∓w, so the optimum is known.
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False)).double()
    net[1].weight.data = torch.stack([weight, -weight])
    images = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    pgd = attack(norm=norm, eps=0.2, step_size=0.1, steps=80)  # l2: (2/3)^80 of the start stays
    out = pgd.perturb(net, images, labels, generator(0, "attack"))
    direction = weight.sign() if norm == "linf" else weight / weight.norm()
    best = 0.5 + 0.2 * torch.stack([-direction, direction])
    torch.testing.assert_close(out.flatten(1), best, **EXACT64)


def test_matches_an_independent_rendering_step_by_step():
    net, (images, labels) = conv_net(torch.float64), batch(dtype=torch.float64)
    out = attack(random_start="none").perturb(net, images, labels, generator(0, "attack"))
    x = images.clone()
    for _ in range(5):
        x = x.detach().requires_grad_(True)
        nn.functional.cross_entropy(net(x), labels, reduction="sum").backward()
        x = x.detach() + 0.03 * torch.sign(x.grad)
        x = torch.max(torch.min(x, images + 0.1), images - 0.1).clamp(0, 1)
    assert torch.equal(out, x)


N_FGSM = {"steps": 1, "step_size": 0.1, "relative_start": 2.0, "projection": "range"}  # of the radius 0.1


def test_n_fgsm_is_one_step_from_large_noise_without_projection():
    """De Jorge et al. (NeurIPS 2022): noise in 2 ε, then ε sign(∇); both are only clipped to the range."""
    net, (images, labels) = conv_net(torch.float64), batch(dtype=torch.float64)
    out = attack(**N_FGSM).perturb(net, images, labels, generator(0, "attack"))
    noise = torch.empty_like(images).uniform_(-0.2, 0.2, generator=generator(0, "attack"))
    noisy = (images + noise).clamp(0, 1).requires_grad_()
    nn.functional.cross_entropy(net(noisy), labels, reduction="sum").backward()
    assert torch.equal(out, (noisy.detach() + 0.1 * noisy.grad.sign()).clamp(0, 1))
    assert 0.25 < (out - images).abs().max() <= 0.3  # ε is 0.1: the ball plays no part


def test_without_noise_n_fgsm_is_fgsm():
    net, (images, labels) = conv_net(torch.float64), batch(dtype=torch.float64)
    fgsm = attack(steps=1, step_size=0.1, random_start="none")
    none = attack(**N_FGSM | {"relative_start": 0.0})
    found, wanted = (a.perturb(net, images, labels, generator(0, "attack")) for a in (none, fgsm))
    torch.testing.assert_close(found, wanted, **EXACT64)  # images + ε and images + ε sign are rounded alike


def test_in_l2_the_noise_has_the_relative_radius_and_the_step_leaves_the_ball():
    images = torch.full((2000, 1, 1, 2), 0.5, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double()
    one = attack(norm="l2", eps=0.1, **N_FGSM)
    start = one.start(images, generator(0, "attack"))
    lengths = (start - images).flatten(1).norm(dim=1)
    assert 0.199 < lengths.max() <= 0.2  # in two dimensions one of 2000 is within 0.1 % of the edge, p < 0.02
    out = one.climb(net, images, torch.zeros(2000, dtype=torch.int64), start)
    torch.testing.assert_close((out - start).flatten(1).norm(dim=1), torch.full_like(lengths, 0.1), **EXACT64)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_normalised_inputs_are_attacked_as_the_pixels_are(norm, start):
    # x' = (x - 1/2) / s seen by a network that undoes it: every step is the pixels' own, divided by s
    net, (images, labels), s = conv_net(torch.float64), batch(dtype=torch.float64), 0.25
    undo = nn.Sequential(_Affine(s, 0.5), net)
    pixels = attack(norm=norm, random_start=start, start_std=0.02)
    normalised = attack(
        norm=norm,
        random_start=start,
        eps=0.1 / s,
        step_size=0.03 / s,
        start_std=0.02 / s,
        valid_range=(-2.0, 2.0),
    )
    wanted = pixels.perturb(net, images, labels, generator(0, "attack"))
    found = normalised.perturb(undo.eval(), (images - 0.5) / s, labels, generator(0, "attack"))
    torch.testing.assert_close(found * s + 0.5, wanted, **EXACT64)
    assert (wanted == 0).any()  # the range had an effect


@pytest.mark.parametrize("spoil", [lambda x: 4 * x - 2, lambda x: x + 1e-3, lambda x: x / x.clamp(max=0)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_refuses_inputs_outside_the_valid_range(norm, spoil):
    net, (images, labels) = conv_net(), batch()
    images[0, 0, 0, 0] = 1.0
    with pytest.raises(ValueError, match=r"inputs lie in .* outside valid_range=\(0, 1\)"):
        attack(norm=norm).perturb(net, spoil(images), labels, generator(0, "attack"))


class _Affine(nn.Module):
    def __init__(self, scale, shift):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x):
        return x * self.scale + self.shift


def test_leaves_gradients_flags_and_statistics_alone():
    net, (images, labels) = conv_net(), batch()
    net.train()
    net[1].eval()  # a flag set by hand, which model.train() would forget
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    statistics = net[1].running_mean.clone()
    attack().perturb(net, images, labels, generator(0, "attack"))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(net[1].running_mean, statistics)
    assert [m.training for m in net.modules()] == [True, True, False, True, True, True]


def test_train_mode_moves_running_statistics_once_a_step():
    net, (images, labels) = conv_net(), batch()
    attack(batchnorm="train", steps=3).perturb(net, images, labels, generator(0, "attack"))
    assert int(net[1].num_batches_tracked) == 3
    assert not net.training


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_radius_zero_the_network_is_not_run(norm):
    net, (images, labels) = conv_net(), batch()
    statistics = net[1].running_mean.clone()
    out = attack(norm=norm, eps=0.0, batchnorm="train").perturb(net, images, labels, generator(0, "attack"))
    assert torch.equal(out, images)
    assert out is not images
    assert torch.equal(net[1].running_mean, statistics)
    assert int(net[1].num_batches_tracked) == 0


def test_the_generator_alone_decides_the_start():
    net, (images, labels) = conv_net(), batch()
    state = torch.get_rng_state()
    first = attack().perturb(net, images, labels, generator(7, "attack", 1))
    again = attack().perturb(net, images, labels, generator(7, "attack", 1))
    other = attack().perturb(net, images, labels, generator(7, "attack", 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_l2_start_is_uniform_in_volume():
    # In d dimensions P(radius ≤ r ε) = r^d; the images are grey, so that the box never cuts the ball.
    images = torch.full((20_000, 1, 1, 2), 0.5)
    pgd = attack(norm="l2", eps=0.3, steps=0)
    out = pgd.perturb(nn.Identity(), images, torch.zeros(20_000), generator(0, "attack"))
    share = ((out - images).flatten(1).norm(dim=1) <= 0.15).double().mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 20_000)


def test_raises_the_loss():
    net, (images, labels) = conv_net(), batch()
    out = attack().perturb(net, images, labels, generator(0, "attack"))
    assert summed_cross_entropy(net(out), labels) > summed_cross_entropy(net(images), labels)


def test_refuses_inference_mode():
    net, (images, labels) = conv_net(), batch()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode=False"):
        attack().perturb(net, images, labels, generator(0, "attack"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l1"}, "norm must be linf or l2, got l1"),
        ({"eps": -0.1}, "eps must be at least 0, got -0.1"),
        ({"step_size": 0}, "step_size must be positive, got 0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"projection": "box"}, "projection must be ball or range, got box"),
        ({"relative_start": -1}, "relative_start must be at least 0 and finite, got -1"),
        ({"relative_start": 2}, "relative_start=2 starts outside the ball .* or projection=range"),
        (
            {"relative_start": 2, "projection": "range", "random_start": "none"},
            "relative_start=2 is the radius of a uniform start, but random_start=none; choose",
        ),
        ({"batchnorm": "frozen"}, "batchnorm must be train or eval, got frozen"),
        ({"eps": 8}, r"eps=8 exceeds the width 1\.0 of the valid range.*255"),
        ({"eps": math.inf, "norm": "l2"}, "eps=inf exceeds"),
        ({"valid_range": (1.0, 0.0)}, "valid_range must be"),
        ({"valid_range": (-2.0, 2.0), "eps": 4.5}, "eps=4.5 exceeds"),
    ],
)
def test_refuses_settings_outside_their_range(change, message):
    with pytest.raises(ValueError, match=message):
        attack(**change)
