import importlib.util
import json
import os
import shutil
import sys

import pytest
import torch
from omegaconf import OmegaConf

import robustdyn.evaluation
from robustdyn.commands.evaluate import main
from robustdyn.defaults import config_dir
from robustdyn.evaluation import autoattack
from tests.data.official import write_cifar10
from tests.runs import command, invoke, rows, tiny_but

SHORT = ("trainer.max_epochs=2", "measure=none", "report=false", "schedule=constant")
TRAINED = tiny_but("measure.", "schedule.", "trainer.max_epochs")
QUICK = ("evaluation=quick", "evaluation.attacks.pgd20.steps=2", "device=cpu")


def evaluate(monkeypatch, *arguments):
    return invoke(main, monkeypatch, *arguments)


def accuracies(directory):
    return json.loads((directory / "summary.json").read_text())["accuracy"]


def row(directory, evaluator):
    (found,) = (r for r in rows(directory, "evaluation") if r["evaluator"] == evaluator)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on digits with a radius that is not the default."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = (*TRAINED, *SHORT, "attack.eps_255=20", f"hydra.run.dir={run_dir}")
        assert command(monkeypatch, *arguments) == 0
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path, monkeypatch):
    """A copy of the run in which nothing was evaluated; the working directory is beside it."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(tmp_path)
    return copy


@pytest.fixture
def checkpoint(run_dir):
    return run_dir / "checkpoints" / "last.ckpt"


def test_a_run_s_own_checkpoint_needs_no_more_than_its_path(run_dir, checkpoint, monkeypatch, capsys):
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 0
    found = run_dir / "evaluation" / "last"
    trained = rows(run_dir, "epochs")[-1]
    assert row(found, "clean")["examples"] == 60
    assert accuracies(found)["clean"] == pytest.approx(1 - trained["test_clean_error"], abs=1e-6)  # float32
    assert row(found, "pgd20")["eps"] == pytest.approx(20 / 255)
    assert row(found, "pgd20")["step_size"] == pytest.approx(5 / 255)
    said = capsys.readouterr().out
    assert f"{checkpoint} (robustdyn)" in said
    assert "all 60 of the test split of Digits" in said
    assert "linf, radius 20/255" in said
    assert f"record: {found}" in said
    assert sorted(path.name for path in run_dir.parent.iterdir()) == ["run"]  # no other files were written
    settings = json.loads((found / "settings.json").read_text())
    assert settings["provenance"]["torch"] == torch.__version__


def test_the_same_command_again_only_reports(run_dir, checkpoint, monkeypatch, capsys):
    said = []
    for _ in range(2):
        assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_what_is_typed_wins(run_dir, checkpoint, monkeypatch, tmp_path):
    typed = ("attack.eps_255=10", "evaluation.examples=25", "data.test_size=50", "seed=3")
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK, *typed, "output=there") == 0
    settings = json.loads((tmp_path / "there" / "settings.json").read_text())["evaluation"]
    assert settings["attack.eps_255"] == 10
    assert settings["evaluation.examples"] == 25
    assert settings["seed"] == 3
    assert settings["model"]["width"] == 4
    labels = [r["label"] for r in rows(tmp_path / "there", "outcomes") if r["evaluator"] == "clean"]
    from tests.data.official import digits  # the same data set, read without robustdyn

    by_hand = digits(train_size=80, test_size=50)
    assert labels == by_hand.split("test").labels[:25].tolist()


def test_a_group_that_is_typed_fits_the_run_s_others(run_dir, checkpoint, monkeypatch):
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK, "attack=l2") == 0
    found = row(run_dir / "evaluation" / "last", "pgd20")
    assert (found["norm"], found["eps"]) == ("l2", 1.0)  # that of digits in l2


def test_a_foreign_file_gives_the_same_outcomes(run_dir, checkpoint, monkeypatch, tmp_path):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    foreign = tmp_path / "elsewhere" / "weights.pth"
    foreign.parent.mkdir()
    torch.save(weights, foreign)
    said = ("data=digits", "data.train_size=80", "data.test_size=60", "attack.eps_255=20")
    network = ("model=preact_resnet18", "model.width=4", "model.blocks=[1,1]", "model.strides=[1,2]")
    assert evaluate(monkeypatch, f"checkpoint={foreign}", *QUICK, *said, *network) == 0
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 0
    here, there = run_dir / "evaluation" / "last", tmp_path / "elsewhere" / "evaluation" / "weights"
    for table in ("outcomes", "evaluation", "warnings"):
        assert rows(here, table) == rows(there, table)


def test_keys_of_the_run_s_data_set_can_be_typed(tmp_path, monkeypatch, capsys):
    """``data.root`` is not a key of the default data set, but the run's data may have moved since."""
    write_cifar10(tmp_path / "data", "binary")
    small = [o for o in TRAINED if not o.startswith("data")]
    data = ("data=cifar10", f"data.root={tmp_path / 'data'}", "data.partial=true", "data.batch_size=10")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *small, *SHORT, *data, "trainer.max_epochs=1", "hydra.run.dir=run") == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    arguments = ("checkpoint=run/checkpoints/last.ckpt", *QUICK, f"data.root={tmp_path / 'moved'}")
    assert evaluate(monkeypatch, *arguments) == 0
    assert row(tmp_path / "run" / "evaluation" / "last", "pgd20")["examples"] == 9
    assert row(tmp_path / "run" / "evaluation" / "last", "pgd20")["eps"] == pytest.approx(8 / 255)
    capsys.readouterr()
    assert evaluate(monkeypatch, *arguments, "data.rot=x") == 1
    assert "unknown config key data.rot; did you mean data.root" in capsys.readouterr().err


def test_a_run_of_an_older_version_gets_what_it_lacks(run_dir, checkpoint, monkeypatch):
    path = run_dir / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    del config.data.split_seed
    OmegaConf.save(config, path)
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 0


@pytest.mark.parametrize(
    "section",
    [
        {"model": {"_target_": "torch.utils.collect_env.run", "command": "touch called"}},
        {"model": {"_target_": "torch.os.system", "command": "touch called"}},
        {"model": {"_target_": "torch.load", "f": "last.ckpt", "weights_only": False}},
        {
            "data": {
                "_target_": "robustdyn.models.checkpoints.torch.utils.collect_env.run",
                "command": "touch called",
            }
        },
    ],
)
def test_a_stranger_s_run_calls_nothing_of_its_choice(run_dir, checkpoint, monkeypatch, capsys, section):
    path = run_dir / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    OmegaConf.save(OmegaConf.merge(config, section), path)
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 1
    assert "is not allowed in a configuration that is read from a run directory" in capsys.readouterr().err
    assert not (run_dir.parent / "called").exists()


def test_a_stranger_s_choice_composes_no_file_of_its_own(run_dir, checkpoint, monkeypatch):
    """Hydra takes an option such as ``../../x`` for a path."""
    (run_dir / "evil.yaml").write_text("# @package _global_\noutput: elsewhere\n")
    path = run_dir / ".hydra" / "hydra.yaml"
    hydra = OmegaConf.load(path)
    hydra.hydra.runtime.choices.model = os.path.relpath(run_dir / "evil", config_dir() / "model")
    OmegaConf.save(hydra, path)
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 0
    assert not (run_dir.parent / "elsewhere").exists()
    assert (run_dir / "evaluation" / "last").is_dir()


@pytest.mark.parametrize("content", [b"\x00\xff\x80", b"[" * 3000 + b"]" * 3000, b"- 1\n", b"data: 5\n"])
def test_a_configuration_that_is_none_is_one_line(run_dir, checkpoint, monkeypatch, capsys, content):
    (run_dir / ".hydra" / "config.yaml").write_bytes(content)
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    "content",
    [
        {"evaluation": 5},
        [],
        {"evaluation": {}, "evaluators": 3},
        {"evaluation": {}, "evaluators": {"pgd20": {"attacks": []}}},
    ],
)
def test_a_record_s_settings_that_are_none_are_one_line(run_dir, checkpoint, monkeypatch, capsys, content):
    folder = run_dir / "evaluation" / "last"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(content))
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {folder / 'settings.json'}: not the settings of an evaluation")
    assert "output=DIR" in line


def test_a_sweep_over_checkpoints(run_dir, monkeypatch):
    files = ",".join(str(run_dir / "checkpoints" / f"{name}.ckpt") for name in ("last", "best_on_test"))
    assert evaluate(monkeypatch, "-m", f"checkpoint={files}", *QUICK, "hydra.sweep.dir=sweep") == 0
    assert {path.name for path in (run_dir / "evaluation").iterdir()} == {"last", "best_on_test"}


def test_attacks_can_be_added_and_changed(run_dir, checkpoint, monkeypatch):
    arguments = (
        "evaluation=autoattack",
        "evaluation.attacks.autoattack.attack_list=[apgd-ce]",
        "+evaluation/attack@evaluation.attacks.mine=pgd10",
        "evaluation.attacks.mine.loss=margin",
        "evaluation.examples=20",
        "device=cpu",
    )
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *arguments) == 0
    names = {r["evaluator"]: r for r in rows(run_dir / "evaluation" / "last", "evaluation")}
    assert list(names) == ["clean", "autoattack/apgd-ce", "autoattack", "mine", "worst_case"]
    assert (names["mine"]["steps"], names["mine"]["loss"]) == (10, "margin")


def test_without_the_extra_autoattack_is_refused_before_any_work(checkpoint, monkeypatch, capsys):
    """The module is loaded once more, as it is where its package is not installed."""
    monkeypatch.setitem(sys.modules, "pyautoattack", None)  # importing it raises ModuleNotFoundError
    spec = importlib.util.spec_from_file_location("without_the_extra", autoattack.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(robustdyn.evaluation, "AutoAttackEvaluator", module.AutoAttackEvaluator)
    said = [f"checkpoint={checkpoint}", "device=cpu"]
    assert evaluate(monkeypatch, *said) == 1
    found = capsys.readouterr()
    assert found.err.startswith("error: evaluation.attacks.autoattack: AutoAttack needs the package")
    assert found.err.count("\n") == 1
    assert "pip install 'robustdyn[autoattack]'" in found.err
    assert "evaluation=pgd" in found.err
    assert found.out == ""


def test_warnings_are_said(run_dir, checkpoint, monkeypatch, capsys):
    """The weights are so large that the softmax saturates."""
    content = torch.load(checkpoint, weights_only=True)
    for name in ("model.linear.weight", "model.linear.bias"):
        content["state_dict"][name] *= 1e4
    torch.save(content, checkpoint)
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 0
    said = capsys.readouterr().out
    assert "warning: clean: at " in said
    assert "[zero_gradient]" in said
    assert "robustness may be overstated: look into this warning before quoting" in said
    summary = json.loads((run_dir / "evaluation" / "last" / "summary.json").read_text())
    assert [w["check"] for w in summary["warnings"]] == ["zero_gradient"]


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def test_another_radius_does_not_go_on_in_the_same_record(run_dir, checkpoint, monkeypatch, capsys):
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 0
    capsys.readouterr()
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK, "attack.eps_255=8") == 1
    error = one_line(capsys)
    assert "holds an evaluation with attack.eps_255=20 (now 8); choose another output=DIR" in error
    torch.save(torch.load(checkpoint, weights_only=True) | {"epoch": 9}, checkpoint)
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 1
    assert "holds an evaluation with checkpoint=" in one_line(capsys)


MISTAKES = [
    ("model.width=8", "model.width=8 does not fit"),
    ("attack.steps=50", "attack.steps belongs to training"),
    ("attack.eps_255=0", "attack.eps_255=0 must be a positive number; evaluation=clean attacks nothing"),
    ("attack.eps_25=8", "unknown config key attack.eps_25; did you mean attack.eps_255"),
    ("evaluation=quik", "Available options in 'evaluation'"),
    ("evaluation.attacks.pgd20.steps=0", "evaluation.attacks.pgd20.steps must be a whole number"),
    ("evaluation.attacks.pgd20.stepz=1", "unknown config key evaluation.attacks.pgd20.stepz; did you mean"),
    ("evaluation.examples=61", "evaluation.examples=61 exceeds the 60 images of the test split"),
    ("evaluation.split=tests", "evaluation.split=tests must be test, validation or train"),
    ("evaluation.split=validation", "data.validation_size=0: there is no validation split"),
    ("device=abacus", "device=abacus is not available; choose auto or cpu"),
    ("layout=awp", "layout=awp does not fit"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_mistake_is_one_clear_line(override, message, run_dir, checkpoint, monkeypatch, capsys):
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK, override) == 1
    assert message in one_line(capsys)
    assert not (run_dir / "evaluation").exists()


def test_a_checkpoint_that_is_none_is_named(run_dir, checkpoint, monkeypatch, capsys, tmp_path):
    assert evaluate(monkeypatch, *QUICK) == 1
    assert "checkpoint is not given" in one_line(capsys)
    assert evaluate(monkeypatch, f"checkpoint={checkpoint.with_name('lst.ckpt')}", *QUICK) == 1
    assert "lst.ckpt: no such file; did you mean last.ckpt?" in one_line(capsys)
    assert evaluate(monkeypatch, f"checkpoint={run_dir}", *QUICK) == 1
    assert (
        f"is a directory; give a file, such as {run_dir / 'checkpoints' / 'best_on_test.ckpt'}"
        in one_line(capsys)
    )
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 1
    assert "last.ckpt: not a complete file" in one_line(capsys)
    alone = shutil.copy(run_dir / "checkpoints" / "best_on_test.ckpt", tmp_path / "alone.ckpt")
    assert evaluate(monkeypatch, f"checkpoint={alone}", *QUICK) == 1
    assert "alone.ckpt is not in a run directory" in one_line(capsys)
    assert evaluate(monkeypatch, f"checkpoint={alone}", *QUICK, "data=digits", "model.width=5") == 1
    assert "choose model.width=4 model.blocks=[1,1]" in one_line(capsys)


def test_a_run_directory_without_its_configuration_is_named(run_dir, checkpoint, monkeypatch, capsys):
    (run_dir / ".hydra" / "config.yaml").write_text("a: [")
    assert evaluate(monkeypatch, f"checkpoint={checkpoint}", *QUICK) == 1
    assert "config.yaml: cannot read" in one_line(capsys)
