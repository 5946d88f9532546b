"""Progress of a walk over samples, and the place where it may be stopped."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Integer

from data_partition.shards.tar import Encoded
from ddm_core.artifacts import Preempted, Workspace


class ProgressTracker:
    """Counts samples up to `total`, reports them, and raises `Preempted` once a stop is requested."""

    def __init__(self, workspace: Workspace, total: int) -> None:
        self.workspace, self.total, self.done = workspace, total, 0

    def step(self, samples: int) -> None:
        """`samples` more are done."""
        self.done += samples
        self.workspace.report_progress(self.done, self.total, unit="images")
        if self.workspace.stop_requested():
            raise Preempted(f"stopped after {self.done} of {self.total} images; this stage starts again")

    def over(self, batches: Iterable[Integer[np.ndarray, " batch"]]) -> Iterator[Integer[np.ndarray, " batch"]]:
        """The same batches, watched."""
        for batch in batches:
            yield batch
            self.step(len(batch))

    def each(self, act: Callable[[int, Encoded], None]) -> Callable[[int, Encoded], None]:
        """`act`, watched."""

        def watched(row: int, sample: Encoded) -> None:
            act(row, sample)
            self.step(1)

        return watched
