"""Stages on the workers of a Ray cluster.

Without an address a cluster is started on loopback and ends with this process. Ray retries nothing: attempts,
backoff and fencing are the runner's.
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
# Ray shows its figures for Prometheus without a token; -1 is no port.
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("AUTOSCALER_METRIC_PORT", "-1")
os.environ.setdefault("DASHBOARD_METRIC_PORT", "-1")

import ray
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from ddm_core.signals import sigterm_flag
from orchestrator.backends.ray_train_driver import TrainDrivers
from orchestrator.config.compute import ComputeConfig
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.run.backend import AttemptOutcome, Job

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20
"""Stages exchange folders, not objects, so Ray's smallest store will do."""

SHARED_ADDRESS = "DDM_RAY_ADDRESS"
"""Environment variable with the address of a Ray cluster that a sweep has started for all its trials."""

REACH_S = 5.0
"""Longest wait for a running Ray cluster to take a connection."""

GROUP_POLL_INTERVAL_S = 0.1
"""How often it is looked whether the process of a group has ended."""

MAX_QUEUED = 64
"""Tasks that Ray is given at once, waiting ones included."""


def _execute(job: Job) -> AttemptOutcome:
    from orchestrator.run.worker import execute  # torch is imported in the worker, never in the controller

    with sigterm_flag() as stopping:
        return execute(job, stopping)


class RayBackend:
    """Submits every job as one Ray task with the resources it asks for; one for several workers begins a group."""

    def __init__(self, config: ComputeConfig) -> None:
        _connect(config)
        self._is_embedded = config.address is None
        self._running: dict[ray.ObjectRef, Job] = {}
        self._groups = TrainDrivers()

    def place(self, job: Job) -> str | None:
        """This Ray cluster, which queues what it has no room for; a bounded number, so that looking stays quick."""
        return "" if len(self._running) + len(self._groups) < MAX_QUEUED else None

    def attach(self, job: Job) -> bool:
        """A task ends with the controller that submitted it."""
        return False

    def submit(self, job: Job) -> None:
        """Queue the job; Ray starts it where its resources are free."""
        asked = job.resources
        self._refuse_impossible(job)
        if asked.workers > 1:
            self._groups.start(job, ray.get_runtime_context().gcs_address)
            return
        task = ray.remote(_execute).options(
            name=job.stage,
            num_cpus=asked.cpus,
            num_gpus=asked.gpus,
            memory=int(asked.memory_gb * 2**30) or None,
            max_retries=0,
        )
        self._running[task.remote(job)] = job

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Outcomes of the tasks and groups that have ended; a task whose worker died is lost."""
        if self._groups:
            timeout_s = min(timeout_s, GROUP_POLL_INTERVAL_S)
            if not self._running:
                time.sleep(timeout_s)
        ended = ray.wait(list(self._running), num_returns=1, timeout=timeout_s)[0] if self._running else []
        return [self._outcome(reference) for reference in ended] + self._groups.ended()

    def kill(self, stage: str) -> None:
        """Kill the worker that runs the stage, or all of its workers."""
        self._groups.kill(stage)
        for reference, job in self._running.items():
            if job.stage == stage:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster; an embedded one ends."""
        self._groups.close()
        ray.shutdown()

    def _refuse_impossible(self, job: Job) -> None:
        """Raise `ConfigError` for what an embedded cluster will never have; a job would wait for it for ever."""
        has, asked = ray.cluster_resources(), job.resources
        each = {"CPU": asked.cpus, "GPU": asked.gpus, "memory": asked.memory_gb * 2**30}
        wanted = {name: amount * asked.workers for name, amount in each.items()}
        lacking = [f"{amount:g} {name}" for name, amount in wanted.items() if amount > has.get(name, 0.0)]
        if self._is_embedded and lacking:
            raise ConfigError(
                f"stage {job.stage} asks for {', '.join(lacking)} and this machine gives Ray "
                f"{has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU, {has.get('memory', 0):g} memory; "
                f"change compute.stages.{job.kind}, compute.cpus or compute.gpus"
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
    """Start an embedded cluster or join a running one.

    The first start after an installation can run into Ray's fixed limit of 30 s for reading its own files from a
    cold disk, so an embedded cluster is tried twice.
    """
    if address := config.address or os.environ.get(SHARED_ADDRESS):
        try:
            _refuse_silent(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
            raise OrchestratorError(
                f"no Ray cluster lets us in at compute.address={address} ({str(error).strip()}); start it, correct the "
                "address, give its token (RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH=a file of mode 600), or leave "
                "the address empty for an embedded one"
            ) from error
        return
    for last in (False, True):
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
            if last:
                raise OrchestratorError(f"Ray did not start here: {error}; compute=inline does without") from error
            log.warning("Ray did not start (%s); trying once more", error)
            ray.shutdown()
        else:
            return


def _refuse_silent(address: str) -> None:
    """Raise `OSError` if nobody listens at an address of host and port; Ray itself would wait for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if port.isdigit():
        with socket.create_connection((host, int(port)), timeout=REACH_S):
            pass


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    """The Ray cluster that this process has joined."""

    address: str
    cpus: int


@contextlib.contextmanager
def join_cluster(config: ComputeConfig) -> Iterator[RayCluster]:
    """Be on a Ray cluster, an embedded one if the configuration names none, while the block lasts."""
    _connect(config)
    try:
        yield RayCluster(
            address=ray.get_runtime_context().gcs_address, cpus=max(1, int(ray.cluster_resources().get("CPU", 0)))
        )
    finally:
        ray.shutdown()
