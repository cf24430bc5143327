"""What scripts here share: an ensemble's replicas, trained once more to get at their weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustdyn.commands.replicas import training_state
from robustdyn.data.tensors import to_unit
from robustdyn.errors import UserError
from robustdyn.records.run_directory import RunDirectory
from robustdyn.replicas import (
    Ensemble,
    MomentumUpdate,
    Recorded,
    RecordedEnsemble,
    Training,
    TrainingState,
    read_ensemble,
)
from robustdyn.replicas.prediction import sampling_of
from robustdyn.run.of_checkpoint import load_config


def opened(directory: Path, step: int, replicas: int) -> tuple[RecordedEnsemble, TrainingState]:
    """An ensemble, RUN/replicas/NAME, and the training that it left at RUN/checkpoints/last.ckpt.

    Raises:
        SystemExit: A file cannot be read, or the ensemble does not have the step or as many replicas.
    """
    run = RunDirectory(directory.parent.parent)
    try:
        ensemble = read_ensemble(directory)
        config = load_config(run.config)
        state = training_state(config, run.last_checkpoint, torch.device("cpu"))
    except UserError as error:
        raise SystemExit(str(error)) from error
    if step not in ensemble.steps or step == 0:
        raise SystemExit(f"--step={step} was not recorded; choose one of {ensemble.steps.tolist()}")
    if len(ensemble.replicas) < replicas:
        raise SystemExit(f"--replicas={replicas} exceeds the ensemble's {len(ensemble.replicas)}")
    return ensemble, state


def training_of(ensemble: RecordedEnsemble, state: TrainingState, learning_rate: Sequence[float]) -> Training:
    """How the ensemble's replicas trained, with a rate η for each step.

    Raises:
        SystemExit: Not by momentum SGD from a buffer of zeros, with running statistics held.
    """
    said = ensemble.settings
    if "betas" in said["optimizer"] or said["initial_state"] != "zero" or said["batchnorm"] != "eval":
        raise SystemExit("give an ensemble of momentum SGD with initial_state=zero and batchnorm=eval")
    return Training(
        images=to_unit(state.images.images).to(next(state.model.parameters()).dtype),
        targets=state.images.labels,
        objective=state.objective,
        attack=state.attack,
        perturbation=state.perturbation,
        update=MomentumUpdate(
            momentum=said["optimizer"]["momentum"],
            weight_decay=said["optimizer"]["weight_decay"],
            initial_buffer=None,
        ),
        learning_rate=learning_rate,
        sampling=sampling_of(ensemble),
        batchnorm="eval",
        seed=said["seed"],
    )


def repeat(ensemble: RecordedEnsemble, state: TrainingState, step: int, replicas: int) -> list[Tensor]:
    """Moves θ − θ_0 (P,), float32, of the first replicas at a step; says how far off the record they are."""
    recorded = Recorded(
        steps=(step,),
        loss_steps=(step,),
        loss_examples=len(state.images),
        mean_steps=(step,),
        loss_draws=1,
        expansion=False,
        weights=False,
    )
    again = Ensemble(
        state.model,
        training_of(ensemble, state, ensemble.learning_rate[:step].tolist()),
        directions=ensemble.start.directions,
        recorded=recorded,
        engine="vmapped",
    )
    row = ensemble.steps.tolist().index(step)
    scale = np.abs(ensemble.position[:, row]).max()
    found = []
    for number in range(replicas):
        arrays = again.run([number])  # alone, so that the mean it keeps is its own
        move, loss = torch.from_numpy(arrays["mean_move"][0, 0]), float(arrays["robust_loss"][0, 0])
        away = np.abs(arrays["position"][0, 0] - ensemble.position[number, row]).max()
        print(f"replica {number}: loss {loss:.4f}, off the record by {away / scale:.1e} of the largest")
        found.append(move)
    return found
