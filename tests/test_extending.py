"""Runs every example of docs/extending.md: its titled blocks are the files, beside which its commands run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from robustdyn.records import TABLES, read_table
from tests.runs import command, invoke
from tests.test_wheel import installed, wheel  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r'```\w+ title="(.+?)"\n(.*?)```', PAGE, re.S))
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
FAST = (
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "attack.steps=1",
    "data.train_size=64",
    "data.test_size=40",
    "report=false",
)
QUICK_MEASURE = (
    "measure.epochs=[0]",
    "measure.examples=16",
    "measure.eigenpairs.directions=2",
    "measure.measurements.alignment=null",
    "measure.measurements.weight_curvature=null",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the page, in a folder that is not on Python's path; what they change is undone."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    TABLES.pop("participation", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


def test_an_example_is_at_most_twenty_lines_of_code():
    for name, text in FILES.items():
        code = [line for line in re.sub(r'""".*?"""', "", text, flags=re.S).splitlines() if line.strip()]
        assert len(code) <= 20, name


def test_all_parts_of_ones_own_in_one_run_and_its_evaluation(folder, monkeypatch, capsys):
    own = (
        "data=stripes",
        "model=small_cnn",
        "objective=logit_penalty",
        "perturbation=sign_ascent",
        "schedule=inverse_square_root",
        "measure=participation",
        "callbacks=weight_norm",
    )
    for choice in own:
        assert any(choice in line.split() for line in COMMANDS), choice
    typed = ("--config-dir", "conf", *own, *FAST, *QUICK_MEASURE, "logger=csv", "hydra.run.dir=run")
    assert command(monkeypatch, *typed) == 0, capsys.readouterr().err
    config = (folder / "run/.hydra/config.yaml").read_text()
    for name in ("Stripes", "SmallCNN", "LogitPenalty", "SignAscent", "InverseSquareRoot", "Participation"):
        assert re.search(rf"_target_: mypackage\.\w+\.{name}\n", config)
    (row,) = read_table("run", "participation").to_dict("records")
    assert row["epoch"] == 0
    assert 1 <= row["directions"] <= 2  # of two non-negative eigenvalues
    (logged,) = (folder / "run").rglob("metrics.csv")
    saved = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    trained = [value for name, value in saved.items() if name.rpartition(".")[2] in ("weight", "bias")]
    norm = torch.cat([value.flatten() for value in trained]).norm().item()
    assert pd.read_csv(logged)["weight_norm"].dropna().tolist() == [pytest.approx(norm, rel=1e-5)]  # float32

    from robustdyn.commands import evaluate, study

    assert study.main(["mypackage.study", "run"]) == 0
    assert "directions count." in (folder / "run/study/findings.md").read_text()

    *_, line = COMMANDS
    words = shlex.split(line)[1:]
    without = [word for word in words if not word.startswith("allow=")]
    assert len(without) < len(words)
    assert invoke(evaluate.main, monkeypatch, *without) == 1
    assert "with allow=[mypackage] on the command line" in capsys.readouterr().err
    assert invoke(evaluate.main, monkeypatch, *without, "allow=[mypack]") == 1
    assert "is not allowed in a configuration that is read from a run directory" in capsys.readouterr().err
    assert invoke(evaluate.main, monkeypatch, *words) == 0, capsys.readouterr().err
    (found,) = (folder / "run/evaluation").glob("*/summary.json")
    assert json.loads(found.read_text())


def test_an_own_class_that_lacks_something_is_one_line(folder, monkeypatch, capsys):
    (folder / "mypackage" / "half.py").write_text(
        "class Half:\n    tables = ('nowhere',)\n    measure = None\n"
        "    def __init__(self, **settings):\n        pass\n"
        "from robustdyn.methods import Objective\n"
        "class Plain(Objective):\n    takes_probabilities = False\n"
        "    def attack_loss(self, model, images):\n        return None\n"
        "    def __call__(self, model, images, adversarial, targets):\n"
        "        return model(adversarial).sum()\n"
    )
    typed = ("--config-dir", "conf", "data=stripes", *FAST)
    mine = "+measure.measurements.half._target_=mypackage.half.Half"
    for more, said in (
        (
            ["objective._target_=mypackage.half.Half", "~objective.label_smoothing"],
            "has no takes_probabilities",
        ),
        ([mine], "measure.measurements.half writes the table nowhere, which is not declared"),
        (
            ["+callbacks.mine._target_=mypackage.half.Half"],
            "callbacks.mine makes a Half, which is no lightning",
        ),
        (
            ["+callbacks.mine._target_=lightning.pytorch.callbacks.LearningRateMonitor", "measure=none"],
            "has no logger",
        ),
        (["+trainer.callbacks=[]"], "trainer.callbacks is set by robustdyn itself; name each callback"),
        (["model._target_=mypackage.model.SmallCnn"], "did you mean mypackage.model.SmallCNN?"),
        (["model._target_=mypackage.half.Half"], "makes a Half, which is no torch.nn.Module"),
        (
            ["objective._target_=mypackage.half.Plain", "~objective.label_smoothing", *QUICK_MEASURE],
            "objective: Plain returns a Tensor; return robustdyn",
        ),
        (["schedule=inverse_square_root", "schedule.constant_epochs=0"], "schedule.constant_epochs must be"),
        (
            ["data.num_classes=3"],
            "data.num_classes=3 does not fit Stripes, which has 1x8x8 images of 2 classes",
        ),
    ):
        assert command(monkeypatch, *typed, *more) == 1
        message = capsys.readouterr().err
        assert said in message
        assert message.count("\n") == 1


@pytest.mark.slow  # a process for each command
@pytest.mark.timeout(1800)
def test_every_command_runs_from_an_installed_wheel(installed, folder):  # noqa: F811
    path = f"{installed / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    environment.pop("PYTHONPATH", None)
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "robustdyn-train":
            words += [word for word in FAST if "_size" not in word or "npz" not in line]
            words += QUICK_MEASURE if "measure=" in line else ["measure=none"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr)


def test_a_worker_of_a_launcher_finds_the_user_s_own_folder_of_settings(folder, monkeypatch):
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from robustdyn.commands import evaluate
    from robustdyn.launch import of_run

    seen = []

    def as_in_a_worker(cfg):
        GlobalHydra.instance().clear()
        seen.append(of_run._compose("evaluate", ["model=small_cnn"]).model._target_)

    monkeypatch.setattr(evaluate, "evaluate_checkpoint", as_in_a_worker)
    assert invoke(evaluate.main, monkeypatch, "--config-dir", "conf", "checkpoint=x") == 0
    assert invoke(evaluate.main, monkeypatch, f"hydra.searchpath=[file://{folder}/conf]") == 0
    assert seen == ["mypackage.model.SmallCNN"] * 2
    HydraConfig.instance().cfg = None
