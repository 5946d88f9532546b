"""The runner against a scripted backend: what is retried, what is given up, what is kept."""

import os
import subprocess
import sys
import time

import pytest

from ddm_core.artifacts import read_json, write_json
from orchestrator.backends.inline import InlineBackend
from orchestrator.config.compute import ComputeConfig, IslandConfig
from orchestrator.pipeline.stage import without
from orchestrator.run.backend import Job, attempt_folder
from orchestrator.run.lease import process_start, this_process
from orchestrator.run.runner import Runner, RunResult, kill_orphan_workers
from tests.orchestrator.fakes import ScriptedBackend, diamond, run_folder

QUICK = ComputeConfig(backoff_s=0.0, grace_s=0.0, retries=2)


def walk(folder, backend: ScriptedBackend, policy: ComputeConfig = QUICK, graph=None) -> RunResult:
    return Runner(run=run_folder(folder), graph=graph or diamond(), backend=backend, policy=policy).run_to_end()


def test_every_stage_runs_once_and_behind_its_inputs(tmp_path):
    backend = ScriptedBackend()
    result = walk(tmp_path, backend)
    assert result == RunResult(
        finished=("data", "expert_0", "expert_1", "ensemble", "score"), submitted=5, failed={}, stopped=False
    )
    order = [job.stage for job in backend.jobs]
    assert order[0] == "data" and set(order[1:3]) == {"expert_0", "expert_1"} and order[3:] == ["ensemble", "score"]


def test_a_second_walk_submits_nothing(tmp_path):
    walk(tmp_path, ScriptedBackend())
    again = walk(tmp_path, ScriptedBackend())
    assert again.submitted == 0 and len(again.finished) == 5


def test_a_changed_configuration_runs_only_what_depends_on_it(tmp_path):
    walk(tmp_path, ScriptedBackend())
    graph = diamond()
    changed = without(graph, "expert_1")  # another ensemble, the same data and expert_0
    assert [job.stage for job in _jobs_of(tmp_path, changed)] == ["ensemble", "score"]


def _jobs_of(folder, graph):
    backend = ScriptedBackend()
    walk(folder, backend, graph=graph)
    return backend.jobs


def test_a_lost_worker_is_retried_under_a_new_attempt_number(tmp_path):
    backend = ScriptedBackend({"data": ["lost", "lost"]})
    result = walk(tmp_path, backend)
    assert [job.attempt for job in backend.jobs if job.stage == "data"] == [1, 2, 3]
    assert not result.failed


def test_retries_end(tmp_path):
    result = walk(tmp_path, ScriptedBackend({"data": ["lost"] * 9}))
    assert result.submitted == 3 and result.failed == {"data": "lost"} and not result.stopped


def test_an_error_of_the_code_is_not_tried_again(tmp_path):
    result = walk(tmp_path, ScriptedBackend({"data": ["error"]}))
    assert result.submitted == 1 and "data" in result.failed


def test_the_ensemble_goes_on_without_a_lost_expert_and_takes_it_in_later(tmp_path):
    result = walk(tmp_path, ScriptedBackend({"expert_1": ["error"]}))
    assert "score" in result.finished and result.failed == {"expert_1": "error"}
    later = walk(tmp_path, ScriptedBackend())
    assert later.submitted == 3  # expert_1, and the ensemble and score that have it
    assert len(list((tmp_path / "artifacts").glob("ensemble-*"))) == 2


def test_without_any_expert_there_is_no_ensemble(tmp_path):
    result = walk(tmp_path, ScriptedBackend({"expert_0": ["error"], "expert_1": ["error"]}))
    assert set(result.failed) == {"expert_0", "expert_1"} and "ensemble" not in result.finished


def test_preemption_uses_up_no_retry_and_a_stop_leaves_a_resumable_run(tmp_path):
    backend = ScriptedBackend({"expert_0": ["hang"]})
    run = run_folder(tmp_path)
    run.stop.touch()
    assert walk(tmp_path, backend).stopped and not backend.jobs
    run.stop.unlink()
    preempted = walk(tmp_path, ScriptedBackend({"data": ["preempted"] * 7}))
    assert not preempted.failed and preempted.submitted == 7 + 5


def test_an_attempt_without_end_is_asked_to_stop_then_killed_and_retried(tmp_path):
    policy = ComputeConfig(backoff_s=0.0, grace_s=0.0, retries=1, timeout_s=0.05)
    backend = ScriptedBackend({"data": ["hang"]})
    result = walk(tmp_path, backend, policy)
    assert not result.failed and backend.killed
    run = run_folder(tmp_path)
    assert (run.attempt(diamond()[0], 1) / "stop").exists()
    assert "timeout_s = 0.05" in next(event["error"] for event in run.events() if event["event"] == "failed")


def test_an_attempt_that_waits_for_a_worker_is_not_out_of_time(tmp_path):
    class Queue(ScriptedBackend):
        def submit(self, job):
            super().submit(job)
            (attempt_folder(job) / "worker.json").unlink()

        def poll(self, timeout_s):
            time.sleep(0.1)
            return super().poll(timeout_s)

    policy = ComputeConfig(backoff_s=0.0, grace_s=0.0, retries=0, timeout_s=0.05)
    assert not walk(tmp_path, Queue(), policy).failed


def test_an_attempt_that_ignores_a_stop_is_killed_and_uses_up_no_retry(tmp_path):
    class Stopping(ScriptedBackend):
        def poll(self, timeout_s):
            run_folder(tmp_path).stop.touch()
            return super().poll(timeout_s)

    result = walk(tmp_path, Stopping({"data": ["hang"]}), ComputeConfig(grace_s=0.0, retries=0))
    assert result.stopped and not result.failed
    assert [event["event"] for event in run_folder(tmp_path).events()] == ["submitted", "preempted"]


def test_the_journal_tells_every_attempt(tmp_path):
    walk(tmp_path, ScriptedBackend({"data": ["lost"]}))
    told = [(event["event"], event["attempt"]) for event in run_folder(tmp_path).events() if event["stage"] == "data"]
    assert told == [("submitted", 1), ("lost", 1), ("submitted", 2), ("finished", 2)]


def test_a_backoff_doubles_give_or_take_half_and_is_waited_for(tmp_path):
    waits = []
    runner = Runner(
        run=run_folder(tmp_path),
        graph=diamond(),
        backend=ScriptedBackend({"data": ["lost", "lost", "lost"]}),
        policy=ComputeConfig(backoff_s=0.4, retries=3),
        on_event=lambda event, stage, text: waits.append(text) if event == "retry" else None,
    )
    started = time.time()
    assert not runner.run_to_end().failed
    seconds = [float(text.rpartition(" in ")[2].removesuffix(" s")) for text in waits]
    for number, waited in enumerate(seconds):
        assert 0.5 * 0.4 * 2**number - 0.06 <= waited <= 1.5 * 0.4 * 2**number + 0.06
    assert time.time() - started >= sum(seconds) - 0.2


SPOT = IslandConfig(address="http://127.0.0.1:1", token_file="t", storage="/s", preemptible=True)


class Surviving(ScriptedBackend):
    """Says that it still runs whatever an earlier controller gave it."""

    def place(self, job):
        return "west"

    def attach(self, job):
        self.submit(job)
        return True


def test_an_attempt_that_outlived_its_controller_is_taken_over_and_not_submitted_again(tmp_path):
    first = Surviving({"data": ["hang"]})
    dying = Runner(run=run_folder(tmp_path), graph=diamond(), backend=first, policy=QUICK, on_tick=[_die_at_first_job])
    with pytest.raises(KeyboardInterrupt):
        dying.run_to_end()
    second = Surviving()
    result = walk(tmp_path, second)
    assert [(job.stage, job.attempt, job.island) for job in second.jobs][0] == ("data", 1, "west")
    assert result.submitted == 4 and len(result.finished) == 5
    events = [
        (event["event"], event.get("attempt")) for event in run_folder(tmp_path).events() if event["stage"] == "data"
    ]
    assert events == [("submitted", 1), ("attached", 1), ("finished", 1)]


def test_what_is_taken_over_is_the_job_that_was_submitted(tmp_path):
    config = ComputeConfig(backoff_s=0.0, backend="islands", islands={"west": SPOT})
    first, second = Surviving({"data": ["lost", "hang"]}), Surviving()

    def die_at_second(running):
        if len(first.jobs) == 2:
            raise KeyboardInterrupt

    one = Runner(run_folder(tmp_path), diamond(), first, config, commit="one", on_tick=[die_at_second])
    with pytest.raises(KeyboardInterrupt):
        one.run_to_end()
    Runner(run_folder(tmp_path), diamond(), second, config, commit="two").run_to_end()
    assert second.jobs[0] == first.jobs[-1]
    assert (second.jobs[0].preemption_count, second.jobs[0].commit, second.jobs[0].attempt) == (1, "one", 2)


class Training(ScriptedBackend):
    """Loses every attempt of `data` but the last; `starts` says from which step each of them goes on."""

    def __init__(self, starts):
        super().__init__({"data": ["lost"] * (len(starts) - 1)})
        self.starts = starts

    def submit(self, job):
        super().submit(job)
        if job.stage == "data":
            step = self.starts[job.attempt - 1]
            (attempt_folder(job) / "log.txt").write_text(f"continuing from step {step}\n" if step else "")


@pytest.mark.parametrize(
    ("starts", "finishes"),
    [([0, 100, 200, 300, 400, 500], True), ([0, 100, 100, 200, 200, 300], True), ([0, 100, 100, 100, 200], False)],
)
def test_a_training_that_comes_further_uses_up_no_retries_and_one_that_dies_at_one_place_does(
    tmp_path, starts, finishes
):
    backend = Training(starts)
    result = walk(tmp_path, backend, ComputeConfig(retries=2, backoff_s=0.0))
    assert ("data" in result.finished) == finishes
    assert len([job for job in backend.jobs if job.stage == "data"]) == (len(starts) if finishes else 4)


def _die_at_first_job(running):
    if running:
        raise KeyboardInterrupt


def test_an_attempt_that_died_with_its_controller_is_started_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Runner(
            run=run_folder(tmp_path),
            graph=diamond(),
            backend=ScriptedBackend({"data": ["hang"]}),
            policy=QUICK,
            on_tick=[_die_at_first_job],
        ).run_to_end()
    backend = ScriptedBackend()
    assert walk(tmp_path, backend).submitted == 5 and backend.jobs[0].attempt == 2


def test_losses_on_preemptible_islands_are_counted_in_the_job(tmp_path):
    policy = ComputeConfig(backend="islands", backoff_s=0.0, retries=9, islands={"west": SPOT})
    backend = Surviving({"data": ["lost", "preempted", "lost"]})
    assert not walk(tmp_path, backend, policy).failed
    assert [job.preemption_count for job in backend.jobs if job.stage == "data"] == [0, 1, 2, 3]


def test_an_expert_that_misses_its_deadline_is_cut_and_the_ensemble_goes_on(tmp_path):
    policy = ComputeConfig(backoff_s=0.0, grace_s=0.0, retries=5, deadline_s=0.3)
    backend = ScriptedBackend({"expert_1": ["hang"] * 9})
    result = walk(tmp_path, backend, policy)
    assert "score" in result.finished and "deadline_s = 0.3" in result.failed["expert_1"]
    assert sum(job.stage == "expert_1" for job in backend.jobs) == 1


def test_an_attempt_that_ends_without_a_word_gets_one(tmp_path):
    walk(tmp_path, ScriptedBackend({"data": ["lost"]}))
    run = run_folder(tmp_path)
    assert read_json(run.attempt(diamond()[0], 1) / "outcome.json")["state"] == "lost"


def test_an_orphan_of_a_dead_controller_is_ended(tmp_path):
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run, stage = run_folder(tmp_path), diamond()[0]
    attempt = run.attempt(stage, 1)
    write_json(attempt / "worker.json", this_process() | {"pid": orphan.pid, "started": process_start(orphan.pid)})
    kill_orphan_workers(run, [stage])
    assert orphan.wait(timeout=10) == -9


def test_a_process_with_the_pid_of_a_worker_elsewhere_is_left_alone(tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run, stage = run_folder(tmp_path), diamond()[0]
    worker = this_process() | {"host": "another-host", "pid": stranger.pid}
    write_json(run.attempt(stage, 1) / "worker.json", worker)
    kill_orphan_workers(run, [stage])
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_killed_job_that_waits_inline_is_reported_as_lost(tmp_path):
    backend = InlineBackend()
    job = Job(
        stage="data",
        kind="dataset",
        config={},
        inputs={},
        input_fingerprints={},
        artifact="",
        scratch="",
        attempt=1,
        stop_files=(),
    )
    backend.submit(job)
    backend.kill("data")
    assert [outcome.state for outcome in backend.poll(0.0)] == ["lost"]
    assert backend.poll(0.0) == []


@pytest.mark.parametrize("ended", [True, False])
def test_a_worker_that_has_ended_its_attempt_is_left_alone(tmp_path, ended):
    run, stage = run_folder(tmp_path), diamond()[0]
    attempt = run.attempt(stage, 1)
    other = this_process() | {"pid": os.getppid(), "started": "0"}  # a pid that was used again
    write_json(attempt / "worker.json", other)
    if ended:
        write_json(attempt / "outcome.json", {})
    kill_orphan_workers(run, [stage])
    os.kill(os.getppid(), 0)
