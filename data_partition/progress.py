"""Progress of a loop over samples, and its response to stop requests."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Integer

from data_partition.shards.tar import Encoded
from ddm_core.artifacts import Preempted, Workspace


class ProgressTracker:
    """Counter of samples up to `total`; reports progress, and raises `Preempted` once a stop is requested."""

    def __init__(self, workspace: Workspace, total: int) -> None:
        self.workspace, self.total, self.done = workspace, total, 0

    def advance(self, samples: int) -> None:
        """Count `samples` more as done; raises `Preempted` on a stop request."""
        self.done += samples
        self.workspace.report_progress(self.done, self.total, unit="images")
        if self.workspace.stop_requested():
            raise Preempted(f"stopped after {self.done} of {self.total} images; this stage starts again")

    def track_batches(
        self, batches: Iterable[Integer[np.ndarray, " batch"]]
    ) -> Iterator[Integer[np.ndarray, " batch"]]:
        """Yield the same batches and count their rows."""
        for batch in batches:
            yield batch
            self.advance(len(batch))

    def track_callback(self, callback: Callable[[int, Encoded], None]) -> Callable[[int, Encoded], None]:
        """Return `callback`, extended to count each sample."""

        def tracked(row: int, sample: Encoded) -> None:
            callback(row, sample)
            self.advance(1)

        return tracked
