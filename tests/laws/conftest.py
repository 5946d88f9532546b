"""A complete run of minimal size, shared by all tests that need real artifacts."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline

TINY = (
    "experiment=digits",
    "compute=inline",
    "compute.backoff_s=0",
    "wandb.mode=disabled",
    "data.limit=160",
    "data.shard_samples=64",
    "partition.num_fine=8",
    "partition.components=4",
    "codec.components=4",
    "expert.training.steps=6",
    "expert.training.batch_size=8",
    "expert.training.checkpoint_every=2",
    "expert.network.width=8",
    "expert.network.depth=1",
    "router.training.steps=4",
    "router.width=8",
    "router.depth=1",
    "scores.num_samples=16",
    "scores.components=4",
    "scores.spaces=[pixels]",
    "ensemble.steps=2",
)


def tiny_config(folder: Path) -> RunConfig:
    return parse_config(compose([*TINY, f"folder={folder}"]))


def run_tiny(folder: Path) -> None:
    """Run, or resume, the tiny run in this folder."""
    run_pipeline(tiny_config(folder), Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run, which tests must not change; see `own_run`."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    run_tiny(folder)
    return folder


@pytest.fixture
def own_run(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, which a test may change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))
