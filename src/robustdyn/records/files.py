"""Replaces files atomically, and locks a directory so that only one process at a time writes to it."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from robustdyn.errors import RecordError

_OWNER = ".lock.owner"


@contextmanager
def sole_process(directory: Path, remedy: str) -> Iterator[None]:
    """Lock a directory for this process; the directory is made if absent.

    The lock is the operating system's, which releases it when the process ends in whatever way.

    Args:
        directory: The directory to lock.
        remedy: What the user can do if another process holds the lock, for the message.

    Raises:
        RecordError: Another process, named in the message, holds the lock, or the directory is not writable.
    """
    lock, owner = FileLock(directory / ".lock"), directory / _OWNER
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        replace_file(owner, f"process {os.getpid()} on host {socket.gethostname()}".encode())
    except Timeout as error:
        who = owner.read_text() if owner.is_file() else "another process"
        raise RecordError(f"{directory}: running in {who}; wait for it, or {remedy}") from error
    except OSError as error:
        lock.release()
        raise RecordError(f"{directory}: cannot write ({error.strerror}); {remedy}") from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file atomically; the new content is on the disk before it takes the old one's place.

    Raises:
        OSError: It cannot be written; the old file is unharmed, and no temporary file is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file is missing or holds no readable object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal digits, which identifies a checkpoint."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
