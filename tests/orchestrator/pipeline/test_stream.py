"""Runs from tars of the user: with stored latents they have the bytes of a copy, without them they copy nothing."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.testbed.tiny_run import TINY
from ddm_core.artifacts import list_files, read_manifest
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.run_folder import RunFolder
from tests.data_partition.shards.test_offset_index import SIDE, write_tars

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
