"""A token in a file that only its owner can read: created once, never printed."""

import os
import secrets
import stat
from pathlib import Path

from orchestrator.errors import IslandError


def create_token(path: Path) -> None:
    """Write a new token to a file with mode 600 from its creation on; raise `FileExistsError` if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))


def describe_exposure(path: Path) -> str:
    """Return an error message with the remedy if others can read the file; else an empty string."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{path} can be read by others (mode {mode:o}); run `chmod 600 {path}`" if mode & 0o077 else ""


def read_token(island: str, file: str) -> str:
    """Read the token in a file; raise `IslandError` if it is missing, empty or readable by others."""
    path = Path(file).expanduser()
    try:
        exposure = describe_exposure(path)
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise IslandError(f"the token of island {island} cannot be read ({error}); write it to {path}") from error
    if exposure:
        raise IslandError(exposure)
    if not token:
        raise IslandError(f"{path} is empty; put the token of island {island} there")
    return token
