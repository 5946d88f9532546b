"""One attempt as a Slurm job: `python -m orchestrator.backends.slurm_worker ATTEMPT_FOLDER` is its whole command.

All that it needs lies in the attempt's folder on the shared disk: `job.json` comes in, `outcome.json` goes out. It runs
only if it gets the attempt's claim, so an attempt that was submitted twice, or given up while it was queued, does not
run twice.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from pydantic import TypeAdapter

from ddm_core.artifacts import read_json, write_json
from ddm_core.signals import sigterm_flag
from orchestrator.run.backend import EXIT_CODES, AttemptOutcome, Job
from orchestrator.run.lease import this_process


def claim(attempt: Path) -> bool:
    """Take the right to run an attempt or to give it up; True for one process alone, on whatever machine it is.

    The claim is a hard link, which exactly one of many can make, also on NFS.
    """
    own = attempt / f".claim.{this_process()['host']}.{os.getpid()}"
    write_json(own, this_process())
    try:
        os.link(own, claim_file(attempt))
    except FileExistsError:
        return False
    finally:
        own.unlink()
    return True


def claim_file(attempt: Path) -> Path:
    """Who runs the attempt, or has given it up before it began."""
    return attempt / "claim.json"


def execute_attempt(attempt: Path, stopping: Callable[[], bool] = lambda: False) -> AttemptOutcome | None:
    """Run the attempt that `job.json` describes; None if it is not ours to run."""
    if not claim(attempt):
        return None
    job = TypeAdapter(Job).validate_python(read_json(attempt / "job.json"))
    from orchestrator.run.worker import execute  # torch takes seconds to import, and the claim and a signal cannot wait

    return execute(job, stopping)


def main() -> None:
    """Run one attempt; SIGTERM (preemption) and SIGUSR2 (soon out of time) ask it to save its work."""
    with ExitStack() as stack:
        stopping = stack.enter_context(sigterm_flag())
        signal.signal(signal.SIGUSR2, _as_sigterm)
        outcome = execute_attempt(Path(sys.argv[1]), stopping)
    if outcome is None:
        sys.exit(f"{sys.argv[1]} is claimed by another process; nothing is run twice")
    sys.exit(EXIT_CODES[outcome.state])


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
