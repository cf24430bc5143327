"""Tests that BatchNorm keeps its running statistics from an epoch on, and still learns."""

import copy

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustdyn.models.modes import mode, running_statistics
from tests.methods.fits import SMALLER, SaveWithin, fit, values
from tests.tolerances import EXACT32

# three steps of an epoch
SMALL = (*SMALLER, "data.train_size=60", "data.batch_size=20", "attack.steps=1", "trainer.max_epochs=3")


class Watch(lightning.Callback):
    """Keeps the network of every epoch's end, and every step's loss besides the one in eval mode."""

    def __init__(self):
        self.ends, self.losses = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        model = copy.deepcopy(pl_module.model).eval()
        self._deployed = float(F.cross_entropy(model(batch.images), batch.targets).detach())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append((float(outputs["loss"]), self._deployed))

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append(values(pl_module))


def watched(*overrides):
    watch = Watch()
    fit(*SMALL, *overrides, callbacks=[watch])
    return watch


def statistics(network):
    return {name: value for name, value in network.items() if "running" in name or "tracked" in name}


def same(found, wanted):
    return all(torch.equal(found[name], value) for name, value in wanted.items())


# the attack, too, would update the statistics
@pytest.mark.parametrize("method", [pytest.param("at", marks=pytest.mark.slow), "awp"])
def test_statistics_are_kept_from_the_epoch_on(method):
    plain, frozen = (
        watched(f"method={method}", f"batchnorm.frozen_from={epoch}").ends for epoch in ("null", 1)
    )
    assert same(frozen[0], plain[0])
    assert len(statistics(plain[0])) > 3
    for before, after in ((0, 1), (1, 2)):
        assert same(statistics(frozen[after]), statistics(frozen[before]))
        assert not same(statistics(plain[after]), statistics(plain[before]))
        for name in ("bn.weight", "bn.bias"):  # the affine parameters still learn
            assert not torch.equal(frozen[after][name], frozen[before][name])


def test_steps_normalise_with_the_running_statistics():
    losses = watched("method=standard", "batchnorm.frozen_from=1").losses
    loss, deployed = torch.tensor(losses).unbind(1)
    torch.testing.assert_close(loss[3:], deployed[3:], **EXACT32)
    assert ((loss - deployed)[:3].abs() > 1e-2).all()


@pytest.mark.parametrize("epoch", [pytest.param(0, marks=pytest.mark.slow), 1])  # saved within epoch 0
def test_a_resumed_run_ends_the_same(epoch, tmp_path):
    settings = (*SMALL, "trainer.max_epochs=2", f"batchnorm.frozen_from={epoch}")
    whole, _ = fit(*settings, callbacks=[SaveWithin(tmp_path / "within.ckpt")])
    resumed, _ = fit(*settings, resume=tmp_path / "within.ckpt")
    assert same(values(resumed), values(whole))


def test_no_mode_reaches_the_layers_within_the_scope():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    net[2][0].eval()
    flags = [module.training for module in net.modules()]
    before = copy.deepcopy(net.state_dict())
    with running_statistics(net):
        for training in (True, False):
            with mode(net, training=training):
                net(torch.randn(5, 2))
                assert (net[0].training, net[2][1].training) == (training, training)
                assert not net[1].training
                assert not net[2][0].training
        net.train()
        net(torch.randn(5, 2))
    assert same(net.state_dict(), before)
    assert [module.training for module in net.modules()] == flags
    net.train()
    assert all(module.training for module in net.modules())
