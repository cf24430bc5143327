import os
from importlib.util import find_spec

_backend = os.environ.get("MPLBACKEND", "")
# a notebook hands its own on to what it starts, perhaps in an environment that lacks it
if _backend.startswith("module://") and find_spec(_backend.removeprefix("module://").split(".")[0]) is None:
    del os.environ["MPLBACKEND"]
