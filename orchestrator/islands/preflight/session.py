"""One island while it is checked: how it is asked, and what is known of it so far."""

import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import requests

from orchestrator.config.compute import IslandConfig
from orchestrator.errors import IslandError, Unreachable
from orchestrator.islands.client import TIMEOUT_S, IslandClient
from orchestrator.islands.preflight.probe import ProbeReport
from orchestrator.islands.storage.storage import Storage
from orchestrator.islands.token import read_token

SKEW_WARNING_S, SKEW_ERROR_S = 5.0, 30.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a check ended, in words that say the way out if it is not ok."""

    state: Literal["ok", "warning", "error"]
    text: str


@dataclass
class PreflightSession:
    """One island, and what its checks have found out for those that follow."""

    name: str
    config: IslandConfig
    wheel: Path
    asked: tuple[float, float] = (0.0, 0.0)
    """When it was asked for its version, and when it had answered, in seconds since the epoch."""
    date: str = ""
    """The time that it told then, as HTTP writes it."""
    ray: str = ""
    """Its release of Ray."""
    probed: tuple[float, float] = (0.0, 0.0)
    """When the small job was last seen running, and first seen ended."""
    answers: list[ProbeReport] = field(default_factory=list)
    """What the small job has said."""

    @cached_property
    def client(self) -> IslandClient:
        """Its Jobs API."""
        return IslandClient(self.name, self.config)

    @cached_property
    def storage(self) -> Storage:
        """Its storage, as it is seen from here."""
        return Storage(self.config.storage, self.config.storage_options)

    @cached_property
    def scratch_key(self) -> str:
        """A name in the storage that nobody else has."""
        return f"check/{secrets.token_hex(6)}"

    @property
    def answer(self) -> ProbeReport:
        """The last word of the small job."""
        return self.answers[-1]

    def report(self, path: str) -> dict[str, Any]:
        """What it tells to whoever has the token; raises `IslandError` if it refuses or says something else."""
        answered = self.fetch_json(path, read_token(self.name, self.config.token_file))
        if answered.status_code in (401, 403):
            raise IslandError(
                f"refused ({answered.status_code}): the token in {self.config.token_file} is wrong or expired; fetch "
                "the island's present one"
            )
        try:
            answered.raise_for_status()
            return dict(answered.json())
        except (requests.RequestException, ValueError, TypeError) as error:
            raise IslandError(
                f"the answer to {path} is not that of a Ray dashboard ({error}); correct "
                f"compute.islands.{self.name}.address"
            ) from error

    def fetch_json(self, path: str, token: str | None) -> requests.Response:
        """Ask with a token or without; raises `Unreachable`."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        url = self.config.address.rstrip("/") + path
        try:
            return requests.get(url, headers=headers, timeout=TIMEOUT_S, allow_redirects=False)
        except requests.RequestException as error:
            raise Unreachable(
                f"no answer from {self.config.address} ({type(error).__name__}); start it, open the tunnel, or correct "
                f"compute.islands.{self.name}.address"
            ) from error


def skew_of(seconds: float, uncertainty_s: float) -> Verdict:
    """What a clock that is ahead by so much, or behind if negative, means."""
    if abs(seconds) < SKEW_WARNING_S:
        return Verdict("ok", f"agrees within {uncertainty_s + abs(seconds):.1f} s")
    text = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} ours; let both ask a time server (NTP)"
    return Verdict("error" if abs(seconds) > SKEW_ERROR_S else "warning", text)
