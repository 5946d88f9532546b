"""An expert is validated at its first checkpoint and planned ones, which neither changes nor fails its training."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_partition.features.efficientnet import EfficientNetFeatures
from ddm_core.artifacts import Preempted, Workspace
from ensemble.config import ValidationConfig
from ensemble.evaluation import validation
from ensemble.evaluation.feature_space import scale_features
from ensemble.evaluation.metrics import kernel_distance
from ensemble.evaluation.validation import COUNT, validation_steps
from ensemble.sampling.images import to_bytes
from experts.config import TrainingConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.errors import ConfigError
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.run_training import run_expert
from orchestrator.pipeline.stage import FIRST_SAMPLES, STEP_SAMPLES, VALIDATION
from orchestrator.run.run_folder import RunFolder
from tests.laws.conftest import TINY

DEFAULT = ValidationConfig()


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

    def train(name, checkpoint_every, kind=Workspace, *, config=DEFAULT, has_room=True):
        steps = 3 * COUNT * DEFAULT.steps
        training = replace(stage.config.expert.training, steps=steps, batch_size=12, checkpoint_every=checkpoint_every)
        stage_config = replace(stage.config, expert=replace(stage.config.expert, training=training), validation=config)
        workspace, out = kind(tmp_path / name / "scratch", tmp_path / name / "attempt"), tmp_path / name / "out"
        for folder in (workspace.scratch, workspace.attempt, out):
            folder.mkdir(parents=True, exist_ok=True)
        picture = workspace.attempt / FIRST_SAMPLES
        if not has_room:
            picture.mkdir()
        assert run_expert(stage_config, inputs, out, workspace) > 0
        return picture, {path.name: path.read_bytes() for path in out.iterdir()}

    return train


def pictures_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("samples-*.png")}


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


def test_process_beside_the_training_draws_the_same(train):
    asked = ValidationConfig(every=300, prompts=("0", "1", "1", "0"), guidance_scale=2)
    inside, artifact = train("inside", 100, config=asked)
    beside, same_artifact = train("beside", 100, config=replace(asked, beside=True, device="cpu"))
    assert artifact == same_artifact
    drawn, drawn_beside = pictures_of(inside.parent), pictures_of(beside.parent)
    assert list(drawn) and set(drawn) == {STEP_SAMPLES.format(step) for step in (100, 300, 480)}
    assert Image.open(inside).size == (2 * 8 + 1, 2 * 8 + 1)
    assert drawn_beside.keys() <= drawn.keys() and STEP_SAMPLES.format(480) in drawn_beside
    assert all(drawn[name] == picture for name, picture in drawn_beside.items())
    assert beside.is_file()


def test_failed_process_is_named_and_fails_nothing(train, caplog, monkeypatch):
    monkeypatch.setattr("orchestrator.pipeline.validation.TASK", "other.json")
    with caplog.at_level(logging.WARNING):
        picture, artifact = train("broken", 300, config=ValidationConfig(beside=True))
    assert artifact and not picture.exists()
    assert "task.json" in caplog.text


def test_distance_is_that_of_samples_and_held_out_images(train, monkeypatch):
    compared = []
    monkeypatch.setattr(
        validation, "kernel_distance", lambda *features: compared.append(features) or kernel_distance(*features)
    )
    sampled = []
    sample = validation.sample
    monkeypatch.setattr(validation, "sample", lambda *inputs: sampled.append(sample(*inputs)) or sampled[-1])
    picture, _ = train("distance", 300, config=ValidationConfig(every=300, kid_samples=12))
    rows = [json.loads(line) for line in (picture.parent / VALIDATION).read_text().splitlines()]
    assert [row["step"] for row in rows] == [300, 480]
    assert [(row["kid"], row["kid_std"]) for row in rows] == [kernel_distance(*features) for features in compared]
    features = EfficientNetFeatures.load(Path())
    drawn = scale_features(features(to_bytes(sampled[-1].images))).astype(np.float64)
    assert np.array_equal(drawn, compared[-1][0]) and 2 <= len(drawn) <= 12


def test_pictures_cost_a_hundredth_of_the_training():
    calls = COUNT * DEFAULT.steps * 100 // 3
    assert validation_steps(DEFAULT, TrainingConfig(steps=calls // 10, batch_size=10)) == ()
    assert len(validation_steps(DEFAULT, TrainingConfig(steps=calls // 10 + 1, batch_size=10))) == 1
    many = TrainingConfig(steps=1050, batch_size=1000, checkpoint_every=100)
    assert validation_steps(DEFAULT, many) == (100, 300, 500, 700, 900, 1050)
    assert validation_steps(DEFAULT, replace(many, checkpoint_every=2000)) == (1050,)


def test_chosen_steps_are_the_next_checkpoints():
    training = TrainingConfig(steps=1050, batch_size=1, checkpoint_every=100)
    assert validation_steps(ValidationConfig(every=250), training) == (300, 500, 800, 1000, 1050)
    assert validation_steps(ValidationConfig(every=9999), training) == (1050,)


def test_classes_may_be_numbers():
    config = parse_config(compose([*TINY, "validation.prompts=[1,a boot]", "data.labels=true"]))
    assert config.validation.prompts == ("1", "a boot")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("validation.kid_samples=100",), "needs validation.every"),
        (("validation.device=cpu",), "set validation.beside=true"),
        (("validation.prompts=[a shoe]", "data.labels=false"), "need classes or captions"),
        (
            ("validation.every=10", "validation.kid_samples=8", "expert.training.held_out_every=null"),
            "needs held-out samples",
        ),
    ],
)
def test_validation_that_cannot_be_is_refused(overrides, message):
    with pytest.raises((ConfigError, ValidationError), match=message.replace("[", r"\[")):
        parse_config(compose([*TINY, *overrides]))
