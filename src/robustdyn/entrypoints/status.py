"""How a plain command ends: status 0, or one line and status 1 for what a user can mend."""

import os
import sys
from collections.abc import Callable

from robustdyn.errors import UserError


def status_of(action: Callable[[], None]) -> int:
    """Run ``action``; its exit status. With ``HYDRA_FULL_ERROR`` set, errors keep their stack trace."""
    try:
        action()
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
