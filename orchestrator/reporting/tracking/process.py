"""Child processes beside the controller, so that neither a slow tracker nor a failing webhook concerns the run."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from orchestrator.config.schema import NotifyConfig, TrackingConfig
from orchestrator.reporting.tracking.webhook import SEND_WITHIN_S, read_url
from orchestrator.run.run_folder import RunFolder

EXIT_WITHIN_S = 5.0
"""Time that the process has to exit beyond its own limit."""


@contextmanager
def track_run(run: RunFolder, config: TrackingConfig, warn: Callable[[str], None]) -> Iterator[None]:
    """Track the run while the block lasts; call `warn` once, with one line, if the tracker failed.

    After the block the tracker has `wandb.finish_s` seconds to send the rest.
    """
    if config.mode == "disabled":
        yield
        return
    with _beside(
        run, "tracker", config.finish_s, lambda reason: warn(f"{config.library} could not track the run: {reason}")
    ):
        yield


@contextmanager
def notify_of(run: RunFolder, config: NotifyConfig, warn: Callable[[str], None]) -> Iterator[None]:
    """Send the events of the run to its webhook while the block lasts; call `warn` once if one could not be sent."""
    if not config.webhook_file:
        yield
        return
    read_url(config)
    with _beside(run, "webhook", SEND_WITHIN_S, lambda reason: warn(f"the webhook was not reached: {reason}"), True):
        yield


@contextmanager
def _beside(
    run: RunFolder, module: str, finish_s: float, on_failure: Callable[[str], None], outlives_errors: bool = False
) -> Iterator[None]:
    """Run a module of this folder while the block lasts, and for `finish_s` longer.

    The process gets a session of its own, so that Ctrl-C in a terminal does not reach it. It is killed if the block
    raises, unless it `outlives_errors`, to report them.
    """
    run.tracking.mkdir(exist_ok=True)
    log = run.tracking / f"{module}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"orchestrator.reporting.tracking.{module}", str(run.root.absolute())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
        with suppress(subprocess.TimeoutExpired):
            process.communicate(b"end\n", timeout=finish_s + EXIT_WITHIN_S)
    except BaseException:
        if outlives_errors:
            process.communicate(timeout=finish_s)
        raise
    finally:
        process.kill()
        process.communicate()
    if process.returncode:
        reason = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        on_failure(f"{reason or 'its process was killed'} (all of it: {log})")
