from argparse import Namespace
from collections import OrderedDict

import lightning
import pytest
import torch
from torch import nn

from robustdyn.errors import ConfigError, DataFileError
from robustdyn.models import PreActResNet, WideResNet, load_weights
from tests.models.public import (
    preact_resnet_logits,
    preact_resnet_state,
    wide_resnet_logits,
    wide_resnet_state,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
COMMON = {"num_classes": 10, "in_channels": 3, "mean": MEAN, "std": STD}
# rounding errors in about twenty float64 layers of unit scale
LOGITS = {"rtol": 1e-12, "atol": 1e-12}


def preact(**changes):
    sizes = {"width": 4, "blocks": (2, 2, 2, 2), "strides": (1, 2, 2, 2)}
    return PreActResNet(**(COMMON | sizes | changes))


def wide(**changes):
    sizes = {"depth": 16, "widen_factor": 2, "base_channels": 16, "dropout": 0.0}
    return WideResNet(**(COMMON | sizes | changes))


def public_preact():
    torch.manual_seed(0)
    return preact_resnet_state(width=4)


def public_wide():
    torch.manual_seed(0)
    return wide_resnet_state(depth=16, widen_factor=2)


def parallel(state):
    """The state with the names of nn.DataParallel."""
    return OrderedDict((f"module.{name}", value) for name, value in state.items())


def best(state):
    """The state in the form in which the best checkpoint is saved."""
    return {"state_dict": state, "test_robust_acc": 0.5, "test_loss": 1.0}


def with_unused_block(state):
    unused = {name: value for name, value in state.items() if name.startswith("block1.")}
    return state | {name.replace("block1.", "sub_block1."): value for name, value in unused.items()}


def saved(content, tmp_path, name="model.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def randomised(model):
    torch.manual_seed(3)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5)
    return model


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------- public layouts


@pytest.mark.parametrize(
    ("build", "state", "logits"),
    [(preact, public_preact, preact_resnet_logits), (wide, public_wide, wide_resnet_logits)],
    ids=["preact_resnet", "wide_resnet"],
)
@pytest.mark.parametrize(
    ("wrap", "layout", "used"),
    [
        (dict, "auto", "robust_overfitting"),
        (parallel, "auto", "robust_overfitting"),
        (lambda state: best(parallel(state)), "auto", "robust_overfitting"),
        (parallel, "robust_overfitting", "robust_overfitting"),
        (lambda state: best(parallel(state)), "awp", "awp"),
        (lambda state: parallel(with_unused_block(state)), "awp", "awp"),
    ],
    ids=["plain", "parallel", "best", "named", "awp", "awp_unused_block"],
)
def test_public_files_give_the_public_logits(build, state, logits, wrap, layout, used, tmp_path):
    theirs, model = state(), build().double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    # the model's own float32 constants, so that both networks normalise in the same way
    expected = logits(theirs, (x - model.mean) / model.std)
    assert load_weights(model, saved(wrap(theirs), tmp_path), layout=layout) == used
    torch.testing.assert_close(model(x), expected, **LOGITS)
    assert expected.std() > 0.1


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def normalised_outside(state):
    """The state of a Sequential of a normalisation layer and the network."""
    return {"0.mu": torch.tensor([0.1, 0.2, 0.3]), "0.sigma": torch.tensor([0.4, 0.5, 0.6])} | under(
        "1.", state
    )


@pytest.mark.parametrize(
    ("wrap", "normalised"),
    [
        (lambda state: {"net": state, "acc": 0.5, "epoch": 3}, False),
        (lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}}, False),
        (lambda state: {"model_state_dict": state, "ema": state, "epoch": 3}, False),
        (lambda state: {"teacher": state, "epoch": 3}, False),
        (lambda state: under("_orig_mod.", state), False),
        (lambda state: {"state_dict": under("module._orig_mod.", state)}, False),
        (lambda state: under("module.model.net.", state), False),
        (lambda state: under("module.", state) | {"n_averaged": torch.tensor(3)}, False),
        (
            lambda state: {
                "pytorch-lightning_version": "2.6.0",
                "state_dict": under("net.", state) | {"criterion.weight": torch.ones(10)},
            },
            False,
        ),
        (normalised_outside, True),
        (lambda state: {"model": under("module.", normalised_outside(state))}, True),
        (
            lambda state: (
                {
                    "mean": torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1),
                    "std": torch.tensor([[0.4, 0.5, 0.6]]),
                }
                | under("model.", state)
            ),
            True,
        ),
    ],
    ids=[
        *("net", "model", "ema", "only", "compiled", "both", "deep", "averaged", "lightning"),
        *("sequential", "parallel", "beside"),
    ],
)
@pytest.mark.parametrize("ours", [True, False], ids=["own", "public"])
def test_wrappers_are_taken_off(wrap, normalised, ours, tmp_path):
    theirs, model = public_preact(), preact().double().eval()
    plain = preact().double().eval()
    load_weights(plain, saved(theirs, tmp_path), layout="auto")
    if ours:
        theirs = plain.state_dict()
    load_weights(model, saved(wrap(theirs), tmp_path), layout="auto")
    assert same(model, plain.state_dict())
    mean, std = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) if normalised else (MEAN, STD)
    torch.testing.assert_close(model.mean.flatten(), torch.tensor(mean).double())
    torch.testing.assert_close(model.std.flatten(), torch.tensor(std).double())


def test_names_the_entries_that_it_cannot_tell_apart(tmp_path):
    path = saved({"student": public_preact(), "teacher": public_preact()}, tmp_path)
    assert "several of its entries hold tensors (student, teacher)" in refused(preact(), path, DataFileError)


def test_two_networks_in_one_state_dict_are_named(tmp_path):
    path = saved(under("student.", public_preact()) | under("teacher.", public_preact()), tmp_path)
    assert "student. and teacher. each hold the weights" in refused(preact(), path, DataFileError)


def test_a_normalisation_is_not_lost(tmp_path):
    """A class that does not normalise would be measured at other inputs than those it was trained on."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    path = saved(normalised_outside(network.state_dict()), tmp_path)
    message = refused(network, path, ConfigError)
    assert "it normalises the pixels (0.mu, 0.sigma) outside the network" in message


def test_refuses_a_normalisation_that_cannot_be(tmp_path):
    wrong = normalised_outside(public_preact()) | {"0.sigma": torch.tensor([0.4, 0.0, 0.6])}
    assert "its std of the pixels" in refused(preact(), saved(wrong, tmp_path), DataFileError)


def test_unused_block_tells_awp_apart(tmp_path):
    path = saved(parallel(with_unused_block(public_wide())), tmp_path)
    assert load_weights(wide(), path, layout="auto") == "awp"
    with pytest.raises(ConfigError, match=r"^layout=robust_overfitting does not fit .*those of awp"):
        load_weights(wide(), path, layout="robust_overfitting")


@pytest.mark.parametrize("layout", ["trades", "mart"])
def test_trades_and_mart_take_the_pixels_as_they_are(layout, tmp_path):
    theirs, model = public_wide(), wide().double().eval()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    path = saved(parallel(with_unused_block(theirs)), tmp_path)
    assert load_weights(model, path, layout=layout) == layout
    torch.testing.assert_close(model(x), wide_resnet_logits(theirs, x), **LOGITS)


def test_a_plain_resnet_needs_its_own_class(tmp_path):
    """The ResNet-18 of MART: convolution before BatchNorm, and a BatchNorm in the shortcuts."""
    theirs = {k: v for k, v in public_preact().items() if not k.startswith("bn.")}
    theirs |= {"bn1.weight": torch.ones(4), "layer2.0.shortcut.1.weight": torch.ones(8)}
    message = refused(preact(), saved(theirs, tmp_path), DataFileError, "mart")
    assert "it looks like a plain ResNet" in message
    assert "model._target_" in message


def test_weights_take_the_models_dtype_and_old_files_need_no_counters(tmp_path):
    theirs = public_wide()
    old = {name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")}
    model = wide()
    load_weights(model, saved(parallel(old), tmp_path), layout="auto")
    assert model.linear.weight.dtype == torch.float32
    assert torch.equal(model.linear.weight, theirs["fc.weight"].float())
    assert torch.equal(model.bn.running_var, theirs["bn1.running_var"].float())


# ---------------------------------------------------------------------- our own


class Wrapper(lightning.LightningModule):
    """Like the module of a run: the network is its attribute ``model``, and it has other state."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("seen", torch.ones(2))


@pytest.mark.parametrize("build", [preact, wide])
def test_own_state_dict_and_lightning_checkpoint(build, tmp_path):
    source = randomised(build())
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    trainer.strategy.connect(Wrapper(source))
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert "pytorch-lightning_version" in torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = saved(source.state_dict(), tmp_path)
    for path in (tmp_path / "last.ckpt", plain):
        for layout in ("auto", "robustdyn"):
            model = build()
            assert load_weights(model, path, layout=layout) == "robustdyn"
            assert same(model, source.state_dict())


def test_any_network_under_its_own_names(tmp_path):
    """This holds even if the names look like those of a public layout."""
    source = nn.Sequential(OrderedDict([("layer1", nn.Sequential(nn.Linear(3, 2))), ("fc", nn.Linear(2, 2))]))
    target = nn.Sequential(OrderedDict([("layer1", nn.Sequential(nn.Linear(3, 2))), ("fc", nn.Linear(2, 2))]))
    assert load_weights(target, saved(source.state_dict(), tmp_path), layout="auto") == "robustdyn"
    assert same(target, source.state_dict())
    checkpoint = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {f"model.{name}": value for name, value in source.state_dict().items()},
    }
    target = nn.Sequential(OrderedDict([("layer1", nn.Sequential(nn.Linear(3, 2))), ("fc", nn.Linear(2, 2))]))
    assert load_weights(target, saved(checkpoint, tmp_path), layout="auto") == "robustdyn"
    assert same(target, source.state_dict())


class Normalising(nn.Module):
    """A user's wrapper around a network that was trained on normalised images."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))

    def forward(self, x):
        return self.network(x - self.mean)


@pytest.mark.parametrize("wrap", [dict, parallel])
def test_a_wrapper_takes_the_file_of_its_network(wrap, tmp_path):
    for theirs in (public_preact(), randomised(preact()).state_dict()):
        model, plain = Normalising(preact()), preact()
        load_weights(plain, saved(theirs, tmp_path), layout="auto")
        load_weights(model, saved(wrap(theirs), tmp_path), layout="auto")
        assert same(model.network, plain.state_dict())
        assert torch.equal(model.mean, torch.full((3, 1, 1), 0.5))


# ---------------------------------------------------------------------- errors


def refused(model, path, error, layout="auto"):
    """Return the message of a refusal that leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        load_weights(model, path, layout=layout)
    assert same(model, before)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("build", "state", "starts", "tensor", "remedy"),
    [
        (
            lambda: preact(width=8),
            public_preact,
            "model.width=8 does not fit",
            "conv1.weight is (4, 3, 3, 3) there and (8, 3, 3, 3) in the network",
            "choose model.width=4",
        ),
        (
            lambda: preact(num_classes=100),
            public_preact,
            "model.num_classes=100 does not fit",
            "linear.weight is (10, 32) there and (100, 32) in the network (2 such differences)",
            "choose model.num_classes=10 or the data set it was trained on",
        ),
        (
            lambda: preact(in_channels=1, mean=(0.5,), std=(0.5,)),
            public_preact,
            "model.in_channels=1 does not fit",
            "conv1.weight is (4, 3, 3, 3) there and (4, 1, 3, 3) in the network",
            "choose model.in_channels=3 or the data set",
        ),
        (
            lambda: preact(blocks=(3, 4, 6, 3)),
            public_preact,
            "model.blocks=[3,4,6,3] does not fit",
            "it has no layers.0.2.bn1.weight",
            "choose model.blocks=[2,2,2,2]",
        ),
        (
            lambda: preact(blocks=(1, 1, 1, 1)),
            public_preact,
            "model.blocks=[1,1,1,1] does not fit",
            "it has layers.0.1.bn1.weight",
            "choose model.blocks=[2,2,2,2]",
        ),
        (
            lambda: wide(depth=28, widen_factor=1),
            public_wide,
            "model.depth=28, model.widen_factor=1 does not fit",
            "layers.0.0.conv1.weight is (32, 16, 3, 3) there and (16, 16, 3, 3) in the network",
            "choose model.depth=16 model.widen_factor=2",
        ),
        (
            lambda: wide(base_channels=8, widen_factor=4),
            public_wide,
            "model.widen_factor=4, model.base_channels=8 does not fit",
            "conv1.weight is (16, 3, 3, 3) there and (8, 3, 3, 3) in the network",
            "choose model.widen_factor=2 model.base_channels=16",
        ),
    ],
    ids=["width", "classes", "channels", "fewer_blocks", "more_blocks", "depth", "base_channels"],
)
def test_names_the_setting_that_does_not_fit(build, state, starts, tensor, remedy, tmp_path):
    message = refused(build(), saved(parallel(state()), tmp_path), ConfigError)
    assert message.startswith(starts)
    assert tensor in message
    assert remedy in message


def test_names_the_other_network(tmp_path):
    message = refused(preact(), saved(public_wide(), tmp_path), DataFileError)
    assert "does not fit this PreActResNet" in message
    assert "looks like a WideResNet of num_classes=10 in_channels=3 depth=16 widen_factor=2" in message
    message = refused(wide(), saved(public_preact(), tmp_path), DataFileError)
    assert "looks like a PreActResNet of num_classes=10 in_channels=3 width=4 blocks=[2,2,2,2]" in message
    message = refused(nn.Linear(2, 2), saved(public_preact(), tmp_path), DataFileError)
    assert "does not fit this Linear" in message


def test_names_missing_and_unexpected_tensors(tmp_path):
    state = public_preact()
    lacking = {name: value for name, value in state.items() if name != "layer3.0.bn2.bias"}
    message = refused(preact(), saved(lacking, tmp_path), DataFileError)
    assert "it has no layers.2.0.bn2.bias; it is damaged or of another network" in message
    more = state | {"layer3.0.bn3.bias": torch.ones(2)}
    message = refused(preact(), saved(more, tmp_path), DataFileError)
    assert "it has layers.2.0.bn3.bias, which the network has not" in message


@pytest.mark.parametrize(
    ("layout", "state", "message"),
    [
        ("robustdyn", public_preact, "those of robust_overfitting; use layout=robust_overfitting or auto"),
        ("awp", lambda: preact().state_dict(), "those of robustdyn; use layout=robustdyn or auto"),
    ],
)
def test_names_the_layout_found(layout, state, message, tmp_path):
    found = refused(preact(), saved(state(), tmp_path), ConfigError, layout)
    assert found.startswith(f"layout={layout} does not fit")
    assert message in found


def test_refuses_an_unknown_layout(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^layout=mair is not known; choose one of auto, robustdyn, robust_ov"
    ):
        load_weights(preact(), saved(public_preact(), tmp_path), layout="mair")


def test_refuses_unknown_names(tmp_path):
    path = saved({"features.0.kernel": torch.ones(2)}, tmp_path)
    assert "its names (features.0.kernel) are of no known layout" in refused(preact(), path, DataFileError)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"state": {}, "param_groups": []}, "found a dict (state, param_groups), not a state_dict"),
        ([torch.ones(2)], "found a list, not a state_dict"),
        (torch.ones(2), "found a Tensor, not a state_dict"),
        ({}, "found a dict (), not a state_dict"),
        ({"state_dict": {}}, "found a dict (state_dict), not a state_dict"),
        ({"conv1.weight": 1.0}, "found a dict (conv1.weight), not a state_dict"),
    ],
    ids=["optimiser", "list", "tensor", "empty", "empty_entry", "numbers"],
)
def test_refuses_what_is_no_state_dict(content, found, tmp_path):
    assert found in refused(preact(), saved(content, tmp_path), DataFileError)


@pytest.mark.parametrize("content", [b"", b"hello world\n", b"\x80\x02}q\x00(garbage", b"PK\x03\x04"])
def test_refuses_what_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert "not a complete file of torch.save" in refused(preact(), path, DataFileError)


def test_refuses_half_a_file(tmp_path):
    path = saved(public_preact(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "copy or download it again" in refused(preact(), path, DataFileError)


def test_refuses_what_is_not_there(tmp_path):
    assert "No such file" in refused(preact(), tmp_path / "none.pth", DataFileError)
    assert "Is a directory" in refused(preact(), tmp_path, DataFileError)


def test_refuses_objects_and_runs_nothing(tmp_path):
    content = {"state_dict": parallel(public_preact()), "args": Namespace(lr=0.1)}
    message = refused(preact(), saved(content, tmp_path), DataFileError)
    assert "it holds argparse.Namespace" in message
    assert "torch.save(model.state_dict(), FILE)" in message

    touched = tmp_path / "touched"

    class Harmful:
        def __reduce__(self):
            return type(touched).touch, (touched,)

    refused(preact(), saved({"conv1.weight": Harmful()}, tmp_path), DataFileError)
    assert not touched.exists()
