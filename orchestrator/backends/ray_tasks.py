"""Run stages on the workers of a Ray cluster.

Without an address, a cluster starts on loopback and ends with this process. Ray retries nothing: the runner is
responsible for attempts, backoff and fencing.
"""

import time
from collections.abc import Callable, Sequence

import ray
from ray.exceptions import RayError, RayTaskError

from ddm_core.signals import sigterm_flag
from orchestrator.backends.ray_cluster import RayCluster
from orchestrator.backends.ray_data import RayEngine, ray_options
from orchestrator.backends.ray_train_driver import TrainDrivers
from orchestrator.config.compute import ComputeConfig
from orchestrator.errors import ConfigError
from orchestrator.run.backend import AttemptOutcome, Job, read_outcome

GROUP_POLL_INTERVAL_S = 0.1
"""Time between two checks whether the process of a group has ended."""

MAX_EARLY_IMPORTS = 8
"""Largest number of workers that import the libraries while the first stage runs; each takes some 400 MB of memory."""

MAX_QUEUED = 64
"""Largest number of tasks submitted to Ray at once, waiting ones included."""


def _execute(job: Job) -> AttemptOutcome:
    from orchestrator.run.worker import execute  # torch is imported in the worker, never in the controller

    with sigterm_flag() as stopping:
        return execute(job, stopping, None if job.engine == "local" else RayEngine(job.resources))


def _import_early() -> None:
    """Import what almost every stage needs; failures are reported by the stage that needs it."""
    import orchestrator.pipeline.run_training
    import orchestrator.run.worker  # noqa: F401


class RayBackend:
    """Submits every job as one Ray task with its resources; a job with several workers starts a process group."""

    def __init__(self, config: ComputeConfig, record: Callable[..., None] = lambda event, **facts: None) -> None:
        """Open the cluster; `record` writes an event to the journal."""
        self._cluster = RayCluster(config)
        self._record = record
        self._is_embedded = config.address is None
        self._running: dict[ray.ObjectRef, Job] = {}
        self._groups = TrainDrivers()
        self._early_imports = min(config.cpus_here - 1, MAX_EARLY_IMPORTS) if self._cluster.is_embedded else 0
        self._start_imports()

    def place(self, job: Job) -> str | None:
        """Return the one place until `MAX_QUEUED` tasks are submitted; the bound keeps `poll` fast.

        An embedded cluster gets no more than it can run at once, so that stages start in the order of their ranks.
        There is no place while the cluster is dead; `poll` starts it again.
        """
        jobs = [*self._running.values(), *self._groups.jobs]
        has_room = len(jobs) < MAX_QUEUED and not (jobs and self._is_embedded and self._lacking([*jobs, job]))
        return "" if has_room and not self._cluster.find_dead() else None

    def attach(self, job: Job) -> bool:
        """Return False: a task ends with the controller that submitted it."""
        return False

    def submit(self, job: Job) -> None:
        """Queue the job; Ray starts it on a node with free resources."""
        resources = job.resources
        self._check_resources(job)
        if resources.workers > 1 and job.engine == "local":
            self._groups.start(job, self._cluster.address)
            return
        task = ray.remote(_execute).options(
            name=job.stage,
            **(ray_options(resources) if job.engine == "local" else {"num_cpus": 0}),
            max_retries=0,
        )
        self._running[task.remote(job)] = job

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Return outcomes of the tasks and groups that have ended; a task whose worker died is lost.

        If the embedded cluster itself has died, it is started again, and all that ran on it is lost.
        """
        if self._groups:
            timeout_s = min(timeout_s, GROUP_POLL_INTERVAL_S)
            if not self._running:
                time.sleep(timeout_s)
        ended = ray.wait(list(self._running), num_returns=1, timeout=timeout_s)[0] if self._running else []
        if dead := self._cluster.find_dead():
            return self._restart(dead)
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
        self._cluster.close()

    def _restart(self, dead: list[str]) -> list[AttemptOutcome]:
        """Start a dead embedded cluster again; return the attempts that ran on it, which use up no retry."""
        jobs = [*self._running.values(), *self._groups.close()]
        self._running.clear()
        reason = self._cluster.restart(dead)
        self._start_imports()
        self._record("ray_restarted", reason=reason)
        return [_outcome_after_restart(job, reason) for job in jobs]

    def _start_imports(self) -> None:
        for _ in range(self._early_imports):
            ray.remote(_import_early).options(max_retries=0).remote()

    def _check_resources(self, job: Job) -> None:
        """Raise `ConfigError` for resources that an embedded cluster lacks; the job would wait without end."""
        if self._is_embedded and (lacking := self._lacking([job])):
            available = self._cluster.resources
            raise ConfigError(
                f"stage {job.stage} needs {', '.join(lacking)}, and this machine gives Ray "
                f"{available.get('CPU', 0):g} CPU, {available.get('GPU', 0):g} GPU, "
                f"{available.get('memory', 0):g} memory; change compute.stages.{job.kind}, compute.cpus or compute.gpus"
            )

    def _lacking(self, jobs: Sequence[Job]) -> list[str]:
        """Return the resources of which jobs need more than the cluster has, with what they need."""
        requests, available = [job.resources for job in jobs], self._cluster.resources
        needed = {
            "CPU": sum(request.cpus * request.workers for request in requests),
            "GPU": sum(request.gpus * request.workers for request in requests),
            "memory": sum(request.memory_gb * 2**30 * request.workers for request in requests),
        }
        return [f"{amount:g} {name}" for name, amount in needed.items() if amount > available.get(name, 0.0)]

    def _outcome(self, reference: ray.ObjectRef) -> AttemptOutcome:
        job = self._running.pop(reference)
        try:
            outcome: AttemptOutcome = ray.get(reference)
        except RayTaskError as error:
            return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed", error=str(error).strip())
        except RayError as error:
            self._cluster.check_now()
            reason = f"its worker is gone ({type(error).__name__})"
            return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="lost", error=reason, transient=True)
        return outcome


def _outcome_after_restart(job: Job, reason: str) -> AttemptOutcome:
    """Return the outcome that the attempt wrote before the cluster died; lost if it had not ended."""
    outcome = read_outcome(job)
    if outcome is not None and outcome.state in ("finished", "preempted"):
        return outcome
    return AttemptOutcome(
        stage=job.stage, attempt=job.attempt, state="lost", error=reason, transient=True, uses_retry=False
    )
