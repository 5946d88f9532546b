"""Start each training on several workers from a separate driver process, on this process's Ray cluster.

The trick: that process is a Ray driver, so Ray releases all its resources as soon as it ends, whatever kills it. It
runs `python -m orchestrator.backends.ray_train_driver`, receives its job through a pipe, and ends when the pipe closes:
with the process that started it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pydantic import TypeAdapter

from ddm_core.artifacts import to_jsonable
from ddm_core.die_with_parent import die_with_parent
from ddm_core.signals import sigterm_flag
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder, read_outcome


class TrainDrivers:
    """The driver processes of running trainings, by stage name."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}

    def __len__(self) -> int:
        return len(self._running)

    @property
    def jobs(self) -> list[Job]:
        """Return the jobs of all running trainings."""
        return [job for job, _ in self._running.values()]

    def start(self, job: Job, address: str) -> None:
        """Start a job on the Ray cluster at `address`; the process prints to `group.log` of the attempt."""
        with _log_file(job).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "orchestrator.backends.ray_train_driver"],
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

    def collect_ended(self) -> list[AttemptOutcome]:
        """Return the outcomes of the trainings that ended since the last call."""
        ended = [stage for stage, (_, process) in self._running.items() if process.poll() is not None]
        return [_outcome(*self._running.pop(stage)) for stage in ended]

    def kill(self, stage: str) -> None:
        """Kill a training if it runs."""
        if stage in self._running:
            self._running[stage][1].kill()

    def close(self) -> list[Job]:
        """Kill all running trainings and return their jobs."""
        killed = self.jobs
        for job, process in self._running.values():
            process.kill()
            process.communicate()
            shutil.rmtree(attempt_folder(job) / "group", ignore_errors=True)
        self._running.clear()
        return killed


def _outcome(job: Job, process: subprocess.Popen[bytes]) -> AttemptOutcome:
    """Return the outcome that the process wrote, or one from its exit code."""
    if process.stdin is not None:
        process.stdin.close()
    if outcome := read_outcome(job):
        return outcome
    if process.returncode < 0:
        shutil.rmtree(attempt_folder(job) / "group", ignore_errors=True)
        error = f"the driver process of its workers received signal {-process.returncode}"
        return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="lost", error=error, transient=True)
    lines = _log_file(job).read_text(errors="replace").strip().splitlines()
    return AttemptOutcome(
        stage=job.stage,
        attempt=job.attempt,
        state="failed",
        error=lines[-1] if lines else "the driver process printed nothing",
    )


def _log_file(job: Job) -> Path:
    return attempt_folder(job) / "group.log"


def main() -> None:
    """Run the job from standard input; on SIGTERM its workers save their work."""
    job = TypeAdapter(Job).validate_json(sys.stdin.readline())
    die_with_parent()
    with sigterm_flag() as stopping:
        from orchestrator.backends.ray_train import run_with_ray_train  # Ray Train takes seconds to import

        run_with_ray_train(job, stopping)


if __name__ == "__main__":
    main()
