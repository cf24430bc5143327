"""``robustdyn-train resume=DIR``, up to the composed configuration: what is read, changed and refused."""

import json
import os

import hydra
import pytest
import torch
from omegaconf import OmegaConf

import robustdyn.launch.sweep  # noqa: F401 - has a resolver of conf/train.yaml
from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError, UserError
from robustdyn.launch.paths import quoted_paths
from robustdyn.launch.resume import resumed
from tests.runs import compose

TYPED = ["trainer.max_epochs=8", "optimizer.lr=0.05", "method=awp"]


def write(run_dir, *typed, change=lambda config: config):
    """A run that was killed before its first checkpoint."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("train", list(typed), return_hydra_config=True)
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    raw = {k: v for k, v in OmegaConf.to_container(cfg, resolve=False).items() if k != "hydra"}
    (run_dir / ".hydra").mkdir(parents=True)
    (run_dir / ".hydra" / "config.yaml").write_text(json.dumps(change(raw)))
    (run_dir / ".hydra" / "overrides.yaml").write_text(json.dumps(list(typed)))
    (run_dir / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices}}}))
    settings = OmegaConf.to_container(compose(*[t for t in typed if "name" not in t], "name=n"), resolve=True)
    (run_dir / "status.json").write_text(json.dumps({"state": "running", "settings": settings}))
    return run_dir


def go_on(run_dir, *typed):
    """The composed configuration of the command."""
    name, arguments = resumed("train", quoted_paths([f"resume={run_dir}", *typed], ["resume"]))
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose(name, arguments, return_hydra_config=True)


def test_nothing_has_to_be_typed_again(tmp_path, capsys):
    run_dir = write(tmp_path / "run", *TYPED)
    cfg = go_on(run_dir)
    settings = json.loads((run_dir / "status.json").read_text())["settings"]
    found = OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True
    )
    assert found == settings | {"resume": "changed"}
    assert cfg.hydra.run.dir == str(run_dir)
    assert cfg.hydra.overrides.task == TYPED
    assert cfg.hydra.runtime.choices.method == "awp"
    assert capsys.readouterr().err == f"{run_dir}: continues with its own settings\n"


def test_a_longer_run_keeps_its_decays_and_says_so(tmp_path, capsys):
    run_dir = write(tmp_path / "run", *TYPED)
    cfg = go_on(run_dir, "trainer.max_epochs=20")
    assert cfg.trainer.max_epochs == 20
    assert cfg.decay_epochs == cfg.schedule.milestones == [4, 6]
    said = capsys.readouterr().err
    assert "changed: trainer.max_epochs=20 (was 8)" in said
    assert "kept, although trainer.max_epochs changed: decay_epochs=[4, 6] (in a new run [10, 15])" in said
    assert cfg.hydra.overrides.task == [*TYPED[1:], TYPED[0].replace("8", "20")]
    cfg = go_on(run_dir, "trainer.max_epochs=20", "decay_epochs=[12]")
    assert cfg.schedule.milestones == [12]
    assert "kept" not in capsys.readouterr().err


def test_a_schedule_of_the_run_s_length_keeps_it(tmp_path, capsys):
    cfg = go_on(write(tmp_path / "run", "schedule=cosine", "trainer.max_epochs=8"), "trainer.max_epochs=9")
    assert cfg.schedule.length == 8
    assert "schedule.length=8 (in a new run 9)" in capsys.readouterr().err


def test_other_settings_still_follow_from_those_that_are_typed(tmp_path):
    cfg = go_on(write(tmp_path / "run", *TYPED), "attack.eps_255=25.5", "seed=7")
    assert cfg.attack.train.eps == pytest.approx(0.1)
    assert cfg.data.seed == 7
    config = OmegaConf.to_container(cfg, resolve=False)
    assert config["data"]["seed"] == "${seed}"  # so that a report sees that it only follows


def test_a_group_may_be_chosen_again_but_no_preset(tmp_path):
    run_dir = write(tmp_path / "run", *TYPED)
    cfg = go_on(run_dir, "perturbation=sam", "logger=csv")
    assert cfg.perturbation._target_ == "robustdyn.methods.SAM"
    assert "gamma" not in cfg.perturbation
    assert "csv" in cfg.logger
    for choice in ("method=at", "scale=small", "data=cifar10", "trainer=ddp"):
        with pytest.raises(ConfigError, match=f"^{choice} would replace settings"):
            go_on(run_dir, choice)


@pytest.mark.parametrize("name", ["a=1,b=2 (3)", "it's ${x}", "~"])
def test_paths_as_people_have_them(name, tmp_path, monkeypatch):
    run_dir = write(tmp_path / name / "run", *TYPED)
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path / name))
    for typed in ("run", "./run/", "~/run"):
        assert go_on(typed).hydra.run.dir == str(run_dir)


def refused(message, *arguments):
    with pytest.raises(UserError, match=message) as refusal:
        resumed("train", quoted_paths(list(arguments), ["resume"]))
    assert "\n" not in str(refusal.value)


def test_a_folder_that_is_no_run_is_one_line_with_the_remedy(tmp_path):
    sweep = tmp_path / "sweep"
    for seed in range(4):
        write(sweep / f"seed={seed}", f"seed={seed}")
    refused("resume=.*/sweep holds 4 runs; give one of them: resume=.*/seed=", f"resume={sweep}")
    (sweep / "multirun.yaml").write_text("{}")
    refused(r"the whole sweep continues when .* with hydra.sweep.dir=.*/sweep$", f"resume={sweep}")
    refused(f"holds 4 runs; give one of them: resume={sweep}/seed=", f"resume={tmp_path}")
    refused("no such directory; did you mean .*/sweep[?]", f"resume={tmp_path}/sweeep")
    refused("lies in a run directory; give resume=.*/seed=1$", f"resume={sweep}/seed=1/.hydra")
    refused("lies in a run directory; give resume=.*/seed=1$", f"resume={sweep}/seed=1/status.json")
    (tmp_path / "empty").mkdir()
    refused("is not a run directory", f"resume={tmp_path}/empty")
    (sweep / "seed=1/status.json").unlink()
    refused("no checkpoint and no record of its settings", f"resume={sweep}/seed=1")
    refused("a sweep continues when its own command is given", "-m", f"resume={sweep}/seed=0")
    refused("leave out hydra.run.dir", f"resume={sweep}/seed=0", "hydra.run.dir=x")
    refused("allow goes with resume=DIR", "allow=[mypackage]")


@pytest.mark.parametrize("given", [(), ("resume=same",), ("resume=changed",), ("resume=null",)])
def test_other_commands_are_left_alone(given):
    arguments = [*given, "seed=1"]
    assert resumed("train", arguments) == ("train", arguments)


def test_a_checkpoint_decides_what_the_settings_were(tmp_path):
    """Hydra's files on disk may be those of a later command, which was refused or killed."""
    run_dir = write(tmp_path / "run", *TYPED)
    settings = json.loads((run_dir / "status.json").read_text())["settings"]
    files = {path.name: path.read_text() for path in (run_dir / ".hydra").iterdir()}
    kinds = {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "loops": {}, "callbacks": {}}
    kinds |= {"schedule": {}, "epoch": 1, "global_step": 5, "pytorch-lightning_version": "2"}
    (run_dir / "checkpoints").mkdir()
    settings["data"]["test_size"] = 99  # what an environment variable had determined, say
    torch.save({"config": settings, "hydra": files, **kinds}, run_dir / "checkpoints/last.ckpt")
    (run_dir / ".hydra" / "config.yaml").write_text("{}")
    (run_dir / ".hydra" / "overrides.yaml").write_text("[seed=3]")
    cfg = go_on(run_dir)
    assert cfg.data.test_size == 99
    assert cfg.hydra.overrides.task == TYPED
    assert (run_dir / ".hydra" / "config.yaml").read_text() == files["config.yaml"]


# ---------------------------------------------------------------------- runs of other versions


def remove(run_dir, *keys):
    """Take keys out of the configuration of a run and out of its settings."""
    for path in (run_dir / ".hydra" / "config.yaml", run_dir / "status.json"):
        content = json.loads(path.read_text())
        for key in keys:
            *sections, leaf = key.split(".")
            section = content.get("settings", content)
            for name in sections:
                section = section[name]
            del section[leaf]
        path.write_text(json.dumps(content))
    return run_dir


def test_what_the_settings_of_another_version_lack_is_named_with_the_remedy(tmp_path):
    run_dir = remove(write(tmp_path / "run", *TYPED), "measure.weights", "added_noise")
    lacks = "the settings of this run lack added_noise, measure.weights, because another version of robustdyn"
    remedy = (
        "train it again, or use that version, or give what is missing: .added_noise=... .measure.weights="
    )
    refused(f"^{run_dir}: {lacks} recorded it; {remedy}", f"resume={run_dir}")
    facts = {"packages": {"robustdyn": "0.0.9", "torch": "2"}, "code_revision": "f00d-dirty"}
    (run_dir / "environment.json").write_text(json.dumps(facts))
    refused(rf"recorded it \(0.0.9, revision f00d-dirty\); {remedy}", f"resume={run_dir}")
    refused("the settings of this run lack added_noise, because", f"resume={run_dir}", "measure=index")
    cfg = go_on(run_dir, "+measure.weights=averaged", "+added_noise=none")
    assert cfg.measure.weights == "averaged"


def test_what_a_run_may_lack(tmp_path):
    """What was left out by its command, measurements, and settings of another class or of another choice."""
    typed = ["~trainer.log_every_n_steps", "~measure.measurements.alignment", "ensemble=default"]
    run_dir = write(
        tmp_path / "run", *typed, change=evil("schedule", {"_target_": "robustdyn.methods.Constant"})
    )
    status = json.loads((run_dir / "status.json").read_text())
    status["settings"]["schedule"] = {"_target_": "robustdyn.methods.Constant"}
    (run_dir / "status.json").write_text(json.dumps(status))
    assert "log_every_n_steps" not in go_on(run_dir).trainer
    assert go_on(run_dir, "ensemble=none").ensemble == {}
    remove(run_dir, "measure.measurements.spectrum", "ensemble.noise_free.children")
    refused("lack ensemble.noise_free.children, because", f"resume={run_dir}")


# ---------------------------------------------------------------------- what a stranger's run may do


def evil(section, node):
    def change(config):
        config[section] = node
        return config

    return change


@pytest.mark.parametrize(
    ("section", "node", "key"),
    [
        ("model", {"_target_": "os.system", "command": "x"}, "model"),
        ("trainer", {"_target_": "lightning.Trainer", "x": [{"_target_": "os.system"}]}, r"trainer.x\[0\]"),
        ("logger", {"a": {"_target_": "torch.load"}}, "logger.a"),
        ("callbacks", {"a": {"_target_": "lightning.pytorch.callbacks.LambdaCallback"}}, "callbacks.a"),
        ("model", {"_target_": "${other}"}, "model"),
        ("other", {"_target_": "robustdyn.models.PreActResNet"}, "other"),
        ("measure", {"measurements": {"m": {"_target_": "subprocess.run"}}}, "measure.measurements.m"),
    ],
)
def test_a_target_that_is_not_allowed_is_refused_before_anything_is_built(section, node, key, tmp_path):
    run_dir = write(tmp_path / "run", *TYPED, change=evil(section, node))
    status = json.loads((run_dir / "status.json").read_text())
    status["settings"][section] = node
    (run_dir / "status.json").write_text(json.dumps(status))
    refused(rf"^{key}._target_=.* is not allowed", f"resume={run_dir}")
    refused(rf"^{key}._target_=.* is not allowed", f"resume={run_dir}", "allow=[mypackage]")


def test_settings_of_hydra_and_lookups_have_no_effect(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")

    def change(config):
        (tmp_path / "evil.yaml").write_text("x: 1")
        callbacks = {"x": {"_target_": "os.system", "command": "x"}}
        return config | {
            "hydra": {"callbacks": callbacks, "searchpath": [str(tmp_path)]},
            "defaults": ["/evil"],
            "allow": ["os"],
            "metric": "${oc.env:SECRET}",
            "extra": ["${oc.env:SECRET}", {"a": "${hydra:runtime.cwd}"}],
        }

    run_dir = write(tmp_path / "run", *TYPED, change=change)
    status = json.loads((run_dir / "status.json").read_text())
    status["settings"]["name"] = "${oc.env:SECRET}"
    (run_dir / "status.json").write_text(json.dumps(status))
    (run_dir / ".hydra" / "overrides.yaml").write_text(
        json.dumps(["hydra.mode=MULTIRUN", "x=${oc.env:SECRET}"])
    )
    cfg = go_on(run_dir)
    text = OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=True)
    text += OmegaConf.to_yaml(cfg.hydra.overrides, resolve=True)
    assert "hidden" not in text
    assert list(cfg.hydra.callbacks) == ["sweep_report"]
    assert "x" not in cfg
    assert cfg.hydra.mode is None
    assert cfg.name == "${oc.env:SECRET}"
    assert os.getcwd() not in OmegaConf.to_yaml(cfg.extra)  # noqa: PTH109


def test_a_run_with_a_class_of_the_user_s_needs_his_permission(tmp_path, monkeypatch):
    (tmp_path / "ownnet.py").write_text("class Net:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    run_dir = write(tmp_path / "run", *TYPED, change=evil("model", {"_target_": "ownnet.Net"}))
    status = json.loads((run_dir / "status.json").read_text())
    status["settings"]["model"] = {"_target_": "ownnet.Net"}
    (run_dir / "status.json").write_text(json.dumps(status))
    refused(r"with allow=\[ownnet\] on the command line", f"resume={run_dir}")
    refused("allow=.* must be a list of packages", f"resume={run_dir}", "allow=[1]")
    assert go_on(run_dir, "allow=[ownnet]").model._target_ == "ownnet.Net"


@pytest.mark.parametrize("name", ["config.yaml", "hydra.yaml", "overrides.yaml"])
def test_a_damaged_configuration_is_one_line(name, tmp_path):
    run_dir = write(tmp_path / "run", *TYPED)
    (run_dir / ".hydra" / name).write_text("a: [")
    refused(rf"{name}: cannot read .*; restore ", f"resume={run_dir}")
