"""A queue of jobs that are run in batches of one key; it knows neither networks nor HTTP.

A batch starts when its key has a full batch, or its oldest job has waited for `wait_s`. The key with the oldest job
comes first, so no key starves. While a batch runs, the next ones gather, and then start at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Job, Result]):
    job: Job
    since: float
    result: "asyncio.Future[Result]"


@dataclass(slots=True, kw_only=True)
class Batcher(Generic[Key, Job, Result]):
    """Runs one batch at a time; all methods belong to one event loop."""

    run: Callable[[Key, Sequence[Job]], Awaitable[Sequence[Result]]]
    """Returns one result for each job, in order; what it raises is raised for every job of the batch."""
    max_jobs: int
    """Most jobs of a batch."""
    wait_s: float
    _waiting: dict[Key, list[_Waiting[Job, Result]]] = field(default_factory=dict)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _worker: "asyncio.Task[None] | None" = None

    async def submit(self, key: Key, job: Job) -> Result:
        """Return the result of a job; cancelled before its batch starts, it is never run."""
        loop = asyncio.get_running_loop()
        waiting: _Waiting[Job, Result] = _Waiting(job, loop.time(), loop.create_future())
        self._waiting.setdefault(key, []).append(waiting)
        self._arrived.set()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            return await waiting.result
        finally:
            self._drop(key, waiting)

    def __len__(self) -> int:
        """Return the number of jobs that have not started."""
        return sum(map(len, self._waiting.values()))

    def _drop(self, key: Key, waiting: _Waiting[Job, Result]) -> None:
        jobs = self._waiting.get(key, [])
        if waiting in jobs:
            jobs.remove(waiting)
        if not jobs:
            self._waiting.pop(key, None)

    async def _work(self) -> None:
        """Run batches until no job waits."""
        while self._waiting:
            key, start = self._next_batch()
            now = asyncio.get_running_loop().time()
            if start > now:
                self._arrived.clear()
                try:
                    async with asyncio.timeout(start - now):
                        await self._arrived.wait()
                except TimeoutError:
                    pass
                continue
            await self._run_batch(key)

    def _next_batch(self) -> tuple[Key, float]:
        """Return the key of the next batch, and the time at which it may start; 0 for a full batch."""
        starts = {
            key: 0.0 if len(jobs) >= self.max_jobs else jobs[0].since + self.wait_s
            for key, jobs in self._waiting.items()
        }
        now = asyncio.get_running_loop().time()
        ready = [key for key, start in starts.items() if start <= now] or list(starts)
        key = min(ready, key=lambda key: self._waiting[key][0].since)
        return key, starts[key]

    async def _run_batch(self, key: Key) -> None:
        jobs = self._waiting[key][: self.max_jobs]
        for waiting in jobs:
            self._drop(key, waiting)
        try:
            results: Sequence[Any] = await self.run(key, [waiting.job for waiting in jobs])
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
            for waiting in jobs:
                if not waiting.result.done():
                    waiting.result.set_exception(error)
            return
        for waiting, result in zip(jobs, results, strict=True):
            if not waiting.result.done():
                waiting.result.set_result(result)
