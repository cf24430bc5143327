import re
import shlex
import shutil
import sys
from pathlib import Path

import hydra
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from robustdyn.commands.measure import main
from robustdyn.commands.report import main as report
from robustdyn.defaults import config_dir
from robustdyn.launch.of_run import deferred
from robustdyn.launch.paths import quoted_paths
from robustdyn.records import RunRecords, read_table
from tests.runs import TINY, command, invoke, rows

PAGE = (Path(__file__).parents[2] / "docs" / "measuring_checkpoints.md").read_text()
OWN_NETWORK = """
from robustdyn.models import PreActResNet

def Classifier(width):
    sizes = dict(num_classes=10, in_channels=1, width=width, blocks=(1, 1), strides=(1, 2))
    return PreActResNet(**sizes, mean=(0.0,), std=(1.0,))
"""
MEASURED = ("wci", "layers", "spectrum", "alignment", "bounds")


def measure(monkeypatch, *arguments):
    """Run ``robustdyn-measure`` in this process and return its exit status."""
    return invoke(main, monkeypatch, "device=cpu", *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on digits that kept the checkpoints of two epochs."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = (
            *TINY,
            "measure.eigenpairs.warm_start=false",
            "attack.eps_255=20",
            "checkpoint.keep_epochs=[0,2]",
            "report=false",
            "seed=3",
        )
        assert command(monkeypatch, *arguments, f"hydra.run.dir={run_dir}") == 0
    for path in (run_dir / "checkpoints").glob("*t.ckpt"):
        path.unlink()
    return run_dir


@pytest.fixture
def run_dir(trained, tmp_path, monkeypatch):
    """A copy of the run of which nothing was measured; the working directory is beside it."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    monkeypatch.chdir(tmp_path)
    return copy


def assert_same(found, expected, tables):
    """Equal up to rounding, with the same starting vectors; the time is another one."""
    for table in tables:
        here, there = (
            read_table(path, table).drop(columns="seconds", errors="ignore") for path in (found, expected)
        )
        assert len(there)
        pd.testing.assert_frame_equal(here, there, rtol=1e-4)


def test_the_checkpoints_of_a_run_give_its_own_records(run_dir, monkeypatch, capsys):
    assert measure(monkeypatch, "checkpoint=run") == 0
    found = run_dir / "measured" / "checkpoints"
    assert_same(found, run_dir, (*MEASURED, "posterior", "epochs", "rates"))
    assert (found / "report" / "index.html").is_file()
    said = capsys.readouterr().out
    assert "checkpoints 2 (epoch 0 to 2)" in said
    assert "24 of the 80 training images of Digits" in said
    assert sorted(path.name for path in run_dir.parent.iterdir()) == ["run"]  # no other files were written


@pytest.mark.slow
def test_a_killed_measurement_goes_on(run_dir, monkeypatch, capsys):
    warm = ("measure.eigenpairs.warm_start=true", "report=false")
    assert measure(monkeypatch, "checkpoint=run", *warm, "output=whole") == 0
    extend, calls = RunRecords.extend, []

    def kill(self, table, rows):
        calls.append(table)
        if calls.count("layers") == 2:
            raise KeyboardInterrupt
        extend(self, table, rows)

    with monkeypatch.context() as patch:
        patch.setattr(RunRecords, "extend", kill)
        assert measure(monkeypatch, "checkpoint=run", *warm, "output=killed") == 130
    assert {row["epoch"] for row in rows(Path("killed"), "spectrum")} == {0, 2}
    assert {row["epoch"] for row in rows(Path("killed"), "costs")} == {0}
    capsys.readouterr()
    assert measure(monkeypatch, "checkpoint=run", *warm, "output=killed") == 0
    said = capsys.readouterr().out
    assert "checkpoints 2 (epoch 0 to 2), 1 of them measured already" in said
    assert "epoch 0:" not in said
    for table in (*MEASURED, "costs", "posterior"):
        assert rows(Path("killed"), table) == rows(Path("whole"), table)


def foreign(run_dir, folder):
    """The run's weights as another code saves them, with its optimiser's state in other files."""
    folder.mkdir()
    for epoch, rate in ((0, 0.1), (2, 0.01)):
        state = torch.load(run_dir / "checkpoints" / f"epoch={epoch:03d}.ckpt", weights_only=True)[
            "state_dict"
        ]
        network = {
            f"module.{k.removeprefix('model.')}": v for k, v in state.items() if k.startswith("model.")
        }
        torch.save(network, folder / f"model_{epoch}.pth")
        parameters = [torch.nn.Parameter(torch.ones(2))]
        optimiser = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=5e-4)
        torch.save(optimiser.state_dict(), folder / f"opt_{epoch}.pth")
    return folder


TYPED = tuple(
    o for o in TINY if o.startswith(("data", "model.", "attack.", "measure.ei", "measure.m", "measure.exa"))
)
OF_RUN = ("attack.eps_255=20", "measure.eigenpairs.warm_start=false", "seed=3", "report=false")


@pytest.mark.slow  # measures three times
def test_files_of_another_code_give_the_same(run_dir, tmp_path, monkeypatch, capsys):
    folder = foreign(run_dir, tmp_path / "theirs")
    assert measure(monkeypatch, "checkpoint=theirs", *TYPED, *OF_RUN) == 0
    found = folder / "measured" / "theirs"
    assert_same(found, run_dir, MEASURED)
    assert not (found / "records" / "posterior.jsonl").exists()
    assert "the rates between the checkpoints are not known" in capsys.readouterr().out
    rates = "learning_rate={0: 0.1, 2: 0.01}"
    assert measure(monkeypatch, "checkpoint=theirs", *TYPED, *OF_RUN, rates, "output=typed") == 0
    assert_same(Path("typed"), run_dir, (*MEASURED, "posterior"))
    assert report(["theirs/measured/theirs"]) == 0
    capsys.readouterr()
    assert report(["typed", "theirs/measured/theirs", "run"]) == 0


def test_the_page_s_network_in_a_file_beside(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # leaves nothing behind for other tests
    folder = foreign(run_dir, tmp_path / "theirs")
    (wrapper,) = re.findall(r'```python title="net.py"\n(.*?)```', PAGE, re.S)
    for theirs, here in (
        ("0.4914, 0.4822, 0.4465", "0.3053"),
        ("0.2471, 0.2435, 0.2616", "0.3759"),
        ("3, 1, 1", "1, 1, 1"),
    ):
        assert theirs in wrapper
        wrapper = wrapper.replace(theirs, here)
    Path("net.py").write_text(wrapper)
    Path("mypackage.py").write_text(OWN_NETWORK)
    own = ("model._target_=net.Net", "model.width=4")
    typed = [o for o in TYPED if not o.startswith("model.")]
    assert measure(monkeypatch, "checkpoint=theirs/model_2.pth", *typed, *OF_RUN, *own) == 0
    for name in ("net", "mypackage"):
        del sys.modules[name]
    (row,) = rows(folder / "measured" / "model_2", "wci")
    (own_row,) = (r for r in rows(run_dir, "wci") if r["epoch"] == 2)
    assert row["wci"] == pytest.approx(own_row["wci"], rel=1e-4)


@pytest.mark.parametrize("line", re.findall(r"^robustdyn-measure (?:.*\\\n)*.*", PAGE, re.M))
def test_the_page_s_commands_compose(line):
    words = shlex.split(line.partition(" #")[0].replace("\\\n", " "))[1:]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("measure", deferred(quoted_paths(words), ("model",)))
    assert cfg.checkpoint


def refused(monkeypatch, capsys, *arguments):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert measure(monkeypatch, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_what_was_measured_stays_what_it_is(run_dir, tmp_path, monkeypatch, capsys):
    """Rows of other settings, or of another network, never get into the same record."""
    foreign(run_dir, tmp_path / "theirs")
    index = (*TYPED, *OF_RUN, "measure=index", "output=there")
    typed = [o for o in index if not o.startswith(("measure.ei", "measure.measurements.al"))]
    assert measure(monkeypatch, "checkpoint=theirs", *typed, "measure.epochs=2") == 0
    assert [row["epoch"] for row in rows(Path("there"), "wci")] == [2]
    said = refused(monkeypatch, capsys, "checkpoint=theirs", *typed, "measure.examples=30")
    assert "there: holds measurements with measure.examples=24 (now 30); choose another output=DIR" in said
    assert measure(monkeypatch, "checkpoint=theirs/model_0.pth", *typed) == 0  # one more epoch
    assert [row["epoch"] for row in rows(Path("there"), "wci")] == [0, 2]
    shutil.copy("theirs/model_2.pth", "theirs/model_0.pth")
    said = refused(monkeypatch, capsys, "checkpoint=theirs/model_0.pth", *typed)
    assert "there: epoch 0 was measured from another file than theirs/model_0.pth" in said


@pytest.mark.parametrize(
    ("key", "requirement"),
    [
        ("added_noise.factor", "must be a number of at least 0"),
        ("trainer.accumulate_grad_batches", "must be a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("value", ["much", -1, "${nothing}"])
def test_a_recorded_setting_that_cannot_be_is_named_with_its_file(
    key, requirement, value, run_dir, monkeypatch, capsys
):
    path = run_dir / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.save(config, path)
    found = refused(monkeypatch, capsys, "checkpoint=run")
    assert found == f"error: {path}: {key}={value} {requirement}; restore it"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((), "checkpoint is not given"),
        (("checkpoint=theirs",), "is not in a run directory"),
        (("checkpoint=theirs", *TYPED, "measure.epochs=[1]"), "there are 0, 2"),
        (("checkpoint=theirs", *TYPED, "learning_rate={1: 0.1}"), "begins after epoch 0, of model_0.pth"),
        (("checkpoint=theirs", *TYPED, "learning_rate={0: -0.1}"), "must be a positive number"),
        (("checkpoint=theirs", *TYPED, "measure.examples=81"), "measure.examples=81 must be between 1 and"),
        (
            ("checkpoint=theirs", *TYPED, "measure.weights=averaged"),
            "model_0.pth holds no average of trained weights; choose measure.weights=trained",
        ),
        (("checkpoint=theirs", *TYPED, "model.width=8"), "model.width=8 does not fit"),
        (("checkpoint=theirs", *TYPED, "batch_size=0"), "batch_size=0 must be a whole number of at least 1"),
        (
            ("checkpoint=theirs/kept.pth", *TYPED, "momentum=0.9"),
            "does not say the learning_rate and weight_decay",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, found, run_dir, tmp_path, monkeypatch, capsys):
    foreign(run_dir, tmp_path / "theirs")
    shutil.copytree("theirs", "kept")
    shutil.move("kept/model_2.pth", "kept/kept.pth")
    arguments = [a.replace("theirs/kept.pth", "kept/kept.pth") for a in arguments]
    assert found in refused(monkeypatch, capsys, *arguments)


def test_a_file_of_another_network_is_refused_before_the_first_measurement(
    run_dir, tmp_path, monkeypatch, capsys
):
    path = foreign(run_dir, tmp_path / "theirs") / "model_2.pth"
    weights = torch.load(path, weights_only=True)
    torch.save(weights | {"module.conv1.weight": torch.ones(3, 1, 3, 3)}, path)
    said = refused(monkeypatch, capsys, "checkpoint=theirs", *TYPED)
    assert "theirs/model_2.pth" in said
    assert not (tmp_path / "theirs/measured").exists()


def test_each_file_of_a_folder_has_a_network_of_its_own(run_dir, tmp_path, monkeypatch, capsys):
    """A file's normalisation is only its own. The optimiser may be known for some of the files."""
    folder = foreign(run_dir, tmp_path / "theirs")
    (folder / "opt_2.pth").unlink()
    typed = (*TYPED, *OF_RUN, "measure=index", "attack.evaluation.steps=1")
    typed = [text for text in typed if not text.startswith(("measure.ei", "measure.measurements.al"))]
    assert measure(monkeypatch, "checkpoint=theirs/model_2.pth", *typed, "output=alone") == 0
    weights = torch.load(folder / "model_0.pth", weights_only=True)
    normalisation = {"module.mean": torch.tensor([0.3]), "module.std": torch.tensor([2.0])}
    torch.save(weights | normalisation, folder / "model_0.pth")
    capsys.readouterr()
    assert measure(monkeypatch, "checkpoint=theirs", *typed, "output=both") == 0
    assert rows(Path("both"), "wci")[1]["wci"] == rows(Path("alone"), "wci")[0]["wci"]
    said = capsys.readouterr().out
    assert "optimiser   not known for model_2.pth, therefore no stationary laws there: give" in said
    assert "radius 20/255, 1 steps" in said


@pytest.mark.parametrize("key", ["optimizer.nesterov", "model.width"])
def test_a_reference_of_the_run_to_nothing_is_one_line(key, run_dir, monkeypatch, capsys):
    path = run_dir / ".hydra" / "config.yaml"
    config = OmegaConf.load(path)
    OmegaConf.update(config, key, "${nothing}")
    OmegaConf.save(config, path)
    said = refused(monkeypatch, capsys, "checkpoint=run")
    assert "nothing" in said
    assert key in said
