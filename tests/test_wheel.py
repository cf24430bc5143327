"""Builds the source archive and its wheel, installs the wheel, and runs its commands in an empty folder."""

import contextlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest
from hatchling.build import build_sdist, build_wheel

from tests.runs import tiny_but

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the unpacked source archive, as ``make wheel`` builds it."""
    folder = tmp_path_factory.mktemp("built")
    with contextlib.chdir(ROOT):  # where a build begins
        archive = folder / build_sdist(str(folder))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    with contextlib.chdir(folder / archive.name.removesuffix(".tar.gz")):
        return folder / build_wheel(str(folder))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment with the wheel; it borrows all other packages but those of extras."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet")
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-compile", wheel], check=True)
    packages = site(folder)
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))  # after ours on the path
    (packages / "pyautoattack.py").write_text("raise ModuleNotFoundError")
    return folder


def site(installed):
    (found,) = installed.glob("lib/python3*/site-packages")
    return found


def run(installed, folder, command, *arguments):
    """Run a program of the environment in ``folder``."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    line = [installed / "bin" / command, *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_has_one_version(wheel, installed, tmp_path):
    assert wheel.name == f"robustdyn-{VERSION}-py3-none-any.whl"
    ended = run(
        installed, tmp_path, "python", "-c", "import robustdyn as r; print(r.__version__, r.__file__)"
    )
    version, file = ended.stdout.split()
    assert version == VERSION
    assert Path(file).is_relative_to(site(installed))
    cited = dict(re.findall(r"(?m)^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text()))
    latest = re.search(r"(?m)^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text())
    assert {"version": latest[1], "date-released": latest[2]} == cited
    assert cited["version"] == VERSION


def test_carries_the_configuration_once(installed):
    shipped, ours = site(installed) / "robustdyn" / "conf", ROOT / "conf"
    assert {path.relative_to(shipped) for path in shipped.rglob("*.yaml")} == {
        path.relative_to(ours) for path in ours.rglob("*.yaml")
    }
    assert (site(installed) / "robustdyn" / "py.typed").exists()


def test_carries_the_published_curves(installed):
    folder = Path("report") / "references"
    ours = {path.name for path in (ROOT / "src" / "robustdyn" / folder).iterdir()}
    assert {path.name for path in (site(installed) / "robustdyn" / folder).iterdir()} == ours
    assert "cifar10_standard.csv" in ours


def test_carries_the_launcher_where_hydra_looks_for_it(installed):
    plugins = site(installed) / "hydra_plugins"
    assert (plugins / "robustdyn_slurm" / "launcher.py").exists()
    assert not (plugins / "__init__.py").exists()  # other distributions share the namespace


def test_trains_in_an_empty_folder_and_reports(installed, tmp_path):
    """Figures are rendered; those of measurements are in tests/report, as rendering them takes long."""
    short = ("hydra.run.dir=run", "trainer.max_epochs=1", "measure=none")
    ended = run(installed, tmp_path, "robustdyn-train", *tiny_but("measure."), *short)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"]["epoch"] == 0
    assert (tmp_path / "run" / "report" / "index.html").exists()
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF-"}
    figures = list((tmp_path / "run" / "report" / "figures").iterdir())
    assert {path.suffix for path in figures} == starts.keys()
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in figures)


def test_help_lists_groups_and_settings(installed, tmp_path):
    ended = run(installed, tmp_path, "robustdyn-train", "--help")
    assert ended.returncode == 0
    for part in (
        "data: cifar10, cifar100, dataset, digits, image_folder, npz, svhn",
        "eps_255: 51",
        "robustdyn-report",
        "resume=DIR",
    ):
        assert part in ended.stdout


def test_a_mistake_ends_with_status_one(installed, tmp_path):
    ended = run(installed, tmp_path, "python", "-m", "robustdyn", "trian")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: no command trian")
