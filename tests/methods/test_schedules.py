"""Tests schedules that depend on the epoch alone, against the formulas of the robust-overfitting study."""

import math

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from robustdyn.methods import Constant, Cosine, Interpolated, MultiDecay, Piecewise
from robustdyn.run.config import build
from tests.runs import command, compose, rows, tiny_but
from tests.tolerances import EXACT64

LENGTH = 200
# middles of steps, 40 per epoch: the points at which rates are used, none of which is on a jump
TIMES = (np.arange(40 * LENGTH) + 0.5) / 40


def option(name, *overrides):
    """A rule as ``schedule=name`` makes it, for a run of LENGTH epochs."""
    return build(compose(f"schedule={name}", f"trainer.max_epochs={LENGTH}", *overrides), "schedule")


# t in epochs, E the length: Rice et al., ICML 2020
FORMULAS = {
    "constant": lambda t, E: np.ones_like(t),
    "piecewise": lambda t, E: np.where(t < E / 2, 1.0, np.where(t < 3 * E / 4, 0.1, 0.01)),
    "linear": lambda t, E: np.interp(t, [0, E / 3, 2 * E / 3, E], [1, 1, 0.1, 0.01]),
    "one_cycle": lambda t, E: np.interp(t, [0, 0.4 * E, E], [0, 1, 0]),
    "cosine": lambda t, E: 0.5 * (1 + np.cos(t / E * np.pi)),
    "multi_decay": lambda t, E: 1 - np.floor(t / (E / 10)) / 10,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_every_option_is_the_studys_formula(name):
    rule = option(name)
    found = [rule.factor(float(t)) for t in TIMES]
    np.testing.assert_allclose(found, FORMULAS[name](TIMES, LENGTH), **EXACT64)


def torch_rates(make, steps):
    """Rates of PyTorch's own scheduler, stepped once an epoch or once a step, from 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (Piecewise([3, 7], 0.1), lambda o: lr_scheduler.MultiStepLR(o, [3, 7], gamma=0.1)),
        (Piecewise([2, 4, 6, 8], 0.5), lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5)),
        (Cosine(length=10), lambda o: lr_scheduler.CosineAnnealingLR(o, 10)),
        (Constant(), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (
            Interpolated(length=10, at=[0, 0.5, 1], factors=[1.0, 0.2, 0.2]),
            lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=5),
        ),
        (
            Interpolated(length=10, at=[0, 0.4, 1], factors=[0.04, 1.0, 0.0]),
            lambda o: lr_scheduler.OneCycleLR(
                # its peak lies at step pct · total − 1, its end at total − 1
                o, 1.0, total_steps=11, pct_start=5 / 11, anneal_strategy="linear", div_factor=25,
                final_div_factor=math.inf, cycle_momentum=False,
            ),
        ),
    ],
)  # fmt: skip
def test_agrees_with_pytorchs_scheduler(rule, make):
    np.testing.assert_allclose([rule.factor(epoch) for epoch in range(10)], torch_rates(make, 10), **EXACT64)


def test_a_list_of_factors_goes_milestone_by_milestone():
    rule = Piecewise([2, 5, 6], [0.5, 0.1, 4.0])  # the last one raises the rate
    assert [rule.factor(t) for t in (0, 1.99, 2, 5, 6, 100)] == pytest.approx([1, 1, 0.5, 0.05, 0.2, 0.2])


def test_decay_epochs_are_those_the_run_reaches():
    assert Piecewise([100, 150], 0.1).decay_epochs(120) == (100,)
    assert Piecewise([], 0.1).decay_epochs(120) == ()
    assert Constant().decay_epochs(120) == ()
    assert option("multi_decay").decay_epochs(120) == (20, 40, 60, 80, 100)
    # jumps at 1.5, 3 and 4.5: the first epochs that lie wholly behind one
    assert MultiDecay(length=6, decays=4).decay_epochs(6) == (2, 3, 5)
    for smooth in ("linear", "one_cycle", "cosine"):
        assert option(smooth).decay_epochs(LENGTH) == ()


def test_after_their_length_rules_stay_where_they_ended():
    assert MultiDecay(length=10, decays=5).factor(25) == pytest.approx(0.2)
    assert Cosine(length=10).factor(25) == 0
    assert Interpolated(length=10, at=[0, 1], factors=[1.0, 0.3]).factor(25) == 0.3


def test_a_rule_knows_nothing_of_measurements():
    for name in FORMULAS:
        rule = option(name)
        assert rule.reads is None
        assert rule.reading_epochs(LENGTH) == ()
        assert rule.state_dict() == {}


REFUSED = [
    (lambda: Piecewise([150, 100], 0.1), "milestones must increase strictly from 1 on"),
    (lambda: Piecewise([100, 100], 0.1), "milestones must increase strictly from 1 on"),
    (lambda: Piecewise([0, 10], 0.1), "milestones must increase strictly from 1 on"),
    (lambda: Piecewise(100, 0.1), "milestones must be a list of epochs, got 100"),
    (lambda: Piecewise("100", 0.1), "milestones must be a list of epochs, got 100"),
    (lambda: Piecewise([10], 0), "factor must be positive, got 0"),
    (lambda: Piecewise([10, 20], [0.1, -1.0]), "factor must be positive"),
    (lambda: Piecewise([10, 20], [0.1]), "factor has 1 values for 2 milestones"),
    (lambda: MultiDecay(length=10, decays=0), "decays must be at least 1, got 0"),
    (lambda: MultiDecay(length=0, decays=2), "length must be at least 1, got 0"),
    (lambda: Cosine(length=0), "length must be at least 1, got 0"),
    (lambda: Interpolated(length=0, at=[0, 1], factors=[1, 1]), "length must be at least 1, got 0"),
    (lambda: Interpolated(length=9, at=[], factors=[]), "at must increase strictly from 0 to 1"),
    (lambda: Interpolated(length=9, at=[0, 0.5], factors=[1, 1]), "at must increase strictly from 0 to 1"),
    (lambda: Interpolated(length=9, at=[0.1, 1], factors=[1, 1]), "at must increase strictly from 0 to 1"),
    (lambda: Interpolated(length=9, at=[0, 0.6, 0.5, 1], factors=[1] * 4), "at must increase strictly"),
    (lambda: Interpolated(length=9, at=[0, 1], factors=[1]), "factors has 1 values for 2 points in at"),
    (lambda: Interpolated(length=9, at=[0, 1], factors=[1, -1]), "factors must be at least 0"),
    (lambda: Interpolated(length=9, at=[0, 0.5, 1], factors=[1, 0, 1]), "factors may be 0 at the ends only"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_refuses_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


EPOCHS, STEPS = 4, 3
QUICK = (
    *tiny_but("schedule.", "measure.measurements."),
    f"trainer.max_epochs={EPOCHS}",
    "optimizer.lr=0.01",  # below every direction's limit of stability
    "measure.interpolation=piecewise_constant",
    "~measure.measurements.alignment",
    "~measure.measurements.weight_curvature",
    "attack.steps=1",
    "data.test_size=20",
)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FORMULAS if name != "cosine"]


@pytest.mark.parametrize("name", ["cosine", *SLOW])
def test_a_run_records_the_formula_at_the_middle_of_every_step(name, tmp_path, monkeypatch):
    arguments = (f"schedule={name}", f"hydra.run.dir={tmp_path}", "report=false")
    assert command(monkeypatch, *QUICK, *arguments) == 0
    middles = (np.arange(EPOCHS * STEPS) + 0.5) / STEPS
    expected = 0.01 * FORMULAS[name](middles, EPOCHS)
    found = rows(tmp_path, "rates")
    starts = [row["step"] for row in found]
    changes = [0, *(np.flatnonzero(np.abs(np.diff(expected)) > 1e-12) + 1).tolist()]
    assert starts == changes  # one row a change
    assert [row["epoch"] for row in found] == [step // STEPS for step in starts]
    np.testing.assert_allclose([row["lr"] for row in found], expected[changes], **EXACT64)
    last_steps = expected[STEPS - 1 :: STEPS]
    np.testing.assert_allclose([row["lr"] for row in rows(tmp_path, "epochs")], last_steps, **EXACT64)
    # the posterior takes every step's rate
    measured = {(row["epoch"], row["index"]): row for row in rows(tmp_path, "spectrum")}
    posterior = {(row["epoch"], row["index"]): row for row in rows(tmp_path, "posterior")}
    assert sorted(posterior) == [(epoch, index) for epoch in range(EPOCHS) for index in range(2)]
    for index in range(2):
        truth = _variances([measured[e, index] for e in (0, 0, 0, 2)], expected)
        found = [posterior[epoch, index]["posterior_variance_independent"] for epoch in range(EPOCHS)]
        np.testing.assert_allclose(found, truth, rtol=1e-9)


def _variances(spectrum, rates):
    """Var θ after every epoch, from its row of the ``spectrum`` table: v ← μv + g, θ ← θ − ηv.

    Batches are independent, so that every step is one matrix.
    """
    state, found = np.zeros((2, 2)), []
    for row, etas in zip(spectrum, rates.reshape(EPOCHS, STEPS), strict=True):
        c, noise = row["curvature"] + 5e-4, row["gradient_noise"]
        for eta in etas:
            move, kick = np.array([[1 - eta * c, -eta * 0.9], [c, 0.9]]), np.array([-eta, 1.0])
            state = move @ state @ move.T + noise * np.outer(kick, kick)
        found.append(state[0, 0])
    return found
