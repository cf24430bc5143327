"""The composed configuration: where it lives, its resolvers, its checks and the objects it names.

``build`` is the project's only caller of Hydra's ``instantiate``.
"""

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustdyn.errors import ConfigError, UserError
from robustdyn.records.untrusted import check_expansion
from robustdyn.run.targets import check_targets


def register_resolvers() -> None:
    """Register the resolvers that ``${name:...}`` in ``conf/`` uses.

    ``per_255``: a pixel radius given in 1/255, on the [0, 1] scale that all code uses.
    ``short``: text for a folder name, cut to 100 characters (file systems take 255 bytes), without slashes.
    ``at_fractions``: epochs at fractions of the run's length, so that a shorter run keeps the papers' shape.
    ``first_at_fraction``: one epoch at a fraction of the run's length, at least 1.
    ``first``: the first of some epochs; 1 if there are none.
    ``times``: the product of two numbers.
    """
    OmegaConf.register_new_resolver("per_255", lambda value: float(value) / 255, replace=True)
    OmegaConf.register_new_resolver("short", lambda text: str(text).replace("/", "-")[:100], replace=True)
    OmegaConf.register_new_resolver("at_fractions", _at_fractions, replace=True)
    OmegaConf.register_new_resolver("times", lambda a, b: float(a) * float(b), replace=True)
    OmegaConf.register_new_resolver("first", lambda epochs: epochs[0] if epochs else 1, replace=True)
    OmegaConf.register_new_resolver(
        "first_at_fraction", lambda length, fraction: max(1, int(length * fraction)), replace=True
    )


def _at_fractions(length: int, fractions: Sequence[float]) -> ListConfig:
    epochs = {int(length * fraction) for fraction in fractions}
    return ListConfig(sorted(epoch for epoch in epochs if epoch >= 1))


class Rule(NamedTuple):
    """A requirement on the value of a key, and its wording in an error."""

    holds: Callable[[Any], bool]
    requirement: str


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(*choices: str) -> Rule:
    *first, last = choices
    return Rule(lambda v: v in choices, f"must be {', '.join(first)} or {last}")


NON_NEGATIVE = Rule(lambda v: _number(v) and v >= 0, "must be a number of at least 0")
POSITIVE = Rule(lambda v: _number(v) and v > 0, "must be a positive number")
WHOLE = Rule(lambda v: _whole(v) and v >= 0, "must be a whole number of at least 0")
SEED = Rule(lambda v: _whole(v) and 0 <= v < 2**63, "must be a whole number from 0 to 2^63 - 1")
COUNT = Rule(lambda v: _whole(v) and v >= 1, "must be a whole number of at least 1")
FRACTION = Rule(lambda v: _number(v) and 0 <= v < 1, "must lie in [0, 1)")
SWITCH = Rule(lambda v: isinstance(v, bool), "must be true or false")

TYPES: Mapping[object, Rule] = {
    bool: SWITCH,
    int: Rule(_whole, "must be a whole number"),
    float: Rule(_number, "must be a number"),
}
"""Rules by the annotation of a constructor's argument."""

# the constructors of the run's parts check the other values when ``check_combinations`` builds them
RULES: Mapping[str, Rule] = {
    "seed": SEED,
    "data.seed": SEED,
    "data.split_seed": SEED,
    "report": SWITCH,
    "nonfinite.every_steps": COUNT,
    "checkpoint.every_minutes": Rule(
        lambda v: v is None or (_number(v) and v > 0), "must be a positive number, or null"
    ),
    "checkpoint.keep_epochs": Rule(
        lambda v: v is not None, "must be epochs in the syntax of measure.epochs, or []"
    ),
    "batchnorm.frozen_from": Rule(
        lambda v: v is None or (_whole(v) and v >= 0), "must be a whole number of at least 0, or null"
    ),
    "resume": _one_of("same", "changed"),
    "deterministic": SWITCH,
    "attack.norm": _one_of("linf", "l2"),
    "attack.eps_255": NON_NEGATIVE,
    "attack.step_255": POSITIVE,
    "attack.steps": WHOLE,
    "optimizer.lr": POSITIVE,
    "optimizer.momentum": FRACTION,
    "optimizer.weight_decay": NON_NEGATIVE,
    "optimizer.fused": SWITCH,
    "stopping.patience": COUNT,
    "measure.inputs": _one_of("adversarial", "clean"),
    "measure.weights": _one_of("trained", "averaged"),
    "measure.examples": TYPES[int],
    "measure.second_attack": TYPES[int],
    "measure.memory_mib": Rule(
        lambda v: v is None or COUNT.holds(v), "must be a whole number of at least 1, or null"
    ),
    "measure.precision": _one_of("full", "tf32", "bfloat16"),
    "measure.interpolation": _one_of("log_linear", "piecewise_constant"),
    "trainer.max_epochs": COUNT,
    "trainer.check_val_every_n_epoch": COUNT,
}


def check_rules(cfg: DictConfig, rules: Mapping[str, Rule], prefix: str = "") -> None:
    """Refuse missing settings and values that break a rule.

    Args:
        cfg: The configuration.
        rules: The rules by key.
        prefix: Prefix of every key, e.g. ``"ensemble."``.

    Raises:
        ConfigError: A value breaks a rule; the message names the key, the value and the requirement.
    """
    for key, rule in rules.items():
        value = OmegaConf.select(cfg, f"{prefix}{key}")
        if not rule.holds(value):
            raise ConfigError(f"{prefix}{key}={value} {rule.requirement}")


def check(cfg: DictConfig) -> None:
    """Refuse values that no run can use, before anything is read or built.

    Raises:
        ConfigError: A value breaks a rule; the message names the key, the value and the requirement.
    """
    for key, rule in RULES.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key not in _present(cfg, key):
            continue  # another choice of the group does not have this setting
        if not rule.holds(value):
            raise ConfigError(f"{key}={value} {rule.requirement}")
    try:  # as whoever reads the run's directory will
        check_expansion(OmegaConf.to_container(cfg, resolve=False))
    except ValueError as error:
        raise ConfigError(f"{error}: nobody could read the run's configuration; type the value") from error


def _present(cfg: DictConfig, key: str) -> set[str]:
    """Return {key} if the configuration has it, even with a null value."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return {key} if isinstance(node, DictConfig) and leaf in node else set()


def build(cfg: Any, key: str, *, allow: Collection[str] | None = None, **extra: Any) -> Any:
    """Build the object that the ``_target_`` at ``key`` names, with ``extra`` added to its arguments.

    Args:
        cfg: The configuration.
        key: The key of a section with a ``_target_``.
        allow: For a configuration that was read from a run directory, which may be a stranger's: the packages
            and modules whose classes it may name besides those of ``conf/``. None for a configuration that
            the user composed by the command line: it may name any class that can be imported.
        extra: Arguments that only the program knows.

    Returns:
        The object; None where a group's choice is ``none``.

    Raises:
        ConfigError: The target is not allowed or unknown, or it refused its arguments; the message names the
            key.
    """
    node = OmegaConf.select(cfg, key)
    if node is None:
        raise ConfigError(f"{key} is missing from the configuration")
    if not node:
        return None  # the choice "none" of a group
    from robustdyn.records.labels import flatten  # loads pandas, which --help does not need

    for name, value in flatten({key: OmegaConf.to_container(node, resolve=False)}).items():
        if value == "???":
            raise ConfigError(f"{name} is not given; give {name}=...")
    try:
        check_targets(OmegaConf.to_container(node, resolve=True), key, allow)
        factory = instantiate(node, _partial_=True)
        if isinstance(factory, partial):
            _check_types(factory, key)
        # extra arguments go straight to the constructor: Hydra would turn dataclasses into configurations
        return factory(**extra) if extra else instantiate(node)
    except UserError:
        raise
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        raise ConfigError(_refusal(key, node, cause or error)) from error
    except Exception as error:
        from lightning.fabric.utilities.exceptions import MisconfigurationException  # takes seconds to load

        if isinstance(error, OmegaConfBaseException | MisconfigurationException | ValueError | TypeError):
            raise ConfigError(_refusal(key, node, error)) from error
        raise


def _check_types(factory: partial[Any], key: str) -> None:
    """Refuse text for a number and the like: a constructor's ``TypeError`` would not name the argument."""
    for name, parameter in inspect.signature(factory.func).parameters.items():
        rule = TYPES.get(parameter.annotation)
        if rule is not None and name in factory.keywords and not rule.holds(factory.keywords[name]):
            raise ConfigError(f"{key}.{name}={factory.keywords[name]} {rule.requirement}")


def _refusal(key: str, node: Any, error: BaseException) -> str:
    """One line: ``objective.beta must be ...`` where a constructor said ``beta must be ...``."""
    said = " ".join(str(error).split())
    named = isinstance(node, DictConfig) and re.split(r"\W", said)[0] in node
    return f"{key}.{said}" if named else f"{key}: {said}"


# at import, because a launcher's worker unpickles the task without passing through the command
register_resolvers()
