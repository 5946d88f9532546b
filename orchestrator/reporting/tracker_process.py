"""The tracker beside the controller: a child process, so that neither a slow nor a failing wandb concerns the run."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from orchestrator.config.schema import TrackingConfig
from orchestrator.run.run_folder import RunFolder

EXIT_WITHIN_S = 5.0
"""Time that the process has to exit beyond its own limit."""


@contextmanager
def track_run(run: RunFolder, config: TrackingConfig, warn: Callable[[str], None]) -> Iterator[None]:
    """Track the run while the block lasts; call `warn` once, with one line, if the tracker failed.

    The process gets a session of its own, so that Ctrl-C in a terminal does not reach it. After the block it has
    `wandb.finish_s` seconds to send the rest.
    """
    if config.mode == "disabled":
        yield
        return
    run.tracking.mkdir(exist_ok=True)
    log = run.tracking / "tracker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "orchestrator.reporting.wandb_tracker", str(run.root.absolute())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
        with suppress(subprocess.TimeoutExpired):
            process.communicate(b"end\n", timeout=config.finish_s + EXIT_WITHIN_S)
    finally:
        process.kill()
        process.communicate()
    if process.returncode:
        reason = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        warn(f"wandb could not track the run: {reason or 'its process was killed'} (all of it: {log})")
