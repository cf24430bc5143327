"""What SLURM starts and what Lightning makes of it; on a real SLURM: tests/slurm."""

import os
import signal

import lightning
import pytest
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import OmegaConf

from robustdyn.errors import ConfigError
from robustdyn.launch.cluster import check_slurm
from robustdyn.launch.requeue import slurm_callbacks, slurm_plugins
from tests.runs import TINY, command

# Lightning's, about this process, which SLURM did not start; and one of its own imports
pytestmark = pytest.mark.filterwarnings("ignore:.*`srun` command", "ignore:.*isinstance.treespec")

# As SLURM 22.05 sets them: one task by srun; two by srun on one node; one on each of two nodes; a batch file
# of two tasks that does not use srun; a terminal session of two tasks (salloc).
ONE = {"SLURM_JOB_ID": "8", "SLURM_JOB_NAME": "robustdyn", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1",
       "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
TWO = ONE | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
TWO_NODES = TWO | {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}
BATCH = {key: value for key, value in TWO.items() if key != "SLURM_STEP_NUM_TASKS"}
SESSION = {"SLURM_JOB_ID": "8", "SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}


def configuration(devices=1, num_nodes=None):
    trainer = {"devices": devices} | ({} if num_nodes is None else {"num_nodes": num_nodes})
    return OmegaConf.create({"trainer": trainer})


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, {"devices": "auto"}),
        (ONE, {}),
        (ONE | {"SLURM_NTASKS_PER_NODE": "1"}, {}),
        (TWO, {"devices": 2}),
        (TWO, {"devices": [0, 1], "num_nodes": 1}),
        (TWO_NODES, {"devices": 1, "num_nodes": 2}),
        (SESSION, {"devices": 2}),
        ({"SLURM_JOB_ID": "8", "SLURM_JOB_NAME": "j"}, {"devices": 2}),  # sbatch, no tasks asked for, no srun
    ],
)
def test_accepts_one_task_for_each_device(environ, settings):
    check_slurm(configuration(**settings), environ)


@pytest.mark.parametrize(
    ("environ", "settings", "message"),
    [
        (TWO, {}, r"^trainer\.devices=1, but SLURM starts 2 tasks on each node: 2 full copies of the run "
                  r"would write one folder; choose trainer\.devices=2, or hydra\.launcher\.tasks_per_node=1"),
        (ONE, {"devices": 2}, r"^trainer\.devices=2, but SLURM starts 1 task on each node: .* some idle"),
        (TWO, {"devices": 4}, r"^trainer\.devices=4, but SLURM starts 2 tasks"),
        (TWO, {"devices": "auto"}, r"^trainer\.devices=auto leaves open how many"),
        (TWO, {"devices": -1}, r"^trainer\.devices=-1 leaves open how many"),
        (TWO_NODES, {}, r"^trainer\.num_nodes=1, but SLURM's job has 2; choose trainer\.num_nodes=2"),
        (TWO, {"devices": 2, "num_nodes": 2}, r"^trainer\.num_nodes=2, but SLURM's job has 1"),
        (BATCH, {"devices": 2}, r"started only once and would wait .* put srun before it"),
        ({k: v for k, v in TWO.items() if k != "SLURM_NTASKS_PER_NODE"}, {"devices": 2},
         r"without saying how many on each node; use --ntasks-per-node=N"),
        # srun --ntasks=1 in a job of four tasks: NTASKS is no longer NTASKS_PER_NODE
        (ONE | {"SLURM_NTASKS_PER_NODE": "4"}, {"devices": 4}, r"of 4 tasks .* but 1 of 1 were started"),
        (TWO | {"SLURM_JOB_NAME": "bash"}, {"devices": 2}, r"^hydra\.launcher\.name=bash means a terminal"),
        (TWO | {"SLURM_JOB_NAME": "interactive"}, {}, r"each of the 2 tasks would train a full copy"),
    ],
)  # fmt: skip
def test_refuses_what_would_hang_idle_or_write_twice(environ, settings, message):
    with pytest.raises(ConfigError, match=message):
        check_slurm(configuration(**settings), environ)


def test_nothing_is_written_when_two_copies_were_started(tmp_path, monkeypatch, capsys):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert command(monkeypatch, *TINY, f"hydra.run.dir={tmp_path}", "report=false") == 1
    assert "2 full copies of the run would write one folder" in capsys.readouterr().err
    assert not (tmp_path / "records").exists()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("chosen", ["hydra/launcher=slurm", "experiment=site"])
def test_the_launcher_without_multirun_is_refused(chosen, tmp_path, monkeypatch, capsys):
    """Hydra would ignore it and train here, on a login node."""
    site = tmp_path / "conf" / "experiment" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("# @package _global_\ndefaults:\n  - override /hydra/launcher: slurm\n")
    folders = (f"--config-dir={tmp_path / 'conf'}", f"hydra.run.dir={tmp_path / 'run'}")
    assert command(monkeypatch, *folders, *TINY, chosen, "report=false") == 1
    assert capsys.readouterr().err == (
        "error: hydra/launcher takes effect with -m only, for a single run too; add it\n"
    )


class Signalled(Callback):
    """Sends the process a signal in the second of four epochs and keeps the handlers it finds."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.handlers = {s: signal.getsignal(s) for s in (signal.SIGUSR1, signal.SIGUSR2)}
            os.kill(os.getpid(), signal.SIGTERM)


def fit(monkeypatch, tmp_path, *, plugins, callbacks):
    """Train under SLURM, with handlers of submitit's kind in place; the trainer and what was signalled."""
    for name, value in ONE.items():
        monkeypatch.setenv(name, value)
    signalled = Signalled()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=4,
        limit_train_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        plugins=plugins,
        callbacks=[*callbacks, signalled],
    )
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, _submitits)
        trainer.fit(BoringModel())
        assert signal.getsignal(signal.SIGTERM) is _submitits  # as it was
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return trainer, signalled


def _submitits(signum, frame):
    pass


def test_sigterm_does_not_end_a_run_that_slurm_will_requeue(monkeypatch, tmp_path):
    trainer, signalled = fit(
        monkeypatch, tmp_path, plugins=slurm_plugins(ONE), callbacks=slurm_callbacks(ONE)
    )
    assert trainer.current_epoch == 4
    # SIGUSR2 is submitit's; SIGUSR1 is nobody's
    assert signalled.handlers[signal.SIGUSR2] is _submitits
    assert signalled.handlers[signal.SIGUSR1] == signal.SIG_DFL


def test_what_lightning_alone_would_do(monkeypatch, tmp_path):
    """If this fails, Lightning has changed, and the module ``requeue`` can be looked at again."""
    with pytest.raises(SystemExit) as end:
        fit(monkeypatch, tmp_path, plugins=[], callbacks=[])
    assert not end.value.code  # SLURM would say COMPLETED


def test_outside_of_slurm_lightning_is_left_alone():
    assert slurm_plugins({}) == slurm_callbacks({}) == []
    assert slurm_plugins(SESSION) == slurm_callbacks(SESSION) == []
    (plugin,) = slurm_plugins(TWO)
    assert isinstance(plugin, SLURMEnvironment)
    assert not plugin.auto_requeue
