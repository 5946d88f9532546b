"""Stages on the workers of a Ray cluster; the one file that imports Ray.

Without an address a cluster is started on loopback and ends with this process. Ray retries nothing: attempts,
backoff and fencing are the runner's.
"""

import logging
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayError, RayTaskError

from orchestrator.backend import Job, Outcome
from orchestrator.config import ComputeConfig
from orchestrator.errors import ConfigError, OrchestratorError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20
"""Stages exchange folders, not objects, so Ray's smallest store will do."""


def _execute(job: Job) -> Outcome:
    from orchestrator.worker import execute  # torch is imported in the worker, never in the controller

    return execute(job)


class RayBackend:
    """Submits every job as one Ray task with the resources it asks for."""

    def __init__(self, config: ComputeConfig) -> None:
        _connect(config)
        self._is_embedded = config.address is None
        self._running: dict[ray.ObjectRef, Job] = {}

    def submit(self, job: Job) -> None:
        """Queue the job; Ray starts it where its resources are free."""
        asked = job.resources
        self._refuse_impossible(job)
        task = ray.remote(_execute).options(
            name=job.stage,
            num_cpus=asked.cpus,
            num_gpus=asked.gpus,
            memory=int(asked.memory_gb * 2**30) or None,
            max_retries=0,
        )
        self._running[task.remote(job)] = job

    def poll(self, timeout_s: float) -> list[Outcome]:
        """Outcomes of the tasks that have ended; a task whose worker died is lost."""
        if not self._running:
            return []
        ended, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [self._outcome(reference) for reference in ended]

    def kill(self, stage: str) -> None:
        """Kill the worker that runs the stage."""
        for reference, job in self._running.items():
            if job.stage == stage:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster; an embedded one ends."""
        ray.shutdown()

    def _refuse_impossible(self, job: Job) -> None:
        """Raise `ConfigError` for what an embedded cluster will never have; a job would wait for it for ever."""
        has, asked = ray.cluster_resources(), job.resources
        wanted = {"CPU": asked.cpus, "GPU": asked.gpus, "memory": asked.memory_gb * 2**30}
        lacking = [f"{amount:g} {name}" for name, amount in wanted.items() if amount > has.get(name, 0.0)]
        if self._is_embedded and lacking:
            raise ConfigError(
                f"stage {job.stage} asks for {', '.join(lacking)} and this machine gives Ray "
                f"{has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU, {has.get('memory', 0):g} memory; "
                f"change compute.stages.{job.kind}, compute.cpus or compute.gpus"
            )

    def _outcome(self, reference: ray.ObjectRef) -> Outcome:
        job = self._running.pop(reference)
        try:
            outcome: Outcome = ray.get(reference)
        except RayTaskError as error:
            return Outcome(stage=job.stage, attempt=job.attempt, state="failed", error=str(error).strip())
        except RayError as error:
            reason = f"its worker is gone ({type(error).__name__})"
            return Outcome(stage=job.stage, attempt=job.attempt, state="lost", error=reason, transient=True)
        return outcome


def _connect(config: ComputeConfig) -> None:
    """Start an embedded cluster or join a running one.

    The first start after an installation can run into Ray's fixed limit of 30 s for reading its own files from a
    cold disk, so an embedded cluster is tried twice.
    """
    if config.address:
        try:
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise OrchestratorError(
                f"no Ray cluster answers at compute.address={config.address} ({error}); start it, correct the address, "
                "or leave it empty for an embedded one"
            ) from error
        return
    for last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=config.cpus or len(os.sched_getaffinity(0)),
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
