import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.serving.batcher import Batcher

ARRIVALS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["stay", "leave"])), min_size=1, max_size=30
)
"""Of each job: the turns of the loop before it, its key, and whether its client leaves a turn later."""


@given(ARRIVALS, st.integers(1, 5))
def test_every_job_has_one_answer_from_a_batch_of_its_key(arrivals, max_jobs):
    batches = []

    async def run(key: int, jobs: Sequence[int]) -> list[tuple[int, int]]:
        batches.append((key, list(jobs)))
        await asyncio.sleep(0)
        return [(key, job) for job in jobs]

    async def main() -> list[object]:
        batcher: Batcher[int, int, tuple[int, int]] = Batcher(run=run, max_jobs=max_jobs, wait_s=0.0)
        tasks = []
        for job, (turns, key, conduct) in enumerate(arrivals):
            for _ in range(turns):
                await asyncio.sleep(0)
            tasks.append(asyncio.create_task(batcher.submit(key, job)))
            if conduct == "leave":
                await asyncio.sleep(0)
                tasks[-1].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert len(batcher) == 0
        return answers

    answers = asyncio.run(main())
    started = [job for _, jobs in batches for job in jobs]
    assert len(started) == len(set(started))
    assert all(1 <= len(jobs) <= max_jobs for _, jobs in batches)
    for job, ((_, key, conduct), answer) in enumerate(zip(arrivals, answers, strict=True)):
        assert answer == (key, job) or (conduct == "leave" and isinstance(answer, asyncio.CancelledError))
        assert job in started or conduct == "leave"
    assert all(arrivals[job][1] == key for key, jobs in batches for job in jobs)


def test_jobs_gather_during_a_batch_and_one_that_left_never_runs():
    batches, gate = [], asyncio.Event()

    async def run(key: str, jobs: Sequence[int]) -> Sequence[int]:
        batches.append((key, list(jobs)))
        await gate.wait()
        return jobs

    async def main() -> None:
        batcher: Batcher[str, int, int] = Batcher(run=run, max_jobs=3, wait_s=0.0)
        tasks = [asyncio.create_task(batcher.submit("a", 0))]
        while not batches:
            await asyncio.sleep(0)
        tasks += [asyncio.create_task(batcher.submit(key, job)) for job, key in enumerate("babbbb", start=1)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert batches == [("a", [0]), ("b", [1, 4, 5]), ("a", [2]), ("b", [6])]


def test_an_error_reaches_the_jobs_of_its_batch_alone():
    async def run(key: str, jobs: Sequence[int]) -> Sequence[int]:
        if key == "bad":
            raise ValueError("broken expert")
        return jobs

    async def main() -> list[object]:
        batcher: Batcher[str, int, int] = Batcher(run=run, max_jobs=3, wait_s=0.0)
        jobs = [batcher.submit(key, job) for job, key in enumerate(["bad", "good", "bad"])]
        return await asyncio.gather(*jobs, return_exceptions=True)

    first, second, third = asyncio.run(main())
    assert (str(first), second, str(third)) == ("broken expert", 1, "broken expert")


@pytest.mark.parametrize(("count", "waits"), [(3, False), (2, True)])
def test_a_full_batch_starts_at_once_and_others_wait(count, waits):
    async def run(_key: str, jobs: Sequence[int]) -> Sequence[int]:
        return jobs

    async def main() -> bool:
        batcher: Batcher[str, int, int] = Batcher(run=run, max_jobs=3, wait_s=3600.0)
        tasks = [asyncio.create_task(batcher.submit("a", job)) for job in range(count)]
        for _ in range(50):
            await asyncio.sleep(0)
        done = all(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        return not done

    assert asyncio.run(main()) == waits
