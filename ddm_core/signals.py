"""Signal handlers that last for a block, and a flag for SIGTERM, the request to stop this process."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def handle_signals(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Install a handler for some signals during the block; restore the previous handlers at its end."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


@contextlib.contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM has arrived; the handler sets a flag and nothing else.

    After the first SIGTERM this process is ending: later ones are ignored, so that they cannot change the exit code.
    Only the main thread can receive signals: in other threads the function always returns False.
    """
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return

    def set_flag(number: int, frame: FrameType | None) -> None:
        received.set()

    previous = signal.signal(signal.SIGTERM, set_flag)
    try:
        yield received.is_set
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if received.is_set() else previous)
