"""Files that are written whole or not at all, and directories that one process at a time writes to."""

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
    """Inside, no other process may enter for the same directory, which is made if absent.

    The lock is the operating system's, so it goes when the process goes, however it ends.

    Args:
        directory: Whose.
        remedy: What the user may do if somebody else is inside, for the message.

    Raises:
        RecordError: Another process, which the message names, is inside, or the directory cannot be written.
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
    """Write ``content`` to ``path`` in one atomic step, on the disk before it counts.

    Raises:
        OSError: It cannot be written; what was there is unharmed, and nothing is left beside it.
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
    """The object in a JSON file; None if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits: what tells a checkpoint from others."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
