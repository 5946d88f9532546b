"""The peak memory of this process, sampled by a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def watching_memory() -> Iterator[list[int]]:
    """Yield a list that gets the memory of this process in bytes every millisecond, beyond that at the start."""
    before, done = anonymous_bytes(), threading.Event()
    seen = [0]

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def anonymous_bytes() -> int:
    """Return the memory of this process that is no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
