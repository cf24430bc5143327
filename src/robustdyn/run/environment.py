"""Records what a run was made with: versions, hardware and code revision."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import lightning
import torch

from robustdyn.records.run_directory import RunDirectory

PACKAGES = ("lightning", "hydra-core", "torchmetrics", "numpy", "scipy")


def write_environment(run_dir: Path, trainer: lightning.Trainer, model: torch.nn.Module) -> None:
    """Write ``environment.json`` into the run directory; a resumed run keeps that of earlier sessions."""
    accelerator = trainer.strategy.root_device
    facts: dict[str, object] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": versions(*PACKAGES),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(accelerator) if accelerator.type == "cuda" else accelerator.type,
        "devices": trainer.world_size,
        "code_revision": _revision(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    run = RunDirectory(run_dir)
    before = run.read_environment()
    if before is not None:  # None if a killed process left only half of it
        facts["earlier_sessions"] = [*before.pop("earlier_sessions", []), before]
    run_dir.mkdir(parents=True, exist_ok=True)
    run.environment.write_text(json.dumps(facts, indent=2) + "\n")


def versions(*others: str) -> dict[str, str]:
    """Versions of robustdyn, torch and other packages."""
    build = str(torch.__version__)  # names CUDA or CPU, which the package's version may leave out
    return {"robustdyn": version("robustdyn"), "torch": build, **{name: version(name) for name in others}}


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def processor() -> str:
    """The processor's name, if the system provides it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _revision() -> str | None:
    """Git commit of the code, with ``-dirty`` for uncommitted changes; None for an installed wheel."""
    checkout = Path(__file__).resolve().parents[3]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
