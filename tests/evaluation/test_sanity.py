"""Tests each sign of overstated robustness with a model that is made to show it."""

import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.square import SquareAttack
from torch import nn

from robustdyn.data import ImageTensors
from robustdyn.evaluation import AutoAttackEvaluator, Ball, Sanity
from tests.evaluation.problems import SANITY, digits, pgd, run, unbounded
from tests.runs import rows

BALL = Ball("linf", 0.15)


class Around(nn.Module):
    """A network with something before or behind it."""

    def __init__(self, net, before=None, behind=None):
        super().__init__()
        self.net = net
        self.before = before or nn.Identity()
        self.behind = behind or nn.Identity()

    def forward(self, x):
        return self.behind(self.net(self.before(x)))


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class StaysInTraining(nn.Dropout):
    """A module that forgets to be set to eval mode."""

    def train(self, mode=True):
        self.training = True
        return self


def rounded(x):
    """Round to eight grey values, so that the gradient is zero everywhere."""
    return (x * 7).round() / 7


def checks(result):
    return {check for check, _ in result.warnings}


def test_a_sound_evaluation_has_no_warning(robust_net, tmp_path):
    evaluators = {
        "pgd20": pgd(),
        "cw": pgd(loss="margin"),
        "pgd50": pgd(steps=50, restarts=2),
        "aa": AutoAttackEvaluator(attack_list=["apgd-ce", "apgd-dlr"]),
        "unbounded": unbounded(),
    }
    result = run(tmp_path, robust_net, digits(40), evaluators, ball=BALL)
    assert not result.warnings
    assert rows(tmp_path, "warnings") == []


def test_masked_gradients_are_seen_in_every_way(robust_net, tmp_path, monkeypatch):
    shorten_square(monkeypatch, queries=200)
    model = Around(robust_net, before=Apply(rounded))
    evaluators = {
        "pgd": pgd(random_start="none"),
        "square": AutoAttackEvaluator(attack_list=["square"]),
        "unbounded": unbounded(random_start="none"),
    }
    result = run(tmp_path, model, digits(40), evaluators, ball=BALL)
    assert result.accuracy("pgd") == result.accuracy("clean")  # without a gradient the attack does nothing
    assert result.accuracy("square") < result.accuracy("pgd")
    assert checks(result) == {"zero_gradient", "black_box", "unbounded"}
    assert "at 40 of 40 images" in result.warnings["zero_gradient", "clean"]
    lost = (result.accuracy("pgd") - result.accuracy("square")) * 100
    assert f"it breaks {lost:.1f}% of the examples" in result.warnings["black_box", "square/square"]
    assert f"{result.accuracy('clean'):.1%} stay right" in result.warnings["unbounded", "unbounded"]
    assert {row["check"] for row in rows(tmp_path, "warnings")} == checks(result)


def shorten_square(monkeypatch, queries):
    """Use fewer queries, because 5,000 take too long for a test."""
    perturb = SquareAttack.perturb

    def short(self, x, y=None):
        self.n_queries = queries
        return perturb(self, x, y)

    monkeypatch.setattr(SquareAttack, "perturb", short)


def test_a_random_model_is_seen(robust_net, tmp_path):
    noisy = Around(robust_net, behind=Apply(lambda z: z + 0.1 * torch.randn_like(z)))
    with torch.random.fork_rng(devices=[]):
        result = run(tmp_path, noisy, digits(20), {}, ball=BALL)
    assert checks(result) == {"randomised"}
    assert "two passes over the same images differ by" in result.warnings["randomised", "model"]


def test_a_module_that_stays_in_training_is_seen(robust_net, tmp_path):
    model = Around(robust_net, behind=StaysInTraining(0.0))  # not random: no other check warns
    result = run(tmp_path, model, digits(20), {}, ball=BALL)
    assert checks(result) == {"train_mode"}
    assert result.warnings["train_mode", "model"].startswith("behind is in train mode")


def test_probabilities_are_seen(robust_net, tmp_path):
    result = run(tmp_path, Around(robust_net, behind=nn.Softmax(dim=1)), digits(20), {}, ball=BALL)
    assert checks(result) == {"probabilities"}


def test_a_saturated_softmax_has_no_gradient_for_some(robust_net, tmp_path):
    data = digits(40)
    with torch.no_grad():
        logits = 20 * robust_net(data.images / 255)
    # the gradient of the cross-entropy is p - y: nothing where float32 rounds p to y
    certain = (nn.functional.softmax(logits, dim=1) - nn.functional.one_hot(data.labels, 10) == 0).all(dim=1)
    result = run(tmp_path, Around(robust_net, behind=Apply(lambda z: 20 * z)), data, {}, ball=BALL)
    count = int(certain.sum())
    assert 0 < count < 40
    assert f"at {count} of 40 images" in result.warnings["zero_gradient", "clean"]


def test_logits_that_are_not_numbers_are_never_right(robust_net, tmp_path):
    def spoilt(z):
        return torch.where(z.argmax(dim=1, keepdim=True) < 5, z, torch.nan)

    data = digits(40)
    model = Around(robust_net, behind=Apply(spoilt))
    result = run(tmp_path, model, data, {"pgd": pgd(steps=2)}, ball=BALL)
    assert "not_finite" in checks(result)
    with torch.no_grad():
        predicted = robust_net(data.images / 255).argmax(dim=1)
    expected = ((predicted == data.labels) & (predicted < 5)).double().mean().item()
    assert result.accuracy("clean") == expected  # argmax alone would find class 0 in NaNs


class NoNumbers(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


def test_a_gradient_that_is_no_number_breaks_nothing(robust_net, tmp_path):
    model = Around(robust_net, before=Apply(NoNumbers.apply))
    result = run(tmp_path, model, digits(20), {"pgd": pgd()}, ball=Ball("l2", 1))
    assert {"not_finite", "zero_gradient"} <= checks(result)
    assert result.accuracy("pgd") == result.accuracy("clean") > 0.5


class Deceived(nn.Module):
    """Has one pixel v. Label 0 loses between 0.52 and 0.58, but the slope there points back.

    A single step of 0.04 from 0.50 ends in that interval, and a second step leaves it again.
    """

    def forward(self, x):
        v = x.flatten(1)[:, :1]
        trap = torch.where((v > 0.52) & (v < 0.58), 1 - 10 * (v - 0.52), 0.1 * (v - 1))
        return torch.cat([torch.zeros_like(trap), trap], dim=1)


def test_more_steps_that_break_less_are_seen(tmp_path):
    data = ImageTensors(torch.full((5, 1, 1, 1), 128, dtype=torch.uint8), torch.zeros(5, dtype=torch.long))
    few = pgd(steps=1, relative_step=0.4, random_start="none")
    more = pgd(steps=2, relative_step=0.4, random_start="none")
    result = run(tmp_path, Deceived(), data, {"few": few, "more": more}, ball=Ball("linf", 0.1))
    assert (result.accuracy("few"), result.accuracy("more")) == (0, 1)
    assert "few left 0.0%" in result.warnings["weaker_with_more_effort", "more"]
    assert "few" not in {name for check, name in result.warnings if check == "weaker_with_more_effort"}


def test_a_suite_weaker_than_one_attack_is_seen(robust_net, tmp_path, monkeypatch):
    monkeypatch.setattr(APGDAttack, "perturb", lambda self, x, y=None: x)  # a suite that does nothing
    evaluators = {"pgd": pgd(), "aa": AutoAttackEvaluator(attack_list=["apgd-ce"])}
    result = run(tmp_path, robust_net, digits(40), evaluators, ball=BALL)
    assert checks(result) == {"suite_weaker"}
    assert "pgd alone only" in result.warnings["suite_weaker", "aa"]


@pytest.mark.slow
def test_a_black_box_attack_may_be_weaker(robust_net, tmp_path, monkeypatch):
    shorten_square(monkeypatch, queries=2)
    evaluators = {"pgd": pgd(), "aa": AutoAttackEvaluator(attack_list=["square"])}
    result = run(tmp_path, robust_net, digits(40), evaluators, ball=BALL)
    assert result.accuracy("aa") > result.accuracy("pgd")
    assert not result.warnings


@pytest.mark.parametrize("key", SANITY)
def test_refuses_a_negative_tolerance(key):
    with pytest.raises(ValueError, match=f"{key} must be at least 0, got -1"):
        Sanity(**(SANITY | {key: -1}))
