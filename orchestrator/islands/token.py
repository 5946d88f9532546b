"""A token in a file that only its owner can read: created once, never printed, never sent unencrypted."""

import os
import secrets
import stat
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.config.compute import IslandConfig
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


def read_token(island: str, config: IslandConfig) -> str:
    """Read the token to send to an island's address.

    Raises `IslandError` if the file is missing, not one word, or readable by others, or if a network would carry the
    token unencrypted.
    """
    if not config.plain_http and not is_confidential(config.address):
        raise IslandError(
            f"compute.islands.{island}.address={config.address} would send the token unencrypted; use https, a tunnel "
            f"to loopback, or set compute.islands.{island}.plain_http=true in a private network"
        )
    return read_token_file(Path(config.token_file).expanduser(), f"the token of island {island}")


def read_token_file(path: Path, name: str) -> str:
    """Read a token; raises `IslandError`, which calls it `name`, if the file is missing, not one word, or exposed."""
    try:
        exposure = describe_exposure(path)
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise IslandError(f"{name} cannot be read ({error}); write it to {path}") from error
    if exposure:
        raise IslandError(exposure)
    if not token:
        raise IslandError(f"{path} is empty; put {name} there")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise IslandError(f"{path} must hold one token and nothing else; put {name} there")
    return token


def is_confidential(address: str) -> bool:
    """Return whether nobody else can read what is sent to a URL: it is https, or stays on this machine."""
    url = urlsplit(address)
    return url.scheme == "https" or is_loopback(url.hostname or "")


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is that of this machine alone."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
