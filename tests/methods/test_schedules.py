import pytest

from robustdyn.methods import Constant, Piecewise


def test_piecewise_follows_the_papers():
    rule = Piecewise([100, 150], 0.1)
    rates = [0.1 * rule.factor(epoch) for epoch in (0, 99, 99.99, 100, 149, 150, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12)


def test_decay_epochs_are_those_the_run_reaches():
    assert Piecewise([100, 150], 0.1).decay_epochs(120) == (100,)
    assert Piecewise([], 0.1).decay_epochs(120) == ()
    assert Constant().decay_epochs(120) == ()


def test_constant_is_constant():
    assert {Constant().factor(epoch) for epoch in (0, 3.5, 500)} == {1.0}


@pytest.mark.parametrize("milestones", [[150, 100], [100, 100], [0, 10]])
def test_refuses_milestones_out_of_order(milestones):
    with pytest.raises(ValueError, match="milestones must increase strictly from 1 on"):
        Piecewise(milestones, 0.1)


@pytest.mark.parametrize("milestones", [100, "100"])
def test_refuses_milestones_that_are_no_list(milestones):
    with pytest.raises(ValueError, match="milestones must be a list of epochs, got 100"):
        Piecewise(milestones, 0.1)


def test_refuses_a_factor_that_is_not_positive():
    with pytest.raises(ValueError, match="factor must be positive, got 0"):
        Piecewise([10], 0)
