"""One checkpoint in float32 and under bfloat16 autocast: input gradients, attacks and robust accuracy.

    python experiments/precision/effect.py RUN [RUN ...] --early RUN [RUN ...]

takes every run's best and last checkpoint, and the last one of the runs given as early, attacks the test
images with the PGD-20 of ``evaluation=quick`` in either precision, and evaluates what either attack made in
either precision. Another random start of the float32 attack is there to compare with. Weights are float32
throughout, as in training with ``trainer.precision=bf16-mixed``. Writes ``results/effect.json`` beside this
script and prints tables.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from scipy import stats
from torch import Tensor, nn

from robustdyn.attacks import PGD, summed_cross_entropy
from robustdyn.data import Batch, ImageDataModule, TensorBatches
from robustdyn.defaults import config_dir
from robustdyn.errors import DataFileError
from robustdyn.evaluation import Ball
from robustdyn.evaluation.evaluators import right
from robustdyn.methods.execution import Execution
from robustdyn.models import load_weights
from robustdyn.models.modes import frozen_parameters, mode
from robustdyn.records import Run, find_runs
from robustdyn.run.config import build
from robustdyn.run.environment import processor
from robustdyn.streams import generator

FLOAT, HALF = "float32", "bfloat16"
AGAIN = "float32, another start"
STAGES = {"best": "best_on_test", "last": "last"}
EARLY = "early"
HALFWAY = 10  # PGD-20 has been PGD-10 after so many steps


@contextmanager
def computed_in(precision: str, device: torch.device) -> Iterator[None]:
    """Forward passes in float32, or under autocast as Lightning's ``bf16-mixed`` arranges it."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == HALF, cache_enabled=False):
        yield


@dataclass(frozen=True)
class Pairs:
    """Two classifications of the same examples: 2×2 counts, and what they say of the difference.

    Attributes:
        examples: n.
        first: Examples right in the first.
        second: Examples right in the second.
        lost: Right in the first only.
        gained: Right in the second only.
    """

    examples: int
    first: int
    second: int
    lost: int
    gained: int

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> "Pairs":
        """From two bool tensors (n,)."""
        counts = (first, second, first & ~second, ~first & second)
        return cls(len(first), *(int(found.sum()) for found in counts))

    @classmethod
    def total(cls, parts: Iterable["Pairs"]) -> "Pairs":
        """Of several networks on their examples together."""
        summed = np.sum([list(vars(part).values()) for part in parts], axis=0)
        return cls(*(int(count) for count in summed))

    @property
    def difference(self) -> float:
        """Accuracy of the second − that of the first."""
        return (self.gained - self.lost) / self.examples

    @property
    def se(self) -> float:
        """Standard error of the difference of paired proportions: only discordant pairs contribute."""
        discordant = (self.lost + self.gained) / self.examples
        return float(np.sqrt((discordant - self.difference**2) / self.examples))

    @property
    def p_value(self) -> float:
        """Exact McNemar test: are discordant pairs as often of one kind as of the other?"""
        if not self.lost + self.gained:
            return 1.0
        return float(stats.binomtest(self.gained, self.lost + self.gained).pvalue)


def input_gradients(model: nn.Module, images: Tensor, targets: Tensor, precision: str) -> Tensor:
    """∇_x Σ cross-entropy at ``images`` (B, C, H, W), as an attack in this precision sees it."""
    images = images.detach().requires_grad_(True)
    with mode(model, training=False), frozen_parameters(model):
        with computed_in(precision, images.device):
            loss = summed_cross_entropy(model(images), targets)
        (gradient,) = torch.autograd.grad(loss, images)
    return gradient


def agreement(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Of gradients (B, C, H, W), per example: share of equal signs, and cosine; (B,) each."""
    same = (first.sign() == second.sign()).flatten(1).double().mean(dim=1)
    return same, F.cosine_similarity(first.flatten(1).double(), second.flatten(1).double())


def compare_gradients(model: nn.Module, batches: Iterable[Batch], pgd: PGD, seed: int) -> dict[str, Tensor]:
    """``sign`` and ``cosine``: ``agreement`` of the two precisions where the attack starts; (n,) each."""
    parts = []
    for index, batch in enumerate(batches):
        start = starting_point(pgd, batch, seed, index)
        gradients = (input_gradients(model, start, batch.targets, precision) for precision in (FLOAT, HALF))
        parts.append(agreement(*gradients))
    return {
        name: torch.cat(found)
        for name, found in zip(("sign", "cosine"), zip(*parts, strict=True), strict=True)
    }


def starting_point(pgd: PGD, batch: Batch, seed: int, index: int, stream: str = "precision") -> Tensor:
    """A random start (B, C, H, W) for the batch of this index."""
    return pgd.start(batch.images, generator(seed, stream, index, device=batch.images.device))


def logits_in(precision: str, model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, K) of a forward pass in this precision, as float32."""
    with torch.no_grad(), mode(model, training=False), computed_in(precision, images.device):
        logits: Tensor = model(images)
    return logits.float()


def attacked(
    model: nn.Module, batch: Batch, start: Tensor, pgd: PGD, precision: str
) -> tuple[Tensor, Tensor]:
    """Adversarial images after ``HALFWAY`` steps and after all of ``pgd``'s."""
    rest = replace(pgd, steps=pgd.steps - HALFWAY)
    with computed_in(precision, batch.images.device):
        half = replace(pgd, steps=HALFWAY).climb(model, batch.images, batch.targets, start)
        return half, rest.climb(model, batch.images, batch.targets, half)


def measure(model: nn.Module, batches: Iterable[Batch], pgd: PGD, seed: int) -> dict[str, Tensor]:
    """What becomes of each example: bool and float64 tensors (n,), by name.

    ``clean PRECISION`` and ``ATTACK / EVALUATION`` say which examples are classified as labelled, ``loss``
    with an attack's name is the cross-entropy after ``HALFWAY`` steps evaluated in float32, and ``tied`` says
    where the two greatest logits under autocast are equal, which argmax decides in favour of the class that
    comes first.
    """
    parts: dict[str, list[Tensor]] = {}

    def note(name: str, found: Tensor) -> None:
        parts.setdefault(name, []).append(found)

    for index, batch in enumerate(batches):
        x, y = batch.images, batch.targets
        start, another = (
            starting_point(pgd, batch, seed, index, stream) for stream in ("precision", "precision-again")
        )
        for precision in (FLOAT, HALF):
            note(f"clean {precision}", right(logits_in(precision, model, x), y))
        for attack, precision, begin in ((FLOAT, FLOAT, start), (HALF, HALF, start), (AGAIN, FLOAT, another)):
            halfway, end = attacked(model, batch, begin, pgd, precision)
            note(
                f"loss {attack}",
                F.cross_entropy(logits_in(FLOAT, model, halfway), y, reduction="none").double(),
            )
            for evaluation in (FLOAT, HALF):
                logits = logits_in(evaluation, model, end)
                note(f"{attack} / {evaluation}", right(logits, y))
                if (attack, evaluation) == (HALF, HALF):
                    top = logits.topk(2).values
                    note("tied", top[:, 0] == top[:, 1])
    return {name: torch.cat(found) for name, found in parts.items()}


REFERENCE = f"{FLOAT} / {FLOAT}"
VARIANTS = {  # what is compared with what: name -> (first, second)
    "clean, bf16 evaluation": (f"clean {FLOAT}", f"clean {HALF}"),
    "bf16 attack, float32 evaluation": (REFERENCE, f"{HALF} / {FLOAT}"),
    "bf16 attack, bf16 evaluation": (REFERENCE, f"{HALF} / {HALF}"),
    "float32 attack, bf16 evaluation": (REFERENCE, f"{FLOAT} / {HALF}"),
    "another start, all float32": (REFERENCE, f"{AGAIN} / {FLOAT}"),
}


def summary(found: Mapping[str, Tensor], gradients: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Counts, means and standard errors over the examples; ``gradients`` by split."""
    means = {f"{name}, {split}": part for split, own in gradients.items() for name, part in own.items()} | {
        f"loss {FLOAT}": found[f"loss {FLOAT}"]
    }
    for attack in (HALF, AGAIN):
        means[f"loss {attack} - {FLOAT}"] = found[f"loss {attack}"] - found[f"loss {FLOAT}"]
    return {
        "means": {name: _mean(part) for name, part in means.items()},
        "pairs": {name: vars(Pairs.of(*(found[key] for key in keys))) for name, keys in VARIANTS.items()},
        "tied": int(found["tied"].sum()),
    }


def _mean(part: Tensor) -> dict[str, float]:
    return {"mean": float(part.mean()), "se": float(part.std() / len(part) ** 0.5)}


# ---------------------------------------------------------------------- checkpoints


def checkpoints(runs: Sequence[Run], early: Sequence[Run]) -> Iterator[tuple[str, Run, Path]]:
    """(stage, run, file) of all that is to be measured.

    Raises:
        DataFileError: A run has no such checkpoint.
    """
    wanted = [(EARLY, run, STAGES["last"]) for run in early]
    wanted += [(stage, run, name) for run in runs for stage, name in STAGES.items()]
    for stage, run, name in wanted:
        path = run.path / "checkpoints" / f"{name}.ckpt"
        if not path.is_file():
            raise DataFileError(f"{path}: no such file; give a run that has written its checkpoints")
        yield stage, run, path


def of_checkpoint(run: Run, path: Path, seed: int) -> dict[str, Any]:
    """The summary of one checkpoint on its run's test images, in the run's ball, and what it is of."""
    cfg = OmegaConf.create(dict(run.config))
    data: ImageDataModule = build(cfg, "data")
    data.prepare_data()
    model: nn.Module = build(cfg, "model")
    load_weights(model, path, layout="robustdyn")
    execution = Execution(channels_last=cfg.execution.channels_last, compile="none")
    execution.prepare(model)
    evaluator = build(OmegaConf.create({"pgd20": OmegaConf.load(config_dir() / PGD20)}), "pgd20")
    pgd = evaluator.pgd(Ball(cfg.attack.norm, cfg.attack.eps_255 / 255))
    batches = {
        split: [
            Batch(execution.images(batch.images), *batch[1:])
            for batch in TensorBatches(data.split(split), cfg.data.eval_batch_size, rank=0, world_size=1)
        ]
        for split in ("test", "train")
    }
    gradients = {split: compare_gradients(model, own, pgd, seed) for split, own in batches.items()}
    epoch = torch.load(path, map_location="cpu", weights_only=True)["epoch"]
    about = {"data": run.choices["data"], "trained": run.choices["execution"], "seed": run.config["seed"]}
    return about | {"epoch": epoch} | summary(measure(model, batches["test"], pgd, seed), gradients)


PGD20 = Path("evaluation", "attack", "pgd20.yaml")


# ---------------------------------------------------------------------- tables


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Two tables, a row for each data set, training precision and stage: means and counts over networks."""
    grouped: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        grouped.setdefault((result["data"], result["trained"], result["stage"]), []).append(result)
    shown = {"sign, test": (100, 2), "cosine, test": (1, 4), "sign, train": (100, 2), "cosine, train": (1, 4)}
    shown |= {f"loss {FLOAT}": (1, 3)} | {f"loss {attack} - {FLOAT}": (1, 5) for attack in (HALF, AGAIN)}
    heads = ["data, trained in, stage", "epochs", *(name.replace("sign", "equal signs, %") for name in shown)]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for group, own in grouped.items():
        cells = [", ".join(group), _range([result["epoch"] for result in own])]
        for name, (scale, places) in shown.items():
            mean, se = _pooled(own, name)
            cells.append(f"{scale * mean:.{places}f} ± {scale * se:.{places}f}")
        lines.append(_line(cells))
    heads = ["data, trained in, stage", "examples", "float32 / float32, %", *VARIANTS, "tied"]
    lines += ["", _line(heads), _line(["---"] * len(heads))]
    for group, own in grouped.items():
        pairs = {name: Pairs.total(Pairs(**result["pairs"][name]) for result in own) for name in VARIANTS}
        robust = pairs["another start, all float32"]
        share = robust.first / robust.examples
        error = np.sqrt(share * (1 - share) / robust.examples)
        cells = [", ".join(group), str(robust.examples), f"{100 * share:.2f} ± {100 * error:.2f}"]
        cells += [
            f"{100 * pair.difference:+.2f} ± {100 * pair.se:.2f} (−{pair.lost} +{pair.gained})"
            for pair in pairs.values()
        ]
        lines.append(_line([*cells, str(sum(result["tied"] for result in own))]))
    return "\n".join(lines) + "\n"


def _pooled(results: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Mean over networks of equally many examples, and its standard error over examples."""
    means, errors = ([result["means"][name][key] for result in results] for key in ("mean", "se"))
    return float(np.mean(means)), float(np.linalg.norm(errors) / len(errors))


def _range(numbers: Sequence[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)}–{max(numbers)}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="+", type=Path, help="run or sweep directories")
    parser.add_argument(
        "--early", nargs="*", default=[], type=Path, help="the same, of runs of an epoch or two"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the attacks' random starts")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    arguments = parser.parse_args()
    early = find_runs(arguments.early) if arguments.early else []
    results = []
    for stage, run, path in checkpoints(find_runs(arguments.path), early):
        results.append({"stage": stage} | of_checkpoint(run, path, arguments.seed))
        print(f"{path.parent.parent.name}/{path.name}", flush=True)
    written = {
        "question": "What bfloat16 autocast does to input gradients, attacks and robust accuracy",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "seed": arguments.seed,
        "checkpoints": results,
    }
    arguments.output.mkdir(exist_ok=True)
    (arguments.output / "effect.json").write_text(json.dumps(written, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
