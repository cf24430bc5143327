"""``robustdyn-train resume=DIR`` ends as a run that was never interrupted, bit for bit."""

import json
import shlex
import shutil
import sys

import pytest
import torch

from robustdyn.methods import AdversarialTraining
from tests.commands.test_resume import OFTEN, assert_same_end, end_of
from tests.runs import command, rows, tiny_but

ARGUMENTS = [*tiny_but("schedule.", "trainer.max_epochs", "measure."), "measure=none", "report=false"]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        run_dir = tmp_path_factory.mktemp("resume=x") / "run"
        arguments = [*ARGUMENTS, "trainer.max_epochs=2", f"hydra.run.dir={run_dir}"]
        assert command(patch, *arguments) == 0
    return run_dir


def test_a_run_that_is_extended(two_epochs, tmp_path, monkeypatch, capsys):
    alone, moved = tmp_path / "alone", tmp_path / "moved, a=1"
    longer = ["trainer.max_epochs=3", "decay_epochs=[1]", f"hydra.run.dir={alone}"]
    assert command(monkeypatch, *ARGUMENTS, *longer) == 0
    shutil.copytree(two_epochs, moved)
    capsys.readouterr()
    assert command(monkeypatch, f"resume={moved}", "trainer.max_epochs=3") == 0
    said = capsys.readouterr().err
    assert "changed: trainer.max_epochs=3 (was 2)" in said
    assert "decay_epochs=[1] (in a new run [1, 2])" in said
    assert_same_end(end_of(moved), end_of(alone))
    log = [json.loads(line) for line in (moved / "log.jsonl").read_text().splitlines()]
    assert any("decay_epochs=[1] (in a new run [1, 2])" in entry["message"] for entry in log)
    overrides = (moved / ".hydra" / "overrides.yaml").read_text()
    assert "trainer.max_epochs=3" in overrides
    assert "trainer.max_epochs=2" not in overrides
    assert "resume" not in overrides
    assert command(monkeypatch, f"resume={moved}") == 0  # once more, with the new length
    assert "3 of 3 epochs were finished already" in capsys.readouterr().err


def test_a_refusal_of_other_settings_names_this_command(two_epochs, monkeypatch, capsys):
    hydra = {p.name: p.read_text() for p in (two_epochs / ".hydra").iterdir()}
    typed = [*ARGUMENTS, "trainer.max_epochs=2", "optimizer.lr=0.2", f"hydra.run.dir={two_epochs}"]
    assert command(monkeypatch, *typed) == 1
    assert capsys.readouterr().err.endswith(
        f"; to continue with its own: robustdyn-train resume={two_epochs}\n"
    )
    assert {p.name: p.read_text() for p in (two_epochs / ".hydra").iterdir()} == hydra


def test_a_refusal_of_a_run_of_another_version_names_what_that_lacks(
    two_epochs, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "older"
    shutil.copytree(two_epochs, run_dir)
    path = run_dir / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"]["optimizer"]["nesterov"]
    lines = checkpoint["hydra"]["config.yaml"].splitlines(keepends=True)
    checkpoint["hydra"]["config.yaml"] = "".join(line for line in lines if "nesterov" not in line)
    torch.save(checkpoint, path)
    typed = [*ARGUMENTS, "trainer.max_epochs=2", "optimizer.lr=0.2", f"hydra.run.dir={run_dir}"]
    assert command(monkeypatch, *typed) == 1
    said, _, printed = capsys.readouterr().err.partition("continue with its own")
    assert "optimizer.lr=0.1 (now 0.2); optimizer.nesterov=null (now False)" in said
    assert printed == (
        " and those that another version of robustdyn did not have: robustdyn-train "
        f"resume={run_dir} +optimizer.nesterov=false\n"
    )
    assert command(monkeypatch, *shlex.split(printed.partition("robustdyn-train ")[2])) == 0


@pytest.mark.slow
def test_an_interrupted_run_with_a_network_of_one_s_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mynet.py").write_text(
        "from robustdyn.models import PreActResNet\n\n\nclass Net(PreActResNet):\n    pass\n"
    )
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/net.yaml").write_text(
        "defaults: [preact_resnet18, _self_]\n"
        "_target_: mynet.Net\nwidth: 4\nblocks: [1, 1]\nstrides: [1, 2]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    mine = ["--config-dir", "conf", "model=net", *(o for o in ARGUMENTS if not o.startswith("model."))]
    mine = [*mine, "trainer.max_epochs=2", OFTEN]
    assert command(monkeypatch, *mine, "hydra.run.dir=alone") == 0
    step = AdversarialTraining.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == 4:
            raise ZeroDivisionError
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AdversarialTraining, "training_step", dies)
    with pytest.raises(ZeroDivisionError):
        command(monkeypatch, *mine, "hydra.run.dir=killed")
    monkeypatch.setattr(AdversarialTraining, "training_step", step)
    capsys.readouterr()
    assert command(monkeypatch, "resume=killed") == 1
    assert capsys.readouterr().err.startswith("error: model._target_=mynet.Net is not allowed")
    assert command(monkeypatch, "resume=killed", "allow=[mynet]") == 0
    assert_same_end(end_of(tmp_path / "killed"), end_of(tmp_path / "alone"))
    assert [row["epoch"] for row in rows(tmp_path / "killed", "epochs")] == [0, 1]
    del sys.modules["mynet"]
