"""Any ensemble's folder is an input of every command: with an expert removed, or compressed already."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ensemble.compression.measurement import CompressionReport
from ensemble.pipeline import EnsemblePipeline
from orchestrator.cli.app import app
from orchestrator.cli.compress import compress_run, describe_compression, start_from, with_compression
from orchestrator.cli.membership import BaseEnsemble, write_without_experts
from orchestrator.pipeline.graph import FROM_ENSEMBLE
from orchestrator.reporting.results import current_graph, load_score_rows
from orchestrator.run.run_folder import RunFolder


def compress(run, ensemble, *overrides):
    """Return the folder of the compressed ensemble."""
    config = start_from(run, with_compression(run.load_config(), overrides), ensemble)
    config = compress_run(run, config, Console(file=io.StringIO()))
    return run.root / describe_compression(run, config).splitlines()[0]


def ddm(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.integration
def test_changed_ensembles_are_inputs_of_every_command(own_run, tmp_path):
    run = RunFolder(own_run)
    removed = write_without_experts(BaseEnsemble.open(run, None), [1], tmp_path / "removed")
    small = compress(run, removed, "prune=ecodiff", "prune.criterion=magnitude")
    assert list(EnsemblePipeline.from_pretrained(small).ensemble.experts) == [0]
    names = [row.name for row in load_score_rows(run, current_graph(run, run.load_config()))]
    assert {FROM_ENSEMBLE, "ecodiff"} <= set(names)

    smaller = compress(run, small, "quantize=int8_weight_only", "quantize.min_elements=16")
    assert CompressionReport.read(smaller / "compression.json").stages == ("ecodiff", "int8_weight_only")
    for folder in (removed, smaller):
        assert "audit.json" in ddm("audit", own_run, "--ensemble", folder)
        assert "classify.json" in ddm("classify", own_run, "--images", 4, "--draws", 1, "--ensemble", folder)
    assert f"{FROM_ENSEMBLE}_full" in ddm("evaluate", own_run, "--selection", "full", "--ensemble", removed)
    assert run.load_config().from_ensemble and not start_from(run, run.load_config(), None).from_ensemble
