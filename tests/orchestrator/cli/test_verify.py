"""`ddm verify`, and that a damaged ensemble is never sampled."""

import pytest
from typer.testing import CliRunner

from ddm_core.artifacts import CorruptArtifact, publish
from orchestrator.cli.app import app
from orchestrator.config.schema import RunConfig
from orchestrator.errors import RunFolderError
from orchestrator.reporting.results import verify_pipeline
from orchestrator.run.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.save_config(RunConfig())
    for name in ("ensemble-0123456789ab", "codec-0123456789ab"):

        def fill(folder):
            (folder / "model_index.json").write_text("{}")
            (folder / "weights").write_bytes(bytes(100))
            return 0.0

        publish(run.root / "artifacts" / name, fill, stage="s", config={}, inputs={})
    return run


def flip_byte(path, place=50):
    contents = bytearray(path.read_bytes())
    contents[place] ^= 1
    path.write_bytes(contents)


def test_intact_run_verifies(run):
    result = CliRunner().invoke(app, ["verify", str(run.root)])
    assert result.exit_code == 0 and "2 artifacts" in result.stdout


def test_damage_of_a_run_is_named_with_the_remedy(run):
    flip_byte(run.root / "artifacts" / "codec-0123456789ab" / "weights")
    result = CliRunner().invoke(app, ["verify", str(run.root)])
    assert isinstance(result.exception, RunFolderError) and "ddm resume" in str(result.exception)
    assert "weights" in result.stdout and "1 of 2" in str(result.exception)


def test_one_artifact_verifies_alone(run):
    assert CliRunner().invoke(app, ["verify", str(run.root / "artifacts" / "codec-0123456789ab")]).exit_code == 0


def test_damaged_ensemble_is_not_opened(run):
    folder = run.root / "artifacts" / "ensemble-0123456789ab"
    assert verify_pipeline(folder) == folder
    flip_byte(folder / "weights")
    with pytest.raises(CorruptArtifact, match="weights"):
        verify_pipeline(folder)


def test_folder_without_an_ensemble_is_named(tmp_path):
    with pytest.raises(RunFolderError, match="model_index"):
        verify_pipeline(tmp_path)
