"""Keeps Lightning from interfering when SLURM or submitit requeues a run.

A run that was ended continues from its last checkpoint when it is started again in its directory. submitit
requeues the job when SLURM warns of the time limit (SIGUSR2). SLURM requeues it itself after preemption.
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
    """Lightning's SLURM environment without its own requeueing; an empty list outside of SLURM.

    On SIGUSR1, Lightning would save the weights, which may be perturbed in the middle of a step, and requeue
    the job any number of times.

    Args:
        environ: The process's environment variables.
    """
    return [SLURMEnvironment(auto_requeue=False)] if in_slurm(environ) else []


def slurm_callbacks(environ: Mapping[str, str]) -> list[Callback]:
    """``GoOnAfterSigterm`` under SLURM; an empty list elsewhere.

    Args:
        environ: The process's environment variables.
    """
    return [GoOnAfterSigterm()] if in_slurm(environ) else []


class GoOnAfterSigterm(Callback):
    """Continues training after SIGTERM, until SLURM kills the process.

    With SIGTERM, SLURM announces that it will do so, on some clusters after a grace time. Lightning would end
    the run after the current step with status 0. SLURM would count the job as completed and not requeue it.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Replace Lightning's handler. At the end Lightning restores the one before its own."""
        signal.signal(signal.SIGTERM, _note)


def _note(signum: int, frame: FrameType | None) -> None:
    _log.warning("SLURM announces the end of this job (SIGTERM); if it is requeued, the run continues")
