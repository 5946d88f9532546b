"""A token in a file that its owner alone can read: made once, never printed."""

import os
import secrets
import stat
from pathlib import Path

from orchestrator.errors import IslandError


def new_token(path: Path) -> None:
    """Write a new token into a file that nobody else can read at any time; raises `FileExistsError` if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))


def exposure(path: Path) -> str:
    """What is wrong if others can read the file, and the way out; empty if they cannot."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{path} can be read by others (mode {mode:o}); run `chmod 600 {path}`" if mode & 0o077 else ""


def read_token(island: str, file: str) -> str:
    """The token in a file that nobody else can read; raises `IslandError` for any other."""
    path = Path(file).expanduser()
    try:
        exposed = exposure(path)
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise IslandError(f"the token of island {island} cannot be read ({error}); write it to {path}") from error
    if exposed:
        raise IslandError(exposed)
    if not token:
        raise IslandError(f"{path} is empty; put the token of island {island} there")
    return token
