"""The pool's token: a file that its owner alone can read, made once, never printed."""

import os
import secrets
import stat
from pathlib import Path

from orchestrator.pools.tools import PoolError


def ensure_token(path: Path) -> None:
    """Make the file with a new token if it is absent; refuse one that others can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise PoolError(f"{path} can be read by others (mode {mode:o}); run `chmod 600 {path}`") from None
        return
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))
