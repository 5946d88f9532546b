"""The border between a stage and whoever runs it: how an attempt ends is data, and what it read is checked."""

from dataclasses import replace

import pytest

from ddm_core.artifacts import files_in, read_json
from orchestrator.run.backend import Job
from orchestrator.run.worker import execute, execute_rank


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


def test_a_finished_attempt_says_so_and_leaves_no_scratch(dataset, tmp_path):
    assert read_json(tmp_path / "work" / "attempt_1" / "outcome.json")["state"] == "finished"
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["attempt_1"]
    outcome = read_json(tmp_path / "work" / "attempt_1" / "outcome.json")
    assert 0 < outcome["started"] <= outcome["ended"]


def test_a_failed_attempt_has_its_traceback_in_its_log(tmp_path):
    outcome = execute(job(tmp_path, config={"source": "digits", "image_size": 9}))
    assert outcome.state == "failed" and not outcome.transient and outcome.error.startswith("MixedSizes: ")
    assert "Traceback" in (tmp_path / "work" / "attempt_1" / "log.txt").read_text()


def test_a_source_that_does_not_answer_may_be_tried_again(tmp_path):
    config = {"source": "webdataset", "path": str(tmp_path / "none.tar")}
    outcome = execute(job(tmp_path, config=config))
    assert outcome.state == "failed" and outcome.transient and "none.tar" in outcome.error


def test_a_stop_that_came_first_is_heard(tmp_path):
    (tmp_path / "stop").touch()
    assert execute(job(tmp_path)).state == "preempted"
    assert not (tmp_path / "dataset").exists()


def test_a_notice_that_came_first_is_heard(tmp_path):
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
    """An expert on the first digits; one that is called by another name is another stage with the same work."""
    inputs = {"shards": str(folder / "dataset" / "train"), "codec": str(folder / "codec")}
    (folder / name / f"attempt_{attempt}").mkdir(parents=True, exist_ok=True)
    return replace(
        job(folder, "expert", EXPERT, inputs),
        artifact=str(folder / f"{name}_artifact"),
        scratch=str(folder / name / "state"),
        attempt=attempt,
    )


def content(folder):
    return {path.name: path.read_bytes() for path in files_in(folder)}


def test_a_notice_in_the_middle_costs_no_step_and_no_byte(dataset, tmp_path):
    assert execute(job(tmp_path, "codec", {"kind": "pixels"}, {"shards": str(dataset / "train")})).state == "finished"
    assert execute(expert(tmp_path, "whole")).state == "finished"
    metrics = tmp_path / "halted" / "attempt_1" / "metrics.jsonl"
    noticed = execute(expert(tmp_path, "halted"), lambda: metrics.exists() and len(metrics.read_text().split("\n")) > 4)
    assert noticed.state == "preempted" and "step 16 of 40" in noticed.error
    assert execute(expert(tmp_path, "halted", attempt=2)).state == "finished"
    assert content(tmp_path / "halted_artifact") == content(tmp_path / "whole_artifact")


def test_one_of_a_group_writes_aside_and_leaves_the_outcome_to_others(tmp_path):
    """Without a process group each is alone, so they can be tried one after the other."""
    for rank, written in ((1, tmp_path / "aside"), (0, tmp_path / "dataset")):
        assert execute_rank(job(tmp_path), rank, tmp_path / "aside").state == "finished"
        assert (written / "dataset.json").exists()
        assert (tmp_path / "dataset").exists() == (rank == 0)
    attempt = tmp_path / "work" / "attempt_1"
    assert {path.name for path in attempt.iterdir()} == {"log.txt", "progress.json", "worker.json", "worker_1"}
    assert (attempt / "worker_1" / "log.txt").exists()
    assert (tmp_path / "work" / "state").exists(), "whoever started the group clears it when all have ended"


def test_an_attempt_that_was_fenced_off_does_not_publish(tmp_path):
    fenced = job(tmp_path)
    (tmp_path / "work" / "attempt_2").mkdir()
    assert execute(fenced).state == "preempted"
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("damaged", ["train/index.json", "train/shard-00000.tar", "manifest.json"])
def test_an_input_that_was_damaged_is_named_and_not_used(dataset, tmp_path, damaged):
    whole = (dataset / damaged).read_bytes()
    (dataset / damaged).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    outcome = execute(job(tmp_path, "codec", {"kind": "pixels"}, {"shards": str(dataset / "train")}))
    assert outcome.state == "failed" and not outcome.transient
    assert outcome.error.startswith("CorruptArtifact: ") and damaged in outcome.error


def test_damage_in_another_part_is_not_looked_at(dataset, tmp_path):
    (dataset / "holdout" / "index.json").write_text("{}")
    codec = job(tmp_path, "codec", {"kind": "pixels"}, {"shards": str(dataset / "train")})
    assert execute(codec).state == "finished"
