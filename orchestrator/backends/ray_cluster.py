"""The Ray cluster of this process: an embedded one on loopback, or a running one to which it connects.

An embedded cluster whose own processes die is started again; a connected one that does not respond is an error.
"""

import contextlib
import logging
import os
import socket
import time
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from ddm_core.environment import environment_variables
from orchestrator.backends.ray_folder import private_folder
from orchestrator.config.compute import ComputeConfig
from orchestrator.errors import OrchestratorError
from orchestrator.run.marked_processes import KEEP_ENVIRONMENT, MARK, kill_marked_processes

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20
"""Stages exchange folders, not objects, so Ray's smallest store suffices."""

SHARED_CLUSTER_ADDRESS = "DDM_RAY_ADDRESS"
"""Environment variable with the address of the Ray cluster that a sweep shares between its trials."""

REACH_S = 5.0
"""Longest wait for a running Ray cluster to accept a connection."""

PROBE_INTERVAL_S = 2.0
"""Time between two checks whether a connected cluster responds."""

SILENCE_S = 20.0
"""Longest time without a response of a connected cluster. After 60 s Ray's own library would end this process."""

MAX_RESTARTS = 3
"""How often an embedded cluster is started again; one that dies more often has a lasting cause."""

RAYLET = "its raylet on this machine"
"""The part of a connected cluster through which this process submits tasks; a dead one does not return."""

ESSENTIAL = ("gcs_server", "raylet")
"""Ray's own processes without which no task runs; its others write logs."""


class OwnCodeOnly(JobConfig):
    """Ray's settings of a driver whose workers import from their own Python installation only.

    Ray would prepend this process's working folder to their `sys.path`, where a user's `router.py` may be.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        """Return True: Ray then treats the workers' paths as complete."""
        return True


class RayCluster:
    """The connection to a Ray cluster; `close` ends it, and an embedded cluster with it."""

    def __init__(self, config: ComputeConfig) -> None:
        """Start an embedded cluster, or connect to the one at `config.address`; raises `OrchestratorError`."""
        self._config = config
        self._joined = config.address or os.environ.get(SHARED_CLUSTER_ADDRESS)
        self._restarts = 0
        self._next_probe = self._last_response = time.monotonic()
        self._stack = contextlib.ExitStack()
        try:
            self._folder = None if self._joined else self._stack.enter_context(private_folder())
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> None:
        if self._folder is not None:
            _start_embedded(self._config, self._folder)
        else:
            _connect(str(self._joined))
        self.address: str = ray.get_runtime_context().gcs_address
        self.resources: dict[str, float] = ray.cluster_resources()

    @property
    def is_embedded(self) -> bool:
        """Return whether this process has started the cluster."""
        return self._folder is not None

    def find_dead(self) -> list[str]:
        """Return which of an embedded cluster's own processes have died, with their exit codes.

        Raises `OrchestratorError` if a connected cluster does not respond.
        """
        if self._folder is None:
            self._check_responds()
            return []
        dead = ray._private.worker._global_node.dead_processes()
        return [f"{kind} (exit code {process.returncode})" for kind, process in dead if kind in ESSENTIAL]

    def restart(self, dead: list[str]) -> str:
        """Kill what is left of an embedded cluster, its workers first, and start it again; return what happened.

        Raises `OrchestratorError` after `MAX_RESTARTS`.
        """
        names = " and ".join(dead)
        kill_marked_processes(str(self._folder))
        ray.shutdown()
        if self._restarts == MAX_RESTARTS:
            raise OrchestratorError(
                f"Ray's processes died {MAX_RESTARTS + 1} times in this run, now {names}; finished stages and "
                "checkpoints are kept. A frequent cause is too little memory: free some, then continue with "
                "`ddm resume`; compute=inline needs no Ray"
            )
        self._restarts += 1
        self._open()
        return f"Ray's process {names} died; Ray was started again ({self._restarts} of {MAX_RESTARTS})"

    def close(self) -> None:
        """Disconnect from the cluster; an embedded one ends, and its files are deleted."""
        with self._stack:
            ray.shutdown()

    def check_now(self) -> None:
        """Raise `OrchestratorError` if a connected cluster does not respond, without waiting for the next probe."""
        self._next_probe = 0.0
        self.find_dead()

    def _check_responds(self) -> None:
        now = time.monotonic()
        if now < self._next_probe:
            return
        self._next_probe = now + PROBE_INTERVAL_S
        parts = {
            RAYLET: ray._private.worker._global_node.raylet_socket_name,
            f"its head (gcs_server) at {self.address}": self.address,
        }
        silent = [name for name, address in parts.items() if not _accepts(address)]
        if not silent:
            self._last_response = now
        elif RAYLET in silent or now - self._last_response > SILENCE_S:
            raise OrchestratorError(
                f"the Ray cluster at {self._joined} does not respond: {' and '.join(silent)} accept(s) no connection; "
                "finished stages and checkpoints are kept. Start that cluster again, then continue with `ddm resume`"
            )


def _start_embedded(config: ComputeConfig, folder: Path) -> None:
    """Start a cluster on loopback, with its files in a private folder.

    The first start after an installation can exceed Ray's fixed limit of 30 s to read its own files from a cold disk,
    so it is tried twice.
    """
    environment = {MARK: str(folder), "PYTHONSAFEPATH": "1", **KEEP_ENVIRONMENT}
    for is_last in (False, True):
        try:
            with environment_variables(environment):
                ray.init(
                    address="local",
                    num_cpus=config.cpus_here,
                    num_gpus=config.gpus,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    job_config=OwnCodeOnly(),
                    _temp_dir=str(folder / "r"),
                )
        except Exception as error:  # noqa: BLE001 - Ray raises a plain Exception for a node that registers late
            ray.shutdown()
            kill_marked_processes(str(folder))
            if is_last:
                reason = str(error).strip().splitlines()[0]
                raise OrchestratorError(
                    f"Ray did not start here, twice: {reason}. Ray gives its processes 30 s: try again when the "
                    "machine is less busy, or use compute=inline, which needs no Ray"
                ) from error
            log.warning("Ray did not start (%s); trying once more", error)
        else:
            return


def _connect(address: str) -> None:
    try:
        _check_listening(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, job_config=OwnCodeOnly())
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        raise OrchestratorError(
            f"no Ray cluster accepts a connection at the address {address} ({str(error).strip()}); start it, correct "
            "the address, set its token (RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH=a file of mode 600), "
            "or leave the address empty for an embedded one"
        ) from error


def _check_listening(address: str) -> None:
    """Raise `OSError` if nothing listens at an address of host and port; Ray itself would wait for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdigit():
        with socket.create_connection((host, int(port)), timeout=REACH_S):
            pass


def _accepts(address: str) -> bool:
    """Return whether a server accepts connections at a host and port, or at the path of a socket."""
    try:
        if not address.startswith("/"):
            _check_listening(address)
        else:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(address)
    except OSError:
        return False
    return True
