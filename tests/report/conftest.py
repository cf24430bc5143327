import pytest

from robustdyn.records import TABLES, combine, find_runs
from tests.records.synthetic import write_run, write_sweep


def frames_of(path):
    runs = find_runs(path)
    return {table: combine(runs, table) for table in TABLES}


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """Directory of one 40-epoch run."""
    return write_run(tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="session")
def seeds(tmp_path_factory):
    """Directory of two runs that differ in their seed."""
    return write_sweep(tmp_path_factory.mktemp("seeds"), ("at",), (0, 1))


@pytest.fixture(scope="session")
def methods(tmp_path_factory):
    """Directory of three methods, two seeds each."""
    return write_sweep(tmp_path_factory.mktemp("methods"), seeds=(0, 1))


@pytest.fixture(scope="session")
def one_frames(one):
    return frames_of(one)


@pytest.fixture(scope="session")
def seeds_frames(seeds):
    return frames_of(seeds)


@pytest.fixture(scope="session")
def methods_frames(methods):
    return frames_of(methods)
