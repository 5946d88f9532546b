"""`data.engine=ray`: one streaming plan of Ray Data for each stage, on a pool of processes of this Ray cluster.

The pieces are few numbers; what they stand for lies on a disk that all nodes share, or in object storage. Results come
back in the order of the pieces, through Ray's object store, which holds the processes up when it is full, and spills.
A process that dies is started again, and its piece with it. The stage itself holds no CPU while it waits.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddm_core.engine import Piece, Result
from orchestrator.config.compute import ResourcesConfig

MAX_BLOCKS = 4096
"""Largest number of blocks that a plan begins with; more pieces share them."""

SEND_S = 0.1
"""Time for which a process collects results before it sends them."""


@dataclass(frozen=True, slots=True)
class _Results:
    """Some results, of a class that Arrow does not know, so that they come back as they were."""

    values: list[Any]
    error: Exception | None = None
    """What followed them; Ray would wrap it, and print it as its own."""


class _Worker:
    """A process of the pool; yields the results of one piece."""

    def __init__(
        self, start: Callable[[], Callable[[Piece], Iterable[Result]]], pieces: Sequence[Piece], cpus: int
    ) -> None:
        from orchestrator.run.worker import limited_threads  # torch is imported only in the workers

        self._start, self._pieces, self._limited_threads = start, pieces, limited_threads(cpus)
        self._limited_threads.__enter__()
        self._work: Callable[[Piece], Iterable[Result]] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        values: list[Any] = []
        sent, error = time.monotonic(), None
        try:
            self._work = self._work or self._start()
            for number in batch["piece"]:
                for value in self._work(self._pieces[number]):
                    values.append(value)
                    if time.monotonic() - sent > SEND_S:
                        yield _as_block(_Results(values))
                        values, sent = [], time.monotonic()
        except Exception as caught:  # noqa: BLE001 - the border between a piece and the stage, which raises it
            error = caught
        yield _as_block(_Results(values, error))


def _as_block(results: _Results) -> dict[str, np.ndarray]:
    column = np.empty(1, dtype=object)
    column[0] = results
    return {"results": column}


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Computes pieces on `resources.workers` processes, each with the CPUs, GPUs and memory of `resources`."""

    resources: ResourcesConfig

    def map(
        self, start: Callable[[], Callable[[Piece], Iterable[Result]]], pieces: Iterable[Piece]
    ) -> Generator[Result]:
        """Yield the results of all pieces, in the order of the pieces."""
        import ray.data  # it imports pandas and pyarrow, which the controller does not need

        listed = list(pieces)
        if not listed:
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.target_max_block_size = 1
        plan = ray.data.from_items(
            [{"piece": number} for number in range(len(listed))], override_num_blocks=min(len(listed), MAX_BLOCKS)
        ).map_batches(
            _Worker,
            batch_size=1,
            fn_constructor_args=(start, listed, self.resources.cpus),
            compute=ray.data.ActorPoolStrategy(size=self.resources.workers),
            **ray_options(self.resources),
        )
        for row in plan.iter_rows():
            results: _Results = row["results"]
            yield from results.values
            if results.error is not None:
                raise results.error


def ray_options(resources: ResourcesConfig) -> dict[str, Any]:
    """Return what Ray reserves for one worker, by Ray's names."""
    return {
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "memory": int(resources.memory_gb * 2**30) or None,
        "label_selector": resources.label_selector,
    }
