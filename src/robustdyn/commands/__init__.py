import os
from importlib.util import find_spec

_backend = os.environ.get("MPLBACKEND", "")
# a notebook passes its own backend on to the processes it starts, whose environment may lack it
if _backend.startswith("module://") and find_spec(_backend.removeprefix("module://").split(".")[0]) is None:
    del os.environ["MPLBACKEND"]
