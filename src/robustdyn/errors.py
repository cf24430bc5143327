"""Errors that a user can put right.

Every message is one line that names the config key or the file at fault and what to do. The entry points
print it without a stack trace and exit with status 1; as a library they are ordinary exceptions.
"""


class UserError(Exception):
    """Something the user can put right; the message is one line with the culprit and the remedy."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot work; the message starts with its key."""


class DataFileError(UserError, OSError):
    """A data file that is missing, truncated or corrupt; the message names the file."""


class CheckpointError(UserError, OSError):
    """A checkpoint that cannot be read or written; the message names the file."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot go on; the message says where it was and what to do."""


class RecordError(UserError, OSError):
    """A run directory or record that cannot be read or written; the message names the path."""
