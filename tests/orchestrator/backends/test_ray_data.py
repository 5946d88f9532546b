"""`data.engine=ray` on a real Ray cluster: the bytes of `data.engine=local`, also after kills; errors and stops."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from ddm_core.artifacts import checksum, list_files
from ddm_core.engine import LocalEngine, row_ranges
from orchestrator.backends.ray_cluster import RayCluster
from orchestrator.backends.ray_data import RayEngine
from orchestrator.backends.ray_tasks import RayBackend
from orchestrator.config.compute import ComputeConfig, ResourcesConfig
from orchestrator.run.backend import Job, attempt_folder

ENGINE = RayEngine(ResourcesConfig(workers=2))


@pytest.fixture
def cluster():
    connection = RayCluster(ComputeConfig(cpus=2))
    yield connection
    connection.close()


def start_numbering(folder: Path):
    """Yield three numbers a piece; the process of the piece `7` dies at its second number, once."""

    def number(piece: int):
        for part in range(3):
            if (piece, part) == (7, 1) and not (folder / "died").exists():
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if piece == 30:
                raise ValueError("piece 30 is damaged")
            yield piece, part, bytes(10_000 * (piece + 1))

    return number


@pytest.mark.integration
def test_results_keep_their_order_when_a_worker_dies(cluster, tmp_path):

    start = partial(start_numbering, tmp_path)
    found = list(ENGINE.map(start, range(20)))
    assert (tmp_path / "died").exists()
    assert found == list(LocalEngine().map(start, range(20)))
    with pytest.raises(ValueError, match="piece 30 is damaged"):
        list(ENGINE.map(start, range(25, 40)))
    stopped = ENGINE.map(start, range(30))
    next(stopped)
    stopped.close()
    assert list(ENGINE.map(start, range(2))) == found[:6], "a closed plan leaves its processes to the next one"
    assert list(ENGINE.map(start, [])) == []


def job(folder: Path, kind: str, config: dict, inputs: dict[str, str], engine: str) -> Job:
    place = folder / engine
    made = Job(
        stage=kind,
        kind=kind,
        config=config,
        inputs={role: str(place / name) for role, name in inputs.items()},
        input_fingerprints={},
        artifact=str(place / kind),
        scratch=str(place / f"{kind}_work" / "state"),
        attempt=1,
        stop_files=(),
        resources=ResourcesConfig(workers=2 if engine == "ray" and kind in ("features", "latents", "partition") else 1),
        engine=engine if kind in ("features", "latents", "partition") else "local",
    )
    attempt_folder(made).mkdir(parents=True)
    return made


STAGES = [
    ("dataset", {"source": "fashion", "limit": 600, "image_size": 28, "shard_samples": 100, "captions": True}, {}),
    ("codec", {"kind": "pca"}, {"shards": "dataset/train"}),
    ("features", {"features": "random_conv", "batch_size": 48}, {"dataset": "dataset"}),
    ("latents", {"text": {"kind": "minilm"}, "flip": True}, {"dataset": "dataset", "codec": "codec"}),
    (
        "partition",
        {"num_experts": 3, "features": "random_conv"},
        {"dataset": "dataset", "features": "features", "latents": "latents"},
    ),
]


@pytest.mark.integration
def test_both_engines_write_the_same_artifacts(tmp_path):
    backend = RayBackend(ComputeConfig(cpus=2))
    try:
        for engine in ("local", "ray"):
            for kind, config, inputs in STAGES:
                backend.submit(job(tmp_path, kind, config, inputs, engine))
                while not (outcomes := backend.poll(1.0)):
                    pass
                assert [(outcome.state, outcome.error) for outcome in outcomes] == [("finished", "")], kind
    finally:
        backend.close()
    contents = [
        {
            str(path.relative_to(tmp_path / engine)): checksum(path)
            for kind, _, _ in STAGES
            for path in list_files(tmp_path / engine / kind)
            if path.name != "manifest.json"
        }
        for engine in ("local", "ray")
    ]
    assert len(contents[0]) > 50 and contents[0] == contents[1]


def test_ranges_are_cut_at_multiples():
    assert row_ranges(3, 11, 4) == [(3, 4), (4, 8), (8, 11)]
    assert row_ranges(4, 8, 4) == [(4, 8)]
    assert row_ranges(8, 8, 4) == []
