"""The loop over the trials of a sweep: start as many as fit, record how they ended, stop on a signal."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ddm_core.signals import handle_signals
from orchestrator.errors import RunFailed, RunIsLocked
from orchestrator.run.lease import hold_lease
from orchestrator.run.run_folder import RunFolder
from orchestrator.sweeps.display import SweepDisplay
from orchestrator.sweeps.trial import SweepStopped, SweepTrial, TrialEnd
from orchestrator.sweeps.trial_pool import TrialPool

POLL_S = 0.5


@dataclass(slots=True)
class _StopSignals:
    """The number of stop signals received."""

    count: int = 0


def run_trials(
    pool: TrialPool,
    next_trial: Callable[[], SweepTrial | None],
    record_end: Callable[[TrialEnd], None],
    display: SweepDisplay,
) -> None:
    """Run trials until `next_trial` returns None and all have ended, or until a signal stops the sweep.

    The first Ctrl-C or SIGTERM lets every trial save its work; a second one kills the trials.
    """
    handled = 0
    with _count_stop_signals() as signals:
        while True:
            while pool.has_room and (trial := next_trial()) is not None:
                pool.start(trial)
                if trial.label in pool.running:
                    display.show_start(trial)
            if pool.is_idle:
                return
            for end in pool.poll(POLL_S):
                record_end(end)
                display.show_end(end)
            if signals.count > handled:
                (pool.kill if handled else pool.stop)()
                display.print_line("Stopping; the same command continues later. Press Ctrl-C again to stop at once.")
                handled = signals.count


@contextlib.contextmanager
def _count_stop_signals() -> Iterator[_StopSignals]:
    """Count SIGINT and SIGTERM while the block lasts."""
    signals = _StopSignals()

    def count(number: int, frame: FrameType | None) -> None:
        signals.count += 1

    with handle_signals(count, signal.SIGINT, signal.SIGTERM):
        yield signals


@contextlib.contextmanager
def lock_sweep_folder(folder: Path) -> Iterator[None]:
    """Lock a sweep's folder while the block lasts; raises `RunIsLocked` with the other sweep's process."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lease(RunFolder(folder)))
        except RunIsLocked as error:
            raise RunIsLocked(
                f"another sweep runs in this folder: {str(error).partition(';')[0]}; wait for it, stop it with "
                "Ctrl-C, or set another folder=…"
            ) from None
        yield


def raise_if_incomplete(ends: Sequence[TrialEnd], *, unstarted: int = 0) -> None:
    """Raise `SweepStopped` if trials were stopped or never started, `RunFailed` if any failed."""
    failed = [end for end in ends if end.state == "failed"]
    stopped = sum(end.state == "stopped" for end in ends) + unstarted
    lines = "".join(f"\n  {end.trial.label}: {end.error}" for end in failed)
    if stopped:
        raise SweepStopped(f"{stopped} trial(s) of the sweep are unfinished; the same command continues{lines}")
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(ends)} trial(s) failed; the same command retries them and keeps the others{lines}"
        )
