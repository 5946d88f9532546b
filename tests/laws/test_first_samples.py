"""A trained expert is drawn from at once, which neither delays nor fails its training."""

from dataclasses import replace

import pytest
from PIL import Image

from ddm_core.artifacts import Workspace
from ensemble.sampling.first_samples import COUNT, STEPS, are_quick
from experts.config import TrainingConfig
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.run_training import run_expert
from orchestrator.pipeline.stage import FIRST_SAMPLES
from orchestrator.run.run_folder import RunFolder


@pytest.mark.parametrize("has_room", [True, False])
def test_expert_is_trained_with_and_without_its_picture(tiny_run, tmp_path, has_room):
    run = RunFolder(tiny_run)
    stage = next(stage for stage in build_graph(run.load_config()) if stage.name == "expert_0")
    inputs = {role: run.artifact(source.stage) / source.part for role, source in stage.inputs.items()}
    training = replace(stage.config.expert.training, steps=3 * COUNT * STEPS, batch_size=12)
    config = replace(stage.config, expert=replace(stage.config.expert, training=training))
    workspace = Workspace(tmp_path / "scratch", tmp_path / "attempt")
    for folder in (workspace.scratch, workspace.attempt, tmp_path / "out"):
        folder.mkdir()
    picture = workspace.attempt / FIRST_SAMPLES
    if not has_room:
        picture.mkdir()
    assert run_expert(config, inputs, tmp_path / "out", workspace) > 0
    assert picture.is_dir() if not has_room else Image.open(picture).size == (4 * 8 + 3, 4 * 8 + 3)


def test_short_trainings_are_not_drawn_from():
    calls = COUNT * STEPS * 100 // 3
    assert not are_quick(TrainingConfig(steps=calls // 10, batch_size=10))
    assert are_quick(TrainingConfig(steps=calls // 10 + 1, batch_size=10))
