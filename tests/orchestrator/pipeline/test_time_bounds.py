"""A run whose experts are networks of intervals of t, from its data to samples."""

import io

import pytest
from rich.console import Console

from benchmarks.testbed.tiny_run import TINY
from ddm_core.artifacts import read_json
from experts.time_split import TimeSplitExpert
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.run_folder import RunFolder


@pytest.mark.integration
def test_run_with_time_bounds_is_scored_beside_its_monolith(tmp_path):
    overrides = ["expert.time_bounds=[0.25,0.75]", "expert.training.batch_size=12", "quantize=int8_weight_only"]
    config = parse_config(
        compose([*TINY, *overrides, "scores.spaces=[pixels]", "quantize.min_elements=16", f"folder={tmp_path}"])
    )
    assert not run_pipeline(config, Console(file=io.StringIO())).stopped
    run, stages = RunFolder(tmp_path), {stage.name: stage for stage in build_graph(config)}
    expert = TimeSplitExpert.load(run.artifact(stages["expert_0"]))
    assert [len(expert.experts), expert.bounds] == [3, (0.25, 0.75)]
    for name in ("score_sticky", "score_monolith", "score_int8_weight_only"):
        assert read_json(run.artifact(stages[name]) / "scores.json")["held_out_loss"] > 0
