"""Defaults stand only in the configuration, which fits the constructors."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from robustdyn.data import CIFAR10, Augmentation, Digits, ImageDataModule, ImageFiles, Mixup
from robustdyn.run.config import build, check
from tests.data.official import SHARED, needs_shared
from tests.runs import compose

CONF = Path(__file__).parents[2] / "conf" / "data"
NAMES = ["digits", "cifar10", "cifar100", "svhn"]


def load(name, **changes):
    whole = OmegaConf.create({"seed": 3, "data": OmegaConf.load(CONF / f"{name}.yaml")})
    return OmegaConf.merge(whole, {"data": changes}).data


def parameters(cls):
    return {
        name: parameter
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_constructors_have_no_defaults():
    for cls in (ImageDataModule, ImageFiles):
        assert all(p.default is p.empty for p in parameters(cls).values())


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_parameters(name):
    expected = {"_target_", *parameters(ImageDataModule)}
    if name != "digits":
        expected |= parameters(ImageFiles).keys()
    assert set(load(name)) == expected


@pytest.mark.parametrize(
    ("name", "own"), [("npz", {"path"}), ("image_folder", {"root"}), ("dataset", {"train", "test"})]
)
def test_keys_of_own_images_are_the_parameters(name, own):
    assert set(load(name)) == {"_target_", *own, *parameters(ImageDataModule)}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_instantiable(name, monkeypatch):
    monkeypatch.setenv("ROBUSTDYN_DATA", "somewhere")
    data = instantiate(load(name))
    assert data.seed == 3
    assert (data.root.name == "somewhere") if name != "digits" else isinstance(data, Digits)


def test_root_has_a_fallback(monkeypatch):
    monkeypatch.delenv("ROBUSTDYN_DATA", raising=False)
    data = instantiate(load("cifar10"))
    assert isinstance(data, CIFAR10)
    assert data.root == Path.cwd() / "data"


@pytest.mark.parametrize("name", NAMES)
def test_cutout_and_mixup_are_off_and_can_be_switched_on(name):
    conf = load(name)
    assert set(conf.augment) == {field.name for field in fields(Augmentation)}
    data = instantiate(conf)
    assert data.augmentation.cutout == 0
    assert data.mixup is None
    data = instantiate(load(name, augment={"cutout": 3}, mixup=0.4))
    assert data.augmentation.cutout == 3
    assert data.mixup == Mixup(alpha=0.4, num_classes=conf.num_classes)


def test_digits_are_not_augmented():
    cfg = compose("data=digits")
    without = compose("data=digits", "data.augment=null")
    check(without)
    data, plain = build(cfg, "data"), build(without, "data")
    assert plain.augmentation is None
    for batch, expected in zip(data.train_dataloader(), plain.train_dataloader(), strict=True):
        for ours, theirs in zip(batch, expected, strict=True):
            assert torch.equal(ours, theirs)
    assert load("svhn").augment == load("digits").augment


def test_digits_load():
    data = instantiate(load("digits"))
    data.setup()
    assert len(data.train_dataloader()) == 40


def test_digits_constants_in_conf_are_those_of_the_data():
    conf = load("digits")
    data = instantiate(conf)
    images = torch.cat([data.split(name).images for name in ("train", "test")]) / 255
    assert list(conf.mean) == [round(images.mean().item(), 4)]
    assert list(conf["std"]) == [round(images.std(correction=0).item(), 4)]


@needs_shared
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_excerpts_load(name):
    changes = {"test_from_train": 219} if name == "svhn" else {}
    data = instantiate(load(name, root=str(SHARED), partial=True, **changes))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (128, 3, 32, 32)
