"""Composes a sweep with the first choice of every group that is swept.

Hydra composes the configuration of a sweep before those of its runs, and leaves out what is swept. A group
then has its default, so that ``-m data=cifar10,svhn data.root=DIR`` would be refused: digits, the default,
have no root.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

_NAME = "create_defaults_list"


@contextmanager
def first_of_swept_groups() -> Iterator[None]:
    """Inside, Hydra composes a sweep in this way. The sweep's runs are composed as usual."""

    def created(*, repo: IConfigRepository, overrides_list: list[Override], **others: Any) -> DefaultsList:
        chosen = [_first(override, repo) for override in overrides_list]
        return create_defaults_list(repo=repo, overrides_list=chosen, **others)

    setattr(config_loader_impl, _NAME, created)
    try:
        yield
    finally:
        setattr(config_loader_impl, _NAME, create_defaults_list)


def _first(override: Override, repo: IConfigRepository) -> Override:
    """The override with its first choice, if it sweeps a group."""
    group = override.key_or_group
    # an experiment brings a sweep of its own, which must not become that of the others
    if not override.is_choice_sweep() or group == "experiment" or not repo.group_exists(group):
        return override
    choice = next(iter(override.sweep_string_iterator()))
    return OverridesParser.create().parse_override(f"{override.get_key_element()}={choice}")
