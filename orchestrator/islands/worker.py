"""One attempt of one stage on an island: `python -m orchestrator.islands.worker --storage URL --job NAME --digest …`.

It fetches its inputs and the latest checkpoint, trains, and brings back log, checkpoints and the model, all through
the island's storage. It needs nobody: while the controller is away it goes on. Exit code 0 is finished, 75 is preempted
with the work saved, 1 is failed; why stands in `outcome.json`.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ddm_core.artifacts import write_json
from ddm_core.signals import sigterm_flag
from orchestrator.islands.checkpoint_mirror import CheckpointMirror
from orchestrator.islands.layout import Names, job_of, names_of, rebase_paths
from orchestrator.islands.storage.storage import CorruptTransfer, Storage, StorageError, StorageUnreachable
from orchestrator.run.backend import EXIT_CODES, AttemptOutcome, Job, attempt_folder

log = logging.getLogger(__name__)

SENT_ROOT = Path("/run")
"""Stands for the run folder in a job that is sent to an island."""

WORKDIR = "DDM_WORKDIR"
"""Environment variable that says where inputs and checkpoints lie on the node; a folder in /tmp without it."""


@dataclass(frozen=True, slots=True)
class Node:
    """The folders of one run on this node."""

    shared: Path
    """Inputs, which all attempts on this node read."""
    own: Path
    """Everything of this attempt alone, so that one that was given up cannot disturb it."""

    @classmethod
    def of(cls, run_id: str, names: Names) -> "Node":
        """The folders for one attempt."""
        default = Path(tempfile.gettempdir()) / f"ddm-{os.getuid()}"
        base = Path(os.environ.get(WORKDIR, default)) / run_id
        return cls(base, base / "attempts" / f"{names.stage}-a{names.attempt}")

    def input(self, sent: str) -> Path:
        """Where an input is here; an artifact and a part of it lie apart, so that one can be replaced alone."""
        return self.shared / "inputs" / tree_name(sent).replace("/", "..")

    def to_local_paths(self, job: Job) -> Job:
        """The job with this node's paths."""
        inputs = {role: str(self.input(sent)) for role, sent in job.inputs.items()}
        return replace(rebase_paths(job, SENT_ROOT, self.own), inputs=inputs)


def tree_name(sent: str) -> str:
    """The name in the storage of a path in a job that was sent."""
    return str(Path(sent).relative_to(SENT_ROOT))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attempt and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.islands.worker", description=__doc__.splitlines()[0])
    parser.add_argument("--storage", required=True, help="the run's place in the island's storage")
    parser.add_argument("--options", default="{}", help="options of its file system, as JSON")
    parser.add_argument("--job", required=True, help="name of the job in the storage")
    parser.add_argument("--digest", required=True, help="SHA-256 of the job as it was submitted")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    storage = Storage(given.storage, json.loads(given.options))
    with sigterm_flag() as stopping:
        job = job_of(storage.get_json(given.job) or {}, given.digest)
        outcome = run(storage, job, Node.of(given.storage.rstrip("/").rpartition("/")[2], names_of(job)), stopping)
    log.info("%s %s", outcome.state, outcome.error)
    return EXIT_CODES[outcome.state]


def run(storage: Storage, sent: Job, node: Node, stopping: Callable[[], bool]) -> AttemptOutcome:
    """Fetch, train, bring back; the outcome is in the storage before it is returned."""
    names, job = names_of(sent), node.to_local_paths(sent)
    folder = attempt_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    with CheckpointMirror(storage, names, folder, Path(job.scratch)) as mirror:
        outcome = _fetched(storage, names, sent, job, node) or _execute(job, stopping)
        mirror.push_state()
        if outcome.state == "finished":
            outcome = _published(storage, names, job, mirror, outcome)
        write_json(folder / "outcome.json", outcome)
    shutil.rmtree(node.own, ignore_errors=True)
    return outcome


def _execute(job: Job, stopping: Callable[[], bool]) -> AttemptOutcome:
    if job.resources.workers > 1:
        from orchestrator.backends.ray_train import run_with_ray_train

        return run_with_ray_train(job, stopping)
    from orchestrator.run.worker import execute

    return execute(job, stopping)


def _fetched(storage: Storage, names: Names, sent: Job, job: Job, node: Node) -> AttemptOutcome | None:
    """Bring inputs and the latest checkpoint here; an outcome if that cannot be done."""
    outcome = AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed", started=time.time())
    try:
        for given in set(sent.inputs.values()):
            with _locked(node.input(given)):
                storage.get_tree(tree_name(given), node.input(given))
        _fetch_state(storage, names, Path(job.scratch))
    except StorageError as error:
        transient = isinstance(error, StorageUnreachable | CorruptTransfer)
        return replace(outcome, error=f"{type(error).__name__}: {error}", transient=transient)
    except OSError as error:
        return replace(outcome, error=f"{type(error).__name__}: {error}", transient=True)
    return None


def _fetch_state(storage: Storage, names: Names, scratch: Path) -> None:
    """Bring the latest checkpoint here; one that is damaged in the storage is deleted, so that a retry helps."""
    if not storage.has_tree(names.state):
        return
    try:
        storage.get_tree(names.state, scratch)
    except CorruptTransfer as error:
        storage.delete(names.state)
        raise CorruptTransfer(f"{error}; it was deleted, so the next attempt begins anew") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process of this node fetch a folder, while others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _published(
    storage: Storage, names: Names, job: Job, mirror: CheckpointMirror, outcome: AttemptOutcome
) -> AttemptOutcome:
    """Bring the artifact to the storage; an attempt that a later one has replaced must not."""
    if mirror.is_fenced():
        return replace(outcome, state="preempted", error=f"a later attempt than {job.attempt} owns {job.stage}")
    try:
        mirror.retry_while_unreachable(lambda: storage.put_tree(Path(job.artifact), names.artifact))
    except StorageError as error:
        return replace(outcome, state="failed", error=f"{type(error).__name__}: {error}", transient=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
