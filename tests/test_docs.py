"""Tests that the documentation names everything public, and nothing else."""

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import robustdyn

ROOT = Path(__file__).parents[1]
WITHOUT_PAGES = {"robustdyn.report.page"}  # the report's own parts


def hook(name):
    """A module of docs/hooks, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = hook("pages")
REFERENCE = PAGES.reference_pages()


def public_modules():
    """All modules with an ``__all__``, found by importing them."""
    found = [entry.name for entry in pkgutil.walk_packages(robustdyn.__path__, "robustdyn.")]
    sources = {name: Path(importlib.util.find_spec(name).origin) for name in found}
    return [name for name, path in sources.items() if re.search(r"(?m)^__all__ = ", path.read_text())]


@pytest.mark.parametrize("module", sorted({*public_modules(), *PAGES.public_names()} - WITHOUT_PAGES))
def test_the_reference_shows_every_public_name(module):
    """Each entry of a page names an object, and these are the objects in ``__all__``."""
    public = importlib.import_module(module)
    page = REFERENCE[".".join(module.split(".")[1:2]) or "robustdyn"]
    paths = re.findall(r"(?m)^::: (\S+)$", page)
    shown = {path.rpartition(".")[2]: path.rpartition(".")[0] for path in paths}
    for name in public.__all__:
        assert getattr(importlib.import_module(shown[name]), name) is getattr(public, name)


def test_the_site_has_every_page_of_the_reference():
    listed = re.findall(r"reference/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(REFERENCE)


def test_the_configuration_page_shows_every_file():
    page = PAGES.configuration_page()
    plain = re.sub(r"(?m)^    ", "", page)
    files = list((ROOT / "conf").rglob("*.yaml"))
    assert files
    for path in files:
        assert path.read_text().rstrip() in plain
        assert f"`{path.relative_to(ROOT / 'conf').with_suffix('').as_posix()}`" in page
