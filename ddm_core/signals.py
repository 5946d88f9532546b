"""Signals: who hears them while a block lasts, and a notice that this process must go (SIGTERM) as a flag."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def handle_signals(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Give signals to a handler while the block lasts, and then to whoever had them before."""
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


@contextlib.contextmanager
def sigterm_flag() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM has come; the handler sets a flag and nothing else.

    Once it has come, this process is ending: a later one is ignored, so that it cannot change the exit code.
    Only the main thread can hear signals: elsewhere the function always says no.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.set()

    earlier = signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if came.is_set() else earlier)
