"""The problems of misalignment.py: a minimum, noise there that can be turned, and replicas around it."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.curvature import EmpiricalRisk, Hessian, gradient_projections, lanczos
from robustdyn.data.digits import read_digits
from robustdyn.replicas import MomentumUpdate, StackedNetwork
from robustdyn.theory import (
    MomentumDynamics,
    correlated_noise,
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
