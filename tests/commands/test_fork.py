"""``robustdyn-fork``: an unchanged branch ends as its run, bit for bit; what is changed has its effect."""

import json
import shutil

import pytest
import torch

from tests.commands.test_resume import assert_same_end, end_of
from tests.runs import command, invoke, rows, tiny_but

EVERYTHING = (
    *tiny_but("schedule.", "measure.epochs"),
    "method=awp_wci_lr",
    "schedule.start_epoch=1",
    "schedule.threshold=1e-6",
    "averaging=ema",
    "measure.epochs=[0]",
)
PLAIN = (*tiny_but("measure.", "schedule."), "measure=none", "decay_epochs=[2]")
KEEP = ("report=false", "checkpoint.keep_epochs=[0]")


def fork(monkeypatch, checkpoint, *arguments):
    """Run ``robustdyn-fork`` in this process and return its exit status."""
    from robustdyn.commands.fork import main

    return invoke(main, monkeypatch, f"checkpoint={checkpoint}", *arguments)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A run of three epochs with a decay before the last, and the checkpoint of its first epoch."""
    with pytest.MonkeyPatch.context() as patch:
        run_dir = tmp_path_factory.mktemp("trunk, a=1") / "seed=0"
        assert command(patch, *PLAIN, *KEEP, f"hydra.run.dir={run_dir}") == 0
    return run_dir


@pytest.fixture
def checkpoint(trunk):
    return trunk / "checkpoints" / "epoch=000.ckpt"


def test_an_unchanged_branch_ends_as_the_run_bit_for_bit(tmp_path, monkeypatch, capsys):
    """With everything that has a state: BatchNorm, AWP, a rate that follows the WCI, averaged weights."""
    run, branch = tmp_path / "run", tmp_path / "branch"
    assert command(monkeypatch, *EVERYTHING, *KEEP, f"hydra.run.dir={run}") == 0
    kept = run / "checkpoints" / "epoch=000.ckpt"
    assert [path.name for path in run.glob("checkpoints/epoch=*")] == [kept.name]
    before = kept.read_bytes()
    capsys.readouterr()
    assert fork(monkeypatch, kept, f"hydra.run.dir={branch}") == 0
    assert "after epoch 0; changed: nothing" in capsys.readouterr().err
    assert_same_end(end_of(branch), end_of(run))
    found, wanted = (end_of(path)[0] for path in (branch, run))
    assert len(found["current_model_state"]) > 0
    for name, value in wanted["current_model_state"].items():
        assert torch.equal(found["current_model_state"][name], value), name
    assert any(name.endswith("running_var") for name in wanted["current_model_state"])
    assert found["schedule"] == wanted["schedule"] != {"damping": 1.0}
    assert found["lr_schedulers"] == wanted["lr_schedulers"]
    assert [row["epoch"] for row in rows(branch, "epochs")] == [0, 1, 2]
    assert kept.read_bytes() == before
    assert json.loads((branch / "fork.json").read_text())["changed"] == {}


def test_what_is_changed_is_changed_from_there_on(trunk, checkpoint, tmp_path, monkeypatch, capsys):
    branch = tmp_path / "branch"
    typed = ["optimizer.lr=0.05", "optimizer.weight_decay=0.1", "perturbation=awp", "data.batch_size=20"]
    assert fork(monkeypatch, checkpoint, *typed, f"hydra.run.dir={branch}") == 0
    assert "optimizer.lr=0.05 (was 0.1)" in capsys.readouterr().err
    run_rows, own_rows = rows(trunk, "epochs"), rows(branch, "epochs")
    assert own_rows[0] == run_rows[0]
    assert own_rows[1] != run_rows[1]
    # three steps of 32, then four of 20 in each epoch; the decay is still that at the third epoch
    assert [row["step"] for row in own_rows] == [3, 7, 11]
    assert [row["lr"] for row in own_rows] == pytest.approx([0.1, 0.05, 0.005])
    state = torch.load(branch / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.1
    origin = json.loads((branch / "fork.json").read_text())
    assert origin["checkpoint"] == str(checkpoint)
    assert (origin["epoch"], origin["step"]) == (0, 3)
    assert origin["changed"]["optimizer.weight_decay"] == [5e-4, 0.1]
    assert origin["changed"]["perturbation._target_"] == [None, "robustdyn.methods.AWP"]
    assert {name.partition(".")[0] for name in origin["changed"]} == {"optimizer", "perturbation", "data"}


@pytest.mark.slow  # three runs
def test_a_branch_of_a_run_with_an_average_can_go_on_without(tmp_path, monkeypatch):
    """It continues with the weights that were trained."""
    for name, averaging in (("plain", "none"), ("averaged", "ema")):
        more = (f"averaging={averaging}", f"hydra.run.dir={tmp_path / name}", "trainer.max_epochs=2")
        assert command(monkeypatch, *PLAIN, *KEEP, *more, "schedule=constant") == 0
    kept = tmp_path / "averaged" / "checkpoints" / "epoch=000.ckpt"
    assert fork(monkeypatch, kept, "averaging=none", f"hydra.run.dir={tmp_path / 'branch'}") == 0
    found, wanted = (end_of(tmp_path / name) for name in ("branch", "plain"))
    assert_same_end((found[0], {}), (wanted[0], {}))
    assert rows(tmp_path / "branch", "epochs")[1] == rows(tmp_path / "plain", "epochs")[1]


def test_a_killed_branch_goes_on_without_its_run(trunk, checkpoint, tmp_path, monkeypatch):
    from robustdyn.methods import AdversarialTraining

    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert fork(monkeypatch, checkpoint, "branch=no_decay", f"hydra.run.dir={alone}") == 0
    step = AdversarialTraining.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == 7:
            raise ZeroDivisionError
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AdversarialTraining, "training_step", dies)
    with pytest.raises(ZeroDivisionError):
        fork(monkeypatch, checkpoint, "branch=no_decay", f"hydra.run.dir={killed}")
    monkeypatch.setattr(AdversarialTraining, "training_step", step)
    assert command(monkeypatch, f"resume={killed}") == 0
    assert_same_end(end_of(killed), end_of(alone))
    assert [row["lr"] for row in rows(killed, "rates")] == [0.1]


def test_several_checkpoints_and_branches_are_one_sweep(trunk, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs, a=1"
    for seed in (0, 1):
        shutil.copytree(trunk, runs / f"seed={seed}")
    sweep = tmp_path / "sweep"
    given = [f"hydra.sweep.dir={sweep}", "branch=unchanged,awp", "report=false"]
    assert fork(monkeypatch, runs / "*" / "checkpoints" / "epoch=000.ckpt", "-m", *given) == 0
    names = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert names == [
        f"branch={branch},trunk=seed_{seed}_epoch_000" for branch in ("awp", "unchanged") for seed in (0, 1)
    ]
    for name in names:
        found = json.loads((sweep / name / "fork.json").read_text())
        assert f"/seed={name[-11]}/" in found["checkpoint"]
        assert bool(found["changed"]) == ("awp" in name)
    capsys.readouterr()
    assert fork(monkeypatch, runs / "*" / "checkpoints" / "epoch=000.ckpt", "-m", *given) == 0  # nothing left
    assert "epoch 2/3" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["trainer.max_epochs=1"], "nothing is left to train; give an earlier checkpoint"),
        (["optimizer=adam"], "optimizer._target_=torch.optim.Adam cannot take over the optimiser's state"),
        (["regularizer.weight_decay_on=weights"], "regularizer.weight_decay_on=weights cannot take over"),
        (["model.width=8"], "the checkpoint has no model.conv1.weight of shape"),
        (["data=cifar10"], "data=cifar10 would replace settings"),
        (["resume=x"], "robustdyn-fork begins new runs"),
        (["branch=sharp"], "branch"),
        (["checkpoint.keep_epochs=[7]"], "checkpoint.keep_epochs: epoch 7 is outside the run's epochs 0..2"),
        (["optimizer.rate=1"], "unknown config key optimizer.rate"),
    ],
)
def test_what_cannot_be_carried_across_is_one_line(checkpoint, tmp_path, monkeypatch, capsys, typed, message):
    assert fork(monkeypatch, checkpoint, *typed, f"hydra.run.dir={tmp_path / 'branch'}") == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_checkpoints_that_no_branch_can_start_from(trunk, checkpoint, tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        from robustdyn.commands.fork import main

        assert invoke(main, monkeypatch, *arguments) == 1
        *_, line = capsys.readouterr().err.strip().splitlines()
        return line

    alone = tmp_path / "alone.ckpt"
    shutil.copy(checkpoint, alone)
    assert refused() == "error: checkpoint is not given; give checkpoint=RUN/checkpoints/epoch=024.ckpt"
    assert "is not in a run directory; give a run's checkpoint" in refused(f"checkpoint={alone}")
    assert "nothing is left to train" in refused(
        f"checkpoint={trunk / 'checkpoints' / 'last.ckpt'}", f"hydra.run.dir={tmp_path / 'branch'}"
    )
    assert "did you mean epoch=000.ckpt" in refused(f"checkpoint={trunk / 'checkpoints' / 'epoch=001.ckpt'}")
    line = refused("-m", f"checkpoint={tmp_path}/alone=*.ckpt")
    assert line.endswith("alone=*.ckpt: matches no file; there are alone.ckpt")
    assert "quote a pattern instead" in refused("-m", f"checkpoint=glob({checkpoint.name})")
    state = torch.load(checkpoint, weights_only=True)
    state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 0
    within = checkpoint.with_name("within.ckpt")
    torch.save(state, within)
    line = refused(f"checkpoint={within}")
    assert "was saved within epoch 0, but branches start at the end of one" in line
    within.unlink()


def test_a_run_of_somebody_else_names_no_class_of_its_own(trunk, tmp_path, monkeypatch, capsys):
    strange = tmp_path / "strange"
    shutil.copytree(trunk, strange)
    path = strange / "checkpoints" / "epoch=000.ckpt"
    state = torch.load(path, weights_only=True)
    state["config"]["objective"] = {"_target_": "os.system", "command": "true"}
    torch.save(state, path)
    assert fork(monkeypatch, path) == 1
    assert "objective._target_=os.system is not allowed" in capsys.readouterr().err
