"""Run one attempt of one stage: `python -m orchestrator.islands.worker --storage URL --job NAME --digest …`.

The worker downloads inputs and the latest checkpoint, trains, and uploads log, checkpoints and the model, all through
the island's storage. It does not need the controller while it runs. Exit code 0 is finished, 75 is preempted with the
work saved, 1 is failed; `outcome.json` has the reason.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ddm_core.artifacts import write_record
from ddm_core.signals import sigterm_flag
from orchestrator.errors import IslandError
from orchestrator.islands.checkpoint_mirror import CheckpointMirror
from orchestrator.islands.layout import AttemptNames, get_attempt_names, parse_job, rebase_paths
from orchestrator.islands.storage.storage import CorruptTransfer, Storage, StorageError, StorageUnreachable
from orchestrator.run.backend import EXIT_CODES, AttemptOutcome, Job, attempt_folder

log = logging.getLogger(__name__)

PLACEHOLDER_ROOT = Path("/run")
"""Replaces the run folder in a job that is sent to an island."""

WORKDIR = "DDM_WORKDIR"
"""Environment variable with the folder for inputs and checkpoints on the node; a folder in /tmp if it is not set."""


@dataclass(frozen=True, slots=True)
class NodeFolders:
    """Folders of one run on this node."""

    shared: Path
    """Inputs, which all attempts on this node read."""
    attempt: Path
    """All other files of this attempt, so an earlier attempt that still runs cannot change them."""

    @classmethod
    def for_attempt(cls, run_id: str, names: AttemptNames) -> "NodeFolders":
        """Return the folders for one attempt."""
        base = Path(os.environ.get(WORKDIR) or _private_folder()) / run_id
        return cls(base, base / "attempts" / f"{names.stage}-a{names.attempt}")

    def input_folder(self, path: str) -> Path:
        """Return the local folder of an input; an artifact and a part of it are siblings, so each can be replaced."""
        return self.shared / "inputs" / get_tree_name(path).replace("/", "..")

    def to_local_paths(self, job: Job) -> Job:
        """Return the job with this node's paths."""
        inputs = {role: str(self.input_folder(path)) for role, path in job.inputs.items()}
        return replace(rebase_paths(job, PLACEHOLDER_ROOT, self.attempt), inputs=inputs)


def _private_folder() -> Path:
    """Create this user's folder in the temporary one, or reuse it; raises `IslandError` if others can write to it."""
    folder = Path(tempfile.gettempdir()) / f"ddm-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise IslandError(
            f"{folder} must be a folder that only user {os.getuid()} can write to; delete it, or set {WORKDIR} in "
            "compute.islands.<name>.env to another one"
        )
    return folder


def get_tree_name(path: str) -> str:
    """Return the name in the storage of a path in a submitted job."""
    return str(Path(path).relative_to(PLACEHOLDER_ROOT))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attempt and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.islands.worker", description=__doc__.splitlines()[0])
    parser.add_argument("--storage", required=True, help="URL of the run's folder in the island's storage")
    parser.add_argument("--options", default="{}", help="options of the storage's driver, as JSON")
    parser.add_argument("--job", required=True, help="name of the job in the storage")
    parser.add_argument("--digest", required=True, help="SHA-256 of the job as it was submitted")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    storage = Storage(options.storage, json.loads(options.options))
    run_id = options.storage.rstrip("/").rpartition("/")[2]
    with sigterm_flag() as should_stop:
        try:
            job = parse_job(storage.get_json(options.job) or {}, options.digest)
            node = NodeFolders.for_attempt(run_id, get_attempt_names(job))
        except IslandError as error:
            log.error("%s", error)
            return EXIT_CODES["failed"]
        outcome = run(storage, job, node, should_stop)
    log.info("%s %s", outcome.state, outcome.error)
    return EXIT_CODES[outcome.state]


def run(storage: Storage, submitted: Job, node: NodeFolders, should_stop: Callable[[], bool]) -> AttemptOutcome:
    """Download, train and upload; the outcome is in the storage before it is returned."""
    names, job = get_attempt_names(submitted), node.to_local_paths(submitted)
    folder = attempt_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    with CheckpointMirror(storage, names, folder, Path(job.scratch)) as mirror:
        outcome = _fetch_inputs(storage, names, submitted, job, node) or _execute(job, should_stop)
        mirror.push_state()
        if outcome.state == "finished":
            outcome = _publish(storage, names, job, mirror, outcome)
        write_record(folder / "outcome.json", outcome)
    shutil.rmtree(node.attempt, ignore_errors=True)
    return outcome


def _execute(job: Job, should_stop: Callable[[], bool]) -> AttemptOutcome:
    if job.resources.workers > 1:
        from orchestrator.backends.ray_train import run_with_ray_train

        return run_with_ray_train(job, should_stop)
    from orchestrator.run.worker import execute

    return execute(job, should_stop)


def _fetch_inputs(
    storage: Storage, names: AttemptNames, submitted: Job, job: Job, node: NodeFolders
) -> AttemptOutcome | None:
    """Download inputs and the latest checkpoint; return an outcome if that fails, else None."""
    outcome = AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed", started=time.time())
    try:
        for path in set(submitted.inputs.values()):
            with _lock_folder(node.input_folder(path)):
                storage.get_tree(get_tree_name(path), node.input_folder(path))
        _fetch_state(storage, names, Path(job.scratch))
    except StorageError as error:
        transient = isinstance(error, StorageUnreachable | CorruptTransfer)
        return replace(outcome, error=f"{type(error).__name__}: {error}", transient=transient)
    except OSError as error:
        return replace(outcome, error=f"{type(error).__name__}: {error}", transient=True)
    return None


def _fetch_state(storage: Storage, names: AttemptNames, scratch: Path) -> None:
    """Download the latest checkpoint; delete one that is corrupt in the storage, so that a retry succeeds."""
    if not storage.has_tree(names.state):
        return
    try:
        storage.get_tree(names.state, scratch)
    except CorruptTransfer as error:
        storage.delete(names.state)
        raise CorruptTransfer(f"{error}; it was deleted, so the next attempt starts at step 0") from error


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Let one process of this node download a folder, while others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _publish(
    storage: Storage, names: AttemptNames, job: Job, mirror: CheckpointMirror, outcome: AttemptOutcome
) -> AttemptOutcome:
    """Upload the artifact, unless a later attempt has replaced this one."""
    if mirror.is_fenced():
        return replace(outcome, state="preempted", error=f"a later attempt than {job.attempt} owns {job.stage}")
    try:
        mirror.retry_while_unreachable(lambda: storage.put_tree(Path(job.artifact), names.artifact))
    except StorageError as error:
        return replace(outcome, state="failed", error=f"{type(error).__name__}: {error}", transient=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
