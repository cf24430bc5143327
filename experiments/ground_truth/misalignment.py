"""Gradient noise turned against the Hessian by a controlled angle: how the bound's terms move.

    python experiments/ground_truth/misalignment.py --output experiments/ground_truth/results/misalignment

Two problems: a quadratic one, and a small network trained on adversarial handwritten digits. Replicas of
momentum SGD start at the minimum and follow the full-batch gradient plus Gaussian noise whose covariance C,
in the eigenbasis of the Hessian H, is set to each of

- ``neighbours rotated``: spectrum held, planes of neighbouring eigenvectors (1, 2), (3, 4), ...
- ``ends rotated``: spectrum held, planes of the sharpest with the flattest, (1, k), (2, k - 1), ...
- ``neighbours correlated``: diagonal held, correlation sin 2φ in planes of neighbours

by every angle. The covariance of the replicas after five of the slowest relaxation times is compared with
the closed form. Writes tables, a figure (PNG and PDF), findings.md and settings.json into the folder given;
misalignment.md beside this script says what is in them.

All angles see the same random numbers, which makes changes with the angle sharper than levels, and the points
of one problem dependent on each other.
"""

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from robustdyn import streams
from robustdyn.analysis import style
from robustdyn.attacks import PGD
from robustdyn.curvature import EmpiricalRisk, Hessian, gradient_projections, lanczos
from robustdyn.data.digits import read_digits
from robustdyn.entrypoints.environment import processor
from robustdyn.replicas import MomentumUpdate, StackedNetwork
from robustdyn.theory import (
    CovarianceTerms,
    MomentumDynamics,
    bound_terms_under_rotation,
    correlated_noise,
    covariance_terms,
    largest_total_correlation,
    minibatch_noise_factor,
    rotated_noise,
    stationary_covariance,
)
from robustdyn.theory.misalignment import Held

Array = NDArray[np.float64]
Simulation = Callable[[Array], Array]
"""Factors L (m, k, k) of m noise covariances L Lᵀ -> positions (m, R, k) of R replicas, from the minimum."""

MOMENTUM = 0.9  # both papers
RELAXATIONS = 5  # the start is then forgotten up to e^-10
LEVEL = 0.95  # of all intervals
RANDOM_ORIENTATIONS = 200
ANY = "any (upper limit)"
FEWEST = 5  # replicas for each direction; fewer, and a bootstrap resample may be singular
PRIOR_DISTANCE = 10.0  # standard deviations: how far the quadratic problem's prior is off, in each direction


@dataclass(frozen=True)
class Family:
    """A way of turning C: what is held, and in which planes of k directions."""

    name: str
    held: Held
    planes: Callable[[int], list[tuple[int, int]]]

    def noise(self, values: Array, radians: float) -> Array:
        """C (k, k), from its eigenvalues or its diagonal (k,)."""
        turn = rotated_noise if self.held == "spectrum" else correlated_noise
        return turn(values, radians, self.planes(len(values)))


def neighbours(k: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(0, k - 1, 2)]


def ends(k: int) -> list[tuple[int, int]]:
    return [(i, k - 1 - i) for i in range(k // 2)]


FAMILIES = (
    Family("neighbours rotated", "spectrum", neighbours),
    Family("ends rotated", "spectrum", ends),
    Family("neighbours correlated", "diagonal", neighbours),
)


@dataclass(frozen=True, eq=False)
class Problem:
    """A minimum, the noise there, and replicas around it.

    Attributes:
        name: Of the problem.
        eigenvalue: λ (k,), descending, without weight decay.
        noise: γ (k,), of C where it commutes with H.
        dynamics: η, μ, ω.
        distance_sq: ‖μ − θ_P‖² in the k directions, for a prior at the start of training.
        simulate: Makes the replicas.
        own: The k x k noise covariance the problem has by itself, where it has one.
        facts: For the record.
    """

    name: str
    eigenvalue: Array
    noise: Array
    dynamics: MomentumDynamics
    distance_sq: float
    simulate: Simulation
    own: Array | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, float]:
        """The dynamics as keyword arguments."""
        return vars(self.dynamics)

    def covariance(self, noise: Array) -> Array:
        """Σ (k, k) in closed form for C (k, k)."""
        return stationary_covariance(self.eigenvalue, noise, **self.options)


def relaxed(dynamics: MomentumDynamics, eigenvalue: Array) -> int:
    """Steps until the start is forgotten."""
    return int(np.ceil(RELAXATIONS * dynamics.relaxation_steps(eigenvalue).max()))


# ---------------------------------------------------------------------- the quadratic problem


def quadratic(directions: int, learning_rate: float, replicas: int, seed: int) -> Problem:
    """λ_i = 40 / i and γ = 0.01 λ, about as at a narrow PreActResNet-18 trained adversarially on digits."""
    eigenvalue = 40 / np.arange(1, directions + 1)
    noise = 0.01 * eigenvalue
    dynamics = MomentumDynamics(learning_rate, MOMENTUM, 5e-4)  # weight decay: both papers
    steps = relaxed(dynamics, eigenvalue)
    aligned = stationary_covariance(eigenvalue, np.diag(noise), **vars(dynamics))
    return Problem(
        name="quadratic",
        eigenvalue=eigenvalue,
        noise=noise,
        dynamics=dynamics,
        distance_sq=PRIOR_DISTANCE**2 * float(np.trace(aligned)),
        simulate=partial(simulate_quadratic, eigenvalue, dynamics, steps, replicas, seed),
        facts={"steps": steps, "replicas": replicas},
    )


def simulate_quadratic(
    eigenvalue: Array, dynamics: MomentumDynamics, steps: int, replicas: int, seed: int, factors: Array
) -> Array:
    """Momentum SGD in coordinates that are not H's eigenbasis; see ``Simulation``."""
    rng = np.random.default_rng(seed)
    k = len(eigenvalue)
    basis = np.linalg.qr(rng.normal(size=(k, k)))[0]  # columns are H's eigenvectors
    curvature = basis * (eigenvalue + dynamics.weight_decay) @ basis.T
    spread = factors.transpose(0, 2, 1) @ basis.T
    theta = np.zeros((len(factors), replicas, k))
    buffer = np.zeros_like(theta)
    for _ in range(steps):
        buffer *= dynamics.momentum
        buffer += theta @ curvature
        buffer += rng.normal(size=(replicas, k)) @ spread
        theta -= dynamics.learning_rate * buffer
    return np.asarray(theta @ basis)


# ---------------------------------------------------------------------- the network


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Of the small network and its replicas; attributes are the command's flags."""

    directions: int
    examples: int
    hidden: int
    training_steps: int
    batch_size: int
    learning_rate: float
    replicas: int
    attack: Literal["held", "refreshed"]
    seed: int


WEIGHT_DECAY = 2e-2  # strong enough for a minimum that is still adversarially trained: see misalignment.md
TRAINING_RATE = 0.3
ATTACK = PGD(
    norm="linf",
    eps=0.1,
    step_size=0.025,
    steps=5,
    random_start="none",  # the attack is a function of the weights alone
    start_std=1e-3,
    batchnorm="eval",
)


def digits_network(settings: NetworkSettings) -> Problem:
    """A perceptron with one smooth hidden layer, trained adversarially, at a minimum for held attacks.

    Full-batch adversarial training, then the adversarial examples are held where they are and the loss on
    them is minimised: only there does H describe the loss, and the mean gradient vanish.
    """
    began = time.process_time()
    data = read_digits()
    images = data.images[: settings.examples].double() / 255
    targets = data.labels[: settings.examples]
    model = perceptron(settings.hidden, data.images[0].numel(), settings.seed)
    first = flat(model)
    draws = streams.generator(settings.seed, "misalignment")
    optimiser = torch.optim.SGD(
        model.parameters(), lr=TRAINING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.training_steps)
    for _ in range(settings.training_steps):
        optimiser.zero_grad()
        F.cross_entropy(model(ATTACK.perturb(model, images, targets, draws)), targets).backward()
        optimiser.step()
        cosine.step()
    attacked = ATTACK.perturb(model, images, targets, draws)
    gradient = minimise(model, attacked, targets)
    with torch.no_grad():
        held = F.cross_entropy(model(attacked), targets).item()
        logits = model(ATTACK.perturb(model, images, targets, draws))
        refreshed = F.cross_entropy(logits, targets).item()
    facts = {
        "parameters": len(first),
        "training_cpu_seconds": round(time.process_time() - began, 1),
        "loss_held_attack": held,
        "loss_refreshed_attack": refreshed,
        "robust_accuracy": (logits.argmax(dim=1) == targets).double().mean().item(),
        "largest_gradient": gradient,
    }
    return measured(model, first, images, attacked, targets, settings, facts)


def measured(
    model: nn.Module,
    first: Tensor,
    images: Tensor,
    attacked: Tensor,
    targets: Tensor,
    settings: NetworkSettings,
    facts: dict[str, Any],
) -> Problem:
    """H's top and the mini-batch noise along it, at the network's minimum."""
    draws = streams.generator(settings.seed, "misalignment-lanczos")
    risk = EmpiricalRisk(model, attacked, targets)
    top = lanczos(
        Hessian(risk),
        settings.directions,
        which="largest",
        tol=1e-6,
        max_products=risk.numel,
        generator=draws,
    )
    if not top.all_converged:
        raise SystemExit(
            f"the leading {settings.directions} eigenpairs did not converge; take fewer --directions"
        )
    eigenvalue, vectors = top.eigenvalues.numpy(), top.eigenvectors
    along = gradient_projections(risk, vectors).double().numpy()
    factor = minibatch_noise_factor(settings.examples, settings.batch_size, replacement=True)
    own = np.cov(along, rowvar=False, bias=True) * factor
    dynamics = MomentumDynamics(settings.learning_rate, MOMENTUM, WEIGHT_DECAY)
    steps = relaxed(dynamics, eigenvalue)
    images = (images if settings.attack == "refreshed" else attacked).float()
    return Problem(
        name="network",
        eigenvalue=eigenvalue,
        noise=np.diag(own).copy(),
        dynamics=dynamics,
        distance_sq=float(((flat(model) - first) @ vectors).square().sum()),
        simulate=partial(
            simulate_network,
            copy.deepcopy(model).float(),
            vectors.float(),
            images,
            targets,
            dynamics,
            steps,
            settings,
        ),
        own=own,
        facts=facts | {"steps": steps, "replicas": settings.replicas, "hessian_products": top.products},
    )


def perceptron(hidden: int, pixels: int, seed: int) -> nn.Module:
    """From images to ten classes through one hidden layer of SiLU, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.stream_seed(seed, "misalignment-weights"))
        layers = [nn.Flatten(), nn.Linear(pixels, hidden), nn.SiLU(), nn.Linear(hidden, 10)]
        return nn.Sequential(*layers).double()


def flat(model: nn.Module) -> Tensor:
    """θ (P,), a copy."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def minimise(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """To the minimum of the loss with weight decay on fixed inputs; the gradient's largest entry there."""
    parameters = list(model.parameters())
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=5000,
        max_eval=10_000,
        tolerance_grad=1e-6,
        tolerance_change=0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        decay = WEIGHT_DECAY / 2 * torch.stack([p.square().sum() for p in parameters]).sum()
        total = F.cross_entropy(model(inputs), targets) + decay
        total.backward()
        return total

    optimiser.step(loss)
    return max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)


def simulate_network(
    model: nn.Module,
    directions: Tensor,
    images: Tensor,
    targets: Tensor,
    dynamics: MomentumDynamics,
    steps: int,
    settings: NetworkSettings,
    factors: Array,
) -> Array:
    """Momentum SGD on all weights, full batch plus noise along the directions; see ``Simulation``."""
    network, replicas = StackedNetwork(model, "vmapped"), settings.replicas
    start = network.theta()
    update = MomentumUpdate(
        momentum=dynamics.momentum, weight_decay=dynamics.weight_decay, initial_buffer=None
    )
    many = images.repeat(replicas, 1, 1, 1)
    labels = targets.repeat(replicas)

    def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
        # classes in the middle: log-softmax over a last dimension of ten is many times slower
        shape = (replicas, len(targets))
        return F.cross_entropy(
            logits.unflatten(0, shape).transpose(1, 2), labels.unflatten(0, shape), reduction="sum"
        )

    found = []
    for factor in factors:
        spread = torch.from_numpy(factor).float().T @ directions.T
        theta = start.expand(replicas, -1).clone()
        state = update.begin(theta)
        for step in range(steps):
            leaves = network.use(theta, {}, learn=True)
            inputs = many
            if settings.attack == "refreshed":
                inputs = ATTACK.climb(network, many, labels, many, summed_loss)
            loss = summed_loss(network(inputs), labels) / len(targets)
            gradient = network.flatten(torch.autograd.grad(loss, leaves))
            draws = streams.generator(settings.seed, "misalignment-noise", step)
            noise = torch.randn(replicas, len(spread), generator=draws)
            update.step(theta, gradient.addmm_(noise, spread), state, dynamics.learning_rate, step)
        found.append(((theta - start).double() @ directions.double()).numpy())
    return np.stack(found)


# ---------------------------------------------------------------------- measured against predicted

TERMS: dict[str, str] = {
    "curvature": "Σ λσ²",
    "log_variance": "−Σ ln σ²",
    "log_determinant": "−ln det Σ",
    "twice_total_correlation": "2 TC",
    "total": "Σ λσ² − ln det Σ",
    "kl_prior_at_minimum": "KL, prior at the minimum",
    "kl_prior_at_start": "KL, prior at the start",
}
"""Columns ``term`` of the tables, and how they are shown. σ_P² is always the best one, chosen anew."""


def by_name(terms: CovarianceTerms, distance_sq: float) -> dict[str, Array]:
    """Every term of ``TERMS``."""
    return {
        "curvature": terms.curvature,
        "log_variance": terms.log_variance,
        "log_determinant": terms.log_determinant,
        "twice_total_correlation": 2 * terms.total_correlation,
        "total": terms.total,
        "kl_prior_at_minimum": terms.kl(distance_sq=0.0, prior_variance=None),
        "kl_prior_at_start": terms.kl(distance_sq=distance_sq, prior_variance=None),
    }


@dataclass(frozen=True, eq=False)
class Estimate:
    """A statistic of the replicas (), and of each resample of them (B,)."""

    value: Array
    resampled: Array

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def row(self, names: Sequence[str]) -> dict[str, float]:
        """The estimate less its bias, and the ends of the basic bootstrap interval, which has none either."""
        tail = (1 - LEVEL) / 2
        found = (np.mean(self.resampled), *np.quantile(self.resampled, [1 - tail, tail]))
        return {name: float(2 * self.value - x) for name, x in zip(names, found, strict=True)}


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Replicas drawn with replacement, the same draws for every angle: counts (B, R)."""

    counts: Array

    @classmethod
    def of(cls, replicas: int, resamples: int, seed: int) -> "Bootstrap":
        """Of so many replicas."""
        rng = np.random.default_rng(seed)
        return cls(rng.multinomial(replicas, np.full(replicas, 1 / replicas), size=resamples).astype(float))

    def covariances(self, positions: Array) -> Array:
        """(B, k, k) of positions (R, k), with the sample covariance for their mean."""
        replicas, k = positions.shape
        shares = self.counts / replicas
        mean = shares @ positions
        products = (positions[:, :, None] * positions[:, None, :]).reshape(replicas, -1)
        second = (shares @ products).reshape(-1, k, k)
        # n / (n − 1) once as in the sample covariance, once for the resample's own mean
        return np.asarray((second - mean[:, :, None] * mean[:, None, :]) * (replicas / (replicas - 1)) ** 2)

    def estimates(self, problem: Problem, positions: Array) -> dict[str, Estimate]:
        """Every term, measured."""
        matrices = np.concatenate([np.asarray([np.cov(positions.T)]), self.covariances(positions)])
        found = by_name(covariance_terms(problem.eigenvalue, matrices), problem.distance_sq)
        return {name: Estimate(values[0], values[1:]) for name, values in found.items()}


@dataclass(frozen=True, eq=False)
class Tables:
    """Tidy results, a row for each number, as written.

    Attributes:
        terms: Of the bound, measured and predicted, with their change from angle 0.
        curves: Predicted change of the terms, every 1.5 degrees.
        variances: Along H's eigenvectors.
        pairs: Correlations in the planes.
        references: Terms for other orientations of the noise, predicted.
    """

    terms: pd.DataFrame
    curves: pd.DataFrame
    variances: pd.DataFrame
    pairs: pd.DataFrame
    references: pd.DataFrame


def compare(problem: Problem, degrees: Sequence[float], resamples: int, seed: int) -> Tables:
    """Measured against predicted for one problem, all families and angles; angle 0 is simulated once."""
    settings = [(family, angle) for family in FAMILIES for angle in degrees]
    noises = [family.noise(problem.noise, np.radians(angle)) for family, angle in settings]
    distinct = {noise.tobytes(): noise for noise in noises}
    positions = problem.simulate(np.stack([root(noise) for noise in distinct.values()]))
    if not np.isfinite(positions).all():
        raise SystemExit(f"replicas of the {problem.name} problem diverged; lower its learning rate")
    bootstrap = Bootstrap.of(positions.shape[1], resamples, seed)
    where = {key: index for index, key in enumerate(distinct)}
    estimated = [bootstrap.estimates(problem, found) for found in positions]
    terms: list[dict[str, Any]] = []
    variances: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for (family, angle), noise in zip(settings, noises, strict=True):
        index = where[noise.tobytes()]
        head = {"problem": problem.name, "family": family.name, "angle_deg": angle}
        terms += (head | row for row in term_rows(problem, family, angle, estimated[index], estimated[0]))
        variances += (head | row for row in variance_rows(problem, noise, positions[index]))
        pairs += (head | row for row in pair_rows(problem, family, noise, positions[index]))
    curves = [row for family in FAMILIES for row in curve_rows(problem, family)]
    other = references(problem, seed)
    return Tables(*(pd.DataFrame(rows) for rows in (terms, curves, variances, pairs, other)))


def root(matrix: Array) -> Array:
    """The symmetric square root, which moves continuously with the angle and exists for singular noise."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.sqrt(values.clip(min=0)) @ vectors.T)


def predicted(problem: Problem, family: Family, degrees: Sequence[float]) -> dict[str, Array]:
    """Every term (n,) at n angles, in closed form."""
    planes = family.planes(len(problem.noise))
    terms = bound_terms_under_rotation(
        problem.eigenvalue,
        problem.noise,
        np.radians(degrees),
        planes,
        held=family.held,
        **problem.options,
    )
    return by_name(terms, problem.distance_sq)


def curve_rows(problem: Problem, family: Family) -> Iterator[dict[str, Any]]:
    degrees = [1.5 * step for step in range(61)]
    for name, values in predicted(problem, family, degrees).items():
        for angle, value in zip(degrees, values, strict=True):
            yield {
                "problem": problem.name,
                "family": family.name,
                "angle_deg": angle,
                "term": name,
                "predicted_change": value - values[0],
            }


def term_rows(
    problem: Problem,
    family: Family,
    angle: float,
    found: dict[str, Estimate],
    aligned: dict[str, Estimate],
) -> Iterator[dict[str, Any]]:
    for name, (now, before) in predicted(problem, family, [angle, 0.0]).items():
        level, change = found[name], found[name] - aligned[name]
        row: dict[str, Any] = {"term": name, "predicted": now} | level.row(("measured", "low", "high"))
        row["predicted_change"] = now - before
        yield row | change.row(("measured_change", "change_low", "change_high"))


def variance_rows(problem: Problem, noise: Array, positions: Array) -> Iterator[dict[str, Any]]:
    """Variances along H's eigenvectors with the interval of χ²."""
    closed, found = np.diag(problem.covariance(noise)), np.asarray(np.var(positions, axis=0, ddof=1))
    freedom = len(positions) - 1
    high, low = (freedom / stats.chi2.ppf(tail, freedom) for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    for i, (expected, value) in enumerate(zip(closed, found, strict=True)):
        yield {
            "direction": i + 1,
            "eigenvalue": problem.eigenvalue[i],
            "noise": noise[i, i],
            "predicted": expected,
            "measured": value,
            "low": low * value,
            "high": high * value,
        }


def pair_rows(problem: Problem, family: Family, noise: Array, positions: Array) -> Iterator[dict[str, Any]]:
    """Correlations of the posterior in the planes, with Fisher's interval."""
    sigma, found = problem.covariance(noise), np.asarray(np.corrcoef(positions.T))
    width = float(stats.norm.ppf((1 + LEVEL) / 2)) / np.sqrt(len(positions) - 3)
    for i, j in family.planes(len(noise)):
        z = np.arctanh(found[i, j])
        yield {
            "first": i + 1,
            "second": j + 1,
            "noise_correlation": noise[i, j] / np.sqrt(noise[i, i] * noise[j, j]),
            "predicted": sigma[i, j] / np.sqrt(sigma[i, i] * sigma[j, j]),
            "measured": found[i, j],
            "low": np.tanh(z - width),
            "high": np.tanh(z + width),
        }


def references(problem: Problem, seed: int) -> Iterator[dict[str, Any]]:
    """The closed form for other orientations of the same noise, to see the angles' effects in proportion."""
    noises = {"aligned": [np.diag(problem.noise)]}
    spectrum = problem.noise
    if problem.own is not None:
        spectrum = np.asarray(np.linalg.eigvalsh(problem.own)[::-1], dtype=np.float64)
        noises["own noise"] = [problem.own]
        noises["own spectrum, aligned"] = [np.diag(spectrum)]
    rng = np.random.default_rng(seed)
    bases = [np.linalg.qr(rng.normal(size=2 * (len(spectrum),)))[0] for _ in range(RANDOM_ORIENTATIONS)]
    name = "aligned" if problem.own is None else "own"
    noises[f"{name} spectrum, random orientation (mean)"] = [b * spectrum @ b.T for b in bases]
    for case, matrices in noises.items():
        sigma = np.stack([problem.covariance(matrix) for matrix in matrices])
        found = by_name(covariance_terms(problem.eigenvalue, sigma), problem.distance_sq)
        yield {"problem": problem.name, "noise": case} | {key: float(np.mean(v)) for key, v in found.items()}
    largest = largest_total_correlation(problem.eigenvalue, **problem.options)
    yield {"problem": problem.name, "noise": ANY, "twice_total_correlation": 2 * largest}


# ---------------------------------------------------------------------- findings


def findings(tables: Tables) -> list[str]:
    """Sentences with the numbers, a list item each."""
    lines = []
    for problem, terms in tables.terms.groupby("problem", sort=False):
        variances = tables.variances[tables.variances["problem"] == problem]
        pairs = tables.pairs[tables.pairs["problem"] == problem]
        ratio = np.exp(np.log(variances["measured"] / variances["predicted"]).mean())
        lines.append(
            f"{problem}: geometric mean of measured / predicted variance {ratio:.3f}; the closed form is "
            f"within the 95 % interval of {inside(variances)} variances, {inside(pairs)} correlations and "
            f"{inside(turned(terms), 'change_')} changes of terms (all angles share random numbers)."
        )
        lines += [
            family_line(str(problem), str(name), rows) for name, rows in terms.groupby("family", sort=False)
        ]
        lines.append(commuting_line(str(problem), terms))
        lines.append(reference_line(str(problem), tables.references))
    return lines


def inside(rows: pd.DataFrame, prefix: str = "") -> str:
    """How many predictions lie in their intervals, as ``n of N``."""
    expected = rows["predicted_change" if prefix else "predicted"]
    # an angle of 0 and a term that cannot move have intervals of no width
    slack = 1e-9
    within = (rows[f"{prefix}low"] - slack <= expected) & (expected <= rows[f"{prefix}high"] + slack)
    return f"{int(within.sum())} of {len(rows)}"


def turned(terms: pd.DataFrame) -> pd.DataFrame:
    return terms[terms["angle_deg"] != 0]


def family_line(problem: str, family: str, rows: pd.DataFrame) -> str:
    """Change of every term at the angle where −ln det Σ is furthest from its start."""
    moved = rows[rows["term"] == "log_determinant"].set_index("angle_deg")["predicted_change"]
    angle = float(moved.index[np.abs(moved.to_numpy()).argmax()])
    at = rows[rows["angle_deg"] == angle].set_index("term")
    start = rows[rows["angle_deg"] == 0].set_index("term")["predicted"]
    parts = []
    for name, shown in TERMS.items():
        row = at.loc[name]
        scale, unit = (100 / start[name], " %") if name == "curvature" else (1.0, "")
        parts.append(
            f"{shown} {scale * row['predicted_change']:+.3g}{unit}, "
            f"measured {scale * row['measured_change']:+.3g} "
            f"[{scale * row['change_low']:+.3g}, {scale * row['change_high']:+.3g}]"
        )
    return f"{problem}, {family}, φ = {angle:g}° against 0° (nats): {'; '.join(parts)}."


def commuting_line(problem: str, terms: pd.DataFrame) -> str:
    """Is what the commuting approximation misses 2 TC?"""
    wide = terms.pivot_table(index=["family", "angle_deg"], columns="term", values=["measured", "predicted"])
    missed = wide["measured"]["log_determinant"] - wide["measured"]["log_variance"]
    error = missed - wide["predicted"]["twice_total_correlation"]
    return (
        f"{problem}: measured −ln det Σ less measured −Σ ln σ², what the commuting form leaves out, differs "
        f"from the closed form's 2 TC by at most {error.abs().max():.3f} nats (root mean square "
        f"{np.sqrt((error**2).mean()):.3f}); 2 TC goes up to "
        f"{wide['predicted']['twice_total_correlation'].max():.2f}."
    )


def reference_line(problem: str, table: pd.DataFrame) -> str:
    own = table[table["problem"] == problem]
    parts = [
        f"{row['noise']}: −ln det Σ {row['log_determinant']:.2f}, 2 TC {row['twice_total_correlation']:.3f}"
        for _, row in own.dropna().iterrows()
    ]
    limit = own.loc[own["noise"] == ANY, "twice_total_correlation"].item()
    parts.append(f"2 TC of any noise at most {limit:.1f}")
    return f"{problem}, closed form for other orientations: {'; '.join(parts)}."


# ---------------------------------------------------------------------- the figure

COLOURS = {
    "log_variance": style.PALETTE[0],
    "log_determinant": style.PALETTE[1],
    "twice_total_correlation": style.PALETTE[2],
    "curvature": style.PALETTE[4],
    "kl_prior_at_minimum": style.NEUTRAL,
    "kl_prior_at_start": style.MARK,
}
DASHED = {"twice_total_correlation", "kl_prior_at_start"}  # they lie on others


@style.styled
def draw(terms: pd.DataFrame, curves: pd.DataFrame, labels: dict[str, str]) -> Figure:
    """Rows of problems, columns of families: lines are the closed form, points the replicas."""
    figure = style.new_figure("Gradient noise turned against the Hessian", height=3.1 * len(labels) + 0.6)
    axes = figure.subplots(len(labels), len(FAMILIES), sharex=True, squeeze=False)
    for row, (problem, label) in zip(axes, labels.items(), strict=True):
        for ax, family in zip(row, FAMILIES, strict=True):
            draw_terms(
                ax,
                *(t[(t["problem"] == problem) & (t["family"] == family.name)] for t in (terms, curves)),
            )
            if ax in axes[0]:
                ax.set_title(f"{family.name}\n({family.held} of C held)")
            if ax in axes[-1]:
                ax.set_xlabel("angle φ (degrees)")
        row[0].set_ylabel(f"{label}\nchange from φ = 0 (nats; Σ λσ²: loss)")
    axes[0, 0].set_xticks(range(0, 91, 15))
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(COLOURS), fontsize=8.5)
    return figure


def draw_terms(ax: Axes, terms: pd.DataFrame, curves: pd.DataFrame) -> None:
    for name, colour in COLOURS.items():
        rows, line = (table[table["term"] == name] for table in (terms, curves))
        found = rows["measured_change"].to_numpy()
        bars = np.abs(rows[["change_low", "change_high"]].to_numpy().T - found)
        dashes = "--" if name in DASHED else "-"
        ax.plot(line["angle_deg"], line["predicted_change"], dashes, color=colour, label=TERMS[name])
        ax.errorbar(rows["angle_deg"], found, yerr=bars, fmt="o", color=colour, elinewidth=1.2, capsize=2)


# ---------------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the results; made if absent")
    add("--problems", nargs="+", choices=("quadratic", "network"), default=["quadratic", "network"])
    add(
        "--angles", nargs="+", type=float, default=[15, 30, 45, 60, 75, 90], help="degrees; 0 is always there"
    )
    add("--directions", type=int, default=10, help="eigenvectors of H that are tracked")
    add("--seed", type=int, default=0, help="of everything random")
    add("--resamples", type=int, default=500, help="bootstrap resamples of the replicas")
    add(
        "--quadratic-rate", type=float, default=0.01, help="learning rate: the papers', after the first decay"
    )
    add("--quadratic-replicas", type=int, default=10_000)
    add("--network-rate", type=float, default=0.03, help="learning rate of the replicas")
    add("--network-replicas", type=int, default=512)
    add(
        "--batch-size", type=int, default=64, help="whose noise along H's eigenvectors the network's C(0) has"
    )
    add("--examples", type=int, default=200, help="training images of the network")
    add("--hidden", type=int, default=16, help="hidden units")
    add("--training-steps", type=int, default=500, help="of full-batch adversarial training")
    add(
        "--attack",
        choices=("held", "refreshed"),
        default="held",
        help="the replicas' adversarial examples: held as at the minimum, or made anew at each step",
    )
    args = parser.parse_args(arguments)
    fewest = FEWEST * args.directions
    if min(args.quadratic_replicas, args.network_replicas) < fewest:
        parser.error(f"{args.directions} directions need at least {fewest} replicas to have a covariance")
    return args


def problems(args: argparse.Namespace) -> Iterator[tuple[Problem, str]]:
    """The problems asked for, and what the figure calls them."""
    if "quadratic" in args.problems:
        problem = quadratic(args.directions, args.quadratic_rate, args.quadratic_replicas, args.seed)
        yield problem, f"quadratic, {args.quadratic_replicas} replicas"
    if "network" in args.problems:
        settings = NetworkSettings(
            directions=args.directions,
            examples=args.examples,
            hidden=args.hidden,
            training_steps=args.training_steps,
            batch_size=args.batch_size,
            learning_rate=args.network_rate,
            replicas=args.network_replicas,
            attack=args.attack,
            seed=args.seed,
        )
        yield digits_network(settings), f"network, attack {args.attack}, {args.network_replicas} replicas"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    degrees = [0.0, *sorted({float(angle) for angle in args.angles} - {0.0})]
    parts, labels, facts = [], {}, {}
    for problem, label in problems(args):
        began = time.process_time()
        parts.append(compare(problem, degrees, args.resamples, args.seed))
        labels[problem.name] = label
        facts[problem.name] = problem.facts | {
            "eigenvalues": problem.eigenvalue.tolist(),
            "noise": problem.noise.tolist(),
            **problem.options,
            "distance_sq": problem.distance_sq,
            "replica_cpu_seconds": round(time.process_time() - began, 1),
        }
        print(f"{problem.name}: {facts[problem.name]['replica_cpu_seconds']} s of CPU time", flush=True)
    tables = Tables(*(pd.concat([getattr(part, name) for part in parts]) for name in Tables.__annotations__))
    write(args, tables, labels, facts)


def write(args: argparse.Namespace, tables: Tables, labels: dict[str, str], facts: dict[str, Any]) -> None:
    """All files of the results, and the findings on the terminal."""
    question = "How do the bound's terms move as gradient noise is turned against the Hessian?"
    args.output.mkdir(parents=True, exist_ok=True)
    for name in Tables.__annotations__:
        getattr(tables, name).to_csv(args.output / f"{name}.csv", index=False, float_format="%.6g")
    style.save(draw(tables.terms, tables.curves, labels), args.output / "misalignment")
    lines = findings(tables)
    (args.output / "findings.md").write_text(
        "\n".join([question, "", *(f"- {line}" for line in lines)]) + "\n", encoding="utf-8"
    )
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    record = {
        "question": question,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "settings": settings,
        "problems": facts,
    }
    (args.output / "settings.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print("\n".join(lines))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
