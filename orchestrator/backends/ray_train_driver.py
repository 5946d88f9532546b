"""Trainings on several workers, each begun by a process of its own on the Ray cluster that this one is on.

That process is a driver of Ray, so Ray takes back all that it holds as soon as it is gone, whatever has killed it. It
is `python -m orchestrator.backends.ray_train_driver`, gets its job through a pipe, and ends when that closes: with
the process that has started it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pydantic import TypeAdapter

from ddm_core.artifacts import to_jsonable
from ddm_core.signals import sigterm_flag
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder, read_outcome
from orchestrator.run.die_with_parent import die_with_parent


class TrainDrivers:
    """The trainings that run, by the name of their stage."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def start(self, job: Job, address: str) -> None:
        """Begin a job on the Ray cluster at `address`; what the process says goes to `group.log` of the attempt."""
        with _log_of(job).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.backends.ray_train_driver"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | {"RAY_ADDRESS": address},
                start_new_session=True,
            )
        if process.stdin is not None:
            process.stdin.write(json.dumps(to_jsonable(job)).encode() + b"\n")
            process.stdin.flush()
        self._running[job.stage] = (job, process)

    def ended(self) -> list[AttemptOutcome]:
        """The outcomes of those that have ended since the last call."""
        gone = [stage for stage, (_, process) in self._running.items() if process.poll() is not None]
        return [_outcome(*self._running.pop(stage)) for stage in gone]

    def kill(self, stage: str) -> None:
        """Kill a training at once, if it runs."""
        if stage in self._running:
            self._running[stage][1].kill()

    def close(self) -> None:
        """Kill whatever still runs."""
        for _, process in self._running.values():
            process.kill()
            process.wait()
        self._running.clear()


def _outcome(job: Job, process: subprocess.Popen[bytes]) -> AttemptOutcome:
    """What the process wrote down, or how it ended if it could not."""
    if process.stdin is not None:
        process.stdin.close()
    if written := read_outcome(job):
        return written
    if process.returncode < 0:
        shutil.rmtree(attempt_folder(job) / "group", ignore_errors=True)
        error = f"the process that started its workers got signal {-process.returncode}"
        return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="lost", error=error, transient=True)
    lines = _log_of(job).read_text(errors="replace").strip().splitlines()
    return AttemptOutcome(
        stage=job.stage, attempt=job.attempt, state="failed", error=lines[-1] if lines else "it said nothing"
    )


def _log_of(job: Job) -> Path:
    return attempt_folder(job) / "group.log"


def main() -> None:
    """Run the job that comes in; a SIGTERM makes its workers save their work."""
    job = TypeAdapter(Job).validate_json(sys.stdin.readline())
    die_with_parent()
    with sigterm_flag() as stopping:
        from orchestrator.backends.ray_train import run_with_ray_train  # Ray Train takes seconds to import

        run_with_ray_train(job, stopping)


if __name__ == "__main__":
    main()
