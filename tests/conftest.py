import logging

import pytest
import torch

from robustdyn.report import style

# Tiny networks gain nothing from threads, and lose much when another process wants the same cores.
torch.set_num_threads(1)

# Cutting TrueType fonts down to the glyphs in use takes a third of a report's time, and no test reads them.
style._RC["pdf.fonttype"] = 3


@pytest.fixture(autouse=True)
def root_logger_as_before():
    """Restore the root logger: a command leaves handlers behind, and pytest closes their streams."""
    before = logging.root.handlers[:]
    yield
    for handler in logging.root.handlers[:]:
        if handler not in before and type(handler).__module__ != "_pytest.logging":
            logging.root.removeHandler(handler)
