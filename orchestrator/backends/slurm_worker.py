"""Run one attempt as a Slurm job, by the command `python -m orchestrator.backends.slurm_worker ATTEMPT_FOLDER`.

It reads `job.json` from the attempt's folder on the shared disk and writes `outcome.json` to it. It runs only if it
obtains the attempt's claim. So an attempt that was submitted twice, or abandoned while it was queued, does not run
twice.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from ddm_core.artifacts import with_checksum
from ddm_core.files.exclusive_files import create_once
from ddm_core.json_values import read_record
from ddm_core.signals import sigterm_flag
from orchestrator.run.backend import EXIT_CODES, AttemptOutcome, Job
from orchestrator.run.lease import this_process
from orchestrator.run.worker_lock import hold_worker_lock


def claim(attempt: Path) -> bool:
    """Claim the right to run or abandon an attempt; return True for exactly one process on all machines."""
    candidate = attempt / f".claim.{this_process()['host']}.{os.getpid()}"
    return create_once(claim_file(attempt), with_checksum(this_process()).encode(), candidate)


def claim_file(attempt: Path) -> Path:
    """Return the file that names the process which runs the attempt, or abandoned it before its start."""
    return attempt / "claim.json"


def execute_attempt(attempt: Path, stopping: Callable[[], bool] = lambda: False) -> AttemptOutcome | None:
    """Run the attempt of `job.json`; return None if another process holds its claim."""
    with hold_worker_lock(attempt):
        if not claim(attempt):
            return None
        job = read_record(Job, attempt / "job.json")
        from orchestrator.run.worker import execute  # torch takes seconds to import; claim and signals come first

        return execute(job, stopping)


def main() -> None:
    """Run one attempt; on SIGTERM (preemption) and SIGUSR2 (time limit near) it saves its work."""
    with ExitStack() as stack:
        stopping = stack.enter_context(sigterm_flag())
        signal.signal(signal.SIGUSR2, _as_sigterm)
        outcome = execute_attempt(Path(sys.argv[1]), stopping)
    if outcome is None:
        sys.exit(f"{sys.argv[1]} is claimed by another process; no attempt runs twice")
    sys.exit(EXIT_CODES[outcome.state])


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
