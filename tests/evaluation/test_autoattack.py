import logging
import sys
from typing import get_args

import pyautoattack
import pytest
import torch
from pyautoattack.autoattack import AttackName

from robustdyn.data import ImageTensors
from robustdyn.evaluation import AutoAttackEvaluator, Ball
from robustdyn.evaluation.autoattack import ATTACKS, NORMS
from tests.evaluation.problems import Linear, digits, grey_images, labelled_by, pgd, run
from tests.evaluation.test_evaluators import flags
from tests.runs import rows

BALL = Ball("linf", 0.15)
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


def autoattack(*attacks):
    return AutoAttackEvaluator(attack_list=attacks)


def by_the_package(model, data, attacks, ball, *, batch_size, seed):
    """One call of the package on all examples, with the settings of its standard version."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    attack = pyautoattack.AutoAttack(
        model, norm=NORMS[ball.norm], eps=ball.eps, version="standard", seed=seed
    )
    attack.attacks_to_run = list(attacks)
    images, labels = data.images / 255, data.labels
    try:
        with torch.random.fork_rng(devices=[]):
            adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=batch_size)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    with torch.no_grad():
        return model(adversarial).argmax(dim=1) == labels


FAST = ("apgd-ce", "apgd-dlr")  # 100 gradients each; the targeted ones take 900


@pytest.mark.parametrize(
    ("norm", "eps", "batch_size"), [("linf", 0.15, 50), pytest.param("l2", 0.6, 17, marks=pytest.mark.slow)]
)
def test_attack_by_attack_is_the_package_s_own_result(norm, eps, batch_size, robust_net, tmp_path):
    data, ball = digits(50), Ball(norm, eps)
    evaluators = {"aa": autoattack(*FAST)}
    result = run(tmp_path, robust_net, data, evaluators, ball=ball, batch_size=batch_size, seed=3)
    expected = by_the_package(robust_net, data, FAST, ball, batch_size=batch_size, seed=3)
    assert torch.equal(flags(tmp_path, f"aa/{FAST[-1]}"), expected)
    assert 0 < result.accuracy("aa") == expected.double().mean().item() < result.accuracy("clean")


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 0.6)])
def test_the_standard_list_is_the_standard_version(norm, eps, robust_net, tmp_path):
    data, ball = digits(80), Ball(norm, eps)
    run(tmp_path, robust_net, data, {"aa": autoattack(*STANDARD), "pgd": pgd()}, ball=ball, batch_size=30)
    expected = by_the_package(robust_net, data, STANDARD, ball, batch_size=30, seed=0)
    assert torch.equal(flags(tmp_path, "aa/square"), expected)


def test_each_attack_gets_what_the_others_left(robust_net, tmp_path):
    result = run(tmp_path, robust_net, digits(50), {"aa": autoattack(*FAST)}, ball=BALL)
    found = [row for row in rows(tmp_path, "outcomes") if row["evaluator"] == "aa/apgd-dlr"]
    survivors = flags(tmp_path, "aa/apgd-ce")
    assert {row["index"] for row in found if row["attacked"]} == set(survivors.nonzero()[:, 0].tolist())
    assert not any(row["robust"] for row in found if not row["attacked"])
    names = [row["evaluator"] for row in result.rows]
    assert names == ["clean", "aa/apgd-ce", "aa/apgd-dlr", "aa", "worst_case"]
    assert result.accuracy("aa") == result.accuracy("aa/apgd-dlr") <= result.accuracy("aa/apgd-ce")


@pytest.mark.slow
def test_is_no_weaker_than_pgd(robust_net, tmp_path):
    evaluators = {"pgd": pgd(), "cw": pgd(loss="margin"), "aa": autoattack("apgd-ce", "apgd-t")}
    result = run(tmp_path, robust_net, digits(40), evaluators, ball=BALL, batch_size=40)
    assert result.accuracy("aa") <= min(result.accuracy("pgd"), result.accuracy("cw"))
    assert result.accuracy("worst_case") <= result.accuracy("aa")


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.015), pytest.param("l2", 0.06, marks=pytest.mark.slow)])
def test_five_classes_have_four_targets(norm, eps, tmp_path):
    """Four are fewer than the standard version's nine, and the distance to each boundary is known."""
    ball, model = Ball(norm, eps), Linear(5, 16)
    data = labelled_by(model, grey_images(60, 5), wrong_every=10)
    result = run(tmp_path, model, data, {"aa": autoattack("apgd-t", "fab-t")}, ball=ball, batch_size=60)
    expected = model.robust(data.images / 255, data.labels, ball)
    assert torch.equal(flags(tmp_path, "aa/fab-t"), expected)
    assert 0.2 < result.accuracy("aa") < 0.8
    targets = {row["evaluator"]: row["restarts"] for row in rows(tmp_path, "evaluation")}
    assert targets["aa/apgd-t"] == targets["aa/fab-t"] == 4


def test_the_recorded_effort_is_the_package_s():
    attack = pyautoattack.AutoAttack(torch.nn.Identity(), version="standard", seed=0)
    images = torch.zeros(1, 1, 8, 8)
    described = autoattack(*STANDARD).attacks("aa", BALL, 10, images, 0)
    effort = {name: (a.description.steps, a.description.restarts) for name, a in described.items()}
    assert effort == {
        "aa/apgd-ce": (attack.apgd.n_iter, attack.apgd.n_restarts),
        "aa/apgd-t": (attack.apgd_targeted.n_iter, attack.apgd_targeted.n_target_classes),
        "aa/fab-t": (attack.fab.n_iter, attack.fab.n_target_classes),
        "aa/square": (attack.square.n_queries, attack.square.n_restarts),
    }


def test_leaves_no_trace_in_the_process(robust_net, tmp_path, caplog):
    def trace(frame, event, argument):
        return None

    state, before = torch.get_rng_state(), sys.gettrace()
    logger = logging.getLogger("auto-attack")
    sys.settrace(trace)
    try:
        run(tmp_path, robust_net, digits(20), {"aa": autoattack("apgd-ce")}, ball=BALL)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not logger.handlers
    assert logger.propagate
    assert not caplog.records


class Dynamic(torch.nn.Module):
    """Computes a gradient while it predicts, like a defence that adapts to its input."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.enable_grad():
            probe = torch.zeros(1, requires_grad=True)
            torch.autograd.grad((probe * 2).sum(), probe)
        return self.net(x)


def test_what_the_package_warns_of_is_recorded(robust_net, tmp_path, caplog):
    result = run(tmp_path / "a", Dynamic(robust_net), digits(20), {"aa": autoattack("apgd-ce")}, ball=BALL)
    assert "dynamic defense" in result.warnings["dynamic_model", "aa/apgd-ce"]
    assert rows(tmp_path / "a", "warnings")[0]["check"] == "dynamic_model"
    assert not caplog.records
    # the package counts over all models of the process
    result = run(tmp_path / "b", robust_net, digits(20), {"aa": autoattack("apgd-ce")}, ball=BALL)
    assert not result.warnings


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ((), "attack_list has none; choose of apgd-ce"),
        (("apgd-ce", "pgd"), "attack_list has pgd; choose of apgd-ce"),
        (("square", "square"), "has a name twice"),
    ],
)
def test_refuses_lists_that_are_none(attacks, message):
    with pytest.raises(ValueError, match=message):
        autoattack(*attacks)


@pytest.mark.parametrize(
    ("attack", "classes", "size", "norm", "message"),
    [
        ("apgd-t", 3, 4, "linf", "apgd-t, which needs 4 classes or more, but there are 3; leave it out"),
        ("apgd-dlr", 2, 4, "linf", "apgd-dlr, which needs 3 classes or more"),
        ("square", 4, 4, "l2", "square, which needs 5x5 pixels or more in l2"),
    ],
)
def test_refuses_what_its_losses_are_not_defined_for(attack, classes, size, norm, message, tmp_path):
    model = Linear(classes, size**2)
    data: ImageTensors = grey_images(5, classes, size=size)
    evaluators = {"pgd": pgd(), "aa": autoattack(attack)}
    with pytest.raises(ValueError, match=message):
        run(tmp_path, model, data, evaluators, ball=Ball(norm, 0.1))
    assert not (tmp_path / "records").exists()  # before anything was attacked


def test_the_names_are_those_of_the_package():
    assert set(ATTACKS) == set(get_args(AttackName))
