"""Batches of the coming steps, drawn in a thread ahead of the training, in memory from which a GPU copies fast.

A CPU draws each batch when it is needed: a thread would take the time from the step, and 8 % more on a small network.
Where a batch has to be read and decoded first, it is drawn ahead on a CPU too.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from experts.training.latent_dataset import Batch

AHEAD = 2
"""Batches that are drawn before they are needed."""


class BatchesAhead:
    """Draws batches in one thread; which batch a step gets does not depend on it."""

    def __init__(self, steps: int, device: torch.device, *, are_read: bool = False) -> None:
        """Draw batches for steps below `steps`; `are_read` says whether they wait for a disk or a server."""
        self.steps, self.device, self.is_ahead = steps, device, are_read or device.type != "cpu"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._drawn: dict[int, Future[Batch]] = {}

    def __enter__(self) -> "BatchesAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int, draw: Callable[[int], Batch]) -> Batch:
        """Return the batch of a step, and have those after it drawn; raises what `draw` raises."""
        if not self.is_ahead:
            return draw(step)
        for coming in range(step, min(step + 1 + AHEAD, self.steps)):
            if coming not in self._drawn:
                self._drawn[coming] = self._thread.submit(self._draw, coming, draw)
        return self._drawn.pop(step).result()

    def clear(self) -> None:
        """Forget the batches that are drawn, because `draw` has changed."""
        for drawn in self._drawn.values():
            drawn.cancel()
        self._drawn.clear()

    def _draw(self, step: int, draw: Callable[[int], Batch]) -> Batch:
        batch = draw(step)
        return batch.pin_memory() if self.device.type == "cuda" else batch
