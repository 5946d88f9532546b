"""Signal handlers that last for a block, and a flag for SIGTERM and SIGHUP, the requests to stop this process."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def handle_signals(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Install a handler for some signals during the block; restore the previous handlers at its end."""
    previous = {number: signal.signal(number, handler) for number in _unless_ignored(*numbers)}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


@contextlib.contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM or SIGHUP has arrived; the handler sets a flag and nothing else.

    After the first one this process is ending: later ones are ignored, so that they cannot change the exit code.
    Only the main thread can receive signals: in other threads the function always returns False.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return

    def set_flag(number: int, frame: FrameType | None) -> None:
        received.set()

    previous = {number: signal.signal(number, set_flag) for number in _unless_ignored(signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received.is_set
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, signal.SIG_IGN if received.is_set() else previous_handler)


def _unless_ignored(*numbers: signal.Signals) -> list[signal.Signals]:
    """Return the signals, without SIGHUP if it is ignored: `nohup` asks for that."""
    is_kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in numbers if number != signal.SIGHUP or not is_kept]
