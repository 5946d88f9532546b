"""Run one attempt of one stage, in whatever process the backend chose.

The attempt writes its own log, records its process, and publishes an artifact or leaves none. It never raises: its
result is the returned outcome, and a traceback goes to its log.
"""

import contextlib
import functools
import logging
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from threadpoolctl import ThreadpoolController

from data_partition.errors import DownloadFailed, SourceUnreachable
from ddm_core.artifacts import Preempted, Workspace, is_finished, publish, verify, write_record
from ddm_core.engine import Engine
from ddm_core.environment import environment_variables
from experts.training.checkpoint import DamagedCheckpoint
from experts.training.parallel.distributed import DataParallelGroup, WorkerLost
from orchestrator.config.compute import CONTROLLER
from orchestrator.config.stage_kinds import STAGE_KINDS
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder
from orchestrator.run.disk_errors import error_number, explain_disk_error
from orchestrator.run.lease import this_process
from orchestrator.run.worker_lock import hold_worker_lock

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What a numeric library reads when it is loaded."""


@contextlib.contextmanager
def limited_threads(cpus: int) -> Iterator[None]:
    """Use one thread per assigned CPU while the block lasts; results depend on this number.

    It applies to the loaded libraries, and to those that the block loads: a stage imports what it needs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(cpus)
    with environment_variables(dict.fromkeys(THREAD_VARIABLES, str(cpus))), ThreadpoolController().limit(limits=cpus):
        try:
            yield
        finally:
            torch.set_num_threads(before)


Fill = Callable[[Path], float]
"""Writes an artifact into a folder and returns its FLOPs."""

TRANSIENT = (OSError, MemoryError, DownloadFailed, SourceUnreachable, DamagedCheckpoint)
"""Errors of the machine. All others come from configuration, data or code, and a retry would repeat them."""

log = logging.getLogger(__name__)


def execute(job: Job, stopping: Callable[[], bool] = lambda: False, engine: Engine | None = None) -> AttemptOutcome:
    """Run the job and return its outcome, also written to `outcome.json` for a controller that returns later.

    Without an `engine` it computes in this process.
    On a stop request, from `stopping` or one of the job's stop files, it saves its work and ends as preempted.
    """
    folder = attempt_folder(job)
    workspace = _make_workspace(job, folder, stopping)
    workspace = workspace if engine is None else replace(workspace, engine=engine)
    try:
        write_record(folder / "worker.json", this_process() | {"time": time.time()})
        with hold_worker_lock(folder), _attempt(job, workspace) as attempt:
            config, fill = _prepare_stage(job, workspace)
            publish(Path(job.artifact), fill, **_publish_arguments(job, config))
        outcome = attempt.outcome
    except OSError as error:
        outcome = _failure(AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed"), error, folder)
    if outcome.state == "finished":
        shutil.rmtree(job.scratch, ignore_errors=True)
    try:
        write_record(folder / "outcome.json", outcome)
    except OSError as error:
        log.info("the outcome of %s is not written: %s", job.stage, explain_disk_error(error, folder))
    return outcome


def execute_rank(job: Job, rank: int, output: Path, stopping: Callable[[], bool] = lambda: False) -> AttemptOutcome:
    """Run the job as one worker of the process group that this process has joined, and return its outcome.

    Rank 0 publishes and reports. The other ranks train on their share of each batch, log to a folder of their own
    below the attempt's, and write the stage's files to `output`. The caller writes `outcome.json`.
    """
    folder = attempt_folder(job) / (f"worker_{rank}" if rank else "")
    workspace = _make_workspace(job, folder, stopping)
    output.mkdir(parents=True, exist_ok=True)
    write_record(folder / "worker.json", this_process() | {"time": time.time()})
    with hold_worker_lock(folder), _attempt(job, workspace) as attempt:
        config, fill = _prepare_stage(job, workspace)
        if rank:
            fill(output)
        else:
            publish(Path(job.artifact), fill, **_publish_arguments(job, config))
    return attempt.outcome


def _make_workspace(job: Job, folder: Path, stopping: Callable[[], bool]) -> Workspace:
    return Workspace(Path(job.scratch), folder, tuple(Path(path) for path in job.stop_files), stopping)


@dataclass(slots=True)
class _Attempt:
    """A running attempt; its outcome is final when the block of `_attempt` has ended."""

    outcome: AttemptOutcome


@contextlib.contextmanager
def _attempt(job: Job, workspace: Workspace) -> Iterator[_Attempt]:
    """Write the block's log, limit its threads, and turn every error that it raises into an outcome."""
    outcome = AttemptOutcome(stage=job.stage, attempt=job.attempt, state="finished", started=time.time())
    attempt, cpu_before_s = _Attempt(outcome), _used_cpu_s()
    with logging_to(workspace.attempt / "log.txt"), limited_threads(job.resources.cpus):
        try:
            yield attempt
        except Preempted as notice:
            attempt.outcome = replace(outcome, state="preempted", error=str(notice))
        except WorkerLost as error:
            attempt.outcome = replace(outcome, state="lost", error=str(error), transient=True)
        except Exception as error:  # noqa: BLE001 - the border between a stage and its caller
            log.error("%s", traceback.format_exc())
            attempt.outcome = _failure(outcome, error, workspace.scratch)
    used_s, notices = _used_cpu_s() - cpu_before_s, tuple(workspace.notices)
    attempt.outcome = replace(attempt.outcome, ended=time.time(), cpu_s=used_s, notices=notices)


def _used_cpu_s() -> float:
    """Return the CPU seconds of this process and its ended children so far, all threads together."""
    return sum(os.times()[:4])


def _failure(outcome: AttemptOutcome, error: Exception, place: Path) -> AttemptOutcome:
    is_transient = isinstance(error, TRANSIENT) or error_number(error) is not None
    return replace(outcome, state="failed", error=explain_disk_error(error, place), transient=is_transient)


def _prepare_stage(job: Job, workspace: Workspace) -> tuple[object, Fill]:
    """Verify the stage's inputs; return its configuration and the function that fills its artifact."""
    kind = STAGE_KINDS[job.kind]
    config = TypeAdapter(kind.config).validate_python(job.config)
    workspace.scratch.mkdir(parents=True, exist_ok=True)
    if DataParallelGroup.join().any_rank(workspace.stop_requested()):
        raise Preempted(f"{job.stage} was stopped before its work began")
    inputs = {role: Path(folder) for role, folder in job.inputs.items()}
    for folder in inputs.values():
        _verify_input(folder)
    return config, functools.partial(kind.run, config, inputs, workspace=workspace)


def _publish_arguments(job: Job, config: object) -> dict[str, Any]:
    """Return the manifest's fields, and the fence: an attempt may publish only while no later attempt exists."""
    return {
        "stage": Path(job.artifact).name.rpartition("-")[0] or job.stage,
        "config": config,
        "inputs": job.input_fingerprints,
        "island": socket.gethostname() if job.island in ("", CONTROLLER) else job.island,
        "attempt": job.attempt,
        "commit": job.commit,
        "may_commit": lambda: not attempt_folder(replace(job, attempt=job.attempt + 1)).exists(),
    }


def _verify_input(folder: Path) -> None:
    """Compare an input, or the part of an artifact that it is, with its checksums.

    A part without its manifest was compared when it was transferred to this island.
    """
    artifact = next((place for place in (folder, *folder.parents) if is_finished(place)), None)
    if artifact is not None:
        verify(artifact, str(folder.relative_to(artifact)))


class _LogFile(logging.FileHandler):
    """A log file on a disk that may be full: then records are lost, and the attempt's outcome names the disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name of the base class
        """Print what went wrong with a record, unless the file cannot be written."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file, also if its last records cannot be written."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send all log records to a file of the attempt while the block lasts."""
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
