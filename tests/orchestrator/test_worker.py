"""The border between a stage and whoever runs it: how an attempt ends is data, and what it read is checked."""

from dataclasses import replace

import pytest

from artifacts import MANIFEST, read_json, write_json
from orchestrator.backend import Job
from orchestrator.worker import execute


def job(folder, kind="dataset", config=None, inputs=None) -> Job:
    (folder / "work" / "attempt_1").mkdir(parents=True, exist_ok=True)
    return Job(
        stage=kind,
        kind=kind,
        config={"source": "digits", "image_size": 8, "limit": 300} if config is None else config,
        inputs=inputs or {},
        input_fingerprints={},
        artifact=str(folder / kind),
        scratch=str(folder / "work"),
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


def test_an_attempt_that_was_fenced_off_does_not_publish(tmp_path):
    fenced = job(tmp_path)
    (tmp_path / "work" / "attempt_2").mkdir()
    assert execute(fenced).state == "preempted"
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(("island", "state"), [("another-host", "failed"), ("", "finished")])
def test_an_input_from_another_machine_is_verified(dataset, tmp_path, island, state):
    manifest = read_json(dataset / MANIFEST)
    here = manifest["island"]
    write_json(dataset / MANIFEST, manifest | {"island": island or here})
    (dataset / "dataset.json").write_text("{}")
    codec = job(tmp_path, "codec", {"kind": "pixels"}, {"shards": str(dataset / "train")})
    outcome = execute(replace(codec, scratch=str(tmp_path / "work")))
    assert outcome.state == state
    assert state == "finished" or "dataset.json" in outcome.error
