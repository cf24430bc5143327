"""The training loops of two studies, rewritten as the baseline of the speed benchmarks.

Robust overfitting (Rice et al., ICML 2020) and adversarial weight perturbation (Wu et al., NeurIPS 2020): the
work that their public code does in a step and in an epoch, in its order, and in PyTorch's plain settings.
Also what the speed benchmarks share: images, the clock and the table.
"""

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from robustdyn.models import PreActResNet

SEED, CLASSES, SIZE = 0, 10, 32
EPS, STEP = 8 / 255, 2 / 255
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # the study's, of CIFAR-10
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
PADDING = 4
PROXY_LR, GAMMA, TINY = 0.01, 0.01, 1e-20  # of the weight perturbation


def into_range(delta: Tensor, images: Tensor) -> Tensor:
    """The perturbation cut off where a pixel would leave [0, 1]."""
    return torch.max(torch.min(delta, 1 - images), 0 - images)


class StudyNetwork(PreActResNet):
    """The same network without the input normalisation inside: the studies normalise in their loops."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.layers(self.conv1(x))))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def network(width: int, kind: type[PreActResNet] = PreActResNet, seed: int = SEED) -> PreActResNet:
    """PreActResNet-18 of this width, its weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(
            num_classes=CLASSES,
            in_channels=3,
            width=width,
            blocks=(2, 2, 2, 2),
            strides=(1, 2, 2, 2),
            mean=MEAN,
            std=STD,
        )


@dataclass
class Sums:
    """Losses and numbers of right answers, added up on the host after every batch."""

    examples: int = 0
    robust_loss: float = 0.0
    robust_right: float = 0.0
    clean_loss: float = 0.0
    clean_right: float = 0.0

    def add(
        self, robust: Tensor, robust_loss: Tensor, clean: Tensor, clean_loss: Tensor, targets: Tensor
    ) -> None:
        self.robust_loss += robust_loss.item() * len(targets)
        self.robust_right += (robust.max(1)[1] == targets).sum().item()
        self.clean_loss += clean_loss.item() * len(targets)
        self.clean_right += (clean.max(1)[1] == targets).sum().item()
        self.examples += len(targets)


@dataclass(kw_only=True)
class RobustOverfitting:
    """Adversarial training as the robust-overfitting study's code carries it out.

    Every attack step computes the gradients of the weights too; every pass normalises with the batch, moves
    the running statistics and builds a graph; a further pass selects among restarts, and clean images pass
    once more after the step for the metrics; numbers go to the host after every batch.

    Attributes:
        model: Network of normalised images.
        steps: Of the attack.
        epochs: Of the whole run, which the learning rate's decay refers to.
        restarts: Of the attack.
        draws: Of the attack's starting noise; None for PyTorch's global generator.
        metrics: Whether to make the two passes that only restarts and metrics need, which move the running
            statistics too: the selection's, and that of the clean images.
    """

    model: nn.Module
    steps: int
    epochs: int = 200
    restarts: int = 1
    draws: torch.Generator | None = None
    metrics: bool = True
    sums: Sums = field(default_factory=Sums)

    def __post_init__(self) -> None:
        first = next(self.model.parameters())
        self._mean = torch.tensor(MEAN).view(3, 1, 1).to(first)
        self._std = torch.tensor(STD).view(3, 1, 1).to(first)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )

    def rate(self, epoch: float) -> float:
        """Piecewise constant: a tenth from half of the epochs on, a hundredth from three quarters on."""
        part = epoch / self.epochs
        return LR if part < 0.5 else LR / 10 if part < 0.75 else LR / 100

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self._mean) / self._std

    def attack(self, images: Tensor, targets: Tensor) -> Tensor:
        """δ (B, C, H, W): of all restarts the one with the greatest loss, example by example."""
        greatest = torch.zeros(len(targets)).to(images)
        chosen = torch.zeros_like(images)
        for _ in range(self.restarts):
            delta = torch.zeros_like(images).uniform_(-EPS, EPS, generator=self.draws)
            delta = into_range(delta, images)
            delta.requires_grad = True
            for _ in range(self.steps):
                loss = F.cross_entropy(self.model(self.normalize(images + delta)), targets)
                loss.backward()
                assert delta.grad is not None
                moved = torch.clamp(delta.detach() + STEP * torch.sign(delta.grad.detach()), -EPS, EPS)
                delta.data[:] = into_range(moved, images)
                delta.grad.zero_()
            if not self.metrics:
                return delta.detach()
            logits = self.model(self.normalize(images + delta))
            losses = F.cross_entropy(logits, targets, reduction="none").detach()
            chosen[losses >= greatest] = delta.detach()[losses >= greatest]
            greatest = torch.max(greatest, losses)
        return chosen

    def adversarial(self, images: Tensor, targets: Tensor) -> Tensor:
        """Attacked images, normalised."""
        return self.normalize(torch.clamp(images + self.attack(images, targets), 0.0, 1.0))

    def step(self, images: Tensor, targets: Tensor, epoch: float = 0.0) -> None:
        """One training step on images (B, C, H, W) in [0, 1]; ``epoch`` with its fraction sets the rate."""
        self.model.train()
        self.optimizer.param_groups[0].update(lr=self.rate(epoch))
        robust, robust_loss = self.descend(self.adversarial(images, targets), targets)
        if self.metrics:
            clean = self.model(self.normalize(images))
            self.sums.add(robust, robust_loss, clean, F.cross_entropy(clean, targets), targets)

    def descend(self, adversarial: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The optimiser's step; logits and loss."""
        robust = self.model(adversarial)
        loss = F.cross_entropy(robust, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return robust, loss

    def evaluate(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Sums:
        """Robust and clean loss and error, with graphs as in training, in eval mode."""
        self.model.eval()
        sums = Sums()
        for images, targets in batches:
            robust = self.model(self.adversarial(images, targets))
            clean = self.model(self.normalize(images))
            losses = F.cross_entropy(robust, targets), F.cross_entropy(clean, targets)
            sums.add(robust, losses[0], clean, losses[1], targets)
        return sums


@dataclass(kw_only=True)
class WeightPerturbation(RobustOverfitting):
    """The same loop with the adversarial weight perturbation's code: a proxy network finds the direction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._proxy = copy.deepcopy(self.model)
        self._proxy_optimizer = torch.optim.SGD(self._proxy.parameters(), lr=PROXY_LR)

    def descend(self, adversarial: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """At w + v; v comes off after the optimiser's step."""
        moves = self.perturbation(adversarial, targets)
        self.move(moves, GAMMA)
        result = super().descend(adversarial, targets)
        self.move(moves, -GAMMA)
        return result

    def perturbation(self, adversarial: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """One ascent step of the proxy; its way in every weight tensor, as long as the tensor."""
        self._proxy.load_state_dict(self.model.state_dict())
        self._proxy.train()
        loss = -F.cross_entropy(self._proxy(adversarial), targets)
        self._proxy_optimizer.zero_grad()
        loss.backward()
        self._proxy_optimizer.step()
        moves = {}
        old, new = self.model.state_dict(), self._proxy.state_dict()
        for name, weight in old.items():
            if weight.dim() > 1 and "weight" in name:
                way = new[name] - weight
                moves[name] = weight.norm() / (way.norm() + TINY) * way
        return moves

    @torch.no_grad()
    def move(self, moves: dict[str, Tensor], factor: float) -> None:
        for name, parameter in self.model.named_parameters():
            if name in moves:
                parameter.add_(factor * moves[name])


class CroppedAndFlipped(Dataset[tuple[NDArray[np.float32], int]]):
    """Images one by one, each cut out of its padded self and mirrored, with the epoch's choices.

    Args:
        images: uint8, (N, C, H, W).
        labels: (N,).
        augment: Whether to crop and flip.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, augment: bool) -> None:
        pixels = images.numpy().astype(np.float32) / 255
        self._size, self._augment = pixels.shape[-1], augment
        border = PADDING if augment else 0
        padded = np.pad(pixels, ((0, 0), (0, 0), (border, border), (border, border)), "reflect")
        self._pairs = list(zip(padded, labels.tolist(), strict=True))
        self._draws = np.random.default_rng(SEED)

    def draw(self) -> None:
        """Choices for an epoch, before the workers start."""
        self._corners = self._draws.integers(0, 2 * PADDING + 1, (len(self), 2))
        self._flips = self._draws.integers(0, 2, len(self))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], int]:
        image, label = self._pairs[index]
        if self._augment:
            top, left = self._corners[index]
            image = image[:, top : top + self._size, left : left + self._size]
            if self._flips[index]:
                image = image[:, :, ::-1].copy()
        return image, label


class StudyBatches:
    """A split as the study loads it: PyTorch's DataLoader, whose workers start again in every epoch."""

    def __init__(
        self, images: Tensor, labels: Tensor, batch: int, *, train: bool, workers: int, device: torch.device
    ) -> None:
        self._images = CroppedAndFlipped(images, labels, augment=train)
        self._device = device
        self._loader = DataLoader(
            self._images,
            batch_size=batch,
            shuffle=train,
            drop_last=train,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(SEED),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._images.draw()
        for images, labels in self._loader:
            yield images.to(self._device).float(), labels.to(self._device).long()


def study_epoch(study: RobustOverfitting, train: StudyBatches, test: StudyBatches, folder: Path) -> Sums:
    """One epoch: training, evaluation, the files that the study keeps of an epoch; the evaluation's sums."""
    study.sums = Sums()
    for number, (images, labels) in enumerate(train):
        study.step(images, labels, (number + 1) / len(train))
    evaluated = study.evaluate(iter(test))
    torch.save(study.model.state_dict(), folder / "model.pth")
    torch.save(study.optimizer.state_dict(), folder / "optimizer.pth")
    best = {"state_dict": study.model.state_dict(), "robust_right": evaluated.robust_right}
    torch.save(best, folder / "best.pth")
    return evaluated


def smooth_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, 32, 32) and labels (N,): blurred patterns, one for each class and one for each image."""
    draws = torch.Generator().manual_seed(seed)
    classes = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(SEED))
    labels = torch.arange(count) % CLASSES
    coarse = classes[labels] + torch.randn(count, 3, 4, 4, generator=draws)
    fine = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    return (127.5 + 50 * fine).clamp(0, 255).to(torch.uint8), labels


def write_images(root: Path, train: int, test: int) -> None:
    """So many smooth images in CIFAR-10's official binary layout."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    images, labels = smooth_images(train + test, SEED)
    records = torch.cat([labels[:, None].to(torch.uint8), images.flatten(1)], dim=1).numpy()
    files = [f"data_batch_{number}.bin" for number in range(1, 6)]
    for name, part in zip(files, np.array_split(records[:train], 5), strict=True):
        part.tofile(folder / name)
    records[train:].tofile(folder / "test_batch.bin")


def now(device: torch.device) -> float:
    """Seconds on the clock, when the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def chosen_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@contextlib.contextmanager
def kernels(*, deterministic: bool, benchmark: bool, tf32: bool = True) -> Iterator[None]:
    """PyTorch's global choice of kernels inside the scope, which every Trainer sets again when it is made.

    By PyTorch's default cuDNN may round the inputs of float32 convolutions to TensorFloat-32.
    """
    cudnn: Any = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.allow_tf32
    torch.use_deterministic_algorithms(deterministic)
    cudnn.benchmark, cudnn.allow_tf32 = benchmark, tf32
    # as robustdyn-train does
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark, cudnn.allow_tf32 = before[1:]


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; the first column to the left, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
