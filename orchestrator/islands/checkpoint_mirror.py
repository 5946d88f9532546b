"""Keeps an attempt's folder and its checkpoints in the island's storage while it trains, and gives signs of life."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ddm_core.artifacts import CACHE
from orchestrator.islands.layout import Names
from orchestrator.islands.storage.storage import Storage, StorageError, StorageUnreachable

log = logging.getLogger(__name__)

SYNC_INTERVAL_S = 0.5
"""How soon after it is written a checkpoint is on its way."""

HEARTBEAT_S = 3.0

PATIENCE_S = 600.0
"""How long a finished attempt tries to reach a storage that does not answer."""


class CheckpointMirror:
    """A thread that sends what has changed; a storage that is away for a while costs nothing but the copies."""

    def __init__(self, storage: Storage, names: Names, attempt: Path, state: Path) -> None:
        self.storage, self.names, self.attempt, self.state = storage, names, attempt, state
        self._ended = threading.Event()
        self._sending = threading.Lock()
        self._beats, self._beat_at, self._seen = 0, 0.0, 0
        self._thread = threading.Thread(target=self._sync_loop, daemon=True, name="mirror")

    def __enter__(self) -> Self:
        """Start following."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send the last word, how it ended included."""
        self._ended.set()
        self._thread.join()
        self.retry_while_unreachable(lambda: self.storage.put_tree(self.attempt, self.names.folder))

    def is_fenced(self) -> bool:
        """Whether a later attempt of the stage was submitted to this storage."""
        try:
            return self.storage.get_json(self.names.next().job) is not None
        except StorageUnreachable:
            return False

    def push_state(self) -> None:
        """Send the checkpoints as they are now."""
        if self.state.is_dir() and not self.is_fenced():
            self.retry_while_unreachable(self._send_state)

    def retry_while_unreachable(self, send: Callable[[], object]) -> None:
        """Do it, again and again while the storage does not answer."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self._sending:
                    send()
            except StorageUnreachable:
                if time.monotonic() > give_up:
                    raise
                time.sleep(SYNC_INTERVAL_S)
            else:
                return

    def _sync_loop(self) -> None:
        while not self._ended.wait(SYNC_INTERVAL_S):
            try:
                with self._sending:
                    self._sync_once()
            except (StorageError, OSError) as error:
                log.warning("not mirrored yet: %s", error)

    def _sync_once(self) -> None:
        if time.monotonic() - self._beat_at > HEARTBEAT_S:
            self._beats, self._beat_at = self._beats + 1, time.monotonic()
            self.storage.put_json(self.names.beat, {"beats": self._beats})
        newest = self._newest()
        if newest != self._seen and not self.is_fenced():
            self._send_state()
            self._seen = newest  # only now: what could not be sent is tried again
        self.storage.put_tree(self.attempt, self.names.folder)

    def _newest(self) -> int:
        """When the state was last written to, in nanoseconds; 0 if there is none."""
        return max((path.stat().st_mtime_ns for path in self.state.glob("**/*") if path.is_file()), default=0)

    def _send_state(self) -> None:
        self.storage.put_tree(self.state, self.names.state, skip=(CACHE,))
