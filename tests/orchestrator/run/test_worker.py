"""Attempts of stages: their outcomes are data, and their inputs are verified."""

import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from ddm_core.artifacts import list_files, read_json
from orchestrator.run.backend import Job
from orchestrator.run.worker import execute, execute_rank
from tests.data_partition.datasets.test_image_folder import write


def job(folder, kind="dataset", config=None, inputs=None) -> Job:
    (folder / "work" / "attempt_1").mkdir(parents=True, exist_ok=True)
    return Job(
        stage=kind,
        kind=kind,
        config={"source": "digits", "image_size": 8, "limit": 300} if config is None else config,
        inputs=inputs or {},
        input_fingerprints={},
        artifact=str(folder / kind),
        scratch=str(folder / "work" / "state"),
        attempt=1,
        stop_files=(str(folder / "stop"),),
    )


@pytest.fixture
def dataset(tmp_path):
    assert execute(job(tmp_path)).state == "finished"
    return tmp_path / "dataset"


def test_execute_finished_writes_outcome_and_clears_scratch(dataset, tmp_path):
    assert read_json(tmp_path / "work" / "attempt_1" / "outcome.json")["state"] == "finished"
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["attempt_1"]
    outcome = read_json(tmp_path / "work" / "attempt_1" / "outcome.json")
    assert 0 < outcome["started"] <= outcome["ended"]


def test_execute_failed_logs_traceback(tmp_path):
    outcome = execute(job(tmp_path, config={"source": "digits", "image_size": 9}))
    assert outcome.state == "failed" and not outcome.transient and outcome.error.startswith("MixedSizes: ")
    assert "Traceback" in (tmp_path / "work" / "attempt_1" / "log.txt").read_text()


def test_execute_unreachable_source_is_transient_missing_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("data_partition.datasets.webdataset_source.RETRY_AFTER_S", ())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for place, transient in ((f"http://127.0.0.1:{unused.getsockname()[1]}", True), (str(tmp_path), False)):
            outcome = execute(job(tmp_path, config={"source": "webdataset", "path": f"{place}/none.tar"}))
            assert outcome.state == "failed" and outcome.transient == transient and "none.tar" in outcome.error


def test_execute_hands_over_what_the_user_should_know(tmp_path):
    for number in range(20):
        write(tmp_path / "in" / "ab"[number % 2] / f"{number}.png", number)
    (tmp_path / "in" / "a" / "x.heic").touch()
    config = {"source": "image_folder", "path": str(tmp_path / "in"), "image_size": 4, "holdout": 0.3}
    outcome = execute(job(tmp_path, config=config))
    assert outcome.notices == ("1 skipped: .heic is not read; convert it to PNG or JPEG (a/x.heic)",)
    assert outcome.notices[0] in (tmp_path / "work" / "attempt_1" / "log.txt").read_text()


def test_execute_with_stop_file_is_preempted(tmp_path):
    (tmp_path / "stop").touch()
    assert execute(job(tmp_path)).state == "preempted"
    assert not (tmp_path / "dataset").exists()


def test_execute_with_stop_notice_is_preempted(tmp_path):
    assert execute(job(tmp_path), stopping=lambda: True).state == "preempted"
    assert not (tmp_path / "dataset").exists()


EXPERT = {
    "expert": {
        "network": {"kind": "residual_mlp", "width": 16, "depth": 1},
        "training": {"steps": 40, "batch_size": 8, "log_every": 4},
    },
    "cluster_id": 0,
}


def expert(folder, name="expert", attempt=1) -> Job:
    """Return the job of an expert on the first digits; another name gives another stage with the same work."""
    inputs = {"latents": str(folder / "dataset" / "train"), "codec": str(folder / "codec")}
    (folder / name / f"attempt_{attempt}").mkdir(parents=True, exist_ok=True)
    return replace(
        job(folder, "expert", EXPERT, inputs),
        artifact=str(folder / f"{name}_artifact"),
        scratch=str(folder / name / "state"),
        attempt=attempt,
    )


def content(folder):
    return {path.name: path.read_bytes() for path in list_files(folder)}


def test_execute_stopped_and_continued_is_bit_identical(dataset, tmp_path):
    assert execute(job(tmp_path, "codec", {"kind": "pixels"}, {"shards": str(dataset / "train")})).state == "finished"
    assert execute(expert(tmp_path, "uninterrupted")).state == "finished"
    metrics = tmp_path / "stopped" / "attempt_1" / "metrics.jsonl"
    stopped = execute(
        expert(tmp_path, "stopped"), lambda: metrics.exists() and len(metrics.read_text().split("\n")) > 4
    )
    assert stopped.state == "preempted" and "step 16 of 40" in stopped.error
    assert execute(expert(tmp_path, "stopped", attempt=2)).state == "finished"
    assert content(tmp_path / "stopped_artifact") == content(tmp_path / "uninterrupted_artifact")


def test_execute_rank_writes_no_outcome(tmp_path):
    """Without a process group the ranks are independent, so they can run one after the other."""
    for rank, output in ((1, tmp_path / "output"), (0, tmp_path / "dataset")):
        assert execute_rank(job(tmp_path), rank, tmp_path / "output").state == "finished"
        assert (output / "dataset.json").exists()
        assert (tmp_path / "dataset").exists() == (rank == 0)
    attempt = tmp_path / "work" / "attempt_1"
    assert {path.name for path in attempt.iterdir()} == {
        "log.txt",
        "progress.json",
        "worker.json",
        "worker.lock",
        "worker_1",
    }
    assert (attempt / "worker_1" / "log.txt").exists()
    assert (tmp_path / "work" / "state").exists(), "the process that started the group deletes it at the end"


def test_execute_fenced_attempt_does_not_publish(tmp_path):
    fenced = job(tmp_path)
    (tmp_path / "work" / "attempt_2").mkdir()
    assert execute(fenced).state == "preempted"
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("damaged", ["train/index.json", "train/shard-00000.tar", "manifest.json"])
def test_execute_damaged_input_is_named_error(dataset, tmp_path, damaged):
    data = (dataset / damaged).read_bytes()
    (dataset / damaged).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    outcome = execute(job(tmp_path, "codec", {"kind": "pixels"}, {"shards": str(dataset / "train")}))
    assert outcome.state == "failed" and not outcome.transient
    assert outcome.error.startswith("CorruptArtifact: ") and damaged in outcome.error


def test_execute_ignores_damage_outside_its_input(dataset, tmp_path):
    (dataset / "holdout" / "index.json").write_text("{}")
    codec = job(tmp_path, "codec", {"kind": "pixels"}, {"shards": str(dataset / "train")})
    assert execute(codec).state == "finished"


def test_thread_limit_covers_libraries_loaded_in_the_block():
    code = (
        "from threadpoolctl import threadpool_info\n"
        "from orchestrator.run.worker import limited_threads\n"
        "for cpus in (1, 2):\n"
        "    with limited_threads(cpus):\n"
        "        import faiss, sklearn.linear_model\n"
        "        print({pool['num_threads'] for pool in threadpool_info()})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "{1}\n{2}\n"
