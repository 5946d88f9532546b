"""A complete run of minimal size, shared by all tests that need real artifacts."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.testbed import tiny_run
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline

TINY = (*tiny_run.TINY, "scores.spaces=[pixels]")


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
