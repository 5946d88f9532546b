"""Run one stage on several workers of this process's Ray cluster, through Ray Train.

The workers train as one process group (`experts/training/parallel/distributed.py`), inside one island and never across
islands. They need the job's folders under the same paths as this process: on a disk that the island's nodes share, or
all on one node. Ray Train only starts and watches them: it retries nothing, keeps no checkpoint, and its folder is
deleted at the end.
The process group forms through a file, so no port is opened for that. On loopback, workers communicate on loopback
only.
"""

import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(10 * 365 * 86400))

import ray
import ray.train
from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from ddm_core.artifacts import write_record
from experts.training.parallel.distributed import GroupError
from orchestrator.backends.ray_cluster import OwnCodeOnly
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder
from orchestrator.run.disk_errors import explain_disk_error

POLL_INTERVAL_S = 0.2
"""Time between two checks for a stop request in the process that started a group."""

PROCESS_GROUP_TIMEOUT = timedelta(days=30)
"""Longest wait of workers for each other. A dead worker is detected by its connection or by Ray, not by this time."""

_terminated = threading.Event()
"""Set in a worker that has received SIGTERM."""


class StageEnded(Exception):  # noqa: N818 - names what happened
    """A worker's stage did not finish. It carries the outcome, and makes Ray Train end the other workers."""

    def __init__(self, outcome: AttemptOutcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def run_with_ray_train(job: Job, stopping: Callable[[], bool] = lambda: False) -> AttemptOutcome:
    """Run the job on `job.resources.workers` workers; return its outcome and write it to `outcome.json`.

    A stop request from `stopping` is passed to the workers as a file named `stop` in the attempt's folder.
    """
    folder = attempt_folder(job)
    try:
        outcome = _outcome(job, lambda: _run_group(job, folder / "group", folder / "stop", stopping))
        if outcome.state == "finished":
            shutil.rmtree(job.scratch, ignore_errors=True)
        write_record(folder / "outcome.json", outcome)
    except OSError as error:
        reason = explain_disk_error(error, folder)
        return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed", error=reason, transient=True)
    return outcome


def _run_group(job: Job, group_folder: Path, stop: Path, stopping: Callable[[], bool]) -> Result:
    """Run the workers with Ray Train; `group_folder` exists while they run."""
    shutil.rmtree(group_folder, ignore_errors=True)
    group_folder.mkdir(parents=True)
    try:
        trainer = _make_trainer(replace(job, stop_files=(*job.stop_files, str(stop))), group_folder)
        return _run_until_stopped(trainer.fit, stopping, stop)
    finally:
        shutil.rmtree(group_folder, ignore_errors=True)


def _make_trainer(job: Job, group_folder: Path) -> TorchTrainer:
    resources = job.resources
    amounts = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_gb * 2**30}
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR, job_config=OwnCodeOnly())
    return TorchTrainer(
        _worker_loop,
        train_loop_config={"job": job, "group_folder": group_folder},
        torch_config=_GlooBackendConfig(folder=str(group_folder)),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={name: amount for name, amount in amounts.items() if amount},
            label_selector=resources.label_selector,
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(group_folder),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _worker_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Run the job in one worker, and return its outcome."""
    from orchestrator.run.worker import execute_rank  # torch is imported only in the workers

    rank = ray.train.get_context().get_world_rank()
    outcome = execute_rank(config["job"], rank, config["group_folder"] / f"output_{rank}", _terminated.is_set)
    if outcome.state in ("failed", "lost"):
        raise StageEnded(outcome)
    return {"outcome": outcome}


def _run_until_stopped(work: Callable[[], Result], stopping: Callable[[], bool], stop: Path) -> Result:
    """Run `work` in a thread, while this thread receives signals and passes stop requests to the workers."""
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(work)
        while True:
            try:
                return ended.result(timeout=POLL_INTERVAL_S)
            except FutureTimeout:
                if ended.done():
                    raise
                if stopping():
                    stop.touch()


def _outcome(job: Job, run: Callable[[], Result]) -> AttemptOutcome:
    """Return the outcome of the group: of rank 0, or of the worker whose failure ended the group."""
    lost = AttemptOutcome(stage=job.stage, attempt=job.attempt, state="lost", transient=True)
    try:
        outcome: AttemptOutcome = run().return_value["outcome"]
    except ray.train.WorkerGroupError as error:
        failures = error.worker_failures
        reported = [failure.outcome for failure in failures.values() if isinstance(failure, StageEnded)]
        failed = [outcome for outcome in reported if outcome.state == "failed"]
        if failed and len(reported) == len(failures):
            return failed[0]
        dead = sorted(rank for rank, failure in failures.items() if not isinstance(failure, StageEnded))
        return replace(lost, error=f"worker(s) {', '.join(map(str, dead)) or 'of the group'} vanished")
    except ray.train.ControllerError as error:
        failure = error.controller_failure
        cause = failure.cause if isinstance(failure, RayTaskError) else failure
        if isinstance(cause, GroupError):
            return replace(lost, state="failed", error=f"GroupError: {cause}", transient=False)
        return replace(lost, error=f"the group of workers did not start ({cause})")
    except (ray.train.TrainingFailedError, RayError) as error:
        return replace(lost, error=f"the group of workers broke ({error})")
    return outcome


@dataclass
class _GlooBackendConfig(TorchConfig):
    """Forms the process group through a file in `folder`."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return the backend that Ray Train runs when the workers are up."""
        return _GlooBackend


class _GlooBackend(Backend):
    """Starts the process group of torch.distributed in each worker's main thread."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: _GlooBackendConfig) -> None:
        """Form the process group of all workers."""
        size, gpus = len(worker_group), worker_group.get_resources_per_worker().get("GPU", 0)
        kind = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        folder = Path(backend_config.folder)
        ray.get(
            [
                worker_group.execute_single_async(rank, _init_process_group, folder, kind, rank, size)
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: _GlooBackendConfig) -> None:
        """Do nothing: the workers' processes end with the group."""


def _init_process_group(folder: Path, kind: str, rank: int, size: int) -> None:
    """Check that the folder is shared, handle SIGTERM, and join the process group."""
    from torch import distributed

    if not folder.is_dir():
        raise GroupError(
            f"workers of one stage need a shared disk; worker {rank} on {socket.gethostname()} cannot see {folder}: "
            "put the run on a shared disk, or set compute.stages.<kind>.workers so that all fit on one node"
        )
    signal.signal(signal.SIGTERM, lambda number, frame: _terminated.set())
    if ray.util.get_node_ip_address().startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = distributed.FileStore(str(folder / "rendezvous"), size)  # type: ignore[attr-defined]
    distributed.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=PROCESS_GROUP_TIMEOUT)
