"""API keys: a file that only its owner can read, with one key a line."""

import hmac
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.islands.token import describe_exposure

SHORTEST = 16
"""Fewest characters of a key."""


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The digests of all keys; without any, every request is accepted."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "ApiKeys":
        """Read a file with one key a line; raise `ConfigError` if others can read it, or for a key that is none."""
        path = path.expanduser()
        try:
            exposure, text = describe_exposure(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API keys cannot be read ({error}); write one a line to {path}") from error
        if exposure:
            raise ConfigError(exposure)
        keys = [line.strip() for line in text.splitlines() if line.strip()]
        if not keys:
            raise ConfigError(f"{path} has no API key; write one a line, such as of `openssl rand -hex 32`")
        for number, key in enumerate(keys, start=1):
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"line {number} of {path} is not an API key, which has at least {SHORTEST} characters and no space"
                )
        return cls(tuple(sha256(key.encode()).digest() for key in keys))

    def accept(self, authorization: str) -> bool:
        """Return whether a header `Bearer KEY` has one of the keys; compares with all of them, in constant time."""
        scheme, _, key = authorization.partition(" ")
        digest = sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return not self.digests or (scheme.lower() == "bearer" and any(matches))
