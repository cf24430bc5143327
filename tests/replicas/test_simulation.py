"""Tests that an ensemble continues a training exactly as its PyTorch optimiser would."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from robustdyn.data.tensors import ImageTensors, to_unit
from robustdyn.errors import ConfigError
from robustdyn.methods import TRADES, AdversarialCrossEntropy
from robustdyn.models.sync_batchnorm import synchronize
from robustdyn.replicas import (
    EnsembleRun,
    EnsembleSettings,
    NoiseFreeSettings,
    PointSettings,
    Recorded,
    TrainingState,
    fingerprint,
    read_ensemble,
)
from robustdyn.replicas.simulation import _alone
from tests.replicas.problems import EXAMPLES, attack, by_hand, network, training
from tests.tolerances import EXACT64

RATES = (0.02, 0.02, 0.002)
KINDS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=5e-3),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.02, betas=(0.8, 0.9), weight_decay=5e-3),
}


def groups(parameters):
    """Two parameter groups: weights, and all others without decay."""
    parameters = list(parameters)
    rest = {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}
    return [{"params": [p for p in parameters if p.dim() > 1]}, rest]


def examples():
    draws = torch.Generator().manual_seed(4)
    images = torch.randint(256, (EXAMPLES, 2, 6, 6), generator=draws, dtype=torch.uint8)
    return ImageTensors(images, torch.randint(3, (EXAMPLES,), generator=draws))


def begun(kind):
    """A network and its optimiser after three steps."""
    model = network()
    optimizer = KINDS[kind](groups(model.parameters()))
    data = examples()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(to_unit(data.images).double()), data.labels).backward()
        optimizer.step()
    return model, optimizer


def settings(**changes):
    point = {"eigenvectors": 2, "random_directions": 1, "attack_draws": 1, "noise_batches": 2}
    point |= {"slope_batches": 0, "slope_distance": 1.0, "tolerance": 1e-3, "max_products": 50}
    chosen = {
        "replicas": 2,
        "chunk": 2,
        "engine": "vmapped",
        "seed": 7,
        "initial_state": "checkpoint",
        "freeze_preconditioner": False,
        "batchnorm": "eval",
        "learning_rate": None,
        "factors": tuple(rate / RATES[0] for rate in RATES),
        "batch_size": 4,
        "replacement": False,
        "drop_last": False,
        "recorded": Recorded(
            steps=(0, 1, 2, 3),
            loss_steps=(),
            loss_examples=99,
            mean_steps=(3,),
            loss_draws=1,
            expansion=False,
            weights=False,
        ),
        "start": PointSettings(memory=2**20, **point),
        "noise_free": NoiseFreeSettings(repetitions=0, pairs=1, every=1, children=0),
        "multiples": (),
        "prefix": "here.",
    }
    return EnsembleSettings(**(chosen | changes))


def state(model, optimizer, **changes):
    chosen = {
        "model": model,
        "optimizer": optimizer,
        "next_rate": RATES[0],
        "images": examples(),
        "batch_size": 5,
        "objective": AdversarialCrossEntropy(label_smoothing=0.0),
        "attack": attack(),
        "perturbation": None,
        "identity": "test",
        "description": {},
    }
    return TrainingState(**(chosen | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_go_on_as_the_optimiser_would(kind, tmp_path):
    model, optimizer = begun(kind)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    said = []
    ensemble = EnsembleRun(settings(), state(model, optimizer))
    assert ensemble.run(tmp_path, {}, shard=0, shards=1, say=said.append, wait=None) == 0
    assert_close([model.state_dict(), optimizer.state_dict()], before, rtol=0, atol=0)
    found = read_ensemble(tmp_path)

    def same(parameters):
        theirs = KINDS[kind](groups(parameters))
        theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which shares tensors
        return theirs

    data = examples()
    problem = training(images=to_unit(data.images).double(), targets=data.labels, learning_rate=RATES)
    for replica in range(2):
        path = by_hand(model, problem, same, replica)
        expected = (path - path[0]) @ found.start.directions.positions
        np.testing.assert_allclose(found.position[replica], expected.numpy(), **EXACT64)
    if kind == "adam":  # weights along D^(-1/2) u, gradients along D^(1/2) u, with D of Adam's third step
        moments = [optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in model.parameters()]
        scale = 1 / ((torch.cat(moments) / (1 - 0.9**3)).sqrt() + 1e-8)
        along = found.start.directions
        assert_close(along.forces, along.positions * scale[:, None], **EXACT64)
    # the mean is kept in float32
    spread = found.path[0].directions.positions.T @ torch.from_numpy(found.mean_move[0]).double()
    np.testing.assert_allclose(spread.numpy(), found.position[:, -1].mean(axis=0), rtol=1e-5, atol=1e-7)
    assert [line.split()[0] for line in said] == ["start", "start", "replicas", "path"]


def test_noise_free_paths_are_followed_beside_the_replicas_and_once(tmp_path):
    """Two shards; the drift's displacements are none at the start, and the children start at the decay."""
    model, optimizer = begun("sgd")
    chosen = settings(
        replicas=8,
        chunk=4,
        start=replace(settings().start, slope_batches=2),
        noise_free=NoiseFreeSettings(repetitions=2, pairs=1, every=2, children=4),
    )
    said = []
    described = {"optimizer": {"momentum": 0.9, "weight_decay": 5e-3}}
    for shard in (0, 1, 0):  # the last one finds nothing to do
        run = EnsembleRun(chosen, state(model, optimizer, description=described))
        run.run(tmp_path, {}, shard=shard, shards=2, say=said.append, wait=None)
    words = [line.split()[0] for line in said]
    one = ["start", "replicas", "noise-free"]
    assert words == ["start", *one, *one, "path", "start", "path"]
    found = read_ensemble(tmp_path)
    plain, drifting = found.mean_paths.plain, found.mean_paths.drifting
    assert plain.shape == drifting.shape == (2, 4, 3)
    assert (plain[:, 0] == 0).all()
    assert (plain[0, 1:] != plain[1, 1:]).all()  # starts of the attack of their own
    assert (plain[:, 1:] != drifting[:, 1:]).all()
    assert np.isnan(found.child[:, :3]).all()  # the rate falls after two steps
    assert np.isfinite(found.child[:4, 3]).all()
    assert np.isnan(found.child[4:]).all()
    # from one state, the replica and its child differ by the noise of one batch at a tenth of the rate
    apart = np.abs(found.child[:4, 3] - found.position[:4, 3]).max()
    assert 0 < apart < np.abs(found.position[:4, 2] - found.position[:4, 1]).max()


def test_noise_free_paths_that_cannot_be_followed_are_refused():
    model, optimizer = begun("adam")
    paths = NoiseFreeSettings(repetitions=2, pairs=1, every=1, children=0)
    slopes = replace(settings().start, slope_batches=2)
    for changes, message in (
        ({"noise_free": paths}, r"start.slope_batches=0 and batchnorm=eval must be at least 2 and eval"),
        ({"noise_free": paths, "start": slopes, "batchnorm": "train"}, "batchnorm=train must be"),
        ({"noise_free": replace(paths, children=3)}, "children=3 must be a multiple of chunk=2"),
        ({"noise_free": replace(paths, children=4)}, "children=4 .* at most replicas=2"),
        (
            {"noise_free": replace(paths, children=4), "replicas": 4, "factors": (1.0, 0.9)},
            "children=4 has no decay to start from; set schedule.milestones",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**changes)
    chosen = settings(noise_free=paths, start=slopes)
    with pytest.raises(ConfigError, match="need the optimizer's settings"):
        EnsembleRun(chosen, state(model, optimizer))
    with pytest.raises(ConfigError, match=r"^here\.freeze_preconditioner=false changes Adam's"):
        EnsembleRun(chosen, state(model, optimizer, description={"optimizer": {}}))


def test_a_fingerprint_is_of_the_point_and_not_of_the_memory():
    model, optimizer = begun("sgd")
    twin, twins = begun("sgd")
    for p in twin.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    assert fingerprint(model, optimizer) == fingerprint(twin, twins)
    momentum = next(iter(twins.state.values()))["momentum_buffer"]
    momentum.view(-1)[0].add_(1e-12)
    assert fingerprint(model, optimizer) != fingerprint(twin, twins)


def test_batchnorm_of_many_processes_is_copied_as_that_of_one():
    x, y = torch.rand(2, 6, 3, 5, 5)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    plain(x)
    of_cpus, of_gpus = copy.deepcopy(plain), nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    synchronize(of_cpus)
    for model in (of_cpus, of_gpus):
        copied = _alone(model)  # in train mode it would ask for the other processes, which are not there
        assert not copied.training
        copied.train()
        expected = copy.deepcopy(plain)
        assert_close(copied(y), expected(y))
        assert_close(copied.state_dict(), expected.state_dict())
    assert isinstance(of_gpus[1], nn.SyncBatchNorm)
    assert "forward" in vars(of_cpus[1])


def nesterov(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def amsgrad(parameters):
    return torch.optim.Adam(parameters, amsgrad=True)


def two_rates(parameters):
    return torch.optim.SGD([dict(group, lr=0.1 + i) for i, group in enumerate(groups(parameters))])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.optim.AdamW, "optimizer: replicas support SGD and Adam, not AdamW"),
        (nesterov, "optimizer: replicas support SGD without Nesterov"),
        (amsgrad, "optimizer: replicas support Adam without amsgrad"),
        (two_rates, "optimizer: replicas only support one lr for all weights"),
        (lambda p: torch.optim.SGD(list(p)[1:], lr=0.1), "optimizer: it does not hold all parameters"),
    ],
)
def test_optimisers_that_replicas_do_not_know(kind, message):
    model = network()
    with pytest.raises(ConfigError, match=message):
        EnsembleRun(settings(), state(model, kind(model.parameters())))


def test_errors_have_the_whole_name_of_their_setting(tmp_path):
    model, optimizer = begun("sgd")
    with pytest.raises(ValueError, match=r"^replicas=3 is not a multiple of chunk=2; choose 4"):
        settings(replicas=3)
    with pytest.raises(ConfigError, match=r"^here\.sampling\.batch_size must lie in \[1, 10\]"):
        EnsembleRun(settings(batch_size=11), state(model, optimizer))
    with pytest.raises(ConfigError, match=r"^here\.learning_rate must be positive"):
        EnsembleRun(settings(), state(model, optimizer, next_rate=0.0))
    trades = TRADES(beta=6.0, label_smoothing=0.0)
    with pytest.raises(ConfigError, match=r"^objective: the Hessian of TRADES"):
        EnsembleRun(settings(), state(model, optimizer, objective=trades))
    fresh = EnsembleRun(settings(), state(model, KINDS["sgd"](model.parameters())))
    with pytest.raises(ConfigError, match=r"^here\.initial_state=checkpoint: the optimiser holds no"):
        fresh.run(tmp_path / "none", {}, shard=0, shards=1, say=print, wait=None)
    assert not (tmp_path / "none").exists()
    fast = EnsembleRun(settings(learning_rate=1e300), state(model, optimizer))
    with pytest.raises(ConfigError, match=r"^here\.learning_rate=1e\+300: replicas .* diverged"):
        fast.run(tmp_path / "fast", {}, shard=0, shards=1, say=print, wait=None)
