"""Errors that the user can correct.

Every message is one line that names the config key or the file at fault and the remedy. The commands print it
without a stack trace and exit with status 1. For users of the library they are ordinary exceptions.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can correct; the message is one line with the cause and the remedy."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot work; the message starts with its key."""


class DataFileError(UserError, OSError):
    """A data file that is missing, truncated or corrupt; the message names the file."""


class CheckpointError(UserError, OSError):
    """A checkpoint that cannot be read or written; the message names the file."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot continue; the message says where it stopped and what to do."""


class RecordError(UserError, OSError):
    """A run directory or record that cannot be read or written; the message names the path."""


@contextmanager
def config_errors(prefix: str) -> Iterator[None]:
    """Turn a ``ValueError`` about a setting into a ``ConfigError``, with the prefix of the setting's key."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error
