"""Runs from tars of the user: with stored latents they have the bytes of a copy, without them they copy nothing."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.testbed.range_server import serve_ranges
from benchmarks.testbed.tiny_run import TINY
from ddm_core.artifacts import list_files, read_manifest, verify
from ensemble.pipeline import EnsemblePipeline
from experts.training.latent_dataset import LatentDataset
from experts.training.latents.folder import read_latents
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.run_folder import RunFolder
from tests.data_partition.shards.test_offset_index import SIDE, write_tars
from tests.data_partition.shards.test_stream_buckets import write_mixed_tars
from tests.orchestrator.pipeline.test_delivery import artifacts, check_partition, ddm
from tests.orchestrator.pipeline.test_latents import BUCKETS

SETTINGS = (
    *(setting for setting in TINY if setting != "data.limit=160"),
    *("data=webdataset", f"data.image_size={SIDE}", "data.channels=3", "data.fit=crop", "data.holdout=0.3"),
    *("scores.spaces=[pixels]", "partition.num_experts=2", "partition.num_fine=2", "baselines=[]"),
)


def run(folder: Path, tars: str, *settings: str) -> tuple[RunFolder, RunConfig]:
    config = parse_config(compose([*SETTINGS, f"data.path={tars}", f"folder={folder}", *settings]))
    run_pipeline(config, Console(file=io.StringIO()))
    return RunFolder(folder), config


@pytest.mark.slow
def test_streamed_runs(tmp_path):
    tars = f'"{write_tars(tmp_path / "tars", (40, 40))}"'
    copied, streamed = (run(tmp_path / mode, tars, f"data.mode={mode}") for mode in ("copy", "stream"))
    checksums = []
    for folder, config in (copied, streamed):
        stages = {stage.name: stage for stage in build_graph(config)}
        names = ("expert_0", "expert_1", "router", "score_sticky")
        checksums.append([read_manifest(folder.artifact(stages[name])).checksums for name in names])
    assert checksums[0] == checksums[1]
    pixels, config = run(tmp_path / "pixels", tars, "data.mode=stream", "codec=pixels")
    stages = {stage.name: stage for stage in build_graph(config)}
    assert read_manifest(pixels.artifact(stages["score_sticky"])).flops > 0
    for folder in (streamed[0], pixels):
        assert not list(folder.root.rglob("*.tar"))
    latents = [path for path in list_files(pixels.artifact(stages["partition"])) if path.name == "clean.bin"]
    assert len(latents) == 4
    assert sum(path.stat().st_size for path in latents) == 0


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of ranges: (its address, its behavior, its folder)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve_ranges(tmp_path / "tars") as (address, behavior):
        yield address, behavior, tmp_path / "tars"


@pytest.mark.slow
def test_a_streamed_run_with_buckets_has_the_latents_of_a_copy(tmp_path, server):
    address, behavior, folder = server
    pattern, latents = write_mixed_tars(folder, (45, 45)), []
    settings = [setting for setting in BUCKETS if "data.channels" not in setting and "data=" not in setting]
    for mode in ("copy", "stream"):
        config = parse_config(
            compose(
                [
                    *settings,
                    *("data=webdataset", "data.aspect_buckets=[24x16,16x24]", "data.image_size=16", "data.channels=3"),
                    *(f'data.path="{address}/{pattern}"', f"data.mode={mode}", f"folder={tmp_path / mode}"),
                    *("expert.network.channels=[8,16]", "expert.training.batch_size=8"),
                ]
            )
        )
        run_pipeline(config, Console(file=io.StringIO()))
        run, stages = RunFolder(tmp_path / mode), {stage.name: stage for stage in build_graph(config)}
        clusters = [read_latents(run.artifact(stages["partition"]) / "latents" / str(k)) for k in range(2)]
        latents.append(sort_latents(clusters))
        assert EnsemblePipeline.from_pretrained(run.artifact(stages["ensemble"]))([1], config.ensemble, size=(24, 16))
    assert not list((tmp_path / "stream").rglob("*.tar")) and behavior.requests
    assert latents[0] == latents[1] and len({shape for _, shape, _ in latents[0]}) == 3


def sort_latents(clusters: list[LatentDataset]) -> list[tuple[int, int, bytes]]:
    """Return hash, number of the shape and latent of every sample, sorted by the first."""
    return sorted(
        (int(sample_id), int(shape), clean.numpy().tobytes())
        for part in clusters
        for sample_id, shape, clean in zip(part.sample_id, part.bucket_id, part.clean, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["pca", pytest.param("pixels", marks=pytest.mark.integration)])
def test_a_streamed_delivery_joins_the_clusters(tmp_path, server, codec):
    address, _, folder = server
    write_tars(folder, (40, 40, 20))
    run, settings = RunFolder(tmp_path / "run"), (*SETTINGS, "data.mode=stream", "data.labels=true", "budget_minutes=0")
    path = f'data.path="{address}/{{0,1}}.tar"'
    code, output = ddm("run", *settings, path, f"codec={codec}", f"folder={run.root}")
    assert code == 0, output
    before = artifacts(run)
    code, output = ddm("extend", run.root, f"{address}/2.tar", "--steps", 4)
    assert code == 0, output
    after = artifacts(run)
    for place in after.values():
        verify(place)
    check_partition(before["partition"], after, "features", frozenset({0, 1}))
    assert not list(run.root.rglob("*.tar"))
    images = [after["partition"] / "latents" / str(k) / "images" for k in range(2)]
    assert [place.is_dir() for place in images] == [codec == "pixels"] * 2
