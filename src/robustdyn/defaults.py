"""Reads the defaults of the Python interface from ``conf/``, where every default stands once.

A function that has a setting in common with the commands takes its default from the same file as they do:
``def lanczos(operator, k=default("measure/default", "eigenpairs.directions"), ...)``.
"""

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def config_dir() -> Path:
    """The folder of default configurations: inside an installed wheel, or at the top of the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parents[1] / "conf"


def default(option: str, key: str) -> Any:
    """One value of a configuration file.

    Args:
        option: The file, as ``group/option``, for example ``measure/default``.
        key: The key in this file, with dots, for example ``eigenpairs.tolerance``.

    Raises:
        KeyError: The file has no such key.
    """
    value: Any = _read(option)
    for name in key.split("."):
        value = value[name]
    return value


@cache
def _read(option: str) -> dict[str, Any]:
    config = OmegaConf.load(config_dir() / f"{option}.yaml")
    assert isinstance(config, DictConfig)
    # interpolations stay text: only the composed configuration can resolve them
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items()}
