"""Everything to know about a GPU, in one command of six minutes: ``make gpu``.

Correctness: the tests marked ``gpu``, which compare training, measurement and evaluation with the CPU.
Steps: the robust-overfitting study's loop against ours, in every execution, on the full PreActResNet-18.
Products: with H, G and C, and the default measurement, against an epoch.

Each part is a process of its own, and what it has found so far is written after each of its steps. A part
that fails, hangs or has no time left leaves the others alone, and the result says why it is missing.

    python experiments/benchmarks/gpu.py [--budget 350] [--data-root FOLDER] [--device cpu --width 4 ...]
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import at_step
import common
import curvature_products
import measurement_cost
import torch
from curvature_problem import Problem, attacked
from study_loops import RobustOverfitting, chosen_device, kernels, markdown, network, now

from robustdyn.data import ImageDataModule
from robustdyn.methods.flops import bfloat16_peak, training_flops
from robustdyn.run.config import build

HERE = Path(__file__).resolve().parent
STUDY, STUDY_FULL = (
    "study's loop, TF32 in convolutions (PyTorch's default)",
    "study's loop, float32 throughout",
)
EXECUTIONS = {
    "default": "ours, float32, TF32 in convolutions",
    "bf16": "ours, bf16",
    "fast": "ours, fast (bf16, compiled)",
    "graphs": "ours, fast with CUDA graphs",
}
COMPILED = ("fast", "graphs")
FAST_TARGETS = {"times as fast as the study": 4.0, "share of the bare passes": 0.85}
EPOCH = 50_000  # images
SETTINGS = (
    *("width", "steps", "batches", "rounds", "batch_sizes", "examples", "measured_steps", "budget"),
    "compile",
)
SECONDS = {"correctness": 150, "compile": 150, "steps": 100, "curvature": 110}
"""The most that a part may take."""
LEAST = 20
"""Seconds without which no part is started."""

Found = dict[str, Any]


class Notes:
    """What a part has found so far, in a file that is complete at any time."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, Found()

    def __call__(self, name: str, value: Any) -> None:
        self.found[name] = value
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found))
        temporary.replace(self.path)


# ---------------------------------------------------------------------- the parts, each in its own process


def steps(args: argparse.Namespace, note: Notes) -> None:
    """Seconds of a training step, variant by variant."""
    device = chosen_device(args.device)
    sizes = at_step.sizes(args)
    torch._dynamo.config.recompile_limit = 64  # the networks share code, and the limit of 8 goes by code
    with at_step.images_in(args.data_root, args.batch * (1 + args.batches), args.batch) as root:
        data: ImageDataModule = build(at_step.compose(root, device, **sizes), "data")
        batches = at_step.batches_of(data, device)
        start = at_step.warmed(args.width, batches, device)

        def study(tf32: bool) -> Callable[[], float]:
            loop = at_step.study(RobustOverfitting, args.width, args.steps, start, device=device)
            return at_step.Study(loop, batches, device, tf32=tf32).seconds

        def ours(execution: str) -> at_step.Ours:
            return at_step.Ours(at_step.compose(root, device, execution=execution, **sizes), start, device)

        runs: dict[str, at_step.Ours] = {}

        def made(name: str) -> Callable[[], float]:
            if name in (STUDY, STUDY_FULL):
                return study(tf32=name == STUDY)
            if name.startswith("limit"):
                return at_step.Limit(runs[name.removeprefix("limit of ")], 1, args.batches, device).seconds
            runs[name] = ours(next(key for key, said in EXECUTIONS.items() if said == name))
            return runs[name].seconds

        names = [STUDY, STUDY_FULL]
        for execution, name in EXECUTIONS.items():
            if args.compile or execution not in COMPILED:
                names += [name, at_step.limit_of(name)]
        if args.only_compile:
            names = [EXECUTIONS[execution] for execution in COMPILED]
        calls: dict[str, Callable[[], float]] = {}
        for name in names:
            with surviving(name, note):
                began = time.perf_counter()
                call = made(name)
                call()
                note(f"{name}: seconds of the first steps", round(time.perf_counter() - began, 1))
                if args.only_compile:
                    continue
                lap(name, call, note)
                calls[name] = call
                if name == EXECUTIONS["default"]:
                    images, targets = batches[0]
                    note("flops of an image", training_flops(runs[name].module.to(device), images, targets))
        if args.only_compile:
            return
        for index in range(1, args.rounds):
            for name in list(calls)[:: -1 if index % 2 else 1]:
                with surviving(name, note):
                    lap(name, calls[name], note)


def lap(name: str, call: Callable[[], float], note: Notes) -> None:
    note(name, [*note.found.get(name, []), call()])


def curvature(args: argparse.Namespace, note: Notes) -> None:
    """Products in seconds and in gradients, and what the default measurement takes in a run."""
    device = chosen_device(args.device)
    with at_step.images_in(args.data_root, args.batch * args.measured_steps, args.batch) as root:
        with surviving("products", note):
            products(args, root, device, note)
        with surviving("measurement", note), tempfile.TemporaryDirectory() as folder:
            measurement(args, root, Path(folder) / "run", note)


def products(args: argparse.Namespace, root: Path, device: torch.device, note: Notes) -> None:
    asked = at_step.sizes(args) | {"batches": args.measured_steps}
    data: ImageDataModule = build(at_step.compose(root, device, **asked), "data")
    model = network(args.width)
    model.load_state_dict(at_step.warmed(args.width, at_step.batches_of(data, device), device))
    model.to(device).eval()
    batch = data.split("train").batch(torch.arange(args.examples))
    images, targets = batch.images.to(device), batch.targets.to(device)
    everything = torch.arange(args.examples, device=device)
    problem = Problem(model, attacked(model, images, targets, everything), targets, {})
    size = sum(parameter.numel() for parameter in model.parameters())
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    vector /= vector.norm()
    # the gradient as exact as the products, which switch TF32 off
    with kernels(deterministic=False, benchmark=device.type == "cuda", tf32=False):
        calls = curvature_products.hessians(problem, None) | curvature_products.others(problem, None)
        note("relative difference to an independent product", differences(problem, calls, vector))
        for name, call in calls.items():
            with surviving(name, note):
                call(vector)
                seconds = []
                for _ in range(args.rounds):
                    began = now(device)
                    call(vector)
                    seconds.append(now(device) - began)
                note(name, seconds)


def differences(
    problem: Problem, calls: Mapping[str, curvature_products.Product], vector: torch.Tensor
) -> dict[str, float] | str:
    try:
        return curvature_products.disagreements(problem, calls, vector)
    except SystemExit as refused:
        return f"failed: {refused}"


def measurement(args: argparse.Namespace, root: Path, run_dir: Path, note: Notes) -> None:
    """The default measurement within a run, after its second epoch from random starts, then warm."""
    asked = argparse.Namespace(
        root=root, width=args.width, train=args.batch * args.measured_steps, memory=None
    )
    measurement_cost.train(
        run_dir,
        asked,
        *("execution=bf16", "trainer.max_epochs=3", "schedule=constant", "measure.epochs=[1,2]"),
        *(f"data.batch_size={args.batch}", f"data.test_size={args.batch}", f"attack.steps={args.steps}"),
        f"measure.examples={args.examples}",
        f"trainer.accelerator={'gpu' if chosen_device(args.device).type == 'cuda' else 'cpu'}",
        *args.overrides,
    )
    for row in measurement_cost.rows(run_dir, "costs"):
        start = "cold" if row["epoch"] == 1 else "warm"
        kept = {key: row[key] for key in ("seconds", "products", "converged") if row[key] is not None}
        note(f"measurement, {start}: {row['part']}", kept)
    note(
        "model FLOP utilisation of the run",
        measurement_cost.rows(run_dir, "timing")[-1]["model_flop_utilisation"],
    )


@contextmanager
def surviving(name: str, note: Notes) -> Iterator[None]:
    """Notes what fails inside, and goes on."""
    try:
        yield
    except (Exception, SystemExit) as error:  # whatever a compiler or a driver raises
        note(f"{name}: failed", f"{type(error).__name__}: {error}"[-1500:])


PARTS: Mapping[str, Callable[[argparse.Namespace, Notes], None]] = {"steps": steps, "curvature": curvature}


# ---------------------------------------------------------------------- the whole


class Process:
    """A command that may take so many seconds, with what it says in a file."""

    def __init__(self, command: Sequence[str], seconds: float, said: Path) -> None:
        self._ends, self._said = time.monotonic() + seconds, said
        with said.open("w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish(self) -> str | None:
        """Wait for it; why it did not end well, else None."""
        try:
            status = self._process.wait(max(0.0, self._ends - time.monotonic()))
        except BaseException as error:
            os.killpg(self._process.pid, signal.SIGKILL)  # with what it has started
            self._process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "stopped, as its time was up"
        return f"exit status {status}: {self._said.read_text()[-1500:]}" if status else None


def tested(junit: Path) -> Found:
    """Outcome of every test in a file that pytest wrote, with the numbers that it recorded."""
    found = Found()
    for case in ElementTree.parse(junit).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = {"outcome": "passed" if bad is None else bad.tag}
        if bad is not None:
            outcome["said"] = bad.get("message", "")[:300]
        outcome |= {item.get("name", ""): item.get("value", "") for item in case.iter("property")}
        found[case.get("name", "")] = outcome
    return found


def said_so_far(log: Path) -> Found:
    """The outcomes in what pytest printed until it was stopped."""
    lines = re.findall(r"(PASSED|FAILED|ERROR|SKIPPED) \S*::(\S+)", log.read_text())
    return {name: {"outcome": outcome.lower()} for outcome, name in lines}


def whole(args: argparse.Namespace, write: Callable[[Found], None]) -> Found:
    """All parts within the budget; ``write`` gets the result after each."""
    ends, result = time.monotonic() + float(args.budget), Found()

    def left() -> float:
        return ends - time.monotonic()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def begun(name: str, limit: str, command: Sequence[str]) -> Process:
            return Process(command, min(SECONDS[limit], left()), folder / f"{name}.log")

        def part(kind: str, name: str, *more: str) -> Sequence[str]:
            options = (f"--part={kind}", f"--into={folder / name}.json", *more)
            return sys.executable, str(HERE / "gpu.py"), *args.given, *options

        junit = folder / "tests.xml"
        tests = begun("tests", "correctness", pytest_command(args, junit))
        # compiled code is kept on disk: made while the tests run, it is there when steps are timed
        compiling = [
            begun(
                f"compile_{batch}",
                "compile",
                part("steps", f"compile_{batch}", f"--batch={batch}", "--only-compile"),
            )
            for batch in (args.batch_sizes if args.compile else [])
        ]
        why = tests.finish()
        result["correctness"] = tested(junit) if junit.exists() else said_so_far(folder / "tests.log")
        result["correctness"] |= {"failed": why} if why else {}
        write(result)
        for process in compiling:
            process.finish()
        todo = [(f"steps of {size}", "steps", [f"--batch={size}"]) for size in args.batch_sizes]
        todo.insert(1, ("curvature", "curvature", []))
        for name, kind, more in todo:
            if left() < LEAST:
                result[name] = {"skipped": f"it needs {LEAST} s, and {left():.0f} s of the budget were left"}
            else:
                why = begun(name, kind, part(kind, name, *more)).finish()
                into = folder / f"{name}.json"
                result[name] = json.loads(into.read_text()) if into.exists() else {}
                result[name] |= {"failed": why} if why else {}
            write(result)
    return result


def pytest_command(args: argparse.Namespace, junit: Path) -> Sequence[str]:
    which = "not slow and not gpu" if args.device == "cpu" else "gpu"
    options = (f"--junitxml={junit}", "-p", "no:cacheprovider", "-m", which, "-vv", f"-n{args.jobs}")
    return sys.executable, "-m", "pytest", str(args.tests), *options


# ---------------------------------------------------------------------- what is said of it


def summary(result: Found, card: str) -> Found:
    """The table's numbers, from what the parts found."""
    said, peak = Found(), bfloat16_peak(card)
    for part, found in result.items():
        if not part.startswith("steps of "):
            continue
        batch = int(part.removeprefix("steps of "))
        rows = said[part] = Found()
        for name in (STUDY, STUDY_FULL, *EXECUTIONS.values()):
            if name not in found:
                continue
            speed = batch / median(found[name])
            row = rows[name] = {"images a second": round(speed, 1)}
            for against, base in (("the study", STUDY), ("the study without TF32", STUDY_FULL)):
                if base in found:
                    row[f"times as fast as {against}"] = ratio(found[base], found[name])
            limit = found.get(at_step.limit_of(name))
            if limit is not None:
                row["share of the bare passes"] = ratio(limit, found[name])
            if peak is not None and "flops of an image" in found:
                row["model FLOP utilisation"] = round(speed * found["flops of an image"] / peak, 4)
        fast = [rows[EXECUTIONS[key]] for key in COMPILED if EXECUTIONS[key] in rows]
        for aim, at_least in FAST_TARGETS.items():
            reached = [row[aim] for row in fast if aim in row]
            if reached:
                said[f"{part}: better of the fast ones, {aim}"] = common.verdict(
                    max(reached), at_least=at_least
                )
    found = result.get("curvature", {})
    gradient = found.get(curvature_products.GRADIENT)
    epochs = {
        name: EPOCH / row["images a second"]
        for name, row in said.get("steps of 128", {}).items()
        if name in (EXECUTIONS["default"], EXECUTIONS["fast"])
    }
    for name, value in found.items():
        seconds = median(value) if isinstance(value, list) else None
        if isinstance(value, dict) and "seconds" in value:
            seconds = value["seconds"]
        if seconds is None:
            continue
        row = {"seconds": round(seconds, 4)}
        if gradient and isinstance(value, list):
            row["gradients"] = ratio(value, gradient)
        row |= {
            f"per cent of an epoch, {run}": round(100 * seconds / epoch, 3) for run, epoch in epochs.items()
        }
        said.setdefault("curvature", Found())[name] = row
    cases = [case for case in result.get("correctness", {}).values() if isinstance(case, dict)]
    outcomes = [case["outcome"] for case in cases]
    said["tests"] = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    return said


def ratio(times: Sequence[float], of: Sequence[float]) -> float:
    return round(median(times) / median(of), 3)


def tables(said: Found) -> str:
    parts = []
    for part, rows in said.items():
        if (part != "curvature" and not part.startswith("steps of")) or "measured" in rows:
            continue
        heads = list(dict.fromkeys(head for row in rows.values() for head in row))
        lines = [[name, *(row.get(head, "") for head in heads)] for name, row in rows.items()]
        parts += [part, markdown(["", *heads], lines)]
    return "\n\n".join(parts)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    at_step.add_arguments(parser, rounds=3, batches=4)
    parser.set_defaults(width=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512], help="of the timed steps")
    parser.add_argument("--budget", type=float, default=350, help="seconds for everything")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--examples", type=int, default=256, help="measured")
    parser.add_argument(
        "--measured-steps", type=int, default=40, help="before products and in a measured epoch"
    )
    parser.add_argument(
        "--tests", type=Path, default=HERE.parents[1] / "tests" / "gpu", help="of correctness"
    )
    parser.add_argument("--jobs", type=int, default=6, help="processes for the tests of correctness")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the measured run")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only-compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.given = list(sys.argv[1:] if arguments is None else arguments)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    common.quiet()
    if args.part is not None:
        PARTS[args.part](args, Notes(args.into))
        return
    device = chosen_device(args.device)
    if device.type != "cuda" and args.device != "cpu":
        raise SystemExit("no GPU: PyTorch finds none; --device cpu tries the parts out, at a small size")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "dry run"
    began = time.monotonic()
    name = f"gpu_{card.lower().removeprefix('nvidia ').replace(' ', '_')}"

    def write(result: Found) -> None:
        common.write_result(
            name,
            question="Does this GPU compute what a CPU does, how fast are steps, what do measurements cost?",
            settings={
                **{key: vars(args)[key] for key in SETTINGS},
                "images": "CIFAR-10" if args.data_root else "made up",
                "seconds": round(time.monotonic() - began),
            },
            summary=summary(result, card) | {"found": result},
            silent=True,
        )

    result = whole(args, write)
    said = summary(result, card)
    print(tables(said))
    for part, value in said.items():
        if part == "tests" or "measured" in value:
            print(f"{part}: {value}")
    for part, found in result.items():
        for what in found:
            if what in ("skipped", "failed") or what.endswith(": failed"):
                print(f"{part}, {what}: {found[what]}")
    print(f"written to {common.RESULTS / name}.json after {time.monotonic() - began:.0f} s")
    if "failed" in result["correctness"]:
        raise SystemExit(f"not all tests of correctness passed: {result['correctness']['failed']}")


if __name__ == "__main__":
    main()
