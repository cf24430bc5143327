"""Tests the wheel by itself, in an empty folder: the commands find their configuration and train."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from hatchling.build import build_wheel

from tests.runs import tiny_but

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel; pip adds only the scripts."""
    folder = tmp_path_factory.mktemp("wheel")
    with contextlib.chdir(ROOT):  # where a build begins
        wheel = build_wheel(str(folder))
    with ZipFile(folder / wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site, folder, *arguments):
    """Run a command in ``folder``; the wheel takes precedence over an editable installation."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "robustdyn", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_carries_the_configuration_once(site):
    shipped, ours = site / "robustdyn" / "conf", ROOT / "conf"
    assert {path.relative_to(shipped) for path in shipped.rglob("*.yaml")} == {
        path.relative_to(ours) for path in ours.rglob("*.yaml")
    }
    assert (site / "robustdyn" / "py.typed").exists()


def test_carries_the_published_curves(site):
    folder = Path("report") / "references"
    ours = {path.name for path in (ROOT / "src" / "robustdyn" / folder).iterdir()}
    assert {path.name for path in (site / "robustdyn" / folder).iterdir()} == ours
    assert "cifar10_standard.csv" in ours


def test_carries_the_launcher_where_hydra_looks_for_it(site):
    assert (site / "hydra_plugins" / "robustdyn_slurm" / "launcher.py").exists()
    assert not (site / "hydra_plugins" / "__init__.py").exists()  # other distributions share the namespace


def test_trains_in_an_empty_folder_and_reports(site, tmp_path):
    """Figures are rendered; those of measurements are in tests/report, as rendering them takes long."""
    short = ("hydra.run.dir=run", "trainer.max_epochs=1", "measure=none")
    ended = run(site, tmp_path, "train", *tiny_but("measure."), *short)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"]["epoch"] == 0
    assert (tmp_path / "run" / "report" / "index.html").exists()
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF-"}
    figures = list((tmp_path / "run" / "report" / "figures").iterdir())
    assert {path.suffix for path in figures} == starts.keys()
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in figures)


def test_help_lists_groups_and_settings(site, tmp_path):
    ended = run(site, tmp_path, "train", "--help")
    assert ended.returncode == 0
    for part in (
        "data: cifar10, cifar100, dataset, digits, image_folder, npz, svhn",
        "eps_255: 51",
        "robustdyn-report",
        "resume=DIR",
    ):
        assert part in ended.stdout


def test_a_mistake_ends_with_status_one(site, tmp_path):
    ended = run(site, tmp_path, "trian")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: no command trian")
