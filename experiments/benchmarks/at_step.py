"""A training step of PGD-10 adversarial training: robustdyn under Lightning against the studies' loops.

First the mathematics is compared in float64: the weights after some steps from the same weights, batches and
starting noise. Then the variants take turns in one process. Ours are the real LightningModule's steps under a
real Trainer, whose time runs from the end of one batch to the end of the next, with loading and all of
Lightning's overhead; the studies' loops are given their batches. Beside each of ours stands its limit: the
passes through the network that the mathematics needs and nothing else, in the same precision, memory layout
and compilation.

    python experiments/benchmarks/at_step.py [--width 16] [--rounds 7] [--no-compile] [--device auto]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import common
import hydra
import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from study_loops import (
    EPS,
    SEED,
    STEP,
    RobustOverfitting,
    StudyNetwork,
    WeightPerturbation,
    chosen_device,
    kernels,
    markdown,
    network,
    now,
    write_images,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.data import ImageDataModule
from robustdyn.defaults import config_dir
from robustdyn.methods.execution import Execution
from robustdyn.methods.metrics import RobustMetrics
from robustdyn.models.modes import frozen_parameters, mode
from robustdyn.run.config import build
from robustdyn.run.parts import build_module

WARM = 10  # steps that every variant's starting weights have seen
EXACT = ("trainer.precision=64-true", "execution.channels_last=false")
STUDIES: Mapping[str, type[RobustOverfitting]] = {
    "at": RobustOverfitting,
    "awp": WeightPerturbation,
}
STUDY_NAMES = {"at": "robust-overfitting study", "awp": "AWP study"}
EXECUTIONS = {
    "default": "float32",
    "bf16": "bf16",
    "compiled": "float32 compiled",
    "fast": "bf16 compiled",
    "graphs": "bf16 compiled, CUDA graphs",
}
METHODS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cpu": {"at": ("default", "bf16", "compiled", "fast"), "awp": ("default", "bf16", "fast")},
    "cuda": {"at": ("default", "bf16", "fast", "graphs"), "awp": ("default", "fast")},
}
NAMES = {"at": "AT", "awp": "AWP"}
BARE = "bare loop, AT, float32"
TARGETS = {
    "cpu": {("at", "default"): 1.6, ("at", "bf16"): 3.3, ("at", "fast"): 4.0, ("awp", "default"): 1.25},
    "cuda": {("at", "fast"): 4.0},
}
LIMIT_TARGETS = {"cpu": 0.85, "cuda": 0.85}
LIGHTNING_TARGET = 1.03
TOLERANCE = 1e-9  # float64, rounding grown over some steps


def ours(method: str, execution: str) -> str:
    return f"ours, {NAMES[method]}, {EXECUTIONS[execution]}"


def overrides(
    root: Path,
    device: torch.device,
    *,
    method: str = "at",
    execution: str = "default",
    width: int,
    batch: int,
    steps: int,
) -> list[str]:
    """What ``robustdyn-train`` is asked: a run on the images in ``root``, without measurements."""
    chosen = ["execution=fast", "execution.compile=reduce-overhead"]
    found = [
        *("data=cifar10", f"data.root={root}", "data.partial=true", f"data.batch_size={batch}"),
        *(f"method={method}", "measure=none", "name=benchmark", f"seed={SEED}"),
        *(chosen if execution == "graphs" else [f"execution={execution}"]),
        *(f"model.width={width}", f"attack.steps={steps}"),
    ]
    if device.type == "cuda":
        return [*found, "deterministic=false", "+trainer.benchmark=true", "trainer.accelerator=gpu"]
    return [*found, "trainer.accelerator=cpu"]


def composed(asked: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose("train", list(asked))


def compose(root: Path, device: torch.device, *extra: str, batches: int, **sizes: Any) -> DictConfig:
    """The configuration of such a run whose epochs are so many batches."""
    asked = overrides(root, device, **sizes)
    return composed([*asked, f"data.train_size={sizes['batch'] * batches}", *extra])


class Laps(Callback):
    """Seconds from the end of one batch to the end of the next, and of them within the step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.lap = self.step = 0.0
        self._began = self._warm = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.step = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if batch_idx == 0:
            self._warm = now(self._device)
            return
        self.step += time.perf_counter() - self._began
        if trainer.is_last_batch:
            self.lap = (now(self._device) - self._warm) / batch_idx
            self.step /= batch_idx


class Ours:
    """A run that goes on by an epoch at a time; the epoch's first batch is not timed.

    Args:
        cfg: The run's configuration; a train split of two batches or more.
        start: Weights and buffers to start from.
        device: Where it trains.
    """

    def __init__(self, cfg: DictConfig, start: Mapping[str, Tensor], device: torch.device) -> None:
        self.cfg = cfg
        self.kernels = {"deterministic": cfg.deterministic, "benchmark": device.type == "cuda"}
        data: ImageDataModule = build(cfg, "data")
        data.prepare_data()
        data.setup("fit")
        self.data = data
        self.module = build_module(cfg, data)
        self.module.model.load_state_dict(start)
        self.laps = Laps(device)
        with kernels(**self.kernels):
            self.trainer: lightning.Trainer = build(
                cfg,
                "trainer",
                max_epochs=0,
                limit_val_batches=0,
                callbacks=[self.laps],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
            )
        self.steps: list[float] = []

    def seconds(self) -> float:
        """Of a batch, from the end of the one before to its own."""
        self.trainer.fit_loop.max_epochs = self.trainer.current_epoch + 1
        with kernels(**self.kernels):
            self.trainer.fit(self.module, datamodule=self.data)
        self.steps.append(self.laps.step)
        return self.laps.lap


class Limit:
    """The passes that a step cannot do without, through our network as it is executed: nothing else.

    The attack's forward passes and its backward passes to the images; for the descent, and for a weight
    perturbation's ascent, a forward pass and a backward pass to the weights each. Train mode.

    Args:
        of: Whose network; its device and its kernels.
        descents: Backward passes to the weights: 1, or 2 with a perturbation.
        batches: Steps that are timed.
        device: Where.
    """

    def __init__(self, of: Ours, descents: int, batches: int, device: torch.device) -> None:
        self._of, self._descents, self._batches, self._device = of, descents, batches, device
        batch = of.data.split("train").batch(torch.arange(of.data.batch_size))
        self._images = of.module.execution.images(batch.images).to(device)
        self._targets = batch.targets.to(device)
        self._half = of.cfg.trainer.precision == "bf16-mixed"

    def seconds(self) -> float:
        model = self._of.module.model.to(self._device).train()
        with kernels(**self._of.kernels):
            self._step(model)
            started = now(self._device)
            for _ in range(self._batches):
                self._step(model)
            return (now(self._device) - started) / self._batches

    def _step(self, model: nn.Module) -> None:
        execution = self._of.module.execution
        with execution.step(len(self._images), "train"):
            with (
                torch.autocast(self._device.type, torch.bfloat16, enabled=self._half),
                frozen_parameters(model),
            ):
                for _ in range(self._of.cfg.attack.steps):
                    images = self._images.requires_grad_(True)
                    self._gradient(execution.repeated(model), images, [images])
            self._images.requires_grad_(False)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                for _ in range(self._descents):
                    self._gradient(model, self._images, list(model.parameters()))

    def _gradient(self, model: nn.Module, images: Tensor, of: Sequence[Tensor]) -> None:
        loss = F.cross_entropy(model(images), self._targets)
        with torch.autocast(self._device.type, enabled=False):
            torch.autograd.grad(loss, of)


class BareLoop:
    """Ours in float32 without Lightning: the same batches, attack, passes, optimiser and metrics."""

    def __init__(self, cfg: DictConfig, start: Mapping[str, Tensor], device: torch.device) -> None:
        self._device = device
        self._kernels = {"deterministic": cfg.deterministic, "benchmark": device.type == "cuda"}
        data: ImageDataModule = build(cfg, "data")
        data.setup("fit")
        self._batches = data.train_dataloader()
        self._batches.data = self._batches.data.to(device)
        self.model: nn.Module = build(cfg, "model")
        self.model.load_state_dict(start)
        self.model.to(device)
        self._execution: Execution = build(cfg, "execution")
        self._execution.prepare(self.model)
        self._attack: PGD = build(cfg, "attack.train")
        self._optimizer: torch.optim.Optimizer = build(cfg, "optimizer")(self.model.parameters())
        self._metrics = RobustMetrics().to(device)
        self._done = 0

    def seconds(self) -> float:
        with kernels(**self._kernels):
            for number, batch in enumerate(self._batches):
                self._step(self._execution.images(batch.images), batch.targets)
                if number == 0:
                    started = now(self._device)
            return (now(self._device) - started) / number

    def _step(self, images: Tensor, targets: Tensor) -> None:
        self.model.train()
        draws = streams.generator(SEED, "attack", self._done, 0, device=self._device)
        logits = self.model(self._attack.perturb(self.model, images, targets, draws))
        loss = F.cross_entropy(logits, targets)
        self._metrics.robust.update(logits.detach(), targets)
        with torch.no_grad(), mode(self.model, training=False):
            self._metrics.clean.update(self.model(images), targets)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._done += 1


class Study:
    """A study's loop on batches that lie ready; the first of every round is not timed."""

    def __init__(
        self,
        loop: RobustOverfitting,
        batches: Sequence[tuple[Tensor, Tensor]],
        device: torch.device,
        *,
        tf32: bool = True,
    ) -> None:
        self.loop, self._batches, self._device, self._tf32 = loop, batches, device, tf32

    def seconds(self) -> float:
        with kernels(deterministic=False, benchmark=self._device.type == "cuda", tf32=self._tf32):
            for number, (images, targets) in enumerate(self._batches):
                self.loop.step(images, targets)
                if number == 0:
                    started = now(self._device)
            return (now(self._device) - started) / number


class ImagesKept(RobustOverfitting):
    """The study's loop with one rounding done as ours does it: the attack holds x + δ instead of δ."""

    def adversarial(self, images: Tensor, targets: Tensor) -> Tensor:
        noise = torch.zeros_like(images).uniform_(-EPS, EPS, generator=self.draws)
        attacked = torch.clamp(images + noise, 0, 1)
        low, high = torch.clamp(images - EPS, min=0), torch.clamp(images + EPS, max=1)
        for _ in range(self.steps):
            attacked = attacked.detach().requires_grad_(True)
            F.cross_entropy(self.model(self.normalize(attacked)), targets).backward()
            assert attacked.grad is not None
            attacked = torch.clamp(attacked.detach() + STEP * attacked.grad.sign(), low, high)
        return self.normalize(attacked)


def study(
    loop: type[RobustOverfitting],
    width: int,
    steps: int,
    start: Mapping[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    metrics: bool = True,
) -> RobustOverfitting:
    """A study's loop on a network with these weights."""
    model = network(width, StudyNetwork)
    model.load_state_dict(start)
    return loop(model=model.to(device, dtype), steps=steps, metrics=metrics)


def batches_of(data: ImageDataModule, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The training batches of epoch 0."""
    return [(batch.images.to(device), batch.targets.to(device)) for batch in data.train_dataloader()]


def warmed(width: int, batches: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Weights and buffers after some steps on FGSM-like examples."""
    loop = RobustOverfitting(model=network(width, StudyNetwork).to(device), steps=1)
    for number in range(WARM):
        loop.step(*batches[number % len(batches)])
    return {name: value.detach().cpu().clone() for name, value in loop.model.state_dict().items()}


@contextmanager
def images_in(data_root: Path | None, train: int, test: int) -> Iterator[Path]:
    """The folder of CIFAR-10's files, or made-up ones for as long as the scope lasts."""
    if data_root is not None:
        yield data_root
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), train, test)
        yield Path(folder)


def differences(
    root: Path, method: str, start: Mapping[str, Tensor], *, width: int, batch: int, steps: int, updates: int
) -> dict[str, float]:
    """Greatest differences to the study's loop after some float64 steps, relative to the greatest entry."""
    cpu = torch.device("cpu")
    cfg = compose(
        root,
        cpu,
        *EXACT,
        method=method,
        width=width,
        batch=batch,
        batches=updates,
        steps=steps,
    )
    run = Ours(cfg, start, cpu)
    batches = [(images.double(), targets) for images, targets in batches_of(run.data, cpu)]
    run.seconds()
    mine = run.module.model.state_dict()
    learned = {key for key, _ in run.module.model.named_parameters()}

    def found(kind: type[RobustOverfitting], *, weights: bool) -> float:
        # the passes for restarts and metrics move the running statistics, and nothing else
        loop = study(kind, width, steps, start, device=cpu, dtype=torch.float64, metrics=weights)
        for number, (images, targets) in enumerate(batches):
            loop.draws = streams.generator(SEED, "attack", number, 0)
            loop.step(images, targets)
        theirs = loop.model.state_dict()
        return max(relative_difference(mine[k], theirs[k]) for k in theirs if (k in learned) == weights)

    result = {
        "weights": found(STUDIES[method], weights=True),
        "running statistics, without the study's passes for restarts and metrics": found(
            STUDIES[method], weights=False
        ),
    }
    if method == "at":
        result["weights, the study's attack holding images"] = found(ImagesKept, weights=True)
    return result


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """What ``compose`` asks of a run that is timed; its epochs begin with a batch that is not."""
    return {
        "width": args.width,
        "batch": args.batch,
        "batches": 1 + args.batches,
        "steps": args.steps,
    }


def variants(
    root: Path, start: Mapping[str, Tensor], args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Callable[[], float]], dict[str, Ours]]:
    """What takes turns, and which of it are ours."""
    settings = sizes(args)
    calls: dict[str, Callable[[], float]] = {}
    runs: dict[str, Ours] = {}
    for method, executions in METHODS[device.type].items():
        for execution in executions:
            if args.compile or execution in ("default", "bf16"):
                name = ours(method, execution)
                cfg = compose(root, device, method=method, execution=execution, **settings)
                runs[name] = Ours(cfg, start, device)
        batches = batches_of(runs[ours(method, "default")].data, device)
        calls[STUDY_NAMES[method]] = Study(
            study(STUDIES[method], args.width, args.steps, start, device=device), batches, device
        ).seconds
        if device.type == "cuda":  # PyTorch's default lets cuDNN round convolutions to TensorFloat-32
            calls[f"{STUDY_NAMES[method]}, TF32 off"] = Study(
                study(STUDIES[method], args.width, args.steps, start, device=device),
                batches,
                device,
                tf32=False,
            ).seconds
    for name, run in runs.items():
        calls[name] = run.seconds
        calls[limit_of(name)] = Limit(run, 2 if NAMES["awp"] in name else 1, args.batches, device).seconds
    calls[BARE] = BareLoop(compose(root, device, **settings), start, device).seconds
    return calls, runs


def limit_of(name: str) -> str:
    return f"limit of {name}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def ratio(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Median and range of seconds to the baseline's, round by round."""
    return spread([time / base for time, base in zip(times, baseline, strict=True)])


def summarise(
    seconds: Mapping[str, list[float]], runs: Mapping[str, Ours], device: torch.device
) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name, times in seconds.items():
        summary[name] = {"seconds": spread(times)}
    targets: dict[str, Any] = {}
    for method, executions in METHODS[device.type].items():
        for execution in executions:
            name = ours(method, execution)
            if name not in runs:
                continue
            faster = ratio(seconds[STUDY_NAMES[method]], seconds[name])
            limit = ratio(seconds[limit_of(name)], seconds[name])
            summary[name] |= {f"times as fast as the {STUDY_NAMES[method]}": faster, "limit / ours": limit}
            if device.type == "cpu":
                within = runs[name].steps[-len(seconds[name]) :]
                summary[name]["share within the step"] = ratio(within, seconds[name])
            if (method, execution) in TARGETS[device.type]:
                at_least = TARGETS[device.type][method, execution]
                targets[f"{name}: speed-up"] = common.verdict(faster["median"], at_least=at_least)
            targets[f"{name}: limit"] = common.verdict(limit["median"], at_least=LIMIT_TARGETS[device.type])
    cost = ratio(seconds[ours("at", "default")], seconds[BARE])
    summary[ours("at", "default")]["times the bare loop"] = cost
    targets["cost of Lightning"] = common.verdict(cost["median"], at_most=LIGHTNING_TARGET)
    summary["targets"] = targets
    return summary


def table(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, values in summary.items():
        if not (isinstance(values, dict) and "seconds" in values) or name.startswith("limit"):
            continue
        faster = next((v for k, v in values.items() if k.startswith("times as fast")), None)
        found = (values["seconds"], faster, values.get("limit / ours"))
        rows.append([name, *map(cell, found)])
    return markdown(["", "s a step", "times as fast as the study", "limit / ours"], rows)


def cell(values: Mapping[str, float] | None) -> str:
    """Median [range], for a table."""
    return f"{values['median']:.3g} [{values['min']:.3g}–{values['max']:.3g}]" if values else ""


def add_arguments(parser: argparse.ArgumentParser, *, rounds: int, batches: int | None) -> None:
    """What the speed benchmarks ask; ``batches`` is None where whole epochs are timed."""
    parser.add_argument("--width", type=int, default=16, help="of the network; the papers' is 64")
    parser.add_argument("--batch", type=int, default=128, help="images of a step")
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--rounds", type=int, default=rounds, help="alternating rounds")
    if batches is not None:
        parser.add_argument("--batches", type=int, default=batches, help="timed batches of a round")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-10's files; else images are made up")


def told(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The arguments as a result's settings."""
    chosen = {key: value for key, value in vars(args).items() if key != "data_root"}
    return {**chosen, "device": str(device), "images": "CIFAR-10" if args.data_root else "made up"}


@contextmanager
def compiling() -> Iterator[None]:
    """Compiled code in a folder of its own, so that compiling takes what it takes the first time."""
    torch._dynamo.config.recompile_limit = 64  # the networks share code, and the limit of 8 goes by code
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            before = os.environ.get(name)
            os.environ[name] = f"{folder}/{name.lower()}"
            if before is None:
                stack.callback(os.environ.pop, name)
            else:
                stack.callback(os.environ.__setitem__, name, before)
        yield


def compiled_graphs() -> int:
    """How many have been compiled so far in this process."""
    return int(counters["stats"]["unique_graphs"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, rounds=7, batches=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--updates", type=int, default=4, help="float64 steps that are compared")
    parser.add_argument("--compared", type=int, default=32, help="images of a step that is compared")
    args = parser.parse_args(arguments)
    common.quiet()
    device = chosen_device(args.device)
    images = max(args.batch * (1 + args.batches), args.compared * args.updates)
    with images_in(args.data_root, images, args.batch) as root, compiling():
        data: ImageDataModule = build(compose(root, device, **sizes(args)), "data")
        start = warmed(args.width, batches_of(data, device), device)
        found = {
            STUDY_NAMES[method]: differences(
                root,
                method,
                start,
                width=args.width,
                batch=args.compared,
                steps=args.steps,
                updates=args.updates,
            )
            for method in STUDIES
        }
        print(f"relative differences after {args.updates} float64 steps: {found}")
        if max(max(values.values()) for values in found.values()) > TOLERANCE:
            raise SystemExit(
                "ours and the studies' loops do not do the same mathematics: no times are compared"
            )

        calls, runs = variants(root, start, args, device)
        compilation = {}
        for name, call in calls.items():
            graphs, began = compiled_graphs(), time.perf_counter()
            lap = call()
            if compiled_graphs() > graphs:
                compilation[name] = round(time.perf_counter() - began - lap * (1 + args.batches), 1)
            print(f"warmed up in {time.perf_counter() - began:.1f} s: {name}", flush=True)
        graphs = compiled_graphs()
        times = common.alternate(calls, args.rounds)
        again = compiled_graphs() - graphs
    summary = summarise(times, runs, device)
    summary["relative differences to the study in float64"] = found
    summary["seconds of compiling"] = compilation
    summary["graphs compiled during the rounds"] = again
    common.write_result(
        Path(__file__).stem + ("_gpu" if device.type == "cuda" else ""),
        question="A step of adversarial training: ours against the studies' loops and against its limit",
        settings=told(args, device),
        summary=summary,
        rounds=times,
    )
    print(table(summary))


if __name__ == "__main__":
    main()
