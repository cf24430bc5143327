"""Tests that the documentation names everything public, and nothing else."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWN = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
PACKAGES = [name for name in SHOWN if name.count(".") == 1]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_shows_every_public_name(package):
    """A package's entry shows its names, except a function with the same name as its module."""
    module = importlib.import_module(package)
    modules = {entry.name for entry in pkgutil.iter_modules(module.__path__)}
    hidden = {f"{package}.{name}.{name}" for name in module.__all__ if name in modules}
    assert hidden == {name for name in SHOWN if name.startswith(f"{package}.")}


def test_the_reference_shows_every_package_that_works_without_hydra():
    public = {
        "curvature",
        "theory",
        "attacks",
        "models",
        "data",
        "methods",
        "measure",
        "evaluation",
        "records",
    }
    assert {f"robustdyn.{name}" for name in public | {"replicas"}} == set(PACKAGES)
