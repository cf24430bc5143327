"""What Lightning must leave alone so that SLURM and submitit can requeue a run.

A run that is taken down goes on from its last checkpoint when it is started again in its directory. submitit
sees to that when SLURM warns of the time limit (SIGUSR2), and SLURM itself when it preempts the job.
"""

import logging
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

import lightning
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from robustdyn.launch.cluster import in_slurm

_log = logging.getLogger(__name__)


def slurm_plugins(environ: Mapping[str, str]) -> list[Any]:
    """Lightning's view of SLURM, without requeueing of its own; nothing outside of SLURM.

    Lightning would answer SIGUSR1 with a checkpoint of the weights as they stand, which in the middle of a
    step may be perturbed ones, and requeue the job without limit.

    Args:
        environ: The process's environment variables.
    """
    return [SLURMEnvironment(auto_requeue=False)] if in_slurm(environ) else []


def slurm_callbacks(environ: Mapping[str, str]) -> list[Callback]:
    """``GoOnAfterSigterm`` under SLURM, nothing elsewhere.

    Args:
        environ: The process's environment variables.
    """
    return [GoOnAfterSigterm()] if in_slurm(environ) else []


class GoOnAfterSigterm(Callback):
    """Trains on until SLURM kills the process.

    SIGTERM is SLURM's notice that it will, with a grace time on some clusters. Lightning would end the run
    after the current step, with status 0: SLURM counts such a job as completed and does not requeue it.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the place of Lightning's handler; Lightning puts back what was there before, at the end."""
        signal.signal(signal.SIGTERM, _note)


def _note(signum: int, frame: FrameType | None) -> None:
    _log.warning("SLURM announces the end of this job (SIGTERM); if it is requeued, the run goes on")
