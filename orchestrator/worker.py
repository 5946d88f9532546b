"""One attempt of one stage, in whatever process the backend chose.

The attempt writes its own log, says who it is, and publishes an artifact or leaves none. It never raises: how it
ended is its return value, and the traceback is in its log.
"""

import contextlib
import logging
import shutil
import socket
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from threadpoolctl import threadpool_limits

from artifacts import MANIFEST, Preempted, Workspace, publish, read_manifest, verify, write_json
from data_partition.errors import DownloadFailed, SourceUnreachable
from orchestrator.backend import Job, Outcome, attempt_folder
from orchestrator.lease import this_process
from orchestrator.stage_functions import KINDS

TRANSIENT = (OSError, MemoryError, DownloadFailed, SourceUnreachable)
"""Errors of the machine; all others come from configuration, data or code, and would come again."""


def execute(job: Job) -> Outcome:
    """Run the job to its end and say how it ended, in `outcome.json` too for a controller that comes back later."""
    folder = attempt_folder(job)
    write_json(folder / "worker.json", this_process())
    outcome = _attempt(job, folder)
    write_json(folder / "outcome.json", outcome)
    return outcome


def _attempt(job: Job, folder: Path) -> Outcome:
    started = time.time()
    with _logging_to(folder / "log.txt"), _limited_threads(job.resources.cpus):
        outcome = Outcome(stage=job.stage, attempt=job.attempt, state="finished", started=started)
        try:
            _run(job)
        except Preempted as notice:
            return replace(outcome, state="preempted", error=str(notice))
        except Exception as error:  # noqa: BLE001 - the border between a stage and whoever runs it
            logging.getLogger(__name__).error("%s", traceback.format_exc())
            text = f"{type(error).__name__}: {error}"
            return replace(outcome, state="failed", error=text, transient=isinstance(error, TRANSIENT))
        return outcome


def _run(job: Job) -> None:
    kind = KINDS[job.kind]
    config = TypeAdapter(kind.config).validate_python(job.config)
    workspace = Workspace(Path(job.scratch), attempt_folder(job), tuple(Path(path) for path in job.stop_files))
    if workspace.stop_requested():
        raise Preempted(f"{job.stage} was asked to stop before it began")
    inputs = {role: Path(folder) for role, folder in job.inputs.items()}
    for folder in inputs.values():
        _verify_foreign(folder)
    publish(
        Path(job.artifact),
        lambda out: kind.run(config, inputs, out, workspace),
        stage=job.stage,
        config=config,
        inputs=job.input_fingerprints,
        island=socket.gethostname(),
        attempt=job.attempt,
        commit=job.commit,
        may_commit=lambda: not attempt_folder(replace(job, attempt=job.attempt + 1)).exists(),
    )
    _clear(workspace.scratch)


def _verify_foreign(folder: Path) -> None:
    """Compare an input with its checksums if another machine has written it."""
    artifact = next(place for place in (folder, *folder.parents) if (place / MANIFEST).is_file())
    if read_manifest(artifact).island != socket.gethostname():
        verify(artifact)


def _clear(scratch: Path) -> None:
    """Delete what only served to continue; the attempts' own folders tell what happened and are kept."""
    for path in scratch.iterdir():
        if not path.name.startswith("attempt_"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


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


@contextlib.contextmanager
def _limited_threads(cpus: int) -> Iterator[None]:
    """One thread per CPU that was given, in torch and in every BLAS; results depend on this number."""
    before = torch.get_num_threads()
    torch.set_num_threads(cpus)
    with threadpool_limits(cpus):
        try:
            yield
        finally:
            torch.set_num_threads(before)
