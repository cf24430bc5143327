import re
import sys
from fractions import Fraction

import pytest
import torch
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from robustdyn.attacks import PGD
from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError
from robustdyn.run.combinations import check_combinations
from robustdyn.run.config import RULES, build, check
from robustdyn.run.targets import allowed
from tests.compositions import COMPOSE, CREATE
from tests.runs import compose

GIVEN = {
    "npz": " data.path=x.npz",
    "image_folder": " data.root=x",
    "dataset": " data.train._target_=fractions.Fraction",
}
"""What an option does not have by itself."""


def options(group):
    names = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    return [name + GIVEN.get(name, "") if group == "data" else name for name in names]


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes_and_passes_its_checks(experiment):
    check(compose(f"experiment={experiment}"))


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={option}"
        for group in (
            "data",
            "model",
            "attack",
            "objective",
            "added_noise",
            "curvature_penalty",
            "optimizer",
            "regularizer",
            "averaging",
            "callbacks",
            "measure",
            "ensemble",
            "trainer",
            "logger",
        )
        for option in options(group)
    ],
)
def test_every_option_composes_and_passes_its_checks(choice):
    """Methods, schedules and perturbations do in tests/commands/test_presets.py."""
    cfg = compose(*choice.split())
    check(cfg)
    check_combinations(cfg)


@pytest.mark.parametrize("choice", [f"scale={scale}" for scale in options("scale")] + ["experiment=demo"])
def test_without_measurement_neither_a_scale_nor_an_experiment_measures(choice):
    assert compose(choice, "measure=none").measure.epochs == []
    assert compose(choice, "measure=none", "measure.epochs=[3]").measure.epochs == [3]


@pytest.mark.parametrize("overrides", [(), ("data=cifar10", "method=awp", "optimizer.lr=1", "~logger")])
def test_tests_compose_as_hydra_does(overrides, monkeypatch):
    """They keep what they composed before."""
    for _ in range(2):
        kept = OmegaConf.to_yaml(compose(*overrides))
    monkeypatch.setattr(config_loader_impl, "create_defaults_list", CREATE)
    monkeypatch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", COMPOSE)
    assert OmegaConf.to_yaml(compose(*overrides)) == kept


CHOICES = (
    (),
    ("method=trades_awp",),
    ("perturbation=sam",),
    ("schedule=wci",),
    ("schedule=bound",),
    ("stopping=early",),
    ("batchnorm.frozen_from=0",),
    ("measure.memory_mib=64",),
)


@pytest.mark.parametrize("key", RULES)
def test_every_rule_guards_a_key_that_exists(key):
    assert any(OmegaConf.select(compose(*choice), key) is not None for choice in CHOICES)


def test_a_data_set_changes_the_protocol_and_the_user_has_the_last_word():
    assert compose("data=cifar10").attack.step_255 == 2
    assert compose("data=svhn").attack.step_255 == 1
    assert compose("data=svhn", "attack.step_255=4").attack.step_255 == 4
    assert compose("data=digits").model.width < compose("data=cifar10").model.width


def test_radii_are_divided_once():
    attack = build(compose("data=cifar10", "attack.eps_255=4"), "attack.train")
    assert isinstance(attack, PGD)
    assert attack.eps == pytest.approx(4 / 255)
    assert attack.step_size == pytest.approx(2 / 255)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attack.eps_255=-8", r"attack.eps_255=-8 must be a number of at least 0"),
        ("attack.step_255=0", r"attack.step_255=0 must be a positive number"),
        ("attack.eps_255=abc", r"attack.eps_255=abc must be a number"),
        ("attack.steps=2.5", r"attack.steps=2.5 must be a whole number"),
        ("optimizer.momentum=1", r"optimizer.momentum=1 must lie in \[0, 1\)"),
        ("optimizer.lr=nan", r"optimizer.lr=nan must be a positive number"),
        ("trainer.max_epochs=0", r"trainer.max_epochs=0 must be a whole number of at least 1"),
        ("seed=-1", r"seed=-1 must be a whole number from 0 to 2\^63 - 1"),
        (f"seed={2**63}", r"must be a whole number from 0 to 2\^63 - 1"),
        (f"data.split_seed={2**63}", r"data.split_seed=\d+ must be a whole number from 0 to 2\^63 - 1"),
        ("seed=null", r"seed=None must be a whole number"),
        ("checkpoint.keep_epochs=null", r"checkpoint.keep_epochs=None must be epochs in the syntax of"),
        ("attack.norm=l1", r"attack.norm=l1 must be linf or l2"),
        (
            "model.num_classes='${oc.select:classes.${seed},10}'",
            r"model.num_classes: a key is computed by an interpolation in .*; type the value",
        ),
    ],
)
def test_refuses_a_value_by_its_key(override, message):
    with pytest.raises(ConfigError, match=message):
        check(compose(override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batch_size=0", "data.batch_size=0 must be a whole number of at least 1"),
        ("data.eval_batch_size=1.5", "data.eval_batch_size=1.5 must be a whole number"),
        ("data.augment.cutout=-1", "data.augment.cutout=-1 must be a whole number of at least 0"),
        ("data.mixup=-0.1", "data.mixup=-0.1 must be a number of at least 0; 0 is none"),
        ("model.width=0", "model.width must be at least 1, got 0"),
        ("model.width=2.5", "model.width=2.5 must be a whole number"),
        ("attack.train.batchnorm=both", "attack.train.batchnorm must be train or eval, got both"),
        ("attack.train.random_start=0", "attack.train.random_start must be uniform, gaussian or none, got 0"),
        ("objective.label_smoothing=1", "objective.label_smoothing must lie in [0, 1), got 1"),
        ("objective=trades objective.beta=abc", "objective.beta=abc must be a number"),
        ("objective=mart objective.beta=-1", "objective.beta must be at least 0, got -1"),
        ("perturbation=awp perturbation.gamma=inf", "perturbation.gamma=inf must be a number"),
        ("perturbation=sam perturbation.rho=-1", "perturbation.rho must be at least 0, got -1"),
        (
            "perturbation=sam perturbation.warmup_epochs=0.5",
            "perturbation.warmup_epochs=0.5 must be a whole number",
        ),
        ("optimizer.nesterov=1", "optimizer.nesterov=1 must be true or false"),
        ("regularizer.l1=nan", "regularizer.l1=nan must be a number"),
        (
            "regularizer.weight_decay_on=biases",
            "regularizer.weight_decay_on must be all or weights, got biases",
        ),
        ("schedule=wci schedule.interval=0", "schedule.interval must be at least 1, got 0"),
        ("schedule=wci schedule.start_epoch=abc", "schedule.start_epoch=abc must be a whole number"),
        ("schedule=wci schedule.threshold=0", "schedule.threshold must be positive, got 0"),
        ("schedule=wci schedule.quantity=rate", "schedule.quantity must be wci or hessian_trace, got rate"),
        ("data=npz", "data.path is not given; give data.path=..."),
        ("data=dataset", "data.train._target_ is not given; give data.train._target_=..."),
        ("schedule=wci schedule.monotone=null", "schedule.monotone=None must be true or false"),
        ("averaging=ema averaging.decay=1", "averaging.decay must lie in [0, 1), got 1"),
        ("execution.channels_last=maybe", "execution.channels_last=maybe must be true or false"),
        ("execution.compile=fast", "execution.compile must be one of none, default, reduce-overhead, "),
        ("measure.eigenpairs.directions=0", "measure.eigenpairs.directions must be at least 1, got 0"),
        ("measure.eigenpairs.max_products=few", "measure.eigenpairs.max_products=few must be a whole number"),
        ("measure.eigenpairs.warm_start=yes", "measure.eigenpairs.warm_start=yes must be true or false"),
        (
            "measure.measurements.alignment.groups=2.5",
            "measure.measurements.alignment.groups=2.5 must be a whole number",
        ),
    ],
)
def test_a_part_refuses_an_argument_by_its_key(override, message):
    cfg = compose(*override.split())
    check(cfg)
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as refusal:
        check_combinations(cfg)
    assert "\n" not in str(refusal.value)


def test_a_constructor_that_refuses_is_named_by_its_key():
    with pytest.raises(ConfigError, match=r"^schedule\.milestones must increase strictly from 1 on"):
        build(compose("schedule.milestones=[5,3]"), "schedule")


def test_a_typed_configuration_may_name_any_class_that_can_be_imported():
    cfg = OmegaConf.create({"thing": {"_target_": "fractions.Fraction", "numerator": 3}})
    assert build(cfg, "thing") == Fraction(3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nomodule.Net", "there is no module nomodule on Python's path or in "),
        ("fractions.Fractoin", r"cannot be imported \(.*\); did you mean fractions.Fraction\?"),
        ("Net", "must be a full name, such as mypackage.MyClass"),
        ("own.Broken", r"cannot be imported \(.*x is not there.*\); correct the name or the module"),
    ],
)
def test_a_target_that_cannot_be_imported_is_one_line(target, message, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("raise ValueError('x is not there')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(ConfigError, match=f"^thing._target_={target}:? {message}") as refusal:
        build(OmegaConf.create({"thing": {"_target_": target}}), "thing")
    assert "\n" not in str(refusal.value)


def test_a_module_in_the_folder_of_the_command_is_found_and_hides_no_installed_one(tmp_path, monkeypatch):
    (tmp_path / "besides.py").write_text("class Net:\n    pass")
    (tmp_path / "fractions.py").write_text("raise ZeroDivisionError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert type(build(OmegaConf.create({"m": {"_target_": "besides.Net"}}), "m")).__name__ == "Net"
    assert sys.path[-1] == str(tmp_path)
    assert build(OmegaConf.create({"m": {"_target_": "fractions.Fraction"}}), "m") == 0


FOREIGN = (
    "torch.os.system",
    "torch.load",
    "torch.utils.collect_env.run",
    "robustdyn.models.checkpoints.torch.utils.collect_env.run",
    "robustdyn.records.files.replace_file",
    "lightning.Trainer",  # named in conf/, for another section
    "${oc.select:other}",
)


@pytest.mark.parametrize("target", FOREIGN)
def test_a_configuration_of_a_file_calls_what_conf_names_alone(target):
    cfg = OmegaConf.create({"model": {"_target_": target}, "other": "torch.load"})
    with pytest.raises(ConfigError, match=r"model._target_=.* is not allowed .*; allowed are .*PreActResNet"):
        build(cfg, "model", allow=())
    nested = {"_target_": "robustdyn.models.PreActResNet", "width": [{"_target_": target}]}
    with pytest.raises(ConfigError, match=r"model.width\[0\]._target_=.* is not allowed"):
        build(OmegaConf.create({"model": nested, "other": "torch.load"}), "model", allow=())


@pytest.fixture
def mypkg(tmp_path, monkeypatch):
    """A package with a class, a function, and what it imports from elsewhere."""
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "__init__.py").write_text("import os\nfrom mypkg.nets import Net, net, loads\n")
    (tmp_path / "mypkg" / "nets.py").write_text(
        "from pickle import loads\nclass Net:\n    pass\ndef net():\n    return Net()\n"
        "class Popen:\n    @classmethod\n    def made(cls):\n        return cls()\n"
    )
    (tmp_path / "mypkgs.py").write_text("raise ZeroDivisionError")
    monkeypatch.syspath_prepend(tmp_path)
    yield "mypkg"
    for name in ("mypkg", "mypkg.nets"):
        sys.modules.pop(name, None)


def built(target, *allow):
    return build(OmegaConf.create({"model": {"_target_": target}}), "model", allow=allow)


@pytest.mark.parametrize(
    ("target", "allow"),
    [
        ("mypkg.Net", "mypkg"),
        ("mypkg.nets.Net", "mypkg"),
        ("mypkg.nets.net", "mypkg"),
        ("mypkg.nets.Net", "mypkg.nets"),
        ("mypkg.Net", "mypkg.Net"),
    ],
)
def test_a_package_that_is_allowed_by_name_may_be_named_by_a_file(mypkg, target, allow):
    assert type(built(target, "another", allow)).__name__ == "Net"


@pytest.mark.parametrize(
    ("target", "allow"),
    [
        ("mypkgs.Net", "mypkg"),  # a longer name is another package
        ("mypkg.Net", "mypkg.nets"),
        ("mypkg.Net", "mypk"),
        ("mypkg.os.system", "mypkg"),  # what a package imports is not its own
        ("mypkg.loads", "mypkg"),
        ("mypkg.nets.Popen.made", "mypkg"),  # an inherited method could be anything
        ("mypkg.Net", "Net"),
        *((target, "mypkg") for target in FOREIGN if "$" not in target),
    ],
)
def test_what_was_not_allowed_is_neither_called_nor_imported(mypkg, target, allow):
    with pytest.raises(ConfigError, match=f"^model._target_={target} is not allowed"):
        built(target, allow)
    assert "mypkgs" not in sys.modules


def test_a_refusal_says_what_to_allow(mypkg):
    with pytest.raises(ConfigError, match=r"with allow=\[mypkg\] on the command line"):
        built("mypkg.Net")
    for target in ("robustdyn.records.files.replace_file", "subprocess.run", "torch.load"):
        with pytest.raises(ConfigError) as refusal:
            built(target)
        assert "allow=" not in str(refusal.value)  # following that advice would let it run anything


def test_replicas_schedules_are_those_of_the_group():
    cfg = OmegaConf.create({"ensemble": {"schedule": {"_target_": "robustdyn.methods.Constant"}}})
    assert build(cfg, "ensemble.schedule", allow=()).factor(0) == 1


@pytest.mark.parametrize(
    ("value", "names"), [(["a", "b.c"], ("a", "b.c")), ("a", ("a",)), (None, ()), ([], ())]
)
def test_what_is_allowed_is_a_list_of_names(value, names):
    assert allowed(OmegaConf.create({"allow": value})) == names
    assert allowed(OmegaConf.create({})) == ()


@pytest.mark.parametrize("value", [["a b"], [""], ["a."], 5, [None], {"a": 1}])
def test_anything_else_is_refused(value):
    with pytest.raises(ConfigError, match=r"^allow=.* must be a list of packages or modules"):
        allowed(OmegaConf.create({"allow": value}))


@pytest.mark.parametrize("group", ["data", "model", "attack", "objective", "regularizer", "perturbation"])
def test_every_option_of_a_group_can_be_built_from_a_file(group):
    for option in options(group):
        if "_target_" in option:
            continue  # of a class that only the user can name
        cfg = compose(*f"{group}={option}".split())
        key = "attack.train" if group == "attack" else group
        assert type(build(cfg, key, allow=())) is type(build(cfg, key))


def test_adds_what_only_the_program_knows():
    module = build(
        OmegaConf.create({"m": {"_target_": "torch.nn.Linear", "in_features": 2}}), "m", out_features=3
    )
    assert isinstance(module, torch.nn.Linear)
    assert module.out_features == 3
