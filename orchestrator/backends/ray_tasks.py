"""Run stages on the workers of a Ray cluster.

Without an address, a cluster starts on loopback and ends with this process. Ray retries nothing: the runner is
responsible for attempts, backoff and fencing.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray exposes its Prometheus metrics without a token; port -1 disables them.
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("AUTOSCALER_METRIC_PORT", "-1")
os.environ.setdefault("DASHBOARD_METRIC_PORT", "-1")

# The controller mostly waits, so workers need not yield to it.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from ddm_core.signals import sigterm_flag
from orchestrator.backends.ray_train_driver import TrainDrivers
from orchestrator.config.compute import ComputeConfig
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.run.backend import AttemptOutcome, Job

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20
"""Stages exchange folders, not objects, so Ray's smallest store suffices."""

SHARED_CLUSTER_ADDRESS = "DDM_RAY_ADDRESS"
"""Environment variable with the address of the Ray cluster that a sweep shares between its trials."""

REACH_S = 5.0
"""Longest wait for a running Ray cluster to accept a connection."""

GROUP_POLL_INTERVAL_S = 0.1
"""Time between two checks whether the process of a group has ended."""

MAX_EARLY_IMPORTS = 8
"""Largest number of workers that import the libraries while the first stage runs; each takes some 400 MB of memory."""

MAX_QUEUED = 64
"""Largest number of tasks submitted to Ray at once, waiting ones included."""


def _execute(job: Job) -> AttemptOutcome:
    from orchestrator.run.worker import execute  # torch is imported in the worker, never in the controller

    with sigterm_flag() as stopping:
        return execute(job, stopping)


def _import_early() -> None:
    """Import what almost every stage needs; failures are reported by the stage that needs it."""
    import orchestrator.pipeline.run_training
    import orchestrator.run.worker  # noqa: F401


class RayBackend:
    """Submits every job as one Ray task with its resources; a job with several workers starts a process group."""

    def __init__(self, config: ComputeConfig) -> None:
        _connect(config)
        self._is_embedded = config.address is None
        self._running: dict[ray.ObjectRef, Job] = {}
        self._groups = TrainDrivers()
        if self._is_embedded and SHARED_CLUSTER_ADDRESS not in os.environ:
            for _ in range(min(config.cpus_here, MAX_EARLY_IMPORTS)):
                ray.remote(_import_early).options(max_retries=0).remote()

    def place(self, job: Job) -> str | None:
        """Return the one place until `MAX_QUEUED` tasks are submitted; the bound keeps `poll` fast."""
        return "" if len(self._running) + len(self._groups) < MAX_QUEUED else None

    def attach(self, job: Job) -> bool:
        """Return False: a task ends with the controller that submitted it."""
        return False

    def submit(self, job: Job) -> None:
        """Queue the job; Ray starts it on a node with free resources."""
        resources = job.resources
        self._check_resources(job)
        if resources.workers > 1:
            self._groups.start(job, ray.get_runtime_context().gcs_address)
            return
        task = ray.remote(_execute).options(
            name=job.stage,
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            memory=int(resources.memory_gb * 2**30) or None,
            max_retries=0,
        )
        self._running[task.remote(job)] = job

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Return outcomes of the tasks and groups that have ended; a task whose worker died is lost."""
        if self._groups:
            timeout_s = min(timeout_s, GROUP_POLL_INTERVAL_S)
            if not self._running:
                time.sleep(timeout_s)
        ended = ray.wait(list(self._running), num_returns=1, timeout=timeout_s)[0] if self._running else []
        return [self._outcome(reference) for reference in ended] + self._groups.collect_ended()

    def kill(self, stage: str) -> None:
        """Kill all workers that run the stage."""
        self._groups.kill(stage)
        for reference, job in self._running.items():
            if job.stage == stage:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        """Disconnect from the cluster; an embedded one ends."""
        self._groups.close()
        ray.shutdown()

    def _check_resources(self, job: Job) -> None:
        """Raise `ConfigError` for resources that an embedded cluster lacks; the job would wait without end."""
        available, resources = ray.cluster_resources(), job.resources
        per_worker = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_gb * 2**30}
        needed = {name: amount * resources.workers for name, amount in per_worker.items()}
        lacking = [f"{amount:g} {name}" for name, amount in needed.items() if amount > available.get(name, 0.0)]
        if self._is_embedded and lacking:
            raise ConfigError(
                f"stage {job.stage} needs {', '.join(lacking)}, and this machine gives Ray "
                f"{available.get('CPU', 0):g} CPU, {available.get('GPU', 0):g} GPU, "
                f"{available.get('memory', 0):g} memory; change compute.stages.{job.kind}, compute.cpus or compute.gpus"
            )

    def _outcome(self, reference: ray.ObjectRef) -> AttemptOutcome:
        job = self._running.pop(reference)
        try:
            outcome: AttemptOutcome = ray.get(reference)
        except RayTaskError as error:
            return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed", error=str(error).strip())
        except RayError as error:
            reason = f"its worker is gone ({type(error).__name__})"
            return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="lost", error=reason, transient=True)
        return outcome


def _connect(config: ComputeConfig) -> None:
    """Start an embedded cluster, or connect to a running one.

    The first start after an installation can exceed Ray's fixed limit of 30 s to read its own files from a cold disk,
    so an embedded cluster is tried twice.
    """
    if address := config.address or os.environ.get(SHARED_CLUSTER_ADDRESS):
        try:
            _check_listening(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
            raise OrchestratorError(
                f"no Ray cluster accepts a connection at compute.address={address} ({str(error).strip()}); start it, "
                "correct the address, set its token (RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH=a file of mode 600), "
                "or leave the address empty for an embedded one"
            ) from error
        return
    for is_last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=config.cpus_here,
                num_gpus=config.gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except RuntimeError as error:
            if is_last:
                raise OrchestratorError(f"Ray did not start here: {error}; compute=inline needs no Ray") from error
            log.warning("Ray did not start (%s); trying once more", error)
            ray.shutdown()
        else:
            return


def _check_listening(address: str) -> None:
    """Raise `OSError` if nothing listens at an address of host and port; Ray itself would wait for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdigit():
        with socket.create_connection((host, int(port)), timeout=REACH_S):
            pass


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    """The Ray cluster to which this process is connected."""

    address: str
    cpus: int


@contextlib.contextmanager
def join_cluster(config: ComputeConfig) -> Iterator[RayCluster]:
    """Connect to a Ray cluster while the block lasts; without an address an embedded one."""
    _connect(config)
    try:
        yield RayCluster(
            address=ray.get_runtime_context().gcs_address, cpus=max(1, int(ray.cluster_resources().get("CPU", 0)))
        )
    finally:
        ray.shutdown()
