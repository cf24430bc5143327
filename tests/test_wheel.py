"""Tests the wheel by itself, in an empty folder: the commands find their configuration and train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import TINY

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel, as pip lays it out."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
    install = [*pip, "--target", folder / "site", wheel]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "site"


def run(site, folder, module, *arguments):
    """Run a module's command in ``folder``; the wheel takes precedence over an editable installation."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
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
    short = ("hydra.run.dir=run", "trainer.max_epochs=1", "measure.epochs=0")
    ended = run(site, tmp_path, "robustdyn.commands.train", *TINY, *short)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"]["epoch"] == 0
    assert (tmp_path / "run" / "report" / "index.html").exists()


def test_help_lists_groups_and_settings(site, tmp_path):
    ended = run(site, tmp_path, "robustdyn.commands.train", "--help")
    assert ended.returncode == 0
    for part in (
        "data: cifar10, cifar100, dataset, digits, image_folder, npz, svhn",
        "eps_255: 51",
        "robustdyn-report",
        "resume=DIR",
    ):
        assert part in ended.stdout


def test_a_mistake_ends_with_status_one(site, tmp_path):
    ended = run(site, tmp_path, "robustdyn.commands.train", "attack.eps_255=-8", "hydra.run.dir=run")
    assert ended.returncode == 1
    assert ended.stderr == "error: attack.eps_255=-8 must be a number of at least 0\n"
