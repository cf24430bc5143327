"""The key that was probably meant, and settings that nothing reads."""

import re
from contextlib import nullcontext

import hydra
import pytest
from omegaconf import OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError
from robustdyn.records.labels import flatten
from robustdyn.run.config_keys import refuse_unread, unknown_key
from tests.runs import compose

READ = [
    "+trainer.gradient_clip_val=1",  # an argument of a class
    "+data.augment.something=1",  # within one
    "+callbacks.mine._target_=mypackage.Mine",  # names a class
    "+callbacks.mine={_target_: mypackage.Mine}",
    "++batchnorm.frozen_from=1",  # exists
]
REFERRED_TO = ["${one}", "${oc.select:one,3}", "${times:2,${one}}"]
UNREAD = [
    ("+epochs=3", "did you mean decay_epochs or measure.epochs or .*trainer.max_epochs"),
    ("+eps=8", "did you mean attack.eps_255 or"),
    ("+lr=0.1", r"did you mean optimizer.lr\?"),
    ("+batchnorm.momentum=0.1", "did you mean optimizer.momentum or"),
    ("+measure.example=9", "did you mean measure.examples or"),
    ("+qqq=9", "see --help for all keys"),
]


@pytest.mark.parametrize("typed", READ)
def test_what_is_read_is_accepted(typed):
    refuse_unread(compose(typed), "train", [typed], {"measure"})


def test_an_option_of_a_group_of_ones_own_is_accepted():
    refuse_unread(compose("+mine=1"), "train", ["+mine=1"], {"mine"})


@pytest.mark.parametrize("text", REFERRED_TO)
def test_what_another_setting_refers_to_is_accepted(text):
    typed = ["+one=3", f"+decay_fractions=[{text}]"]
    refuse_unread(compose(typed[0], f"optimizer.lr='{text}'"), "train", typed, ())
    with pytest.raises(ConfigError, match="nothing reads one;"):
        refuse_unread(compose(typed[0], "optimizer.lr='${times:2,${trainer.one}}'"), "train", typed, ())


@pytest.mark.parametrize(("typed", "remedy"), UNREAD)
def test_what_nothing_reads_is_refused(typed, remedy):
    key = typed.lstrip("+").partition("=")[0]
    with pytest.raises(ConfigError, match=f"nothing reads {key}; {remedy}"):
        refuse_unread(compose(typed), "train", ["seed=0", typed], ())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lr", r"unknown config key lr; did you mean optimizer.lr\?$"),
        ("steps", "did you mean attack.steps or"),
        ("schedule.threshold", "with the chosen options; leave it out, or choose schedule=wci$"),
        ("optimizer.betas", "or choose optimizer=adam or optimizer=adamw$"),
        ("trainer.max_epoch", r"did you mean trainer.max_epochs.*\+trainer.max_epoch=... passes a further"),
        ("qqq", "unknown config key qqq; see --help for all keys$"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(key, message):
    known = flatten(OmegaConf.to_container(compose(), resolve=False))
    assert re.search(message, unknown_key(key, known))


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("replicas", "+run.data.train_size=9", None),  # changes the run's settings
        (
            "replicas",
            "+data.train_size=9",
            r"nothing reads data.train_size; did you mean \+run.data.train_size\?",
        ),
        ("certify", "+run.data.train_size=9", None),
        ("evaluate", "+examples=9", r"did you mean evaluation.examples\?"),
        ("measure", "+directions=9", r"did you mean measure.eigenpairs.directions\?"),
        ("fork", "+fork.epochs=9", "did you mean fork.epoch or"),
    ],
)
def test_each_command_has_its_own_keys(name, typed, message):
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose(name, [typed])
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        refuse_unread(cfg, name, [typed], ())
