"""Uploads an attempt's folder, checkpoints and heartbeat to the island's storage while it trains."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ddm_core.artifacts import CACHE
from orchestrator.islands.layout import AttemptNames
from orchestrator.islands.storage.storage import Storage, StorageError, StorageUnreachable

log = logging.getLogger(__name__)

SYNC_INTERVAL_S = 0.5
"""Longest time from the write of a checkpoint to the start of its upload."""

HEARTBEAT_S = 3.0

PATIENCE_S = 600.0
"""How long a finished attempt retries a storage that does not respond."""


class CheckpointMirror:
    """A thread that uploads changed files; while the storage is unreachable, only the copies are late."""

    def __init__(self, storage: Storage, names: AttemptNames, attempt: Path, state: Path) -> None:
        self.storage, self.names, self.attempt, self.state = storage, names, attempt, state
        self._stopped = threading.Event()
        self._upload_lock = threading.Lock()
        self._heartbeats, self._last_heartbeat, self._uploaded_mtime_ns = 0, 0.0, 0
        self._thread = threading.Thread(target=self._sync_loop, daemon=True, name="mirror")

    def __enter__(self) -> Self:
        """Start the upload thread."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread, then upload the attempt's folder with its outcome."""
        self._stopped.set()
        self._thread.join()
        self.retry_while_unreachable(lambda: self.storage.put_tree(self.attempt, self.names.folder))

    def is_fenced(self) -> bool:
        """Return whether a later attempt of the stage was submitted to this storage."""
        try:
            return self.storage.get_json(self.names.next().job) is not None
        except StorageUnreachable:
            return False

    def push_state(self) -> None:
        """Upload the present checkpoints."""
        if self.state.is_dir() and not self.is_fenced():
            self.retry_while_unreachable(self._upload_state)

    def retry_while_unreachable(self, upload: Callable[[], object]) -> None:
        """Call `upload` until the storage responds; raise its last error after `PATIENCE_S`."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self._upload_lock:
                    upload()
            except StorageUnreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(SYNC_INTERVAL_S)
            else:
                return

    def _sync_loop(self) -> None:
        while not self._stopped.wait(SYNC_INTERVAL_S):
            try:
                with self._upload_lock:
                    self._sync_once()
            except (StorageError, OSError) as error:
                log.warning("not mirrored yet: %s", error)

    def _sync_once(self) -> None:
        if time.monotonic() - self._last_heartbeat > HEARTBEAT_S:
            self._heartbeats, self._last_heartbeat = self._heartbeats + 1, time.monotonic()
            self.storage.put_json(self.names.heartbeat, {"beats": self._heartbeats})
        mtime_ns = self._latest_mtime_ns()
        if mtime_ns != self._uploaded_mtime_ns and not self.is_fenced():
            self._upload_state()
            self._uploaded_mtime_ns = mtime_ns  # set after the upload, so a failed one is retried
        self.storage.put_tree(self.attempt, self.names.folder)

    def _latest_mtime_ns(self) -> int:
        """Return the latest modification time of the state's files, in nanoseconds; 0 if there are none."""
        return max((path.stat().st_mtime_ns for path in self.state.glob("**/*") if path.is_file()), default=0)

    def _upload_state(self) -> None:
        self.storage.put_tree(self.state, self.names.state, skip=(CACHE,))
