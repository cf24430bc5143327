"""Tests the penalty on the Hessian's trace against exact traces, over all random signs of small batches."""

import itertools

import pytest
import torch
from torch import nn

from robustdyn.curvature import EmpiricalRisk
from robustdyn.curvature.layer_traces import layer_traces
from robustdyn.curvature.probes import rademacher
from robustdyn.data import Part
from robustdyn.methods import GaussNewtonPenalty
from robustdyn.methods.curvature_penalty import estimated_trace
from tests.cases import CASES
from tests.methods.fits import EXACTLY, SMALLER, SaveWithin, fit, values
from tests.tolerances import EXACT64, FD, MC_SIGMAS

SMALL = (*SMALLER, "data.train_size=84", "attack.steps=1", "trainer.max_epochs=2")
PENALTY = "curvature_penalty=gauss_newton"


def small():
    """Two examples of two classes, with 16 choices of signs; BatchNorm is not the identity."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.uniform_(net[1].running_mean, -0.5, 0.5)
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)
    return net, torch.randn(2, 3, dtype=torch.float64)


def every_sign(examples, classes):
    for signs in itertools.product((-1.0, 1.0), repeat=examples * classes):
        yield torch.tensor(signs, dtype=torch.float64).view(examples, classes)


def exact(net, images):
    """Tr(H) over all parameters; the targets do not matter."""
    targets = torch.zeros(len(images), dtype=torch.int64)
    risk = EmpiricalRisk(net, images, targets, batchnorm="eval")
    return float(layer_traces(risk, method="gauss_newton", weights_only=False).traces.sum())


def test_the_mean_over_all_signs_is_the_exact_trace():
    net, images = small()
    found = [estimated_trace(net, images, lambda classes, s=s: s).item() for s in every_sign(2, 2)]
    assert sum(found) / len(found) == pytest.approx(exact(net, images), rel=EXACT64["rtol"])
    assert max(found) > 1.1 * min(found)
    assert net.training


def test_the_gradient_is_that_of_the_exact_trace():
    net, images = small()
    parameters = list(net.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for signs in every_sign(2, 2):
        trace = estimated_trace(net, images, lambda classes, s=signs: s)
        for sum_, gradient in zip(
            total, torch.autograd.grad(trace, parameters, allow_unused=True), strict=True
        ):
            sum_ += torch.zeros_like(sum_) if gradient is None else gradient / 16
    step = 1e-5
    for parameter, found in zip(parameters, total, strict=True):
        flat, differences = parameter.data.view(-1), []
        for i in range(flat.numel()):
            middle = flat[i].item()
            ends = []
            for value in (middle + step, middle - step):
                flat[i] = value
                ends.append(exact(net, images))
            flat[i] = middle
            differences.append((ends[0] - ends[1]) / (2 * step))
        torch.testing.assert_close(found.view(-1), torch.tensor(differences, dtype=torch.float64), **FD)
    assert max(float(gradient.abs().max()) for gradient in total) > 1e-2


@pytest.mark.parametrize("name", ["relu_mlp", "preact"])
def test_random_signs_are_unbiased(name):
    net, images, _ = CASES[name].problem()
    generator = torch.Generator().manual_seed(0)

    def signs(classes):
        return rademacher((len(images), classes), generator, torch.float64, torch.device("cpu"))

    found = torch.tensor([estimated_trace(net, images, signs).item() for _ in range(400)])
    wanted = exact(net, images)
    assert abs(found.mean() - wanted) <= MC_SIGMAS * found.std() / 400**0.5
    assert found.std() <= 2**0.5 * wanted * (1 + MC_SIGMAS * 400**-0.5)


@pytest.mark.parametrize("examples", [None, 1, 2, 3])
def test_shares_of_processes_add_up_in_expectation(examples):
    """Parts of one and two examples; over many signs, the sum of shares has the mean of the whole."""
    net, images = small()
    images = torch.cat([images, 1.5 * images[:1].flip(1)])
    penalty = GaussNewtonPenalty(strength=0.5, examples=examples)
    parts = (Part(slice(0, 1), 3), Part(slice(1, 3), 3))

    def drawn(seed):
        return torch.Generator().manual_seed(seed)

    whole = penalty(net, images, Part(slice(None), 3), drawn(0))
    chosen = images[: examples or 3]
    sums = torch.tensor(
        [
            sum(penalty(net, images[part.places], part, drawn(seed)).item() for part in parts)
            for seed in range(100)
        ]
    )
    # one example's share has no noise from products of examples, but from those of classes
    assert abs(sums.mean() - 0.5 * exact(net, chosen)) <= MC_SIGMAS * sums.std() / 100**0.5 + 1e-6
    if examples == 1:  # the second process has none of the examples
        assert whole.item() == pytest.approx(penalty(net, images[:1], parts[0], drawn(0)).item())
        assert penalty(net, images[1:], parts[1], drawn(0)).item() == 0


def test_autocast_and_frozen_parameters_change_nothing():
    net, images = small()
    net, images = net.float(), images.float()
    penalty, part = GaussNewtonPenalty(strength=1.0, examples=None), Part(slice(None), 2)
    wanted = penalty(net, images, part, torch.Generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(penalty(net, images, part, torch.Generator()), wanted)
    net[0].weight.requires_grad_(False)
    assert 0 < penalty(net, images, part, torch.Generator()).item() < wanted.item()


def test_no_penalty_changes_no_bit():
    found, expected = (fit(*SMALL, *more)[0] for more in ((PENALTY, "curvature_penalty.strength=0"), ()))
    torch.testing.assert_close(values(found), values(expected), **EXACTLY)


def test_a_resumed_run_draws_the_same_signs(tmp_path):
    whole, _ = fit(*SMALL, PENALTY, callbacks=[SaveWithin(tmp_path / "within.ckpt")])
    resumed, _ = fit(*SMALL, PENALTY, resume=tmp_path / "within.ckpt")
    torch.testing.assert_close(values(resumed), values(whole), **EXACTLY)


@pytest.mark.slow  # two runs
def test_training_with_it_lowers_the_trace():
    def trace(*overrides):
        module, trainer = fit(*SMALLER, "data.train_size=160", "attack.steps=1", *overrides)
        data = trainer.datamodule.split("train")
        batch = data.batch(torch.arange(160))
        return exact(module.model.double().eval(), batch.images.double())

    assert trace(PENALTY, "curvature_penalty.strength=0.1") < 0.7 * trace()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1.0, "examples": None}, "strength must be at least 0, got -1.0"),
        ({"strength": 1.0, "examples": 0}, "examples must be a whole number of at least 1, or null, got 0"),
        ({"strength": 1.0, "examples": 2.5}, "examples must be a whole number of at least 1, or null"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GaussNewtonPenalty(**settings)
