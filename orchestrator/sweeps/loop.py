"""One walk over the trials of a sweep: start as many as fit, hear how they ended, stop when asked to."""

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
class _Notice:
    """How often the sweep was asked to stop."""

    times: int = 0


def run_trials(
    pool: TrialPool,
    following: Callable[[], SweepTrial | None],
    ended: Callable[[TrialEnd], None],
    display: SweepDisplay,
) -> None:
    """Run trials until `following` gives None and all have ended, or until a signal stops the sweep.

    The first Ctrl-C or SIGTERM lets every trial save its work; a second one does not wait for that.
    """
    heard = 0
    with _listening() as notice:
        while True:
            while pool.has_room and (trial := following()) is not None:
                pool.start(trial)
                if trial.label in pool.members:
                    display.started(trial)
            if pool.is_idle:
                return
            for end in pool.poll(POLL_S):
                ended(end)
                display.ended(end)
            if notice.times > heard:
                (pool.kill if heard else pool.stop)()
                display.print("Stopping; the same command goes on later. Press Ctrl-C again to stop at once.")
                heard = notice.times


@contextlib.contextmanager
def _listening() -> Iterator[_Notice]:
    """Count SIGINT and SIGTERM while the block lasts."""
    notice = _Notice()

    def note(number: int, frame: FrameType | None) -> None:
        notice.times += 1

    with handle_signals(note, signal.SIGINT, signal.SIGTERM):
        yield notice


@contextlib.contextmanager
def only_sweep(folder: Path) -> Iterator[None]:
    """Be the only sweep in its folder while the block lasts; raises `RunIsLocked` naming the other one."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_lease(RunFolder(folder)))
        except RunIsLocked as error:
            raise RunIsLocked(
                f"another sweep is at work here: {str(error).partition(';')[0]}; wait for it, stop it with Ctrl-C, or "
                "choose another folder=…"
            ) from None
        yield


def finish_sweep(ends: Sequence[TrialEnd], *, unstarted: int = 0) -> None:
    """Raise `SweepStopped` if trials were stopped or never started, `RunFailed` naming all that failed."""
    failed = [end for end in ends if end.state == "failed"]
    stopped = sum(end.state == "stopped" for end in ends) + unstarted
    lines = "".join(f"\n  {end.trial.label}: {end.error}" for end in failed)
    if stopped:
        raise SweepStopped(f"{stopped} trial(s) of the sweep are not finished; the same command goes on{lines}")
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(ends)} trial(s) failed; the same command tries them again and keeps the rest{lines}"
        )
