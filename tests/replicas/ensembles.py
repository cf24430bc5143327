"""Makes recorded ensembles of linear problems, simulated in NumPy."""

import dataclasses

import numpy as np
import torch

from robustdyn.replicas import Directions, EnsembleRecord, MeasuredPoint, RecordedEnsemble

MU, OMEGA, EXAMPLES, BATCH = 0.9, 5e-4, 400, 64
OPTIMIZER = {"_target_": "torch.optim.SGD", "momentum": MU, "weight_decay": OMEGA}


def point(
    hessian, example_noise, gradient, *, slopes=None, errors=0.0, attack=None, sampled=None, again=None
):
    k = len(hessian)
    unit = torch.eye(k)
    slopes = np.full((k, k), np.nan) if slopes is None else np.asarray(slopes, dtype=float)
    attack = np.zeros((k, k)) if attack is None else attack
    return MeasuredPoint(
        directions=Directions(positions=unit, forces=unit),
        eigenvalues=np.diag(hessian).copy(),
        residuals=np.zeros(k),
        converged=True,
        hessian=np.asarray(hessian, dtype=float),
        mean_gradient=np.asarray(gradient, dtype=float),
        decay_gradient=np.zeros(k),
        example_covariance=example_noise,
        attack_covariance=attack,
        noise=(example_noise + attack) / BATCH,
        sampled_gradients=np.empty((0, k)) if sampled is None else sampled,
        sampled_again=np.empty((0, k)) if sampled is None else sampled if again is None else again,
        slopes=slopes,
        slope_errors=np.full((k, k), errors),
        slope_distances=np.ones(k),
        loss=0.5,
        curvature_has_decay=False,
    )


def recorded(start, position, steps, rates, *, gradient=None, path=(), path_steps=(), **settings):
    """An ensemble that holds these positions (R, S, k)."""
    replicas, _, k = position.shape
    nothing = np.full((replicas, 0), np.nan)
    fields = {
        "settings": {
            "optimizer": OPTIMIZER,
            "perturbation": None,
            "examples": EXAMPLES,
            "sampling.batch_size": BATCH,
            "sampling.replacement": True,
            "sampling.drop_last": False,
        }
        | settings,
        "start": start,
        "path_steps": np.array(path_steps, dtype=np.int64),
        "path": tuple(path),
        "replicas": np.arange(replicas),
        "steps": np.array(steps, dtype=np.int64),
        "loss_steps": np.empty(0, dtype=np.int64),
        "learning_rate": np.asarray(rates, dtype=float),
        "position": position,
        "buffer": np.zeros_like(position),
        "gradient": np.full_like(position, np.nan) if gradient is None else gradient,
        "distance": np.linalg.norm(position, axis=2),
        "batch_loss": np.zeros((replicas, len(rates))),
        "robust_loss": nothing,
        "robust_error": nothing,
        "mean_steps": np.array(path_steps, dtype=np.int64),
        "mean_move": np.zeros((len(path_steps), k), dtype=np.float32),
    }
    for field in dataclasses.fields(RecordedEnsemble):
        if field.name not in fields:  # an optional field is absent
            fields[field.name] = None
    return RecordedEnsemble(**fields)


def simulate(slope, noise, gradient, rates, steps, *, replicas, seed):
    """Simulate momentum SGD on a linear gradient; return positions and gradients (R, S, k)."""
    draws = np.random.default_rng(seed)
    root = np.linalg.cholesky(noise)
    x, v = np.zeros((2, replicas, len(noise)))
    positions, gradients, g = [x], [np.full_like(x, np.nan)], None
    for rate in rates:
        g = gradient + x @ slope.T + draws.standard_normal(x.shape) @ root.T
        v = MU * v + g + OMEGA * x
        x = x - rate * v
        positions.append(x)
        gradients.append(g)
    return np.stack([positions[s] for s in steps], 1), np.stack([gradients[s] for s in steps], 1)


def write(directory, ensemble, **settings):
    """Write the ensemble's directory as the command does."""
    described = {
        **ensemble.settings,
        "data": "robustdyn.data.Digits",
        "objective": {"_target_": "robustdyn.methods.AdversarialCrossEntropy"},
        "learning_rate": ensemble.learning_rate.tolist(),
        "record.steps": ensemble.steps.tolist(),
        "record.loss_steps": [],
        "record.mean_steps": ensemble.path_steps.tolist(),
        **settings,
    }
    replicas, paths = len(ensemble.replicas), ensemble.mean_paths
    if paths is not None:
        described["noise_free"] = {"repetitions": len(paths.plain)}
    record = EnsembleRecord(directory, described, {}, chunk=replicas)
    record.start(lambda: ensemble.start, torch.device("cpu"))
    names = ("position", "buffer", "gradient", "distance", "batch_loss", "robust_loss", "robust_error")
    arrays = {name: getattr(ensemble, name) for name in names}
    arrays |= {"mean_move": ensemble.mean_move[None]}
    record.add(range(replicas), arrays | ({} if ensemble.child is None else {"child": ensemble.child}))
    if paths is not None:
        for number, both in enumerate(zip(paths.plain, paths.drifting, strict=True)):
            record.mean_path(number, lambda both=both: both)
    points = iter(ensemble.path)
    record.path(replicas, ensemble.path_steps.tolist(), lambda _: next(points))
