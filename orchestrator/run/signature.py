"""Signatures of this user: proof that a file was written by this user, on this machine or with this home folder.

The key is in the user's own folder, of mode 600, and never in a run folder. A copied or moved file keeps its signature.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from ddm_core.artifacts import CorruptArtifact, read_small_file, write_text
from ddm_core.files.exclusive_files import create_once
from ddm_core.url_queries import user_folder

KEY_BYTES = 32


def sign(file: Path, signature: Path) -> None:
    """Write the signature of a file's present content."""
    write_text(signature, _compute(file, _load_key(create=True)) + "\n")


def is_signed(file: Path, signature: Path) -> bool:
    """Return whether this user has signed the file's present content."""
    try:
        recorded = read_small_file(signature).decode("ascii").strip()
    except (OSError, CorruptArtifact, UnicodeDecodeError):
        return False
    key = _load_key(create=False)
    return bool(key) and hmac.compare_digest(recorded, _compute(file, key))


def _compute(file: Path, key: bytes) -> str:
    message = b"\0".join([file.name.encode(), str(os.getuid()).encode(), file.read_bytes()])
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def _load_key(*, create: bool) -> bytes:
    """Return this user's key; empty if there is none and `create` is False."""
    path = user_folder() / "signing.key"
    if create and not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        candidate = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        create_once(path, secrets.token_bytes(KEY_BYTES), candidate, mode=0o600)
    return path.read_bytes() if path.is_file() else b""
