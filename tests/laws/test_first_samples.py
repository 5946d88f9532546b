"""An expert is drawn from at its first checkpoint and some later ones, which neither changes nor fails its training."""

from dataclasses import replace

import pytest
from PIL import Image

from ddm_core.artifacts import Preempted, Workspace
from ensemble.sampling.first_samples import COUNT, STEPS, picture_steps
from experts.config import TrainingConfig
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.run_training import run_expert
from orchestrator.pipeline.stage import FIRST_SAMPLES, STEP_SAMPLES
from orchestrator.run.run_folder import RunFolder


class StoppedByPicture(Workspace):
    """Requests a stop as soon as the first samples are there."""

    def stop_requested(self):
        return (self.attempt / FIRST_SAMPLES).is_file()


@pytest.fixture
def train(tiny_run, tmp_path):
    """Return a function that trains an expert in folders of this name, and returns its attempt's and its artifact's."""
    run = RunFolder(tiny_run)
    stage = next(stage for stage in build_graph(run.load_config()) if stage.name == "expert_0")
    inputs = {role: run.artifact(source.stage) / source.part for role, source in stage.inputs.items()}

    def train(name, checkpoint_every, kind=Workspace, *, has_room=True):
        training = replace(
            stage.config.expert.training, steps=3 * COUNT * STEPS, batch_size=12, checkpoint_every=checkpoint_every
        )
        config = replace(stage.config, expert=replace(stage.config.expert, training=training))
        workspace, out = kind(tmp_path / name / "scratch", tmp_path / name / "attempt"), tmp_path / name / "out"
        for folder in (workspace.scratch, workspace.attempt, out):
            folder.mkdir(parents=True, exist_ok=True)
        picture = workspace.attempt / FIRST_SAMPLES
        if not has_room:
            picture.mkdir()
        assert run_expert(config, inputs, out, workspace) > 0
        return picture, {path.name: path.read_bytes() for path in out.iterdir()}

    return train


def test_expert_is_drawn_from_at_its_first_checkpoint(train, tmp_path):
    with pytest.raises(Preempted, match="stopped at step 200 of"):
        train("first", 200, StoppedByPicture)
    picture, continued = train("first", 200)
    assert Image.open(picture).size == (4 * 8 + 3, 4 * 8 + 3)
    by_step = sorted(path.name for path in picture.parent.glob("samples-*.png"))
    assert by_step == [STEP_SAMPLES.format(200), STEP_SAMPLES.format(400)]  # one for each start of the worker
    blocked, without_picture = train("second", 200, has_room=False)
    assert blocked.is_dir()
    assert continued == without_picture


def test_expert_without_a_checkpoint_is_drawn_from_at_its_end(train):
    picture, _ = train("only", 10_000)
    assert picture.is_file()


def test_pictures_cost_a_hundredth_of_the_training():
    calls = COUNT * STEPS * 100 // 3
    assert picture_steps(TrainingConfig(steps=calls // 10, batch_size=10)) == ()
    assert len(picture_steps(TrainingConfig(steps=calls // 10 + 1, batch_size=10))) == 1
    assert picture_steps(TrainingConfig(steps=1050, batch_size=1000, checkpoint_every=100)) == (
        100,
        300,
        500,
        700,
        900,
        1050,
    )
    assert picture_steps(TrainingConfig(steps=1050, batch_size=1000, checkpoint_every=2000)) == (1050,)
