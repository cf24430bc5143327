import pytest
import torch
from torch import nn
from torch.testing import assert_close

from robustdyn.models.modes import frozen_statistics, mode
from tests.tolerances import EXACT64

NORMS = {
    "moving average": lambda: nn.BatchNorm1d(3),
    "cumulative average": lambda: nn.BatchNorm1d(3, momentum=None),
    "synchronised": lambda: nn.SyncBatchNorm(3),
}
norms = pytest.mark.parametrize("norm", NORMS)


def inputs():
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1


def settled(norm):
    """A normalisation layer that has seen another batch."""
    module = NORMS[norm]().double()
    module(inputs().flip(1) ** 2)
    return module


def state(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def batch_normalised(x):
    return (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()


@norms
def test_frozen_statistics_normalise_with_the_batch_and_stay(norm):
    module, x = settled(norm), inputs()
    before = state(module)
    with frozen_statistics(module):
        assert_close(module(x), batch_normalised(x), **EXACT64)
    assert_same(state(module), before)
    assert module.training
    assert module.track_running_stats
    module(x)
    assert int(module.num_batches_tracked) == int(before["num_batches_tracked"]) + 1
    weight = 0.5 if norm == "cumulative average" else 0.1
    mean = (1 - weight) * before["running_mean"] + weight * x.mean(dim=0)
    assert_close(module.running_mean, mean, **EXACT64)


@norms
def test_frozen_statistics_leave_eval_mode_alone(norm):
    module, x = settled(norm).eval(), inputs()
    before = state(module)
    expected = (x - module.running_mean) / (module.running_var + module.eps).sqrt()
    with frozen_statistics(module):
        assert_close(module(x), expected, **EXACT64)
    assert_same(state(module), before)


def flags(model):
    return [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]


def mixed():
    """A network with submodules in every possible state."""
    model = nn.Sequential(
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3).eval(),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Sequential(nn.SyncBatchNorm(3), nn.Dropout(0.5).eval()),
        nn.InstanceNorm1d(3, track_running_stats=True),
    )
    model[3].training = False  # the module itself, not its submodules
    return model


SCOPES = {
    "train": lambda model: mode(model, training=True),
    "eval": lambda model: mode(model, training=False),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fails", [False, True], ids=["goes well", "fails"])
def test_every_flag_comes_back(scope, fails):
    model = mixed()
    before = flags(model)

    def use():
        with SCOPES[scope](model):
            assert flags(model) != before
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    assert flags(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_is_that_of_every_submodule(training):
    model = mixed()
    with mode(model, training=training):
        assert {module.training for module in model.modules()} == {training}
        with mode(model, training=training):  # nothing to do
            assert {module.training for module in model.modules()} == {training}
        assert {module.training for module in model.modules()} == {training}


def test_scopes_nest():
    model = settled("moving average")
    before = state(model)
    with frozen_statistics(model):
        with frozen_statistics(model), mode(model, training=False):
            model(inputs())
        model(inputs())  # still frozen
    assert_same(state(model), before)
    assert model.track_running_stats
