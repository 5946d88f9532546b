"""One island's Ray Jobs API: every call carries the island's own token and ends within seconds.

Ray's client waits for ever for a server that accepts and does not answer, so each request here has a time-out. No
answer is `Unreachable`, which says nothing about the jobs; a refusal is `IslandError`.
"""

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast

import requests
from ray import __version__ as ray_version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from orchestrator.config.compute import IslandConfig, ResourcesConfig
from orchestrator.errors import IslandError, Unreachable
from orchestrator.islands.token import read_token

logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)

TIMEOUT_S = (3.0, 10.0)
"""Longest wait for a connection, and between two bytes of an answer."""

ISLAND = "ddm-island"
"""Key of a submission's metadata that says which island it was given to."""

Status = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
T = TypeVar("T")

TAKEN = "already exists"
"""What Ray's answer says somewhere, below a traceback, when a submission id is used a second time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the island says of one submission."""

    status: Status
    message: str = ""
    error_type: str = ""
    """Ray's class of the failure, such as `JOB_SUPERVISOR_ACTOR_DIED` for a lost node."""
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the island says that its process is gone."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


def minor(release: str) -> list[str]:
    """Major and minor number of a release."""
    return release.split(".")[:2]


class IslandClient:
    """Submits to one island and asks it what became of it; raises `Unreachable` or `IslandError`."""

    def __init__(self, name: str, config: IslandConfig) -> None:
        self.name, self.config = name, config
        self._opened: _Client | None = None

    def check_reachable(self) -> str:
        """The island's Ray version, after checking that it is one we speak to."""
        version = self._ask(lambda client: client.ray_version())
        if minor(version) != minor(ray_version):
            raise IslandError(
                f"island {self.name} runs Ray {version}, this is {ray_version}: major and minor version must agree; "
                "install the same on one of the two"
            )
        return version

    def submit(
        self,
        submission_id: str,
        command: Sequence[str],
        *,
        wheel: Path,
        resources: ResourcesConfig,
        env: Mapping[str, str] = MappingProxyType({}),
        grace_s: float,
    ) -> bool:
        """Submit a command with the project's code; False if that id was submitted before: nothing is run twice."""
        group = resources.workers > 1
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(round(grace_s)), **self.config.env, **env}
        try:
            self._ask(
                lambda client: client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=submission_id,
                    metadata={ISLAND: self.name},
                    runtime_env={"py_modules": [str(wheel)], "env_vars": environment},
                    entrypoint_num_cpus=0 if group else resources.cpus,
                    entrypoint_num_gpus=0 if group else resources.gpus,
                    entrypoint_memory=int(resources.memory_gb * 2**30) or None,
                    entrypoint_resources=self.config.resources or None,
                )
            )
        except IslandError as error:
            if TAKEN not in str(error):
                raise
            return False
        return True

    def states(self) -> dict[str, JobState]:
        """Everything that was submitted to the island, by submission id.

        Several islands may be types of nodes of one Ray cluster: what another of them was given is not counted.
        """
        found = self._ask(lambda client: client.list_jobs())
        return {
            job.submission_id: JobState(
                status=cast(Status, job.status.value),
                message=job.message or "",
                error_type=job.error_type or "",
                exit_code=job.driver_exit_code,
            )
            for job in found
            if job.submission_id and (job.metadata or {}).get(ISLAND, self.name) == self.name
        }

    def stop(self, submission_id: str) -> None:
        """SIGTERM now, SIGKILL after the grace that was given with the submission."""
        self._ask(lambda client: client.stop_job(submission_id))

    def delete(self, submission_id: str) -> None:
        """Let the island forget a submission that has ended."""
        self._ask(lambda client: client.delete_job(submission_id))

    def log(self, submission_id: str) -> str:
        """What the submission's process has printed so far."""
        return str(self._ask(lambda client: client.get_job_logs(submission_id)))

    def _ask(self, question: Callable[["_Client"], T]) -> T:
        try:
            if self._opened is None:
                self._opened = _Client(self.config.address, read_token(self.name, self.config.token_file))
            return question(self._opened)
        except (requests.ConnectionError, requests.Timeout, ConnectionError) as error:
            self._opened = None
            address = self.config.address
            raise Unreachable(f"island {self.name} does not answer at {address} ({_short(error)})") from error
        except AuthenticationError as error:
            self._opened = None
            raise IslandError(
                f"island {self.name} refuses the token in {self.config.token_file}: {_short(error)}; "
                "put the island's own token there"
            ) from error
        except (RuntimeError, requests.RequestException, ValueError) as error:
            text = _short(error)
            if TAKEN in str(error):
                raise IslandError(f"island {self.name}: a job of that name {TAKEN}") from error
            if any(sign in text for sign in _PASSING):
                raise Unreachable(f"island {self.name} cannot answer now ({text})") from error
            raise IslandError(f"island {self.name} refuses: {text}") from error


_PASSING = ("status code 404", "status code 5", "No available agent", "returned 404", "Expecting value", "Server Error")
"""Signs of a Ray cluster that starts or ends, or of something else at its address: they say nothing about jobs."""


class _Client(JobSubmissionClient):
    """Ray's client with a time-out on every request."""

    def __init__(self, address: str, token: str) -> None:
        super().__init__(address, headers={"Authorization": f"Bearer {token}"})

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", TIMEOUT_S)
        return super()._do_request(method, endpoint, **options)

    def ray_version(self) -> str:
        """The release that the island runs; `get_version` gives the version of the API."""
        answer = self._do_request("GET", "/api/version")
        if not answer.ok:
            self._raise_error(answer)
        return str(answer.json()["ray_version"])


def _short(error: Exception) -> str:
    """The first line of a message, without Ray's long advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
