import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from robustdyn.commands.replicas import main
from robustdyn.replicas import read_ensemble
from tests.runs import command, invoke, tiny_but

SHORT = ("trainer.max_epochs=1", "measure=none", "report=false", "schedule=constant", "data.batch_size=20")
TRAINED = tiny_but("measure.", "schedule.", "trainer.max_epochs")
SMALL = (
    "device=cpu",
    "replicas=4",
    "chunk=2",
    "steps=6",
    "learning_rate=0.01",
    "record.steps=[0,3,6]",
    "record.loss_steps=[6]",
    "record.loss_examples=20",
    "start.eigenvectors=3",
    "start.noise_batches=4",
    "start.tolerance=1e-1",
)


def replicate(monkeypatch, *arguments):
    """Run ``robustdyn-replicas`` in this process and return its exit status."""
    return invoke(main, monkeypatch, *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, *TRAINED, *SHORT, f"hydra.run.dir={run_dir}") == 0
    return run_dir


@pytest.fixture
def checkpoint(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"


def chunks(directory):
    """Contents of all chunks."""
    found = {}
    for path in sorted((directory / "chunks").glob("*.npz")):
        with np.load(path) as file:
            found[path.name] = {name: file[name] for name in file.files}
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        for key in one[name]:
            np.testing.assert_array_equal(one[name][key], other[name][key])


@pytest.mark.slow
def test_whole_sharded_and_grown_ensembles_are_the_same(checkpoint, tmp_path, monkeypatch, capsys):
    assert replicate(monkeypatch, checkpoint, *SMALL, "output=whole", "replicas=6") == 0
    said = capsys.readouterr().out
    assert "eigenvalues" in said
    assert "(3 of 3 chunks)" in said
    assert replicate(monkeypatch, checkpoint, *SMALL, "output=parts", "shard=1/2") == 0
    assert "1 chunks are still missing" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert replicate(monkeypatch, checkpoint, *SMALL, "output=parts") == 0
    assert replicate(monkeypatch, checkpoint, *SMALL, "output=parts", "replicas=6") == 0  # grown
    assert_same(chunks(tmp_path / "whole"), chunks(tmp_path / "parts"))
    found = read_ensemble(tmp_path / "whole")
    assert found.position.shape == (6, 3, 3)
    assert found.robust_loss.shape == (6, 1)
    assert np.isfinite(found.robust_loss).all()
    assert (found.position[:, 0] == 0).all()
    assert len(np.unique(found.position[:, 2, 0])) == 6  # all replicas differ
    np.testing.assert_allclose(found.learning_rate, 0.01)


@pytest.mark.slow
def test_a_killed_command_goes_on(checkpoint, tmp_path, monkeypatch):
    arguments = [checkpoint, *SMALL, "steps=12", "replicas=8"]
    assert replicate(monkeypatch, *arguments, "output=undisturbed") == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "robustdyn.commands.replicas", *arguments, "output=killed"],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "chunks").glob("*.npz")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "chunks").glob("*.npz")}
    assert replicate(monkeypatch, *arguments, "output=killed") == 0
    assert_same(chunks(tmp_path / "undisturbed"), chunks(tmp_path / "killed"))
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "chunks").glob("*.npz")}
    assert before.items() <= after.items()  # finished chunks were not run again


def test_what_the_run_of_another_version_lacks_is_named_if_it_is_needed(
    checkpoint, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "run" / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    del config.optimizer.nesterov, config.measure.weights
    OmegaConf.save(config, path)
    assert replicate(monkeypatch, checkpoint, *SMALL) == 1
    said = capsys.readouterr().err
    assert "the settings of this run lack optimizer.nesterov, because another version of robustdyn" in said
    assert said.endswith("or use that version, or give what is missing: +run.optimizer.nesterov=...\n")


@pytest.mark.slow  # trains replicas
def test_what_the_run_says_can_be_changed(checkpoint, tmp_path, monkeypatch):
    changes = (
        "method.perturbation=awp",
        "batchnorm=train",
        "sampling.replacement=true",
        "schedule.milestones=[4]",
    )
    more = ("+run.optimizer.weight_decay=0.01", "start.random_directions=1", "initial_state=checkpoint")
    two = ("replicas=2", "output=changed")
    assert replicate(monkeypatch, checkpoint, *SMALL, *changes, *more, *two) == 0
    settings = json.loads((tmp_path / "changed" / "settings.json").read_text())
    saved = torch.load(checkpoint.partition("=")[2], weights_only=True)
    begun = {"epoch": saved["epoch"], "step": saved["global_step"]}
    assert settings["provenance"].items() >= begun.items()
    stored = settings["ensemble"]
    assert stored["perturbation"]["gamma"] == 0.01
    assert stored["optimizer"]["weight_decay"] == 0.01
    np.testing.assert_allclose(stored["learning_rate"], [0.01] * 4 + [0.001] * 2)
    found = read_ensemble(tmp_path / "changed")
    assert found.position.shape == (2, 3, 4)
    assert (np.abs(found.buffer[:, 0]) > 0).all()  # the checkpoint's momentum
    state = saved["optimizer_states"][0]["state"]
    held = torch.cat([state[i]["momentum_buffer"].contiguous().reshape(-1) for i in range(len(state))])
    expected = held.double() @ found.start.directions.forces.double()
    np.testing.assert_allclose(found.buffer[0, 0], expected.numpy(), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["true", "false"])
def test_adam_replicas_of_an_sgd_run(checkpoint, tmp_path, monkeypatch, frozen):
    adam = ("method.optimizer=adam", "learning_rate=1e-3", f"freeze_preconditioner={frozen}", "output=adam")
    assert replicate(monkeypatch, checkpoint, *SMALL, *adam) == 0
    found = read_ensemble(tmp_path / "adam")
    assert found.start.curvature_has_decay
    assert (found.distance[:, 2] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=1"], "holds an ensemble with seed=0 (now 1)"),
        (["replicas=5"], "replicas=5 is not a multiple of chunk=2; choose 6"),
        (["shard=2/2"], "shard=2/2 must be I/N with 0 <= I < N"),
        (["engine=fast"], "engine=fast must be vmapped or looped"),
        (["method.perturbation=nothing"], "method.perturbation=nothing is not known; choose run, awp"),
        (["method.optimizer=adamw"], "replicas support SGD and Adam, not AdamW"),
        (["+run.optimizer.nesterov=true"], "replicas support SGD without Nesterov"),
        (["sampling.batch_size=81"], "sampling.batch_size must lie in [1, 80]"),
        (["start.attack_draws=0"], "start.attack_draws must be at least 1"),
        (["method.optimizer=adam", "initial_state=checkpoint"], "the optimiser holds no exp_avg"),
        (["+run.regularizer.l1=1e-6"], "not 0, which replicas do not support; set +run.regularizer.l1=0"),
        (["+run.batchnorm.frozen_from=1", "batchnorm=train"], "choose batchnorm=eval for the replicas"),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path_factory, monkeypatch, capsys, arguments, message):
    output = trained.parent / "mistakes"
    path = f"checkpoint={trained / 'checkpoints' / 'last.ckpt'}"
    monkeypatch.chdir(trained.parent)
    if not output.exists():
        assert replicate(monkeypatch, path, *SMALL, f"output={output}", "replicas=2") == 0
    capsys.readouterr()
    assert replicate(monkeypatch, path, *SMALL, f"output={output}", *arguments) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_file_outside_a_run_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "weights.ckpt"
    shutil.copy(checkpoint.partition("=")[2], elsewhere)
    assert replicate(monkeypatch, f"checkpoint={elsewhere}", *SMALL) == 1
    assert "is not in a run directory" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["model", "regularizer", "optimizer", "data", "objective", "attack.train"])
def test_a_stranger_s_run_calls_nothing_of_its_choice(checkpoint, tmp_path, monkeypatch, capsys, key):
    path = tmp_path / "run" / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    config.merge_with_dotlist(
        [f"{key}._target_=robustdyn.models.checkpoints.torch.os.system", f"{key}.command=touch called"]
    )
    OmegaConf.save(config, path)
    assert replicate(monkeypatch, checkpoint, *SMALL) == 1
    said = capsys.readouterr().err
    assert f"{key}._target_=robustdyn.models.checkpoints.torch.os.system is not allowed" in said
    assert not (tmp_path / "called").exists()


@pytest.mark.slow  # trains replicas
def test_the_loss_is_expanded_on_request(checkpoint, monkeypatch, capsys):
    asked = ("output=expanded", "expansion.multiples=[0.5,1]", "record.loss_draws=2")
    assert replicate(monkeypatch, checkpoint, *SMALL, *asked) == 0
    found = read_ensemble(Path("expanded"))
    assert found.lines is not None
    assert found.recomputed_loss.shape == (4, 1, 2)
    assert np.isfinite(found.expanded_loss).all()
    capsys.readouterr()
    assert replicate(monkeypatch, checkpoint, *SMALL, "expansion.multiples=[1,0.5]") == 1
    assert "expansion.multiples" in capsys.readouterr().err
