import gc
import logging
import sys

import pytest
import torch

from robustdyn.report import page, style
from tests.compositions import keep_compositions
from tests.runs import PIXEL

# Tiny networks gain nothing from threads, and lose much when another process wants the same cores.
torch.set_num_threads(1)

# Composing takes a third of the time of a run as short as those here.
keep_compositions()

# What imports leave behind stays, so that searching it for garbage finds none, again and again.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


SAVE = style.save


def save_unrendered(figure, stem):
    """Stand in for ``style.save``: rendering takes most of a report's time, and few tests read the files."""
    files = [stem.with_suffix(".png"), stem.with_suffix(".pdf")]
    for file in files:
        file.write_bytes(PIXEL)
    return files


style.save = save_unrendered


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch finds none"))


@pytest.fixture
def without_figures(monkeypatch):
    """Reports draw no figures."""
    monkeypatch.setattr(page, "FIGURES", ())


@pytest.fixture
def rendered(monkeypatch):
    """Figures are rendered, as the program does it."""
    monkeypatch.setattr(style, "save", SAVE)


@pytest.fixture(autouse=True)
def root_logger_as_before():
    """Restore the root logger: a command leaves handlers behind, and pytest closes their streams."""
    before = logging.root.handlers[:]
    yield
    for handler in logging.root.handlers[:]:
        if handler not in before and type(handler).__module__ != "_pytest.logging":
            logging.root.removeHandler(handler)


@pytest.fixture(autouse=True)
def own_modules_forgotten(tmp_path_factory):
    """Forget what a test imported from files that it wrote, as another test may use the same names."""
    before = set(sys.modules)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]
