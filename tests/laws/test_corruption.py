"""Every bit of what a run keeps is guarded: one that has flipped, or an end that is missing, is an error by name."""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_partition.errors import ShardError
from data_partition.shards.shards import read_encoded
from ddm_core.artifacts import MANIFEST, ArtifactError, CorruptArtifact, files_in, read_manifest, to_jsonable, verify
from experts.training.checkpoint import DamagedCheckpoint, restore_checkpoint, save_checkpoint
from orchestrator.cli.sample import pipeline_folder
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.results import score_rows
from orchestrator.run.backend import Job
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.worker import execute
from tests.data_partition.conftest import write_samples
from tests.experts.training.test_checkpoint import started, trained
from tests.laws.conftest import tiny_config, walk

KINDS = ("dataset", "codec", "features", "partition", "expert", "router", "reference", "ensemble", "score", "monolith")


def stage_of(run: Path, kind: str) -> Stage:
    return next(stage for stage in build_graph(tiny_config(run)) if stage.kind == kind)


def flips(data: bytes, draws: random.Random, *, sampled: int = 0) -> Iterator[bytes]:
    """The data with one bit turned over in each byte, or in `sampled` bytes of each region of a larger file."""
    size = len(data)
    regions = [range(min(64, size)), range(min(64, size), max(size - 64, 0)), range(max(size - 64, 0), size)]
    chosen = {at for region in regions for at in draws.sample(region, min(sampled, len(region)))}
    for at in sorted(chosen) if sampled else range(size):
        yield data[:at] + bytes([data[at] ^ 1 << draws.randrange(8)]) + data[at + 1 :]


def cuts(data: bytes) -> set[bytes]:
    """The data with their end missing."""
    return {data[:size] for size in (0, 1, len(data) // 2, len(data) - 1) if size < len(data)}


def unnoticed(path: Path, damaged: Iterator[bytes], look: Callable[[], object], expected: type[Exception]) -> list[str]:
    """What `look` says when it misses a damage of the file, or names it by another error; empty if it never does."""
    whole, missed = path.read_bytes(), []
    for data in damaged:
        path.write_bytes(data)
        try:
            look()
        except expected as error:
            if path.name not in str(error):
                missed.append(f"not named: {error}")
        else:
            missed.append(f"not seen: {len(data)} bytes")
    path.write_bytes(whole)
    return missed


def every_damage(data: bytes, seed: int, *, sampled: int = 0) -> Iterator[bytes]:
    yield from flips(data, random.Random(seed), sampled=sampled)
    yield from cuts(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["features", "expert"])
def test_every_byte_of_a_manifest_is_guarded(tiny_run, tmp_path, kind):
    manifest = Path(shutil.copy(RunFolder(tiny_run).artifact(stage_of(tiny_run, kind)) / MANIFEST, tmp_path))
    damaged = every_damage(manifest.read_bytes(), 0)
    assert not unnoticed(manifest, damaged, lambda: read_manifest(tmp_path), ArtifactError)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_region_of_every_file_of_an_artifact_is_guarded(own_run, kind):
    folder = RunFolder(own_run).artifact(stage_of(own_run, kind))
    for number, path in enumerate([folder / MANIFEST, *files_in(folder)]):
        damaged = every_damage(path.read_bytes(), number, sampled=6)
        assert not unnoticed(path, damaged, lambda: verify(folder), ArtifactError), path


def job(run: RunFolder, stage: Stage, out: Path, attempt: int = 1) -> Job:
    """The stage once more, on the run's artifacts, into another folder."""
    (out / "work" / stage.name / f"attempt_{attempt}").mkdir(parents=True, exist_ok=True)
    return Job(
        stage=stage.name,
        kind=stage.kind,
        config=to_jsonable(stage.config),
        inputs={role: str(run.input(given)) for role, given in stage.inputs.items()},
        input_fingerprints=stage.input_fingerprints,
        artifact=str(out / stage.folder_name),
        scratch=str(out / "work" / stage.name / "state"),
        attempt=attempt,
        stop_files=(),
    )


@pytest.mark.slow
def test_no_stage_uses_a_damaged_input(own_run, tmp_path):
    run, draws, tried = RunFolder(own_run), random.Random(0), 0
    for stage in build_graph(tiny_config(own_run)):
        for given in stage.inputs.values():
            path = draws.choice(files_in(run.input(given)))
            whole = path.read_bytes()
            path.write_bytes(next(flips(whole, draws, sampled=1)))
            began, outcome = time.process_time(), execute(job(run, stage, tmp_path / "out"))
            assert (outcome.state, outcome.transient) == ("failed", False), (stage.name, path)
            assert outcome.error.startswith("CorruptArtifact: ") and path.name in outcome.error
            assert not (tmp_path / "out" / stage.folder_name).exists() and time.process_time() - began < 5
            path.write_bytes(whole)
            tried += 1
    assert tried > 25


@pytest.mark.slow
def test_nobody_is_shown_a_damaged_score_or_picture(own_run):
    run, draws = RunFolder(own_run), random.Random(0)
    graph = build_graph(tiny_config(own_run))
    weights = run.artifact(stage_of(own_run, "ensemble")) / "expert_0" / "diffusion_pytorch_model.safetensors"
    scores = run.artifact(stage_of(own_run, "score")) / "scores.json"
    for path, look in (
        (weights, lambda: pipeline_folder(run, monolith=False)),
        (scores, lambda: score_rows(run, graph)),
    ):
        assert not unnoticed(path, flips(path.read_bytes(), draws, sampled=8), look, CorruptArtifact)


@pytest.mark.parametrize("name", ["shard-00000.tar", "index.json"])
def test_every_byte_of_a_folder_of_shards_is_guarded_wherever_it_lies(tmp_path, name):
    """No manifest is near: this is what an island has, and who trains by hand."""
    write_samples(tmp_path, 3)
    data = (tmp_path / name).read_bytes()
    damaged = every_damage(data, 0, sampled=0 if name == "index.json" else 400)
    expected = "not a folder of shards" if name == "index.json" else "shard-00000"
    for each in damaged:
        (tmp_path / name).write_bytes(each)
        with pytest.raises(ShardError, match=expected):
            list(read_encoded(tmp_path))


def test_every_class_of_every_sample_is_guarded(tmp_path):
    """A digit that turns into another digit is a whole tar to tar, and a wrong class to the training."""
    write_samples(tmp_path, 8)
    path = tmp_path / "shard-00001.tar"
    data = path.read_bytes()
    at = data.index(b"1", data.index(b"sample-00004.cls") + 512)
    path.write_bytes(data[:at] + b"0" + data[at + 1 :])
    with pytest.raises(ShardError, match="shard-00001.tar is truncated or changed"):
        list(read_encoded(tmp_path))


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_every_byte_of_a_checkpoint_is_guarded(tmp_path, name):
    save_checkpoint(tmp_path, trained())
    checkpoint, aside, state = tmp_path / "step-00000003", tmp_path / "damaged-step-00000003", started()
    data = (checkpoint / name).read_bytes()
    for each in every_damage(data, 0, sampled=0 if name == "state.json" else 100):
        (checkpoint / name).write_bytes(each)
        with pytest.raises(DamagedCheckpoint, match=name):
            restore_checkpoint(tmp_path, state)
        aside.rename(checkpoint)
    assert state.step == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_run_survives_a_damaged_checkpoint_and_says_so(tiny_run, own_run, name):
    run = RunFolder(own_run)
    stage = stage_of(own_run, "expert")
    for gone in (stage.folder_name, "ensemble-*", "score_sticky-*"):
        for folder in run.root.glob(f"artifacts/{gone}"):
            shutil.rmtree(folder)
    interrupted = job(run, stage, own_run.with_name("interrupted"))
    steps = iter(range(5))
    assert execute(interrupted, lambda: next(steps, None) is None).state == "preempted"
    shutil.copytree(interrupted.scratch, run.scratch(stage))
    (checkpoint,) = run.scratch(stage).glob("checkpoints/step-*")
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(next(flips(data, random.Random(1), sampled=1)))

    walk(own_run)

    told = [event for event in run.events() if event.get("stage") == stage.name and "DamagedCheckpoint" in str(event)]
    assert [event["event"] for event in told] == ["failed"] and "begins anew" in told[0]["error"]
    for path in run.root.glob("artifacts/*"):
        assert read_manifest(path).checksums == read_manifest(tiny_run / "artifacts" / path.name).checksums
