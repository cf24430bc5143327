"""The studies: a module for each question that the papers raise, with a ``STUDY``."""

import pkgutil


def names() -> list[str]:
    """Of all studies."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
