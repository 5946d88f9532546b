"""The runner with a scripted backend: retries, permanent failures, and reused stages."""

import os
import subprocess
import sys
import time

import pytest

from ddm_core.artifacts import read_json, write_json
from orchestrator.backends.inline import InlineBackend
from orchestrator.config.compute import ComputeConfig, IslandConfig
from orchestrator.pipeline.stage import remove_stage
from orchestrator.run.backend import Job, attempt_folder
from orchestrator.run.lease import process_start_time, this_process
from orchestrator.run.runner import Runner, RunResult, kill_orphan_workers
from tests.orchestrator.fakes import ScriptedBackend, diamond, run_folder

QUICK = ComputeConfig(backoff_s=0.0, grace_s=0.0, retries=2)


def run_graph(folder, backend: ScriptedBackend, policy: ComputeConfig = QUICK, graph=None) -> RunResult:
    return Runner(run=run_folder(folder), graph=graph or diamond(), backend=backend, policy=policy).run_to_end()


def test_run_executes_stages_once_after_their_inputs(tmp_path):
    backend = ScriptedBackend()
    result = run_graph(tmp_path, backend)
    assert result == RunResult(
        finished=("data", "expert_0", "expert_1", "ensemble", "score"), submitted=5, failed={}, stopped=False
    )
    order = [job.stage for job in backend.jobs]
    assert order[0] == "data" and set(order[1:3]) == {"expert_0", "expert_1"} and order[3:] == ["ensemble", "score"]


def test_second_run_submits_nothing(tmp_path):
    run_graph(tmp_path, ScriptedBackend())
    second = run_graph(tmp_path, ScriptedBackend())
    assert second.submitted == 0 and len(second.finished) == 5


def test_changed_graph_runs_only_dependent_stages(tmp_path):
    run_graph(tmp_path, ScriptedBackend())
    graph = diamond()
    changed = remove_stage(graph, "expert_1")  # another ensemble, the same data and expert_0
    assert [job.stage for job in _run_jobs(tmp_path, changed)] == ["ensemble", "score"]


def _run_jobs(folder, graph):
    backend = ScriptedBackend()
    run_graph(folder, backend, graph=graph)
    return backend.jobs


def test_lost_worker_is_retried_as_next_attempt(tmp_path):
    backend = ScriptedBackend({"data": ["lost", "lost"]})
    result = run_graph(tmp_path, backend)
    assert [job.attempt for job in backend.jobs if job.stage == "data"] == [1, 2, 3]
    assert not result.failed


def test_retries_are_limited(tmp_path):
    result = run_graph(tmp_path, ScriptedBackend({"data": ["lost"] * 9}))
    assert result.submitted == 3 and result.failed == {"data": "lost"} and not result.stopped


def test_restart_of_the_place_uses_no_retry(tmp_path):
    result = run_graph(tmp_path, ScriptedBackend({"data": ["restart"] * 3}), ComputeConfig(backoff_s=0.0, retries=0))
    assert result.submitted == 3 + 5 and not result.failed


def test_permanent_error_is_not_retried(tmp_path):
    result = run_graph(tmp_path, ScriptedBackend({"data": ["error"]}))
    assert result.submitted == 1 and "data" in result.failed


def test_failed_expert_is_omitted_and_added_later(tmp_path):
    result = run_graph(tmp_path, ScriptedBackend({"expert_1": ["error"]}))
    assert "score" in result.finished and result.failed == {"expert_1": "error"}
    later = run_graph(tmp_path, ScriptedBackend())
    assert later.submitted == 3  # expert_1, and the ensemble and score that have it
    assert len(list((tmp_path / "artifacts").glob("ensemble-*"))) == 2


def test_all_experts_failed_gives_no_ensemble(tmp_path):
    result = run_graph(tmp_path, ScriptedBackend({"expert_0": ["error"], "expert_1": ["error"]}))
    assert set(result.failed) == {"expert_0", "expert_1"} and "ensemble" not in result.finished


def test_preemption_and_stop_use_no_retry(tmp_path):
    backend = ScriptedBackend({"expert_0": ["hang"]})
    run = run_folder(tmp_path)
    run.stop.touch()
    assert run_graph(tmp_path, backend).stopped and not backend.jobs
    run.stop.unlink()
    preempted = run_graph(tmp_path, ScriptedBackend({"data": ["preempted"] * 7}))
    assert not preempted.failed and preempted.submitted == 7 + 5


def test_timeout_stops_kills_and_retries_attempt(tmp_path):
    policy = ComputeConfig(backoff_s=0.0, grace_s=0.0, retries=1, timeout_s=0.05)
    backend = ScriptedBackend({"data": ["hang"]})
    result = run_graph(tmp_path, backend, policy)
    assert not result.failed and backend.killed
    run = run_folder(tmp_path)
    assert (run.attempt(diamond()[0], 1) / "stop").exists()
    assert "timeout_s = 0.05" in next(event["error"] for event in run.read_events() if event["event"] == "failed")


def test_timeout_ignores_wait_for_worker(tmp_path):
    class Queue(ScriptedBackend):
        def submit(self, job):
            super().submit(job)
            (attempt_folder(job) / "worker.json").unlink()

        def poll(self, timeout_s):
            time.sleep(0.1)
            return super().poll(timeout_s)

    policy = ComputeConfig(backoff_s=0.0, grace_s=0.0, retries=0, timeout_s=0.05)
    assert not run_graph(tmp_path, Queue(), policy).failed


def test_ignored_stop_kills_attempt_without_retry(tmp_path):
    class Stopping(ScriptedBackend):
        def poll(self, timeout_s):
            run_folder(tmp_path).stop.touch()
            return super().poll(timeout_s)

    told = []
    runner = Runner(
        run=run_folder(tmp_path),
        graph=diamond(),
        backend=Stopping({"data": ["hang"]}),
        policy=ComputeConfig(grace_s=0.0, retries=0),
        on_event=lambda event, stage, text: told.append((event, stage.name, text)),
    )
    result = runner.run_to_end()
    assert result.stopped and not result.failed
    assert ("stopping", "data", "saves its work; killed after 0 s") in told
    assert [event["event"] for event in run_folder(tmp_path).read_events()] == ["submitted", "preempted"]


def test_journal_records_every_attempt(tmp_path):
    run_graph(tmp_path, ScriptedBackend({"data": ["lost"]}))
    events = [
        (event["event"], event["attempt"]) for event in run_folder(tmp_path).read_events() if event["stage"] == "data"
    ]
    assert events == [("submitted", 1), ("lost", 1), ("submitted", 2), ("finished", 2)]


def test_backoff_doubles_and_delays_retry(tmp_path):
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
    """Reattaches to every attempt of an earlier controller."""

    def place(self, job):
        return "west"

    def attach(self, job):
        self.submit(job)
        return True


def test_surviving_attempt_is_reattached(tmp_path):
    first = Surviving({"data": ["hang"]})
    killed = Runner(run=run_folder(tmp_path), graph=diamond(), backend=first, policy=QUICK, on_tick=[_die_at_first_job])
    with pytest.raises(KeyboardInterrupt):
        killed.run_to_end()
    second = Surviving()
    result = run_graph(tmp_path, second)
    assert [(job.stage, job.attempt, job.island) for job in second.jobs][0] == ("data", 1, "west")
    assert result.submitted == 4 and len(result.finished) == 5
    events = [
        (event["event"], event.get("attempt"))
        for event in run_folder(tmp_path).read_events()
        if event["stage"] == "data"
    ]
    assert events == [("submitted", 1), ("attached", 1), ("finished", 1)]


def test_reattached_job_equals_submitted_job(tmp_path):
    config = ComputeConfig(backoff_s=0.0, backend="islands", islands={"west": SPOT})
    first, second = Surviving({"data": ["lost", "hang"]}), Surviving()

    def die_at_second(running):
        if len(first.jobs) == 2:
            raise KeyboardInterrupt

    runner = Runner(run_folder(tmp_path), diamond(), first, config, commit="one", on_tick=[die_at_second])
    with pytest.raises(KeyboardInterrupt):
        runner.run_to_end()
    Runner(run_folder(tmp_path), diamond(), second, config, commit="two").run_to_end()
    assert second.jobs[0] == first.jobs[-1]
    assert (second.jobs[0].preemption_count, second.jobs[0].commit, second.jobs[0].attempt) == (1, "one", 2)


class Training(ScriptedBackend):
    """Loses every attempt of `data` except the last; `starts` are the steps from which they resume."""

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
def test_progress_of_training_resets_retries(tmp_path, starts, finishes):
    backend = Training(starts)
    result = run_graph(tmp_path, backend, ComputeConfig(retries=2, backoff_s=0.0))
    assert ("data" in result.finished) == finishes
    assert len([job for job in backend.jobs if job.stage == "data"]) == (len(starts) if finishes else 4)


def _die_at_first_job(running):
    if running:
        raise KeyboardInterrupt


def test_attempt_lost_with_controller_is_restarted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Runner(
            run=run_folder(tmp_path),
            graph=diamond(),
            backend=ScriptedBackend({"data": ["hang"]}),
            policy=QUICK,
            on_tick=[_die_at_first_job],
        ).run_to_end()
    backend = ScriptedBackend()
    assert run_graph(tmp_path, backend).submitted == 5 and backend.jobs[0].attempt == 2


def test_job_counts_losses_on_preemptible_islands(tmp_path):
    policy = ComputeConfig(backend="islands", backoff_s=0.0, retries=9, islands={"west": SPOT})
    backend = Surviving({"data": ["lost", "preempted", "lost"]})
    assert not run_graph(tmp_path, backend, policy).failed
    assert [job.preemption_count for job in backend.jobs if job.stage == "data"] == [0, 1, 2, 3]


def test_expert_after_deadline_is_omitted(tmp_path):
    policy = ComputeConfig(backoff_s=0.0, grace_s=0.0, retries=5, deadline_s=0.3)
    backend = ScriptedBackend({"expert_1": ["hang"] * 9})
    result = run_graph(tmp_path, backend, policy)
    assert "score" in result.finished and "deadline_s = 0.3" in result.failed["expert_1"]
    assert sum(job.stage == "expert_1" for job in backend.jobs) == 1


def test_attempt_without_outcome_gets_one(tmp_path):
    run_graph(tmp_path, ScriptedBackend({"data": ["lost"]}))
    run = run_folder(tmp_path)
    assert read_json(run.attempt(diamond()[0], 1) / "outcome.json")["state"] == "lost"


def test_orphan_worker_is_killed(tmp_path):
    run, stage = run_folder(tmp_path), diamond()[0]
    attempt = run.attempt(stage, 1)
    attempt.mkdir(parents=True)
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.run.worker_lock import hold_worker_lock\n"
        "with hold_worker_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    orphan = subprocess.Popen([sys.executable, "-c", code, str(attempt)], stdout=subprocess.PIPE, text=True)
    assert orphan.stdout.readline() == "held\n"
    write_json(attempt / "worker.json", this_process() | {"pid": orphan.pid, "started": process_start_time(orphan.pid)})
    kill_orphan_workers(run, [stage])
    assert orphan.wait(timeout=10) == -9
    orphan.stdout.close()


def test_process_with_pid_of_remote_worker_survives(tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run, stage = run_folder(tmp_path), diamond()[0]
    worker = this_process() | {"host": "another-host", "pid": stranger.pid}
    write_json(run.attempt(stage, 1) / "worker.json", worker)
    kill_orphan_workers(run, [stage])
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_inline_killed_waiting_job_is_lost(tmp_path):
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
def test_worker_of_ended_attempt_survives(tmp_path, ended):
    run, stage = run_folder(tmp_path), diamond()[0]
    attempt = run.attempt(stage, 1)
    other = this_process() | {"pid": os.getppid(), "started": "0"}  # a reused pid
    write_json(attempt / "worker.json", other)
    if ended:
        write_json(attempt / "outcome.json", {})
    kill_orphan_workers(run, [stage])
    os.kill(os.getppid(), 0)
