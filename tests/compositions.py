"""Keeps what Hydra composes: ``conf/`` is read and merged once for each choice of groups, not each command.

The values that are typed are set as Hydra sets them. Compositions with files of a test's own are not kept.
"""

import copy
import dataclasses
import functools

import omegaconf.base
import yaml
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import _utils, grammar_parser

from robustdyn.defaults import config_dir

CREATE, COMPOSE = (
    config_loader_impl.create_defaults_list,
    ConfigLoaderImpl._compose_config_from_defaults_list,
)
CHOICES = defaults_list._create_interpolation_map


def keep_compositions():
    """From now on, for all of this process."""
    lists, configs = {}, {}

    def create_defaults_list(repo, config_name, overrides_list, **settings):
        own = not (config_dir() / f"{config_name}.yaml").is_file()  # as of a run that is resumed
        own |= any(source.provider == "command-line" for source in repo.get_sources())
        if own or any(override.key_or_group == "hydra.searchpath" for override in overrides_list):
            return CREATE(repo, config_name, overrides_list, **settings)
        typed = [override for override in overrides_list if not override.is_sweep_override()]
        values = [o for o in typed if isinstance(o.value(), dict) or not repo.group_exists(o.key_or_group)]
        groups = [override for override in typed if override not in values]
        places = (source.path for source in repo.get_sources())
        key = (config_name, *places, *settings.items(), *(override.input_line for override in groups))
        if key not in lists:
            lists[key] = CREATE(repo, config_name, groups, **settings)
        return dataclasses.replace(lists[key], config_overrides=values)

    def compose(self, defaults, repo):
        if not any(found.defaults is defaults for found in lists.values()):
            return COMPOSE(self, defaults, repo)
        if id(defaults) not in configs:
            configs[id(defaults)] = COMPOSE(self, defaults, repo)
        return copy.deepcopy(configs[id(defaults)])

    def choices(overrides, defaults, self_added):
        """Collected for each file in a quarter of the time; only lists with an interpolation read them."""
        options = [getattr(default, "path", getattr(default, "value", None)) for default in defaults]
        return CHOICES(overrides, defaults, self_added) if "${" in str(options) else None

    defaults_list._create_interpolation_map = choices
    config_loader_impl.create_defaults_list = create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = compose
    # Interpolations are parsed over and over, and whoever gets the trees only reads them.
    omegaconf.base.parse = _utils.parse = functools.cache(grammar_parser.parse)
    # OmegaConf builds its loader on this class; the one in C loads the same in a tenth of the time.
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
