"""Every stored bit of a run is guarded: a flipped bit or a missing end is an error that names the file."""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_partition.errors import ShardError
from data_partition.shards.shards import read_encoded
from ddm_core.artifacts import MANIFEST, ArtifactError, CorruptArtifact, list_files, read_manifest, to_jsonable, verify
from experts.training.checkpoint import DamagedCheckpoint, restore_checkpoint, save_checkpoint
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.results import find_pipeline, load_score_rows
from orchestrator.run.backend import Job
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.worker import execute
from tests.data_partition.conftest import write_samples
from tests.experts.training.test_checkpoint import create_state, create_trained_state
from tests.laws.conftest import run_tiny, tiny_config

KINDS = (
    "dataset",
    "codec",
    "latents",
    "features",
    "partition",
    "expert",
    "router",
    "reference",
    "ensemble",
    "score",
    "monolith",
)


def find_stage(run: Path, kind: str) -> Stage:
    return next(stage for stage in build_graph(tiny_config(run)) if stage.kind == kind)


def flips(data: bytes, draws: random.Random, *, sampled: int = 0) -> Iterator[bytes]:
    """Yield the data with one flipped bit: in each byte, or in `sampled` bytes of each region of a large file."""
    size = len(data)
    regions = [range(min(64, size)), range(min(64, size), max(size - 64, 0)), range(max(size - 64, 0), size)]
    offsets = {offset for region in regions for offset in draws.sample(region, min(sampled, len(region)))}
    for offset in sorted(offsets) if sampled else range(size):
        yield data[:offset] + bytes([data[offset] ^ 1 << draws.randrange(8)]) + data[offset + 1 :]


def cuts(data: bytes) -> set[bytes]:
    """Return the data without their end, at several lengths."""
    return {data[:size] for size in (0, 1, len(data) // 2, len(data) - 1) if size < len(data)}


def undetected(
    path: Path, damaged: Iterator[bytes], read: Callable[[], object], expected: type[Exception]
) -> list[str]:
    """Return the damages of the file that `read` does not report, or reports without the file's name."""
    original, missed = path.read_bytes(), []
    for data in damaged:
        path.write_bytes(data)
        try:
            read()
        except expected as error:
            if path.name not in str(error):
                missed.append(f"not named: {error}")
        else:
            missed.append(f"not seen: {len(data)} bytes")
    path.write_bytes(original)
    return missed


def every_damage(data: bytes, seed: int, *, sampled: int = 0) -> Iterator[bytes]:
    yield from flips(data, random.Random(seed), sampled=sampled)
    yield from cuts(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["features", "expert"])
def test_damaged_manifest_is_detected(tiny_run, tmp_path, kind):
    manifest = Path(shutil.copy(RunFolder(tiny_run).artifact(find_stage(tiny_run, kind)) / MANIFEST, tmp_path))
    damaged = every_damage(manifest.read_bytes(), 0)
    assert not undetected(manifest, damaged, lambda: read_manifest(tmp_path), ArtifactError)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_artifact_file_is_detected(own_run, kind):
    folder = RunFolder(own_run).artifact(find_stage(own_run, kind))
    for number, path in enumerate([folder / MANIFEST, *list_files(folder)]):
        damaged = every_damage(path.read_bytes(), number, sampled=6)
        assert not undetected(path, damaged, lambda: verify(folder), ArtifactError), path


def job(run: RunFolder, stage: Stage, out: Path, attempt: int = 1) -> Job:
    """Return a job that repeats the stage with the run's artifacts, into another folder."""
    (out / "work" / stage.name / f"attempt_{attempt}").mkdir(parents=True, exist_ok=True)
    return Job(
        stage=stage.name,
        kind=stage.kind,
        config=to_jsonable(stage.config),
        inputs={role: str(run.input_folder(source)) for role, source in stage.inputs.items()},
        input_fingerprints=stage.input_fingerprints,
        artifact=str(out / stage.folder_name),
        scratch=str(out / "work" / stage.name / "state"),
        attempt=attempt,
        stop_files=(),
    )


@pytest.mark.slow
def test_stage_with_damaged_input_fails(own_run, tmp_path):
    run, draws, tried = RunFolder(own_run), random.Random(0), 0
    for stage in build_graph(tiny_config(own_run)):
        for source in stage.inputs.values():
            path = draws.choice(list_files(run.input_folder(source)))
            original = path.read_bytes()
            path.write_bytes(next(flips(original, draws, sampled=1)))
            started, outcome = time.process_time(), execute(job(run, stage, tmp_path / "out"))
            assert (outcome.state, outcome.transient) == ("failed", False), (stage.name, path)
            assert outcome.error.startswith("CorruptArtifact: ") and path.name in outcome.error
            assert not (tmp_path / "out" / stage.folder_name).exists() and time.process_time() - started < 5
            path.write_bytes(original)
            tried += 1
    assert tried > 25


@pytest.mark.slow
def test_damaged_scores_and_weights_are_not_used(own_run):
    run, draws = RunFolder(own_run), random.Random(0)
    graph = build_graph(tiny_config(own_run))
    weights = run.artifact(find_stage(own_run, "ensemble")) / "expert_0" / "diffusion_pytorch_model.safetensors"
    scores = run.artifact(find_stage(own_run, "score")) / "scores.json"
    for path, read in (
        (weights, lambda: find_pipeline(run, monolith=False)),
        (scores, lambda: load_score_rows(run, graph)),
    ):
        assert not undetected(path, flips(path.read_bytes(), draws, sampled=8), read, CorruptArtifact)


@pytest.mark.parametrize("name", ["shard-00000.tar", "index.json"])
def test_damaged_shards_are_detected_without_manifest(tmp_path, name):
    """An island, and `python -m experts`, have shards without a manifest."""
    write_samples(tmp_path, 3)
    data = (tmp_path / name).read_bytes()
    damaged = every_damage(data, 0, sampled=0 if name == "index.json" else 400)
    expected = "not a folder of shards" if name == "index.json" else "shard-00000"
    for each in damaged:
        (tmp_path / name).write_bytes(each)
        with pytest.raises(ShardError, match=expected):
            list(read_encoded(tmp_path))


def test_changed_class_in_shard_is_detected(tmp_path):
    """A changed digit leaves a valid tar, and gives the training a wrong class."""
    write_samples(tmp_path, 8)
    path = tmp_path / "shard-00001.tar"
    data = path.read_bytes()
    offset = data.index(b"1", data.index(b"sample-00004.cls") + 512)
    path.write_bytes(data[:offset] + b"0" + data[offset + 1 :])
    with pytest.raises(ShardError, match="shard-00001.tar is truncated or corrupt"):
        list(read_encoded(tmp_path))


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_damaged_checkpoint_is_detected(tmp_path, name):
    save_checkpoint(tmp_path, create_trained_state())
    checkpoint, renamed, state = tmp_path / "step-00000003", tmp_path / "damaged-step-00000003", create_state()
    data = (checkpoint / name).read_bytes()
    for each in every_damage(data, 0, sampled=0 if name == "state.json" else 100):
        (checkpoint / name).write_bytes(each)
        with pytest.raises(DamagedCheckpoint, match=name):
            restore_checkpoint(tmp_path, state)
        renamed.rename(checkpoint)
    assert state.step == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_run_with_damaged_checkpoint_restarts_training(tiny_run, own_run, name):
    run = RunFolder(own_run)
    stage = find_stage(own_run, "expert")
    for pattern in (stage.folder_name, "ensemble-*", "score_sticky-*"):
        for folder in run.root.glob(f"artifacts/{pattern}"):
            shutil.rmtree(folder)
    interrupted = job(run, stage, own_run.with_name("interrupted"))
    steps = iter(range(5))
    assert execute(interrupted, lambda: next(steps, None) is None).state == "preempted"
    shutil.copytree(interrupted.scratch, run.scratch(stage))
    (checkpoint,) = run.scratch(stage).glob("checkpoints/step-*")
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(next(flips(data, random.Random(1), sampled=1)))

    run_tiny(own_run)

    events = [
        event for event in run.read_events() if event.get("stage") == stage.name and "DamagedCheckpoint" in str(event)
    ]
    assert [event["event"] for event in events] == ["failed"] and "restart from step 0" in events[0]["error"]
    for path in run.root.glob("artifacts/*"):
        assert read_manifest(path).checksums == read_manifest(tiny_run / "artifacts" / path.name).checksums
