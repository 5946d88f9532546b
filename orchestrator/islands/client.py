"""Client of one island's Ray Jobs API: every call sends the island's token and ends within seconds.

Ray's client waits forever for a server that accepts a connection and does not respond, so each request here has a
timeout. No response raises `Unreachable`, which implies nothing about the jobs; a refusal raises `IslandError`.
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

from orchestrator.backends.proxies import bypass_proxies_on_loopback, describe_proxy
from orchestrator.config.compute import IslandConfig, ResourcesConfig
from orchestrator.errors import IslandError, Unreachable
from orchestrator.islands.token import read_token

logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)

TIMEOUT_S = (3.0, 10.0)
"""Timeouts for a connection, and between two bytes of a response."""

ISLAND_KEY = "ddm-island"
"""Metadata key of a submission: the name of its island."""

Status = Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
T = TypeVar("T")

DUPLICATE_SIGN = "already exists"
"""Text in Ray's response, somewhere below a traceback, when a submission id is used a second time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """State of one submission, as the island reports it."""

    status: Status
    message: str = ""
    error_type: str = ""
    """Ray's class of the failure, such as `JOB_SUPERVISOR_ACTOR_DIED` for a lost node."""
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        """Return whether the island reports that the job's process is gone."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


def major_minor(release: str) -> list[str]:
    """Return the major and minor number of a release."""
    return release.split(".")[:2]


class IslandClient:
    """Submits jobs to one island and lists their states; raises `Unreachable` or `IslandError`."""

    def __init__(self, name: str, config: IslandConfig) -> None:
        bypass_proxies_on_loopback()
        self.name, self.config = name, config
        self._client: _TimeoutClient | None = None

    def check_reachable(self) -> str:
        """Return the island's Ray version; raise `IslandError` if its major or minor number differs from ours."""
        version = self._call(lambda client: client.fetch_ray_version())
        if major_minor(version) != major_minor(ray_version):
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
        """Submit a command with the project's wheel; return False if the id was submitted before."""
        uses_ray_train = resources.workers > 1
        settings = {"RAY_JOB_STOP_WAIT_TIME_S": str(round(grace_s)), "PYTHONSAFEPATH": "1"}
        environment = settings | self.config.env | dict(env)
        try:
            self._call(
                lambda client: client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=submission_id,
                    metadata={ISLAND_KEY: self.name},
                    runtime_env={"py_modules": [str(wheel)], "env_vars": environment},
                    entrypoint_num_cpus=0 if uses_ray_train else resources.cpus,
                    entrypoint_num_gpus=0 if uses_ray_train else resources.gpus,
                    entrypoint_memory=int(resources.memory_gb * 2**30) or None,
                    entrypoint_resources=self.config.resources or None,
                    entrypoint_label_selector=resources.label_selector,
                )
            )
        except IslandError as error:
            if DUPLICATE_SIGN not in str(error):
                raise
            return False
        return True

    def list_states(self) -> dict[str, JobState]:
        """Return the state of every job that was submitted to the island, by submission id.

        Several islands may be node types of one Ray cluster; jobs of the other islands are not listed.
        """
        jobs = self._call(lambda client: client.list_jobs())
        return {
            job.submission_id: JobState(
                status=cast(Status, job.status.value),
                message=job.message or "",
                error_type=job.error_type or "",
                exit_code=job.driver_exit_code,
            )
            for job in jobs
            if job.submission_id and (job.metadata or {}).get(ISLAND_KEY, self.name) == self.name
        }

    def stop(self, submission_id: str) -> None:
        """Send SIGTERM now, and SIGKILL after the grace period of the submission."""
        self._call(lambda client: client.stop_job(submission_id))

    def delete(self, submission_id: str) -> None:
        """Delete an ended submission from the island's list."""
        self._call(lambda client: client.delete_job(submission_id))

    def fetch_log(self, submission_id: str) -> str:
        """Return the output that the submission's process has printed."""
        return str(self._call(lambda client: client.get_job_logs(submission_id)))

    def _call(self, request: Callable[["_TimeoutClient"], T]) -> T:
        try:
            if self._client is None:
                self._client = _TimeoutClient(self.config.address, read_token(self.name, self.config))
            return request(self._client)
        except (requests.ConnectionError, requests.Timeout, ConnectionError) as error:
            self._client = None
            address = self.config.address
            raise Unreachable(
                f"island {self.name} does not respond at {address} ({_first_line(error)}){describe_proxy(address)}"
            ) from error
        except AuthenticationError as error:
            self._client = None
            raise IslandError(
                f"island {self.name} refuses the token in {self.config.token_file}: {_first_line(error)}; "
                "put the island's own token there"
            ) from error
        except (TypeError, KeyError, AttributeError) as error:  # from Ray's parser of the response
            raise IslandError(
                f"island {self.name}: {self.config.address} does not answer as Ray's Jobs API ({_first_line(error)}); "
                f"correct compute.islands.{self.name}.address"
            ) from error
        except (RuntimeError, requests.RequestException, ValueError) as error:
            text = _first_line(error)
            if DUPLICATE_SIGN in str(error):
                raise IslandError(f"island {self.name}: a job of that name {DUPLICATE_SIGN}") from error
            if any(sign in text for sign in _TRANSIENT_SIGNS):
                raise Unreachable(f"island {self.name} cannot respond now ({text})") from error
            raise IslandError(f"island {self.name} refuses: {text}") from error


_TRANSIENT_SIGNS = (
    "status code 404",
    "status code 5",
    "No available agent",
    "returned 404",
    "Expecting value",
    "Server Error",
)
"""Texts of errors from a Ray cluster that starts or ends, or from another server at its address.

They imply nothing about jobs.
"""


class _TimeoutClient(JobSubmissionClient):
    """Ray's client with a timeout on every request."""

    def __init__(self, address: str, token: str) -> None:
        super().__init__(address, headers={"Authorization": f"Bearer {token}"})

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options |= {"timeout": TIMEOUT_S, "allow_redirects": False}
        return super()._do_request(method, endpoint, **options)

    def fetch_ray_version(self) -> str:
        """Return the island's Ray release; `get_version` returns the version of the API."""
        response = self._do_request("GET", "/api/version")
        if not response.ok:
            self._raise_error(response)
        return str(response.json()["ray_version"])


def _first_line(error: Exception) -> str:
    """Return the first line of a message, without Ray's long advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
