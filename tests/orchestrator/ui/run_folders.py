"""Small synthetic runs, and the page served for them on loopback."""

import contextlib
import socket
import threading
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI

from benchmarks.large_runs import build_run
from data_partition.shards.images import encode_png, tile_pixels
from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import publish, save_arrays, write_json
from ensemble.config import TRAJECTORIES
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.run_folder import RunFolder
from orchestrator.serving.app import create_app as create_service
from orchestrator.serving.backend import LocalBackend
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.sources import ModelSource
from orchestrator.ui.facts.catalog import RunCatalog
from orchestrator.ui.playground import Service
from orchestrator.ui.server import create_app
from orchestrator.ui.watcher import RunWatcher
from tests.ensemble.text_pipeline import assemble_text_pipeline
from tests.orchestrator.serving.test_service import CONFIG, SAMPLING

DISTANCES = {"fd": 1.0, "fd_std": 0.1, "kid": 0.01, "kid_std": 0.002, "precision": 0.5, "recall": 0.6}
SPACE = DISTANCES | {"floor": DISTANCES, "codec": DISTANCES}


def make_run(folder: Path, experts: int = 4, rows: int = 60, seeds: range = range(12)) -> RunFolder:
    """Return a run in which one expert in ten and the router still run, with the samples of one score."""
    run = build_run(folder, experts, rows)
    stage = next(stage for stage in build_graph(run.load_config()) if stage.kind == "score")

    def fill(out: Path) -> float:
        images = np.random.default_rng(seeds.start).integers(0, 256, (len(seeds), 8, 8, 1), dtype=np.uint8)
        np.save(out / "images.npy", images)
        np.save(out / "seeds.npy", np.array(seeds))
        (out / "grid.png").write_bytes(encode_png(tile_pixels(images, columns=4)))
        write_json(out / "scores.json", scores())
        save_arrays(out / TRAJECTORIES, trajectories(images[:3], experts, seeds))
        return 0.0

    publish(run.artifact(stage), fill, stage=stage.name, config=stage.config, inputs=stage.input_fingerprints)
    return run


def add_data(run: RunFolder, size: int = 16) -> list[str]:
    """Write the data set, its features in two groups, and the held-out conditions; return the keys of the images."""
    stages = {stage.name: run.artifact(stage) for stage in build_graph(run.load_config())}
    random, keys = np.random.default_rng(0), [f"image-{number}" for number in range(60)]
    with ShardWriter(stages["dataset"] / "train", samples_per_shard=40) as writer:
        for number, key in enumerate(keys):
            writer.add(Sample(key=key, image=np.full((size, size, 3), 4 * number, np.uint8)))
        writer.close()
    write_json(stages["dataset"] / "dataset.json", {"class_names": ["Boot", "<Bag>"]})
    features = random.normal(size=(60, 5)) + np.where(np.arange(60) < 20, 50.0, 0.0)[:, None]
    np.save(stages["features"] / "features.npy", features.astype(np.float32))
    (stages["features"] / "keys.txt").write_text("".join(f"{key}\n" for key in keys))
    rows = "".join(f"{key},{int(number >= 20)}\n" for number, key in enumerate(keys))
    (stages["partition"] / "assignment.csv").write_text(f"key,cluster_id\n{rows}")
    np.save(stages["reference"] / "labels.npy", np.array([0, 1, 1, -1, 0]))
    write_json(stages["reference"] / "captions.json", {"held_out": ["a boot", "", "a bag", "", ""]})
    return keys


def trajectories(images: np.ndarray, experts: int, seeds: range) -> dict:
    """Return three trajectories of four steps: expert `row` draws row `row`, and the router doubts it at first."""
    gates = np.eye(experts, dtype=np.float32)[:3, None].repeat(4, axis=1)[: len(images)]
    doubt = np.float32([0.6, 0.3, 0.1, 0.0])[:, None]
    return {
        "seeds": np.array(seeds[: len(gates)], np.int64),
        "times": np.float32([1.0, 0.75, 0.5, 0.25]),
        "shown": np.array([0, 3]),
        "gates": gates,
        "posterior": (1 - doubt) * gates + doubt / experts,
        "frames": np.stack([images // 4, images // 2, images], axis=1)[: len(gates)],
    }


def scores() -> dict:
    return {
        "num_samples": 256,
        "held_out": 600,
        "selection": "sticky",
        "spaces": {"efficientnet_lite0": SPACE, "pixels": SPACE},
        "class_coverage": None,
        "class_tv": None,
        "class_tv_floor": None,
        "cluster_share_tv": 0.1,
        "cluster_share_tv_floor": 0.05,
        "copies": {"share": 0.02, "expected": 0.01, "p_value": 0.2},
        "calls_per_step": 1.0,
        "flops_per_image": 1.5e9,
        "text": None,
    }


@contextlib.contextmanager
def serve_app(app: FastAPI):
    """Yield the address of an application, served by a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


def serve_page(paths: list[Path], token: str = "", period_s: float = 0.05, service: Service | None = None):
    """Serve a page for these runs, as `serve_app` does."""
    return serve_app(create_app(RunCatalog(paths), token, watcher=RunWatcher(period_s), service=service))


@contextlib.contextmanager
def serve_images(root: Path):
    """Yield a service of a small text-to-image ensemble that wants a key."""
    assemble_text_pipeline(root)
    (root / "key").touch(mode=0o600)
    (root / "key").write_text("k" * 32)
    source = ModelSource(name="tiny", folder=root / "pipeline", sampling=SAMPLING)
    app = create_service(LocalBackend([source], CONFIG.batching), CONFIG, ApiKeys.read(root / "key"))
    with serve_app(app) as address:
        yield Service.open(address + "/v1", root / "key")


def key_of(run: RunFolder) -> str:
    return RunCatalog([run.root]).entries()[0].key
