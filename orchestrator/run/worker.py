"""One attempt of one stage, in whatever process the backend chose.

The attempt writes its own log, says who it is, and publishes an artifact or leaves none. It never raises: how it
ended is its return value, and the traceback is in its log.
"""

import contextlib
import functools
import logging
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from threadpoolctl import ThreadpoolController

from data_partition.errors import DownloadFailed, SourceUnreachable
from ddm_core.artifacts import Preempted, Workspace, is_finished, publish, verify, write_json
from experts.training.checkpoint import DamagedCheckpoint
from experts.training.distributed import DataParallelGroup, WorkerLost
from orchestrator.config.compute import CONTROLLER
from orchestrator.pipeline.stage_kinds import STAGE_KINDS
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder
from orchestrator.run.disk_errors import error_number, explain_disk_error
from orchestrator.run.lease import this_process


@contextlib.contextmanager
def limited_threads(cpus: int) -> Iterator[None]:
    """One thread per CPU that was given; results depend on this number."""
    before = torch.get_num_threads()
    torch.set_num_threads(cpus)
    with _pools().limit(limits=cpus):
        try:
            yield
        finally:
            torch.set_num_threads(before)


@functools.cache
def _pools() -> ThreadpoolController:
    """The pools of all libraries that are loaded by the first stage; looking for them takes a millisecond."""
    return ThreadpoolController()


Fill = Callable[[Path], float]
"""Writes an artifact into a folder and returns its FLOPs."""

TRANSIENT = (OSError, MemoryError, DownloadFailed, SourceUnreachable, DamagedCheckpoint)
"""Errors of the machine; all others come from configuration, data or code, and would come again."""

log = logging.getLogger(__name__)


def execute(job: Job, stopping: Callable[[], bool] = lambda: False) -> AttemptOutcome:
    """Run the job to its end and say how it ended, in `outcome.json` too for a controller that comes back later.

    Asked to stop by `stopping`, or by one of the job's stop files, it saves its work and ends as preempted.
    """
    folder = attempt_folder(job)
    try:
        write_json(folder / "worker.json", this_process() | {"time": time.time()})
        outcome = _attempt(job, _workspace(job, folder, stopping), partial(_publish, job))
    except OSError as error:
        outcome = _failed(AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed"), error, folder)
    if outcome.state == "finished":
        shutil.rmtree(job.scratch, ignore_errors=True)
    try:
        write_json(folder / "outcome.json", outcome)
    except OSError as error:
        log.warning("how %s ended is not written down: %s", job.stage, explain_disk_error(error, folder))
    return outcome


def execute_rank(job: Job, rank: int, aside: Path, stopping: Callable[[], bool] = lambda: False) -> AttemptOutcome:
    """Run the job as one worker of the group that this process has joined; whoever started the group says the outcome.

    The first worker publishes and reports. The others do their share of the training, write their log below the
    attempt's folder, and what the stage writes into `aside`.
    """
    folder = attempt_folder(job) / (f"worker_{rank}" if rank else "")
    aside.mkdir(parents=True, exist_ok=True)
    write_json(folder / "worker.json", this_process() | {"time": time.time()})
    write = (lambda config, fill: fill(aside)) if rank else partial(_publish, job)
    return _attempt(job, _workspace(job, folder, stopping), write)


def _workspace(job: Job, folder: Path, stopping: Callable[[], bool]) -> Workspace:
    return Workspace(Path(job.scratch), folder, tuple(Path(path) for path in job.stop_files), stopping)


def _attempt(job: Job, workspace: Workspace, write: Callable[[object, Fill], object]) -> AttemptOutcome:
    """Run the stage with its log, and turn whatever it raises into an outcome."""
    outcome = AttemptOutcome(stage=job.stage, attempt=job.attempt, state="finished", started=time.time())
    with _logging_to(workspace.attempt / "log.txt"), limited_threads(job.resources.cpus):
        try:
            _run(job, workspace, write)
        except Preempted as notice:
            outcome = replace(outcome, state="preempted", error=str(notice))
        except WorkerLost as error:
            outcome = replace(outcome, state="lost", error=str(error), transient=True)
        except Exception as error:  # noqa: BLE001 - the border between a stage and whoever runs it
            log.error("%s", traceback.format_exc())
            outcome = _failed(outcome, error, workspace.scratch)
    return replace(outcome, ended=time.time())


def _failed(outcome: AttemptOutcome, error: Exception, place: Path) -> AttemptOutcome:
    is_transient = isinstance(error, TRANSIENT) or error_number(error) is not None
    return replace(outcome, state="failed", error=explain_disk_error(error, place), transient=is_transient)


def _run(job: Job, workspace: Workspace, write: Callable[[object, Fill], object]) -> None:
    kind = STAGE_KINDS[job.kind]
    config = TypeAdapter(kind.config).validate_python(job.config)
    workspace.scratch.mkdir(parents=True, exist_ok=True)
    if DataParallelGroup.join().any_rank(workspace.stop_requested()):
        raise Preempted(f"{job.stage} was asked to stop before it began")
    inputs = {role: Path(folder) for role, folder in job.inputs.items()}
    for folder in inputs.values():
        _verify(folder)
    write(config, lambda out: kind.run(config, inputs, out, workspace))


def _publish(job: Job, config: object, fill: Fill) -> None:
    """Give what the stage writes its final name, unless a later attempt has begun."""
    publish(
        Path(job.artifact),
        fill,
        stage=job.stage,
        config=config,
        inputs=job.input_fingerprints,
        island=socket.gethostname() if job.island in ("", CONTROLLER) else job.island,
        attempt=job.attempt,
        commit=job.commit,
        may_commit=lambda: not attempt_folder(replace(job, attempt=job.attempt + 1)).exists(),
    )


def _verify(folder: Path) -> None:
    """Compare an input, or the part of an artifact that it is, with its checksums.

    A part that came without its manifest was compared on its way to this island.
    """
    artifact = next((place for place in (folder, *folder.parents) if is_finished(place)), None)
    if artifact is not None:
        verify(artifact, str(folder.relative_to(artifact)))


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Send everything that is logged while the block lasts to a file of the attempt."""
    handler = logging.FileHandler(path)
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
