"""`data.engine=ray` on a real Ray cluster: the bytes of `data.engine=local`, also after kills; errors and stops."""

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray import cloudpickle

from data_partition.datasets.duplicates import REPEATED
from ddm_core.artifacts import list_files, read_json
from ddm_core.engine import LocalEngine, row_ranges
from ddm_core.files.checksums import checksum
from orchestrator.backends.ray_cluster import RayCluster
from orchestrator.backends.ray_data import RayEngine
from orchestrator.backends.ray_tasks import RayBackend
from orchestrator.config.compute import ComputeConfig, ResourcesConfig
from orchestrator.config.stage_kinds import ENGINE_KINDS
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
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
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
        resources=ResourcesConfig(workers=2 if engine == "ray" and kind in ENGINE_KINDS else 1),
        engine=engine if kind in ENGINE_KINDS else "local",
    )
    attempt_folder(made).mkdir(parents=True)
    return made


FEATURES = {"dataset": "dataset"}
LATENTS = {"dataset": "dataset", "codec": "codec"}
PARTITION = {"dataset": "dataset", "features": "features", "latents": "latents"}


def stages(folder: Path) -> list[tuple[str, dict, dict[str, str]]]:
    """Write pictures, two of them alike and one unreadable, and return stages that read them."""
    draws = np.random.default_rng(0)
    for number in range(300):
        name = folder / "pictures" / f"{number % 2}" / f"{number:03d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (7, 7, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(name)
        name.with_suffix(".txt").write_text(f"picture number {number}")
    shutil.copyfile(folder / "pictures" / "0" / "000.png", folder / "pictures" / "1" / "copy.png")
    (folder / "pictures" / "1" / "no.png").write_bytes(b"no picture")
    data = {"source": "image_folder", "path": str(folder / "pictures"), "image_size": 24, "channels": 3}
    data |= {"fit": "crop", "shard_samples": 50, "captions": True, "duplicates": "remove"}
    return [
        ("dataset", data, {}),
        ("codec", {"kind": "pca"}, {"shards": "dataset/train"}),
        ("features", {"features": "random_conv", "batch_size": 48}, FEATURES),
        ("latents", {"text": {"kind": "minilm"}, "flip": True}, LATENTS),
        ("partition", {"num_experts": 3, "features": "random_conv"}, PARTITION),
    ]


@pytest.mark.integration
def test_both_engines_write_the_same_artifacts(tmp_path):
    backend, pipeline = RayBackend(ComputeConfig(cpus=2)), stages(tmp_path)
    try:
        for engine in ("local", "ray"):
            for kind, config, inputs in pipeline:
                backend.submit(job(tmp_path, kind, config, inputs, engine))
                while not (outcomes := backend.poll(1.0)):
                    pass
                assert [(outcome.state, outcome.error) for outcome in outcomes] == [("finished", "")], kind
    finally:
        backend.close()
    contents = [
        {
            str(path.relative_to(tmp_path / engine)): checksum(path)
            for kind, _, _ in pipeline
            for path in list_files(tmp_path / engine / kind)
            if path.name != "manifest.json"
        }
        for engine in ("local", "ray")
    ]
    assert len(contents[0]) > 50 and contents[0] == contents[1]
    assert read_json(tmp_path / "ray" / "dataset" / "dataset.json")["skipped_counts"].keys() >= {REPEATED}


def test_ranges_are_cut_at_multiples():
    assert row_ranges(3, 11, 4) == [(3, 4), (4, 8), (8, 11)]
    assert row_ranges(4, 8, 4) == [(4, 8)]
    assert row_ranges(8, 8, 4) == []
