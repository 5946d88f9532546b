"""One stage on several workers of the Ray cluster that this process is on, through Ray Train.

The workers train as one (`experts/training/distributed.py`), inside one island and never across islands. They must see
the job's folders under the same names as this process does: on a disk that the island's nodes share, or all on one
node. Ray Train starts and watches them, and nothing else: it retries nothing, keeps no checkpoint, and its own folder
goes at the end.
The workers meet through a file, so no port is opened for that; on loopback they talk on loopback alone.
"""

import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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

from ddm_core.artifacts import write_json
from experts.training.distributed import GroupError
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder
from orchestrator.run.disk_errors import explain_disk_error

POLL_INTERVAL_S = 0.2
"""How often the process that started a group looks whether it is asked to stop."""

PATIENCE = timedelta(days=30)
"""How long workers wait for each other; one that dies is noticed by its connection or by Ray, not by a clock."""

_terminated = threading.Event()
"""Set in a worker that has got SIGTERM."""


class StageEnded(Exception):  # noqa: N818 - names what happened
    """A worker's stage did not finish; it carries the outcome, and makes Ray Train end the other workers."""

    def __init__(self, outcome: AttemptOutcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def run_with_ray_train(job: Job, stopping: Callable[[], bool] = lambda: False) -> AttemptOutcome:
    """Run the job on `job.resources.workers` workers and say how it ended, in `outcome.json` too.

    Asked to stop by `stopping`, it passes that on through a file named `stop` in the attempt's folder.
    """
    folder = attempt_folder(job)
    try:
        outcome = _outcome(job, lambda: _fitted(job, folder / "group", folder / "stop", stopping))
        if outcome.state == "finished":
            shutil.rmtree(job.scratch, ignore_errors=True)
        write_json(folder / "outcome.json", outcome)
    except OSError as error:
        reason = explain_disk_error(error, folder)
        return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed", error=reason, transient=True)
    return outcome


def _fitted(job: Job, meeting: Path, stop: Path, stopping: Callable[[], bool]) -> Result:
    """Let Ray Train run the workers to their end; `meeting` is there for so long."""
    shutil.rmtree(meeting, ignore_errors=True)
    meeting.mkdir(parents=True)
    try:
        trainer = _trainer(replace(job, stop_files=(*job.stop_files, str(stop))), meeting)
        return _run_until_stopped(trainer.fit, stopping, stop)
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _trainer(job: Job, meeting: Path) -> TorchTrainer:
    asked = job.resources
    amounts = {"CPU": asked.cpus, "GPU": asked.gpus, "memory": asked.memory_gb * 2**30}
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    return TorchTrainer(
        _work,
        train_loop_config={"job": job, "meeting": meeting},
        torch_config=_GlooBackendConfig(folder=str(meeting)),
        scaling_config=ScalingConfig(
            num_workers=asked.workers,
            use_gpu=asked.gpus > 0,
            resources_per_worker={name: amount for name, amount in amounts.items() if amount},
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(meeting),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _work(given: dict[str, Any]) -> dict[str, Any]:
    """What every worker does."""
    from orchestrator.run.worker import execute_rank  # torch and every room are imported in the workers alone

    rank = ray.train.get_context().get_world_rank()
    outcome = execute_rank(given["job"], rank, given["meeting"] / f"aside_{rank}", _terminated.is_set)
    if outcome.state in ("failed", "lost"):
        raise StageEnded(outcome)
    return {"outcome": outcome}


def _run_until_stopped(work: Callable[[], Result], stopping: Callable[[], bool], stop: Path) -> Result:
    """Do the work in a thread, while this one hears signals and passes a stop on to the workers."""
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(work)
        while True:
            try:
                return ended.result(timeout=POLL_INTERVAL_S)
            except NotYet:
                if ended.done():
                    raise
                if stopping():
                    stop.touch()


def _outcome(job: Job, run: Callable[[], Result]) -> AttemptOutcome:
    """How the group ended: as its first worker did, or else as the one that broke it."""
    lost = AttemptOutcome(stage=job.stage, attempt=job.attempt, state="lost", transient=True)
    try:
        ended_well: AttemptOutcome = run().return_value["outcome"]
    except ray.train.WorkerGroupError as error:
        ended = [found.outcome for found in error.worker_failures.values() if isinstance(found, StageEnded)]
        failed = [outcome for outcome in ended if outcome.state == "failed"]
        if failed and len(ended) == len(error.worker_failures):
            return failed[0]
        dead = sorted(rank for rank, found in error.worker_failures.items() if not isinstance(found, StageEnded))
        return replace(lost, error=f"worker(s) {', '.join(map(str, dead)) or 'of the group'} vanished")
    except ray.train.ControllerError as error:
        failure = error.controller_failure
        cause = failure.cause if isinstance(failure, RayTaskError) else failure
        if isinstance(cause, GroupError):
            return replace(lost, state="failed", error=f"GroupError: {cause}", transient=False)
        return replace(lost, error=f"the group of workers did not start ({cause})")
    except (ray.train.TrainingFailedError, RayError) as error:
        return replace(lost, error=f"the group of workers broke ({error})")
    return ended_well


@dataclass
class _GlooBackendConfig(TorchConfig):
    """How the workers meet: through a file in `folder`."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train runs when the workers are up."""
        return _GlooBackend


class _GlooBackend(Backend):
    """The process group of torch.distributed, begun and ended in each worker's main thread."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: _GlooBackendConfig) -> None:
        """Let all workers meet."""
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
        """The workers' processes end with the group."""


def _init_process_group(folder: Path, kind: str, rank: int, size: int) -> None:
    """Check that the folder is shared, hear SIGTERM from now on, and join the process group."""
    from torch import distributed

    if not folder.is_dir():
        raise GroupError(
            f"worker {rank} on {socket.gethostname()} cannot see {folder}; workers of one stage need a disk that they "
            "share: keep the run there, or give compute.stages.<kind>.workers that one node has room for"
        )
    signal.signal(signal.SIGTERM, lambda number, frame: _terminated.set())
    if ray.util.get_node_ip_address().startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = distributed.FileStore(str(folder / "meeting"), size)  # type: ignore[attr-defined]
    distributed.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=PATIENCE)
