"""One island during its checks: HTTP requests to it, and results that later checks need."""

import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import requests

from orchestrator.backends.proxies import bypass_proxies_on_loopback, describe_proxy
from orchestrator.config.compute import IslandConfig
from orchestrator.errors import IslandError, Unreachable
from orchestrator.islands.client import TIMEOUT_S, IslandClient
from orchestrator.islands.preflight.probe import ProbeReport
from orchestrator.islands.storage.storage import Storage
from orchestrator.islands.token import read_token

SKEW_WARNING_S, SKEW_ERROR_S = 5.0, 30.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a check; the text has the remedy if it is not ok."""

    state: Literal["ok", "warning", "error"]
    text: str


@dataclass
class PreflightSession:
    """One island, and results of its checks that later ones need."""

    name: str
    config: IslandConfig
    wheel: Path
    version_request_times: tuple[float, float] = (0.0, 0.0)
    """Start and end of the version request, in seconds since the epoch."""
    remote_date: str = ""
    """Date header of the response to that request."""
    remote_ray: str = ""
    """The island's Ray version."""
    job_end_times: tuple[float, float] = (0.0, 0.0)
    """Time of the last poll at which the small job ran, and of the first at which it had ended."""
    probe_reports: list[ProbeReport] = field(default_factory=list)
    """Reports that the small job has printed."""

    @cached_property
    def client(self) -> IslandClient:
        """Return the client of the island's Jobs API."""
        return IslandClient(self.name, self.config)

    @cached_property
    def storage(self) -> Storage:
        """Return the island's storage, as this machine reaches it."""
        return Storage(self.config.storage, self.config.storage_options)

    @cached_property
    def scratch_key(self) -> str:
        """Return a unique name in the storage for temporary files."""
        return f"check/{secrets.token_hex(6)}"

    @property
    def probe_report(self) -> ProbeReport:
        """Return the last report of the small job."""
        return self.probe_reports[-1]

    def fetch_json(self, path: str) -> dict[str, Any]:
        """Send a request with the token and return its JSON; raise `IslandError` for a refusal or another response."""
        response = self.send_request(path, read_token(self.name, self.config))
        if response.status_code in (401, 403):
            raise IslandError(
                f"refused ({response.status_code}): the token in {self.config.token_file} is wrong or expired; fetch "
                "the island's present one"
            )
        try:
            response.raise_for_status()
            return dict(response.json())
        except (requests.RequestException, ValueError, TypeError) as error:
            raise IslandError(
                f"the response to {path} is not that of a Ray dashboard ({error}); correct "
                f"compute.islands.{self.name}.address"
            ) from error

    def send_request(self, path: str, token: str | None) -> requests.Response:
        """Send a GET request with or without a token; raise `Unreachable` if there is no response."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        url = self.config.address.rstrip("/") + path
        bypass_proxies_on_loopback()
        try:
            return requests.get(url, headers=headers, timeout=TIMEOUT_S, allow_redirects=False)
        except requests.RequestException as error:
            raise Unreachable(
                f"no response from {self.config.address} ({type(error).__name__}); start it, open the tunnel, or "
                f"correct compute.islands.{self.name}.address{describe_proxy(url)}"
            ) from error


def judge_clock_skew(seconds: float, uncertainty_s: float) -> Verdict:
    """Return the verdict for a remote clock that is `seconds` ahead of the local one, or behind if negative."""
    if abs(seconds) < SKEW_WARNING_S:
        return Verdict("ok", f"agrees within {uncertainty_s + abs(seconds):.1f} s")
    direction = "ahead of" if seconds > 0 else "behind"
    text = f"{abs(seconds):.0f} s {direction} the local clock; synchronize both with a time server (NTP)"
    return Verdict("error" if abs(seconds) > SKEW_ERROR_S else "warning", text)
